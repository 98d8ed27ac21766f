"""`mot bench decoding`: minimum bytes, timing in turns, and the table."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest

from mot_jax import cli
from mot_jax.benchmark.decoding import random_variables, step_bytes
from mot_jax.benchmark.report import markdown
from mot_jax.benchmark.timing import Timings, in_turns
from mot_jax.config import (
    Config,
    ExpertChoiceConfig,
    ExpertThresholdConfig,
    HashConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    ReluRoutingConfig,
    to_json,
)
from mot_jax.modes import enter
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.transformer import bind, init_params

MODEL = ModelConfig(2, 16, 64, 2, context_length=16, loss_chunk=16, feed_forward=MixtureOfTokensConfig(4, 8))


@pytest.mark.slow
def test_a_decode_step_reads_each_weight_once_and_only_the_chosen_experts():
    """float32: 4 bytes. The cache has 8 positions of keys and values, 16 numbers each, in both blocks."""
    config = Config(model=MODEL)
    params = init_params(MODEL, jax.random.key(0, impl="rbg"))
    cache = {batch: 2 * 2 * batch * 8 * 16 * 4 for batch in (1, 3)}
    experts = 4 * sum(value.size for name, value in params.items() if "/w_" in name)
    tables = 4 * (257 + 16) * 16
    rest = 4 * sum(value.size for value in params.values()) - experts - tables
    embedding_rows = {batch: 2 * batch * 16 * 4 for batch in (1, 3)}
    for batch in (1, 3):
        assert step_bytes(MODEL, params, batch) == rest + experts + embedding_rows[batch] + cache[batch]
    routed, routed_params = enter("token_choice", config, params, 0)
    assert step_bytes(routed.model, routed_params, 1) == rest + experts * 2 // 8 + embedding_rows[1] + cache[1]
    chosen = experts * (1 - (1 - 2 / 8) ** 3)
    assert step_bytes(routed.model, routed_params, 3) == round(rest + chosen + embedding_rows[3] + cache[3])


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        (ExpertThresholdConfig(8, top_k=2), 2 / 8),
        (ExpertChoiceConfig(4, 8, top_k=2), 1),
        (ReluRoutingConfig(8, top_k=2), 1),
        (HashConfig(8, top_k=2), 2 / 8),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_experts_that_a_decode_step_of_one_sequence_reads(kind, share):
    model = dataclasses.replace(MODEL, feed_forward=kind)
    params = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    others = {name: value for name, value in params.items() if "/w_" not in name}
    experts = 4 * sum(value.size for name, value in params.items() if name not in others)
    assert step_bytes(model, params, 1) - step_bytes(model, others, 1) == experts * share > 0


def test_random_models_have_thresholds_that_top_k_experts_reach():
    kind = ExpertThresholdConfig(8, top_k=2, routing_group_tokens=16)
    model = dataclasses.replace(MODEL, feed_forward=kind)
    variables = random_variables(model)
    tokens = np.random.default_rng(0).integers(0, 256, (64, 16)).astype(np.int32)
    every = FeedForwardContext(np.ones(tokens.shape, bool), tokens)
    metrics = bind(model, variables)(tokens, every, np.zeros_like(tokens)).metrics
    reached = [float(value) for name, value in metrics.items() if name.startswith("experts_per_token")]
    assert len(reached) == 2 and reached == pytest.approx([2, 2], rel=0.2)
    assert not any(name.endswith(("num_updates", "quantile_average")) for name in random_variables(MODEL))


def test_programs_take_turns_and_the_first_round_is_discarded():
    calls = []

    def program(name):
        def prepare():
            calls.append(name)
            return lambda: np.zeros(1)

        return prepare

    times = in_turns({name: program(name) for name in "abc"}, rounds=30)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 31 and all(set(names) == {"a", "b", "c"} for names in rounds)
    assert len(set(rounds)) == 6  # all orders, so that no program always follows the same one
    assert {name: len(t.seconds) for name, t in times.items()} == {"a": 30, "b": 30, "c": 30}
    assert Timings((1.0, 2.0, 4.0)).median == 2.0


def test_tables_are_markdown():
    lines = markdown({"device": "cpu"}, [{"x": 1}, {"x": 22}], [("x", lambda row: str(row["x"])), ("y", lambda _: "-")])
    assert lines == ["device cpu", "", "| x  | y |", "|----|---|", "| 1  | - |", "| 22 | - |"]


def write_config(path, config: Config) -> str:
    path.write_text(
        f"from mot_jax.config import from_json\n\n\ndef get_config():\n    return from_json({to_json(config)!r})\n"
    )
    return str(path)


@pytest.mark.slow
def test_the_command_has_a_row_for_each_mode_and_the_dense_model(tmp_path, capsys):
    config, output = write_config(tmp_path / "tiny.py", Config(model=MODEL)), str(tmp_path / "rows.json")
    cli.main(["bench", "decoding", config, "--batch", "2", "--rounds", "3", "--json", output])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    modes = ["dense", "grouped", "companions", "sparse", "mean_field", "token_choice", "threshold", "discrete"]
    assert [row["mode"] for row in rows] == modes
    assert all(row["seconds_per_step"] > 0 and row["temporaries"] > 0 for row in rows)
    assert capsys.readouterr().out.count("\n| ") == 9


@pytest.mark.slow
def test_a_kind_with_router_state_has_a_row(tmp_path):
    model = dataclasses.replace(MODEL, feed_forward=HashConfig(8, top_k=2))
    config, output = write_config(tmp_path / "tiny.py", Config(model=model)), tmp_path / "rows.json"
    cli.main(["bench", "decoding", config, "--batch", "2", "--rounds", "3", "--json", str(output)])
    assert [row["mode"] for row in json.loads(output.read_text())["rows"]] == ["dense", "grouped"]


def test_a_masked_model_is_refused(tmp_path, capsys):
    config = write_config(tmp_path / "masked.py", Config(model=dataclasses.replace(MODEL, objective="masked")))
    with pytest.raises(SystemExit):
        cli.main(["bench", "decoding", config])
    assert "generates no text; try a causal model" in capsys.readouterr().err
