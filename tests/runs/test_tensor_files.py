"""Files of tensors are read back unchanged, by this package and by Orbax; a damaged one is an error of one line."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint import v1 as ocp

from mot_jax.errors import RetryableError, UserError
from mot_jax.runs import tensor_files
from mot_jax.runs.tensor_files import INDEX, MODEL, open_tensors, write_tensors

RNG = np.random.default_rng(0)
VALUES = {
    "stacks/0/0/w_in": RNG.normal(size=(2, 3, 4)).astype(np.float32),
    "narrow": np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16),  # all there are
    "turned": RNG.normal(size=(3, 2)).astype(np.float32).T,
    "scalar": np.array(-0.0, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "odd": np.array([np.nan, np.inf, 1e-45], np.float32),
}


def write(folder, values=VALUES, **options) -> list[str]:
    kinds = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in values.items()}
    return write_tensors(epath.Path(folder), kinds, values.__getitem__, {"step": "12"}, **options)


def read(path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_tensors(epath.Path(path)).tensors.items()}


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape)
        assert np.asarray(actual[name]).tobytes() == value.tobytes()


def test_every_bit_comes_back(tmp_path):
    assert write(tmp_path) == [MODEL]
    assert_equal(read(tmp_path), VALUES)
    file = open_tensors(epath.Path(tmp_path))
    assert file.metadata == {"step": "12"}
    assert {(name, t.dtype, t.shape) for name, t in file.tensors.items()} == {
        (name, str(value.dtype), value.shape) for name, value in VALUES.items()
    }
    assert [path.name for path in tmp_path.iterdir()] == [MODEL]


def test_orbax_reads_the_same(tmp_path):
    values = {name: value for name, value in VALUES.items() if value.size}
    write(tmp_path, values)
    context = ocp.Context()
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    with context:
        assert_equal(ocp.load(tmp_path / MODEL), values)


def test_a_large_model_is_several_files_and_an_index(tmp_path):
    names = write(tmp_path, shard_bytes=200)
    assert names == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX]
    assert_equal(read(tmp_path), VALUES)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in VALUES.values())
    assert index["weight_map"]["narrow"] == names[1] and index["weight_map"]["odd"] == names[2]
    (tmp_path / names[2]).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{names[2]}: no such file"):
        read(tmp_path)
    write(tmp_path, {"odd": VALUES["odd"]})
    (tmp_path / MODEL).rename(tmp_path / names[2])
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert len(error.value.faults) == 3 and all("must be in model-00003" in fault for fault in error.value.faults)
    for text in ("{}", "[]", '{"weight_map": {"a": "../a.safetensors"}}', "nothing", '{"weight_map": 1}'):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(UserError, match=rf"{INDEX}: cannot be read \(") as error:
            read(tmp_path)
        assert len(error.value.faults) == 1


def test_damage_is_one_line_or_changes_no_tensor(tmp_path):
    """A file that is cut short, anywhere; a bit that is flipped, anywhere in the header; files of other kinds."""
    values = {name: value for name, value in VALUES.items() if name != "narrow"}
    write(tmp_path, values)
    content = (tmp_path / MODEL).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    flipped = [bytearray(content) for _ in range(0, 8 * header, 7)]
    for bit, damaged in zip(range(0, 8 * header, 7), flipped, strict=True):
        damaged[bit // 8] ^= 1 << bit % 8
    others = [b"# a readme, not a model", b"PK\x03\x04" + bytes(100), b"[" * 100_000, content + b"x"]
    cut = [content[:length] for length in range(0, len(content), 3)]
    unnoticed = 0
    for damaged in [*cut, *others, *flipped]:
        (tmp_path / MODEL).write_bytes(damaged)
        try:
            tensors = open_tensors(epath.Path(tmp_path)).tensors
        except UserError as error:
            (fault,) = error.faults
            assert fault.startswith(f"{tmp_path / MODEL}: cannot be read (SafetensorError: ")
            assert fault.endswith("; try another copy") and "\n" not in fault and len(fault) < 600
            continue
        assert len(damaged) == len(content)
        if {n: (t.dtype, t.shape) for n, t in tensors.items()} == {n: (v.dtype, v.shape) for n, v in values.items()}:
            unnoticed += 1
            assert_equal({name: tensor.read() for name, tensor in tensors.items()}, values)
    assert unnoticed <= 8 / 7 * len('{"step":"12"}')  # the metadata


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "last.ckpt"])
def test_pickles_are_refused_with_a_command_that_converts_them(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match=f"{name}: is a pickle.*try python -c .*weights_only=True.*save_file"):
        read(tmp_path / name)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no such file; try the model.safetensors"):
        read(tmp_path / MODEL)
    with pytest.raises(UserError, match=r"holds neither model.safetensors nor"):
        read(tmp_path)


def test_a_disk_that_does_not_answer_is_no_damage(tmp_path, monkeypatch):
    write(tmp_path)

    def silent(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(tensor_files, "safe_open", silent)
    with pytest.raises(RetryableError, match="could not be read"):
        read(tmp_path)


def test_a_file_on_a_store_is_read_from_a_copy_that_is_gone(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(tensor_files, "is_remote", lambda path: True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    file = open_tensors(epath.Path(tmp_path))
    (tmp_path / MODEL).unlink()
    assert not list((tmp_path / "copies").iterdir())
    assert_equal({name: tensor.read() for name, tensor in file.tensors.items()}, VALUES)


def test_a_kill_leaves_the_old_file(tmp_path, monkeypatch):
    write(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        patch.setattr("os.rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, {"odd": VALUES["odd"]})
    assert_equal(read(tmp_path), VALUES)
