"""The mixing core of Mixture of Tokens: pure functions on arrays (PAPER.md section 2).

Notation, here and everywhere:

    B  batch, rows          N  groups, B / G         E  experts          x  layer input, after the norm
    S  sequence             G  group size            F  expert width     u  mixtures, one per group, position and expert
    D  model width          n, g, s, e, d, f  their indices in einsums   o  expert outputs

Row b of the batch is slot b % G of group b // G. (V-MoE calls something else a group: a set of tokens that are routed
together.) Tokens are mixed with the tokens at the same position of the other rows of their group, and with no others:
no position sees another, no group sees another.

The functions run under NNX, Linen or bare JAX, with or without a mesh. Under a mesh with our Explicit axes, groups are
split over all devices and experts over the axis `expert` (`mot_jax.nn.sharding`). A device that holds fewer rows than a
group exchanges rows for positions with its neighbours: mixing asks for whole groups at a position, not for whole rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from mot_jax.config import MixingConfig
from mot_jax.nn.sharding import DIMENSIONS, Axes, axes_of, axis_size, reshard, spec, whole_group_axes

Saved = Literal["nothing", "pre_activations", "all"]
Project = Callable[[Any, Any], Any]


def group(x: jax.Array, group_size: int, groups: Literal["across", "within"] = "across") -> jax.Array:
    """[B, S, ...] -> [N, G, S, ...]: contiguous rows form a group. Raises AssertionError unless G divides B.

    `within`: contiguous positions of a row form a group, [B, S, ...] -> [B S / G, G, 1, ...]; G divides S.
    Groups that span devices are made whole by one all-to-all, after which S is spread over what held their rows.
    """
    chex.assert_scalar_positive(group_size)
    batch, length = x.shape[:2]
    positions: Axes = ()
    if groups == "within":
        words = f"sequence S = {length}, group size G = {group_size}"
        chex.assert_is_divisible(length, group_size, custom_message=words)
        shape = (batch * length // group_size, group_size, 1, *x.shape[2:])
        rows = DIMENSIONS["sequences"]
    else:
        chex.assert_is_divisible(batch, group_size, custom_message=f"batch B = {batch}, group size G = {group_size}")
        shape = (batch // group_size, group_size, *x.shape[1:])
        rows, positions = whole_group_axes(x, group_size)
    rest = [None] * (x.ndim - 2)
    x = reshard(x, rows, positions, *rest)
    return jnp.reshape(x, shape, out_sharding=spec(rows, None, positions, *rest))


def ungroup(x: jax.Array, length: int | None = None) -> jax.Array:
    """[N, G, S, ...] -> [B, S, ...], the inverse of `group`; of groups within rows if the `length` S is given."""
    if x.ndim < 3:
        raise AssertionError(f"x is [N, G, S, ...]: groups, group size, sequence; its rank is {x.ndim}")
    length = x.shape[2] if length is None else length
    shape = (x.shape[0] * x.shape[1] * x.shape[2] // length, length, *x.shape[3:])
    rows, _, positions, *_ = axes_of(x)
    rest = [None] * (x.ndim - 3)
    x = jnp.reshape(x, shape, out_sharding=spec(rows, positions, *rest))
    moved = tuple(axis for axis in positions if axis in DIMENSIONS["sequences"])
    return reshard(x, rows + moved, tuple(axis for axis in positions if axis not in moved), *rest)


# --- mixing weights ---------------------------------------------------------------------------------------------------

OVER_GROUP, OVER_EXPERTS = 1, 3  # the dimension of [N, G, S, E] that a softmax runs over


def temperature(config: MixingConfig, step: jax.Array | None, learned: jax.Array | None = None) -> float | jax.Array:
    """T at a training step (int32 scalar; None: after training). Scalar, or [E] if one is learned for each expert.

    learned: the parameter θ, [] or [E], with `learned_temperature`.
    """
    if config.annealing != "none":
        if step is None:
            return config.final_temperature
        first, last = config.annealing_steps
        part = jnp.clip((step - first) / (last - first), 0, 1)
        part = (1 - jnp.cos(jnp.pi * part)) / 2 if config.annealing == "cosine" else part
        return config.temperature + (config.final_temperature - config.temperature) * part
    if learned is None:
        return config.temperature
    learned = learned.astype(jnp.promote_types(learned.dtype, jnp.float32))
    if step is not None:
        learned = jnp.where(step < config.frozen_steps, jax.lax.stop_gradient(learned), learned)
    factor = jnp.exp(learned) if config.positive_temperature else 1 + learned
    return jnp.maximum(config.temperature * factor, 1e-6)  # whatever it learns, no division by 0


def mixing_weights(
    logits: jax.Array,
    config: MixingConfig = MixingConfig(),
    token_mask: jax.Array | None = None,
    temperature: float | jax.Array | None = None,
) -> jax.Array:
    """Merge weights M over the tokens of each group, for each expert and position apart.

    Args:
        logits: [N, G, S, E], what the controller says of each token. Any float type.
        config: where the weights come from (`config.merge`).
        token_mask: bool [N, G, S], True = real. Masked tokens get weight 0.
        temperature: T, a scalar or [E], see `temperature`; None: that of `config`.

    Returns:
        [N, G, S, E] in promote_types(logits.dtype, float32). Sums to 1 over G, or to 0 where no token is real; but for
        `merge="logits"`, where it is the logits.
    """
    logits, real = _prepare(logits, token_mask)
    if config.merge == "uniform":
        weights = jnp.where(real, jnp.ones_like(logits), 0)
        return weights / jnp.maximum(weights.sum(axis=OVER_GROUP, keepdims=True), 1)
    if config.merge == "logits":
        return jnp.where(real, logits, 0)
    return _softmax(logits, real, config, temperature, OVER_GROUP)


def emit_weights(
    merge_weights: jax.Array,
    logits: jax.Array,
    config: MixingConfig,
    token_mask: jax.Array | None = None,
    temperature: float | jax.Array | None = None,
) -> jax.Array | None:
    """Emit weights Q, [N, G, S, E] like `merge_weights` M; None where they are M. Masked tokens get weight 0.

    logits: [N, G, S, E] of the emit controller; the other arguments are those of `mixing_weights`. Columns sum to 1
    over G with `emit="softmax"`, rows over E with `softmax_over_experts`.
    """
    if config.emit == "merge":
        return None
    logits, real = _prepare(logits, token_mask)
    if config.emit == "ones":
        return jnp.where(real, jnp.ones_like(logits), 0)
    if config.emit == "top_token":
        return _one_hot(merge_weights, real, OVER_GROUP)
    axis = OVER_GROUP if config.emit == "softmax" else OVER_EXPERTS
    return _softmax(logits, real, config, temperature, axis)


def _prepare(logits: jax.Array, token_mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Checks; the logits in float32 or wider, and which tokens are real, [N, G, S, 1] or []."""
    chex.assert_rank(logits, 4, custom_message="logits are [N, G, S, E]: groups, group size, sequence, experts")
    chex.assert_type(logits, jnp.floating)
    if token_mask is not None:
        _check_mask(token_mask, logits)
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    return logits.astype(wide), jnp.ones((), bool) if token_mask is None else token_mask[..., None]


