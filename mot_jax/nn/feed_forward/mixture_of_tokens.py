"""The Mixture-of-Tokens layer and its variants (`docs/paper.md`, sections 2 and 3; arXiv 2310.15961).

The forward pass, from `MixtureOfTokens.__call__`, with the functions of `mot_jax.nn.mixing` (dimensions as there):

    x [B, S, D]  ->  group          [N, G, S, D]    G sequences form a group, N = B / G
                     logits         [N, G, S, E]    the controller's product, in float32
                     mixing weights [N, G, S, E]    softmax over G
                     merge          [N, S, E, D]    one mixture for each group, position and expert
                     experts        [N, S, E, D]
                     emit           [N, G, S, D]    the same weights
                     ungroup        [B, S, D]

The backward pass of merge, experts and emit is the custom derivative of `mixing.merge_experts_emit`, or of a Pallas
kernel if `config.kernel` is not `xla`. Saved for it are x and the mixing weights, and, by `config.save_for_backward`,
nothing else, the experts' pre-activations, or these, the mixtures and the expert outputs. The rest is recomputed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mot_jax.config import MixtureOfTokensConfig
from mot_jax.nn import mixing
from mot_jax.nn.feed_forward.experts import ExpertFeedForward, project_in, project_out, value
from mot_jax.nn.feed_forward.interface import (
    FeedForwardContext,
    FeedForwardOutput,
    LayerOptions,
    activate,
    needs_step,
    saves_result,
)
from mot_jax.nn.kernels.fused_experts_tpu import fused_experts
from mot_jax.nn.kernels.fused_mixture_tpu import fused_mixture
from mot_jax.nn.kernels.pallas_tpu import TILE, Activation
from mot_jax.nn.sharding import axes_of, num_shards, reshard, undeferred
from mot_jax.runtime.compilation import default_promotion


class MixtureOfTokens(ExpertFeedForward):
    """Each expert processes one mixture of the tokens that a group of sequences has at a position.

    Parameters: those of `ExpertFeedForward`. The mixing variants add

    emit_controller, base_controller [D, E]: for separate controllers, and for a common base.
    base_weight, emit_base_weight: scalars, initially 0.5, the weight of a controller against its base.
    temperature, emit_temperature: θ of the learned temperatures, scalars or [E], initially 0.
    mixture_norm, output_norm [2, D]: scale and bias of the layer norms of mixtures and of expert outputs.
    """

    config_type = MixtureOfTokensConfig
    config: MixtureOfTokensConfig

    def _create_parameters(self, options: LayerOptions) -> None:
        config, mixing_config = self.config, self.config.mixing
        d, e = options.d_model, config.num_experts
        has_base = mixing_config.controllers == "common_base"
        # As in the authors' code: the sum of controller and base has the variance of one controller.
        fan_in = 2 * d if has_base else d
        self._create_expert_parameters(options, fan_in)

        def controller() -> nnx.Param:
            return options.matrix((d, e), fan_in, config.controller_init_scale)

        self.emit_controller = controller() if mixing_config.controllers != "shared" else None
        self.base_controller = controller() if has_base else None
        self.base_weight = None if mixing_config.base_weight == "sum" else options.constant(0.5)
        self.emit_base_weight = options.constant(0.5) if mixing_config.base_weight == "two" else None
        shape = (e,) if mixing_config.learned_temperature == "per_expert" else ()
        self.temperature = None if mixing_config.learned_temperature == "none" else options.constant(0.0, *shape)
        self.emit_temperature = options.constant(0.0, *shape) if mixing_config.separate_temperatures else None
        self.mixture_norm = options.norm() if mixing_config.layer_norm else None
        self.output_norm = options.norm() if mixing_config.layer_norm else None

    @default_promotion()
    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D] -> update [B, S, D] in the layer's dtype; B is a multiple of the group size.

        Metrics: `mixing_entropy` and, if emit has a softmax of its own, `emit_entropy`: the normalized entropies of
        the mixing weights. Loss: `mixing_entropy`, their mean.
        """
        grouped = self._group(x.astype(self.dtype))
        weights, emit_weights = self._weights(grouped, context)
        y = self._merge_experts_emit(grouped, weights, emit_weights)
        y = reshard(mixing.ungroup(y, x.shape[1]), *axes_of(x))
        if self.shared is not None:
            y += self.shared(x, context).y
        has_loss = "mixing_entropy" in context.losses
        if not has_loss:  # then nothing is saved for the backward pass of the entropies
            weights, emit_weights = jax.lax.stop_gradient((weights, emit_weights))
        entropies = self._entropies(weights, emit_weights, context)
        losses = {}
        if has_loss and entropies:
            terms = self._entropies(weights, emit_weights, context, context.loss_counts)
            losses["mixing_entropy"] = jnp.stack([*terms.values()]).mean()
        return FeedForwardOutput(y, losses, jax.lax.stop_gradient(entropies))

    def loss_counts(self, token_mask: jax.Array) -> dict[str, jax.Array]:
        """The number of entropies in the means `mixing_entropy` and `emit_entropy`, whose mean is the loss."""
        mask = self._group(token_mask)
        return {name: mixing.entropy_count(mask, axis) for name, axis in self._entropy_axes().items()}

    def _merge_experts_emit(self, grouped: jax.Array, weights: jax.Array, emit_weights: jax.Array | None) -> jax.Array:
        """[N, G, S, D] -> update [N, G, S, D]."""
        config, positions = self.config, axes_of(grouped)[2]
        # Sequences that are not whole tiles, such as the single position of a decode step, are computed by XLA.
        if config.kernel != "xla" and grouped.shape[2] % (TILE * num_shards(positions)) == 0:
            kernel = {"fused_mixture": fused_mixture, "fused_experts": fused_experts}[config.kernel]
            return kernel(_activation(self.activation), grouped, weights, self.w_in[...], self.w_out[...])
        (project_in, w_in), (project_out, w_out) = self.experts()
        return mixing.merge_experts_emit(
            project_in,
            project_out,
            config.save_for_backward,
            grouped,
            weights,
            w_in,
            w_out,
            emit_weights,
            fence_saved=not saves_result(self.activation, self.w_gate is not None),
        )

    def experts(self) -> tuple[tuple[mixing.Projection, dict], tuple[mixing.Projection, dict]]:
        """The experts in two halves, (function, parameters) each, as in `mixing.merge_experts_emit`.

        The first half ends with the pre-activations, the second one starts with them.
        """
        w_in = {"w": self.w_in[...], "gate": value(self.w_gate), "norm": value(self.mixture_norm)}
        w_out = {"w": self.w_out[...], "norm": value(self.output_norm)}
        return (project_in(self.activation), w_in), (project_out(self.activation), w_out)

    @default_promotion()
    def weights(
        self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()
    ) -> tuple[jax.Array, jax.Array | None]:
        """x [B, S, D] -> merge weights [N, G, S, E] in float32 (or wider), and emit weights; None if they are the same.

        With groups within a sequence, N is B S / G and S is 1.
        """
        return self._weights(self._group(x.astype(self.dtype)), context)

    def _weights(self, grouped: jax.Array, context: FeedForwardContext) -> tuple[jax.Array, jax.Array | None]:
        config, mask = self.config.mixing, self._group_mask(context)
        logits, emit_logits = self.logits(grouped)
        t, emit_t = self.temperatures(context)
        weights = mixing.mixing_weights(logits, config, mask, t)
        return weights, mixing.emit_weights(weights, emit_logits, config, mask, emit_t)

    def logits(self, grouped: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[N, G, S, D] -> logits of the merge and of the emit controller, [N, G, S, E] in float32 (or wider)."""

        def controller_logits(controller: nnx.Param, base_weight: nnx.Param | None) -> jax.Array:
            kernel = controller[...]
            if self.base_controller is not None:
                kernel, base = undeferred(kernel), self.base_controller[...]
                a = value(base_weight)
                kernel = kernel + base if a is None else a * kernel + (1 - a) * base
            wide = jnp.promote_types(self.dtype, jnp.float32)
            return mixing.controller_logits(grouped, kernel, wide)

        logits = controller_logits(self.controller, self.base_weight)
        if self.emit_controller is None:
            return logits, logits
        base_weight = self.base_weight if self.emit_base_weight is None else self.emit_base_weight
        return logits, controller_logits(self.emit_controller, base_weight)

    def temperatures(self, context: FeedForwardContext) -> tuple[float | jax.Array, float | jax.Array]:
        """T of merge and of emit, scalars or [E]."""
        config = self.config.mixing
        if context.train and context.step is None and (config.annealing != "none" or config.frozen_steps):
            field = "annealing" if config.annealing != "none" else "frozen_steps"
            raise needs_step(f"mixing.{field}", getattr(config, field))
        t = mixing.temperature_at_step(config, context.step, value(self.temperature))
        if self.emit_temperature is None:
            return t, t
        return t, mixing.temperature_at_step(config, context.step, value(self.emit_temperature))

    def _group_mask(self, context: FeedForwardContext) -> jax.Array | None:
        return None if context.token_mask is None else self._group(context.token_mask)

    def _group(self, x: jax.Array) -> jax.Array:
        return mixing.group(x, self.config.group_size, self.config.mixing.groups)

    def _entropies(
        self,
        weights: jax.Array,
        emit_weights: jax.Array | None,
        context: FeedForwardContext,
        counts: dict[str, jax.Array] | None = None,
    ) -> dict[str, jax.Array]:
        """The normalized entropies by name: means over x, or sums divided by these `counts`."""
        mask, counts = self._group_mask(context), counts or {}
        weights_of = {"mixing_entropy": weights, "emit_entropy": weights if emit_weights is None else emit_weights}
        return {
            name: mixing.normalised_entropy(weights_of[name], mask, axis, counts.get(name))
            for name, axis in self._entropy_axes().items()
        }

    def _entropy_axes(self) -> dict[str, int]:
        """The normalized dimension of the weights whose entropy is measured, by the name of the entropy."""
        config, axes = self.config.mixing, {}
        if config.merge != "logits":
            axes["mixing_entropy"] = mixing.OVER_GROUP
        if config.emit_has_own_softmax:
            over_experts = config.emit == "softmax_over_experts"
            axes["emit_entropy"] = mixing.OVER_EXPERTS if over_experts else mixing.OVER_GROUP
        return axes


@functools.cache
def _activation(name: str) -> Activation:
    return lambda h: activate(name, h, None)
