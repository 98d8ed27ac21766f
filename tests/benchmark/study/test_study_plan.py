import dataclasses
import math
import random
from pathlib import Path

import pytest

from mot_jax.benchmark.study import plan as plans
from mot_jax.benchmark.study.plan import Study, load_study, plan, tune
from mot_jax.config import Config, ExpertChoiceConfig, TokenChoiceConfig, check, name_of_variant
from mot_jax.config.files import variants_of
from mot_jax.errors import RetryableError, UserError

ROOT = Path(__file__).parents[3]
STUDIES = [
    path.relative_to(ROOT).as_posix() + (f":{variant}" if variant else "")
    for path in sorted((ROOT / "configs" / "studies").glob("*.py"))
    for variant in variants_of(path) or [None]
]


@pytest.fixture(scope="module")
def smoke() -> Study:
    return load_study(ROOT / "configs" / "studies" / "smoke.py")


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_its_command_and_time(name):
    assert isinstance(load_study(ROOT / name), Study)
    text = (ROOT / name.partition(":")[0]).read_text()
    assert f"\nCommand: mot bench train {name} --workdir runs/" in text and "\nHere:    " in text


@pytest.fixture(scope="module")
def with_alternatives(smoke) -> Study:
    """Token choice has the choice between three scales of its router's initial weights: 3, 1 and 9."""
    config = smoke.entrants["token_choice"]
    alternatives = {f"scale_{scale}": with_layer(config, controller_init_scale=float(scale)) for scale in (1, 9)}
    return dataclasses.replace(smoke, alternatives={"token_choice": alternatives})


def with_layer(config: Config, **fields) -> Config:
    layer = dataclasses.replace(config.model.feed_forward, **fields)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=layer))


def scale_of(config: Config | None) -> float:
    assert config is not None and isinstance(config.model.feed_forward, TokenChoiceConfig)
    return config.model.feed_forward.controller_init_scale


# --- tuning -----------------------------------------------------------------------------------------------------------


def tuned(study: Study, best: float) -> plans.Tuning:
    """The tuning of an entrant whose loss is lowest at `best` times its rate, with all runs that it asks for."""
    middle, losses = study.entrants["dense"].training.optimizer.learning_rate, {}
    while not (tuning := tune(study, "dense", losses)).complete:
        losses |= {run: abs(math.log2(rate / (best * middle))) for run, rate in tuning.rates.items()}
    return tuning


@pytest.mark.parametrize(
    ("best", "rates", "chosen", "at_end"),
    [
        (1, [0.25, 0.5, 1, 2, 4], 1, False),
        (2, [0.25, 0.5, 1, 2, 4], 2, False),
        (4, [0.25, 0.5, 1, 2, 4, 8], 4, False),
        (0.125, [0.0625, 0.125, 0.25, 0.5, 1, 2, 4], 0.125, False),
        (64, [0.25, 0.5, 1, 2, 4, 8, 16], 16, True),
    ],
)
def test_the_grid_is_extended_by_one_while_the_best_rate_is_at_an_end(smoke, best, rates, chosen, at_end):
    study = dataclasses.replace(smoke, rate_factors=(0.25, 0.5, 1.0, 2.0, 4.0), max_extensions=2)
    tuning, middle = tuned(study, best), study.entrants["dense"].training.optimizer.learning_rate
    assert tuple(tuning.rates.values()) == tuple(middle * factor for factor in rates)
    assert (tuning.chosen, tuning.at_end) == (middle * chosen, at_end)


def test_an_entrant_that_always_diverges_has_no_rate_and_no_further_runs(smoke):
    losses = trained(smoke, diverging="token_choice")
    current = plan(smoke, losses)
    tuning = current.tunings["token_choice"]
    assert tuning.complete and tuning.chosen is None and len(tuning.rates) == 4
    stages = {run.stage for run in current.runs if run.entrant == "token_choice"}
    assert stages == {plans.TUNING} and not current.further


# --- the runs of a study ----------------------------------------------------------------------------------------------


OFFSETS = {"dense": 0.1, "mixture_of_tokens": 0.0, "token_choice": 0.05}
BEST_RATES = {"dense": 0.01, "mixture_of_tokens": 0.0025, "token_choice": 0.01}  # that of MoT is outside of the grid


def loss_of(run: plans.Run) -> float:
    """A loss as of a model: lower with more steps, lowest at some rate, with some noise between seeds."""
    assert run.config is not None
    rate = abs(math.log2(run.config.training.optimizer.learning_rate / BEST_RATES[run.entrant]))
    return 1.0 + OFFSETS[run.entrant] + 0.01 * rate + 6 / run.steps + 1e-4 * run.seed


