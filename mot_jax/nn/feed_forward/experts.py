"""The parameters that all kinds with experts share, so that weights of one kind can be used by another."""

from __future__ import annotations

import jax

from mot_jax.config import DenseConfig
from mot_jax.nn.feed_forward.dense import Dense
from mot_jax.nn.feed_forward.interface import FeedForward, LayerOptions, activate
from mot_jax.nn.sharding import DIMENSIONS, axes_of, num_shards, product, reshard, spec


class ExpertFeedForward(FeedForward):
    """Base class of the kinds with experts.

    Parameters, all without biases:

    controller [D, E]: a linear map from a token to one logit per expert (a sparse mixture calls it the router).
    w_in [E, D, F], w_out [E, F, D], and w_gate [E, D, F] if `gated`: the experts. The fan-in of `w_out` is F.
    shared: a `Dense` layer that processes every token, if `config.shared_dim` > 0.
    """

    def _create_expert_parameters(
        self, options: LayerOptions, controller_fan_in: int, slots: tuple[int, ...] = ()
    ) -> None:
        config, d = self.config, options.d_model
        e, f, width = config.num_experts, config.hidden_dim(options.d_ff), config.shared_dim(options.d_ff)
        self.controller = options.matrix((d, e, *slots), controller_fan_in, config.controller_init_scale)
        self.w_in = options.matrix((e, d, f), d, config.w_in_init_scale)
        self.w_out = options.matrix((e, f, d), f, config.w_out_init_scale)
        self.w_gate = options.matrix((e, d, f), d, config.w_in_init_scale) if options.gated else None
        self.shared = Dense(d, width, DenseConfig(bias=False), **options.keywords()) if width else None

    def _expert_parameters(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        return self.w_in[...], self.w_out[...], None if self.w_gate is None else self.w_gate[...]

    def _apply_to_slots(self, u: jax.Array) -> jax.Array:
        """Apply each expert to its slots, [N, C, E, D] -> [N, C, E, D]: N routing groups, each with C slots.

        Takes one all-to-all along the mesh axis `expert` before the experts, and one after them.
        """
        w_in, w_out, w_gate = self._expert_parameters()
        groups = axes_of(u)[0]
        u = reshard(u, tuple(axis for axis in groups if axis not in DIMENSIONS["experts"]), None, "experts", None)
        gate = None if w_gate is None else product("nced,edf->ncef", u, w_gate)
        hidden = activate(self.activation, product("nced,edf->ncef", u, w_in), gate)
        local_groups, _, experts, width = axes_of(hidden)
        slots = (
            () if hidden.shape[1] % num_shards(width) else width
        )  # devices that share F each sum a part of the slots
        o = product("ncef,efd->nced", hidden, w_out, spec(local_groups, slots, experts, None))
        return reshard(o, groups, None, None, None)
