"""`mot bench accelerator`: numerics, parts that fail, and the headline that stops after its time."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from mot_jax import cli
from mot_jax.benchmark import accelerator, mesh, numerics
from mot_jax.benchmark.accelerator import bench_accelerator
from mot_jax.benchmark.headline import bench_headline, headline_configs, headline_rows
from mot_jax.benchmark.mesh import bench_mesh, meshes
from mot_jax.benchmark.workloads import SMALL
from mot_jax.config import DenseConfig, check
from mot_jax.errors import UserError
from mot_jax.nn.feed_forward import KINDS

ROOT = Path(__file__).parents[2]


def quiet(line):
    pass


def test_numerics_cover_every_kind():
    configs = numerics.configs_to_check(numerics.SHAPE, jax.devices()[0])
    assert {type(config) for config in configs.values()} == set(KINDS)


OTHERS = (
    "dense",
    "token_choice",
    "token_choice:dropless",
    "expert_threshold",
    "expert_choice",
    "relu_routing",
    "hash",
    "soft_moe",
    "companions",
    "threshold",
)
OTHERS += ("mixture_of_tokens:fused_mixture", "mixture_of_tokens:fused_experts")


@pytest.mark.parametrize(
    "kind",
    ["mixture_of_tokens", *(pytest.param(k, marks=pytest.mark.slow) for k in OTHERS)],
)
def test_a_correct_layer_passes_and_a_wrong_one_fails(kind, monkeypatch):
    config = numerics.configs_to_check(numerics.SHAPES["tiny"], SimpleNamespace(platform="tpu", device_kind="TPU v5"))[
        kind
    ]
    monkeypatch.setattr(numerics, "configs_to_check", lambda shape, device: {kind: config})
    monkeypatch.setattr(numerics, "attention_to_check", lambda fused: {})
    rows = numerics.bench_numerics(True, quiet)
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"] and all(row["ok"] for row in rows)
    assert rows[0]["y_error"] < 1e-5 < rows[1]["y_error"]  # rounding to bfloat16 is visible
    assert (rows[0]["gradient_error"] is None) == (kind in ("companions", "threshold"))
    outputs = numerics._outputs
    on_accelerator = iter([True, False] * 2)

    def wrong_on_accelerator(forward, state, x, *rest):
        return outputs(forward, state, x.at[0, 0].add(1) if next(on_accelerator) else x, *rest)

    monkeypatch.setattr(numerics, "_outputs", wrong_on_accelerator)
    assert not any(row["ok"] for row in numerics.bench_numerics(True, quiet))


def test_a_check_that_fails_does_not_stop_the_others(monkeypatch):
    def fails():
        raise ValueError("no such instruction\nin line 2")

    table = {("hash", "float32"): fails, ("dense", "float32"): lambda: ROW}
    monkeypatch.setattr(numerics, "checks", lambda small: table)
    first, second = numerics.bench_numerics(True, quiet)
    assert first == {"kind": "hash", "dtype": "float32", "reason": "ValueError: no such instruction", "ok": False}
    assert second == ROW
    cells = [text_of(first) for _, text_of in numerics.COLUMNS]
    assert cells == ["hash", "float32", "-", "-", "-", "-", "ValueError: no such instruction"]


def test_attention_is_checked_by_the_fused_kernel_of_the_device(monkeypatch):
    """cuDNN's attention computes in bfloat16 only."""
    monkeypatch.setattr(numerics, "configs_to_check", lambda shape, device: {})
    monkeypatch.setattr(numerics.fused_attention, "platform", lambda: "gpu")
    kinds = [f"attention, {kernel}, {mask}" for kernel in ("xla", "cudnn") for mask in MASKS]
    assert list(numerics.checks(small=True)) == [(k, "float32") for k in kinds[:3]] + [(k, "bfloat16") for k in kinds]


MASKS = ("causal", "causal, documents", "bidirectional, padding")


@pytest.mark.parametrize("part", ["step", "step_base_32e", "step_d2048"])
def test_the_models_of_the_steps_are_valid(part):
    config = accelerator.STEP_WORKLOADS[part]()
    check(config)
    assert config.model.dtype == "bfloat16" and config.model.feed_forward.kind == "mixture_of_tokens"
    assert {"step": 256, "step_base_32e": 768, "step_d2048": 2048}[part] == config.model.d_model
    tpu = SimpleNamespace(platform="tpu", device_kind="TPU v5")
    configs = accelerator.step_configs(part, config, tpu)
    kernel = "fused_mixture" if part == "step" else "fused_experts"
    names = [f"mixture_of_tokens, kernel {kernel}", "mixture_of_tokens", "dense"]
    if part == "step":
        names[1:1] = ["mixture_of_tokens, attention_kernel auto", "dense, attention_kernel auto"]
    assert list(configs) == names and configs[names[0]].model.feed_forward.kernel == kernel
    for compared in configs.values():
        check(compared)


