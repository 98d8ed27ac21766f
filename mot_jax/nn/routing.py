"""The routing core of the sparse kinds: pure functions on arrays (`docs/paper.md`, sections 4 and 5).

Dimensions, here and in the layers; B, S, D, E, F as in `mot_jax.nn.mixing`:

    N  routing groups      k  choices of a token       C  capacity: the slots of an expert in a group
    T  tokens of a group   A  assignments, T k         n, t, k, c, e, d, f: their einsum letters

A routing group is T consecutive tokens of the batch, sequence after sequence. Its tokens take the slots of an expert in
token order, whichever of their choices the expert is, so no later token displaces an earlier one. (With priority for
first choices, or for probabilities, it would: a token's update would then depend on tokens that a causal model has yet
to predict.) Only choices that depend on other sequences, those in the warmup of `expert_threshold`, take slots position
by position. Assignments without a slot are dropped. Groups are independent; a token depends on earlier tokens of its
group.

The functions work under NNX, Linen or bare JAX, with or without a mesh; groups are sharded over devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mot_jax.nn.sharding import axes_of, axis_size, num_shards, product, reshard, spec
from mot_jax.runtime.compilation import default_promotion

Activate = Callable[[jax.Array, jax.Array | None], jax.Array]  # (h, gate or None) -> hidden layer, of h's shape


def router_logits(equation: str, x: jax.Array, controller: jax.Array) -> jax.Array:
    """The `product` of x and a controller, in float32 (or wider).

    By default, GPUs and TPUs would round both to fewer bits.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return product(equation, wide, controller, precision=jax.lax.Precision.HIGHEST)


