"""The dense feed-forward layer: every token by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from mot_jax.config import DenseConfig, InitConfig
from mot_jax.nn.feed_forward.interface import FeedForwardContext, FeedForwardOutput, activate
from mot_jax.nn.initializers import draw
from mot_jax.nn.sharding import axes_of, product, spec


class Dense(nnx.Module):
    """act(x W_in + b_in) W_out + b_out; if gated, act(x W_gate + b_gate) (x W_in + b_in) W_out + b_out.

    Parameters: `kernel_in` [D, F], `kernel_out` [F, D], and `kernel_gate` [D, F] if `gated`. With `bias`: `bias_in`
    [F], `bias_out` [D] and `bias_gate` [F], zero at first.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        config: DenseConfig = DenseConfig(),
        *,
        activation: str = "relu",
        gated: bool = False,
        init: InitConfig = InitConfig(),
        dtype: str = "float32",
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.activation, self.dtype = activation, dtype

        def kernel(inner: int, outer: int) -> nnx.Param:
            return nnx.Param(draw(rngs.params(), (inner, outer), inner, init, param_dtype))

        def bias(size: int, there: bool = True) -> nnx.Param | None:
            return nnx.Param(jnp.zeros(size, param_dtype)) if config.bias and there else None

        self.kernel_in, self.kernel_out = kernel(d_model, d_ff), kernel(d_ff, d_model)
        self.kernel_gate = kernel(d_model, d_ff) if gated else None
        self.bias_in, self.bias_out, self.bias_gate = bias(d_ff), bias(d_model), bias(d_ff, gated)

    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D] -> update [B, S, D] in the layer's dtype."""
        del context
        x = x.astype(self.dtype)
        gate = None if self.kernel_gate is None else self._linear(x, self.kernel_gate, self.bias_gate)
        h = activate(self.activation, self._linear(x, self.kernel_in, self.bias_in), gate)
        return FeedForwardOutput(self._linear(h, self.kernel_out, self.bias_out, spec(*axes_of(x))))

    def _linear(
        self, x: jax.Array, kernel: nnx.Param, bias: nnx.Param | None, out: PartitionSpec | None = None
    ) -> jax.Array:
        y = product("bsd,df->bsf", x, kernel[...], out)
        return y if bias is None else y + bias[...].astype(self.dtype)
