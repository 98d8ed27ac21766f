"""Cross-entropy without the logits of the whole batch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from mot_jax.sharding import shards, spec


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array, chunk: int) -> jax.Array:
    """Sum of -log softmax(hidden @ head)[target] over the True entries of `mask`, in nats.

    A scan over chunks of positions: logits exist for B x `chunk` tokens at a time. Under differentiation the same pass
    also makes the gradients, so that no logits are kept and none are computed twice.

    Args:
        hidden: [B, S, D]. head: [D, V], same dtype. targets: int32 [B, S]. mask: bool [B, S]. chunk: divides S.

    Returns:
        Scalar in promote_types(dtype, float32).
    """
    parts = _chunks(chunk, hidden, targets, mask)

    def body(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        return total + _chunk_loss(part, head)[0], None

    return jax.lax.scan(body, jnp.zeros((), _wide(hidden)), parts)[0]


def _forward(hidden, head, targets, mask, chunk):
    # Each shard of the rows sums its own gradient of the head over all chunks, so that the devices add theirs up once,
    # after the scan, and not in every chunk.
    parts = _chunks(chunk, hidden, targets, mask)
    d_head = jnp.zeros((shards("rows"), *head.shape), _wide(hidden), out_sharding=spec("rows", None, None))

    def body(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        total, d_head = carry
        loss, d_logits = _chunk_loss(part, head)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("nbsv,dv->nbsd", d_logits, head)
        d_head += jnp.einsum("nbsd,nbsv->ndv", part[0], d_logits, preferred_element_type=d_head.dtype)
        return (total + loss, d_head), d_hidden

    (total, d_head), d_hidden = jax.lax.scan(body, (jnp.zeros((), _wide(hidden)), d_head), parts)
    d_hidden = jnp.moveaxis(d_hidden, 0, 2).reshape(hidden.shape, out_sharding=spec("rows", None, None))
    return total, (d_hidden, d_head.sum(axis=0).astype(head.dtype))


def _backward(chunk, residuals, scale):
    d_hidden, d_head = residuals
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


def _chunk_loss(part: tuple, head: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of losses, its gradient with respect to the logits) of one chunk."""
    hidden, targets, mask = part
    logits = jnp.einsum("nbsd,dv->nbsv", hidden, head, preferred_element_type=_wide(hidden))
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    target = jax.nn.one_hot(targets, head.shape[1], dtype=logits.dtype)
    losses = log_z[..., 0] - (logits * target).sum(axis=-1)
    d_logits = jnp.where(mask[..., None], jnp.exp(logits - log_z) - target, 0)
    return jnp.where(mask, losses, 0).sum(), d_logits


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
