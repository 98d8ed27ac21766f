"""A Mixture-of-Tokens layer for one row alone: the others of its group are fixed sequences, the companions.

The companions ran once, by themselves, as a group of G; a row takes the place of the first of them. So they never hear
a user, and what a token needs of the other G - 1 at its position is a constant: for each expert what they say together,
one logit, and their mixture, one vector. A token and its companions are then mixed as a group of two would be:

    softmax over the group of (l_1, ..., l_G) / T   =   softmax of (l_1, v) / T, and of the second the G - 1 shares,
    with v = T log sum_g>1 exp(l_g / T), which is their largest logit for T = 0.

No row reads another row.

All E experts are G times the FLOPs of a group's. But a token weighs few experts, and what another expert reads is
nearly the companions' mixture alone, of which its output is a constant as well. With `experts_per_token` = k the k
experts with the largest emit weights run, and the others are taken to say what they say to the companions.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mot_jax.config import CompanionsConfig
from mot_jax.errors import UserError
from mot_jax.nn import mixing, routing
from mot_jax.nn.feed_forward.interface import FeedForwardContext, FeedForwardOutput, activate
from mot_jax.nn.feed_forward.mixture_of_tokens import MixtureOfTokens
from mot_jax.nn.sharding import axes_of, reshard, spec


class Summary(nnx.Variable):
    """What a layer keeps of its companions: neither a parameter nor trained."""


class Companions(MixtureOfTokens):
    """The layer of a trained `MixtureOfTokens`, with its parameters, for rows that do not hear each other.

    Beside these, of each of P positions (1: whichever), zero until `summarise` has made them:

    companion_mixtures [P, E, D], in the layer's dtype: the companions' mixture of each expert; their sum, where the
        weights are logits.
    companion_outputs [P, E, D]: what each expert makes of that; with `experts_per_token` alone.
    companion_logits [P, E], float32: v of merge. companion_emit_logits: v of emit, where it has a softmax over the
        group. companion_top: their largest logit, where the top token alone is handed anything.
    """

    config: CompanionsConfig

    def __init__(self, d_model: int, d_ff: int, config: CompanionsConfig, **options: Any):
        super().__init__(d_model, d_ff, config, **options)
        positions, e, c = config.num_positions, config.num_experts, config.mixing
        if c.layer_norm and config.experts_per_token is not None:
            raise UserError(
                f"experts_per_token = {config.experts_per_token}: no norm of outputs is known there; try None"
            )

        def logits(there: bool) -> Summary | None:
            return Summary(jnp.zeros((positions, e))) if there else None

        vectors = jnp.zeros((positions, e, d_model), self.dtype)
        self.companion_mixtures = Summary(vectors)
        self.companion_outputs = None if config.experts_per_token is None else Summary(vectors)
        self.companion_logits = logits(c.merge == "softmax")
        self.companion_emit_logits = logits(c.emit == "softmax")
        self.companion_top = logits(c.emit == "top_token")

    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D] -> update [B, S, D] in the layer's dtype. S is at most P, unless `context.positions` or P = 1."""
        run = self._run_all if self.config.experts_per_token is None else self._run_some
        y = run(x.astype(self.dtype), context)
        if self.shared is not None:
            y += self.shared(x, context).y
        return FeedForwardOutput(y)

    def _run_all(self, x: jax.Array, context: FeedForwardContext) -> jax.Array:
        """Devices along `expert` gather each other's rows, which are E times smaller than the mixtures, and add up what
        their experts hand back.
        """
        out, (rows, positions, _) = spec(*axes_of(x)), axes_of(x)
        rows = tuple(axis for axis in rows if axis != "expert")
        x = reshard(x, rows, positions, None)
        merge, rest, emit = (reshard(a, rows, positions, "experts") for a in self._shares(x, context))
        u = _mixed(merge, x, rest, self._at_positions(self.companion_mixtures, x, context, "experts", None))
        (project_in, w_in), (project_out, w_out) = self.experts()
        outputs = reshard(project_out(project_in(u, w_in), w_out), rows, positions, "experts", None)
        return jnp.einsum("bse,bsed->bsd", emit.astype(x.dtype), outputs, out_sharding=out)

    def _run_some(self, x: jax.Array, context: FeedForwardContext) -> jax.Array:
        """Each token's k experts; what the others say to the companions."""
        assert self.config.experts_per_token is not None and self.companion_outputs is not None
        merge, rest, emit = self._shares(x, context)
        _, chosen = jax.lax.top_k(emit, self.config.experts_per_token)
        weights, merge, rest = (jnp.take_along_axis(a, chosen, axis=-1) for a in (emit, merge, rest))
        u = _mixed(merge, x, rest, self._of_chosen(self.companion_mixtures, chosen, context))
        act = functools.partial(activate, self.activation)
        gate = None if self.w_gate is None else self.w_gate[...]
        y = routing.sum_experts(u, chosen, weights, act, self.w_in[...], self.w_out[...], gate)

        runs = jax.nn.one_hot(chosen, emit.shape[-1], dtype=bool).any(axis=-2)
        others = self._at_positions(self.companion_outputs, x, context, None, None)
        alike = tuple(axis for axis in (0, 1) if others.shape[axis] == 1)
        letters = "".join(letter for axis, letter in enumerate("bsed") if axis not in alike)
        constants = (jnp.where(runs, 0, emit).astype(x.dtype), others.squeeze(alike))
        rest_of_them = jnp.einsum(f"bse,{letters}->bsd", *constants, out_sharding=spec(*axes_of(x)))
        return reshard(y, *axes_of(x)) + rest_of_them

    def _shares(self, x: jax.Array, context: FeedForwardContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, S, D] -> of each token [B, S, E]: its share of a mixture, the companions', what it is handed back."""
        config = self.config.mixing
        said, emit_said = self.logits(x[:, None])
        t, emit_t = self.temperatures(context)

        def beside(own: jax.Array, companions: Summary) -> jax.Array:
            """[B, 2, S, E]: as a group of two."""
            others = self._at_positions(companions, x, context, None)[:, None]
            others = reshard(jnp.broadcast_to(others.astype(own.dtype), own.shape), *axes_of(own))
            return jnp.concatenate([own, others], axis=1)

        if self.companion_logits is not None:
            pair = mixing.mixing_weights(beside(said, self.companion_logits), config, None, t)
            merge, rest = pair[:, :1], pair[:, 1:]
        elif config.merge == "uniform":
            merge = jnp.full_like(said, 1 / self.config.group_size)
            rest = 1 - merge
            said = jnp.zeros_like(said)
        else:
            merge, rest = said, jnp.ones_like(said)
        if self.companion_emit_logits is not None:
            emit_said = beside(emit_said, self.companion_emit_logits)
        if self.companion_top is not None:
            emit = (said >= self._at_positions(self.companion_top, x, context, None)[:, None]).astype(said.dtype)
        else:
            found = mixing.emit_weights(merge, emit_said, config, None, emit_t)
            emit = merge if found is None else found[:, :1]
        if context.token_mask is not None:
            real = reshard(context.token_mask, *axes_of(x)[:2])
            emit = jnp.where(real[:, None, :, None], emit, 0)
        return merge[:, 0], rest[:, 0], emit[:, 0]

    def _at_positions(self, summary: Summary, x: jax.Array, context: FeedForwardContext, *rest: Any) -> jax.Array:
        """A summary [P, ...] where the tokens of x [B, S, D] stand: [B, S, ...], or 1 in place of a B or S that it
        does not depend on. rest: how its other dimensions are to lie on the mesh.
        """
        value, (rows, positions, _) = summary[...], axes_of(x)
        if value.shape[0] == 1:
            return reshard(value[None], None, None, *rest)
        if context.positions is None:
            return reshard(value[None, : x.shape[1]], None, positions, *rest)
        places = reshard(context.positions, rows, positions)
        return reshard(value, None, *rest).at[places].get(mode="clip", out_sharding=spec(rows, positions, *rest))

    def _of_chosen(self, summary: Summary, experts: jax.Array, context: FeedForwardContext) -> jax.Array:
        """A summary [P, E, D] where tokens stand, of their chosen experts [B, S, k] alone: [B, S, k, D]."""
        (rows, positions, _), (batch, length, _) = axes_of(experts), experts.shape
        places = jnp.arange(length)[None] if context.positions is None else context.positions
        places = reshard(jnp.broadcast_to(places, (batch, length)), rows, positions)
        at = summary[...].at[jnp.broadcast_to(places[..., None], experts.shape), experts]
        return at.get(mode="clip", out_sharding=spec(rows, positions, None, None))  # to the one that there may be


