"""Token choice: a sparse mixture of experts, in which each token goes to its most probable experts.

See `docs/paper.md`, section 4; dimensions as in `mot_jax.nn.routing`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mot_jax.config import TokenChoiceConfig
from mot_jax.nn import routing
from mot_jax.nn.feed_forward.experts import ExpertFeedForward
from mot_jax.nn.feed_forward.interface import (
    FeedForwardContext,
    FeedForwardOutput,
    LayerOptions,
    RouterState,
    activate,
)
from mot_jax.nn.sharding import DIMENSIONS, axes_of, num_shards, reshard
from mot_jax.runtime.compilation import default_promotion


class TokenChoice(ExpertFeedForward):
    """The update of a token is the sum of its top_k experts' outputs times their weights (`config.scores`).

    Parameters: those of `ExpertFeedForward`, as in `MixtureOfTokens`; the controller is the router. With
    `balance="bias"`, the router state `balance_bias` [E] is added to the scores for the choice. The paper's token
    choice, if it does not start from a MoT model, initializes `w_out` with fan-in E F instead of F, which is
    `w_out_init_scale` = 1 / sqrt(E). The router's input, logits and softmax are in float32 (or wider).

    With a capacity, tokens without a slot are dropped: a token's update depends on earlier tokens of its routing group,
    also of other sequences (`mot_jax.nn.routing`), and on no later ones. Without a capacity it depends on no other
    token, bit for bit.
    """

    config_type = TokenChoiceConfig
    config: TokenChoiceConfig

    def _create_parameters(self, options: LayerOptions) -> None:
        self._create_expert_parameters(options, options.d_model)
        zeros = jnp.zeros(self.config.num_experts, jnp.float32)
        self.balance_bias = RouterState(zeros) if self.config.balance == "bias" else None

    @default_promotion()
    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D] -> update [B, S, D] in the layer's dtype. With a capacity, x consists of whole routing groups.

        Losses, means over routing groups: `load_balancing`, `router_z` (`mot_jax.nn.routing`). Metrics: `dropped`, the
        share of assignments without a slot; `load_max`, the largest load of an expert, 1 being an even share;
        `router_entropy`, normalized.
        """
        config, mask, x = self.config, context.token_mask, x.astype(self.dtype)
        tokens, length = self._tokens_per_group(x), x.shape[1]
        logits = routing.group_tokens(routing.router_logits("bsd,de->bse", x, self.controller[...]), tokens)
        mask = None if mask is None else routing.group_tokens(mask, tokens)
        bias = None if self.balance_bias is None else self.balance_bias[...]
        choices = routing.choose_experts(logits, config.top_k, mask, config.scores, bias)
        dropped = jnp.zeros((), logits.dtype)
        if config.capacity_factor is None:
            experts, weights = (routing.ungroup_tokens(a, length) for a in choices[:2])
            act = functools.partial(activate, self.activation)
            y = routing.sum_experts(x[:, :, None], experts, weights, act, *self._expert_parameters())
        else:
            capacity = routing.capacity(tokens, config.top_k, config.num_experts, config.capacity_factor)
            slots = routing.assign_slots(choices.experts, config.num_experts, capacity)
            u = routing.dispatch(routing.group_tokens(x, tokens), slots)
            y = routing.ungroup_tokens(routing.combine(self._apply_to_slots(u), slots, choices.weights), length)
            dropped = routing.dropped_share(choices.experts, slots, config.num_experts)
        y = reshard(y, *axes_of(x))
        if self.shared is not None:
            y += self.shared(x, context).y
        counts = context.loss_counts or {}
        functions = {
            "load_balancing": lambda count: routing.load_balancing(choices, mask, count),
            "router_z": lambda count: routing.router_z(logits, mask, count),
        }
        metrics = {
            "dropped": dropped,
            "load_max": routing.largest_load(choices, mask),
            "router_entropy": routing.router_entropy(choices.probabilities, mask),
        }
        losses = {n: loss(counts.get(n)) for n, loss in functions.items() if n in context.losses}
        updates = context.train and self.balance_bias is not None
        statistics = {"load": routing.total_load(choices.experts, config.num_experts)} if updates else {}
        return FeedForwardOutput(y, losses, metrics, statistics)

    @classmethod
    def update_router(
        cls, config: TokenChoiceConfig, router: dict[str, jax.Array], statistics: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Move `balance_bias` [layers, E] by `routing.updated_bias`."""
        bias = routing.updated_bias(router["balance_bias"], statistics["load"], config.bias_rate)
        return {"balance_bias": bias}

    def loss_counts(self, token_mask: jax.Array) -> dict[str, jax.Array]:
        """The number of routing groups with non-padding tokens, for both losses."""
        count = routing.group_count(routing.group_tokens(token_mask, self._tokens_per_group(token_mask)))
        return {"load_balancing": count, "router_z": count}

    def _tokens_per_group(self, x: jax.Array) -> int:
        """T. Without a capacity, routing groups serve measurement only.

        Then, if x does not consist of whole groups, as in generation, each sequence is a group.
        """
        tokens, (batch, length) = self.config.routing_group_tokens, x.shape[:2]
        partial_groups = length % tokens and tokens % length
        partial_groups = partial_groups or batch * length % (tokens * num_shards(DIMENSIONS["sequences"]))
        return length if partial_groups and self.config.capacity_factor is None else tokens
