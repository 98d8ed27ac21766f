"""A Mixture-of-Tokens run that another run continues: annealed, or as token choice."""

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
from tiny_run import StopAt, StoppedError

from mot_jax.cli import main
from mot_jax.config import Config, DenseConfig, LoggingConfig, MixingConfig, check
from mot_jax.errors import UserError
from mot_jax.nn.mixing import temperature_at_step
from mot_jax.nn.sharding import make_mesh
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.runs.metrics import read_rows
from mot_jax.runs.restore import load_training
from mot_jax.training import train, trainer, transition


@pytest.fixture(scope="module")
def small(tiny: Config) -> Config:
    """A config with little to do but train: hundreds of windows to score, a sample of one token."""
    data = dataclasses.replace(tiny.data, validation_split="validation[:1%]")
    return dataclasses.replace(tiny, data=data, logging=LoggingConfig(tensorboard=False, sample_tokens=1))


@pytest.fixture(scope="module")
def source(small: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, str]:
    """A run of six steps."""
    workdir = str(tmp_path_factory.mktemp("mixed") / "run")
    config = dataclasses.replace(small, training=dataclasses.replace(small.training, steps=6))
    train(config, workdir)
    return config, workdir


def tuned(source: tuple[Config, str], steps: int = 4, **changes) -> Config:
    """The config that the command makes for a tuning run."""
    config = transition.tuning_config(*source, "token_choice", steps)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def rows(workdir: Path | str, split: str) -> list[dict]:
    speed = ("tokens_per_second", "model_flops_per_second", "data_wait", "seconds_left", "mfu")
    chosen = [row for row in read_rows(epath.Path(workdir)) if row["split"] == split]
    return [{name: value for name, value in row.items() if name not in speed} for row in chosen]


def named(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("to", [pytest.param("annealed", marks=pytest.mark.slow), "token_choice", "bias"])
def test_weights_and_moments_are_carried_over_and_the_schedule_starts_again(source, to):
    config = transition.annealing_config(*source, 4) if to == "annealed" else tuned(source)
    if to == "bias":  # which is router state, that the source lacks
        kind = dataclasses.replace(config.model.feed_forward, scores="sigmoid", balance="bias")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=kind))
    check(config)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        old = load_training(source[1], mesh).state
        state, example, notes = transition.transition_state(config, mesh)
    assert example == 6 * 32 and "after 6 steps" in notes[0] and "learning rate up to" in notes[1]
    schedules = [part for part in state.opt_state if isinstance(part, optax.ScaleByScheduleState)]
    assert int(state.step) == 0 and [int(part.count) for part in schedules] == [0]
    before, after = named((old.params, old.opt_state[:-1])), named((state.params, state.opt_state[:-1]))
    assert before.keys() == after.keys() and any("count" in name for name in before)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    if to != "annealed":
        new = transition.create_state(config, mesh)
        for variables, expected in ((state.params, new.params), (state.router, new.router)):
            assert {n: (v.shape, v.sharding) for n, v in variables.items()} == {
                n: (v.shape, v.sharding) for n, v in expected.items()
            }
        assert bool(state.router) == (to == "bias")


@pytest.mark.slow
def test_a_random_router_has_new_controllers_and_no_other_new_weights(source):
    config = tuned(source, transition_router="random")
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        old = load_training(source[1], mesh).state.params
        first = transition.create_state(source[0], mesh).params
        params = transition.transition_state(config, mesh)[0].params
    for name, value in params.items():
        new = name.endswith("/controller")
        assert np.array_equal(value, old[name]) != new, name
        assert not new or not np.allclose(value, first[name]), name


