"""Runs whose loss, gradient or parameters become infinite or NaN, from the command line and with hooks."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from etils import epath
from tiny_run import numbers

from mot_jax import cli
from mot_jax.config import Config, InitConfig, MeshConfig, from_json, to_json
from mot_jax.errors import DivergedError, UserError
from mot_jax.nn.transformer import Transformer
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.training import Hook, begin, prepare, train
from mot_jax.training.divergence import DivergenceWatch

MESHES = [
    pytest.param(MeshConfig(data=1), id="1 device"),
    pytest.param(MeshConfig(data=2, expert=4), id="8 devices"),
]


def changed(config: Config, learning_rate: float | None = None, **training: Any) -> Config:
    """The config with other fields of `training`, and no TensorBoard file."""
    optimizer = config.training.optimizer
    if learning_rate is not None:
        optimizer = dataclasses.replace(optimizer, learning_rate=learning_rate)
    logging = dataclasses.replace(config.logging, tensorboard=False)
    return dataclasses.replace(
        config, training=dataclasses.replace(config.training, optimizer=optimizer, **training), logging=logging
    )


def mot(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    """The exit code of a command, and the lines of its errors."""
    code = 0
    capsys.readouterr()
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, capsys.readouterr().err.splitlines()


def config_file(config: Config, folder: Path) -> Path:
    file = folder / "config.py"
    file.write_text(
        f"from mot_jax.config import from_json\n\ndef get_config():\n    return from_json({to_json(config)!r})\n"
    )
    return file


def train_rows(workdir: epath.PathLike) -> dict[int, dict]:
    return {row["step"]: row for row in numbers(workdir) if row["split"] == "train"}


def saved_steps(workdir: epath.PathLike) -> set[int]:
    return {int(path.name) for path in (epath.Path(workdir) / "checkpoints").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_run_that_diverges_leaves_its_last_finite_checkpoint(finished, tiny, tmp_path, capsys, mesh):
    """A learning rate of 1e30 from step 13 on; checkpoints are due at 16, 20 and 24."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    config = dataclasses.replace(changed(tiny, 1e30, steps=60), mesh=mesh)
    (workdir / "config.json").write_text(to_json(config))
    content = {path: path.read_bytes() for path in (workdir / "checkpoints" / "12").rglob("*") if path.is_file()}
    command = "train", config_file(config, tmp_path), "--workdir", workdir
    code, errors = mot(capsys, *command)
    assert code == 3
    assert errors == [
        f"error: workdir = {workdir}: has diverged: the updates of 10 steps in a row were skipped, since their loss "
        f"or gradient was not finite; its last checkpoint, {workdir}/checkpoints/12, is that of step 12; try a "
        "training.optimizer.learning_rate below 1e+30 and a new --workdir"
    ]
    assert saved_steps(workdir) == {8, 12}
    assert content == {path: path.read_bytes() for path in content}
    rows = train_rows(workdir)
    assert rows[13]["skipped"] == 0 and math.isfinite(rows[13]["loss"])
    assert [rows[step]["skipped_in_a_row"] for step in range(14, 24)] == list(range(1, 11))
    assert all(rows[step]["loss"] is None and rows[step]["update_rms"] == 0 for step in range(14, 24))
    assert (rows[14]["first_example"], rows[14]["last_example"]) == (13 * 32, 14 * 32 - 1)
    assert mot(capsys, *command) == (code, errors)  # from the checkpoint
    assert mot(capsys, "evaluate", workdir, "--windows", 64, "--json", tmp_path / "score.json")[0] == 0
    assert math.isfinite(json.loads((tmp_path / "score.json").read_text())["loss"])


@pytest.mark.slow
def test_a_run_that_diverges_at_once_has_no_checkpoint(tiny, tmp_path, capsys):
    """The first update leaves parameters of 1e30, finite but of no use: the norm is not."""
    config = changed(tiny, 1e30, steps=60, checkpoint_every=1, log_every=10)
    command = "train", config_file(config, tmp_path), "--workdir", tmp_path / "run"
    for _ in range(2):
        code, (line,) = mot(capsys, *command)
        assert code == 3 and "10 steps in a row were skipped" in line and "it has no checkpoint; try" in line
        assert not saved_steps(tmp_path / "run")
    assert sorted(train_rows(tmp_path / "run")) == list(range(1, 12))  # logged in any case: unusable, then skipped
    code, (line,) = mot(capsys, "evaluate", tmp_path / "run")
    assert code == 2 and "has no checkpoint yet" in line


@pytest.mark.slow
def test_a_run_that_ends_before_it_is_known_to_diverge_has_no_result(tiny, tmp_path):
    """With an update that is infinite itself, in the last step."""
    with pytest.raises(DivergedError, match="norm of the parameters is not finite after step 1; it has no checkpoint"):
        train(changed(tiny, 1e38, steps=1), tmp_path / "run")
    assert not saved_steps(tmp_path / "run") and not (tmp_path / "run" / "result.json").exists()


# --- a few bad steps --------------------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch):
    """poison(3, 5): the activations of steps 3 and 5 are NaN."""

    def at(*steps: int) -> None:
        call = Transformer.__call__

        def poisoned(self, tokens, context, *rest, **others):
            out = call(self, tokens, context, *rest, **others)
            if not context.train:
                return out
            bad = (context.step + 1 == jnp.array(steps)).any()
            return out._replace(hidden=jnp.where(bad, jnp.nan, out.hidden))

        monkeypatch.setattr(Transformer, "__call__", poisoned)

    return at