def _softmax(logits, real, config: MixingConfig, temperature: float | jax.Array | None, axis: int) -> jax.Array:
    """softmax(logits / T) over the real entries of `axis`; the others get 0."""
    t = config.temperature if temperature is None else temperature
    real = jnp.broadcast_to(real, logits.shape)
    tiny = float(jnp.finfo(logits.dtype).tiny)
    if config.learned_temperature != "none":
        weights = _masked_softmax(logits / t, real, 1.0, axis)
    elif isinstance(t, (int, float)):
        weights = _one_hot(logits, real, axis) if t < tiny else _masked_softmax(logits, real, t, axis)
    else:
        weights = _masked_softmax(logits, real, jnp.maximum(t, tiny), axis)
        weights = jnp.where(t < tiny, _one_hot(logits, real, axis), weights)
    if config.straight_through:
        weights = _straight_through(weights, _masked_softmax(logits, real, 1.0, axis))
    return weights


def _one_hot(values: jax.Array, real: jax.Array, axis: int) -> jax.Array:
    """1 for the first largest of the real entries of `axis`, 0 for the others. No gradient."""
    best = jnp.argmax(jnp.where(real, values, jnp.finfo(values.dtype).min), axis=axis)  # the first of equals
    return jnp.where(real, jax.nn.one_hot(best, values.shape[axis], axis=axis, dtype=values.dtype), 0)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _masked_softmax(logits: jax.Array, real: jax.Array, temperature: jax.typing.ArrayLike, axis: int) -> jax.Array:
    """Over the real entries of `axis`. Nothing but its result is kept for the backward pass; no gradient of T."""
    # The lowest finite number instead of -inf: a group without real tokens gives no NaN. The largest is 0 before the
    # division, so that neither a huge logit nor a tiny temperature overflows.
    scaled = jnp.where(real, logits, jnp.finfo(logits.dtype).min)
    scaled = (scaled - scaled.max(axis=axis, keepdims=True)) / temperature
    return jnp.where(real, jax.nn.softmax(scaled, axis=axis), 0)


