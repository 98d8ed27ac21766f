"""Tensors in safetensors files: one, or several with an index beside them, as the Hugging Face hub has large models."""

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
from mot_jax.runtime.paths import is_passing, is_remote, replace_file

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
SHARD_BYTES = 2 * 10**9

FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


class Tensor(NamedTuple):
    """A tensor in an open file. dtype: a float's as NumPy names it, another's as the file does."""

    path: epath.Path
    file: safe_open
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Its values, a copy."""
        return self.file.get_tensor(self.name)


class Tensors(NamedTuple):
    """Of one file or several: the tensors by name, and what else a file says of them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def holds_tensors(folder: epath.Path) -> bool:
    """Whether a directory has files as `write_tensors` writes them."""
    return (folder / MODEL).exists() or (folder / INDEX).exists()


def open_tensors(path: epath.Path) -> Tensors:
    """The tensors of a file, of the files that an index names, or of either in a directory, without their values.

    Files on an object store are copied to the temporary directory (TMPDIR) for as long as their tensors are held.
    Raises UserError for what is missing, damaged, or no such file; RetryableError if it cannot be read now.
    """
    if path.is_dir():
        found = [path / name for name in (INDEX, MODEL) if (path / name).exists()]
        if not found:
            raise UserError(f"{path}: holds neither {MODEL} nor {INDEX}; try the output of mot export")
        path = found[0]
    return _open_index(path) if path.suffix == ".json" else _open_file(path)


def _open_index(path: epath.Path) -> Tensors:
    try:
        places = dict(json.loads(path.read_text())["weight_map"])
        files = sorted(set(places.values()))
        if not files or any(os.path.basename(name) != name for name in files):
            raise ValueError("its weight_map must name files beside it")
    except Exception as error:
        raise _unreadable(path, error) from None
    parts = [_open_file(path.parent / name) for name in files]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    there = {name: tensor.path.name for name, tensor in tensors.items()}
    if wrong := sorted(name for name in places | there if places.get(name) != there.get(name)):
        words = "tensor {}: must be in {}, and is in {}"
        raise UserError(*(f"{path}: {words.format(n, places.get(n), there.get(n))}" for n in wrong))
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
    for name in file.keys():  # noqa: SIM118, for it is no mapping
        about = file.get_slice(name)
        dtype = FLOATS.get(about.get_dtype(), about.get_dtype())
        tensors[name] = Tensor(path, file, name, dtype, tuple(about.get_shape()))
    return Tensors(tensors, file.metadata() or {})


def _mapped_copy(path: epath.Path) -> safe_open:
    with tempfile.NamedTemporaryFile() as copy, path.open("rb") as there:
        shutil.copyfileobj(there, copy, 2**24)
        copy.flush()
        return safe_open(copy.name, "np")  # the mapping stays when the name is gone


def _unreadable(path: epath.Path, error: Exception) -> UserError:
    """The library's words, or the disk's or the store's, which raise what they like."""
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
    """Writes `model.safetensors`, or files of at most `shard_bytes` (or one tensor) with an index beside them.

    kinds: shapes and dtypes. read: called once for each name, in their order, for the values. Memory: a file, twice.
    Returns the names of the files. Each appears whole; files of another number of shards are left where they are.
    """
    sizes = {name: math.prod(kind.shape) * kind.dtype.itemsize for name, kind in kinds.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    names = [SHARD.format(i + 1, len(shards)) for i in range(len(shards))] if len(shards) > 1 else [MODEL]
    for file_name, part in zip(names, shards, strict=True):
        values = {name: np.asarray(read(name), order="C") for name in part}  # the library saves memory as it lies
        replace_file(folder / file_name, save(values, metadata))
    if len(shards) == 1:
        return names
    places = {name: file for file, part in zip(names, shards, strict=True) for name in part}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    replace_file(folder / INDEX, json.dumps(index, indent=1).encode() + b"\n")
    return [*names, INDEX]
