"""A study and its runs.

A study compares *entrants*, named configs of equal cost, in three stages:

tuning: an entrant that has alternatives is first trained once with each of its configs, its candidates, and the best
    one is chosen. Each entrant is then trained at several learning rates. While the best one is at an end of the grid,
    the grid is extended by one, at most `max_extensions` times.
seeds: each entrant is trained at its best rate with fresh seeds. Runs of one seed have the same training batches.
horizons: shorter schedules, to find the shortest one that reaches the target loss.

`plan` is a function of the study and of the final losses so far, so that any process can continue a study.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from mot_jax.benchmark.study.statistics import horizons_left, next_horizon
from mot_jax.config import Config, ModelConfig, check, leaves
from mot_jax.config.files import call_in_file
from mot_jax.cost.flops import executed_flops_per_token, flops_per_token
from mot_jax.data.text import with_absolute_paths
from mot_jax.errors import RetryableError, UserError, nearest
from mot_jax.modes import default_mode, trained_mode
from mot_jax.runtime import strict_json

PROTOCOL_SEEDS = 5
TUNING, SEEDS, HORIZONS = STAGES = ("tuning", "seeds", "horizons")


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of training runs.

    Attributes:
        title: of the report.
        entrants: configs by name. The learning rate of each is the middle of its grid, its seed is not used.
        alternatives: other configs of entrants, by the name of the entrant and a short one, with its learning rate. Of
            its own config and these, the first with the lowest loss at this rate is tuned and compared.
        budget_hours: a study whose runs would take longer is refused, unless other hours are given.
        seeds: of the runs that are compared.
        tuning_seed: of the runs that choose the learning rate.
        rate_factors: the grid of learning rates, as multiples of the entrant's.
        max_extensions: how often the grid is extended by a factor of 2.
        horizons: schedules to try, as shares of the steps.
        horizon_seeds: the seeds with which they are tried.
        target: the entrant whose mean final loss is the target of the others.
        compared: the entrant with which every other is compared in tests.
        pairs: of entrants, whose final losses are compared in addition.
        flops_per_second: for the estimate of hours before any run has finished; an entrant's finished runs replace it.
        overhead_seconds: time of a run in addition to its steps, mainly for compilation; also for the estimate only.
    """

    title: str
    entrants: Mapping[str, Config]
    budget_hours: float
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    tuning_seed: int = 0
    rate_factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    max_extensions: int = 2
    horizons: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    horizon_seeds: tuple[int, ...] = (1,)
    target: str = "dense"
    compared: str = "mixture_of_tokens"
    pairs: tuple[tuple[str, str], ...] = ()
    flops_per_second: float = 1e10
    overhead_seconds: float = 20.0
    alternatives: Mapping[str, Mapping[str, Config]] = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> int:
        """The number of steps of every run but those of shorter schedules."""
        return self.entrants[self.target].training.steps


class Run(NamedTuple):
    """A training run of a study.

    config: None if the candidate or the learning rate has not been chosen yet. needs: the runs that choose it.
    """

    name: str
    entrant: str
    stage: str
    seed: int
    steps: int
    config: Config | None
    needs: tuple[str, ...] = ()


class Tuning(NamedTuple):
    """The tuning of an entrant so far.

    candidates: configs that the entrant can still have, by name; one if a candidate is chosen, or has no alternative.
    rates: of the grid, with its extensions, increasing, by run; none until a candidate is chosen. chosen: the best one;
    None until all are trained, or if the loss of none is finite. at_end: the best rate is at an end of the grid, which
    is not extended further.
    """

    candidates: dict[str, Config]
    rates: dict[str, float]
    chosen: float | None = None
    complete: bool = False
    at_end: bool = False

    @property
    def fails(self) -> bool:
        """Whether no rate of the grid trains, so that the entrant has no further runs."""
        return self.complete and self.chosen is None


class Further(NamedTuple):
    """Runs that a study may have in addition to the known ones, depending on losses.

    names: those that they can have. at_most: the largest number of them. steps: the most that one of them has. needs:
    the runs that have not ended and on whose losses they depend.
    """

    entrant: str
    names: tuple[str, ...]
    at_most: int
    steps: int
    needs: tuple[str, ...]


