"""The routing core of token choice: pure functions on arrays (PAPER.md section 4).

Notation, here and in `feed_forward/token_choice.py`; B, S, D, E, F as in `mot_jax.nn.mixing`:

    N  routing groups      k  choices of a token       C  capacity, the slots of an expert in a group
    T  tokens of a group   A  assignments, T k         n, t, k, c, e, d, f  their indices

A routing group is T neighbouring tokens of the batch, row after row. Its tokens take the slots of an expert in their
order, whichever choice the expert was: a token that comes earlier is never displaced by one that comes later. (By
priority of first choices, or of probabilities, it would be: its update would then depend on tokens that a causal model
is yet to predict.) What finds no slot is dropped. Groups are independent; tokens of one group depend on earlier ones.

The functions run under NNX, Linen or bare JAX, with or without a mesh; what is spread over devices is the groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mot_jax.nn.sharding import axes_of, axis_size, num_shards, reshard, spec

Activate = Callable[[jax.Array, jax.Array | None], jax.Array]  # (h, gate or None) -> what a hidden layer hands on


def group(x: jax.Array, tokens: int) -> jax.Array:
    """[B, S, ...] -> [N, T, ...]: T neighbouring tokens form a group. Each device has the groups of its own rows.

    Raises AssertionError unless T divides S or is a multiple of it, and the rows make whole groups on every device.
    """
    batch, length, *rest = x.shape
    chex.assert_scalar_positive(tokens)
    if (length % tokens and tokens % length) or batch * length % (tokens * num_shards(axes_of(x)[0])):
        raise AssertionError(
            f"batch B = {batch}, sequence S = {length} on {num_shards(axes_of(x)[0])} shards of the rows: each must "
            f"hold whole routing groups of {tokens} tokens, which divide S or are a multiple of it"
        )
    x = reshard(x, "sequences", *[None] * (x.ndim - 1))
    return jnp.reshape(x, (batch * length // tokens, tokens, *rest), out_sharding=spec(*axes_of(x)))


def ungroup(x: jax.Array, length: int) -> jax.Array:
    """[N, T, ...] -> [B, S, ...], the inverse of `group`."""
    return jnp.reshape(x, (-1, length, *x.shape[2:]), out_sharding=spec(*axes_of(x)))


# --- choices ----------------------------------------------------------------------------------------------------------


class Choices(NamedTuple):
    """experts: int32 [N, T, k], the likeliest first, of equals the first; E for masked tokens, which go nowhere.

    weights: [N, T, k], their probabilities, not renormalised; 0 for masked tokens. probabilities: [N, T, E].
    """

    experts: jax.Array
    weights: jax.Array
    probabilities: jax.Array


def choose(logits: jax.Array, top_k: int, token_mask: jax.Array | None = None) -> Choices:
    """The top_k experts of each token by softmax(logits) over the experts.

    logits [N, T, E] in any float type, token_mask bool [N, T], True = real -> Choices, floats in promote_types(logits'
    dtype, float32). Raises AssertionError for other shapes and for more choices than experts.
    """
    chex.assert_rank(logits, 3, custom_message="logits are [N, T, E]: routing groups, tokens, experts")
    chex.assert_type(logits, jnp.floating)
    count = logits.shape[-1]
    if not 1 <= top_k <= count:
        raise AssertionError(f"top_k = {top_k}: must be 1 to the number of experts E = {count}")
    probabilities = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
    experts = _likeliest(jax.lax.stop_gradient(probabilities), top_k)
    weights = jnp.take_along_axis(probabilities, experts, axis=-1)
    if token_mask is not None:
        _check_mask(token_mask, logits)
        experts = jnp.where(token_mask[..., None], experts, count)
        weights = jnp.where(token_mask[..., None], weights, 0)
    return Choices(experts, weights, probabilities)


def _likeliest(probabilities: jax.Array, top_k: int) -> jax.Array:
    """int32 [N, T, k]. Each device for its own groups: the compiler would gather all of them for this operation."""
    place = spec(*axes_of(probabilities))

    def here(p: jax.Array) -> jax.Array:
        return jax.lax.top_k(p, top_k)[1]

    return here(probabilities) if place is None else jax.shard_map(here, in_specs=place, out_specs=place)(probabilities)


def load(experts: jax.Array, num_experts: int) -> jax.Array:
    """Choices int32 [N, T, k] -> the share of a group's assignments that each expert gets, before any is dropped.

    [N, E], float; sums to 1, or to 0 in a group without real tokens.
    """
    counts = _multi_hot(experts, num_experts).sum(axis=1)
    return counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1)


def load_balancing(choices: Choices, token_mask: jax.Array | None = None) -> jax.Array:
    """E sum_e f_e p_e, mean over groups: 1 if all experts are alike, E if one has everything. Scalar.

    f: the experts' `load`, p: their mean probabilities, which alone have a gradient (Switch Transformer, GShard).
    """
    count = choices.probabilities.shape[-1]
    real = _real(choices.probabilities, token_mask)
    p = jnp.where(real[..., None], choices.probabilities, 0).sum(axis=1)
    p = p / jnp.maximum(real.sum(axis=1, keepdims=True), 1)
    return _mean(count * (load(choices.experts, count) * p).sum(axis=-1), real)


def largest_load(choices: Choices, token_mask: jax.Array | None = None) -> jax.Array:
    """The largest load of an expert, 1 being an even share; mean over groups. Scalar."""
    count = choices.probabilities.shape[-1]
    return _mean(count * load(choices.experts, count).max(axis=-1), _real(choices.probabilities, token_mask))


def router_z(logits: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
    """(log sum exp logits)², mean over the real tokens of a group, then over groups. logits [N, T, E] -> scalar."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return _token_mean(jax.nn.logsumexp(logits, axis=-1) ** 2, _real(logits, token_mask))


