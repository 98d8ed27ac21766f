"""Export: bit for bit the run, on any mesh and number of processes; interrupted and damaged exports; the commands."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from etils import epath
from exports import assert_same, config_of, tensors_of
from other_projects import AUTHORS
from processes import start

from mot_jax import cli
from mot_jax.config import MeshConfig, to_json
from mot_jax.data.tokenizers import ByteTokenizer
from mot_jax.errors import UserError
from mot_jax.interop.export import export_model
from mot_jax.interop.importing import import_model
from mot_jax.nn.sharding import parameter_spec
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.runs.restore import load_run, load_run_config
from mot_jax.runs.state import TrainState, abstract_state
from mot_jax.runs.tensor_files import INDEX, MODEL, open_tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, TrainState]:
    """A workdir with a checkpoint of random values, and its state, on a mesh of two by two devices."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    workdir.mkdir()
    shape, axes = (1, 2, 2, 1), ("data", "fsdp", "expert", "tensor")
    types = (jax.sharding.AxisType.Explicit,) * 4
    config = config_of(AUTHORS)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding),
        abstract_state(config, jax.make_mesh(shape, axes, axis_types=types, devices=jax.devices()[:4])),
    )
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(12, state, 0, config)
    (workdir / "config.json").write_text(to_json(config))
    (workdir / "data.json").write_text(json.dumps({"train": "1", "tokenizer": ByteTokenizer.fingerprint}))
    np.save(workdir / "companions.npy", np.arange(28, dtype=np.int32).reshape(4, 7))
    return workdir, state


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "out"
    export_model(saved[0], folder)
    return folder


@pytest.mark.parametrize("meshed", [False, True])
def test_an_export_equals_the_run_bit_for_bit(saved, exported, tmp_path, mesh_of, meshed):
    workdir, state = saved
    mesh = None
    if meshed:
        mesh, exported = mesh_of(fsdp=2, expert=4), tmp_path / "out"
        with jax.set_mesh(mesh):
            export_model(workdir, exported)
    assert sorted(path.name for path in exported.iterdir()) == ["companions.npy", "config.json", "data.json", MODEL]
    run = load_run(exported, mesh)
    assert (run.config, run.step) == (config_of(AUTHORS), 12)
    assert_same(run.params, state.params)
    for name, value in run.params.items():
        if mesh is not None:
            assert value.sharding.spec == parameter_spec(name, value.ndim) and value.sharding.mesh == mesh
    for name in ("companions.npy", "data.json"):
        assert (exported / name).read_bytes() == (workdir / name).read_bytes()


def test_large_exports_are_several_files_and_can_be_imported(saved, exported, tmp_path):
    params, out = saved[1].params, tmp_path / "out"
    export_model(exported, out, shard_bytes=4000)
    assert len(list(out.glob("model-*.safetensors"))) > 3 and (out / INDEX).exists()
    assert_same(load_run(out).params, params)
    for source in (out, out / INDEX):
        import_model(source, tmp_path / "again", overwrite=True)
        assert_same(tensors_of(tmp_path / "again"), params)
        assert (tmp_path / "again" / "config.json").read_text() == to_json(config_of(AUTHORS))
        assert open_tensors(epath.Path(tmp_path / "again")).metadata == {"step": "12"}
    export_model(exported, out, overwrite=True)  # in one file; the shards are removed
    assert not list(out.glob("model-*")) and not (out / INDEX).exists()


def test_bfloat16_exports_are_loaded_as_float32(exported, tmp_path):
    export_model(exported, tmp_path / "out", "bfloat16")
    narrow = {name: value.astype(jnp.bfloat16) for name, value in tensors_of(exported).items()}
    assert_same(tensors_of(tmp_path / "out"), narrow)
    wide = {name: value.astype(np.float32) for name, value in narrow.items()}
    assert_same(load_run(tmp_path / "out").params, wide)
    with pytest.raises(UserError, match="--dtype = 'float16': no such dtype"):
        export_model(exported, tmp_path / "other", "float16")


def test_an_export_includes_its_tokenizer(saved, tmp_path):
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "[UNK]": 1, "<|endoftext|>": 2}, unk_token="[UNK]")
    )
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "words.json"))
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(saved[0] / "checkpoints")
    (workdir / "config.json").write_text(to_json(config_of(AUTHORS, tokenizer=str(tmp_path / "words.json"))))
    export_model(workdir, tmp_path / "out")
    (tmp_path / "words.json").rename(tmp_path / "elsewhere.json")
    config = load_run_config(tmp_path / "out")
    assert config.data.tokenizer == str(tmp_path / "out" / "tokenizer.json")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["data"]["tokenizer"] == "tokenizer.json"
    export_model(tmp_path / "out", tmp_path / "second")  # from an export
    assert (tmp_path / "second" / "tokenizer.json").read_bytes() == (tmp_path / "elsewhere.json").read_bytes()
    (workdir / "data.json").write_text(json.dumps({"tokenizer": "another"}))
    (tmp_path / "elsewhere.json").rename(tmp_path / "words.json")
    with pytest.raises(UserError, match="does not match the checkpoints in workdir"):
        export_model(workdir, tmp_path / "third")


