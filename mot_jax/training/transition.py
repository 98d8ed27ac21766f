"""Transition tuning: a Mixture-of-Tokens model becomes a token-choice one by a short run (PAPER.md section 4)."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from matplotlib.figure import Figure

from mot_jax import modes
from mot_jax.config import (
    Config,
    FeedForwardConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    TokenChoiceConfig,
)
from mot_jax.errors import UserError, nearest
from mot_jax.modes.companions import load_companions
from mot_jax.runs.metrics import png, read_rows
from mot_jax.runs.restore import load_run_config, load_whole
from mot_jax.runs.scores import Score
from mot_jax.runs.state import TrainState, create_state
from mot_jax.runtime import distributed
from mot_jax.runtime.paths import replace_file, user_path
from mot_jax.training.evaluation import evaluate_run

TARGETS = ("token_choice",)

# What served best in short trials (docs/inference.md): of the run's peak, and of its steps of warm-up.
_LEARNING_RATE, _WARMUP = 0.4, 0.1


def tuning_config(source: Config, workdir: str, to: str, steps: int) -> Config:
    """The config of a run that makes of the one in `workdir`, whose config is `source`, a model of the kind `to`.

    Routing groups are the rows of the groups that were mixed, and the shuffle is the same. Raises UserError, also
    for a variant of mixing whose parameters a router has no place for.
    """
    if to not in TARGETS:
        raise UserError(f"--to = {to!r}: no such kind to tune to{nearest(to, TARGETS)}")
    mixture = _settled(_mixture(source, workdir))
    if mixture.mixing.learned_temperature != "none":
        raise UserError(f"WORKDIR = {workdir}: its temperature is learned, and a router has none; try another run")
    kind = modes.token_choice(_with(source, mixture)).model.feed_forward
    assert isinstance(kind, TokenChoiceConfig)
    tokens = source.group_size * source.model.context_length
    kind = dataclasses.replace(kind, capacity_factor=1.25, routing_group_tokens=tokens)
    losses = dataclasses.replace(source.training.losses, mixing_entropy=0.0, load_balancing=0.01)
    return _with(_begun_as(source, workdir, steps, losses=losses), kind)


def annealing_config(source: Config, workdir: str, steps: int) -> Config:
    """The config of a run that goes on with that in `workdir` while its temperature falls to 0. Raises UserError."""
    kind = _mixture(source, workdir)
    mixing = dataclasses.replace(kind.mixing, annealing="linear", final_temperature=0.0, annealing_steps=(0, steps))
    return _with(_begun_as(source, workdir, steps), dataclasses.replace(kind, mixing=mixing))


def _begun_as(source: Config, workdir: str, steps: int, **changes: Any) -> Config:
    old, optimizer = source.training, source.training.optimizer
    if old.transition_from is None:  # after annealing they are what they are to be
        optimizer = dataclasses.replace(
            optimizer,
            learning_rate=optimizer.learning_rate * _LEARNING_RATE,
            warmup_steps=round(optimizer.warmup_steps * _WARMUP),
        )
    training = dataclasses.replace(
        old,
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
        raise UserError(f"WORKDIR = {workdir}: must be a Mixture-of-Tokens run, and is {kind.kind}; try such a one")
    return kind


def _settled(kind: MixtureOfTokensConfig, temperature: float | None = None) -> MixtureOfTokensConfig:
    """The layer at the temperature that annealing ended with, or at another one."""
    plain, mixing = MixingConfig(), kind.mixing
    if temperature is None:
        temperature = mixing.temperature if mixing.annealing == "none" else mixing.final_temperature
    fixed = {name: getattr(plain, name) for name in ("annealing", "final_temperature", "annealing_steps")}
    return dataclasses.replace(kind, mixing=dataclasses.replace(mixing, temperature=temperature, **fixed))


def check_transition(config: Config) -> None:
    """Raises UserError unless `transition_from` is a Mixture-of-Tokens run that `config` may go on with: the same
    weights by name, an optimizer with the same state, the same shuffle.
    """
    model, t, workdir = config.model, config.training, config.training.transition_from
    assert workdir is not None
    source = load_run_config(workdir)
    old = _mixture(source, workdir)
    kind = model.feed_forward
    mine = kind.mixture if isinstance(kind, TokenChoiceConfig) else kind
    free = {"feed_forward", "dtype", "attention_kernel", "remat", "loss_chunk"}
    pairs = [
        ("model", source.model, model, [f.name for f in dataclasses.fields(ModelConfig) if f.name not in free]),
        ("training", source.training, t, ["seed"]),
        ("training.optimizer", source.training.optimizer, t.optimizer, ["name", "beta1", "decay", "mu_dtype"]),
        ("data", source.data, config.data, ["corpus", "weights", "train_split", "text_feature", "tokenizer"]),
    ]
    rule = f"must be as in training.transition_from = {workdir!r}"
    faults = [
        f"{path}.{name} = {getattr(here, name)!r}: {rule}; try {getattr(there, name)!r}"
        for path, there, here, names in pairs
        for name in names
        if getattr(here, name) != getattr(there, name)
    ]
    if config.group_size != source.group_size:
        faults.append(f"data.shuffle_group_size = {config.group_size}: {rule}; try {source.group_size}")
    if not isinstance(mine, MixtureOfTokensConfig) or _settled(mine, 1.0) != _settled(old, 1.0):
        faults.append(f"model.feed_forward: {rule}, but for its temperature; try mot transition {workdir}")
    if faults:
        raise UserError(*faults)
    folder = user_path("training.transition_from", workdir) / "checkpoints"
    if not folder.exists() or not any(path.name.isdigit() for path in folder.iterdir()):
        raise UserError(
            f"training.transition_from = {workdir!r}: has no checkpoint yet; try again after the run has saved one"
        )


def transition_state(config: Config, mesh: Mesh) -> tuple[TrainState, int, list[str]]:
    """The state in which the run of `config` begins, its first example, and notes for people.

    Weights, moments and the moments' counts are those of `transition_from`, by name; steps and learning rate begin
    anew. The text goes on where that run stopped, at the next whole batch. Of a `random` router only the initial draw
    is new, by another seed than that run's; the moments are not. Raises what `load_whole` raises.
    """
    t = config.training
    assert t.transition_from is not None
    _, state, example = load_whole(t.transition_from, mesh)
    o = t.optimizer
    notes = [
        f"begins as {t.transition_from} after {int(state.step)} steps, with example {example:,}",
        f"learning rate up to {o.learning_rate:g} in {o.warmup_steps} steps, then down to {o.min_lr_ratio:g} of it",
    ]
    params = state.params
    if t.transition_router == "random":
        other = dataclasses.replace(config, training=dataclasses.replace(t, seed=(t.seed + 1) % 2**32))
        drawn = create_state(other, mesh).params
        params = {name: drawn[name] if name.endswith("/controller") else value for name, value in params.items()}
        notes += ["warning: with a random router, for comparison"]
    schedule = optax.ScaleByScheduleState
    opt_state = jax.tree.map(
        lambda part: schedule(jnp.zeros_like(part.count)) if isinstance(part, schedule) else part,
        state.opt_state,
        is_leaf=lambda part: isinstance(part, schedule),
    )
    batches = -(-example // t.batch_size)
    return TrainState(jnp.zeros_like(state.step), params, opt_state), batches * t.batch_size, notes


# --- what it cost and what it gave ------------------------------------------------------------------------------------


def report(config: Config, workdir: epath.PathLike, source: str, limit: int | None = None) -> list[str]:
    """The losses in every mode of the run in `source`, and of the one in `workdir` that came of it: lines for people.

    config: of the latter. limit: windows to score; None: the whole validation split. Writes `transition.json` and
    `transition.png` there; where they are, it reads the first. Of several processes, each calls it, and the first gets
    the lines. Raises what `evaluate_run` raises.
    """
    workdir = user_path("workdir", workdir)
    path, steps = workdir / "transition.json", config.training.steps
    about = {"from": source, "tuned": str(workdir), "steps": steps, "limit": limit}
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if not distributed.gather(found.items() >= about.items())[0]:
        old = dataclasses.replace(load_run_config(source), mesh=config.mesh)
        found = {**about, "router": config.training.transition_router}
        found |= {"before": _scores(old, source, limit), "after": _scores(config, workdir, limit)}
        # The windows that the run was scored on meanwhile may be fewer.
        split, fewer = config.data.validation_split, config.data.validation_windows
        found["grouped"] = evaluate_run(source, old, split, fewer)[0]["loss"]
        last = evaluate_run(workdir, config, split, fewer, ["token_choice"])[0]
        if distributed.is_first():
            rows = [row for row in read_rows(workdir) if row["split"] == "validation" and row["step"] < steps]
            found["curve"] = [(row["step"], row["loss"]) for row in [*rows, last]]
            replace_file(workdir / "transition.png", _picture(found))
            replace_file(path, (json.dumps(found, indent=1) + "\n").encode())
    return _lines(found) if distributed.is_first() else []


def _scores(config: Config, workdir: epath.PathLike, limit: int | None) -> dict[str, Score]:
    """By mode, in all that the run has."""
    companions = load_companions(workdir)
    there = [mode for mode in modes.MODES if modes.lacking(mode, config, companions) is None]
    return {s["mode"]: s for s in evaluate_run(workdir, config, config.data.validation_split, limit, there)}


def _lines(found: dict[str, Any]) -> list[str]:
    before, after = found["before"], found["after"]
    of = before["grouped"]["loss"]

    def cell(scores: dict[str, Score], mode: str) -> str:
        return f"{scores[mode]['loss']:.4f} ({scores[mode]['loss'] / of - 1:+6.1%})" if mode in scores else ""

    lines = [f"validation loss of {found['from']} and of {found['tuned']}; in brackets, beside the former in groups"]
    lines += [f"{'mode':12} | {'before':17} | after"]
    for mode in before | after:
        lines.append(f"{mode:12} | {cell(before, mode):17} | {cell(after, mode)}".rstrip())
    first, last = (found["curve"][i][1] for i in (0, -1))
    beside = f"{found['grouped']:.4f} in groups on the same windows"
    return [*lines, f"of the tuning, as its validations saw it: from {first:.4f} to {last:.4f}, beside {beside}"]


def _picture(found: dict[str, Any]) -> bytes:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*found["curve"], strict=True), marker="o", label="token choice, tuned")
    axes.axhline(found["grouped"], color="C1", linestyle="--", label="Mixture of Tokens, grouped, before")
    axes.set(xlabel="step of tuning", ylabel="validation loss in nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure)
