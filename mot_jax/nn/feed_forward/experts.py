"""The parameters that all kinds with experts share, so that weights of one kind can be used by another.

The experts of a kind that mixes or chooses along the batch are two functions, `project_in` and `project_out`, for
`mot_jax.nn.mixing.merge_experts_emit`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mot_jax.config import DenseConfig
from mot_jax.nn import mixing
from mot_jax.nn.feed_forward.dense import Dense
from mot_jax.nn.feed_forward.interface import FeedForward, LayerOptions, activate, clip, saves_result
from mot_jax.nn.sharding import DIMENSIONS, axes_of, num_shards, product, reshard, spec


class ExpertFeedForward(FeedForward):
    """Base class of the kinds with experts.

    Parameters, all without biases:

    controller [D, E]: a linear map from a token to one logit per expert (a sparse mixture calls it the router); not of
        kinds that choose experts without one.
    w_in [E, D, F], w_out [E, F, D], and w_gate [E, D, F] if `gated`: the experts. The fan-in of `w_out` is F,
        or that of the kind.
    shared: a `Dense` layer that processes every token, if `config.shared_dim` > 0.
    """

    def _create_expert_parameters(
        self,
        options: LayerOptions,
        controller_fan_in: int | None,
        *,
        slots: tuple[int, ...] = (),
        w_out_fan_in: int | None = None,
    ) -> None:
        config, d = self.config, options.d_model
        e, f, width = config.num_experts, config.hidden_dim(options.d_ff), config.shared_dim(options.d_ff)
        if controller_fan_in is not None:
            self.controller = options.matrix((d, e, *slots), controller_fan_in, config.controller_init_scale)
        self.w_in = options.matrix((e, d, f), d, config.w_in_init_scale)
        self.w_out = options.matrix((e, f, d), w_out_fan_in or f, config.w_out_init_scale)
        self.w_gate = options.matrix((e, d, f), d, config.w_in_init_scale) if options.gated else None
        self.shared = Dense(d, width, DenseConfig(bias=False), **options.keywords()) if width else None

    def _expert_parameters(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        return self.w_in[...], self.w_out[...], value(self.w_gate)

    def _apply_to_slots(self, u: jax.Array) -> jax.Array:
        """Apply each expert to its slots, [E, N, C, D] -> [E, N, C, D]: N routing groups, each with C slots.

        Takes one all-to-all along the mesh axis `expert` before the experts, and one after them.
        """
        w_in, w_out, w_gate = self._expert_parameters()
        groups = axes_of(u)[1]
        u = reshard(u, "experts", tuple(axis for axis in groups if axis not in DIMENSIONS["experts"]), None, None)
        gate = None if w_gate is None else product("encd,edf->encf", u, w_gate)
        hidden = activate(self.activation, product("encd,edf->encf", u, w_in), gate)
        experts, local_groups, _, width = axes_of(hidden)
        # Devices that share F each sum a part of the slots.
        slots = () if hidden.shape[2] % num_shards(width) else width
        o = product("encf,efd->encd", hidden, w_out, spec(experts, local_groups, slots, None))
        # First the all-to-all, then the all-gather along F's devices: in one step XLA would send more.
        return reshard(reshard(o, None, groups, slots, None), None, groups, None, None)


def value(param: nnx.Param | None) -> jax.Array | None:
    """The array of a parameter; None without one."""
    return None if param is None else param[...]


_product = functools.partial(product, fenced=False)  # `merge_experts_emit` has one barrier for all of its products


@functools.cache  # one function object per activation: JAX caches compiled functions by identity
def project_in(activation: str) -> mixing.Projection:
    """The first half of the experts, before this activation function."""

    def project_in(u: jax.Array, p: dict[str, Any]) -> tuple[jax.Array, jax.Array | None]:
        """Mixtures [N, S, E, D] -> pre-activations and gate (or None), [E, N, S, F].

        Experts come first, so that neither product transposes the array between them. If the second half needs no more
        of the pre-activations than their positive part, they are this part, which is saved for the backward pass.
        """
        u = layer_norm(jnp.moveaxis(u, 2, 0), p["norm"])
        gate = None if p["gate"] is None else _product("ensd,edf->ensf", u, p["gate"])
        h = _product("ensd,edf->ensf", u, p["w"])
        return clip(h) if saves_result(activation, gate is not None) else h, gate

    return project_in


@functools.cache
def project_out(activation: str) -> mixing.Projection:
    """The second half of the experts, with this activation function."""

    def project_out(h: tuple[jax.Array, jax.Array | None], p: dict[str, Any]) -> jax.Array:
        """Pre-activations and gate [E, N, S, F] -> expert outputs [N, S, E, D]."""
        hidden = activate(activation, *h)
        experts, groups, positions, width = axes_of(hidden)
        if (
            hidden.shape[2] % num_shards(positions + width) == 0
        ):  # devices that share F each sum a part of the positions
            positions = width + positions
        out = spec(experts, groups, positions, None)
        return jnp.moveaxis(layer_norm(_product("ensf,efd->ensd", hidden, p["w"], out), p["norm"]), 0, 2)

    return project_out


def layer_norm(x: jax.Array, norm: jax.Array | None) -> jax.Array:
    """Normalize x [..., D] over D, then apply scale and bias ([2, D]); return x itself if `norm` is None."""
    if norm is None:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide -= wide.mean(axis=-1, keepdims=True)
    wide *= jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + 1e-5)
    return (wide * norm[0] + norm[1]).astype(x.dtype)
