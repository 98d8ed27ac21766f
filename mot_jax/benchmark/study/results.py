"""The results of a study as plain data, `results.json`: all that its report depends on."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from typing import Any

from etils import epath

from mot_jax.benchmark.study import plan as plans
from mot_jax.benchmark.study.execute import Directory, Outcome, read_record, workdir_of
from mot_jax.benchmark.study.plan import SEEDS, Plan, Run, Study
from mot_jax.benchmark.study.times import read_times
from mot_jax.config import Config, MixtureOfTokensConfig, TrainingConfig, to_json
from mot_jax.cost.flops import forward_flops
from mot_jax.cost.memory import memory_bytes
from mot_jax.cost.parameters import active_parameters, count_parameters
from mot_jax.errors import UserError
from mot_jax.modes import is_independent, trained_mode
from mot_jax.runs.metrics import Row, read_rows
from mot_jax.runs.restore import read_config
from mot_jax.runs.scores import read_scores
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import replace_file

FILE, ROWS_FILE, FORMAT = "results.json", "rows.jsonl.gz", 2
_LAST_PART = 0.1  # of the steps, over which the metrics of layers are averaged
_EVERY = 50  # steps of whose multiples the training rows are published
_TIMES = ("tokens_per_second", "model_flops_per_second", "data_wait", "seconds_left", "mfu")


def collect(directory: Directory, command: str) -> dict[str, Any]:
    """The results of a study so far. command: with which its runs were trained."""
    study, plan = directory.study, directory.plan()
    records = {run.name: read_record(workdir_of(directory.folder, run.name)) for run in plan.runs}
    begun = [record for record in records.values() if record]
    machines = _distinct([_machine(record) for record in begun if "machine" in record])
    settings = {name: value for name, value in vars(study).items() if name not in ("title", "entrants", "alternatives")}
    return {
        "format": FORMAT,
        "study": directory.name,
        "title": study.title,
        "command": command,
        "settings": settings | {"steps": study.steps},
        "machines": machines,
        "commits": _distinct([commit for record in begun for commit in record.get("commits", [])]),
        "data": _data(directory, plan, begun),
        "entrants": {
            name: _entrant(study, name, plan.tunings[name]) | {"trained_with": _trained_with(directory, plan, name)}
            for name in study.entrants
        },
        "runs": [
            _run(directory, run, records[run.name]) | _origin(records[run.name], machines, begun) for run in plan.runs
        ],
        "other_runs": directory.other_runs(plan),
        "times": read_times(directory),
    }


def write(directory: Directory, command: str) -> dict[str, Any]:
    """Write `results.json`, and the rows of metrics; return the results, as they are read again."""
    content = strict_json.dumps(collect(directory, command), indent=1) + "\n"
    replace_file(directory.folder / FILE, content.encode())
    lines = "".join(strict_json.dumps(row) + "\n" for row in _published_rows(directory))
    replace_file(directory.folder / ROWS_FILE, gzip.compress(lines.encode(), mtime=0))
    return json.loads(content)


def load(folder: epath.Path) -> dict[str, Any]:
    """The results in a directory. Raises UserError."""
    advice = "try the --workdir of mot bench train"
    results = strict_json.load(folder / FILE, dict, advice)
    if "study" not in results:
        raise UserError(f"{folder / FILE}: is not of a study; {advice}")
    if (found := results.get("format")) != FORMAT:
        raise UserError(f"{folder / FILE}: has format {found!r}, and this version reads {FORMAT}; {advice}")
    return results


def _machine(record: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in record["machine"].items() if name != "date"}


def _distinct(values: list[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]


def _data(directory: Directory, plan: Plan, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The text: corpus and splits, fingerprints, windows, and the epochs of a run of all steps."""
    study = directory.study
    config = study.entrants[study.target]
    about: dict[str, Any] = {"corpus": config.data.corpus, "train": config.data.train_split}
    about |= {"validation": config.data.validation_split, "tokenizer": config.data.tokenizer}
    if records:
        windows = records[0].get("train_windows")
        epochs = study.steps * config.training.batch_size / windows if windows else None
        about |= {"train_windows": windows, "epochs": epochs}
        about |= {name: records[0].get(name) for name in ("fingerprints", "validation_filled", "warnings")}
    for run in plan.runs:
        outcome = directory.outcome(run.name)
        rows = _validations(workdir_of(directory.folder, run.name)) if outcome else []
        if outcome and outcome.state == "finished" and rows:
            last = rows[-1]
            about |= {"validation_windows": last["windows"], "validation_tokens": last["tokens"]}
            about["bits_per_nat"] = last["bits_per_byte"] / last["loss"]
            break
    return about


def _entrant(study: Study, name: str, tuning: plans.Tuning) -> dict[str, Any]:
    """An entrant: its config, its candidates if it has alternatives, its tuning, and the costs of a step of training.

    While no candidate is chosen, config and costs are those without alternatives.
    """
    candidates, runs = plans.candidates(study, name), plans.candidate_runs(study, name)
    candidate, config = next(iter(tuning.candidates.items()))
    useful, executed = plans.run_flops(config, 1)
    memory, mode = memory_bytes(config), plans.headline_mode(config)
    about: dict[str, Any] = {"candidate": candidate if tuning.rates else None, "candidates": {}}
    if len(candidates) > 1:
        about["candidates"] = {other: {"run": runs[other], **_config(candidates[other])} for other in candidates}
    return about | {
        **_config(config),
        "tuning": {field: value for field, value in tuning._asdict().items() if field != "candidates"},
        "headline_mode": mode,
        "independent": is_independent(trained_mode(config) if mode == "trained" else mode, config),
        "headline_flops": _headline_flops(config, mode),
        "parameters": sum(count_parameters(config.model).values()),
        "active_parameters": active_parameters(config.model),
        "state_bytes": memory["parameters"] + memory["optimizer state"],
        "useful_flops": useful,
        "executed_flops": executed,
    }


