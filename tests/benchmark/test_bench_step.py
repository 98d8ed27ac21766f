"""`mot bench step`: a config compared with its dense baseline."""

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mot_jax import cli
from mot_jax.benchmark import step
from mot_jax.benchmark.step import bench_step, random_batch
from mot_jax.benchmark.workloads import dense_of_equal_width
from mot_jax.config import Config, MeshConfig, MixtureOfTokensConfig, ModelConfig, TrainingConfig, to_json
from mot_jax.cost.flops import flops_per_token
from mot_jax.cost.memory import adamw_bytes
from mot_jax.cost.parameters import count_parameters
from mot_jax.errors import UserError
from mot_jax.nn.sharding import make_mesh

MODEL = ModelConfig(1, 16, 32, 2, context_length=16, loss_chunk=16, feed_forward=MixtureOfTokensConfig(4, 8))
CONFIG = Config(model=MODEL, training=TrainingConfig(batch_size=8), mesh=MeshConfig(data=1))


def test_random_batches_have_the_targets_of_the_objective():
    batch = random_batch(CONFIG, 4)
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.inputs.shape == (4, 16) and batch.segments is None and batch.target_mask.all()
    masked = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, objective="masked", document_mask=True))
    batch = random_batch(masked, 64)
    assert 0.1 < batch.target_mask.mean() < 0.2 and batch.segments.shape == (64, 16)
    assert batch.inputs.min() >= 0 and batch.inputs.max() < MODEL.vocab_size


class StubRun:
    """Replaces the compiled programs: a step of 20 ms and an update of 5 ms."""

    seconds_to_compile, temporaries, parameters_per_device = 1.0, 1, 1000

    def __init__(self, config: Config):
        self.mesh = make_mesh(config)

    def step(self):
        return lambda: time.sleep(0.02)

    def optimizer(self):
        return lambda: time.sleep(0.005)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_row_for_the_config_and_its_baseline(compiled, monkeypatch):
    """Times of step and optimizer, and their shares of the measured peak and bandwidth."""
    monkeypatch.setattr(step, "matmul_peak", lambda dtype: 1e9)
    monkeypatch.setattr(step, "bandwidth", lambda: 1e8)
    if not compiled:
        monkeypatch.setattr(step, "_TrainingRun", StubRun)
    rows, measured = bench_step({"mot": CONFIG, "dense": dense_of_equal_width(CONFIG)}, 3, lambda line: None)
    assert [row["config"] for row in rows] == ["mot", "dense"] and rows[1]["ratio_to_dense"] == 1
    assert measured == {"peak": 1e9, "bandwidth": 1e8}
    assert [row["kind"] for row in rows] == ["mixture_of_tokens", "dense"]
    for row in rows:
        assert row["tokens"] == 8 * 16 and row["compile_s"] > 0 and row["temporaries"] > 0
        assert row["mfu"] == pytest.approx(row["flops"] / row["median_s"] / measured["peak"])
        assert row["optimizer_share"] == row["optimizer_s"] / row["median_s"] and row["mfu_by_datasheet"] is None
        assert compiled or 0.1 < row["optimizer_share"] < 0.9
        stored = row["parameters"] if compiled else 1000
        assert row["optimizer_bound_s"] == adamw_bytes(stored) / measured["bandwidth"]
    assert rows[0]["flops"] == flops_per_token(CONFIG) * 128


def test_steps_of_different_numbers_of_tokens_are_refused():
    half = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, batch_size=4))
    rule = "the steps of mot have 128 tokens, those of dense 64: must be equal; try --training.batch-size 4"
    with pytest.raises(UserError, match=rule):
        bench_step({"mot": CONFIG, "dense": dense_of_equal_width(half)}, 3, lambda line: None)


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "share"), [({"data": 8}, 1), ({"fsdp": 8, "data": 1}, 1 / 8)])
def test_parameters_of_a_device_are_those_that_the_mesh_replicates_or_shards(axes, share):
    program = step.TrainingProgram(dataclasses.replace(CONFIG, mesh=MeshConfig(**axes)))
    total = sum(count_parameters(MODEL).values())
    assert share * total <= program.parameters_per_device <= 1.2 * share * total


@pytest.mark.parametrize(("platform", "times"), [("cpu", 1), ("gpu", 2)])
def test_devices_of_a_cpu_share_its_peak(monkeypatch, platform, times):
    device = SimpleNamespace(platform=platform, device_kind="H100")
    mesh = SimpleNamespace(size=2, devices=SimpleNamespace(flat=[device, device]))
    monkeypatch.setattr(step, "matmul_peak", lambda dtype: 1e9)
    monkeypatch.setattr(step, "bandwidth", lambda: 1e8)
    monkeypatch.setattr(step, "_TrainingRun", StubRun)
    monkeypatch.setattr(StubRun, "__init__", lambda self, config: setattr(self, "mesh", mesh))
    (row,), measured = bench_step({"dense": dense_of_equal_width(CONFIG)}, 3, lambda line: None)
    assert measured == {"peak": times * 1e9, "bandwidth": times * 1e8}
    of_all = 2 // times  # devices whose parameters are in the memory of the bandwidth
    assert row["optimizer_bound_s"] == adamw_bytes(of_all * 1000) / 1e8
    assert row["mfu"] == pytest.approx(row["flops"] / row["median_s"] / measured["peak"])


@pytest.mark.slow
def test_the_command_compares_with_another_config(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "matmul_peak", lambda dtype: 1e9)
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, d_ff=64))
    for name, config in (("a", CONFIG), ("b", other)):
        text = (
            f"from mot_jax.config import from_json\n\n\ndef get_config():\n    return from_json({to_json(config)!r})\n"
        )
        (tmp_path / f"{name}.py").write_text(text)
    paths = [str(tmp_path / name) for name in ("a.py", "b.py", "rows.json")]
    cli.main(["bench", "step", paths[0], "--against", paths[1], "--rounds", "3", "--json", paths[2]])
    assert [row["config"] for row in json.loads(Path(paths[2]).read_text())["rows"]] == ["a", "b"]
    assert capsys.readouterr().out.count("\n| ") == 3


def test_each_step_continues_from_the_previous_state():
    """Each step or update starts from the state that the last step or update returned."""
    run = object.__new__(step._TrainingRun)
    run._state, run._batch, run._gradients = 0, 1, 10
    run.compiled, run._update = lambda state, batch: (state + batch, None), lambda gradients, state: state + gradients
    for program in (run.step, run.optimizer, run.step):
        program()()
    assert run._state == 12
