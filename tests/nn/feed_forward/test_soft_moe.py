"""The soft-MoE layer: equal to the oracle, mixes whole sequences, and no two of them."""

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

from mot_jax import Config, ModelConfig, SoftMoE, SoftMoEConfig
from mot_jax.config import MeshConfig, TrainingConfig, check
from mot_jax.errors import UserError
from mot_jax.nn import sharding
from mot_jax.nn.feed_forward import FeedForwardContext, FeedForwardOutput
from mot_jax.nn.feed_forward.soft_moe import soft_weights
from mot_jax.nn.transformer import init_params

B, S, D, E, F, P = 4, 6, 5, 4, 3, 2
KEY = jax.random.key(0, impl="rbg")


@dataclasses.dataclass(frozen=True)
class Case:
    """A config, and whether there is padding and a gate."""

    config: SoftMoEConfig
    masked: bool = True
    gated: bool = False


CASES = {
    "no padding": Case(SoftMoEConfig(E, P, F), masked=False),
    "one slot, shared expert, padding": Case(SoftMoEConfig(E, 1, F, shared_expert_dim=4)),
    "more slots than tokens, gated, padding": Case(SoftMoEConfig(E, P, F), gated=True),
}
PADDED = "more slots than tokens, gated, padding"


def mask_of(seed: int) -> np.ndarray:
    """Random padding; the first sequence is padding only, the second has one non-padding token."""
    mask = np.random.default_rng(seed).random((B, S)) < 0.7
    mask[0], mask[1], mask[1:, 2] = False, False, True
    return mask


@lru_cache
def abstract(case: Case, dtype: str):
    options = {"dtype": dtype, "param_dtype": dtype, "gated": case.gated}
    return nnx.split(nnx.eval_shape(lambda: SoftMoE(D, 8, case.config, rngs=nnx.Rngs(params=KEY), **options)))


