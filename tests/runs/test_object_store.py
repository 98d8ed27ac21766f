"""Workdirs on object stores, where nothing is appended to, renamed or locked."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import gcsfs.retry
import jax
import numpy as np
import pytest
from etils import epath
from gcsfs.retry import HttpError
from object_store import open_bucket
from tiny_run import StopAt, StoppedError, numbers

from mot_jax import cli
from mot_jax.config import CheckpointConfig, Config, LoggingConfig, default_workdir, to_json
from mot_jax.errors import UserError
from mot_jax.inference.sample import SampleHook
from mot_jax.interop.export import export_model
from mot_jax.interop.importing import import_model
from mot_jax.nn.sharding import make_mesh
from mot_jax.runs import manifest, owner, status
from mot_jax.runs import metrics as log
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.runs.restore import load_run
from mot_jax.runs.state import abstract_state, create_state
from mot_jax.runs.tensor_files import INDEX
from mot_jax.runtime import exit_codes
from mot_jax.training import train

QUIET = LoggingConfig(tensorboard=False)


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest):
    with open_bucket(request.param) as (path, _):
        yield path


def test_owner_is_created_exclusively(bucket, monkeypatch, capfd):
    workdir = bucket / "owned"
    owner.acquire(workdir)
    first = owner.read(workdir)
    assert first is not None and first["host"]
    assert not owner._create(workdir / owner.FILE, first)
    # Another machine's start.
    ownership = owner._held.pop(str(workdir))
    for name in ("_POLL_SECONDS", "_SETTLE_SECONDS", "STALE_SECONDS"):
        monkeypatch.setattr(owner, name, 0.1)
    owner.acquire(workdir)
    assert "taken over from process" in capfd.readouterr().err
    owner.check(workdir)
    ownership.end()  # finds its successor, and removes nothing
    assert ownership.successor == owner.read(workdir)
    owner.release(workdir)
    assert owner.read(workdir) is None


def test_status_of_runs_on_a_store(bucket, capsys):
    workdir = bucket / "studies" / "of_two" / "mine"
    (workdir / "config.json").write_text(json.dumps({"training": {"steps": 9}}))
    write(bucket / "studies" / "of_two" / "mine", 0, range(1, 4))
    (bucket / "studies" / "notes.txt").write_text("")
    cli.main(["status", str(bucket / "studies"), "--json"])
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["workdir"], report["state"], report["step"], report["steps"]) == (str(workdir), "unfinished", 3, 9)
    owner.acquire(workdir)
    status.write(workdir, {"state": "training", "step": 5})
    cli.main(["status", str(workdir), "--json"])
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["state"], report["step"], report["loss"]) == ("training", 5, 1 / 3)
    owner.release(workdir)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["status", str(bucket / "nothing")])
    assert "nothing: no such directory" in capsys.readouterr().err


def write(workdir: epath.Path, done: int, steps: range) -> None:
    metrics = log.MetricsLog(workdir, done, QUIET)
    for step in steps:
        metrics.write({"step": step, "split": "train", "loss": 1.0 / step})
    metrics.close()


def steps(workdir: epath.Path) -> list[int]:
    return [row["step"] for row in log.read_rows(workdir)]


def test_a_run_whose_store_fails_ends_in_one_line_and_may_be_tried_again(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gcsfs.retry, "min", lambda *_: 0.0, raising=False)  # the pauses between its attempts
    config, text = tmp_path / "config.py", to_json(dataclasses.replace(tiny, logging=QUIET))
    config.write_text(f"from mot_jax.config import from_json\n\ndef get_config():\n    return from_json({text!r})\n")
    with open_bucket("gs") as (bucket, store):
        store.unavailable = "run/metrics"
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", str(config), "--workdir", str(bucket / "run")])
        assert ended.value.code == exit_codes.RETRYABLE
        (line,) = capsys.readouterr().err.splitlines()
        expected = "HttpError: backendError, 503; the same command may succeed later, and resumes a run"
        assert line == f"error: {expected}"


def test_an_owner_file_that_cannot_be_read_now_is_no_sign_of_another_owner(tmp_path, monkeypatch):
    workdir = epath.Path(tmp_path)
    owner.acquire(workdir)

    def failing(*_: object) -> None:
        raise HttpError({"code": 503, "message": "backendError"})

    with monkeypatch.context() as patch:
        patch.setattr(owner, "read", failing)
        owner.check(workdir, now=True)
    owner.release(workdir)


def test_rows_are_stored_before_a_checkpoint_and_those_after_it_are_logged_again(bucket, monkeypatch):
    workdir = bucket / "rows"
    metrics = log.MetricsLog(workdir, 0, QUIET)
    metrics.write({"step": 1, "split": "train", "loss": 1.0})
    assert steps(workdir) == []  # it waits
    metrics.flush()
    assert steps(workdir) == [1]
    monkeypatch.setattr(log, "_SECONDS", 0.0)
    metrics.write({"step": 2, "split": "train", "loss": 1.0})
    assert steps(workdir) == [1, 2]  # it has waited long enough
    monkeypatch.undo()
    metrics.write({"step": 3, "split": "train", "loss": 1.0})  # and here the run is killed
    write(workdir, 1, range(2, 5))
    assert steps(workdir) == [1, 2, 3, 4]
    write(workdir, 4, range(5, 6))
    assert steps(workdir) == [1, 2, 3, 4, 5] and len(list((workdir / "metrics").iterdir())) == 3
    write(workdir, 0, range(1, 3))
    assert steps(workdir) == [1, 2] and len(list((workdir / "metrics").iterdir())) == 1


def test_the_bytes_sent_are_a_small_multiple_of_the_bytes_logged(bucket, monkeypatch):
    monkeypatch.setattr(log, "_PART_BYTES", 500)
    sent = []
    writes = epath.Path.write_bytes
    monkeypatch.setattr(type(bucket), "write_bytes", lambda self, data: sent.append(len(data)) or writes(self, data))
    workdir = bucket / "long"
    metrics = log.MetricsLog(workdir, 0, QUIET)
    for step in range(1, 101):
        metrics.write({"step": step, "split": "train", "loss": 1.0})
        if step % 2 == 0:
            metrics.flush()
    metrics.close()
    assert steps(workdir) == list(range(1, 101))
    logged = sum(path.stat().length for path in (workdir / "metrics").iterdir())
    assert len(sent) == 50 and max(sent) < 700 and sum(sent) < 8 * logged


def test_rows_of_a_run_that_moved_to_a_store_are_in_both_forms(bucket, tmp_path):
    write(bucket / "moved", 0, range(1, 4))
    workdir = epath.Path(tmp_path)
    (workdir / "metrics").mkdir()
    (workdir / "metrics" / "00000.jsonl").write_bytes((bucket / "moved" / "metrics" / "00000.jsonl").read_bytes())
    write(workdir, 2, range(3, 6))
    assert steps(workdir) == [1, 2, 3, 4, 5]
    assert (workdir / "metrics.jsonl").read_text().count("\n") == 3


def test_only_complete_checkpoints_count(bucket, tiny):
    workdir, mesh = bucket / "saved", make_mesh(tiny)
    (workdir / "config.json").write_text(to_json(tiny))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding),
        abstract_state(tiny, mesh),
    )
    with Checkpoints(workdir / "checkpoints", CheckpointConfig(max_to_keep=1)) as checkpoints:
        checkpoints.save(4, state, 128, tiny)
        checkpoints.save(8, state, 256, tiny)
    for path in ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt"):  # of a save that was killed
        content = (workdir / "checkpoints" / "8" / path).read_bytes()
        (workdir / "checkpoints" / "12" / path).write_bytes(content)
    content = manifest.read(workdir / "checkpoints" / "8")
    for name, (_, checksum) in content.files.items():
        assert checksum == f"md5:{hashlib.md5((workdir / 'checkpoints' / '8' / name).read_bytes()).hexdigest()}"
    run = load_run(workdir)
    assert run.step == 8
    for name, value in run.params.items():
        np.testing.assert_array_equal(value, state.params[name])
    with Checkpoints(workdir / "checkpoints", CheckpointConfig(max_to_keep=1)) as checkpoints:
        assert checkpoints.newest_intact() == (8, {})
        checkpoints.tidy(8, {})
        assert checkpoints.restore(8, tiny, mesh).next_example == 256
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"8"}


@pytest.mark.slow
def test_exports_to_and_from_a_store(bucket, tiny, tmp_path):
    """From a workdir on the store to the store, in several files that are written over; from there to a disk."""
    workdir, output = bucket / "to_export", bucket / "exported"
    state = create_state(tiny, make_mesh(tiny))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(4, state, 0, tiny)
    (workdir / "config.json").write_text(to_json(tiny))
    export_model(workdir, output, shard_bytes=4000)
    export_model(workdir, output, shard_bytes=8000, overwrite=True)
    with pytest.raises(UserError, match="holds an export already"):
        export_model(workdir, output)
    import_model(output, tmp_path / "copy")
    for place in (output, tmp_path / "copy"):
        run = load_run(place)
        assert (run.config, run.step) == (tiny, 4)
        for name, value in state.params.items():
            np.testing.assert_array_equal(run.params[name], value)
    content = (output / INDEX).read_bytes()
    (output / INDEX).write_bytes(content[:-9])
    with pytest.raises(UserError, match=r"model.safetensors.index.json: cannot be read"):
        load_run(output)


def test_the_config_of_a_run_on_a_store_is_that_of_a_command(bucket, tiny, capsys):
    workdir = bucket / "described"
    (workdir / "config.json").write_text(to_json(tiny))
    for name in (workdir, workdir / "config.json"):
        cli.main(["describe", "--training.batch-size", "64", str(name)])
        assert "64" in capsys.readouterr().out
    assert default_workdir(str(workdir)) == default_workdir(str(workdir / "config.json")) == str(workdir)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", str(bucket / "nothing")])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and f"{bucket / 'nothing' / 'config.json'}: cannot be read" in line


def test_a_missing_bucket_is_one_line(bucket, tiny):
    with pytest.raises(UserError, match=r"^workdir = ..://nobody/run: (cannot be written to|the store refuses)") as e:
        train(tiny, f"{str(bucket)[:5]}nobody/run")
    assert type(e.value) is UserError and len(e.value.faults) == 1 and "\n" not in str(e.value)


@pytest.mark.slow
def test_a_run_stops_is_resumed_and_read_by_commands(bucket, tiny: Config, tmp_path, monkeypatch, capsys):
    workdir, local = bucket / "runs" / "mine", epath.Path(tmp_path / "local")
    train(tiny, local, [SampleHook()])
    save, seen = Checkpoints.save, []

    def saving(self: Checkpoints, step: int, *rest: object) -> None:
        seen.append((step, steps(workdir)[-1]))
        save(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(Checkpoints, "save", saving)
        train(tiny, str(workdir), [StopAt(7)])
    assert seen == [(4, 4)]  # the checkpoint does not outlive its rows
    assert steps(workdir)[-1] == 5 + 1  # the row of step 7 was never fetched
    assert status.report(workdir)["state"] == "failed"
    train(tiny, str(workdir), [SampleHook()])
    assert numbers(workdir) == numbers(local)
    assert status.report(workdir)["state"] == "finished" and status.report(workdir)["checkpoint"] == 12
    assert {path.name for path in workdir.iterdir()} == {path.name for path in local.iterdir()} - {"metrics.jsonl"} | {
        "metrics"
    }
    assert (workdir / "sample.txt").read_text() == (local / "sample.txt").read_text()
    assert len(list((workdir / "tensorboard").iterdir())) == 2
    assert all(path.stat().length > 1000 for path in (workdir / "tensorboard").iterdir())
    capsys.readouterr()

    cli.main(["evaluate", str(workdir), "--json", str(workdir / "score.json")])
    cli.main(["curves", str(workdir), "--output", str(workdir / "curves.png")])
    cli.main(["inspect", str(workdir)])
    assert json.loads((workdir / "score.json").read_text())["loss"] == pytest.approx(numbers(local)[-1]["loss"])
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "inspect" / "tokens.png").read_bytes().startswith(b"\x89PNG")
    assert "nothing left to train" not in capsys.readouterr().out
    train(tiny, str(workdir))
    assert "nothing left to train" in capsys.readouterr().out
    cli.main(["train", str(workdir)])
    assert "nothing left to train" in capsys.readouterr().out
