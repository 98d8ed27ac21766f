"""Training of a study's runs, each as `mot train` would, in `DIR/runs/NAME`.

A run is stale if its config or its text differs from that of the study now; stale runs are refused, not replaced. The
commit is recorded and does not make a run stale.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from mot_jax.benchmark.report import Column
from mot_jax.benchmark.study import plan as plans
from mot_jax.benchmark.study.plan import SEEDS, Plan, Run, Study
from mot_jax.benchmark.timing import machine
from mot_jax.config import Config, ModelConfig
from mot_jax.cost.flops import executed_flops_per_token
from mot_jax.data.fingerprints import load_fingerprints
from mot_jax.data.order import filled_share
from mot_jax.data.text import open_text, text_warnings
from mot_jax.errors import DivergedError, RetryableError, UserError
from mot_jax.modes import enter
from mot_jax.modes.companions import load_companions
from mot_jax.runs.checkpoint import versions
from mot_jax.runs.metrics import read_rows
from mot_jax.runs.restore import read_config
from mot_jax.runs.scores import record_score, score_of
from mot_jax.runs.status import RESULT
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import create_file, make_directory, replace_file
from mot_jax.runtime.progress import Advance, duration, progress
from mot_jax.training import Hook, Trainer, train
from mot_jax.training.evaluation import Result, make_evaluation

STUDY_FILE, RECORD = "study.json", "record.json"
_SAME_MACHINE = ("device", "processor", "python", "jax", "jaxlib")  # on which a run is resumed, and all are timed
_SHOWN = 8  # stale runs in an error


class Outcome(NamedTuple):
    """A run that has ended.

    Attributes:
        state: `finished` or `diverged`.
        loss: the final loss in the headline mode; infinite if it diverged.
        curve: (step, loss) of each evaluation in the headline mode.
        trained_curve: the same in the mode of training.
    """

    state: str
    loss: float
    curve: list[tuple[int, float]]
    trained_curve: list[tuple[int, float]]


def workdir_of(folder: epath.Path, name: str) -> epath.Path:
    """The directory of a run."""
    return folder / "runs" / name


# --- reading the runs of a directory ----------------------------------------------------------------------------------


def read_record(workdir: epath.Path) -> dict[str, Any]:
    """The record of a run: its state, machine and commits; empty if it has not begun."""
    path = workdir / RECORD
    return strict_json.load(path, dict, f"try rm {path}, and the run is trained to its end") if path.exists() else {}


def add_to_record(workdir: epath.Path, content: Mapping[str, Any]) -> None:
    """Add content to the record of a run, or replace it there."""
    record = strict_json.dumps({**read_record(workdir), **content}, indent=1)
    replace_file(workdir / RECORD, f"{record}\n".encode())


def read_outcome(workdir: epath.Path, mode: str) -> Outcome | None:
    """The outcome of a run; None if it has not ended. mode: the headline mode of its model.

    Raises UserError for a run that has ended without an evaluation in this mode, which no study has trained.
    """
    record = read_record(workdir)
    state = record.get("state")
    if state != "diverged" and not (workdir / RESULT).exists():
        return None
    rows = [row for row in read_rows(workdir) if row["split"] == "validation"]
    trained = [(row["step"], _loss(row["loss"])) for row in rows]
    curve = trained
    if mode != "trained":
        curve = [(step, _loss(loss)) for step, loss in record.get("curve", [])]
    if state == "diverged":
        return Outcome("diverged", float("inf"), curve, trained)
    if not curve or not trained or curve[-1][0] != trained[-1][0]:
        where = f"{workdir}: has ended without a last evaluation in the mode {mode}"
        raise UserError(f"{where}; try mv {workdir} {workdir}.old, and it is trained again")
    return Outcome("finished", curve[-1][1], curve, trained)


def _loss(value: float | None) -> float:
    return float("inf") if value is None else value  # strict JSON has null for values that are not finite


class Directory:
    """The directory of a study: its runs, and their outcomes so far."""

    def __init__(self, study: Study, name: str, folder: epath.Path):
        self.study, self.name, self.folder = study, name, folder
        self._outcomes: dict[str, Outcome] = {}
        self._fingerprints: dict[Any, dict[str, str]] = {}

    def claim(self) -> None:
        """Create the directory for this study. Raises UserError if it has another one."""
        make_directory("--workdir", self.folder)
        path = self.folder / STUDY_FILE
        others = [child.name for child in self.folder.iterdir() if not child.name.startswith(STUDY_FILE)]
        if others and not path.exists():  # in this order: another process may begin the study now
            advice = f"try --workdir {self.folder / self.name}"
            raise UserError(f"--workdir = {self.folder}: has files, but no study (no {STUDY_FILE}); {advice}")
        about = {"study": self.name, "title": self.study.title}
        create_file(path, (strict_json.dumps(about) + "\n").encode())
        self.check_name()

    def check_name(self) -> None:
        """Raise UserError if the directory exists and has another study."""
        path = self.folder / STUDY_FILE
        if path.exists():
            about = strict_json.load(path, dict, "try another --workdir")
            other, title = about.get("study"), about.get("title", self.study.title)
            advice = f"try --workdir {self.folder}_{self.name}"
            if other != self.name:
                raise UserError(f"--workdir = {self.folder}: has the study {other!r}, not {self.name!r}; {advice}")
            if title != self.study.title:
                rule = f"has a study with the title {title!r}, not {self.study.title!r}"
                raise UserError(f"--workdir = {self.folder}: {rule}; {advice}_2, or that title for the same study")

    def plan(self) -> Plan:
        """The runs, from the outcomes so far. Outcomes do not change, so that each is read once."""
        while True:
            current = plans.plan(self.study, self.losses())
            if not any(self._read(run, current) for run in current.runs if run.name not in self._outcomes):
                return current

    def _read(self, run: Run, plan: Plan) -> bool:
        modes = {plans.headline_mode(config) for config in plan.configs(run)}
        if len(modes) > 1:  # one for some candidates, another one for others
            return False
        outcome = read_outcome(workdir_of(self.folder, run.name), modes.pop())
        if outcome is not None:
            self._outcomes[run.name] = outcome
        return outcome is not None

    def outcome(self, name: str) -> Outcome | None:
        """The outcome of a run of the plan."""
        return self._outcomes.get(name)

    def losses(self) -> dict[str, float]:
        """The final losses so far, by run."""
        return {name: outcome.loss for name, outcome in self._outcomes.items()}

    def to_train(self, plan: Plan) -> list[Run]:
        """The runs of a plan that can be trained now."""
        return [run for run in plan.runs if run.config is not None and self.outcome(run.name) is None]

    def check_stale(self, plan: Plan) -> None:
        """Raise UserError, with their names, if runs of the plan have another config or text than it has now."""
        faults = []
        for run in plan.runs:
            workdir = workdir_of(self.folder, run.name)
            if run.config is not None and (workdir / "config.json").exists():
                reason = self._stale_reason(run.config, workdir)
                if reason:
                    advice = f"try another --workdir, or mv {workdir} {self.folder / ('stale-' + run.name)}"
                    faults.append(f"{run.name}: is stale: {reason}; {advice}")
        if faults:
            more = len(faults) - _SHOWN
            raise UserError(*faults[:_SHOWN], *([f"{more} more runs are stale"] if more > 0 else []))

    def _stale_reason(self, config: Config, workdir: epath.Path) -> str:
        try:
            before = plans.identity(read_config(workdir / "config.json"))
        except UserError as error:
            return error.faults[0]
        now = plans.identity(config)
        names = [name for name in before | now if before.get(name) != now.get(name)]
        if names:
            name = names[0]
            more = f" and {len(names) - 1} more fields" if len(names) > 1 else ""
            return f"{name} was {before.get(name)!r}, now {now.get(name)!r}{more}"
        stored, current = load_fingerprints(workdir), self._text(config)
        changed = [key for key in current if stored.get(key, current[key]) != current[key]]
        return f"its text has changed ({', '.join(changed)})" if changed else ""

    def _text(self, config: Config) -> dict[str, str]:
        """The fingerprints of a config's text, which is opened once for all entrants."""
        key = (config.data, config.model.context_length)
        if key not in self._fingerprints:
            self._fingerprints[key] = open_text(config).fingerprints
        return self._fingerprints[key]

    def other_runs(self, plan: Plan) -> list[str]:
        """Runs in the directory that the plan does not have, as after a change of the study."""
        runs, names = self.folder / "runs", {run.name for run in plan.runs}
        return sorted(child.name for child in runs.iterdir() if child.name not in names) if runs.exists() else []

    def step_seconds(self) -> dict[ModelConfig, float]:
        """The mean time of a step of each model's finished runs, for estimates only."""
        times: dict[ModelConfig, list[float]] = {}
        for run in plans.plan(self.study, self.losses()).runs:
            seconds = read_record(workdir_of(self.folder, run.name)).get("seconds_per_step")
            if seconds and run.config is not None:
                times.setdefault(run.config.model, []).append(seconds)
        return {model: sum(seconds) / len(seconds) for model, seconds in times.items()}


