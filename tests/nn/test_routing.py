"""The routing core: slots, dropped assignments, losses, and experts without a capacity."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mot_jax.nn import routing

SEEDS = st.integers(0, 2**16)


def experts_of(rng: np.random.Generator, *shape: int, k: int, e: int) -> np.ndarray:
    """Distinct choices of each token, int32 [..., k]; a fifth of the tokens have no expert."""
    chosen = rng.random((*shape, e)).argsort(axis=-1)[..., :k]
    return np.where(rng.random((*shape, 1)) < 0.2, e, chosen).astype(np.int32)


@pytest.mark.parametrize(
    "tokens, k, e, factor, expected",
    [(64, 4, 128, 1.25, 3), (10, 1, 10, 1.1, 2), (100, 1, 10, 1.1, 11), (8, 2, 4, 100.0, 8), (8, 1, 64, 0.1, 1)],
)
def test_capacity(tokens, k, e, factor, expected):
    assert routing.capacity(tokens, k, e, factor) == expected


@partial(jax.jit, static_argnums=(0, 1))
def dispatch_and_combine(e: int, capacity: int, x, experts, weights):
    slots = routing.assign_slots(experts, e, capacity)
    in_slots = routing.dispatch(x, slots)
    return in_slots, routing.combine(in_slots, slots, weights), routing.dropped_share(experts, slots, e)


@given(SEEDS, st.sampled_from([(1, 1), (3, 2), (2, 4)]))
def test_slots_are_assigned_in_token_order(seed, sizes):
    """As in a loop over tokens in plain Python: earlier tokens first, whichever of their choices the expert is."""
    (k, capacity), n, t, e, rng = sizes, 2, 7, 5, np.random.default_rng(seed)
    experts = experts_of(rng, n, t, k=k, e=e)
    x = rng.normal(size=(n, t, 3)).astype("float32")
    expected, has_slot = np.zeros((e, n, capacity, 3), "float32"), np.zeros((n, t, k), bool)
    for i in range(n):
        taken = [0] * e
        for token in range(t):
            for j, expert in enumerate(experts[i, token]):
                if expert < e and taken[expert] < capacity:
                    expected[expert, i, taken[expert]] = x[i, token]
                    has_slot[i, token, j] = True
                    taken[expert] += 1
    weights = rng.random((n, t, k)).astype("float32")
    in_slots, combined, dropped = dispatch_and_combine(e, capacity, x, experts, weights)
    np.testing.assert_array_equal(in_slots, expected)
    np.testing.assert_allclose(combined, (weights * has_slot).sum(axis=-1)[..., None] * x, atol=1e-6)
    assigned = (experts < e).sum()
    assert float(dropped) == pytest.approx(1 - has_slot.sum() / assigned if assigned else 0)


def test_equal_probabilities_choose_the_first_expert():
    choices = routing.choose_experts(jnp.zeros((1, 3, 5)), 2)
    np.testing.assert_array_equal(choices.experts, np.broadcast_to([0, 1], (1, 3, 2)))
    np.testing.assert_allclose(choices.weights, 0.2)


@jax.jit
def losses_and_metrics(logits, mask):
    """load_balancing, router_z, largest_load and router_entropy of the first choices."""
    choices = routing.choose_experts(logits, 1, mask)
    losses = (routing.load_balancing(choices, mask), routing.router_z(logits, mask))
    metrics = (routing.largest_load(choices, mask), routing.router_entropy(choices.probabilities, mask))
    return jnp.stack([*losses, *metrics])


def test_load_balancing_is_1_for_even_loads_and_e_if_one_expert_has_all():
    logits, mask = 20 * np.eye(4, dtype="float32")[None].repeat(3, axis=0), np.ones((3, 4), bool)
    np.testing.assert_allclose(losses_and_metrics(logits, mask), [1, 400, 1, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        losses_and_metrics(logits[:, :1].repeat(4, axis=1), mask), [4, 400, 4, 0], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(losses_and_metrics(0 * logits, mask), [1, np.log(4) ** 2, 4, 1], rtol=1e-5)


@given(SEEDS)
def test_losses_and_metrics_do_not_depend_on_padding_tokens_and_empty_groups(seed):
    rng = np.random.default_rng(seed)
    logits, mask = rng.normal(size=(3, 6, 4)).astype("float32"), rng.random((3, 6)) < 0.5
    mask[0], mask[1, 2] = False, True
    other = np.where(mask[..., None], logits, 100 * rng.normal(size=logits.shape)).astype("float32")
    np.testing.assert_array_equal(losses_and_metrics(logits, mask), losses_and_metrics(other, mask))
    np.testing.assert_allclose(losses_and_metrics(logits, mask), losses_and_metrics(logits[1:], mask[1:]), rtol=1e-6)


def relu(h, gate):
    return jax.nn.relu(h) if gate is None else jax.nn.relu(gate) * h


@pytest.mark.parametrize(
    "tokens, k, e, separate_inputs",
    [(1, 2, 7, False), (6, 3, 5, True), (300, 2, 4, False), (300, 2, 4, True)],
    ids=["b 1", "b 4, separate inputs", "b 128", "b 128, separate inputs"],
)
def test_apply_experts_equals_einsums(tokens, k, e, separate_inputs):
    """Values and gradients, with gates, for several block sizes; a token without an expert has output 0."""
    rng, d, f = np.random.default_rng(0), 3, 4
    shapes = {"x": (tokens, k if separate_inputs else 1, d), "w_in": (e, d, f), "w_out": (e, f, d), "w_gate": (e, d, f)}
    p = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    experts = jnp.asarray(experts_of(rng, tokens, k=k, e=e))
    dy = rng.normal(size=(tokens, k, d)).astype("float32")

    def blocks(p):
        y = routing.apply_experts(p["x"], experts, relu, p["w_in"], p["w_out"], p["w_gate"])
        return (y * dy).sum(), y

    def einsums(p):
        h, g = (jnp.einsum("tkd,edf->tkef", p["x"], p[w]) for w in ("w_in", "w_gate"))
        y = jnp.einsum("tkef,efd->tked", relu(h, g), p["w_out"])
        y = (y * jax.nn.one_hot(experts, e)[..., None]).sum(axis=2)
        return (y * dy).sum(), y

    (gradients, y), (expected, expected_y) = (
        jax.jit(jax.grad(function, has_aux=True))(p) for function in (blocks, einsums)
    )
    np.testing.assert_allclose(y, expected_y, rtol=1e-4, atol=1e-4)
    assert not np.asarray(y)[np.asarray(experts) == e].any()
    for name in p:
        np.testing.assert_allclose(gradients[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("tokens, e", [(8, 64), (64, 16)], ids=["b 1", "b 8"])
def test_without_a_capacity_a_token_has_the_same_bits_for_any_other_tokens(tokens, e):
    rng, k, d, f = np.random.default_rng(0), 2, 32, 24
    assert routing.block_size(tokens * k, e) == (1 if tokens == 8 else 8)
    w_in, w_out = (jnp.asarray(rng.normal(size=shape), "float32") for shape in ((e, d, f), (e, f, d)))
    run = jax.jit(lambda x, experts: routing.apply_experts(x, experts, relu, w_in, w_out))
    x, experts = rng.normal(size=(tokens, 1, d)).astype("float32"), experts_of(rng, tokens, k=k, e=e)
    token = tokens // 3
    expected = None
    for _ in range(100):
        others, chosen = 10 * rng.normal(size=x.shape).astype("float32"), experts_of(rng, tokens, k=k, e=e)
        others[token], chosen[token] = x[token], experts[0] if experts[0, 0] < e else [0, 1]
        y = np.asarray(run(others, chosen))[token]
        expected = y if expected is None else expected
        np.testing.assert_array_equal(y, expected)
    assert expected.any()


def test_wrong_shapes_raise_an_error_that_names_the_dimensions():
    with pytest.raises(AssertionError, match=r"top_k = 5: must be 1 to the number of experts E = 4"):
        routing.choose_experts(jnp.zeros((1, 2, 4)), 5)
    with pytest.raises(AssertionError, match=r"logits are \[N, T, E\]"):
        routing.choose_experts(jnp.zeros((2, 4)), 1)
    with pytest.raises(AssertionError, match=r"token mask is \[N, T\]"):
        routing.choose_experts(jnp.zeros((1, 2, 4)), 1, jnp.ones((1, 3), bool))
    with pytest.raises(AssertionError, match=r"whole routing groups of 6 tokens"):
        routing.group_tokens(jnp.zeros((4, 4, 2)), 6)
    with pytest.raises(AssertionError, match=r"must be \[T, 1 or k, D\]"):
        routing.apply_experts(jnp.zeros((4, 2, 3)), jnp.zeros((4, 3), int), relu, jnp.zeros((2, 3, 1)), jnp.zeros(()))
