"""The mixing core of Mixture of Tokens: pure functions on arrays (`docs/paper.md`, section 2; arXiv 2310.15961).

For one group at one position, with its tokens X [G, D] after the layer norm and an expert e of E:

    L   = X C                            logits, C the controller              [G, E]    computed by the caller
    M   = softmax(L / T) over the group  mixing weights, columns sum to 1      [G, E]    `mixing_weights`
    U   = Mᵀ X                           mixtures, the input of the experts    [E, D]    `merge`
    O_e = act(U_e W_in[e]) W_out[e]      expert outputs                        [E, D]    functions passed by the caller
    Y   = M O                            update, added to the residual stream  [G, D]    `emit`

Dimensions, in every package:

    B  batch                 N  groups, B / G    E  experts          x  layer input, after the layer norm
    S  sequence (positions)  G  group size       F  expert width     u  mixtures: per group, position and expert
    D  model width           n, g, s, e, d, f: their einsum letters  o  expert outputs

Sequence b of the batch is member b % G of group b // G. (V-MoE uses "group" for something else: a set of tokens that
are routed together.) A token is mixed with the tokens at the same position of the other sequences of its group and with
no others, so positions are independent of each other, and so are groups.

The backward pass is in `merge_experts_emit`, which computes U, O and Y as one function with its own derivative
(`jax.custom_vjp`; `_forward` returns the saved arrays, `_backward` uses them). Always saved: x, the mixing weights and
the experts' parameters. By its argument `save_for_backward`, also nothing, the experts' pre-activations, or these with
the mixtures and the expert outputs, each E / G times as large as x. The rest is recomputed. The softmax saves only its
result.

The functions work under NNX, Linen or bare JAX, with or without a mesh. Under a mesh with our Explicit axes, groups are
sharded over all devices and experts over the axis `expert` (`mot_jax.nn.sharding`). If a device holds fewer sequences
than a group, devices exchange sequences for positions by an all-to-all: mixing needs whole groups at a position, not
whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from mot_jax.config import MixingConfig, check_part
from mot_jax.errors import UserError, nearest
from mot_jax.nn.sharding import (
    DIMENSIONS,
    Axes,
    axes_of,
    axis_size,
    product,
    reshard,
    select_by_platform,
    spec,
    whole_group_axes,
)
from mot_jax.runtime.compilation import default_promotion

SaveForBackward = Literal["nothing", "pre_activations", "all"]
Projection = Callable[[Any, Any], Any]  # (input, parameters) -> output: one half of the experts


def group(x: jax.Array, group_size: int, groups: Literal["across", "within"] = "across") -> jax.Array:
    """Split the batch into groups of contiguous sequences: [B, S, ...] -> [N, G, S, ...].

    Groups that span devices are made whole by one all-to-all, after which S is sharded over the mesh axes that
    sequences were sharded over.

    Args:
        x: [B, S, ...].
        group_size: G.
        groups: `across` sequences, or `within` a sequence: contiguous positions form a group, and the result is
            [B S / G, G, 1, ...].

    Raises:
        AssertionError: G does not divide B (`across`) or S (`within`).
    """
    chex.assert_scalar_positive(group_size)
    if groups not in ("across", "within"):
        raise UserError(
            f"groups = {groups!r}: must be 'across' or 'within'{nearest(str(groups), ['across', 'within'])}"
        )
    batch, length = x.shape[:2]
    position_axes: Axes = ()
    if groups == "within":
        words = f"sequence S = {length}, group size G = {group_size}"
        chex.assert_is_divisible(length, group_size, custom_message=words)
        shape = (batch * length // group_size, group_size, 1, *x.shape[2:])
        batch_axes = DIMENSIONS["sequences"]
    else:
        chex.assert_is_divisible(batch, group_size, custom_message=f"batch B = {batch}, group size G = {group_size}")
        shape = (batch // group_size, group_size, *x.shape[1:])
        batch_axes, position_axes = whole_group_axes(x, group_size)
    rest = [None] * (x.ndim - 2)
    x = reshard(x, batch_axes, position_axes, *rest)
    return jnp.reshape(x, shape, out_sharding=spec(batch_axes, None, position_axes, *rest))


def ungroup(x: jax.Array, length: int | None = None) -> jax.Array:
    """Invert `group`: [N, G, S, ...] -> [B, S, ...].

    length: S, needed for groups within a sequence only.
    """
    if x.ndim < 3:
        raise AssertionError(f"x is [N, G, S, ...]: groups, group size, sequence; its rank is {x.ndim}")
    length = x.shape[2] if length is None else length
    shape = (x.shape[0] * x.shape[1] * x.shape[2] // length, length, *x.shape[3:])
    group_axes, _, position_axes, *_ = axes_of(x)
    rest = [None] * (x.ndim - 3)
    x = jnp.reshape(x, shape, out_sharding=spec(group_axes, position_axes, *rest))
    moved = tuple(axis for axis in position_axes if axis in DIMENSIONS["sequences"])
    return reshard(x, group_axes + moved, tuple(axis for axis in position_axes if axis not in moved), *rest)


# --- mixing weights ---------------------------------------------------------------------------------------------------

OVER_GROUP, OVER_EXPERTS = 1, 3  # the dimension of [N, G, S, E] that a softmax normalizes


@default_promotion()
def temperature_at_step(
    config: MixingConfig, step: jax.Array | None, learned: jax.Array | None = None
) -> float | jax.Array:
    """T at a training step: annealed, learned or constant.

    Args:
        step: int32 scalar; None after training.
        learned: the parameter θ, [] or [E], with `learned_temperature`.

    Returns:
        A scalar, or [E] if each expert learns its own.
    """
    check_part(config)
    if config.annealing != "none":
        if step is None:
            return config.final_temperature
        first, last = config.annealing_steps
        progress = jnp.clip((step - first) / (last - first), 0, 1)
        progress = (1 - jnp.cos(jnp.pi * progress)) / 2 if config.annealing == "cosine" else progress
        return config.temperature + (config.final_temperature - config.temperature) * progress
    if learned is None:
        return config.temperature
    learned = learned.astype(jnp.promote_types(learned.dtype, jnp.float32))
    if step is not None:
        learned = jnp.where(step < config.frozen_steps, jax.lax.stop_gradient(learned), learned)
    factor = jnp.exp(learned) if config.positive_temperature else 1 + learned
    return jnp.maximum(config.temperature * factor, 1e-6)  # never a division by 0, whatever value is learned


@default_promotion()
def mixing_weights(
    logits: jax.Array,
    config: MixingConfig = MixingConfig(),
    token_mask: jax.Array | None = None,
    temperature: float | jax.Array | None = None,
) -> jax.Array:
    """Compute the merge weights M: for each expert and position, a distribution over the tokens of the group.

    Args:
        logits: [N, G, S, E], the controller's logits, in any float type.
        config: `config.merge` chooses softmax, uniform weights, or the logits themselves.
        token_mask: bool [N, G, S], True = non-padding. Padding tokens have weight 0.
        temperature: T, a scalar or [E] (see `temperature_at_step`); None: that of `config`.

    Returns:
        [N, G, S, E] in promote_types(logits.dtype, float32). Sums to 1 over G, or to 0 where the group has padding
        only. With `merge="logits"` there is no normalization.
    """
    check_part(config)
    logits, valid = _prepare(logits, token_mask)
    if config.merge == "uniform":
        weights = jnp.where(valid, jnp.ones_like(logits), 0)
        return weights / jnp.maximum(weights.sum(axis=OVER_GROUP, keepdims=True), 1)
    if config.merge == "logits":
        return jnp.where(valid, logits, 0)
    return _softmax(logits, valid, config, temperature, OVER_GROUP)


@default_promotion()
def emit_weights(
    merge_weights: jax.Array,
    logits: jax.Array,
    config: MixingConfig,
    token_mask: jax.Array | None = None,
    temperature: float | jax.Array | None = None,
) -> jax.Array | None:
    """Compute the emit weights Q, Y = Q O; None if they are the merge weights M (the paper's default).

    Args:
        merge_weights: M, [N, G, S, E].
        logits: [N, G, S, E], of the emit controller.
        config, token_mask, temperature: as in `mixing_weights`.

    Returns:
        [N, G, S, E], 0 for padding tokens. Sums to 1 over G with `emit="softmax"`, and over E with
        `emit="softmax_over_experts"`.
    """
    check_part(config)
    if config.emit == "merge":
        return None
    logits, valid = _prepare(logits, token_mask)
    if config.emit == "ones":
        return jnp.where(valid, jnp.ones_like(logits), 0)
    if config.emit == "top_token":
        return _one_hot(merge_weights, valid, OVER_GROUP)
    axis = OVER_GROUP if config.emit == "softmax" else OVER_EXPERTS
    return _softmax(logits, valid, config, temperature, axis)


def _prepare(logits: jax.Array, token_mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Check the arguments; return the logits in float32 or wider and the mask as [N, G, S, 1] ([] without one)."""
    chex.assert_rank(logits, 4, custom_message="logits are [N, G, S, E]: groups, group size, sequence, experts")
    chex.assert_type(logits, jnp.floating)
    if token_mask is not None:
        _check_mask(token_mask, logits)
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    return logits.astype(wide), jnp.ones((), bool) if token_mask is None else token_mask[..., None]


def _softmax(logits, valid, config: MixingConfig, temperature: float | jax.Array | None, axis: int) -> jax.Array:
    """softmax(logits / T) over the valid entries of `axis`, 0 elsewhere; one-hot in the limit T = 0."""
    t = config.temperature if temperature is None else temperature
    valid = jnp.broadcast_to(valid, logits.shape)
    tiny = float(jnp.finfo(logits.dtype).tiny)
    if jnp.ndim(t) and axis == OVER_EXPERTS:
        weights = _masked_softmax(logits / t, valid, 1.0, axis)
    elif config.learned_temperature != "none":  # never 0
        weights = _masked_softmax(logits, valid, t, axis)
    elif isinstance(t, (int, float)):
        weights = _one_hot(logits, valid, axis) if t < tiny else _masked_softmax(logits, valid, t, axis)
    else:
        weights = _masked_softmax(logits, valid, jnp.maximum(t, tiny), axis)
        weights = jnp.where(t < tiny, _one_hot(logits, valid, axis), weights)
    if config.straight_through:
        weights = _straight_through(weights, _masked_softmax(logits, valid, 1.0, axis))
    return weights


def _one_hot(values: jax.Array, valid: jax.Array, axis: int) -> jax.Array:
    """1 at the first maximum of the valid entries of `axis`, 0 elsewhere. Has no gradient."""
    best = jnp.argmax(jnp.where(valid, values, jnp.finfo(values.dtype).min), axis=axis)
    return jnp.where(valid, jax.nn.one_hot(best, values.shape[axis], axis=axis, dtype=values.dtype), 0)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _masked_softmax(logits: jax.Array, valid: jax.Array, temperature: jax.typing.ArrayLike, axis: int) -> jax.Array:
    """softmax(logits / temperature) over the valid entries of `axis`, 0 elsewhere.

    temperature: a scalar, or [E] if `axis` is not that of the experts. Saves only its result, and the temperature, for
    the backward pass.
    """
    # The lowest finite number instead of -inf: a group with padding only gives no NaN. The maximum is subtracted before
    # the division, so that neither a huge logit nor a tiny temperature overflows.
    scaled = jnp.where(valid, logits, jnp.finfo(logits.dtype).min)
    scaled = (scaled - scaled.max(axis=axis, keepdims=True)) / temperature
    exponentials = jnp.exp(scaled)  # `jax.nn.softmax` would read everything once more to subtract the maximum, 0
    return jnp.where(valid, exponentials / exponentials.sum(axis=axis, keepdims=True), 0)


def _masked_softmax_forward(logits, valid, temperature, axis):
    weights = _masked_softmax(logits, valid, temperature, axis)
    return weights, (weights, temperature)


@default_promotion()
def _masked_softmax_backward(axis, residuals, cotangent):
    weights, temperature = residuals
    weighted = weights * cotangent
    by_logits = (weighted - weights * weighted.sum(axis=axis, keepdims=True)) / temperature
    # A constant added to the logits of a distribution has the derivative 0, so that log(weights), which is their share
    # of the temperature but for a constant, takes the place of logits / temperature.
    logs = jnp.log(jnp.where(weights > 0, weights, 1))
    by_temperature = -(by_logits * logs).sum(axis=tuple(range(weights.ndim - jnp.ndim(temperature))))
    return by_logits, None, by_temperature.astype(jnp.result_type(temperature))


_masked_softmax.defvjp(_masked_softmax_forward, _masked_softmax_backward)


@jax.custom_vjp
def _straight_through(value: jax.Array, surrogate: jax.Array) -> jax.Array:
    """Return `value`, with the gradient of `surrogate`."""
    return value


_straight_through.defvjp(lambda value, surrogate: (value, None), lambda _, cotangent: (None, cotangent))


@default_promotion()
def normalised_entropy(
    weights: jax.Array,
    token_mask: jax.Array | None = None,
    axis: int = OVER_GROUP,
    count: jax.Array | None = None,
) -> jax.Array:
    """Mean entropy of mixing weights, divided by that of uniform ones: 1 is uniform, 0 is one-hot. Scalar.

    Args:
        weights: [N, G, S, E].
        token_mask: bool [N, G, S], True = non-padding.
        axis: the normalized dimension. With `OVER_GROUP`, groups with fewer than two non-padding tokens at a position
            are left out of the mean; with `OVER_EXPERTS`, padding tokens are.
        count: the divisor of the mean: `entropy_count` of a batch of which `weights` are a part. None: their own.
    """
    n, g, s, e = weights.shape
    token_mask = jnp.ones((n, g, s), bool) if token_mask is None else token_mask
    positive = weights > jnp.finfo(weights.dtype).tiny  # elsewhere, as for padding tokens, the slope would be infinite
    logs = jnp.log(jnp.where(positive, weights, 1))
    entropy = -(weights * logs).sum(axis=axis)
    if axis == OVER_EXPERTS:
        entropy = entropy / jnp.log(max(e, 2))
    else:
        entropy = entropy.mean(axis=-1) / jnp.log(jnp.maximum(token_mask.sum(axis=1), 2))
    count = entropy_count(token_mask, axis) if count is None else count
    return jnp.where(_has_entropy(token_mask, axis), entropy, 0).sum() / jnp.maximum(count, 1)


def entropy_count(token_mask: jax.Array, axis: int = OVER_GROUP) -> jax.Array:
    """The number of entropies that `normalised_entropy` averages, for a token mask [N, G, S]."""
    return _has_entropy(token_mask, axis).sum()


def _has_entropy(token_mask: jax.Array, axis: int) -> jax.Array:
    return token_mask if axis == OVER_EXPERTS else token_mask.sum(axis=1) > 1


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def controller_logits(x: jax.Array, controller: jax.Array, dtype: Any) -> jax.Array:
    """The product of x [N, G, S, D] and a controller [D, E]: [N, G, S, E] in `dtype`."""
    return product("ngsd,de->ngse", x, controller, dtype=dtype)


@default_promotion()
def _controller_logits_backward(dtype, residuals, cotangent):
    """On a GPU, with x and the cotangent by position, as merge and the softmax have them: elsewhere a copy of each."""

    def natural(x, controller, cotangent):
        return jax.vjp(partial(product, "ngsd,de->ngse", dtype=dtype), x, controller)[1](cotangent)

    def by_position(x, controller, cotangent):
        # Without the barrier XLA would transpose the original x once more. Letters of contracted dimensions are sorted
        # by einsum, which would transpose x if their order were not that of the dimensions.
        x = jax.lax.optimization_barrier(_by_position(x))
        pull = jax.vjp(partial(product, "nstd,de->nste", dtype=dtype), x, controller)[1]
        dx, d_controller = pull(_by_position(cotangent))
        return _by_position(dx), d_controller

    return select_by_platform(by_position, natural, *residuals, cotangent)


controller_logits.defvjp(
    lambda x, controller, dtype: (controller_logits(x, controller, dtype), (x, controller)), _controller_logits_backward
)


# --- merge, experts, emit ---------------------------------------------------------------------------------------------


def merge(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Compute the mixtures: for each expert, the average of a group's tokens by the expert's mixing weights.

    weights [N, G, S, E], x [N, G, S, D] -> [N, S, E, D] in x's dtype.
    """
    _check_pair(weights, x)
    return jnp.einsum("nsge,nsgd->nsed", _by_position(weights.astype(x.dtype)), _by_position(x))


def emit(weights: jax.Array, outputs: jax.Array) -> jax.Array:
    """Distribute the expert outputs to the tokens of the group: their sum by each token's weights, not renormalized.

    weights [N, G, S, E], outputs [N, S, E, D] -> [N, G, S, D] in the dtype of `outputs`.
    """
    chex.assert_rank([weights, outputs], 4, custom_message="weights are [N, G, S, E], outputs are [N, S, E, D]")
    n, _, s, e = weights.shape
    words = "expert outputs are [N, S, E, D] for weights [N, G, S, E]"
    chex.assert_shape(outputs, (n, s, e, None), custom_message=words)
    return _by_position(jnp.einsum("nsge,nsed->nsgd", _by_position(weights.astype(outputs.dtype)), outputs))


def _by_position(x: jax.Array) -> jax.Array:
    """Swap G and S, [N, G, S, ...] <-> [N, S, G, ...]: one matrix per position, the layout of batched products."""
    return jnp.swapaxes(x, 1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 8))
def merge_experts_emit(
    project_in: Projection,
    project_out: Projection,
    save_for_backward: SaveForBackward,
    x: jax.Array,
    weights: jax.Array,
    w_in: chex.ArrayTree,
    w_out: chex.ArrayTree,
    emit_weights: jax.Array | None = None,
    fence_saved: bool = True,
) -> jax.Array:
    """Merge, experts and emit as one function with its own backward pass, which need not save the mixtures.

    At granularity E / G = k the mixtures and the expert outputs are each k times as large as x. The backward pass
    recomputes them, the mixtures from x and the outputs from the pre-activations, unless `save_for_backward` is `all`.

    If experts are sharded over devices, a recomputed array travels in one all-to-all with the cotangent that has to
    travel anyway: two all-to-alls forward and two backward for every value of `save_for_backward`.

    Args:
        project_in: (u [N, S, E, D], w_in) -> pre-activations, a tree of [E, N, S, F]: the experts up to the activation.
        project_out: (pre-activations, w_out) -> [N, S, E, D]: activation and output projection.
        save_for_backward: arrays that the forward pass saves in addition to x, the mixing weights and the parameters:
            `nothing`, the `pre_activations`, or `all` (also the mixtures and the expert outputs).
        x: [N, G, S, D].
        weights: mixing weights [N, G, S, E], used by merge, and by emit unless `emit_weights` are given.
        w_in, w_out: the experts' parameters, sharded over the mesh axis `expert` along E.
        emit_weights: [N, G, S, E], if different from `weights`.
        fence_saved: whether, on GPUs, an optimization barrier keeps the compiler from also saving the elementwise
            results of `project_out`. False where these are the pre-activations themselves.

    Returns:
        The update [N, G, S, D] in x's dtype. Has reverse-mode derivatives of any order, and none of forward mode.
    """
    return _forward(project_in, project_out, save_for_backward, x, weights, w_in, w_out, emit_weights, fence_saved)[0]


def _forward(project_in, project_out, save_for_backward, x, weights, w_in, w_out, emit_weights, fence_saved):
    """Return the update, and the residuals that are saved for `_backward`."""
    (u,) = _to_experts(merge(weights, x))
    h = project_in(u, w_in)
    (o,) = _to_groups(x, project_out(h, w_out))
    saved = {"nothing": (), "pre_activations": (h,), "all": (h, u, o)}[save_for_backward]
    y = emit(weights if emit_weights is None else emit_weights, o)
    return y, (x, weights, w_in, w_out, emit_weights, saved)


@default_promotion()
def _backward(project_in, project_out, save_for_backward, fence_saved, residuals, dy):
    """Gradients of x, the weights, w_in, w_out and the emit weights; `dy` [N, G, S, D] is the update's cotangent."""
    # Without the barrier the compiler finds the same expressions in the forward pass and saves their values, which
    # are meant to be recomputed.
    x, *others, saved = residuals
    fenced, saved = _fenced_casts((x, *others, dy), saved, x.dtype, fence_saved)
    x, weights, w_in, w_out, emit_weights, dy = fenced
    do = merge(weights if emit_weights is None else emit_weights, dy)  # the transpose of emit
    if save_for_backward == "all":
        u, (do,) = saved[1], _to_experts(do)
    else:
        u, do = _to_experts(merge(weights, x), do)
    # If h was saved, recomputing it here is dead code, which the compiler removes.
    h, pull_in = jax.vjp(project_in, u, w_in)
    o, pull_out = jax.vjp(project_out, saved[0] if saved else h, w_out)
    dh, dw_out = pull_out(reshard(do, *axes_of(o)))
    du, dw_in = pull_in(dh)
    if save_for_backward == "all":
        o, (du,) = saved[2], _to_groups(x, du)
    else:
        o, du = _to_groups(x, reshard(o, *axes_of(du)), du)
    dx = emit(weights, du)  # the transpose of merge
    d_merge, d_emit = map(_weights_gradient, (x, dy), (du, o))
    of_weights = (d_merge + d_emit, None) if emit_weights is None else (d_merge, d_emit)
    gradients = [of_weights[0], dw_in, dw_out, of_weights[1]]
    return dx, *jax.tree.map(lambda of, gradient: gradient.astype(of.dtype), others, gradients)


merge_experts_emit.defvjp(_forward, _backward)


def _fenced_casts(tree: Any, saved: Any, dtype: Any, fence_saved: bool) -> tuple[Any, Any]:
    """Pass trees of arrays through an optimization barrier, and cast those of rank 3 and more in `tree` to `dtype`.

    XLA does not fuse the cast into products on a GPU. There the barrier follows the cast, so that the forward pass and
    the backward pass share its result; elsewhere it precedes it. `fence_saved`, see above, is for GPUs, too.
    """

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(dtype) if a.ndim > 2 else a, tree)

    def cast_first(tree: Any, saved: Any) -> tuple[Any, Any]:
        if fence_saved:
            return jax.lax.optimization_barrier((cast(tree), saved))
        return jax.lax.optimization_barrier(cast(tree)), saved

    def cast_last(tree: Any, saved: Any) -> tuple[Any, Any]:
        tree, saved = jax.lax.optimization_barrier((tree, saved))
        return cast(tree), saved

    return select_by_platform(cast_first, cast_last, tree, saved)


def _weights_gradient(tokens: jax.Array, of_experts: jax.Array) -> jax.Array:
    """Inner products over D of tokens [N, G, S, D] and arrays of experts [N, S, E, D]: [N, G, S, E]."""
    return _by_position(jnp.einsum("nsgd,nsed->nsge", _by_position(tokens), of_experts))


def _to_experts(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Reshard [N, S, E, D] from groups to experts, by one all-to-all along the mesh axis `expert`.

    Before, a device has its groups for all experts; after, its experts for all groups. `expert` shards the groups, or
    the positions where groups span devices.
    """
    groups, positions = (tuple(axis for axis in axes if axis != "expert") for axes in axes_of(arrays[0])[:2])
    return _exchange(arrays, groups, positions, DIMENSIONS["experts"])


def _to_groups(like: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Invert `_to_experts`: reshard to the groups and positions of `like` [N, G, S, D], by one all-to-all."""
    groups, _, positions, _ = axes_of(like)
    return _exchange(arrays, groups, positions, ())


def _exchange(arrays: tuple[jax.Array, ...], groups: Axes, positions: Axes, experts: Axes) -> tuple[jax.Array, ...]:
    """Reshard all arrays; several of them are stacked, so that they take one collective."""
    if axis_size("expert") == 1 or len(arrays) == 1:
        return tuple(reshard(a, groups, positions, experts, None) for a in arrays)
    return tuple(reshard(jnp.stack(arrays), None, groups, positions, experts, None))


def _check_pair(weights: jax.Array, x: jax.Array) -> None:
    chex.assert_rank([weights, x], 4, custom_message="weights are [N, G, S, E], x is [N, G, S, D]")
    chex.assert_equal_shape_prefix(
        [weights, x], 3, custom_message="weights [N, G, S, E] and x [N, G, S, D] share groups, group size and sequence"
    )


def _check_mask(token_mask: jax.Array, logits: jax.Array) -> None:
    chex.assert_type(token_mask, bool)
    chex.assert_shape(
        token_mask, logits.shape[:3], custom_message="token mask is [N, G, S]: groups, group size, sequence"
    )
