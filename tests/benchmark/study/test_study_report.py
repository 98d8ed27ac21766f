import copy
import json
import math
import re
from html.parser import HTMLParser

import pytest
from etils import epath

from mot_jax import cli
from mot_jax.benchmark.study.analysis import analyze, stability
from mot_jax.benchmark.study.plan import few_seeds
from mot_jax.benchmark.study.report import Table, _marked, report, to_html, to_markdown
from mot_jax.benchmark.study.results import gradient_variation, load
from mot_jax.config import TrainingConfig
from mot_jax.errors import UserError

DENSE, MOT, ROUTED = "dense", "mixture_of_tokens", "token_choice"
# Final losses by entrant and seed: dense 2.0 on average; token choice misses that with seed 2.
FINAL = {DENSE: {1: 1.9, 2: 2.1}, MOT: {1: 1.0, 2: 1.3}, ROUTED: {1: 1.95, 2: 2.05}}
FLOPS = {DENSE: (100.0, 100.0), MOT: (125.0, 125.0), ROUTED: (100.0, 200.0)}  # useful, executed, of a step


def run(entrant: str, stage: str, seed: int, steps: int, loss: float, rate: float = 0.01) -> dict:
    """A run whose loss falls from 4 at half of its steps, linearly."""
    names = {"tuning": f"-rate-{rate:g}", "seeds": f"-seed-{seed}", "horizons": f"-seed-{seed}-steps-{steps}"}
    row = {"name": entrant + names[stage], "entrant": entrant, "stage": stage, "seed": seed, "steps": steps}
    row |= {"learning_rate": rate, "state": "finished", "loss": loss, "curve": [[steps / 2, 4.0], [steps, loss]]}
    row |= {"trained_curve": row["curve"], "commits": ["abc"], "config_hash": "0"}
    row |= {"machine": 0, "same_text": True, "skipped_steps": 0}
    if stage == "seeds":
        row["layers"] = {"dropped/0": 0.25 * seed, "dropped/1": 0.0, "router_entropy/0": 0.5}
        row["gradient_variation"] = 0.05 * seed
    return row


@pytest.fixture
def results() -> dict:
    """Three entrants, two seeds, 100 steps; as read from results.json."""
    runs = []
    for entrant, losses in FINAL.items():
        runs += [run(entrant, "tuning", 0, 100, loss, rate) for rate, loss in ((0.005, 2.2), (0.01, 2.0), (0.02, 2.1))]
        runs += [run(entrant, "seeds", seed, 100, loss) for seed, loss in losses.items()]
    runs += [run(MOT, "horizons", 1, 50, 1.9), run(MOT, "horizons", 1, 30, 2.5)]
    runs += [run(ROUTED, "horizons", 1, 50, 2.5)]
    entrants = {
        name: {
            "kind": name,
            "config": {
                "training": {
                    "optimizer": {"learning_rate": 0.01, "multipliers": [["controller", 0.0]] if name == MOT else []}
                },
                "model": {"feed_forward": {"kind": name, f"{name}_a": 1, f"{name}_b": 3}},
            },
            "kind_defaults": {"kind": name, f"{name}_a": 1, f"{name}_b": 2},
            "candidate": name,
            "candidates": {},
            "tuning": {
                "rates": {f"{name}-rate-{rate}": rate for rate in (0.005, 0.01, 0.02)},
                "chosen": 0.01,
                "complete": True,
                "at_end": name == DENSE,
            },
            "headline_mode": "companions" if name == MOT else "trained",
            "independent": True,
            "headline_flops": 3.0 if name == MOT else 1.0,
            "parameters": 1000,
            "active_parameters": 1000,
            "state_bytes": 12000,
            "useful_flops": FLOPS[name][0],
            "executed_flops": FLOPS[name][1],
        }
        for name in FINAL
    }
    seconds = {DENSE: [0.09, 0.1, 0.12], MOT: [0.2, 0.2, 0.2], ROUTED: [0.3, 0.3, 0.3]}
    timed = {name: {"seconds": [of], "compiler_flops": 1e9, "temporaries": 1} for name, of in seconds.items()}
    machine = {"device": "1 x cpu", "python": "3.13.0"}
    settings = {
        "seeds": [1, 2],
        "tuning_seed": 0,
        "horizon_seeds": [1],
        "max_extensions": 2,
        "steps": 100,
        "horizons": [0.3, 0.5],
    }
    data = {"corpus": ["a", "b"], "train": "train", "validation": "validation", "tokenizer": "bytes"}
    data |= {"fingerprints": {"train": "f1"}, "train_windows": 50, "epochs": 0.5, "bits_per_nat": 1 / math.log(2)}
    data |= {"validation_filled": 0.25, "warnings": ["warning: text trained on"]}
    return {
        "format": 2,
        "study": "mine",
        "title": "Three <kinds> & more",
        "command": "mot bench train mine.py --workdir out",
        "settings": settings | {"target": DENSE, "compared": MOT},
        "machines": [machine],
        "commits": ["abc"],
        "data": data,
        "entrants": entrants,
        "runs": runs,
        "other_runs": [],
        "times": {"rows": timed, "sittings": [sitting("2026-12-01T04:00:00Z")], "rounds": 20},
    }