def trained(study: Study, diverging: str = "") -> dict[str, float]:
    """The losses of all runs of a study, trained in the order of its plan."""
    losses: dict[str, float] = {}
    while todo := [run for run in plan(study, losses).runs if run.config and run.name not in losses]:
        losses[todo[0].name] = math.inf if todo[0].entrant == diverging else loss_of(todo[0])
    return losses


def test_all_runs_of_a_study_are_valid_and_have_the_seeds_of_their_stage(smoke):
    losses = trained(smoke)
    runs = plan(smoke, losses).runs
    assert {run.name for run in runs} == set(losses) and len(runs) == len(losses)
    by_stage = {stage: [r for r in runs if r.stage == stage] for stage in plans.STAGES}
    assert {run.seed for run in by_stage[plans.TUNING]} == {smoke.tuning_seed}
    assert len(by_stage[plans.SEEDS]) == 6 and {run.seed for run in by_stage[plans.SEEDS]} == {1, 2}
    for run in runs:
        assert run.config is not None
        check(run.config)
        training = run.config.training
        assert (training.seed, training.steps) == (run.seed, run.steps)
        chosen = plan(smoke, losses).tunings[run.entrant].chosen
        assert run.stage == plans.TUNING or training.optimizer.learning_rate == chosen


def test_the_shortest_schedule_is_searched_for_all_but_the_target(smoke):
    losses = trained(smoke)
    target = plans.target_loss(smoke, losses)
    assert target == pytest.approx(sum(losses[f"dense-seed-{seed}"] for seed in (1, 2)) / 2)
    assert not [name for name in losses if name.startswith("dense-seed") and "steps" in name]
    for entrant in ("mixture_of_tokens", "token_choice"):
        by_share = plans.horizon_losses(smoke, entrant, 1, losses)
        reached = [share for share in (0.5, 0.75, 1.0) if 1 + 6 / (60 * share) + OFFSETS[entrant] + 1e-4 <= target]
        assert min(share for share, loss in by_share.items() if loss <= target) == min(reached)


def test_a_plan_depends_on_the_losses_and_not_on_their_order(with_alternatives):
    """As after a kill, or with several jobs: from any part of the losses, the same runs remain.

    Those that are not known yet have their names and bounds in the plan.
    """
    losses = trained(with_alternatives)
    end, generator = plan(with_alternatives, losses), random.Random(0)
    assert not end.further and "mixture_of_tokens-rate-0.0025" in losses
    for _ in range(5):
        done: dict[str, float] = {}
        while (current := plan(with_alternatives, done)) and len(done) < len(losses):
            names = {run.name for run in current.runs}
            later = [run for run in end.runs if run.name not in names]
            possible = {name for further in current.further for name in further.names}
            assert {run.name for run in later} <= possible and not possible & names
            assert len(later) <= sum(further.at_most for further in current.further)
            assert sum(run.steps for run in later) <= sum(some.at_most * some.steps for some in current.further)
            assert all(some.needs and {*some.needs} <= names - done.keys() for some in current.further)
            todo = [run for run in current.runs if run.config and run.name not in done]
            for run in generator.sample(todo, generator.randint(1, len(todo))):
                done[run.name] = loss_of(run)
        assert done == losses and current == end


def test_runs_that_wait_for_a_learning_rate_name_the_runs_that_they_need(smoke):
    current = plan(smoke, {})
    waiting = [run for run in current.runs if run.config is None]
    assert [run.stage for run in waiting] == [plans.SEEDS] * 6
    for run in waiting:
        assert run.needs == tuple(current.tunings[run.entrant].rates)
    with pytest.raises(UserError, match="did you mean 'dense-seed-1'"):
        current.run("dense-sed-1")


def bounds(current: plans.Plan) -> dict[str, list[tuple[int, int]]]:
    """The largest numbers of further runs, with their steps, by entrant: of tuning and of horizons."""
    by_entrant: dict[str, list[tuple[int, int]]] = {}
    for further in current.further:
        by_entrant.setdefault(further.entrant, []).append((further.at_most, further.steps))
    return by_entrant