class Plan(NamedTuple):
    """All runs of a study that are known so far, in the order in which they are trained.

    tunings: by entrant.
    """

    runs: list[Run]
    tunings: dict[str, Tuning]
    further: list[Further]

    def configs(self, run: Run) -> list[Config]:
        """The configs of which a run can have one, for estimates of its cost."""
        return [*self.tunings[run.entrant].candidates.values()] if run.config is None else [run.config]

    def run(self, name: str) -> Run:
        """The run of this name.

        Raises:
            UserError: if the study has no such run.
            RetryableError: if it may have it later.
        """
        runs = {run.name: run for run in self.runs}
        for further in self.further:
            if name in further.names:
                advice = f"try again after {', '.join(further.needs)}"
                raise RetryableError(f"--run = {name}: whether the study has this run is not decided yet; {advice}")
        if name not in runs:
            raise UserError(f"--run = {name}: the study has no such run{nearest(name, runs)}")
        return runs[name]


# --- study files ------------------------------------------------------------------------------------------------------


def load_study(name: str | os.PathLike[str]) -> Study:
    """Load the study of a Python file.

    The file defines `get_study() -> Study`; or, if it has several, which are named as `FILE.py:VARIANT`,
    `VARIANTS: dict[str, Callable[[], Study]]` and `get_study(variant: str | None = None) -> Study`, see
    `mot_jax.config.select`.

    Raises:
        UserError: the file is missing or broken, has no such variant, or its study compares unequal things.
    """
    study = call_in_file("STUDY", name, "get_study() -> Study", "configs/studies/smoke.py")
    if not isinstance(study, Study):
        raise UserError(f"STUDY = {name}: get_study() must return a Study, and returned {study!r}")
    check_study(study)
    return study


def check_study(study: Study) -> None:
    """Raise UserError with every error of a study."""
    faults = [*_own_faults(study), *_alternative_faults(study)]
    for place, config in _configs(study).items():
        try:
            check(config)
        except UserError as error:
            faults += [f"{place}: {fault}" for fault in error.faults]
    if not faults:
        faults += _unequal_fields(study)
    if faults:
        raise UserError(*faults)


def _configs(study: Study) -> dict[str, Config]:
    """Return the configs of entrants and alternatives, by their place in the study."""
    configs = {f"entrants[{name!r}]": config for name, config in study.entrants.items()}
    for entrant, alternatives in study.alternatives.items():
        configs |= {f"alternatives[{entrant!r}][{name!r}]": config for name, config in alternatives.items()}
    return configs


def _own_faults(study: Study) -> Iterator[str]:
    yield from _name_faults("entrants", study.entrants)
    for role in ("target", "compared"):
        if (name := getattr(study, role)) not in study.entrants:
            yield f"{role} = {name!r}: must be an entrant{nearest(name, study.entrants)}"
    for pair in study.pairs:
        for name in pair:
            if name not in study.entrants:
                yield f"pairs: {name!r} must be an entrant{nearest(name, study.entrants)}"
        if len(set(pair)) < 2:
            yield f"pairs: {pair} must be two different entrants; try {('dense', study.compared)}"
    factors = sorted(study.rate_factors)
    if len(factors) < 3 or any(high != 2 * low for low, high in itertools.pairwise(factors)):
        yield f"rate_factors = {study.rate_factors}: must be 3 or more, each twice the one before; try (0.5, 1.0, 2.0)"
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        yield f"seeds = {study.seeds}: must be different numbers, at least one; try (1, 2, 3, 4, 5)"
    if study.tuning_seed in study.seeds:
        yield f"tuning_seed = {study.tuning_seed}: must not be one of seeds = {study.seeds}; try {max(study.seeds) + 1}"
    if not set(study.horizon_seeds) <= set(study.seeds):
        yield f"horizon_seeds = {study.horizon_seeds}: must be among seeds = {study.seeds}; try {study.seeds[:1]}"
    if not all(0 < share < 1 for share in study.horizons):
        yield f"horizons = {study.horizons}: must be between 0 and 1; try (0.5,)"
    if study.max_extensions < 0:
        yield f"max_extensions = {study.max_extensions}: must be at least 0; try 2"
    for name in ("budget_hours", "flops_per_second"):
        if getattr(study, name) <= 0:
            yield f"{name} = {getattr(study, name)}: must be above 0; try 1"


