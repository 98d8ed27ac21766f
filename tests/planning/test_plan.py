"""Plans of small steps: for local CPU devices, and with libtpu ahead of time for TPUs."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from mot_jax.cli import main
from mot_jax.config import (
    Config,
    DenseConfig,
    MeshConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TokenChoiceConfig,
    TrainingConfig,
)
from mot_jax.cost.hardware import HARDWARE, parse_topology, peak_flops
from mot_jax.cost.parameters import count_parameters
from mot_jax.errors import UserError
from mot_jax.planning import hlo
from mot_jax.planning import plan as module
from mot_jax.planning.plan import Plan, _advice, plan_training
from mot_jax.planning.program import Program, read_program
from mot_jax.planning.times import StepTimes, model_times
from mot_jax.training import step as step_module

LIBTPU = ("0.0.42", "0.0.50")  # other versions may compile the same program to other collectives
INSTALLED = ""
with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    INSTALLED = importlib.metadata.version("libtpu")
needs_libtpu = pytest.mark.skipif(
    not INSTALLED.startswith(LIBTPU), reason=f"needs libtpu {' or '.join(LIBTPU)}, installed is {INSTALLED or 'none'}"
)


def small_config(kind=DenseConfig(), **mesh: int) -> Config:
    """One block of d_model 64, with batches of 16 sequences of 32 tokens."""
    model = ModelConfig(num_blocks=1, d_model=64, d_ff=128, context_length=32, feed_forward=kind, loss_chunk=32)
    return Config(model=model, training=TrainingConfig(batch_size=16), mesh=MeshConfig(**mesh))


def collective_bytes(result, kind: str, *axes: str) -> float:
    """Bytes per step of the collectives of a kind."""
    collectives = [c for c in result.program.collectives if c.kind == kind and (not axes or c.axes == axes)]
    return sum(c.executions * c.bytes for c in collectives)


def test_a_data_parallel_step_reduces_its_gradients_once():
    config = small_config(data=8)
    progress_lines: list[str] = []
    result = plan_training(config, "local:8", progress=progress_lines.append)
    parameters = sum(count_parameters(config.model).values())
    # Float32 gradients, and a few sums of scalars.
    assert 4 * parameters <= collective_bytes(result, "all-reduce", "data") <= 4 * parameters + 100
    assert {c.kind for c in result.program.collectives} == {"all-reduce"}
    assert result.memory["parameters"] == 4 * parameters
    assert 8 * parameters <= result.memory["optimizer"] <= 8 * parameters + 100
    assert result.memory["arguments"] == pytest.approx(12 * parameters + 2 * 32 * (4 + 4 + 1 + 1), abs=100)
    assert 1.0 <= result.program.flops / result.model_flops < 1.2  # includes recomputation
    assert result.fits and result.times is None and len(progress_lines) == 3
    content = json.loads(json.dumps(result.to_dict()))["program"]
    assert content["flops"] == result.program.flops and content["collectives"][0]["group_size"] == 8
    assert any("all-reduce over data" in line for line in result.lines())


@pytest.mark.slow
def test_experts_need_four_all_to_alls_per_layer():
    kind = MixtureOfTokensConfig(group_size=4, num_experts=8, save_for_backward="all")
    config = small_config(kind, data=2, expert=2)
    result = plan_training(config, "local:4")
    # A chip has 16 / 4 / 4 = 1 group, whose 32 x E mixtures of 64 floats are exchanged twice forward, twice backward.
    assert collective_bytes(result, "all-to-all", "expert") == 4 * (1 * 32 * 8 * 64) * 4
    experts = count_parameters(config.model)["experts"]
    assert collective_bytes(result, "all-reduce", "data") == 4 * experts / 2


@pytest.mark.slow
def test_without_a_capacity_experts_on_more_chips_compute_no_less_and_the_plan_states_it():
    flops, notes = {}, {}
    for factor in (1.0, None):
        kind = TokenChoiceConfig(4, capacity_factor=factor, routing_group_tokens=32)
        result = plan_training(small_config(kind, expert=4), "local:4")
        flops[factor], notes[factor] = result.program.flops, [line for line in result.lines() if "computation" in line]
    assert not notes[1.0] and len(notes[None]) == 1 and "mesh.expert = 4: token_choice" in notes[None][0]
    experts = 3 * 4 * 64 * 128 * 16 * 32 / 4  # FLOPs of a chip's share, forward and backward
    assert flops[None] - flops[1.0] > 2.5 * experts


def test_a_mesh_that_leaves_chips_idle_is_refused():
    with pytest.raises(UserError, match=r"idle; try --mesh.data -1"):
        plan_training(small_config(data=2), "local:8")


def test_without_libtpu_its_installation_is_suggested(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'"):
        plan_training(small_config(data=4), "v5e:2x2")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_live_temporaries_on_a_tpu():
    """Equal to all temporaries if those are allocated without gaps; arguments and results are not included."""
    chip = SingleDeviceSharding(module.devices_of(parse_topology("v5p:2x2x1"))[0])
    x = jax.ShapeDtypeStruct((8192, 8192), "float32", sharding=chip)

    def run(x):
        return (jnp.tanh(x @ x) @ x) @ (x @ x), x + 1

    for donated, outputs in ((None, 2), (0, 1)):
        compiled = jax.jit(run, out_shardings=chip, donate_argnums=donated).lower(x).compile()
        memory = module._program_bytes(compiled.memory_analysis(), None, "tpu")
        assert memory["other outputs and code"] == pytest.approx(outputs * 2**28, abs=2**22)
        assert memory["in use at once"] == memory["temporaries"] > 2**26
        assert "in use at once" not in module._program_bytes(compiled.memory_analysis(), None, "cpu")


@pytest.mark.parametrize(
    "message, needed, limit",
    [
        ("RESOURCE_EXHAUSTED: … HLO temporaries (24.50G) exceeds available HBM (15.75G).", 24.5 * 2**30, 15.75 * 2**30),
        ("RESOURCE_EXHAUSTED: … Used 17.5G of 512.00M hbm. Exceeded …", 17.5 * 2**30, 2**29),
        ("RESOURCE_EXHAUSTED: something else", None, 7.0),
    ],
)
def test_the_compilers_message_about_a_program_that_does_not_fit(message, needed, limit):
    assert module._refused_bytes(message, 7.0) == {"needed": needed, "HBM limit": limit}


def test_the_command_line(capsys, tmp_path, monkeypatch):
    def run(*flags: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main(["plan", "configs/demo.py:dense", *flags])
        return stop.value.code

    assert run() == 2 and "--topology is missing; known: v4" in capsys.readouterr().err
    assert run("--topology", "v9:2x2") == 2 and "no such topology" in capsys.readouterr().err
    assert run("--topology", "v5e:2x2", "--slices", "none") == 2 and "--slices" in capsys.readouterr().err

    def does_not_fit(config, topology, slices, progress, products):
        assert products == "cublas"
        progress(f"{topology} {slices} {config.model.d_model}")
        memory = {"needed": 2.0**31, "HBM limit": None}
        return Plan(
            *(topology, "TPU v5", 8, slices, {"data": 8}, 1.0, memory, False, [(2.0**20, "float32[4]")]),
            *(["more chips"], 1.0, None, None, None),
        )

    monkeypatch.setattr(module, "plan_training", does_not_fit)
    flags = ["--slices", "2", "--products", "cublas", "--model.d-model", "32", "--json", str(tmp_path / "plan.json")]
    assert run("--topology", "v5p:2x2x1", *flags) == 1
    output = capsys.readouterr().out
    assert all(text in output for text in ("v5p:2x2x1 2 32", "2.000", "unknown", "float32[4]", "more chips"))
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is False


def test_times_that_lack_a_kernel_are_lower_bounds_without_an_mfu():
    def report(unknown, efficiency):
        program = Program((), (), unknown)
        times = StepTimes(0.1, 0.0, {}, 0.1, 0.1, "compute", "compute")
        plan = Plan("v5e:2x2", "TPU", 4, 1, {}, 1.0, {}, True, [], [], 1.0, program, times, efficiency)
        return "\n".join(plan.lines())

    assert "without overlap  100.00 ms, roofline MFU 50.0%" in report((), (0.5, 0.5))
    output = report(("FLOPs of the custom call splash",), None)
    assert "without overlap  at least 100.00 ms; largest" in output and "MFU" not in output


def test_changes_that_reduce_memory_are_valid_for_the_config(mesh_of):
    """Half of 32 sequences is not a whole group of 32, and a dense model has no experts to shard."""
    config = small_config()
    mixture = dataclasses.replace(config.model, feed_forward=MixtureOfTokensConfig(32, 32))
    training = dataclasses.replace(config.training, batch_size=32)
    advice = _advice(dataclasses.replace(config, model=mixture, training=training), mesh_of(data=1))
    assert any("--mesh.expert" in line for line in advice) and not any("batch-size" in line for line in advice)
    dense = dataclasses.replace(config.model, feed_forward=DenseConfig())
    config = dataclasses.replace(config, model=dense, training=training)
    advice = _advice(config, mesh_of(data=1))
    assert not any("--mesh.expert" in line for line in advice) and "--training.batch-size 16" in advice
    eight = dataclasses.replace(config, training=dataclasses.replace(training, batch_size=8))
    assert not any("batch-size" in line for line in _advice(eight, mesh_of(data=8)))  # no sequence for half of them


@pytest.mark.parametrize(
    ("attention", "kernel", "line"),
    [
        ("splash", "xla", "model.attention_kernel = 'splash'"),
        ("auto", "fused_mixture", "model.feed_forward.kernel = 'fused_mixture'"),
    ],
)
def test_a_kernel_that_needs_more_than_a_core_has_is_named(monkeypatch, mesh_of, attention, kernel, line):
    class Traced:
        def trace(self, *_):
            return self

        lower = trace

        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.")

    config = small_config()
    layer = MixtureOfTokensConfig(4, 8, kernel=kernel, save_for_backward="nothing")
    model = dataclasses.replace(config.model, feed_forward=layer, attention_kernel=attention, context_length=128)
    monkeypatch.setattr(module, "check", lambda config: None)
    monkeypatch.setattr(module, "_mesh", lambda config, devices: mesh_of(data=1))
    monkeypatch.setattr(jax, "jit", lambda *_, **__: Traced())
    with pytest.raises(UserError, match=f"^{line}: needs more than a core's memory; try 'xla'"):
        plan_training(dataclasses.replace(config, model=model), "local:1")


# --- with libtpu ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_libtpu
def test_a_data_parallel_step_on_a_tpu():
    config = small_config(data=4)
    result = plan_training(config, "v5e:2x2")
    parameters = sum(count_parameters(config.model).values())
    assert 4 * parameters <= collective_bytes(result, "all-reduce", "data") <= 4 * parameters + 100
    assert not result.program.unknown and 1.0 <= result.program.flops / result.model_flops < 1.2
    # 2 x 2 chips, no rings: two links of 45 GB/s.
    expected = 2 * 3 / 4 * 4 * parameters / (2 * 4.5e10)
    assert result.times.collectives["all-reduce over data"] == pytest.approx(expected, rel=1e-3)
    assert result.memory["HBM limit"] == 15.75 * 2**30
    assert 0 < result.efficiency[0] < result.efficiency[1] < 1


@pytest.mark.slow
@needs_libtpu
def test_a_data_parallel_step_on_chips_of_two_devices():
    """Their collectives run on SparseCores, and are calls in the text of the program."""
    config = small_config(data=8)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, d_model=512, num_heads=4))
    result = plan_training(config, "tpu7x:2x2x1")
    parameters = sum(count_parameters(config.model).values())
    assert result.chips == 8 and not result.program.unknown
    assert 4 * parameters <= collective_bytes(result, "all-reduce", "data") <= 4 * parameters + 100
    # 2 x 2 chips, no rings: two links, of which each device has 45 GB/s for its half of the bytes.
    expected = 2 * 3 / 4 * 2 * parameters / (2 * 4.5e10)
    assert result.times.collectives["all-reduce over data"] == pytest.approx(expected, rel=1e-3)
    assert result.memory["HBM limit"] == 94.74 * 2**30


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_skipping_steps_adds_no_pass_over_the_state_on_a_tpu(monkeypatch, optimizer):
    """The step reads and writes as many bytes as one without the check that loss and gradient are finite."""
    config = small_config(MixtureOfTokensConfig(group_size=4, num_experts=8), data=4)
    training = dataclasses.replace(config.training, optimizer=OptimizerConfig(name=optimizer))
    config = dataclasses.replace(config, training=training)
    checked = plan_training(config, "v5e:2x2").program.hbm_bytes
    monkeypatch.setattr(step_module, "_all_finite", lambda *values: jnp.array(True))
    without = plan_training(config, "v5e:2x2").program.hbm_bytes
    assert abs(checked - without) < 2000  # scalars; one pass over the parameters would be 4 bytes for each
    assert 4 * sum(count_parameters(config.model).values()) > 100_000


DEPTH, WIDTH, ROWS = 4, 512, 256  # rows of the input on each chip


def sharded_program(mesh):
    """The program of the gradient of DEPTH layers in bfloat16, whose float32 weights are sharded over `fsdp`."""

    def loss(weights, x):
        def layer(x, w):
            return jax.nn.relu(x @ jax.reshard(w.astype(jnp.bfloat16), P())), None

        return jax.lax.scan(layer, x, weights)[0].astype(jnp.float32).sum()

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    weights = array((DEPTH, WIDTH, WIDTH), jnp.float32, None, "fsdp")
    x = array((mesh.size * ROWS, WIDTH), jnp.bfloat16, ("data", "fsdp"))
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss)).lower(weights, x).compile().as_text()


def bytes_by_kind(program):
    total = collections.Counter()
    for c in program.collectives:
        total[c.kind, *c.axes] += c.executions * c.bytes
    return total


@pytest.mark.slow
@needs_libtpu
def test_fully_sharded_weights_on_a_tpu():
    devices = module.devices_of(parse_topology("v5e:2x4"))
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2, devices=devices)
    program = read_program(hlo.parse(sharded_program(mesh)), dict(mesh.shape))
    assert program.flops == 3 * DEPTH * 2 * ROWS * WIDTH**2
    weights = 2 * DEPTH * WIDTH**2  # bytes, in bfloat16
    # Gathered once, as they are saved for the backward pass. libtpu reduces whole gradients and slices them.
    assert bytes_by_kind(program) == {("all-gather", "fsdp"): weights, ("all-reduce", "data", "fsdp"): weights}
    peak = peak_flops("TPU v5 lite", "bfloat16")
    times = model_times(program, HARDWARE["v5e"], peak, list(mesh.devices.flat)).collectives
    # JAX places the four chips of fsdp on a square, so each has two links; all eight chips have two as well.
    assert times["all-gather over fsdp"] == pytest.approx(3 / 4 * weights / (2 * 4.5e10))
    assert times["all-reduce over data x fsdp"] == pytest.approx(2 * 7 / 8 * weights / (2 * 4.5e10))


@pytest.mark.slow
@needs_libtpu
def test_a_fully_sharded_model_on_a_tpu():
    """Four dense blocks in bfloat16 over `fsdp` only: gathered and scattered bytes, from the sizes of the weights."""
    config = small_config(data=1, fsdp=4)
    sizes = {"num_blocks": 4, "d_model": 256, "d_ff": 1024, "num_heads": 2, "context_length": 128, "vocab_size": 1024}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16", **sizes))
    result = plan_training(config, "v5e:2x2")
    assert not result.program.unknown
    parameters = count_parameters(config.model)
    biases = 4 * (1024 + 256)
    blocks = parameters["attention"] + parameters["dense FFN"] - biases
    # Blocks in bfloat16 forward and backward; the head once, and the embeddings in float32.
    gathered = 2 * 2 * blocks + 2 * parameters["head"] + 4 * parameters["embeddings"]
    assert collective_bytes(result, "all-gather", "fsdp") == gathered
    # Gradients once, in the dtype of the products; those of the head are summed in float32. The gradient of these small
    # embeddings fits into the core's memory, where libtpu sums it whole, and then slices it.
    scattered = 2 * blocks + 4 * parameters["head"]
    assert collective_bytes(result, "reduce-scatter", "fsdp") == scattered
    whole = 4 * parameters["norms"] + 2 * biases + 4 * parameters["embeddings"]
    assert collective_bytes(result, "all-reduce", "fsdp") == pytest.approx(whole, abs=1000)
    # 2 x 2 chips, no rings: two links of 45 GB/s, over which each receives, or sends, three quarters.
    assert result.times.collectives["all-gather over fsdp"] == pytest.approx(3 / 4 * gathered / (2 * 4.5e10))
    assert result.times.collectives["reduce-scatter over fsdp"] == pytest.approx(3 / 4 * scattered / (2 * 4.5e10))
    # A chip has a quarter of every matrix, with two moments.
    sharded = sum(parameters.values()) - parameters["norms"] - biases
    assert result.memory["parameters"] == 4 * (sharded / 4 + parameters["norms"] + biases)
    assert result.memory["optimizer"] == pytest.approx(2 * result.memory["parameters"], abs=100)


@pytest.mark.slow
@needs_libtpu
def test_two_slices_of_tpus():
    devices = module.devices_of(parse_topology("v5e:2x2", 2))
    order = np.array(sorted(devices, key=lambda device: device.slice_index)).reshape(2, 4)
    mesh = jax.sharding.Mesh(order, ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    program = read_program(hlo.parse(sharded_program(mesh)), dict(mesh.shape), slices=2)
    assert program.flops == 3 * DEPTH * 2 * ROWS * WIDTH**2
    weights = 2 * DEPTH * WIDTH**2
    # Each slice sums its gradients; each chip sends a quarter of them to the other slice.
    expected = {("all-gather", "fsdp"): weights, ("all-reduce", "fsdp"): weights}
    assert bytes_by_kind(program) == {**expected, ("all-reduce", "slices"): weights / 4}
    times = model_times(program, HARDWARE["v5e"], 1.97e14, list(mesh.devices.flat)).collectives
    assert times["all-reduce over slices"] == pytest.approx(2 * 1 / 2 * weights / 4 / 3.1e9)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("batch_size", [16, 32])
def test_all_to_alls_of_a_mixture_on_a_tpu(batch_size):
    """Groups of 4 on eight chips with 2 or 4 sequences each: four all-to-alls forward and backward, or two and two."""
    kind = MixtureOfTokensConfig(group_size=4, num_experts=8)
    config = small_config(kind, data=2, expert=4)
    model = dataclasses.replace(config.model, num_blocks=4, dtype="bfloat16", d_model=128)
    config = dataclasses.replace(config, model=model, training=TrainingConfig(batch_size=batch_size))
    result = plan_training(config, "v5e:2x4")
    part = 2 * batch_size * 32 * 128 // 8  # bytes of a chip's activations
    mixtures = part * 8 // 4
    sent = sorted(
        c.bytes for c in result.program.collectives if c.kind == "all-to-all" and c.executions == 4 and c.bytes > 1000
    )
    # Backward, mixtures and expert outputs are exchanged again together with their cotangents.
    expected = 2 * [mixtures] + 2 * [2 * mixtures] + (4 * [part] if batch_size == 16 else [])
    assert sent == sorted(expected)
    assert all(c.axes == ("expert",) for c in result.program.collectives if c.kind == "all-to-all")


@pytest.mark.slow
@needs_libtpu
def test_slices_are_along_the_data_axis():
    result = plan_training(small_config(data=-1, fsdp=2), "v5e:2x2", 2)
    assert result.mesh == {"data": 4, "fsdp": 2, "expert": 1, "tensor": 1} and result.slices == 2
    between = {c.axes for c in result.program.collectives if "slices" in c.axes}
    assert (
        between == {("slices",)}
        and collective_bytes(result, "all-gather", "fsdp")
        and not collective_bytes(result, "all-gather", "slices")
    )


@pytest.mark.slow
@needs_libtpu
def test_a_step_that_does_not_fit_has_a_plan():
    config = small_config(data=4)
    training = dataclasses.replace(config.training, batch_size=2**22)
    result = plan_training(dataclasses.replace(config, training=training), "v5e:2x2")
    assert not result.fits and result.program is None and result.times is None
    assert result.memory["needed"] > result.memory["HBM limit"] == 15.75 * 2**30
    size, description = result.largest[0]
    assert size == 2**20 * 32 * 257 * 4 and description.startswith("float32[1, 1048576, 1, 32, 257]")  # logits
    assert any("--model.remat blocks" in line for line in result.lines())
