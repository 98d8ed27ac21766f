"""The status of runs: `status.json`, which a run in progress writes once a minute, and the report of `mot status`.

Reading takes no lock, writes nothing and does not import JAX. It combines `status.json` with the other files of a run,
so that a run of an earlier version, a killed one and one with damaged files have a report as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.markup
import rich.table
from etils import epath

from mot_jax.errors import RetryableError, UserError, error_words
from mot_jax.runs import owner
from mot_jax.runs.metrics import read_rows
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import is_io_error, is_passing, replace_file
from mot_jax.runtime.progress import duration

FILE = "status.json"
RESULT = "result.json"  # the last file that a run writes: the mark of a finished one
# States in which a run has ended; others are starting, compiling, training, validating, saving, finishing.
ENDED = ("finished", "stopped", "preempted", "interrupted", "diverged", "failed")

Status = dict[str, Any]  # the content of the file
_NUMBERS = (
    "step",
    "steps",
    "loss",
    "learning_rate",
    "tokens_per_second",
    "seconds_left",
    "seconds_since_step",
    "checkpoint",
    "time",
)
_TEXTS = ("state", "waiting_for", "behind", "error")
# The fields of a report.
_LAST_KNOWN = ("step", "steps", "loss", "learning_rate", "tokens_per_second", "checkpoint")
_OF_PROGRESS = ("seconds_left", "seconds_since_step", "waiting_for", "waits", "behind")
_LIFE = ("sign_of_life", "seconds_since_sign_of_life", "owner", "remark")
FIELDS = ("workdir", "state", *_LAST_KNOWN, "validation_loss", *_OF_PROGRESS, *_LIFE)
_LONG_SECONDS = 60.0  # since the last step: then the report has the reason


# --- writing ----------------------------------------------------------------------------------------------------------


def write(workdir: epath.Path, content: Mapping[str, Any]) -> None:
    """Replace the status of the run in a workdir that this process owns; otherwise do nothing."""
    if owner.is_owner(workdir):
        about = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        replace_file(workdir / FILE, (strict_json.dumps({**content, **about}, indent=1) + "\n").encode())


def note(workdir: epath.Path, content: Mapping[str, Any], update: bool = False) -> None:
    """As `write`, and ignore errors of the disk or store. update: retain the other fields of the file."""
    with contextlib.suppress(Exception):
        write(workdir, {**(read(workdir) or {}), **content} if update else content)


# --- reading ----------------------------------------------------------------------------------------------------------


def read(workdir: epath.Path) -> Status | None:
    """The status in a workdir; None without the file, and an empty one for a damaged file."""
    content = _json(workdir / FILE)
    return None if content is None else {name: value for name, value in content.items() if _valid(name, value)}


def _valid(name: str, value: Any) -> bool:
    if name in _NUMBERS:
        return isinstance(value, (int, float))
    return isinstance(value, str) if name in _TEXTS else True


def _json(path: epath.Path) -> dict[str, Any] | None:
    """The object in a file; None without the file, and an empty one for a damaged file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def reports(name: str, directory: epath.Path) -> list[dict[str, Any]]:
    """The report about the run in `directory`, or about all runs below it.

    Raises UserError, naming `name`, if there is none; RetryableError if a store does not respond.
    """
    try:
        workdirs = list(_workdirs(directory))
    except FileNotFoundError:
        raise UserError(f"{name} = {directory}: no such directory; try the --workdir of a training run") from None
    except Exception as error:
        if is_passing(error):
            raise RetryableError(f"{name} = {directory}: cannot be read now ({error_words(error)})") from None
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error_words(error)
        raise UserError(f"{name} = {directory}: cannot be read ({reason}); try the --workdir of a run") from None
    if not workdirs:
        raise UserError(
            f"{name} = {directory}: holds no run; try the --workdir of a training run, or a directory that has some"
        )
    return [_report(workdir) for workdir in workdirs]


def _workdirs(directory: epath.Path) -> Iterator[epath.Path]:
    children = sorted(directory.iterdir())
    if _is_workdir(child.name for child in children):
        yield directory
        return
    for child in children:
        # A store may have an object with the name of the directory.
        if child == directory or child.name.startswith("."):
            continue
        with contextlib.suppress(PermissionError):
            if not child.is_dir():
                continue
            if not os.path.islink(child):
                yield from _workdirs(child)
            elif _is_workdir(file.name for file in child.iterdir()):  # other links may form a cycle
                yield child


def _is_workdir(names: Iterable[str]) -> bool:
    """Whether a directory with these files has a run. Exports and other projects' models have a config.json as well."""
    files = set(names)
    if any(name.startswith("model.safetensors") for name in files):
        return False
    of_run = {"data.json", "metrics.jsonl", "metrics", "checkpoints"}
    return owner.FILE in files or ("config.json" in files and not files.isdisjoint(of_run))


def _report(workdir: epath.Path) -> dict[str, Any]:
    try:
        return report(workdir)
    except Exception as error:
        if not is_io_error(error):
            raise
        unknown = dict.fromkeys(FIELDS)
        return unknown | {"workdir": str(workdir), "state": "unreadable", "remark": error_words(error)}


