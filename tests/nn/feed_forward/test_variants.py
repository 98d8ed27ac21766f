"""Every variant of `docs/paper.md`, section 3: one value of MixingConfig each, equal to its oracle."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from variants import VARIANTS

from mot_jax.config import MixingConfig, MixtureOfTokensConfig
from mot_jax.errors import UserError
from mot_jax.nn import mixing
from mot_jax.nn.feed_forward import FeedForwardContext, FeedForwardOutput, MixtureOfTokens
from mot_jax.nn.sharding import batch_sharding, parameter_spec
from mot_jax.nn.transformer import get_params

B, S, D, G, E, F = 8, 4, 3, 4, 3, 4
KEY = jax.random.key(0, impl="rbg")
STEP = 4  # of the 10 of the annealing
ANNEALED = {"linear": 0.6, "cosine": (1 + np.cos(0.4 * np.pi)) / 2}  # the temperature at that step
GATED = {"separate controllers", "several"}


def layer_of(mixing: MixingConfig, name: str = "", **changes) -> MixtureOfTokens:
    kind = dataclasses.replace(MixtureOfTokensConfig(G, E, F, mixing=mixing), **changes)
    return MixtureOfTokens(D, 8, kind, gated=name in GATED, rngs=nnx.Rngs(params=KEY))


def mask_of() -> np.ndarray:
    """Random padding; one group across sequences, and all groups of the last sequence, are padding only."""
    mask = np.random.default_rng(1).random((B, S)) < 0.7
    mask[:G, 0] = False
    mask[B - 1] = False
    return mask


def values(name: str) -> dict[str, np.ndarray]:
    """x and every parameter of the variant, drawn at random, since initial values of 0 or 0.5 are special cases."""
    rng = np.random.default_rng(0)
    shapes = {key: value.shape for key, value in get_params(layer_of(VARIANTS[name], name)).items()}
    small = {"temperature", "emit_temperature"}
    scales = {key: 0.3 if key in small else 1.0 for key in shapes}
    drawn = {key: np.asarray(scales[key] * rng.normal(size=shape)) for key, shape in shapes.items()}
    return {"x": rng.normal(size=(B, S, D)), **drawn}


def reference(name: str, p: dict[str, np.ndarray], mask: np.ndarray | None) -> oracle.MixtureOfTokens:
    c = VARIANTS[name]
    t = ANNEALED.get(c.annealing, c.temperature)
    anchor = p if c.straight_through else None
    return oracle.MixtureOfTokens(G, c.merge, t, mask, c.emit, c.groups == "within", c.positive_temperature, anchor)


def output(name: str, p: dict, mask: jax.Array | None) -> FeedForwardOutput:
    graph, state = nnx.split(nnx.eval_shape(lambda: layer_of(VARIANTS[name], name)))
    filled = [(path, v.replace(p["/".join(path)])) for path, v in nnx.to_flat_state(state)]
    layer = nnx.merge(graph, nnx.from_flat_state(filled))
    layer.dtype = p["x"].dtype.name
    return layer(p["x"], FeedForwardContext(mask, step=jnp.asarray(STEP), losses=("mixing_entropy",)))


@functools.partial(jax.jit, static_argnums=0)
def entropy_and_gradients(name: str, p: dict, mask: jax.Array | None):
    return jax.value_and_grad(lambda p: output(name, p, mask).losses["mixing_entropy"])(p)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(name: str, p: dict, dy: jax.Array, mask: jax.Array | None):
    def loss(p: dict):
        out = output(name, p, mask)
        # Times 0, so that a NaN of the losses shows.
        return (out.y * dy).sum() + 0 * sum(out.losses.values()), out.y

    gradients, y = jax.grad(loss, has_aux=True)(p)
    return y, gradients


# Each option once; the others are slow.
FAST_ORACLE = {"default", "emit over experts", "no softmax", "straight-through temperature", "discrete", "several"}
EVERY = pytest.mark.parametrize(
    "name", [name if name in FAST_ORACLE else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)


@EVERY
def test_variant_equals_its_oracle(name):
    """In float64, with padding: values to 1e-10, every gradient to the precision of central differences of 1e-6."""
    p, mask = values(name), mask_of()
    layer, dy = reference(name, p, mask), np.random.default_rng(2).normal(size=(B, S, D))
    with jax.enable_x64(True):
        y, gradients = value_and_gradients(name, p, dy, mask)
        np.testing.assert_allclose(y, layer.forward(p), rtol=1e-9, atol=1e-10)
        for key in p:
            expected = layer.differences(p, dy, key)
            np.testing.assert_allclose(gradients[key], expected, rtol=1e-5, atol=1e-6, err_msg=key)
        # Every gradient is finite if all weights are uniform, all parameters zero, or all tokens equal.
        zero = {key: np.zeros_like(value) for key, value in p.items()}
        for results in (
            value_and_gradients(name, q, dy, mask) for q in (zero, zero | {"x": p["x"]}, p | {"x": zero["x"]})
        ):
            chex.assert_tree_all_finite(results)


@EVERY
def test_the_values_of_padding_tokens_change_no_bit(name):
    """Neither of the update nor of any gradient."""
    p, mask, rng = values(name), mask_of(), np.random.default_rng(2)
    dy, other = rng.normal(size=(B, S, D)), 100 * rng.normal(size=(B, S, D))
    with jax.enable_x64(True):
        before, after = (
            value_and_gradients(name, p | {"x": x}, dy, mask)
            for x in (p["x"], np.where(mask[..., None], p["x"], other))
        )
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert not before[0][~mask].any() and before[0][mask].any()


# Emit by the merge weights, separate, over experts; learned temperatures; groups within a sequence; uniform merge.
ENTROPIES = [
    "default",
    "separate controllers",
    "emit over experts",
    "learnable temperature, separate",
    "uniform mixing",
]
ENTROPIES = ["several", *(pytest.param(name, marks=pytest.mark.slow) for name in ENTROPIES)]


@pytest.mark.parametrize("name", ENTROPIES)
@pytest.mark.parametrize("masked", [False, True])
def test_entropy_loss_equals_its_oracle(name, masked):
    """Its value and gradients, in float64."""
    p, mask = values(name), mask_of() if masked else None
    reference_layer, nothing = reference(name, p, mask), np.zeros((B, S, D))
    with jax.enable_x64(True):
        loss, gradients = entropy_and_gradients(name, p, mask)
        assert float(loss) == pytest.approx(reference_layer.entropy(p), rel=1e-10)
        for key in ("x", *(key for key in p if "controller" in key or "base" in key or "temperature" in key)):
            expected = reference_layer.differences(p, nothing, key, entropy=1.0)
            np.testing.assert_allclose(gradients[key], expected, rtol=1e-5, atol=1e-8, err_msg=key)


def test_more_experts_than_group_members_equal_the_oracle():
    """E = 6, G = 2: granularity 3."""
    rng, config = np.random.default_rng(0), MixtureOfTokensConfig(2, 6, 2)
    p = {"controller": (D, 6), "w_in": (6, D, 2), "w_out": (6, 2, D), "x": (B, S, D)}
    p = {key: rng.normal(size=shape) for key, shape in p.items()}
    with jax.enable_x64(True):
        layer = MixtureOfTokens(D, 8, config, dtype="float64", param_dtype="float64", rngs=nnx.Rngs(params=KEY))
        for key in ("controller", "w_in", "w_out"):
            getattr(layer, key)[...] = jnp.asarray(p[key])
        y = layer(jnp.asarray(p["x"]), FeedForwardContext(mask_of())).y
        np.testing.assert_allclose(y, oracle.MixtureOfTokens(2, mask=mask_of()).forward(p), rtol=1e-9, atol=1e-10)


FAST_MESH = {"uniform mixing", "no softmax", "several"}
MESH_CASES = [name if name in FAST_MESH else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]


@pytest.mark.parametrize("name", MESH_CASES)
def test_variant_on_a_mesh_equals_one_device(name, mesh_of, optimized):
    """In float32, without padding: values and gradients, with sequences over 2 x 4 devices and experts over 4."""
    layer = layer_of(VARIANTS[name], name, num_experts=4)
    graph, state = nnx.split(layer)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), state)
    x, dy = (rng.normal(size=(8 * G, S, D)).astype("float32") for _ in range(2))

    @jax.jit
    def run(state, x):
        def loss(state):
            y = nnx.merge(graph, state)(x, FeedForwardContext(step=jnp.asarray(STEP))).y
            return (y * dy).sum(), y

        return jax.value_and_grad(loss, has_aux=True)(state)

    expected = run(state, x)
    mesh = mesh_of(data=2, expert=4)
    with jax.set_mesh(mesh):
        placed = nnx.to_pure_dict(state)
        placed = {k: jax.device_put(v, NamedSharding(mesh, parameter_spec(k, v.ndim))) for k, v in placed.items()}
        nnx.replace_by_pure_dict(state, placed)
        on_mesh = run(state, jax.device_put(x, batch_sharding(mesh)))
    (_, y), gradients = expected
    assert set(nnx.to_pure_dict(gradients)) == set(placed)
    chex.assert_trees_all_close(jax.device_get(on_mesh[0][1]), y, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(jax.device_get(on_mesh[1]), gradients, rtol=1e-3, atol=1e-3)


# --- temperatures -----------------------------------------------------------------------------------------------------


def test_annealing_interpolates_between_two_temperatures():
    """Linear and cosine, between steps 10 and 20, from 2 to 0; the final temperature without a step."""
    for shape, middle in (("linear", 1.5), ("cosine", 1 + np.cos(np.pi / 4))):
        config = MixingConfig(temperature=2.0, annealing=shape, annealing_steps=(10, 20))
        temperatures = [float(mixing.temperature_at_step(config, jnp.asarray(step))) for step in (0, 10, 20, 99)]
        assert temperatures == [2, 2, 0, 0] and mixing.temperature_at_step(config, None) == 0
        assert float(mixing.temperature_at_step(config, jnp.asarray(12.5))) == pytest.approx(middle)


def test_an_annealed_temperature_of_zero_is_the_one_hot_limit():
    """Gradients are finite at the end of the schedule and just before it."""
    config = MixingConfig(annealing="linear", annealing_steps=(0, 10))
    logits = np.random.default_rng(0).normal(size=(2, G, S, E)).astype("float32")
    one_hot = mixing.mixing_weights(logits, MixingConfig(temperature=0.0))
    for step in (9.9999, 10):
        t = mixing.temperature_at_step(config, jnp.asarray(step))
        weights, pull = jax.vjp(lambda x, t=t: mixing.mixing_weights(x, config, temperature=t), logits)
        np.testing.assert_allclose(weights, one_hot, atol=1e-6)
        chex.assert_tree_all_finite(pull(jnp.ones_like(weights)))


def test_a_learned_temperature_has_no_gradient_during_frozen_steps():
    config = MixingConfig(learned_temperature="scalar", frozen_steps=5, temperature=0.5)

    def temperature(theta, step):
        return mixing.temperature_at_step(config, step, theta)

    theta = jnp.asarray(0.0)
    slopes = [float(jax.grad(temperature)(theta, jnp.asarray(step))) for step in (0, 4, 5)]
    assert slopes == [0, 0, 0.5] and float(temperature(theta, None)) == 0.5
    unbounded = dataclasses.replace(config, positive_temperature=False)
    # Clipped to a positive number, where the formula is negative.
    assert float(mixing.temperature_at_step(unbounded, None, jnp.asarray(-3.0))) > 0


def test_straight_through_has_the_gradient_of_temperature_one():
    logits, dy = np.random.default_rng(0).normal(size=(2, 2, G, S, E)).astype("float32")
    plain, through, cold = (
        jax.vjp(lambda x, c=c: mixing.mixing_weights(x, c), logits)
        for c in (MixingConfig(), MixingConfig(temperature=0.1, straight_through=True), MixingConfig(temperature=0.1))
    )
    np.testing.assert_array_equal(through[0], cold[0])
    np.testing.assert_array_equal(through[1](dy), plain[1](dy))


# --- other properties of variants -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gradient_step_on_the_entropy_loss_lowers_the_entropy():
    """The loss is the mean of the entropies of merge and emit, returned only if the context names it."""
    layer = layer_of(MixingConfig(emit="softmax_over_experts"))
    x = np.random.default_rng(0).normal(size=(B, S, D)).astype("float32")
    without_loss, with_loss = (layer(x, FeedForwardContext(losses=losses)) for losses in ((), ("mixing_entropy",)))
    assert without_loss.losses == {}
    expected = (without_loss.metrics["mixing_entropy"] + without_loss.metrics["emit_entropy"]) / 2
    assert float(with_loss.losses["mixing_entropy"]) == pytest.approx(float(expected))
    gradient = nnx.grad(lambda layer: layer(x, FeedForwardContext(losses=("mixing_entropy",))).losses["mixing_entropy"])
    slope = gradient(layer)["controller"][...]
    layer.controller[...] = layer.controller[...] - 0.1 * slope
    assert float(layer(x).metrics["mixing_entropy"]) < float(without_loss.metrics["mixing_entropy"])


def test_groups_within_a_sequence_do_not_mix_sequences():
    layer, rng = layer_of(MixingConfig(groups="within")), np.random.default_rng(0)
    x = rng.normal(size=(B, 2 * G, D)).astype("float32")
    other = x.copy()
    other[0, :G] = rng.normal(size=(G, D))
    before, after = layer(x).y, layer(other).y
    np.testing.assert_array_equal(before[1:], after[1:])
    np.testing.assert_array_equal(before[0, G:], after[0, G:])
    assert (before[0, :G] != after[0, :G]).all(axis=1).all()


@pytest.mark.parametrize("experts", [1, 8])
def test_expert_width_follows_from_the_flop_matching_rule(experts):
    """G = 4, d_ff = 6: E F = 24 for every E."""
    layer = layer_of(MixingConfig(), num_experts=experts, expert_dim=None)
    layer = MixtureOfTokens(D, 6, layer.config, rngs=nnx.Rngs(params=KEY))
    assert layer.w_in.shape == (experts, D, 24 // experts)
    assert layer(np.ones((B, S, D), "float32")).y.shape == (B, S, D)


def test_the_layer_refuses_a_meaningless_combination():
    with pytest.raises(UserError, match=r"mixing\.controllers = 'separate'.*try 'shared'"):
        layer_of(MixingConfig(controllers="separate"))
