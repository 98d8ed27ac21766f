"""Tensors in files of the safetensors format: the length of a header, the header in JSON, the tensors' bytes.

Read and written a tensor at a time, locally and on object stores alike, so that no more than one is in memory: the
library of that name takes a file's tensors together, and only from local disks. A damaged file is one line.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mot_jax.config import ConfigError, TransientError, error_words
from mot_jax.paths import is_passing, replace_file, whole_file

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
SHARD_BYTES = 5 * 10**9

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 10**8  # bytes; the format's own limit
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


class Tensor(NamedTuple):
    """Where a tensor lies: `begin` counts bytes from the beginning of the file."""

    path: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int

    def read(self) -> np.ndarray:
        """Its values. Raises ConfigError, or TransientError, if they cannot be read."""
        count = math.prod(self.shape) * self.dtype.itemsize
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(self.begin)
            content = file.read(count)
        if len(content) < count:
            raise ConfigError(f"{self.path}: has become shorter while it was read; try again")
        return np.frombuffer(content, self.dtype).reshape(self.shape)


class Tensors(NamedTuple):
    """Of one file or several: the tensors by name, and what else the (first) file says of them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


# --- reading ----------------------------------------------------------------------------------------------------------


def holds_tensors(folder: epath.Path) -> bool:
    """Whether a directory has files as `write_tensors` writes them."""
    return (folder / MODEL).exists() or (folder / INDEX).exists()


def open_tensors(path: epath.Path) -> Tensors:
    """The tensors of a file, of the files that an index names, or of either in a directory, without their values.

    Raises ConfigError for what is missing, damaged, or no such file; TransientError if it cannot be read now.
    """
    if path.is_dir():
        found = [path / name for name in (INDEX, MODEL) if (path / name).exists()]
        if not found:
            raise ConfigError(f"{path}: holds neither {MODEL} nor {INDEX}; try the output of mot export")
        path = found[0]
    if not path.exists():
        raise ConfigError(f"{path}: no such file; try a {MODEL}")
    if path.suffix in _PICKLES:
        raise _pickle(path)
    return _open_index(path) if path.suffix == ".json" else _open_file(path)


def _open_index(path: epath.Path) -> Tensors:
    """All tensors of a large model: each must be in the file that the index says, and in no other."""
    with _reading(path):
        content = path.read_bytes()
    try:
        places = dict(_parsed(content)["weight_map"])
        files = sorted(set(places.values()))
        if not files or any(os.path.basename(name) != name for name in files):
            raise ValueError("its weight_map must name files beside it")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: is no index of tensors ({error_words(error)}); try {MODEL}") from None
    missing = [name for name in files if not (path.parent / name).exists()]
    if missing:
        raise ConfigError(*(f"{path.parent / name}: no such file, and {path.name} names it" for name in missing))
    parts = [_open_file(path.parent / name) for name in files]
    there = {name: tensor.path.name for part in parts for name, tensor in part.tensors.items()}
    faults = [
        f"{path}: tensor {name}: must be in {places.get(name)}, and is in {there.get(name)}"
        for name in sorted(places.keys() | there.keys())
        if places.get(name) != there.get(name)
    ]
    if faults or len(there) < sum(len(part.tensors) for part in parts):
        raise ConfigError(*(faults or [f"{path}: a tensor is in more than one file"]))
    return Tensors({name: t for part in parts for name, t in part.tensors.items()}, parts[0].metadata)