def _softmax_forward(logits, real, temperature, axis):
    weights = _masked_softmax(logits, real, temperature, axis)
    return weights, (weights, temperature)


def _softmax_backward(axis, kept, cotangent):
    weights, temperature = kept
    product = weights * cotangent
    return (product - weights * product.sum(axis=axis, keepdims=True)) / temperature, None, None


_masked_softmax.defvjp(_softmax_forward, _softmax_backward)


@jax.custom_vjp
def _straight_through(value: jax.Array, surrogate: jax.Array) -> jax.Array:
    """`value`, with the gradient of `surrogate`."""
    return value


_straight_through.defvjp(lambda value, surrogate: (value, None), lambda _, cotangent: (None, cotangent))


def normalised_entropy(weights: jax.Array, token_mask: jax.Array | None = None, axis: int = OVER_GROUP) -> jax.Array:
    """Mean entropy of the mixing weights over log(real entries of `axis`): 1 is uniform, 0 is one-hot. Scalar.

    `OVER_GROUP`: groups with fewer than two real tokens at a position do not count. `OVER_EXPERTS`: masked tokens.
    """
    n, g, s, e = weights.shape
    there = weights > jnp.finfo(weights.dtype).tiny  # where not, as with masked tokens, no infinite slope
    logs = jnp.log(jnp.where(there, weights, 1))
    entropy = -(weights * logs).sum(axis=axis)
    if axis == OVER_EXPERTS:
        counts = jnp.ones((n, g, s), bool) if token_mask is None else token_mask
        entropy = entropy / jnp.log(max(e, 2))
    else:
        real = jnp.full((n, s), g) if token_mask is None else token_mask.sum(axis=1)
        counts = real > 1
        entropy = entropy.mean(axis=-1) / jnp.log(jnp.maximum(real, 2))
    return jnp.where(counts, entropy, 0).sum() / jnp.maximum(counts.sum(), 1)


# --- merge, experts, emit ---------------------------------------------------------------------------------------------


