"""The expert-choice layer: equal to the oracle, the choice of tokens, and exchanges between devices."""

import dataclasses
import math
import re
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from mot_jax import ExpertChoice, ExpertChoiceConfig
from mot_jax.config import Config, MeshConfig, ModelConfig, TrainingConfig
from mot_jax.nn import sharding
from mot_jax.nn.feed_forward import FeedForwardContext, FeedForwardOutput
from mot_jax.nn.routing import choose_tokens

B, S, D, E, F = 8, 6, 5, 4, 3
KEY = jax.random.key(0, impl="rbg")


@dataclasses.dataclass(frozen=True)
class Case:
    """A config, the number of tokens that an expert then takes, and whether there is padding and a gate."""

    config: ExpertChoiceConfig
    capacity: int
    masked: bool = True
    gated: bool = False


CASES = {
    "one token": Case(ExpertChoiceConfig(4, E, F, save_for_backward="pre_activations"), 1, masked=False),
    "fewer members than experts": Case(ExpertChoiceConfig(2, E, F, shared_expert_dim=4), 1),
    "two tokens, gated": Case(ExpertChoiceConfig(4, E, F, top_k=2, save_for_backward="nothing"), 2, gated=True),
    "all members, layer norm": Case(ExpertChoiceConfig(4, E, F, capacity_factor=9.0, layer_norm=True), 4),
    "over tokens, layer norm": Case(ExpertChoiceConfig(4, E, F, 2, over="tokens", layer_norm=True), 3),
}


def mask_of(seed: int) -> np.ndarray:
    """Random padding; a sequence, and all members of a group at one position, are padding only."""
    mask = np.random.default_rng(seed).random((B, S)) < 0.7
    mask[5], mask[:4, 2] = False, False
    return mask


