"""A run as its user sees it: files, resuming, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from mot_jax.config import Config, InitConfig, LoggingConfig, MeshConfig, OptimizerConfig, to_json
from mot_jax.data.order import filled_share
from mot_jax.data.text import open_split, open_tokenizer
from mot_jax.errors import UserError
from mot_jax.runs import metrics as log
from mot_jax.training import loop

OF_THE_MACHINE = ("tokens_per_second", "model_flops_per_second", "data_wait", "seconds_left", "mfu")


def numbers(workdir: epath.Path) -> list[log.Row]:
    """The rows without what depends on how fast the machine was."""
    return [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in log.read_rows(workdir)]


@pytest.fixture(scope="module")
def finished(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    """The undisturbed run."""
    workdir = epath.Path(tmp_path_factory.mktemp("runs")) / "undisturbed"
    loop.train(tiny, workdir)
    return workdir


def test_a_run_leaves_everything_that_the_readme_names(finished, tiny):
    rows = numbers(finished)
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 13))
    validation = [row for row in rows if row["split"] == "validation"]
    assert [row["step"] for row in validation] == [6, 12]
    assert validation[0]["windows"] == 64 < validation[1]["windows"]  # the last one scores the whole split
    # Every byte of the split is scored, and every text has one end of text: a few more tokens than bytes.
    assert validation[1]["bits_per_byte"] > validation[1]["loss"] / 0.6932
    assert validation[1]["loss"] < validation[0]["loss"] < rows[0]["loss"]
    assert json.loads((finished / "config.json").read_text())["training"]["steps"] == 12
    assert (finished / "config.json").read_text() == to_json(tiny)
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "sample.txt").read_text().count("--- continued") == 4  # one full group
    assert {int(p.name) for p in (finished / "checkpoints").iterdir()} == {8, 12}
    assert any((finished / "tensorboard").iterdir())


def test_a_finished_run_says_so_and_changes_nothing(finished, tiny, capsys):
    before = {str(p): p.read_bytes() for p in sorted(finished.glob("*")) if p.is_file()}
    result = loop.train(tiny, finished)
    assert result["step"] == 12 and result["split"] == "validation"
    assert "nothing left to train" in capsys.readouterr().out
    assert before == {str(p): p.read_bytes() for p in sorted(finished.glob("*")) if p.is_file()}


def test_what_a_finished_run_lacks_is_made(finished, tiny, tmp_path):
    """A kill between the last checkpoint and the picture."""
    workdir = epath.Path(shutil.copytree(finished, tmp_path / "copy"))
    (workdir / "loss.png").unlink()
    (workdir / "sample.txt").unlink()
    loop.train(tiny, workdir)
    assert (workdir / "loss.png").exists()
    assert (workdir / "sample.txt").read_text() == (finished / "sample.txt").read_text()
    assert numbers(workdir) == numbers(finished)


class StoppedError(Exception):
    pass


def stop_at(monkeypatch, step: int) -> None:
    """Ends the next run in the middle of that step."""
    track = log.Console.track

    def stopping(self, steps, done):
        for at in track(self, steps, done):
            if at == step:
                raise StoppedError
            yield at

    monkeypatch.setattr(log.Console, "track", stopping)


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 7, pytest.param(9, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(finished, tiny, tmp_path, monkeypatch, step):
    workdir = epath.Path(tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(StoppedError):
            loop.train(tiny, workdir)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "split": "tra')  # a row that the end cut short
    loop.train(dataclasses.replace(tiny, logging=dataclasses.replace(tiny.logging, tensorboard=False)), workdir)
    assert numbers(workdir) == numbers(finished)
    assert (workdir / "sample.txt").read_text() == (finished / "sample.txt").read_text()


def test_sigterm_saves_a_checkpoint_and_ends_with_its_exit_code(finished, tiny, tmp_path, monkeypatch, capsys):
    workdir, track = epath.Path(tmp_path / "run"), log.Console.track

    def signalled(self, steps, done):
        for at in track(self, steps, done):
            if at == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield at

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(log.Console, "track", signalled)
        with pytest.raises(SystemExit) as stopped:
            loop.train(tiny, workdir)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert "SIGTERM: stopped after step 5, with a checkpoint" in capsys.readouterr().out
    assert {int(p.name) for p in (workdir / "checkpoints").iterdir()} == {4, 5}
    assert [row["step"] for row in numbers(workdir)] == [1, 2, 3, 4, 5]
    loop.train(tiny, workdir)
    assert numbers(workdir) == numbers(finished)


@pytest.mark.slow
def test_a_run_can_be_extended(tiny, tmp_path):
    workdir = epath.Path(tmp_path / "run")
    loop.train(dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, steps=4)), workdir)
    loop.train(dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, steps=6)), workdir)
    assert [row["step"] for row in numbers(workdir) if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert json.loads((workdir / "config.json").read_text())["training"]["steps"] == 6
    with pytest.raises(UserError, match=r"training.steps: 6 in the run, now 5; a run can be extended"):
        loop.train(dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, steps=5)), workdir)


def modified(directory: epath.Path) -> dict[str, int]:
    """When each file below was last written."""
    return {str(path): path.stat().st_mtime_ns for path in Path(directory).rglob("*")}


def test_another_experiment_does_not_touch_a_workdir(finished, tiny):
    files = modified(finished)
    other = dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, seed=3, batch_size=64))
    with pytest.raises(UserError) as error:
        loop.train(other, finished)
    assert [
        ("seed: 0 in the run, now 3" in f, "batch_size: 32 in the run, now 64" in f) for f in sorted(error.value.faults)
    ] == [
        (False, True),
        (True, False),
    ]
    assert files == modified(finished)


def test_a_directory_of_other_things_is_not_a_workdir(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds files, but no run .* try .*/run"):
        loop.train(tiny, tmp_path)
    with pytest.raises(UserError, match="must be a directory, and is a file"):
        loop.train(tiny, tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_too_little_disk_is_known_before_the_start(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"its checkpoints need .* MB more, and 0 MB are free"):
        loop.train(tiny, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_holds_the_checkpoints_already_needs_no_room_for_them(finished, tiny, monkeypatch):
    monkeypatch.setattr(loop.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    assert loop.train(tiny, finished)["step"] == 12


def test_a_run_on_other_text_is_not_gone_on_with(finished, tiny, tmp_path):
    workdir = epath.Path(shutil.copytree(finished, tmp_path / "copy"))
    there = json.loads((workdir / "data.json").read_text())
    (workdir / "data.json").write_text(json.dumps(there | {"train": "another"}))
    longer = dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, steps=20))
    with pytest.raises(UserError, match=rf"other text: train: another there, {there['train']} here"):
        loop.train(longer, workdir)
    assert (workdir / "config.json").read_text() == to_json(tiny)


@pytest.mark.slow
def test_an_extended_run_that_is_killed_at_its_end_is_finished_again(finished, tiny, tmp_path, monkeypatch):
    workdir = epath.Path(shutil.copytree(finished, tmp_path / "copy"))
    longer = dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, steps=14))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "sample_text", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.train(longer, workdir)
    assert not (workdir / "loss.png").exists()  # the mark of a finished run, which was that of the shorter one
    loop.train(longer, workdir)
    assert (workdir / "loss.png").exists()


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(finished, tiny, tmp_path, monkeypatch):
    workdir = epath.Path(tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(StoppedError):
            loop.train(tiny, workdir)
    loop.train(dataclasses.replace(tiny, mesh=MeshConfig(data=2, expert=4)), workdir)
    for row, expected in zip(numbers(workdir), numbers(finished), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert (workdir / "sample.txt").read_text().count("--- continued") == 4


@pytest.mark.slow
def test_a_vocabulary_larger_than_the_tokenizers_writes_no_unknown_token(tiny, tmp_path, capsys):
    roomy = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, vocab_size=4096))
    short = dataclasses.replace(roomy, training=dataclasses.replace(tiny.training, steps=1))
    one_document = dataclasses.replace(short, data=dataclasses.replace(tiny.data, validation_split="validation[:1%]"))
    loop.train(one_document, tmp_path / "run")
    assert (tmp_path / "run" / "sample.txt").exists()
    said = capsys.readouterr().out
    assert "warning: validation groups are filled to 25%" in said
    advice = dict(re.findall(r"data\.(\w+) = '(train\S+)'", said))  # which helps
    assert set(advice) == {"train_split", "validation_split"}
    assert filled_share(open_split(short, advice["validation_split"], open_tokenizer(short)).documents, 4) > 0.9


def test_numbers_that_are_not_finite_are_null(tmp_path):
    metrics = log.MetricsLog(epath.Path(tmp_path), 0, LoggingConfig(tensorboard=False))
    metrics.write({"step": 1, "split": "train", "loss": float("nan"), "mfu": float("inf")})
    metrics.close()
    assert log.read_rows(epath.Path(tmp_path)) == [{"step": 1, "split": "train", "loss": None, "mfu": None}]


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(tiny, tmp_path):
    small = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, vocab_size=256))
    with pytest.raises(UserError, match=r"model.vocab_size = 256: must be at least the 257 .* try 257"):
        loop.train(small, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ten_kills_change_no_bit(finished, tiny, tmp_path):
    """SIGKILL at random moments, during saves too: every row that follows equals the undisturbed run's."""
    steps = dataclasses.replace(tiny.training, steps=600, checkpoint_every=3, validate_every=100)
    config = dataclasses.replace(tiny, training=steps, data=dataclasses.replace(tiny.data, validation_windows=32))
    (tmp_path / "long.py").write_text(
        "from mot_jax.config import from_json\n\n\ndef get_config():\n    return from_json("
        + repr(to_json(config))
        + ")\n"
    )
    undisturbed, killed = epath.Path(tmp_path / "undisturbed"), epath.Path(tmp_path / "killed")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}

    def start(workdir: epath.Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "mot_jax.cli", "train", str(tmp_path / "long.py"), "--workdir", str(workdir)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    assert start(undisturbed).wait() == 0
    moments, kills = random.Random(0), 0
    rows_seen = []
    while kills < 10:
        process = start(killed)
        begun = len(log.read_rows(killed))
        # Not before it trains again, and then anywhere within the next steps and saves.
        target = begun + moments.randrange(1, 30)
        while process.poll() is None and len(log.read_rows(killed)) < target:
            time.sleep(0.01)
        time.sleep(moments.random() * 0.2)
        assert process.poll() is None, "finished before ten kills: make the run longer"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        rows_seen.append(len(log.read_rows(killed)))
    assert start(killed).wait() == 0
    assert numbers(killed) == numbers(undisturbed)
    assert len(set(rows_seen)) > 3


def test_a_masked_model_trains_and_fills_gaps(tiny, tmp_path, capsys):
    """With documents kept apart in attention; what it prints and writes is about masked tokens."""
    model = dataclasses.replace(tiny.model, objective="masked", vocab_size=258, document_mask=True)
    optimizer = dataclasses.replace(tiny.training.optimizer, learning_rate=2e-2)
    training = dataclasses.replace(tiny.training, steps=60, optimizer=optimizer, validate_every=60, checkpoint_every=60)
    row = loop.train(dataclasses.replace(tiny, model=model, training=training), tmp_path / "run")
    rows = [r for r in log.read_rows(epath.Path(tmp_path) / "run") if r["split"] == "train"]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert 0.1 < row["most_frequent"] < 0.5 and row["accuracy"] > 0.9 * row["most_frequent"]
    assert row["tokens"] == pytest.approx(0.15 * 16 * row["windows"], rel=0.05)
    assert "masked tokens right" in capsys.readouterr().out
    sample = (tmp_path / "run" / "sample.txt").read_text()
    assert sample.count("--- filled") == 4 and "\N{WHITE SQUARE}" in sample


@pytest.mark.slow
def test_a_masked_model_learns_more_than_the_most_frequent_token(tiny, tmp_path):
    sizes = {"d_model": 32, "d_ff": 64, "final_norm": True, "init": InitConfig(scale=1.0)}
    model = dataclasses.replace(tiny.model, objective="masked", vocab_size=258, **sizes)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=20, beta2=0.95, clip_norm=1.0)
    steps = {"steps": 1500, "validate_every": 1500, "checkpoint_every": 1500, "log_every": 100}
    training = dataclasses.replace(tiny.training, optimizer=optimizer, **steps)
    row = loop.train(dataclasses.replace(tiny, model=model, training=training), tmp_path / "run")
    assert row["accuracy"] > row["most_frequent"] + 0.05
