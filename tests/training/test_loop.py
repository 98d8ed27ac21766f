"""A run as its user sees it: its files, and resuming it after an error, a kill or an extension."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath
from tiny_run import StopAt, StoppedError, numbers

from mot_jax.cli.parsing import RUN_FILES
from mot_jax.config import InitConfig, MeshConfig, OptimizerConfig, to_json
from mot_jax.data.order import filled_share
from mot_jax.data.text import open_split, open_tokenizer
from mot_jax.errors import UserError
from mot_jax.inference.sample import SampleHook
from mot_jax.runs import owner
from mot_jax.runs.metrics import read_rows
from mot_jax.training import Hook, train


def test_a_run_writes_all_files_that_the_readme_names(finished, tiny):
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
    assert json.loads((finished / "result.json").read_text())["validation"]["step"] == 12
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "sample.txt").read_text().count("--- continued") == 4  # one full group
    assert {int(p.name) for p in (finished / "checkpoints").iterdir()} == {8, 12}
    assert any((finished / "tensorboard").iterdir())
    files = [str(path.relative_to(finished)) for path in Path(finished).rglob("*") if path.is_file()]
    assert all(re.fullmatch(RUN_FILES, path) for path in files), files  # which no other output replaces


@pytest.mark.gpu
@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 7, pytest.param(9, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_bit_for_bit(finished, tiny, tmp_path, step, separate_programs):
    workdir = epath.Path(tmp_path / "run")
    with pytest.raises(StoppedError):
        train(tiny, workdir, [StopAt(step)])
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "split": "tra')  # a row that the error left incomplete
    logging = dataclasses.replace(tiny.logging, tensorboard=False)
    train(dataclasses.replace(tiny, logging=logging), workdir, [SampleHook()])
    assert numbers(workdir) == numbers(finished)
    assert (workdir / "sample.txt").read_text() == (finished / "sample.txt").read_text()


@pytest.mark.slow
def test_a_run_can_be_extended(tiny, tmp_path):
    workdir = epath.Path(tmp_path / "run")
    train(dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, steps=4)), workdir)
    train(dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, steps=6)), workdir)
    assert [row["step"] for row in numbers(workdir) if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert json.loads((workdir / "config.json").read_text())["training"]["steps"] == 6
    with pytest.raises(UserError, match=r"training.steps: 6 in the run, now 5; a run can be extended"):
        train(dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, steps=5)), workdir)


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh(finished, tiny, tmp_path):
    workdir = epath.Path(tmp_path / "run")
    with pytest.raises(StoppedError):
        train(tiny, workdir, [StopAt(7)])
    train(dataclasses.replace(tiny, mesh=MeshConfig(data=2, expert=4)), workdir, [SampleHook()])
    for row, expected in zip(numbers(workdir), numbers(finished), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert (workdir / "sample.txt").read_text().count("--- continued") == 4


@pytest.mark.slow
def test_a_vocabulary_larger_than_the_tokenizers_writes_no_unknown_token(tiny, tmp_path, capsys):
    roomy = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, vocab_size=4096))
    short = dataclasses.replace(roomy, training=dataclasses.replace(tiny.training, steps=1))
    one_document = dataclasses.replace(short, data=dataclasses.replace(tiny.data, validation_split="validation[:1%]"))
    train(one_document, tmp_path / "run", [SampleHook()])
    assert (tmp_path / "run" / "sample.txt").exists()
    output = capsys.readouterr().out
    assert "warning: groups of 4 are filled to 25%" in output
    advice = dict(re.findall(r"data\.(\w+) = '(train\S+)'", output))  # which helps
    assert set(advice) == {"train_split", "validation_split"}
    assert filled_share(open_split(short, advice["validation_split"], open_tokenizer(short)).documents, 4) > 0.9


@pytest.mark.slow
def test_ten_kills_change_no_bit(tiny, tmp_path):
    """SIGKILL at random moments, during saves too: every later row equals that of the undisturbed run."""
    steps = dataclasses.replace(tiny.training, steps=200, checkpoint_every=3, validate_every=50)
    data = dataclasses.replace(tiny.data, validation_windows=32, validation_split="validation[:1%]")
    logging = dataclasses.replace(tiny.logging, sample_tokens=0)
    config = dataclasses.replace(tiny, training=steps, data=data, logging=logging)
    (tmp_path / "long.py").write_text(
        "from mot_jax.config import from_json\n\n"
        f"VARIANTS = {{'long': lambda: from_json({to_json(config)!r})}}\n\n"
        "def get_config(variant=None):\n    return VARIANTS[variant or 'long']()\n"
    )
    undisturbed, killed = epath.Path(tmp_path / "undisturbed"), epath.Path(tmp_path / "killed")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}

    def start(workdir: epath.Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "mot_jax.cli", "train", str(tmp_path / "long.py"), "--workdir", str(workdir)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    def count_rows() -> int:
        log = killed / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    assert start(undisturbed).wait() == 0
    moments, kills = random.Random(0), 0
    rows_seen = []
    while kills < 10:
        process = start(killed)
        begun = count_rows()
        # Not before it trains again, and then anywhere within the next steps and saves.
        target = begun + moments.randrange(1, 12)
        while process.poll() is None and count_rows() < target:
            time.sleep(0.01)
        time.sleep(moments.random() * 0.1)
        assert process.poll() is None, "finished before ten kills: make the run longer"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        rows_seen.append(count_rows())
    assert start(killed).wait() == 0
    assert numbers(killed) == numbers(undisturbed)
    assert len(set(rows_seen)) > 3


@pytest.mark.slow
def test_a_masked_model_trains_and_fills_gaps(tiny, tmp_path, capsys):
    """With attention within documents only; the printed lines and the sample are about masked tokens."""
    model = dataclasses.replace(tiny.model, objective="masked", vocab_size=258, document_mask=True)
    optimizer = dataclasses.replace(tiny.training.optimizer, learning_rate=2e-2)
    training = dataclasses.replace(tiny.training, steps=60, optimizer=optimizer, validate_every=60, checkpoint_every=60)
    row = train(dataclasses.replace(tiny, model=model, training=training), tmp_path / "run", [SampleHook()])
    rows = [r for r in read_rows(epath.Path(tmp_path) / "run") if r["split"] == "train"]
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
    row = train(dataclasses.replace(tiny, model=model, training=training), tmp_path / "run")
    assert row["accuracy"] > row["most_frequent"] + 0.05


class BugAt(Hook):
    def after_step(self, trainer, metrics):
        if trainer.step == 2:
            raise ZeroDivisionError("a bug in a hook")


@pytest.mark.slow
def test_the_traceback_of_an_error_is_in_the_workdir(tiny, tmp_path):
    with pytest.raises(ZeroDivisionError):
        train(tiny, tmp_path / "run", [BugAt()])
    text = (tmp_path / "run" / "error.txt").read_text()
    assert "ZeroDivisionError: a bug in a hook" in text and "jax 0." in text and "in after_step" in text
    (changed := tmp_path / "other").mkdir()
    (changed / "notes.txt").write_text("")
    with pytest.raises(UserError, match="has files, but no run"):
        train(tiny, changed, [BugAt()])
    assert [path.name for path in changed.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_run_that_was_taken_over_writes_no_error_into_the_directory(tiny, tmp_path):
    class TakenOverAt(Hook):
        def after_step(self, trainer, metrics):
            if trainer.step == 2:
                other = owner.read(trainer.run.workdir) | {"token": "of another process"}
                (trainer.run.workdir / owner.FILE).write_text(json.dumps(other))
                owner.check(trainer.run.workdir, now=True)

    with pytest.raises(UserError, match="has taken it over"):
        train(tiny, tmp_path / "run", [TakenOverAt()])
    assert not (tmp_path / "run" / "error.txt").exists()
