"""The status of runs: the report of `mot status` on a run in progress, an ended, a killed and a damaged one."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from etils import epath
from tiny_run import StopAt, StoppedError

from mot_jax import cli
from mot_jax.config import Config
from mot_jax.errors import DivergedError
from mot_jax.runs import owner, status
from mot_jax.training import Hook, Trainer, status_hook, train


@pytest.fixture
def workdir(tmp_path) -> epath.Path:
    return epath.Path(tmp_path / "run")


@pytest.fixture
def reports(capsys) -> Callable[..., list[dict[str, Any]]]:
    """A function that returns the output of `mot status --json`."""

    def reports(*workdirs: object) -> list[dict[str, Any]]:
        capsys.readouterr()
        cli.main(["status", *map(str, workdirs), "--json"])
        return json.loads(capsys.readouterr().out)

    return reports


def with_steps(config: Config, steps: int) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps, validate_every=steps))


def write_run(workdir: epath.Path, **files: object) -> None:
    """Write the files of a run: config, one row of metrics, and the JSON `files` by name without suffix."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps({"training": {"steps": 1600}}))
    rows = [{"step": 40, "split": "train", "loss": 2.5, "tokens_per_second": 9e3}, {"step": 40, "split": "validation"}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in files.items():
        (workdir / f"{name}.json").write_text(json.dumps(content))


def owned_by(pid: int, **changes: object) -> owner.Owner:
    """The content of an owner's file, for a process of this system that may have ended."""
    return owner._this_process(2) | {"pid": pid, "process_start": owner._start_time(pid), **changes}


@pytest.fixture(scope="module")
def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_finished_run_has_all_its_numbers(finished, reports, capsys):
    content = json.loads((finished / status.FILE).read_text())
    assert content["state"] == "finished" and content["pid"] == os.getpid()
    assert content["waits"].keys() == {"data", "device", "peers"}
    (report,) = reports(finished)
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "train"][-1]
    names = ("step", "loss", "learning_rate", "tokens_per_second")
    assert {name: report[name] for name in names} == {name: last[name] for name in names}
    assert (report["state"], report["steps"], report["checkpoint"]) == ("finished", 12, 12)
    assert report["validation_loss"] == rows[-1]["loss"] and report["owner"] is report["remark"] is None
    cli.main(["status", str(finished.parent)])  # the directory of the run's directory
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["run", "state", "step"]
    assert line.split()[:4] == [str(finished), "finished", "12/12", f"{last['loss']:.4f}"]


@pytest.mark.slow
def test_a_run_that_waits_has_the_cause(tiny, workdir, reports, monkeypatch):
    """Its status is written while the loop waits in a hook, and for data."""
    for name in ("WRITE_SECONDS", "PUBLISH_SECONDS"):
        monkeypatch.setattr(status_hook, name, 0.02)
    monkeypatch.setattr(status, "_LONG_SECONDS", 0.1)
    waiting, trainers = [], []

    def wait_for(cause: str) -> None:
        deadline = time.monotonic() + 60
        while not waiting or waiting[-1]["waiting_for"] != cause or not waiting[-1]["remark"]:
            assert time.monotonic() < deadline, waiting[-1]
            waiting.extend(reports(workdir))

    class Batches:
        def __init__(self, batches):
            self._batches, self.close = batches, batches.close

        def __next__(self):
            wait_for("data")
            return next(self._batches)

    class Wait(Hook):
        def after_step(self, trainer: Trainer, metrics: dict) -> None:
            if trainer.step == 2:
                trainers.append(weakref.ref(trainer))
                assert reports(workdir)[0]["checkpoint"] is None
                wait_for("hook Wait")
                trainer._batches = Batches(trainer._batches)
            elif trainer.step == 3:
                trainer.stop()

    gc.disable()
    try:
        train(with_steps(tiny, 8), workdir, [Wait()])
        assert trainers[0]() is None  # nor is its state on the devices retained by a cycle of references
    finally:
        gc.enable()
    in_hook = next(report for report in waiting if report["waiting_for"] == "hook Wait" and report["remark"])
    for report, cause in ((in_hook, "hook Wait"), (waiting[-1], "data")):
        assert (report["state"], report["steps"]) == ("training", 8)
        assert report["remark"] == f"no step for 0:00, waiting for {cause}" and report["seconds_since_step"] >= 0.1
        assert report["owner"].startswith(f"process {os.getpid()} on ")
    assert (in_hook["step"], waiting[-1]["step"]) == (1, 1)  # that of step 2 is fetched after the next
    assert waiting[-1]["waits"]["data"] > in_hook["waits"]["data"]
    (report,) = reports(workdir)
    assert (report["state"], report["step"], report["checkpoint"]) == ("stopped", 3, 3)
    assert report["waiting_for"] is report["seconds_left"] is report["owner"] is None


