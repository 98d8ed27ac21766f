"""Layers and steps compiled ahead of time for a target device."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import jax
import pytest

from mot_jax import cli
from mot_jax.benchmark import ahead_of_time
from mot_jax.benchmark.ahead_of_time import COLUMNS, STEP_COLUMNS, memory_of_steps
from mot_jax.benchmark.workloads import SMALL, dense_of_equal_width


@pytest.fixture(autouse=True)
def initialized_jax():
    """Initialize JAX with its eight devices first: `local:1` would limit all tests of this process to one."""
    jax.devices()


def rows_of(tmp_path, topology: str) -> dict[str, dict]:
    file = tmp_path / "rows.json"
    cli.main(["bench", "layers", "--topology", topology, "--shapes", "tiny", "--json", str(file)])
    return {row["kind"]: row for row in json.loads(file.read_text())["rows"]}


def test_bytes_of_layers_are_compared_with_dense(tmp_path, capsys):
    rows = rows_of(tmp_path, "local:1")
    dense, mixture, refused = (
        rows[f"{kind}"] for kind in ("dense", "mixture_of_tokens", "mixture_of_tokens:fused_mixture")
    )
    weights, tokens = 4 * 2 * 32 * 64, 2 * 8 * 32 * 32  # of tiny: D 32, d_ff 64, 8 rows of 32 tokens
    assert dense["hbm_bytes"] > 3 * weights + 4 * tokens and dense["ratio"] == 1
    assert mixture["ratio"] == mixture["hbm_bytes"] / dense["hbm_bytes"] > 1 and mixture["copies"] > 0
    assert "needs a TPU v5e, v5p or later; try --topology v5p" in refused["refused"]
    assert "needs a TPU" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_of_a_step():
    [row] = memory_of_steps({"mot": SMALL}, "local:1", lambda line: None)
    assert (row["config"], row["fits"], row["ratio"]) == ("mot", True, 1)
    assert row["needed"] >= row["arguments"] + row["temporaries"] and row["hbm_bytes"] > row["arguments"]
    assert row["live"] is None and row["live_ratio"] is None  # not reported by the CPU compiler


def test_notes_and_unknown_parts_of_a_plan(monkeypatch, tmp_path, capsys):
    """A time that lacks a part of the program is left blank."""

    def plan(config, *_, **options):
        dense = config.model.feed_forward.kind == "dense"
        unknown = {"unknown": ("FLOPs of the custom call x",), "overcounted": ("branch taken by y",)}
        program = SimpleNamespace(hbm_bytes=8.0, **dict.fromkeys(unknown, ()) if dense else unknown)
        times, notes = SimpleNamespace(compute=1.0, hbm=2.0), () if dense else ("XLA's attention, not cuDNN's",)
        memory = {"needed": 3, "arguments": 1, "temporaries": 2}
        counts = {"seconds_to_compile": 1.0, "copies": 5, "transposes": 2}
        return SimpleNamespace(fits=True, times=times, memory=memory, program=program, notes=notes, **counts)

    monkeypatch.setattr(ahead_of_time, "plan_training", plan)
    file = tmp_path / "rows.json"
    cli.main(["bench", "step", "configs/demo.py", "--topology", "local:1", "--json", str(file)])
    mot, dense = json.loads(file.read_text())["rows"]
    assert (mot["kernel_s"], mot["unknown"]) == (None, ["FLOPs of the custom call x", "branch taken by y"])
    assert (dense["kernel_s"], dense["unknown"], dense["notes"]) == (3.0, [], [])
    assert mot["notes"] == ["XLA's attention, not cuDNN's"] and (mot["copies"], mot["transposes"]) == (5, 2)
    assert capsys.readouterr().out.splitlines()[-1] == "demo: XLA's attention, not cuDNN's"


@pytest.mark.slow
def test_memory_of_a_step_is_compared_with_the_dense_baseline():
    layer = dataclasses.replace(SMALL.model.feed_forward, num_experts=32)
    mixture = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, feed_forward=layer))
    configs = {"mot": mixture, "dense": dense_of_equal_width(mixture)}
    mot, dense = memory_of_steps(configs, "local:1", lambda line: None)
    assert (mot["config"], dense["config"], dense["ratio"]) == ("mot", "dense", 1)
    assert mot["ratio"] == mot["temporaries"] / dense["temporaries"] > 1
    # Parameters and both moments, float32: the baseline has one dense layer with biases instead of the experts.
    assert mot["arguments"] - dense["arguments"] == 3 * 4 * (2 * 32 * 16 * 4 + 16 * 32 - (2 * 16 * 32 + 32 + 16))


@pytest.mark.slow
def test_the_command_compares_steps(tmp_path, capsys):
    arguments = ["--topology", "local:1", "--model.num-blocks", "1"]
    cli.main(["bench", "step", "configs/demo.py", *arguments, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["config"] for row in rows] == ["demo", "demo, dense"] and rows[0]["ratio"] > 1
    assert "GB of temporaries" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["layers", "--shapes", "tiny"], ["step", "configs/demo.py"]], ids=lambda c: c[0])
def test_flags_of_timing_are_refused_with_topology(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", *command, "--topology", "local:1", "--rounds", "9", "--profile", "trace"])
    rounds, profile = capsys.readouterr().err.splitlines()
    assert "--rounds = 9: has no part in --topology" in rounds and rounds.endswith("try without --rounds")
    assert "--profile = trace: has no part in --topology" in profile and profile.endswith("try without --profile")


@pytest.mark.parametrize("columns", [COLUMNS, STEP_COLUMNS])
def test_column_titles_are_unique(columns):
    titles = [title for title, _ in columns]
    assert len(set(titles)) == len(titles)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_bytes_of_a_kernel_are_those_of_its_blocks(tmp_path):
    rows = rows_of(tmp_path, "v5p:2x2x1")
    kernel = rows["mixture_of_tokens:fused_mixture"]
    assert 0 < kernel["kernel_bytes"] < kernel["hbm_bytes"] and kernel["kernel_bytes"] < kernel["cost_bytes"]
    assert not rows["mixture_of_tokens"]["kernel_bytes"]
