"""The trainer driven from outside: step by step, with hooks, from a script."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import threading
from pathlib import Path

import pytest
from tiny_run import StopAt, StoppedError, numbers

from mot_jax.training import Hook, Trainer, begin, prepare, train
from mot_jax.training import trainer as trainer_module

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_loop.py"


@pytest.mark.slow
def test_steps_made_from_outside_are_those_of_a_run(finished, tiny, tmp_path):
    losses = []
    run = prepare(tiny, tmp_path / "run")
    with Trainer(run, begin(run)) as trainer:
        while not trainer.at_last_step:
            metrics = trainer.train_step()
            losses.append(float(metrics["loss"]))
            assert (trainer.step, trainer.next_example) == (len(losses), 32 * len(losses))
        result = trainer.evaluate()
    rows = numbers(finished)
    assert losses == [row["loss"] for row in rows if row["split"] == "train"]
    assert result.items() <= rows[-1].items()


@pytest.mark.gpu
def test_a_trainer_resumes_from_a_checkpoint(finished, tiny, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(workdir / "checkpoints" / "12")
    run = prepare(tiny, workdir)
    with Trainer(run, begin(run)) as trainer:
        assert trainer.step == 8
        losses = [float(trainer.train_step()["loss"]) for _ in range(4)]
    rows = [row for row in numbers(finished) if row["split"] == "train"]
    assert losses == [row["loss"] for row in rows[8:]]


@pytest.mark.slow
def test_the_custom_loop_of_the_examples_resumes_and_ends_like_an_undisturbed_run(
    finished, tiny, tmp_path, monkeypatch, capsys
):
    spec = importlib.util.spec_from_file_location("custom_loop", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def train_step(trainer: Trainer) -> dict:
        if trainer.step == 9:
            raise StoppedError
        return make_step(trainer)

    make_step = Trainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(StoppedError):
            module.main(tiny, str(tmp_path / "run"))
    assert module.main(tiny, str(tmp_path / "run")) == numbers(finished)[-1]["bits_per_byte"]
    losses = {row["step"]: row["loss"] for row in numbers(finished) if row["split"] == "train"}
    # Steps 4 and 8 were made once: the second call began after the checkpoint of step 8.
    assert capsys.readouterr().out.splitlines() == [f"step {step}: loss {losses[step]:.4f}" for step in (4, 8, 12)]


class Recorder(Hook):
    """Writes down its calls; all recorders of a test share a list."""

    def __init__(self, name: str, calls: list[str]):
        self._name, self._calls = name, calls

    @contextlib.contextmanager
    def around(self, trainer: Trainer):
        self._calls.append(f"{self._name} enters at {trainer.step}")
        try:
            yield
        finally:
            self._calls.append(f"{self._name} leaves at {trainer.step}")

    def after_step(self, trainer: Trainer, metrics: dict) -> None:
        self._calls.append(f"{self._name} after {trainer.step}")

    def at_end(self, trainer: Trainer) -> None:
        self._calls.append(f"{self._name} ends at {trainer.step}")


@pytest.fixture(scope="module")
def trainer(tiny, tmp_path_factory):
    """A trainer of twelve steps; each test makes some of them."""
    run = prepare(tiny, tmp_path_factory.mktemp("hooks") / "run")
    with Trainer(run, begin(run)) as trainer:
        yield trainer


def test_hooks_are_called_in_order_until_one_of_them_stops_the_training(trainer):
    class Stop(Hook):
        def after_step(self, trainer, metrics):
            trainer.stop()

    calls: list[str] = []
    trainer.train([Recorder("a", calls), Stop(), Recorder("b", calls)])
    assert calls == [
        "a enters at 0",
        "b enters at 0",
        "a after 1",
        "b after 1",  # also those after the hook that stops
        "b leaves at 1",
        "a leaves at 1",
    ]
    assert trainer.stopping and not trainer.at_last_step


def test_hooks_leave_their_contexts_after_an_error_and_end_only_with_the_last_step(tiny, tmp_path):
    calls: list[str] = []
    run = prepare(tiny, tmp_path / "run")
    with Trainer(run, begin(run)) as trainer:
        with pytest.raises(StoppedError):
            trainer.train([Recorder("a", calls), StopAt(2)])
        assert calls == ["a enters at 0", "a after 1", "a after 2", "a leaves at 2"]
        calls.clear()
        trainer.train([Recorder("a", calls)])
    assert calls == [
        "a enters at 2",
        *(f"a after {i}" for i in range(3, 13)),
        "a leaves at 12",
        "a ends at 12",
    ]


@pytest.mark.parametrize("moment", ["compilation", "step"])
def test_no_thread_outlives_an_error(tiny, tmp_path, monkeypatch, moment):
    if moment == "compilation":
        monkeypatch.setattr(trainer_module, "make_train_step", lambda *_: 1 / 0)
    run = prepare(tiny, tmp_path / "run")
    start, before = begin(run), set(threading.enumerate())
    error = ZeroDivisionError if moment == "compilation" else StoppedError
    with pytest.raises(error), Trainer(run, start) as trainer:
        trainer.train([StopAt(1)])
    threads = set(threading.enumerate()) - before
    for thread in threads:
        thread.join(10)  # one that is reading ends after this block
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.slow
def test_a_stopped_run_leaves_a_checkpoint_and_no_result(finished, tiny, tmp_path):
    class StopAfter(Hook):
        def after_step(self, trainer, metrics):
            if trainer.step == 7:
                trainer.stop()

    row = train(tiny, tmp_path / "run", [StopAfter()])
    assert row["step"] == 6 and not (tmp_path / "run" / "result.json").exists()
    assert {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()} == {4, 7}
    assert [row["step"] for row in numbers(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 6, 7]
    train(tiny, tmp_path / "run")
    assert numbers(tmp_path / "run") == numbers(finished)
