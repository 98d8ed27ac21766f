"""Transition tuning: a short run converts a Mixture-of-Tokens model into a token-choice one.

See `docs/paper.md`, section 4.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from matplotlib.figure import Figure

from mot_jax import modes
from mot_jax.config import (
    SAME_FUNCTION,
    Config,
    FeedForwardConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    TokenChoiceConfig,
)
from mot_jax.errors import UserError, nearest
from mot_jax.runs.metrics import png, read_rows
from mot_jax.runs.restore import load_run_config, load_training
from mot_jax.runs.scores import Score
from mot_jax.runs.state import TrainState, create_router, create_state
from mot_jax.runtime import distributed, strict_json
from mot_jax.runtime.paths import replace_file, user_path
from mot_jax.training.evaluation import evaluate_all_modes, evaluate_run

TARGETS = ("token_choice",)

# Fractions of the run's peak learning rate and warm-up steps, the best in short trials
# (docs/notes/2026-11-26-inference-modes.md).
_LEARNING_RATE, _WARMUP = 0.4, 0.1


def tuning_config(source: Config, workdir: str, to: str, steps: int) -> Config:
    """The config of a run that converts the model in `workdir`, whose config is `source`, into one of the kind `to`.

    The sequences of a mixing group become a routing group; the shuffle is the same.

    Raises:
        UserError: if the conversion does not exist, or the variant of mixing has parameters that a router lacks.
    """
    if to not in TARGETS:
        raise UserError(f"--to = {to!r}: no such kind to tune to{nearest(to, TARGETS)}")
    mixture = _at_fixed_temperature(_mixture(source, workdir))
    if mixture.mixing.learned_temperature != "none":
        raise UserError(f"WORKDIR = {workdir}: its temperature is learned, and a router has none; try another run")
    kind = modes.token_choice(_with(source, mixture)).model.feed_forward
    assert isinstance(kind, TokenChoiceConfig)
    tokens = source.group_size * source.model.context_length
    kind = dataclasses.replace(kind, capacity_factor=1.25, routing_group_tokens=tokens)
    losses = dataclasses.replace(source.training.losses, mixing_entropy=0.0, load_balancing=0.01)
    return _with(_continuing(source, workdir, steps, losses=losses), kind)


def annealing_config(source: Config, workdir: str, steps: int) -> Config:
    """The config of a run that continues the one in `workdir` while its temperature falls to 0. Raises UserError."""
    kind = _mixture(source, workdir)
    mixing = dataclasses.replace(kind.mixing, annealing="linear", final_temperature=0.0, annealing_steps=(0, steps))
    return _with(_continuing(source, workdir, steps), dataclasses.replace(kind, mixing=mixing))


def _continuing(source: Config, workdir: str, steps: int, **changes: Any) -> Config:
    """The config of a run of `steps` that begins as the one in `workdir`, with changed fields of the training."""
    optimizer = source.training.optimizer
    if source.training.transition_from is None:  # else annealing has changed them already
        optimizer = dataclasses.replace(
            optimizer,
            learning_rate=optimizer.learning_rate * _LEARNING_RATE,
            warmup_steps=round(optimizer.warmup_steps * _WARMUP),
        )
    training = dataclasses.replace(
        source.training,
        steps=steps,
        upcycle_from=None,
        transition_from=workdir,
        optimizer=optimizer,
        log_every=max(1, steps // 32),
        validate_every=max(1, steps // 8),
        checkpoint_every=max(1, steps // 4),
        **changes,
    )
    return dataclasses.replace(
        source, training=training, data=dataclasses.replace(source.data, shuffle_group_size=source.group_size)
    )


def _with(config: Config, kind: FeedForwardConfig) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=kind))


def _mixture(source: Config, workdir: str) -> MixtureOfTokensConfig:
    kind = source.model.feed_forward
    if not isinstance(kind, MixtureOfTokensConfig):
        raise UserError(f"WORKDIR = {workdir}: must be a Mixture-of-Tokens run, and is {kind.kind}; try such a run")
    return kind


def _at_fixed_temperature(kind: MixtureOfTokensConfig, temperature: float | None = None) -> MixtureOfTokensConfig:
    """The layer without annealing, at its final temperature or at the given one."""
    default, mixing = MixingConfig(), kind.mixing
    if temperature is None:
        temperature = mixing.temperature if mixing.annealing == "none" else mixing.final_temperature
    fixed = {name: getattr(default, name) for name in ("annealing", "final_temperature", "annealing_steps")}
    return dataclasses.replace(kind, mixing=dataclasses.replace(mixing, temperature=temperature, **fixed))


def check_transition(config: Config) -> None:
    """Raise UserError unless `transition_from` is a Mixture-of-Tokens run that `config` can continue.

    That needs the same parameters by name, an optimizer with the same state, and the same shuffle.
    """
    model, t, workdir = config.model, config.training, config.training.transition_from
    assert workdir is not None
    source = load_run_config(workdir)
    source_mixture, kind = _mixture(source, workdir), model.feed_forward
    mixture = kind.mixture if isinstance(kind, TokenChoiceConfig) else kind
    free = {"feed_forward", *SAME_FUNCTION}
    pairs = [
        ("model", source.model, model, [f.name for f in dataclasses.fields(ModelConfig) if f.name not in free]),
        ("training", source.training, t, ["seed"]),
        ("training.optimizer", source.training.optimizer, t.optimizer, ["name", "beta1", "decay", "mu_dtype"]),
        ("data", source.data, config.data, ["weights", "train_split", "text_feature"]),
    ]
    rule = f"must be as in training.transition_from = {workdir!r}"
    faults = [
        f"{path}.{name} = {getattr(new, name)!r}: {rule}; try {getattr(old, name)!r}"
        for path, old, new, names in pairs
        for name in names
        if getattr(new, name) != getattr(old, name)
    ]
    if config.group_size != source.group_size:
        faults.append(f"data.shuffle_group_size = {config.group_size}: {rule}; try {source.group_size}")
    if not isinstance(mixture, MixtureOfTokensConfig) or (
        _at_fixed_temperature(mixture, 1.0) != _at_fixed_temperature(source_mixture, 1.0)
    ):
        faults.append(f"model.feed_forward: {rule}, except for its temperature; try mot transition {workdir}")
    if faults:
        raise UserError(*faults)
    folder = user_path("training.transition_from", workdir) / "checkpoints"
    if not folder.exists() or not any(path.name.isdigit() for path in folder.iterdir()):
        raise UserError(
            f"training.transition_from = {workdir!r}: has no checkpoint yet; try again after the run has saved one"
        )


def transition_state(config: Config, mesh: Mesh) -> tuple[TrainState, int, list[str]]:
    """The state in which a run of `config` begins that continues `training.transition_from`.

    Parameters, the moments of the optimizer and their counts are those of that run, by name; the steps and the learning
    rate schedule start from 0. The training text continues where that run stopped, at the next whole batch. A `random`
    router has new initial weights, from another seed than that run's, but the same moments.

    Returns:
        The state, the index of its next example, and lines for the user.

    Raises:
        UserError, RetryableError: as `load_training`.
    """
    t = config.training
    assert t.transition_from is not None
    _, state, example = load_training(t.transition_from, mesh)
    optimizer = t.optimizer
    notes = [
        f"begins as {t.transition_from} after {int(state.step)} steps, with example {example:,}",
        f"learning rate up to {optimizer.learning_rate:g} in {optimizer.warmup_steps} steps, then down to "
        f"{optimizer.min_lr_ratio:g} of it",
    ]
    params = state.params
    if t.transition_router == "random":
        other_seed = dataclasses.replace(config, training=dataclasses.replace(t, seed=(t.seed + 1) % 2**32))
        random = create_state(other_seed, mesh).params
        params = {name: random[name] if name.endswith("/controller") else value for name, value in params.items()}
        notes += ["warning: with a random router, for comparison"]
    schedule = optax.ScaleByScheduleState
    opt_state = jax.tree.map(
        lambda part: schedule(jnp.zeros_like(part.count)) if isinstance(part, schedule) else part,
        state.opt_state,
        is_leaf=lambda part: isinstance(part, schedule),
    )
    batches = -(-example // t.batch_size)
    step, skipped, skipped_in_a_row = (jnp.zeros_like(state.step) for _ in range(3))
    router = create_router(config, mesh)
    return TrainState(step, params, opt_state, skipped, skipped_in_a_row, router), batches * t.batch_size, notes


# --- the losses before and after --------------------------------------------------------------------------------------


def report(config: Config, workdir: epath.PathLike, source: str, limit: int | None = None) -> list[str]:
    """Compare the run in `source` with the one in `workdir` that was tuned from it, in every inference mode.

    Writes `transition.json` and `transition.png` to `workdir`, or reads the former if it has the same settings. With
    several processes, each calls this.

    Args:
        config: of the tuned run.
        limit: windows to score, about; None: the whole validation split.

    Returns:
        Lines for the user, in process 0 only.

    Raises:
        UserError, RetryableError: as `evaluate_run`.
    """
    workdir = user_path("workdir", workdir)
    path, steps = workdir / "transition.json", config.training.steps
    settings = {"from": source, "tuned": str(workdir), "steps": steps, "limit": limit}
    with distributed.together():
        result = _read_report(path)
    if not distributed.gather(result.items() >= settings.items())[0]:
        source_config = dataclasses.replace(load_run_config(source), mesh=config.mesh)
        result = {**settings, "router": config.training.transition_router}
        result |= {"before": _scores(source_config, source, limit), "after": _scores(config, workdir, limit)}
        # On the same windows as the validations during the run, which may be fewer.
        split, run_limit = config.data.validation_split, config.data.validation_windows
        result["grouped"] = evaluate_run(source, source_config, split, run_limit)[0]["loss"]
        last = evaluate_run(workdir, config, split, run_limit, ["token_choice"])[0]
        if distributed.is_first():
            rows = [row for row in read_rows(workdir) if row["split"] == "validation" and row["step"] < steps]
            result["curve"] = [(row["step"], row["loss"]) for row in [*rows, last]]
            replace_file(workdir / "transition.png", _picture(result))
            replace_file(path, (strict_json.dumps(result, indent=1) + "\n").encode())
    return _lines(result) if distributed.is_first() else []


def _read_report(path: epath.Path) -> dict[str, Any]:
    """The content of `transition.json`; empty if there is none. Raises UserError if it is damaged."""
    if not path.exists():
        return {}
    advice = f"try rm -r {path}, and the same command writes it again"
    result: dict[str, Any] = strict_json.load(path, dict, advice)
    if missing := [key for key in ("from", "before", "after", "grouped", "curve") if key not in result]:
        raise UserError(f"{path}: is damaged (without {missing[0]}); {advice}")
    return result


def _scores(config: Config, workdir: epath.PathLike, limit: int | None) -> dict[str, Score]:
    """The scores of a run in all inference modes that it has, by mode."""
    scores, _ = evaluate_all_modes(workdir, config, config.data.validation_split, limit)
    return {score["mode"]: score for score in scores}


def _lines(result: dict[str, Any]) -> list[str]:
    before, after = result["before"], result["after"]

    def cell(scores: dict[str, Score], mode: str) -> str:
        if mode not in scores:
            return ""
        loss, baseline = _number(scores[mode]["loss"]), _number(before["grouped"]["loss"])
        return f"{loss:.4f} ({loss / baseline - 1:+6.1%})"

    words = "in brackets, compared with the former in groups"
    lines = [f"validation loss of {result['from']} and of {result['tuned']}; {words}"]
    lines += [f"{'mode':12} | {'before':17} | after"]
    for mode in before | after:
        lines.append(f"{mode:12} | {cell(before, mode):17} | {cell(after, mode)}".rstrip())
    first, last, grouped = map(_number, (result["curve"][0][1], result["curve"][-1][1], result["grouped"]))
    compared = f"{grouped:.4f} in groups before, on the same windows"
    lines.append(f"validations during the tuning: from {first:.4f} to {last:.4f}, compared with {compared}")
    losses = [_number(score["loss"]) for scores in (before, after) for score in scores.values()]
    if not all(map(math.isfinite, [*losses, first, last, grouped])):
        lines.append("warning: nan marks a loss that is not finite: that model has diverged")
    return lines


def _number(loss: float | None) -> float:
    """A loss from a JSON file, which has null in place of one that is not finite."""
    return math.nan if loss is None else loss


def _picture(result: dict[str, Any]) -> bytes:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*result["curve"], strict=True)
    axes.plot(steps, list(map(_number, losses)), marker="o", label="token choice, tuned")
    axes.axhline(result["grouped"], color="C1", linestyle="--", label="Mixture of Tokens, grouped, before")
    axes.set(xlabel="step of tuning", ylabel="validation loss in nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure)