def values(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    rng, state = np.random.default_rng(seed), abstract(case, "float32")[1]
    shapes = {"x": (B, S, D)} | {path[-1]: leaf.shape for path, leaf in nnx.to_flat_state(state)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@lru_cache
def abstract(case: Case, dtype: str):
    options = {"dtype": dtype, "param_dtype": dtype, "gated": case.gated}
    return nnx.split(nnx.eval_shape(lambda: ExpertChoice(D, 8, case.config, rngs=nnx.Rngs(params=KEY), **options)))


def apply(case: Case, dtype: str, p: dict, mask=None, losses: tuple[str, ...] = ()) -> FeedForwardOutput:
    graph, state = abstract(case, dtype)
    filled = [(path, v.replace(jnp.asarray(p[path[-1]], dtype))) for path, v in nnx.to_flat_state(state)]
    layer = nnx.merge(graph, nnx.from_flat_state(filled))
    return layer(jnp.asarray(p["x"], dtype), FeedForwardContext(token_mask=mask, losses=losses))


def reference(name: str) -> tuple[oracle.ExpertChoice, dict[str, np.ndarray], np.ndarray]:
    case = CASES[name]
    over_tokens = case.config.over == "tokens"
    size, mask = S if over_tokens else case.config.group_size, mask_of(1) if case.masked else None
    layer = oracle.ExpertChoice(size, case.capacity, over_tokens, mask, 0.2)
    return layer, values(case), np.random.default_rng(2).normal(size=(B, S, D))


@pytest.mark.parametrize("name", CASES)
def test_oracle_gradients_equal_finite_differences(name):
    layer, p, dy = reference(name)

    def total(p: dict) -> float:
        y, loss, *_ = layer(p, dy)
        return (y * dy).sum() + loss

    oracle.check_gradients(total, p, layer(p, dy)[2])


@pytest.mark.parametrize(
    "name, dtype, tolerance", [*((n, "float64", 1e-10) for n in CASES), (list(CASES)[-1], "float32", 1e-4)]
)
def test_layer_equals_oracle(name, dtype, tolerance):
    """Values, the loss, every gradient and the metrics."""
    layer, p, dy = reference(name)
    y, loss, gradients, experts_per_token = layer(p, dy)

    @jax.jit
    def step(p):
        def total(p):
            out = apply(CASES[name], dtype, p, layer.mask, ("router_z",))
            return (out.y * dy.astype(dtype)).sum() + layer.z * out.losses["router_z"], out

        return jax.grad(total, has_aux=True)(p)

    with jax.enable_x64(dtype == "float64"):
        actual, out = jax.device_get(step({key: jnp.asarray(value, dtype) for key, value in p.items()}))
    assert out.y.dtype == dtype
    pairs = {"y": (out.y, y), "loss": (layer.z * out.losses["router_z"], loss)}
    pairs |= {key: (actual[key], gradients[key]) for key in p}
    for key, (value, expected) in pairs.items():
        assert np.abs(value - expected).max() <= tolerance * max(1.0, np.abs(expected).max()), key
    experts = experts_per_token if layer.mask is None else experts_per_token[layer.mask]
    assert out.metrics["experts_per_token"] == pytest.approx(experts.mean())
    assert out.metrics["dropped"] == pytest.approx((experts == 0).mean())


# --- the choice -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**16), st.integers(1, 5))
def test_experts_take_their_most_probable_tokens_the_first_among_equals(seed, capacity):
    """Equal probabilities, of 0 too, and padding."""
    rng = np.random.default_rng(seed)
    probabilities = rng.choice([0.0, 0.3, 0.5], size=(2, 5, 3, E)).astype("float32")
    mask = rng.random((2, 5, 3)) < 0.6
    mask[0, :, 0] = False
    expected = np.zeros((2, 5, 3, E, capacity), bool)
    for n, s, e in np.ndindex(2, 3, E):
        members = sorted(np.flatnonzero(mask[n, :, s]), key=lambda g: -probabilities[n, g, s, e])
        for c, g in enumerate(members[:capacity]):
            expected[n, g, s, e, c] = True
    np.testing.assert_array_equal(choose_tokens(probabilities, capacity, mask), expected)


@pytest.mark.parametrize(
    "group_size, experts, top_k, factor, capacity",
    [(32, 32, 1, 1.0, 1), (32, 128, 1, 1.0, 1), (32, 8, 1, 1.0, 4), (32, 64, 8, 1.25, 5), (8, 4, 2, 1e30, 8)],
)
def test_capacity(group_size, experts, top_k, factor, capacity):
    """At least one token, although models refuse the second config."""
    config = ExpertChoiceConfig(group_size, experts, top_k=top_k, capacity_factor=factor)
    assert config.capacity(group_size) == capacity


def test_other_capacities_are_refused():
    for capacity in (0, 5):
        with pytest.raises(AssertionError, match=f"C = {capacity}: must be 1 to the group size G = 4"):
            choose_tokens(jnp.ones((1, 4, 2, E)), capacity)


def test_a_later_token_displaces_an_earlier_one():
    """The leak for which causal models refuse `over="tokens"`, where the members of a group are a sequence."""
    probabilities = np.full((1, 4, 1, 1), 0.5, "float32")
    assert choose_tokens(probabilities, 1)[0, 0].all()
    probabilities[0, 3] = 0.6
    assert not choose_tokens(probabilities, 1)[0, 0].any()


# --- the layer as a module --------------------------------------------------------------------------------------------


def test_parameters_output_losses_and_metrics():
    config = ExpertChoiceConfig(4, 8, top_k=4, shared_expert_dim=8, layer_norm=True)
    layer = nnx.jit(lambda: ExpertChoice(5, 2056, config, dtype="bfloat16", rngs=nnx.Rngs(params=KEY)))()
    shapes = {name: getattr(layer, name).shape for name in ("controller", "w_in", "w_out", "output_norm")}
    assert shapes == {"controller": (5, 8), "w_in": (8, 5, 512), "w_out": (8, 512, 5), "output_norm": (2, 5)}
    # The fan-in of w_out is k F: half of the standard deviation that sqrt(0.1 / F) would be.
    assert float(layer.w_out[...].std()) == pytest.approx(math.sqrt(0.1 / (4 * 512)), rel=0.02)
    out = nnx.jit(lambda layer: layer(jnp.ones((8, 3, 5)), FeedForwardContext(losses=("router_z", "load_balancing"))))(
        layer
    )
    assert out.y.shape == (8, 3, 5) and out.y.dtype == "bfloat16" and layer.w_in.dtype == "float32"
    assert list(out.losses) == ["router_z"]
    # All tokens are equal: every expert takes the first two members of a group.
    metrics = {"dropped": 0.5, "experts_per_token": 4.0}
    assert {name: float(out.metrics[name]) for name in metrics} == metrics
    assert set(out.metrics) == {*metrics, "router_entropy"}


def test_save_for_backward_decides_which_arrays_are_saved_and_recomputed():
    """Counts the saved arrays of the pre-activations' and the chosen tokens' shapes, and FLOPs of the backward pass."""
    groups, capacity, saved, flops = B // 4, 2, {}, {}
    backward = jax.jit(lambda pull, dy: pull(dy))
    for choice in ("nothing", "pre_activations", "all"):
        case = Case(ExpertChoiceConfig(4, E, F, top_k=2, save_for_backward=choice), capacity)
        p = {name: jnp.asarray(value, "float32") for name, value in values(case).items()}
        pull = jax.vjp(lambda p, case=case: apply(case, "float32", p).y, p)[1]
        shapes = [leaf.shape for leaf in jax.tree.leaves(pull)]
        saved[choice] = (
            shapes.count((E, groups * capacity, S, F)),
            shapes.count((groups, S, E * capacity, D)),
        )
        flops[choice] = backward.lower(pull, jnp.ones((B, S, D))).compile().cost_analysis()["flops"]
    assert saved == {"nothing": (0, 0), "pre_activations": (1, 0), "all": (1, 2)}
    assert flops["nothing"] > flops["pre_activations"] > flops["all"]


def test_a_batch_without_whole_groups_is_refused():
    case = CASES["one token"]
    with pytest.raises(AssertionError, match="batch B = 6, group size G = 4"):
        apply(case, "float32", values(case) | {"x": np.ones((6, S, D))})


# --- on a mesh --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over, exchanges", [("batch", 8), pytest.param("tokens", 4, marks=pytest.mark.slow)])
def test_experts_are_surrounded_by_two_all_to_alls(over, exchanges):
    """Forward, and as many backward; groups that span devices by two more."""
    saved = "all" if over == "batch" else "nothing"
    kind = ExpertChoiceConfig(8, 4, 4, top_k=2, over=over, layer_norm=True, save_for_backward=saved)
    model = ModelConfig(1, 8, 16, 2, context_length=8, feed_forward=kind, objective="masked")
    mesh = sharding.make_mesh(Config(model, training=TrainingConfig(batch_size=16), mesh=MeshConfig(1, 2, 2, 2)))
    graph, state = nnx.split(nnx.eval_shape(lambda: ExpertChoice(8, 16, kind, rngs=nnx.Rngs(params=KEY))))

    def update(params, x, mask):
        filled = [(path, v.replace(params[path[0]])) for path, v in nnx.to_flat_state(state)]
        return nnx.merge(graph, nnx.from_flat_state(filled))(x, FeedForwardContext(mask)).y

    with jax.set_mesh(mesh):
        params = {path[0]: np.zeros(leaf.shape, "float32") for path, leaf in nnx.to_flat_state(state)}
        specs = {n: jax.NamedSharding(mesh, sharding.parameter_spec(n, v.ndim)) for n, v in params.items()}
        batch = jax.device_put((np.zeros((16, 8, 8), "float32"), np.ones((16, 8), bool)), sharding.batch_sharding(mesh))
        step = jax.jit(jax.grad(lambda *arguments: (update(*arguments) ** 2).sum(), argnums=(0, 1)))
        text = step.lower(jax.device_put(params, specs), *batch).compile().as_text()
    results = re.findall(r"= (.*?) all-to-all(?:-start)?\(", text)
    assert len([result for result in results if "pred" not in result]) == exchanges  # without those of masks