def test_extensions_that_are_still_possible_are_counted(smoke):
    """The grid is extended by one rate at most; then two of the schedules of 30 and 45 steps are trained."""
    horizons = (2, 45)
    assert bounds(plan(smoke, {})) == {
        "dense": [(1, 60)],
        "mixture_of_tokens": [(1, 60), horizons],
        "token_choice": [(1, 60), horizons],
    }
    inside = {"dense-rate-0.01": 1.0, "dense-rate-0.02": 1.1}
    (extension,) = [further for further in plan(smoke, inside).further if further.entrant == "dense"]
    assert extension.names == ("dense-rate-0.0025",) and extension.needs == ("dense-rate-0.005",)
    assert "dense" not in bounds(plan(smoke, inside | {"dense-rate-0.005": 1.2}))
    assert "dense" not in bounds(plan(smoke, inside | {"dense-rate-0.005": 0.9}))  # the extension is known


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("dense-rate-0.0025", "dense-rate-0.005, dense-rate-0.01, dense-rate-0.02"),
        ("token_choice-scale_9-rate-0.02", "token_choice-rate-0.01, .*scale_1-rate-0.01, .*scale_9-rate-0.01"),
        ("token_choice-scale_9-rate-0.04", "token_choice-rate-0.01, .*scale_1-rate-0.01, .*scale_9-rate-0.01"),
        ("token_choice-seed-1-steps-45", "token_choice-seed-1, dense-seed-1, dense-seed-2"),
    ],
)
def test_a_run_that_depends_on_losses_can_be_retried_until_it_is_ruled_out(with_alternatives, name, needs):
    with pytest.raises(RetryableError, match=f"--run = {name}: .*is not decided yet; try again after {needs}$"):
        plan(with_alternatives, {}).run(name)
    with pytest.raises(UserError, match="the study has no such run"):
        plan(with_alternatives, trained(with_alternatives, diverging="token_choice")).run(name)
    for never in ("dense-seed-1-steps-45", "dense-rate-0.00125", "token_choice-seed-2-steps-45"):
        with pytest.raises(UserError, match="the study has no such run"):
            plan(with_alternatives, {}).run(never)


def test_a_target_that_diverged_is_reached_by_no_schedule(smoke):
    losses = trained(smoke)
    losses = {name: loss for name, loss in losses.items() if "steps" not in name} | {"dense-seed-2": math.inf}
    current = plan(smoke, losses)
    assert not current.further and plans.HORIZONS not in {run.stage for run in current.runs}


# --- alternatives -----------------------------------------------------------------------------------------------------

CANDIDATES = {"token_choice": 3.0, "token_choice-scale_1": 1.0, "token_choice-scale_9": 9.0}


def test_until_a_candidate_is_chosen_only_the_candidates_can_be_trained(smoke, with_alternatives):
    before, current = plan(smoke, {}), plan(with_alternatives, {})
    runs = [run for run in current.runs if run.entrant == "token_choice"]
    tuning = {run.name: scale_of(run.config) for run in runs if run.stage == plans.TUNING}
    assert tuning == {f"{name}-rate-0.01": scale for name, scale in CANDIDATES.items()}
    waiting = [run for run in runs if run.stage != plans.TUNING]
    assert len(waiting) == 2 and all(run.needs == tuple(tuning) and run.config is None for run in waiting)
    assert [scale_of(config) for config in current.configs(waiting[0])] == [*CANDIDATES.values()]
    (tuning_before, horizons), other_bounds = bounds(before)["token_choice"], bounds(current)["token_choice"]
    assert tuning_before == (1, smoke.steps) and other_bounds == [(3, smoke.steps), horizons]
    others = [[run for run in one.runs if run.entrant != "token_choice"] for one in (before, current)]
    assert others[0] == others[1]


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ((2.0, 2.0, 2.0), "token_choice"),
        ((2.0, 1.9, 1.9), "token_choice-scale_1"),
        ((2.0, 2.1, 1.9), "token_choice-scale_9"),
        ((math.inf, 2.0, 2.1), "token_choice-scale_1"),
        ((2.0, math.inf, 2.1), "token_choice"),
    ],
)
def test_the_candidate_with_the_lowest_loss_is_tuned_and_compared(smoke, with_alternatives, losses, chosen):
    done = {f"{name}-rate-0.01": loss for name, loss in zip(CANDIDATES, losses, strict=True)}
    current = plan(with_alternatives, done)
    assert [*current.tunings["token_choice"].rates] == [f"{chosen}-rate-{rate}" for rate in (0.005, 0.01, 0.02)]
    assert all(run in [one.name for one in current.runs] for run in done)
    done |= {f"{chosen}-rate-0.005": 1.0, f"{chosen}-rate-0.02": 3.0, f"{chosen}-rate-0.0025": 1.5}
    current = plan(with_alternatives, done)
    compared = [run for run in current.runs if run.entrant == "token_choice" and run.stage == plans.SEEDS]
    assert [run.name for run in compared] == ["token_choice-seed-1", "token_choice-seed-2"]
    for run in compared:
        assert run.config is not None and run.config.training.optimizer.learning_rate == 0.005
        assert scale_of(run.config) == CANDIDATES[chosen]
    assert bounds(current)["token_choice"] == bounds(plan(smoke, {}))["token_choice"][1:]


