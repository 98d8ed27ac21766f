"""A damaged or unreadable file of a run: a command works without it, or ends with one line and changes nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mot_jax import cli
from mot_jax.runs import owner
from mot_jax.training import run as training_run

# The commands that read or write a file, or list the directory.
COMMANDS = {
    "config.json": ["finished", "resume", "evaluate", "generate", "inspect", "export", "describe"],
    "data.json": ["finished", "resume", "evaluate", "generate", "inspect", "export"],
    "tokenizer.json": ["finished", "resume", "evaluate", "generate", "inspect", "export", "describe"],
    "checkpoints": ["finished", "evaluate", "generate", "inspect", "export"],
    "metrics.jsonl": ["finished", "resume", "inspect", "curves"],
    "companions.npy": ["finished", "resume", "evaluate", "generate", "export"],
    "modes.json": ["evaluate", "generate"],
    "result.json": ["finished", "resume"],
    "sample.txt": ["finished", "resume"],
    "loss.png": ["resume"],
    "tensorboard": ["resume"],
    "owner.json": ["resume"],
}
WRITTEN_BY = {"evaluate": {"modes.json"}}  # by a reading command that succeeds
DAMAGES = {
    "a directory": lambda path, content: path.mkdir(),
    "empty": lambda path, content: path.write_bytes(b""),
    "the first half": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "other content": lambda path, content: path.write_bytes(b"[1]\n"),
}


def files(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != "owner.json"
    }


@pytest.fixture
def workdir(finished, tmp_path, monkeypatch) -> Path:
    """A copy of a finished run."""
    monkeypatch.setattr(owner, "_SETTLE_SECONDS", 0.01)
    return Path(shutil.copytree(finished, tmp_path / "run"))


def unfinish(workdir: Path) -> None:
    """Remove all that the run wrote after its last checkpoint but one."""
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    shutil.rmtree(workdir / "checkpoints" / str(steps[-1]))
    (workdir / "result.json").unlink()


def call(command: str, workdir: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Run a command; its exit code, and the lines of its errors. Any other exception is a traceback."""
    flags = {
        "evaluate": ["--mode", "companions", "--windows", "8"],
        "generate": ["--prompt", "def ", "--tokens", "2"],
        "inspect": ["--output", str(output / "pictures")],
        "export": ["--output", str(output / "export")],
        "curves": ["--output", str(output / "curves.png")],
    }
    name = "train" if command in ("finished", "resume") else command
    capsys.readouterr()
    try:
        cli.main([name, str(workdir), *flags.get(name, [])])
    except SystemExit as ended:
        lines = capsys.readouterr().err.splitlines()
        return int(ended.code or 0), [line for line in lines if not line.startswith("warning: ")]
    return 0, []


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_damaged_file_is_one_line_and_nothing_is_lost(workdir, tmp_path, capsys, name, damage):
    path, commands = workdir / name, COMMANDS[name]
    if name == "tokenizer.json":
        config = json.loads((workdir / "config.json").read_text())
        config["data"]["tokenizer"] = "/moved/tokenizer.json"
        (workdir / "config.json").write_text(json.dumps(config))
    if path.is_dir():
        if damage != "empty":
            pytest.skip("it is a directory")
        commands = [command for command in commands if command != "resume" or name == "tensorboard"]
    for command in commands:
        copy, output = Path(shutil.copytree(workdir, tmp_path / command)), tmp_path / f"{command} output"
        output.mkdir()
        if command == "resume":
            unfinish(copy)
        damaged = copy / name
        content = damaged.read_bytes() if damaged.is_file() else b"{}{}"
        shutil.rmtree(damaged) if damaged.is_dir() else damaged.unlink(missing_ok=True)
        DAMAGES[damage](damaged, content)
        before = files(copy)
        code, lines = call(command, copy, output, capsys)
        after = files(copy)
        if code == 0:
            if command != "resume":
                changed = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
                assert changed <= WRITTEN_BY.get(command, set()), (command, changed)
        else:
            assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (command, code, lines)
            assert str(copy) in lines[0], (command, lines)
            kept = {file for file in before if file.startswith(("checkpoints/8/", name))}
            assert {file for file in kept if before[file] != after.get(file, "removed")} == set(), command


def test_a_finished_run_that_cannot_be_written_shows_its_result(workdir, capsys, monkeypatch):
    """As the run of another user: root may write anywhere, so that a file system without writing is simulated."""
    (workdir / "companions.npy").unlink()  # else nothing would be written anyway
    monkeypatch.setattr(training_run.os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(training_run, "write_workdir", lambda run: pytest.fail("is written"))
    before = files(workdir)
    assert call("finished", workdir, workdir, capsys) == (0, [])
    assert files(workdir) == before


def test_permission_denied_is_one_line(workdir, tmp_path, capsys, monkeypatch):
    """For any file of the run that a command opens."""
    read_bytes = Path.read_bytes
    for name, command in (("data.json", "evaluate"), ("companions.npy", "generate"), ("metrics.jsonl", "curves")):

        def denied(path, name=name):
            if path.name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return read_bytes(path)

        monkeypatch.setattr(Path, "read_bytes", denied)
        code, (line,) = call(command, workdir, tmp_path, capsys)
        assert code == 2 and line.startswith(f"error: {workdir / name}: cannot be read (Permission denied); ")