@pytest.mark.slow
def test_a_run_that_ends_with_an_error_has_it(tiny, workdir, reports):
    class Diverge(Hook):
        def after_step(self, trainer: Trainer, metrics: dict) -> None:
            raise DivergedError("the loss is infinite")

    class Interrupt(Hook):
        def after_step(self, trainer: Trainer, metrics: dict) -> None:
            raise KeyboardInterrupt

    config = with_steps(tiny, 8)
    for hook, error, state, remark in (
        (StopAt(2), StoppedError, "failed", "StoppedError"),
        (Diverge(), DivergedError, "diverged", "DivergedError: the loss is infinite"),
        (Interrupt(), KeyboardInterrupt, "interrupted", None),
    ):
        with pytest.raises(error):
            train(config, workdir, [hook])
        (report,) = reports(workdir)
        assert (report["state"], report["remark"], report["steps"]) == (state, remark, 8)
        if remark is not None:  # by error.txt, as in runs of earlier versions
            (workdir / status.FILE).unlink()
            (report,) = reports(workdir)
            assert (report["state"], report["remark"]) == (state, remark)


@pytest.mark.slow
def test_a_status_that_cannot_be_written_does_not_stop_a_run(tiny, workdir, reports, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(status, "replace_file", full)
    monkeypatch.setattr(status_hook, "WRITE_SECONDS", 0.0)
    monkeypatch.setattr(status_hook, "PUBLISH_SECONDS", 0.001)
    with pytest.raises(StoppedError):
        train(with_steps(tiny, 8), workdir, [StopAt(2)])
    output = capsys.readouterr().out
    assert output.count("warning: status.json cannot be written (OSError: [Errno 28] No space left on device)") == 1
    (report,) = reports(workdir)
    assert (report["state"], report["step"], report["steps"]) == ("failed", 1, 8)


def test_only_the_owner_writes(workdir, monkeypatch):
    monkeypatch.setattr(owner, "_SETTLE_SECONDS", 0.0)
    owner.acquire(workdir)
    status.write(workdir, {"state": "training", "loss": float("nan")})
    content = json.loads((workdir / status.FILE).read_text())
    assert (content["state"], content["loss"], content["pid"]) == ("training", None, os.getpid())
    (workdir / owner.FILE).write_text(json.dumps(owned_by(1, token="of another process")))
    status.write(workdir, {"state": "saving"})
    status.note(workdir, {"state": "finished"}, update=True)
    assert json.loads((workdir / status.FILE).read_text()) == content
    owner.release(workdir)
    status.write(workdir, {"state": "saving"})
    assert json.loads((workdir / status.FILE).read_text()) == content


def test_a_killed_run(workdir, reports, ended_process):
    process = owned_by(ended_process, process_start=1, beat=time.time() - 100)
    of_process = {"host": process["host"], "pid": process["pid"], "time": time.time() - 40}
    content = {"state": "training", "step": 44, "loss": 2.0, "seconds_left": 9.0, "behind": "process 1", **of_process}
    write_run(workdir, owner=process, status=content)
    (report,) = reports(workdir)
    assert (report["state"], report["remark"]) == ("killed", "that process has ended")
    assert (report["step"], report["steps"], report["loss"]) == (44, 1600, 2.0)
    assert 40 <= report["seconds_since_sign_of_life"] < 100  # the later of both
    assert report["behind"] is report["seconds_left"] is None
    assert report["owner"].startswith(f"process {ended_process} of 2 on ")


def test_an_error_before_the_last_sign_of_life_is_not_that_of_a_killed_run(workdir, reports, ended_process):
    """It is of the run from which the killed one has taken over the workdir."""
    now = time.time()
    process = owned_by(ended_process, process_start=1, beat=now - 50)
    write_run(workdir, owner=process, status={"state": "training", "step": 44, "time": now - 40})
    (workdir / "error.txt").write_text("Traceback (most recent call last):\nValueError: x\n")
    os.utime(workdir / "error.txt", (now - 200, now - 200))
    (report,) = reports(workdir)
    assert (report["state"], report["remark"]) == ("killed", "that process has ended")
    os.utime(workdir / "error.txt", (now - 30, now - 30))
    (report,) = reports(workdir)
    assert (report["state"], report["remark"]) == ("failed", "ValueError: x")


def test_the_state_follows_from_all_files(tmp_path, reports, ended_process):
    """Of runs of earlier versions and with damaged files, too."""
    ended = owned_by(ended_process, process_start=1)
    alive = owned_by(os.getpid())
    elsewhere = alive | {"boot_id": "of another machine", "pid": 17, "host": "other"}
    of_alive = {"host": alive["host"], "pid": os.getpid(), "time": time.time()}
    runs = {
        "alive": ({"owner": alive, "status": {"state": "saving", "step": 41, **of_alive}}, "saving", 41),
        "alive, of an earlier version": ({"owner": alive}, "training", 40),
        "alive, restarted": ({"owner": alive, "status": {"state": "failed", "host": "x", "pid": 1}}, "training", 40),
        "alive elsewhere": ({"owner": elsewhere, "status": of_alive | {"host": "other", "pid": 17}}, "starting", 40),
        "silent elsewhere": ({"owner": elsewhere | {"beat": time.time() - 1000}}, "silent", 40),
        "no owner": ({"status": {"state": "training", "step": 42, "steps": 1700}}, "unfinished", 42),
        "no owner, of an earlier version": ({}, "unfinished", 40),
        "preempted": ({"status": {"state": "preempted", "step": 43}}, "preempted", 43),
        "finished, of an earlier version": ({"result": {"validation": {"loss": 2.25}}}, "finished", 40),
        "killed in its last moment": ({"owner": ended, "result": {}, "status": {"state": "finishing"}}, "finished", 40),
        "list for a status": ({"status": [1]}, "unfinished", 40),
        "texts for numbers": ({"status": {"step": "x", "steps": [], "time": {}, "state": 3}}, "unfinished", 40),
        "list for a result": ({"result": [1], "status": {"state": "failed"}}, "finished", 40),
    }
    for name, (files, *_) in runs.items():
        write_run(epath.Path(tmp_path / name), **files)
    of_names = {epath.Path(report["workdir"]).name: report for report in reports(tmp_path)}
    assert {name: (r["state"], r["step"]) for name, r in of_names.items()} == {
        name: (state, step) for name, (_, state, step) in runs.items()
    }
    assert {name for name, report in of_names.items() if report["steps"] != 1600} == {"no owner"}
    assert "status.json is damaged" in of_names["list for a status"]["remark"]
    assert of_names["finished, of an earlier version"]["validation_loss"] == 2.25
    assert all(report["sign_of_life"] is not None for report in of_names.values())


@pytest.mark.parametrize("name", ["status.json", "owner.json", "result.json", "config.json", "metrics.jsonl"])
@pytest.mark.parametrize(
    "content",
    [b"", b'{"state": "tr', b"\xff\xfe\x00", b"[[1]]", b'{"training": [], "step": {}}', b'{"validation": [1]}'],
)
def test_damaged_files_are_no_error(workdir, reports, monkeypatch, name, content):
    monkeypatch.setattr(owner, "_SETTLE_SECONDS", 0.0)
    write_run(workdir, status={"state": "stopped", "step": 7, "steps": 9, "time": time.time() - 500})
    (workdir / name).write_bytes(content)
    (report,) = reports(workdir)
    assert report["state"] == {"status.json": "unfinished", "result.json": "finished"}.get(name, "stopped")


def test_a_directory_without_a_run_is_an_error_and_the_others_are_printed(tmp_path, capsys):
    write_run(epath.Path(tmp_path / "runs" / "[red] 1"))
    write_run(epath.Path(tmp_path / "runs" / "deep" / "er" / "2"))
    write_run(epath.Path(tmp_path / "export"))
    (tmp_path / "export" / "model.safetensors").write_bytes(b"")
    (tmp_path / "runs" / "model").mkdir()
    (tmp_path / "runs" / "model" / "config.json").write_text("{}")
    (tmp_path / "runs" / "cycle").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "runs" / "[red] 1")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["status", str(tmp_path / "export"), str(tmp_path / "nowhere"), str(tmp_path / "runs"), str(__file__)])
    output, errors = capsys.readouterr()
    assert exit_.value.code == 2
    runs = [line.partition("unfinished")[0].strip() for line in output.splitlines()[1:]]
    assert runs == [str(tmp_path / "runs" / name) for name in ("[red] 1", "deep/er/2", "link")]
    starts = ("export: holds no run", "nowhere: no such directory", "test_status.py: cannot be read (Not a dir")
    for line, start in zip(errors.splitlines(), starts, strict=True):
        assert line.startswith("error: WORKDIR = ") and start in line
    assert sorted(tmp_path.rglob("*")) == before