# --- training them ----------------------------------------------------------------------------------------------------


def train_study(directory: Directory, hours: float | None) -> Iterator[str]:
    """Train all runs that have not ended, one after the other. Yields `notices`, and a line after each run.

    Args:
        directory: of the study.
        hours: limit of the estimated time; None: the study's budget.

    Raises:
        UserError: if a run is stale, or the estimate exceeds the limit.
    """
    directory.claim()
    plan = directory.plan()
    directory.check_stale(plan)
    check_hours(directory, plan, hours)
    yield from notices(directory, plan)
    done = 0.0  # in units of a step of the target entrant, as is the work that is left
    while todo := directory.to_train(plan):
        run, ended, begin = todo[0], len(directory.losses()), time.monotonic()
        title = f"run {ended + 1}, at most {ended + _at_most(directory, plan)}: {run.name}"
        total = done + _work_left(directory, plan)
        weight = _weight(directory.study, plan.configs(run))
        with progress(title, round(total), quiet=not sys.stderr.isatty(), done=round(done)) as advance:
            train_run(directory, run, _weighted(advance, weight))
        done += run.steps * weight
        plan = directory.plan()
        directory.check_stale(plan)
        left = duration(3600 * estimate(directory, plan))
        yield f"{_result(directory, run)}, in {duration(time.monotonic() - begin)}; about {left} left, at most"


