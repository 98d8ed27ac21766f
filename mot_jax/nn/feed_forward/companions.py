"""A Mixture-of-Tokens layer for isolated sequences: the other members of a group are fixed reference sequences.

These are called companions (inference mode `companions`). They run once, as a group of G sequences of their own. A
sequence then takes the place of the first of them, so the companions do not depend on any user's sequence. At each
position a token depends on the other G - 1 only through constants, which for each expert are one logit and one vector,
their mixture. Mixing a token with its companions is mixing in a group of two:

    softmax over the group of (l_1, ..., l_G) / T  =  softmax of (l_1, v) / T,  v = T log sum_g>1 exp(l_g / T)

where the second weight is the sum of those of the G - 1 companions. For T = 0, v is their largest logit.

No sequence depends on another one.

Running all E experts costs G times the FLOPs per token of a training group. But a token has large weights for few
experts, and the input of the others is nearly the companions' mixture, for which their output is a constant as well.
With `experts_per_token` = k, the k experts with the largest emit weights run, and for the others the constant outputs
are used.

The mixtures of a token are its own, one for each expert: E times the size of its activation. Tokens are therefore
processed in parts, one after the other, whose temporaries take at most about `TEMPORARY_BYTES` on a device.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mot_jax.config import CompanionsConfig
from mot_jax.errors import UserError
from mot_jax.nn import mixing, routing
from mot_jax.nn.feed_forward.interface import FeedForwardContext, FeedForwardOutput, LayerOptions, activate
from mot_jax.nn.feed_forward.mixture_of_tokens import MixtureOfTokens
from mot_jax.nn.sharding import axes_of, num_shards, reshard, spec
from mot_jax.runtime.compilation import default_promotion

TEMPORARY_BYTES = 1 << 28  # of mixtures, hidden layers and expert outputs on a device at one time


class Summary(nnx.Variable):
    """A constant that a layer stores about its companions: not a parameter, not trained."""


class Companions(MixtureOfTokens):
    """The layer of a trained `MixtureOfTokens`, with its parameters, for sequences that are not mixed with each other.

    In addition to the parameters it has constants for each of P positions (P = 1: the same for all positions), zero
    until they are assigned from `summarise`:

    companion_mixtures [P, E, D], in the layer's dtype: the companions' mixture for each expert; their sum if the
        weights are logits.
    companion_outputs [P, E, D]: each expert's output for that mixture; only with `experts_per_token`.
    companion_logits [P, E], float32: v of merge.
    companion_emit_logits [P, E], float32: v of emit, if emit has a softmax over the group.
    companion_top [P, E], float32: the companions' largest logit, if emit selects the top token.
    """

    config_type = CompanionsConfig
    config: CompanionsConfig

    def _create_parameters(self, options: LayerOptions) -> None:
        super()._create_parameters(options)
        config, mixing_config = self.config, self.config.mixing
        if mixing_config.layer_norm and config.experts_per_token is not None:
            raise UserError(
                f"experts_per_token = {config.experts_per_token}: does not support the layer norm of expert outputs; "
                "try None"
            )

        def logits(required: bool) -> Summary | None:
            return Summary(jnp.zeros((config.num_positions, config.num_experts))) if required else None

        vectors = jnp.zeros((config.num_positions, config.num_experts, options.d_model), self.dtype)
        self.companion_mixtures = Summary(vectors)
        self.companion_outputs = None if config.experts_per_token is None else Summary(vectors)
        self.companion_logits = logits(mixing_config.merge == "softmax")
        self.companion_emit_logits = logits(mixing_config.emit == "softmax")
        self.companion_top = logits(mixing_config.emit == "top_token")

    @default_promotion()
    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D] -> update [B, S, D] in the layer's dtype. S is at most P, unless `context.positions` or P = 1."""
        apply = self._apply_all_experts if self.config.experts_per_token is None else self._apply_top_experts
        y = self._in_parts(apply, x.astype(self.dtype), context)
        if self.shared is not None:
            y += self.shared(x, context).y
        return FeedForwardOutput(y)

    def _in_parts(
        self,
        apply: Callable[[jax.Array, FeedForwardContext], jax.Array],
        x: jax.Array,
        context: FeedForwardContext,
    ) -> jax.Array:
        """Return apply(x, context), computed for a part of the sequences and positions at a time if x is large.

        A part has every k-th sequence and every m-th position, so that each device has an equal share of it.
        """
        (batch_axes, position_axes, _), (batch, length, _) = axes_of(x), x.shape
        local_batch = batch // num_shards(batch_axes)
        parts = -(-local_batch * length * self._temporary_bytes_per_token() // TEMPORARY_BYTES)
        k, m = _divisors_for(parts, local_batch, length // num_shards(position_axes))
        if k * m == 1:
            return apply(x, context)
        axes = (batch_axes, None, position_axes, None)

        def split(a: jax.Array) -> jax.Array:
            """[B, S, ...] -> [k m, B / k, S / m, ...]."""
            rest = a.shape[2:]
            a = reshard(a, batch_axes, position_axes, *[None] * len(rest))
            shape = (batch // k, k, length // m, m, *rest)
            a = jnp.reshape(a, shape, out_sharding=spec(*axes, *[None] * len(rest)))
            return jnp.moveaxis(a, (1, 3), (0, 1)).reshape(k * m, batch // k, length // m, *rest)

        positions = jnp.arange(length, dtype=jnp.int32)[None] if context.positions is None else context.positions
        positions = jnp.broadcast_to(positions, (batch, length))
        of_tokens = FeedForwardContext(token_mask=context.token_mask, positions=positions)

        def apply_to_part(part: tuple[jax.Array, FeedForwardContext]) -> jax.Array:
            return apply(part[0], dataclasses.replace(part[1], step=context.step))

        y = jax.lax.map(apply_to_part, jax.tree.map(split, (x, of_tokens)))
        y = jnp.moveaxis(y.reshape(k, m, *y.shape[1:]), (0, 1), (1, 3))
        return jnp.reshape(y, x.shape, out_sharding=spec(*axes_of(x)))

    def _temporary_bytes_per_token(self) -> int:
        """About the bytes of a token's temporaries: mixtures, hidden layers, outputs, summaries, weights."""
        (e, d, f), k = self.w_in.shape, self.config.experts_per_token
        values = (e if k is None else k) * (3 * d + 2 * f)
        if k is not None:  # constant outputs, and the weights of blocks of `routing.block_size` tokens
            values += e * d + 2 * k * d * f // 128
        return values * jnp.dtype(self.dtype).itemsize + 32 * e

    def _apply_all_experts(self, x: jax.Array, context: FeedForwardContext) -> jax.Array:
        """Apply all E experts.

        Devices along the mesh axis `expert` gather each other's sequences, which are E times smaller than the mixtures,
        and sum the updates from their experts.
        """
        out, (batch_axes, positions, _) = spec(*axes_of(x)), axes_of(x)
        batch_axes = tuple(axis for axis in batch_axes if axis != "expert")
        x = reshard(x, batch_axes, positions, None)
        merge, rest, emit = (reshard(a, batch_axes, positions, "experts") for a in self._shares(x, context))
        u = _mix_pair(merge, x, rest, self._at_positions(self.companion_mixtures, x, context, "experts", None))
        (project_in, w_in), (project_out, w_out) = self.experts()
        outputs = reshard(project_out(project_in(u, w_in), w_out), batch_axes, positions, "experts", None)
        return jnp.einsum("bse,bsed->bsd", emit.astype(x.dtype), outputs, out_sharding=out)

    def _apply_top_experts(self, x: jax.Array, context: FeedForwardContext) -> jax.Array:
        """Apply each token's k experts, and add the constant outputs of the others."""
        assert self.config.experts_per_token is not None and self.companion_outputs is not None
        merge, rest, emit = self._shares(x, context)
        _, chosen = jax.lax.top_k(emit, self.config.experts_per_token)
        weights, merge, rest = (jnp.take_along_axis(a, chosen, axis=-1) for a in (emit, merge, rest))
        u = _mix_pair(merge, x, rest, self._of_chosen(self.companion_mixtures, chosen, context))
        act = functools.partial(activate, self.activation)
        gate = None if self.w_gate is None else self.w_gate[...]
        y = routing.sum_experts(u, chosen, weights, act, self.w_in[...], self.w_out[...], gate)

        is_chosen = jax.nn.one_hot(chosen, emit.shape[-1], dtype=bool).any(axis=-2)
        constants = self._at_positions(self.companion_outputs, x, context, None, None)
        broadcast = tuple(axis for axis in (0, 1) if constants.shape[axis] == 1)
        letters = "".join(letter for axis, letter in enumerate("bsed") if axis not in broadcast)
        operands = (jnp.where(is_chosen, 0, emit).astype(x.dtype), constants.squeeze(broadcast))
        constant_update = jnp.einsum(f"bse,{letters}->bsd", *operands, out_sharding=spec(*axes_of(x)))
        return reshard(y, *axes_of(x)) + constant_update

    def _shares(self, x: jax.Array, context: FeedForwardContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, S, D] -> for each token [B, S, E]: its merge weight, the companions' merge weight, its emit weight."""
        config = self.config.mixing
        logits, emit_logits = self.logits(x[:, None])
        t, emit_t = self.temperatures(context)

        def with_companions(token_logits: jax.Array, companions: Summary) -> jax.Array:
            """[B, 2, S, E]: the logits of a group of two."""
            others = self._at_positions(companions, x, context, None)[:, None]
            others = reshard(
                jnp.broadcast_to(others.astype(token_logits.dtype), token_logits.shape), *axes_of(token_logits)
            )
            return jnp.concatenate([token_logits, others], axis=1)

        if self.companion_logits is not None:
            pair = mixing.mixing_weights(with_companions(logits, self.companion_logits), config, None, t)
            merge, rest = pair[:, :1], pair[:, 1:]
        elif config.merge == "uniform":
            merge = jnp.full_like(logits, 1 / self.config.group_size)
            rest = 1 - merge
            logits = jnp.zeros_like(logits)
        else:
            merge, rest = logits, jnp.ones_like(logits)
        if self.companion_emit_logits is not None:
            emit_logits = with_companions(emit_logits, self.companion_emit_logits)
        if self.companion_top is not None:
            largest = self._at_positions(self.companion_top, x, context, None)[:, None]
            emit = (logits >= largest).astype(logits.dtype)
        else:
            weights = mixing.emit_weights(merge, emit_logits, config, None, emit_t)
            emit = merge if weights is None else weights[:, :1]
        if context.token_mask is not None:
            mask = reshard(context.token_mask, *axes_of(x)[:2])
            emit = jnp.where(mask[:, None, :, None], emit, 0)
        return merge[:, 0], rest[:, 0], emit[:, 0]

    def _at_positions(self, summary: Summary, x: jax.Array, context: FeedForwardContext, *rest: Any) -> jax.Array:
        """A summary [P, ...] at the positions of the tokens x [B, S, D]: [B, S, ...].

        The result has size 1 instead of B or S where it does not depend on the sequence or the position. rest: the
        sharding of the other dimensions.
        """
        value, (batch_axes, positions, _) = summary[...], axes_of(x)
        if value.shape[0] == 1:
            return reshard(value[None], None, None, *rest)
        if context.positions is None:
            return reshard(value[None, : x.shape[1]], None, positions, *rest)
        indices = reshard(context.positions, batch_axes, positions)
        return reshard(value, None, *rest).at[indices].get(mode="clip", out_sharding=spec(batch_axes, positions, *rest))

    def _of_chosen(self, summary: Summary, experts: jax.Array, context: FeedForwardContext) -> jax.Array:
        """A summary [P, E, D] at the tokens' positions, for their chosen experts [B, S, k]: [B, S, k, D]."""
        (batch_axes, positions, _), (batch, length, _) = axes_of(experts), experts.shape
        indices = jnp.arange(length)[None] if context.positions is None else context.positions
        indices = reshard(jnp.broadcast_to(indices, (batch, length)), batch_axes, positions)
        at = summary[...].at[jnp.broadcast_to(indices[..., None], experts.shape), experts]
        # If P = 1, `clip` maps every position to the only entry.
        return at.get(mode="clip", out_sharding=spec(batch_axes, positions, None, None))


def _divisors_for(parts: int, batch: int, length: int) -> tuple[int, int]:
    """Return divisors of batch and length with the smallest product that is at least `parts`, or the largest."""
    divisors = ([n for n in range(1, size + 1) if size % n == 0] for size in (batch, length))
    pairs = [(k, m) for k, m in itertools.product(*divisors) if k * m >= parts]
    return min(pairs, key=lambda pair: (math.prod(pair), pair), default=(batch, length))


def _mix_pair(merge: jax.Array, x: jax.Array, rest: jax.Array, companions: jax.Array) -> jax.Array:
    """Mixtures [B, S, E or k, D] of tokens x [B, S, D] and their companions, by the weights [B, S, E or k] of each."""
    merge, rest = (a[..., None].astype(x.dtype) for a in (merge, rest))
    return merge * x[:, :, None] + rest * companions


def summarise(layer: MixtureOfTokens, x: jax.Array, context: FeedForwardContext) -> dict[str, jax.Array]:
    """Compute the constants of `Companions`, by name, for every group of x except its first sequence.

    x [B, S, D] -> [N, S, ...] each.
    """
    config = layer.config.mixing
    companions = mixing.group(x.astype(layer.dtype), layer.config.group_size)[:, 1:]
    logits, emit_logits = layer.logits(companions)
    t, emit_t = layer.temperatures(context)
    mixtures = mixing.merge(mixing.mixing_weights(logits, config, None, t), companions)
    (project_in, w_in), (project_out, w_out) = layer.experts()
    outputs = project_out(project_in(mixtures, w_in), w_out)
    summaries = {"companion_mixtures": mixtures, "companion_outputs": outputs}
    if config.merge == "softmax":
        summaries["companion_logits"] = _combined_logit(logits, t)
    if config.emit == "softmax":
        summaries["companion_emit_logits"] = _combined_logit(emit_logits, emit_t)
    if config.emit == "top_token":
        summaries["companion_top"] = (jnp.zeros_like(logits) if config.merge == "uniform" else logits).max(axis=1)
    return summaries


def _combined_logit(logits: jax.Array, t: float | jax.Array) -> jax.Array:
    """v = T log sum_g exp(l_g / T), [N, G, S, E] -> [N, S, E]; the largest logit for T = 0."""
    largest = logits.max(axis=1)
    powers = jnp.exp((logits - largest[:, None]) / jnp.maximum(t, jnp.finfo(logits.dtype).tiny))
    return largest + t * jnp.log(powers.sum(axis=1))