def test_an_entrant_whose_candidates_all_diverge_has_its_own_grid_and_no_rate(with_alternatives):
    current = plan(with_alternatives, trained(with_alternatives, diverging="token_choice"))
    tuning = current.tunings["token_choice"]
    assert tuning.complete and tuning.chosen is None and [*tuning.candidates] == ["token_choice"]
    assert len([run for run in current.runs if run.entrant == "token_choice"]) == len(tuning.rates) + 2


# --- identity ---------------------------------------------------------------------------------------------------------


def test_the_hash_of_a_run_changes_with_every_field_that_its_result_depends_on(smoke):
    config = smoke.entrants["dense"]
    changes = {
        "checkpoint_every": (dataclasses.replace(config.training, checkpoint_every=7), False),
        "log_every": (dataclasses.replace(config.training, log_every=7), False),
        "validate_every": (dataclasses.replace(config.training, validate_every=7), True),
        "steps": (dataclasses.replace(config.training, steps=61), True),
        "seed": (dataclasses.replace(config.training, seed=7), True),
    }
    for name, (training, differs) in changes.items():
        changed = dataclasses.replace(config, training=training)
        assert (plans.identity_hash(changed) != plans.identity_hash(config)) == differs, name
    hashes = {plans.identity_hash(entrant) for entrant in smoke.entrants.values()}
    assert len(hashes) == len(smoke.entrants)


def test_the_headline_mode_keeps_sequences_independent_where_it_can(smoke):
    modes = {name: plans.headline_mode(config) for name, config in smoke.entrants.items()}
    assert modes == {"dense": "trained", "mixture_of_tokens": "companions", "token_choice": "trained"}


# --- errors -----------------------------------------------------------------------------------------------------------


def with_dense(study: Study, **groups) -> Study:
    """The study with other groups of fields of its dense entrant."""
    return dataclasses.replace(
        study, entrants={**study.entrants, "dense": dataclasses.replace(study.entrants["dense"], **groups)}
    )


def faulty_studies(study: Study):
    dense, mot = (study.entrants[name] for name in ("dense", "mixture_of_tokens"))
    replace = dataclasses.replace
    over_tokens = replace(mot.model, feed_forward=ExpertChoiceConfig(group_size=8, num_experts=16, over="tokens"))
    yield replace(study, target="dens"), "target = 'dens': must be an entrant; did you mean 'dense'?"
    yield replace(study, pairs=(("dense", "mixture"),)), "pairs: 'mixture' must be an entrant; did you mean 'mixture_of"
    yield replace(study, pairs=(("dense", "dense"),)), "pairs: .* must be two different entrants; try"
    yield replace(study, seeds=(1, 1)), "seeds = .*must be different numbers"
    yield replace(study, seeds=(0, 1)), "tuning_seed = 0: must not be one of seeds"
    yield replace(study, horizon_seeds=(9,)), r"horizon_seeds = \(9,\): must be among seeds"
    yield replace(study, horizons=(0.5, 1.5)), "horizons = .*: must be between 0 and 1"
    yield replace(study, rate_factors=(0.5, 1.0, 3.0)), "rate_factors = .*each twice the one before"
    yield replace(study, budget_hours=0), "budget_hours = 0: must be above 0"
    yield replace(study, entrants={**study.entrants, "a-b": dense}), "'a-b' must have small letters.*; try 'a_b'"
    yield (
        with_dense(study, data=replace(dense.data, validation_windows=4)),
        "mixture.*validation_windows = None: must be that of dense, 4",
    )
    yield with_dense(study, training=replace(dense.training, steps=61)), "mixture.*training.steps = 60: must be that of"
    unequal = {"gradient_accumulation_steps": 2, "max_skipped": 3, "upcycle_from": "runs/a"}
    for field, value in unequal.items():
        training = replace(mot.training, **{field: value})
        other = replace(study, entrants={**study.entrants, "mixture_of_tokens": replace(mot, training=training)})
        yield other, rf"\['mixture_of_tokens'\]: training.{field} = {value!r}: must be that of dense"
    head_z = replace(mot.training, losses=replace(mot.training.losses, head_z=1e-4))
    other = replace(study, entrants={**study.entrants, "mixture_of_tokens": replace(mot, training=head_z)})
    yield other, "training.losses.head_z = 0.0001: must be that of dense, 0.0"
    yield with_dense(study, data=replace(dense.data, shuffle_group_size=None)), "shuffle_group_size"
    yield with_dense(study, model=over_tokens), r"entrants\['dense'\]: .*over = 'tokens'.*causal"


