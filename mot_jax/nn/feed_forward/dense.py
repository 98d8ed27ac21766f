"""The dense feed-forward layer: each token is processed independently."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from mot_jax.config import DenseConfig
from mot_jax.nn.feed_forward.interface import (
    FeedForward,
    FeedForwardContext,
    FeedForwardOutput,
    LayerOptions,
    activate,
)
from mot_jax.nn.sharding import axes_of, product, spec
from mot_jax.runtime.compilation import default_promotion


class Dense(FeedForward):
    """act(x W_in + b_in) W_out + b_out; if gated, act(x W_gate + b_gate) (x W_in + b_in) W_out + b_out.

    Parameters: `kernel_in` [D, F], `kernel_out` [F, D], and `kernel_gate` [D, F] if `gated`. With `config.bias` also
    `bias_in` [F], `bias_out` [D], and `bias_gate` [F] if `gated`, initially zero. F is `d_ff`.
    """

    config_type = DenseConfig
    config: DenseConfig

    def _create_parameters(self, options: LayerOptions) -> None:
        d, f, gated = options.d_model, options.d_ff, options.gated
        self.kernel_in = options.matrix((d, f), d)
        self.kernel_out = options.matrix((f, d), f)
        self.kernel_gate = options.matrix((d, f), d) if gated else None

        def bias(size: int) -> nnx.Param:
            return nnx.Param(jnp.zeros(size, options.param_dtype))

        self.bias_in = bias(f) if self.config.bias else None
        self.bias_out = bias(d) if self.config.bias else None
        self.bias_gate = bias(f) if self.config.bias and gated else None

    @default_promotion()
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
