"""A kind that a file outside of the package registers: described, trained, resumed, read again, compared."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from flax import nnx

import mot_jax
from mot_jax import cli
from mot_jax.benchmark.study import load_study
from mot_jax.config import FeedForwardKind, MeshConfig, from_json, load_config, to_json
from mot_jax.cost.feed_forward import DenseCost, feed_forward_cost
from mot_jax.errors import UserError
from mot_jax.nn.feed_forward import Dense, make_feed_forward
from mot_jax.training import train

EXAMPLE = Path(__file__).parents[3] / "examples" / "own_kind.py"


@pytest.fixture
def small(tiny):
    """The config of the example, with the sizes and the text of the tiny run."""
    kind = load_config(EXAMPLE).model.feed_forward
    return dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, feed_forward=kind))


def test_the_config_is_read_again_and_described(capsys):
    config = load_config(EXAMPLE)
    assert config.model.feed_forward.kind == "bilinear" and from_json(to_json(config)) == config
    assert load_config(EXAMPLE).model.feed_forward == config.model.feed_forward  # the file is executed once
    cli.main(["describe", str(EXAMPLE)])
    assert "bilinear" in capsys.readouterr().out
    study = load_study(EXAMPLE)
    assert list(study.entrants) == ["dense", "bilinear"]


def test_the_layer_has_the_products_of_its_cost():
    config = load_config(EXAMPLE).model
    layer = make_feed_forward(config, config.feed_forward, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 8, config.d_model))
    p = {name: np.asarray(getattr(layer, name)[...], float) for name in ("kernel_in", "kernel_gate", "kernel_out")}
    expected = (np.asarray(x, float) @ p["kernel_in"] * (x @ p["kernel_gate"])) @ p["kernel_out"]
    np.testing.assert_allclose(layer(x).y, expected, rtol=1e-3, atol=1e-4)
    cost = feed_forward_cost(config, config.feed_forward)
    assert cost.flops() == 2 * sum(value.size for value in p.values())


@pytest.mark.slow
def test_a_run_is_trained_on_a_mesh_resumed_and_evaluated(small, tmp_path):
    """By another process, which knows the kind by the environment only."""
    data = dataclasses.replace(small.data, validation_windows=32, final_validation_windows=32)
    meshed = dataclasses.replace(small, mesh=MeshConfig(data=2, fsdp=2, tensor=2), data=data)
    first, last = (
        train(dataclasses.replace(meshed, training=dataclasses.replace(small.training, steps=steps)), tmp_path)
        for steps in (4, 6)
    )
    assert (first["step"], last["step"]) == (4, 6) and math.isfinite(last["loss"])
    command = [
        sys.executable,
        "-m",
        "mot_jax",
        "evaluate",
        str(tmp_path),
        "--windows",
        "32",
        "--json",
        str(tmp_path / "scores.json"),
    ]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "MOT_JAX_KINDS=FILE.py" in refused.stderr
    subprocess.run(command, env=os.environ | {"MOT_JAX_KINDS": str(EXAMPLE)}, check=True)
    assert json.loads((tmp_path / "scores.json").read_text())


def test_kinds_that_cannot_be_registered():
    @dataclasses.dataclass(frozen=True)
    class Other(FeedForwardKind):
        kind: ClassVar[str] = "mixture_of_tokens"

    class OtherLayer(Dense):
        config_type = Other

    class Unnamed(Dense):
        config_type = type("NoDataclass", (), {})

    with pytest.raises(UserError, match=r"kind = 'mixture_of_tokens': is another kind; try 'my_mixture_of_tokens'"):
        mot_jax.register_kind(OtherLayer, DenseCost)
    with pytest.raises(UserError, match=r"Unnamed.config_type = NoDataclass: must be a dataclass derived from"):
        mot_jax.register_kind(Unnamed, DenseCost)