def faulty_alternatives(study: Study):
    config, replace = study.entrants["token_choice"], dataclasses.replace
    place = r"alternatives\['token_choice'\]"
    other = with_layer(config, controller_init_scale=1.0)
    optimizer = replace(config.training.optimizer, learning_rate=0.02)
    rate = replace(other, training=replace(config.training, optimizer=optimizer))
    steps = replace(other, training=replace(config.training, steps=61))
    yield {"token_choise": {"a": other}}, r"alternatives\['token_choise'\]: must be of an .*did you mean 'token_choice'"
    yield {"token_choice": {"a-b": other}}, f"{place}: 'a-b' must have small letters.*; try 'a_b'"
    yield {"token_choice": {"a": rate}}, rf"{place}\['a'\]: training.optimizer.learning_rate = 0.02: .* try 0.01"
    yield {"token_choice": {"a": steps}}, rf"{place}\['a'\]: training.steps = 61: must be that of dense, 60"
    yield {"token_choice": {"a": config}}, rf"{place}\['a'\]: must differ from the entrant"
    yield {"token_choice": {"a": other, "b": other}}, rf"{place}\['b'\]: must differ from a"
    yield {"token_choice": {"a": with_layer(config, top_k=0)}}, rf"{place}\['a'\]: .*top_k = 0"


def test_a_study_with_alternatives_that_are_not_equal_is_refused(smoke):
    for alternatives, line in faulty_alternatives(smoke):
        with pytest.raises(UserError, match=line):
            plans.check_study(dataclasses.replace(smoke, alternatives=alternatives))
    factors = dataclasses.replace(smoke, alternatives={"dense": {}}, rate_factors=(0.75, 1.5, 3.0))
    with pytest.raises(UserError, match=r"rate_factors = .*: must have 1.0, that of alternatives"):
        plans.check_study(factors)


def test_a_study_that_compares_unequal_things_is_refused(smoke):
    for study, line in faulty_studies(smoke):
        with pytest.raises(UserError, match=line):
            plans.check_study(study)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", r"must define get_study\(\) -> Study"),
        ("def get_study():\n    return 1\n", r"get_study\(\) must return a Study, and returned 1"),
        ("def get_study():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
        ("x = (", "line 1: SyntaxError"),
    ],
)
def test_a_broken_study_file_is_refused_in_one_line(tmp_path, text, line):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=line) as error:
        load_study(path)
    assert str(error.value).startswith(f"STUDY = {path}")


def test_a_study_file_with_variants_has_one_study_for_each(tmp_path):
    path = tmp_path / "mine.py"
    smoke = (ROOT / "configs" / "studies" / "smoke.py").read_text().replace("def get_study()", "def small()")
    select = "from mot_jax.config import select\n\n\ndef get_study(variant=None):\n    "
    path.write_text(
        f'{smoke}\n\nVARIANTS = {{"small": small}}\n{select}return select(VARIANTS, variant, has_default=False)\n'
    )
    assert load_study(f"{path}:small") == load_study(ROOT / "configs" / "studies" / "smoke.py")
    assert name_of_variant(f"{path}:small") == "mine_small"
    for name, line in {path: "a variant must be named", f"{path}:smal": "no variant 'smal'"}.items():
        with pytest.raises(UserError) as error:
            load_study(name)
        assert str(error.value) == f"STUDY = {name}: {line}; the variants are small; try {path}:small"
    with pytest.raises(UserError, match=f"mine_small.py: no such file; did you mean '{path}:small'"):
        load_study(tmp_path / "mine_small.py")


def test_estimates_replace_flops_by_measured_steps(smoke):
    executed = plans.run_flops(smoke.entrants["dense"], 1)[1]
    study = dataclasses.replace(smoke, flops_per_second=executed, overhead_seconds=3.0)
    dense = study.entrants["dense"]
    assert plans.seconds_of(study, [dense], 10, 2, {}) == pytest.approx(16)
    assert plans.seconds_of(study, [dense], 10, 2, {dense.model: 0.5}) == pytest.approx(11)
    other = study.entrants["token_choice"]
    assert plans.seconds_of(study, [dense, other], 10, 2, {dense.model: 0.5, other.model: 0.7}) == pytest.approx(13)
