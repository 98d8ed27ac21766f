"""Hash layers: equal to the oracle; tables that load the experts evenly; a run whose table is that of its text."""

import dataclasses
import json
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import StopAt, StoppedError

import mot_jax
from mot_jax import Hash, HashConfig, cli
from mot_jax.data import pipeline
from mot_jax.errors import UserError
from mot_jax.nn.feed_forward import FeedForwardContext, FeedForwardOutput
from mot_jax.nn.feed_forward.hash import balanced_table
from mot_jax.nn.transformer import bind, initial_router
from mot_jax.runs.restore import load_run
from mot_jax.training import prepare, train

B, S, D, E, F, V = 4, 6, 5, 4, 3, 9
KEY = jax.random.key(0, impl="rbg")


@dataclasses.dataclass(frozen=True)
class Case:
    """A config, and whether there is padding and a gate."""

    config: HashConfig
    masked: bool = True
    gated: bool = False


CASES = {
    "one expert, no padding": Case(HashConfig(E, F, vocab_size=V), masked=False),
    "three experts, gated, padding": Case(HashConfig(E, F, 3, vocab_size=V), gated=True),
    "two experts, shared expert, padding": Case(HashConfig(E, F, 2, shared_expert_dim=4, vocab_size=V)),
}
IDS = np.random.default_rng(5).integers(V, size=(B, S), dtype="int32")


def mask_of(seed: int) -> np.ndarray:
    """Random padding; the first sequence is padding only."""
    mask = np.random.default_rng(seed).random((B, S)) < 0.7
    mask[0], mask[1:, 0] = False, True
    return mask


@lru_cache
def abstract(case: Case, dtype: str):
    options = {"dtype": dtype, "param_dtype": dtype, "gated": case.gated}
    return nnx.split(nnx.eval_shape(lambda: Hash(D, 8, case.config, rngs=nnx.Rngs(params=KEY), **options)))


