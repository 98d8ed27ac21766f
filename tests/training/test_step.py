"""The training step: the same numbers on every mesh, with the collectives that the design promises and no others."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from variants import VARIANTS

from mot_jax.config import (
    Config,
    DenseConfig,
    LossWeights,
    MeshConfig,
    OptimizerConfig,
    TokenChoiceConfig,
)
from mot_jax.data.objectives import Batch, Objective
from mot_jax.data.tokenizers import ByteTokenizer
from mot_jax.data.windows import WindowBatch
from mot_jax.nn import losses, mixing, sharding
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.kernels import fused_attention
from mot_jax.nn.sharding import DEFERRABLE, local_sequences, make_mesh, place_microbatches, place_sequences
from mot_jax.nn.transformer import Transformer, bind
from mot_jax.planning import hlo
from mot_jax.planning.program import read_program
from mot_jax.runs.optimizer import learning_rate, make_optimizer
from mot_jax.runs.state import TrainState, abstract_state, create_state
from mot_jax.training import step as step_module
from mot_jax.training.step import make_eval_step, make_train_step

COLLECTIVES = ("all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute")


def batches(config: Config, count: int, values: int = 256) -> list[Batch]:
    """Learnable tokens: sequences of consecutive numbers."""
    rng = np.random.default_rng(0)
    size = (count, config.training.batch_size, 1)
    tokens = ((rng.integers(0, 256, size) + np.arange(config.model.context_length + 1)) % values).astype(np.int32)
    return [batch_of(config, rows, number) for number, rows in enumerate(tokens)]


def batch_of(config: Config, tokens: np.ndarray, number: int = 0, mask: np.ndarray | None = None) -> Batch:
    """The batch [B, S] for the model of `config`, from tokens int32 [B, S + 1]."""
    mask = np.ones_like(tokens[:, 1:], bool) if mask is None else mask
    return Objective.of(config, ByteTokenizer())(
        WindowBatch(tokens, mask), number * len(tokens) + np.arange(len(tokens))
    )


def place(mesh: jax.sharding.Mesh, config: Config, batch: Batch) -> Batch:
    """The whole batch, in microbatches, on the mesh."""
    t = config.training
    rows = local_sequences(mesh, t.batch_size, t.gradient_accumulation_steps)
    return place_microbatches(mesh, jax.tree.map(lambda x: x[rows], batch), t.batch_size, t.gradient_accumulation_steps)


@functools.cache
def initial_state(config: Config) -> TrainState:
    """The state of a run on one device, which tests on several devices place there without a compilation."""
    return jax.device_get(create_state(config, make_mesh(config, jax.devices()[:1])))


def compiled_step(config: Config):
    """(mesh, new state, compiled step)."""
    initial = initial_state(dataclasses.replace(config, mesh=MeshConfig(data=1)))
    mesh = make_mesh(config, jax.devices()[: math.prod(dataclasses.astuple(config.mesh))])
    state = jax.device_put(initial, jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh)))
    with jax.set_mesh(mesh):
        batch = place(mesh, config, batches(config, 1)[0])
        t = config.training
        train_step = make_train_step(config.model, t.optimizer, t.steps, t.losses, t.gradient_accumulation_steps)
        return mesh, state, jax.jit(train_step, donate_argnums=0).lower(state, batch).compile()


def run(config: Config, steps: int = 20, values: int = 256) -> tuple[list[dict[str, float]], str]:
    """The metrics of each step, and the compiled program."""
    mesh, state, step = compiled_step(config)
    rows = []
    for batch in batches(config, steps, values):
        placed = place(mesh, config, batch)
        with jax.transfer_guard("disallow"):  # the step itself never talks to Python
            state, metrics = step(state, placed)
        rows.append({name: float(value) for name, value in metrics.items()})
    return rows, step.as_text()


def collectives(program: str) -> Counter[str]:
    return Counter(name for name in re.findall(r" ([a-z-]+?)(?:-start)?\(", program) if name in COLLECTIVES)


@pytest.fixture(scope="module")
def one_device(tiny: Config) -> list[dict[str, float]]:
    rows, program = run(tiny)
    assert not collectives(program)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.03
    return rows


MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "expert 8": MeshConfig(data=1, expert=8),
    "data 2 x tensor 4": MeshConfig(data=2, tensor=4),
    "data 2 x fsdp 2 x expert 2": MeshConfig(data=2, fsdp=2, expert=2),
    "expert 4 x tensor 2": MeshConfig(data=1, expert=4, tensor=2),
}


def assert_close(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for row, expected_row in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(expected_row["loss"], rel=1e-5)
        assert {name: row[name] for name in expected_row} == pytest.approx(expected_row, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_twenty_steps_on_eight_devices_equal_one_device(tiny, one_device, mesh):
    rows, program = run(dataclasses.replace(tiny, mesh=mesh))
    assert_close(rows, one_device)
    counts = collectives(program)
    # The blocks are one scan: its body holds one MoT layer forward, and one backward.
    assert counts["all-to-all"] == (4 if mesh.expert > 1 else 0)
    assert bool(counts["all-gather"]) == (mesh.fsdp * mesh.tensor > 1) and not counts["collective-permute"]


def test_one_sum_has_the_metrics_of_two_also_beyond_float32():
    old = {"a": jnp.arange(6.0), "b": jnp.ones((2, 3))}
    for scale in (1.0, 1e25):  # the second one overflows the sum of the parameters' squares, not that of the changes
        new = jax.tree.map(lambda x, scale=scale: x * scale + 1, old)
        start = jax.tree.map(lambda x: x - 1, new)
        two, one = (f(new, start) for f in (step_module._rms_of_change_and_new, step_module._rms_by_one_sum))
        np.testing.assert_allclose(one, two, rtol=1e-6)
    assert np.isinf(one[1]) and np.isfinite(one[0])


def test_a_model_may_have_more_parameters_than_an_int32(tiny):
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, vocab_size=2**31 // tiny.model.d_model))
    mesh, t = make_mesh(config, jax.devices()[:1]), config.training
    state = abstract_state(config, mesh)
    assert sum(leaf.size for leaf in state.variables.values()) > 2**32
    with jax.set_mesh(mesh):
        batch = place(mesh, config, batches(config, 1)[0])
        step = make_train_step(config.model, t.optimizer, t.steps, t.losses, t.gradient_accumulation_steps)
        after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["parameter_rms"].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["one", *list(MESHES)[-2:]])
def test_programs_for_gpus_train_equally(monkeypatch, tiny, mesh):
    """Their layouts, attention, loss and metrics, executed on this device, which differ in the order of sums only."""
    model = dataclasses.replace(tiny.model, attention_kernel="xla")
    config = dataclasses.replace(tiny, model=model, mesh=MESHES.get(mesh, MeshConfig(data=1)))
    expected, _ = run(config, 3)
    monkeypatch.setattr(fused_attention, "platform", lambda: "gpu")
    for module in (losses, mixing, sharding, step_module):
        monkeypatch.setattr(module, "select_by_platform", lambda gpu, default, *operands: gpu(*operands))
    rows, _ = run(config, 3)
    assert rows != expected
    assert_close(rows, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_groups_that_span_devices_equal_one_device(tiny, grouped, mesh):
    """32 sequences in two microbatches: two sequences per device, and groups of 8; the blocks are rematerialized."""
    config, expected = grouped
    rows, program = run(dataclasses.replace(config, mesh=mesh))
    assert_close(rows, expected)
    spans, experts = 16 // math.prod(dataclasses.astuple(mesh)[:3]) < 8, mesh.expert > 1
    # Two in the forward and two in the backward pass, to the experts and back; one when recomputing. Not the mask.
    activations = [line for line in re.findall(r"= (.*) all-to-all(?:-start)?\(", program) if "pred" not in line]
    assert len(activations) == 5 * (spans + experts)


@pytest.fixture(scope="module")
def grouped(tiny: Config) -> tuple[Config, list[dict[str, float]]]:
    """A config with groups of 8, accumulation and rematerialization, and the rows of one device without these two."""
    kind = dataclasses.replace(tiny.model.feed_forward, group_size=8)
    plain = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, feed_forward=kind))
    model, training = (
        dataclasses.replace(plain.model, remat="blocks"),
        dataclasses.replace(plain.training, gradient_accumulation_steps=2),
    )
    rows = run(plain)[0]
    for row in rows:  # but for the mean of the microbatches' ratios, which is not the ratio of the batch
        row.pop("update_ratio/00"), row.pop("update_ratio/01")
    return dataclasses.replace(plain, model=model, training=training), rows


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data 8", "expert 8", "data 2 x fsdp 2 x expert 2"])
def test_gradients_are_summed_over_devices_once_a_step(tiny, mesh):
    """Of four microbatches as of one, except scales and biases; over `fsdp`, which shards them, in each microbatch."""
    training = dataclasses.replace(tiny.training, batch_size=64)
    sent = {}
    for steps in (1, 4):
        config = dataclasses.replace(
            tiny, mesh=MESHES[mesh], training=dataclasses.replace(training, gradient_accumulation_steps=steps)
        )
        on_mesh, state, step = compiled_step(config)
        program = read_program(hlo.parse(step.as_text()), dict(on_mesh.shape))
        assert not program.unknown
        sent[steps] = Counter()
        for c in program.collectives:
            sent[steps][c.kind, "fsdp" in c.axes] += c.executions * c.bytes
    elementwise = sum(x.size for name, x in state.params.items() if name.rpartition("/")[2] not in DEFERRABLE)
    scalars = 1000  # bytes of losses and metrics, a few in each layer and microbatch
    if MESHES[mesh].fsdp == 1:
        one, four = (sent[steps]["all-reduce", False] for steps in (1, 4))
        assert 0 <= four - one - 3 * 4 * elementwise <= scalars
        assert one > 5 * scalars  # summed in each microbatch, the difference would be 3 times this
    else:
        shards = sum(
            4 * math.prod(x.sharding.shard_shape(x.shape))
            for name, x in state.params.items()
            if name.rpartition("/")[2] in DEFERRABLE
        )
        assert 0 <= sent[4]["all-reduce", False] - shards <= scalars < shards


def test_metrics_equal_their_definitions(tiny):
    mesh, state, step = compiled_step(tiny)
    before = jax.device_get(state.params)
    batch = batches(tiny, 1)[0]
    state, metrics = step(state, place(mesh, tiny, batch))
    after = jax.device_get(state.params)

    def rms(tree):
        return np.sqrt(np.mean(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) ** 2))

    assert float(metrics["parameter_rms"]) == pytest.approx(rms(after), rel=1e-5)
    assert float(metrics["update_rms"]) == pytest.approx(rms(jax.tree.map(np.subtract, after, before)), rel=1e-4)
    assert float(metrics["learning_rate"]) == pytest.approx(tiny.training.optimizer.learning_rate / 4)
    assert set(metrics) >= {f"{name}/{i:02d}" for name in ("mixing_entropy", "update_ratio") for i in range(2)}

    def naive(params):
        model = bind(tiny.model, params)
        logits = model.logits(model(batch.inputs).hidden)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets).mean()

    loss, gradient = jax.jit(jax.value_and_grad(naive))(before)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["gradient_rms"]) == pytest.approx(rms(gradient), rel=1e-4)


@pytest.mark.slow
def test_the_state_is_initialized_sharded_with_its_optimizer(tiny, optimized):
    config = dataclasses.replace(tiny, mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    mesh = make_mesh(config)
    state: TrainState = create_state(config, mesh)
    cut = {
        jax.tree_util.keystr(path): leaf.size // math.prod(leaf.sharding.shard_shape(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    assert [parts for name, parts in cut.items() if "w_in" in name or "w_out" in name] == [8] * 6  # and two moments
    assert [parts for name, parts in cut.items() if "attention/" in name] == [4] * 9
    single = create_state(tiny, make_mesh(tiny, jax.devices()[:1]))
    # From jax 0.12 on, the last bit of XLA's erf_inv on a CPU depends on the shape of a shard.
    rtol = 0 if jax.__version_info__ < (0, 12) else 3e-7
    equal = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=0)
    jax.tree.map(equal, jax.device_get(state), jax.device_get(single))
    jax.tree.map(lambda a, b: None, state, abstract_state(config, mesh))


def test_evaluation_counts_targets_without_padding_and_their_bytes(tiny):
    mesh = make_mesh(tiny, jax.devices()[:1])
    state = create_state(tiny, mesh)
    tokens = np.random.default_rng(0).integers(0, 256, (32, 17)).astype(np.int32)
    tokens[:, 5] = 256
    mask = np.ones((32, 16), bool)
    mask[3, 7:] = False
    mask[4] = False
    sizes = np.array([1] * 256 + [0])
    with jax.set_mesh(mesh):
        evaluate = jax.jit(make_eval_step(tiny.model, sizes))
        batch = batch_of(tiny, tokens, mask=mask)
        nats, count, correct, size, windows = map(
            float, evaluate(state.params, state.step, place_sequences(mesh, batch, 32))
        )
        changed = tokens.copy()
        changed[4], changed[3, 8:] = 77, 78
        again = evaluate(state.params, state.step, place_sequences(mesh, batch_of(tiny, changed, mask=mask), 32))
        model = bind(tiny.model, state.params)
        likeliest = model.logits(model(batch.inputs, FeedForwardContext(mask)).hidden).argmax(axis=-1)
    assert count == mask.sum() and windows == 31
    assert size == (mask & (tokens[:, 1:] != 256)).sum()
    assert correct == (mask & (likeliest == batch.targets)).sum()
    assert float(again.nats) == nats  # bit for bit: masked targets do not count


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_learning_rate_warms_up_and_ends_at_its_fraction(warmup):
    schedule = learning_rate(OptimizerConfig(learning_rate=2.0, warmup_steps=warmup, min_lr_ratio=0.1), 100)
    values = [float(schedule(step)) for step in range(100)]
    assert max(values) == pytest.approx(2.0, rel=1e-2)
    assert values[-1] == pytest.approx(0.2)
    assert values[0] == pytest.approx(2.0 / max(warmup, 1), rel=1e-2)
    assert np.all(np.diff(values[max(warmup - 1, 0) :]) <= 0)


def test_the_optimizer_clips_the_whole_gradient():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=0.5)
    optimizer = make_optimizer(config, 10)
    gradients = {"a": np.full(4, 30.0, np.float32), "b": np.full(3, 40.0, np.float32)}
    _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
    first = optax.tree.get(state, "mu")
    assert float(optax.tree.norm(first)) == pytest.approx(0.5 * 0.1, rel=1e-5)  # (1 - beta1) of the clipped


@pytest.mark.slow
def test_losses_of_the_layers_and_the_head_are_added_by_their_weights(tiny):
    """The step's gradient is that of cross-entropy + 0.3 x mean entropy + 0.01 x (log Z)^2; `loss` has the first."""
    weights = LossWeights(mixing_entropy=0.3, head_z=0.01)
    config = dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, losses=weights))
    mesh, state, step = compiled_step(config)
    before, batch = jax.device_get(state.params), batches(config, 1)[0]
    _, metrics = step(state, place(mesh, config, batch))

    def naive(params):
        model = bind(config.model, params)
        out = model(batch.inputs, FeedForwardContext(losses=("mixing_entropy",)))
        logits = model.logits(out.hidden)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets).mean()
        z = (jax.nn.logsumexp(logits, axis=-1) ** 2).mean()
        return nats + 0.3 * sum(out.losses.values()) / 2 + 0.01 * z, nats

    gradient, nats = jax.jit(jax.grad(naive, has_aux=True))(before)
    assert float(metrics["loss"]) == pytest.approx(float(nats), rel=1e-5)
    expected = np.sqrt(np.mean(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)]) ** 2))
    assert float(metrics["gradient_rms"]) == pytest.approx(expected, rel=1e-4)


