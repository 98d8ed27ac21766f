"""The hooks of a run: rows are written before the checkpoint that follows them, and a SIGTERM stops the run."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
from etils import epath
from tiny_run import numbers

from mot_jax.runs import status
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.training import Hook, train


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