def replace_parts(monkeypatch, **rows_of):
    monkeypatch.setattr(accelerator, "_measure", lambda part, *rest: rows_of[part]())


ROW = {"kind": "dense", "dtype": "float32", "y_error": 1e-7, "gradient_error": None, "ok": True}
ROW |= {"tolerance": 1e-5, "gradient_tolerance": 1e-5}


def test_a_part_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def fails():
        raise RuntimeError("out of memory")

    replace_parts(monkeypatch, numerics=lambda: [ROW], step=fails)
    assert bench_accelerator(str(tmp_path), ["step", "numerics"], True, 60, quiet) == ["step"]
    results = json.loads(next(tmp_path.glob("*_small.json")).read_text())
    assert results["parts"]["numerics"]["rows"] == [ROW] and "out of memory" in results["parts"]["step"]["not_run"]
    assert {"device", "date", "python", "jax"} <= results["machine"].keys()
    page = next(tmp_path.glob("*.md")).read_text()
    assert "Not measured: RuntimeError: out of memory" in page and "1.0e-07" in page and page in capsys.readouterr().out


def test_a_job_with_several_tasks_is_refused_in_one_line(monkeypatch, capsys):
    numbers = {"JOB_ID": "4097", "NTASKS": "8", "PROCID": "2", "LOCALID": "2", "STEP_NODELIST": "node07"}
    for name, value in numbers.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    called = []
    monkeypatch.setattr(accelerator, "bench_accelerator", lambda *_: called.append(1))
    for tasks, rule in (("8", "process 2 of 8, each of which"), ("many", "the process cannot be identified")):
        monkeypatch.setenv("SLURM_NTASKS", tasks)
        with pytest.raises(SystemExit) as exit_:
            cli.main(["bench", "accelerator"])
        (line,) = capsys.readouterr().err.splitlines()
        assert exit_.value.code == 2 and line.startswith(f"error: cluster: {rule}") and not called
        assert line.endswith("; try srun --nodes=1 --ntasks=1 mot bench accelerator")
    for name, value in {"NTASKS": "1", "PROCID": "0", "LOCALID": "0"}.items():  # of that command
        monkeypatch.setenv(f"SLURM_{name}", value)
    cli.main(["bench", "accelerator"])
    assert called


def test_rows_are_written_as_soon_as_they_are_measured(tmp_path, monkeypatch):
    """A part that ends with an error, or is killed, has the rows before."""

    def rows():
        yield ROW
        written = json.loads(next(tmp_path.glob("*_small.json")).read_text())["parts"]["numerics"]
        assert written["rows"] == [ROW] and written["not_run"] == "interrupted"
        raise RuntimeError("out of memory")

    replace_parts(monkeypatch, numerics=rows)
    assert bench_accelerator(str(tmp_path), ["numerics"], True, 60, quiet) == ["numerics"]
    results = json.loads(next(tmp_path.glob("*_small.json")).read_text())["parts"]["numerics"]
    assert results["rows"] == [ROW] and results["not_run"] == "RuntimeError: out of memory"
    page = next(tmp_path.glob("*.md")).read_text()
    assert "Incomplete: RuntimeError: out of memory." in page and "1.0e-07" in page
    replace_parts(monkeypatch, numerics=lambda: [ROW])
    assert bench_accelerator(str(tmp_path), ["numerics"], True, 60, quiet) == []
    assert "Incomplete" not in next(tmp_path.glob("*.md")).read_text()


def test_the_layers_of_an_accelerator_are_timed_from_small_to_large(monkeypatch):
    timed = []

    def bench_layers(shapes, *rest, directions, **options):
        timed.extend((shape.name, direction) for shape in shapes for direction in directions)
        return [{"shape": shapes[0].name}], 1.0

    monkeypatch.setattr(accelerator.layers, "bench_layers", bench_layers)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    rows = accelerator._measure("layers", Path(), False, math.inf, None, quiet)
    assert next(rows) == {"shape": "v1"} and timed == [("v1", "forward")]  # the others are not compiled yet
    assert [row["shape"] for row in rows] == ["v1", *["medium_32e_8"] * 2, *["base_32e"] * 2, *["d2048"] * 2]


