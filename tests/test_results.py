"""Published results are those of the JSON next to them, and so are the figures that other pages take from them."""

from __future__ import annotations

import gzip
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from mot_jax.benchmark.study.analysis import analyze, curve_of, final_loss, seed_runs, stability
from mot_jax.benchmark.study.report import write_report
from mot_jax.benchmark.study.results import load
from mot_jax.benchmark.study.statistics import compare, crossing, holm, summary, time_ratio

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
STUDIES = sorted(path.parent for path in RESULTS.glob("*/results.json"))
assert STUDIES


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_published_report_is_rebuilt_from_its_results(study, tmp_path):
    """The plots depend on the version of Matplotlib."""
    write_report(epath.Path(study), epath.Path(tmp_path))
    assert (study / "report.md").read_text() == (tmp_path / "report.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} <= {path.name for path in study.iterdir()}


def loss(entrant: str) -> Callable[[dict[str, Any]], str]:
    return lambda figures: f"{figures['entrants'][entrant]['loss']['mean']:.3f}"


def as_trained(entrant: str) -> Callable[[dict[str, Any]], str]:
    return lambda figures: f"{figures['entrants'][entrant]['trained_loss']['mean']:.3f}"


def cost(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda figures: f"{figures['entrants']['mixture_of_tokens'][name]:.2f}"


def at_four_times_the_rate(entrant: str) -> Callable[[dict[str, Any]], str]:
    return lambda figures: f"{figures['stability'][entrant]['changes'][4.0]:.1%}".replace("%", " %")


# Sentences of pages, with a figure of the demo study in place of each brace.
CITED: list[tuple[str, str, list[Callable[[dict[str, Any]], str]]]] = [
    (
        "docs/results/index.md",
        "MoT {}, dense {}, token choice {}, hash layers {} nats",
        [*map(loss, ("mixture_of_tokens", "dense", "token_choice", "hash"))],
    ),
    (
        "docs/when.md",
        "after {} of the steps, each {} times as long: {} of the time",
        [cost("steps_to_target"), cost("time_ratio"), cost("time_to_target")],
    ),
    (
        "docs/when.md",
        "{} nats in groups against {} of dense and {} of dense with as many FLOPs",
        [as_trained("mixture_of_tokens"), loss("dense"), loss("dense_equal_flops")],
    ),
    (
        "docs/when.md",
        "hash layers {} nats, token choice {}, with bias balancing {}, MoT {}",
        [*map(loss, ("hash", "token_choice", "token_choice_bias", "mixture_of_tokens"))],
    ),
    (
        "docs/when.md",
        "the loss of MoT is higher by {}, of hash layers by {}, of dense by {}, of token choice by {}",
        [*map(at_four_times_the_rate, ("mixture_of_tokens", "hash", "dense", "token_choice"))],
    ),
]


def figures_of(study: str) -> dict[str, Any]:
    results = load(epath.Path(RESULTS / study))
    return analyze(results) | {"stability": {name: stability(results, name) for name in results["entrants"]}}


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    return figures_of("demo")


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return figures_of("recipe")


def test_rows_of_metrics_end_with_the_losses_of_the_results():
    """The last evaluation in the compared mode of each run, in the published rows."""
    results, last = load(epath.Path(RESULTS / "demo")), {}
    with gzip.open(RESULTS / "demo" / "rows.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            if row["split"] == "validation":
                last[row["run"], row.get("mode", "trained")] = row["step"], row["loss"]
    for run in results["runs"]:
        if run["state"] == "finished":
            mode = results["entrants"][run["entrant"]]["headline_mode"]
            assert last[run["name"], mode] == (run["steps"], run["loss"]), run["name"]


def signed(value: float, digits: str) -> str:
    text = f"{value:+{digits}}".replace("+", "+ ").replace("-", "\N{MINUS SIGN} ").replace("%", " %")
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def ratio(value: float | None) -> str:
    return "\N{EN DASH}" if value is None or math.isinf(value) else f"{value:.2f}"


def loss_of(row: dict[str, Any]) -> str:
    return f"{row['loss']['mean']:.3f} ± {row['loss']['sd']:.3f}".replace(" ", "\N{NO-BREAK SPACE}")


def p_value(test: dict[str, Any]) -> str:
    return f"{test['holm']:.2g}" if test["holm"] >= 1e-4 else "< 0.0001"


def compared_of(row: dict[str, Any]) -> str:
    """The difference of the loss from that of the compared entrant, which has none."""
    test = row["loss_test"]
    return "\N{EN DASH}" if test is None else f"{signed(test['difference'], '.3f')} ({p_value(test)})"


def steps_of(row: dict[str, Any]) -> str:
    """The median of the steps to the target, or the number of seeds that reach it, if most do not."""
    reached, seeds, median = (row["crossing"][name] for name in ("reached", "of", "median"))
    return f"{reached} of {seeds} seeds" if math.isinf(median) else ratio(row["steps_to_target"])


def summary_of(figures: dict[str, Any], entrant: str) -> list[str]:
    """The cells of an entrant's row in docs/results/demo.md."""
    row, changes = figures["entrants"][entrant], figures["stability"][entrant]["changes"]
    shortest = [ratio(tried["shortest"]) for tried in (row["horizon"] or {}).values()]
    return [
        loss_of(row),
        f"{row['trained_loss']['mean']:.3f}",
        compared_of(row),
        steps_of(row),
        "1.00" if entrant == "dense" else ", ".join(shortest),
        ratio(row["executed_to_target"]),
        ratio(row["time_ratio"]),
        ratio(row["time_to_target"]),
        signed(changes[4.0], ".1%"),
    ]


def readme_cells(figures: dict[str, Any], entrant: str) -> str:
    """The cells of an entrant's row in README.md."""
    row = figures["entrants"][entrant]
    costs = [steps_of(row), ratio(row["time_ratio"]), ratio(row["time_to_target"])]
    return " | ".join([f"{row['loss']['mean']:.3f}", *costs])


def test_the_table_of_the_readme_has_all_figures_of_the_demo_study(demo):
    text = (ROOT / "README.md").read_text()
    for entrant in demo["entrants"]:
        assert f" | {readme_cells(demo, entrant)} |\n" in text, entrant


def test_the_second_table_of_the_readme_has_figures_of_the_study_of_recipes(recipe):
    text = (ROOT / "README.md").read_text()
    for entrant in ("first_block_hash", "first_block_token_choice", "first_block", "dense_equal_flops"):
        row = recipe["entrants"][entrant]
        cells = readme_cells(recipe, entrant).rpartition(" | ")[0]
        assert f" | {cells} | {time_of(row)} |\n" in text, entrant


def test_the_table_of_the_demo_study_has_its_figures(demo):
    page = (RESULTS / "demo.md").read_text()
    for entrant in demo["entrants"]:
        assert f"| `{entrant}` | {' | '.join(summary_of(demo, entrant))} |" in page


def with_bounds(value: float | None, bounds: tuple[float, float] | None) -> str:
    return ratio(value) + ("" if bounds is None else " ({:.2f} to {:.2f})".format(*bounds))


def time_of(row: dict[str, Any]) -> str:
    return with_bounds(row["time_to_target"], row["time_bounds"])


def recipe_cells(row: dict[str, Any]) -> str:
    """The cells of an entrant's row in docs/results/recipe.md."""
    cells = [loss_of(row), compared_of(row)]
    if row["loss_test"] is None:  # the target
        return " | ".join([*cells, "1", "1", "1", "1"])
    step = with_bounds(row["time_ratio"], row["time_interval"])
    return " | ".join([*cells, steps_of(row), ratio(row["executed_to_target"]), step, time_of(row)])


def time_against(study: str, entrant: str, reference: str) -> str:
    """The time in which an entrant reaches dense's loss of the same seed, as a share of that of another entrant."""
    results = load(epath.Path(RESULTS / study))
    targets = {seed: final_loss(run) for seed, run in seed_runs(results, "dense").items()}
    logs = []
    for name in (entrant, reference):
        steps = {seed: crossing(curve_of(run), targets[seed]) for seed, run in seed_runs(results, name).items()}
        logs.append({seed: math.log(step) for seed, step in steps.items()})
    test, rows = compare(*logs), results["times"]["rows"]
    step, bounds = time_ratio(rows[entrant]["seconds"], rows[reference]["seconds"])
    assert test.low is not None and test.high is not None and bounds is not None
    products = math.exp(test.low) * bounds[0], math.exp(test.high) * bounds[1]
    return with_bounds(math.exp(test.difference) * step, products)


def test_when_to_train_has_figures_of_the_study_of_recipes(recipe):
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "when.md").read_text())
    entrants = ("first_block_hash", "first_block_token_choice", "first_block")
    sentence = "dense's loss after {} of its time, token choice there after {}, MoT after {}"
    assert sentence.format(*(time_of(recipe["entrants"][name]) for name in entrants)) in text
    changes = [recipe["stability"][name]["changes"] for name in ("first_block", "dense")]
    rates = [signed(change[factor], ".1%") for factor in (2.0, 0.5) for change in changes]
    sentence = "at twice the best rate {} against {}, at half of it {} against {}"
    assert sentence.format(*rates).replace("\N{NO-BREAK SPACE}", " ") in text


def test_the_table_of_the_study_of_recipes_has_its_figures(recipe):
    page = (RESULTS / "recipe.md").read_text()
    for entrant, row in recipe["entrants"].items():
        assert f"| `{entrant}` | {recipe_cells(row)} |" in page, entrant
    text = re.sub(r"[ \n]+", " ", page)
    for name, sentence in (
        ("first_block_hash", "loss in {} of its time on two CPU cores, and in {} of that of the wider"),
        ("first_block_token_choice", "in {} of the time, and in {} of the wider model's"),
        ("first_block", "in {} ({}) of the time, and in {} of the wider model's"),
    ):
        times = time_of(recipe["entrants"][name])[:-1].split(" (")[: sentence.count("{}") - 1]
        assert sentence.format(*times, time_against("recipe", name, "dense_equal_flops")) in text


def test_the_page_of_sizes_has_the_figures_of_its_studies():
    page = (RESULTS / "scale.md").read_text()
    for study in sorted(RESULTS.glob("scale_*")):
        for entrant, row in figures_of(study.name)["entrants"].items():
            assert f"| `{entrant}` | {recipe_cells(row)} |" in page, (study.name, entrant)
    mixture, hashed = (time_against("scale_d64", f"first_block{kind}", "dense_equal_flops") for kind in ("", "_hash"))
    assert f"model, seed by seed, in {mixture} and {hashed}" in re.sub(r"[ \n]+", " ", page)


def test_pages_have_the_times_of_the_smaller_size():
    rows = figures_of("scale_d64")["entrants"]
    mixture, hashed, routed = (rows[f"first_block{kind}"] for kind in ("", "_hash", "_token_choice"))
    times = f"MoT {time_of(mixture)}, hash layers {ratio(hashed['time_to_target'])}, token choice {time_of(routed)}"
    assert times in (RESULTS / "index.md").read_text()
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "when.md").read_text())
    hashed_time = f"{ratio(hashed['time_to_target'])} for hash layers"
    assert f"it is {time_of(mixture)} for MoT, {hashed_time} and {time_of(routed)} for token choice" in page


