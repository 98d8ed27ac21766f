"""Cross-entropy that never holds the logits of the whole batch in memory."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mot_jax.nn.sharding import (
    axes_of,
    deferred_axes,
    num_shards,
    replicate,
    reshard,
    scale_gradient,
    select_by_platform,
    spec,
    sum_leading,
    undeferred,
)
from mot_jax.runtime.compilation import default_promotion


class LossSums(NamedTuple):
    """Sums over targets, scalars. Only `loss` has a gradient.

    Attributes:
        loss: the objective to minimize, nats + head_z x (log Z)^2, where Z is the sum of the exponentials of a target's
            logits. In promote_types(dtype, float32).
        nats: -log p(target). In promote_types(dtype, float32).
        correct: int32, the number of targets with the largest logit.
    """

    loss: jax.Array
    nats: jax.Array
    correct: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy_sum(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    chunk: int,
    head_z: float = 0.0,
    accuracy: bool = False,
) -> LossSums:
    """Sum -log softmax(hidden @ head)[target], and further statistics, over the True entries of `mask`.

    This scans over chunks of positions, so that the logits of B x `chunk` tokens are in memory at a time. Under
    differentiation the same scan computes the gradients, so that logits are neither saved nor recomputed.

    Args:
        hidden: [B, S, D].
        head: [D, V], cast to hidden's dtype.
        targets: int32 [B, S].
        mask: bool [B, S].
        chunk: positions per chunk on one device. The largest divisor of `chunk` that also divides a device's part of S
            is used.
        head_z: weight of (log Z)^2 in the loss.
        accuracy: whether to count `correct`, which is 0 otherwise.
    """
    parts, head = _chunks(chunk, hidden, targets, mask), replicate(undeferred(head).astype(hidden.dtype))

    def body(total: LossSums, part: tuple) -> tuple[LossSums, None]:
        return jax.tree.map(jnp.add, total, _chunk_loss(part, head, head_z, accuracy)[0]), None

    return jax.lax.scan(body, _zero(hidden), parts)[0]


def _forward(hidden, head, targets, mask, chunk, head_z, accuracy):
    # Each device sums its own gradient of the head over all chunks, so that devices add theirs up once, after the scan,
    # and not once per chunk.
    parts = _chunks(chunk, hidden, targets, mask)
    replicated = replicate(undeferred(head).astype(hidden.dtype))
    batch_axes, position_axes, _ = axes_of(hidden)
    shape = (num_shards(batch_axes), num_shards(position_axes), *head.shape)
    d_head = jnp.zeros(shape, _wide(hidden), out_sharding=spec(batch_axes, position_axes, None, None))

    def body(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        total, d_head = carry
        sums, d_logits = _chunk_loss(part, replicated, head_z, accuracy)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("nbtsv,dv->nbtsd", d_logits, replicated)
        d_head += jnp.einsum("nbtsd,nbtsv->ntdv", part[0], d_logits, preferred_element_type=d_head.dtype)
        return (jax.tree.map(jnp.add, total, sums), d_head), d_hidden

    (total, d_head), d_hidden = jax.lax.scan(body, (_zero(hidden), d_head), parts)
    d_hidden = jnp.moveaxis(d_hidden, 0, 3).reshape(hidden.shape, out_sharding=spec(batch_axes, position_axes, None))
    return total, (d_hidden, _sum_over_devices(d_head, head).astype(head.dtype))


@default_promotion()
def _backward(chunk, head_z, accuracy, residuals, cotangents):
    (d_hidden, d_head), scale = residuals, cotangents.loss
    return (d_hidden * scale).astype(d_hidden.dtype), scale_gradient(d_head, scale).astype(d_head.dtype), None, None


cross_entropy_sum.defvjp(_forward, _backward)


def _sum_over_devices(partial_sums: jax.Array, like: jax.Array) -> jax.Array:
    """Sum [n, t, D, V], one entry a device, to the gradient [D, V] of `like`: a reduce-scatter where it is sharded."""
    if deferred_axes(like):
        return sum_leading(partial_sums, 2, like)
    batch_axes, position_axes, *_ = axes_of(partial_sums)
    summed_axes, out_axes = batch_axes + position_axes, axes_of(like)
    if num_shards(summed_axes) == 1:
        return reshard(partial_sums.sum(axis=(0, 1)), *out_axes)
    all_reduced = tuple(axis for axis in summed_axes if not any(axis in axes for axes in out_axes))

    def add(partial_sum: jax.Array) -> jax.Array:
        total = partial_sum[0, 0]
        for dimension, axes in enumerate(out_axes):
            if num_shards(axes) > 1:
                total = jax.lax.psum_scatter(total, axes, scatter_dimension=dimension, tiled=True)
        return jax.lax.psum(total, all_reduced) if num_shards(all_reduced) > 1 else total

    # The check of varying axes would refuse an axis of size 1 that nothing is summed over.
    in_specs, out_specs = spec(batch_axes, position_axes, None, None), spec(*out_axes)
    return jax.shard_map(add, in_specs=in_specs, out_specs=out_specs, check_vma=False)(partial_sums)


def _chunks(chunk: int, hidden: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """Split [B, S, ...] into [chunks, n, B / n, t, chunk, ...], n and t the numbers of `hidden`'s shards of B and S."""
    batch_axes, position_axes, _ = axes_of(hidden)
    n, t = num_shards(batch_axes), num_shards(position_axes)
    size = math.gcd(chunk, hidden.shape[1] // t)

    def split(x: jax.Array) -> jax.Array:
        shape = (n, x.shape[0] // n, t, x.shape[1] // (t * size), size, *x.shape[2:])
        x = reshard(x, batch_axes, position_axes, *[None] * (x.ndim - 2))
        out_sharding = spec(batch_axes, None, position_axes, *[None] * (len(shape) - 3))
        return jnp.moveaxis(jnp.reshape(x, shape, out_sharding=out_sharding), 3, 0)

    return tuple(split(x) for x in (hidden, *others))


def _chunk_loss(part: tuple, head: jax.Array, head_z: float, accuracy: bool) -> tuple[LossSums, jax.Array]:
    """The sums of one chunk, and the gradient of its loss with respect to the logits."""
    hidden, targets, mask = part
    logits = jnp.einsum("nbtsd,dv->nbtsv", hidden, head, preferred_element_type=_wide(hidden))
    target = jax.nn.one_hot(targets, head.shape[1], dtype=logits.dtype)
    log_z, target_logits = select_by_platform(_in_one_pass, _in_three_passes, logits, target)
    nats = log_z[..., 0] - target_logits
    losses, probabilities = nats, jnp.exp(logits - log_z)
    if head_z:
        losses += head_z * log_z[..., 0] ** 2
        probabilities *= 1 + 2 * head_z * log_z
    correct = jnp.argmax(logits, axis=-1) == targets if accuracy else jnp.zeros_like(mask)
    loss_sum, nats_sum = (jnp.where(mask, value, 0).sum() for value in (losses, nats))
    return LossSums(loss_sum, nats_sum, (mask & correct).sum()), jnp.where(mask[..., None], probabilities - target, 0)


def _in_three_passes(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log Z [..., 1], and the logits of the targets [...], of logits and one-hot targets [..., V]."""
    return jax.nn.logsumexp(logits, axis=-1, keepdims=True), (logits * target).sum(axis=-1)


def _in_one_pass(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `_in_three_passes`, by one reduction, so that a GPU reads all logits once."""

    def add(a: tuple, b: tuple) -> tuple:
        maximum = jnp.maximum(a[0], b[0])
        scaled = (total * jnp.exp(old - maximum) for old, total in ((a[0], a[1]), (b[0], b[1])))
        return maximum, sum(scaled), a[2] + b[2]

    zero, lowest = jnp.zeros((), logits.dtype), jnp.finfo(logits.dtype).min.astype(logits.dtype)
    operands = logits, jnp.ones_like(logits), logits * target
    maximum, total, target_logits = jax.lax.reduce(operands, (lowest, zero, zero), add, (logits.ndim - 1,))
    return (maximum + jnp.log(total))[..., None], target_logits


def _zero(hidden: jax.Array) -> LossSums:
    zero = jnp.zeros((), _wide(hidden))
    return LossSums(zero, zero, jnp.zeros((), int))


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