# --- skipped steps ----------------------------------------------------------------------------------------------------

POISON = 255  # a target of the microbatches whose loss or gradient is not finite


WITH_ROUTER_STATE = TokenChoiceConfig(8, None, 2, 8, 2.0, 32, 3.0, scores="sigmoid", balance="bias", bias_rate=0.01)


def poison_loss(monkeypatch, kind: str) -> None:
    """Make the loss of every microbatch with the target POISON NaN, or its gradient infinite."""
    loss_sum = Transformer.loss_sum

    def poisoned(self, hidden, targets, *rest):
        sums, bad = loss_sum(self, hidden, targets, *rest), (targets == POISON).any()
        if kind == "loss":
            factor = jnp.where(bad, jnp.nan, 1)
            return sums._replace(loss=sums.loss * factor, nats=sums.nats * factor)
        zero = jnp.where(bad, sums.loss - jax.lax.stop_gradient(sums.loss), 1)  # with the slope 1, or the constant 1
        return sums._replace(loss=sums.loss + jnp.where(bad, jnp.sqrt(zero), 0))

    monkeypatch.setattr(Transformer, "loss_sum", poisoned)


@pytest.mark.parametrize("kind, microbatches", [pytest.param("loss", 1, marks=pytest.mark.slow), ("gradient", 4)])
def test_a_step_that_is_not_finite_changes_only_counters(tiny, monkeypatch, kind, microbatches):
    """The run is that in which this update is left out, bit for bit. One bad microbatch of several is enough."""
    poison_loss(monkeypatch, kind)
    training = dataclasses.replace(tiny.training, gradient_accumulation_steps=microbatches)
    layer = WITH_ROUTER_STATE if microbatches > 1 else tiny.model.feed_forward
    config = dataclasses.replace(tiny, training=training, model=dataclasses.replace(tiny.model, feed_forward=layer))
    mesh, initial_state, step = compiled_step(config)
    bad, sequences = 2, batches(config, 5, values=128)
    targets = sequences[bad].targets.copy()
    targets[-1, 3] = POISON
    shardings, initial = jax.tree.map(lambda leaf: leaf.sharding, initial_state), jax.device_get(initial_state)

    def trained(apply_all: bool) -> tuple[TrainState, list[dict[str, float]]]:
        state, rows = jax.device_put(initial, shardings), []
        for number, batch in enumerate(sequences):
            if number == bad and not apply_all:
                state = state._replace(step=state.step + 1)
                continue
            batch = batch._replace(targets=targets) if number == bad else batch
            state, metrics = step(state, place(mesh, config, batch))
            rows.append({name: float(value) for name, value in metrics.items()})
        return jax.device_get(state), rows

    (state, rows), (expected, expected_rows) = trained(True), trained(False)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (5, 1, 0)
    jax.tree.map(np.testing.assert_array_equal, state[:3], expected[:3])
    assert len(state.router) == (microbatches > 1)
    for name, value in state.router.items():
        np.testing.assert_array_equal(value, expected.router[name])
        assert np.any(value != initial.router[name])
    skipped_row = rows.pop(bad)
    assert np.isnan(skipped_row["loss"]) == (kind == "loss") and not np.isfinite(skipped_row["gradient_rms"])
    assert (skipped_row["update_rms"], skipped_row["skipped"], skipped_row["skipped_in_a_row"]) == (0, 1, 1)
    assert skipped_row["parameter_rms"] == rows[bad - 1]["parameter_rms"]
    # The schedule counts updates; the compared run has no skipped steps, so that its metric is of the next step.
    without = [{n: v for n, v in row.items() if n not in ("skipped", "learning_rate")} for row in rows]
    assert without == [{n: row[n] for n in without[0]} for row in expected_rows]
    assert [row["learning_rate"] for row in rows] == pytest.approx(
        [float(learning_rate(training.optimizer, training.steps)(update)) for update in range(4)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "mixture_of_tokens"])
