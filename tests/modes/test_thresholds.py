"""Mode `threshold`: measuring its constants, their file, and the models and runs that have it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath

import mot_jax
from mot_jax import cli
from mot_jax.config import (
    Config,
    ExpertThresholdConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    ThresholdConfig,
    TokenChoiceConfig,
    to_json,
)
from mot_jax.cost.feed_forward import feed_forward_cost
from mot_jax.data.objectives import Batch
from mot_jax.data.tokenizers import ByteTokenizer
from mot_jax.errors import UserError
from mot_jax.inference.language_model import LanguageModel
from mot_jax.modes import enter, mode_of, thresholds
from mot_jax.modes.recording import record
from mot_jax.modes.thresholds import Thresholds, load_thresholds, measure, save_thresholds
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.transformer import Params, init_params

G, E, S, T = 4, 8, 8, 0.5
KIND = MixtureOfTokensConfig(G, E, controller_init_scale=20.0, mixing=MixingConfig(temperature=T))
MODEL = ModelConfig(4, 16, 32, 2, context_length=S, loss_chunk=S, moe_blocks="every_other", feed_forward=KIND)
CONFIG = dataclasses.replace(Config(model=MODEL), training=dataclasses.replace(Config().training, steps=10**6))
STORED = Thresholds(3, G, 100, np.zeros((2, E), "float32"), np.full((2, E), 0.1, "float32"))


def batches() -> list[Batch]:
    rng, result = np.random.default_rng(0), []
    for _ in range(3):
        tokens = rng.integers(0, 256, (2 * G, S)).astype(np.int32)
        result.append(Batch(tokens, tokens, rng.random((2 * G, S)) < 0.9, tokens > 0))
    return result


@pytest.fixture(scope="module")
def params() -> Params:
    return init_params(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def measured(params) -> Thresholds:
    return measure(MODEL, params, 3, batches())


@pytest.mark.slow
def test_experts_take_their_share_of_the_measured_tokens(params, measured):
    """E / G of E of the non-padding tokens of all batches, and the mean of exp(l / T), against float64."""
    by_layer = []
    for batch in batches():
        context = FeedForwardContext(token_mask=batch.token_mask, token_ids=batch.inputs)

        def inputs(layer, x, context):
            return {"x": x, "controller": layer.controller[...]}

        _, recorded = record(MODEL, params, batch.inputs, context, None, inputs)
        x, controller = (
            np.stack([np.float64(recorded[name][block]) for block in (1, 3)]) for name in ("x", "controller")
        )
        by_layer.append(np.einsum("lbsd,lde->lbse", x, controller)[:, batch.token_mask] / T)
    logits = np.concatenate(by_layer, axis=1)
    tokens = logits.shape[1]
    assert (measured.tokens, measured.step, measured.group_size) == (tokens, 3, G) and tokens < 3 * 2 * G * S
    np.testing.assert_allclose(measured.log_means, np.log(np.exp(logits).mean(axis=1)), rtol=1e-4, atol=1e-4)
    counts = (logits >= measured.logits[:, None] - 1e-5).sum(axis=1)
    np.testing.assert_array_equal(counts, np.full((2, E), -(-tokens * 2 // E)))


@pytest.mark.slow
def test_generation_with_a_cache_has_the_probabilities_of_a_whole_pass(params, measured):
    config, params = enter("threshold", CONFIG, params, 3, thresholds=measured)
    model, rng = LanguageModel(config, params, ByteTokenizer(), "threshold", 3), np.random.default_rng(0)
    prompts = [rng.integers(256, size=length, dtype="int32") for length in (4, 3, 1)]
    continuations = model.generate(prompts, max_tokens=4, temperature=1.0, ends=False)
    pairs = [(prompt, c.tokens) for prompt, c in zip(prompts, continuations, strict=True)]
    for likelihood, c in zip(model.log_likelihoods(pairs, batch_size=3), continuations, strict=True):
        assert likelihood.log_prob == pytest.approx(float(c.log_probs.sum()), rel=1e-5)


def test_a_file_that_does_not_fit_is_an_error_of_one_line(tmp_path):
    workdir = epath.Path(tmp_path)
    assert load_thresholds(workdir) is None
    save_thresholds(workdir, STORED)
    loaded = load_thresholds(workdir)
    assert to_tuple(loaded) == to_tuple(STORED)
    others = {
        r"thresholds.json: is missing; the mot train command of a finished run, given again, writes it": None,
        r"is of step 2, and the model is of step 3; the mot train": dataclasses.replace(STORED, step=2),
        r"is for groups of 8, .* of 4; try --group-size 8": dataclasses.replace(STORED, group_size=8),
        r"must have \[2, 8\] values, .* has \[2, 7\]": dataclasses.replace(STORED, logits=STORED.logits[:, 1:]),
    }
    for message, other in others.items():
        with pytest.raises(UserError, match=message):
            enter("threshold", CONFIG, {}, 3, thresholds=other)
    with pytest.raises(UserError, match=r"runs of at least 16,384 training tokens, and this one has fewer; try --mode"):
        enter("threshold", Config(model=MODEL, training=dataclasses.replace(CONFIG.training, steps=1)), {}, 3)
    content = (workdir / "thresholds.json").read_bytes()
    for damaged in (b"", content[:-8], content.replace(b"0.1", b"0.2")):
        (workdir / "thresholds.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"thresholds.json: is damaged \(.*data.json has\); the mot train command"):
            load_thresholds(workdir)


def to_tuple(stored: Thresholds) -> tuple:
    return stored.step, stored.group_size, stored.tokens, stored.log_means.tolist(), stored.logits.tolist()


@pytest.mark.parametrize(
    "kind, words",
    [
        (dataclasses.replace(KIND, mixing=MixingConfig(temperature=0.0)), "temperature = above 0, and it is 0.0"),
        (dataclasses.replace(KIND, mixing=MixingConfig(annealing="linear")), "final_temperature = above 0, and it is"),
        (dataclasses.replace(KIND, mixing=MixingConfig(emit="ones")), "emit = 'merge', and it is 'ones'"),
        (dataclasses.replace(KIND, mixing=MixingConfig(layer_norm=True)), "mixing.layer_norm = True: the experts"),
        (dataclasses.replace(KIND, mixing=MixingConfig(emit="softmax", controllers="separate")), "two controllers"),
        (dataclasses.replace(KIND, group_size=1), "does not mix sequences; try --mode grouped"),
        (TokenChoiceConfig(), "the model has token_choice layers; try --mode token_choice"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.kind,
)
def test_layers_without_an_expected_weight_are_refused(kind, words):
    with pytest.raises(UserError) as error:
        mode_of("threshold").change(Config(model=dataclasses.replace(MODEL, feed_forward=kind)))
    assert any(words in fault for fault in error.value.faults)
    assert all(fault.startswith("--mode threshold: ") and "; try --mode " in fault for fault in error.value.faults)


def test_the_cost_is_that_of_experts_with_thresholds():
    """Each token has E / G experts on average, and all E are executed."""
    kind, width = ThresholdConfig(G, E, shared_expert_dim=16), KIND.group_size * 16 // E
    expected = feed_forward_cost(MODEL, ExpertThresholdConfig(E, width, 2, 16, capacity_factor=None))
    cost = feed_forward_cost(MODEL, kind)
    assert (cost.flops(), cost.executed_flops()) == (expected.flops(), expected.executed_flops())
    assert cost.executed_over_useful() == G and kind.experts_per_token == 2


@pytest.mark.slow
def test_a_run_writes_its_thresholds_and_every_command_has_the_mode(tiny, tmp_path, monkeypatch, capsys):
    """At its end, and again when its command is repeated without the file; an export has them too."""
    monkeypatch.setattr(thresholds, "MIN_TOKENS", 1)
    workdir, exported = tmp_path / "run", tmp_path / "exported"
    (tmp_path / "tiny.py").write_text(
        f"from mot_jax.config import from_json\n\n\ndef get_config():\n    return from_json({to_json(tiny)!r})\n"
    )
    command = ["train", str(tmp_path / "tiny.py"), "--workdir", str(workdir)]
    cli.main(command)
    content = (workdir / "thresholds.json").read_bytes()
    assert json.loads(content)["step"] == tiny.training.steps
    (workdir / "thresholds.json").unlink()
    with pytest.raises(SystemExit) as exit:
        cli.main(["generate", str(workdir), "--prompt", "x", "--mode", "threshold"])
    assert exit.value.code == 2 and "error: thresholds.json: is missing; the mot train" in capsys.readouterr().err
    cli.main(command)
    assert json.loads((workdir / "thresholds.json").read_bytes()) == json.loads(content)
    cli.main(["evaluate", str(workdir), "--mode", "threshold", "--windows", "16"])
    assert "each expert takes the tokens of large expected weight" in capsys.readouterr().out
    cli.main(["export", str(workdir), "--output", str(exported)])
    model = mot_jax.load(exported, "threshold")
    (layers,) = (value for name, value in model.params.items() if name.endswith("logit_threshold"))
    np.testing.assert_array_equal(layers, np.float32(json.loads(content)["logits"]))
    assert model.independent and model.mode == "threshold"
