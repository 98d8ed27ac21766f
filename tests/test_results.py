"""Published results are those of the JSON next to them, and so are the figures that pages take from them."""

from __future__ import annotations

import functools
import gzip
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
from etils import epath

from mot_jax.benchmark.study.analysis import analyze, curve_of, final_loss, seed_runs, stability
from mot_jax.benchmark.study.report import write_report
from mot_jax.benchmark.study.results import load
from mot_jax.benchmark.study.statistics import compare, crossing, holm, summary, time_ratio

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
STUDIES = sorted(path.parent.name for path in RESULTS.glob("*/results.json"))

Row = dict[str, Any]
Texts = Iterator[tuple[str, str]]  # a page, and a row of a table or a part of a sentence that it has


@functools.cache
def results_of(study: str) -> Row:
    return load(epath.Path(RESULTS / study))


@functools.cache
def figures_of(study: str) -> Row:
    results = results_of(study)
    return analyze(results) | {"stability": {name: stability(results, name) for name in results["entrants"]}}


@pytest.mark.parametrize("study", STUDIES)
def test_a_published_report_is_rebuilt_from_its_results(study, tmp_path):
    """The plots depend on the version of Matplotlib."""
    write_report(epath.Path(RESULTS / study), epath.Path(tmp_path))
    assert (RESULTS / study / "report.md").read_text() == (tmp_path / "report.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} <= {path.name for path in (RESULTS / study).iterdir()}


@pytest.mark.parametrize("study", STUDIES)
def test_rows_of_metrics_end_with_the_losses_of_the_results(study):
    """The last evaluation in the compared mode of each run, in the published rows."""
    results, last = results_of(study), {}
    with gzip.open(RESULTS / study / "rows.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            if row["split"] == "validation":
                last[row["run"], row.get("mode", "trained")] = row["step"], row["loss"]
    for run in results["runs"]:
        if run["state"] == "finished":
            mode = results["entrants"][run["entrant"]]["headline_mode"]
            assert last[run["name"], mode] == (run["steps"], run["loss"]), run["name"]


# --- cells ------------------------------------------------------------------------------------------------------------


def signed(value: float, digits: str) -> str:
    text = f"{value:+{digits}}".replace("+", "+ ").replace("-", "\N{MINUS SIGN} ")
    return text.replace("%", " %")


def ratio(value: float | None) -> str:
    return "\N{EN DASH}" if value is None or math.isinf(value) else f"{value:.2f}"


def percents(row: Row) -> str:
    """The time to the target in percent, with its bounds."""
    low, high = row["time_bounds"]
    return f"{100 * row['time_to_target']:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def with_bounds(value: float | None, bounds: tuple[float, float] | None) -> str:
    return ratio(value) + ("" if bounds is None else " ({:.2f} to {:.2f})".format(*bounds))


def loss_of(row: Row) -> str:
    return f"{row['loss']['mean']:.3f}"


def trained_loss_of(row: Row) -> str:
    return f"{row['trained_loss']['mean']:.3f}"


def loss_with_deviation(row: Row) -> str:
    return f"{loss_of(row)} ± {row['loss']['sd']:.3f}"


def p_value(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def compared_of(row: Row) -> str:
    """The difference of the loss from that of the compared entrant, which has none."""
    test = row["loss_test"]
    return "\N{EN DASH}" if test is None else f"{signed(test['difference'], '.3f')} ({p_value(test['holm'])})"


def difference(test: Row) -> str:
    """A difference of losses with its 95 % interval."""
    low, high = (signed(test[name], ".3f") for name in ("low", "high"))
    return f"{signed(test['difference'], '.3f')} ({low} to {high})"


def steps_of(row: Row) -> str:
    """The median of the steps to the target, or the number of seeds that reach it, if most do not."""
    reached, seeds, median = (row["crossing"][name] for name in ("reached", "of", "median"))
    return f"{reached} of {seeds} seeds" if math.isinf(median) else ratio(row["steps_to_target"])


def time_of(row: Row) -> str:
    return with_bounds(row["time_to_target"], row["time_bounds"])


def time_against(study: str, entrant: str, reference: str) -> str:
    """The time in which an entrant reaches dense's loss of the same seed, as a share of that of another entrant."""
    results = results_of(study)
    targets = {seed: final_loss(run) for seed, run in seed_runs(results, "dense").items()}
    logs = []
    for name in (entrant, reference):
        steps = {seed: crossing(curve_of(run), targets[seed]) for seed, run in seed_runs(results, name).items()}
        logs.append({seed: math.log(step) for seed, step in steps.items()})
    test, rows = compare(*logs), results["times"]["rows"]
    step, bounds = time_ratio(rows[entrant]["seconds"], rows[reference]["seconds"])
    assert test.low is not None and test.high is not None and bounds is not None
    return with_bounds(
        math.exp(test.difference) * step, (math.exp(test.low) * bounds[0], math.exp(test.high) * bounds[1])
    )


def corrected_upper_bound(study: str, entrant: str, number: int) -> str:
    """The upper bound of the time to the target with a correction (Bonferroni's) for a number of entrants."""
    row, rows = figures_of(study)["entrants"][entrant], results_of(study)["times"]["rows"]
    seeds, sittings, bound = row["loss"]["of"], len(rows[entrant]["seconds"]), 0.0
    step = [math.log(end) for end in row["time_interval"]]
    for low, high, size in ((row["crossing_test"]["low"], row["crossing_test"]["high"], seeds), (*step, sittings)):
        wider = scipy.stats.t.ppf(1 - 0.025 / number, size - 1) / scipy.stats.t.ppf(0.975, size - 1)
        bound += (low + high) / 2 + wider * (high - low) / 2
    return f"{math.exp(bound):.2f}"


def recipe_cells(row: Row) -> list[str]:
    """The cells of an entrant of the studies of recipes and of sizes."""
    cells = [loss_with_deviation(row), compared_of(row)]
    if row["loss_test"] is None:  # the target
        return [*cells, "1", "1", "1", "1"]
    step = with_bounds(row["time_ratio"], row["time_interval"])
    return [*cells, steps_of(row), ratio(row["executed_to_target"]), step, time_of(row)]


def stability_cells(figures: Row, name: str) -> list[str]:
    """The cells of an entrant in docs/results/stability.md."""
    of = figures["stability"][name]
    span = f"{of['span'].high / of['span'].low:.1f}"
    span = f"> {span}" if of["span"].open_below or of["span"].open_above else span
    changes = ["\N{EN DASH}" if change is None else signed(change, ".1%") for change in of["changes"].values()]
    return [
        span,
        *changes,
        f"{figures['entrants'][name]['loss']['sd']:.3f}",
        f"{of['variation']:.1%}".replace("%", " %"),
    ]


def line(*cells: str) -> str:
    """A row of a table, or its last cells."""
    return f"| {' | '.join(cells)} |"


# --- pages ------------------------------------------------------------------------------------------------------------


def of_demo(figures: Row) -> Texts:
    rows, changes = figures["entrants"], {name: of["changes"] for name, of in figures["stability"].items()}
    for name, row in rows.items():
        costs = [steps_of(row), ratio(row["time_ratio"]), ratio(row["time_to_target"])]
        yield "README.md", line(loss_of(row), *costs)
        shortest = [ratio(tried["shortest"]) for tried in (row["horizon"] or {}).values()]
        cells = [loss_with_deviation(row), trained_loss_of(row), compared_of(row), steps_of(row)]
        cells += ["1.00" if name == "dense" else ", ".join(shortest), ratio(row["executed_to_target"])]
        yield "docs/results/demo.md", line(f"`{name}`", *cells, *costs[1:], signed(changes[name][4.0], ".1%"))
        yield "docs/results/stability.md", line(f"`{name}`", *stability_cells(figures, name))
    loss, mixture = {name: loss_of(row) for name, row in rows.items()}, rows["mixture_of_tokens"]
    rivals = f"token choice {loss['token_choice']}, hash layers {loss['hash']} nats"
    yield "docs/results/index.md", f"MoT {loss['mixture_of_tokens']}, dense {loss['dense']}, {rivals}"
    steps, step, time = (ratio(mixture[name]) for name in ("steps_to_target", "time_ratio", "time_to_target"))
    yield "docs/when.md", f"after {steps} of the steps, each {step} times as long: {time} of the time"
    wide = f"{loss['dense']} of dense and {loss['dense_equal_flops']} of dense with as many FLOPs"
    yield "docs/when.md", f"{trained_loss_of(mixture)} nats in groups against {wide}"
    biased = f"with bias balancing {loss['token_choice_bias']}, MoT {loss['mixture_of_tokens']}"
    yield "docs/when.md", f"hash layers {loss['hash']} nats, token choice {loss['token_choice']}, {biased}"
    mixture, hashed, dense, routed = (
        f"{changes[name][4.0]:.1%}".replace("%", " %")
        for name in ("mixture_of_tokens", "hash", "dense", "token_choice")
    )
    rivals = f"of hash layers by {hashed}, of dense by {dense}, of token choice by {routed}"
    yield "docs/when.md", f"the loss of MoT is higher by {mixture}, {rivals}"
    yield "docs/results/index.md", f"at four times the best rate + {mixture} for MoT, + {routed} for token choice"


def of_recipe(figures: Row) -> Texts:
    rows, changes = figures["entrants"], {name: of["changes"] for name, of in figures["stability"].items()}
    for name, row in rows.items():
        yield "docs/results/recipe.md", line(f"`{name}`", *recipe_cells(row))
        yield "docs/results/stability.md", line(f"`{name}`", *stability_cells(figures, name))
    for name in ("first_block_hash", "first_block_token_choice", "first_block", "dense_equal_flops"):
        row = rows[name]
        yield "README.md", line(loss_of(row), steps_of(row), ratio(row["time_ratio"]), time_of(row))
    names = [f"first_block{kind}" for kind in ("_hash", "_token_choice", "")]
    against = [time_against("recipe", name, "dense_equal_flops") for name in names]
    hashed, routed, mixture = (rows[name] for name in names)
    times = [ratio(row["time_to_target"]) for row in (hashed, routed)]
    page = "docs/results/recipe.md"
    yield page, f"in {times[0]} of its time on two CPU cores, and in {against[0]} of that of the wider"
    yield page, f"in {times[1]} of the time, and in {against[1]} of the wider model's"
    yield page, f"in {time_of(mixture)} of the time, and in {against[2]} of the wider model's"
    hashed_bound, routed_bound, bound = (corrected_upper_bound("recipe", name, 7) for name in names)
    bounds = f"its upper bound is {bound}, that of token choice {routed_bound}, of hash layers {hashed_bound}"
    yield page, f"With a correction for seven recipes {bounds}"
    yield "docs/when.md", f"MoT after {time_of(mixture)}, up to {bound} if corrected for seven recipes"
    step = f"a step of MoT takes {ratio(mixture['time_ratio'])} times dense's"
    rivals = f"hash layers {times[0]}, token choice {times[1]}"
    yield "docs/results/index.md", f"{rivals}, MoT {time_of(mixture)} of dense's time; {step}"
    yield "docs/results/index.md", percents(mixture)
    everywhere = rows["mixture_of_tokens"]
    time, step = ratio(everywhere["time_to_target"]), ratio(everywhere["time_ratio"])
    yield "docs/results/index.md", f"MoT {time}, a step {step} times dense's (Intel Xeon)"
    page = "docs/when.md"
    yield (
        page,
        f"{time_of(hashed)} of its time, token choice there after {time_of(routed)}, MoT after {time_of(mixture)}",
    )
    yield page, f"MoT needs {time} of the time in the study of recipes"
    twice, half = ([signed(changes[name][factor], ".1%") for name in ("first_block", "dense")] for factor in (2.0, 0.5))
    yield page, f"at twice the best rate {' against '.join(twice)}, at half of it {' against '.join(half)}"
    yield from of_group_sizes()


def of_group_sizes() -> Texts:
    losses = json.loads((RESULTS / "recipe" / "group_sizes.json").read_text())["losses"]
    for model, by_size in losses.items():
        means = [f"{statistics.fmean(by_size[size].values()):.3f}" for size in ("8", "16", "32", "64")]
        yield "docs/inference.md", line(f"`{model}`", *means)


def of_scale_d64(figures: Row) -> Texts:
    rows = figures["entrants"]
    for name, row in rows.items():
        yield "docs/results/scale.md", line(f"`{name}`", *recipe_cells(row))
    mixture, hashed, routed = (rows[f"first_block{kind}"] for kind in ("", "_hash", "_token_choice"))
    against = [time_against("scale_d64", f"first_block{kind}", "dense_equal_flops") for kind in ("", "_hash")]
    yield "docs/results/scale.md", f"{time_of(mixture)} of its time, and hash layers in {time_of(hashed)}"
    yield "docs/results/scale.md", f"model, seed by seed, in {' and '.join(against)}"
    bound = corrected_upper_bound("scale_d64", "first_block", 4)
    yield "docs/results/scale.md", f"with a correction, that of Mixture of Tokens is {bound}"
    hashed_time = ratio(hashed["time_to_target"])
    rivals = f"hash layers {hashed_time}, token choice {time_of(routed)}"
    yield "docs/results/index.md", f"MoT {time_of(mixture)}, {rivals}"
    yield "docs/results/index.md", f"{percents(mixture)} in a smaller model"
    rivals = f"{hashed_time} for hash layers and {time_of(routed)} for token choice"
    yield "docs/when.md", f"it is {time_of(mixture)} for MoT, {rivals}"


def of_controls(figures: Row) -> Texts:
    rows, (without_experts, dense) = figures["entrants"], (row["loss_test"] for row in figures["pairs"])
    frozen, learned, unshared = (
        compare(rows[name]["losses"], rows["dense"]["losses"])._asdict()
        for name in ("frozen_controller", "mixture_of_tokens", "no_shared_expert")
    )
    page = "docs/results/controls.md"
    for name, row in rows.items():
        costs = [ratio(row[cost]) for cost in ("executed_to_target", "time_ratio", "time_to_target")]
        cells = [loss_with_deviation(row), trained_loss_of(row), compared_of(row), steps_of(row)]
        yield page, line(f"`{name}`", *cells, *costs)
    yield page, f"the difference from `shared_expert_only` is {difference(without_experts)} nats"
    yield page, f"It is worse than dense by {difference(dense)}"
    yield page, f"the difference from dense is {difference(frozen)}"
    yield page, f"that of the learned one from dense {difference(learned)}"
    yield page, f"the difference from the learned one is {difference(rows['frozen_controller']['loss_test'])}"
    of_mixture = difference(rows["no_shared_expert"]["loss_test"])
    left = f"{difference(unshared)}, not planned and not corrected, that from Mixture of Tokens {of_mixture}"
    yield page, f"three quarters of the gain are left**: the difference from dense is {left}"
    yield page, f"with nothing else, the loss is higher by {difference(rows['shared_expert_only']['loss_test'])}"


def of_transition(figures: Row) -> Texts:
    """Losses of this study, of the study of recipes, and of the tuned and continued models of `tuned.json`."""
    rows, recipes = figures["entrants"], figures_of("recipe")["entrants"]
    scores = json.loads((RESULTS / "transition" / "tuned.json").read_text())["seeds"]

    def scored(model: str, mode: str) -> dict[int, float]:
        return {int(seed): by_model[model][mode] for seed, by_model in scores.items()}

    start, tuned = rows["token_choice"]["losses"], scored("tuned", "token_choice")
    continued, before = scored("continued", "companions"), scored("before", "companions")
    models = {
        ("Mixture of Tokens, tuned to token choice", "1,600 + 160"): tuned,
        ("token choice from the start", "1,760"): start,
        ("Mixture of Tokens, continued", "1,600 + 160"): continued,
        ("Mixture of Tokens from the start", "1,760"): rows["mixture_of_tokens"]["losses"],
        ("token choice from the start", "1,600"): recipes["first_block_token_choice"]["losses"],
        ("Mixture of Tokens from the start", "1,600"): before,
    }
    tests = {"start": compare(tuned, start), "continued": compare(tuned, continued)}
    corrected = {name: p_value(p) for name, p in holm({name: test.p for name, test in tests.items()}).items()}
    page = "docs/results/transition.md"
    for model, losses in models.items():
        compared = "\N{EN DASH}" if losses is start else difference(compare(losses, start)._asdict())
        p = f", p = {corrected['start']}" if losses is tuned else ""
        yield page, line(*model, loss_with_deviation({"loss": summary(losses)}), f"{compared}{p}")
    yield page, f"{difference(tests['continued']._asdict())}, p = {corrected['continued']}"
    mixture = rows["mixture_of_tokens"]
    yield (
        page,
        f"takes {with_bounds(mixture['time_ratio'], mixture['time_interval'])} of the time of one of token choice",
    )
    first, second, third, fourth = (f"{statistics.fmean(x.values()):.3f}" for x in (start, tuned, before, continued))
    yield "docs/results/index.md", f"from {third} to {second} nats; token choice from the start has {first} after 1,760"
    yield "docs/results/index.md", f"{second} nats after it, {third} before it"
    yield "docs/when.md", f"end at {first} nats, 1,600 of MoT and 160 of tuning at {second}"
    yield "docs/when.md", f"with as many steps more of mixing it ends at {fourth}"
    labels = {"companions": "`companions`, the default", "token_choice": "`token_choice`, tuned"}
    for mode in ("grouped", "companions", "sparse", "mean_field", "token_choice", "threshold", "discrete"):
        losses = scored("tuned" if mode == "token_choice" else "before", mode)
        row = f"| {labels.get(mode, f'`{mode}`')} | {statistics.fmean(losses.values()):.3f} |"
        yield "docs/notes/2026-12-01-decoding-first-block.md", row


PAGES: dict[str, Callable[[Row], Texts]] = {
    "demo": of_demo,
    "recipe": of_recipe,
    "scale_d64": of_scale_d64,
    "controls": of_controls,
    "transition": of_transition,
}


@pytest.mark.parametrize("study", STUDIES)
def test_pages_have_the_figures_of_the_studies(study):
    def spaced(text: str) -> str:
        return re.sub(r"\s+", " ", text)

    texts = list(PAGES[study](figures_of(study)))
    missing = [(page, text) for page, text in texts if spaced(text) not in spaced((ROOT / page).read_text())]
    assert texts and not missing