def test_skipping_adds_no_pass_over_the_state(tiny, monkeypatch, optimized, kind):
    """The compiled step reads and writes as many bytes as one without the check, up to a few scalars.

    `tests/planning/test_plan.py` has the same for a TPU.
    """
    config = tiny
    if kind == "dense":
        config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, feed_forward=DenseConfig()))

    def memory_traffic() -> float:
        return read_program(hlo.parse(compiled_step(config)[2].as_text()), {"data": 1}).hbm_bytes

    checked = memory_traffic()
    monkeypatch.setattr(step_module, "_all_finite", lambda *values: jnp.array(True))
    assert 0 <= checked - memory_traffic() < 500


# --- token choice -----------------------------------------------------------------------------------------------------


def routed(tiny: Config, factor: float | None, mesh: MeshConfig = MeshConfig(data=1)) -> Config:
    """Routing groups of two sequences; both auxiliary losses have weights."""
    kind = TokenChoiceConfig(8, None, 2, 8, factor, routing_group_tokens=32, controller_init_scale=3.0)
    training = dataclasses.replace(tiny.training, losses=LossWeights(load_balancing=0.1, router_z=0.01))
    return dataclasses.replace(
        tiny, model=dataclasses.replace(tiny.model, feed_forward=kind), training=training, mesh=mesh
    )


