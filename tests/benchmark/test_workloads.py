"""The benchmarks' models: those of `configs/`, available without a checkout, and their dense baselines."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mot_jax
from mot_jax.benchmark import accelerator, workloads
from mot_jax.config import Config, DenseConfig, MixtureOfTokensConfig, ModelConfig, check, load_config
from mot_jax.config.files import variants_of
from mot_jax.cost.parameters import active_parameters

CONFIGS = Path(__file__).parents[2] / "configs"
# Workload: its config file.
FILES = {
    workloads.v1_mot: "v1.py",
    workloads.v1_dense: "v1.py:dense",
    workloads.v2_base_32e: "v2.py:base_32e",
}
# Configs with a mixture: their dense variants.
DENSE = {"demo.py": "demo.py:dense", "v1.py": "v1.py:dense", "v2.py:base_32e": "v2.py:base_dense"}


@pytest.mark.parametrize("workload", FILES, ids=lambda workload: workload.__name__)
def test_workloads_equal_the_config_files(workload):
    assert workload() == load_config(CONFIGS / FILES[workload])


@pytest.mark.parametrize("config", [workloads.d2048(), workloads.SMALL], ids=["d2048", "small"])
def test_workloads_without_a_config_file_are_valid(config):
    check(config)


@pytest.mark.parametrize("name", DENSE)
def test_dense_of_equal_width_is_the_dense_variant(name):
    dense = workloads.dense_of_equal_width(load_config(CONFIGS / name))
    expected = load_config(CONFIGS / DENSE[name])
    assert (dense.model, dense.data) == (expected.model, expected.data)


@pytest.mark.parametrize(
    "file", sorted({*CONFIGS.glob("*.py"), *CONFIGS.glob("pods/*.py")}), ids=lambda path: path.name
)
def test_dense_of_equal_width_of_every_config_is_valid(file):
    """Without the auxiliary losses and multipliers that the other layer has."""
    for name in [f"{file}:{variant}" for variant in variants_of(file)] or [file]:
        config = load_config(name)
        optimizer = dataclasses.replace(config.training.optimizer, multipliers=(("controller", 3.0), ("head", 0.5)))
        training = dataclasses.replace(config.training, optimizer=optimizer)
        dense = workloads.dense_of_equal_width(dataclasses.replace(config, training=training))
        check(dense)
        assert dense.training.optimizer.multipliers == (("head", 0.5),) or isinstance(
            config.model.feed_forward, DenseConfig
        )


def test_dense_of_equal_active_parameters():
    model = ModelConfig(2, 16, 64, 2, context_length=16, loss_chunk=16, feed_forward=MixtureOfTokensConfig(4, 8))
    dense = workloads.dense_of_equal_active_parameters(Config(model=model)).model
    assert isinstance(dense.feed_forward, DenseConfig)
    assert abs(active_parameters(dense) / active_parameters(model) - 1) < 0.01


@pytest.fixture
def run_without_checkout(tmp_path):
    """Runs Python in an empty directory, on a copy of the package that has no `configs/` next to it."""
    site, workdir = tmp_path / "site", tmp_path / "empty"
    shutil.copytree(Path(mot_jax.__file__).parent, site / "mot_jax", ignore=shutil.ignore_patterns("__pycache__"))
    workdir.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}

    def run_python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        result = subprocess.run(command, cwd=workdir, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run_python


CODE = """
from pathlib import Path
import mot_jax
from mot_jax.benchmark import accelerator, headline
from mot_jax.config import check
assert not (Path(mot_jax.__file__).parents[1] / "configs").exists()
configs = [workload() for workload in accelerator.STEP_WORKLOADS.values()]
for small in (True, False):
    configs += headline.headline_configs(Path("headline"), small).values()
for config in configs:
    check(config)
print(len(configs))
"""


@pytest.mark.slow
def test_all_workloads_of_the_accelerator_benchmark_exist_without_a_checkout(run_without_checkout):
    assert run_without_checkout("-c", CODE) == "7\n"


# Of the small benchmark, in commands of less than a minute; the headline has a test of its own.
PARTS = [["numerics", "layers"], ["step", "step_base_32e", "step_d2048"], ["decoding"], ["peers"]]
ELSEWHERE = {"headline", "attention", "mesh", "collectives"}  # in test_accelerator.py


def test_every_part_is_tested():
    assert {part for parts in PARTS for part in parts} | ELSEWHERE == accelerator._TITLES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: parts[0])
def test_the_small_accelerator_benchmark_runs_without_a_checkout(run_without_checkout, tmp_path, parts):
    flags = ["--small", "--out", str(tmp_path / "results"), "--minutes", "9", "--parts", ",".join(parts)]
    output = run_without_checkout("-m", "mot_jax.cli", "bench", "accelerator", *flags)
    results = json.loads(next((tmp_path / "results").glob("*_small.json")).read_text())["parts"]
    assert results.keys() == {*parts} and all(part["rows"] for part in results.values())
    assert output.count("## ") == len(results) + (parts != ["decoding"])  # and modeled against measured times
    assert len(list((tmp_path / "results").glob("*_layers.png"))) == ("layers" in parts)