def _mixed(merge: jax.Array, x: jax.Array, rest: jax.Array, companions: jax.Array) -> jax.Array:
    """Mixtures [B, S, E or k, D] of tokens [B, S, D] and of their companions, by the shares [B, S, E or k] of each."""
    merge, rest = (a[..., None].astype(x.dtype) for a in (merge, rest))
    return merge * x[:, :, None] + rest * companions


def summarise(layer: MixtureOfTokens, x: jax.Array, context: FeedForwardContext) -> dict[str, jax.Array]:
    """What `Companions` may keep, by name, of each group but for its first row: x [B, S, D] -> [N, S, ...] each."""
    config = layer.config.mixing
    grouped = mixing.group(x.astype(layer.dtype), layer.config.group_size)[:, 1:]
    said, emit_said = layer.logits(grouped)
    t, emit_t = layer.temperatures(context)
    mixtures = mixing.merge(mixing.mixing_weights(said, config, None, t), grouped)
    (project_in, w_in), (project_out, w_out) = layer.experts()
    outputs = project_out(project_in(mixtures, w_in), w_out)
    found = {"companion_mixtures": mixtures, "companion_outputs": outputs}
    if config.merge == "softmax":
        found["companion_logits"] = _together(said, t)
    if config.emit == "softmax":
        found["companion_emit_logits"] = _together(emit_said, emit_t)
    if config.emit == "top_token":
        found["companion_top"] = (jnp.zeros_like(said) if config.merge == "uniform" else said).max(axis=1)
    return found


def _together(logits: jax.Array, t: float | jax.Array) -> jax.Array:
    """T log sum_g exp(l_g / T), [N, G, S, E] -> [N, S, E]; their largest for T = 0."""
    top = logits.max(axis=1)
    parts = jnp.exp((logits - top[:, None]) / jnp.maximum(t, jnp.finfo(logits.dtype).tiny))
    return top + t * jnp.log(parts.sum(axis=1))
