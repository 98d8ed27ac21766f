"""Parameters of a run from its workdir, while another process may be writing there."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from safetensors.numpy import save_file

from mot_jax.config import Config, MeshConfig, to_json
from mot_jax.errors import RetryableError, UserError
from mot_jax.nn.sharding import make_mesh
from mot_jax.runs import checkpoint, manifest, restore
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.runs.restore import load_run, load_run_config, tensor_faults
from mot_jax.runs.state import TrainState, abstract_state
from mot_jax.runs.tensor_files import open_tensors
from mot_jax.runtime import distributed


@pytest.fixture(scope="module")
def saved(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[epath.Path, TrainState]:
    """A workdir with two checkpoints, made on eight devices, and the state of the newer one."""
    workdir = epath.Path(tmp_path_factory.mktemp("runs"))
    mesh = make_mesh(dataclasses.replace(tiny, mesh=MeshConfig(data=2, expert=4)))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding),
        abstract_state(tiny, mesh),
    )
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(4, state._replace(params=optax.tree.get(state.opt_state, "mu")), 0, tiny)
        checkpoints.save(12, state, 0, tiny)
    (workdir / "config.json").write_text(to_json(tiny))
    return workdir, state


def modification_times(directory: epath.Path) -> dict[str, int]:
    """The modification times of all files in a directory."""
    return {str(path): path.stat().st_mtime_ns for path in Path(directory).rglob("*")}


def test_the_newest_parameters_on_one_device_without_writing(saved, tiny):
    workdir, state = saved
    leftover = workdir / "checkpoints" / "16.orbax-checkpoint-tmp-1"  # a save that is under way, or was killed
    leftover.mkdir()
    before = modification_times(workdir)
    run = load_run(workdir)
    assert before == modification_times(workdir)
    assert (run.config, run.step) == (tiny, 12)
    assert run.params.keys() == state.params.keys()
    for name, value in run.params.items():
        assert value.devices() == {jax.devices()[0]}
        np.testing.assert_array_equal(value, state.params[name])


def test_parameters_are_placed_on_the_default_device(saved):
    device = jax.devices()[1]
    with jax.default_device(device):
        params = load_run(saved[0]).params
    assert all(value.devices() == {device} for value in params.values())


def test_parameters_are_placed_on_the_mesh_that_is_given_or_set(saved, mesh_of):
    workdir, state = saved
    mesh = mesh_of(expert=2)
    with jax.set_mesh(mesh):
        on_set_mesh = load_run(workdir).params
    for params in (on_set_mesh, load_run(workdir, mesh).params):
        w_in = params["stacks/0/0/feed_forward/w_in"]
        assert w_in.sharding.mesh == mesh and w_in.sharding.shard_shape(w_in.shape)[1] * 2 == w_in.shape[1]
        np.testing.assert_array_equal(w_in, state.params["stacks/0/0/feed_forward/w_in"])


def test_a_checkpoint_that_a_newer_one_replaces_while_it_is_read(saved, tmp_path, monkeypatch):
    workdir = epath.Path(shutil.copytree(saved[0], tmp_path / "run"))
    load = restore.ocp.load

    def overtaken(path, *arguments):
        monkeypatch.setattr(restore.ocp, "load", load)
        path.rename(path.with_name("16"))
        raise FileNotFoundError(path)

    def overtaken_by_nothing(path, *arguments):
        raise FileNotFoundError(path)

    monkeypatch.setattr(restore.ocp, "load", overtaken)
    assert load_run(workdir).step == 16
    # Nothing newer, and all its files are as they were saved: an error.
    monkeypatch.setattr(restore.ocp, "load", overtaken_by_nothing)
    with pytest.raises(UserError, match=r"its checkpoint 16 cannot be read \(.*; `mot verify .*/run` checks its files"):
        load_run(workdir)


READ_BOTH = """
import sys
import jax
from mot_jax.errors import ReportedError, UserError
from mot_jax.nn.sharding import make_mesh
from mot_jax.runs.tensor_files import open_tensors
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.runs.restore import load_run, load_run_config, load_training, tensor_faults

def restore_state(workdir):
    config = load_run_config(workdir)
    with Checkpoints(workdir + "/checkpoints") as checkpoints:
        checkpoints.restore(12, config, make_mesh(config, jax.devices()[:1]))

for read in (load_run, restore_state):
    try:
        read(sys.argv[1])
    except ReportedError as error:
        print(type(error).__name__, *error.faults)
