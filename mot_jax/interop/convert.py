"""Models in and out: exports in safetensors, and the parameters of others' models by their names.

An export is a directory: the tensors, `config.json`, the tokenizer's file, and of the workdir `data.json` and
`companions.npy`. It is read wherever a workdir is, but cannot be trained on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mot_jax.config import Config, MixtureOfTokensConfig, ModelConfig, to_json
from mot_jax.data.text import open_tokenizer
from mot_jax.errors import RetryableError, UserError, error_words, nearest
from mot_jax.nn.transformer import block_places
from mot_jax.runs.restore import (
    EXPORTED_TOKENIZERS,
    check_data,
    load_run,
    load_run_config,
    parameter_kinds,
    tensor_faults,
)
from mot_jax.runs.state import fetch
from mot_jax.runs.tensor_files import INDEX, MODEL, SHARD_BYTES, Tensor, Tensors, open_tensors, write_tensors
from mot_jax.runtime import distributed
from mot_jax.runtime.paths import is_passing, make_directory, replace_file, user_path

DTYPES = ("float32", "bfloat16")
_COPIED = ("data.json", "companions.npy")
_FILES = ("config.json", "modes.json", MODEL, INDEX, *EXPORTED_TOKENIZERS, *_COPIED)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

Kinds = Mapping[str, jax.ShapeDtypeStruct]


# --- exports ----------------------------------------------------------------------------------------------------------


def export(
    workdir: epath.PathLike,
    output: epath.PathLike,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes the newest checkpoint of the run in `workdir`, or another export, to the directory `output`.

    dtype: of the tensors, one of DTYPES; None is as they are. shard_bytes: the most of a file with several tensors.
    Meanwhile the parameters lie on the mesh that is set. Of several processes each calls this, and process 0 writes.
    Returns lines for people. Raises UserError for bad input: an `output` that holds anything else, say, or that holds
    an export already, unless it is to `overwrite` it.
    """
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype = {dtype!r}: no such dtype{nearest(str(dtype), DTYPES)}")
    with distributed.together():
        config = load_run_config(workdir)
        check_data({"tokenizer": open_tokenizer(config).fingerprint}, config, workdir)
        source = user_path("workdir", workdir)
        folder = _open_output(output, overwrite, source)
    run = load_run(workdir)

    def read(name: str) -> np.ndarray:
        value = fetch(run.params[name])
        return value if dtype is None else value.astype(jnp.dtype(dtype))

    kinds = {name: jax.ShapeDtypeStruct(v.shape, jnp.dtype(dtype or v.dtype)) for name, v in run.params.items()}
    if not distributed.is_first():  # takes part in gathering
        for name in kinds:
            read(name)
        return []
    copies = {name: (source / name).read_bytes() for name in _COPIED if (source / name).exists()}
    return _write(folder, config, kinds, read, run.step, copies, shard_bytes)


def _open_output(output: epath.PathLike, overwrite: bool, source: epath.Path) -> epath.Path:
    """The directory, which may hold nothing, or an export to overwrite, but not the `source`."""
    folder = user_path("--output", output)
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in there if not _is_ours(name)]
    if foreign or (folder.exists() and not folder.is_dir()):
        what = f"holds {foreign[0]}, which is of no export" if foreign else "is a file"
        raise UserError(f"--output = {output}: {what}; try a new directory")
    if there and not overwrite:
        raise UserError(f"--output = {output}: holds an export already; try another directory, or --overwrite")
    if folder.resolve() in (source.resolve(), source.parent.resolve()):
        raise UserError(f"--output = {output}: is where the tensors come from; try another directory")
    if distributed.is_first():
        make_directory("--output", folder)
    return folder


def _is_ours(name: str) -> bool:
    return name.removesuffix(".new") in _FILES or bool(_SHARD.match(name))


