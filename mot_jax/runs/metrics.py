"""The metrics of a run: rows, TensorBoard, W&B, lines or a progress bar on the console, a plot of the loss curves.

Rows are lines of JSON that are appended to `metrics.jsonl`. An object store cannot append: there they are in
`metrics/00000.jsonl` and so on, the last of which is rewritten with all its rows until it is large.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import netrc
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import rich.console
import rich.progress
from etils import epath
from matplotlib.figure import Figure

from mot_jax.config import LoggingConfig
from mot_jax.errors import UserError
from mot_jax.runtime import distributed, strict_json
from mot_jax.runtime.paths import is_remote, read_file, replace_file, sync
from mot_jax.runtime.progress import duration

Row = dict[str, Any]

_PART_BYTES = 1 << 19  # bytes of rows after which a new part begins
_LOGIN = "try `wandb login`, or WANDB_MODE=offline"
_NAMED = 5  # damaged lines of which a warning has the numbers
_SECONDS = 60.0  # between writes of a part; a checkpoint causes further ones
# How often the TensorBoard file is flushed, by whether it is on an object store, where it is sent as a whole each time.
_BOARD_SECONDS = {False: 10, True: 300}


class MetricsLog:
    """Writes each row to the workdir, and to TensorBoard and Weights & Biases where `config` asks for them.

    Opening removes the rows after `step`, which the resumed run logs again. Raises UserError if W&B cannot start.
    """

    def __init__(self, workdir: epath.Path, step: int, config: LoggingConfig):
        self._wandb = _open_wandb(workdir, config.wandb_project) if config.wandb else None  # first: it can fail
        self._board = None
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            seconds = _BOARD_SECONDS[is_remote(workdir)]
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1, flush_secs=seconds)
        _remove_rows_after(workdir, step)
        self._rows = _Parts(workdir) if is_remote(workdir) else _Lines(workdir)

    def write(self, row: Row) -> None:
        """Write a row: a file has it when this returns, an object store after the next `flush`."""
        self._rows.write(_line(row))
        values = {f"{row['split']}/{name}": value for name, value in row.items() if isinstance(value, float)}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log({"step": row["step"], **values})

    def flush(self) -> None:
        """Make all rows durable. Call this before each checkpoint: a resumed run must have all rows up to its step."""
        self._rows.flush()

    def close(self) -> None:
        self._rows.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class _Lines:
    """Rows appended to one file, flushed at once, so that `tail -f` shows them."""

    def __init__(self, workdir: epath.Path):
        self._file = (workdir / "metrics.jsonl").open("a")
        sync(workdir)

    def write(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def flush(self) -> None:
        os.fsync(self._file.fileno())  # `write` hands every line to the system, which a power loss may still drop

    def close(self) -> None:
        self._file.close()


class _Parts:
    """Rows in objects of bounded size, so that the bytes sent are a small multiple of the bytes logged.

    Limiting the rate of writes limits the time that the training loop waits for them; a kill loses the rows since the
    last write, but none before a checkpoint.
    """

    def __init__(self, workdir: epath.Path):
        self._folder = workdir / "metrics"
        numbers = [int(path.stem) for path in _row_files(workdir) if path.stem.isdigit()]
        self._number = max(numbers, default=-1) + 1
        self._lines: list[str] = []
        self._unwritten, self._since = False, time.monotonic()

    def write(self, line: str) -> None:
        self._lines.append(line)
        self._unwritten = True
        if time.monotonic() - self._since > _SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._unwritten:
            content = "".join(self._lines).encode()
            (self._folder / f"{self._number:05d}.jsonl").write_bytes(content)
            self._unwritten, self._since = False, time.monotonic()
            if len(content) > _PART_BYTES:
                self._number, self._lines = self._number + 1, []

    def close(self) -> None:
        self.flush()


def check_logging(config: LoggingConfig) -> None:
    """Raise UserError if W&B is enabled and not installed, or if this process writes to it and is not logged in."""
    if not config.wandb:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError("logging.wandb = True: wandb is not installed; try pip install wandb")
    if distributed.is_first() and not _is_logged_in():
        raise UserError(f"logging.wandb = True: no API key of W&B is configured; {_LOGIN}")


def _is_logged_in() -> bool:
    """Whether W&B has credentials, or sends nothing. Whether they are valid is known only to its server."""
    import wandb

    settings = wandb.setup().settings
    if settings.mode in ("offline", "disabled", "dryrun"):
        return True
    if settings.api_key or getattr(settings, "identity_token_file", None):
        return True
    hosts = {urlsplit(settings.base_url).netloc, "api.wandb.ai"}  # versions differ in the host of one login
    for path in filter(None, [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if not hosts.isdisjoint(netrc.netrc(os.path.expanduser(path)).hosts):
                return True
    return False


def _open_wandb(workdir: epath.Path, project: str) -> Any:
    """The W&B run of this workdir: a new one, or the one whose id is in `wandb_id`."""
    import wandb

    path = workdir / "wandb_id"
    if not (path.exists() and path.read_text().strip()):
        path.write_text(uuid.uuid4().hex[:12])
    try:
        run = wandb.init(
            project=project,
            id=path.read_text(),
            name=workdir.name,
            resume="allow",
            allow_val_change=True,  # `steps`, when a run is extended
            dir=None if is_remote(workdir) else str(workdir),  # None: the default of W&B
            config=json.loads((workdir / "config.json").read_text()),
            settings=wandb.Settings(console="off"),  # it would redirect the printed lines and the progress bar
        )
    except wandb.errors.Error as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"logging.wandb = True: {reason}; {_LOGIN}") from None
    # W&B drops rows of earlier steps by its own step count, and a resumed run sends some again.
    run.define_metric("*", step_metric="step")
    return run


def _line(row: Row) -> str:
    """A row as a line of strict JSON, with null for NaN and infinities."""
    return strict_json.dumps(row) + "\n"


def read_rows(workdir: epath.Path) -> list[Row]:
    """The rows of a run so far, ordered by step, without damaged lines, which are reported on standard error.

    Raises UserError for a file that cannot be read.
    """
    rows = [row for path in _row_files(workdir) for row in _rows_of(path)]
    return sorted(rows, key=lambda row: row["step"])  # a run that moved to or from an object store has both forms


def _row_files(workdir: epath.Path) -> list[epath.Path]:
    folder, file = workdir / "metrics", workdir / "metrics.jsonl"
    parts = sorted(path for path in folder.iterdir() if path.suffix == ".jsonl") if folder.is_dir() else []
    return [*parts, file] if file.exists() else parts


def _rows_of(path: epath.Path) -> list[Row]:
    """The rows of a file. Damaged lines are left out and reported, except for the last one, which a kill may cut."""
    rows, damaged = [], []
    lines = read_file(path, f"try mv {path} {path}.old").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        row = _row_in(line)
        if row is not None:
            rows.append(row)
        elif line.endswith(b"\n"):
            damaged.append(str(number))
    if damaged:
        more = f" and {len(damaged) - _NAMED:,} more" if len(damaged) > _NAMED else ""
        words = f"damaged lines are left out: {', '.join(damaged[:_NAMED])}{more}"
        print(f"warning: {path}: {words}", file=sys.stderr)
    return rows


def _row_in(line: bytes) -> Row | None:
    """The row of a line; None for a damaged line."""
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) and isinstance(row["split"], str) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _remove_rows_after(workdir: epath.Path, step: int) -> None:
    """Remove the rows after `step`, beginning with the last file, so that a kill in between leaves no gap."""
    for path in reversed(_row_files(workdir)):
        remaining = [row for row in _rows_of(path) if row["step"] <= step]
        if remaining:
            replace_file(path, "".join(map(_line, remaining)).encode())
        else:
            path.unlink()


def layer_metrics(row: Row, name: str) -> list[float]:
    """The values of a metric of the layers, `{name}/{block}` in a row, in the order of the blocks."""
    return [row[key] for key in sorted(row) if key.startswith(name + "/")]


class Console:
    """The lines that a run prints: above a progress bar on a terminal, plain elsewhere, none if `quiet`."""

    def __init__(self, steps: int, interactive: bool | None = None, quiet: bool = False):
        self._interactive = (sys.stdout.isatty() if interactive is None else interactive) and not quiet
        self._quiet = quiet
        self._console = rich.console.Console(highlight=False, soft_wrap=True)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._interactive,
        )
        self._steps = steps

    def line(self, text: str = "") -> None:
        if self._interactive:
            self._console.print(text, markup=False)
        elif not self._quiet:
            print(text, flush=True)

    @contextlib.contextmanager
    def progress(self, done: int) -> Iterator[Callable[[], None]]:
        """Show a progress bar that begins at `done` steps; gives a function that advances it by one step."""
        with self._bar as bar:
            task = bar.add_task("training", total=self._steps, completed=done)
            yield lambda: bar.advance(task)


def train_line(row: Row, steps: int) -> str:
    """The line that is printed for a training row."""
    parts = [
        f"step {row['step']:>{len(str(steps))}}/{steps}",
        f"loss {row['loss']:.4f}",
        f"lr {row['learning_rate']:.2e}",
        f"rms grad {row['gradient_rms']:.1e} update {row['update_rms']:.1e} params {row['parameter_rms']:.3f}",
        f"{row['tokens_per_second']:,.0f} tokens/s",
        f"{row['model_flops_per_second'] / 1e9:,.1f} GFLOP/s",
    ]
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    parts.append(f"data wait {row['data_wait']:.1%}")
    parts.append(f"left {duration(row['seconds_left'])}")
    for name, label in (("mixing_entropy", "entropy"), ("update_ratio", "update/residual")):
        if values := layer_metrics(row, name):
            parts.append(f"{label} " + " ".join(f"{value:.2f}" for value in values))
    if row["shared_document_share"]:
        parts.append(f"groups with two windows of one document {row['shared_document_share']:.1%}")
    if row.get("skipped"):
        parts.append(f"skipped {row['skipped']:.0f}")
    return " | ".join(parts)


def validation_line(row: Row) -> str:
    """The line that is printed for a validation row."""
    parts = [f"validation after {row['step']} steps: {row['bits_per_byte']:.4f} bits per byte"]
    if "most_frequent" in row:
        parts = [
            f"validation after {row['step']} steps: {row['accuracy']:.1%} of {row['tokens']:,} masked tokens right"
        ]
        parts += [f"the most frequent one would be right for {row['most_frequent']:.1%}"]
    return " | ".join([*parts, f"loss {row['loss']:.4f}", f"{row['windows']:,} windows"])


def plot_curves(runs: dict[str, list[Row]]) -> bytes:
    """A PNG of the loss curves of runs by name: training as a thin line, validation as dots on a thick one."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, rows) in enumerate(runs.items()):
        color = f"C{index}"
        for split, style in (("train", {"linewidth": 0.7, "alpha": 0.5}), ("validation", {"marker": "o"})):
            points = [
                (row["step"], row["loss"]) for row in rows if row["split"] == split and row.get("loss") is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, label=f"{name}, {split}", **style)
    axes.set(xlabel="step", ylabel="loss in nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure)


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
