"""`mot inspect`: the recorded weights are those of the forward pass, and the tables are means of them."""

from __future__ import annotations

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mot_jax import cli
from mot_jax.analysis import curves, pictures
from mot_jax.analysis import inspect as inspect_module
from mot_jax.analysis.inspect import forward_with_weights, inspect
from mot_jax.config import Config, DataConfig, DenseConfig, MixtureOfTokensConfig, ModelConfig, TrainingConfig, to_json
from mot_jax.data.objectives import Objective
from mot_jax.data.text import open_split, open_tokenizer
from mot_jax.errors import UserError
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.mixing import group, normalised_entropy
from mot_jax.nn.transformer import ModelOutput, bind, init_params
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.runs.restore import load_run
from mot_jax.runs.state import TrainState


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(inspect_module, "_MIN_TOKENS", 1000)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    """A run whose second and fourth block mix, with mixing weights far from uniform."""
    path = epath.Path(tmp_path_factory.mktemp("runs")) / "run"
    kind = MixtureOfTokensConfig(group_size=4, num_experts=8, controller_init_scale=5.0)
    sizes = {"num_blocks": 4, "d_model": 16, "d_ff": 32, "num_heads": 2, "context_length": 16, "loss_chunk": 8}
    config = Config(
        model=ModelConfig(**sizes, feed_forward=kind, moe_blocks="every_other"),
        data=DataConfig(directory=str(tmp_path_factory.mktemp("data"))),
        training=TrainingConfig(batch_size=4),
    )
    shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape.shape).astype(np.float32) for name, shape in shapes.items()}
    with Checkpoints(path / "checkpoints") as checkpoints:
        zero = jnp.asarray(0)
        checkpoints.save(7, TrainState(jnp.asarray(7), jax.device_put(params), (), zero, zero, {}), 0, config)
    (path / "config.json").write_text(to_json(config))
    names = [f"{name}/{block:02d}" for name in ("mixing_entropy", "emit_entropy", "update_ratio") for block in (1, 3)]
    rows = [{"step": step, "split": "train", **dict.fromkeys(names, 1 / step)} for step in (1, 2, 3)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class ForwardPass(NamedTuple):
    """64 sequences of the validation text, the model's output for them, and its mixing weights."""

    tokens: np.ndarray
    mask: np.ndarray
    out: ModelOutput
    weights: dict[str, dict[int, jax.Array]]


@pytest.fixture(scope="module")
def forward_pass(workdir) -> ForwardPass:
    config, params, step = load_run(workdir)
    tokenizer, windows = open_validation(config)
    ids = inspect_module.validation_order(windows.documents, 4)[:16].reshape(-1)
    batch = Objective.of(config, tokenizer)(windows.read(ids), ids)
    out, weights = jax.jit(forward_with_weights, static_argnums=0)(config.model, params, step, batch)
    return ForwardPass(batch.inputs, batch.token_mask, out, weights)


def open_validation(config):
    tokenizer = open_tokenizer(config)
    return tokenizer, open_split(config, "validation", tokenizer)


def test_weights_are_recorded_during_the_models_forward_pass(workdir, forward_pass):
    config, params, _ = load_run(workdir)
    tokens, mask, out, weights = forward_pass
    context = FeedForwardContext(token_mask=mask, token_ids=tokens, step=jnp.asarray(7))
    plain = jax.jit(lambda p: bind(config.model, p)(tokens, context))(params)
    np.testing.assert_allclose(out.hidden, plain.hidden, rtol=1e-6)
    assert out.metrics.keys() == plain.metrics.keys()
    assert weights.keys() == {"merge"} and weights["merge"].keys() == {1, 3}
    for block, merge in weights["merge"].items():
        assert merge.shape == (16, 4, 16, 8)
        entropy = normalised_entropy(merge, group(jnp.asarray(mask), 4))
        assert float(entropy) == pytest.approx(float(plain.metrics[f"mixing_entropy/{block:02d}"]))
    assert not np.allclose(*weights["merge"].values())


def test_the_tables_are_means_over_the_windows(workdir, forward_pass):
    run = load_run(workdir)
    tokenizer, windows = open_validation(run.config)
    tables = inspect_module._token_statistics(
        run, tokenizer, windows, inspect_module.validation_order(windows.documents, 4)
    )
    tokens, mask, _, weights = forward_pass
    assert tables["tokens_read"] == mask.sum() and tables["blocks"].keys() == {"01", "03"}
    for name, block in tables["blocks"].items():
        merge = np.asarray(weights["merge"][int(name)], np.float64)
        entropy = -(merge * np.log(np.maximum(merge, 1e-30))).sum(axis=1).mean(axis=(0, 1)) / np.log(4)
        assert [e["expert"] for e in block["experts"]] == np.argsort(entropy).tolist()
        assert block["entropy"] == pytest.approx(entropy.mean(), abs=1e-4)
        rows = merge.reshape(-1, 8)
        for expert in block["experts"]:
            assert expert["entropy"] == pytest.approx(entropy[expert["expert"]], abs=1e-4)
            ratios = [token["ratio"] for token in expert["tokens"]]
            assert ratios == sorted(ratios, reverse=True) and min(ratios) > 1
            for token in expert["tokens"]:
                occurrences = (tokens == token["id"]).ravel()
                assert token["count"] == occurrences.sum() >= 8
                assert token["ratio"] == pytest.approx(4 * rows[occurrences, expert["expert"]].mean(), abs=2e-3)
                assert token["text"] == chr(token["id"]) or token["id"] > 127


def test_group_members_are_labelled(workdir):
    run = load_run(workdir)
    tokenizer, windows = open_validation(run.config)
    tokens = windows.read([0, 5]).tokens
    shares, members = inspect_module._group_shares(run, tokenizer, windows, np.array([0, -1, 5, 9]), 0, 0)
    assert [member["token"] for member in members[:3]] == [
        "<eot>",
        "<masked>",
        chr(tokens[1, 0]),
    ]  # window 0 begins the split
    assert [member["real"] for member in members] == [True, False, True, True]
    assert shares["merge"].keys() == {1, 3}
    for share in shares["merge"].values():
        assert share.shape == (4, 8) and not share[1].any()
        np.testing.assert_allclose(share.sum(axis=0), 1, rtol=1e-6)
    _, members = inspect_module._group_shares(run, tokenizer, windows, np.array([5]).repeat(4), 0, 3)
    assert members[0]["before"] + members[0]["token"] == bytes(tokens[1, :4].tolist()).decode()


def test_mask_tokens_of_a_masked_model_are_labelled(workdir):
    """With a document mask, as in training."""
    run = load_run(workdir)
    model = dataclasses.replace(run.config.model, objective="masked", vocab_size=258, document_mask=True)
    config = dataclasses.replace(run.config, model=model)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    masked = run._replace(config=config, params={name: jnp.zeros(s.shape, s.dtype) for name, s in shapes.items()})
    tokenizer, windows = open_validation(config)
    members = [inspect_module._group_shares(masked, tokenizer, windows, np.arange(4), 0, s)[1] for s in range(16)]
    assert 0 < sum(member["token"] == "<mask>" for group in members for member in group) < 30


def test_the_command_writes_pictures_a_table_and_a_summary(workdir, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "weights.png").write_text("of another time")
    cli.main(["inspect", str(workdir), "--output", str(tmp_path), "--group", "1", "--position", "9"])
    assert not (workdir / "inspect").exists() and (tmp_path / "notes.txt").read_text() == "mine"
    for picture in ("entropy.png", "weights.png", "tokens.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "inspect.json").read_text())
    assert (report["step"], report["group"]["index"], report["group"]["position"]) == (7, 1, 9)
    assert len(report["group"]["rows"]) == 4
    summary, table = capsys.readouterr().out, (tmp_path / "tokens.txt").read_text()
    assert "block 03: mean entropy" in summary and summary.count("  expert ") == 2 * 4
    assert table.count("  expert ") == 2 * 8 and "weights.png" in summary and "notes.txt" not in summary


def test_invalid_runs_and_options_are_errors_of_one_line(workdir, tmp_path):
    config = load_run(workdir).config
    dense = dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=DenseConfig()))
    (tmp_path / "config.json").write_text(to_json(dense))
    with pytest.raises(UserError, match=r"holds a dense model, and mixing weights are those of mixture_of_tokens; try"):
        inspect(tmp_path)
    with pytest.raises(UserError, match=r"--group = -1: must be 0 to \d+; try 0$"):
        inspect(workdir, group=-1)
    with pytest.raises(UserError, match=r"--position = 16: must be 0 to 15; try 15$"):
        inspect(workdir, position=16)
    with pytest.raises(UserError, match=r"--output = .*config.json: cannot be written \(.*\); try"):
        inspect(workdir, tmp_path / "config.json")
    assert not (workdir / "inspect").exists()


def test_any_text_can_be_drawn():
    """Warnings are errors in these tests: a glyph that the font lacks, a title that does not fit."""
    shares = {block: np.full((2, 64), 0.5) for block in range(4)}
    assert pictures.weight_maps(shares, ["日本 $x$│\x00", pictures.visible("a b\n\t│")], "a group").startswith(
        b"\x89PNG"
    )
    token = {"text": "日$\n$", "ratio": 1.5}
    blocks = {
        "00": {"entropy": 0.5, "experts": [{"expert": 1, "entropy": 0.5, "tokens": words} for words in ([token], [])]}
    }
    report = {"blocks": blocks, "step": 1, "tokens_read": 2, "least_count": 8}
    assert pictures.token_table(report, 1).startswith(b"\x89PNG")
    assert curves.mixing_curves([], "nothing yet").startswith(b"\x89PNG")
