"""A training run from its config to its result. Read `train` from top to bottom."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator

import jax
from etils import epath
from jax.sharding import Mesh

from mot_jax.config import Config, TokenChoiceConfig, check, from_json, identity_changes, to_json
from mot_jax.cost import accounting
from mot_jax.data.objectives import Batch, Objective
from mot_jax.data.order import filled_share
from mot_jax.data.pipeline import TrainBatch, train_batches
from mot_jax.data.text import open_text, open_tokenizer
from mot_jax.data.windows import Windows
from mot_jax.errors import UserError
from mot_jax.inference.sample import sample_text
from mot_jax.modes import token_choice
from mot_jax.modes.companions import choose, load_companions, save_companions
from mot_jax.nn.sharding import local_rows, make_mesh, place_microbatches
from mot_jax.runs import metrics as log
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.runs.restore import check_data
from mot_jax.runs.state import TrainState, abstract_state, create_state
from mot_jax.runs.tensor_files import holds_tensors
from mot_jax.runtime import distributed
from mot_jax.runtime.paths import is_remote, make_directory, replace_file, user_path
from mot_jax.training.evaluation import make_evaluation
from mot_jax.training.step import Metrics, make_train_step
from mot_jax.training.transition import check_transition, go_over
from mot_jax.training.upcycling import check_upcycle, upcycle

_SEEN_WITHIN = 30.0  # seconds after which another host sees a file, where the file system is shared
_FILLED = 0.5  # the share of places in validation groups below which people are warned
_SHOWN = 3  # continuations printed at the end; sample.txt has the whole group


def train(config: Config, workdir: epath.PathLike) -> log.Row:
    """Trains as `config` says, or goes on where the run in `workdir` stopped. Returns the last validation row.

    Raises UserError, before the workdir is touched, for whatever in the config or the workdir cannot work. After a
    SIGTERM it saves a checkpoint and raises SystemExit. Of several processes, each calls it with the same arguments.
    """
    # --- all that can fail, before anything is touched ----------------------------------------------------------------
    with distributed.together() as same:
        same |= {"config": to_json(config), "workdir": str(workdir)}
        check(config)
        log.check_logging(config.logging)
        workdir = user_path("workdir", workdir)
        mesh = make_mesh(config)
        _check_workdir(config, workdir)
        t, begins = config.training, not (workdir / "checkpoints").exists()
        if begins and t.upcycle_from is not None:
            check_upcycle(config)
        if begins and t.transition_from is not None:
            check_transition(config)
        _check_space(abstract_state(config, mesh), config, workdir)
        tokenizer = open_tokenizer(config)
        check_data({"tokenizer": tokenizer.fingerprint}, config, workdir)  # before hours of tokenising, perhaps
        _, windows, unseen, order, data = open_text(config, tokenizer)
        check_data(data, config, workdir)
        if begins and t.transition_from is not None:
            check_data(data, config, t.transition_from)
        same |= {f"text of data.corpus, {name}": fingerprint for name, fingerprint in data.items()}

    # --- the run, new or resumed --------------------------------------------------------------------------------------
    first = distributed.is_first()
    console = log.Console(t.steps, quiet=not first)
    with distributed.together():
        if first:
            make_directory("workdir", workdir)
            replace_file(workdir / "config.json", to_json(config).encode())
            replace_file(workdir / "data.json", json.dumps(data, indent=1).encode())
            if config.model.group_size > 1:
                objective = Objective.of(config, tokenizer)
                save_companions(workdir, choose(windows, order, objective, config.model.group_size))
            elif t.transition_from is not None and (companions := load_companions(t.transition_from)) is not None:
                save_companions(workdir, companions)
    with distributed.together():
        _check_shared(config, workdir)
    with Checkpoints(workdir / "checkpoints", config.checkpoint.max_to_keep) as checkpoints, jax.set_mesh(mesh):
        # What process 0 sees: a shared file system may show the others an older state.
        done, drawn = distributed.gather((checkpoints.latest() or 0, (workdir / "loss.png").exists()))[0]
        if done >= t.steps and drawn:  # the picture is the last thing that a run writes
            console.line(f"{workdir} has its {t.steps} steps: nothing left to train")
            return _report(console, workdir)
        with distributed.together():
            if done:
                state, next_example, changed = checkpoints.restore(done, config, mesh)
                for line in changed:
                    console.line(f"warning: another version, so last bits may differ: {line}")
            elif t.transition_from is None:
                state, next_example = create_state(config, mesh), 0
        if not done and t.transition_from is not None:
            state, next_example, notes = go_over(config, mesh)
            for line in notes:
                console.line(line)
        if not done and t.upcycle_from is not None:
            params, notes = upcycle(config.model, state.params, t.upcycle_from)
            state = state._replace(params=params)
            for line in notes:
                console.line(line)
        console.line(f"{workdir}: {f'going on from step {done}' if done else 'a new run'}, {t.steps} steps")
        console.line(_summary(config, mesh, windows))
        if (share := filled_share(unseen.documents, config.group_size)) < _FILLED:
            console.line(
                f"warning: validation groups are filled to {share:.0%}: rows of a group come from different documents; "
                f"data.validation_split = {config.data.validation_split!r} has too few long ones to score it as trained"
                "; try one of more text, as data.train_split = 'train[:90%]', data.validation_split = 'train[90%:]'"
            )

        if first:
            (workdir / "loss.png").unlink(missing_ok=True)

        # --- compile ----------------------------------------------------------------------------------------------
        rows = local_rows(mesh, t.batch_size, t.gradient_accumulation_steps)

        def place(batch: Batch) -> Batch:
            return place_microbatches(mesh, batch, t.batch_size, t.gradient_accumulation_steps)

        objective = Objective.of(config, tokenizer)
        batches = train_batches(windows, order, objective, t.batch_size, rows, next_example)
        example = place(objective(windows.read([-1] * len(rows)), rows))
        start = time.perf_counter()
        train_step = jax.jit(make_train_step(config), donate_argnums=0).lower(state, example).compile()
        evaluate = make_evaluation(_without_drops(config), mesh, unseen, tokenizer)
        console.line(f"compiled the training step in {time.perf_counter() - start:.1f} s")

        # --- the loop -------------------------------------------------------------------------------------------------
        with distributed.together():
            metrics_log = log.MetricsLog(workdir, done or -1, config.logging) if first else None
        meter = _Meter(config, mesh)
        meter.restart(done)
        pending: tuple[int, Metrics, TrainBatch] | None = None

        def record(row: log.Row, line: str) -> None:
            if metrics_log is not None:
                metrics_log.write(row)
            console.line(line)

        def log_pending() -> None:
            """Writes the row that waits. Its numbers are fetched while the device computes the next step."""
            nonlocal pending
            if pending is not None:
                step, values, batch = pending
                row = {"step": step, "split": "train"}
                row |= {name: float(value) for name, value in jax.device_get(values).items()}
                row |= {**meter.read(step), "shared_document_share": batch.shared_document_share}
                record(row, log.train_line(row, t.steps))
                pending = None

        def validate(step: int, limit: int | None) -> None:
            row = {"step": step, "split": "validation", **evaluate(state.params, state.step, limit)}
            record(row, log.validation_line(row))

        try:
            if not done and t.transition_from is not None:
                validate(0, config.data.validation_windows)  # the spike
            with distributed.preemption() as preempted:
                for step in console.track(range(done + 1, t.steps + 1), done):
                    with meter.waiting():
                        batch = next(batches)
                    state, values = train_step(state, place(batch.sequences))
                    log_pending()
                    last = step == t.steps
                    if step % t.log_every == 0 or last:
                        pending = (step, values, batch)
                    early = t.transition_from is not None and step.bit_count() == 1  # 1, 2, 4, 8 ...: a spike is short
                    validates = step % t.validate_every == 0 or last or early
                    stops = preempted(step) and not last
                    saves = step % t.checkpoint_every == 0 or last or stops
                    if validates or saves:
                        log_pending()  # a checkpoint never outlives the rows before it
                    if validates:
                        validate(step, None if last else config.data.validation_windows)
                    if saves:
                        if metrics_log is not None:
                            metrics_log.flush()
                        checkpoints.save(step, state, next_example + (step - done) * t.batch_size, config)
                    if validates or saves:
                        meter.restart(step)
                    if stops:
                        checkpoints.wait()
                        console.line(f"SIGTERM: stopped after step {step}, with a checkpoint; the same command goes on")
                        distributed.stop(config.checkpoint.preempted_exit_code)
        except Exception as error:
            distributed.end_if_peer_lost(error, f"at step {step}")
            raise
        finally:
            batches.close()
            if metrics_log is not None:
                metrics_log.close()
        checkpoints.wait()

        # --- what came of it ------------------------------------------------------------------------------------------
        sample = (
            sample_text(_without_drops(config), mesh, state.params, unseen, tokenizer)
            if config.logging.sample_tokens
            else None
        )
        with distributed.together():
            if first:
                if sample is not None:
                    replace_file(workdir / "sample.txt", sample.encode())
                replace_file(workdir / "loss.png", log.plot_curves({workdir.name: log.read_rows(workdir)}))
        return _report(console, workdir)


def _without_drops(config: Config) -> Config:
    """As the model is scored: where tokens choose experts, all are heard."""
    return token_choice(config) if isinstance(config.model.feed_forward, TokenChoiceConfig) else config


def _check_workdir(config: Config, workdir: epath.Path) -> None:
    """Raises UserError unless `workdir` is new, empty, or holds a run that `config` may continue."""
    path = workdir / "config.json"
    if holds_tensors(workdir):
        raise UserError(f"workdir = {workdir}: holds an export, which cannot be trained on; try a new --workdir")
    if path.exists():
        changes = identity_changes(from_json(path.read_text()), config)
        if changes:
            raise UserError(*(f"workdir = {workdir} holds another run: {c}; try a new --workdir" for c in changes))
    elif workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir = {workdir}: must be a directory, and is a file; try {workdir}-run")
    elif workdir.exists() and any(child.name != "config.json.new" for child in workdir.iterdir()):
        raise UserError(f"workdir = {workdir}: holds files, but no run (no config.json); try {workdir / 'run'}")


def _check_shared(config: Config, workdir: epath.Path) -> None:
    """Raises UserError where this process does not see what process 0 has just written."""
    path, deadline = workdir / "config.json", time.monotonic() + _SEEN_WITHIN
    while not (path.exists() and path.read_text() == to_json(config)):
        if time.monotonic() > deadline:
            raise UserError(
                f"workdir = {workdir}: must be one directory for all processes, and what process 0 wrote is not "
                "there; try one on a file system that they share"
            )
        time.sleep(0.1)


def _check_space(state: TrainState, config: Config, workdir: epath.Path) -> None:
    """Raises UserError if the disk cannot hold the checkpoints to come: those kept, and the one being written."""
    if is_remote(workdir):
        return
    folder, keep = workdir / "checkpoints", config.checkpoint.max_to_keep
    there = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    if max(there, default=0) >= config.training.steps:
        return
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    needed = max(keep + 1 - len(there), 1) * size
    existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"workdir = {workdir}: its checkpoints need {needed / 1e6:,.0f} MB more, and {free / 1e6:,.0f} MB are "
            f"free; try a --workdir on a larger disk"
        )


class _Meter:
    """Speed since the last reading."""

    def __init__(self, config: Config, mesh: Mesh):
        self._steps = config.training.steps
        self._tokens = config.training.batch_size * config.model.context_length
        self._flops = accounting.flops_per_token(config)
        peak = accounting.peak_flops(mesh.devices.flat[0], config.model.dtype)
        self._peak = None if peak is None else peak * mesh.size

    def restart(self, step: int) -> None:
        """Begins to measure after `step`."""
        self._since, self._step, self._waited = time.perf_counter(), step, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the time in which the loop waits for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def read(self, step: int) -> dict[str, float]:
        """tokens/s, model FLOP/s (`mfu` where the peak is known), share of time waiting for data, seconds left."""
        seconds, steps = time.perf_counter() - self._since, step - self._step
        speed = steps * self._tokens / seconds
        found = {"tokens_per_second": speed, "model_flops_per_second": speed * self._flops}
        if self._peak is not None:
            found["mfu"] = speed * self._flops / self._peak
        found["data_wait"] = self._waited / seconds
        found["seconds_left"] = (self._steps - step) * seconds / steps
        self.restart(step)
        return found


def _summary(config: Config, mesh: Mesh, windows: Windows) -> str:
    t, total = config.training, sum(accounting.count_parameters(config.model).values())
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    epochs = t.steps * t.batch_size / len(windows)
    return (
        f"{total / 1e6:,.1f} M parameters | mesh {axes} of {mesh.devices.flat[0].device_kind} | "
        f"{t.batch_size * config.model.context_length:,} tokens a step | {len(windows):,} windows, {epochs:.1f} epochs"
    )


def _report(console: log.Console, workdir: epath.Path) -> log.Row:
    """Prints the result of a finished run; returns its last validation row."""
    result = [row for row in log.read_rows(workdir) if row["split"] == "validation"][-1]
    console.line(log.validation_line(result))
    sampled = workdir / "sample.txt"
    if sampled.exists():
        console.line("\n--- prompt\n".join(sampled.read_text().split("\n--- prompt\n")[:_SHOWN]))
    console.line(f"in {workdir}: {', '.join(sorted(child.name for child in workdir.iterdir()))}")
    return result
