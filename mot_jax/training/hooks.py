"""Hooks of the training loop: log, validate, stop when preempted, save checkpoints, show progress, write the status.

Their order is the order of effects: a row is written before the checkpoint that follows it, and a checkpoint is saved
in the step in which training stops. `default_hooks` has them in this order.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from mot_jax.config import Config
from mot_jax.cost.flops import flops_per_token
from mot_jax.cost.hardware import peak_flops
from mot_jax.errors import DivergedError
from mot_jax.runs import owner
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.runs.metrics import Console, MetricsLog, Row, train_line, validation_line
from mot_jax.runs.restore import newest_step
from mot_jax.runtime import distributed, exit_codes
from mot_jax.training.divergence import WATCHED, DivergenceWatch
from mot_jax.training.status_hook import StatusHook
from mot_jax.training.trainer import Hook, StepMetrics, Trainer


def default_hooks(config: Config, console: Console, hooks: Sequence[Hook] = ()) -> list[Hook]:
    """The hooks of a run, with further `hooks` in the place where they may log rows and stop the training."""
    log = LogHook(console)
    status = StatusHook(console, lambda: log.latest)
    validate = ValidateHook(log, console, early=config.training.transition_from is not None)
    return [status, log, validate, PreemptHook(console), *hooks, CheckpointHook(log), WatchHook(console)]


class _Pending(NamedTuple):
    """A step whose metrics have not been fetched. next_example: index of the first example after those of the step."""

    step: int
    next_example: int
    metrics: StepMetrics


class LogHook(Hook):
    """Writes a row of metrics every `training.log_every` steps, and for every skipped step and spike of the loss.

    The metrics of a step are fetched one step later, while the devices compute the next one: a fetch waits for the
    device, which must not wait for the host.

    Attributes:
        watch: the state of the latest step whose metrics have been fetched.
        last_validation: the latest validation row; empty if there is none since the start.
        latest: step and loss of that step, and the other values of the last row.
    """

    def __init__(self, console: Console):
        self._console = console
        self._metrics_log: MetricsLog | None = None  # only in process 0
        self._pending: _Pending | None = None
        self.watch = DivergenceWatch()
        self.last_validation: Row = {}
        self.latest: Row = {}

    @contextlib.contextmanager
    def around(self, trainer: Trainer) -> Iterator[None]:
        run = trainer.run
        with distributed.together():
            if distributed.is_first():
                # The log of a new run removes all older rows, that of step 0 too.
                self._metrics_log = MetricsLog(run.workdir, trainer.step or -1, run.config.logging)
        self._meter = Meter(run.config, run.mesh)
        self._meter.restart(trainer)
        try:
            yield
            self.read_pending(trainer)
        finally:
            if self._metrics_log is not None:
                self._metrics_log.close()

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.read_pending(trainer)
        self._pending = _Pending(trainer.step, trainer.next_example, metrics)

    def read_pending(self, trainer: Trainer) -> None:
        """Fetch the metrics of the last step, if they are not fetched yet, and write its row, if it has one."""
        if self._pending is None:
            return
        (step, next_example, metrics), self._pending = self._pending, None
        t = trainer.run.config.training
        row: Row = {"step": step, "split": "train"}
        with trainer.waits.on("device"):
            watched = jax.device_get({name: metrics[name] for name in WATCHED})
        remark = self.watch.read(watched)
        self.latest = self.latest | {"step": step, "loss": float(watched["loss"])}
        if remark:
            row |= {"first_example": next_example - t.batch_size, "last_example": next_example - 1}
            examples = f"examples {row['first_example']:,} to {row['last_example']:,} of the training order"
            self._console.line(f"step {step}: {remark}; {examples}")
        if remark or step % t.log_every == 0 or step == t.steps:
            row |= {name: float(value) for name, value in jax.device_get(metrics).items()}
            row |= self._meter.read(trainer, step)
            self.latest = row
            self.write(row, train_line(row, t.steps))

    def write(self, row: Row, line: str) -> None:
        """Write a row to the log, and its line to the console."""
        if row["split"] == "validation":
            self.last_validation = row
        if self._metrics_log is not None:
            self._metrics_log.write(row)
        self._console.line(line)

    def flush(self) -> None:
        """Send all rows to the workdir: on an object store, they are collected in between."""
        if self._metrics_log is not None:
            self._metrics_log.flush()

    @contextlib.contextmanager
    def pause(self, trainer: Trainer) -> Iterator[None]:
        """Around work between two steps, whose time does not count as that of training: first writes the last row."""
        self.read_pending(trainer)
        begin = time.perf_counter()
        yield
        self._meter.resume(trainer, time.perf_counter() - begin)


class ValidateHook(Hook):
    """Scores `data.validation_windows` windows every `training.validate_every` steps.

    At the end it scores `data.final_validation_windows`, by default the whole split.

    early: also before the first step and after steps 1, 2, 4, 8, ...: the loss of a transition rises only briefly.
    """

    state = "validating"

    def __init__(self, log: LogHook, console: Console, early: bool = False):
        self._log, self._console, self._early = log, console, early

    @contextlib.contextmanager
    def around(self, trainer: Trainer) -> Iterator[None]:
        if self._early and trainer.step == 0:
            self._validate(trainer)
        yield

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        due = trainer.step % trainer.run.config.training.validate_every == 0 or trainer.at_last_step
        if due or (self._early and trainer.step.bit_count() == 1):
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        data = trainer.run.config.data
        limit = data.final_validation_windows if trainer.at_last_step else data.validation_windows
        with self._log.pause(trainer):
            row = {"step": trainer.step, "split": "validation", **trainer.evaluate(limit)}
            self._log.write(row, validation_line(row))


class PreemptHook(Hook):
    """Stops training after a SIGTERM or Ctrl-C, in the same step of all processes, and then ends them.

    The exit code is `checkpoint.preempted_exit_code`, or 130 after Ctrl-C. Must come before the `CheckpointHook`, which
    saves the state of that step.
    """

    def __init__(self, console: Console):
        self._console = console

    @contextlib.contextmanager
    def around(self, trainer: Trainer) -> Iterator[None]:
        self._preempted = False
        with distributed.preemption() as self._request:
            yield
        if self._preempted:  # here the checkpoint is complete: its hook's context has been left
            interrupted = self._request.is_interrupt()
            cause = "Ctrl-C" if interrupted else "SIGTERM"
            self._console.line(
                f"{cause}: stopped after step {trainer.step}, with a checkpoint; the same command resumes the run"
            )
            preempted_code = trainer.run.config.checkpoint.preempted_exit_code
            distributed.stop(exit_codes.INTERRUPTED if interrupted else preempted_code)

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self._request.is_due(trainer.step) and not trainer.at_last_step:
            self._preempted = True
            trainer.stop()


class CheckpointHook(Hook):
    """Saves a checkpoint every `training.checkpoint_every` steps and in the step in which training ends.

    All rows are written before. Saving continues in the background; leaving the context waits for it.

    A checkpoint is not to replace a better one: it is postponed while steps are skipped, since parameters of which
    every loss is infinite or NaN are of no use, and none is saved of parameters whose norm is not finite. After
    `training.max_skipped` skipped steps in a row, or with such parameters at the end, the run ends with DivergedError.
    """

    state = "saving"

    def __init__(self, log: LogHook):
        self._log, self._due = log, False

    @contextlib.contextmanager
    def around(self, trainer: Trainer) -> Iterator[None]:
        with Checkpoints(trainer.run.workdir / "checkpoints", trainer.run.config.checkpoint) as self._checkpoints:
            yield

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._checkpoints.check()
        t, watch = trainer.run.config.training, self._log.watch
        self._due = self._due or trainer.step % t.checkpoint_every == 0
        due = self._due or trainer.stopping
        with self._log.pause(trainer) if due else contextlib.nullcontext():  # reads the metrics of this step
            if watch.most_in_a_row >= t.max_skipped:
                problem = f"the updates of {watch.most_in_a_row} steps in a row were skipped, since their loss or"
                raise self._diverged(trainer, f"{problem} gradient was not finite")
            if trainer.stopping and not watch.usable:
                raise self._diverged(trainer, f"the norm of the parameters is not finite after step {trainer.step}")
            if due and watch.usable and (trainer.stopping or not watch.skipped_in_a_row):
                owner.check(trainer.run.workdir, now=True)
                self._log.flush()
                row = self._log.last_validation
                loss = row["loss"] if row.get("step") == trainer.step else None
                self._checkpoints.save(trainer.step, trainer.state, trainer.next_example, trainer.run.config, loss)
                self._due = False

    def _diverged(self, trainer: Trainer, problem: str) -> DivergedError:
        self._checkpoints.wait()
        workdir = trainer.run.workdir
        step = newest_step(workdir / "checkpoints")
        last = f"its last checkpoint, {workdir / 'checkpoints' / str(step)}, is that of step {step}"
        rate = trainer.run.config.training.optimizer.learning_rate
        return DivergedError(
            f"workdir = {workdir}: has diverged: {problem}; {last if step else 'it has no checkpoint'}; try a "
            f"training.optimizer.learning_rate below {rate:g} and a new --workdir"
        )


class WatchHook(Hook):
    """Shows a progress bar on a terminal."""

    def __init__(self, console: Console):
        self._console = console

    @contextlib.contextmanager
    def around(self, trainer: Trainer) -> Iterator[None]:
        with self._console.progress(trainer.step) as self._advance:
            yield

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._advance()


class Meter:
    """Training speed since the last reading."""

    def __init__(self, config: Config, mesh: Mesh):
        self._steps = config.training.steps
        self._tokens_per_step = config.training.batch_size * config.model.context_length
        self._flops_per_token = flops_per_token(config)
        peak = peak_flops(mesh.devices.flat[0], config.model.dtype)
        self._peak_flops = None if peak is None else peak * mesh.size
        self._paused, self._first_pause = 0.0, math.inf

    def resume(self, trainer: Trainer, seconds: float) -> None:
        """Begin to measure again after a pause of so many seconds."""
        if math.isinf(self._first_pause):  # which includes compilation
            self._first_pause = trainer.step
        else:
            self._paused += seconds
        self.restart(trainer)

    def restart(self, trainer: Trainer) -> None:
        """Begin to measure after the current step."""
        self._restart(trainer, trainer.step)

    def _restart(self, trainer: Trainer, step: int) -> None:
        self._begin, self._first_step, self._data_wait = time.perf_counter(), step, trainer.data_wait

    def read(self, trainer: Trainer, step: int) -> dict[str, float]:
        """The speed up to `step`, and begin to measure again.

        Returns:
            tokens_per_second, model_flops_per_second, mfu (only if the peak FLOP/s of the device are known), data_wait
            (share of the time spent waiting for batches), seconds_left: with pauses as since the first one, without
            the last validation.
        """
        seconds, steps = time.perf_counter() - self._begin, step - self._first_step
        tokens_per_second = steps * self._tokens_per_step / seconds
        flops_per_second = tokens_per_second * self._flops_per_token
        speed = {"tokens_per_second": tokens_per_second, "model_flops_per_second": flops_per_second}
        if self._peak_flops is not None:
            speed["mfu"] = flops_per_second / self._peak_flops
        speed["data_wait"] = (trainer.data_wait - self._data_wait) / seconds
        paused = self._paused / (step - self._first_pause) if step > self._first_pause else 0.0
        speed["seconds_left"] = (self._steps - step) * (seconds / steps + paused)
        self._restart(trainer, step)
        return speed
