"""The layer of experts with thresholds: equal to the oracle in both phases, thresholds are moving averages."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from mot_jax import Config, ExpertThreshold, ExpertThresholdConfig, ModelConfig
from mot_jax.config import TrainingConfig, check
from mot_jax.errors import UserError
from mot_jax.modes import default_mode, enter
from mot_jax.nn import routing
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.feed_forward.expert_threshold import choose_along_batch, upper_quantiles
from mot_jax.training.evaluation import evaluated_config

B, S, D, E, F, T, G = 6, 4, 5, 4, 3, 8, 3
KEY = jax.random.key(0, impl="rbg")
THRESHOLDS = np.array([-0.5, 0.0, 0.5, 1.0])


@dataclasses.dataclass(frozen=True)
class Case:
    """A config, the step (None: not in training), and whether there is padding and a gate."""

    config: ExpertThresholdConfig
    step: int | None
    masked: bool = True
    gated: bool = False


def config(capacity_factor: float | None, shared_expert_dim: int = 0, top_k: int = 2) -> ExpertThresholdConfig:
    return ExpertThresholdConfig(E, F, top_k, shared_expert_dim, capacity_factor, T, G, warmup_steps=10)


CASES = {
    "warmup, drops": Case(config(0.5), 9),
    "warmup, gated, no padding": Case(config(2.0, top_k=1), 0, masked=False, gated=True),
    "thresholds, drops": Case(config(0.5), 10),
    "thresholds, shared expert, no padding": Case(config(2.0, 4), 10, masked=False),
    "thresholds, unlimited": Case(config(None), 10, gated=True),
    "inference": Case(config(0.5, 4), None),
}


def mask_of(seed: int) -> np.ndarray:
    """Random padding; the first routing group is padding only."""
    mask = np.random.default_rng(seed).random((B, S)) < 0.7
    mask[:2] = False
    return mask


@lru_cache
def abstract(case: Case, dtype: str):
    options = {"dtype": dtype, "param_dtype": dtype, "gated": case.gated}
    layer = nnx.eval_shape(lambda: ExpertThreshold(D, 8, case.config, rngs=nnx.Rngs(params=KEY), **options))
    return nnx.split(layer, nnx.Param, ...)


def values(case: Case) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"x": (B, S, D)} | {path[-1]: v.shape for path, v in nnx.to_flat_state(abstract(case, "float32")[1])}
    return {name: np.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def reference(name: str) -> tuple[oracle.ExpertThreshold, dict[str, np.ndarray], np.ndarray]:
    case = CASES[name]
    capacity = None
    if case.step is not None and case.config.capacity_factor is not None:
        capacity = round(case.config.capacity_factor * T * case.config.top_k / E)
    layer = oracle.ExpertThreshold(
        case.config.top_k,
        T,
        capacity,
        None if name.startswith("warmup") else THRESHOLDS,
        G,
        {1: 1, 2: 2}[case.config.top_k],  # of 0.75 and 1.5 tokens, rounded
        mask_of(1) if case.masked else None,
    )
    return layer, values(case), np.random.default_rng(2).normal(size=(B, S, D))


@pytest.mark.parametrize("name", CASES)
def test_oracle_gradients_equal_finite_differences(name):
    layer, p, dy = reference(name)
    oracle.check_gradients(lambda p: (layer(p, dy)[0] * dy).sum(), p, layer(p, dy)[1])


@pytest.mark.parametrize(
    "name, dtype, tolerance", [*((n, "float64", 1e-10) for n in CASES), ("thresholds, drops", "float32", 1e-4)]
)
def test_layer_equals_oracle(name, dtype, tolerance):
    """Values, every gradient, metrics and quantiles."""
    (layer, p, dy), case = reference(name), CASES[name]
    y, gradients, metrics, quantiles = layer(p, dy)
    assert (metrics["dropped"] > 0.1) == ("drops" in name) and metrics["experts_per_token"] > 0.9
    with jax.enable_x64(dtype == "float64"):
        graph, params, router = abstract(case, dtype)

    @jax.jit
    def step(p, step):
        def total(p):
            filled = [(path, v.replace(p[path[-1]])) for path, v in nnx.to_flat_state(params)]
            state = {"quantile_average": THRESHOLDS * (1 - 0.99**3), "num_updates": 3}
            states = [
                (path, v.replace(jnp.asarray(state[path[-1]], "float32"))) for path, v in nnx.to_flat_state(router)
            ]
            module = nnx.merge(graph, nnx.from_flat_state(filled), nnx.from_flat_state(states))
            out = module(p["x"], FeedForwardContext(layer.mask, step=step, train=step is not None))
            return (out.y * dy.astype(dtype)).sum(), out

        return jax.grad(total, has_aux=True)(p)

    with jax.enable_x64(dtype == "float64"):
        number = None if case.step is None else jnp.int32(case.step)
        actual, out = jax.device_get(step({key: jnp.asarray(value, dtype) for key, value in p.items()}, number))
    assert out.y.dtype == dtype and set(out.metrics) == set(metrics)
    pairs = {"y": (out.y, y)} | {key: (actual[key], gradients[key]) for key in p}
    pairs |= {key: (out.metrics[key], metrics[key]) for key in metrics}
    for key, (value, expected) in pairs.items():
        assert np.abs(value - expected).max() <= tolerance * max(1.0, np.abs(expected).max()), key
    if case.step is None:
        assert out.statistics == {}
    else:
        mean = out.statistics["quantiles"] / out.statistics["groups"]
        np.testing.assert_allclose(mean, quantiles, rtol=1e-5)
        assert out.statistics["quantiles"].dtype == np.float32


# --- thresholds -------------------------------------------------------------------------------------------------------


def test_thresholds_are_the_corrected_moving_average_of_quantiles():
    """As Adam's moments; a step without tokens changes nothing, and neither does the number of routing groups."""
    layer = ExpertThreshold(D, 8, config(None), rngs=nnx.Rngs(params=KEY))
    router = {"quantile_average": jnp.zeros((2, E)), "num_updates": jnp.zeros(2)}
    steps = np.random.default_rng(0).normal(size=(5, 2, E))
    for quantiles, groups in zip(steps, (1, 2, 0, 4, 8), strict=True):
        statistics = {"quantiles": jnp.asarray(groups * quantiles), "groups": jnp.full(2, groups)}
        router = ExpertThreshold.update_router(layer.config, router, statistics)
    weights = 0.99 ** np.array([3, 2, 1, 0])
    expected = np.tensordot(weights / weights.sum(), steps[[0, 1, 3, 4]], 1)
    np.testing.assert_array_equal(router["num_updates"], 4)
    assert not layer.thresholds().any()
    for block in range(2):
        layer.quantile_average[...], layer.num_updates[...] = (value[block] for value in router.values())
        np.testing.assert_allclose(layer.thresholds(), expected[block], rtol=1e-5)