def report(workdir: epath.Path) -> dict[str, Any]:
    """The report about the run in a workdir, from all its files.

    Returns:
        `FIELDS`, None where a value is not known. state: one of `status.json`, or `killed` (its process has ended,
        without an error), `silent` (no sign of life for `owner.STALE_SECONDS`), `unfinished` (without a process, for an
        unknown reason). step ... checkpoint: the last ones known. validation_loss: of a finished run. seconds_left ...
        behind: of a run in progress. sign_of_life: the time of the last one, in seconds since 1970. owner: the process
        of a run in progress, or of a killed one. remark: the reason for the state.
    """
    now, process, status = time.time(), owner.read(workdir), read(workdir)
    remarks = [f"{FILE} is damaged"] if status == {} else []
    status, result = status or {}, _json(workdir / RESULT)
    signs = [float(value) for value in (status.get("time"), (process or {}).get("beat")) if value]
    sign_of_life = max(signs, default=None) or _last_write(workdir)
    gone = None if process is None else _gone(process, sign_of_life)
    in_progress = process is not None and gone is None
    if process and in_progress and (status.get("host"), status.get("pid")) != (process.get("host"), process.get("pid")):
        status = {}  # of an earlier start
    # A process of several may fail shortly before the last sign of life, which is that of process 0.
    error_since = max(signs, default=0.0) - owner.BEAT_SECONDS
    error = None if in_progress else status.get("error") or _error(workdir, error_since)

    if in_progress:
        state = status.get("state", "starting")
        remarks += _delays(status)
    elif result is not None:
        state = "finished"
    elif status.get("state") in ENDED:
        state = status["state"]
    elif error is not None:
        state = "diverged" if error.startswith("DivergedError") else "failed"
    elif gone is not None:
        state, reason = gone
        remarks.append(reason)
    else:
        state = "unfinished"
    if error is not None and state in ("failed", "diverged"):
        remarks.append(error.removesuffix(": "))  # of an exception without a text

    last = _last_row(workdir) if "loss" not in status else {}
    if in_progress and not status and last:
        state = "training"  # of an earlier version, without status.json
    validation = (result or {}).get("validation")
    known: dict[str, Any] = {"steps": _steps(workdir), **last, **status}
    return dict.fromkeys(FIELDS) | {
        "workdir": str(workdir),
        "state": state,
        **{name: known.get(name) for name in _LAST_KNOWN},
        "validation_loss": validation.get("loss") if isinstance(validation, dict) else None,
        **{name: status.get(name) for name in _OF_PROGRESS if in_progress},
        "sign_of_life": sign_of_life,
        "seconds_since_sign_of_life": None if sign_of_life is None else max(now - sign_of_life, 0.0),
        "owner": None if process is None else owner.describe(process),
        "remark": "; ".join(remarks) or None,
    }


def _gone(process: owner.Owner, sign_of_life: float | None) -> tuple[str, str] | None:
    """State and reason for a run of which this is the owner, if it is no longer in progress."""
    if process and (reason := owner.reason_gone(process)):
        return "killed", reason
    if reason := owner.silence(process or {"beat": sign_of_life}):  # empty: from a damaged file
        return "silent", reason if process else f"{owner.FILE} is damaged, and {reason}"
    return None


def _delays(status: Status) -> list[str]:
    """The process that is behind, or the reason for which no step has been made for long."""
    if status.get("behind"):
        return [status["behind"]]
    seconds, cause = status.get("seconds_since_step") or 0, status.get("waiting_for")
    if seconds < _LONG_SECONDS:
        return []
    return [f"no step for {duration(seconds)}" + (f", waiting for {cause}" if cause else "")]


def _steps(workdir: epath.Path) -> int | None:
    """The number of steps in the config, which may be of an earlier version."""
    with contextlib.suppress(KeyError, TypeError):
        return (_json(workdir / "config.json") or {})["training"]["steps"]
    return None


def _last_row(workdir: epath.Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        rows = [row for row in read_rows(workdir) if row["split"] == "train"]
        return rows[-1] if rows else {}
    return {}


def _error(workdir: epath.Path, since: float) -> str | None:
    """The error at the end of `error.txt`, or of that of one of several processes; None without one.

    since: the time before which the file is of another run: the last owner had a later sign of life.
    """
    for path in sorted(workdir.glob("error*.txt")):
        with contextlib.suppress(OSError, ValueError):
            if float(path.stat().mtime) < since:
                continue
            for line in reversed(path.read_text().splitlines()):
                if error := re.match(r"(?:\w+\.)*(\w+(?:: .*)?)$", line):
                    return error[1]
    return None


def _last_write(workdir: epath.Path) -> float | None:
    """The time at which a run without `status.json` last wrote a file."""
    times = []
    for name in (RESULT, "metrics.jsonl", "config.json"):
        with contextlib.suppress(OSError):
            times.append(float((workdir / name).stat().mtime))
    return max(times, default=None)


# --- printing ---------------------------------------------------------------------------------------------------------


def show(reports: Sequence[Mapping[str, Any]]) -> None:
    """Print a table with a line for each run."""
    table = rich.table.Table(box=None, pad_edge=False)
    for name in ("run", "state", "step", "loss", "tokens/s", "left", "sign of life", "process", "remark"):
        right = name in ("step", "loss", "tokens/s", "left", "sign of life")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for of in reports:
        cells = (
            of["workdir"],
            of["state"],
            f"{_text(of['step'], '{:,.0f}')}/{_text(of['steps'], '{:,.0f}')}",
            _text(of["loss"], "{:.4f}"),
            _text(of["tokens_per_second"], "{:,.0f}"),
            "-" if of["seconds_left"] is None else duration(of["seconds_left"]),
            _age(of["seconds_since_sign_of_life"]),
            of["owner"] or "-",
            of["remark"] or "",
        )
        table.add_row(*map(rich.markup.escape, cells))
    console = rich.console.Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # a line for each run
    with console.capture() as lines:
        console.print(table)
    print("\n".join(line.rstrip() for line in lines.get().splitlines()))


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    days = int(seconds // 86400)
    return f"{days} days ago" if days > 1 else f"{duration(seconds)} ago"
