"""Expert choice: a sparse mixture of experts, in which each expert takes its most probable tokens (arXiv 2202.09368).

As in the paper's baseline (`docs/paper.md`, section 5), an expert chooses along the batch: at each position, among the
tokens of the G sequences of a group. Dimensions as in `mot_jax.nn.mixing`, and

    C  capacity: the number of tokens that an expert takes from a group at a position     c: its einsum letter

All shapes are static: every expert takes C tokens. They are gathered, and their outputs distributed, by products with
one-hot matrices: expert choice is the merge and emit of Mixture of Tokens, with C one-hot vectors of merge weights for
each expert and the probabilities as emit weights. Gathers by index would need scatter-adds, which are slow on CPUs and
TPUs, and whose order of summation is not fixed on GPUs. Sharding, exchanges and the backward pass are those of
`mixing.merge_experts_emit`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mot_jax.config import ExpertChoiceConfig
from mot_jax.nn import mixing, routing
from mot_jax.nn.feed_forward.experts import ExpertFeedForward, layer_norm, project_in, project_out, value
from mot_jax.nn.feed_forward.interface import FeedForwardContext, FeedForwardOutput, LayerOptions, saves_result
from mot_jax.nn.sharding import axes_of, reshard, spec
from mot_jax.runtime.compilation import default_promotion


class ExpertChoice(ExpertFeedForward):
    """The update of a token is the sum, over the experts that take it, of their outputs times its probability of them.

    Parameters: those of `ExpertFeedForward`, with fan-in top_k F for `w_out`; with `config.layer_norm` also

    output_norm [2, D]: scale and bias of the layer norm of the update.

    The controller's input, logits and softmax are in float32 (or wider). The probabilities of a token's experts are not
    renormalized. A token that no expert takes has update 0, or that of the shared expert, or the bias of the layer
    norm.

    An expert's choice at a position depends on no other position, so the layer is causal, but a token depends on the
    other sequences of its group. With `over="tokens"` an expert chooses among the tokens of a sequence: sequences are
    independent, and a token depends on later ones.
    """

    config_type = ExpertChoiceConfig
    config: ExpertChoiceConfig

    def _create_parameters(self, options: LayerOptions) -> None:
        fan_in = self.config.top_k * self.config.hidden_dim(options.d_ff)
        self._create_expert_parameters(options, options.d_model, w_out_fan_in=fan_in)
        self.output_norm = options.norm() if self.config.layer_norm else None

    @default_promotion()
    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D] -> update [B, S, D] in the layer's dtype; B is a multiple of the group size.

        Loss: `router_z`, (log sum exp logits)². Metrics: `dropped`, the share of tokens that no expert takes;
        `experts_per_token`; `router_entropy`, normalized. All are means over the non-padding tokens.
        """
        x, mask = x.astype(self.dtype), context.token_mask
        grouped, mask = self._group(x), None if mask is None else self._group(mask)
        logits = routing.router_logits("ngsd,de->ngse", grouped, self.controller[...])
        probabilities = jax.nn.softmax(logits, axis=-1)
        chosen = routing.choose_tokens(probabilities, self.config.capacity(grouped.shape[1]), mask)
        y = layer_norm(self._apply_experts(grouped, chosen, probabilities), value(self.output_norm))
        y = y if mask is None else jnp.where(mask[..., None], y, 0)  # the bias of the layer norm
        y = reshard(mixing.ungroup(y, x.shape[1]), *axes_of(x))
        if self.shared is not None:
            y += self.shared(x, context).y

        def mean(values: jax.Array, count: jax.Array | None = None) -> jax.Array:
            """Mean of [N, G, S] over non-padding tokens, or their sum divided by `count`."""
            values = values if mask is None else jnp.where(mask, values, 0)
            if count is None:
                count = jnp.asarray(values.size) if mask is None else mask.sum()
            return values.sum() / jnp.maximum(count, 1)

        losses = {}
        if "router_z" in context.losses:
            count = (context.loss_counts or {}).get("router_z")
            losses["router_z"] = mean(jax.nn.logsumexp(logits, axis=-1) ** 2, count)
        experts = chosen.sum(axis=(3, 4))  # that take the token
        entropy = mixing.normalised_entropy(jax.lax.stop_gradient(probabilities), mask, mixing.OVER_EXPERTS)
        metrics = {"dropped": mean(experts == 0), "experts_per_token": mean(experts), "router_entropy": entropy}
        return FeedForwardOutput(y, losses, metrics)

    def loss_counts(self, token_mask: jax.Array) -> dict[str, jax.Array]:
        """The number of non-padding tokens."""
        return {"router_z": token_mask.sum()}

    def _group(self, x: jax.Array) -> jax.Array:
        """[B, S, ...] -> [N, G, S, ...]; if experts choose over tokens, a sequence is a group: [B, S, 1, ...]."""
        if self.config.over == "tokens":
            return mixing.group(x, x.shape[1], "within")
        return mixing.group(x, self.config.group_size)

    def _apply_experts(self, x: jax.Array, chosen: jax.Array, probabilities: jax.Array) -> jax.Array:
        """x [N, G, S, D], chosen [N, G, S, E, C], probabilities [N, G, S, E] -> sum of expert outputs [N, G, S, D]."""
        places = spec(*axes_of(x)[:3], None)

        def by_expert_place(weights: jax.Array) -> jax.Array:
            """[N, G, S, E, C] -> [N, G, S, E C]."""
            return jnp.reshape(weights, (*weights.shape[:3], -1), out_sharding=places)

        gates = jnp.where(chosen, probabilities[..., None], 0)
        project = _projections(self.activation, chosen.shape[-1])
        w_in = {"w": self.w_in[...], "gate": value(self.w_gate), "norm": None}
        w_out = {"w": self.w_out[...], "norm": None}
        merge = by_expert_place(chosen.astype(x.dtype))
        emit, saved = by_expert_place(gates), self.config.save_for_backward
        fence = not saves_result(self.activation, self.w_gate is not None)
        return mixing.merge_experts_emit(*project, saved, x, merge, w_in, w_out, emit, fence_saved=fence)


