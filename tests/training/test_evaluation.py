"""Scores of a finished run: as logged, in other groups and modes, per byte of the text; refused on other text."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from etils import epath

from mot_jax import cli
from mot_jax.analysis.inspect import inspect
from mot_jax.config import Config, DenseConfig, MixingConfig, to_json
from mot_jax.data.build import build, spec_from_files
from mot_jax.data.corpora import open_corpus
from mot_jax.data.order import filled_share
from mot_jax.data.text import open_split, open_tokenizer
from mot_jax.errors import UserError
from mot_jax.modes import MODES
from mot_jax.modes.companions import load_companions, save_companions
from mot_jax.modes.thresholds import Thresholds, save_thresholds
from mot_jax.runs.metrics import read_rows
from mot_jax.runs.scores import measured, record_score
from mot_jax.runtime import progress
from mot_jax.training import evaluation, train
from mot_jax.training.evaluation import evaluate_run
from mot_jax.training.upcycling import check_upcycle

COLORS = "red green blue black white".split()


def word_level(*words: str) -> str:
    """A tokenizer of these whole words, which loses all other words and every space."""
    names = ["[UNK]", "<|endoftext|>", *words]
    model = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str()


@pytest.fixture(scope="module")
def run(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, list[str]]:
    """A finished run of four steps on words, its workdir, and the texts of its validation split."""
    directory = tmp_path_factory.mktemp("words")
    lines = [f"{COLORS[i % 5]}   is {COLORS[i % 3]}, größer than {i}" for i in range(400)]
    (directory / "a.txt").write_text("\n".join(lines))
    plan = spec_from_files("words", [str(directory / "a.txt")], "line", validation=0.2)
    build(plan, directory / "corpora", 1)
    (directory / "words.json").write_text(word_level(*COLORS, "is", "than"))
    data = dataclasses.replace(
        tiny.data,
        corpus=("words",),
        validation_split="validation",
        tokenizer=str(directory / "words.json"),
        directory=str(directory),
        validation_windows=None,
    )
    config = dataclasses.replace(tiny, data=data, training=dataclasses.replace(tiny.training, steps=4))
    train(config, directory / "run")
    texts = [text.decode() for _, text in open_corpus("words", "validation", directory)]
    return config, directory / "run", texts


def last_row(workdir: Path) -> dict:
    (row,) = [row for row in read_rows(epath.Path(workdir)) if row["split"] == "validation"]
    return {name: value for name, value in row.items() if name != "split"}


def test_a_finished_run_has_the_scores_of_its_last_row(run):
    config, workdir, _ = run
    (score,) = evaluate_run(workdir, config, "validation", None)
    about = {"mode": "grouped", "split": "validation", "group_size": 4, "independent": False}
    assert score == about | last_row(workdir) | {"perplexity": pytest.approx(math.exp(score["loss"]))}


def test_bits_per_byte_count_the_bytes_that_the_tokenizer_loses(run):
    _, workdir, texts = run
    row, size = last_row(workdir), sum(len(text.encode()) for text in texts)
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["tokens"] / math.log(2) / size)


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (["--group-size", "2"], {"group_size": 2, "expert_dim": 12}),
        (["--mode", "discrete"], {"mixing": MixingConfig(temperature=0.0)}),
    ],
)
def test_the_command_scores_other_groups_and_modes(run, tmp_path, capsys, flags, changes):
    config, workdir, _ = run
    cli.main(["evaluate", str(workdir), *flags, "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    kind = dataclasses.replace(config.model.feed_forward, **changes)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=kind))
    (expected,) = evaluate_run(workdir, other, "validation", None)
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5) and result["step"] == 4
    assert abs(result["loss"] - last_row(workdir)["loss"]) > 1e-5
    output = capsys.readouterr().out
    assert (
        f"groups of {kind.group_size}" in output
        and "sequences influence each other" in output
        and "perplexity" in output
    )


def test_groups_that_the_split_cannot_fill_are_named(run, capsys):
    """Of the longest document no two windows share a group, so that there are as many groups as it has windows."""
    config, workdir, _ = run
    cli.main(["evaluate", str(workdir), "--group-size", "2", "--windows", "8"])
    assert "warning" not in capsys.readouterr().err
    windows = open_split(config, "validation", open_tokenizer(config))
    filled = filled_share(windows.documents, 64)
    assert filled < 0.5
    cli.main(["evaluate", str(workdir), "--group-size", "64", "--windows", "8"])
    assert f"warning: groups of 64 are filled to {filled:.0%}: " in capsys.readouterr().err


@pytest.mark.slow
def test_all_modes_are_scored_on_the_same_text_printed_and_stored(run, tmp_path, capsys, monkeypatch):
    """In batches limited by the size of the mixtures; without companions, the modes that do not need them.

    The run is too short for thresholds. An export has files that do not fit.
    """
    config, workdir, _ = run
    modes = [mode for mode in MODES if mode != "threshold"]
    (workdir / "modes.json").unlink(missing_ok=True)
    monkeypatch.setattr(evaluation, "_MIXTURE_BYTES", 3 * 16 * 8 * 16 * 4)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0)
    cli.main(["evaluate", str(workdir), "--mode", "all", "--windows", "30", "--json", str(tmp_path / "result.json")])
    output = capsys.readouterr()
    lines = output.out.splitlines()
    scores = measured(workdir, 4)
    total, counts = len(modes) * 30, []
    for line in output.err.splitlines():
        words = rf"scoring {workdir} in {len(modes)} modes, windows: (\d+) of {total}, \d+:\d\d left"
        if match := re.fullmatch(words, line):
            counts.append(int(match[1]))
    assert len(counts) > len(modes) and counts == sorted(set(counts)) and counts[0] <= 32
    assert list(scores) == modes and scores == {
        s["mode"]: s for s in json.loads((tmp_path / "result.json").read_text())["modes"]
    }
    for field in ("windows", "tokens", "group_size"):
        assert len({score[field] for score in scores.values()}) == 1
    assert len({round(score["loss"], 6) for score in scores.values()}) == len(modes)
    assert {mode for mode, score in scores.items() if score["independent"]} == {
        m for m in modes if MODES[m].independent
    }
    for mode, score in scores.items():
        (line,) = [line for line in lines if line.startswith(f"{mode} ")]
        assert f"{score['bits_per_byte']:.4f}" in line and MODES[mode].about in line
    assert "threshold is left out: thresholds.json: is written by runs of at least 16,384 training tokens" in output.out
    exported, values = tmp_path / "exported", np.zeros((2, 8), np.float32)
    cli.main(["export", str(workdir), "--output", str(exported)])
    save_thresholds(epath.Path(exported), Thresholds(3, 4, 100, values, values))
    (exported / "companions.npy").write_bytes(b"")
    cli.main(["evaluate", str(exported), "--mode", "all", "--windows", "30"])
    output = capsys.readouterr().out
    assert "threshold is left out: thresholds.json: is of step 3, and the model is of step 4; the mot train" in output
    assert f"mean_field is left out: {exported}/companions.npy: is damaged" in output
    assert list(measured(exported, 4)) == ["grouped", "token_choice", "discrete", "without"]
    companions = workdir / "companions.npy"
    moved = companions.rename(tmp_path / "companions.npy")
    try:
        cli.main(["evaluate", str(workdir), "--mode", "all", "--windows", "30"])
        assert "mean_field is left out: companions.npy: is missing" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            cli.main(["evaluate", str(workdir), "--mode", "sparse"])
        assert capsys.readouterr().err.startswith("error: companions.npy: is missing")
        train(config, workdir)  # the remedy
        assert companions.read_bytes() == moved.read_bytes()
    finally:
        moved.rename(companions)


def test_processes_must_have_the_same_companions(run, monkeypatch, tmp_path):
    """Without a shared file system each process reads those of its own copy of the run."""
    config, workdir, _ = run
    other = epath.Path(shutil.copytree(workdir, tmp_path / "run"))
    companions = load_companions(other)
    assert companions is not None
    (other / "companions.npy").unlink()
    save_companions(other, companions[:, ::-1], {})
    facts: dict[str, str] = {}

    @contextlib.contextmanager
    def together():
        yield facts
        if "modes" in facts:
            raise KeyboardInterrupt  # before anything is scored

    monkeypatch.setattr(evaluation.distributed, "together", together)
    digests = []
    for copy in (workdir, other):
        facts.clear()
        with pytest.raises(KeyboardInterrupt):
            evaluate_run(copy, config, "validation", None, ["grouped", "companions"])
        digests.append({name.split()[-1]: digest for name, digest in facts.items() if name.startswith("companions")})
    assert digests[0]["grouped"] == digests[1]["grouped"] and digests[0]["companions"] != digests[1]["companions"]


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_scores_that_cannot_be_recorded_are_printed_after_one_warning(run, capsys, monkeypatch, remote):
    """Stores raise errors of their libraries, local files only those of the system."""
    _, workdir, _ = run
    calls = []
    StoreError = type("StoreError", (Exception,), {"__module__": "botocore.exceptions"})  # noqa: N806

    def failing(*arguments: object) -> None:
        calls.append(arguments)
        raise StoreError("429, slow down") if remote else PermissionError(13, "Permission denied")

    monkeypatch.setattr(evaluation, "record_score", failing)
    cli.main(["evaluate", str(workdir), "--mode", "all", "--windows", "30"])
    output = capsys.readouterr()
    assert all(f"\n{name} " in output.out for name in MODES) and len(calls) == 1
    reason = "StoreError: 429, slow down" if remote else "PermissionError: [Errno 13] Permission denied"
    (warning,) = [line for line in output.err.splitlines() if line.startswith("warning")]
    assert warning == f"warning: {workdir}/modes.json: scores are not recorded ({reason})"


def test_scores_are_compared_on_the_windows_that_most_modes_have(run, tmp_path):
    config, _, _ = run
    (tmp_path / "config.json").write_text(to_json(config))
    assert measured(tmp_path, 4) == {}
    for mode, windows, loss in (("grouped", 9, 1.0), ("grouped", 5, 2.0), ("without", 5, 3.0), ("without", 5, 4.0)):
        record_score(
            tmp_path,
            {"mode": mode, "split": "validation", "step": 4, "windows": windows, "group_size": 4, "loss": loss},
        )
    record_score(
        tmp_path, {"mode": "discrete", "split": "train", "step": 4, "windows": 5, "group_size": 4, "loss": 5.0}
    )
    assert {mode: score["loss"] for mode, score in measured(tmp_path, 4).items()} == {"grouped": 2.0, "without": 4.0}
    assert measured(tmp_path, 5) == {}
    (tmp_path / "modes.json").write_text("{")
    with pytest.raises(UserError, match=r"modes.json: is damaged \(.*\); delete it, and mot evaluate"):
        measured(tmp_path, 4)


def upcycled(config: Config, workdir: Path) -> None:
    """Check a config that upcycles a dense run on the text of `workdir`."""
    source = workdir.parent / "dense"
    source.mkdir(exist_ok=True)
    dense = dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=DenseConfig()))
    (source / "config.json").write_text(to_json(dense))
    (source / "data.json").write_text((workdir / "data.json").read_text())
    check_upcycle(dataclasses.replace(config, training=dataclasses.replace(config.training, upcycle_from=str(source))))


READERS: dict[str, Callable[[Config, Path], object]] = {
    "train": train,
    "evaluate": lambda config, workdir: evaluate_run(workdir, config, "train", 32),
    "inspect": lambda config, workdir: inspect(workdir, workdir.parent / "inspect"),
    "upcycle": upcycled,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_tokenizer_that_has_changed_under_its_name_is_refused(run, reader):
    config, workdir, _ = run
    path = Path(config.data.tokenizer)
    before = path.read_text()
    try:
        READERS[reader](config, workdir)
        path.write_text(word_level(*reversed(COLORS), "is", "than"))
        if reader == "inspect":  # which has no config but that of the run, and so reads the run's copy
            READERS[reader](config, workdir)
            return
        with pytest.raises(UserError, match=r"data.tokenizer = .*words.json': does not match the checkpoints in"):
            READERS[reader](config, workdir)
    finally:
        path.write_text(before)


@pytest.mark.parametrize("reader", ["evaluate", "inspect"])
def test_validation_text_that_has_changed_is_refused(run, tmp_path, reader):
    """Any text is allowed in a split other than the validation split of the run."""
    config, workdir, _ = run
    path = workdir / "data.json"
    before = path.read_text()
    readers = READERS | {"evaluate": lambda config, workdir: evaluate_run(workdir, config, "validation", 32)}
    try:
        path.write_text(json.dumps(json.loads(before) | {"validation": "another"}))
        with pytest.raises(UserError, match=r"was trained on other text: validation: another in the run, "):
            readers[reader](config, workdir)
        assert evaluate_run(workdir, config, "train", 32)[0]["step"] == 4
    finally:
        path.write_text(before)
