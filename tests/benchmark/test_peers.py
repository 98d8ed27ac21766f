"""`mot bench layers --peers` and `--routing RUN`."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mot_jax import cli
from mot_jax.benchmark import layers, peers, trained_layer
from mot_jax.benchmark.peers import PEERS, PeerError, comparable
from mot_jax.benchmark.trained_layer import read_trained_layer
from mot_jax.config import (
    Config,
    DenseConfig,
    HashConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    TokenChoiceConfig,
    to_json,
)
from mot_jax.cost.layers import SHAPES
from mot_jax.errors import UserError

TINY = comparable(SHAPES["tiny"])


def results(peer: str, shape, capacity_factor: float | None):
    """Output and gradients of token choice and of a peer with the same parameters."""
    config = dataclasses.replace(shape.kinds()["token_choice"], capacity_factor=capacity_factor)
    configs = tuple(config if c.kind == "token_choice" else c for c in shape.configs)
    shape = dataclasses.replace(shape, configs=configs)
    ours, variables, _ = layers.layer_function(shape, "token_choice", "float32")
    x, dy = (jax.random.normal(jax.random.key(s), (shape.sequences, shape.length, shape.d_model)) for s in (0, 1))
    for forward in (ours, PEERS[peer].function(shape, "float32")):
        yield jax.jit(layers.forward_and_backward(forward))(variables, x, dy)


def assert_equal(pair) -> None:
    for ours, theirs in zip(*map(jax.tree.leaves, pair), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5 * np.abs(ours).max())
        assert jnp.any(ours)


@pytest.mark.slow
def test_the_grouped_product_of_jax_is_our_layer_without_a_capacity():
    assert_equal(list(results("jax_ragged_dot", TINY, None)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peer", "module", "factor"), [("maxtext", "maxtext", 1.0), ("tokamax_ragged_dot", "tokamax", None)]
)
def test_layers_of_other_packages_equal_ours(peer, module, factor):
    """MaxText's with a capacity at which assignments are dropped."""
    pytest.importorskip(module)
    assert_equal(list(results(peer, TINY, factor)))


