"""The owner of a run's directory, by real processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from etils import epath

from mot_jax.config import Config
from mot_jax.errors import RetryableError, UserError
from mot_jax.runs import owner
from mot_jax.training import Trainer, begin, prepare, train

# Owns the directory argv[1] with a beat every argv[2] seconds: writes "owner", then waits for the end of its input.
HOLDER = """
import sys
from etils import epath
from mot_jax.errors import ReportedError
from mot_jax.runs import owner
workdir, owner.BEAT_SECONDS, owner.STALE_SECONDS = epath.Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
owner._POLL_SECONDS, owner._SETTLE_SECONDS = 0.05, 0.1
try:
    owner.acquire(workdir)
except ReportedError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print("owner", flush=True)
sys.stdin.read()
owner.check(workdir, now=True)
"""


def with_steps(config: Config, steps: int) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))


@pytest.fixture
def workdir(tmp_path: Path) -> epath.Path:
    return epath.Path(tmp_path / "run")


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(owner, "STALE_SECONDS", 1.5)
    monkeypatch.setattr(owner, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(owner, "_SETTLE_SECONDS", 0.1)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """A function that starts a process with `HOLDER`; all are killed in the end."""
    processes: list[subprocess.Popen] = []

    def start(workdir: epath.Path, beat: float = 0.2, stale: float = 1.5, **environment: str) -> subprocess.Popen:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        call = [sys.executable, "-c", HOLDER, str(workdir), str(beat), str(stale)]
        processes.append(subprocess.Popen(call, env=os.environ | environment, text=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
        process.wait()


def wait_for_owner(process: subprocess.Popen) -> None:
    assert process.stdout is not None and process.stdout.readline() == "owner\n", process.communicate()[1]


def other_system(workdir: epath.Path, **changes: object) -> None:
    """Make the owner's file that of another machine, whose processes cannot be seen from here."""
    path = workdir / owner.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"boot_id": "of another machine", **changes}))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_file_exists_while_a_run_is_in_progress(workdir):
    owner.acquire(workdir, processes=4)
    content = json.loads((workdir / owner.FILE).read_text())
    assert content["pid"] == os.getpid() and content["processes"] == 4 and content["host"]
    assert owner.describe(content).startswith(f"process {os.getpid()} of 4 on ")
    wait_until(lambda: owner.read(workdir)["beat"] > content["beat"])
    owner.acquire(workdir)  # the same process
    owner.release(workdir)
    assert not list(workdir.iterdir())


def test_a_second_start_ends_while_the_first_run_is_in_progress(workdir, start, capfd):
    first = start(workdir)
    wait_for_owner(first)
    with pytest.raises(
        RetryableError, match=rf"is in use by process {first.pid} on .*; try another directory, or --take-over"
    ):
        owner.acquire(workdir)
    assert f"process {first.pid}" in capfd.readouterr().err  # before the wait
    first.communicate("")
    assert first.returncode == 0 and not (workdir / owner.FILE).exists()


def test_a_second_start_takes_over_when_the_first_run_ends(workdir, start):
    first = start(workdir, beat=60, stale=60)
    wait_for_owner(first)
    second = start(workdir, beat=60, stale=60)
    assert second.stderr.readline().startswith(f"workdir = {workdir}: is in use by process {first.pid} ")
    assert second.poll() is None
    first.communicate("")
    wait_for_owner(second)
    second.communicate("")
    assert second.returncode == 0


def test_a_killed_process_is_replaced_at_once(workdir, start, capfd):
    first = start(workdir, beat=60, stale=600)
    wait_for_owner(first)
    first.kill()
    first.wait()
    owner.acquire(workdir)
    (line,) = capfd.readouterr().err.splitlines()  # without waiting
    assert re.search(r"taken over from process \d+ on .* \(that process has ended\)", line)
    owner.release(workdir)


def test_another_process_with_the_same_id_is_not_the_owner(workdir):
    owner.acquire(workdir)
    owner._held.pop(str(workdir))._ended.set()
    path = workdir / owner.FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"process_start": content["process_start"] - 1, "token": "another"}))
    owner.acquire(workdir)
    owner.release(workdir)


def test_an_earlier_start_of_the_same_job_is_replaced_at_once(workdir, start, monkeypatch, capfd):
    first = start(workdir, beat=60, stale=600, SLURM_JOB_ID="17", SLURM_RESTART_COUNT="1")
    wait_for_owner(first)
    other_system(workdir)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(owner, "STALE_SECONDS", 600)
    owner.acquire(workdir)
    assert "earlier start of the same job" in capfd.readouterr().err
    owner.release(workdir)


