"""A run of training before and after its steps: `prepare` checks it, `begin` creates or restores its state, `finish`
writes its result.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from mot_jax.config import Config, TrainingConfig, check, identity_changes, to_json
from mot_jax.cost.parameters import count_parameters
from mot_jax.data.objectives import Objective
from mot_jax.data.order import Order
from mot_jax.data.pipeline import token_counts
from mot_jax.data.text import open_text, open_tokenizer, store_text_once, with_absolute_paths
from mot_jax.data.tokenizers import Tokenizer, tokenizer_copy
from mot_jax.data.windows import Windows
from mot_jax.errors import UserError
from mot_jax.modes import companions, offers
from mot_jax.modes.thresholds import first_batches, load_thresholds, measure, measured_tokens, save_thresholds
from mot_jax.nn.sharding import make_mesh
from mot_jax.nn.transformer import Params, initial_router
from mot_jax.runs import owner, status
from mot_jax.runs.checkpoint import Checkpoints, Restored
from mot_jax.runs.manifest import left_out_lines, steps_of
from mot_jax.runs.metrics import Row, check_logging, plot_curves, read_rows
from mot_jax.runs.optimizer import learning_rate
from mot_jax.runs.restore import check_data, newest_step, read_config, with_tokenizer_copy
from mot_jax.runs.state import TrainState, abstract_state, create_state, spread
from mot_jax.runs.status import RESULT
from mot_jax.runs.tensor_files import holds_tensors
from mot_jax.runtime import distributed, strict_json
from mot_jax.runtime.paths import await_visible, is_remote, make_directory, replace_file, user_path
from mot_jax.training.transition import check_transition, transition_state
from mot_jax.training.upcycling import check_upcycle, upcycle

_BEFORE_CONFIG = ("config.json.new", owner.FILE)  # how files of a run begin that was killed at its start


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked experiment and its directory; `prepare` makes it.

    windows, validation_windows: the tokenized text of the two splits. order: the global order of training examples.
    fingerprints: of `train`, `validation`, `tokenizer` and `order`; a resumed run must have the same ones.
    """

    config: Config
    workdir: epath.Path
    mesh: Mesh
    tokenizer: Tokenizer
    windows: Windows
    validation_windows: Windows
    order: Order
    fingerprints: dict[str, str]


class Start(NamedTuple):
    """The state in which a run starts or resumes.

    step: updates made so far. next_example: index of the next training example in the global order, a multiple of the
    batch size. notes: lines for the user about the origin of the state.
    """

    state: TrainState
    step: int
    next_example: int
    notes: list[str]


# --- before the steps -------------------------------------------------------------------------------------------------


def prepare(config: Config, workdir: epath.PathLike) -> Run:
    """Check everything that can be checked before training, and open the text, which is tokenized now if needed.

    Nothing in the workdir is touched. With several processes, each calls this with the same arguments.

    Raises:
        UserError: for every error in the config, the workdir or the data.
        RetryableError: if only a store or a disk failed, perhaps temporarily.
    """
    with distributed.together() as same:
        check(config)
        config = with_absolute_paths(config)
        same |= {"config": to_json(config), "workdir": str(workdir)}
        check_logging(config.logging)
        workdir = user_path("workdir", workdir)
        _check_name(workdir)
        mesh = make_mesh(config)
        _check_workdir(config, workdir)
        origin = _RESUMED if (workdir / "checkpoints").exists() else _origin_of(config)
        origin.check(config)
        _check_disk_space(abstract_state(config, mesh), config, workdir)
        named = config.data.tokenizer == "bytes" or user_path("data.tokenizer", config.data.tokenizer).exists()
        tokenizer = open_tokenizer(config if named else with_tokenizer_copy(config, workdir))
        # First only the tokenizer: tokenizing the text can take hours.
        check_data({"tokenizer": tokenizer.fingerprint}, config, workdir)
    store_text_once(config, tokenizer, config.data.train_split, config.data.validation_split)
    with distributed.together() as same:
        _, windows, validation_windows, order, fingerprints = open_text(config, tokenizer)
        check_data(fingerprints, config, workdir)
        origin.check_text(config, fingerprints)
        same |= {f"text of data.corpus, {name}": fingerprint for name, fingerprint in fingerprints.items()}
    return Run(config, workdir, mesh, tokenizer, windows, validation_windows, order, fingerprints)


def is_finished(run: Run) -> bool:
    """Whether a run in this workdir has made all its steps and written its result, as process 0 sees it."""
    steps_done = newest_step(run.workdir / "checkpoints") or 0
    finished = steps_done >= run.config.training.steps and (run.workdir / RESULT).exists()
    return distributed.gather(finished)[0]