def _trained_with(directory: Directory, plan: Plan, entrant: str) -> dict[str, Any]:
    """The fields (`plan.execution`) with which an entrant's runs were trained, where the study has other values now."""
    fields: dict[str, Any] = {}
    for run in plan.runs:
        path = workdir_of(directory.folder, run.name) / "config.json"
        if run.entrant == entrant and run.config and path.exists():
            then, now = plans.execution(read_config(path)), plans.execution(run.config)
            fields |= {name: value for name, value in then.items() if value != now.get(name)}
    return fields


def _config(config: Config) -> dict[str, Any]:
    kind = config.model.feed_forward
    defaults = dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=type(kind)()))
    return {
        "kind": kind.kind,
        "config": json.loads(to_json(config)),
        "kind_defaults": json.loads(to_json(defaults))["model"]["feed_forward"],
    }


def _headline_flops(config: Config, mode: str) -> float:
    """FLOPs per token of the headline mode, relative to the forward pass of training.

    With companions, every sequence has mixtures for all experts, instead of one set for its group.
    """
    kind, parts = config.model.feed_forward, forward_flops(config.model)
    if mode != "companions" or not isinstance(kind, MixtureOfTokensConfig):
        return 1.0
    return 1.0 + (kind.group_size - 1) * parts.get("experts", 0.0) / sum(parts.values())


def _run(directory: Directory, run: Run, record: dict[str, Any]) -> dict[str, Any]:
    """A run, its losses, and the number of its skipped steps. Metrics of gradients and layers: of the seeds' runs."""
    outcome = directory.outcome(run.name) or Outcome("not ended", float("nan"), [], [])
    rate = None if run.config is None else run.config.training.optimizer.learning_rate
    row = {"name": run.name, "entrant": run.entrant, "stage": run.stage, "seed": run.seed, "steps": run.steps}
    row |= {"learning_rate": rate, "state": outcome.state, "curve": outcome.curve}
    row |= {"trained_curve": outcome.trained_curve, "loss": outcome.loss}
    row |= {name: record.get(name) for name in ("config_hash", "commits", "reason") if name in record}
    rows = read_rows(workdir_of(directory.folder, run.name)) if outcome.state != "not ended" else []
    skipped = [training["skipped"] for training in rows if training["split"] == "train"]
    row["skipped_steps"] = int(skipped[-1]) if skipped else None
    if run.stage == SEEDS and outcome.state == "finished":
        row["layers"] = _layer_metrics(rows, run.steps)
        row["gradient_variation"] = run.config and gradient_variation(rows, run.config.training)
    return row


def _origin(record: dict[str, Any], machines: list[dict[str, str]], begun: list[dict[str, Any]]) -> dict[str, Any]:
    """The machine of a run, as an index into all of them, and whether its text is that of the study (`data`).

    Both are None for a run that has not begun.
    """
    if "machine" not in record:
        return {"machine": None, "same_text": None}
    same = record.get("fingerprints") == begun[0].get("fingerprints")
    return {"machine": machines.index(_machine(record)), "same_text": same}


def _layer_metrics(rows: list[Row], steps: int) -> dict[str, float]:
    """Means over the last tenth of training of the metrics of each block, `NAME/BLOCK`, such as drops and load."""
    last = [row for row in rows if row["split"] == "train" and row["step"] > steps * (1 - _LAST_PART)]
    names = {name for row in last for name, value in row.items() if "/" in name and isinstance(value, float)}
    return {name: statistics.fmean(row[name] for row in last if row.get(name) is not None) for name in sorted(names)}


def gradient_variation(rows: list[Row], training: TrainingConfig) -> float | None:
    """How much the norm of the gradients, before clipping, varies in the second half of training, without its trend.

    The root mean square of the differences of successive logged norms, over the square root of 2, relative to their
    mean: the standard deviation over the mean if norms are independent. None if fewer than two are logged. Steps that
    were skipped have no norm, and steps that are logged for an event do not count.
    """
    norms = [
        row["gradient_rms"]
        for row in rows
        if row["split"] == "train" and row["step"] > training.steps / 2 and row["step"] % training.log_every == 0
        if row["gradient_rms"]
    ]
    if len(norms) < 2:
        return None
    squares = [(after - before) ** 2 for before, after in itertools.pairwise(norms)]
    return math.sqrt(statistics.fmean(squares) / 2) / statistics.fmean(norms)


def _validations(workdir: epath.Path) -> list[Row]:
    return [row for row in read_rows(workdir) if row["split"] == "validation"]


def _published_rows(directory: Directory) -> Iterator[Row]:
    """The rows of the runs that have ended, without times: all evaluations, and training rows of every fiftieth step.

    An evaluation in the headline mode is a score of the run and has its `mode`; one in the mode of training has none.
    """
    plan = directory.plan()
    for run in plan.runs:
        outcome, workdir = directory.outcome(run.name), workdir_of(directory.folder, run.name)
        if outcome is None:
            continue
        rows = [row for row in read_rows(workdir) if row["split"] == "validation" or row["step"] % _EVERY == 0]
        mode = plans.headline_mode(plan.configs(run)[0])
        for score in read_scores(workdir) if mode != "trained" else ():
            loss = math.inf if score["loss"] is None else score["loss"]
            if score["mode"] == mode and (score["step"], loss) in outcome.curve:  # not of a later mot evaluate
                rows.append(score | {"split": "validation"})
        for row in rows:
            yield {"run": run.name, **{name: value for name, value in row.items() if name not in _TIMES}}
