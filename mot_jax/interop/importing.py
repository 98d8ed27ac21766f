"""Import of models from safetensors (`mot import`): exports, and other projects' models by the names of their tensors.

`NAMINGS` describes the tensor names and layouts of the projects that can be imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from mot_jax.config import Config, DenseConfig, MixtureOfTokensConfig, ModelConfig
from mot_jax.data.text import open_tokenizer
from mot_jax.errors import UserError
from mot_jax.interop.export import ParameterKinds, copies_of, open_output, write_export
from mot_jax.nn.transformer import block_places
from mot_jax.runs.restore import check_data, load_run_config, parameter_kinds, router_kinds, tensor_faults
from mot_jax.runs.tensor_files import SHARD_BYTES, Tensor, Tensors, open_tensors
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import user_path


class TensorRule(NamedTuple):
    """How one parameter, of a block or of the whole model, is made from one tensor of another project.

    Dimensions are letters: `v` vocabulary, `s` positions, `d` model, `h` heads, `k` width of a head, `f` width of a
    dense layer, `e` experts, `m` width of an expert, `3` query, key and value.

    Attributes:
        theirs: the name of the tensor.
        layout: its dimensions; those in parentheses are merged into one.
        ours: the name of the parameter.
        order: the dimensions of the parameter, the same letters in its own order.
        part: the part of dimension `3` that the parameter takes.
    """

    theirs: str
    layout: str
    ours: str
    order: str
    part: slice | int = slice(None)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape that the tensor must have."""
        return tuple(math.prod(sizes[d] for d in group) for group in self._groups())

    def apply(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Convert the tensor to the values of the parameter."""
        letters = "".join(self._groups())
        value = tensor.reshape([sizes[d] for d in letters])
        value = value.transpose([letters.index(d) for d in self.order])
        return value[tuple(self.part if d == "3" else slice(None) for d in self.order)]

    def _groups(self) -> list[str]:
        """Return the letters of each dimension of the tensor."""
        return [a.replace(" ", "") or b for a, b in re.findall(r"\((.*?)\)|(\w)", self.layout)]


class Naming(NamedTuple):
    """The tensor names of another project's models.

    Attributes:
        title: the project.
        outside: rules of the parameters outside of the blocks; the first identifies the project.
        block: prefix of a block's tensors, with `{}` in place of the block's index.
        inside: rules of the parameters of a block.
        wrappers: pattern of the parts of names that training code adds, which are removed.
        buffers: pattern of tensors that are not parameters, which are ignored.
    """

    title: str
    outside: tuple[TensorRule, ...]
    block: str
    inside: tuple[TensorRule, ...]
    wrappers: str
    buffers: str


def _expert_rules(prefix: str) -> tuple[TensorRule, ...]:
    layouts = {"controller": ("controller", "de"), "lin1": ("w_in", "edm"), "lin2": ("w_out", "emd")}
    return tuple(
        TensorRule(f"{prefix}.{theirs}", order, f"feed_forward/{ours}", order)
        for theirs, (ours, order) in layouts.items()
    )


_ATTENTION = "residual_attention.layer.attention"
_DENSE = "residual_feedforward.layer.feedforward.logging_ff"

NAMINGS = (
    Naming(
        "the authors' PyTorch code (llm-random)",
        outside=(
            TensorRule("embedding_layer.layers.0.weight", "v d", "token_embedding", "vd"),
            TensorRule("embedding_layer.layers.1.layer.weight", "s d", "position_embedding", "sd"),
            TensorRule("head.weight", "v d", "head", "dv"),
        ),
        block="encoder.blocks.block_{}.block.",
        inside=(
            TensorRule("residual_attention.layer.pre_norm.weight", "d", "attention_norm/scale", "d"),
            TensorRule("residual_attention.layer.pre_norm.bias", "d", "attention_norm/bias", "d"),
            TensorRule(f"{_ATTENTION}.input_projection.weight", "(h3k) d", "attention/query", "3dhk", 0),
            TensorRule(f"{_ATTENTION}.input_projection.weight", "(h3k) d", "attention/key_value", "d3hk", slice(1, 3)),
            TensorRule(f"{_ATTENTION}.output_projection.weight", "d (hk)", "attention/out", "hkd"),
            TensorRule("residual_feedforward.layer.pre_norm.weight", "d", "feed_forward_norm/scale", "d"),
            TensorRule("residual_feedforward.layer.pre_norm.bias", "d", "feed_forward_norm/bias", "d"),
            TensorRule(f"{_DENSE}_pre_relu.weight", "f d", "feed_forward/kernel_in", "df"),
            TensorRule(f"{_DENSE}_pre_relu.bias", "f", "feed_forward/bias_in", "f"),
            TensorRule(f"{_DENSE}_post_relu.weight", "d f", "feed_forward/kernel_out", "fd"),
            TensorRule(f"{_DENSE}_post_relu.bias", "d", "feed_forward/bias_out", "d"),
            *_expert_rules("residual_feedforward.layer.feedforward"),
        ),
        wrappers=r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.",
        buffers=r".*\.attention\.rope\.(sin|cos)",
    ),
    Naming(
        "the Hugging Face port",
        outside=(
            TensorRule("wte.weight", "v d", "token_embedding", "vd"),
            TensorRule("wpe.weight", "s d", "position_embedding", "sd"),
            TensorRule("ln_f.weight", "d", "final_norm/scale", "d"),
            TensorRule("ln_f.bias", "d", "final_norm/bias", "d"),
            TensorRule("lm_head.weight", "v d", "head", "dv"),
        ),
        block="h.{}.",
        inside=(
            TensorRule("ln_1.weight", "d", "attention_norm/scale", "d"),
            TensorRule("ln_1.bias", "d", "attention_norm/bias", "d"),
            TensorRule("attn.c_attn.weight", "d (3hk)", "attention/query", "3dhk", 0),
            TensorRule("attn.c_attn.weight", "d (3hk)", "attention/key_value", "d3hk", slice(1, 3)),
            TensorRule("attn.c_attn.bias", "(3hk)", "attention/query_bias", "3hk", 0),
            TensorRule("attn.c_attn.bias", "(3hk)", "attention/key_value_bias", "3hk", slice(1, 3)),
            TensorRule("attn.c_proj.weight", "(hk) d", "attention/out", "hkd"),
            TensorRule("attn.c_proj.bias", "d", "attention/out_bias", "d"),
            TensorRule("ln_2.weight", "d", "feed_forward_norm/scale", "d"),
            TensorRule("ln_2.bias", "d", "feed_forward_norm/bias", "d"),
            *_expert_rules("mlp"),
        ),
        wrappers=r"^transformer\.",
        buffers=r"h\.\d+\.attn\.(masked_)?bias",
    ),
)


def import_model(
    source: epath.PathLike, output: epath.PathLike, config: Config | None = None, overwrite: bool = False
) -> list[str]:
    """Make an export from the tensors in `source`.

    The names of the tensors identify the project: this one, or one of NAMINGS.

    Args:
        source: a safetensors file, the index of several, or a directory with either.
        output: a new or empty directory, or an export if `overwrite` is given.
        config: of the model; None reads the `config.json` next to tensors of `mot export`.
        overwrite: replace the export in `output`.

    Returns:
        Lines for the user: warnings, and a summary of the files.

    Raises:
        UserError: with one line for each tensor that is not used exactly once, and each parameter without a tensor.
    """
    path = user_path("FILE", source)
    directory = path if path.is_dir() else path.parent
    tensors = open_tensors(path)
    naming = _identify(tensors)
    if config is None:
        if naming is not None:
            raise UserError(f"--config is missing: {path} is of {naming.title}; try --config configs/v2.py:medium_32e")
        config = load_run_config(directory)
    tokenizer = open_tokenizer(config)
    kinds = {**parameter_kinds(config.model), **router_kinds(config.model)}
    if naming is None:
        if errors := tensor_faults(tensors, kinds, path):
            raise UserError(*errors)
        readers = {name: tensors.tensors[name].read for name in kinds}
    else:
        readers = _parameter_readers(naming, config.model, kinds, tensors, path)
    folder = open_output(output, overwrite, path)
    step = int(tensors.metadata["step"]) if tensors.metadata.get("step", "").isdecimal() else 0
    copies = {"data.json": (strict_json.dumps({"tokenizer": tokenizer.fingerprint}) + "\n").encode()}
    if naming is None:
        check_data({"tokenizer": tokenizer.fingerprint}, config, directory)
        copies |= copies_of(directory)
    return write_export(
        folder, config, kinds, lambda name: readers[name]().astype(kinds[name].dtype), step, copies, SHARD_BYTES
    )


def _identify(tensors: Tensors) -> Naming | None:
    """Return the naming that the tensors follow; None is that of this project."""
    if "token_embedding" in tensors.tensors:
        return None
    for naming in NAMINGS:
        if naming.outside[0].theirs in (re.sub(naming.wrappers, "", name) for name in tensors.tensors):
            return naming
    known = ", ".join(f"{naming.outside[0].theirs} of {naming.title}" for naming in NAMINGS)
    first = next(iter(tensors.tensors), "none")
    raise UserError(f"tensors: are of no known model (the first is {first}); known are {known}")


def _parameter_readers(
    naming: Naming, model: ModelConfig, kinds: ParameterKinds, tensors: Tensors, path: epath.Path
) -> dict[str, Callable[[], np.ndarray]]:
    """Return, for each parameter, a function that makes its values. Raises UserError with a line for each error."""
    by_name = {re.sub(naming.wrappers, "", name): tensor for name, tensor in tensors.tensors.items()}
    errors = []
    if len(by_name) < len(tensors.tensors):
        errors.append(f"{path}: two tensors have the same name without {naming.wrappers}")
    for name in [name for name in by_name if re.fullmatch(naming.buffers, name)]:
        del by_name[name]
    if model.num_kv_heads not in (None, model.num_heads):
        errors.append(f"model.num_kv_heads = {model.num_kv_heads}: {naming.title} shares no keys and values; try None")
    outside, inside = ({rule.ours: rule for rule in rules} for rules in (naming.outside, naming.inside))
    embedding, head = outside["token_embedding"].theirs, outside["head"].theirs
    if model.tie_embeddings and head in by_name and embedding in by_name:
        if not np.array_equal(by_name.pop(head).read(), by_name[embedding].read()):
            errors.append(f"{path}: tensor {head}: is not {embedding}; try model.tie_embeddings = False")
    elif not model.tie_embeddings and head not in by_name:
        errors.append(f"{path}: tensor {head}: is missing; try model.tie_embeddings = True")
        kinds = {name: kind for name, kind in kinds.items() if name != "head"}

    if not isinstance(model.feed_forward, DenseConfig | MixtureOfTokensConfig):
        reason = f"{naming.title} has no such layers; try a mixture_of_tokens or dense config"
        raise UserError(*errors, f"model.feed_forward = {model.feed_forward.kind}: {reason}")
    sizes = _sizes(model)
    block_prefixes: dict[str, list[str]] = {}  # by our prefix, in the order of a scanned layer's repeats
    for block, (place, _) in enumerate(block_places(model)):
        block_prefixes.setdefault(place, []).append(naming.block.format(block))
    required: dict[str, jax.ShapeDtypeStruct] = {}
    readers: dict[str, Callable[[], np.ndarray]] = {}
    for name, kind in kinds.items():
        place = next((place for place in block_prefixes if name.startswith(place)), "")
        rule = (inside if place else outside).get(name.removeprefix(place))
        if rule is None:
            errors.append(f"{path}: {name}: {naming.title} has no tensor for this parameter")
            continue
        sources = [prefix + rule.theirs for prefix in block_prefixes.get(place, [""])]
        required |= dict.fromkeys(sources, jax.ShapeDtypeStruct(rule.shape(sizes), kind.dtype))
        readers[name] = partial(_read_parameter, rule, sizes, by_name, sources, bool(place))
    if errors := errors + tensor_faults(Tensors(by_name, {}), required, path):
        raise UserError(*errors)
    return readers


def _sizes(model: ModelConfig) -> dict[str, int]:
    """Return the size of each dimension by its letter, see `TensorRule`."""
    kind = model.feed_forward
    sizes = {"v": model.vocab_size, "s": model.context_length, "d": model.d_model, "f": model.d_ff, "3": 3}
    sizes |= {"h": model.num_heads, "k": model.d_model // model.num_heads}
    if isinstance(kind, MixtureOfTokensConfig):
        sizes |= {"e": kind.num_experts, "m": kind.hidden_dim(model.d_ff)}
    return sizes


def _read_parameter(
    rule: TensorRule, sizes: Mapping[str, int], tensors: Mapping[str, Tensor], sources: list[str], stacked: bool
) -> np.ndarray:
    """Read a parameter from one tensor, or, with a leading dimension of blocks, from one tensor of each block."""
    parts = [rule.apply(tensors[source].read(), sizes) for source in sources]
    return np.stack(parts) if stacked else parts[0]
