"""The hooks of a run: rows are written before the checkpoint that follows them, and a SIGTERM stops the run."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from types import SimpleNamespace

import pytest
from etils import epath
from tiny_run import numbers

from mot_jax.nn.sharding import make_mesh
from mot_jax.runs import status
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.training import Hook, train
from mot_jax.training.hooks import Meter


@pytest.mark.parametrize(
    ("number", "words", "code"),
    [
        (signal.SIGTERM, "SIGTERM", 143),
        pytest.param(signal.SIGINT, "Ctrl-C", 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_a_checkpoint_and_ends_with_its_exit_code(finished, tiny, tmp_path, capsys, number, words, code):
    class Signal(Hook):
        def after_step(self, trainer, metrics):
            if trainer.step == 4:
                os.kill(os.getpid(), number)

    workdir, before = epath.Path(tmp_path / "run"), signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train(tiny, workdir, [Signal()])
    assert stopped.value.code == code and signal.getsignal(number) == before
    line = f"{words}: stopped after step 5, with a checkpoint; the same command resumes the run"
    assert line in capsys.readouterr().out.splitlines()
    assert {int(p.name) for p in (workdir / "checkpoints").iterdir()} == {4, 5}
    assert [row["step"] for row in numbers(workdir)] == [1, 2, 3, 4, 5]
    content = status.read(workdir)
    state = {143: "preempted", 130: "interrupted"}[code]
    assert content is not None and (content["state"], content["step"], content["checkpoint"]) == (state, 5, 5)
    train(tiny, workdir)
    assert numbers(workdir) == numbers(finished)


@pytest.mark.slow
def test_every_row_is_written_before_the_checkpoint_that_follows(tiny, tmp_path, monkeypatch):
    """Even if rows are logged more rarely than checkpoints are saved: the last of them waits for the next step."""
    workdir, save, rows = tmp_path / "run", Checkpoints.save, []

    def saving(self: Checkpoints, step: int, *rest: object) -> None:
        rows.append((step, [(row["step"], row["split"]) for row in numbers(workdir)]))
        save(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", saving)
    training = dataclasses.replace(tiny.training, steps=8, log_every=3, validate_every=4, checkpoint_every=3)
    train(dataclasses.replace(tiny, training=training), workdir)
    logged = [(3, "train"), (4, "validation"), (6, "train"), (8, "train"), (8, "validation")]
    assert rows == [(3, logged[:1]), (6, logged[:3]), (8, logged)]


def test_the_time_left_has_the_pauses_since_the_first_one(tiny, monkeypatch):
    """A second a step, and pauses after every 20 steps: of 60 seconds, with compilation, and then of 5."""
    clock, trainer = [0.0], SimpleNamespace(step=0, data_wait=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    training = dataclasses.replace(tiny.training, steps=100)
    meter = Meter(dataclasses.replace(tiny, training=training), make_mesh(tiny))
    meter.restart(trainer)
    left = {}
    for step in range(10, 90, 10):
        clock[0] += 10
        trainer.step = step
        left[step] = meter.read(trainer, step)["seconds_left"]
        if step % 20 == 0:
            pause = 60.0 if step == 20 else 5.0
            clock[0] += pause
            meter.resume(trainer, pause)
    assert [left[step] for step in (10, 20, 30, 40)] == [90, 80, 70, 60]
    assert left[50] == pytest.approx(50 + 5 / 30 * 50) and left[80] == pytest.approx(20 + 10 / 60 * 20)
