"""The training loop, which can be driven from outside: one method makes one step, and hooks do all else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, ClassVar, Literal

import jax

from mot_jax.data.objectives import Batch, Objective
from mot_jax.data.pipeline import train_batches
from mot_jax.nn.sharding import local_sequences, place_microbatches
from mot_jax.runs import owner
from mot_jax.runtime import distributed
from mot_jax.training.evaluation import Result, evaluated_config, make_evaluation
from mot_jax.training.run import Run, Start
from mot_jax.training.step import make_train_step

StepMetrics = dict[str, Any]


class Waits:
    """Times for which the training loop has waited, by cause; other threads may read them.

    current: cause of the wait in progress, if any.
    """

    def __init__(self) -> None:
        self._seconds, self._since = {"data": 0.0, "device": 0.0}, 0.0
        self.current: str | None = None

    @contextlib.contextmanager
    def on(self, cause: Literal["data", "device"]) -> Iterator[None]:
        """Around a wait."""
        self._since, self.current = time.perf_counter(), cause
        try:
            yield
        finally:
            self.current = None
            self._seconds[cause] += time.perf_counter() - self._since

    def seconds(self, cause: str) -> float:
        """The sum of all waits, with that in progress."""
        return self._seconds[cause] + (time.perf_counter() - self._since if self.current == cause else 0.0)


class Hook:
    """Something that happens during training: a subclass overrides the methods that it needs.

    Hooks are called in the order in which they are given; their contexts are left in the opposite order.

    Attributes:
        state: the state of the run while a method of the hook is executed, for `status.json`.
    """

    state: ClassVar[str] = "training"

    def around(self, trainer: Trainer) -> contextlib.AbstractContextManager[Any]:
        """A context that is entered before the first step and left after the last one, or after an error."""
        return contextlib.nullcontext()

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Called after each step is dispatched: fetching its metrics waits until the device has computed it."""

    def at_end(self, trainer: Trainer) -> None:
        """Called once after the last step, when all contexts have been left; not if training stops before."""


class Trainer:
    """State, compiled training step and batches of a run; a context manager, within which the run's mesh is set.

    Attributes:
        run: the experiment.
        state: parameters and optimizer state after `step` updates. The step donates its buffers: keep no reference.
        step: updates made so far, in this process and before.
        next_example: index of the next training example in the global order.
        begun: number of the last step whose batch has been read, which may still be dispatched.
        waits: time spent waiting for batches and the device so far.
        hook: the hook that is being called, if any.
        compile_seconds: time that compiling the step took.
    """

    def __init__(self, run: Run, start: Start):
        t = run.config.training
        self.run, self.state, self.step, self.next_example = run, start.state, start.step, start.next_example
        self.begun, self.waits, self._stop_requested = start.step, Waits(), False
        self.hook: Hook | None = None
        rows = local_sequences(run.mesh, t.batch_size, t.gradient_accumulation_steps)
        objective = Objective.of(run.config, run.tokenizer)
        begin = time.perf_counter()
        with jax.set_mesh(run.mesh):
            empty = self._place(objective(run.windows.read([-1] * len(rows)), rows))
            train_step = make_train_step(
                run.config.model, t.optimizer, t.steps, t.losses, t.gradient_accumulation_steps
            )
            self._train_step = jax.jit(train_step, donate_argnums=0).lower(self.state, empty).compile()
        self.compile_seconds = time.perf_counter() - begin
        evaluated = evaluated_config(run.config)
        self._evaluate = make_evaluation(evaluated, run.mesh, run.validation_windows, run.tokenizer)
        # Last, so that an error above leaves no reader open.
        self._batches = train_batches(run.windows, run.order, objective, t.batch_size, rows, start.next_example)

    @property
    def data_wait(self) -> float:
        """Seconds that steps have waited for batches so far."""
        return self.waits.seconds("data")

    @property
    def at_last_step(self) -> bool:
        """Whether all steps of the run are made."""
        return self.step >= self.run.config.training.steps

    @property
    def stopping(self) -> bool:
        """Whether `train` ends after this step: it is the last one, or a hook has called `stop`."""
        return self.at_last_step or self._stop_requested

    def stop(self) -> None:
        """End `train` after the hooks of this step, with a checkpoint if there is a `CheckpointHook`.

        With several processes, all of them must call it in the same step.
        """
        self._stop_requested = True

    def train_step(self) -> StepMetrics:
        """Make one step with the next batch.

        Returns its metrics, scalars: those of `make_train_step`, on the devices, which may still be computing them;
        and shared_document_share, the share of the batch's groups with two sequences of one document.

        Raises UserError if another run has taken over the workdir.
        """
        owner.check(self.run.workdir)
        with self.waits.on("data"):
            batch = next(self._batches)
        self.begun = self.step + 1
        with self.waits.on("device"):  # where programs are not executed asynchronously
            self.state, metrics = self._train_step(self.state, self._place(batch.sequences))
        self.step = self.begun
        self.next_example += self.run.config.training.batch_size
        return {**metrics, "shared_document_share": batch.shared_document_share}

    def evaluate(self, limit: int | None = None) -> Result:
        """Score the current parameters on about `limit` windows of the validation split, or on all of them."""
        return self._evaluate(self.state.variables, self.state.step, limit)

    def train(self, hooks: Sequence[Hook] = ()) -> None:
        """Make the remaining steps of the run, each followed by all hooks, unless a hook stops it before."""
        self._stop_requested = False
        with contextlib.ExitStack() as stack:
            for hook in hooks:
                self.hook = hook
                stack.enter_context(hook.around(self))
            self.hook = None
            try:
                while not self.stopping:
                    metrics = self.train_step()
                    for hook in hooks:
                        self.hook = hook
                        hook.after_step(self, metrics)
                    self.hook = None
            except Exception as error:
                # Before any context is left: closing could wait for the lost process.
                distributed.end_if_peer_lost(error, f"at step {self.step}")
                raise
            finally:
                self.hook = None
        if self.at_last_step:
            for hook in hooks:
                hook.at_end(self)

    def _place(self, batch: Batch) -> Batch:
        """Global arrays [A, B / A, S], A microbatches, from the sequences of this process."""
        t = self.run.config.training
        return place_microbatches(self.run.mesh, batch, t.batch_size, t.gradient_accumulation_steps)

    def __enter__(self) -> Trainer:
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._batches.close)  # stops the thread that reads ahead
        self._stack.enter_context(jax.set_mesh(self.run.mesh))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