@pytest.mark.parametrize("skew", [0, 3600])
def test_an_owner_without_a_sign_of_life_is_replaced(workdir, start, capfd, skew):
    """By the age of its last beat, or, where its clock is ahead, after waiting."""
    first = start(workdir, beat=60)
    wait_for_owner(first)
    other_system(workdir, beat=time.time() + skew)
    owner.acquire(workdir)
    assert re.search(r"taken over from process \d+ on .*sign of life", capfd.readouterr().err)
    owner.release(workdir)


def test_take_over_ends_the_former_owner(workdir, start):
    first = start(workdir)
    wait_for_owner(first)
    owner.acquire(workdir, take_over=True)
    _, errors = first.communicate("")
    assert first.returncode == 1 and f"process {os.getpid()} on" in errors and "has taken it over" in errors
    assert owner.read(workdir)["pid"] == os.getpid()  # not removed by the former owner
    owner.release(workdir)


def test_the_former_owner_stops_even_if_its_successor_has_ended(workdir, start):
    first = start(workdir)
    wait_for_owner(first)
    owner.acquire(workdir, take_over=True)
    owner.release(workdir)
    _, errors = first.communicate("")
    assert first.returncode == 1 and "has taken it over" in errors
    assert not (workdir / owner.FILE).exists()  # nor written again


@pytest.mark.slow
def test_one_of_two_waiting_starts_replaces_a_silent_owner(workdir, start):
    """The winner's first beat is its own, not one from before it waited."""
    silent = start(workdir, beat=600)
    wait_for_owner(silent)
    other_system(workdir, beat=time.time() + 3600)  # its clock is ahead
    silent.kill()
    starts = [start(workdir, beat=0.5, stale=3) for _ in range(2)]
    winners = [process.stdout.readline() == "owner\n" for process in starts]
    assert sum(winners) == 1
    assert "RetryableError" in starts[winners.index(False)].communicate("")[1]
    assert starts[winners.index(True)].communicate("")[1].count("taken over") == 1


@pytest.mark.parametrize(
    "content", [b"", b'{"host": "a', b"[]", b'{"pid": 1, "restarts": 0, "beat": "x", "token": ""}']
)
def test_a_damaged_file_is_replaced(workdir, content):
    workdir.mkdir()
    (workdir / owner.FILE).write_bytes(content)
    owner.acquire(workdir)
    assert owner.read(workdir)["pid"] == os.getpid()
    owner.release(workdir)


def test_a_damaged_file_does_not_end_the_run_of_its_owner_and_is_written_again(workdir, start):
    first = start(workdir)
    wait_for_owner(first)
    current = owner.read(workdir)
    (workdir / owner.FILE).write_bytes(b'{"host": "a')
    wait_until(lambda: (owner.read(workdir) or {}).get("token") == current["token"] or first.poll() is not None)
    first.communicate("")
    assert first.returncode == 0


@pytest.mark.parametrize("remains", [False, True])
def test_one_of_several_starts_at_once_becomes_the_owner(workdir, start, remains):
    """In an empty directory, and in one with the remains of a killed process."""
    if remains:
        killed = start(workdir)
        wait_for_owner(killed)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    starts = [start(workdir, beat=0.1) for _ in range(4)]
    winners = []
    for process in starts:
        assert process.stdout is not None
        winners.append(process.stdout.readline() == "owner\n")  # empty if it has ended with an error
    assert sum(winners) == 1
    for process, won in zip(starts, winners, strict=True):
        _, errors = process.communicate("")
        assert won or "RetryableError" in errors


def test_a_directory_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        owner.acquire(epath.Path(tmp_path / "file" / "run"))


@pytest.mark.slow
def test_a_run_in_progress_is_not_touched_by_a_second_start(workdir, start, tiny):
    first = start(workdir)
    wait_for_owner(first)
    with pytest.raises(RetryableError, match="is in use by"):
        train(tiny, workdir)
    assert [path.name for path in workdir.iterdir()] == [owner.FILE]
    first.kill()
    first.wait()
    result = train(with_steps(tiny, 4), workdir)
    assert result["step"] == 4 and not (workdir / owner.FILE).exists()
    run = prepare(with_steps(tiny, 8), workdir)
    with Trainer(run, begin(run)) as trainer:
        trainer.train_step()
        second = start(workdir)  # in the middle of the run, from another process
        assert "RetryableError" in second.communicate()[1]
    owner.release(workdir)