def sitting(start: str) -> dict:
    about = {"start": start, "machine": {"device": "1 x cpu", "python": "3.13.0"}, "commit": "def", "runs": {}}
    return about | {"share_of_others": 0.034, "load_averages": [1.9, 1.8]}


def diverge(results: dict, *names: str) -> dict:
    changed = copy.deepcopy(results)
    for row in changed["runs"]:
        if row["name"] in names:
            row |= {"state": "diverged", "loss": None}
    return changed


def test_the_target_and_the_cost_of_reaching_it(results):
    """MoT falls from 4 to 1.0 and 1.3 in the last 50 steps: it reaches 2.0 after 2 / 3 and 2 / 2.7 of them."""
    figures = analyze(results)
    rows = figures["entrants"]
    assert figures["target"] == pytest.approx(2.0)
    steps = {1: 50 + 50 * 2 / 3, 2: 50 + 50 * 2 / 2.7}
    assert rows[MOT]["crossings"] == pytest.approx(steps)
    share = sum(steps.values()) / 200
    assert rows[MOT]["steps_to_target"] == pytest.approx(share)
    assert rows[MOT]["useful_to_target"] == pytest.approx(1.25 * share)
    assert rows[MOT]["time_to_target"] == pytest.approx(2 * share)
    assert rows[MOT]["horizon"] == {1: {"losses": {1.0: 1.0, 0.5: 1.9, 0.3: 2.5}, "shortest": 0.5, "complete": True}}


def test_a_seed_that_misses_makes_the_median_infinite_and_prevents_the_test(results):
    row = analyze(results)["entrants"][ROUTED]
    assert row["crossing"]["reached"] == 1 and row["steps_to_target"] == math.inf
    assert row["crossing_test"]["reason"] == "1 of 2 seeds miss" and row["crossing_test"]["holm"] is None
    assert row["loss_test"]["difference"] == pytest.approx(0.85)


def test_the_target_entrant_is_compared_by_its_own_losses(results):
    """MoT falls to 1.9 with seed 1 and to 2.1 with seed 2, where dense ends with 100 steps."""
    test = analyze(results)["entrants"][DENSE]["crossing_test"]
    steps = 50 + 50 * 2.1 / 3, 50 + 50 * 1.9 / 2.7
    assert test["difference"] == pytest.approx(math.log(100) - (math.log(steps[0]) + math.log(steps[1])) / 2)
    assert test["reason"] == "" and 0 < test["p"] < test["holm"] <= 1


def test_losses_as_trained_are_compared_too(results):
    for row in results["runs"]:
        if row["entrant"] == MOT:
            row["trained_curve"] = [[step, loss + 0.5] for step, loss in row["curve"]]
    row = analyze(results)["entrants"][ROUTED]
    assert row["trained_loss_test"]["difference"] == pytest.approx(0.85 - 0.5)
    assert row["loss_test"]["difference"] == pytest.approx(0.85)


