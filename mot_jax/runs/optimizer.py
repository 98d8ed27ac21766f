"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mot_jax.config import OptimizerConfig, check_part
from mot_jax.errors import UserError, nearest
from mot_jax.nn.sharding import PARAMETERS, axes_of, spec
from mot_jax.nn.transformer import Params


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, then a cosine down to `min_lr_ratio` of the peak at `steps`.

    Step t (from 0) makes update t + 1: the first update has 1 / warmup_steps of the peak learning rate, the last one
    the final value.
    """
    warmup = config.warmup_steps

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        update = jnp.asarray(step, jnp.float32) + 1
        progress = jnp.clip((update - warmup) / max(steps - warmup, 1), 0, 1)
        cosine = config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return config.learning_rate * jnp.where(update < warmup, update / max(warmup, 1), cosine)

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Chain clipping by the global norm, the optimizer, weight decay, the learning rate and its multipliers.

    For parameters in a flat dictionary by name. A *matrix* is a parameter with two or more dimensions in addition to
    those over which it is stacked (blocks, and experts of a layer). `beta1` is the decay of the first moment, which is
    stored in `mu_dtype`; all other state and the updates are in float32 or wider. Only AdamW uses `beta2` and
    `epsilon`.

    adamw: both moments. With `decay: all`, as in the paper (`docs/paper.md`, section 5).
    adafactor: the second moment of a matrix with two dimensions of at least 128 (those of attention are split into
        heads) is factored into a row and a column; updates have an RMS of at most 1 and a first moment, unless
        beta1 = 0. The learning rate is absolute, as with AdamW.
    muon: the matrices of the blocks have Nesterov momentum, orthogonalized and scaled to an RMS of 0.2, about that of
        AdamW's updates; all other parameters have AdamW. Keys and values are two matrices, each of all heads.

    Its `init` raises UserError for a multiplier that matches no parameter. Its `update` has a keyword `finite`, a bool
    scalar: if it is False, the state keeps its values, and the caller must not apply the updates.
    """
    check_part(config, "training.optimizer.")
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}[config.name](config),
        optax.add_decayed_weights(config.weight_decay, None if config.decay == "all" else _decayed),
        _multiply(config.multipliers),
        _keep(optax.scale_by_learning_rate(learning_rate(config, steps))),
    )
    return _on_any_mesh(_in_float32(optimizer))


