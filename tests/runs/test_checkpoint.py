"""Checkpoints with their manifests: damage is found and named, and the checkpoint before is used."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from tiny_run import StopAt, StoppedError, numbers

from mot_jax import cli
from mot_jax.config import CheckpointConfig, Config, to_json
from mot_jax.errors import RetryableError, UserError
from mot_jax.inference.sample import SampleHook
from mot_jax.nn.sharding import make_mesh
from mot_jax.runs import manifest
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.runs.restore import load_run
from mot_jax.runs.state import TrainState, create_state
from mot_jax.training import Hook, train


@pytest.fixture(scope="module")
def state(tiny: Config) -> TrainState:
    return create_state(tiny, make_mesh(tiny, jax.devices()[:1]))


@pytest.fixture(scope="module")
def saved(tiny: Config, state: TrainState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with two checkpoints; tests must not change it."""
    workdir = tmp_path_factory.mktemp("saved")
    (workdir / "config.json").write_text(to_json(tiny))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(4, state, 128, tiny, validation_loss=3.0)
        checkpoints.save(8, state, 256, tiny, validation_loss=float("nan"))
    return workdir


def files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_a_manifest_has_every_file_and_the_validation_loss(saved):
    checkpoint = saved / "checkpoints" / "4"
    content = manifest.read(epath.Path(checkpoint))
    assert content.validation_loss == 3.0
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files(checkpoint)}
    del sizes[manifest.FILE]
    assert {name: size for name, (size, _) in content.files.items()} == sizes
    assert manifest.read(epath.Path(saved / "checkpoints" / "8")).validation_loss is None


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_one_flipped_bit_in_any_file_is_found_and_named(saved, tmp_path):
    checkpoint = Path(shutil.copytree(saved / "checkpoints" / "8", tmp_path / "8"))
    draw, not_empty = random.Random(0), [path for path in files(checkpoint) if path.stat().st_size]
    assert manifest.damage(epath.Path(checkpoint)) is None
    for path in not_empty:
        for _ in range(-(-100 // len(not_empty))):
            bit = draw.randrange(8 * path.stat().st_size)
            flip_bit(path, bit)
            problem = manifest.damage(epath.Path(checkpoint))
            assert problem is not None and path.name in problem, (path, bit)
            flip_bit(path, bit)
    assert manifest.damage(epath.Path(checkpoint)) is None


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def newer_format(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))


def into_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "truncated data": ("state/d/*", truncate, r"has [\d,]+ bytes instead of"),
    "missing data": ("state/d/*", Path.unlink, "is missing"),
    "a directory in place of data": ("state/d/*", into_directory, "is missing"),
    "missing tree": ("state", shutil.rmtree, "is missing"),
    "truncated metadata": ("_CHECKPOINT_METADATA", truncate, r"_CHECKPOINT_METADATA has [\d,]+ bytes instead of"),
    "truncated manifest": ("manifest.json", truncate, r"manifest.json is damaged \(.*\)"),
    "empty manifest": ("manifest.json", lambda path: path.write_text(""), "manifest.json is damaged"),
    "newer format": ("manifest.json", newer_format, "its format 2 is newer than 1, that of this mot_jax"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_left_out_by_name(saved, tmp_path, capsys, kind):
    pattern, make_damage, words = DAMAGES[kind]
    workdir = Path(shutil.copytree(saved, tmp_path / "run"))
    for path in list((workdir / "checkpoints" / "8").glob(pattern)):
        make_damage(path)
    before = files(workdir)
    assert load_run(workdir).step == 4
    expected = rf"warning: workdir = {workdir}: its checkpoint 8 is left out: .*{words}.*; step 4 is used instead\n"
    message = capsys.readouterr().err
    assert re.fullmatch(expected, message), message
    with pytest.raises(SystemExit):
        cli.main(["verify", str(workdir)])
    output = capsys.readouterr()
    assert "checkpoint 4: intact" in output.out and "its checkpoint 8 is left out" in output.err
    shutil.rmtree(workdir / "checkpoints" / "4")
    with pytest.raises(UserError, match=words):
        load_run(workdir)
    assert files(workdir) == [path for path in before if "checkpoints/4" not in str(path)]


def test_a_step_without_manifest_is_no_checkpoint(saved, tmp_path, capsys):
    workdir = Path(shutil.copytree(saved, tmp_path / "run"))
    (workdir / "checkpoints" / "8" / "manifest.json").unlink()
    (workdir / "checkpoints" / "12").mkdir()
    assert load_run(workdir).step == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "its checkpoint 8 is left out: manifest.json is missing: its save is in progress or was" in line
    cli.main(["verify", str(workdir)])
    assert "checkpoint 8: does not count: manifest.json is missing" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_is_no_damage(saved, monkeypatch):
    def failing(error: OSError):
        def read(*_: object) -> None:
            raise error

        return read

    for error, kind, words in (
        (OSError(5, "Input/output error"), RetryableError, "checkpoints/8: cannot be read now"),
        (PermissionError(13, "Permission denied"), UserError, r"cannot be read \(.*\); try chmod"),
    ):
        monkeypatch.setattr(manifest, "_checksum", failing(error))
        with pytest.raises(kind, match=words):
            load_run(saved)


def small(config: Config, **changes: object) -> Config:
    """The config without TensorBoard and sample; changes: of its checkpoints."""
    logging = dataclasses.replace(config.logging, tensorboard=False, sample_tokens=0)
    return dataclasses.replace(
        config,
        logging=logging,
        checkpoint=dataclasses.replace(config.checkpoint, **changes),  # type: ignore[arg-type]
    )


@pytest.mark.slow
def test_a_run_resumes_before_a_damaged_checkpoint_and_ends_with_the_same_numbers(finished, tiny, tmp_path, capsys):
    with pytest.raises(StoppedError):
        train(tiny, tmp_path, [SampleHook(), StopAt(9)])
    (data,) = (tmp_path / "checkpoints" / "8" / "state" / "d").iterdir()
    flip_bit(data, 999)
    content = data.read_bytes()
    capsys.readouterr()
    train(tiny, tmp_path, [SampleHook()])
    lines = capsys.readouterr().out.splitlines()
    assert f"d/{data.name} has other content than was written" in lines[0] and "checkpoint 8 is left out" in lines[0]
    assert lines[1].endswith("resuming from step 4, 12 steps")
    assert numbers(tmp_path) == numbers(finished)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"8", "8.left-out-1", "12"}
    assert (tmp_path / "checkpoints" / "8.left-out-1" / "state" / "d" / data.name).read_bytes() == content
    for path in (tmp_path / "checkpoints").glob("[0-9]*/manifest.json"):
        path.write_text("")
    (tmp_path / "result.json").unlink()
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with pytest.raises(UserError) as error:
        train(tiny, tmp_path)
    assert [re.search(r"its checkpoint (\d+) is left out", line)[1] for line in error.value.faults] == ["12", "8"]  # type: ignore[index]
    assert f"or move {tmp_path}/checkpoints away to begin again" in error.value.faults[0]
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_retained_are_the_newest_those_of_an_interval_and_the_best(tiny, state, tmp_path):
    config = CheckpointConfig(max_to_keep=1, keep_every=4, keep_best=1)
    with Checkpoints(tmp_path / "checkpoints", config) as checkpoints:
        for step in range(2, 12, 2):
            checkpoints.save(step, state, 0, tiny, {6: 2.0, 10: float("nan")}.get(step, 3.0))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "8", "6", "10"}