@pytest.fixture
def out(exported, tmp_path) -> Path:
    """A copy of an export, to be modified."""
    return Path(shutil.copytree(exported, tmp_path / "out"))


def test_no_file_is_overwritten_without_the_option(saved, exported, out, tmp_path):
    with pytest.raises(UserError, match="holds an export already; try another directory, or --overwrite"):
        export_model(exported, out)
    with pytest.raises(UserError, match="is where the tensors come from"):
        export_model(out, out, overwrite=True)
    with pytest.raises(UserError, match="is where the tensors come from"):
        import_model(out / MODEL, out, overwrite=True)
    with pytest.raises(UserError, match="holds checkpoints, which is not part of an export"):
        export_model(out, saved[0], overwrite=True)
    backup = out / "model-00001-of-00002.safetensors.bak"  # of the user, not a part of an export
    backup.write_text("")
    with pytest.raises(UserError, match=f"holds {backup.name}, which is not part of an export"):
        export_model(exported, out, overwrite=True)
    backup.unlink()
    incomplete = out / "model-00001-of-00002.safetensors.new"  # of an export that was killed
    incomplete.write_text("")
    with pytest.raises(UserError, match="holds an export already"):
        export_model(exported, out)
    incomplete.unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; try a new directory"):
        export_model(out, tmp_path / "file")
    for path in out.iterdir():
        assert path.read_bytes() == (exported / path.name).read_bytes()


def test_an_interrupted_export_is_not_loaded(saved, exported, out, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mot_jax.interop.export.to_json", killed)
        with pytest.raises(KeyboardInterrupt):
            export_model(exported, out, overwrite=True)
    with pytest.raises(UserError, match=r"holds no run \(no config.json\)"):
        load_run(out)
    export_model(exported, out, overwrite=True)
    assert_same(load_run(out).params, saved[1].params)


def test_damaged_tensors_and_a_different_config_are_errors_of_one_line_each(out):
    content = (out / MODEL).read_bytes()
    for damaged, words in {
        content[:-1]: "cannot be read",
        content.replace(b'"12"', b'"1x"'): "its step is '1x', must be a number",
    }.items():
        (out / MODEL).write_bytes(damaged)
        with pytest.raises(UserError, match=words):
            load_run(out)
    (out / MODEL).write_bytes(content)
    model = dataclasses.replace(AUTHORS, final_norm=True, vocab_size=300)
    (out / "config.json").write_text(to_json(config_of(model)))
    with pytest.raises(UserError) as error:
        load_run(out)
    assert sorted(fault.removeprefix(f"{out}: ") for fault in error.value.faults) == [
        "tensor final_norm/bias: is missing, must have shape (12,)",
        "tensor final_norm/scale: is missing, must have shape (12,)",
        "tensor head: has shape (12, 260), must have (12, 300)",
        "tensor token_embedding: has shape (260, 12), must have (300, 12)",
    ]


def test_the_commands_export_and_import(saved, exported, tmp_path, capsys):
    workdir, state = exported, saved[1]
    cli.main(["export", str(workdir), "--output", str(tmp_path / "out")])
    size = sum(value.size for value in state.params.values())
    assert f"out: step 12, {size:,} parameters in " in capsys.readouterr().out
    cli.main(["import", str(tmp_path / "out" / MODEL), "--output", str(tmp_path / "again")])
    assert_same(tensors_of(tmp_path / "again"), state.params)
    capsys.readouterr()
    (tmp_path / "theirs.bin").write_bytes(b"")
    for arguments, words in {
        ("export", str(workdir)): "--output is missing; try mot export runs/demo --output runs/mine",
        ("export", str(tmp_path / "none"), "--output", "x"): "no such directory",
        ("import", str(tmp_path / "theirs.bin"), "--output", "x"): "is a pickle, which can run code",
        ("import", "x", "--config", str(tmp_path / "none.py"), "--output", "x"): "no such file",
    }.items():
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words in line


@pytest.mark.slow
def test_two_processes_gather_their_shards(saved, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(saved[0] / "checkpoints")
    config = dataclasses.replace(config_of(AUTHORS), mesh=MeshConfig(fsdp=2, expert=2))
    (workdir / "config.json").write_text(to_json(config))
    processes = start([str(workdir), "--output", str(tmp_path / "out")], 2, 2, tmp_path / "record", command="export")
    logs = [tmp_path / f"record.{i}.log" for i in range(2)]
    assert [process.wait(200) for process in processes] == [0, 0], [log.read_text() for log in logs]
    assert "parameters in" in logs[0].read_text() and "parameters in" not in logs[1].read_text()
    assert_same(load_run(tmp_path / "out").params, saved[1].params)
