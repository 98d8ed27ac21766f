"""The mixing core: weights, merge, emit, and `merge_experts_emit` with its own backward pass."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mot_jax.config import MixingConfig
from mot_jax.nn import mixing

N, G, S, E, D = 2, 4, 3, 5, 6
SEEDS = st.integers(0, 2**16)
MIXING = [MixingConfig(), MixingConfig(temperature=0.2), MixingConfig(temperature=0.0)]
MIXING += [MixingConfig("uniform")]
EVERY_MIXING = pytest.mark.parametrize("config", MIXING, ids=lambda c: f"{c.merge}-{c.temperature}")

weights_of = jax.jit(mixing.mixing_weights, static_argnums=1)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def some_mask(seed: int) -> np.ndarray:
    mask = np.random.default_rng(seed).random((N, G, S)) < 0.5
    mask[0, :, 0] = False
    return mask


@EVERY_MIXING
@given(SEEDS, st.sampled_from([0.0, 1.0, 1e4, 1e30]))
def test_weights_sum_to_one_over_the_group_or_to_zero_without_tokens(config, seed, scale):
    logits, mask = scale * normal(seed, N, G, S, E), some_mask(seed)
    for valid in (np.ones_like(mask), mask):
        weights = np.asarray(weights_of(logits, config, valid))
        assert (weights >= 0).all() and not weights[~valid].any()
        expected = np.broadcast_to(valid.any(axis=1)[..., None], (N, S, E))
        np.testing.assert_allclose(weights.sum(axis=1), expected, atol=1e-6)
    np.testing.assert_allclose(weights_of(logits, config), weights_of(logits, config, np.ones_like(mask)), atol=1e-6)


@given(SEEDS)
def test_temperature_zero_takes_the_first_maximum_of_the_non_padding_tokens(seed):
    """With integer logits from a small range, so that most maxima occur more than once."""
    logits = np.random.default_rng(seed).integers(-1, 2, size=(N, G, S, E)).astype("float32")
    mask = some_mask(seed)
    best = np.where(mask[..., None], logits, -np.inf).argmax(axis=1)  # NumPy's argmax is the first one, too
    expected = (np.arange(G)[:, None, None] == best[:, None]) & mask[..., None]
    np.testing.assert_array_equal(weights_of(logits, MixingConfig(temperature=0.0), mask), expected)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37])
def test_tiny_temperatures_and_huge_logits_do_not_overflow(temperature):
    logits = 1e8 * normal(0, N, G, S, E)
    weights, pull = jax.vjp(lambda x: mixing.mixing_weights(x, MixingConfig(temperature=temperature)), logits)
    np.testing.assert_array_equal(weights, weights_of(logits, MixingConfig(temperature=0.0)))
    chex.assert_tree_all_finite(pull(normal(1, N, G, S, E)))


@given(SEEDS)
def test_temperature_divides_the_logits(seed):
    logits = normal(seed, N, G, S, E)
    powers = np.exp(logits / 0.2)
    expected = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights_of(logits, MixingConfig(temperature=0.2)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axis, emit", [(1, "merge"), (3, "softmax_over_experts")])
@pytest.mark.parametrize("shape", [(), (E,)])
def test_the_gradient_by_a_temperature_is_that_of_the_formula(axis, emit, shape):
    logits, mask, dy = normal(0, N, G, S, E), some_mask(1)[..., None], normal(2, N, G, S, E)
    config = MixingConfig(emit=emit)

    def weights(t):
        merged = mixing.mixing_weights(logits, config, mask[..., 0], t)
        emitted = mixing.emit_weights(merged, logits, config, mask[..., 0], t)
        return ((merged if emitted is None else emitted) * dy).sum()

    def formula(t):
        powers = jnp.where(mask, jnp.exp(logits / t), 0)
        return (powers / jnp.maximum(powers.sum(axis=axis, keepdims=True), 1e-30) * dy).sum()

    temperature = 0.5 + jnp.abs(normal(3, *shape))
    gradient = jax.grad(weights)(temperature)
    np.testing.assert_allclose(gradient, jax.grad(formula)(temperature), rtol=1e-4, atol=1e-5)
    assert gradient.shape == shape and np.abs(gradient).min() > 1e-3


@EVERY_MIXING
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e30])
def test_gradients_of_the_weights_are_finite(config, scale):
    logits, mask, dy = scale * normal(0, N, G, S, E), some_mask(1), normal(2, N, G, S, E)
    gradient = jax.grad(lambda logits: (mixing.mixing_weights(logits, config, mask) * dy).sum())(logits)
    chex.assert_tree_all_finite(gradient)
    assert not np.asarray(gradient)[~mask].any()


@pytest.mark.parametrize("given_type", ["bfloat16", "float32", "float64"])
def test_weights_are_at_least_float32(given_type):
    expected = max(given_type, "float32", key=lambda name: jnp.finfo(name).bits)
    with jax.enable_x64(True):
        logits = jnp.asarray(normal(0, N, G, S, E), given_type)
        assert all(mixing.mixing_weights(logits, config).dtype == expected for config in MIXING)


def test_a_group_consists_of_contiguous_sequences():
    x = np.arange(N * G * S).reshape(N * G, S)
    grouped = mixing.group(x, G)
    np.testing.assert_array_equal(grouped[1, 2], x[1 * G + 2])
    np.testing.assert_array_equal(mixing.ungroup(grouped), x)


def test_merge_and_emit_are_transposes():
    weights, x, o = normal(0, N, G, S, E), normal(1, N, G, S, D), normal(2, N, S, E, D)
    np.testing.assert_allclose((mixing.merge(weights, x) * o).sum(), (mixing.emit(weights, o) * x).sum(), rtol=1e-5)
    np.testing.assert_allclose(mixing.merge(weights, x), np.einsum("ngse,ngsd->nsed", weights, x), atol=1e-5)


@given(SEEDS)
def test_entropy_is_one_for_uniform_and_zero_for_one_token(seed):
    logits, mask = normal(seed, N, G, S, E), some_mask(seed)
    mask[1, :2] = True  # at least one group has two tokens, without which every entropy is 0
    entropies = [mixing.normalised_entropy(weights_of(logits, c, mask), mask) for c in MIXING]
    softmax, cold, zero, uniform = map(float, entropies)
    assert zero == 0 and uniform == pytest.approx(1, abs=1e-5)
    assert 0 < cold < softmax < 1


@pytest.mark.parametrize("mask", [np.zeros((N, G, S), bool), np.arange(G)[None, :, None] + np.zeros((N, 1, S)) == 1])
def test_entropy_is_zero_if_no_group_has_two_tokens(mask):
    assert mixing.normalised_entropy(weights_of(normal(0, N, G, S, E), MixingConfig(), mask), mask) == 0


# --- merge_experts_emit -----------------------------------------------------------------------------------------------


def project_in(u: jax.Array, p: dict) -> jax.Array:
    return u * p["scale"] + p["bias"]


def project_out(h: jax.Array, p: dict) -> jax.Array:
    return jnp.tanh(h) * p["scale"]


def reference(x, weights, w_in, w_out):
    """The formula of `merge_experts_emit`, for automatic differentiation."""
    return mixing.emit(weights, project_out(project_in(mixing.merge(weights, x), w_in), w_out))


@pytest.mark.parametrize("save_for_backward", ["nothing", "pre_activations", "all"])
def test_merge_experts_emit_has_the_gradients_of_the_plain_composition(save_for_backward):
    """For experts that are arbitrary functions of arbitrary trees of parameters."""
    w_in = {"scale": normal(3, E, D), "bias": normal(4, E, D)}
    args = (normal(0, N, G, S, D), normal(1, N, G, S, E), w_in, {"scale": normal(5, E, D)})
    dy = normal(2, N, G, S, D)
    fused = partial(mixing.merge_experts_emit, project_in, project_out, save_for_backward)
    (y, pull), (expected, expected_pull) = (jax.vjp(f, *args) for f in (fused, reference))
    chex.assert_trees_all_close((y, pull(dy)), (expected, expected_pull(dy)), rtol=1e-4, atol=1e-5)


# --- refused arguments ------------------------------------------------------------------------------------------------

ZEROS = {"NGSE": jnp.zeros((N, G, S, E)), "NGSD": jnp.zeros((N, G, S, D)), "NSED": jnp.zeros((N, S, E, D))}
REFUSED = {
    "batch not divisible": (lambda: mixing.group(jnp.zeros((6, S)), G), "batch B = 6, group size G = 4"),
    "group size 0": (lambda: mixing.group(jnp.zeros((6, S)), 0), "positive"),
    "rank of logits": (lambda: mixing.mixing_weights(jnp.zeros((N, G, S))), r"logits are \[N, G, S, E\]"),
    "shape of mask": (
        lambda: mixing.mixing_weights(ZEROS["NGSE"], token_mask=jnp.ones((N, G, S + 1), bool)),
        r"token mask is \[N, G, S\]",
    ),
    "merge rank": (lambda: mixing.merge(ZEROS["NGSE"][0], ZEROS["NGSD"]), r"weights are \[N, G, S, E\]"),
    "merge prefix": (lambda: mixing.merge(ZEROS["NGSE"], ZEROS["NGSD"][:, :, 1:]), "share groups, group size and"),
    "emit experts": (lambda: mixing.emit(ZEROS["NGSE"], ZEROS["NSED"][:, :, 1:]), r"expert outputs are \[N, S, E, D\]"),
    "emit rank": (lambda: mixing.emit(ZEROS["NGSE"], ZEROS["NSED"][0]), r"\[N, S, E, D\]"),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", REFUSED)
def test_wrong_shapes_raise_an_error_that_names_the_dimensions(case, compiled):
    call, message = REFUSED[case]
    with pytest.raises(AssertionError, match=message):
        (jax.jit(call) if compiled else call)()