@pytest.fixture(scope="module")
def routed_rows(tiny):
    """The rows of one device, by capacity factor."""
    return functools.cache(lambda factor: run(routed(tiny, factor))[0])


ROUTED = {"data 2 x expert 4": MeshConfig(data=2, expert=4)}
ROUTED |= {name: MESHES[name] for name in ("data 8", "expert 8", "expert 4 x tensor 2", "fsdp 8")}


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, None])
@pytest.mark.parametrize("mesh", ROUTED)
def test_twenty_routed_steps_on_eight_devices_equal_one_device(tiny, routed_rows, mesh, factor):
    expected = routed_rows(factor)
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.03
    assert (expected[0]["dropped/00"] > 0.05) == (factor is not None)
    rows, program = run(routed(tiny, factor, ROUTED[mesh]))
    assert_close(rows, expected)
    counts, axes = collectives(program), ROUTED[mesh]
    assert not counts["collective-permute"]
    if factor is None:  # tokens are gathered along `expert`, and sums scattered
        assert not counts["all-to-all"] and bool(counts["all-gather"]) == (mesh != "data 8")
    else:  # the body of a scan holds one layer: there and back, forward and backward
        assert counts["all-to-all"] == (4 if axes.expert > 1 else 0)
        assert bool(counts["all-gather"]) == (axes.fsdp * axes.tensor > 1)