@pytest.mark.slow
def test_a_missing_package_is_named_and_the_rest_is_timed(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    monkeypatch.setitem(sys.modules, "maxtext.layers.moe", None)
    output = tmp_path / "rows.json"
    flags = ["--peers", "--routing", "random", "--shapes", "tiny", "--rounds", "3", "--kinds", "token_choice:dropless"]
    cli.main(["bench", "layers", *flags, "--json", str(output)])
    content, table = json.loads(output.read_text()), capsys.readouterr().out
    reasons = {row["kind"]: row.get("reason") for row in content["rows"]}
    reason = "not installed: pip install -r requirements-peers.lock"
    assert reasons.pop("maxtext") == reasons.pop("tokamax_ragged_dot") == reason
    assert set(reasons) == {
        "products",
        "expert_products",
        "dense",
        "dense_flat",
        "token_choice:dropless",
        "jax_ragged_dot",
    }
    dropless, ragged = (
        {row["executed_flops"] for row in content["rows"] if row["kind"] == kind and row["direction"] == "forward"}
        for kind in ("token_choice:dropless", "jax_ragged_dot")
    )
    router = 2 * TINY.tokens * TINY.d_model * TINY.num_experts
    row = 3 * 2 * TINY.d_model * TINY.d_ff
    rows = 32 * (8 + 248 // 32)  # blocks of 32: up to 8 partly filled, one per expert, and full ones
    assert dropless == {router + rows * row}
    assert ragged == {router + TINY.num_experts * TINY.tokens * row}  # all experts on a CPU
    assert not any(reasons.values()) and table.count(f"maxtext ({reason})") == 2
    assert table.startswith("Layers on random routing, gated experts\n") and content["title"] in table


@pytest.mark.slow
def test_all_rows_on_the_routing_of_a_run(finished, monkeypatch, tmp_path):
    """Thresholds are of a step on the run's batch; hash layers have the run's tokens, whose experts are not even."""
    monkeypatch.setitem(sys.modules, "tokamax", None)
    monkeypatch.setitem(sys.modules, "maxtext.layers.moe", None)
    output, kinds = tmp_path / "rows.json", "token_choice:dropless,expert_threshold,hash"
    flags = ["--peers", "--routing", str(finished), "--kinds", kinds, "--rounds", "3", "--json", str(output)]
    cli.main(["bench", "layers", *flags])
    content = json.loads(output.read_text())
    assert content["title"] == f"routing of {finished}, block 1, step 12, gated experts"
    rows = {row["kind"]: row for row in content["rows"] if row["direction"] == "forward_backward"}
    assert all(rows[kind]["median_s"] > 0 for kind in (*kinds.split(","), "jax_ragged_dot", "expert_products", "dense"))
    assert rows["token_choice:dropless"]["dropped"] == 0 and rows["token_choice:dropless"]["load_max"] > 1
    assert rows["expert_threshold"]["experts_per_token"] == pytest.approx(2, rel=0.15)  # E / G of the run
    assert rows["hash"]["load_max"] > 1.05


@pytest.mark.slow
def test_the_layer_of_a_run(finished):
    layer = read_trained_layer(str(finished))
    shape, mixture = layer.shape, layer.shape.kinds()["mixture_of_tokens"]
    assert (layer.block, layer.step, mixture.expert_dim) == (1, 12, 12)
    assert (shape.d_model, shape.group_size, shape.num_experts, layer.x.shape) == (16, 4, 8, (32, 16, 16))
    assert shape.kinds()["token_choice"].top_k == 2 and shape.d_ff == 24
    assert np.allclose(layer.x.mean(axis=-1), 0, atol=0.5) and np.std(layer.x) > 0.3  # after a layer norm
    params, _ = layer.with_router(layers.layer_function(comparable(shape), "token_choice", "float32").variables)
    assert np.array_equal(params["controller"][...], layer.router["controller"])
    hash_layer = layers.layer_function(comparable(shape), "hash", "float32", token_ids=layer.token_ids)
    _, router = layer.with_router(hash_layer.variables)
    (table,) = (v[...] for v in jax.tree.leaves(router, is_leaf=lambda leaf: hasattr(leaf, "replace")))
    assert np.array_equal(table, layer.router["table"]) and table.shape == (shape.vocab_size, 2)
    assert np.bincount(np.asarray(table).ravel()).min() > 0  # all experts have ids
    with pytest.raises(UserError, match=r"--block = 2: has no mixture_of_tokens layer in .*; try one of \[0, 1\]"):
        read_trained_layer(str(finished), 2)


def kinds_and_reasons(kind, sequences: int, length: int) -> tuple[set[str], dict[str, str]]:
    config = Config(ModelConfig(d_ff=384, context_length=length, feed_forward=kind))
    shape, left_out = trained_layer._shape(config, "run", np.zeros((sequences, length, config.model.d_model)))
    return set(shape.kinds()), left_out


def test_kinds_that_cannot_be_compared_with_a_run_are_left_out():
    """96 positions are no multiple of 64; a batch of 32 has no group of 64; 10 // 4 groups have 5 experts per token."""
    kinds, left_out = kinds_and_reasons(MixtureOfTokensConfig(4, 8), 8, 96)
    assert left_out.keys() == {"soft_moe"} and {"dense", "token_choice", "expert_threshold", "hash"} < kinds
    kinds, left_out = kinds_and_reasons(TokenChoiceConfig(64, top_k=1, routing_group_tokens=96), 32, 96)
    assert {"dense", "token_choice", "hash"} <= kinds and not kinds & left_out.keys()
    assert left_out["mixture_of_tokens"] == "groups of 64 sequences do not divide a batch of 32"
    kinds, left_out = kinds_and_reasons(TokenChoiceConfig(10, 96, 4, routing_group_tokens=64), 32, 64)
    assert "token_choice" in kinds and "1.25 times the FLOPs" in left_out["mixture_of_tokens"]
    kinds, left_out = kinds_and_reasons(MixtureOfTokensConfig(32, 8), 32, 64)
    assert (
        kinds == {"dense", "mixture_of_tokens"}
        and "soft_moe" in left_out
        and "4.00 times the FLOPs" in left_out["token_choice"]
    )


def test_a_package_that_cannot_be_imported_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("from jax import no_such_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PeerError, match=r"^cannot be imported: cannot import name 'no_such_name' from 'jax'"):
        peers._import("broken")
    with pytest.raises(PeerError, match=r"^not installed: pip install"):
        peers._import("absent_package.layers")


def test_runs_that_have_no_routing(tmp_path, tiny):
    workdir = epath.Path(tmp_path) / "run"
    with pytest.raises(UserError, match=r"--routing: workdir = .*: no such directory"):
        read_trained_layer(str(workdir))
    workdir.mkdir()
    with pytest.raises(UserError, match=r"--routing: workdir = .*: holds no run"):
        read_trained_layer(str(workdir))
    (workdir / "config.json").write_text(to_json(tiny))
    with pytest.raises(UserError, match=r"--routing = .*: must be a finished run, and has no result.json"):
        read_trained_layer(str(workdir))


@pytest.mark.parametrize("kind", [DenseConfig(), HashConfig(8)])
def test_a_run_without_a_controller_is_refused_before_its_weights_are_read(tmp_path, tiny, capsys, kind):
    model = dataclasses.replace(tiny.model, feed_forward=kind)
    (tmp_path / "config.json").write_text(to_json(dataclasses.replace(tiny, model=model)))
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["bench", "layers", "--routing", str(tmp_path)])
    rule = f"its kind {kind.kind} has no controller [D, E]; try a mixture_of_tokens run"
    assert exit_info.value.code == 2 and capsys.readouterr().err == f"error: --routing = {tmp_path}: {rule}\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--routing: must be given, since"),
        (["--peers"], "--routing: must be given, since"),
        (["--peers", "--counts"], "--peers: has no part in --counts"),
        (["--routing", "random", "--counts"], "--routing = random: has no part in --counts"),
        (["--counts", "--topology", "local:1"], "--topology = local:1: has no part in --counts"),
        (["--counts", "--plot", "x.png"], "--plot = x.png: has no part in --counts"),
        (["--products", "cublas"], "--products = cublas: has no part without --topology"),
        (["--block", "1"], "--block = 1: needs the run that has this block"),
        (["--routing", "run", "--shapes", "v1"], "--shapes = v1: the sizes are those of --routing = run"),
    ],
)
def test_options_that_contradict_each_other(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["bench", "layers", *flags])
    assert exit_info.value.code == 2 and message in capsys.readouterr().err
