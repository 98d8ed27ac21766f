"""Export of trained models as safetensors (`mot export`).

An export is a directory with the tensors, `config.json`, the tokenizer's file, and the workdir's `data.json` and
`companions.npy` and `thresholds.json`. It is accepted wherever a workdir is read, but training cannot resume from it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mot_jax.config import Config, to_json
from mot_jax.data.text import open_tokenizer
from mot_jax.data.tokenizers import COPIES, tokenizer_copy
from mot_jax.errors import RetryableError, UserError, error_words, nearest
from mot_jax.modes.companions import load_companions
from mot_jax.modes.thresholds import load_thresholds
from mot_jax.runs.restore import check_data, load_run, load_run_config, router_kinds
from mot_jax.runs.state import fetch
from mot_jax.runs.tensor_files import INDEX, MODEL, SHARD_BYTES, write_tensors
from mot_jax.runtime import distributed
from mot_jax.runtime.paths import is_passing, make_directory, read_file, replace_file, user_path

DTYPES = ("float32", "bfloat16")
_COPIED = ("data.json", "companions.npy", "thresholds.json")
_FILES = ("config.json", "modes.json", MODEL, INDEX, *COPIES, *_COPIED)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

ParameterKinds = Mapping[str, jax.ShapeDtypeStruct]  # shapes and dtypes by name


def export_model(
    workdir: epath.PathLike,
    output: epath.PathLike,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    step: int | None = None,
) -> list[str]:
    """Write a checkpoint of the run in `workdir`, or another export, to the directory `output`.

    The parameters are sharded over the mesh that is set while they are read. With several processes, each calls this,
    and process 0 writes.

    Args:
        workdir: of a run, or an export.
        output: a new or empty directory, or an export if `overwrite` is given.
        dtype: of the tensors, one of DTYPES; None keeps that of the parameters.
        overwrite: replace the export in `output`.
        shard_bytes: the maximum size of a file that holds several tensors.
        step: that of the checkpoint; None for the newest.

    Returns:
        Lines for the user: warnings, and a summary of the files.

    Raises:
        UserError: the input is invalid; for example, `output` holds other files.
    """
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype = {dtype!r}: no such dtype{nearest(str(dtype), DTYPES)}")
    with distributed.together():
        config = load_run_config(workdir)
        check_data({"tokenizer": open_tokenizer(config).fingerprint}, config, workdir)
        source = user_path("workdir", workdir)
        folder = open_output(output, overwrite, source)
    run, router = load_run(workdir, step=step), router_kinds(config.model)
    kinds = {
        name: jax.ShapeDtypeStruct(v.shape, v.dtype if dtype is None or name in router else jnp.dtype(dtype))
        for name, v in run.params.items()
    }

    def read(name: str) -> np.ndarray:
        return fetch(run.params[name]).astype(kinds[name].dtype)

    if not distributed.is_first():  # takes part in the collective gather of each parameter
        for name in kinds:
            read(name)
        return []
    return write_export(folder, config, kinds, read, run.step, copies_of(source), shard_bytes)


def copies_of(source: epath.Path) -> dict[str, bytes]:
    """The contents, by name, of the files of a workdir or an export that an export has as well.

    Raises UserError if one of them is damaged or cannot be read.
    """
    load_companions(source)
    load_thresholds(source)
    advice = "try another copy of this run"
    return {name: read_file(source / name, advice) for name in _COPIED if (source / name).exists()}


def open_output(output: epath.PathLike, overwrite: bool, source: epath.Path) -> epath.Path:
    """Check and make the output directory of an export.

    It may hold nothing, or an export if `overwrite` is given, and may not be the directory of the `source`.
    """
    folder = user_path("--output", output)
    existing = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in existing if not _is_export_file(name)]
    if foreign or (folder.exists() and not folder.is_dir()):
        reason = f"holds {foreign[0]}, which is not part of an export" if foreign else "is a file"
        raise UserError(f"--output = {output}: {reason}; try a new directory")
    if existing and not overwrite:
        raise UserError(f"--output = {output}: holds an export already; try another directory, or --overwrite")
    if folder.resolve() in (source.resolve(), source.parent.resolve()):
        raise UserError(f"--output = {output}: is where the tensors come from; try another directory")
    if distributed.is_first():
        make_directory("--output", folder)
    return folder


def _is_export_file(name: str) -> bool:
    written = name.removesuffix(".new")  # of a file that a kill left incomplete
    return written in _FILES or bool(_SHARD.fullmatch(written))


def write_export(
    folder: epath.Path,
    config: Config,
    kinds: ParameterKinds,
    read: Callable[[str], np.ndarray],
    step: int,
    copies: dict[str, bytes],
    shard_bytes: int,
) -> list[str]:
    """Write an export. Its `config.json`, which marks it as complete, is removed first and written last.

    Args:
        folder: from `open_output`.
        config: of the model.
        kinds: shapes and dtypes of the parameters.
        read: returns the values of a parameter by name.
        step: the number of training steps.
        copies: contents of further files by name.
        shard_bytes: the maximum size of a file that holds several tensors.

    Returns:
        Lines for the user: warnings, and a summary of the files.
    """
    lines: list[str] = []

    def read_checked(name: str) -> np.ndarray:
        value = read(name)
        non_finite = value.size - np.count_nonzero(np.isfinite(value))
        if non_finite:
            lines.append(f"warning: {name}: {non_finite} of {value.size} values are infinite or NaN")
        return value

    tokenizer = config.data.tokenizer
    if (copy := tokenizer_copy(folder, tokenizer)) is not None:
        copies = copies | {copy.name: user_path("data.tokenizer", tokenizer).read_bytes()}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=copy.name))
    try:
        (folder / "config.json").unlink(missing_ok=True)
        written = write_tensors(folder, kinds, read_checked, {"step": str(step)}, shard_bytes)
        for name, content in copies.items():
            replace_file(folder / name, content)
        for path in folder.iterdir():  # remaining files of the export that is overwritten
            if _is_export_file(path.name) and path.name not in (*written, *copies):
                path.unlink()
        replace_file(folder / "config.json", to_json(config).encode())
    except OSError as error:
        reason = error.strerror or error_words(error)
        error_type = RetryableError if is_passing(error) else UserError
        raise error_type(f"--output = {folder}: cannot be written to ({reason}); try another") from error
    count = sum(math.prod(kind.shape) for kind in kinds.values())
    size = sum(math.prod(kind.shape) * kind.dtype.itemsize for kind in kinds.values())
    lines.append(f"{folder}: step {step}, {count:,} parameters in {len(kinds)} tensors, {size / 1e6:,.1f} MB")
    return lines