def _in_float32(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Run an optimizer on gradients and parameters in float32 or wider, which its state and updates then have, too.

    A second moment in bfloat16 would only grow: b2 = 0.999 is rounded to 1 there.
    """

    def wide(params: Params | None) -> Params | None:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params)

    def update(
        updates: Params, state: optax.OptState, params: Params, *, finite: jax.Array | None = None
    ) -> tuple[Params, optax.OptState]:
        return optimizer.update(wide(updates), state, wide(params), finite=finite)

    return optax.GradientTransformationExtraArgs(lambda params: optimizer.init(wide(params)), update)


def _on_any_mesh(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Run an optimizer with automatic axes, since Optax does not support Explicit ones.

    Updates and state have the shardings of the gradients and of the old state.
    """

    def update(
        updates: Params, state: optax.OptState, params: Params, *, finite: jax.Array | None = None
    ) -> tuple[Params, optax.OptState]:
        def update_if(finite: jax.Array | None, *arguments: Any) -> tuple[Params, optax.OptState]:
            return optimizer.update(*arguments, finite=finite)

        arguments = finite, updates, state, params
        if spec() is None:
            return update_if(*arguments)
        out = jax.tree.map(lambda x: spec(*axes_of(x)), (updates, state))
        return jax.sharding.auto_axes(update_if, out_sharding=out)(*arguments)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _select(finite: jax.Array | None, new: Any, old: Any) -> Any:
    """The tree `new`, or `old` if `finite` is False."""
    return new if finite is None else jax.tree.map(lambda n, o: jnp.where(finite, n, o.astype(n.dtype)), new, old)


def _keep(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer with the keyword `finite` of `make_optimizer`."""

    def update(
        updates: Params, state: optax.OptState, params: Params | None = None, *, finite: jax.Array | None = None
    ) -> tuple[Params, optax.OptState]:
        updates, new_state = optimizer.update(updates, state, params)
        return updates, _select(finite, new_state, state)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _adamw(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """`_adam`, with the keyword `finite` of `make_optimizer`.

    As `optax.scale_by_adam`, but the update is computed from the moments that are kept. Computed before the select, as
    in `_keep`, XLA for CPU would copy both moments and compute each twice.
    """

    def update(
        updates: Params,
        state: optax.ScaleByAdamState,
        params: Params | None = None,
        *,
        finite: jax.Array | None = None,
    ) -> tuple[Params, optax.OptState]:
        mu = _select(finite, optax.tree.update_moment(updates, state.mu, config.beta1, 1), state.mu)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, config.beta2, 2)
        nu = _select(finite, nu, state.nu)
        count = optax.safe_increment(state.count)
        mu_hat = optax.tree.bias_correction(mu, config.beta1, count)
        nu_hat = optax.tree.bias_correction(nu, config.beta2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.epsilon), mu_hat, nu_hat)
        mu, nu = optax.tree.cast(mu, config.mu_dtype), optax.tree.cast_like(nu, state.nu)
        return updates, optax.ScaleByAdamState(_select(finite, count, state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(_adam(config).init, update)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, mu_dtype=config.mu_dtype)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    parts = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    if config.beta1:
        parts.append(optax.ema(config.beta1, debias=False, accumulator_dtype=config.mu_dtype))
    adafactor = optax.chain(*parts)
    return _keep(_per_matrix(lambda name, shape: adafactor))


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    adam = _adam(config)

    def choose(name: str, shape: tuple[int, ...]) -> optax.GradientTransformation:
        if not _is_matrix(name, len(shape)):
            return adam
        axes = _AXES.get(name.rpartition("/")[2], ((0,), tuple(range(1, len(shape)))))
        muon = optax.contrib.scale_by_muon(
            beta=config.beta1,
            mu_dtype=config.mu_dtype,
            weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(*axes),
        )
        sides = (math.prod(shape[axis] for axis in side) for side in axes)
        return optax.chain(muon, optax.scale(0.2 * max(sides) ** 0.5))

    return _keep(_per_matrix(choose))


# The input and output dimensions of matrices whose only input dimension is not the first, or whose outputs are not the
# others.
_AXES = {"key_value": ((0,), (2, 3)), "out": ((0, 1), (2,))}


def _per_matrix(choose: Callable[[str, tuple[int, ...]], optax.GradientTransformation]) -> Any:
    """Apply to every matrix of a stack of blocks or experts the optimizer that `choose` returns for its name and shape.

    The state is also by name. All of it, step counts too, has the leading dimensions of the stack, and so can have the
    sharding of the parameter. (Without this, Optax would factor over the experts, and reshape their dimension away,
    which Explicit axes forbid.)
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
    """The number of leading dimensions of a parameter over which matrices are stacked: blocks, experts."""
    return name.startswith("stacks/") + PARAMETERS.get(name.rpartition("/")[2], ()).count("experts")


def _is_matrix(name: str, rank: int) -> bool:
    """Whether a parameter of a block is a matrix, by its rank without stacked dimensions; never of norms, or biases."""
    return name.startswith("stacks/") and "norm" not in name and "bias" not in name and rank > 1


def _decayed(params: Params) -> dict[str, bool]:
    """Which parameters decay with `decay: matrices`: the matrices of the blocks, and the head, tied or not."""
    head = "head" if "head" in params else "token_embedding"
    return {name: name == head or _is_matrix(name, param.ndim - stacked(name)) for name, param in params.items()}


def _multiply(multipliers: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Multiply the update of a parameter by the factors of all parts that its name contains."""

    def init(params: Params) -> optax.OptState:
        words = {word for name in params for word in name.split("/") if not word.isdigit()}
        for part, _ in multipliers:
            if not any(part in name for name in params):
                advice = nearest(part, params if "/" in part else sorted(words))
                raise UserError(
                    f"training.optimizer.multipliers = {multipliers}: {part!r} is in no parameter's name{advice}"
                )
        return optax.EmptyState()

    def update(updates: Params, state: optax.OptState, params: Params) -> tuple[Params, optax.OptState]:
        factors = {name: math.prod(f for part, f in multipliers if part in name) for name in updates}
        return {name: u * f if (f := factors[name]) != 1 else u for name, u in updates.items()}, state

    return optax.GradientTransformation(init, update)