@pytest.mark.slow
def test_losses_of_token_choice_are_added_by_their_weights(tiny):
    """Its gradient is that of cross-entropy + 0.1 x mean balance + 0.01 x mean (log Z)^2; `loss` has the first."""
    config = routed(tiny, 1.0)
    mesh, state, step = compiled_step(config)
    before, batch = jax.device_get(state.params), batches(config, 1)[0]
    _, metrics = step(state, place(mesh, config, batch))

    def naive(params):
        model = bind(config.model, params)
        out = model(batch.inputs, FeedForwardContext(losses=("load_balancing", "router_z")))
        nats = optax.softmax_cross_entropy_with_integer_labels(model.logits(out.hidden), batch.targets).mean()
        balance, z = (out.losses[f"{name}/00"] + out.losses[f"{name}/01"] for name in ("load_balancing", "router_z"))
        return nats + 0.1 * balance / 2 + 0.01 * z / 2, nats

    gradient, nats = jax.jit(jax.grad(naive, has_aux=True))(before)
    assert float(metrics["loss"]) == pytest.approx(float(nats), rel=1e-5)
    expected = np.sqrt(np.mean(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)]) ** 2))
    assert float(metrics["gradient_rms"]) == pytest.approx(expected, rel=1e-4)


# --- every variant ----------------------------------------------------------------------------------------------------

