"""A damaged or unreadable file of a run: a command works without it, or ends with one line and changes nothing."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
from pathlib import Path

import pytest

from mot_jax import cli
from mot_jax.runs import owner
from mot_jax.training import run as training_run

# The commands that read a file, or list a directory; a finished run is one that is started again.
READ = {
    "config.json": ["finished", "evaluate", "generate", "inspect", "export", "describe"],
    "data.json": ["finished", "evaluate", "generate", "inspect", "export"],
    "tokenizer.json": ["finished", "evaluate", "generate", "inspect", "export"],
    "checkpoints": ["finished", "evaluate", "generate", "inspect", "export"],
    "companions.npy": ["finished", "evaluate", "generate", "export"],
    "metrics.jsonl": ["finished", "curves"],
    "modes.json": ["evaluate"],
    "result.json": ["finished"],
    "sample.txt": ["finished"],
}
WRITTEN = [*READ, "loss.png", "tensorboard", "owner.json"]  # by a run that is resumed
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


def call(command: str, workdir: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Run a command; its exit code, and the lines of its errors. Any other exception is a traceback."""
    flags = {
        "evaluate": ["--mode", "companions", "--windows", "8"],
        "generate": ["--prompt", "def ", "--tokens", "2"],
        "inspect": ["--output", str(output / "pictures")],
        "export": ["--output", str(output / "export")],
        "curves": ["--output", str(output / "curves.png")],
        "import": ["--output", str(output / "import")],
        "transition": ["--to", "token_choice", "--steps", "2", "--output", str(output / "tuned")],
    }
    name = "train" if command in ("finished", "resume") else command
    capsys.readouterr()
    try:
        cli.main([name, str(workdir), *flags.get(name, [])])
    except SystemExit as ended:
        lines = capsys.readouterr().err.splitlines()
        return int(ended.code or 0), [line for line in lines if not line.startswith("warning: ")]
    return 0, []


def check(command: str, workdir: Path, name: str, damage: str, output: Path, capsys) -> None:
    """Damage a file of `workdir`, then call a command: it works, or ends with one line, and loses nothing."""
    path = workdir / name
    content = path.read_bytes() if path.is_file() else b"{}{}"
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    DAMAGES[damage](path, content)
    before = files(workdir)
    code, lines = call(command, workdir, output, capsys)
    after = files(workdir)
    if code == 0 and command == "resume":
        assert (workdir / "result.json").exists()
    elif code == 0:
        changed = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
        assert changed <= WRITTEN_BY.get(command, set()), (command, changed)
    else:
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (command, code, lines)
        assert str(workdir) in lines[0], (command, lines)
        retained = {file for file in before if file.startswith(("checkpoints/8/", name))}
        assert {file for file in retained if before[file] != after.get(file, "removed")} == set(), command


def use_a_lost_tokenizer(workdir: Path) -> None:
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["tokenizer"] = "/moved/tokenizer.json"
    (workdir / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage",
    ["a directory", "the first half", *(pytest.param(d, marks=pytest.mark.slow) for d in ("empty", "other content"))],
)
@pytest.mark.parametrize("name", READ)
def test_a_damaged_file_that_is_read(workdir, tmp_path, capsys, name, damage):
    if name == "checkpoints":
        damage = "empty"  # a file in place of the directory
    if name == "tokenizer.json":
        use_a_lost_tokenizer(workdir)
    for command in READ[name]:
        output = tmp_path / f"{command} output"
        output.mkdir()
        copy = Path(shutil.copytree(workdir, tmp_path / command))
        check(command, copy, name, damage, output, capsys)


@pytest.mark.slow
def test_one_changed_token_of_the_companions_is_refused(workdir, tmp_path, capsys):
    assert call("export", workdir, tmp_path, capsys) == (0, [])
    intact = (workdir / "companions.npy").read_bytes()
    for place, commands in (
        (workdir, ["evaluate", "generate", "export"]),
        (tmp_path / "export", ["generate", "import"]),
    ):
        (place / "companions.npy").write_bytes(intact[:-200] + bytes([intact[-200] ^ 1]) + intact[-199:])
        for command in commands:
            code, (line,) = call(command, place, tmp_path / "new", capsys)
            reason = "is damaged (it is not the file whose digest data.json has); delete it: a finished run writes it"
            assert code == 2 and f"{place / 'companions.npy'}: {reason}" in line
    fingerprints = (workdir / "data.json").read_text()
    earlier = json.loads(fingerprints)
    assert earlier.pop("companions").startswith("sha256:")
    (workdir / "data.json").write_text(json.dumps(earlier))  # of a version without the digest
    assert call("generate", workdir, tmp_path, capsys) == (0, [])
    (workdir / "companions.npy").unlink()
    assert call("finished", workdir, tmp_path, capsys) == (0, [])
    assert (workdir / "companions.npy").read_bytes() == intact
    assert (workdir / "data.json").read_text() == fingerprints


def test_a_config_that_was_edited_after_the_training_is_refused(workdir, tmp_path, capsys):
    """Fields that leave the shapes of the parameters as they were: they would give other numbers."""
    config = json.loads((workdir / "config.json").read_text())
    config["model"] |= {"norm_epsilon": 0.1, "activation": "gelu"}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "12")
    before = files(workdir / "checkpoints")
    for command in ("evaluate", "generate", "inspect", "export", "transition", "resume"):
        code, lines = call(command, workdir, tmp_path, capsys)
        place = f"error: {workdir}/config.json: model"
        assert code == 2 and lines == [
            f'{place}.activation = "gelu": checkpoint 8 was trained with "relu"; set it back',
            f"{place}.norm_epsilon = 0.1: checkpoint 8 was trained with 1e-05; set it back",
        ]
    assert files(workdir / "checkpoints") == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a directory", "empty"])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_damaged_file_of_a_run_that_is_resumed(workdir, tmp_path, capsys, name, damage):
    if name == "tokenizer.json":
        use_a_lost_tokenizer(workdir)
    if name != "result.json":
        (workdir / "result.json").unlink()
    if name != "checkpoints":
        shutil.rmtree(workdir / "checkpoints" / "12")
    check("resume", workdir, name, "empty" if name == "checkpoints" else damage, tmp_path, capsys)


def test_a_finished_run_that_cannot_be_written_shows_its_result(workdir, capsys, monkeypatch):
    """As the run of another user: root may write anywhere, so that a file system without writing is simulated."""
    (workdir / "companions.npy").unlink()  # else nothing would be written anyway
    monkeypatch.setattr(training_run.os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(training_run, "write_workdir", lambda run: pytest.fail("is written"))
    before = files(workdir)
    assert call("finished", workdir, workdir, capsys) == (0, [])
    assert files(workdir) == before


@pytest.mark.parametrize(
    ("name", "command"), [("config.json", "describe"), ("data.json", "export"), ("metrics.jsonl", "curves")]
)
def test_permission_denied_is_one_line(workdir, tmp_path, capsys, monkeypatch, name, command):
    """Root may read anywhere, so that the error of the system is simulated."""
    system_open = open

    def denying(path, *rest, **options):
        if str(path) == str(workdir / name):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return system_open(path, *rest, **options)

    for module in (io, builtins):  # for pathlib and etils
        monkeypatch.setattr(module, "open", denying)
    code, (line,) = call(command, workdir, tmp_path, capsys)
    assert code == 2 and f"{workdir / name}: cannot be read (Permission denied); " in line and "rm -r" not in line