def difference(test: dict[str, Any]) -> str:
    """A difference of losses with its 95 % interval."""
    low, high = (signed(test[name], ".3f") for name in ("low", "high"))
    return f"{signed(test['difference'], '.3f')} ({low} to {high})"


def control_cells(row: dict[str, Any]) -> str:
    """The cells of an entrant's row in docs/results/controls.md."""
    trained = f"{row['trained_loss']['mean']:.3f}"
    costs = [row["executed_to_target"], row["time_ratio"], row["time_to_target"]]
    return " | ".join([loss_of(row), trained, compared_of(row), steps_of(row), *map(ratio, costs)])


def control_sentences(figures: dict[str, Any]) -> list[str]:
    rows, (without_experts, dense) = figures["entrants"], (row["loss_test"] for row in figures["pairs"])
    frozen, learned = (
        compare(rows[name]["losses"], rows["dense"]["losses"])._asdict()
        for name in ("frozen_controller", "mixture_of_tokens")
    )
    return [
        f"the difference from `shared_expert_only` is {difference(without_experts)} nats",
        f"It is worse than dense by {difference(dense)}",
        f"the difference from dense is {difference(frozen)}",
        f"that of the learned one from dense {difference(learned)}",
        f"the difference from the learned one is {difference(rows['frozen_controller']['loss_test'])}",
        f"with nothing else, the loss is higher by {difference(rows['shared_expert_only']['loss_test'])}",
    ]


