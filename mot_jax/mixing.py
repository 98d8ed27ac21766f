"""The mixing core of Mixture of Tokens: pure functions on arrays (PAPER.md section 2).

Notation, here and everywhere:

    B  batch, rows          N  groups, B / G         E  experts          x  layer input, after the norm
    S  sequence             G  group size            F  expert width     u  mixtures, one per group, position and expert
    D  model width          n, g, s, e, d, f  their indices in einsums   o  expert outputs

Row b of the batch is slot b % G of group b // G. (V-MoE calls something else a group: a set of tokens that are routed
together.) Tokens are mixed with the tokens at the same position of the other rows of their group, and with no others:
no position sees another, no group sees another.

The functions run under NNX, Linen or bare JAX, with or without a mesh. Under a mesh with our Explicit axes, groups are
spread over all devices and experts over the axis `expert` (`mot_jax.sharding`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from mot_jax.config import MixingConfig
from mot_jax.sharding import axis_size, reshard, spec

Saved = Literal["nothing", "pre_activations", "all"]
Project = Callable[[jax.Array, chex.ArrayTree], jax.Array]


def group(x: jax.Array, group_size: int) -> jax.Array:
    """[B, S, ...] -> [N, G, S, ...]: contiguous rows form a group. Raises AssertionError unless G divides B."""
    chex.assert_scalar_positive(group_size)
    batch = x.shape[0]
    chex.assert_is_divisible(batch, group_size, custom_message=f"batch B = {batch}, group size G = {group_size}")
    shape = (batch // group_size, group_size, *x.shape[1:])
    return jnp.reshape(x, shape, out_sharding=spec("groups", *[None] * (len(shape) - 1)))


def ungroup(x: jax.Array) -> jax.Array:
    """[N, G, S, ...] -> [B, S, ...], the inverse of `group`."""
    if x.ndim < 3:
        raise AssertionError(f"x is [N, G, S, ...]: groups, group size, sequence; its rank is {x.ndim}")
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    return jnp.reshape(x, shape, out_sharding=spec("rows", *[None] * (len(shape) - 1)))


def mixing_weights(
    logits: jax.Array, config: MixingConfig = MixingConfig(), token_mask: jax.Array | None = None
) -> jax.Array:
    """Mixing weights over the tokens of each group, for each expert and position apart.

    Args:
        logits: [N, G, S, E], what the controller says of each token. Any float type.
        config: where the weights come from, and the temperature.
        token_mask: bool [N, G, S], True = real. Masked tokens get weight 0.

    Returns:
        [N, G, S, E] in promote_types(logits.dtype, float32). Sums to 1 over G, or to 0 where no token is real.
    """
    chex.assert_rank(logits, 4, custom_message="logits are [N, G, S, E]: groups, group size, sequence, experts")
    chex.assert_type(logits, jnp.floating)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    real = jnp.ones((), bool) if token_mask is None else token_mask[..., None]
    if token_mask is not None:
        _check_mask(token_mask, logits)
    if config.merge == "uniform":
        weights = jnp.broadcast_to(real, logits.shape).astype(logits.dtype)
        return weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1)
    if config.temperature < jnp.finfo(logits.dtype).tiny:
        best = jnp.argmax(jnp.where(real, logits, jnp.finfo(logits.dtype).min), axis=1)  # the first of equals
        return jnp.where(real, jax.nn.one_hot(best, logits.shape[1], axis=1, dtype=logits.dtype), 0)
    return _softmax(logits, jnp.broadcast_to(real, logits.shape), config.temperature)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _softmax(logits: jax.Array, real: jax.Array, temperature: float) -> jax.Array:
    """Over the real tokens of the group; the others get 0. It keeps nothing but its result for the backward pass."""
    # The lowest finite number instead of -inf: a group without real tokens gives no NaN. The largest is 0 before the
    # division, so that neither a huge logit nor a tiny temperature overflows.
    scaled = jnp.where(real, logits, jnp.finfo(logits.dtype).min)
    scaled = (scaled - scaled.max(axis=1, keepdims=True)) / temperature
    return jnp.where(real, jax.nn.softmax(scaled, axis=1), 0)


def _softmax_forward(logits, real, temperature):
    weights = _softmax(logits, real, temperature)
    return weights, weights


def _softmax_backward(temperature, weights, cotangent):
    product = weights * cotangent
    return (product - weights * product.sum(axis=1, keepdims=True)) / temperature, None


_softmax.defvjp(_softmax_forward, _softmax_backward)


def merge(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Mixtures: the tokens of a group averaged by the mixing weights of each expert.

    weights [N, G, S, E], x [N, G, S, D] -> [N, S, E, D] in x's dtype.
    """
    _check_pair(weights, x)
    out = spec("groups", None, None, None)
    return jnp.einsum("ngse,ngsd->nsed", weights.astype(x.dtype), x, out_sharding=out)


