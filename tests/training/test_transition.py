"""A Mixture-of-Tokens run that another run goes on with: annealed, or as token choice."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from etils import epath

from mot_jax.config import Config, ConfigError, DenseConfig, MixingConfig, MixtureOfTokensConfig, check, to_json
from mot_jax.sharding import make_mesh
from mot_jax.training import loop, transition
from mot_jax.training.metrics import read_rows
from mot_jax.training.restore import load_whole


@pytest.fixture(scope="module")
def source(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, str]:
    """A run of six steps."""
    workdir = str(tmp_path_factory.mktemp("mixed") / "run")
    config = dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, steps=6))
    loop.train(config, workdir)
    return config, workdir


def tuned(source: tuple[Config, str], steps: int = 4, **changes) -> Config:
    """The command's config of a tuning run."""
    config = transition.tuning_config(*source, "token_choice", steps)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def rows(workdir: Path | str, split: str) -> list[dict]:
    speed = ("tokens_per_second", "model_flops_per_second", "data_wait", "seconds_left", "mfu")
    found = [row for row in read_rows(epath.Path(workdir)) if row["split"] == split]
    return [{name: value for name, value in row.items() if name not in speed} for row in found]


def named(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("to", ["annealed", "token_choice"])
def test_weights_and_moments_are_carried_over_and_the_schedule_begins_anew(source, to):
    config = transition.annealing_config(*source, 4) if to == "annealed" else tuned(source)
    check(config)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        old = load_whole(source[1], mesh).state
        state, example, notes = transition.go_over(config, mesh)
    assert example == 6 * 32 and "after 6 steps" in notes[0] and "learning rate up to" in notes[1]
    schedules = [part for part in state.opt_state if isinstance(part, optax.ScaleByScheduleState)]
    assert int(state.step) == 0 and [int(part.count) for part in schedules] == [0]
    before, after = named((old.params, old.opt_state[:-1])), named((state.params, state.opt_state[:-1]))
    assert before.keys() == after.keys() and any("count" in name for name in before)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    if to == "token_choice":
        assert {name: p.shape for name, p in state.params.items()} == {
            name: p.shape for name, p in transition.create_state(config, mesh).params.items()
        }


def test_of_a_random_router_the_controller_alone_is_new_and_not_that_of_the_first_step(source):
    config = tuned(source, transition_router="random")
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        old = load_whole(source[1], mesh).state.params
        first = transition.create_state(source[0], mesh).params
        params = transition.go_over(config, mesh)[0].params
    for name, value in params.items():
        new = name.endswith("/controller")
        assert np.array_equal(value, old[name]) != new, name
        assert not new or not np.allclose(value, first[name]), name


def test_the_text_goes_on_at_the_next_whole_batch_and_a_stopped_run_bit_for_bit(source, tmp_path, monkeypatch):
    config = tuned(source, steps=4, log_every=1, checkpoint_every=2)
    asked: list[tuple[int, int]] = []
    batches = loop.train_batches

    def watched(*arguments):
        asked.append(arguments[-1])
        return batches(*arguments)

    monkeypatch.setattr(loop, "train_batches", watched)
    loop.train(config, tmp_path / "undisturbed")
    track = loop.log.Console.track

    def stopping(self, steps, done):
        for step in track(self, steps, done):
            if step == 4:
                raise KeyboardInterrupt
            yield step

    for stops in (True, False):
        with monkeypatch.context() as patch:
            if stops:
                patch.setattr(loop.log.Console, "track", stopping)
                with pytest.raises(KeyboardInterrupt):
                    loop.train(config, tmp_path / "stopped")
            else:
                loop.train(config, tmp_path / "stopped")
    assert asked == [6 * 32, 6 * 32, 8 * 32]
    for split in ("train", "validation"):
        assert rows(tmp_path / "stopped", split) == rows(tmp_path / "undisturbed", split)
    assert [row["step"] for row in rows(tmp_path / "stopped", "validation")] == [0, 1, 2, 4]
    mesh = make_mesh(config)
    wider = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=160))
    assert transition.go_over(wider, mesh)[1] == 320  # after 192 examples


def test_a_run_killed_before_its_first_checkpoint_has_one_row_of_the_spike(source, tmp_path, monkeypatch):
    config = tuned(source, steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.train(config, tmp_path / "run")
    loop.train(config, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run", "validation")] == [0, 1, 2]


def test_annealing_ends_one_hot_and_is_what_the_mixture_then_is(source, tmp_path):
    config = transition.annealing_config(*source, 4)
    loop.train(config, tmp_path / "annealed")
    entropies = [row["mixing_entropy/00"] for row in rows(tmp_path / "annealed", "train")]
    assert entropies[0] > 0.5 and entropies[-1] < 0.2  # the last step but one has a quarter of the temperature
    mixture = tuned((config, str(tmp_path / "annealed"))).model.feed_forward.mixture
    assert mixture.mixing == MixingConfig(temperature=0.0)
    transition.check_transition(tuned((config, str(tmp_path / "annealed"))))


def variant(source: tuple[Config, str], tmp_path: Path, **changes) -> tuple[Config, str]:
    """The workdir with another kind of layer in its config."""
    kind = dataclasses.replace(source[0].model.feed_forward, mixing=MixingConfig(**changes))
    config = dataclasses.replace(source[0], model=dataclasses.replace(source[0].model, feed_forward=kind))
    workdir = shutil.copytree(source[1], tmp_path / "variant")
    (workdir / "config.json").write_text(to_json(config))
    return config, str(workdir)