@pytest.mark.slow
def test_the_checkpoint_with_the_best_validation_loss_of_a_run_is_retained(tiny, tmp_path):
    config = small(tiny, max_to_keep=1, keep_best=1)
    training = dataclasses.replace(tiny.training, checkpoint_every=2, validate_every=2, steps=6)
    train(dataclasses.replace(config, training=training), tmp_path)
    rows = [row for row in numbers(tmp_path) if row["split"] == "validation"]
    best = min(rows, key=lambda row: row["loss"])["step"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {str(best), "6"}
    for step in {best, 6}:
        saved = manifest.read(epath.Path(tmp_path) / "checkpoints" / str(step))
        assert saved.validation_loss == next(row["loss"] for row in rows if row["step"] == step)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep_every": 6}, r"checkpoint.keep_every = 6: must be a multiple of training.checkpoint_every = 4; try 8"),
        ({"keep_best": 1}, r"checkpoint.keep_best = 1: .* training.validate_every = 6 divides .*; try .* = 4"),
    ],
)
def test_retention_that_cannot_be_is_refused(tiny, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train(small(tiny, **changes), tmp_path)


@pytest.mark.parametrize("name", ["sweep[1]", "a*", "what?", "[ab]/run"])
def test_a_path_that_is_a_pattern_is_refused_before_the_start(tiny, tmp_path, name):
    with pytest.raises(UserError, match=r"must not contain \[, \* or \?, since no checkpoint could be read; try .*_"):
        train(tiny, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["with space", "größe-日本", "100%", "a]b", "$HOME {x} 'q'"])
def test_checkpoints_under_unusual_paths_are_read_back(tiny, state, tmp_path, name):
    with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
        checkpoints.save(4, state, 128, tiny)
        checkpoints.wait()
        restored = checkpoints.restore(4, tiny, make_mesh(tiny, jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)


def test_a_run_moved_to_a_path_that_is_a_pattern_can_be_read(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "sweep[1]")
    assert load_run(tmp_path / "sweep[1]").step == 8


@pytest.mark.slow
def test_a_run_without_manifests_is_refused_and_keeps_its_rows(tiny, tmp_path):
    """More steps without a manifest than one interrupted save leaves behind: they have been lost."""
    workdir = tmp_path / "run"
    train(small(tiny), workdir, [])
    (workdir / "result.json").unlink()
    for path in (workdir / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    rows = numbers(workdir)
    with pytest.raises(UserError, match=r"checkpoint 12 is left out: manifest.json is missing: .* move .* away to"):
        train(small(tiny), workdir)
    with pytest.raises(UserError, match=r"checkpoint 12 is left out"):
        load_run(workdir)
    assert numbers(workdir) == rows


@pytest.mark.parametrize(
    ("step", "every", "has_result"),
    [(12, 12, True), (12, 8, False), (4, 4, False)],
    ids=["a result", "a later save", "rows beyond the next save"],
)
def test_a_run_with_more_than_its_first_save_is_not_begun_again_but_adopted(
    finished, tiny, tmp_path, capsys, step, every, has_result
):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    (workdir / "checkpoints" / "8").rename(workdir / "checkpoints" / "4")
    shutil.rmtree(workdir / "checkpoints" / ("4" if step == 12 else "12"))
    (workdir / "checkpoints" / str(step) / "manifest.json").unlink()
    if not has_result:
        (workdir / "result.json").unlink()
    config = dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, checkpoint_every=every))
    (workdir / "config.json").write_text(to_json(config))
    before = {path: path.read_bytes() for path in files(workdir)}
    with pytest.raises(UserError, match=rf"checkpoint {step} is left out: .* `mot verify --adopt` writes one; .* move"):
        train(config, workdir)
    assert {path: path.read_bytes() for path in files(workdir)} == before

    cli.main(["verify", "--adopt", str(workdir)])
    assert capsys.readouterr().out.splitlines()[-1] == f"checkpoint {step}: intact"
    adopted = {path: path.read_bytes() for path in files(workdir)}
    assert adopted.pop(workdir / "checkpoints" / str(step) / "manifest.json") and adopted == before
    assert load_run(workdir).step == step
    if has_result:
        train(config, workdir)
        assert "nothing left to train" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_read_is_not_adopted(saved, tmp_path, capsys):
    workdir = Path(shutil.copytree(saved, tmp_path / "run"))
    for step in (4, 8):
        (workdir / "checkpoints" / str(step) / "manifest.json").unlink()
    truncate(workdir / "checkpoints" / "4" / "state" / "_METADATA")
    cli.main(["verify", "--adopt", str(workdir)])
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("checkpoint 4: is not adopted: ") and rest[-1] == "checkpoint 8: intact"
    assert [path.parent.name for path in workdir.glob("checkpoints/*/manifest.json")] == ["8"]


@pytest.mark.slow
def test_a_run_killed_before_its_first_manifest_begins_again(finished, tiny, tmp_path, capsys):
    with pytest.raises(StoppedError):
        train(tiny, tmp_path, [SampleHook(), StopAt(6)])
    (tmp_path / "checkpoints" / "4" / "manifest.json").unlink()
    train(tiny, tmp_path, [SampleHook()])
    assert "its checkpoint 4 is left out" in capsys.readouterr().out
    assert numbers(tmp_path) == numbers(finished)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4.left-out-1", "8", "12"}


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, RetryableError), pytest.param(errno.EACCES, UserError, marks=pytest.mark.slow)]
)
def test_a_save_that_fails_ends_the_run_at_the_next_step(tiny, tmp_path, monkeypatch, number, kind):
    """At once, since the steps until the next save would be lost too. The last checkpoint is named."""
    write, failed, steps = manifest.write, threading.Event(), []

    def failing(path: epath.Path, *rest: object) -> None:
        if path.name == "8":
            failed.set()
            raise OSError(number, os.strerror(number))
        write(path, *rest)

    class Wait(Hook):
        def after_step(self, trainer, metrics):
            steps.append(trainer.step)
            if trainer.step == 9:
                assert failed.wait(60)

    monkeypatch.setattr(manifest, "write", failing)
    with pytest.raises(kind) as raised:
        train(tiny, tmp_path, [Wait()])
    reason = f"could not be saved ({type(OSError(number, '')).__name__}: [Errno {number}] {os.strerror(number)})"
    resumption = f"the same command resumes from its last checkpoint, {tmp_path}/checkpoints/4"
    assert raised.value.faults == (f"{tmp_path}/checkpoints/8: {reason}; {resumption}",)
    assert steps[-1] < 12
    assert load_run(tmp_path).step == 4


