"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mot_jax.config import OptimizerConfig
from mot_jax.errors import UserError, nearest
from mot_jax.nn.sharding import PARAMETERS, axes_of, spec
from mot_jax.nn.transformer import Params


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, then a cosine down to `min_lr_ratio` of the peak at `steps`.

    Step t (from 0) makes update t + 1: the first update has 1/warmup_steps of the peak, the last one the final value.
    """
    warmup = config.warmup_steps

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        update = jnp.asarray(step, jnp.float32) + 1
        progress = jnp.clip((update - warmup) / max(steps - warmup, 1), 0, 1)
        cosine = config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return config.learning_rate * jnp.where(update < warmup, update / max(warmup, 1), cosine)

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, the optimizer, weight decay, the learning rate and its multipliers.

    For parameters in a flat dictionary by name. A *matrix* is what has two dimensions or more beside those over which
    it is stacked: blocks, and experts of a layer. `beta1` is the decay of the first moment, which is kept in
    `mu_dtype`, all else in the parameter's dtype. `beta2` and `epsilon` are AdamW's alone.

    adamw: both moments. With `decay: all`, as in the paper (PAPER.md section 5).
    adafactor: of a matrix with two dimensions of at least 128 (attention's are cut into heads), a row and a column for
        the second moment; updates of RMS at most 1, and their first moment, unless beta1 = 0. The learning rate is
        absolute, as AdamW's.
    muon: the matrices of the blocks get Nesterov momentum, made orthogonal and scaled to an RMS of 0.2, about that of
        AdamW's updates; the rest AdamW. Keys and values are two matrices, all heads of one.

    Its `init` raises UserError for a multiplier that is no parameter's.
    """
    return _on_any_mesh(
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            {"adamw": _adam, "adafactor": _adafactor, "muon": _muon}[config.name](config),
            optax.add_decayed_weights(config.weight_decay, None if config.decay == "all" else _decayed),
            _multiply(config.multipliers),
            optax.scale_by_learning_rate(learning_rate(config, steps)),
        )
    )


def _on_any_mesh(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same; what it makes lies where what it is made of lay. Optax knows no Explicit axes: the compiler spreads."""

    def update(*arguments: Any) -> tuple[Params, optax.OptState]:
        if spec() is None:
            return optimizer.update(*arguments)
        out = jax.tree.map(lambda x: spec(*axes_of(x)), arguments[:2])
        return jax.sharding.auto_axes(optimizer.update, out_sharding=out)(*arguments)

    return optax.GradientTransformation(optimizer.init, update)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, mu_dtype=config.mu_dtype)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    parts = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    if config.beta1:
        parts.append(optax.ema(config.beta1, debias=False, accumulator_dtype=config.mu_dtype))
    adafactor = optax.chain(*parts)
    return _each_by_itself(lambda name, shape: adafactor)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    adam = _adam(config)

    def choose(name: str, shape: tuple[int, ...]) -> optax.GradientTransformation:
        if not _is_matrix(name, len(shape)):
            return adam
        axes = _AXES.get(name.rpartition("/")[2], ((0,), (1,)))
        muon = optax.contrib.scale_by_muon(
            beta=config.beta1,
            mu_dtype=config.mu_dtype,
            weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(*axes),
        )
        sides = (math.prod(shape[axis] for axis in side) for side in axes)
        return optax.chain(muon, optax.scale(0.2 * max(sides) ** 0.5))

    return _each_by_itself(choose)


# The dimensions that a matrix reads and writes, where they are not two.
_AXES = {"query": ((0,), (1, 2)), "key_value": ((0,), (2, 3)), "out": ((0, 1), (2,))}


def _each_by_itself(choose: Callable[[str, tuple[int, ...]], optax.GradientTransformation]) -> Any:
    """Every matrix of a stack of blocks or experts by itself, with what `choose` has for its name and shape.

    The state, by name too, has the leading dimensions of the stack, count and all, and so can lie where the parameter
    does. (Optax alone would factor over the experts, and reshape their dimension away, which Explicit axes forbid.)
    """

    def mapped(method: str, name: str, *trees: Any) -> Any:
        leading = stacked(name)
        function = getattr(choose(name, trees[0].shape[leading:]), method)
        for _ in range(leading):
            function = jax.vmap(function)
        return function(*trees)

    def init(params: Params) -> optax.OptState:
        return {name: mapped("init", name, param) for name, param in params.items()}

    def update(updates: Params, state: dict, params: Params) -> tuple[Params, optax.OptState]:
        new = {name: mapped("update", name, u, state[name], params[name]) for name, u in updates.items()}
        return {name: pair[0] for name, pair in new.items()}, {name: pair[1] for name, pair in new.items()}

    return optax.GradientTransformation(init, update)


def stacked(name: str) -> int:
    """The number of a parameter's leading dimensions over which it is stacked: blocks, experts."""
    return name.startswith("stacks/") + PARAMETERS.get(name.rpartition("/")[2], ()).count("experts")


def _is_matrix(name: str, rank: int) -> bool:
    """Whether a parameter of a block is one, by its rank without leading dimensions. A norm's, or a bias, is none."""
    return name.startswith("stacks/") and "norm" not in name and "bias" not in name and rank > 1


def _decayed(params: Params) -> dict[str, bool]:
    """Which parameters `decay: matrices` shrinks: the matrices of the blocks, and the head, tied or not."""
    head = "head" if "head" in params else "token_embedding"
    return {name: name == head or _is_matrix(name, param.ndim - stacked(name)) for name, param in params.items()}


def _multiply(multipliers: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Updates times the factors of all parts that are in the parameter's name."""

    def init(params: Params) -> optax.OptState:
        words = {word for name in params for word in name.split("/") if not word.isdigit()}
        for part, _ in multipliers:
            if not any(part in name for name in params):
                near = nearest(part, params if "/" in part else sorted(words))
                fault = f"training.optimizer.multipliers = {multipliers}: {part!r} is in no parameter's name{near}"
                raise UserError(fault)
        return optax.EmptyState()

    def update(updates: Params, state: optax.OptState, params: Params) -> tuple[Params, optax.OptState]:
        factors = {name: math.prod(f for part, f in multipliers if part in name) for name in updates}
        return {name: u * f if (f := factors[name]) != 1 else u for name, u in updates.items()}, state

    return optax.GradientTransformation(init, update)