def test_pairs_of_the_study_are_compared_and_corrected_among_themselves(results):
    """Losses of MoT are lower by 0.95 and 0.75: t = 8.5 with 1 degree of freedom, p = 0.075, twice that by Holm."""
    assert analyze(results)["pairs"] == []
    results["settings"]["pairs"] = [[MOT, ROUTED]]
    (row,) = analyze(results)["pairs"]
    assert row["pair"] == (MOT, ROUTED) and row["loss_test"]["difference"] == pytest.approx(-0.85)
    assert row["loss_test"]["holm"] == pytest.approx(row["loss_test"]["p"]) == pytest.approx(0.0746, abs=1e-4)
    results["settings"]["pairs"] += [[DENSE, MOT]]
    row, other = analyze(results)["pairs"]
    assert row["loss_test"]["holm"] == pytest.approx(2 * other["loss_test"]["p"]) == other["loss_test"]["holm"]
    text = to_markdown("", list(report(results)))
    assert f"| {MOT} - {ROUTED} | -0.8500 (-2.1206 to +0.4206) | 0.075 | not significant | -0.8500" in text


def test_entrants_are_compared_with_the_target_entrant_by_its_own_losses(results):
    """Of two seeds of dense, one ends above their mean: each entrant's steps are to the loss of the same seed."""
    before = analyze(results)["entrants"][DENSE]["crossing_test"]
    results["settings"]["compared"] = DENSE
    rows = analyze(results)["entrants"]
    assert rows[DENSE]["crossing_test"] is None
    assert rows[MOT]["crossing_test"]["difference"] == pytest.approx(-before["difference"])
    assert rows[ROUTED]["crossing_test"]["reason"] == "1 of 2 seeds miss"
    assert "reaches the final loss of dense with the same seed, over all steps of dense" in to_markdown(
        "", list(report(results))
    )


def test_a_study_without_horizons_has_no_column_of_them(results):
    assert "own horizon" in to_markdown("", list(report(results)))
    results["settings"]["horizons"] = []
    assert "horizon" not in to_markdown("", list(report(results))).lower()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "is not of a study"),
        ({"format": 2, "rows": []}, "is not of a study"),
        ({"format": 1, "study": "mine"}, "has format 1, and this version reads 2"),
    ],
)
def test_results_of_another_kind_are_refused(tmp_path, content, words):
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"results.json: {words}"):
        load(epath.Path(tmp_path))


def test_losses_at_equal_budgets_are_those_at_an_earlier_step(results):
    """MoT's step costs 1.25 times dense's, which leaves it 80 of 100 steps; token choice executes twice as much."""
    rows = analyze(results)["entrants"]
    at_80 = [4 - 3.0 * 30 / 50, 4 - 2.7 * 30 / 50]
    assert rows[MOT]["loss_at_equal_useful"] == pytest.approx(sum(at_80) / 2)
    assert rows[MOT]["loss_at_equal_time"] == pytest.approx(4.0)
    assert rows[ROUTED]["loss_at_equal_useful"] == pytest.approx(2.0)
    assert rows[ROUTED]["loss_at_equal_executed"] == pytest.approx(4.0)
    assert rows[ROUTED]["loss_at_equal_time"] == math.inf  # before its first evaluation


def test_stability_is_that_of_the_grid_and_of_the_seeds(results):
    """The losses of the grid are 2.2, 2.0 and 2.1 at 0.005, 0.01 and 0.02."""
    row = stability(results, MOT)
    assert 0.005 < row["span"].low < 0.01 < row["span"].high < 0.02
    assert row["changes"] == {0.5: pytest.approx(0.1), 2.0: pytest.approx(0.05), 4.0: None}
    assert row["variation"] == pytest.approx(0.075)
    text = to_markdown("", list(report(diverge(results, f"{ROUTED}-rate-0.02"))))
    assert re.search(r"mixture_of_tokens \| 0.00\d+ to 0.01\d, x 1.\d \| \+10.0% \| \+5.0% \| - \| 7.5% \|", text)
    assert re.search(r"token_choice \| 0.00\d+ to 0.01, x 1.\d \| \+10.0% \| diverged \| - \| 7.5% \|", text)
    next(row for row in results["runs"] if row["name"] == f"{MOT}-seed-1").pop("gradient_variation")
    assert stability(results, MOT)["variation"] is None


