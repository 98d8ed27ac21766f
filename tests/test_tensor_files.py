"""Files of tensors: what is written is read back, here and by Orbax; what is damaged is one line."""

from __future__ import annotations

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint import v1 as ocp

from mot_jax.config import ConfigError, TransientError
from mot_jax.tensor_files import INDEX, MODEL, open_tensors, tensor_faults, write_tensors

RNG = np.random.default_rng(0)
VALUES = {
    "stacks/0/0/w_in": RNG.normal(size=(2, 3, 4)).astype(np.float32),
    "narrow": RNG.normal(size=(5,)).astype(jnp.bfloat16),  # ten bytes: what follows is not aligned
    "scalar": np.array(-0.0, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "odd": np.array([np.nan, np.inf, 1e-45], np.float32),
}


def kinds(values: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in values.items()}


def write(folder, values=VALUES, **options) -> list[str]:
    return write_tensors(epath.Path(folder), kinds(values), values.__getitem__, {"step": "12"}, **options)


def read(path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_tensors(epath.Path(path)).tensors.items()}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert np.asarray(found[name]).tobytes() == value.tobytes()


def by_hand(entries: dict, content: bytes, length: int | None = None) -> bytes:
    """A file with any header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def test_every_bit_comes_back(tmp_path):
    assert write(tmp_path) == [MODEL]
    assert_equal(read(tmp_path), VALUES)
    assert open_tensors(epath.Path(tmp_path)).metadata == {"step": "12"}
    assert [path.name for path in tmp_path.iterdir()] == [MODEL]


def test_orbax_reads_the_same(tmp_path):
    values = {name: value for name, value in VALUES.items() if value.size}
    write(tmp_path, values)
    context = ocp.Context()
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    with context:
        assert_equal(ocp.load(tmp_path / MODEL), values)


def test_the_library_reads_the_same(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    values = {name: value for name, value in VALUES.items() if value.dtype == np.float32}
    write(tmp_path, values)
    assert_equal(safetensors.load_file(tmp_path / MODEL), values)
    safetensors.save_file(values, tmp_path / "theirs.safetensors")
    assert_equal(read(tmp_path / "theirs.safetensors"), values)


def test_a_large_model_is_several_files_and_an_index(tmp_path):
    names = write(tmp_path, shard_bytes=100)
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
    assert_equal(read(tmp_path), VALUES)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in VALUES.values())
    assert index["weight_map"]["stacks/0/0/w_in"] == names[0] and index["weight_map"]["odd"] == names[1]
    (tmp_path / names[1]).rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=f"{names[1]}: no such file, and {INDEX} names it"):
        read(tmp_path)
    write(tmp_path, {"odd": VALUES["odd"]})
    (tmp_path / MODEL).rename(tmp_path / names[1])
    with pytest.raises(ConfigError) as error:
        read(tmp_path)
    assert len(error.value.faults) == 3 and all("must be in model-00002" in fault for fault in error.value.faults)
    for text in ("{}", "[]", '{"weight_map": {"a": "../a.safetensors"}}', "nothing", '{"weight_map": 1}'):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(ConfigError, match="is no index of tensors"):
            read(tmp_path)


def test_a_file_cut_short_anywhere_is_one_line(tmp_path):
    write(tmp_path)
    content = (tmp_path / MODEL).read_bytes()
    for length in range(len(content)):
        (tmp_path / MODEL).write_bytes(content[:length])
        with pytest.raises(ConfigError, match=r"cut short") as error:
            read(tmp_path)
        assert len(error.value.faults) == 1 and "\n" not in str(error.value)
    (tmp_path / MODEL).write_bytes(content + b"x")
    with pytest.raises(ConfigError, match="is too long"):
        read(tmp_path)


def test_a_flipped_bit_in_the_header_is_a_fault_or_changes_no_tensor(tmp_path):
    """Of the length, of names (which the model misses then), of dtypes, shapes and places."""
    write(tmp_path)
    content = (tmp_path / MODEL).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    unnoticed = 0
    for bit in range(0, 8 * header, 3):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / MODEL).write_bytes(damaged)
        try:
            found = open_tensors(epath.Path(tmp_path))
        except ConfigError as error:
            assert len(error.faults) == 1 and "\n" not in str(error)
            continue
        if not tensor_faults(found, kinds(VALUES), "here"):
            unnoticed += 1
            assert_equal({name: tensor.read() for name, tensor in found.tensors.items()}, VALUES)
    assert unnoticed < 8 / 3 * len('{"step":"12"}')  # what is said beside the tensors


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "nothing": (b"", "cut short or no safetensors"),
    "text": (b"# a readme, not a model", "cut short or no safetensors"),
    "not JSON": (by_hand(b"{,}", b""), "header is damaged"),
    "not UTF-8": (by_hand(b'{"\xff": 1}', b""), "header is damaged"),
    "deep": (by_hand(b"[" * 100_000, b""), "header is damaged"),
    "a list": (by_hand(b"[1]", b""), "must be an object"),
    "twice": (by_hand(b'{"a": 1, "a": 2}', b""), "a name comes twice"),
    "metadata": (by_hand({"__metadata__": {"step": 3}}, b""), "__metadata__ must be text"),
    "no shape": (by_hand({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "tensor a: must have dtype"),
    "dtype": (by_hand({"a": ENTRY | {"dtype": "F8_E4M3"}}, bytes(8)), "dtype 'F8_E4M3' must be one of F64"),
    "shape": (by_hand({"a": ENTRY | {"shape": [3]}}, bytes(8)), r"bytes \[0, 8\] cannot hold shape \[3\] of F32"),
    "negative": (by_hand({"a": ENTRY | {"shape": [-2]}}, bytes(8)), "must be whole numbers"),
    "truth": (by_hand({"a": ENTRY | {"shape": [True, 2]}}, bytes(8)), "must be whole numbers"),
    "overlap": (by_hand({"a": ENTRY, "b": ENTRY}, bytes(8)), "tensor b begins at 0, must at 8"),
    "hole": (by_hand({"a": ENTRY | {"data_offsets": [8, 16]}}, bytes(16)), "tensor a begins at 8, must at 0"),
    "long header": (by_hand({"a": ENTRY}, bytes(8), length=2**63), "its header would have"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_what_the_format_forbids_is_one_line(tmp_path, what):
    content, words = DAMAGED[what]
    (tmp_path / MODEL).write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        read(tmp_path)
    assert len(error.value.faults) == 1 and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "last.ckpt", "model.safetensors"])
def test_pickles_are_not_read_but_told_how_to_convert(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ConfigError, match=f"{name}: is a pickle.*try python -c .*weights_only=True.*save_file"):
        read(tmp_path / name)


def test_what_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file; try a model.safetensors"):
        read(tmp_path / MODEL)
    with pytest.raises(ConfigError, match=r"holds neither model.safetensors nor"):
        read(tmp_path)


def test_a_disk_that_does_not_answer_is_no_damage(tmp_path, monkeypatch):
    write(tmp_path)

    def silent(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "open", silent)
    with pytest.raises(TransientError, match="could not be read"):
        read(tmp_path)


def test_what_a_model_wants_and_finds(tmp_path):
    f32, f16, i32 = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float16), np.zeros((2, 3), np.int32)
    values = {"good": f32, "narrow": f16, "turned": f32, "whole numbers": i32, "wide": f32, "extra": f32}
    write(tmp_path, values)
    wanted = kinds(values) | {name: jax.ShapeDtypeStruct((2, 3), jnp.float32) for name in ("narrow", "whole numbers")}
    wanted |= {"turned": jax.ShapeDtypeStruct((3, 2), jnp.float32), "wide": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}
    wanted |= {"absent": wanted["good"]}
    del wanted["extra"]
    assert tensor_faults(open_tensors(epath.Path(tmp_path)), wanted, "here") == [
        "here: tensor turned: has shape (2, 3), must have (3, 2)",
        "here: tensor whole numbers: is I32, must be F32 or narrower; try model.param_dtype = 'float32'",
        "here: tensor wide: is F32, must be BF16 or narrower; try model.param_dtype = 'float32'",
        "here: tensor absent: is missing, must have shape (2, 3)",
        "here: tensor extra: the model has no parameter for it",
    ]


def test_a_kill_leaves_the_old_file(tmp_path):
    write(tmp_path)

    def killed(name: str) -> np.ndarray:
        if name == "narrow":
            raise KeyboardInterrupt
        return VALUES[name]

    with pytest.raises(KeyboardInterrupt):
        write_tensors(epath.Path(tmp_path), kinds(VALUES), killed, {})
    assert_equal(read(tmp_path), VALUES)