def train_named(directory: Directory, name: str) -> str:
    """Train one run, for an array job of a cluster. Returns a line about its result.

    Raises:
        UserError: if the study has no such run, or it is stale.
        RetryableError: if its learning rate is not chosen yet, or whether the study has this run is not decided, since
            runs that it needs have not ended.
    """
    directory.claim()
    plan = directory.plan()
    run = plan.run(name)
    missing = [need for need in run.needs if directory.outcome(need) is None]
    if run.config is None:
        advice = f"try again after {', '.join(missing)}"
        raise RetryableError(f"--run = {name}: its learning rate is not chosen yet; {advice}")
    directory.check_stale(plan)
    if directory.outcome(name) is None:
        with progress(name, run.steps, quiet=not sys.stderr.isatty()) as advance:
            train_run(directory, run, advance)
        directory.plan()
    return _result(directory, run)


def _result(directory: Directory, run: Run) -> str:
    outcome = directory.outcome(run.name)
    assert outcome is not None
    return f"{run.name}: " + (f"loss {outcome.loss:.4f}" if outcome.state == "finished" else "diverged")


def train_run(directory: Directory, run: Run, advance: Advance) -> None:
    """Train a run, or resume it. That it has diverged is recorded, and no error."""
    assert run.config is not None
    workdir = workdir_of(directory.folder, run.name)
    _check_machine(run.name, read_record(workdir))
    try:
        train(run.config, workdir, [StudyHook(run.config, run.stage == SEEDS, advance)], quiet=True)
    except DivergedError as error:
        add_to_record(workdir, {"state": "diverged", "reason": error.faults[0]})
    else:
        add_to_record(workdir, {"state": "finished"})
    jax.clear_caches()  # programs of this run, which no other run executes