def test_the_page_of_the_controls_has_its_figures():
    page, figures = (RESULTS / "controls.md").read_text(), figures_of("controls")
    for entrant, row in figures["entrants"].items():
        assert f"| `{entrant}` | {control_cells(row)} |" in page, entrant
    for sentence in control_sentences(figures):
        assert sentence in re.sub(r"[ \n]+", " ", page), sentence


def transition_rows() -> dict[str, str]:
    """The rows of docs/results/transition.md, by model, and its sentence about the models that are continued."""
    study, recipes = figures_of("transition")["entrants"], figures_of("recipe")["entrants"]
    scores = json.loads((RESULTS / "transition" / "tuned.json").read_text())["seeds"]

    def scored(model: str, mode: str) -> dict[int, float]:
        return {int(seed): by_model[model][mode] for seed, by_model in scores.items()}

    start, tuned = study["token_choice"]["losses"], scored("tuned", "token_choice")
    continued = scored("continued", "companions")
    models = {
        "Mixture of Tokens, tuned to token choice | 1,600 + 160": tuned,
        "token choice from the start | 1,760": start,
        "Mixture of Tokens, continued | 1,600 + 160": continued,
        "Mixture of Tokens from the start | 1,760": study["mixture_of_tokens"]["losses"],
        "token choice from the start | 1,600": recipes["first_block_token_choice"]["losses"],
        "Mixture of Tokens from the start | 1,600": scored("before", "companions"),
    }
    tests = {"start": compare(tuned, start), "continued": compare(tuned, continued)}
    corrected = holm({name: test.p for name, test in tests.items()})
    rows = {}
    for model, losses in models.items():
        compared = "\N{EN DASH}" if losses is start else difference(compare(losses, start)._asdict())
        p = f", p = {p_value({'holm': corrected['start']})}" if losses is tuned else ""
        rows[model] = f"{loss_of({'loss': summary(losses)})} | {compared}{p} |"
    p = p_value({"holm": corrected["continued"]})
    return rows | {"sentence": f"{difference(tests['continued']._asdict())}, p = {p}"}


def test_the_page_of_the_transition_has_its_figures():
    page, rows = (RESULTS / "transition.md").read_text(), transition_rows()
    assert rows.pop("sentence") in re.sub(r"[ \n]+", " ", page)
    for model, cells in rows.items():
        assert f"| {model} | {cells}" in page, model


def test_the_note_on_decoding_has_the_losses_of_the_scored_models():
    page = (ROOT / "docs" / "notes" / "2026-12-01-decoding-first-block.md").read_text()
    scores = json.loads((RESULTS / "transition" / "tuned.json").read_text())["seeds"].values()
    for mode in ("grouped", "companions", "sparse", "mean_field", "token_choice", "threshold", "discrete"):
        losses = [seed["tuned" if mode == "token_choice" else "before"][mode] for seed in scores]
        assert re.search(rf"^\| `{mode}`[^|]*\| {statistics.fmean(losses):.3f} \|", page, re.MULTILINE), mode


@pytest.mark.parametrize(("page", "sentence", "figures"), CITED)
def test_figures_in_pages_are_those_of_the_demo_study(demo, page, sentence, figures):
    text = re.sub(r"\s+", " ", (ROOT / page).read_text())
    assert sentence.format(*(figure(demo) for figure in figures)) in text
