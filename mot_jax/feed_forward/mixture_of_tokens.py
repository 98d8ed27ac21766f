"""The Mixture-of-Tokens layer (PAPER.md section 2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mot_jax import mixing
from mot_jax.config import DenseConfig, InitConfig, MixtureOfTokensConfig
from mot_jax.feed_forward.dense import Dense
from mot_jax.feed_forward.interface import FeedForwardContext, FeedForwardOutput
from mot_jax.init import draw
from mot_jax.sharding import spec


class MixtureOfTokens(nnx.Module):
    """Each expert reads one mixture of the tokens that a group of sequences has at a position.

    Parameters: `controller` [D, E], `w_in` [E, D, F], `w_out` [E, F, D], no biases; `shared`, a `Dense` layer without
    biases, if `shared_dim` > 0. `controller` keeps its product in float32 (or wider).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        config: MixtureOfTokensConfig = MixtureOfTokensConfig(),
        *,
        init: InitConfig = InitConfig(),
        dtype: str = "float32",
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, dtype
        d, e, f = d_model, config.num_experts, config.hidden_dim(d_ff)

        def param(shape: tuple[int, ...], fan_in: int, multiplier: float) -> nnx.Param:
            return nnx.Param(draw(rngs.params(), shape, fan_in, init, param_dtype, multiplier))

        self.controller = param((d, e), d, config.controller_init_scale)
        self.w_in = param((e, d, f), d, config.w_in_init_scale)
        self.w_out = param((e, f, d), f, config.w_out_init_scale)
        plain = DenseConfig(bias=False)
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.shared = Dense(d, config.shared_dim, plain, init=init, rngs=rngs, **dtypes) if config.shared_dim else None

    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D], B a multiple of the group size -> update [B, S, D] in the layer's dtype.

        Metric `mixing_entropy`: the normalised entropy of the mixing weights.
        """
        config = self.config
        grouped = mixing.group(x.astype(self.dtype), config.group_size)
        mask = None if context.token_mask is None else mixing.group(context.token_mask, config.group_size)
        logits = jnp.einsum(
            "ngsd,de->ngse",
            grouped,
            self.controller[...].astype(self.dtype),
            preferred_element_type=jnp.promote_types(self.dtype, jnp.float32),
        )
        weights = mixing.mixing_weights(logits, config.mixing, mask)
        experts = (self.w_in[...], self.w_out[...])
        y = mixing.ungroup(mixing.mix_through(_project_in, _project_out, config.saved, grouped, weights, *experts))
        if self.shared is not None:
            y += self.shared(x, context).y
        entropy = mixing.normalised_entropy(jax.lax.stop_gradient(weights), mask)
        return FeedForwardOutput(y, metrics={"mixing_entropy": entropy})


def _project_in(u: jax.Array, w_in: jax.Array) -> jax.Array:
    out = spec("exchanged_groups", None, "experts", None)
    return jnp.einsum("nsed,edf->nsef", u, w_in.astype(u.dtype), out_sharding=out)


def _project_out(h: jax.Array, w_out: jax.Array) -> jax.Array:
    out = spec("exchanged_groups", None, "experts", None)
    return jnp.einsum("nsef,efd->nsed", jax.nn.relu(h), w_out.astype(h.dtype), out_sharding=out)
