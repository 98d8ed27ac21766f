"""The figures of a study's report, computed from its results and nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from mot_jax.benchmark.study.plan import HORIZONS, SEEDS, TUNING
from mot_jax.benchmark.study.statistics import (
    Comparison,
    Curve,
    compare,
    crossing,
    holm,
    horizon,
    loss_at,
    rate_span,
    summary,
    time_ratio,
)
from mot_jax.config import ReluRoutingConfig

TOLERANCE = 0.01  # of the lowest loss, for the span of learning rates
Results = Mapping[str, Any]
Row = dict[str, Any]


def analyze(results: Results) -> dict[str, Any]:
    """Return the figures of the report.

    Returns:
        target: the loss to reach; None if there is none, for the reason `no_target`: runs of the target entrant have
            not ended, or one has diverged, so that their mean is infinite.
        entrants: a row for each.
        pairs: a row for each of the study's `pairs`, with p-values corrected over them.
    """
    settings, entrants = results["settings"], results["entrants"]
    by_entrant = {name: seed_runs(results, name) for name in entrants}
    losses = {name: {seed: final_loss(run) for seed, run in runs.items()} for name, runs in by_entrant.items()}
    target, no_target = _target(settings, losses[settings["target"]])
    crossings = {
        name: {seed: crossing(curve_of(run), target) for seed, run in runs.items()} if target is not None else {}
        for name, runs in by_entrant.items()
    }
    compared = settings["compared"]
    logs = {name: (_logs(crossings[name]), _logs(crossings[compared])) for name in entrants}
    no_test = {} if target is not None else {name: "no target" for name in entrants if name != settings["target"]}
    of_target = by_entrant[settings["target"]]
    if compared == settings["target"]:
        for name in entrants:
            logs[name] = _logs_to_own_losses(results, of_target, by_entrant[name])[::-1]
    else:
        logs[settings["target"]] = _logs_to_own_losses(results, of_target, by_entrant[compared])
    in_training = {name: {seed: trained_loss(run) for seed, run in runs.items()} for name, runs in by_entrant.items()}
    tests = {
        "loss": _tests({name: (losses[name], losses[compared]) for name in entrants if name != compared}),
        "trained_loss": _tests({n: (in_training[n], in_training[compared]) for n in entrants if n != compared}),
        "crossing": _tests({name: logs[name] for name in entrants if name != compared}, no_test),
    }
    rows = {}
    for name, entrant in entrants.items():
        row: Row = {"kind": entrant["kind"], "losses": losses[name], "loss": summary(losses[name])}
        row["trained_loss"] = summary(in_training[name])
        row |= {"crossings": crossings[name], "crossing": summary(crossings[name])}
        row["horizon"] = None if target is None else _horizons(results, name, target)
        row |= {f"{measure}_test": by_name.get(name) for measure, by_name in tests.items()}
        costs = _costs(results, name, row["crossing"]["median"])
        row |= costs | _equal_budgets(results, name, costs)
        rows[name] = row | {"time_bounds": _time_bounds(row) if compared == settings["target"] else None}
    pairs = [tuple(pair) for pair in settings.get("pairs", ())]
    by_pair = {
        measure: _tests({" - ".join(pair): (values[pair[0]], values[pair[1]]) for pair in pairs})
        for measure, values in (("loss_test", losses), ("trained_loss_test", in_training))
    }
    pair_rows = [
        {"pair": pair} | {measure: tests[" - ".join(pair)] for measure, tests in by_pair.items()} for pair in pairs
    ]
    return {"target": target, "no_target": no_target, "entrants": rows, "pairs": pair_rows}


# --- runs -------------------------------------------------------------------------------------------------------------


def seed_runs(results: Results, entrant: str) -> dict[int, Row]:
    """Return the runs of an entrant that are compared and have ended, by seed.

    An entrant of which no learning rate trains has diverged with every seed.
    """
    runs = [run for run in results["runs"] if run["entrant"] == entrant and run["stage"] == SEEDS]
    tuning = results["entrants"][entrant]["tuning"]
    if tuning["complete"] and tuning["chosen"] is None:
        return {seed: {"state": "diverged", "curve": [], "loss": None} for seed in results["settings"]["seeds"]}
    return {run["seed"]: run for run in runs if run["state"] != "not ended"}


def final_loss(run: Row) -> float:
    """Return the final loss of a run that has ended; infinity if it diverged."""
    return math.inf if run["state"] == "diverged" or run["loss"] is None else run["loss"]


def trained_loss(run: Row) -> float:
    """Return the final loss of a run that has ended, in the mode of training; infinity if it diverged."""
    losses = [loss for _, loss in run.get("trained_curve", [])]
    return math.inf if run["state"] == "diverged" or not losses or losses[-1] is None else losses[-1]


def curve_of(run: Row) -> Curve:
    """Return the evaluations of a run that has ended; none of one that diverged, which reaches no target."""
    if run["state"] == "diverged":
        return []
    return [(step, math.inf if loss is None else loss) for step, loss in run["curve"]]


def tuning_losses(results: Results, entrant: str) -> dict[str, float]:
    """Return the final losses of an entrant's tuning runs that have ended, by run."""
    runs = [run for run in results["runs"] if run["entrant"] == entrant and run["stage"] == TUNING]
    return {run["name"]: final_loss(run) for run in runs if run["state"] != "not ended"}