def normalised_entropy(probabilities: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
    """Mean entropy of the tokens' probabilities [N, T, E] over log E: 1 is uniform, 0 is one-hot. No gradient."""
    p = jax.lax.stop_gradient(probabilities)
    entropy = -(p * jnp.log(jnp.where(p > 0, p, 1))).sum(axis=-1) / math.log(max(p.shape[-1], 2))
    return _token_mean(entropy, _real(p, token_mask))


def _multi_hot(experts: jax.Array, num_experts: int) -> jax.Array:
    """[N, T, k] -> int32 [N, T, E], 1 where a token has chosen an expert: never twice the same."""
    return (experts[..., None] == jnp.arange(num_experts)).sum(axis=-2, dtype=jnp.int32)


def _real(beside: jax.Array, token_mask: jax.Array | None) -> jax.Array:
    """bool [N, T], of `beside` [N, T, E]."""
    if token_mask is not None:
        _check_mask(token_mask, beside)
        return token_mask
    return jnp.ones_like(beside[..., 0], bool)


def _token_mean(values: jax.Array, real: jax.Array) -> jax.Array:
    """Of values [N, T], over the real tokens of each group, then over the groups that have any."""
    return _mean(jnp.where(real, values, 0).sum(axis=1) / jnp.maximum(real.sum(axis=1), 1), real)


def _mean(values: jax.Array, real: jax.Array) -> jax.Array:
    """Of values [N], over the groups with real tokens."""
    there = real.any(axis=1)
    return jnp.where(there, values, 0).sum() / jnp.maximum(there.sum(), 1)


# --- with a capacity --------------------------------------------------------------------------------------------------


def capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """C: ceil(factor T k / E), and at most T, since a token chooses an expert once."""
    return min(tokens, math.ceil(round(factor * tokens * top_k / num_experts, 6)))


class Slots(NamedTuple):
    """Which assignment has which slot, in both directions; `None` is a number past the end.

    of_assignment: int32 [N, A], the slot of assignment t k + j: c E + e, or C E where it is dropped.
    of_slot: int32 [N, C E], the assignment in a slot, or A where it is empty.
    """

    of_assignment: jax.Array
    of_slot: jax.Array


def place(experts: jax.Array, num_experts: int, capacity: int) -> Slots:
    """Gives the slots of each expert to the tokens that have chosen it, in the tokens' order, while there are any.

    experts: int32 [N, T, k], E for nowhere, as in `Choices`.
    """
    n, t, k = experts.shape
    chosen = _multi_hot(experts, num_experts)
    before = jnp.cumsum(chosen, axis=1) - chosen  # of the earlier tokens, how many have chosen this expert
    slot = jnp.take_along_axis(before, jnp.minimum(experts, num_experts - 1), axis=-1)
    there = (experts < num_experts) & (slot < capacity)
    of_assignment = jnp.where(there, slot * num_experts + experts, capacity * num_experts).reshape(n, t * k)
    return Slots(of_assignment, jax.vmap(lambda places: _inverse(places, capacity * num_experts))(of_assignment))


def dropped(experts: jax.Array, slots: Slots, num_experts: int) -> jax.Array:
    """Of the assignments of real tokens, int32 [N, T, k], the share that has no slot. Scalar."""
    real = (experts < num_experts).sum()
    kept = (slots.of_slot < slots.of_assignment.shape[1]).sum()
    return (real - kept) / jnp.maximum(real, 1)


def dispatch(x: jax.Array, slots: Slots, num_experts: int) -> jax.Array:
    """Tokens [N, T, D] in the slots of the experts, [N, C, E, D]; an empty slot holds 0."""
    chex.assert_rank(x, 3, custom_message="x is [N, T, D]: routing groups, tokens, width")
    n, t, d = x.shape
    k = slots.of_assignment.shape[1] // t
    back = slots.of_assignment.reshape(n, t, k)
    return jax.vmap(_take)(x, slots.of_slot // k, back).reshape(n, -1, num_experts, d)


def combine(outputs: jax.Array, slots: Slots, weights: jax.Array) -> jax.Array:
    """Expert outputs [N, C, E, D] times `weights` [N, T, k] back to their tokens, [N, T, D]; 0 for what was dropped."""
    chex.assert_rank([outputs, weights], [4, 3], custom_message="outputs are [N, C, E, D], weights are [N, T, k]")
    n, c, e, d = outputs.shape
    found = jax.vmap(_take)(outputs.reshape(n, c * e, d), slots.of_assignment, slots.of_slot[..., None])
    return weighted(found.reshape(*weights.shape, d), weights)


def weighted(outputs: jax.Array, weights: jax.Array) -> jax.Array:
    """sum over k of weights [..., k] x outputs [..., k, D], in the outputs' dtype."""
    return (weights[..., None].astype(outputs.dtype) * outputs).sum(axis=-2)


def _inverse(places: jax.Array, size: int) -> jax.Array:
    """Of distinct places [A], or `size` for none: who is at each place, int32 [size], or A for nobody."""
    return jnp.full(size, len(places), jnp.int32).at[places].set(jnp.arange(len(places), dtype=jnp.int32), mode="drop")


@jax.custom_vjp
def _take(x: jax.Array, there: jax.Array, back: jax.Array) -> jax.Array:
    """x [R, D] at `there` [Q], 0 past the end: [Q, D]. back: int32 [R, m], where in the result each row of x stands.

    So the gradient is looked up too: a scatter that adds is slow, and on GPUs in no fixed order.
    """
    return jnp.take(x, there, axis=0, mode="fill", fill_value=0)


def _take_forward(x, there, back):
    return _take(x, there, back), back


def _take_backward(back, cotangent):
    return jnp.take(cotangent, back, axis=0, mode="fill", fill_value=0).sum(axis=1), None, None


_take.defvjp(_take_forward, _take_backward)


# --- without one ------------------------------------------------------------------------------------------------------

_KEPT = "pre_activations"  # the name of what the backward pass of `sum_experts` finds again
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
    """What the chosen experts make of their inputs, however many have chosen the same one.

    Assignments are sorted by expert, in blocks of b rows that one expert reads; b is near the mean load A / E, and 1
    where the experts outnumber the assignments, as in generation: then only weights of chosen experts are read.
    Whatever the other tokens are and choose, a token's result has the same bits. All of it happens on one device.

    Args:
        inputs: [T, k, D], or [T, 1, D] where the experts of a token read the same.
        experts: int32 [T, k]; E for nowhere.
        activate: (h, gate or None) -> what the hidden layer hands on, of h's shape.
        w_in, w_gate: [E, D, F]. w_out: [E, F, D]. In the inputs' dtype.

    Returns:
        [T, k, D]; 0 for nowhere.
    """
    chex.assert_rank([inputs, experts], [3, 2], custom_message="inputs are [T, k, D], experts are [T, k]")
    chex.assert_type(experts, jnp.integer)
    (t, k), (_, m, d), e = experts.shape, inputs.shape, w_in.shape[0]
    if inputs.shape[0] != t or m not in (1, k):
        raise AssertionError(f"inputs {inputs.shape} beside experts {experts.shape}: must be [T, 1 or k, D] and [T, k]")
    slots, owners, b = _blocks(experts.reshape(t * k), e)
    back = slots.of_assignment.reshape(t * m, k // m)
    u = _take(inputs.reshape(t * m, d), slots.of_slot // (k // m), back).reshape(-1, b, d)

    def project(w: jax.Array) -> jax.Array:
        return checkpoint_name(jnp.einsum("qbd,qdf->qbf", u, w[owners]), _KEPT)

    hidden = activate(project(w_in), None if w_gate is None else project(w_gate))
    o = jnp.einsum("qbf,qfd->qbd", hidden, w_out[owners]).reshape(-1, d)
    return _take(o, slots.of_assignment, slots.of_slot[:, None]).reshape(t, k, d)


def sum_experts(
    inputs: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    activate: Activate,
    w_in: jax.Array,
    w_out: jax.Array,
    w_gate: jax.Array | None = None,
) -> jax.Array:
    """sum over k of weights x `apply_experts`, wherever rows and experts are: [B, S, D] where the rows of `inputs` are.

    Each device runs its own experts for the rows of all devices along the axis `expert`, which are gathered, and its
    part of the hidden width; sums go back to the rows. Any expert may have all tokens, and shapes are static: more
    devices along `expert` hold fewer weights each, but do not compute less. The backward pass computes the blocks'
    weights again, so that copies of them are not kept, and what `fsdp` has cut of them is gathered again.

    inputs [B, S, k or 1, D], experts int32 [B, S, k], weights [B, S, k], the others as in `apply_experts`.
    """
    rows, hidden, ring = spec("sequences"), spec("hidden"), axis_size("expert")

    def here(inputs: jax.Array, experts: jax.Array, weights: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
        tokens, chosen = (a.reshape(-1, *a.shape[2:]) for a in (inputs, experts))
        found = apply_experts(tokens, chosen, activate, **params)
        return weighted(found.reshape(*experts.shape, -1), weights)

    def on_device(inputs: jax.Array, experts: jax.Array, weights: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
        if ring > 1:
            arrays = (inputs, experts, weights)
            inputs, experts, weights = (jax.lax.all_gather(a, "expert", tiled=True) for a in arrays)
            mine = params["w_in"].shape[0]
            experts = experts - mine * jax.lax.axis_index("expert")
            experts = jnp.where((experts >= 0) & (experts < mine), experts, mine)
        y = here(inputs, experts, weights, params)
        y = jax.lax.psum(y, hidden[0]) if hidden and hidden[0] else y
        return jax.lax.psum_scatter(y, "expert", tiled=True) if ring > 1 else y

    def everywhere(
        inputs: jax.Array, experts: jax.Array, weights: jax.Array, params: dict[str, jax.Array]
    ) -> jax.Array:
        params = {name: w.astype(inputs.dtype) for name, w in params.items()}
        if rows is None:
            return here(inputs, experts, weights, params)
        params = {name: reshard(w, *_WEIGHTS[name]) for name, w in params.items()}
        places = {name: spec(*_WEIGHTS[name]) for name in params}
        inputs, experts, weights = (reshard(a, "sequences", *[None] * (a.ndim - 1)) for a in (inputs, experts, weights))
        run = jax.shard_map(on_device, in_specs=(rows, rows, rows, places), out_specs=rows)
        return run(inputs, experts, weights, params)

    params = {"w_in": w_in, "w_out": w_out} | ({} if w_gate is None else {"w_gate": w_gate})
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    return jax.checkpoint(everywhere, policy=policy)(inputs, experts, weights, params)


def block_rows(assignments: int, num_experts: int) -> int:
    """b: the power of two nearest to A / E, from 1 to 128."""
    return 2 ** min(7, max(0, round(math.log2(max(assignments, 1) / num_experts))))


def _blocks(experts: jax.Array, num_experts: int) -> tuple[Slots, jax.Array, int]:
    """Slots of the assignments [A] (without N), the expert of each block int32 [Q], and b; a slot is block x b + row.

    Q: the most blocks that A assignments can fill and begin.
    """
    a, b = len(experts), block_rows(len(experts), num_experts)
    begun = min(a, num_experts)
    q = begun + (a - begun) // b
    order = jnp.argsort(experts, stable=True)
    counts = (experts[:, None] == jnp.arange(num_experts)).sum(axis=0, dtype=jnp.int32)
    blocks = -(-counts // b)
    ends = jnp.cumsum(blocks)
    first = (ends - blocks) * b - (jnp.cumsum(counts) - counts)  # slot less place in the sorted order
    ordered = experts[order]
    places = jnp.arange(a) + first[jnp.minimum(ordered, num_experts - 1)]
    places = jnp.where(ordered < num_experts, places, q * b).astype(experts.dtype)
    of_assignment = jnp.zeros_like(experts).at[order].set(places)
    owners = jnp.minimum(jnp.searchsorted(ends, jnp.arange(q), side="right"), num_experts - 1)
    return Slots(of_assignment, _inverse(of_assignment, q * b)), owners, b


def _check_mask(token_mask: jax.Array, beside: jax.Array) -> None:
    chex.assert_type(token_mask, bool)
    chex.assert_shape(token_mask, beside.shape[:2], custom_message="token mask is [N, T]: routing groups, tokens")
