"""Errors of the system, closed pipes, Ctrl-C, encodings and missing devices: one line and an exit code each."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from etils import epath
from gcsfs.retry import HttpError

from mot_jax import cli, training
from mot_jax.config import DataConfig, to_json
from mot_jax.data.build import build, spec_from_files
from mot_jax.errors import RetryableError, UserError
from mot_jax.runs.metrics import read_rows
from mot_jax.runtime import exit_codes

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo.py")
MOT = [sys.executable, "-m", "mot_jax"]


def environment(**changes: str | None) -> dict[str, str]:
    """That of this process, in which `mot_jax` can be imported from anywhere; None removes a variable."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **changes}
    return {name: value for name, value in variables.items() if value is not None}


def mot(*arguments: str, command: list[str] = MOT, **options) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own. `env` has only the changes of the environment."""
    env = environment(**options.pop("env", {}))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    return subprocess.run([*command, *arguments], env=env, timeout=100, **(streams | options))


def fails_in_training(monkeypatch, capsys, error: BaseException, *flags: str) -> tuple[object, list[str]]:
    """The exit code and the lines of `mot train` if training raises `error`."""

    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(training, "train", failing)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", DEMO, *flags])
    return ended.value.code, capsys.readouterr().err.splitlines()


# --- errors of the operating system -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "try a path to which you have access"),
        (errno.EPERM, "try a path to which you have access"),
        (errno.EROFS, "try a path that can be written"),
        (errno.ENOENT, "try a path that exists"),
        (errno.ENOTDIR, "a part of the path is not a directory; try another path"),
        (errno.EISDIR, "try the path of a file"),
        (errno.EEXIST, "another file has this name; try another path"),
        (errno.ENAMETOOLONG, "try a shorter name"),
    ],
)
def test_an_error_of_the_system_is_one_line(monkeypatch, capsys, number, advice):
    error = OSError(number, os.strerror(number), "/a/b")
    line = f"error: /a/b: {os.strerror(number)}; {advice}"
    assert fails_in_training(monkeypatch, capsys, error) == (exit_codes.USER_ERROR, [line])


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG])
def test_a_full_quota_is_a_full_disk(monkeypatch, capsys, number):
    code, (line,) = fails_in_training(monkeypatch, capsys, OSError(number, os.strerror(number)))
    assert code == exit_codes.USER_ERROR and line.startswith("error: no space left on the disk")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EIO, "Input/output error", "/a/b"), "/a/b: Input/output error"),
        (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
        (ConnectionResetError("closed"), "ConnectionResetError: closed"),
        (HttpError({"code": 503, "message": "backendError"}), "HttpError: backendError, 503"),
        (aiohttp.ServerDisconnectedError(), "ServerDisconnectedError: Server disconnected"),
        (
            EndpointConnectionError(endpoint_url="https://a"),
            'EndpointConnectionError: Could not connect to the endpoint URL: "https://a"',
        ),
    ],
)
def test_an_error_that_may_pass_is_one_line_and_may_be_tried_again(monkeypatch, capsys, error, reason):
    line = f"error: {reason}; the same command may succeed later, and resumes a run"
    assert fails_in_training(monkeypatch, capsys, error) == (exit_codes.RETRYABLE, [line])


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.EISDIR])
def test_words_of_a_path_do_not_make_an_error_pass(monkeypatch, capsys, number):
    error = OSError(number, os.strerror(number), "/connection-study/timeout")
    assert fails_in_training(monkeypatch, capsys, error)[0] == exit_codes.USER_ERROR


def test_a_store_that_refuses_is_one_line(monkeypatch, capsys):
    error = ClientError({"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "PutObject")
    code, (line,) = fails_in_training(monkeypatch, capsys, error)
    assert code == exit_codes.USER_ERROR
    assert line.startswith("error: an object store refuses (ClientError: ") and "AccessDenied" in line


def test_the_cause_of_a_librarys_error_is_reported_and_its_context_is_not(monkeypatch, capsys):
    denied = PermissionError(errno.EACCES, "Permission denied", "/a")
    wrapped = ValueError("a checkpoint cannot be saved")
    wrapped.__cause__ = denied
    code, lines = fails_in_training(monkeypatch, capsys, wrapped)
    assert (code, lines) == (2, ["error: /a: Permission denied; try a path to which you have access"])
    bug = ZeroDivisionError("in the handler of an error")
    bug.__context__ = denied
    monkeypatch.setattr(training, "train", lambda *_: (_ for _ in ()).throw(bug))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", DEMO])


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), OSError(errno.EINVAL, "a bug"), FileNotFoundError("x")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(training, "train", failing)
    with pytest.raises(type(error)) as raised:
        cli.main(["train", DEMO])
    assert raised.value is error


@pytest.mark.parametrize(("path", "shown"), [("a\nb", "'a\\nb'"), (b"/a", "/a"), ("x" * 300, "x" * 200 + "...")])
def test_any_path_fits_into_the_line(monkeypatch, capsys, path, shown):
    _, lines = fails_in_training(monkeypatch, capsys, OSError(errno.ENOENT, "", path))
    assert lines == [f"error: {shown}: No such file or directory; try a path that exists"]


@pytest.mark.parametrize(
    "error", [UserError("one", "two"), RetryableError("one", "two"), OSError(errno.EACCES, "Permission denied", "/a")]
)
def test_debug_prints_the_traceback_of_a_reported_error(monkeypatch, capsys, error):
    code, lines = fails_in_training(monkeypatch, capsys, error)
    assert not any("Traceback" in line for line in lines)
    for place in range(2):
        flags = ["--training.steps", "3"]
        flags.insert(2 * place, "--debug")
        with_traceback = fails_in_training(monkeypatch, capsys, error, *flags)
        assert with_traceback[0] == code and with_traceback[1][0].startswith("Traceback")
        assert with_traceback[1][-len(lines) :] == lines


@pytest.mark.slow
def test_an_unwritable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        result = mot("train", DEMO, "--workdir", str(workdir), cwd=tmp_path)
        assert result.returncode == exit_codes.USER_ERROR, result.stderr
        assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() == 0 and shutil.which("setpriv") is None, reason="root may write anywhere")
def test_a_directory_without_write_permission_is_one_line(tmp_path):
    closed, unreadable = tmp_path / "closed", tmp_path / "run"
    closed.mkdir()
    unreadable.mkdir()
    (unreadable / "config.json").write_text("{}")
    closed.chmod(0o555)
    (unreadable / "config.json").chmod(0)
    limits = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.getuid() == 0 else []
    for arguments in (["describe", DEMO, "--json", f"{closed}/x.json"], ["evaluate", str(unreadable)]):
        result = mot(*arguments, command=[*limits, *MOT])
        assert result.returncode == exit_codes.USER_ERROR, result.stderr
        assert len(result.stderr.splitlines()) == 1 and "Permission" in result.stderr


def test_an_empty_workdir_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("has started"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", DEMO, "--workdir", ""])
    assert ended.value.code == exit_codes.USER_ERROR
    assert capsys.readouterr().err == "error: --workdir = '': must be a path; try --workdir runs/mine\n"
    assert list(tmp_path.iterdir()) == []


# --- streams ----------------------------------------------------------------------------------------------------------


def closed_pipe() -> int:
    """The writing end of a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("unbuffered", [None, pytest.param("1", marks=pytest.mark.slow)])
