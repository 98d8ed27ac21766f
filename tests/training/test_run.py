"""A run before and after its steps: configs that are refused, files of a finished run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from etils import epath
from tiny_run import numbers
from tokenizer_files import FILES, TEXT

import mot_jax
from mot_jax import cli
from mot_jax.config import Config, to_json
from mot_jax.cost.parameters import count_parameters
from mot_jax.errors import UserError
from mot_jax.inference.sample import SampleHook
from mot_jax.runs.optimizer import learning_rate
from mot_jax.runs.restore import load_run_config, newest_step
from mot_jax.training import Hook, begin, is_finished, prepare, train
from mot_jax.training import run as run_module
from mot_jax.training.evaluation import evaluate_run


def with_steps(config: Config, steps: int) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))


def modification_times(directory: epath.Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(directory).rglob("*")}


# --- prepare ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prepare_opens_the_text_and_leaves_the_workdir_alone(tiny, tmp_path):
    run = prepare(tiny, tmp_path / "run")
    assert run.config == tiny and run.workdir == epath.Path(tmp_path / "run") and run.mesh.size == 1
    assert len(run.windows) > len(run.validation_windows) > 0
    assert run.fingerprints.keys() == {"train", "validation", "tokenizer", "order"}
    assert run.order.group_size == 4 and not is_finished(run)
    assert not (tmp_path / "run").exists()
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.config = None


def test_another_experiment_does_not_touch_a_workdir(finished, tiny):
    files = modification_times(finished)
    other = dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, seed=3, batch_size=64))
    with pytest.raises(UserError) as error:
        train(other, finished)
    assert [
        ("seed: 0 in the run, now 3" in f, "batch_size: 32 in the run, now 64" in f) for f in sorted(error.value.faults)
    ] == [
        (False, True),
        (True, False),
    ]
    assert files == modification_times(finished)


def test_a_directory_of_other_files_is_not_a_workdir(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"has files, but no run .* try .*/run"):
        prepare(tiny, tmp_path)
    with pytest.raises(UserError, match="must be a directory, and is a file"):
        prepare(tiny, tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_the_start(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"its checkpoints need .* MB more, and 0 MB are free"):
        prepare(tiny, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_all_its_checkpoints_needs_no_free_disk(finished, tiny, monkeypatch):
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    assert train(tiny, finished)["step"] == 12


def test_a_run_on_other_text_is_not_resumed(finished, tiny, tmp_path):
    workdir = epath.Path(shutil.copytree(finished, tmp_path / "copy"))
    fingerprints = json.loads((workdir / "data.json").read_text())
    (workdir / "data.json").write_text(json.dumps(fingerprints | {"train": "another"}))
    with pytest.raises(UserError, match=rf"other text: train: another in the run, now {fingerprints['train']}"):
        train(with_steps(tiny, 20), workdir)
    assert (workdir / "config.json").read_text() == to_json(tiny)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"train": '])
def test_damaged_fingerprints_are_named_and_written_again(finished, tiny, tmp_path, content):
    workdir = epath.Path(shutil.copytree(finished, tmp_path / "copy"))
    fingerprints = (workdir / "data.json").read_text()
    (workdir / "data.json").write_text(content)
    with pytest.raises(
        UserError, match=r"copy/data.json: is damaged \(.*\); try rm .*data.json, and mot train"
    ) as error:
        train(tiny, workdir)
    assert "\n" not in str(error.value)
    (workdir / "data.json").unlink()
    train(tiny, workdir)
    assert (workdir / "data.json").read_text() == fingerprints


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(tiny, tmp_path):
    small = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, vocab_size=256))
    with pytest.raises(UserError, match=r"model.vocab_size = 256: must be at least the 257 .* try 257"):
        train(small, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- begin ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_begin_initializes_or_restores(finished, tiny, tmp_path):
    new = begin(prepare(tiny, tmp_path / "new"))
    assert (new.step, new.next_example, int(new.state.step), new.notes) == (0, 0, 0, [])
    assert (tmp_path / "new" / "config.json").read_text() == to_json(tiny)
    workdir = epath.Path(shutil.copytree(finished, tmp_path / "copy"))
    begin(prepare(tiny, workdir))
    assert (workdir / "result.json").exists()  # still that of this run
    restored = begin(prepare(with_steps(tiny, 20), workdir))
    assert (restored.step, restored.next_example, int(restored.state.step)) == (12, 12 * 32, 12)
    assert not (workdir / "result.json").exists()  # that of the shorter run


def test_the_rates_of_an_extended_run_are_printed(finished, tiny, tmp_path):
    """The cosine is rescaled, so that the learning rate jumps."""
    workdir = epath.Path(shutil.copytree(finished, tmp_path / "copy"))
    optimizer = tiny.training.optimizer
    last, planned = (float(learning_rate(optimizer, 12)(update)) for update in (11, 12))
    new = float(learning_rate(optimizer, 24)(12))
    assert new > 2 * planned
    (note,) = begin(prepare(with_steps(tiny, 24), workdir)).notes
    assert note == (
        "training.steps = 24, was 12: the cosine of the learning rate now ends at step 24, so the next rate is "
        f"{new:.3g} instead of {planned:.3g}; the last one was {last:.3g}"
    )


# --- finish -----------------------------------------------------------------------------------------------------------


def test_the_result_is_strict_json_that_does_not_depend_on_the_workdir(finished, tiny):
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (finished / "result.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "steps": 12,
        "parameters": sum(count_parameters(tiny.model).values()),
        "validation": numbers(finished)[-1],
    }
    assert str(finished) not in text and finished.name not in text


def test_a_finished_run_changes_nothing_when_it_is_started_again(finished, tiny, capsys):
    before = {str(p): p.read_bytes() for p in sorted(finished.glob("*")) if p.is_file()}
    result = train(tiny, finished)
    assert result["step"] == 12 and result["split"] == "validation"
    assert "nothing left to train" in capsys.readouterr().out
    assert before == {str(p): p.read_bytes() for p in sorted(finished.glob("*")) if p.is_file()}


def test_a_run_killed_between_its_last_checkpoint_and_its_result_is_finished_again(finished, tiny, tmp_path):
    """Or one that was finished before there was a `result.json`, with `loss.png` as its mark."""
    workdir = epath.Path(shutil.copytree(finished, tmp_path / "copy"))
    (workdir / "result.json").unlink()
    (workdir / "sample.txt").unlink()
    train(tiny, workdir, [SampleHook()])
    assert (workdir / "loss.png").exists()
    assert (workdir / "result.json").read_text() == (finished / "result.json").read_text()
    assert (workdir / "sample.txt").read_text() == (finished / "sample.txt").read_text()
    assert numbers(workdir) == numbers(finished)


def test_a_picture_of_the_losses_is_no_mark_of_a_finished_run(finished, tiny, tmp_path):
    workdir = epath.Path(shutil.copytree(finished, tmp_path / "copy"))
    (workdir / "loss.png").unlink()
    assert is_finished(prepare(tiny, workdir))
    (workdir / "result.json").unlink()
    assert not is_finished(prepare(tiny, workdir))


@pytest.mark.slow
def test_an_extended_run_that_is_killed_at_its_end_is_finished_again(finished, tiny, tmp_path):
    class Killed(Hook):
        def at_end(self, trainer):
            raise ZeroDivisionError

    workdir = epath.Path(shutil.copytree(finished, tmp_path / "copy"))
    with pytest.raises(ZeroDivisionError):
        train(with_steps(tiny, 14), workdir, [Killed()])
    assert not (workdir / "result.json").exists()  # the mark of a finished run, which was that of the shorter one
    train(with_steps(tiny, 14), workdir)
    assert json.loads((workdir / "result.json").read_text())["steps"] == 14


@pytest.mark.slow
def test_a_run_has_its_tokenizer_and_paths_are_compared_by_content(tiny, tmp_path, monkeypatch):
    """A tokenizer and a corpus by relative paths: read and resumed from other directories, under other names."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project, elsewhere):
        folder.mkdir()
    monkeypatch.chdir(project)
    (project / "t.json").write_bytes(FILES["bpe.json"]())
    (project / "text.txt").write_text("\n\n".join(f"{text.decode()} {i}" for i, text in enumerate(TEXT * 20)))
    cli.main(["data", "build", "mine", "text.txt", "--documents", "paragraph", "--directory", "."])
    data = dataclasses.replace(
        tiny.data,
        tokenizer="t.json",
        corpus=("./corpora/mine",),
        validation_split="validation",
        directory=str(tmp_path),
    )
    model = dataclasses.replace(tiny.model, vocab_size=300)
    config = dataclasses.replace(tiny, data=data, model=model)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=4))
    train(config, project / "run")
    monkeypatch.chdir(elsewhere)
    text = mot_jax.load(project / "run").generate(["return x"], max_tokens=4)[0]
    evaluated = evaluate_run(project / "run", load_run_config(project / "run"), "validation", 8)
    (project / "t.json").rename(elsewhere / "moved.json")
    (project / "corpora").rename(elsewhere / "texts")
    assert mot_jax.load(project / "run").generate(["return x"], max_tokens=4)[0].text == text.text
    moved = dataclasses.replace(data, tokenizer="./moved.json", corpus=("../elsewhere/texts/mine",))
    longer = dataclasses.replace(config.training, steps=8)
    train(dataclasses.replace(config, data=moved, training=longer), project / "run")
    assert evaluated and newest_step(project / "run" / "checkpoints") == 8
    (elsewhere / "other.json").write_bytes(FILES["words.json"]())
    other = dataclasses.replace(moved, tokenizer="other.json")
    with pytest.raises(UserError, match="another tokenizer"):
        prepare(dataclasses.replace(config, data=other, training=longer), project / "run")
