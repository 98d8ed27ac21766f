"""The report of a study, from nothing but its results: `report.html`, one self-contained page, and `report.md`."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from etils import epath
from matplotlib.figure import Figure

from mot_jax.benchmark.study.analysis import (
    TOLERANCE,
    analyze,
    curve_of,
    grid_losses,
    layer_metrics,
    runs_all_experts,
    seed_runs,
    stability,
    tuning_losses,
)
from mot_jax.benchmark.study.plan import few_seeds
from mot_jax.benchmark.study.results import FILE, ROWS_FILE, load
from mot_jax.benchmark.study.statistics import SIGNIFICANCE, RateSpan, time_ratio
from mot_jax.runtime.paths import make_directory, replace_file

_AT_END = "\N{DAGGER}"
_BOUNDS = ("difference", "low", "high")  # of a comparison
HTML, MARKDOWN = "report.html", "report.md"
Results = Mapping[str, Any]


class Heading(NamedTuple):
    text: str


class Text(NamedTuple):
    text: str


class Lines(NamedTuple):
    lines: Sequence[str]


class Code(NamedTuple):
    text: str


class Table(NamedTuple):
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Plot(NamedTuple):
    """A plot as SVG: part of the HTML page, and a file of this name next to the Markdown."""

    name: str
    svg: str
    caption: str


Block = Heading | Text | Lines | Code | Table | Plot


def write_report(folder: epath.Path, output: epath.Path | None = None) -> list[epath.Path]:
    """Write the report of the results in a directory, and its plots, there or in another one. Returns the files.

    Raises UserError if there are no results.
    """
    results, output = load(folder), output or folder
    make_directory("--output", output)
    blocks = [_marked(results, block) for block in report(results)]
    files = {HTML: to_html(results["title"], blocks), MARKDOWN: to_markdown(results["title"], blocks)}
    files |= {f"{block.name}.svg": block.svg for block in blocks if isinstance(block, Plot)}
    for name, text in files.items():
        replace_file(output / name, text.encode())
    return [output / name for name in files]


# --- content ----------------------------------------------------------------------------------------------------------


def report(results: Results) -> Iterator[Block]:
    """Yield the report block by block."""
    figures = analyze(results)
    yield from _summary(results, figures)
    yield from _to_target(results, figures)
    yield from _equal_budgets(results, figures)
    yield from _significance(results, figures)
    yield from _tuning(results)
    yield from _stability(results)
    yield from _balance(results)
    yield from _costs(results, figures)
    yield from _configs(results)
    yield from _conditions(results)
    yield from _refutation(results)


def _marked(results: Results, block: Block) -> Block:
    """Mark the entrants of a table whose best learning rate is at an end of the grid."""
    if not isinstance(block, Table) or block.columns[0] != "entrant":
        return block
    at_end = {name for name, about in results["entrants"].items() if about["tuning"]["at_end"]}
    rows = [[f"{name} {_AT_END}" if name in at_end else name, *cells] for name, *cells in block.rows]
    return Table(block.columns, rows)


def _summary(results: Results, figures: dict[str, Any]) -> Iterator[Block]:
    settings, rows = results["settings"], figures["entrants"]
    target, seeds = figures["target"], len(settings["seeds"])
    yield Heading("Losses at equal steps")
    if target is None:
        yield Text(f"There is no target, and no cost of reaching it: {figures['no_target']}.")
    else:
        text = f"Target: {_loss(target)} nats per token, the mean final loss of {settings['target']}"
        yield Text(f"{text} over {seeds} seed{'s' * (seeds != 1)}, at its tuned learning rate.")
    if not_ended := [run["name"] for run in results["runs"] if run["state"] == "not ended"]:
        yield Text(f"Preliminary: {len(not_ended)} runs have not ended, among them {', '.join(not_ended[:3])}.")
    yield from _machine_warnings(results)
    if warning := few_seeds(seeds):
        yield Text(f"Warning: {warning}.")
    bits = results["data"].get("bits_per_nat")
    table = []
    ordered = sorted(rows, key=lambda name: rows[name]["loss"]["median"])
    for name in ordered:
        about, loss = results["entrants"][name], rows[name]["loss"]
        mean = loss.get("mean")
        table.append(
            [
                name,
                _mode(about),
                _loss(mean) if mean is not None else f"{loss['reached']} of {loss['of']} finite",
                _loss(loss.get("sd")),
                "-" if mean is None or not bits else f"{mean * bits:.4f}",
                _loss(rows[name]["trained_loss"].get("mean")),
                f"{loss['of']} of {seeds}",
                f"{about['parameters']:,}",
            ]
        )
    columns = ["entrant", "evaluated in", "loss", "sd over seeds", "bits per byte", "as trained", "seeds", "parameters"]
    yield Table(columns, table)
    if any(about["tuning"]["at_end"] for about in results["entrants"].values()):
        yield Text(f"{_AT_END}: the best learning rate is at an end of the grid, so that a better one may exist.")
    yield Text(
        "Loss: mean over seeds of the last evaluation, in nats per token, in the inference mode of the second column, "
        "one in which no sequence of a batch depends on another, where the entrant has one. As trained: the loss in "
        "the mode of training, but without the capacity of token choice and expert threshold, so that no token is "
        "dropped; the experts of expert threshold take tokens by their thresholds, as after the warmup. Every "
        "evaluation of a run scores the same windows."
    )
    caption = "Loss in the evaluated mode, mean over seeds, without entrants of which a seed diverged; dashed: target."
    yield Plot("curves", _curves_plot(results, ordered, target), caption)


def _machine_warnings(results: Results) -> Iterator[Block]:
    """Yield a warning for each seed whose runs, which are compared in pairs, are not of one machine and versions."""
    by_seed: dict[int, dict[int, str]] = {}  # the first run of each machine
    for run in results["runs"]:
        if run["machine"] is not None:
            by_seed.setdefault(run["seed"], {}).setdefault(run["machine"], run["name"])
    for seed, names in by_seed.items():
        if len(names) > 1:
            where = ", ".join(f"{name} on machine {machine + 1}" for machine, name in sorted(names.items()))
            yield Text(f"Warning: the runs of seed {seed} differ in machine or versions, listed below: {where}.")


def _mode(about: Mapping[str, Any]) -> str:
    mode = "as trained" if about["headline_mode"] == "trained" else about["headline_mode"]
    if about["headline_flops"] != 1.0:
        mode += f", {about['headline_flops']:.1f} x the FLOPs"
    return mode if about["independent"] else f"{mode}, sequences depend on each other"


def _ended(results: Results, entrant: str) -> list[dict[str, Any]]:
    return list(seed_runs(results, entrant).values())


def _to_target(results: Results, figures: dict[str, Any]) -> Iterator[Block]:
    settings, table = results["settings"], []
    if figures["target"] is None:
        return
    yield Heading("Cost of reaching the target")
    for name, row in figures["entrants"].items():
        reached = row["crossing"]
        table.append(
            [
                name,
                f"{reached['reached']} of {reached['of']}",
                _share(row["steps_to_target"]),
                _share(row["useful_to_target"]),
                _share(row["executed_to_target"]),
                _share(row["time_to_target"]) + _bounds(row["time_bounds"]),
                _horizon(row["horizon"], name == settings["target"]),
                f"{results['entrants'][name]['state_bytes'] / 1e6:,.1f} MB",
            ]
        )
    columns = ["entrant", "seeds that reach it", "steps", "useful FLOPs", "executed FLOPs", "time", "own horizon"]
    horizon = (
        " Own horizon: the shortest schedule, as a share of the steps, whose final loss reaches the target, by "
        f"bisection, with seed {_list(settings['horizon_seeds'])}."
    )
    if not settings["horizons"]:
        columns, horizon = columns[:-1], ""
        table = [[*row[: len(columns)], row[-1]] for row in table]
    yield Table([*columns, "state"], table)
    bounds = ""
    if any(row["time_bounds"] for row in figures["entrants"].values()):
        bounds = (
            ", in parentheses the products of the lower and of the upper ends of the 95 % intervals of the ratios of "
            "steps and of step times, both below"
        )
    share = f"relative to the whole training of {settings['target']}, {settings['steps']:,} steps"
    yield Text(
        f"Steps, FLOPs and time: {share}; medians over seeds on the curve, where the loss first reaches the target, "
        "between evaluations by linear interpolation. A miss counts as infinite, so that the median is infinite if "
        f"half of the seeds miss. The target is a mean over seeds, so that about half of those of {settings['target']} "
        f"miss it.{horizon} Time: steps times the step time of the trained models in turns{bounds}. State: parameters "
        f"and optimizer state.{_without_time(results)}"
    )


def _bounds(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" ({bounds[0]:.2f} to {bounds[1]:.2f})"


def _without_time(results: Results) -> str:
    names = [name for name, about in results["entrants"].items() if runs_all_experts(about)]
    return f" {_list(names)}: no time, since all experts run on all tokens." if names else ""


def _horizon(by_seed: Mapping[Any, Any] | None, is_target: bool) -> str:
    if is_target:
        return "1, by definition"
    if not by_seed:
        return "-"
    return ", ".join(_share(row["shortest"]) + ("" if row["complete"] else " so far") for row in by_seed.values())


def _equal_budgets(results: Results, figures: dict[str, Any]) -> Iterator[Block]:
    settings = results["settings"]
    yield Heading("Losses at equal FLOPs and time")
    table = [
        [name, *(_loss(row[f"loss_at_equal_{cost}"]) for cost in ("useful", "executed", "time"))]
        for name, row in figures["entrants"].items()
    ]
    yield Table(["entrant", "useful FLOPs", "executed FLOPs", "time"], table)
    yield Text(
        f"Mean over seeds of the loss at the step at which an entrant has used the budget of {settings['target']}'s "
        "whole training. An entrant with a more expensive step is read before the end of its schedule, where its "
        "learning rate is still high, which counts against it; one with a cheaper step has its final loss."
        f"{_without_time(results)}"
    )


def _significance(results: Results, figures: dict[str, Any]) -> Iterator[Block]:
    settings = results["settings"]
    compared = settings["compared"]
    yield Heading(f"Differences from {compared}")
    table = []
    for name, row in figures["entrants"].items():
        if name == compared:
            continue
        loss, trained, steps = row["loss_test"], row["trained_loss_test"], row["crossing_test"]
        factors = [None if steps[key] is None else math.exp(steps[key]) for key in _BOUNDS]
        table.append(
            [
                name,
                *_loss_cells(loss),
                *_loss_cells(trained)[:2],
                _interval(factors, ".3f"),
                _p_value(steps),
                _verdict(steps, "earlier", "later"),
            ]
        )
    columns = ["entrant", "loss", "p", f"than {compared}", "loss as trained", "p", "steps to target, ratio", "p"]
    yield Table([*columns, f"than {compared}"], table)
    if compared == settings["target"]:
        steps = (
            f"Steps: those in which an entrant reaches the final loss of {compared} with the same seed, over all steps "
            f"of {compared}; there is no test where a seed does not reach it."
        )
    else:
        steps = (
            "There is no test of the steps where a seed misses the target. Steps of "
            f"{settings['target']}: all of them, and those of {compared} to its loss of the same seed."
        )
    yield Text(
        f"Mean differences of the final losses and mean ratios of the steps to the target, entrant and {compared} "
        "paired by seed, with 95 % confidence intervals, which are not corrected for their number. Loss: in the "
        "evaluated modes; as trained: both in the mode of training. p: of paired two-sided t-tests of each loss and of "
        "the logarithm of the steps, corrected over the entrants by Holm's method; significant below "
        f"{SIGNIFICANCE}. {steps}"
    )
    if pairs := figures["pairs"]:
        yield Table(
            ["entrants", "loss", "p", "than the second", "loss as trained", "p", "than the second"],
            [
                [" - ".join(row["pair"]), *_loss_cells(row["loss_test"]), *_loss_cells(row["trained_loss_test"])]
                for row in pairs
            ],
        )
        yield Text("The same for the pairs of the study file, the first less the second; p corrected over these pairs.")


def _loss_cells(test: Mapping[str, Any]) -> list[str]:
    return [_interval([test[key] for key in _BOUNDS], "+.4f"), _p_value(test), _verdict(test, "lower", "higher")]


def _verdict(test: Mapping[str, Any], below: str, above: str) -> str:
    if test["holm"] is None:
        return "not tested"
    if test["holm"] >= SIGNIFICANCE:
        return "not significant"
    return below if test["difference"] < 0 else above


def _p_value(test: Mapping[str, Any]) -> str:
    return test["reason"] if test["holm"] is None else f"{test['holm']:.2g}"


def _interval(bounds: Sequence[float | None], form: str) -> str:
    """The cell of a difference and of its confidence interval, by `_BOUNDS`."""
    value, low, high = bounds
    if value is None:
        return "-"
    return format(value, form) + ("" if low is None or high is None else f" ({low:{form}} to {high:{form}})")


def _tuning(results: Results) -> Iterator[Block]:
    settings, table = results["settings"], []
    yield Heading("Tuning")
    for name, entrant in results["entrants"].items():
        tuning = entrant["tuning"]
        remark = "at an end of the grid" if tuning["at_end"] else ""
        if not tuning["complete"]:
            remark = "not complete"
        elif tuning["chosen"] is None:
            remark = "no rate of the grid trains"
        points = ", ".join(f"{rate:.4g}: {_loss(loss)}" for rate, loss in grid_losses(results, name).items())
        rate = "-" if tuning["chosen"] is None else f"{tuning['chosen']:.4g}"
        table.append([name, rate, str(len(tuning_losses(results, name))), remark, points])
    yield Table(["entrant", "learning rate", "runs", "remark", "final losses"], table)
    yield Text(
        f"The peak learning rate, in factors of 2 around the entrant's default, {settings['steps']:,} steps each, seed "
        f"{settings['tuning_seed']}; while the best rate was at an end, the grid was extended by one (limit: "
        f"{settings['max_extensions']}). The compared runs have other seeds. Runs: all that tuned the entrant."
    )
    by_number: dict[int, list[str]] = {}
    for name, entrant in results["entrants"].items():
        by_number.setdefault(len(entrant["candidates"]) or 1, []).append(name)
    if len(by_number) > 1:
        numbers = "; ".join(f"{number} of {', '.join(names)}" for number, names in sorted(by_number.items()))
        yield Text(f"Warning: entrants are tuned unequally, by different numbers of candidates: {numbers}.")
    yield from _alternatives(results)
    yield Plot("tuning", _tuning_plot(results), "Final loss over the learning rate; filled: chosen.")


def _alternatives(results: Results) -> Iterator[Block]:
    """Yield the table of the candidates of entrants that have alternatives."""
    table = []
    for name, entrant in results["entrants"].items():
        losses = tuning_losses(results, name)
        for candidate, about in entrant["candidates"].items():
            differences = _differences(entrant["candidates"][name], about)
            fields = ", ".join(f"{field} = {value} instead of {before}" for field, before, value in differences)
            loss, remark = _loss(losses.get(about["run"])), "chosen" if candidate == entrant["candidate"] else ""
            table.append([name, candidate.removeprefix(f"{name}-"), fields or "the entrant's own", loss, remark])
    if not table:
        yield Text("No other field was tuned.")
        return
    yield Table(["entrant", "candidate", "config", "final loss", "remark"], table)
    yield Text(
        "Alternatives: a second knob of these entrants. Each candidate was trained once, at the entrant's default "
        "learning rate, with the seed of the tuning, and the one with the lowest final loss was chosen, the entrant's "
        "own among equal ones. Its learning rate was then tuned, with this run as a point of the grid."
    )


def _stability(results: Results) -> Iterator[Block]:
    yield Heading("Stability")
    table = []
    for name in results["entrants"]:
        row = stability(results, name)
        variation = "-" if row["variation"] is None else f"{row['variation']:.1%}"
        table.append([name, _span(row["span"]), *map(_change, row["changes"].values()), variation])
    columns = ["entrant", f"rates within {TOLERANCE:.0%} of the lowest loss", "loss at half the rate", "at twice"]
    yield Table([*columns, "at four times", "variation of the gradient norm"], table)
    yield Text(
        f"Rates and losses: of the tuning runs, one seed ({results['settings']['tuning_seed']}), so that they vary by "
        "as much as the losses of the seeds do. Rates: the span in which the final loss is close to the lowest one, "
        "and the ratio of its ends, by a monotone cubic over the logarithm of the rate; > where the grid ends inside "
        "of it. Losses: relative to that at the chosen rate. Variation: RMS difference of successive logged gradient "
        "norms, before clipping, over the square root of 2 and their mean, in the second half of the seeds' runs, mean "
        "over seeds; none if a seed diverged."
    )


def _change(value: float | None) -> str:
    return "-" if value is None else "diverged" if math.isinf(value) else f"{value:+.1%}"


def _span(span: RateSpan) -> str:
    if span.low is None or span.high is None:
        return "-"
    bound = "> " * (span.open_below or span.open_above)
    return f"{span.low:.2g} to {span.high:.2g}, x {bound}{span.high / span.low:.1f}"


def _balance(results: Results) -> Iterator[Block]:
    table = []
    for name in results["entrants"]:
        for metric, values in layer_metrics(results, name).items():
            table.append([name, metric, " ".join(f"{value:.3g}" for value in values)])
    if not table:
        return
    yield Heading("Drops, load and other metrics of the layers")
    yield Table(["entrant", "metric", "by block"], table)
    yield Text(
        "Means over the last tenth of training and over seeds. `dropped`: share of the choices, or of the tokens, "
        "that no expert processes; `load_max`: load of the fullest expert relative to an even one; "
        "`experts_per_token`: number of experts that process a token; entropies are relative to uniform weights; "
        "`update_ratio`: RMS of the layer's output over that of the residual stream; of ReLU routing, `gate_l1`: sum "
        "of the gates of a token, and `l1_weight`: weight of the loss of the gates."
    )


def _costs(results: Results, figures: dict[str, Any]) -> Iterator[Block]:
    settings, times, table = results["settings"], results["times"], []
    yield Heading("Cost of a step")
    reference = results["entrants"][settings["target"]]
    for name, about in results["entrants"].items():
        timed = (times or {"rows": {}})["rows"].get(name)
        row = figures["entrants"][name]
        compiler = timed and timed["compiler_flops"]
        table.append(
            [
                name,
                f"{about['useful_flops'] / 1e9:,.3f}",
                f"{about['useful_flops'] / reference['useful_flops']:.2f}",
                f"{about['executed_flops'] / 1e9:,.3f}",
                f"{compiler / 1e9:,.3f}" if compiler else "-",
                f"{1e3 * row['step_seconds']:,.2f}" if timed else "-",
                _interval([row["time_ratio"], *(row["time_interval"] or (None, None))], ".2f"),
            ]
        )
    columns = ["entrant", "GFLOP useful", "ratio", "executed", "by the compiler", "ms", "ratio"]
    yield Table(columns, table)
    yield Text(
        "Useful FLOPs: 3 x the forward pass by this project's accounting, with a token's experts only. Executed: with "
        "empty slots of experts, also those of blocks that are filled in part, and products that move tokens, without "
        "recomputation. By the compiler: XLA's count of the compiled step, with the optimizer and recomputation; it "
        "counts the body of a scan once. Ratios are to " + settings["target"] + "."
    )
    if times is None:
        yield Text("Step times have not been measured: mot bench train measures them after the last run.")
        return
    sittings, advice = times["sittings"], ""
    if len(sittings) == 1:
        advice = " One sitting gives no interval; mot bench train with --times adds another one."
    commits = ", ".join(dict.fromkeys(sitting["commit"] for sitting in sittings))
    yield Text(
        f"Step times: medians of sittings of {times['rounds']} rounds, in which the trained models take turns on a "
        f"batch of their text; ms: the median sitting. On {_about(sittings[-1]['machine'])}, commit {commits}. Ratios: "
        "geometric means of those of the sittings, below, with 95 % intervals by a t distribution over the "
        f"logarithms.{advice}"
    )
    rows = {name: row["seconds"] for name, row in times["rows"].items()}
    others = [name for name in rows if name != settings["target"]] if settings["target"] in rows else []
    table = []
    for i, sitting in enumerate(sittings):
        share, (before, after) = sitting["share_of_others"], sitting["load_averages"]
        base = rows.get(settings["target"])
        ratios = [f"{time_ratio([rows[name][i]], [base[i]])[0]:.3f}" for name in others] if base else []
        load = ["-" if share is None else f"{share:.1%}", f"{before:.1f}, {after:.1f}"]
        table.append([sitting["start"], *ratios, *load])
    yield Table(["sitting", *others, "CPU time of others", "load"], table)
    yield Text(
        f"Ratios to {settings['target']} by sitting; the share of the CPU time of all cores that other processes used; "
        "load averages before and after it, with the study's own load."
    )


def _configs(results: Results) -> Iterator[Block]:
    settings, entrants = results["settings"], results["entrants"]
    yield Heading("Differences between the configs")
    target, table = entrants[settings["target"]], []
    for name, about in entrants.items():
        table += [[name, *difference] for difference in _differences(target, about)]
    yield Table(["entrant", "field", settings["target"], "value"], table)
    chosen = "the config of an entrant with alternatives is that of the chosen candidate"
    if undecided := [name for name, about in entrants.items() if about["candidate"] is None]:
        chosen += f", and without its alternatives while none is chosen, as for {_list(undecided)}"
    yield Text(
        "All other fields are equal, except for those that only one of the two kinds has and that have their default; "
        f"`{FILE}` has the whole configs. The learning rate is that before tuning; {chosen}."
    )
    trained = {
        name: ", ".join(f"{field} = {value}" for field, value in about.get("trained_with", {}).items())
        for name, about in entrants.items()
    }
    if lines := [f"{name}: {fields}" for name, fields in trained.items() if fields]:
        yield Text(
            "Runs, or some of them, were trained with other values of these fields, which change results by rounding "
            "only, and times:"
        )
        yield Lines(lines)


def _differences(reference: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield fields of the configs of two entrants that differ, with both values, without defaults of one kind only."""
    kind = "model.feed_forward"
    fields, defaults = (
        [_flat(entrant["config"]) for entrant in (reference, about)],
        [_flat(entrant["kind_defaults"], kind) for entrant in (reference, about)],
    )
    for field in fields[0] | fields[1]:
        sides = [side for side in (0, 1) if field in fields[side]]
        is_default = len(sides) == 1 and fields[sides[0]][field] == defaults[sides[0]].get(field)
        values = [str(side.get(field, "-")) for side in fields]
        if values[0] != values[1] and not is_default:
            yield field, values[0], values[1]


