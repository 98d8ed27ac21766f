"""Tensors in safetensors files: one file, or several with an index, as large models on the Hugging Face hub."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from safetensors import safe_open
from safetensors.numpy import save

from mot_jax.errors import RetryableError, UserError, error_words
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import is_passing, is_remote, replace_file

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
SHARD_BYTES = 2 * 10**9

FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DTYPES = FLOATS | {"I32": "int32"}  # integers are router state
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


class Tensor(NamedTuple):
    """A tensor in an open file. dtype: NumPy's name for those in `DTYPES`, the name in the file for others."""

    path: epath.Path
    file: safe_open
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Copy its values into memory."""
        return self.file.get_tensor(self.name)


class Tensors(NamedTuple):
    """The tensors of one file or several, by name, and the metadata of the file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def holds_tensors(folder: epath.Path) -> bool:
    """Whether a directory has files written by `write_tensors`."""
    return (folder / MODEL).exists() or (folder / INDEX).exists()


def open_tensors(path: epath.Path) -> Tensors:
    """Open a file, the files that an index names, or either of them in a directory, without reading values.

    Files on an object store are copied to the temporary directory (TMPDIR) until their tensors are garbage-collected.

    Raises:
        UserError: for files that are missing, damaged or of another format.
        RetryableError: if a file cannot be read now.
    """
    if path.is_dir():
        files = [path / name for name in (INDEX, MODEL) if (path / name).exists()]
        if not files:
            raise UserError(f"{path}: holds neither {MODEL} nor {INDEX}; try the output of mot export")
        path = files[0]
    return _open_index(path) if path.suffix == ".json" else _open_file(path)


def _open_index(path: epath.Path) -> Tensors:
    try:
        places = dict(json.loads(path.read_text())["weight_map"])
        files = sorted(set(places.values()))
        if not files or any(os.path.basename(name) != name for name in files):
            raise ValueError("its weight_map must name files in its directory")
    except Exception as error:
        raise _unreadable(path, error) from None
    parts = [_open_file(path.parent / name) for name in files]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    actual = {name: tensor.path.name for name, tensor in tensors.items()}
    if misplaced := sorted(name for name in places | actual if places.get(name) != actual.get(name)):
        raise UserError(
            *(f"{path}: tensor {n}: must be in {places.get(n)}, and is in {actual.get(n)}" for n in misplaced)
        )
    return Tensors(tensors, parts[0].metadata)


def _open_file(path: epath.Path) -> Tensors:
    if not path.exists():
        raise UserError(f"{path}: no such file; try the {MODEL}, or the directory, of an export")
    if path.suffix in _PICKLES:
        code = (
            f"import torch, safetensors.torch as s; w = torch.load('{path.name}', weights_only=True); "
            "s.save_file({k: v.clone() for k, v in w.get('model', w).items()}, 'model.safetensors')"
        )
        raise UserError(f'{path}: is a pickle, which can run code, and is not read; try python -c "{code}"')
    try:
        file = _mapped_copy(path) if is_remote(path) else safe_open(path, "np")
    except Exception as error:
        raise _unreadable(path, error) from None
    tensors = {}
    for name in file.keys():  # noqa: SIM118, the file is not a mapping
        tensor_slice = file.get_slice(name)
        dtype = DTYPES.get(tensor_slice.get_dtype(), tensor_slice.get_dtype())
        tensors[name] = Tensor(path, file, name, dtype, tuple(tensor_slice.get_shape()))
    return Tensors(tensors, file.metadata() or {})


def _mapped_copy(path: epath.Path) -> safe_open:
    with tempfile.NamedTemporaryFile() as copy, path.open("rb") as remote:
        shutil.copyfileobj(remote, copy, 2**24)
        copy.flush()
        return safe_open(copy.name, "np")  # the memory mapping outlives the file's name


def _unreadable(path: epath.Path, error: Exception) -> UserError | RetryableError:
    """The error to raise for one of the library, the disk or the store: retryable if it may pass."""
    if is_passing(error):
        return RetryableError(f"{path}: could not be read ({error_words(error)}); try again later")
    return UserError(f"{path}: cannot be read ({error_words(error)}); try another copy")


def write_tensors(
    folder: epath.Path,
    kinds: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], np.ndarray],
    metadata: dict[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write `model.safetensors`, or several files with an index, each of at most `shard_bytes` or a single tensor.

    Each file is written atomically. Files of an earlier export with another number of shards are not removed. Memory:
    twice the size of a file.

    Args:
        kinds: shapes and dtypes, by name.
        read: returns the values of a tensor; called once for each name, in the order of `kinds`.

    Returns:
        The names of the files.
    """
    sizes = {name: math.prod(kind.shape) * kind.dtype.itemsize for name, kind in kinds.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    names = [SHARD.format(i + 1, len(shards)) for i in range(len(shards))] if len(shards) > 1 else [MODEL]
    for file_name, part in zip(names, shards, strict=True):
        values = {name: np.asarray(read(name), order="C") for name in part}  # the library ignores strides
        replace_file(folder / file_name, save(values, metadata))
    if len(shards) == 1:
        return names
    places = {name: file for file, part in zip(names, shards, strict=True) for name in part}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    replace_file(folder / INDEX, strict_json.dumps(index, indent=1).encode() + b"\n")
    return [*names, INDEX]
