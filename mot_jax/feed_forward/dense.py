"""The dense feed-forward layer: every token by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mot_jax.config import DenseConfig, InitConfig
from mot_jax.feed_forward.interface import FeedForwardContext, FeedForwardOutput
from mot_jax.init import draw


class Dense(nnx.Module):
    """ReLU(x W_in + b_in) W_out + b_out.

    Parameters: `kernel_in` [D, F], `kernel_out` [F, D]. With `bias`: `bias_in` [F], `bias_out` [D], zero at first.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        config: DenseConfig = DenseConfig(),
        *,
        init: InitConfig = InitConfig(),
        dtype: str = "float32",
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.kernel_in = nnx.Param(draw(rngs.params(), (d_model, d_ff), d_model, init, param_dtype))
        self.kernel_out = nnx.Param(draw(rngs.params(), (d_ff, d_model), d_ff, init, param_dtype))
        self.bias_in = nnx.Param(jnp.zeros(d_ff, param_dtype)) if config.bias else None
        self.bias_out = nnx.Param(jnp.zeros(d_model, param_dtype)) if config.bias else None

    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D] -> update [B, S, D] in the layer's dtype."""
        del context
        h = x.astype(self.dtype) @ self.kernel_in[...].astype(self.dtype)
        if self.bias_in is not None:
            h += self.bias_in[...].astype(self.dtype)
        y = jax.nn.relu(h) @ self.kernel_out[...].astype(self.dtype)
        if self.bias_out is not None:
            y += self.bias_out[...].astype(self.dtype)
        return FeedForwardOutput(y)
