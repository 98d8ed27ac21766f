"""Cross-entropy without the logits of the whole batch."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mot_jax.nn.sharding import axes_of, reshard, shards, spec, whole


class LossSums(NamedTuple):
    """Scalars, summed over targets. Only `loss` has a gradient.

    loss: what to minimise, nats + head_z x (log Z)^2, Z being the sum of the exponentials of a target's logits. nats:
    -log p(target). Both in promote_types(dtype, float32). correct: int32, the targets that the model thinks likeliest.
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
    """-log softmax(hidden @ head)[target] and more, summed over the True entries of `mask`.

    A scan over chunks of positions: logits exist for B x `chunk` tokens at a time. Under differentiation the same pass
    also makes the gradients, so that no logits are kept and none are computed twice.

    Args:
        hidden: [B, S, D]. head: [D, V], read in hidden's dtype. targets: int32 [B, S]. mask: bool [B, S].
        chunk: positions of a row whose logits a device holds; the largest that divides its part of S is taken.
        head_z: weight of (log Z)^2 in the loss. accuracy: whether to count `correct`, which is 0 otherwise.
    """
    parts, head = _chunks(chunk, hidden, targets, mask), whole(head.astype(hidden.dtype))

    def body(total: LossSums, part: tuple) -> tuple[LossSums, None]:
        return jax.tree.map(jnp.add, total, _chunk_loss(part, head, head_z, accuracy)[0]), None

    return jax.lax.scan(body, _zero(hidden), parts)[0]


def _forward(hidden, head, targets, mask, chunk, head_z, accuracy):
    # Each device sums its own gradient of the head over all chunks, so that they add theirs up once, after the scan,
    # and not in every chunk.
    parts, every = _chunks(chunk, hidden, targets, mask), whole(head.astype(hidden.dtype))
    rows, positions, _ = axes_of(hidden)
    shape = (shards(rows), shards(positions), *head.shape)
    d_head = jnp.zeros(shape, _wide(hidden), out_sharding=spec(rows, positions, None, None))

    def body(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        total, d_head = carry
        sums, d_logits = _chunk_loss(part, every, head_z, accuracy)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("nbtsv,dv->nbtsd", d_logits, every)
        d_head += jnp.einsum("nbtsd,nbtsv->ntdv", part[0], d_logits, preferred_element_type=d_head.dtype)
        return (jax.tree.map(jnp.add, total, sums), d_head), d_hidden

    (total, d_head), d_hidden = jax.lax.scan(body, (_zero(hidden), d_head), parts)
    d_hidden = jnp.moveaxis(d_hidden, 0, 3).reshape(hidden.shape, out_sharding=spec(rows, positions, None))
    return total, (d_hidden, _add_up(d_head, head).astype(head.dtype))


def _backward(chunk, head_z, accuracy, residuals, cotangents):
    (d_hidden, d_head), scale = residuals, cotangents.loss
    return (d_hidden * scale).astype(d_hidden.dtype), (d_head * scale).astype(d_head.dtype), None, None


cross_entropy_sum.defvjp(_forward, _backward)


def _add_up(parts: jax.Array, like: jax.Array) -> jax.Array:
    """[n, t, D, V], one part from each device, -> their sum, cut as `like` is: each device adds up what it keeps."""
    rows, positions, *_ = axes_of(parts)
    if shards(rows + positions) == 1:
        return reshard(parts.sum(axis=(0, 1)), *axes_of(like))
    cut = axes_of(like)
    others = tuple(axis for axis in rows + positions if not any(axis in axes for axes in cut))

    def add(part: jax.Array) -> jax.Array:
        total = part[0, 0]
        for dimension, axes in enumerate(cut):
            if shards(axes) > 1:
                total = jax.lax.psum_scatter(total, axes, scatter_dimension=dimension, tiled=True)
        return jax.lax.psum(total, others) if shards(others) > 1 else total

    # Unchecked: an axis of size 1 over which nothing is added up still tells its parts apart.
    into, out = spec(rows, positions, None, None), spec(*cut)
    return jax.shard_map(add, in_specs=into, out_specs=out, check_vma=False)(parts)


def _chunks(chunk: int, hidden: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """[B, S, ...] -> [chunks, n, B / n, t, chunk, ...]: n parts of the rows, t of the positions, as `hidden` is cut."""
    rows, positions, _ = axes_of(hidden)
    n, t = shards(rows), shards(positions)
    size = math.gcd(chunk, hidden.shape[1] // t)

    def cut(x: jax.Array) -> jax.Array:
        shape = (n, x.shape[0] // n, t, x.shape[1] // (t * size), size, *x.shape[2:])
        x = reshard(x, rows, positions, *[None] * (x.ndim - 2))
        out = spec(rows, None, positions, *[None] * (len(shape) - 3))
        return jnp.moveaxis(jnp.reshape(x, shape, out_sharding=out), 3, 0)

    return tuple(cut(x) for x in (hidden, *others))


def _chunk_loss(part: tuple, head: jax.Array, head_z: float, accuracy: bool) -> tuple[LossSums, jax.Array]:
    """(sums, gradient of the loss with respect to the logits) of one chunk."""
    hidden, targets, mask = part
    logits = jnp.einsum("nbtsd,dv->nbtsv", hidden, head, preferred_element_type=_wide(hidden))
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    target = jax.nn.one_hot(targets, head.shape[1], dtype=logits.dtype)
    nats = log_z[..., 0] - (logits * target).sum(axis=-1)
    losses, probabilities = nats, jnp.exp(logits - log_z)
    if head_z:
        losses += head_z * log_z[..., 0] ** 2
        probabilities *= 1 + 2 * head_z * log_z
    correct = jnp.argmax(logits, axis=-1) == targets if accuracy else jnp.zeros_like(mask)
    loss_sum, nats_sum = (jnp.where(mask, value, 0).sum() for value in (losses, nats))
    return LossSums(loss_sum, nats_sum, (mask & correct).sum()), jnp.where(mask[..., None], probabilities - target, 0)


def _zero(hidden: jax.Array) -> LossSums:
    zero = jnp.zeros((), _wide(hidden))
    return LossSums(zero, zero, jnp.zeros((), int))


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
