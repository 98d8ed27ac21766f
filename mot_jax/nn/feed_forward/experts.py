"""The parameters that all kinds with experts share, so that weights of one kind can be used by another."""

from __future__ import annotations

from mot_jax.config import DenseConfig
from mot_jax.nn.feed_forward.dense import Dense
from mot_jax.nn.feed_forward.interface import FeedForward, LayerOptions


class ExpertFeedForward(FeedForward):
    """Base class of the kinds with experts.

    Parameters, all without biases:

    controller [D, E]: a linear map from a token to one logit per expert (a sparse mixture calls it the router).
    w_in [E, D, F], w_out [E, F, D], and w_gate [E, D, F] if `gated`: the experts. The fan-in of `w_out` is F.
    shared: a `Dense` layer that processes every token, if `config.shared_expert_dim` > 0.
    """

    def _create_expert_parameters(self, options: LayerOptions, controller_fan_in: int) -> None:
        config, d = self.config, options.d_model
        e, f, width = config.num_experts, config.hidden_dim(options.d_ff), config.shared_expert_dim
        self.controller = options.matrix((d, e), controller_fan_in, config.controller_init_scale)
        self.w_in = options.matrix((e, d, f), d, config.w_in_init_scale)
        self.w_out = options.matrix((e, f, d), f, config.w_out_init_scale)
        self.w_gate = options.matrix((e, d, f), d, config.w_in_init_scale) if options.gated else None
        self.shared = Dense(d, width, DenseConfig(bias=False), **options.keywords()) if width else None
