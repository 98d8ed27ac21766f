"""Rows of metrics, and Weights & Biases; tests/training tests the logs of whole runs."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
from etils import epath

from mot_jax.config import Config, LoggingConfig, to_json
from mot_jax.errors import UserError
from mot_jax.runs.metrics import MetricsLog, check_logging, read_rows
from mot_jax.training import train

WANDB = LoggingConfig(tensorboard=False, wandb=True, wandb_project="mine")


@pytest.fixture
def workdir(tmp_path) -> epath.Path:
    (tmp_path / "config.json").write_text(to_json(Config()))
    return epath.Path(tmp_path)


def log_rows(workdir: epath.Path, done: int, steps: range) -> None:
    metrics = MetricsLog(workdir, done, WANDB)
    for step in steps:
        metrics.write({"step": step, "split": "train", "loss": 1.0 / step, "windows": 3})
    metrics.close()


def test_rows_go_to_one_wandb_run_however_often_it_is_resumed(workdir, monkeypatch):
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.rows, self.open = options, [], True
            runs.append(self)

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, row):
            self.rows.append(row)

        def finish(self):
            self.open = False

    wandb = types.ModuleType("wandb")
    wandb.init, wandb.Settings, wandb.errors = Run, dict, types.SimpleNamespace(Error=RuntimeError)
    wandb.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    check_logging(WANDB)
    log_rows(workdir, 0, range(1, 4))
    log_rows(workdir, 2, range(3, 5))
    assert [[row["step"] for row in run.rows] for run in runs] == [[1, 2, 3], [3, 4]]
    assert runs[0].rows[1] == {"step": 2, "train/loss": 0.5} and not runs[0].open
    assert runs[0].options["id"] == runs[1].options["id"] and runs[1].options["resume"] == "allow"
    assert runs[0].options["project"] == "mine" and runs[0].options["dir"] == str(workdir)
    assert runs[0].options["config"] == json.loads(to_json(Config()))

    def refuse(**_):
        raise RuntimeError("No API key configured.\nmore")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"wandb = True: No API key configured.; try .*WANDB_MODE=offline$"):
        MetricsLog(workdir, 4, WANDB)


def test_wandb_is_imported_only_when_asked_for(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it is an error
    plain = LoggingConfig(tensorboard=False)
    check_logging(plain)
    MetricsLog(workdir, 0, plain).close()
    with pytest.raises(UserError, match=r"wandb is not installed; try pip install wandb"):
        train(dataclasses.replace(Config(), logging=WANDB), workdir / "run")
    assert not (workdir / "run").exists()


def test_wandb_itself_offline(workdir, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_rows(workdir, 0, range(1, 4))
    wandb.teardown()
    (file,) = (workdir / "wandb").glob("offline-run-*/*.wandb")
    assert file.name == f"run-{(workdir / 'wandb_id').read_text()}.wandb"


def test_numbers_that_are_not_finite_are_null(tmp_path):
    metrics = MetricsLog(epath.Path(tmp_path), 0, LoggingConfig(tensorboard=False))
    metrics.write({"step": 1, "split": "train", "loss": float("nan"), "mfu": float("inf")})
    metrics.close()
    assert read_rows(epath.Path(tmp_path)) == [{"step": 1, "split": "train", "loss": None, "mfu": None}]