def test_a_wrong_number_fails_the_command_and_later_calls_add_their_parts(tmp_path, monkeypatch):
    replace_parts(monkeypatch, numerics=lambda: [ROW | {"ok": False}])
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", "accelerator", "--out", str(tmp_path), "--parts", "numerics"])
    assert exit_.value.code == 1
    assert "WRONG" in next(tmp_path.glob("*.md")).read_text()
    assert bench_accelerator(str(tmp_path), ["layers"], False, 0, quiet) == []
    results = json.loads(next(tmp_path.glob("*.json")).read_text())["parts"]
    assert results["layers"]["not_run"] == "no time was left" and results["numerics"]["rows"]
    assert bench_accelerator(str(tmp_path), ["numerics"], False, 0, quiet) == []
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["parts"]["numerics"] == results["numerics"]
    with pytest.raises(UserError, match="did you mean 'layers'"):
        bench_accelerator(str(tmp_path), ["layer"], False, 60, quiet)


# --- several devices --------------------------------------------------------------------------------------------------


def test_each_axis_is_tried_that_the_model_allows():
    sizes = {name: dataclasses.astuple(mesh)[:4] for name, mesh in meshes(SMALL, 8).items()}
    expected = {"1 device": (1, 1, 1, 1), "data 8": (8, 1, 1, 1), "fsdp 8": (1, 8, 1, 1), "expert 8": (1, 1, 8, 1)}
    assert sizes == expected  # two heads: no tensor
    assert list(meshes(SMALL, 1)) == ["1 device"] and "tensor 2" in meshes(SMALL, 2)


class StubRun:
    """Replaces a compiled step."""

    compiled, temporaries, seconds_to_compile, mesh = None, 1, 1.0, SimpleNamespace(size=8)

    def step(self):
        return lambda: None


NO_MODEL = SimpleNamespace(seconds=lambda *_: {})


def test_a_loss_that_depends_on_the_mesh_is_wrong(monkeypatch):
    losses = {"data": [5.0, 4.0], "fsdp": [5.0, 4.00001], "expert": [5.0, 4.1]}

    def train(config, mesh, steps):
        axis = next((name for name in losses if getattr(mesh, name) > 1), "data")
        return StubRun(), losses[axis]

    monkeypatch.setattr(mesh, "train_on", train)
    rows = {row["mesh"]: row for row in bench_mesh(SMALL, 3, NO_MODEL, quiet)}
    assert [row["ok"] for row in rows.values()] == [True, True, True, False] and rows["1 device"]["speedup"] == 1
    assert rows["expert 8"]["loss_difference"] == pytest.approx(0.025)
    monkeypatch.setattr(mesh, "train_on", lambda *_: (StubRun(), [math.nan] * 2))
    assert not any(row["ok"] for row in bench_mesh(SMALL, 3, NO_MODEL, quiet))


def test_a_loss_that_is_not_a_number_is_a_dash_in_this_call_and_in_later_ones(tmp_path, monkeypatch):
    """In JSON it is null."""
    monkeypatch.setattr(mesh, "train_on", lambda *_: (StubRun(), [math.nan, math.nan]))
    replace_parts(monkeypatch, mesh=lambda: bench_mesh(SMALL, 3, NO_MODEL, quiet), numerics=lambda: [ROW])
    for part, failed in (("mesh", ["mesh"]), ("numerics", [])):
        assert bench_accelerator(str(tmp_path), [part], True, 60, quiet) == failed
        (line,) = [line for line in next(tmp_path.glob("*.md")).read_text().splitlines() if "| 1 device" in line]
        assert [cell.strip() for cell in line.split("|")[2:6]] == ["-", "-", "1e-05", "WRONG"]
    results = json.loads(next(tmp_path.glob("*_small.json")).read_text())["parts"]
    assert results["mesh"]["rows"][0]["losses"] == [None, None] and results["numerics"]["rows"] == [ROW]


def test_an_error_of_the_calibration_loses_no_part(tmp_path, monkeypatch):
    def fails(*_, **options):
        raise ValueError("singular")

    row = ROW | {"modeled_s": {"products": 1.0}, "median_s": 2.0}
    replace_parts(monkeypatch, numerics=lambda: [row])
    monkeypatch.setattr(accelerator.calibration, "calibrate", fails)
    assert bench_accelerator(str(tmp_path), ["numerics"], True, 60, quiet) == ["calibration"]
    content = json.loads(next(tmp_path.glob("*_small.json")).read_text())
    assert content["parts"]["numerics"]["rows"] == [row]
    page = next(tmp_path.glob("*.md")).read_text()
    assert "1.0e-07" in page and "Not calibrated: ValueError: singular." in page