def grid_losses(results: Results, entrant: str) -> dict[float, float]:
    """Return the final losses of those in the grid, by learning rate, increasing."""
    losses, rates = tuning_losses(results, entrant), results["entrants"][entrant]["tuning"]["rates"]
    return {rate: losses[run] for run, rate in rates.items() if run in losses}


def stability(results: Results, entrant: str) -> Row:
    """Return how an entrant reacts to the learning rate, and how its gradients vary.

    Returns:
        span: `RateSpan` of the rates within `TOLERANCE` of the lowest loss.
        changes: by factor, the change of the loss as a share of it at half, twice and four times the chosen rate; None
            where the grid ends before.
        variation: of the gradient norm, as in the results, mean over seeds; None if a seed diverged or has none.
    """
    losses, chosen = grid_losses(results, entrant), results["entrants"][entrant]["tuning"]["chosen"]
    changes = {}
    for factor in (0.5, 2.0, 4.0):
        rate = next((rate for rate in losses if chosen and math.isclose(rate, factor * chosen)), None)
        changes[factor] = None if rate is None else losses[rate] / losses[chosen] - 1
    runs = seed_runs(results, entrant).values()
    variations = [run["gradient_variation"] for run in runs if run.get("gradient_variation") is not None]
    mean = statistics.fmean(variations) if variations and len(variations) == len(runs) else None
    return {"span": rate_span(losses, TOLERANCE), "changes": changes, "variation": mean}


def layer_metrics(results: Results, entrant: str) -> dict[str, list[float]]:
    """Return the metrics of layers, means over seeds, as lists over blocks."""
    by_seed = [run["layers"] for run in seed_runs(results, entrant).values() if "layers" in run]
    metrics: dict[str, list[float]] = {}
    keys = sorted({key for layers in by_seed for key in layers}, key=lambda key: (key.split("/")[0], _block(key)))
    for key in keys:
        values = [layers[key] for layers in by_seed if key in layers]
        metrics.setdefault(key.split("/")[0], []).append(statistics.fmean(values))
    return metrics


def _block(key: str) -> int:
    return int(key.rpartition("/")[2])


# --- figures ----------------------------------------------------------------------------------------------------------


def _target(settings: Mapping[str, Any], losses: Mapping[int, float]) -> tuple[float | None, str]:
    """Return the mean final loss of the target entrant, or None and the reason why there is no target."""
    name, seeds = settings["target"], settings["seeds"]
    if diverged := [seed for seed in seeds if math.isinf(losses.get(seed, 0.0))]:
        return None, f"{len(diverged)} of {len(seeds)} runs of {name} diverged, and an infinite mean is no target"
    if set(losses) != set(seeds):
        return None, f"runs of {name} have not ended"
    return statistics.fmean(losses.values()), ""


def _logs(crossings: Mapping[int, float]) -> dict[int, float]:
    return {seed: math.log(step) for seed, step in crossings.items()}


def _logs_to_own_losses(
    results: Results, runs: Mapping[int, Row], compared: Mapping[int, Row]
) -> tuple[dict[int, float], dict[int, float]]:
    """Return the logarithms of the steps to the final loss of each run of the target entrant, by seed.

    The run itself reaches it at its last step. (The mean over the seeds is reached by some of these runs only.)
    """
    last = math.log(results["settings"]["steps"])
    steps = {
        seed: crossing(curve_of(compared[seed]), final_loss(run)) for seed, run in runs.items() if seed in compared
    }
    return dict.fromkeys(steps, last), _logs(steps)