def merge(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Mixtures: the tokens of a group averaged by the mixing weights of each expert.

    weights [N, G, S, E], x [N, G, S, D] -> [N, S, E, D] in x's dtype.
    """
    _check_pair(weights, x)
    return jnp.einsum("nsge,nsgd->nsed", _by_position(weights.astype(x.dtype)), _by_position(x))


def emit(weights: jax.Array, outputs: jax.Array) -> jax.Array:
    """Expert outputs handed back to the tokens of the group, not renormalised.

    weights [N, G, S, E], outputs [N, S, E, D] -> [N, G, S, D] in the dtype of outputs.
    """
    chex.assert_rank([weights, outputs], 4, custom_message="weights are [N, G, S, E], outputs are [N, S, E, D]")
    n, _, s, e = weights.shape
    words = "expert outputs are [N, S, E, D] beside weights [N, G, S, E]"
    chex.assert_shape(outputs, (n, s, e, None), custom_message=words)
    return _by_position(jnp.einsum("nsge,nsed->nsgd", _by_position(weights.astype(outputs.dtype)), outputs))


def _by_position(x: jax.Array) -> jax.Array:
    """[N, G, S, ...] -> [N, S, G, ...], and back: a matrix for each position, which products read as it lies."""
    return jnp.swapaxes(x, 1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def mix_through(
    project_in: Project,
    project_out: Project,
    save_for_backward: Saved,
    x: jax.Array,
    weights: jax.Array,
    w_in: chex.ArrayTree,
    w_out: chex.ArrayTree,
    emit_weights: jax.Array | None = None,
) -> jax.Array:
    """Merge, experts and emit in one function, so that the backward pass need not keep the mixtures.

    At granularity E/G = k the mixtures and the expert outputs are each k times as large as the activations. Neither is
    kept (unless `save_for_backward` is `all`): the backward pass makes them again, the mixtures from x, the outputs from the
    pre-activations. Where experts are spread over devices, what is made again travels together with the cotangent that
    must travel anyway: two all-to-alls forward and two backward, whatever is kept.

    Args:
        project_in: (u [N, S, E, D], w_in) -> pre-activations, a tree of [E, N, S, F]: the experts up to the activation.
        project_out: (pre-activations, w_out) -> [N, S, E, D]: activation and output projection.
        save_for_backward: what to keep, see `MixtureOfTokensConfig`.
        x: [N, G, S, D].
        weights: mixing weights [N, G, S, E], to merge with, and to emit with unless there are `emit_weights`.
        w_in, w_out: the experts' parameters, spread over the mesh axis `expert` by their dimension E.
        emit_weights: [N, G, S, E], if they are others.

    Returns:
        The update [N, G, S, D] in x's dtype. Only reverse-mode derivatives exist, and no second ones.
    """
    return _forward(project_in, project_out, save_for_backward, x, weights, w_in, w_out, emit_weights)[0]


def _forward(project_in, project_out, save_for_backward, x, weights, w_in, w_out, emit_weights):
    (u,) = _to_experts(merge(weights, x))
    h = project_in(u, w_in)
    (o,) = _to_groups(x, project_out(h, w_out))
    kept = {"nothing": (), "pre_activations": (h,), "all": (h, u, o)}[save_for_backward]
    y = emit(weights if emit_weights is None else emit_weights, o)
    return y, (x, weights, w_in, w_out, emit_weights, kept)


def _backward(project_in, project_out, save_for_backward, residuals, dy):
    # Or else the compiler, finding the forward pass in the same program, keeps what we mean to compute again.
    x, weights, w_in, w_out, emit_weights, kept, dy = jax.lax.optimization_barrier((*residuals, dy))
    do = merge(weights if emit_weights is None else emit_weights, dy)  # emit's transpose
    if save_for_backward == "all":
        u, (do,) = kept[1], _to_experts(do)
    else:
        u, do = _to_experts(merge(weights, x), do)
    # Where h was kept, this second computation of it is dead code to the compiler.
    h, pull_in = jax.vjp(project_in, u, w_in)
    o, pull_out = jax.vjp(project_out, kept[0] if kept else h, w_out)
    dh, dw_out = pull_out(reshard(do, *axes_of(o)))
    du, dw_in = pull_in(dh)
    if save_for_backward == "all":
        o, (du,) = kept[2], _to_groups(x, du)
    else:
        o, du = _to_groups(x, reshard(o, *axes_of(du)), du)
    dx = emit(weights, du)  # merge's transpose
    d_merge, d_emit = map(_weights_gradient, (x, dy), (du, o))
    if emit_weights is None:
        return dx, (d_merge + d_emit).astype(weights.dtype), dw_in, dw_out, None
    return dx, d_merge.astype(weights.dtype), dw_in, dw_out, d_emit.astype(emit_weights.dtype)


mix_through.defvjp(_forward, _backward)


def _weights_gradient(tokens: jax.Array, of_experts: jax.Array) -> jax.Array:
    """[N, G, S, D], [N, S, E, D] -> their products over D, [N, G, S, E]."""
    return _by_position(jnp.einsum("nsgd,nsed->nsge", _by_position(tokens), of_experts))


def _to_experts(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """From each device having its groups for all experts to its experts for all groups: one all-to-all on `expert`.

    [N, S, E, D], of which `expert` cuts the groups, or the positions where groups span devices.
    """
    groups, positions = (tuple(axis for axis in axes if axis != "expert") for axes in axes_of(arrays[0])[:2])
    return _exchange(arrays, groups, positions, DIMENSIONS["experts"])


def _to_groups(like: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Back again, to where the groups of `like` [N, G, S, D] are: one all-to-all on `expert`."""
    groups, _, positions, _ = axes_of(like)
    return _exchange(arrays, groups, positions, ())


def _exchange(arrays: tuple[jax.Array, ...], groups: Axes, positions: Axes, experts: Axes) -> tuple[jax.Array, ...]:
    if axis_size("expert") == 1 or len(arrays) == 1:
        return tuple(reshard(a, groups, positions, experts, None) for a in arrays)
    return tuple(reshard(jnp.stack(arrays), None, groups, positions, experts, None))


def _check_pair(weights: jax.Array, x: jax.Array) -> None:
    chex.assert_rank([weights, x], 4, custom_message="weights are [N, G, S, E], x is [N, G, S, D]")
    chex.assert_equal_shape_prefix(
        [weights, x], 3, custom_message="weights [N, G, S, E] and x [N, G, S, D] share groups, group size and sequence"
    )


def _check_mask(token_mask: jax.Array, beside: jax.Array) -> None:
    chex.assert_type(token_mask, bool)
    chex.assert_shape(
        token_mask, beside.shape[:3], custom_message="token mask is [N, G, S]: groups, group size, sequence"
    )
