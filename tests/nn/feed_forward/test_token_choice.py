"""The token-choice layer: equal to the oracle, and causal, whichever tokens are dropped."""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from mot_jax.config import TokenChoiceConfig
from mot_jax.nn import routing
from mot_jax.nn.feed_forward import FeedForwardContext, TokenChoice

B, S, D, E, F, K = 4, 6, 5, 4, 3, 2
KEY = jax.random.key(0, impl="rbg")
SEEDS = st.integers(0, 2**16)
# (config, gated, masked)
CASES = {
    "capacity": (TokenChoiceConfig(E, F, K, 0, 1.0, 2 * S), False, False),
    "capacity, shared expert, masked": (TokenChoiceConfig(E, F, K, 4, 0.7, S // 2), False, True),
    "dropless": (TokenChoiceConfig(E, F, K, 0, None, S), False, False),
    "dropless, gated, masked": (TokenChoiceConfig(E, F, K, 0, None, 2 * S), True, True),
    "sigmoid with biases, masked": (
        TokenChoiceConfig(E, F, K, 0, 1.0, 2 * S, scores="sigmoid", balance="bias"),
        False,
        True,
    ),
    "sigmoid, one choice": (TokenChoiceConfig(E, F, 1, 0, None, S, scores="sigmoid"), False, False),
}


def mask_of(seed: int) -> np.ndarray:
    """Random padding; the first sequence is padding only, the others start with a non-padding token."""
    mask = np.random.default_rng(seed).random((B, S)) < 0.7
    mask[0], mask[1:, 0] = False, True
    return mask


def values(seed: int, shared: int = 0, gated: bool = False, biased: bool = False) -> dict[str, np.ndarray]:
    shapes = {"x": (B, S, D), "controller": (D, E), "w_in": (E, D, F), "w_out": (E, F, D)}
    shapes |= {"w_gate": (E, D, F)} if gated else {}
    shapes |= {"kernel_in": (D, shared), "kernel_out": (shared, D)} if shared else {}
    shapes |= {"balance_bias": (E,)} if biased else {}
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def config_of(factor: float | None, tokens: int = 2 * S, shared: int = 0, top_k: int = K) -> TokenChoiceConfig:
    return TokenChoiceConfig(E, F, top_k, shared, factor, tokens)


@lru_cache
def abstract(config: TokenChoiceConfig, dtype: str, gated: bool):
    dtypes = {"dtype": dtype, "param_dtype": dtype}
    return nnx.split(
        nnx.eval_shape(lambda: TokenChoice(D, 8, config, gated=gated, rngs=nnx.Rngs(params=KEY), **dtypes))
    )


def apply(config: TokenChoiceConfig, dtype: str, p: dict, mask=None, losses: tuple[str, ...] = (), train=False):
    graph, state = abstract(config, dtype, "w_gate" in p)
    filled = [(path, v.replace(jnp.asarray(p[path[-1]], dtype))) for path, v in nnx.to_flat_state(state)]
    layer = nnx.merge(graph, nnx.from_flat_state(filled))
    return layer(jnp.asarray(p["x"], dtype), FeedForwardContext(token_mask=mask, losses=losses, train=train))


@partial(jax.jit, static_argnums=0)
def run(config: TokenChoiceConfig, p: dict, mask=None):
    return apply(config, "float32", p, mask)


def reference(case: str) -> tuple[oracle.TokenChoice, dict[str, np.ndarray], np.ndarray]:
    config, gated, masked = CASES[case]
    factor, tokens = config.capacity_factor, config.routing_group_tokens
    capacity = None if factor is None else int(np.ceil(factor * tokens * config.top_k / E))
    p = values(0, config.shared_expert_dim, gated, config.balance == "bias")
    mask, sigmoid = mask_of(1) if masked else None, config.scores == "sigmoid"
    layer = oracle.TokenChoice(config.top_k, tokens, capacity, mask, 0.3, 0.2, sigmoid)
    return layer, p, np.random.default_rng(2).normal(size=(B, S, D))


@pytest.mark.parametrize("case", CASES)
def test_oracle_gradients_equal_finite_differences(case):
    layer, p, dy = reference(case)

    def total(p: dict) -> float:
        y, loss, _ = layer(p, dy)
        return (y * dy).sum() + loss

    oracle.check_gradients(total, p, layer(p, dy)[2], rtol=1e-6)


@pytest.mark.parametrize(
    "case, dtype, tolerance",
    [*((case, "float64", 1e-10) for case in CASES), *((case, "float32", 1e-5) for case in CASES if "masked" in case)],
)
def test_layer_equals_oracle(case, dtype, tolerance):
    """Values, losses and every gradient."""
    layer, p, dy = reference(case)
    y, loss, gradients = layer(p, dy)
    names = ("load_balancing", "router_z")

    @jax.jit
    def step(p):
        def total(p):
            out = apply(CASES[case][0], dtype, p, layer.mask, names)
            losses = layer.balance * out.losses["load_balancing"] + layer.z * out.losses["router_z"]
            return (out.y * dy.astype(dtype)).sum() + losses, (out.y, losses)

        return jax.grad(total, has_aux=True)(p)

    with jax.enable_x64(dtype == "float64"):
        cast = {name: jnp.asarray(value, dtype) for name, value in p.items()}
        actual, (actual_y, actual_loss) = jax.device_get(step(cast))
    assert actual_y.dtype == dtype
    pairs = {"y": (actual_y, y), "loss": (actual_loss, loss)} | {name: (actual[name], gradients[name]) for name in p}
    for name, (value, expected) in pairs.items():
        assert np.abs(value - expected).max() <= tolerance * max(1.0, np.abs(expected).max()), name


# --- dependence on other tokens ---------------------------------------------------------------------------------------


@given(SEEDS)
def test_without_a_capacity_updates_do_not_depend_on_the_order_of_sequences(seed):
    """They are the sum of the K most probable experts' outputs times their probabilities."""
    p, order = values(seed), np.random.default_rng(seed).permutation(B)
    y = run(config_of(None), p).y
    np.testing.assert_allclose(run(config_of(None), p | {"x": p["x"][order]}).y, y[order], atol=1e-5)
    probabilities = np.asarray(jax.nn.softmax(p["x"] @ p["controller"]))
    outputs = np.einsum("bsef,efd->bsed", np.maximum(np.einsum("bsd,edf->bsef", p["x"], p["w_in"]), 0), p["w_out"])
    kept = np.where(probabilities >= np.sort(probabilities)[..., -K, None], probabilities, 0)
    np.testing.assert_allclose(y, np.einsum("bse,bsed->bsd", kept, outputs), atol=1e-4)


def depends_on_later_tokens(run, draws: int = 40) -> tuple[bool, float]:
    """Whether, in any draw, an update changes with later tokens of the batch; and the share of dropped assignments.

    All tokens after a random one are replaced: the later ones of its sequence, and all later sequences.
    """
    depends, dropped = False, []
    for seed in range(draws):
        p, rng = values(seed), np.random.default_rng(seed)
        row, position = rng.integers(B), rng.integers(1, S)
        later = np.zeros((B, S), bool)
        later[row, position:], later[row + 1 :] = True, True
        other = np.where(later[..., None], 10 * rng.normal(size=p["x"].shape), p["x"])
        before, after = run(p), run(p | {"x": other})
        depends |= bool((np.asarray(before.y)[~later] != np.asarray(after.y)[~later]).any())
        dropped.append(float(before.metrics["dropped"]))
    return depends, float(np.mean(dropped))


@pytest.mark.parametrize("tokens", [S // 2, 2 * S])
def test_with_a_capacity_no_token_depends_on_later_tokens(tokens):
    config = config_of(0.6, tokens)
    depends, dropped = depends_on_later_tokens(partial(run, config))
    assert dropped > 0.2 and not depends


def test_slots_by_priority_of_the_choice_would_depend_on_later_tokens(monkeypatch):
    """First choices before all second ones, as in GShard: a later token takes the slot of an earlier one."""
    assign_slots = routing.assign_slots

    def by_priority(experts, num_experts, capacity):
        n, t, k = experts.shape
        slots = assign_slots(experts.transpose(0, 2, 1).reshape(n, t * k, 1), num_experts, capacity)
        of_assignment = slots.of_assignment.reshape(n, k, t).transpose(0, 2, 1)
        of_slot = jnp.where(slots.of_slot < t * k, slots.of_slot % t * k + slots.of_slot // t, t * k)
        return routing.Slots(of_assignment, of_slot, of_assignment, None)

    monkeypatch.setattr(routing, "assign_slots", by_priority)
    config = config_of(0.6)
    depends, dropped = depends_on_later_tokens(jax.jit(lambda p: apply(config, "float32", p)))
    assert dropped > 0.2 and depends


def test_only_with_a_capacity_a_token_depends_on_earlier_sequences():
    """The first sequence of a routing group of two is replaced: the second one changes, or has the same bits."""
    changed = {}
    for factor in (0.6, None):
        config, expected, rng = config_of(factor), run(config_of(factor), values(0)).y[1], np.random.default_rng(1)
        outputs = [
            run(config, values(0) | {"x": np.concatenate([rng.normal(size=(1, S, D)), values(0)["x"][1:]])})
            for _ in range(30)
        ]
        changed[factor] = any((out.y[1] != expected).any() for out in outputs)
    assert changed == {0.6: True, None: False}


@jax.jit
def has_gradient(p: dict) -> jax.Array:
    """bool [S, S]: whether the update at a position of the first sequence has a gradient by x at another."""
    config = config_of(0.6)
    jacobian = jax.jacrev(lambda x: apply(config, "float32", p | {"x": p["x"].at[0].set(x)}).y[0].sum(axis=-1))
    return jacobian(p["x"][0]).any(axis=-1)


def test_an_update_has_a_gradient_only_by_its_own_token():
    dependence = np.asarray(has_gradient({name: jnp.asarray(v, "float32") for name, v in values(0).items()}))
    assert not (dependence & ~np.eye(S, dtype=bool)).any() and dependence.any()


@given(SEEDS, st.sampled_from([0.6, None]), st.sampled_from([1.0, 1e3, 1e15]))
def test_padding_tokens_take_no_slot_and_have_zero_updates(seed, factor, scale):
    p, mask, config = values(seed), mask_of(seed), config_of(factor)
    other = np.where(mask[..., None], p["x"], scale * np.random.default_rng(seed).normal(size=p["x"].shape))
    before, after = run(config, p, mask), run(config, p | {"x": other}, mask)
    np.testing.assert_array_equal(before.y, after.y)
    assert not before.y[~mask].any()
    assert before.metrics["dropped"] == after.metrics["dropped"]


# --- balance by biases ------------------------------------------------------------------------------------------------


def test_biases_change_the_choice_but_not_the_weights():
    config, p = CASES["sigmoid with biases, masked"][0], values(0, biased=True)
    p["balance_bias"] = 1e3 * np.arange(E)  # all tokens choose the last K experts
    config = dataclasses.replace(config, capacity_factor=None)
    scores = np.asarray(jax.nn.sigmoid(p["x"] @ p["controller"]))[..., -K:]
    outputs = np.einsum("bsef,efd->bsed", np.maximum(np.einsum("bsd,edf->bsef", p["x"], p["w_in"]), 0), p["w_out"])
    expected = np.einsum("bse,bsed->bsd", scores / scores.sum(axis=-1, keepdims=True), outputs[..., -K:, :])
    np.testing.assert_allclose(run(config, p).y, expected, atol=1e-4)


def test_statistics_count_the_choices_of_non_padding_tokens_in_training_only():
    config, p, mask = CASES["sigmoid with biases, masked"][0], values(0, biased=True), mask_of(1)

    def statistics(config: TokenChoiceConfig, train: bool) -> dict:
        return jax.jit(lambda p: apply(config, "float32", p, mask, train=train).statistics)(p)

    loads = statistics(config, train=True)["load"]
    scores = np.where(mask[..., None], 1 / (1 + np.exp(-p["x"] @ p["controller"])) + p["balance_bias"], -np.inf)
    kth = np.sort(scores, axis=-1)[..., -K, None]
    np.testing.assert_array_equal(loads, (mask[..., None] & (scores >= kth)).sum(axis=(0, 1)))
    assert not statistics(config, train=False)
    assert not statistics(dataclasses.replace(config, balance="loss"), train=True)


def test_a_step_moves_the_biases_towards_an_even_load_with_mean_zero():
    config = TokenChoiceConfig(4, top_k=2, scores="sigmoid", balance="bias", bias_rate=0.01)
    router = {"balance_bias": jnp.array([[0.0, 0, 0, 0], [0.5, -0.5, 0.25, -0.25]])}
    updated = TokenChoice.update_router(config, router, {"load": jnp.array([[9.0, 1, 1, 1], [3, 3, 3, 3]])})
    expected = [[-0.015, 0.005, 0.005, 0.005], [0.5, -0.5, 0.25, -0.25]]
    np.testing.assert_allclose(updated["balance_bias"], expected, atol=1e-7)


# --- the layer as a module --------------------------------------------------------------------------------------------


def test_parameters_output_losses_and_metrics():
    config = TokenChoiceConfig(8, top_k=2, shared_expert_dim=6, routing_group_tokens=3)
    layer = nnx.jit(lambda: TokenChoice(5, 10, config, dtype="bfloat16", rngs=nnx.Rngs(params=KEY)))()
    shapes = {name: getattr(layer, name).shape for name in ("controller", "w_in", "w_out")}
    assert shapes == {"controller": (5, 8), "w_in": (8, 5, 2), "w_out": (8, 2, 5)}  # 2 x 2 = 10 - 6
    call = nnx.jit(
        lambda layer, losses: layer(jnp.ones((8, 3, 5)), FeedForwardContext(losses=losses)), static_argnums=1
    )
    out = call(layer, ("router_z",))
    assert out.y.shape == (8, 3, 5) and out.y.dtype == "bfloat16" and layer.w_in.dtype == "float32"
    assert list(out.losses) == ["router_z"] and set(out.metrics) == {"dropped", "load_max", "router_entropy"}
    # The three tokens of a group are equal and choose the same experts, which have one slot each.
    assert float(out.metrics["dropped"]) == pytest.approx(2 / 3)


def test_a_batch_without_whole_routing_groups_is_refused_only_with_a_capacity():
    p = values(0) | {"x": np.ones((3, S, D))}
    with pytest.raises(AssertionError, match="whole routing groups of 12 tokens"):
        run(config_of(1.0), p)
    assert run(config_of(None), p).y.shape == (3, S, D)