def test_parts_for_several_devices_are_left_out_on_one(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert bench_accelerator(str(tmp_path), ["mesh", "collectives"], True, 60, quiet) == []
    assert next(tmp_path.glob("*.md")).read_text().count("Not measured: there is one device.") == 2


@pytest.mark.slow
def test_the_installed_package_alone_measures_and_writes_the_report(tmp_path):
    """Two devices, from arguments to report, with no file of the checkout but the package."""
    shutil.copytree(ROOT / "mot_jax", tmp_path / "site" / "mot_jax")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-m", "mot_jax", "bench", "accelerator", "--small", "--out", "results"]
    command += ["--parts", "attention,mesh,collectives"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    content = json.loads(next((tmp_path / "results").glob("*_small.json")).read_text())
    rows = {part: values["rows"] for part, values in content["parts"].items()}
    assert [row["kernel"] for row in rows["attention"]] == ["xla"]
    assert [row["mesh"] for row in rows["mesh"]] == ["1 device", "data 2", "fsdp 2", "expert 2", "tensor 2"]
    assert all(row["ok"] and len(row["losses"]) == 4 for row in rows["mesh"])
    assert len(rows["collectives"]) == 5 and all(row["bytes_per_second"] > 0 for row in rows["collectives"])
    calibration = content["calibration"]
    assert calibration["rates"] == "measured" and len(calibration["rows"]) == 11
    assert {"products", "elementwise", "collectives"} <= calibration["factors"].keys()
    for row in calibration["rows"]:
        assert row["ratio"] == pytest.approx(row["measured_s"] / sum(row["modeled_s"].values()))
    page = next((tmp_path / "results").glob("*_small.md")).read_text()
    assert page in result.stdout and "## Modeled against measured" in page


def test_headline_models_are_version_1_s_with_a_small_vocabulary(tmp_path):
    configs = headline_configs(tmp_path, small=False)
    for config in configs.values():
        check(config)
        assert (config.model.vocab_size, config.model.d_model, config.training.batch_size) == (8192, 256, 256)
        assert config.group_size == 32
    assert sum(config.training.steps for config in configs.values()) == 8_000
    dense, mot = configs["dense"], configs["mixture_of_tokens"]
    assert isinstance(dense.model.feed_forward, DenseConfig) and mot.model.feed_forward.num_experts == 512
    rates = [config.training.optimizer.learning_rate for config in (dense, mot)]
    assert rates == [4e-3, 2e-3]


def run(losses: dict[int, float], speed: float) -> list[dict]:
    rows = [{"split": "train", "step": step, "loss": 9.0, "tokens_per_second": speed} for step in losses]
    return rows + [{"split": "validation", "step": step, "loss": loss} for step, loss in losses.items()]


def test_the_headline_is_the_step_and_the_time_of_the_dense_models_last_loss():
    dense = (40, run({10: 3.0, 40: 2.0}, 100.0))
    mot = (40, run({10: 2.5, 20: 1.9}, 50.0))
    first, second = headline_rows({"dense": dense, "mixture_of_tokens": mot})
    assert (first["matched_step"], first["share_of_steps"], first["share_of_time"]) == (40, 1.0, 1.0)
    assert (second["matched_step"], second["share_of_steps"], second["share_of_time"]) == (20, 0.5, 1.0)
    assert (second["step"], second["loss"], second["tokens_per_second"]) == (20, 1.9, 50.0)
    unfinished = headline_rows({"dense": (80, dense[1]), "mixture_of_tokens": (80, [])})
    assert [row["matched_step"] for row in unfinished] == [None, None] and unfinished[1]["loss"] is None


@pytest.mark.slow
def test_a_headline_stops_by_time_and_is_resumed(tmp_path):
    """The first call stops after its first step; the second one trains both models to their ends."""
    rows = bench_headline(tmp_path / "headline", True, 0.01, quiet)
    assert [row["step"] for row in rows] == [1, 0]
    rows = bench_headline(tmp_path / "headline", True, 300, quiet)
    assert [row["step"] for row in rows] == [6, 6] and rows[0]["matched_step"] is not None
