"""A training run from its config to its result."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

import jax
from etils import epath

from mot_jax.config import Config
from mot_jax.cost.parameters import count_parameters
from mot_jax.data.order import fill_warnings
from mot_jax.data.text import text_warnings
from mot_jax.runs import owner
from mot_jax.runs.checkpoint import versions
from mot_jax.runs.metrics import Console, Row, validation_line
from mot_jax.runs.restore import load_run
from mot_jax.runtime import distributed
from mot_jax.runtime.compilation import default_tracing
from mot_jax.training.hooks import default_hooks
from mot_jax.training.run import (
    Run,
    begin,
    finish,
    is_finished,
    is_outdated,
    last_validation,
    needs_thresholds,
    prepare,
    record_thresholds,
    write_workdir,
)
from mot_jax.training.trainer import Hook, Trainer

_SHOWN = 3  # continuations of sample.txt printed at the end; the file has those of the whole group


@default_tracing()
def train(
    config: Config,
    workdir: epath.PathLike,
    hooks: Sequence[Hook] = (),
    take_over: bool = False,
    quiet: bool = False,
) -> Row:
    """Train a model, or resume the run in `workdir`.

    With several processes, each calls this with the same arguments. A SIGTERM or Ctrl-C during the steps saves a
    checkpoint and raises SystemExit. The traceback of an error is also written to `error.txt` in the workdir.

    Args:
        config: the experiment.
        workdir: the directory of the run: new, empty, or that of the same experiment.
        hooks: called in each step, in addition to those that log, validate and save checkpoints. No text sample is
            written without `mot_jax.inference.sample.SampleHook`, which `mot_jax.train` adds.
        take_over: do not wait for another run that is in progress in `workdir`, but end it.
        quiet: print no lines and no progress bar.

    Returns:
        The last validation row: loss in nats per token, bits_per_byte, ...; that of an earlier step if a hook stopped
        the training.

    Raises:
        UserError: before the workdir is touched, for every error in the config, the workdir or the data.
        RetryableError: if another run is in progress in the workdir, or a store fails.
        DivergedError: if the loss or gradient is not finite for `training.max_skipped` steps in a row.
    """
    run = prepare(config, workdir)
    try:
        return _train(run, hooks, take_over, quiet)
    finally:
        owner.release(run.workdir)


def _train(run: Run, hooks: Sequence[Hook], take_over: bool, quiet: bool) -> Row:
    config = run.config
    steps, console = config.training.steps, Console(config.training.steps, quiet=quiet or not distributed.is_first())
    if is_finished(run):
        if is_outdated(run):
            write_workdir(run)
        if needs_thresholds(run, steps):
            with jax.set_mesh(run.mesh):
                trained = load_run(run.workdir, run.mesh)
                record_thresholds(run, trained.params, trained.step)
        console.line(f"{run.workdir} has its {steps} steps: nothing left to train")
        return _report(run, console)
    start = begin(run, take_over)
    for line in start.notes:
        console.line(line)
    console.line(f"{run.workdir}: {f'resuming from step {start.step}' if start.step else 'a new run'}, {steps} steps")
    with _traceback_in_workdir(run):
        for line in _summary(run):
            console.line(line)
        with Trainer(run, start) as trainer:
            console.line(f"compiled the training step in {trainer.compile_seconds:.1f} s")
            trainer.train(default_hooks(config, console, hooks))
            if trainer.at_last_step and needs_thresholds(run, steps):
                record_thresholds(run, trainer.state.variables, steps)
        if not trainer.at_last_step:
            return last_validation(run)
        finish(run)
    return _report(run, console)


@contextlib.contextmanager
def _traceback_in_workdir(run: Run) -> Iterator[None]:
    """Around the steps: write an error to `error.txt` of the workdir, `error_I.txt` for process I of several.

    Process 0 writes nothing after another run has taken over the workdir.
    """
    try:
        yield
    except Exception:
        name = "error.txt" if jax.process_count() == 1 else f"error_{jax.process_index()}.txt"
        about = [time.strftime("%Y-%m-%d %H:%M:%S %Z"), " ".join(sys.argv)]
        about += [f"{package} {version}" for package, version in versions().items()]
        with contextlib.suppress(Exception):  # the disk may be full; the error itself is reported in any case
            if not distributed.is_first() or owner.is_owner(run.workdir):
                (run.workdir / name).write_text("\n".join([*about, "", traceback.format_exc()]))
        raise


def _summary(run: Run) -> list[str]:
    """Lines about the size of the run, and a warning if its validation groups are mostly padding."""
    config, t, mesh = run.config, run.config.training, run.mesh
    parameters = sum(count_parameters(config.model).values())
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    epochs = t.steps * t.batch_size / len(run.windows)
    lines = [
        f"{parameters / 1e6:,.1f} M parameters | mesh {axes} of {mesh.devices.flat[0].device_kind} | "
        f"{t.batch_size * config.model.context_length:,} tokens a step | {len(run.windows):,} windows, "
        f"{epochs:.1f} epochs"
    ]
    lines += text_warnings(config, run.tokenizer)
    data = config.data
    advice = "one with more text, as data.train_split = 'train[:90%]', data.validation_split = 'train[90%:]'"
    return lines + fill_warnings(run.validation_windows.documents, data.validation_split, config.group_size, advice)


def _report(run: Run, console: Console) -> Row:
    """Print the result of a finished run; return its last validation row."""
    row = last_validation(run)
    if row and row.get("loss") is not None:  # null after a loss that was not finite
        console.line(validation_line(row))
    with contextlib.suppress(OSError):  # no sample, or an unreadable one
        sample = (run.workdir / "sample.txt").read_bytes().decode(errors="replace")
        console.line("\n--- prompt\n".join(sample.split("\n--- prompt\n")[:_SHOWN]))
    console.line(f"in {run.workdir}: {', '.join(sorted(child.name for child in run.workdir.iterdir()))}")
    return row