def _tests(
    samples: Mapping[str, tuple[Mapping[int, float], Mapping[int, float]]], no_test: Mapping[str, str] | None = None
) -> dict[str, Row]:
    """Return the comparison of each sample with its reference, with p-values corrected over all of them.

    no_test: by name, the reason why there is no test.
    """
    reasons = no_test or {}
    comparisons = {
        name: Comparison(reason=reasons[name]) if name in reasons else compare(*pair) for name, pair in samples.items()
    }
    corrected = holm({name: comparison.p for name, comparison in comparisons.items()})
    return {name: {**comparison._asdict(), "holm": corrected[name]} for name, comparison in comparisons.items()}


def _horizons(results: Results, entrant: str, target: float) -> dict[int, Row]:
    """Return, by seed, the schedules that were trained with their final losses, and the shortest that reaches it."""
    settings, by_seed = results["settings"], {}
    for seed in settings["horizon_seeds"]:
        runs = [run for run in results["runs"] if run["entrant"] == entrant and run["seed"] == seed]
        losses = {
            run["steps"] / settings["steps"]: final_loss(run)
            for run in runs
            if run["stage"] in (SEEDS, HORIZONS) and run["state"] != "not ended"
        }
        complete = 1.0 in losses and not any(run["state"] == "not ended" for run in runs if run["stage"] == HORIZONS)
        if losses:
            by_seed[seed] = {"losses": losses, "shortest": horizon(losses, target), "complete": complete}
    return by_seed


def _costs(results: Results, entrant: str, median_crossing: float) -> Row:
    """Return the costs of a step relative to the target entrant's, and those of reaching the target."""
    settings, about, times = results["settings"], results["entrants"][entrant], results["times"]
    reference = results["entrants"][settings["target"]]
    row: Row = {"step_seconds": None, "time_ratio": None, "time_interval": None}
    if times is not None and {entrant, settings["target"]} <= times["rows"].keys():
        timed, base = times["rows"][entrant], times["rows"][settings["target"]]
        row["step_seconds"] = statistics.median(map(statistics.median, timed["seconds"]))
        row["time_ratio"], interval = time_ratio(timed["seconds"], base["seconds"])
        row["time_interval"] = None if entrant == settings["target"] else interval
    share = median_crossing / settings["steps"]
    row["useful_ratio"] = about["useful_flops"] / reference["useful_flops"]
    row["executed_ratio"] = about["executed_flops"] / reference["executed_flops"]
    row["steps_to_target"] = share
    for cost in ("useful", "executed", "time"):
        row[f"{cost}_to_target"] = None if row[f"{cost}_ratio"] is None else share * row[f"{cost}_ratio"]
    if runs_all_experts(about):
        row["time_to_target"] = None
    return row


def _time_bounds(row: Row) -> tuple[float, float] | None:
    """Return the products of the ends of the 95 % intervals of the ratio of steps, seed by seed, and of step times."""
    test, interval = row["crossing_test"], row["time_interval"]
    if row["time_to_target"] is None or test is None or test["low"] is None or interval is None:
        return None
    return math.exp(test["low"]) * interval[0], math.exp(test["high"]) * interval[1]


def runs_all_experts(entrant: Row) -> bool:
    """Whether all experts process all tokens, so that the time is not that of the kind where experts are skipped."""
    return bool(entrant["kind"] == ReluRoutingConfig.kind)


def _equal_budgets(results: Results, entrant: str, row: Row) -> Row:
    """Return mean losses at the useful and executed FLOPs and the seconds of the target entrant's whole training.

    They are those of the curve at an earlier step, where the learning rate has not yet decayed to its end.

    row: the costs of a step, of `_costs`.
    """
    steps, curves = results["settings"]["steps"], [curve_of(run) for run in seed_runs(results, entrant).values()]
    losses: Row = {}
    for cost in ("useful", "executed", "time"):
        ratio = row[f"{cost}_ratio"]
        known = curves and ratio is not None and not (cost == "time" and runs_all_experts(results["entrants"][entrant]))
        mean = statistics.fmean(loss_at(curve, steps / ratio) for curve in curves) if known else None
        losses[f"loss_at_equal_{cost}"] = mean
    return losses