@pytest.mark.slow
def test_training_resumes_after_skipped_steps(tiny, tmp_path, poison, monkeypatch):
    """A checkpoint that is due in such a step is saved after the next one that is not skipped."""
    poison(3, 4, 7)
    save, saved = Checkpoints.save, []

    def recording(self, step, *rest):
        saved.append(step)
        save(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", recording)
    train(changed(tiny, max_skipped=3, log_every=100), tmp_path / "run")
    assert saved == [5, 8, 12]
    rows = train_rows(tmp_path / "run")
    assert [(step, row["skipped"], row["skipped_in_a_row"]) for step, row in rows.items()] == [
        *((3, 1, 1), (4, 2, 2), (7, 3, 1), (12, 3, 0))
    ]
    assert math.isfinite(rows[12]["loss"])
    assert rows[12]["learning_rate"] == pytest.approx(_rate(tiny, updates_before=12 - 1 - 3))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 12


def _rate(config: Config, updates_before: int) -> float:
    t = config.training
    progress = (updates_before + 1 - t.optimizer.warmup_steps) / (t.steps - t.optimizer.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return t.optimizer.learning_rate * (t.optimizer.min_lr_ratio + (1 - t.optimizer.min_lr_ratio) * cosine)


@pytest.mark.slow
def test_the_counters_of_skipped_steps_are_those_of_the_checkpoint(tiny, tmp_path, poison):
    """Two skipped steps before a stop, and a third after it: three in a row."""

    class StopAfter(Hook):
        def after_step(self, trainer, metrics):
            if trainer.step == 4:
                trainer.stop()

    poison(3, 4, 5)
    config = changed(tiny, max_skipped=3)
    train(config, tmp_path / "run", [StopAfter()])
    assert saved_steps(tmp_path / "run") == {4}
    state = begin(prepare(config, tmp_path / "run")).state
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (4, 2, 2)
    with pytest.raises(DivergedError, match=r"3 steps in a row .*checkpoints/4, is that of step 4"):
        train(config, tmp_path / "run")
    assert train_rows(tmp_path / "run")[5]["skipped_in_a_row"] == 3


# --- states that are not finite ---------------------------------------------------------------------------------------


def test_a_checkpoint_with_nan_is_refused_by_name(finished, tiny, tmp_path):
    """Such as those that versions before the check have saved."""
    workdir, config = epath.Path(shutil.copytree(finished, tmp_path / "run")), changed(tiny, steps=20)
    start = begin(prepare(config, workdir))
    name = "stacks/0/0/feed_forward/w_in"
    poisoned = start.state.params | {name: start.state.params[name] * jnp.nan}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(16, start.state._replace(params=poisoned), 512, config)
    with pytest.raises(UserError) as error:
        train(config, workdir)
    place = workdir / "checkpoints" / "16"
    assert error.value.faults == (
        f"workdir = {workdir}: checkpoint {place} has NaN or infinite values, in its parameters {name}; move "
        f"{place} away, and the one before is used",
    )
    shutil.rmtree(place)
    assert begin(prepare(config, workdir)).step == 12


@pytest.mark.filterwarnings("ignore:overflow")
def test_initial_values_that_are_infinite_are_refused(tiny, tmp_path):
    init, kind = InitConfig("normal", 1e30, None), dataclasses.replace(tiny.model.feed_forward, w_in_init_scale=1e38)
    model = dataclasses.replace(tiny.model, init=init, feed_forward=kind)
    with pytest.raises(UserError, match=r"the initial state has NaN .* in its parameters .*; try model.init.scale"):
        train(dataclasses.replace(tiny, model=model), tmp_path / "run")
    assert from_json((tmp_path / "run" / "config.json").read_text()).model == model


# --- spikes -----------------------------------------------------------------------------------------------------------


def watched(loss: float, skipped_in_a_row: int = 0, parameter_rms: float = 1.0) -> dict[str, float]:
    return {"loss": loss, "skipped_in_a_row": skipped_in_a_row, "parameter_rms": parameter_rms}


def test_a_loss_far_above_the_median_of_those_before_is_a_spike():
    watch = DivergenceWatch()
    assert [watch.read(watched(3.0)) for _ in range(19)] == [None] * 19
    assert watch.read(watched(9.0)) is None  # too few before
    assert watch.read(watched(4.4)) is None
    assert watch.read(watched(4.6)) == "loss 4.6000 is over 1.5 times 3.0000, the median of the 21 steps before"
    assert not any(watch.read(watched(6.0)) for _ in range(100))  # the same spike, then a new level
    assert watch.read(watched(9.1)) is not None
    unusable = watched(3.0) | {"parameter_rms": math.inf}
    assert "no checkpoint is saved" in watch.read(unusable) and not watch.usable
    assert watch.read(unusable) is None


@pytest.mark.slow
def test_the_examples_of_a_spike_are_logged(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mot_jax.training.divergence._ENOUGH", 2)
    monkeypatch.setattr("mot_jax.training.divergence._FACTOR", 0.5)  # the loss of the third step
    train(changed(tiny, steps=4, log_every=4), tmp_path / "run")
    rows = train_rows(tmp_path / "run")
    assert list(rows) == [3, 4] and (rows[3]["first_example"], rows[3]["last_example"]) == (64, 95)
    assert "the 2 steps before; examples 64 to 95 of the training order" in capsys.readouterr().out
