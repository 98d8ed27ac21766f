"""The ReLU-routing layer: equal to the oracle; its loss is a mean over the batch, its sparsity reaches the target."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx

import mot_jax
from mot_jax import Config, ModelConfig, ReluRouting, ReluRoutingConfig
from mot_jax.config import LossWeights, TrainingConfig, check
from mot_jax.errors import UserError
from mot_jax.nn.feed_forward import FeedForwardContext, FeedForwardOutput, RouterState

B, S, D, E, F = 4, 6, 5, 4, 3
KEY = jax.random.key(0, impl="rbg")


@dataclasses.dataclass(frozen=True)
class Case:
    """A config, and whether there is padding and a gate of the hidden layer."""

    config: ReluRoutingConfig
    masked: bool = True
    gated: bool = False


CASES = {
    "no padding": Case(ReluRoutingConfig(E, F), masked=False),
    "two experts, shared expert, padding": Case(ReluRoutingConfig(E, F, top_k=2, shared_expert_dim=4)),
    "gated, padding": Case(ReluRoutingConfig(E, F), gated=True),
}
PADDED = "gated, padding"


def mask_of(seed: int) -> np.ndarray:
    """Random padding; the first sequence is padding only."""
    mask = np.random.default_rng(seed).random((B, S)) < 0.7
    mask[0] = False
    return mask


@lru_cache
def abstract(case: Case, dtype: str):
    options = {"dtype": dtype, "param_dtype": dtype, "gated": case.gated}
    return nnx.split(nnx.eval_shape(lambda: ReluRouting(D, 8, case.config, rngs=nnx.Rngs(params=KEY), **options)))


def values(case: Case) -> dict[str, np.ndarray]:
    """x, parameters and router state."""
    rng, state = np.random.default_rng(0), abstract(case, "float32")[1]
    shapes = {"x": (B, S, D)} | {path[-1]: leaf.shape for path, leaf in nnx.to_flat_state(state)}
    router = {"l1_weight": np.array(0.25), "load": np.array([0.5, 3, 0, 1])}
    return {name: np.asarray(rng.normal(size=shape)) for name, shape in shapes.items()} | router


def apply(case: Case, dtype: str, p: dict, context: FeedForwardContext) -> FeedForwardOutput:
    graph, state = abstract(case, dtype)
    filled = [(path, v.replace(jnp.asarray(p[path[-1]], v.get_value().dtype))) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))(jnp.asarray(p["x"], dtype), context)


def reference(name: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]:
    case = CASES[name]
    return values(case), np.random.default_rng(2).normal(size=(B, S, D)), mask_of(1) if case.masked else None


@pytest.mark.parametrize("name", CASES)
def test_oracle_gradients_equal_finite_differences(name):
    p, dy, mask = reference(name)
    layer = oracle.ReluRouting(mask)

    def total(p: dict) -> float:
        y, loss, _, _ = layer(p, dy)
        return (y * dy).sum() + loss

    oracle.check_gradients(total, p, layer(p, dy)[2])


@pytest.mark.parametrize("name, dtype, tolerance", [*((n, "float64", 1e-10) for n in CASES), (PADDED, "float32", 1e-4)])
def test_layer_equals_oracle(name, dtype, tolerance):
    """Values, the loss, every gradient and the metrics."""
    p, dy, mask = reference(name)
    y, loss, gradients, metrics = oracle.ReluRouting(mask)(p, dy)
    router = {key: p[key] for key in ("l1_weight", "load")}

    @jax.jit
    def step(p):
        def total(p):
            out = apply(CASES[name], dtype, p | router, FeedForwardContext(mask, losses=("relu_l1",)))
            return (out.y * dy.astype(dtype)).sum() + out.losses["relu_l1"], out

        return jax.grad(total, has_aux=True)(p)

    with jax.enable_x64(dtype == "float64"):
        params = {key: jnp.asarray(p[key], dtype) for key in gradients}
        actual, out = jax.device_get(step(params))
    assert out.y.dtype == dtype and set(out.metrics) == set(metrics) and not out.statistics
    pairs = {"y": (out.y, y), "relu_l1": (out.losses["relu_l1"], loss)}
    pairs |= {key: (actual[key], gradients[key]) for key in gradients}
    pairs |= {key: (out.metrics[key], metrics[key]) for key in metrics}
    for key, (value, expected) in pairs.items():
        scale = max(1.0, np.abs(expected).max())
        bound = max(tolerance, 1e-6) if key in ("experts_per_token", "load_max") else tolerance  # counts are in float32
        assert np.abs(value - expected).max() <= bound * scale, key


def test_parts_of_a_batch_have_losses_and_statistics_that_add_up():
    """Those of sequences with different numbers of tokens, to the loss and the counts of the batch."""
    case, (p, _, mask) = CASES[PADDED], reference(PADDED)

    @jax.jit
    def of(x, mask, counts):
        return apply(
            case, "float32", p | {"x": x}, FeedForwardContext(mask, None, None, None, None, ("relu_l1",), counts, True)
        )

    whole = of(p["x"], mask, None)
    counts = {"relu_l1": mask.sum()}
    parts = [of(p["x"][half], mask[half], counts) for half in (slice(2), slice(2, 4))]
    added = jax.tree.map(lambda *a: sum(a), *((part.losses, part.statistics) for part in parts))
    for value, expected in zip(*map(jax.tree.leaves, (added, (whole.losses, whole.statistics))), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(
        whole.statistics["active"], (mask[..., None] & (p["x"] @ p["controller"] > 0)).sum((0, 1))
    )
    assert whole.statistics["tokens"] == mask.sum()


# --- the weight of the loss -------------------------------------------------------------------------------------------


def test_one_weight_for_all_layers_follows_their_mean_sparsity():
    config = ReluRoutingConfig(4, top_k=1)  # the target is a quarter of 2 x 4 x 10 gates: 20
    for second_layer, factor in (([2.0, 3, 2, 4], 1.2), ([2.0, 3, 2, 3], 1 / 1.2)):
        statistics = {"active": jnp.array([[10.0, 0, 0, 0], second_layer]), "tokens": jnp.array([10.0, 10])}
        router = {"l1_weight": jnp.full(2, 0.5), "load": jnp.ones((2, 4))}
        updated = ReluRouting.update_router(config, router, statistics)
        np.testing.assert_allclose(updated["l1_weight"], [0.5 * factor] * 2, rtol=1e-6)
        np.testing.assert_allclose(updated["load"], np.array([[10, 0, 0, 0], second_layer]) / 2.5, rtol=1e-6)


def test_layers_in_a_model_of_your_own_are_updated_together():
    """The second layer by itself would lower its weight; both layers raise it."""
    config = ReluRoutingConfig(4, top_k=1, l1_weight=0.5)
    layers = [ReluRouting(2, 2, config, rngs=nnx.Rngs(0)) for _ in range(2)]
    active, tokens = jnp.array([[10.0, 9, 8, 7], [1, 2, 3, 4]]), jnp.array(10.0)
    mot_jax.update_router_state(layers, [{"active": of_layer, "tokens": tokens} for of_layer in active])
    for layer, of_layer in zip(layers, active, strict=True):
        assert layer.l1_weight[...] == pytest.approx(0.6)
        np.testing.assert_allclose(layer.load[...], of_layer / 2.5, rtol=1e-6)


@pytest.mark.parametrize("active, limit", [(10.0, 1e6), (0.0, 1e-12)])
def test_the_weight_stays_finite_and_above_zero(active, limit):
    config = ReluRoutingConfig(4, l1_factor=1e30)
    router = {"l1_weight": jnp.full(1, 1e-8), "load": jnp.ones((1, 4))}
    statistics = {"active": jnp.full((1, 4), active), "tokens": jnp.full(1, 10.0)}
    for _ in range(3):
        router = ReluRouting.update_router(config, router, statistics)
    np.testing.assert_allclose(router["l1_weight"], limit, rtol=1e-6)


def test_the_number_of_experts_per_token_reaches_its_target():
    """The mean over steps, from about half of eight; the training continues to fit its targets."""
    config = ReluRoutingConfig(8, 4, top_k=1, controller_init_scale=3.0)
    layer = nnx.jit(lambda: ReluRouting(16, 8, config, rngs=nnx.Rngs(params=KEY)))()
    graph, params, router = nnx.split(layer, nnx.Param, RouterState)
    x = np.random.default_rng(0).normal(size=(32, 16, 16)).astype("float32")
    x[..., :4] = 1  # from which the controller can shift all logits of an expert
    optimizer = optax.adam(1e-2)

    def loss(params, router):
        out = nnx.merge(graph, params, router)(x, FeedForwardContext(losses=("relu_l1",), train=True))
        error = jnp.square(out.y - jnp.sin(2 * x)).mean()
        return error + out.losses["relu_l1"], (out.metrics | {"error": error}, out.statistics)

    def step(carry, _):
        params, router, state = carry
        gradients, (metrics, statistics) = jax.grad(loss, has_aux=True)(params, router)
        stacked = jax.tree.map(lambda a: a[None], (nnx.to_pure_dict(router), statistics))
        nnx.replace_by_pure_dict(router, jax.tree.map(lambda a: a[0], ReluRouting.update_router(config, *stacked)))
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), router, state), metrics

    carry = (params, router, optimizer.init(params))
    metrics = jax.device_get(jax.jit(lambda carry: jax.lax.scan(step, carry, length=400)[1])(carry))
    assert metrics["experts_per_token"][:10].mean() > 2.8
    assert metrics["experts_per_token"][-200:].mean() == pytest.approx(1, abs=0.24)
    assert metrics["l1_weight"][0] == pytest.approx(1e-8) and 1e-3 < metrics["l1_weight"][-200:].mean() < 10
    assert metrics["error"][-200:].mean() < 0.8 * metrics["error"][0]


# --- the layer and its config -----------------------------------------------------------------------------------------


def test_parameters_and_initial_state():
    config = ReluRoutingConfig(8, top_k=2, shared_expert_dim=6)
    layer = nnx.jit(lambda: ReluRouting(5, 10, config, dtype="bfloat16", rngs=nnx.Rngs(params=KEY)))()
    shapes = {name: getattr(layer, name).shape for name in ("controller", "w_in", "w_out")}
    assert shapes == {"controller": (5, 8), "w_in": (8, 5, 2), "w_out": (8, 2, 5)}  # 2 x 2 = 10 - 6
    assert float(layer.l1_weight[...]) == pytest.approx(1e-8) and (layer.load[...] == 1).all()
    out = nnx.jit(lambda layer: layer(jnp.ones((2, 3, 5))))(layer)
    assert out.y.shape == (2, 3, 5) and out.y.dtype == "bfloat16" and not out.losses and not out.statistics


@pytest.mark.parametrize(
    "fields, error",
    [
        ({"top_k": 64}, "top_k = 64: must be at most model.feed_forward.num_experts = 32; try 1"),
        ({"top_k": 3}, "top_k = 3: must divide d_ff - shared_expert_dim = 1024; try 2"),
        ({"l1_factor": 0.5}, "l1_factor = 0.5: must be at least 1; try 1"),
        ({"l1_weight": 0.0}, "l1_weight = 0.0: must be at least 1e-12; try 1"),
    ],
)
def test_each_error_is_one_line(fields, error):
    with pytest.raises(UserError) as raised:
        check(Config(ModelConfig(feed_forward=ReluRoutingConfig(**fields))))
    assert raised.value.faults == (f"model.feed_forward.{error}",)


def test_the_loss_has_a_weight_by_default():
    kind = ReluRoutingConfig()
    assert LossWeights().of_layers(kind) == {"relu_l1": 1.0} and not LossWeights(relu_l1=0).of_layers(kind)
    check(Config(ModelConfig(feed_forward=kind), training=TrainingConfig(losses=LossWeights(relu_l1=0.5))))