def _alternative_faults(study: Study) -> Iterator[str]:
    if study.alternatives and 1.0 not in study.rate_factors:
        yield f"rate_factors = {study.rate_factors}: must have 1.0, that of alternatives; try (0.5, 1.0, 2.0)"
    for entrant, alternatives in study.alternatives.items():
        place = f"alternatives[{entrant!r}]"
        if entrant not in study.entrants:
            yield f"{place}: must be of an entrant{nearest(entrant, study.entrants)}"
            continue
        yield from _name_faults(place, alternatives)
        rate = study.entrants[entrant].training.optimizer.learning_rate
        others = {"the entrant": study.entrants[entrant]}
        for name, config in alternatives.items():
            if (other_rate := config.training.optimizer.learning_rate) != rate:
                rule = f"must be that of {entrant}, {rate!r}"
                yield f"{place}[{name!r}]: training.optimizer.learning_rate = {other_rate!r}: {rule}; try {rate!r}"
            for other in (other for other, known in others.items() if known == config):
                yield f"{place}[{name!r}]: must differ from {other}, and has the same config; try to remove it"
            others[name] = config


def _name_faults(place: str, names: Mapping[str, Config]) -> Iterator[str]:
    for name in names:
        if not re.fullmatch(r"[a-z0-9_]+", name):
            yield f"{place}: {name!r} must have small letters, digits and _ only; try {_plain(name)!r}"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "_", name.lower()) or "mine"


def _unequal_fields(study: Study) -> Iterator[str]:
    """Yield the fields of entrants and alternatives that must be equal for a comparison, and are not."""
    target = study.entrants[study.target]
    for place, config in _configs(study).items():
        for field, value in _equal_fields(config).items():
            expected = _equal_fields(target)[field]
            if value != expected:
                rule = f"must be that of {study.target}, {expected!r}"
                yield f"{place}: {field} = {value!r}: {rule}; try {expected!r}"
        for share in study.horizons:
            try:
                check(_with(config, 1.0, 0, _steps(config.training.steps, share)))
            except UserError as error:
                yield from (f"{place}, schedule of {share} of the steps: {f}" for f in error.faults)


def _equal_fields(config: Config) -> dict[str, Any]:
    """All but the layer, its auxiliary losses and the tuned rate, with the multipliers that name its parameters.

    The report lists the differences in these.
    """
    training, model, data = config.training, config.model, config.data
    fields = {f"data.{name}": value for name, value in vars(data).items() if name != "shuffle_group_size"}
    layer = ("feed_forward", "d_ff", "dense_bias", "moe_blocks")
    fields |= {f"model.{name}": value for name, value in vars(model).items() if name not in layer}
    no_part = ("seed", "optimizer", "losses", "log_every", "checkpoint_every")
    fields |= {f"training.{name}": value for name, value in vars(training).items() if name not in no_part}
    fields["training.losses.head_z"] = training.losses.head_z  # the only loss that is not of layers
    tuned = ("learning_rate", "multipliers")
    optimizer = vars(training.optimizer)
    fields |= {f"training.optimizer.{name}": value for name, value in optimizer.items() if name not in tuned}
    return fields | {"data.shuffle_group_size (or the groups of the model)": config.group_size}


# --- the runs ---------------------------------------------------------------------------------------------------------


def candidates(study: Study, entrant: str) -> dict[str, Config]:
    """Return the configs from which that of an entrant is chosen, its own first, by the prefix of their runs' names."""
    alternatives = study.alternatives.get(entrant, {})
    return {entrant: study.entrants[entrant]} | {f"{entrant}-{name}": c for name, c in alternatives.items()}