def test_the_variation_of_gradients_has_no_trend():
    """Norms of 2, 3 and 4 in the second half of 12 steps, of which every second is logged, and a skipped one."""
    norms = {2: 9.0, 4: 1.0, 6: 7.0, 8: 2.0, 9: 50.0, 10: 3.0, 11: None, 12: 4.0}
    rows = [{"split": "train", "step": step, "gradient_rms": norm} for step, norm in norms.items()]
    training = TrainingConfig(steps=12, log_every=2)
    assert gradient_variation([*rows, {"split": "validation", "step": 12}], training) == pytest.approx(0.5**0.5 / 3)
    assert gradient_variation(rows[:4], training) is None


def test_a_run_that_diverged_is_a_miss(results):
    figures = analyze(diverge(results, f"{MOT}-seed-2", f"{ROUTED}-seed-1"))
    assert figures["entrants"][MOT]["crossing"] == {"reached": 1, "of": 2, "median": math.inf}
    assert figures["entrants"][ROUTED]["loss_test"]["reason"] == "2 of 2 seeds miss"


def test_without_a_target_the_report_has_the_reason(results):
    """A target entrant of which one run diverged has an infinite mean, which no loss could miss."""
    results = diverge(results, f"{DENSE}-seed-1")
    figures = analyze(results)
    rows = figures["entrants"]
    assert figures["target"] is None and rows[MOT]["crossing"]["reached"] == 0 and rows[MOT]["horizon"] is None
    assert rows[ROUTED]["crossing_test"]["reason"] == "no target"
    assert rows[DENSE]["crossing_test"]["reason"] == "1 of 2 seeds miss"  # MoT reaches the loss of the other seed
    text = to_markdown("", list(report(results)))
    assert "There is no target, and no cost of reaching it: 1 of 2 runs of dense diverged" in text
    assert "Cost of reaching the target" not in text


def test_an_entrant_that_never_trains_has_a_row_of_misses(results):
    results["runs"] = [row for row in results["runs"] if row["entrant"] != ROUTED or row["stage"] == "tuning"]
    results["entrants"][ROUTED]["tuning"] |= {"chosen": None}
    row = analyze(results)["entrants"][ROUTED]
    assert row["loss"]["reached"] == 0 and row["loss"]["of"] == 2
    assert "no rate of the grid trains" in to_markdown("", list(report(results)))