def values(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random parameters and x, and a random table."""
    rng, state = np.random.default_rng(0), abstract(case, "float32")[1]
    shapes = {"x": (B, S, D)} | {path[-1]: leaf.shape for path, leaf in nnx.to_flat_state(state)}
    table = np.array([rng.permutation(E)[: case.config.top_k] for _ in range(V)], "int32")
    return {name: rng.normal(size=shape) for name, shape in shapes.items() if name != "table"}, table


def apply(case: Case, dtype: str, p: dict, table: np.ndarray, mask=None) -> FeedForwardOutput:
    graph, state = abstract(case, dtype)
    variables = {name: jnp.asarray(value, dtype) for name, value in p.items()} | {"table": jnp.asarray(table)}
    filled = [(path, v.replace(variables[path[-1]])) for path, v in nnx.to_flat_state(state)]
    layer = nnx.merge(graph, nnx.from_flat_state(filled))
    return layer(variables["x"], FeedForwardContext(token_mask=mask, token_ids=jnp.asarray(IDS)))


def reference(name: str) -> tuple[oracle.Hash, dict[str, np.ndarray], np.ndarray]:
    case = CASES[name]
    p, table = values(case)
    layer = oracle.Hash(table, IDS, mask_of(1) if case.masked else None)
    return layer, p, np.random.default_rng(2).normal(size=(B, S, D))


@pytest.mark.parametrize("name", CASES)
def test_oracle_gradients_equal_finite_differences(name):
    layer, p, dy = reference(name)
    oracle.check_gradients(lambda p: (layer(p, dy)[0] * dy).sum(), p, layer(p, dy)[1], rtol=1e-6)


@pytest.mark.parametrize(
    "name, dtype, tolerance",
    [*((name, "float64", 1e-10) for name in CASES), ("three experts, gated, padding", "float32", 1e-5)],
)
def test_layer_equals_oracle(name, dtype, tolerance):
    """Values, every gradient and the metric."""
    layer, p, dy = reference(name)
    y, gradients, load_max = layer(p, dy)

    @jax.jit
    def step(p):
        def total(p):
            out = apply(CASES[name], dtype, p, layer.table, layer.mask)
            return (out.y * dy.astype(dtype)).sum(), out

        return jax.grad(total, has_aux=True)(p)

    with jax.enable_x64(dtype == "float64"):
        actual, out = jax.device_get(step({key: jnp.asarray(value, dtype) for key, value in p.items()}))
    assert out.y.dtype == dtype and set(out.metrics) == {"load_max"} and not out.statistics
    assert out.metrics["load_max"] == pytest.approx(load_max)
    pairs = {"y": (out.y, y)} | {key: (actual[key], gradients[key]) for key in p}
    for key, (value, expected) in pairs.items():
        assert np.abs(value - expected).max() <= tolerance * max(1.0, np.abs(expected).max()), key


# --- tables -----------------------------------------------------------------------------------------------------------


def largest_load(table: np.ndarray, counts: np.ndarray, num_experts: int) -> float:
    """The largest load of an expert by these token counts, 1 being an even share."""
    loads = np.bincount(table.ravel(), np.repeat(counts, table.shape[1]), num_experts)
    return num_experts * loads.max() / loads.sum()


def zipf(size: int, total: int = 2**22) -> np.ndarray:
    """Token counts that fall as 1 / (rank + 10), in a random order of the ids."""
    shares = 1 / (np.arange(size) + 10)
    return np.random.default_rng(0).permutation(np.round(total * shares / shares.sum()).astype(int))


@pytest.mark.parametrize("size, num_experts, top_k", [(50_257, 32, 1), (2_000, 32, 1), (2_000, 64, 4)])
def test_a_balanced_table_is_even_where_ids_modulo_experts_are_not(size, num_experts, top_k):
    counts = zipf(size)
    modulo = np.arange(size * top_k).reshape(size, top_k) % num_experts
    tables = [balanced_table(counts, num_experts, top_k, seed) for seed in range(2)]
    assert all(largest_load(table, counts, num_experts) < 1.02 for table in tables)
    assert largest_load(modulo, counts, num_experts) > 1.2
    # The layers' tables are two partitions: of the ids that share an expert in one, few share one in the other.
    first, second = (table[:1000, 0] for table in tables)
    pairs = first[:, None] == first
    assert (pairs & (second[:, None] == second)).sum() - 1000 < 0.2 * (pairs.sum() - 1000)


def test_an_id_with_more_than_an_even_share_has_its_experts_to_itself():
    """30 % of the text with 32 experts: no table is even. More experts per id divide the excess."""
    counts = zipf(2_000)
    counts[7] = round(0.3 / 0.7 * (counts.sum() - counts[7]))
    share = counts[7] / counts.sum()
    for top_k, experts in ((1, 32), (2, 32), (4, 32)):
        table = balanced_table(counts, experts, top_k, 0)
        assert largest_load(table, counts, experts) == pytest.approx(experts * share / top_k)
        others = np.delete(table, 7, axis=0)
        assert not np.isin(others, table[7]).any()
        rest = np.bincount(others.ravel(), np.repeat(np.delete(counts, 7), top_k), experts)
        rest = np.delete(rest, table[7])
        assert rest.max() < 1.02 * rest.mean()
    table = balanced_table(counts, 8, 4, 0)  # 30 % is below 4 / 8
    assert largest_load(table, counts, 8) < 1.02


@given(st.integers(0, 2**16), st.integers(1, 9), st.data())
def test_every_id_has_different_experts_whether_it_was_counted_or_not(seed, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    counts = np.random.default_rng(seed).integers(0, 4, size=40) ** 8 * (np.arange(40) < 20)
    table = balanced_table(counts, num_experts, top_k, seed)
    assert table.shape == (40, top_k) and table.dtype == np.int32 and table.min() >= 0 and table.max() < num_experts
    assert all(len(set(row)) == top_k for row in table.tolist())
    np.testing.assert_array_equal(table, balanced_table(counts, num_experts, top_k, seed))
    uncounted = np.bincount(balanced_table(np.zeros(40), num_experts, top_k, seed).ravel(), minlength=num_experts)
    assert np.ptp(uncounted) <= 1


# --- the layer as a module --------------------------------------------------------------------------------------------


def test_parameters_and_the_table_of_equal_counts():
    config = HashConfig(4, top_k=2, vocab_size=6)
    layer = nnx.jit(lambda: Hash(5, 16, config, dtype="bfloat16", rngs=nnx.Rngs(params=KEY)))()
    params = {path[-1]: value.shape for path, value in nnx.to_flat_state(nnx.state(layer, nnx.Param))}
    assert params == {"w_in": (4, 5, 8), "w_out": (4, 8, 5)}
    np.testing.assert_array_equal(layer.table[...], [[0, 1], [2, 3]] * 3)
    ids = jnp.array([[0, 1, 2], [0, 0, 0]])
    out = nnx.jit(lambda layer: layer(jnp.ones((2, 3, 5)), FeedForwardContext(token_ids=ids)))(layer)
    assert out.y.shape == (2, 3, 5) and out.y.dtype == "bfloat16" and layer.w_in.dtype == "float32"
    assert out.metrics["load_max"] == pytest.approx(4 * 5 / 12)


def test_a_layer_on_its_own_names_its_missing_arguments():
    options = {"rngs": nnx.Rngs(params=KEY)}
    with pytest.raises(UserError, match=r"vocab_size = None: must be given for a layer on its own.*; try 257$"):
        Hash(8, 16, HashConfig(4), **options)
    with pytest.raises(UserError, match=r"top_k = 5: must be at most num_experts = 4; try 1$"):
        Hash(8, 16, HashConfig(4, top_k=5, vocab_size=9), **options)
    layer = Hash(8, 16, HashConfig(4, vocab_size=9), **options)
    with pytest.raises(UserError, match=r"context.token_ids = None: must be given.*; try FeedForwardContext\(token_"):
        layer(jnp.ones((1, 2, 8)))


# --- in a training run ------------------------------------------------------------------------------------------------

TABLE = "stacks/0/0/feed_forward/table"


def test_layers_in_several_scans_have_a_table_each(tiny):
    kind = HashConfig(4, vocab_size=257)
    model = dataclasses.replace(tiny.model, feed_forward=kind, num_blocks=5, moe_blocks=(1, 2, 4))
    tables = initial_router(model, lambda: zipf(257))
    assert {name: table.shape for name, table in tables.items()} == {
        "stacks/1/0/feed_forward/table": (2, 257, 1),
        "stacks/3/0/feed_forward/table": (1, 257, 1),
    }
    for layer, table in enumerate(np.concatenate([*tables.values()])):
        np.testing.assert_array_equal(table, balanced_table(zipf(257), 4, 1, layer))
    assert initial_router(dataclasses.replace(model, moe_blocks=()), lambda: zipf(257)) == {}


@pytest.mark.slow
def test_the_table_of_a_run_is_that_of_its_text_wherever_the_run_is_read(tiny, tmp_path, monkeypatch, capsys):
    """After an interruption, in an evaluation, in generation, and in an export."""
    monkeypatch.setattr(pipeline, "COUNTED_TOKENS", 2**14)
    model = dataclasses.replace(tiny.model, feed_forward=HashConfig(8, top_k=2))
    training = dataclasses.replace(tiny.training, steps=6, validate_every=6)
    logging = dataclasses.replace(tiny.logging, tensorboard=False, sample_tokens=0)
    data = dataclasses.replace(tiny.data, validation_split="validation[:1%]")
    config = dataclasses.replace(tiny, model=model, data=data, training=training, logging=logging)
    workdir = tmp_path / "run"
    with pytest.raises(StoppedError):
        train(config, workdir, [StopAt(5)])
    monkeypatch.setattr(pipeline, "COUNTED_TOKENS", 2**8)  # other counts, were they counted again
    loss = train(config, workdir)["loss"]

    run = prepare(config, workdir)
    tokens, mask = run.windows.read(run.order.window_ids(0, 2**14 // 16))
    counts = np.bincount(tokens[:, :-1][mask], minlength=257)
    tables = np.stack([balanced_table(counts, 8, 2, layer) for layer in range(2)])
    params = load_run(workdir).params
    np.testing.assert_array_equal(params[TABLE], tables)
    assert params[TABLE].dtype == np.int32

    cli.main(["evaluate", str(workdir), "--json", str(tmp_path / "evaluated.json")])
    assert json.loads((tmp_path / "evaluated.json").read_text())["loss"] == pytest.approx(loss, rel=1e-6)
    cli.main(["export", str(workdir), "--output", str(tmp_path / "out"), "--dtype", "bfloat16"])
    np.testing.assert_array_equal(load_run(tmp_path / "out").params[TABLE], tables)

    language_model = mot_jax.load(workdir)
    assert language_model.mode == "grouped" and language_model.independent
    (continuation,) = language_model.generate(["import os"], max_tokens=6, temperature=1.0, seed=1, ends=False)
    text = np.concatenate([np.frombuffer(b"import os", np.uint8), continuation.tokens]).astype("int32")

    @jax.jit
    def log_probs(table: jax.Array) -> jax.Array:
        """Of the generated tokens, in a whole pass with this table."""
        transformer = bind(config.model, params | {TABLE: table})
        logits = transformer.logits(transformer(jnp.asarray(text[None, :-1])).hidden)
        return jax.nn.log_softmax(logits)[0, np.arange(8, 14), text[9:]]

    np.testing.assert_allclose(continuation.log_probs, log_probs(tables), atol=1e-4)
    assert np.abs(continuation.log_probs - log_probs((tables + 1) % 8)).max() > 2e-3
