"""`mot bench step`: a config beside its dense twin."""

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mot_jax import cli
from mot_jax.benchmark import step
from mot_jax.benchmark.step import bench_step, dense_twin, random_batch
from mot_jax.config import Config, MeshConfig, MixtureOfTokensConfig, ModelConfig, TrainingConfig, load_config, to_json
from mot_jax.cost.flops import flops_per_token
from mot_jax.cost.memory import adamw_bytes
from mot_jax.nn.sharding import make_mesh

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = ModelConfig(1, 16, 32, 2, context_length=16, loss_chunk=16, feed_forward=MixtureOfTokensConfig(4, 8))
CONFIG = Config(model=MODEL, training=TrainingConfig(batch_size=8), mesh=MeshConfig(data=1))


@pytest.mark.parametrize("name", ["demo", "v1", "v2_base"])
def test_the_dense_twin_is_that_of_the_configs(name):
    mot = {"demo": "demo", "v1": "v1_mot", "v2_base": "v2_base_32e"}[name]
    twin, written = dense_twin(load_config(CONFIGS / f"{mot}.py")), load_config(CONFIGS / f"{name}_dense.py")
    assert (twin.model, twin.data) == (written.model, written.data)


def test_rows_of_random_tokens_are_what_the_objective_asks():
    batch = random_batch(CONFIG, 4)
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.inputs.shape == (4, 16) and batch.segments is None and batch.target_mask.all()
    masked = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, objective="masked", document_mask=True))
    batch = random_batch(masked, 64)
    assert 0.1 < batch.target_mask.mean() < 0.2 and batch.segments.shape == (64, 16)
    assert batch.inputs.min() >= 0 and batch.inputs.max() < MODEL.vocab_size


class Stub:
    """In place of what is compiled: a step of 20 ms, an update of 5."""

    seconds_to_compile, temporaries = 1.0, 1

    def __init__(self, config: Config):
        self.mesh = make_mesh(config)

    def step(self):
        return lambda: time.sleep(0.02)

    def optimizer(self):
        return lambda: time.sleep(0.005)


@pytest.mark.parametrize("real", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_row_for_the_config_and_its_twin(real, monkeypatch):
    """Times of step and optimizer, and their shares of what the device reaches."""
    monkeypatch.setattr(step, "matmul_peak", lambda dtype: 1e9)
    monkeypatch.setattr(step, "bandwidth", lambda: 1e8)
    if not real:
        monkeypatch.setattr(step, "_Run", Stub)
    rows, reached = bench_step({"mot": CONFIG, "dense": dense_twin(CONFIG)}, 3, lambda line: None)
    assert [row["config"] for row in rows] == ["mot", "dense"] and rows[1]["ratio_to_dense"] == 1
    assert reached == {"peak": 1e9, "bandwidth": 1e8}
    assert [row["kind"] for row in rows] == ["mixture_of_tokens", "dense"]
    for row in rows:
        assert row["tokens"] == 8 * 16 and row["compile_s"] > 0 and row["temporaries"] > 0
        assert row["mfu"] == pytest.approx(row["flops"] / row["median_s"] / reached["peak"])
        assert row["optimizer_share"] == row["optimizer_s"] / row["median_s"] and row["mfu_by_datasheet"] is None
        assert real or 0.1 < row["optimizer_share"] < 0.9
        assert row["optimizer_bound_s"] == adamw_bytes(row["parameters"]) / reached["bandwidth"]
    assert rows[0]["flops"] == flops_per_token(CONFIG) * 128


@pytest.mark.parametrize(("platform", "times"), [("cpu", 1), ("gpu", 2)])
def test_devices_of_a_cpu_share_its_peak(monkeypatch, platform, times):
    device = SimpleNamespace(platform=platform, device_kind="H100")
    mesh = SimpleNamespace(size=2, devices=SimpleNamespace(flat=[device, device]))
    monkeypatch.setattr(step, "matmul_peak", lambda dtype: 1e9)
    monkeypatch.setattr(step, "bandwidth", lambda: 1e8)
    monkeypatch.setattr(step, "_Run", Stub)
    monkeypatch.setattr(Stub, "__init__", lambda self, config: setattr(self, "mesh", mesh))
    (row,), reached = bench_step({"dense": dense_twin(CONFIG)}, 3, lambda line: None)
    assert reached == {"peak": times * 1e9, "bandwidth": times * 1e8}
    assert row["mfu"] == pytest.approx(row["flops"] / row["median_s"] / reached["peak"])


@pytest.mark.slow
def test_the_command_compares_with_the_config_it_is_given(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "matmul_peak", lambda dtype: 1e9)
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, d_ff=64))
    for name, config in (("a", CONFIG), ("b", other)):
        text = (
            f"from mot_jax.config import from_json\n\n\ndef get_config():\n    return from_json({to_json(config)!r})\n"
        )
        (tmp_path / f"{name}.py").write_text(text)
    paths = [str(tmp_path / name) for name in ("a.py", "b.py", "found.json")]
    cli.main(["bench", "step", paths[0], "--against", paths[1], "--rounds", "3", "--json", paths[2]])
    assert [row["config"] for row in json.loads(Path(paths[2]).read_text())["rows"]] == ["a", "b"]
    assert capsys.readouterr().out.count("\n| ") == 3


def test_a_step_hands_its_state_on():
    """Donated or not: each run begins where the last one, or the last update, ended."""
    run = object.__new__(step._Run)
    run._state, run._batch, run._gradients = 0, 1, 10
    run._step, run._update = lambda state, batch: (state + batch, None), lambda gradients, state: state + gradients
    for program in (run.step, run.optimizer, run.step):
        program()()
    assert run._state == 12
