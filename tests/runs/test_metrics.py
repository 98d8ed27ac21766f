"""Rows of metrics, and Weights & Biases; tests/training tests the logs of whole runs."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
from etils import epath

from mot_jax.config import Config, DataConfig, LoggingConfig, to_json
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
    settings = types.SimpleNamespace(mode="online", api_key="key", base_url="https://api.wandb.ai")
    wandb.setup = lambda: types.SimpleNamespace(settings=settings)
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


@pytest.mark.slow  # as the next: only the slow part of .ci/run installs wandb
def test_wandb_itself_offline(workdir, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_rows(workdir, 0, range(1, 4))
    wandb.teardown()
    (file,) = (workdir / "wandb").glob("offline-run-*/*.wandb")
    assert file.name == f"run-{(workdir / 'wandb_id').read_text()}.wandb"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "is_accepted"),
    [
        ({}, False),
        ({"WANDB_MODE": "offline"}, True),
        ({"WANDB_MODE": "disabled"}, True),
        ({"WANDB_API_KEY": "0" * 40}, True),
        ({"NETRC": "netrc"}, True),
        ({"NETRC": "other"}, False),
        ({"NETRC": "damaged"}, False),
    ],
)
def test_a_missing_login_of_wandb_is_refused_before_the_data_is_read(tmp_path, monkeypatch, variables, is_accepted):
    wandb = pytest.importorskip("wandb", reason="an extra")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {'0' * 40}\n")
    (tmp_path / "other").write_text("machine github.com\n  login user\n  password p\n")
    (tmp_path / "damaged").write_text("no netrc")
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    try:
        if is_accepted:
            check_logging(WANDB)
        else:
            data = DataConfig(corpus=("missing",), directory=str(tmp_path))
            with pytest.raises(UserError, match=r"no API key of W&B is configured; try `wandb login`, or WANDB_MODE="):
                train(Config(data=data, logging=WANDB), tmp_path / "run")
            assert not (tmp_path / "run").exists()
    finally:
        wandb.teardown()


@pytest.mark.parametrize(
    "damage", [b"{\n", b"\xff\xfe\n", b"[1]\n", b"{}\n", b"\n", b'{"step": "3"}\n', b"[" * 5000 + b"\n"]
)
def test_only_damaged_lines_are_dropped_and_reported(tmp_path, capsys, damage):
    workdir = epath.Path(tmp_path)
    lines = [json.dumps({"step": step, "split": "train", "loss": 1.0}).encode() + b"\n" for step in range(1, 8)]
    cut = b'{"step": 8, "spl'  # by a kill
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines[:3], damage, *lines[3:], cut]))
    warning = f"warning: {tmp_path}/metrics.jsonl: damaged lines are left out: 4\n"
    assert [row["step"] for row in read_rows(workdir)] == [1, 2, 3, 4, 5, 6, 7]
    assert capsys.readouterr().err == warning
    MetricsLog(workdir, 6, LoggingConfig(tensorboard=False)).close()
    assert capsys.readouterr().err == warning
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines[:6])
    read_rows(workdir)
    assert capsys.readouterr().err == ""


def test_many_damaged_lines_are_counted_and_an_unreadable_file_is_named(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("no JSON\n" * 9)
    assert read_rows(epath.Path(tmp_path)) == []
    assert capsys.readouterr().err.endswith("left out: 1, 2, 3, 4, 5 and 4 more\n")
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be read \(Is a directory\); try mv "):
        read_rows(epath.Path(tmp_path))


def test_numbers_that_are_not_finite_are_null(tmp_path):
    metrics = MetricsLog(epath.Path(tmp_path), 0, LoggingConfig(tensorboard=False))
    metrics.write({"step": 1, "split": "train", "loss": float("nan"), "mfu": float("inf")})
    metrics.close()
    assert read_rows(epath.Path(tmp_path)) == [{"step": 1, "split": "train", "loss": None, "mfu": None}]