class StudyHook(Hook):
    """Records the run, scores the model in its headline mode, and advances the progress of the study.

    curve: score at every validation; otherwise at the end only.
    """

    state = "validating"

    def __init__(self, config: Config, curve: bool, advance: Advance):
        self._mode, self._curve, self._advance = plans.headline_mode(config), curve, advance
        self._evaluate: Callable[..., Result] | None = None

    @contextlib.contextmanager
    def around(self, trainer: Trainer) -> Iterator[None]:
        run = trainer.run
        record = read_record(run.workdir)  # as another process may have left it, of which this one now owns the run
        commits = [*dict.fromkeys([*record.get("commits", []), commit()])]
        about: dict[str, Any] = {"config_hash": plans.identity_hash(run.config), "fingerprints": run.fingerprints}
        about |= {"machine": machine(), "commits": commits, "state": "begun", "train_windows": len(run.windows)}
        about["validation_filled"] = filled_share(run.validation_windows.documents, run.config.group_size)
        about["warnings"] = text_warnings(run.config, run.tokenizer)
        about["environment"] = {n: v for n, v in sorted(os.environ.items()) if n == "XLA_FLAGS" or n.startswith("JAX_")}
        start = {"time": now(), "step": trainer.step}
        add_to_record(run.workdir, about | {"starts": [*record.get("starts", []), start]})
        self._advance(trainer.step)
        begin, first = time.monotonic(), trainer.step
        yield
        if trainer.step > first:
            seconds = (time.monotonic() - begin) / (trainer.step - first)
            add_to_record(run.workdir, {"seconds_per_step": seconds, "end": now()})

    def after_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._advance(1)
        due = self._curve and trainer.step % trainer.run.config.training.validate_every == 0
        if self._mode != "trained" and (due or trainer.at_last_step):
            self._score(trainer)

    def _score(self, trainer: Trainer) -> None:
        run = trainer.run
        companions = load_companions(run.workdir)
        config, params = enter(self._mode, run.config, trainer.state.variables, trainer.step, companions)
        if self._evaluate is None:
            self._evaluate = make_evaluation(config, run.mesh, run.validation_windows, run.tokenizer)
        result = self._evaluate(params, trainer.state.step, run.config.data.validation_windows)
        score = score_of(self._mode, run.config.data.validation_split, run.config, {"step": trainer.step, **result})
        record_score(run.workdir, score)
        before = [[step, loss] for step, loss in read_record(run.workdir).get("curve", []) if step < trainer.step]
        add_to_record(run.workdir, {"curve": [*before, [trainer.step, result["loss"]]]})


def now() -> str:
    """The time in UTC, in seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def changes_of_machine(before: Mapping[str, Any]) -> str:
    """The fields, of a machine and its versions, in which this one differs from an earlier one; else empty."""
    here = machine()
    return "; ".join(
        f"{key} {before.get(key)}, now {here.get(key)}" for key in _SAME_MACHINE if before.get(key) != here.get(key)
    )


def _check_machine(name: str, record: Mapping[str, Any]) -> None:
    """Raise UserError if a run that has begun would be resumed on another machine, whose numbers differ."""
    begun = record.get("machine")
    if begun is not None and record.get("state") == "begun" and (changes := changes_of_machine(begun)):
        advice = "resume it there, or move its directory away, and it is trained again"
        raise UserError(f"{name}: was begun on another machine ({changes}); {advice}")


@functools.cache
def commit() -> str:
    """The commit of this package's source, with `-dirty` after changes; its version if it is installed.

    That of the process's first run: later changes are not executed by it.
    """
    git = ["git", "-C", os.fspath(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], check=True, capture_output=True)
        describe = [*git, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"mot_jax {versions()['mot_jax']}"


# --- estimates --------------------------------------------------------------------------------------------------------


def estimate(directory: Directory, plan: Plan) -> float:
    """The hours of the runs that have not ended, with those that are not known yet."""
    step_seconds, seconds = directory.step_seconds(), 0.0
    for run in plan.runs:
        if directory.outcome(run.name) is None:
            seconds += plans.seconds_of(directory.study, plan.configs(run), run.steps, 1, step_seconds)
    for further in plan.further:
        configs, steps = plan.tunings[further.entrant].candidates.values(), further.at_most * further.steps
        seconds += plans.seconds_of(directory.study, configs, steps, further.at_most, step_seconds)
    return seconds / 3600


def check_hours(directory: Directory, plan: Plan, hours: float | None) -> None:
    """Raise UserError if the estimate exceeds the limit, or without one the budget of the study."""
    needed, budget = estimate(directory, plan), directory.study.budget_hours
    limit = budget if hours is None else hours
    if not needed <= limit:  # NaN is no limit
        name = "budget_hours" if hours is None else "--hours"
        rule = f"the study's runs take about {needed:.1f} hours more"
        raise UserError(f"{name} = {limit:g}: {rule}; try --hours {int(needed) + 1}, or --dry-run for the list of runs")


def dry_run(directory: Directory) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the planned runs, and lines below their table. Nothing is written."""
    directory.check_name()
    plan, study = directory.plan(), directory.study
    directory.check_stale(plan)
    step_seconds = directory.step_seconds()
    rows = []
    for run in plan.runs:
        outcome, config = directory.outcome(run.name), run.config
        useful, executed = map(max, zip(*(plans.run_flops(c, run.steps) for c in plan.configs(run)), strict=True))
        state = outcome.state if outcome else "waits for the tuning" if config is None else "to train"
        if not outcome and (workdir_of(directory.folder, run.name) / RECORD).exists():
            state = "begun"
        rate = None if config is None else config.training.optimizer.learning_rate
        hours = 0.0 if outcome else plans.seconds_of(study, plan.configs(run), run.steps, 1, step_seconds) / 3600
        row = {"run": run.name, "stage": run.stage, "state": state, "learning_rate": rate, "seed": run.seed}
        rows.append(row | {"steps": run.steps, "useful": useful, "executed": executed, "hours": hours})
    lines = []
    if at_most := sum(further.at_most for further in plan.further):
        lines.append(f"and at most {at_most} runs more, which depend on the losses of these")
    lines.append(
        "hours are measured on finished runs of the same model"
        if step_seconds
        else f"hours are estimated at {study.flops_per_second:.0e} executed FLOP/s"
    )
    needed = estimate(directory, plan)
    lines.append(f"about {needed:.1f} hours left in all, at most; the budget is {study.budget_hours:g}")
    return rows, [*lines, *notices(directory, plan)]