def candidate_runs(study: Study, entrant: str) -> dict[str, str]:
    """Return the names of the runs by which a candidate is chosen, those at the entrant's learning rate."""
    return {name: _tuning_run(name, _middle(study, entrant)) for name in candidates(study, entrant)}


def _middle(study: Study, entrant: str) -> float:
    return study.entrants[entrant].training.optimizer.learning_rate


def _grid(study: Study, entrant: str) -> list[float]:
    """Return the learning rates of an entrant's grid without extensions, increasing."""
    return [_middle(study, entrant) * factor for factor in sorted(study.rate_factors)]


def tune(study: Study, entrant: str, losses: Mapping[str, float]) -> Tuning:
    """Return the chosen candidate of an entrant, its grid, and the best rate in it, from the losses so far by run."""
    configs, runs = candidates(study, entrant), candidate_runs(study, entrant)
    if len(configs) > 1 and any(run not in losses for run in runs.values()):
        return Tuning(configs, {})
    name = min(configs, key=lambda name: losses.get(runs[name], math.inf))  # the first of equal ones
    rates = _grid(study, entrant)
    for extension in range(study.max_extensions + 1):
        grid = {_tuning_run(name, rate): rate for rate in rates}
        if any(run not in losses for run in grid):
            return Tuning({name: configs[name]}, grid)
        best = grid[min(grid, key=lambda run: losses[run])]  # the lowest of equal ones
        if best not in (rates[0], rates[-1]):
            break
        if extension < study.max_extensions:
            rates = [best / 2, *rates] if best == rates[0] else [*rates, best * 2]
    at_end, trains = best in (rates[0], rates[-1]), math.isfinite(losses[_tuning_run(name, best)])
    return Tuning({name: configs[name]}, grid, best if trains else None, True, at_end)


def target_loss(study: Study, losses: Mapping[str, float]) -> float | None:
    """Return the target: the mean over the seeds of the target entrant's final loss; None until all are trained.

    Infinite if one of them has diverged: no run reaches it.
    """
    final = [losses[name] for name in seed_runs(study, study.target).values() if name in losses]
    return sum(final) / len(final) if len(final) == len(study.seeds) or math.inf in final else None


def plan(study: Study, losses: Mapping[str, float]) -> Plan:
    """Return the runs of a study.

    Args:
        losses: the final loss of each run that has ended, by name; infinite if it diverged.
    """
    tunings, tuning_runs, further = {}, [], []
    for entrant in study.entrants:
        tunings[entrant] = tuning = tune(study, entrant, losses)
        tuning_runs += _tuning_runs(study, entrant, tuning)
        further.append(_further_tuning(study, entrant, tuning, losses))
    compared_runs = []
    for seed in study.seeds:
        for entrant in study.entrants:
            tuning = tunings[entrant]
            if not tuning.fails:
                compared_runs.append(_chosen_run(study, tuning, entrant, seed, study.steps))
    horizon_runs = []
    for seed in study.horizon_seeds:
        for entrant in study.entrants:
            if entrant == study.target or tunings[entrant].fails or tunings[study.target].fails:
                continue
            known, possible = _horizon_runs(study, tunings[entrant], entrant, seed, losses)
            horizon_runs += known
            further.append(possible)
    return Plan([*tuning_runs, *compared_runs, *horizon_runs], tunings, [some for some in further if some.at_most])


def horizon_losses(study: Study, entrant: str, seed: int, losses: Mapping[str, float]) -> dict[float, float]:
    """Return the final losses of an entrant's schedules so far, by their share of the steps."""
    names = {share: _horizon_run(entrant, seed, _steps(study.steps, share)) for share in study.horizons}
    names[1.0] = _seed_run(entrant, seed)
    return {share: losses[name] for share, name in sorted(names.items()) if name in losses}


