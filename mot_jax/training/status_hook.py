"""The hook that reports on a run in progress: `status.json`, and the process for which the others wait.

All of it happens in a thread, so that the reports continue while a step waits for data, the devices or a process.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mot_jax.errors import DivergedError, error_words
from mot_jax.runs import status
from mot_jax.runs.manifest import steps_of
from mot_jax.runs.metrics import Console, Row
from mot_jax.runtime import distributed, exit_codes
from mot_jax.runtime.rendezvous import listed
from mot_jax.training.trainer import Hook, StepMetrics, Trainer

WRITE_SECONDS = 60.0  # between two writes of the status
PUBLISH_SECONDS = 5.0  # between two looks at the training loop, whose step is then published for process 0
STALL_SECONDS = 60.0  # without a step, and at least `_STALL_STEPS` times the mean step: then processes are compared
_STALL_STEPS = 10
_END_SECONDS = 30.0  # for which the end of training waits for a disk or store that does not respond

_CAUSES = ("data", "device", "peers")
_REPORTED = ("loss", "learning_rate", "tokens_per_second", "seconds_left")


class StatusHook(Hook):
    """Writes `status.json` at the start, once a minute and at the end, and prints which process is behind.

    Must be the first hook: its context then encloses those of the others, whose errors decide the last state.

    Args:
        latest: function that returns the latest metrics that have been fetched; no others are.
    """

    def __init__(self, console: Console, latest: Callable[[], Row]):
        self._console, self._latest = console, latest

    @contextlib.contextmanager
    def around(self, trainer: Trainer) -> Iterator[None]:
        reporter = _Reporter(trainer, self._console, self._latest)
        self._step_made = reporter.step_made
        try:
            yield
        except BaseException as error:
            reporter.end(_end_of(error, trainer.run.config.checkpoint.preempted_exit_code))
            raise
        else:
            reporter.end({"state": "finishing" if trainer.at_last_step else "stopped"})
        finally:
            del self._step_made  # with its reference to the trainer, and to the state on the devices

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._step_made()


def _end_of(error: BaseException, preempted_exit_code: int) -> dict[str, str]:
    """The last state of a run that ends with an error."""
    if isinstance(error, SystemExit):
        states: dict[object, str] = {preempted_exit_code: "preempted", exit_codes.INTERRUPTED: "interrupted"}
        return {"state": states.get(error.code, "stopped")}
    if isinstance(error, Exception):
        state = "diverged" if isinstance(error, DivergedError) else "failed"
        return {"state": state, "error": error_words(error)}
    return {"state": "interrupted"}


class _Reporter:
    """The thread of a `StatusHook`."""

    def __init__(self, trainer: Trainer, console: Console, latest: Callable[[], Row]):
        self._trainer, self._console, self._latest = trainer, console, latest
        self._board = distributed.Board()
        self._published: dict[str, Any] = {}
        self._first_step, self._begin = trainer.step, time.monotonic()
        self._last_step_at = self._looked_at = self._wrote_at = self._begin
        self._behind: _Behind | None = None
        self._named_at_step = -1  # during the stall of this step a process has been named
        self._waited = self._waits()
        self._shares = dict.fromkeys(_CAUSES, 0.0)  # seconds since the last write
        self._may_warn = True
        self._end: dict[str, str] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)
        self._thread.start()

    def step_made(self) -> None:
        """Note the time of a step."""
        self._last_step_at = time.monotonic()

    def end(self, state: dict[str, str]) -> None:
        """Write a last status with this state."""
        self._end = state
        self._ended.set()
        self._thread.join(_END_SECONDS)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._ended.is_set():
            with contextlib.suppress(Exception):  # process 0 is lost, and this process ends, too
                self._publish()
                if self._find_process_behind():
                    due = time.monotonic()
            self._measure()
            if time.monotonic() >= due:
                self._write({})
                due = time.monotonic() + WRITE_SECONDS
            self._ended.wait(PUBLISH_SECONDS)
        self._behind = None
        self._measure()
        self._write({"waiting_for": None, **self._end})

    # --- several processes

    def _publish(self) -> None:
        state, cause = self._activity()
        current = {"step": self._trainer.begun, "state": state, "waiting_for": cause}
        if current != self._published:
            self._board.publish(current)
            self._published = current

    def _find_process_behind(self) -> bool:
        """Compare the processes' steps if this one, process 0, has made none for long.

        Returns whether a process that is behind has been printed: once per stall.
        """
        seconds, step = time.monotonic() - self._last_step_at, self._trainer.begun
        steps = self._trainer.step - self._first_step
        usual = (self._last_step_at - self._begin) / max(steps, 1)
        self._behind = None
        if not distributed.is_first() or seconds < max(STALL_SECONDS, _STALL_STEPS * usual):
            return False
        unpublished = {"step": self._first_step, "state": "starting", "waiting_for": None}
        self._behind = _processes_behind([value or unpublished for value in self._board.read()], seconds)
        if self._behind is None or self._named_at_step == step:
            return False
        self._named_at_step = step
        self._console.line(self._behind.line)
        return True

    def _waits_for_peers(self) -> bool:
        return self._behind is not None and 0 not in self._behind.processes

    # --- the status

    def _activity(self) -> tuple[str, str | None]:
        """The state of the training loop, and the cause of its wait, if it waits."""
        trainer, hook = self._trainer, self._trainer.hook
        cause = trainer.waits.current or (f"hook {type(hook).__name__}" if hook else None)
        if self._waits_for_peers():
            cause = "peers"
        if hook is not None:
            return hook.state, cause
        return "finishing" if trainer.stopping else "training", cause

    def _waits(self) -> dict[str, float]:
        return {cause: self._trainer.waits.seconds(cause) for cause in ("data", "device")}

    def _measure(self) -> None:
        """Add the waits since the last look. A wait for the device is one for peers while a process is behind."""
        waits, now = self._waits(), time.monotonic()
        seconds = {cause: max(waits[cause] - self._waited[cause], 0.0) for cause in waits}
        if self._waits_for_peers():
            seconds |= {"device": 0.0, "peers": max(now - self._looked_at - seconds["data"], 0.0)}
        for cause, value in seconds.items():
            self._shares[cause] += value
        self._waited, self._looked_at = waits, now

    def _write(self, end: dict[str, Any]) -> None:
        """Write the status. A disk or store that fails is no reason for training to stop."""
        if not distributed.is_first():
            return
        try:
            status.write(self._trainer.run.workdir, self._content() | end)
        except Exception as error:
            if self._may_warn:
                self._console.line(
                    f"warning: {status.FILE} cannot be written ({error_words(error)}); training continues"
                )
                self._may_warn = False

    def _content(self) -> dict[str, Any]:
        latest, (state, cause), now = self._latest(), self._activity(), time.monotonic()
        elapsed = max(now - self._wrote_at, 1e-3)
        waits = {cause: min(seconds / elapsed, 1.0) for cause, seconds in self._shares.items()}
        self._shares, self._wrote_at = dict.fromkeys(_CAUSES, 0.0), now
        return {
            "state": state,
            "step": latest.get("step", self._first_step),
            "steps": self._trainer.run.config.training.steps,
            **{name: latest.get(name) for name in _REPORTED},
            "seconds_since_step": now - self._last_step_at,
            "waiting_for": cause,
            "waits": waits,
            "behind": self._behind.line if self._behind else None,
            "checkpoint": max(steps_of(self._trainer.run.workdir / "checkpoints"), default=None),
        }


class _Behind(NamedTuple):
    """The processes for which the others wait, and a line that names them."""

    processes: list[int]
    line: str


def _processes_behind(activities: list[dict[str, Any]], seconds: float) -> _Behind | None:
    """Find the processes that have begun fewer steps than the others; None if there is none.

    Args:
        activities: last step begun, state and cause of the wait of each process.
        seconds: since the last step.
    """
    steps = [activity["step"] for activity in activities]
    step = min(steps)
    if step == max(steps):
        return None
    processes = [index for index, begun in enumerate(steps) if begun == step]
    first = activities[processes[0]]
    words = f"waiting for {first['waiting_for']}" if first["waiting_for"] else first["state"]
    verb = "is" if len(processes) == 1 else "are"
    line = f"step {step + 1} has waited {seconds:.0f} s for {listed(processes)}, which {verb} at step {step} ({words})"
    return _Behind(processes, line)
