"""Token choice: a sparse mixture of experts, each token to the experts it finds likeliest (PAPER.md section 4)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mot_jax.config import DenseConfig, InitConfig, TokenChoiceConfig
from mot_jax.nn import routing
from mot_jax.nn.feed_forward.dense import Dense
from mot_jax.nn.feed_forward.interface import FeedForwardContext, FeedForwardOutput, activate
from mot_jax.nn.initializers import draw
from mot_jax.nn.sharding import DIMENSIONS, axes_of, num_shards, product, reshard, spec


class TokenChoice(nnx.Module):
    """Each token's update is the sum of its top_k experts' outputs times their probabilities, not renormalised.

    Parameters, those of `MixtureOfTokens`: `controller` [D, E], here the router, `w_in` [E, D, F], `w_out` [E, F, D],
    no biases; `w_gate` [E, D, F] if `gated`; `shared`, a `Dense` layer without biases, if `shared_expert_dim` > 0. The initial
    fan-in of `w_out` is F, as there (the paper's token choice, where it does not begin as a MoT, has E F, which is
    `w_out_init_scale` = 1 / sqrt(E)). The router's input, logits and softmax are in float32 (or wider).

    With a capacity, tokens that find no slot are dropped: a token depends on earlier tokens of its routing group, also
    of other rows (`mot_jax.nn.routing`), and on no later ones. Without, on no other token at all, bit by bit.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        config: TokenChoiceConfig = TokenChoiceConfig(),
        *,
        activation: str = "relu",
        gated: bool = False,
        init: InitConfig = InitConfig(),
        dtype: str = "float32",
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.config, self.activation, self.dtype = config, activation, dtype
        d, e, f = d_model, config.num_experts, config.hidden_dim(d_ff)

        def param(shape: tuple[int, ...], fan_in: int, multiplier: float) -> nnx.Param:
            return nnx.Param(draw(rngs.params(), shape, fan_in, init, param_dtype, multiplier))

        self.controller = param((d, e), d, config.controller_init_scale)
        self.w_in = param((e, d, f), d, config.w_in_init_scale)
        self.w_out = param((e, f, d), f, config.w_out_init_scale)
        self.w_gate = param((e, d, f), d, config.w_in_init_scale) if gated else None
        plain = DenseConfig(bias=False)
        dense = functools.partial(Dense, config=plain, activation=activation, gated=gated, init=init, dtype=dtype)
        self.shared = (
            dense(d, config.shared_expert_dim, param_dtype=param_dtype, rngs=rngs) if config.shared_expert_dim else None
        )

    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D], of whole routing groups unless there is no capacity -> update [B, S, D] in the layer's dtype.

        Losses, means over routing groups: `load_balancing`, `router_z` (`mot_jax.nn.routing`). Metrics: `dropped`, the
        share of assignments; `load_max`, the largest load of an expert, 1 being an even share; `router_entropy`,
        normalised.
        """
        config, mask, x = self.config, context.token_mask, x.astype(self.dtype)
        tokens, length = self._group_tokens(x), x.shape[1]
        wide = jnp.promote_types(self.dtype, jnp.float32)
        logits = routing.group(product("bsd,de->bse", x.astype(wide), self.controller[...]), tokens)
        mask = None if mask is None else routing.group(mask, tokens)
        choices = routing.choose(logits, config.top_k, mask)
        dropped = jnp.zeros((), wide)
        if config.capacity_factor is None:
            experts, weights = (routing.ungroup(a, length) for a in choices[:2])
            act = functools.partial(activate, self.activation)
            y = routing.sum_experts(x[:, :, None], experts, weights, act, *self._experts())
        else:
            capacity = routing.capacity(tokens, config.top_k, config.num_experts, config.capacity_factor)
            slots = routing.place(choices.experts, config.num_experts, capacity)
            u = routing.dispatch(routing.group(x, tokens), slots, config.num_experts)
            y = routing.ungroup(routing.combine(self._run(u), slots, choices.weights), length)
            dropped = routing.dropped(choices.experts, slots, config.num_experts)
        y = reshard(y, *axes_of(x))
        if self.shared is not None:
            y += self.shared(x, context).y
        makers = {
            "load_balancing": lambda: routing.load_balancing(choices, mask),
            "router_z": lambda: routing.router_z(logits, mask),
        }
        metrics = {
            "dropped": dropped,
            "load_max": routing.largest_load(choices, mask),
            "router_entropy": routing.normalised_entropy(choices.probabilities, mask),
        }
        return FeedForwardOutput(y, {n: make() for n, make in makers.items() if n in context.losses}, metrics)

    def _group_tokens(self, x: jax.Array) -> int:
        """T. Without a capacity groups only measure: where the batch has no whole ones, as in generation, rows do."""
        tokens, (rows, length) = self.config.routing_group_tokens, x.shape[:2]
        cut = (length % tokens and tokens % length) or rows * length % (tokens * num_shards(DIMENSIONS["sequences"]))
        return length if cut and self.config.capacity_factor is None else tokens

    def _experts(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        return self.w_in[...], self.w_out[...], None if self.w_gate is None else self.w_gate[...]

    def _run(self, u: jax.Array) -> jax.Array:
        """Each expert on its slots, [N, C, E, D] -> the same: one all-to-all on `expert` there, and one back."""
        w_in, w_out, w_gate = self._experts()
        groups = axes_of(u)[0]
        u = reshard(u, tuple(axis for axis in groups if axis not in DIMENSIONS["experts"]), None, "experts", None)
        gate = None if w_gate is None else product("nced,edf->ncef", u, w_gate)
        hidden = activate(self.activation, product("nced,edf->ncef", u, w_in), gate)
        here, _, experts, width = axes_of(hidden)
        slots = () if hidden.shape[1] % num_shards(width) else width  # each device that has a part of F sums some slots
        o = product("ncef,efd->nced", hidden, w_out, spec(here, slots, experts, None))
        return reshard(o, groups, None, None, None)