def _write(
    folder: epath.Path,
    config: Config,
    kinds: Kinds,
    read: Callable[[str], np.ndarray],
    step: int,
    copies: dict[str, bytes],
    shard_bytes: int,
) -> list[str]:
    """Writes an export, whose mark is its config.json: removed at first, written last.

    Returns lines for people: warnings, and what was written.
    """
    lines: list[str] = []

    def checked(name: str) -> np.ndarray:
        value = read(name)
        bad = value.size - np.count_nonzero(np.isfinite(value))
        if bad:
            lines.append(f"warning: {name}: {bad} of {value.size} numbers are infinite or no numbers")
        return value

    tokenizer, name = config.data.tokenizer, f"tokenizer{PurePosixPath(config.data.tokenizer).suffix}"
    if name in EXPORTED_TOKENIZERS:
        copies = copies | {name: user_path("data.tokenizer", tokenizer).read_bytes()}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=name))
    try:
        (folder / "config.json").unlink(missing_ok=True)
        written = write_tensors(folder, kinds, checked, {"step": str(step)}, shard_bytes)
        for name, content in copies.items():
            replace_file(folder / name, content)
        for path in folder.iterdir():  # of an export that was there before
            if _is_ours(path.name) and path.name not in (*written, *copies):
                path.unlink()
        replace_file(folder / "config.json", to_json(config).encode())
    except OSError as error:
        words = error.strerror or error_words(error)
        fault = RetryableError if is_passing(error) else UserError
        raise fault(f"--output = {folder}: cannot be written to ({words}); try another") from error
    count = sum(math.prod(kind.shape) for kind in kinds.values())
    size = sum(math.prod(kind.shape) * kind.dtype.itemsize for kind in kinds.values())
    lines.append(f"{folder}: step {step}, {count:,} parameters in {len(kinds)} tensors, {size / 1e6:,.1f} MB")
    return lines


# --- imports ----------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """How one parameter, of a block or of the model, is made of one tensor of theirs.

    theirs, layout: its name and dimensions: `v` vocabulary, `s` positions, `d` model, `h` heads, `k` width of a head,
    `f` of a dense layer, `e` experts, `m` width of an expert, `3` query, key and value; those in parentheses are one.
    ours, order: the parameter's name, and the same dimensions in its own order. part: which of `3` it takes.
    """

    theirs: str
    layout: str
    ours: str
    order: str
    part: slice | int = slice(None)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(math.prod(sizes[d] for d in group) for group in self._groups())

    def apply(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The parameter's values."""
        names = "".join(self._groups())
        value = tensor.reshape([sizes[d] for d in names])
        value = value.transpose([names.index(d) for d in self.order])
        return value[tuple(self.part if d == "3" else slice(None) for d in self.order)]

    def _groups(self) -> list[str]:
        return [a.replace(" ", "") or b for a, b in re.findall(r"\((.*?)\)|(\w)", self.layout)]


class Names(NamedTuple):
    """Of somebody's model: the rules outside of blocks and in them, how a block's tensors begin, what else there is.

    wrappers: parts of names that training code adds, removed. buffers: what is no parameter.
    """

    title: str
    outside: tuple[Rule, ...]
    block: str
    inside: tuple[Rule, ...]
    wrappers: str
    buffers: str


def _experts(theirs: str) -> tuple[Rule, ...]:
    names = {"controller": ("controller", "de"), "lin1": ("w_in", "edm"), "lin2": ("w_out", "emd")}
    return tuple(Rule(f"{theirs}.{t}", order, f"feed_forward/{ours}", order) for t, (ours, order) in names.items())


_ATTENTION = "residual_attention.layer.attention"
_DENSE = "residual_feedforward.layer.feedforward.logging_ff"