@pytest.mark.slow
def test_the_text_continues_at_the_next_whole_batch_and_a_stopped_run_resumes_bit_for_bit(
    source, tmp_path, monkeypatch
):
    config = tuned(source, steps=4, log_every=1, validate_every=4, checkpoint_every=2)
    first_examples: list[int] = []
    train_batches = trainer.train_batches

    def recording(*arguments):
        first_examples.append(arguments[-1])
        return train_batches(*arguments)

    monkeypatch.setattr(trainer, "train_batches", recording)
    train(config, tmp_path / "undisturbed")
    with pytest.raises(StoppedError):
        train(config, tmp_path / "stopped", [StopAt(4)])
    train(config, tmp_path / "stopped")
    assert first_examples == [6 * 32, 6 * 32, 8 * 32]
    for split in ("train", "validation"):
        assert rows(tmp_path / "stopped", split) == rows(tmp_path / "undisturbed", split)
    assert [row["step"] for row in rows(tmp_path / "stopped", "validation")] == [0, 1, 2, 4]
    mesh = make_mesh(config)
    wider = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=160))
    assert transition.transition_state(wider, mesh)[1] == 320  # after 192 examples


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_validates_step_0_again(source, tmp_path, monkeypatch):
    config = tuned(source, steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run", "validation")] == [0, 1, 2]


def test_annealing_ends_one_hot_and_tuning_begins_so(source):
    config = transition.annealing_config(*source, 4)
    mixing = config.model.feed_forward.mixing
    assert [float(temperature_at_step(mixing, np.int32(step))) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert config.training.transition_from == source[1] and config.training.steps == 4
    later = tuned((config, source[1]))
    assert later.model.feed_forward.mixture.mixing == MixingConfig(temperature=0.0)
    transition.check_transition(config)
    transition.check_transition(later)


def test_a_source_that_cannot_be_tuned_is_refused_in_one_line(source, tmp_path):
    dense = dataclasses.replace(source[0], model=dataclasses.replace(source[0].model, feed_forward=DenseConfig()))
    for config in (lambda: tuned((dense, "runs/dense")), lambda: transition.annealing_config(dense, "runs/dense", 4)):
        with pytest.raises(UserError, match=r"^WORKDIR = runs/dense: must be a Mixture-of-Tokens run, and is dense;"):
            config()
    with pytest.raises(UserError, match=r"^--to = 'expert_choice': no such kind to tune to; .*token_choice"):
        transition.tuning_config(*source, "expert_choice", 4)
    with pytest.raises(UserError, match="token_choice") as error:
        tuned(variant(source, controllers="separate", emit="softmax"))
    assert len(error.value.faults) == 1


def variant(source: tuple[Config, str], **mixing) -> tuple[Config, str]:
    """Its config with another kind of mixing."""
    kind = dataclasses.replace(source[0].model.feed_forward, mixing=MixingConfig(**mixing))
    return dataclasses.replace(source[0], model=dataclasses.replace(source[0].model, feed_forward=kind)), source[1]


def test_every_difference_from_the_source_is_refused_at_once(source, tmp_path):
    config = tuned(source)
    transition.check_transition(config)
    optimizer = dataclasses.replace(config.training.optimizer, name="muon")
    training = dataclasses.replace(config.training, optimizer=optimizer, seed=1)
    kind = dataclasses.replace(config.model.feed_forward, mixture=None)
    model = dataclasses.replace(config.model, final_norm=True, feed_forward=kind)
    data = dataclasses.replace(config.data, shuffle_group_size=8)
    with pytest.raises(UserError) as error:
        transition.check_transition(dataclasses.replace(config, model=model, training=training, data=data))
    assert [fault.partition(":")[0] for fault in error.value.faults] == [
        "model.final_norm = True",
        "training.seed = 1",
        "training.optimizer.name = 'muon'",
        "data.shuffle_group_size = 8",
        "model.feed_forward",
    ]
    assert all(f"as in training.transition_from = {source[1]!r}" in fault for fault in error.value.faults)


def test_a_source_without_a_checkpoint_or_of_other_text_is_refused_before_the_start(source, tmp_path):
    copy = Path(shutil.copytree(source[1], tmp_path / "copy"))
    config = tuned((source[0], str(copy)))
    fingerprints = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps(fingerprints | {"train": "other"}))
    with pytest.raises(UserError, match=f"workdir = {copy} was trained on other text: train: other in the run"):
        train(config, tmp_path / "new")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match=r"copy': has no checkpoint yet; try again"):
        train(config, tmp_path / "new")
    shutil.rmtree(copy)
    with pytest.raises(UserError, match="copy: no such directory"):
        train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--to", "token_choice", "--steps", "0"], "--steps = '0': must be a whole number, at least 1"),
        (["--to", "token_choice", "--steps", "4", "--anneal", "-1"], "--anneal = '-1': must be a whole number"),
        (["--to", "token_choice", "--steps", "4", "--top-k", "9"], "top_k = 9: must be at most"),
        (["--to", "token_choice", "--steps", "4", "--router", "best"], "--router = 'best': must be 'controller' or"),
        (["--to", "dense", "--steps", "4"], "--to = 'dense': no such kind"),
        (["--steps", "4"], "--to is missing; try mot transition runs/demo --to token_choice --steps 100"),
        (
            ["--to", "token_choice", "--steps", "4", "--model.topk", "1"],
            "--model.topk: no such flag; did you mean '--model.",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(source, capsys, flags, words):
    with pytest.raises(SystemExit) as ended:
        main(["transition", source[1], *flags])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and words in lines[0]


@pytest.mark.slow
def test_tuning_recovers_the_loss_of_the_conversion(tiny, small, tmp_path, capsys):
    """The command from end to end, on a small model that has learned to mix; again, it prints the report only."""
    small = dataclasses.replace(small, data=tiny.data)  # of documents enough to make whole groups
    optimizer = dataclasses.replace(small.training.optimizer, learning_rate=7e-3)
    often = {"log_every": 50, "validate_every": 500, "checkpoint_every": 500}
    training = dataclasses.replace(small.training, steps=500, optimizer=optimizer, **often)
    workdir, output = str(tmp_path / "mixed"), tmp_path / "mixed-token_choice"
    train(dataclasses.replace(small, training=training), workdir)
    main(["transition", workdir, "--to", "token_choice", "--steps", "50"])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads((output / "transition.json").read_text())
    before, after = ({mode: score["loss"] for mode, score in result[when].items()} for when in ("before", "after"))
    assert (
        before.keys() - {"threshold"}
        == after.keys()
        >= {"grouped", "discrete", "companions", "token_choice", "without"}
    )
    assert before["token_choice"] > before["grouped"] * 1.02
    assert after["token_choice"] < before["grouped"] * 1.01
    steps = [step for step, _ in result["curve"]]
    assert steps[:7] == [0, 1, 2, 4, 6, 8, 12] and steps[-1] == 50
    assert result["curve"][0][1] > result["grouped"] and len({s["windows"] for s in result["after"].values()}) == 1
    assert (output / "transition.png").read_bytes().startswith(b"\x89PNG")
    assert any(line.startswith("token_choice | ") for line in lines)
    main(["transition", workdir, "--to", "token_choice", "--steps", "50"])
    again = capsys.readouterr().out.splitlines()
    assert "nothing left to train" in again[0] and again[-len(before) - 3 :] == lines[-len(before) - 3 :]


def test_the_report_of_a_diverged_run_is_printed_again(source, tmp_path):
    """Its file has null in place of losses that are not finite."""
    settings = {"from": source[1], "tuned": str(tmp_path), "steps": 4, "limit": None}
    scores = {"grouped": {"loss": 2.0}, "token_choice": {"loss": None}}
    result = {**settings, "before": scores, "after": scores, "grouped": 2.0, "curve": [[0, 2.5], [4, None]]}
    (tmp_path / "transition.json").write_text(json.dumps(result))
    lines = transition.report(tuned(source), tmp_path, source[1])
    assert "grouped      | 2.0000 ( +0.0%)   | 2.0000 ( +0.0%)" in lines
    assert any(line.startswith("token_choice | nan") for line in lines)
    assert "from 2.5000 to nan, compared with 2.0000 in groups" in lines[-2]
    assert lines[-1] == "warning: nan marks a loss that is not finite: that model has diverged"
    assert transition._picture(result).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "JSONDecodeError"), ("[]", "no JSON object"), ("{}", "without from"), ('{"from": "x"}', "without before")],
)
def test_a_damaged_report_is_one_line_and_not_overwritten(source, tmp_path, content, words):
    path = tmp_path / "transition.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"^{path}: is damaged .*{words}.*the same command writes it again$"):
        transition.report(tuned(source), tmp_path, source[1])
    assert path.read_text() == content


@pytest.mark.slow
def test_annealing_before_tuning(source, tmp_path, capsys):
    output = tmp_path / "tuned"
    main(["transition", source[1], "--to", "token_choice", "--steps", "2", "--anneal", "2", "--output", f"{output}/"])
    out = capsys.readouterr().out
    annealed = f"{output}-annealed"
    assert f"begins as {source[1]} after 6 steps, with example 192" in out
    assert f"begins as {annealed} after 2 steps, with example 256" in out
    assert f"validation loss of {source[1]} and of {output}" in out
    entropies = [row["mixing_entropy/00"] for row in rows(annealed, "train")]
    assert entropies[1] < entropies[0]