def begin(run: Run, take_over: bool = False) -> Start:
    """Create the workdir, and the state of a new run or that of the newest checkpoint.

    With several processes, each calls this. Process 0 becomes the owner of the workdir (`runs/owner.py`), until
    `finish`, or until it ends.

    Args:
        take_over: become the owner at once, even if another run is in progress in this workdir.

    Raises:
        UserError: if the workdir cannot be written, is not shared by all processes, or has a damaged checkpoint, or if
            a value of the state is NaN or infinite.
        RetryableError: if a checkpoint cannot be read now, or another run is in progress in the workdir.
    """
    with distributed.together():
        if distributed.is_first():
            owner.acquire(run.workdir, jax.process_count(), take_over)
            # Another run may have begun or continued there since `prepare`.
            _check_workdir(run.config, run.workdir)
            check_data(run.fingerprints, run.config, run.workdir)
            for path in run.workdir.glob("error*.txt"):  # of an earlier start
                path.unlink(missing_ok=True)
    write_workdir(run)
    folder = run.workdir / "checkpoints"
    with Checkpoints(folder, run.config.checkpoint) as checkpoints:
        newest, left_out = checkpoints.newest_intact()
        problems, step = left_out_lines(folder, left_out), newest or 0
        with distributed.together():
            if distributed.is_first():
                checkpoints.tidy(step, left_out, _is_in_first_save(run, left_out))
        status.note(run.workdir, {"state": "starting"})
        origin = _RESUMED if step else _origin_of(run.config)
        with jax.set_mesh(run.mesh):
            start = origin.begin(run, checkpoints, step)
            _check_finite(run, start)
        start = start._replace(notes=[f"warning: {line}" for line in problems] + start.notes)
    with distributed.together():
        if distributed.is_first() and start.step < run.config.training.steps:
            (run.workdir / RESULT).unlink(missing_ok=True)  # that of a shorter run, which is now extended
    status.note(run.workdir, {"state": "compiling", "step": start.step, "steps": run.config.training.steps})
    return start


def _is_in_first_save(run: Run, left_out: Iterable[int]) -> bool:
    """Whether checkpoints without a manifest can be of the first save of the run only, so that no other is lost.

    A save begins after the manifest of the one before is written, and training waits for it.
    """
    every = run.config.training.checkpoint_every
    saved, logged = max(left_out, default=0), max((row["step"] for row in read_rows(run.workdir)), default=0)
    return saved <= every and logged <= saved + every and not (run.workdir / RESULT).exists()


def write_workdir(run: Run) -> None:
    """Write config, fingerprints of the data, and companions (the reference sequences of inference modes).

    Raises UserError if the workdir cannot be written, or is not the same directory for all processes.
    """
    config, workdir = run.config, run.workdir
    with distributed.together():
        if distributed.is_first():
            make_directory("workdir", workdir)
            replace_file(workdir / "config.json", to_json(config).encode())
            copy = tokenizer_copy(workdir, config.data.tokenizer)
            if copy is not None and run.tokenizer.content is not None:
                replace_file(copy, run.tokenizer.content)
            source, chosen = config.training.transition_from, None
            if config.model.has_companions:
                objective = Objective.of(config, run.tokenizer)
                chosen = companions.choose(run.windows, run.order, objective, config.model.group_size)
            elif source is not None and not (workdir / companions.FILE).exists():
                chosen = companions.load_companions(source)
            companions.save_companions(workdir, chosen, run.fingerprints)
    with distributed.together():
        _check_shared(config, workdir)


def is_outdated(run: Run) -> bool:
    """Whether a file of `write_workdir` is missing, or the config has another one, as process 0 sees it.

    False for a workdir that cannot be written, such as the finished run of another user.
    """
    path = run.workdir / "config.json"
    files = [path, run.workdir / "data.json"]
    if run.config.model.has_companions:
        files.append(run.workdir / companions.FILE)
    if (copy := tokenizer_copy(run.workdir, run.config.data.tokenizer)) is not None:
        files.append(copy)
    current = all(file.exists() for file in files) and path.read_text() == to_json(run.config)
    writable = is_remote(run.workdir) or os.access(run.workdir, os.W_OK)
    return distributed.gather(writable and not current)[0]


# --- after the steps --------------------------------------------------------------------------------------------------


