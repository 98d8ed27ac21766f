"""The Mixture-of-Tokens layer and its variants (PAPER.md sections 2 and 3)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mot_jax.config import DenseConfig, InitConfig, MixtureOfTokensConfig, kernel_errors, mixing_errors
from mot_jax.errors import UserError
from mot_jax.nn import mixing
from mot_jax.nn.feed_forward.dense import Dense
from mot_jax.nn.feed_forward.interface import FeedForwardContext, FeedForwardOutput, activate
from mot_jax.nn.initializers import draw
from mot_jax.nn.kernels import fused_experts_tpu, fused_mixture_tpu, pallas_tpu
from mot_jax.nn.sharding import axes_of, num_shards, product, reshard, spec


class MixtureOfTokens(nnx.Module):
    """Each expert reads one mixture of the tokens that a group of sequences has at a position.

    Parameters: `controller` [D, E], `w_in` [E, D, F], `w_out` [E, F, D], no biases; `w_gate` [E, D, F] if `gated`;
    `shared`, a `Dense` layer without biases, if `shared_expert_dim` > 0. The controller's product stays in float32 (or wider).

    Of the mixing variants: `emit_controller` and `base_controller` [D, E]; how much of the base is taken, `base_weight`
    and `emit_base_weight`, scalars, 0.5 at first; θ of learned temperatures, `temperature` and `emit_temperature`,
    scalars or [E], 0 at first; `mixture_norm` and `output_norm` [2, D], scale and bias.

    Raises UserError for a `config.mixing` that means nothing.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        config: MixtureOfTokensConfig = MixtureOfTokensConfig(),
        *,
        activation: str = "relu",
        gated: bool = False,
        init: InitConfig = InitConfig(),
        dtype: str = "float32",
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.config, self.activation, self.dtype = config, activation, dtype
        d, e, f, c = d_model, config.num_experts, config.hidden_dim(d_ff), config.mixing
        if faults := list(mixing_errors(c)):
            raise UserError(*(f"mixing.{fault}" for fault in faults))
        if faults := list(kernel_errors(config, gated)):
            raise UserError(*faults)

        def param(shape: tuple[int, ...], fan_in: int, multiplier: float) -> nnx.Param:
            return nnx.Param(draw(rngs.params(), shape, fan_in, init, param_dtype, multiplier))

        def constant(value: float, *shape: int) -> nnx.Param:
            return nnx.Param(jnp.full(shape, value, param_dtype))

        based = c.controllers == "common_base"
        fan_in = 2 * d if based else d  # as in the authors' code: the sum of two has the variance of one
        self.controller = param((d, e), fan_in, config.controller_init_scale)
        self.w_in = param((e, d, f), d, config.w_in_init_scale)
        self.w_out = param((e, f, d), f, config.w_out_init_scale)
        self.w_gate = param((e, d, f), d, config.w_in_init_scale) if gated else None
        plain = DenseConfig(bias=False)
        dense = functools.partial(Dense, config=plain, activation=activation, gated=gated, init=init, dtype=dtype)
        self.shared = (
            dense(d, config.shared_expert_dim, param_dtype=param_dtype, rngs=rngs) if config.shared_expert_dim else None
        )

        separate = c.controllers != "shared"
        self.emit_controller = param((d, e), fan_in, config.controller_init_scale) if separate else None
        self.base_controller = param((d, e), fan_in, config.controller_init_scale) if based else None
        self.base_weight = None if c.base_weight == "sum" else constant(0.5)
        self.emit_base_weight = constant(0.5) if c.base_weight == "two" else None
        shape = (e,) if c.learned_temperature == "per_expert" else ()
        self.temperature = None if c.learned_temperature == "none" else constant(0.0, *shape)
        self.emit_temperature = constant(0.0, *shape) if c.separate_temperatures else None
        unit = jnp.array([[1.0], [0.0]], param_dtype).repeat(d, axis=1)
        self.mixture_norm = nnx.Param(unit) if c.layer_norm else None
        self.output_norm = nnx.Param(unit) if c.layer_norm else None

    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D], B a multiple of the group size -> update [B, S, D] in the layer's dtype.

        Metrics: `mixing_entropy` and, where emit has a softmax of its own, `emit_entropy`: the normalised entropies of
        the mixing weights. Loss: `mixing_entropy`, their mean.
        """
        grouped = self._group(x.astype(self.dtype))
        weights, emit_weights = self._weights(grouped, context)
        y = self._through(grouped, weights, emit_weights)
        y = reshard(mixing.ungroup(y, x.shape[1]), *axes_of(x))
        if self.shared is not None:
            y += self.shared(x, context).y
        wanted = "mixing_entropy" in context.losses
        if not wanted:  # then nothing is kept for their backward pass
            weights, emit_weights = jax.lax.stop_gradient((weights, emit_weights))
        entropies = self._entropies(weights, emit_weights, context)
        losses = {"mixing_entropy": jnp.stack([*entropies.values()]).mean()} if wanted and entropies else {}
        return FeedForwardOutput(y, losses, jax.lax.stop_gradient(entropies))

    def _through(self, grouped: jax.Array, weights: jax.Array, emit_weights: jax.Array | None) -> jax.Array:
        """Merge, experts, emit: [N, G, S, D]."""
        config, positions = self.config, axes_of(grouped)[2]
        # Other lengths, such as the one position of a step of generation, are no work for the kernel.
        if config.kernel != "xla" and grouped.shape[2] % (pallas_tpu.TILE * num_shards(positions)) == 0:
            kernel = {"fused_mixture": fused_mixture_tpu, "fused_experts": fused_experts_tpu}[config.kernel]
            return kernel.mix_through(_activation(self.activation), grouped, weights, self.w_in[...], self.w_out[...])
        (project_in, w_in), (project_out, w_out) = self.experts()
        return mixing.mix_through(
            project_in, project_out, config.save_for_backward, grouped, weights, w_in, w_out, emit_weights
        )

    def experts(self) -> tuple[tuple[mixing.Project, dict], tuple[mixing.Project, dict]]:
        """The experts up to their activation, and from there on: see `mixing.mix_through`."""
        w_in = {"w": self.w_in[...], "gate": _value(self.w_gate), "norm": _value(self.mixture_norm)}
        w_out = {"w": self.w_out[...], "norm": _value(self.output_norm)}
        return (_project_in, w_in), (_project_out(self.activation), w_out)

    def weights(
        self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()
    ) -> tuple[jax.Array, jax.Array | None]:
        """x [B, S, D] -> merge weights [N, G, S, E] in float32 (or wider), and emit weights; None if they are the same.

        With groups within rows, N is B S / G and S is 1.
        """
        return self._weights(self._group(x.astype(self.dtype)), context)

    def _weights(self, grouped: jax.Array, context: FeedForwardContext) -> tuple[jax.Array, jax.Array | None]:
        config, mask = self.config.mixing, self._group_mask(context)
        said, emit_said = self.logits(grouped)
        t, emit_t = self.temperatures(context)
        weights = mixing.mixing_weights(said, config, mask, t)
        return weights, mixing.emit_weights(weights, emit_said, config, mask, emit_t)

    def logits(self, grouped: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[N, G, S, D] -> what the controllers of merge and of emit say, [N, G, S, E] in float32 (or wider)."""

        def say(controller: nnx.Param, base_weight: nnx.Param | None) -> jax.Array:
            kernel = controller[...]
            if self.base_controller is not None:
                base = self.base_controller[...]
                a = _value(base_weight)
                kernel = kernel + base if a is None else a * kernel + (1 - a) * base
            wide = jnp.promote_types(self.dtype, jnp.float32)
            return product("ngsd,de->ngse", grouped, kernel, dtype=wide)

        said = say(self.controller, self.base_weight)
        if self.emit_controller is None:
            return said, said
        base_weight = self.base_weight if self.emit_base_weight is None else self.emit_base_weight
        return said, say(self.emit_controller, base_weight)

    def temperatures(self, context: FeedForwardContext) -> tuple[float | jax.Array, float | jax.Array]:
        """T of merge and of emit, scalars or [E]."""
        t = mixing.temperature(self.config.mixing, context.step, _value(self.temperature))
        if self.emit_temperature is None:
            return t, t
        return t, mixing.temperature(self.config.mixing, context.step, _value(self.emit_temperature))

    def _group_mask(self, context: FeedForwardContext) -> jax.Array | None:
        return None if context.token_mask is None else self._group(context.token_mask)

    def _group(self, x: jax.Array) -> jax.Array:
        return mixing.group(x, self.config.group_size, self.config.mixing.groups)

    def _entropies(
        self, weights: jax.Array, emit_weights: jax.Array | None, context: FeedForwardContext
    ) -> dict[str, jax.Array]:
        config, mask = self.config.mixing, self._group_mask(context)
        found = {}
        if config.merge != "logits":
            found["mixing_entropy"] = mixing.normalised_entropy(weights, mask)
        if config.emit_has_own_softmax:
            assert emit_weights is not None
            axis = mixing.OVER_EXPERTS if config.emit == "softmax_over_experts" else mixing.OVER_GROUP
            found["emit_entropy"] = mixing.normalised_entropy(emit_weights, mask, axis)
        return found