def group_tokens(x: jax.Array, tokens: int) -> jax.Array:
    """Split the batch into routing groups of T consecutive tokens: [B, S, ...] -> [N, T, ...].

    Each device has the groups of its own sequences.

    Raises:
        AssertionError: T neither divides S nor is a multiple of it, or a device's sequences are not whole groups.
    """
    batch, length, *rest = x.shape
    chex.assert_scalar_positive(tokens)
    if (length % tokens and tokens % length) or batch * length % (tokens * num_shards(axes_of(x)[0])):
        raise AssertionError(
            f"batch B = {batch}, sequence S = {length} on {num_shards(axes_of(x)[0])} shards: each must hold "
            f"whole routing groups of {tokens} tokens, which divide S or are a multiple of it"
        )
    x = reshard(x, "sequences", *[None] * (x.ndim - 1))
    return jnp.reshape(x, (batch * length // tokens, tokens, *rest), out_sharding=spec(*axes_of(x)))


def ungroup_tokens(x: jax.Array, length: int) -> jax.Array:
    """Invert `group_tokens`: [N, T, ...] -> [B, S, ...]."""
    return jnp.reshape(x, (-1, length, *x.shape[2:]), out_sharding=spec(*axes_of(x)))


# --- choices ----------------------------------------------------------------------------------------------------------


class Choices(NamedTuple):
    """The experts that each token of a routing group has chosen."""

    experts: jax.Array
    """int32 [N, T, k], most probable first, the lower index first among equals; E (no expert) for padding tokens."""

    weights: jax.Array
    """[N, T, k], of the outputs of `experts`; 0 for padding tokens."""

    probabilities: jax.Array
    """[N, T, E], the scores of all experts, which sum to 1."""


def choose_experts(
    logits: jax.Array,
    top_k: int,
    token_mask: jax.Array | None = None,
    scores: str = "softmax",
    bias: jax.Array | None = None,
) -> Choices:
    """Choose the top_k experts of each token.

    Args:
        logits: [N, T, E] in any float type.
        top_k: choices of a token.
        token_mask: bool [N, T], True = non-padding.
        scores: `softmax` over the experts: weights are the scores of the chosen experts. `sigmoid`: they are divided by
            their sum, unless top_k is 1, where the weight would be 1 and the router would have no gradient.
        bias: [E], added to the scores for the choice only.

    Returns:
        `Choices`, with floats in promote_types(logits.dtype, float32).

    Raises:
        AssertionError: other shapes, or more choices than experts.
    """
    chex.assert_rank(logits, 3, custom_message="logits are [N, T, E]: routing groups, tokens, experts")
    chex.assert_type(logits, jnp.floating)
    num_experts = logits.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise AssertionError(f"top_k = {top_k}: must be 1 to the number of experts E = {num_experts}")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # A softmax of logarithms divides by their sum, which may underflow to 0, and so may its square in the gradient.
    logs = logits if scores == "softmax" else jax.nn.log_sigmoid(logits)
    probabilities = jax.nn.softmax(logs, axis=-1)
    values = probabilities if scores == "softmax" else jnp.exp(logs)
    experts = top_k_indices(jax.lax.stop_gradient(values if bias is None else values + bias), top_k)
    if scores == "sigmoid" and top_k > 1:
        weights = jax.nn.softmax(jnp.take_along_axis(logs, experts, axis=-1), axis=-1)
    else:
        weights = jnp.take_along_axis(values, experts, axis=-1)
    if token_mask is not None:
        _check_mask(token_mask, logits)
        experts = jnp.where(token_mask[..., None], experts, num_experts)
        weights = jnp.where(token_mask[..., None], weights, 0)
    return Choices(experts, weights, probabilities)


def total_load(experts: jax.Array, num_experts: int) -> jax.Array:
    """The number of assignments of each expert, before any are dropped: int32 [N, T, k] -> float32 [E]."""
    return _multi_hot(experts, num_experts).sum(axis=(0, 1)).astype(jnp.float32)


def updated_bias(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """The bias of the scores after a step, [..., E]: b + rate sign(mean load - load), minus its mean over the experts.

    load: `total_load` of all tokens of the step. Without the subtraction the bias drifts (arXiv 2408.15664).
    """
    bias += rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
    return bias - bias.mean(axis=-1, keepdims=True)


def top_k_indices(probabilities: jax.Array, top_k: int) -> jax.Array:
    """Indices of the largest numbers along the last axis, the lower one first among equals: [..., E] -> int32 [..., k].

    In `shard_map`, since the compiler would gather all groups for a top_k.
    """
    partition = spec(*axes_of(probabilities))

    def local_top_k(p: jax.Array) -> jax.Array:
        return jax.lax.top_k(p, top_k)[1]

    if partition is None:
        return local_top_k(probabilities)
    return jax.shard_map(local_top_k, in_specs=partition, out_specs=partition)(probabilities)


def choose_tokens(scores: jax.Array, capacity: int, token_mask: jax.Array | None = None) -> jax.Array:
    """Choose the tokens of each expert: those of a group with its largest scores, the first among equals.

    Args:
        scores: [N, G, S, E], logits or probabilities of the G members of each group at each position.
        capacity: C, from 1 to G.
        token_mask: bool [N, G, S], True = non-padding. Padding is not chosen; an expert takes fewer tokens than C if
            there are fewer.

    Returns:
        bool [N, G, S, E, C]: whether the expert takes the token, as the one with its c-th largest score.
    """
    chex.assert_rank(scores, 4, custom_message="scores are [N, G, S, E]: groups, members, positions, experts")
    scores, group_size = jax.lax.stop_gradient(scores), scores.shape[1]
    if not 1 <= capacity <= group_size:
        raise AssertionError(f"capacity C = {capacity}: must be 1 to the group size G = {group_size}")
    if token_mask is not None:
        scores = jnp.where(token_mask[..., None], scores, -jnp.inf)
    chosen = jax.nn.one_hot(top_k_indices(jnp.moveaxis(scores, 1, -1), capacity), group_size, axis=1, dtype=bool)
    return chosen if token_mask is None else chosen & token_mask[..., None, None]


def expert_load(experts: jax.Array, num_experts: int) -> jax.Array:
    """Share of a group's assignments that each expert is chosen for, before any are dropped.

    Choices int32 [N, T, k] -> float [N, E], which sums to 1 over E, or to 0 in a group with padding only.
    """
    counts = _multi_hot(experts, num_experts).sum(axis=1)
    return counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1)


def load_balancing(choices: Choices, token_mask: jax.Array | None = None, count: jax.Array | None = None) -> jax.Array:
    """Load-balancing loss E sum_e f_e p_e, mean over groups: 1 if all experts are even, E if one has all. Scalar.

    f is the experts' load and p their mean probability; only p has a gradient (Switch Transformer, GShard).
    count: the divisor of the mean: `group_count` of a batch of which these groups are a part. None: their own.
    """
    num_experts = choices.probabilities.shape[-1]
    valid = _valid_tokens(choices.probabilities, token_mask)
    p = jnp.where(valid[..., None], choices.probabilities, 0).sum(axis=1)
    p = p / jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
    return _group_mean(num_experts * (expert_load(choices.experts, num_experts) * p).sum(axis=-1), valid, count)


def largest_load(choices: Choices, token_mask: jax.Array | None = None) -> jax.Array:
    """The largest load of an expert, 1 being an even share; mean over groups. Scalar."""
    num_experts = choices.probabilities.shape[-1]
    loads = num_experts * expert_load(choices.experts, num_experts).max(axis=-1)
    return _group_mean(loads, _valid_tokens(choices.probabilities, token_mask))


def router_z(logits: jax.Array, token_mask: jax.Array | None = None, count: jax.Array | None = None) -> jax.Array:
    """Router z-loss (log sum exp logits)², mean over a group's non-padding tokens, then over groups.

    logits [N, T, E] -> scalar. count: as in `load_balancing`.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return _token_mean(jax.nn.logsumexp(logits, axis=-1) ** 2, _valid_tokens(logits, token_mask), count)


def router_entropy(probabilities: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
    """Mean entropy of the tokens' probabilities [N, T, E] over log E: 1 is uniform, 0 is one-hot. No gradient."""
    p = jax.lax.stop_gradient(probabilities)
    entropy = -(p * jnp.log(jnp.where(p > 0, p, 1))).sum(axis=-1) / math.log(max(p.shape[-1], 2))
    return _token_mean(entropy, _valid_tokens(p, token_mask))


def group_count(token_mask: jax.Array) -> jax.Array:
    """The number of routing groups with non-padding tokens, for a token mask [N, T]: the divisor of means over them."""
    return token_mask.any(axis=1).sum()


def _multi_hot(experts: jax.Array, num_experts: int) -> jax.Array:
    """[N, T, k] -> int32 [N, T, E], 1 for the chosen experts. A token chooses an expert at most once."""
    return (experts[..., None] == jnp.arange(num_experts)).sum(axis=-2, dtype=jnp.int32)


def _valid_tokens(of_experts: jax.Array, token_mask: jax.Array | None) -> jax.Array:
    """The mask bool [N, T] for an array [N, T, E]; all True without one."""
    if token_mask is not None:
        _check_mask(token_mask, of_experts)
        return token_mask
    return jnp.ones_like(of_experts[..., 0], bool)


def _token_mean(values: jax.Array, valid: jax.Array, count: jax.Array | None = None) -> jax.Array:
    """Mean of values [N, T] over the valid tokens of each group, then over the groups that have any."""
    return _group_mean(jnp.where(valid, values, 0).sum(axis=1) / jnp.maximum(valid.sum(axis=1), 1), valid, count)


def _group_mean(values: jax.Array, valid: jax.Array, count: jax.Array | None = None) -> jax.Array:
    """Mean of values [N] over the groups with valid tokens, or their sum divided by `count`."""
    count = group_count(valid) if count is None else count
    return jnp.where(valid.any(axis=1), values, 0).sum() / jnp.maximum(count, 1)


# --- with a capacity --------------------------------------------------------------------------------------------------


def capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """C: ceil(factor T k / E), and at most T, since a token chooses an expert at most once."""
    return min(tokens, math.ceil(round(factor * tokens * top_k / num_experts, 6)))


class Slots(NamedTuple):
    """The map between assignments and slots, in both directions. An index past the end stands for none.

    A token has m possible assignments: its k choices, or one for each of the E experts. Assignment t m + j is the j-th
    one of token t; slot e C + c is the c-th one of expert e.
    """

    of_assignment: jax.Array
    """int32 [N, T, m], the slot of each assignment."""

    of_slot: jax.Array
    """int32 [N, E, C], the assignment in each slot."""

    of_token: jax.Array
    """int32 [N, T, m], the slots of each token: `of_assignment`, or these in an order in which none is last."""

    most: jax.Array | None
    """int32 scalar, the largest number of slots of a token, if none is last in `of_token`."""


def assign_slots(experts: jax.Array, num_experts: int, capacity: int) -> Slots:
    """Assign the slots of each expert to the tokens that have chosen it, in token order, until none are left.

    experts: int32 [N, T, k], E for no expert, as in `Choices`.
    """
    place = jnp.take_along_axis(
        earlier_tokens(_multi_hot(experts, num_experts)), jnp.minimum(experts, num_experts - 1), axis=-1
    )
    of_assignment, of_slot = _place(experts, place, experts < num_experts, num_experts, capacity)
    return Slots(of_assignment, of_slot, of_assignment, None)


def fill_slots(chosen: jax.Array, place: jax.Array, capacity: int) -> Slots:
    """As `assign_slots`, for tokens with a varying number of experts.

    Args:
        chosen: bool [N, T, E].
        place: int32 [N, T, E], the number of tokens of the group that have chosen an expert and come before this one,
            such as `earlier_tokens(chosen)`.
        capacity: C, the number of slots of an expert.
    """
    num_experts = chosen.shape[-1]
    of_assignment, of_slot = _place(jnp.arange(num_experts), place, chosen, num_experts, capacity)
    has_slot = of_assignment < num_experts * capacity
    order = jnp.argsort(~has_slot, axis=-1, stable=True)
    of_token = jnp.take_along_axis(of_assignment, order, axis=-1)
    return Slots(of_assignment, of_slot, of_token, has_slot.sum(axis=-1).max())


def earlier_tokens(chosen: jax.Array) -> jax.Array:
    """The number of earlier tokens of the group that have chosen an expert: [N, T, E], 0 or 1, -> int32 [N, T, E]."""
    chosen = chosen.astype(jnp.int32)
    return jnp.cumsum(chosen, axis=1) - chosen


def tokens_at_earlier_positions(chosen: jax.Array, length: int) -> jax.Array:
    """As `earlier_tokens`, of sequences of `length` tokens, T / length of them, in the order of their positions.

    At one position, the order is that of the sequences.
    """
    by_sequence = chosen.reshape(len(chosen), -1, length, chosen.shape[-1])
    at_position = by_sequence.sum(axis=1, dtype=jnp.int32)  # [N, length, E]
    return (earlier_tokens(at_position)[:, None] + earlier_tokens(by_sequence)).reshape(chosen.shape)


def _place(
    experts: jax.Array, place: jax.Array, is_assigned: jax.Array, num_experts: int, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """`of_assignment` and `of_slot` of assignments [N, T, m], the place-th ones of their experts."""
    slots = jnp.where(is_assigned & (place < capacity), experts * capacity + place, num_experts * capacity)
    of_slot = jax.vmap(lambda s: _invert(s.reshape(-1), num_experts * capacity))(slots)
    return slots, of_slot.reshape(-1, num_experts, capacity)


def dropped_share(experts: jax.Array, slots: Slots, num_experts: int) -> jax.Array:
    """Share of the non-padding tokens' assignments, int32 [N, T, k], that have no slot. Scalar."""
    assigned = (experts < num_experts).sum()
    placed = (slots.of_assignment < math.prod(slots.of_slot.shape[1:])).sum()
    return (assigned - placed) / jnp.maximum(assigned, 1)


def weighted_sum(outputs: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum over k of weights [..., k] x outputs [..., k, D], in the dtype of `outputs`."""
    return (weights[..., None].astype(outputs.dtype) * outputs).sum(axis=-2)


def _invert(slots: jax.Array, size: int) -> jax.Array:
    """Invert a map from assignments to distinct slots, [A] with `size` for none -> int32 [size] with A for none."""
    return jnp.full(size, len(slots), jnp.int32).at[slots].set(jnp.arange(len(slots), dtype=jnp.int32), mode="drop")


@jax.custom_vjp
def _take_rows(x: jax.Array, indices: jax.Array, positions_of_row: jax.Array) -> jax.Array:
    """Gather rows of x [R, D] by indices [Q], 0 past the end: [Q, D].

    positions_of_row: int32 [R, m], the positions in the result of each row of x, so that the backward pass gathers,
    too. A scatter-add is slow, and on GPUs its order of summation is not fixed.
    """
    return jnp.take(x, indices, axis=0, mode="fill", fill_value=0)


def _take_rows_forward(x, indices, positions_of_row):
    return _take_rows(x, indices, positions_of_row), positions_of_row


@default_promotion()
def _take_rows_backward(positions_of_row, cotangent):
    return jnp.take(cotangent, positions_of_row, axis=0, mode="fill", fill_value=0).sum(axis=1), None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def combine(outputs: jax.Array, slots: Slots, weights: jax.Array) -> jax.Array:
    """Sum the expert outputs of each token by its weights; an assignment without a slot adds 0.

    outputs [E, N, C, D], weights [N, T, m] of the assignments -> [N, T, D].
    """
    chex.assert_rank([outputs, weights], [4, 3], custom_message="outputs are [E, N, C, D], weights are [N, T, m]")

    def by_slot(weights: jax.Array, of_slot: jax.Array, of_assignment: jax.Array) -> jax.Array:
        rows = _take_rows(weights.reshape(-1)[:, None], of_slot.reshape(-1), of_assignment.reshape(-1)[:, None])
        return rows[:, 0].reshape(of_slot.shape)[..., None]

    of_slots = jax.vmap(by_slot, out_axes=1)(weights, slots.of_slot, slots.of_assignment)
    return _sum_slots(of_slots.astype(outputs.dtype) * outputs, slots)


@jax.custom_vjp
def dispatch(x: jax.Array, slots: Slots) -> jax.Array:
    """Copy tokens [N, T, D] into the experts' slots, [E, N, C, D]; an empty slot holds 0.

    Experts come first, so that their products need no transposes. The backward pass is `_sum_slots`.
    """
    chex.assert_rank(x, 3, custom_message="x is [N, T, D]: routing groups, tokens, width")
    tokens = slots.of_slot // slots.of_assignment.shape[-1]
    return jax.vmap(lambda x, t: x.at[t].get(mode="fill", fill_value=0), out_axes=1)(x, tokens)


@jax.custom_vjp
def _sum_slots(rows: jax.Array, slots: Slots) -> jax.Array:
    """Sum the rows of each token's slots, [E, N, C, D] -> [N, T, D]. The backward pass is `dispatch`.

    Each term gathers one slot of each token. (A scatter-add is slow, and on GPUs its order of summation is not fixed.)
    Where the number of slots varies, a loop ends with the largest one, instead of mostly reading empty slots.
    """
    capacity = rows.shape[2]

    def term(j: jax.Array | int) -> jax.Array:
        slots_of_tokens = jax.lax.dynamic_index_in_dim(slots.of_token, j, axis=-1, keepdims=False)
        take = jax.vmap(lambda rows, s: rows.at[s // capacity, s % capacity].get(mode="fill", fill_value=0), (1, 0))
        return take(rows, slots_of_tokens).astype(jnp.promote_types(rows.dtype, jnp.float32))

    if slots.most is None:
        return sum(map(term, range(1, slots.of_token.shape[-1])), term(0)).astype(rows.dtype)
    return jax.lax.fori_loop(1, slots.most, lambda j, y: y + term(j), term(0)).astype(rows.dtype)


def _dispatch_backward(slots, cotangent):
    return _sum_slots(cotangent, slots), None


def _sum_slots_backward(slots, cotangent):
    return dispatch(cotangent, slots), None


dispatch.defvjp(lambda x, slots: (dispatch(x, slots), slots), default_promotion()(_dispatch_backward))
_sum_slots.defvjp(lambda rows, slots: (_sum_slots(rows, slots), slots), default_promotion()(_sum_slots_backward))


# --- without a capacity -----------------------------------------------------------------------------------------------

_SAVED = "pre_activations"  # the checkpoint name of the values that `sum_experts` saves for the backward pass
_WEIGHTS = {"w_in": ("experts", None, "hidden"), "w_out": ("experts", "hidden", None)}
_WEIGHTS["w_gate"] = _WEIGHTS["w_in"]


def apply_experts(
    inputs: jax.Array,
    experts: jax.Array,
    activate: Activate,
    w_in: jax.Array,
    w_out: jax.Array,
    w_gate: jax.Array | None = None,
) -> jax.Array:
    """Apply the chosen experts to their inputs, however many assignments an expert has.

    Assignments are sorted by expert into blocks of b rows, each processed by one expert; b is near the mean load A / E,
    and 1 if there are more experts than assignments, as in generation: then only the weights of chosen experts are
    read. The result of a token has the same bits for any other tokens and choices. Everything is local to a device.

    Args:
        inputs: [T, k, D], or [T, 1, D] if all experts of a token have the same input.
        experts: int32 [T, k]; E for no expert.
        activate: (h, gate or None) -> hidden layer, of h's shape.
        w_in, w_gate: [E, D, F], in the inputs' dtype.
        w_out: [E, F, D], in the inputs' dtype.

    Returns:
        [T, k, D]; 0 for no expert.
    """
    chex.assert_rank([inputs, experts], [3, 2], custom_message="inputs are [T, k, D], experts are [T, k]")
    chex.assert_type(experts, jnp.integer)
    (t, k), (_, m, d), e = experts.shape, inputs.shape, w_in.shape[0]
    if inputs.shape[0] != t or m not in (1, k):
        raise AssertionError(f"inputs {inputs.shape}, experts {experts.shape}: must be [T, 1 or k, D] and [T, k]")
    slot_of_assignment, assignment_of_slot, expert_of_block, b = _sort_into_blocks(experts.reshape(t * k), e)
    slots_of_input = slot_of_assignment.reshape(t * m, k // m)
    u = _take_rows(inputs.reshape(t * m, d), assignment_of_slot // (k // m), slots_of_input).reshape(-1, b, d)

    def project(w: jax.Array) -> jax.Array:
        return checkpoint_name(jnp.einsum("qbd,qdf->qbf", u, w[expert_of_block]), _SAVED)

    hidden = activate(project(w_in), None if w_gate is None else project(w_gate))
    o = jnp.einsum("qbf,qfd->qbd", hidden, w_out[expert_of_block]).reshape(-1, d)
    return _take_rows(o, slot_of_assignment, assignment_of_slot[:, None]).reshape(t, k, d)


def sum_experts(
    inputs: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    activate: Activate,
    w_in: jax.Array,
    w_out: jax.Array,
    w_gate: jax.Array | None = None,
) -> jax.Array:
    """Sum over k of weights x `apply_experts`, for sharded sequences and experts.

    Each device applies its own experts, and its part of the hidden width, to the sequences of all devices along the
    mesh axis `expert`, which are all-gathered; the sums are reduce-scattered back. An expert may have all tokens and
    shapes are static, so more devices along `expert` hold fewer weights each, but do not compute less. The backward
    pass recomputes the gathered weights of the blocks, and their all-gather over `fsdp`, instead of saving them; in
    addition to its inputs, only the pre-activations are saved.

    Args:
        inputs: [B, S, k, D], or [B, S, 1, D] if all experts of a token have the same input.
        experts: int32 [B, S, k]; E for no expert.
        weights: [B, S, k].
        activate, w_in, w_out, w_gate: as in `apply_experts`, parameters in any float type.

    Returns:
        [B, S, D], sharded over the batch.
    """
    batch_spec, hidden, expert_devices = spec("sequences"), spec("hidden"), axis_size("expert")

    def apply_local(
        inputs: jax.Array, experts: jax.Array, weights: jax.Array, params: dict[str, jax.Array]
    ) -> jax.Array:
        tokens, chosen = (a.reshape(-1, *a.shape[2:]) for a in (inputs, experts))
        outputs = apply_experts(tokens, chosen, activate, **params)
        return weighted_sum(outputs.reshape(*experts.shape, -1), weights)

    def on_device(inputs: jax.Array, experts: jax.Array, weights: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
        if expert_devices > 1:
            arrays = (inputs, experts, weights)
            inputs, experts, weights = (jax.lax.all_gather(a, "expert", tiled=True) for a in arrays)
            num_local = params["w_in"].shape[0]
            experts = experts - num_local * jax.lax.axis_index("expert")
            experts = jnp.where((experts >= 0) & (experts < num_local), experts, num_local)
        y = apply_local(inputs, experts, weights, params)
        y = jax.lax.psum(y, hidden[0]) if hidden and hidden[0] else y
        return jax.lax.psum_scatter(y, "expert", tiled=True) if expert_devices > 1 else y

    def on_mesh(inputs: jax.Array, experts: jax.Array, weights: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
        params = {name: w.astype(inputs.dtype) for name, w in params.items()}
        if batch_spec is None:
            return apply_local(inputs, experts, weights, params)
        params = {name: reshard(w, *_WEIGHTS[name]) for name, w in params.items()}
        partitions = {name: spec(*_WEIGHTS[name]) for name in params}
        inputs, experts, weights = (reshard(a, "sequences", *[None] * (a.ndim - 1)) for a in (inputs, experts, weights))
        mapped = jax.shard_map(on_device, in_specs=(*[batch_spec] * 3, partitions), out_specs=batch_spec)
        return mapped(inputs, experts, weights, params)

    params = {"w_in": w_in, "w_out": w_out} | ({} if w_gate is None else {"w_gate": w_gate})
    policy = jax.checkpoint_policies.save_only_these_names(_SAVED)
    return jax.checkpoint(on_mesh, policy=policy)(inputs, experts, weights, params)


def sum_all_experts(
    x: jax.Array,
    weights: jax.Array,
    activate: Activate,
    w_in: jax.Array,
    w_out: jax.Array,
    w_gate: jax.Array | None = None,
) -> jax.Array:
    """Sum over all experts of weights x outputs, for tokens with a varying number of experts.

    A device runs its experts one after the other on all tokens, except those that have weight 0 for each of its tokens:
    of these not even the weights are read. Sharding is that of `sum_experts`. The result of a token has the same bits
    for any other tokens. The backward pass recomputes the experts.

    Args:
        x: [B, S, D].
        weights: [B, S, E].
        activate, w_in, w_out, w_gate: as in `apply_experts`, parameters in any float type.

    Returns:
        [B, S, D], sharded over the batch.
    """
    batch_spec, hidden, expert_devices = spec("sequences"), spec("hidden"), axis_size("expert")

    axes_of_batch, axes_of_weights = (
        {axis for entry in partition or () for axis in ((entry,) if isinstance(entry, str) else entry or ())}
        for partition in (batch_spec, spec("experts", "hidden"))
    )

    def apply_local(x: jax.Array, weights: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
        @jax.checkpoint
        def weighted(expert: jax.Array, x: jax.Array, weights: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
            p = {name: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False) for name, w in params.items()}
            weight = jax.lax.dynamic_index_in_dim(weights, expert, axis=-1)
            h = activate(x @ p["w_in"], x @ p["w_gate"] if "w_gate" in p else None)
            return (weight * (h @ p["w_out"])).astype(weights.dtype)

        def add(y: jax.Array, expert: jax.Array) -> tuple[jax.Array, None]:
            is_chosen = (jax.lax.dynamic_index_in_dim(weights, expert, axis=-1) != 0).any()
            return jax.lax.cond(is_chosen, lambda: y + weighted(expert, x, weights, params), lambda: y), None

        # Before the loop, so that the backward pass has no sum over devices in a branch that only some of them take.
        x, weights = _vary((x, weights), axes_of_weights - axes_of_batch)
        params = _vary(params, axes_of_batch - axes_of_weights)
        zeros = _vary(jnp.zeros(x.shape, weights.dtype), axes_of_weights | axes_of_batch)
        return jax.lax.scan(add, zeros, jnp.arange(weights.shape[-1]))[0]

    def on_device(x: jax.Array, weights: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
        if expert_devices > 1:
            x, weights = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, weights))
            num_local = params["w_in"].shape[0]
            weights = jax.lax.dynamic_slice_in_dim(weights, num_local * jax.lax.axis_index("expert"), num_local, -1)
        y = apply_local(x, weights, params)
        y = jax.lax.psum(y, hidden[0]) if hidden and hidden[0] else y
        return jax.lax.psum_scatter(y, "expert", tiled=True) if expert_devices > 1 else y

    params = {"w_in": w_in, "w_out": w_out} | ({} if w_gate is None else {"w_gate": w_gate})
    params = {name: w.astype(x.dtype) for name, w in params.items()}
    if batch_spec is None:
        return apply_local(x, weights, params).astype(x.dtype)
    params = {name: reshard(w, *_WEIGHTS[name]) for name, w in params.items()}
    partitions = {name: spec(*_WEIGHTS[name]) for name in params}
    x, weights = (reshard(a, "sequences", None, None) for a in (x, weights))
    mapped = jax.shard_map(on_device, in_specs=(batch_spec, batch_spec, partitions), out_specs=batch_spec)
    return mapped(x, weights, params).astype(x.dtype)


def _vary(tree: Any, axes: set[str]) -> Any:
    """In `shard_map`: the same arrays, with types that vary over these further mesh axes."""
    return jax.tree.map(lambda a: jax.lax.pcast(a, tuple(sorted(axes)), to="varying"), tree) if axes else tree


def block_size(assignments: int, num_experts: int) -> int:
    """b: the power of two nearest to A / E, from 1 to 128."""
    return 2 ** min(7, max(0, round(math.log2(max(assignments, 1) / num_experts))))


def blocks(assignments: int, num_experts: int) -> int:
    """Q: the largest number of blocks that A assignments can occupy, partly filled ones included."""
    partly_filled = min(assignments, num_experts)
    return partly_filled + (assignments - partly_filled) // block_size(assignments, num_experts)


def _sort_into_blocks(experts: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array, int]:
    """Place assignments [A] in blocks of one expert each.

    Returns:
        The slot of each assignment, block x b + row; the assignment in each slot; the expert of each block, int32 [Q];
        and b.
    """
    a = len(experts)
    b, q = block_size(a, num_experts), blocks(a, num_experts)
    order = jnp.argsort(experts, stable=True)
    counts = (experts[:, None] == jnp.arange(num_experts)).sum(axis=0, dtype=jnp.int32)
    blocks_of_expert = -(-counts // b)
    ends = jnp.cumsum(blocks_of_expert)
    # Slot minus index in the sorted order, per expert.
    offsets = (ends - blocks_of_expert) * b - (jnp.cumsum(counts) - counts)
    ordered = experts[order]
    slots = jnp.arange(a) + offsets[jnp.minimum(ordered, num_experts - 1)]
    slots = jnp.where(ordered < num_experts, slots, q * b).astype(experts.dtype)
    of_assignment = jnp.zeros_like(experts).at[order].set(slots)
    expert_of_block = jnp.minimum(jnp.searchsorted(ends, jnp.arange(q), side="right"), num_experts - 1)
    return of_assignment, _invert(of_assignment, q * b), expert_of_block, b


def _check_mask(token_mask: jax.Array, of_experts: jax.Array) -> None:
    chex.assert_type(token_mask, bool)
    chex.assert_shape(token_mask, of_experts.shape[:2], custom_message="token mask is [N, T]: routing groups, tokens")
