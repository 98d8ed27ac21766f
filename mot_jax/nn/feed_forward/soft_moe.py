"""Soft MoE: each expert processes averages of all tokens of a sequence (arXiv 2308.00951, section 2).

The forward pass, from `SoftMoE.__call__`, with the dimensions B batch, S sequence, D model, E experts and

    P  slots of an expert, each an average of the tokens of one sequence    p: its einsum letter

    x [B, S, D]  ->  logits            [B, S, E, P]    scaled cosines of tokens and controller, in float32
                     dispatch weights  [B, S, E, P]    softmax over S
                     slots             [B, P, E, D]    averages of the tokens by these weights
                     experts           [B, P, E, D]
                     combine weights   [B, S, E, P]    softmax over all E P slots
                     update            [B, S, D]       averages of the expert outputs by these weights

A token depends on all tokens of its sequence, later ones included, so the layer is not causal: masked models only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mot_jax.config import SoftMoEConfig
from mot_jax.errors import UserError
from mot_jax.nn import mixing, routing
from mot_jax.nn.feed_forward.experts import ExpertFeedForward
from mot_jax.nn.feed_forward.interface import FeedForwardContext, FeedForwardOutput, LayerOptions
from mot_jax.nn.sharding import axes_of, reshard, spec, undeferred
from mot_jax.runtime.compilation import default_promotion


def unit(x: jax.Array, axis: int) -> jax.Array:
    """Divide by the L2 norm over `axis`, sqrt(sum x² + 1e-6): a zero vector stays zero and has a finite gradient."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=axis, keepdims=True) + 1e-6)


def soft_weights(logits: jax.Array, token_mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Compute dispatch and combine weights from logits [B, S, E, P].

    Args:
        logits: float32 or wider.
        token_mask: bool [B, S], True = non-padding. Both weights of padding are 0.

    Returns:
        Softmax of the logits over S, and over E and P, [B, S, E, P]. All weights of a sequence of padding are 0.
    """
    if token_mask is None:
        return jax.nn.softmax(logits, axis=1), jax.nn.softmax(logits, axis=(2, 3))
    valid = token_mask[:, :, None, None]
    # The lowest finite number instead of -inf: a sequence of padding only gives no NaN.
    dispatch = jax.nn.softmax(jnp.where(valid, logits, jnp.finfo(logits.dtype).min), axis=1)
    return jnp.where(valid, dispatch, 0), jnp.where(valid, jax.nn.softmax(logits, axis=(2, 3)), 0)


class SoftMoE(ExpertFeedForward):
    """Each expert processes P averages of the tokens of a sequence; a token's update is an average of all outputs.

    Parameters: those of `ExpertFeedForward`, but controller [D, E, P], and

    scale: a scalar, initially 1, the factor on the cosines.

    Tokens and controller are normalized over D (`unit`); these, logits and softmax are in float32 (or wider). P is
    fixed by the config, and S may be any length. Sequences are independent of each other. A layer on its own needs
    `config.slots_per_expert`; in a model its default follows from the context length.
    """

    config_type = SoftMoEConfig
    config: SoftMoEConfig

    def _create_parameters(self, options: LayerOptions) -> None:
        slots = self.config.slots_per_expert
        if slots is None:
            rule = "must be given for a layer on its own, the length of its sequences / num_experts"
            raise UserError(f"slots_per_expert = None: {rule}; try 1")
        self._create_expert_parameters(options, options.d_model, slots=(slots,))
        self.scale = options.constant(1.0)

    @default_promotion()
    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D] -> update [B, S, D] in the layer's dtype.

        Metrics: `dispatch_entropy` and `combine_entropy`, the normalized entropies of the weights; `load_max`, the
        largest share of an expert in the combine weights, 1 being an even share.
        """
        x = x.astype(self.dtype)
        sequences, positions, _ = axes_of(x)
        mask = None if context.token_mask is None else reshard(context.token_mask, sequences, positions)
        dispatch, combine = soft_weights(self.logits(x), mask)
        # Devices that share the positions of a sequence each add a part of the slots' sums.
        out = spec(None, sequences, None, None)
        u = jnp.einsum("bsep,bsd->ebpd", dispatch.astype(x.dtype), x, out_sharding=out)
        o = self._apply_to_slots(u)
        y = reshard(jnp.einsum("bsep,ebpd->bsd", combine.astype(x.dtype), o), *axes_of(x))
        if self.shared is not None:
            y += self.shared(x, context).y
        return FeedForwardOutput(y, metrics=_metrics(*jax.lax.stop_gradient((dispatch, combine)), mask))

    def logits(self, x: jax.Array) -> jax.Array:
        """x [B, S, D] -> `scale` times the cosines of tokens and controller, [B, S, E, P] in float32 (or wider)."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        controller = self.scale[...].astype(wide) * unit(undeferred(self.controller[...]).astype(wide), axis=0)
        return routing.router_logits("bsd,dep->bsep", unit(x.astype(wide), axis=-1), controller)


def _metrics(dispatch: jax.Array, combine: jax.Array, mask: jax.Array | None) -> dict[str, jax.Array]:
    """The metrics of weights [B, S, E, P], as means over sequences and slots, and over non-padding tokens."""
    b, s, e, p = dispatch.shape
    token_axes = axes_of(dispatch)[:2]

    def members(a: jax.Array, *dimensions: int) -> jax.Array:
        """[B, S, ...] -> [B, S, 1, ...]: the sequences are the groups of `mixing.normalised_entropy`."""
        return jnp.reshape(a, (b, s, 1, *dimensions), out_sharding=spec(*token_axes, None, *(None for _ in dimensions)))

    grouped_mask = None if mask is None else members(mask)
    count = b * s if mask is None else mask.sum()
    shares = combine.sum(axis=(0, 1, 3)) / jnp.maximum(count, 1)
    return {
        "dispatch_entropy": mixing.normalised_entropy(members(dispatch, e * p), grouped_mask, mixing.OVER_GROUP),
        "combine_entropy": mixing.normalised_entropy(members(combine, e * p), grouped_mask, mixing.OVER_EXPERTS),
        "load_max": e * shares.max(),
    }