def _value(param: nnx.Param | None) -> jax.Array | None:
    return None if param is None else param[...]


_product = functools.partial(product, fenced=False)  # `mix_through` has a fence for all it does


def _project_in(u: jax.Array, p: dict[str, Any]) -> tuple[jax.Array, jax.Array | None]:
    """[N, S, E, D] -> [E, N, S, F]: experts first, so that neither product transposes what is between them."""
    u = _layer_norm(jnp.moveaxis(u, 2, 0), p["norm"])
    gate = None if p["gate"] is None else _product("ensd,edf->ensf", u, p["gate"])
    return _product("ensd,edf->ensf", u, p["w"]), gate


@functools.cache  # one function for each activation: JAX knows functions by identity
def _project_out(activation: str) -> mixing.Project:
    def project_out(h: tuple[jax.Array, jax.Array | None], p: dict[str, Any]) -> jax.Array:
        hidden = activate(activation, *h)
        experts, groups, positions, width = axes_of(hidden)
        if hidden.shape[2] % num_shards(positions + width) == 0:  # each device that has a part of F sums some positions
            positions = width + positions
        out = spec(experts, groups, positions, None)
        return jnp.moveaxis(_layer_norm(_product("ensf,efd->ensd", hidden, p["w"], out), p["norm"]), 0, 2)

    return project_out


@functools.cache
def _activation(name: str) -> pallas_tpu.Activation:
    return lambda h: activate(name, h, None)


def _layer_norm(x: jax.Array, norm: jax.Array | None) -> jax.Array:
    """x [..., D] normalised over D, times scale, plus bias ([2, D]); x itself without them."""
    if norm is None:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide -= wide.mean(axis=-1, keepdims=True)
    wide *= jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + 1e-5)
    return (wide * norm[0] + norm[1]).astype(x.dtype)