class Page(HTMLParser):
    """Collects the attributes that refer to other files, and checks that elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "path", "use"):
            self.open.append(tag)
        self.references += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith("#")]

    def handle_startendtag(self, tag, attributes):
        self.references += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith("#")]

    def handle_endtag(self, tag):
        if tag not in ("path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text


def test_the_page_is_complete_in_itself(results):
    text = to_html(results["title"], list(report(results)))
    page = Page()
    page.feed(text)
    assert not page.open and not page.references and "@import" not in text and "url(http" not in text
    assert text.count("<svg") == 2 and "Three &lt;kinds&gt; &amp; more" in text
    identifiers = re.findall(r'<clipPath id="(\w+)"', text)
    assert len(identifiers) == len(set(identifiers)) == 2
    for part in (
        "How to refute this",
        "filled to 25%",
        "warning: text trained on",
        "at an end of the grid",
        "companions, 3.0 x the FLOPs",
        "1 of 2 seeds miss",
        "commit def. Ratios: geometric means",
    ):
        assert part in page.text


def test_the_tables_have_the_figures(results):
    """Losses of dense are higher by 0.9 and 0.8: t = 17 with 1 degree of freedom, p = 0.037, twice that by Holm."""
    text = to_markdown(results["title"], list(report(results)))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert any(line.startswith("| dense | +0.8500 (+0.2147 to +1.4853) | 0.075 | not significant |") for line in lines)
    assert "| mixture_of_tokens | dropped | 0.375 0 |" in lines
    assert "| mixture_of_tokens | 2 of 2 | 0.85 | 1.06 | 1.06 | 1.70 | 0.50 | 0.0 MB |" in lines
    differences = [line for line in lines if line.startswith("| token_choice | model.feed_forward.")]
    assert [line.split(" | ")[1:] for line in differences] == [
        ["model.feed_forward.kind", "dense", "token_choice |"],
        ["model.feed_forward.dense_b", "3", "- |"],
        ["model.feed_forward.token_choice_b", "-", "3 |"],
    ]
    multipliers = "training.optimizer.multipliers | [] | [['controller', 0.0]]"
    assert f"| mixture_of_tokens | {multipliers} |" in lines


def test_candidates_are_listed_with_their_losses_and_are_no_points_of_the_grid(results):
    own = {"kind": ROUTED} | {key: results["entrants"][ROUTED][key] for key in ("config", "kind_defaults")}
    other = copy.deepcopy(own)
    other["config"]["model"]["feed_forward"]["token_choice_b"] = 9
    best = f"{ROUTED}-other"
    candidates = {ROUTED: {"run": f"{ROUTED}-rate-0.01", **own}, best: {"run": f"{best}-rate-0.01", **other}}
    results["runs"].append({**run(ROUTED, "tuning", 0, 100, 9.5), "name": f"{best}-rate-0.01"})
    results["entrants"][ROUTED] |= {"candidates": candidates, "candidate": ROUTED}
    text = to_markdown("", list(report(results)))
    assert "| token_choice | token_choice | the entrant's own | 2.0000 | chosen |" in text
    fields = "model.feed_forward.token_choice_b = 9 instead of 3"
    assert f"| token_choice | other | {fields} | 9.5000 |  |" in text
    assert "| token_choice | 0.01 | 4 |  | 0.005: 2.2000, 0.01: 2.0000, 0.02: 2.1000 |" in text
    assert "| dense | 0.01 | 3 |" in text and "--run dense-rate-0.01" in text
    assert "different numbers of candidates: 1 of dense, mixture_of_tokens; 2 of token_choice." in text
    undecided = {"rates": {}, "chosen": None, "complete": False, "at_end": False}
    results["entrants"][ROUTED] |= {"candidate": None, "tuning": undecided}
    text = to_markdown("", list(report(results)))
    assert "| token_choice | - | 4 | not complete |  |" in text and "| chosen |" not in text
    assert "without its alternatives while none is chosen, as for token_choice." in text


def test_entrants_whose_best_rate_is_at_an_end_of_the_grid_are_marked_in_every_table(results):
    blocks = list(report(results))
    marked = [_marked(results, block) for block in blocks]
    tables = [block for block in marked if isinstance(block, Table) and block.columns[0] == "entrant"]
    names = [row[0] for table in tables for row in table.rows]
    assert len(tables) >= 6 and names.count(f"{DENSE} \N{DAGGER}") >= 5 and MOT in names
    assert DENSE not in names and f"{MOT} \N{DAGGER}" not in names
    assert "\N{DAGGER}: the best learning rate is at an end" in to_markdown("", blocks)
    for about in results["entrants"].values():
        about["tuning"]["at_end"] = False
    assert "\N{DAGGER}" not in to_markdown("", list(report(results)))


def test_few_seeds_are_named(results):
    assert "Warning: 2 seeds, of 5 or more" in to_markdown("", list(report(results)))
    assert few_seeds(1).startswith("1 seed, of 5") and few_seeds(5) is None


def test_times_of_a_kind_that_runs_all_experts_are_not_compared(results):
    results["entrants"][ROUTED]["kind"] = "relu_routing"
    figures = analyze(results)["entrants"]
    assert figures[ROUTED]["time_ratio"] == pytest.approx(3) and figures[MOT]["time_to_target"] is not None
    assert figures[ROUTED]["time_to_target"] is None and figures[ROUTED]["loss_at_equal_time"] is None
    assert figures[ROUTED]["executed_to_target"] is not None
    assert to_markdown("", list(report(results))).count(f"{ROUTED}: no time, since all experts run on all tokens.") == 2


def test_ratios_of_step_times_have_an_interval_over_several_sittings(results):
    """Medians of 0.2 over 0.1 and 0.21 over 0.1 s: a mean of 2.05, and t of one degree of freedom."""
    assert analyze(results)["entrants"][MOT]["time_interval"] is None
    text = to_markdown("", list(report(results)))
    assert "One sitting gives no interval" in text and "| 200.00 | 2.00 |" in text
    assert "| 2026-12-01T04:00:00Z | 2.000 | 3.000 | 3.4% | 1.9, 1.8 |" in text
    times = results["times"]
    times["sittings"].append(sitting("2026-12-01T05:00:00Z"))
    for name, seconds in ((DENSE, [0.1]), (MOT, [0.21]), (ROUTED, [0.3])):
        times["rows"][name]["seconds"].append(seconds)
    figures = analyze(results)["entrants"]
    mean, half = math.sqrt(2 * 2.1), 12.706 * math.log(2.1 / 2) / 2
    assert figures[MOT]["time_ratio"] == pytest.approx(mean) and figures[DENSE]["time_interval"] is None
    low, high = figures[MOT]["time_interval"]
    assert (low, high) == pytest.approx((mean * math.exp(-half), mean * math.exp(half)), rel=1e-4)
    text = to_markdown("", list(report(results)))
    assert f"| {mean:.2f} ({low:.2f} to {high:.2f}) |" in text and "One sitting" not in text
    assert "| 2026-12-01T05:00:00Z | 2.100 | 3.000 |" in text
    assert all(row["time_bounds"] is None for row in figures.values())
    results["settings"]["compared"] = DENSE
    figures = analyze(results)["entrants"]
    steps = figures[MOT]["crossing_test"]
    products = low * math.exp(steps["low"]), high * math.exp(steps["high"])
    assert figures[MOT]["time_bounds"] == pytest.approx(products)
    assert figures[DENSE]["time_bounds"] is None is figures[ROUTED]["time_bounds"]  # of which a seed misses
    cell = "{:.2f} ({:.2f} to {:.2f})".format(figures[MOT]["time_to_target"], *figures[MOT]["time_bounds"])
    assert f"| {cell} |" in to_markdown("", list(report(results)))


def test_the_report_names_runs_of_other_machines_and_texts_and_skipped_steps(results):
    text = to_markdown("", list(report(results)))
    assert "skipped steps, whose loss or gradient was not finite: none" in text and "arning: " not in text.replace(
        "warning: text trained on", ""
    ).replace("Warning: 2 seeds, of 5", "")
    results["machines"].append({"device": "1 x cpu", "python": "3.11.0"})
    (row,) = [row for row in results["runs"] if row["name"] == f"{MOT}-seed-2"]
    row |= {"machine": 1, "same_text": False, "skipped_steps": 3}
    text = to_markdown("", list(report(results)))
    where = "dense-seed-2 on machine 1, mixture_of_tokens-seed-2 on machine 2"
    assert f"Warning: the runs of seed 2 differ in machine or versions, listed below: {where}." in text
    assert "seed 1 differ" not in text and "- machine 2: device 1 x cpu, python 3.11.0" in text
    assert "was not finite: mixture_of_tokens-seed-2 (3)" in text
    assert "warning: runs with another text than the first one: mixture_of_tokens-seed-2" in text


def test_a_report_of_unfinished_runs_is_preliminary(results):
    for row in results["runs"]:
        if row["name"] == f"{DENSE}-seed-2" or row["stage"] == "horizons":
            row |= {"state": "not ended", "loss": None, "curve": [], "trained_curve": []}
    results["times"] = None
    text = to_markdown(results["title"], list(report(results)))
    assert "Preliminary: 4 runs have not ended" in text and "runs of dense have not ended" in text
    assert "Cost of reaching the target" not in text and "have not been measured" in text


def test_the_report_is_rebuilt_from_the_results_alone(results, tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(results))
    contents = []
    for output, flags in ((tmp_path, []), (tmp_path / "other", ["--output", str(tmp_path / "other")])):
        files = [output / name for name in ("report.html", "report.md", "curves.svg", "tuning.svg")]
        cli.main(["bench", "report", str(tmp_path), *flags])
        assert capsys.readouterr().out.split() == [str(path) for path in files]
        contents.append([path.read_bytes() for path in files])
    assert contents[0] == contents[1]
    page, markdown, curves, _ = (content.decode() for content in contents[0])
    assert curves in page and curves.startswith("<svg") and "](curves.svg)" in markdown


def test_a_directory_without_results_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", "report", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and "results.json" in line and "mot bench train" in line
