"""Causal multi-head self-attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mot_jax.config import ModelConfig
from mot_jax.init import draw


class Attention(nnx.Module):
    """Scaled dot-product attention over earlier positions of the same row, no biases.

    Parameters: `query` [D, H, K], `key_value` [D, 2, H, K], `out` [H, K, D], with K = D / H.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, h = config.d_model, config.num_heads
        k = d // h
        self.dtype, self.remat = config.dtype, config.remat == "attention"
        self.query = nnx.Param(draw(rngs.params(), (d, h, k), d, config.init, config.param_dtype))
        self.key_value = nnx.Param(draw(rngs.params(), (d, 2, h, k), d, config.init, config.param_dtype))
        self.out = nnx.Param(draw(rngs.params(), (h, k, d), d, config.init, config.param_dtype))

    def __call__(self, x: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
        """x [B, S, D], token_mask bool [B, S] (False is not attended to) -> [B, S, D] in the layer's dtype."""
        x = x.astype(self.dtype)
        query = jnp.einsum("bsd,dhk->bshk", x, self.query[...].astype(self.dtype))
        key_value = jnp.einsum("bsd,dchk->cbshk", x, self.key_value[...].astype(self.dtype))
        mask = None if token_mask is None else token_mask[:, None, None, :]
        attend: Callable[..., jax.Array] = partial(jax.nn.dot_product_attention, is_causal=True)
        if self.remat:  # the S x S scores are large, and cheap to compute again
            attend = jax.checkpoint(attend)
        y = attend(query, key_value[0], key_value[1], mask=mask)
        return jnp.einsum("bshk,hkd->bsd", y, self.out[...].astype(self.dtype))
