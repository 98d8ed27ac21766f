"""ReLU routing: a mixture of experts whose gates are ReLUs (ReMoE, arXiv 2412.14711, section 3).

The forward pass, from `ReluRouting.__call__`, with the dimensions B batch, S sequence, D model, E experts, F width:

    x [B, S, D]  ->  gates   [B, S, E]      ReLU of tokens times controller, in float32, not normalized
                     hidden  [B, S, E, F]   of all experts, multiplied by the gates
                     update  [B, S, D]      sum of the expert outputs

All experts process all tokens, so the layer executes E / k times the FLOPs that its sparsity would allow: it is a
baseline of quality, not of time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mot_jax.config import ReluRoutingConfig
from mot_jax.nn import routing
from mot_jax.nn.feed_forward.experts import ExpertFeedForward
from mot_jax.nn.feed_forward.interface import (
    FeedForwardContext,
    FeedForwardOutput,
    LayerOptions,
    RouterState,
    activate,
)
from mot_jax.nn.sharding import DIMENSIONS, axes_of, product, reshard, spec
from mot_jax.runtime.compilation import default_promotion

_L1_WEIGHTS = (1e-12, 1e6)  # limits of λ, which would else overflow, or reach 0 and stay there
_TINY = 1e-20


class ReluRouting(ExpertFeedForward):
    """The update of a token is the sum of all experts' outputs, multiplied by gates, most of which are 0.

    Parameters: those of `ExpertFeedForward`; the controller is the router. Router state, float32:

    l1_weight: a scalar, the weight λ of the loss `relu_l1`, equal in all layers. After each step it is multiplied by
        `config.l1_factor` if more than the share k / E of the gates of all layers were above 0, and else divided by it.
    load [E]: the share of the last step's tokens with a gate above 0, over k / E. Initially 1.

    Tokens are independent of each other.
    """

    config_type = ReluRoutingConfig
    config: ReluRoutingConfig

    def _create_parameters(self, options: LayerOptions) -> None:
        self._create_expert_parameters(options, options.d_model)
        self.l1_weight = RouterState(jnp.array(self.config.l1_weight, jnp.float32))
        self.load = RouterState(jnp.ones(self.config.num_experts, jnp.float32))

    @default_promotion()
    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D] -> update [B, S, D] in the layer's dtype.

        Loss: `relu_l1` = λ Σ_e load_e · mean of gate e over the tokens. In the paper `load` is that of the same batch;
        that of the step before makes the loss a mean over the batch, equal for any number of microbatches. Metrics:
        `gate_l1`, the sum of a token's gates; `experts_per_token`, how many of them are above 0, which λ moves to k;
        `load_max`, the largest share of an expert in these, 1 being an even share; `l1_weight`, λ.
        """
        mask, x = context.token_mask, x.astype(self.dtype)
        gates = jax.nn.relu(routing.router_logits("bsd,de->bse", x, self.controller[...]))
        if mask is not None:
            gates = jnp.where(reshard(mask, *axes_of(gates)[:2])[..., None], gates, 0)
        y = self._apply_experts(x, gates)
        if self.shared is not None:
            y += self.shared(x, context).y
        tokens = jnp.array(gates[..., 0].size) if mask is None else mask.sum()
        count = jnp.maximum((context.loss_counts or {}).get("relu_l1", tokens), 1)
        l1 = (gates * self.load[...]).sum() / count
        losses = {"relu_l1": self.l1_weight[...] * l1} if "relu_l1" in context.losses else {}
        active = (gates > 0).sum(axis=(0, 1)).astype(jnp.float32)
        shares = active / jnp.maximum(tokens, 1)
        metrics = {
            "gate_l1": jax.lax.stop_gradient(gates).sum() / jnp.maximum(tokens, 1),
            "experts_per_token": shares.sum(),
            "load_max": (shares.max() + _TINY) / (shares.mean() + _TINY),
            "l1_weight": self.l1_weight[...],
        }
        statistics = {"active": active, "tokens": tokens.astype(jnp.float32)} if context.train else {}
        return FeedForwardOutput(y, losses, metrics, statistics)

    def _apply_experts(self, x: jax.Array, gates: jax.Array) -> jax.Array:
        """The sum of the experts' outputs times the gates, [B, S, D] and [B, S, E] -> [B, S, D].

        Sequences are all-gathered along the mesh axis `expert` before the experts, and sums reduce-scattered after
        them.
        """
        w_in, w_out, w_gate = self._expert_parameters()
        out = axes_of(x)
        x = reshard(x, tuple(axis for axis in out[0] if axis not in DIMENSIONS["experts"]), *out[1:])
        gate = None if w_gate is None else product("bsd,edf->bsef", x, w_gate)
        hidden = activate(self.activation, product("bsd,edf->bsef", x, w_in), gate)
        hidden *= reshard(gates, *axes_of(hidden)[:3])[..., None].astype(hidden.dtype)
        return product("bsef,efd->bsd", hidden, w_out, spec(*out))

    def loss_counts(self, token_mask: jax.Array) -> dict[str, jax.Array]:
        """The number of non-padding tokens."""
        return {"relu_l1": token_mask.sum()}

    @classmethod
    def update_router(
        cls, config: ReluRoutingConfig, router: dict[str, jax.Array], statistics: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Set `load` [layers, E], and multiply or divide `l1_weight` [layers] by `config.l1_factor`."""
        shares = statistics["active"] / jnp.maximum(statistics["tokens"], 1)[:, None]
        load = shares * (config.num_experts / config.top_k)
        factor = jnp.where(load.mean() > 1, config.l1_factor, 1 / config.l1_factor)
        return {"l1_weight": jnp.clip(router["l1_weight"] * factor, *_L1_WEIGHTS), "load": load}
