"""What a run says of itself: rows, TensorBoard, W&B, lines or a progress bar, a picture of the curves.

Rows are lines of JSON in `metrics.jsonl`, which grows. On an object store, where nothing grows, they are in
`metrics/00000.jsonl` and so on: the last of these is written anew with all its rows, until it is large.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import rich.console
import rich.progress
from etils import epath
from matplotlib.figure import Figure

from mot_jax.config import LoggingConfig
from mot_jax.errors import UserError
from mot_jax.runtime.paths import is_remote, replace_file

Row = dict[str, Any]

_PART = 1 << 19  # bytes of rows after which a new part begins
_SECONDS = 60.0  # between writes of a part, but for those that a checkpoint asks for
# How often TensorBoard's file is brought up to date; on an object store it is sent whole each time.
_BOARD_SECONDS = {False: 10, True: 300}


class MetricsLog:
    """Writes each row to the workdir, and to TensorBoard and Weights & Biases where `config` asks for them.

    Opening removes the rows after `step`: they come again. Raises UserError if W&B cannot start.
    """

    def __init__(self, workdir: epath.Path, step: int, config: LoggingConfig):
        self._wandb = _open_wandb(workdir, config.wandb_project) if config.wandb else None  # first: it can fail
        _cut(workdir, step)
        self._rows = _Parts(workdir) if is_remote(workdir) else _Lines(workdir)
        self._board = None
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            seconds = _BOARD_SECONDS[is_remote(workdir)]
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1, flush_secs=seconds)

    def write(self, row: Row) -> None:
        """Where files can grow, the system has the row when this returns; on an object store, after `flush`."""
        self._rows.write(_line(row))
        values = {f"{row['split']}/{name}": value for name, value in row.items() if isinstance(value, float)}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log({"step": row["step"], **values})

    def flush(self) -> None:
        """Must come before each checkpoint, which then never outlives its rows."""
        self._rows.flush()

    def close(self) -> None:
        self._rows.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class _Lines:
    """Rows in one file that grows, where people can watch it."""

    def __init__(self, workdir: epath.Path):
        self._file = (workdir / "metrics.jsonl").open("a")

    def write(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def flush(self) -> None:
        pass  # each line already is

    def close(self) -> None:
        self._file.close()


class _Parts:
    """Rows in objects of bounded size, so that what is sent is a small multiple of what is logged.

    The time between writes bounds what the training loop waits for; a kill loses rows, but none before a checkpoint.
    """

    def __init__(self, workdir: epath.Path):
        self._folder = workdir / "metrics"
        there = [int(path.stem) for path in _row_files(workdir) if path.stem.isdigit()]
        self._number = max(there, default=-1) + 1
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
            if len(content) > _PART:
                self._number, self._lines = self._number + 1, []

    def close(self) -> None:
        self.flush()


def check_logging(config: LoggingConfig) -> None:
    """Raises UserError if W&B is asked for and not installed."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("logging.wandb = True: wandb is not installed; try pip install 'mot_jax[wandb]'")


def _open_wandb(workdir: epath.Path, project: str) -> Any:
    """The W&B run of this workdir: a new one, or the one whose id is in `wandb_id`."""
    import wandb

    path = workdir / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    try:
        run = wandb.init(
            project=project,
            id=path.read_text(),
            name=workdir.name,
            resume="allow",
            allow_val_change=True,  # the steps of a run that is extended
            dir=None if is_remote(workdir) else str(workdir),  # None: W&B's own choice
            config=json.loads((workdir / "config.json").read_text()),
            settings=wandb.Settings(console="off"),  # it would redirect our lines and the progress bar
        )
    except wandb.errors.Error as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"logging.wandb = True: {reason}; try `wandb login`, or WANDB_MODE=offline") from None
    # Not W&B's own count: a resumed run sends rows again, which it would drop as being of the past.
    run.define_metric("*", step_metric="step")
    return run


def _line(row: Row) -> str:
    """JSON has no word for what is not finite: null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_rows(workdir: epath.Path) -> list[Row]:
    """The rows of a run so far, wherever it logged them; a last line that a kill cut short is left out."""
    rows = [row for path in _row_files(workdir) for row in _rows_of(path)]
    return sorted(rows, key=lambda row: row["step"])  # a run that moved to or from an object store has both forms


def _row_files(workdir: epath.Path) -> list[epath.Path]:
    folder, file = workdir / "metrics", workdir / "metrics.jsonl"
    parts = sorted(path for path in folder.iterdir() if path.suffix == ".jsonl") if folder.is_dir() else []
    return [*parts, file] if file.exists() else parts


def _rows_of(path: epath.Path) -> list[Row]:
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _cut(workdir: epath.Path, step: int) -> None:
    """Removes the rows after `step`, the last file first: a kill meanwhile leaves no gap."""
    for path in reversed(_row_files(workdir)):
        kept = [row for row in _rows_of(path) if row["step"] <= step]
        if kept:
            replace_file(path, "".join(map(_line, kept)).encode())
        else:
            path.unlink()


def layer_metrics(row: Row, name: str) -> list[float]:
    """The values of a layer metric (`{name}/{block}`), in the order of the blocks."""
    return [row[key] for key in sorted(row) if key.startswith(name + "/")]


class Console:
    """Lines of a run: plain in a log, above a progress bar on a terminal; none of a `quiet` one."""

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
    """One line of a training row for people."""
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
    return " | ".join(parts)


def validation_line(row: Row) -> str:
    """One line of a validation row for people."""
    parts = [f"validation after {row['step']} steps: {row['bits_per_byte']:.4f} bits per byte"]
    if "most_frequent" in row:
        parts = [
            f"validation after {row['step']} steps: {row['accuracy']:.1%} of {row['tokens']:,} masked tokens right"
        ]
        parts += [f"the commonest is {row['most_frequent']:.1%}"]
    return " | ".join([*parts, f"loss {row['loss']:.4f}", f"{row['windows']:,} windows"])


def duration(seconds: float) -> str:
    """`1:02:03` or `4:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def plot_curves(runs: dict[str, list[Row]]) -> bytes:
    """A PNG of the loss curves of runs by name: training as a thin line, validation as dots on a thick one."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, rows) in enumerate(runs.items()):
        color = f"C{index}"
        for split, style in (("train", {"linewidth": 0.7, "alpha": 0.5}), ("validation", {"marker": "o"})):
            points = [(row["step"], row["loss"]) for row in rows if row["split"] == split and row["loss"] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, label=f"{name}, {split}", **style)
    axes.set(xlabel="step", ylabel="loss in nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure)


def png(figure: Figure) -> bytes:
    """The picture as a file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