def values(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    rng, state = np.random.default_rng(seed), abstract(case, "float32")[1]
    shapes = {"x": (B, S, D)} | {path[-1]: leaf.shape for path, leaf in nnx.to_flat_state(state)}
    return {name: np.asarray(rng.normal(size=shape)) for name, shape in shapes.items()} | {"scale": np.array(1.7)}


def apply(case: Case, dtype: str, p: dict, mask=None) -> FeedForwardOutput:
    graph, state = abstract(case, dtype)
    filled = [(path, v.replace(jnp.asarray(p[path[-1]], dtype))) for path, v in nnx.to_flat_state(state)]
    layer = nnx.merge(graph, nnx.from_flat_state(filled))
    return layer(jnp.asarray(p["x"], dtype), FeedForwardContext(token_mask=mask))


@partial(jax.jit, static_argnums=0)
def run(case: Case, p: dict, mask=None) -> FeedForwardOutput:
    return apply(case, "float32", p, mask)


@partial(jax.jit, static_argnums=0)
def gradients_of(case: Case, p: dict, mask=None) -> dict:
    return jax.grad(lambda p: jnp.square(apply(case, "float32", p, mask).y).sum())(p)


def reference(name: str) -> tuple[oracle.SoftMoE, dict[str, np.ndarray], np.ndarray]:
    case = CASES[name]
    mask = mask_of(1) if case.masked else None
    return oracle.SoftMoE(mask), values(case), np.random.default_rng(2).normal(size=(B, S, D))


@pytest.mark.parametrize("name", CASES)
def test_oracle_gradients_equal_finite_differences(name):
    layer, p, dy = reference(name)
    oracle.check_gradients(lambda p: (layer(p, dy)[0] * dy).sum(), p, layer(p, dy)[1])


@pytest.mark.parametrize("name, dtype, tolerance", [*((n, "float64", 1e-10) for n in CASES), (PADDED, "float32", 1e-4)])
def test_layer_equals_oracle(name, dtype, tolerance):
    """Values, every gradient and the metrics."""
    layer, p, dy = reference(name)
    y, gradients, metrics = layer(p, dy)

    @jax.jit
    def step(p):
        def total(p):
            out = apply(CASES[name], dtype, p, layer.mask)
            return (out.y * dy.astype(dtype)).sum(), out

        return jax.grad(total, has_aux=True)(p)

    with jax.enable_x64(dtype == "float64"):
        actual, out = jax.device_get(step({key: jnp.asarray(value, dtype) for key, value in p.items()}))
    assert out.y.dtype == dtype and set(out.metrics) == set(metrics)
    pairs = {"y": (out.y, y)} | {key: (actual[key], gradients[key]) for key in p}
    pairs |= {key: (out.metrics[key], metrics[key]) for key in metrics}
    for key, (value, expected) in pairs.items():
        assert np.abs(value - expected).max() <= tolerance * max(1.0, np.abs(expected).max()), key


# --- dependence on other tokens ---------------------------------------------------------------------------------------


def test_an_earlier_token_depends_on_a_later_one():
    """The leak for which causal models refuse it, in the weights of a single sequence and in the layer."""
    logits = np.random.default_rng(0).normal(size=(1, S, E, P)).astype("float32")
    later = logits.copy()
    later[:, -1] += 1
    before, after = soft_weights(logits)[0], soft_weights(later)[0]
    assert (before[:, :-1] > after[:, :-1]).all()
    case = CASES["no padding"]
    p = values(case)
    changed = p | {"x": np.where(np.arange(S)[:, None] < S - 1, p["x"], -p["x"])}
    assert (run(case, p).y[:, :-1] != run(case, changed).y[:, :-1]).all(axis=-1).all()


def test_causal_models_refuse_it_and_the_advice_works():
    config = Config(ModelConfig(feed_forward=SoftMoEConfig(8)))
    with pytest.raises(UserError, match=r"^model.objective = 'causal': must be 'masked' for .*; try 'masked'$"):
        check(config)
    check(dataclasses.replace(config, model=dataclasses.replace(config.model, objective="masked")))


def test_sequences_are_independent_bit_for_bit():
    case, mask = CASES[PADDED], mask_of(3)
    p = values(case)
    changed = p | {"x": np.concatenate([-p["x"][:3], p["x"][3:]])}
    other_mask = np.concatenate([~mask[:3], mask[3:]])
    np.testing.assert_array_equal(run(case, p, mask).y[3], run(case, changed, other_mask).y[3])


@given(st.integers(0, 2**16), st.sampled_from([1.0, 1e15]))
def test_padding_is_mixed_with_no_token_and_has_zero_updates(seed, scale):
    case, mask = CASES[PADDED], mask_of(seed)
    p = values(case)
    before = run(case, p, mask)
    assert not before.y[~mask].any() and before.y[mask].all()
    other = np.where(mask[..., None], p["x"], scale * np.random.default_rng(4).normal(size=p["x"].shape))
    jax.tree.map(np.testing.assert_array_equal, before, run(case, p | {"x": other}, mask))


def test_padding_at_the_end_equals_a_shorter_sequence():
    case, mask = CASES[PADDED], np.broadcast_to(np.arange(S) < 4, (B, S))
    p = values(case)
    shorter = run(case, p | {"x": p["x"][:, :4]})
    np.testing.assert_allclose(run(case, p, mask).y[:, :4], shorter.y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zeroed", [("x",), ("controller",), ("x", "controller"), ("scale",), ("w_out",)])
def test_gradients_are_finite_at_zeros(zeroed):
    case = CASES[PADDED]
    p = values(case)
    p |= {name: np.zeros_like(p[name]) for name in zeroed}
    for mask in (None, mask_of(0)):
        for name, gradient in gradients_of(case, p, mask).items():
            assert np.isfinite(gradient).all(), name


# --- the layer as a module, and in a model ----------------------------------------------------------------------------


def test_parameters_and_uniform_weights():
    layer = SoftMoE(5, 16, SoftMoEConfig(4, 3), dtype="bfloat16", rngs=nnx.Rngs(params=KEY))
    shapes = {name: getattr(layer, name).shape for name in ("controller", "w_in", "w_out", "scale")}
    assert shapes == {"controller": (5, 4, 3), "w_in": (4, 5, 16), "w_out": (4, 16, 5), "scale": ()}
    assert float(layer.scale[...]) == 1
    layer.scale[...] = jnp.zeros(())
    out = layer(jnp.ones((2, 7, 5)))
    assert out.y.shape == (2, 7, 5) and out.y.dtype == "bfloat16" and layer.w_in.dtype == "float32"
    assert {name: pytest.approx(1.0) for name in out.metrics} == {k: float(v) for k, v in out.metrics.items()}


@pytest.mark.parametrize("length, experts, slots", [(256, 32, 8), (256, 512, 1), (100, 32, 3), (20, 32, 1)])
def test_slots_follow_from_the_context_length(length, experts, slots):
    kind = SoftMoEConfig(experts, expert_dim=4)
    model = ModelConfig(1, 8, 16, 2, context_length=length, feed_forward=kind, objective="masked")
    params = jax.eval_shape(lambda: init_params(model, KEY))
    assert params["stacks/0/0/feed_forward/controller"].shape == (1, 8, experts, slots)


def test_a_layer_on_its_own_needs_its_number_of_slots():
    with pytest.raises(UserError, match=r"slots_per_expert = None: must be given for a layer on its own.*; try 1$"):
        SoftMoE(8, 16, SoftMoEConfig(4), rngs=nnx.Rngs(0))
    for slots in (0, -1):
        with pytest.raises(UserError, match=f"slots_per_expert = {slots}: must be at least 1; try 1"):
            SoftMoE(8, 16, SoftMoEConfig(4, slots), rngs=nnx.Rngs(0))


# --- on a mesh --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 7])
def test_eight_devices_equal_one(length):
    """Values, gradients and metrics, with positions that the axis `tensor` divides or not."""
    kind = SoftMoEConfig(4, 2, 4)
    model = ModelConfig(1, 8, 16, 2, context_length=length, feed_forward=kind, objective="masked", loss_chunk=length)
    config = Config(model, training=TrainingConfig(batch_size=8), mesh=MeshConfig(1, 2, 2, 2))
    mesh, rng = sharding.make_mesh(config), np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: SoftMoE(8, 16, kind, rngs=nnx.Rngs(params=KEY))))
    params = {path[0]: np.asarray(rng.normal(size=v.shape), "float32") for path, v in nnx.to_flat_state(state)}
    x, dy = rng.normal(size=(2, 8, length, 8)).astype("float32")
    mask = rng.random((8, length)) < 0.8

    def total(params, x, dy, mask):
        filled = [(path, v.replace(params[path[0]])) for path, v in nnx.to_flat_state(state)]
        x = sharding.reshard(x, "sequences", sharding.positions_dimension(length), None)
        out = nnx.merge(graph, nnx.from_flat_state(filled))(x, FeedForwardContext(mask))
        return (out.y * sharding.reshard(dy, *sharding.axes_of(out.y))).sum(), out

    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    expected = step(params, x, dy, mask)
    with jax.set_mesh(mesh):
        specs = {n: jax.NamedSharding(mesh, sharding.parameter_spec(n, v.ndim)) for n, v in params.items()}
        assert specs["controller"].spec == jax.P(None, ("fsdp",), None)
        placed = (jax.device_put(params, specs), *jax.device_put((x, dy, mask), sharding.batch_sharding(mesh)))
        actual = step(*placed)
    for value, wanted in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)


def test_the_axis_fsdp_must_divide_the_experts():
    model = ModelConfig(1, 8, 16, 2, context_length=8, feed_forward=SoftMoEConfig(3, 2), objective="masked")
    config = Config(model, training=TrainingConfig(batch_size=8), mesh=MeshConfig(4, 2, 1, 1))
    with pytest.raises(UserError, match=r"mesh.fsdp = 2: must divide model.feed_forward.num_experts = 3; try 1"):
        sharding.make_mesh(config)