def _tuning_runs(study: Study, entrant: str, tuning: Tuning) -> list[Run]:
    """Return the runs of an entrant's candidates, then those of the grid of the chosen one."""
    configs, middle, decided = candidates(study, entrant), _middle(study, entrant), bool(tuning.rates)
    runs = candidate_runs(study, entrant).items()
    points = [(run, configs[name], middle) for name, run in runs if not (decided and name in tuning.candidates)]
    if decided:
        (chosen,) = tuning.candidates.values()
        points += [(run, chosen, rate) for run, rate in tuning.rates.items()]
    return [
        Run(run, entrant, TUNING, study.tuning_seed, study.steps, _with(config, rate, study.tuning_seed, study.steps))
        for run, config, rate in points
    ]


def _further_tuning(study: Study, entrant: str, tuning: Tuning, losses: Mapping[str, float]) -> Further:
    """Return the grid, if the candidate is not chosen yet, and the extensions that are still possible."""
    if tuning.complete:
        return Further(entrant, (), 0, study.steps, ())
    grid = _grid(study, entrant)
    rates = [*tuning.rates.values()] or grid
    best = min((losses[run] for run in tuning.rates if run in losses), default=math.inf)
    at_least = {rate: losses.get(run, best) for run, rate in tuning.rates.items()}
    ends = [(rate, factor) for rate, factor in ((rates[0], 0.5), (rates[-1], 2.0)) if at_least.get(rate, best) <= best]
    extensions = study.max_extensions - (len(rates) - len(grid)) if ends else 0
    untried = [] if tuning.rates else [rate for rate in grid if rate != _middle(study, entrant)]
    possible = [*untried, *(rate * factor ** (i + 1) for rate, factor in ends for i in range(extensions))]
    names = tuple(_tuning_run(name, rate) for name in tuning.candidates for rate in possible)
    needed = tuning.rates or candidate_runs(study, entrant).values()
    needs = tuple(run for run in needed if run not in losses)
    return Further(entrant, names, len(untried) + extensions, study.steps, needs)


def _horizon_runs(
    study: Study, tuning: Tuning, entrant: str, seed: int, losses: Mapping[str, float]
) -> tuple[list[Run], Further]:
    """Return the schedules of the bisection so far, with the next one, and those that may follow."""
    shares = [*sorted(study.horizons), 1.0]
    trained, target = horizon_losses(study, entrant, seed, losses), target_loss(study, losses)
    runs: list[Run] = []

    def further(possible: list[float], at_most: int, needs: Iterable[str]) -> Further:
        steps = [_steps(study.steps, share) for share in possible]
        names = tuple(_horizon_run(entrant, seed, some) for some in steps)
        return Further(entrant, names, at_most, max(steps, default=0), tuple(run for run in needs if run not in losses))

    if math.inf in (target, trained.get(1.0)):
        return [], further([], 0, ())
    if 1.0 not in trained or target is None:
        needs = dict.fromkeys([_seed_run(entrant, seed), *seed_runs(study, study.target).values()])
        return [], further(shares[:-1], len(study.horizons).bit_length(), needs)
    bisected = {1.0: trained[1.0]}
    while left := horizons_left(shares, bisected, target):
        share = next_horizon(left)
        runs.append(_chosen_run(study, tuning, entrant, seed, _steps(study.steps, share)))
        if share not in trained:
            possible = [other for other in left if other != share]
            return runs, further(possible, len(left).bit_length() - 1, [runs[-1].name])
        bisected[share] = trained[share]
    return runs, further([], 0, ())


def _chosen_run(study: Study, tuning: Tuning, entrant: str, seed: int, steps: int) -> Run:
    """Return a run of the chosen candidate at the chosen rate."""
    full = steps == study.steps
    name, stage = (_seed_run(entrant, seed), SEEDS) if full else (_horizon_run(entrant, seed, steps), HORIZONS)
    if tuning.chosen is None:
        needs = tuple(tuning.rates or candidate_runs(study, entrant).values())
        return Run(name, entrant, stage, seed, steps, None, needs)
    (candidate,) = tuning.candidates.values()
    return Run(name, entrant, stage, seed, steps, _with(candidate, tuning.chosen, seed, steps))