def emit(weights: jax.Array, outputs: jax.Array) -> jax.Array:
    """Expert outputs handed back to the tokens of the group, not renormalised.

    weights [N, G, S, E], outputs [N, S, E, D] -> [N, G, S, D] in the dtype of outputs.
    """
    chex.assert_rank([weights, outputs], 4, custom_message="weights are [N, G, S, E], outputs are [N, S, E, D]")
    n, _, s, e = weights.shape
    words = "expert outputs are [N, S, E, D] beside weights [N, G, S, E]"
    chex.assert_shape(outputs, (n, s, e, None), custom_message=words)
    out = spec("groups", None, None, None)
    return jnp.einsum("ngse,nsed->ngsd", weights.astype(outputs.dtype), outputs, out_sharding=out)


def normalised_entropy(weights: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
    """Mean entropy of the mixing weights over log(real tokens in the group): 1 is uniform, 0 is one token. Scalar.

    Groups with fewer than two real tokens at a position do not count.
    """
    n, g, s, _ = weights.shape
    real = jnp.full((n, s), g) if token_mask is None else token_mask.sum(axis=1)
    counts = real > 1
    entropy = jax.scipy.special.entr(weights).sum(axis=1).mean(axis=-1) / jnp.log(jnp.maximum(real, 2))
    return jnp.where(counts, entropy, 0).sum() / jnp.maximum(counts.sum(), 1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def mix_through(
    project_in: Project,
    project_out: Project,
    saved: Saved,
    x: jax.Array,
    weights: jax.Array,
    w_in: chex.ArrayTree,
    w_out: chex.ArrayTree,
) -> jax.Array:
    """Merge, experts and emit in one function, so that the backward pass need not keep the mixtures.

    At granularity E/G = k the mixtures and the expert outputs are each k times as large as the activations. Neither is
    kept (unless `saved` is `all`): the backward pass makes them again, the mixtures from x, the outputs from the
    pre-activations. Where experts are spread over devices, what is made again travels together with the cotangent that
    must travel anyway: two all-to-alls forward and two backward, whatever is kept.

    Args:
        project_in: (u [N, S, E, D], w_in) -> pre-activations [N, S, E, F]: the experts up to the activation.
        project_out: (pre-activations, w_out) -> [N, S, E, D]: activation and output projection.
        saved: what to keep, see `MixtureOfTokensConfig`.
        x: [N, G, S, D].
        weights: mixing weights [N, G, S, E].
        w_in, w_out: the experts' parameters, spread over the mesh axis `expert` by their dimension E.

    Returns:
        The update [N, G, S, D] in x's dtype. Only reverse-mode derivatives exist, and no second ones.
    """
    return _forward(project_in, project_out, saved, x, weights, w_in, w_out)[0]


def _forward(project_in, project_out, saved, x, weights, w_in, w_out):
    (u,) = _to_experts(merge(weights, x))
    h = project_in(u, w_in)
    (o,) = _to_groups(project_out(h, w_out))
    kept = {"nothing": (), "pre_activations": (h,), "all": (h, u, o)}[saved]
    return emit(weights, o), (x, weights, w_in, w_out, kept)


def _backward(project_in, project_out, saved, residuals, dy):
    # Or else the compiler, finding the forward pass in the same program, keeps what we mean to compute again.
    x, weights, w_in, w_out, kept, dy = jax.lax.optimization_barrier((*residuals, dy))
    do = merge(weights, dy)  # emit's transpose
    if saved == "all":
        u, (do,) = kept[1], _to_experts(do)
    else:
        u, do = _to_experts(merge(weights, x), do)
    # Where h was kept, this second computation of it is dead code to the compiler.
    h, pull_in = jax.vjp(project_in, u, w_in)
    o, pull_out = jax.vjp(project_out, kept[0] if kept else h, w_out)
    dh, dw_out = pull_out(do)
    du, dw_in = pull_in(dh)
    if saved == "all":
        o, (du,) = kept[2], _to_groups(du)
    else:
        o, du = _to_groups(o, du)
    dx = emit(weights, du)  # merge's transpose
    both = jnp.einsum("ngsd,nsed->ngse", x, du) + jnp.einsum("ngsd,nsed->ngse", dy, o)
    return dx, both.astype(weights.dtype), dw_in, dw_out


mix_through.defvjp(_forward, _backward)


def _to_experts(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """From each device having its groups for all experts to its experts for all groups: one all-to-all on `expert`."""
    return _exchange(arrays, "exchanged_groups", "experts")


def _to_groups(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Back again: one all-to-all on `expert`."""
    return _exchange(arrays, "groups", None)


def _exchange(arrays: tuple[jax.Array, ...], groups: str, experts: str | None) -> tuple[jax.Array, ...]:
    if axis_size("expert") == 1 or len(arrays) == 1:
        return tuple(reshard(a, groups, None, experts, None) for a in arrays)
    return tuple(reshard(jnp.stack(arrays), None, groups, None, experts, None))


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