def _flat(config: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {path: config}
    fields: dict[str, Any] = {}
    for name, value in config.items():
        fields |= _flat(value, f"{path}.{name}" if path else name)
    return fields


def _conditions(results: Results) -> Iterator[Block]:
    data, settings = results["data"], results["settings"]
    yield Heading("Data, machine and versions")
    corpus = " + ".join(data["corpus"])
    lines = [f"text: {corpus}, {data['train']} and {data['validation']}, tokenizer {data['tokenizer']}"]
    if data.get("train_windows"):
        epochs = f"{data['epochs']:.3g} epochs"
        lines.append(f"{data['train_windows']:,} training windows; the steps of a run are {epochs}")
    if data.get("validation_windows"):
        lines.append(f"{data['validation_windows']:,} validation windows, {data['validation_tokens']:,} tokens")
    if data.get("validation_filled") is not None:
        lines.append(f"validation groups are filled to {data['validation_filled']:.0%}; the rest is padding")
    lines += data.get("warnings") or []
    if data.get("fingerprints"):
        lines += [f"fingerprint of {name}: {value}" for name, value in sorted(data["fingerprints"].items())]
    lines.append(f"seeds {_list(settings['seeds'])}, of the initial values and of the order of the text")
    lines += [f"machine {number}: {_about(machine)}" for number, machine in enumerate(results["machines"], 1)]
    lines += [f"commit: {commit}" for commit in results["commits"]]
    lines.append(f"command: {results['command']}")
    if results["other_runs"]:
        lines.append(f"runs in the directory that the study does not have: {', '.join(results['other_runs'])}")
    diverged = [run["name"] for run in results["runs"] if run["state"] == "diverged"]
    lines.append(f"diverged runs, each an infinite loss: {', '.join(diverged) or 'none'}")
    skipped = [f"{run['name']} ({run['skipped_steps']})" for run in results["runs"] if run["skipped_steps"]]
    lines.append(f"runs with skipped steps, whose loss or gradient was not finite: {', '.join(skipped) or 'none'}")
    if others := [run["name"] for run in results["runs"] if run["same_text"] is False]:
        lines.append(f"warning: runs with another text than the first one: {', '.join(others)}")
    yield Lines(lines)


def _refutation(results: Results) -> Iterator[Block]:
    settings, command = results["settings"], results["command"].partition(" --")[0]
    seeds = [name for name in results["entrants"] if name in (settings["target"], settings["compared"])]
    yield Heading("How to refute this")
    yield Text("Each of these would show that a conclusion above is wrong:")
    yield Lines(
        [
            "A run that gives another loss. The same commit, machine, Python and jax give the same numbers to the bit: "
            "train one run again in another directory, as below, and compare.",
            "Fresh seeds: change `seeds` in the study file. A difference that is not significant may be one of chance; "
            "a significant one should remain.",
            f"A better learning rate of {settings['target']} or of any entrant outside of the grid above, above all "
            "where the best one is at an end of it, or another knob, such as the weight of an auxiliary loss, tuned "
            "with the same number of runs for every entrant (`alternatives` in the study file).",
            "A longer training or larger models, at which the order of the entrants changes: the study holds for its "
            f"{settings['steps']:,} steps and its sizes only.",
            "An entrant whose tokens depend on later ones: tests/nn/feed_forward/test_every_kind.py has the tests of "
            "causality of every kind, by gradient of the layer and by perturbation of the model's tokens.",
            "FLOPs that are counted wrongly: the table of costs has two counts, and tests/cost/ compares the "
            "accounting with the compiler, and the parameters with those that the papers state.",
            "Times on another machine: `mot bench step` compares two configs.",
            f"The figures themselves: `{FILE}` has all losses, `{ROWS_FILE}` the rows of the runs, and "
            "`mot bench report` computes this page from the former.",
        ]
    )
    runs = [_default_run(name, results["entrants"][name]) for name in seeds]
    yield Code("\n".join(f"{command} --workdir again --run {run}" for run in runs))


def _default_run(name: str, entrant: Mapping[str, Any]) -> str:
    """The run of the chosen candidate at the learning rate before tuning, which needs no other run."""
    rate = entrant["config"]["training"]["optimizer"]["learning_rate"]
    return f"{entrant['candidate'] or name}-rate-{rate:.6g}"


def _about(machine: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def _loss(value: float | None) -> str:
    return "-" if value is None else "infinite" if math.isinf(value) else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "-" if value is None else "infinite" if math.isinf(value) else f"{value:.2f}"


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


# --- plots ------------------------------------------------------------------------------------------------------------


def _curves_plot(results: Results, names: Sequence[str], target: float | None) -> str:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in names:
        curves = [dict(curve_of(run)) for run in _ended(results, name)]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        means = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
        points = [(step, mean) for step, mean in zip(steps, means, strict=True) if math.isfinite(mean)]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=name, **_style(results, name))
    if target is not None:
        axes.axhline(target, color="gray", linestyle="--")
    axes.set(xlabel="step", ylabel="loss in nats per token")
    return _svg(figure, "curves")


def _tuning_plot(results: Results) -> str:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    rates: set[float] = set()
    for name, entrant in results["entrants"].items():
        points = [(rate, loss) for rate, loss in grid_losses(results, name).items() if math.isfinite(loss)]
        if points:
            style, chosen = (
                _style(results, name),
                [point for point in points if point[0] == entrant["tuning"]["chosen"]],
            )
            axes.plot(*zip(*points, strict=True), marker="o", markerfacecolor="white", label=name, **style)
            axes.plot([rate for rate, _ in chosen], [loss for _, loss in chosen], "o", color=style["color"])
            rates |= {rate for rate, _ in points}
    axes.set_xticks(sorted(rates), [f"{rate:.3g}" for rate in sorted(rates)])
    axes.set(xlabel="learning rate", ylabel="final loss in nats per token")
    return _svg(figure, "tuning")


def _style(results: Results, entrant: str) -> dict[str, Any]:
    """The color and line of an entrant in the plots."""
    index = [*results["entrants"]].index(entrant)
    return {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else ":"}


def _svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element, the same for the same data. name: makes its identifiers unique in the page."""
    (axes,) = figure.axes
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :]  # without the XML declaration


# --- formats ----------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
div.table { overflow-x: auto } table { border-collapse: collapse; font-size: 14px }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #e5e5e5; vertical-align: top }
th:first-child, td:first-child { text-align: left; white-space: nowrap } td { font-variant-numeric: tabular-nums }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto } figure { margin: 1rem 0 }
figcaption { color: #555; font-size: 14px } svg { max-width: 100%; height: auto } li { overflow-wrap: anywhere }
"""


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """A page that refers to no other file."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    body = "\n".join(_html_block(block) for block in blocks)
    page = f"<head>{head}<style>{_STYLE}</style></head>\n<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>"
    return f'<!DOCTYPE html>\n<html lang="en">\n{page}\n</html>\n'


def _html_block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Lines(lines):
            return "<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in lines) + "</ul>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Table(columns, rows):
            head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
            table_rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
            cells = "".join(f"<tr>{row}</tr>\n" for row in table_rows)
            return f'<div class="table"><table>\n<tr>{head}</tr>\n{cells}</table></div>'
        case Plot(_, svg, caption):
            return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _inline(text: str) -> str:
    """Text with code between backquotes, as HTML."""
    return re.sub("`(.*?)`", r"<code>\1</code>", html.escape(text))


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The same as Markdown, with links to the files of its plots."""
    return "\n\n".join([f"# {title}", *map(_markdown_block, blocks)]) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Text(text):
            return text
        case Lines(lines):
            return "\n".join(f"- {line}" for line in lines)
        case Code(text):
            return f"```bash\n{text}\n```"
        case Table(columns, rows):
            cells = [columns, ["---"] * len(columns), *rows]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
        case Plot(name, _, caption):
            return f"![{caption}]({name}.svg)\n\n*{caption}*"