def test_quantiles_of_padded_groups():
    logits = jnp.asarray(np.random.default_rng(0).permutation(3 * 8 * 4).reshape(3, 8, 4), "float32")
    mask = np.ones((3, 8), bool)
    mask[0, 5:], mask[1] = False, False
    quantiles, valid = upper_quantiles(logits, 1, 4, jnp.asarray(mask))
    np.testing.assert_array_equal(valid, [True, False, True])
    for group, count in ((0, 5), (2, 8)):  # the second largest of 5 and of 8
        np.testing.assert_array_equal(quantiles[group], np.sort(logits[group, :count], axis=0)[-2])


def test_equal_logits_go_to_the_first_tokens_in_the_warmup():
    mask = jnp.arange(6)[:, None] != 3
    taken = choose_along_batch(jnp.zeros((6, 1, 2)), 3, 2, mask)
    np.testing.assert_array_equal(taken[:, 0, 0], [True, True, False, False, True, True])


def test_slots_are_filled_in_token_order():
    chosen = jnp.asarray([[[1, 0], [1, 1], [1, 1], [0, 1]]], bool)
    slots = routing.fill_slots(chosen, routing.earlier_tokens(chosen), 2)
    np.testing.assert_array_equal(slots.of_assignment[0], [[0, 4], [1, 2], [4, 3], [4, 4]])
    np.testing.assert_array_equal(slots.of_slot[0], [[0, 2], [3, 5]])
    np.testing.assert_array_equal(slots.of_token[0], [[0, 4], [1, 2], [3, 4], [4, 4]])
    assert slots.most == 2


def test_slots_are_filled_position_by_position_in_the_warmup():
    """Of two sequences of two tokens, the second token of the first one is after the first token of the second."""
    chosen = jnp.asarray([[[1, 0], [1, 1], [1, 1], [0, 1]]], bool)
    place = routing.tokens_at_earlier_positions(chosen, length=2)
    np.testing.assert_array_equal(jnp.where(chosen, place, -1)[0], [[0, -1], [2, 1], [1, 0], [-1, 2]])


# --- configs ----------------------------------------------------------------------------------------------------------


def test_default_widths_cost_the_flops_of_the_dense_layer():
    for kind in (ExpertThresholdConfig(), ExpertThresholdConfig(top_k=2), ExpertThresholdConfig(shared_expert_dim=24)):
        assert kind.top_k * kind.hidden_dim(1024) + kind.shared_dim(1024) == 1024
    assert ExpertThresholdConfig().shared_dim(1024) == 512 and ExpertThresholdConfig(expert_dim=40).shared_dim(96) == 40


def test_sequences_are_independent_after_training():
    """The warmup needs groups, of which batches consist; validation is on the same windows without them."""
    trained = Config(ModelConfig(feed_forward=ExpertThresholdConfig(group_size=8, routing_group_tokens=512)))
    assert trained.group_size == trained.model.group_size == 8 and default_mode(trained)[0] == "grouped"
    for changed in (evaluated_config(trained), enter("grouped", trained, {}, 0)[0]):
        assert changed.group_size == 8 and changed.model.group_size == changed.model.sequences_per_routing_group == 1
        assert changed.model.feed_forward.capacity_factor is None
        check(changed)
    resolved = trained.model.feed_forward.for_training(1000)
    assert resolved.warmup_steps == 200 and resolved.for_training(50) == resolved


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"top_k": 5}, r"top_k = 5: must be at most model.feed_forward.num_experts = 4; try 1"),
        ({"shared_expert_dim": 1024}, r"shared_expert_dim = 1024: must be below model.d_ff = 1024; try 256"),
        ({"top_k": 3, "shared_expert_dim": 0}, r"top_k = 3: must divide d_ff - shared_expert_dim = 1024; try 2"),
        ({"routing_group_tokens": 300}, r"routing_group_tokens = 300: must divide model.context_length = 256"),
        ({"group_size": 3, "routing_group_tokens": 512}, r"group_size = 3: must divide the 2 sequences .*; try 2"),
        ({"warmup_steps": -1}, r"warmup_steps = -1: must be at least 0"),
    ],
)
def test_errors_of_configs(fields, error):
    kind = ExpertThresholdConfig(**{"num_experts": 4, "group_size": 8} | fields)
    with pytest.raises(UserError, match=error):
        check(Config(ModelConfig(feed_forward=kind), training=TrainingConfig(batch_size=48)))