NAMES = (
    Names(
        "the authors' PyTorch code (llm-random)",
        outside=(
            Rule("embedding_layer.layers.0.weight", "v d", "token_embedding", "vd"),
            Rule("embedding_layer.layers.1.layer.weight", "s d", "position_embedding", "sd"),
            Rule("head.weight", "v d", "head", "dv"),
        ),
        block="encoder.blocks.block_{}.block.",
        inside=(
            Rule("residual_attention.layer.pre_norm.weight", "d", "attention_norm/scale", "d"),
            Rule("residual_attention.layer.pre_norm.bias", "d", "attention_norm/bias", "d"),
            Rule(f"{_ATTENTION}.input_projection.weight", "(h3k) d", "attention/query", "3dhk", 0),
            Rule(f"{_ATTENTION}.input_projection.weight", "(h3k) d", "attention/key_value", "d3hk", slice(1, 3)),
            Rule(f"{_ATTENTION}.output_projection.weight", "d (hk)", "attention/out", "hkd"),
            Rule("residual_feedforward.layer.pre_norm.weight", "d", "feed_forward_norm/scale", "d"),
            Rule("residual_feedforward.layer.pre_norm.bias", "d", "feed_forward_norm/bias", "d"),
            Rule(f"{_DENSE}_pre_relu.weight", "f d", "feed_forward/kernel_in", "df"),
            Rule(f"{_DENSE}_pre_relu.bias", "f", "feed_forward/bias_in", "f"),
            Rule(f"{_DENSE}_post_relu.weight", "d f", "feed_forward/kernel_out", "fd"),
            Rule(f"{_DENSE}_post_relu.bias", "d", "feed_forward/bias_out", "d"),
            *_experts("residual_feedforward.layer.feedforward"),
        ),
        wrappers=r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.",
        buffers=r".*\.attention\.rope\.(sin|cos)",
    ),
    Names(
        "the Hugging Face port",
        outside=(
            Rule("wte.weight", "v d", "token_embedding", "vd"),
            Rule("wpe.weight", "s d", "position_embedding", "sd"),
            Rule("ln_f.weight", "d", "final_norm/scale", "d"),
            Rule("ln_f.bias", "d", "final_norm/bias", "d"),
            Rule("lm_head.weight", "v d", "head", "dv"),
        ),
        block="h.{}.",
        inside=(
            Rule("ln_1.weight", "d", "attention_norm/scale", "d"),
            Rule("ln_1.bias", "d", "attention_norm/bias", "d"),
            Rule("attn.c_attn.weight", "d (3hk)", "attention/query", "3dhk", 0),
            Rule("attn.c_attn.weight", "d (3hk)", "attention/key_value", "d3hk", slice(1, 3)),
            Rule("attn.c_attn.bias", "(3hk)", "attention/query_bias", "3hk", 0),
            Rule("attn.c_attn.bias", "(3hk)", "attention/key_value_bias", "3hk", slice(1, 3)),
            Rule("attn.c_proj.weight", "(hk) d", "attention/out", "hkd"),
            Rule("attn.c_proj.bias", "d", "attention/out_bias", "d"),
            Rule("ln_2.weight", "d", "feed_forward_norm/scale", "d"),
            Rule("ln_2.bias", "d", "feed_forward_norm/bias", "d"),
            *_experts("mlp"),
        ),
        wrappers=r"^transformer\.",
        buffers=r"h\.\d+\.attn\.(masked_)?bias",
    ),
)


def import_model(
    source: epath.PathLike, output: epath.PathLike, config: Config | None = None, overwrite: bool = False
) -> list[str]:
    """Makes an export of the tensors in `source`: a safetensors file, the index of several, or a directory with either.

    Their names say whose they are: ours, or one of NAMES. config: of the model; None is that beside our own tensors.
    Every tensor is used once and every parameter is filled, or a UserError has a line for each fault.
    Returns lines for people.
    """
    path = user_path("FILE", source)
    found = open_tensors(path)
    names = _names_of(found)
    if config is None:
        if names is not None:
            raise UserError(f"--config is missing: {path} is of {names.title}; try --config configs/v2.py:medium_32e")
        config = load_run_config(path if path.is_dir() else path.parent)
    tokenizer = open_tokenizer(config)
    kinds = parameter_kinds(config.model)
    if names is None:
        if faults := tensor_faults(found, kinds, path):
            raise UserError(*faults)
        read = {name: found.tensors[name].read for name in kinds}
    else:
        read = _plan(names, config.model, kinds, found, path)
    folder = _open_output(output, overwrite, path)
    step = int(found.metadata["step"]) if found.metadata.get("step", "").isdecimal() else 0
    copies = {"data.json": (json.dumps({"tokenizer": tokenizer.fingerprint}) + "\n").encode()}
    return _write(folder, config, kinds, lambda n: read[n]().astype(kinds[n].dtype), step, copies, SHARD_BYTES)