def test_a_first_save_that_fails_leaves_nothing_to_resume(tiny, state, tmp_path, monkeypatch):
    def failing(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(manifest, "write", failing)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(4, state, 128, tiny)
    with pytest.raises(UserError, match=r"4: could not be saved \(.*Read-only.*\); the same command begins again$"):
        checkpoints.wait()


@pytest.mark.slow
def test_old_checkpoints_that_cannot_be_removed_do_not_end_the_run(finished, tiny, tmp_path, monkeypatch, capfd):
    remove = Checkpoints._remove_expired

    def failing(checkpoints: Checkpoints, newest: int) -> None:
        if newest == 12:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(checkpoints, newest)

    monkeypatch.setattr(Checkpoints, "_remove_expired", failing)
    train(tiny, tmp_path, [SampleHook()])
    assert "cannot remove old checkpoints (OSError: [Errno 39] Directory not empty)" in capfd.readouterr().err
    assert numbers(tmp_path) == numbers(finished)


def test_remains_of_interrupted_saves_are_removed_once_a_newer_checkpoint_is_complete(tiny, state, tmp_path):
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig(max_to_keep=2)) as checkpoints:
        for step in (4, 8):
            checkpoints.save(step, state, 0, tiny)
            checkpoints.wait()
        (tmp_path / "checkpoints" / "8" / "manifest.json").unlink()
        checkpoints.save(12, state, 0, tiny)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "12"}