@functools.cache  # one pair of functions per activation and capacity: JAX caches compiled functions by identity
def _projections(activation: str, capacity: int) -> tuple[mixing.Projection, mixing.Projection]:
    """The two halves of experts that process C tokens each, as in `mixing.merge_experts_emit`."""

    def from_places(u: jax.Array, w_in: dict[str, Any]) -> tuple[jax.Array, jax.Array | None]:
        """Tokens [N, S, E C, D] -> pre-activations and gate (or None), [E, N C, S, F]."""
        n, s, places, d = u.shape
        groups, positions, experts, _ = axes_of(u)
        shape: tuple[int, ...] = (n, s, places // capacity, capacity, d)
        u = jnp.moveaxis(jnp.reshape(u, shape, out_sharding=spec(groups, positions, experts, None, None)), 3, 1)
        shape = (n * capacity, s, places // capacity, d)
        return project_in(activation)(jnp.reshape(u, shape, out_sharding=spec(groups, positions, experts, None)), w_in)

    def to_places(h: tuple[jax.Array, jax.Array | None], w_out: dict[str, Any]) -> jax.Array:
        """Pre-activations and gate [E, N C, S, F] -> outputs [N, S, E C, D]."""
        o = project_out(activation)(h, w_out)
        n_c, s, e, d = o.shape
        groups, positions, experts, _ = axes_of(o)
        shape: tuple[int, ...] = (n_c // capacity, capacity, s, e, d)
        o = jnp.moveaxis(jnp.reshape(o, shape, out_sharding=spec(groups, None, positions, experts, None)), 1, 3)
        shape = (n_c // capacity, s, e * capacity, d)
        return jnp.reshape(o, shape, out_sharding=spec(groups, positions, experts, None))

    return from_places, to_places