def needs_thresholds(run: Run, step: int) -> bool:
    """Whether `thresholds.json` is to be written: the model has the mode, and no intact file of this step exists.

    False for a workdir that cannot be written. As process 0 sees it.
    """
    if not offers("threshold", run.config) or not measured_tokens(run.config):
        return False
    try:
        thresholds = load_thresholds(run.workdir)
    except UserError:  # a damaged file, or that of another run, is replaced
        thresholds = None
    current = thresholds is not None and thresholds.step == step
    writable = is_remote(run.workdir) or os.access(run.workdir, os.W_OK)
    return distributed.gather(writable and not current)[0]


def record_thresholds(run: Run, params: Params, step: int) -> None:
    """Measure the thresholds of the inference mode `threshold` on training text, and write `thresholds.json`.

    The run's mesh is set. With several processes, each calls this, and process 0 writes.
    """
    objective = Objective.of(run.config, run.tokenizer)
    batches = first_batches(run.config, run.mesh, run.windows, run.order, objective)
    thresholds = measure(run.config.model, params, step, batches)
    with distributed.together():
        if distributed.is_first():
            save_thresholds(run.workdir, thresholds)


def finish(run: Run) -> Row:
    """Write `loss.png`, and `result.json`, which marks the run as finished. Returns the last validation row.

    The row is empty if none was logged. With several processes, each calls this, and process 0 writes.
    """
    with distributed.together():
        if distributed.is_first():
            owner.check(run.workdir, now=True)
            rows = read_rows(run.workdir)
            result = {
                "steps": run.config.training.steps,
                "parameters": sum(count_parameters(run.config.model).values()),
                "validation": last_validation(run) or None,
            }
            replace_file(run.workdir / "loss.png", plot_curves({run.workdir.name: rows}))
            status.note(run.workdir, {"state": "finished"}, update=True)
            content = strict_json.dumps(result, indent=1)
            replace_file(run.workdir / RESULT, (content + "\n").encode())
            owner.release(run.workdir)
    return last_validation(run)


def last_validation(run: Run) -> Row:
    """The last validation row of the log so far; empty if there is none."""
    rows = [row for row in read_rows(run.workdir) if row["split"] == "validation"]
    return rows[-1] if rows else {}


# --- the ways in which a run begins -----------------------------------------------------------------------------------


class _Origin(NamedTuple):
    """Where the state of a run comes from.

    applies: whether a new run of this config begins so. check: raises UserError if it cannot; before the text is
    opened. check_text: the same, given the fingerprints of the text. begin: the state, with the run's mesh set.
    """

    applies: Callable[[Config], bool]
    check: Callable[[Config], None]
    check_text: Callable[[Config, dict[str, str]], None]
    begin: Callable[[Run, Checkpoints, int], Start]


def _restore(run: Run, checkpoints: Checkpoints, step: int) -> Start:
    with distributed.together():
        restored = checkpoints.restore(step, run.config, run.mesh)
    notes = [f"warning: another version, so last bits may differ: {change}" for change in restored.changes]
    notes += _extension(run.config.training, restored)
    return Start(restored.state, step, restored.next_example, notes)


def _extension(training: TrainingConfig, restored: Restored) -> list[str]:
    """A line about the learning rate if the run has more steps than when the checkpoint was saved, since it changes."""
    before, now = restored.config["training"]["steps"], training.steps
    if before == now:
        return []
    updates = int(restored.state.step) - int(restored.state.skipped)
    last, planned, new = (
        float(learning_rate(training.optimizer, steps)(update))
        for steps, update in ((before, updates - 1), (before, updates), (now, updates))
    )
    return [
        f"training.steps = {now}, was {before}: the cosine of the learning rate now ends at step {now}, so the next "
        f"rate is {new:.3g} instead of {planned:.3g}; the last one was {last:.3g}"
    ]


def _initialize(run: Run, checkpoints: Checkpoints, step: int) -> Start:
    config = run.config
    with distributed.together():
        state = create_state(config, run.mesh)
        objective = Objective.of(config, run.tokenizer)
        count = partial(token_counts, run.windows, run.order, objective, config.model.vocab_size)
        values = initial_router(config.model, count)
        router = state.router | {name: spread(value, state.router[name].sharding) for name, value in values.items()}
        return Start(state._replace(router=router), 0, 0, [])


def _upcycle(run: Run, checkpoints: Checkpoints, step: int) -> Start:
    start, source = _initialize(run, checkpoints, step), run.config.training.upcycle_from
    assert source is not None
    params, notes = upcycle(run.config.model, start.state.params, source)
    return start._replace(state=start.state._replace(params=params), notes=notes)


def _transition(run: Run, checkpoints: Checkpoints, step: int) -> Start:
    state, next_example, notes = transition_state(run.config, run.mesh)
    return Start(state, 0, next_example, notes)