"""


def read_errors(workdir: epath.PathLike) -> list[str]:
    """The errors of `load_run` and of `Checkpoints.restore` for a checkpoint.

    In a separate process, since Orbax may leave coroutines and threads behind.
    """
    done = subprocess.run([sys.executable, "-c", READ_BOTH, workdir], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    return done.stdout.splitlines()


def restore_state(workdir: Path, config: Config) -> None:
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.restore(12, config, make_mesh(config, jax.devices()[:1]))


def test_a_disk_or_store_that_does_not_answer_is_no_damage(saved, tiny, monkeypatch):
    def silent(*_: object) -> None:
        try:
            raise OSError(errno.EIO, "Input/output error")
        except OSError as error:
            raise ValueError("Orbax's own words\nin lines") from error

    monkeypatch.setattr(restore.ocp, "load", silent)
    monkeypatch.setattr(checkpoint.ocp, "load", silent)
    for read in (load_run, lambda workdir: restore_state(workdir, tiny)):
        with pytest.raises(RetryableError, match=r"12 could not be read \(OSError: .*Input/output error\); the same"):
            read(saved[0])


@pytest.mark.parametrize("faulty", [0, 1])
def test_processes_read_one_checkpoint_and_try_again_together(saved, monkeypatch, faulty):
    """Two processes as one of them sees it: process 0 sees an older checkpoint, which one of them finds deleted."""
    newest, load, read = iter([4, 12, 12]), restore.ocp.load, []

    def gathered(value: object) -> list:
        return [value or (faulty == 0 and len(read) == 1), value] if isinstance(value, bool) else [value, value]

    def loaded(path, *arguments):
        read.append(path.name)
        if faulty == 1 and len(read) == 1:
            raise FileNotFoundError(path)
        return load(path, *arguments)

    monkeypatch.setattr(distributed, "gather", gathered)
    monkeypatch.setattr(restore, "newest_intact", lambda folder, step: (next(newest), {}))
    monkeypatch.setattr(restore, "steps_of", lambda folder: [12])
    monkeypatch.setattr(restore.ocp, "load", loaded)
    assert load_run(saved[0]).step == 12
    assert read == ["4", "12"]


def test_a_directory_without_a_run_is_one_line(saved, tiny, tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=r"run: no such directory; try"):
        load_run(workdir)
    workdir.mkdir()
    with pytest.raises(UserError, match=r"holds no run \(no config.json\); try"):
        load_run(workdir)
    (workdir / "config.json").write_text(to_json(tiny))
    with pytest.raises(UserError, match=r"has no checkpoint yet; try"):
        load_run(workdir)
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    shutil.copytree(saved[0] / "checkpoints", workdir / "checkpoints")
    model = dataclasses.replace(tiny.model, final_norm=True)
    (workdir / "config.json").write_text(to_json(dataclasses.replace(tiny, model=model)))
    with pytest.raises(UserError, match=r"run/config.json: model.final_norm = true: checkpoint 12 was trained with fa"):
        load_run(workdir)
    put_saved_config(workdir, None)
    with pytest.raises(UserError, match=r"of another mot_jax, without final_norm/"):
        load_run(workdir)


def put_saved_config(workdir: epath.PathLike, config: dict[str, Any] | None) -> None:
    """Replace the config that checkpoint 12 holds; None removes it, as in checkpoints of early versions."""
    checkpoint = epath.Path(workdir) / "checkpoints" / "12"
    metadata = json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())
    metadata["custom_metadata"].pop("config")
    metadata["custom_metadata"] |= {"config": config} if config else {}
    (checkpoint / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    manifest.write(checkpoint, "test")


def test_differences_of_the_config_that_leave_the_model_as_it_was(saved, tiny, tmp_path):
    workdir = epath.Path(shutil.copytree(saved[0], tmp_path / "run"))
    model = dataclasses.replace(tiny.model, attention_kernel="auto", dtype="bfloat16", remat="blocks", loss_chunk=4)
    (workdir / "config.json").write_text(to_json(dataclasses.replace(tiny, model=model, mesh=MeshConfig(fsdp=2))))
    assert load_run(workdir).config.model.attention_kernel == "auto"
    earlier = json.loads(to_json(tiny))
    del earlier["model"]["norm_epsilon"], earlier["model"]["feed_forward"]["mixing"]["layer_norm"]
    (workdir / "config.json").write_text(json.dumps(earlier))  # of a version without these fields
    assert load_run(workdir).config == tiny
    (workdir / "config.json").write_text(to_json(tiny))
    for config in (earlier, earlier | {"version": 2}, None):
        put_saved_config(workdir, config)
        assert load_run(workdir).config == tiny


def test_a_checkpoint_of_another_state_is_refused_in_one_line(saved, tmp_path):
    """Usually its config is refused before; here the config matches and the checkpoint does not."""
    copy = Path(shutil.copytree(saved[0], tmp_path / "run"))
    config = load_run_config(copy)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=64))
    (copy / "config.json").write_text(to_json(wider))
    put_saved_config(copy, json.loads(to_json(wider)))
    of_parameters, of_state = read_errors(copy)
    assert of_parameters.startswith(f"UserError workdir = {copy}: its checkpoint 12 cannot be read (ValueError: ")
    assert "its checkpoint 12 cannot be read into this config's state by mot_jax 0.1.0 (ValueError: " in of_state


def test_tensors_are_compared_with_the_parameters_of_a_model(tmp_path):
    dtypes = {"good": "float32", "narrow": "float16", "wide": "float32", "whole": "int32", "tiny": "float8_e4m3fn"}
    dtypes |= {"table": "int32", "decimal_table": "float32"}
    values = {name: np.zeros((2, 3), dtype) for name, dtype in dtypes.items()}
    values |= {"turned": values["good"], "extra": values["good"]}
    save_file(values, tmp_path / "model.safetensors")
    parameters = {name: jax.ShapeDtypeStruct((2, 3), jnp.float32) for name in [*dtypes, "absent"]}
    parameters |= {
        "turned": jax.ShapeDtypeStruct((3, 2), jnp.float32),
        "wide": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16),
        "table": jax.ShapeDtypeStruct((2, 3), jnp.int32),
        "decimal_table": jax.ShapeDtypeStruct((2, 3), jnp.int32),
    }
    advice = "or narrower; try model.param_dtype = 'float32'"
    assert tensor_faults(open_tensors(epath.Path(tmp_path)), parameters, "here") == [
        "here: tensor extra: the model has no parameter for it",
        f"here: tensor wide: is float32, must be bfloat16 {advice}",
        f"here: tensor whole: is int32, must be float32 {advice}",
        f"here: tensor tiny: is F8_E4M3, must be float32 {advice}",
        "here: tensor decimal_table: is float32, must be int32; try mot export again",
        "here: tensor absent: is missing, must have shape (2, 3)",
        "here: tensor turned: has shape (2, 3), must have (3, 2)",
    ]