def _open_file(path: epath.Path) -> Tensors:
    with _reading(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(8)
        length = int.from_bytes(start, "little")
        there = length <= min(size - 8, _LONGEST_HEADER)
        raw = file.read(length) if there else b""
    if start[:2] in (b"PK", b"\x80\x02"):
        raise _pickle(path)
    if not there:
        words = f"its header would have {length} bytes, and the file has {size}"
        raise ConfigError(f"{path}: is cut short or no safetensors file ({words}); try another copy")
    try:
        header = _parsed(raw)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in [*metadata, *metadata.values()]):
            raise ValueError("__metadata__ must be text")
        entries = {name: _entry(name, entry) for name, entry in header.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: its header is damaged ({error_words(error)}); try another copy") from None
    begin = 0
    for name, (_, _, first, last) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if first != begin:
            raise ConfigError(f"{path}: its header is damaged (tensor {name} begins at {first}, must at {begin})")
        begin = last
    if begin != size - 8 - length:
        words = f"{size - 8 - length} bytes of tensors are there, and its header tells of {begin}"
        raise ConfigError(f"{path}: is {'cut short' if begin > size - 8 - length else 'too long'} ({words})")
    tensors = {name: Tensor(path, d, shape, 8 + length + first) for name, (d, shape, first, _) in entries.items()}
    return Tensors(tensors, metadata)


def _entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, last byte). Raises ValueError for what the format forbids."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name}: must have dtype, shape and data_offsets")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name}: dtype {entry['dtype']!r} must be one of {', '.join(DTYPES)}")
    dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"tensor {name}: {numbers!r} must be whole numbers")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name}: bytes {offsets} cannot hold shape {shape} of {entry['dtype']}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _parsed(content: bytes) -> dict[str, Any]:
    """JSON in which no name comes twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name comes twice")
        return dict(pairs)

    parsed = json.loads(content.decode(), object_pairs_hook=unique)
    if not isinstance(parsed, dict):
        raise ValueError("must be an object")
    return parsed


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a store's library raises what it likes
        if is_passing(error):
            raise TransientError(f"{path}: could not be read ({error_words(error)}); try again later") from None
        raise ConfigError(f"{path}: cannot be read ({error_words(error)}); try another copy") from None


def _pickle(path: epath.Path) -> ConfigError:
    code = (
        f"import torch, safetensors.torch as s; w = torch.load('{path.name}', weights_only=True); "
        "s.save_file({k: v.clone() for k, v in w.get('model', w).items()}, 'model.safetensors')"
    )
    return ConfigError(f'{path}: is a pickle, which can run code, and is not read; try python -c "{code}"')


# --- writing ----------------------------------------------------------------------------------------------------------


def write_tensors(
    folder: epath.Path,
    kinds: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], np.ndarray],
    metadata: dict[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes `model.safetensors`, or files of at most `shard_bytes` (or one tensor) with an index beside them.

    kinds: shapes and dtypes. read: called once for each name, in their order, for the values.
    Returns the names of the files. Each appears whole; files of another number of shards are left where they are.
    """
    shards: list[list[str]] = [[]]
    sizes = {name: math.prod(kind.shape) * kind.dtype.itemsize for name, kind in kinds.items()}
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    names = [SHARD.format(i + 1, len(shards)) for i in range(len(shards))] if len(shards) > 1 else [MODEL]
    for file_name, part in zip(names, shards, strict=True):
        _write_file(folder / file_name, {name: kinds[name] for name in part}, read, metadata)
    if len(shards) > 1:
        places = {name: file for file, part in zip(names, shards, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        replace_file(folder / INDEX, json.dumps(index, indent=1).encode() + b"\n")
        names.append(INDEX)
    return names


def _write_file(
    path: epath.Path,
    kinds: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], np.ndarray],
    metadata: dict[str, str],
) -> None:
    ends = list(itertools.accumulate(math.prod(k.shape) * k.dtype.itemsize for k in kinds.values()))
    header: dict[str, Any] = {"__metadata__": metadata}
    for (name, kind), begin, end in zip(kinds.items(), [0, *ends[:-1]], ends, strict=True):
        header[name] = {"dtype": dtype_name(kind.dtype), "shape": list(kind.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, kind in kinds.items():
            value = read(name)
            assert (value.dtype, value.shape) == (kind.dtype, kind.shape), name
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def dtype_name(dtype: np.dtype) -> str:
    """`F32`, say."""
    return _NAMES[np.dtype(dtype)]


# --- what a model wants -----------------------------------------------------------------------------------------------


def tensor_faults(found: Tensors, wanted: Mapping[str, jax.ShapeDtypeStruct], where: object) -> list[str]:
    """A line for each tensor that is missing, of another shape or dtype than wanted, or not wanted at all.

    A tensor may be narrower than wanted, which changes no value, but not wider. where: the tensors are, for people.
    """
    faults = []
    for name, kind in wanted.items():
        tensor = found.tensors.get(name)
        if tensor is None:
            faults.append(f"{where}: tensor {name}: is missing, must have shape {kind.shape}")
        elif tensor.shape != kind.shape:
            faults.append(f"{where}: tensor {name}: has shape {tensor.shape}, must have {kind.shape}")
        elif not _fits(tensor.dtype, kind.dtype):
            words = f"is {dtype_name(tensor.dtype)}, must be {dtype_name(kind.dtype)} or narrower"
            faults.append(f"{where}: tensor {name}: {words}; try model.param_dtype = 'float32'")
    faults += [
        f"{where}: tensor {name}: the model has no parameter for it" for name in found.tensors if name not in wanted
    ]
    return faults


def _fits(dtype: np.dtype, wanted: np.dtype) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.promote_types(dtype, wanted) == wanted
