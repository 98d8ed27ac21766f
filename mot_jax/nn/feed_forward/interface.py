"""What the transformer knows of a feed-forward layer: `layer(x, context) -> FeedForwardOutput`."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax

_ARRAYS = ["token_mask", "token_ids", "positions", "step", "key"]


@partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=["losses", "train"])
@dataclasses.dataclass(frozen=True)
class FeedForwardContext:
    """What a layer may want to know beside its input. The transformer is given one a step and hands it down.

    token_mask: bool [B, S], True = real; None: all are.
    token_ids: int32 [B, S].
    positions: int32 [B, S], how many tokens of its text stand before each; None: 0 to S - 1, in every row.
    step: int32 scalar, the training step; None after training. key: a PRNG key.
    losses: names of the losses that the training weighs; a layer makes those that it knows. train: whether it is a step
        of training, where tokens that are not real stand at the ends of rows alone. losses, train: static.
    """

    token_mask: jax.Array | None = None
    token_ids: jax.Array | None = None
    positions: jax.Array | None = None
    step: jax.Array | None = None
    key: jax.Array | None = None
    losses: tuple[str, ...] = ()
    train: bool = False


@partial(jax.tree_util.register_dataclass, data_fields=["y", "losses", "metrics"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class FeedForwardOutput:
    """y: the update [B, S, D]. losses: unweighted scalars. metrics: scalars, the same keys in every layer of a kind."""

    y: jax.Array
    losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


_ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


def activate(name: str, h: jax.Array, gate: jax.Array | None) -> jax.Array:
    """What a hidden layer hands on: act(h), or act(gate) h where there is a gate, of h's shape.

    name: `relu`, `gelu` (its tanh form) or `silu`.
    """
    return _ACTIVATIONS[name](h) if gate is None else _ACTIVATIONS[name](gate) * h