def _tuning_run(entrant: str, rate: float) -> str:
    return f"{entrant}-rate-{rate:.6g}"


def _seed_run(entrant: str, seed: int) -> str:
    return f"{entrant}-seed-{seed}"


def _horizon_run(entrant: str, seed: int, steps: int) -> str:
    return f"{entrant}-seed-{seed}-steps-{steps}"


def seed_runs(study: Study, entrant: str) -> dict[int, str]:
    """Return the names of an entrant's runs at its best rate, by seed."""
    return {seed: _seed_run(entrant, seed) for seed in study.seeds}


def _steps(steps: int, share: float) -> int:
    return max(1, round(share * steps))


def _with(config: Config, rate: float, seed: int, steps: int) -> Config:
    """Return the config of a run.

    The last evaluation scores the windows of the others. Only the last checkpoint is retained, and nothing is written
    that is not read.
    """
    optimizer = dataclasses.replace(config.training.optimizer, learning_rate=rate)
    training = dataclasses.replace(config.training, optimizer=optimizer, seed=seed, steps=steps)
    logging = dataclasses.replace(config.logging, tensorboard=False, wandb=False, sample_tokens=0)
    checkpoint = dataclasses.replace(config.checkpoint, max_to_keep=1, keep_every=0, keep_best=0)
    data = dataclasses.replace(config.data, final_validation_windows=config.data.validation_windows)
    changed = dataclasses.replace(config, training=training, logging=logging, checkpoint=checkpoint, data=data)
    return with_absolute_paths(changed)  # as the run stores them


def few_seeds(seeds: int) -> str | None:
    """Return the warning of a study with fewer seeds than the protocol asks for, else None."""
    if seeds >= PROTOCOL_SEEDS:
        return None
    count = f"{seeds} seed{'s' * (seeds != 1)}"
    return f"{count}, of {PROTOCOL_SEEDS} or more that the protocol asks for: few differences can be significant"


# --- identity and cost of a run ---------------------------------------------------------------------------------------

# Fields that may differ when a run is resumed, and on which the evaluations of a study depend.
_EVALUATION = ("data.validation_windows", "data.final_validation_windows", "training.validate_every")


def identity(config: Config) -> dict[str, Any]:
    """Return the fields on which the result of a run depends, except for its text, which has fingerprints."""
    fields = {"model.feed_forward.kind": config.model.feed_forward.kind}
    for name, field, _, value in leaves(config):
        if field.metadata.get("resume", "identity") not in ("free", "content") or name in _EVALUATION:
            fields[name] = value
    return fields


def execution(config: Config) -> dict[str, Any]:
    """Return the fields of the model that change the result of a run by rounding only, and the time of its steps."""
    fields = ((name, field.metadata.get("resume"), value) for name, field, _, value in leaves(config))
    return {name: value for name, rule, value in fields if rule == "free" and name.startswith("model.")}


def identity_hash(config: Config) -> str:
    """Return a hash of `identity`."""
    return hashlib.sha256(strict_json.dumps(identity(config), sort_keys=True).encode()).hexdigest()


def headline_mode(config: Config) -> str:
    """Return the inference mode whose loss is compared: one in which no sequence depends on another, if there is one.

    `trained` if the evaluations during training are in this mode already.
    """
    mode, _ = default_mode(config)
    return "trained" if mode == trained_mode(config) else mode


def run_flops(config: Config, steps: int) -> tuple[float, float]:
    """Return the useful and the executed FLOPs of a number of training steps."""
    tokens = config.training.batch_size * config.model.context_length * steps
    return flops_per_token(config) * tokens, executed_flops_per_token(config) * tokens


def seconds_of(
    study: Study, configs: Iterable[Config], steps: int, runs: int, step_seconds: Mapping[ModelConfig, float]
) -> float:
    """Estimate the time of runs that have one of these configs, from measured times of a step where they are known."""
    times = [step_seconds.get(config.model) or run_flops(config, 1)[1] / study.flops_per_second for config in configs]
    return runs * study.overhead_seconds + steps * max(times)