def _check_transition_text(config: Config, fingerprints: dict[str, str]) -> None:
    assert config.training.transition_from is not None
    check_data(fingerprints, config, config.training.transition_from)


def _nothing_to_check(*_: object) -> None:
    pass


_RESUMED = _Origin(lambda config: False, _nothing_to_check, _nothing_to_check, _restore)
# Of a new run, the first that applies.
_ORIGINS = (
    _Origin(
        lambda config: config.training.transition_from is not None,
        check_transition,
        _check_transition_text,
        _transition,
    ),
    _Origin(
        lambda config: config.training.upcycle_from is not None,
        check_upcycle,
        _nothing_to_check,
        _upcycle,
    ),
    _Origin(lambda config: True, _nothing_to_check, _nothing_to_check, _initialize),
)


def _origin_of(config: Config) -> _Origin:
    return next(origin for origin in _ORIGINS if origin.applies(config))


# --- checks of the workdir --------------------------------------------------------------------------------------------


def _check_workdir(config: Config, workdir: epath.Path) -> None:
    """Raise UserError unless `workdir` is new, empty, or has a run that `config` may resume."""
    path = workdir / "config.json"
    if holds_tensors(workdir):
        raise UserError(f"workdir = {workdir}: has an export, which cannot be trained; try a new --workdir")
    if path.exists():
        changes = identity_changes(read_config(path), config)
        if changes:
            raise UserError(*(f"workdir = {workdir} has another run: {c}; try a new --workdir" for c in changes))
    elif workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir = {workdir}: must be a directory, and is a file; try {workdir}-run")
    elif workdir.exists() and not all(child.name.startswith(_BEFORE_CONFIG) for child in workdir.iterdir()):
        raise UserError(f"workdir = {workdir}: has files, but no run (no config.json); try {workdir / 'run'}")


@jax.jit
def _finite(tree: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)


def _check_finite(run: Run, start: Start) -> None:
    """Raise UserError if a parameter in which the run is to start, or its optimizer state, is NaN or infinite."""
    state, t = {"parameters": start.state.variables, "optimizer state": start.state.opt_state}, run.config.training
    faulty = [
        path for path, finite in jax.tree_util.tree_leaves_with_path(jax.device_get(_finite(state))) if not finite
    ]
    if not faulty:
        return
    name = jax.tree_util.keystr(faulty[0], simple=True, separator=" ")
    checkpoint = run.workdir / "checkpoints" / str(start.step)
    if start.step:
        place, advice = f"checkpoint {checkpoint}", f"move {checkpoint} away, and the one before is used"
    elif source := t.transition_from or t.upcycle_from:
        place, advice = f"{source}", "try a run whose last checkpoint is finite"
    else:
        place, advice = "the initial state", "try model.init.scale = 0.1"
    raise UserError(f"workdir = {run.workdir}: {place} has NaN or infinite values, in its {name}; {advice}")


def _check_name(workdir: epath.Path) -> None:
    """Raise UserError for a path that Orbax, which takes it for a pattern, would write to but not read from."""
    path = str(workdir if is_remote(workdir) else workdir.absolute())
    if re.search(r"[\[*?]", path):
        rule = "must not contain [, * or ?, since no checkpoint could be read"
        raise UserError(f"workdir = {path}: {rule}; try {re.sub(r'[][*?]', '_', path)}")


def _check_shared(config: Config, workdir: epath.Path) -> None:
    """Raise UserError if this process does not see the config that process 0 has just written."""
    path = workdir / "config.json"
    if not await_visible(lambda: path.exists() and path.read_text() == to_json(config)):
        raise UserError(
            f"workdir = {workdir}: must be one directory for all processes, and the config.json of process 0 is not in "
            "it; try one on a shared file system"
        )


def _check_disk_space(state: TrainState, config: Config, workdir: epath.Path) -> None:
    """Raise UserError if the disk cannot hold the checkpoints to come: those retained, and one being written."""
    if is_remote(workdir):
        return
    steps, c = config.training.steps, config.checkpoint
    saved_steps = steps_of(workdir / "checkpoints")
    if max(saved_steps, default=0) >= steps:
        return
    retained = c.max_to_keep + c.keep_best + (steps // c.keep_every if c.keep_every else 0)
    checkpoint_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    needed = max(retained + 1 - len(saved_steps), 1) * checkpoint_bytes
    existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"workdir = {workdir}: its checkpoints need {needed / 1e6:,.0f} MB more, and {free / 1e6:,.0f} MB are "
            f"free; try a --workdir on a larger disk"
        )
