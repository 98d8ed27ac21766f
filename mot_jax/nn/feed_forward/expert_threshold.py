"""Expert threshold: a sparse mixture of experts, each with a threshold for the logits of its tokens (arXiv 2603.11535).

See `docs/paper.md`, section 5; dimensions as in `mot_jax.nn.routing`. A token goes to a varying number of experts, so
that in training each expert has slots for a fixed number of tokens, its capacity.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from mot_jax.config import ExpertThresholdConfig
from mot_jax.nn import mixing, routing
from mot_jax.nn.feed_forward.experts import ExpertFeedForward
from mot_jax.nn.feed_forward.interface import (
    FeedForwardContext,
    FeedForwardOutput,
    LayerOptions,
    RouterState,
    activate,
    needs_step,
)
from mot_jax.nn.sharding import axes_of, reshard
from mot_jax.runtime.compilation import default_promotion

DECAY = 0.99  # of the moving averages, per step


class ExpertThreshold(ExpertFeedForward):
    """The update of a token is the sum of its experts' outputs times the sigmoids of their logits, not normalized.

    A token goes to all experts whose logit reaches the expert's threshold. Parameters: those of `ExpertFeedForward`.
    The router's input, logits and sigmoids are in float32 (or wider). Router state:

    quantile_average [E]: moving average, over the steps, of the logit that top_k / E of the tokens reach, from 0.
    num_updates: the number of steps in it. Divided by 1 - DECAY^num_updates, as in Adam, the average is the threshold.

    In the first `warmup_steps` of training, experts choose along the batch instead: at each position those of the G
    tokens of a group with the largest logits. In training with a capacity, tokens without a slot are dropped. Slots are
    filled in token order, so that a token depends on earlier tokens of its routing group; in the warmup position by
    position, since the choices of an earlier sequence depend on all sequences of its group. Both rules are causal.
    Outside of training steps (`FeedForwardContext.train`), thresholds decide and nothing is dropped: a token depends on
    no other token.
    """

    config_type = ExpertThresholdConfig
    config: ExpertThresholdConfig

    def _create_parameters(self, options: LayerOptions) -> None:
        self._create_expert_parameters(options, options.d_model)
        self.quantile_average = RouterState(jnp.zeros(self.config.num_experts, jnp.float32))
        self.num_updates = RouterState(jnp.zeros((), jnp.float32))

    @default_promotion()
    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D] -> update [B, S, D] in the layer's dtype. In training, x consists of whole routing groups.

        Metrics: `dropped`, the share of assignments without a slot; `no_expert`, the share of tokens that only the
        shared expert processes; `experts_per_token`, before any are dropped; `load_max`, the largest load of an expert,
        1 being an even share, 0 if no expert has a token; `router_entropy` of the sigmoids over their sum, normalized.
        """
        config, x = self.config, x.astype(self.dtype)
        logits = routing.router_logits("bsd,de->bse", x, self.controller[...])
        mask = None if context.token_mask is None else reshard(context.token_mask, *axes_of(x)[:2])
        taken, in_warmup = logits >= self.thresholds(), None
        if context.train and config.warmup_steps:
            if context.step is None:
                raise needs_step("warmup_steps", config.warmup_steps)
            along_batch = choose_along_batch(logits, config.group_size, config.tokens_along_batch(), mask)
            in_warmup = context.step < config.warmup_steps
            taken = jnp.where(in_warmup, along_batch, taken)
        taken = taken if mask is None else taken & mask[..., None]
        weights = jnp.where(taken, jax.nn.sigmoid(logits), 0)
        if context.train and config.capacity_factor is not None:
            y, placed = self._apply_with_capacity(x, taken, weights, in_warmup)
        else:
            act = functools.partial(activate, self.activation)
            y, placed = routing.sum_all_experts(x, weights, act, *self._expert_parameters()), taken
        y = reshard(y, *axes_of(x))
        if self.shared is not None:
            y += self.shared(x, context).y
        metrics = _metrics(logits, taken, placed, mask)
        return FeedForwardOutput(y, metrics=metrics, statistics=self._statistics(logits, mask) if context.train else {})

    def thresholds(self) -> jax.Array:
        """The threshold of each expert, float32 [E]; 0 before the first step."""
        weight = -jnp.expm1(jnp.maximum(self.num_updates[...], 1) * math.log(DECAY))  # 1 - DECAY^num_updates
        return self.quantile_average[...] / weight

    def _apply_with_capacity(
        self, x: jax.Array, taken: jax.Array, weights: jax.Array, in_warmup: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """x [B, S, D], taken and weights [B, S, E] -> y [B, S, D], and which of the taken tokens have a slot.

        in_warmup: bool scalar; None: not.
        """
        config, length = self.config, x.shape[1]
        tokens, taken, weights = (routing.group_tokens(a, config.routing_group_tokens) for a in (x, taken, weights))
        capacity = routing.capacity(tokens.shape[1], config.top_k, config.num_experts, config.capacity_factor or 0)
        place = routing.earlier_tokens(taken)
        if in_warmup is not None and config.routing_group_tokens > length:
            place = jnp.where(in_warmup, routing.tokens_at_earlier_positions(taken, length), place)
        slots = routing.fill_slots(taken, place, capacity)
        y = routing.combine(self._apply_to_slots(routing.dispatch(tokens, slots)), slots, weights)
        placed = slots.of_assignment < capacity * config.num_experts
        return routing.ungroup_tokens(y, length), routing.ungroup_tokens(placed, length)

    def _statistics(self, logits: jax.Array, mask: jax.Array | None) -> dict[str, jax.Array]:
        """The sum of the routing groups' quantiles [E], and the number of groups."""
        tokens, config = self.config.routing_group_tokens, self.config
        logits = routing.group_tokens(jax.lax.stop_gradient(logits), tokens)
        mask = None if mask is None else routing.group_tokens(mask, tokens)
        quantiles, valid = upper_quantiles(logits, config.top_k, config.num_experts, mask)
        sums = jnp.where(valid[:, None], quantiles, 0).sum(axis=0)
        return {"quantiles": sums.astype(jnp.float32), "groups": valid.sum().astype(jnp.float32)}

    @classmethod
    def update_router(
        cls, config: ExpertThresholdConfig, router: dict[str, jax.Array], statistics: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Move the averages [layers, E] towards the mean quantile of the step's routing groups."""
        groups, average, updates = statistics["groups"], router["quantile_average"], router["num_updates"]
        mean = statistics["quantiles"] / jnp.maximum(groups, 1)[:, None]
        moved = DECAY * average + (1 - DECAY) * mean
        return {
            "quantile_average": jnp.where(groups[:, None] > 0, moved, average),
            "num_updates": updates + (groups > 0),
        }


def choose_along_batch(
    logits: jax.Array, group_size: int, count: int, token_mask: jax.Array | None = None
) -> jax.Array:
    """Choose for each expert and position the tokens of a group with the largest logits, the first among equals.

    Args:
        logits: [B, S, E].
        group_size: G, the number of consecutive sequences of a group.
        count: the number of tokens of a group that an expert takes at a position, from 1 to G.
        token_mask: bool [B, S], True = non-padding. Padding is not chosen; an expert takes fewer tokens than `count` if
            there are fewer.

    Returns:
        bool [B, S, E].
    """
    grouped = mixing.group(logits, group_size)
    mask = None if token_mask is None else mixing.group(token_mask, group_size)
    return reshard(mixing.ungroup(routing.choose_tokens(grouped, count, mask).any(axis=-1)), *axes_of(logits))


def upper_quantiles(
    logits: jax.Array, top_k: int, num_experts: int, token_mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Compute the logit that top_k / num_experts of a routing group's tokens reach, for each expert.

    Args:
        logits: [N, T, E].
        token_mask: bool [N, T], True = non-padding.

    Returns:
        [N, E], the ceil(top_k n / num_experts)-th largest logit of the n non-padding tokens; and bool [N], n > 0.
    """
    tokens = logits.shape[1]
    counts = jnp.full_like(logits[:, 0, 0], tokens, jnp.int32) if token_mask is None else token_mask.sum(axis=1)
    scores = logits if token_mask is None else jnp.where(token_mask[..., None], logits, -jnp.inf)
    by_expert = jnp.moveaxis(scores, 1, -1)
    largest = routing.top_k_indices(by_expert, -(-top_k * tokens // num_experts))
    rank = jnp.maximum(-(-top_k * counts // num_experts) - 1, 0)
    index = jnp.take_along_axis(largest, rank[:, None, None], axis=-1)
    return jnp.take_along_axis(by_expert, index, axis=-1)[..., 0], counts > 0


def _metrics(logits: jax.Array, taken: jax.Array, placed: jax.Array, mask: jax.Array | None) -> dict[str, jax.Array]:
    """The metrics of arrays [B, S, E] for the mask [B, S]."""
    placed, axes = reshard(placed, *axes_of(taken)), (0, 1)
    loads, valid = taken.sum(axis=axes), jnp.ones_like(taken[..., 0]) if mask is None else mask
    assignments, tokens = jnp.maximum(loads.sum(), 1), jnp.maximum(valid.sum(), 1)
    values = jax.nn.sigmoid(jax.lax.stop_gradient(logits))
    probabilities = values / (values.sum(axis=-1, keepdims=True) + 1e-20)
    return {
        "dropped": (loads.sum() - placed.sum()) / assignments,
        "no_expert": (valid & ~placed.any(axis=-1)).sum() / tokens,
        "experts_per_token": loads.sum() / tokens,
        "load_max": loads.shape[0] * loads.max() / assignments,
        "router_entropy": routing.router_entropy(probabilities, mask),
    }