def notices(directory: Directory, plan: Plan) -> list[str]:
    """Lines about runs of an earlier version of the study, and about too few seeds."""
    lines = []
    if others := directory.other_runs(plan):
        lines.append(f"runs in {directory.folder} that the study does not have now: {', '.join(others)}")
    if warning := plans.few_seeds(len(directory.study.seeds)):
        lines.append(f"warning: {warning}")
    return lines


COLUMNS: list[Column] = [
    ("run", lambda row: row["run"]),
    ("stage", lambda row: row["stage"]),
    ("state", lambda row: row["state"]),
    ("learning rate", lambda row: "-" if row["learning_rate"] is None else f"{row['learning_rate']:.4g}"),
    ("seed", lambda row: str(row["seed"])),
    ("steps", lambda row: f"{row['steps']:,}"),
    ("TFLOP useful", lambda row: f"{row['useful'] / 1e12:,.2f}"),
    ("executed", lambda row: f"{row['executed'] / 1e12:,.2f}"),
    ("hours", lambda row: f"{row['hours']:.2f}"),
]


def _weight(study: Study, configs: Iterable[Config]) -> float:
    """The most executed FLOPs of a step relative to those of the target entrant: units of the progress bar."""
    return max(map(executed_flops_per_token, configs)) / executed_flops_per_token(study.entrants[study.target])


def _work_left(directory: Directory, plan: Plan) -> float:
    study, runs = directory.study, [run for run in plan.runs if directory.outcome(run.name) is None]
    work = sum(run.steps * _weight(study, plan.configs(run)) for run in runs)
    candidates = {entrant: tuning.candidates.values() for entrant, tuning in plan.tunings.items()}
    return work + sum(some.at_most * some.steps * _weight(study, candidates[some.entrant]) for some in plan.further)


def _at_most(directory: Directory, plan: Plan) -> int:
    """The number of runs that are left, with those that are not known yet."""
    runs = sum(directory.outcome(run.name) is None for run in plan.runs)
    return runs + sum(further.at_most for further in plan.further)


def _weighted(advance: Advance, weight: float) -> Advance:
    """Advance by whole units, of which a step is `weight`."""
    total = 0.0

    def advance_steps(steps: int) -> None:
        nonlocal total
        before, total = round(total), total + steps * weight
        advance(round(total) - before)

    return advance_steps