ON_EIGHT_DEVICES = ("common base", "learnable temperature, per expert", "several")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns(tiny, name):
    """Twenty steps, a masked model where groups are within sequences; every loss and metric stays finite.

    Some of them on eight devices, on which `tests/nn/feed_forward/test_variants.py` has every layer with its gradients.
    """
    mixing = VARIANTS[name]
    if mixing.annealing != "none":
        mixing = dataclasses.replace(mixing, annealing_steps=(5, 15))  # the last steps are at temperature 0
    kind = dataclasses.replace(tiny.model.feed_forward, mixing=mixing)
    model = dataclasses.replace(tiny.model, feed_forward=kind)
    if mixing.groups == "within":
        model = dataclasses.replace(model, objective="masked", vocab_size=258)
    optimizer = dataclasses.replace(tiny.training.optimizer, learning_rate=1e-2)
    training = dataclasses.replace(tiny.training, optimizer=optimizer)
    mesh = MeshConfig(data=2, expert=4) if name in ON_EIGHT_DEVICES else MeshConfig(data=1)
    rows, _ = run(dataclasses.replace(tiny, model=model, training=training, mesh=mesh), values=16)
    assert all(np.isfinite(value) for row in rows for value in row.values())
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.5, losses


@pytest.mark.slow
@pytest.mark.parametrize("case", ["entropy loss", "granularity below 1"])
def test_an_entropy_loss_and_a_low_granularity_train_too(tiny, case):
    """With an entropy loss, weights become decided as the loss falls; without, they do not."""
    weight, experts = {"entropy loss": (3.0, 8), "granularity below 1": (0.0, 2)}[case]
    model = dataclasses.replace(
        tiny.model, feed_forward=dataclasses.replace(tiny.model.feed_forward, num_experts=experts)
    )
    optimizer = dataclasses.replace(tiny.training.optimizer, learning_rate=1e-2)
    training = dataclasses.replace(tiny.training, optimizer=optimizer, losses=LossWeights(mixing_entropy=weight))
    rows, _ = run(dataclasses.replace(tiny, model=model, training=training), values=16)
    losses, entropies = ([row[name] for row in rows] for name in ("loss", "mixing_entropy/00"))
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.5, losses
    assert (entropies[-1] < entropies[0] - 0.1) == bool(weight), entropies
