"""A Mixture-of-Tokens model that begins as a trained dense one."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from mot_jax.config import Config, DenseConfig, MixingConfig, MixtureOfTokensConfig, to_json
from mot_jax.errors import UserError
from mot_jax.nn.sharding import make_mesh
from mot_jax.nn.transformer import bind, init_params
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.runs.metrics import read_rows
from mot_jax.runs.restore import load_run
from mot_jax.runs.state import create_state
from mot_jax.training import train
from mot_jax.training.upcycling import check_upcycle, upcycle

# (experts, width, shared): as wide as the dense layer (32), slices of it, wider than it, with a shared expert.
SHAPES = {"copies": (4, 32, 0), "slices": (16, 8, 0), "wider": (2, 64, 0), "shared": (8, 12, 8)}


@pytest.fixture(scope="module")
def dense_run(tiny, tmp_path_factory) -> tuple[Config, str]:
    """The config and the workdir of a dense model without biases, saved at step 4."""
    model = dataclasses.replace(tiny.model, feed_forward=DenseConfig(bias=False), final_norm=True)
    config = dataclasses.replace(tiny, model=model, training=dataclasses.replace(tiny.training, steps=4))
    workdir = epath.Path(tmp_path_factory.mktemp("dense"))
    (workdir / "config.json").write_text(to_json(config))
    state = create_state(config, make_mesh(config, jax.devices()[:1]))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(4, state._replace(step=state.step + 4), 128, config)
    return config, str(workdir)


def mixture(config: Config, shape: str, **changes) -> Config:
    experts, width, shared = SHAPES[shape]
    kind = MixtureOfTokensConfig(4, experts, width, shared_expert_dim=shared, mixing=MixingConfig("uniform"))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=kind, **changes))


@pytest.mark.parametrize("shape", [pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES])
def test_with_equal_sequences_in_a_group_the_model_equals_the_dense_one(dense_run, shape):
    """Uniform mixing of equal tokens: the experts together give G times the dense update, each token a G-th of it."""
    config, workdir = dense_run
    model = mixture(config, shape).model
    key = jax.random.key(1, impl="rbg")
    params, notes = upcycle(model, init_params(model, key), workdir)
    assert len(notes) == 1 and "after 4 steps" in notes[0]
    rows = np.random.default_rng(0).integers(0, 256, (2, 16)).astype(np.int32)
    outputs = bind(model, params)(np.repeat(rows, 4, axis=0)).hidden[::4]
    expected = bind(config.model, load_run(workdir).params)(rows).hidden
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_only_the_chosen_blocks_become_experts(dense_run):
    config, workdir = dense_run
    model = mixture(config, "copies", moe_blocks=(1,)).model
    old = load_run(workdir).params
    params, _ = upcycle(model, init_params(model, jax.random.key(1, impl="rbg")), workdir)
    np.testing.assert_array_equal(
        params["stacks/0/0/feed_forward/kernel_in"][0], old["stacks/0/0/feed_forward/kernel_in"][0]
    )
    np.testing.assert_array_equal(
        params["stacks/1/0/feed_forward/w_in"][0, 3], old["stacks/0/0/feed_forward/kernel_in"][1]
    )
    np.testing.assert_array_equal(params["head"], old["head"])


@pytest.mark.slow
def test_a_run_begins_as_the_dense_one_and_resumes_without_it(dense_run, tmp_path, capsys):
    config, copy = dense_run[0], tmp_path / "dense"
    train(config, copy)
    training = dataclasses.replace(config.training, steps=12, upcycle_from=str(copy))
    train(dataclasses.replace(mixture(config, "copies"), training=training), tmp_path / "run")
    assert f"experts begin as the dense layers of {copy}" in capsys.readouterr().out
    losses = [row["loss"] for row in read_rows(epath.Path(tmp_path) / "run") if row["split"] == "train"]
    before = [row["loss"] for row in read_rows(epath.Path(copy)) if row["split"] == "train"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.02 and losses[0] < before[0]
    shutil.rmtree(copy)
    training = dataclasses.replace(training, steps=13)
    train(dataclasses.replace(mixture(config, "copies"), training=training), tmp_path / "run")
    assert "experts begin" not in capsys.readouterr().out


def test_a_source_that_cannot_be_upcycled_is_refused_before_the_start(dense_run, tmp_path):
    config, workdir = dense_run
    training = dataclasses.replace(config.training, upcycle_from=workdir)
    wrong = dataclasses.replace(mixture(config, "copies", final_norm=False), training=training)
    kind = dataclasses.replace(wrong.model.feed_forward, expert_dim=24)
    with pytest.raises(UserError) as error:
        check_upcycle(dataclasses.replace(wrong, model=dataclasses.replace(wrong.model, feed_forward=kind)))
    first, second = error.value.faults
    assert first.startswith("model.final_norm = False: must be as in") and first.endswith("try True")
    assert second.startswith("model.feed_forward.expert_dim = 24: must divide") and second.endswith("try 16")
    training = dataclasses.replace(config.training, upcycle_from=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no such directory"):
        train(dataclasses.replace(mixture(config, "copies"), training=training), tmp_path / "new")
    assert not (tmp_path / "new").exists()