def test_the_tag_of_an_object_uploaded_in_parts_is_no_checksum(saved, tmp_path):
    """Nor is one that changed with a copy, if the content has the checksum that the first tag was."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    md5 = hashlib.md5(b"content").hexdigest()
    for before, now in ((f"etag:{md5}-2", "etag:1"), ("etag:1", f"etag:{md5}-2"), (f"md5:{md5}", "etag:1")):
        manifest._compare(epath.Path(path), "file", (7, before), (7, now))
    with pytest.raises(manifest.DamageError, match="other content"):
        manifest._compare(epath.Path(path), "file", (7, "etag:2"), (7, "etag:1"))
    with pytest.raises(manifest.DamageError, match="other content"):
        manifest._compare(epath.Path(path), "file", (7, f"md5:{'0' * 32}"), (7, f"etag:{md5}-2"))


@pytest.mark.parametrize("form", ['etag:"{}"', "md5:{}"])  # the first is that of manifests until November 2026
def test_a_local_copy_of_a_run_on_s3_is_compared_by_the_md5_that_its_tags_are(saved, tmp_path, capsys, form):
    workdir = Path(shutil.copytree(saved, tmp_path / "run"))
    checkpoint = workdir / "checkpoints" / "8"

    def write_manifest(forms: dict[str, str]) -> None:
        content = json.loads((saved / "checkpoints" / "8" / "manifest.json").read_text())
        del content["checksum"]
        for name in content["files"]:
            md5 = hashlib.md5((checkpoint / name).read_bytes()).hexdigest()
            content["files"][name][1] = forms.get(name, form).format(md5)
        (checkpoint / "manifest.json").write_text(manifest._encode(content))

    write_manifest({})
    cli.main(["verify", str(workdir)])
    assert capsys.readouterr().out.splitlines()[-1] == "checkpoint 8: intact"
    largest = max(files(checkpoint), key=lambda path: path.stat().st_size)
    name = largest.relative_to(checkpoint).as_posix()
    flip_bit(largest, 999)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["verify", str(workdir)])
    assert f"checkpoint 8 is left out: {name} has other content than was written" in capsys.readouterr().err
    write_manifest({name: 'etag:"{}-2"'})
    cli.main(["verify", str(workdir)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("checkpoint 8: intact; of 1 of ") and line.endswith(
        "only sizes, and tags on S3, could be compared"
    )


def test_the_first_checkpoint_after_a_multiple_is_retained_if_that_of_the_multiple_was_postponed(tiny, state, tmp_path):
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig(max_to_keep=1, keep_every=4)) as checkpoints:
        for step in (2, 5, 6, 8, 10):
            checkpoints.save(step, state, 0, tiny)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"5", "8", "10"}


def test_commands_read_the_checkpoint_of_a_step(finished, tmp_path, capsys):
    """Of the steps 8 and 12 of a run."""
    finished, scores = shutil.copytree(finished, tmp_path / "run"), []  # scores are recorded in it
    for flags in ([], ["--step", "8"], ["--step", "12"]):
        cli.main(["evaluate", str(finished), "--windows", "16", "--json", str(tmp_path / "score.json"), *flags])
        scores.append(json.loads((tmp_path / "score.json").read_text()))
    assert [score["step"] for score in scores] == [12, 8, 12]
    assert scores[1]["loss"] != scores[2]["loss"] == scores[0]["loss"]
    cli.main(["export", str(finished), "--output", str(tmp_path / "export"), "--step", "8"])
    assert load_run(tmp_path / "export").step == 8
    with pytest.raises(UserError, match=r"--step = 9: .* has no such checkpoint; try one of \[8, 12\]"):
        load_run(finished, step=9)
    with pytest.raises(UserError, match=r"--step = 9: .* is an export"):
        load_run(tmp_path / "export", step=9)