def _names_of(found: Tensors) -> Names | None:
    """Whose the tensors are; None is ours."""
    if "token_embedding" in found.tensors:
        return None
    for names in NAMES:
        if names.outside[0].theirs in (re.sub(names.wrappers, "", name) for name in found.tensors):
            return names
    known = ", ".join(f"{names.outside[0].theirs} of {names.title}" for names in NAMES)
    some = next(iter(found.tensors), "none")
    raise UserError(f"tensors: are of no model that is known (the first is {some}); known are {known}")


def _plan(
    names: Names, model: ModelConfig, kinds: Kinds, found: Tensors, path: epath.Path
) -> dict[str, Callable[[], np.ndarray]]:
    """By parameter, what makes its values. Raises UserError with a line for each fault."""
    theirs = {re.sub(names.wrappers, "", name): tensor for name, tensor in found.tensors.items()}
    faults = [] if len(theirs) == len(found.tensors) else [f"{path}: two tensors differ in {names.wrappers} alone"]
    for name in [name for name in theirs if re.fullmatch(names.buffers, name)]:
        del theirs[name]
    if model.num_kv_heads not in (None, model.num_heads):
        faults.append(f"model.num_kv_heads = {model.num_kv_heads}: {names.title} shares no keys and values; try None")
    outside, inside = ({rule.ours: rule for rule in rules} for rules in (names.outside, names.inside))
    embedding, head = outside["token_embedding"].theirs, outside["head"].theirs
    if model.tie_embeddings and head in theirs and embedding in theirs:
        if not np.array_equal(theirs.pop(head).read(), theirs[embedding].read()):
            faults.append(f"{path}: tensor {head}: is not {embedding}; try model.tie_embeddings = False")
    elif not model.tie_embeddings and head not in theirs:
        faults.append(f"{path}: tensor {head}: is missing; try model.tie_embeddings = True")
        kinds = {name: kind for name, kind in kinds.items() if name != "head"}

    sizes = _sizes(model)
    blocks: dict[str, list[str]] = {}
    for block, (place, _) in enumerate(block_places(model)):  # the blocks of a stack, in its order
        blocks.setdefault(place, []).append(names.block.format(block))
    wanted: dict[str, jax.ShapeDtypeStruct] = {}
    makers: dict[str, Callable[[], np.ndarray]] = {}
    for name, kind in kinds.items():
        place = next((place for place in blocks if name.startswith(place)), "")
        rule = (inside if place else outside).get(name.removeprefix(place))
        if rule is None:
            faults.append(f"{path}: {name}: {names.title} has nothing for this parameter")
            continue
        sources = [block + rule.theirs for block in blocks.get(place, [""])]
        wanted |= dict.fromkeys(sources, jax.ShapeDtypeStruct(rule.shape(sizes), kind.dtype))
        makers[name] = partial(_make, rule, sizes, theirs, sources, bool(place))
    if faults := faults + tensor_faults(Tensors(theirs, {}), wanted, path):
        raise UserError(*faults)
    return makers


def _sizes(model: ModelConfig) -> dict[str, int]:
    """By the letters of `Rule`."""
    kind = model.feed_forward
    sizes = {"v": model.vocab_size, "s": model.context_length, "d": model.d_model, "f": model.d_ff, "3": 3}
    sizes |= {"h": model.num_heads, "k": model.d_model // model.num_heads}
    if isinstance(kind, MixtureOfTokensConfig):
        sizes |= {"e": kind.num_experts, "m": kind.hidden_dim(model.d_ff)}
    return sizes


def _make(
    rule: Rule, sizes: Mapping[str, int], theirs: Mapping[str, Tensor], sources: list[str], stacked: bool
) -> np.ndarray:
    parts = [rule.apply(theirs[source].read(), sizes) for source in sources]
    return np.stack(parts) if stacked else parts[0]