def test_a_closed_pipe_ends_the_output_silently(tmp_path, unbuffered):
    writer = closed_pipe()
    output = tmp_path / "cost.json"
    result = mot("describe", DEMO, "--json", str(output), stdout=writer, env={"PYTHONUNBUFFERED": unbuffered})
    os.close(writer)
    assert (result.returncode, result.stderr) == (exit_codes.FINISHED, "")
    assert json.loads(output.read_text())  # the command has continued


def test_closed_pipes_of_both_streams_leave_the_exit_code():
    writer = closed_pipe()
    assert mot("describe", "/no/such.py", stdout=writer, stderr=writer).returncode == exit_codes.USER_ERROR
    os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        result = mot("describe", DEMO, stdout=full)
    assert result.returncode == exit_codes.USER_ERROR
    assert len(result.stderr.splitlines()) == 1 and "no space left on the disk" in result.stderr


@pytest.mark.slow
def test_closed_streams_are_no_error():
    result = mot(command=["sh", "-c", 'exec "$@" >&-', "sh", *MOT, "describe", DEMO])
    assert (result.returncode, result.stderr) == (exit_codes.FINISHED, "")


def test_characters_that_an_encoding_lacks_are_replaced():
    result = mot("describe", "/no/such/caf\u00e9.py", env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == exit_codes.USER_ERROR
    assert len(result.stderr.splitlines()) == 1 and "caf\\xe9.py" in result.stderr
    program = (
        "import sys; from mot_jax.cli.boundary import boundary\nwith boundary(): print('caf\u00e9', sys.stdin.read())"
    )
    result = mot(command=[sys.executable, "-c", program], input="\udce9", errors="surrogateescape")
    assert (result.returncode, result.stdout) == (0, "caf\u00e9 \ufffd\n")
    result = mot(command=[sys.executable, "-c", program], input="", env={"PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stdout) == (0, "caf? \n")


# --- devices, home and Ctrl-C -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "reason"), [("nonsense", "Unable to initialize backend 'nonsense'"), ("cuda", "")]
)
def test_a_platform_that_is_missing_is_one_line(tmp_path, platform, reason):
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    if platform == "cuda" and any("cuda" in plugin.name for plugin in plugins):
        pytest.skip("XLA's CUDA plugin is installed, for target devices, and logs missing libraries")
    result = mot("train", DEMO, "--workdir", str(tmp_path / "run"), env={"JAX_PLATFORMS": platform})
    assert result.returncode == exit_codes.USER_ERROR
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"error: JAX_PLATFORMS = {platform}: {reason}") and "try JAX_PLATFORMS=cpu" in line
    assert not (tmp_path / "run").exists()


NO_HOME = """
import pwd, sys

def getpwuid(uid):
    raise KeyError(uid)

pwd.getpwuid = getpwuid
from mot_jax.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_user_without_a_home_has_the_data_in_the_temporary_directory(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\ntwo\nthree\n" * 20)
    env = {"HOME": None, "TMPDIR": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": None}
    command = [sys.executable, "-c", NO_HOME]
    build = ["data", "build", "mine", str(text), "--documents", "line", "--workers", "1"]
    result = mot(*build, command=command, env=env, cwd=tmp_path)
    assert result.returncode == exit_codes.FINISHED, result.stderr
    assert (tmp_path / f"mot_jax-{os.getuid()}" / "corpora" / "mine").is_dir()
    assert not (tmp_path / "~").exists()
    result = mot("train", DEMO, "--workdir", "~/run", command=command, env=env, cwd=tmp_path)
    expected = "error: workdir = ~/run: there is no such home directory; set HOME, or try an absolute path"
    assert (result.returncode, result.stderr.splitlines()[-1]) == (exit_codes.USER_ERROR, expected)


@pytest.fixture
def run(tiny, tmp_path) -> Iterator[tuple[subprocess.Popen[str], epath.Path]]:
    """A process that trains a tiny model for hours, and its workdir."""
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("".join(f"{i * n % 997} is {i} times {n}.\n" for n in range(60)))
    spec = spec_from_files("sums", [str(tmp_path)], "file", "text", 0.3)
    build(spec, tmp_path / "data" / "corpora", 1, lambda line: None)
    data = DataConfig(corpus=("sums",), directory=str(tmp_path / "data"), validation_windows=32)
    steps = dataclasses.replace(tiny.training, steps=100_000, checkpoint_every=300, validate_every=1000)
    logging = dataclasses.replace(tiny.logging, tensorboard=False)
    config = dataclasses.replace(tiny, data=data, training=steps, logging=logging)
    file, workdir = tmp_path / "long.py", epath.Path(tmp_path / "run")
    file.write_text(
        f"from mot_jax.config import from_json\n\ndef get_config():\n    return from_json({to_json(config)!r})\n"
    )
    command = [*MOT, "train", str(file), "--workdir", str(workdir)]
    env = environment(XLA_FLAGS=None, JAX_PLATFORMS="cpu")
    with (
        open(tmp_path / "stderr", "w") as stderr,
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=stderr, encoding="utf-8") as process,
    ):
        yield process, workdir
        process.kill()


def wait_for_rows(process: subprocess.Popen[str], workdir: epath.Path, rows: int) -> None:
    end = time.monotonic() + 100
    while process.poll() is None and len(read_rows(workdir)) < rows and time.monotonic() < end:
        time.sleep(0.05)
    assert process.poll() is None, "has ended"


def steps_of(workdir: epath.Path) -> list[int]:
    """The last step that is logged, and the last one that is saved."""
    saved = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    return [read_rows(workdir)[-1]["step"], max(saved)]


@pytest.mark.slow
def test_training_survives_a_closed_pipe_and_saves_a_checkpoint_at_ctrl_c(run):
    process, workdir = run
    process.stdout.readline()
    process.stdout.close()
    wait_for_rows(process, workdir, 20)
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == exit_codes.INTERRUPTED
    assert (workdir.parent / "stderr").read_text() == ""
    logged, saved = steps_of(workdir)
    assert logged == saved >= 20


@pytest.mark.slow
def test_training_does_not_wait_for_a_reader_of_its_output(run):
    process, workdir = run
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)  # full after some of the lines of the steps below
    wait_for_rows(process, workdir, 100)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == exit_codes.PREEMPTED
    logged, saved = steps_of(workdir)
    assert logged == saved >= 100


@pytest.mark.slow
def test_a_save_that_fails_ends_the_process_in_one_line(run):
    """A thread of Orbax would keep the process alive."""
    process, workdir = run
    process.stdout.close()
    wait_for_rows(process, workdir, 1)
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    (workdir / "checkpoints").rename(workdir / "before")
    (workdir / "checkpoints").write_text("")
    process.send_signal(signal.SIGCONT)
    assert process.wait(100) == exit_codes.USER_ERROR
    (line,) = (workdir.parent / "stderr").read_text().splitlines()
    assert line.startswith(f"error: {workdir}/checkpoints/")
