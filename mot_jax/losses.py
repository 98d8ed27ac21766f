"""Cross-entropy without the logits of the whole batch."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mot_jax.sharding import shards, spec


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
        hidden: [B, S, D]. head: [D, V], same dtype. targets: int32 [B, S]. mask: bool [B, S]. chunk: divides S.
        head_z: weight of (log Z)^2 in the loss. accuracy: whether to count `correct`, which is 0 otherwise.
    """
    parts = _chunks(chunk, hidden, targets, mask)

    def body(total: LossSums, part: tuple) -> tuple[LossSums, None]:
        return jax.tree.map(jnp.add, total, _chunk_loss(part, head, head_z, accuracy)[0]), None

    return jax.lax.scan(body, _zero(hidden), parts)[0]


def _forward(hidden, head, targets, mask, chunk, head_z, accuracy):
    # Each shard of the rows sums its own gradient of the head over all chunks, so that the devices add theirs up once,
    # after the scan, and not in every chunk.
    parts = _chunks(chunk, hidden, targets, mask)
    d_head = jnp.zeros((shards("rows"), *head.shape), _wide(hidden), out_sharding=spec("rows", None, None))

    def body(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        total, d_head = carry
        sums, d_logits = _chunk_loss(part, head, head_z, accuracy)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("nbsv,dv->nbsd", d_logits, head)
        d_head += jnp.einsum("nbsd,nbsv->ndv", part[0], d_logits, preferred_element_type=d_head.dtype)
        return (jax.tree.map(jnp.add, total, sums), d_head), d_hidden

    (total, d_head), d_hidden = jax.lax.scan(body, (_zero(hidden), d_head), parts)
    d_hidden = jnp.moveaxis(d_hidden, 0, 2).reshape(hidden.shape, out_sharding=spec("rows", None, None))
    return total, (d_hidden, d_head.sum(axis=0).astype(head.dtype))


def _backward(chunk, head_z, accuracy, residuals, cotangents):
    (d_hidden, d_head), scale = residuals, cotangents.loss
    return (d_hidden * scale).astype(d_hidden.dtype), (d_head * scale).astype(d_head.dtype), None, None


cross_entropy_sum.defvjp(_forward, _backward)


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[B, S, ...] -> [S / chunk, shards, B / shards, chunk, ...]."""
    n = shards("rows")

    def cut(x: jax.Array) -> jax.Array:
        shape = (n, x.shape[0] // n, x.shape[1] // chunk, chunk, *x.shape[2:])
        out = spec("rows", *[None] * (len(shape) - 1))
        return jnp.moveaxis(jnp.reshape(x, shape, out_sharding=out), 2, 0)

    return tuple(cut(x) for x in arrays)


def _chunk_loss(part: tuple, head: jax.Array, head_z: float, accuracy: bool) -> tuple[LossSums, jax.Array]:
    """(sums, gradient of the loss with respect to the logits) of one chunk."""
    hidden, targets, mask = part
    logits = jnp.einsum("nbsd,dv->nbsv", hidden, head, preferred_element_type=_wide(hidden))
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
