"""Scoring: equal to one pass of the whole model, and independent of the other pairs of a batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mot_jax.config import Config, DenseConfig, MixtureOfTokensConfig, ModelConfig
from mot_jax.data.tokenizers import ByteTokenizer
from mot_jax.errors import UserError
from mot_jax.inference import scoring
from mot_jax.inference.language_model import LanguageModel
from mot_jax.inference.scoring import scoring_windows
from mot_jax.modes import enter
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.sharding import parameter_spec
from mot_jax.nn.transformer import bind, init_params

# The vocabulary of the models is larger than that of the tokenizer.
GROUPED = ModelConfig(
    1, 16, 32, 2, context_length=32, loss_chunk=4, vocab_size=272, feed_forward=MixtureOfTokensConfig(4, 8)
)
INDEPENDENT = dataclasses.replace(GROUPED, document_mask=True, positions="rotary", feed_forward=DenseConfig())
SLOW = pytest.mark.slow
PAIRS = [("import ", "os"), ("", "x"), ("def f(", "x):\n"), ("class A", ""), ("a" * 20, "b" * 9), ("no", " other one")]


@functools.lru_cache
def random_params(model: ModelConfig) -> dict[str, jax.Array]:
    """Parameters large enough that the outputs of different sequences differ."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return {name: jnp.asarray(rng.normal(0, 0.5, shape.shape), shape.dtype) for name, shape in shapes.items()}


def language_model(model: ModelConfig, mode: str = "grouped") -> LanguageModel:
    texts = np.random.default_rng(0).integers(0, 256, (4, model.context_length), np.int32)
    companions = np.stack([texts, np.zeros_like(texts)])
    config, params = enter(mode, Config(model=model), random_params(model), 0, companions)
    return LanguageModel(config, params, ByteTokenizer(), mode, 0)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: ModelConfig, params, tokens, token_mask, segments) -> jax.Array:
    model = bind(config, params)
    return model.logits(model(tokens, FeedForwardContext(token_mask, tokens), segments).hidden)


def log_softmax(lm: LanguageModel, sequences: list[np.ndarray]) -> np.ndarray:
    """Log-probabilities by one pass over a batch of eight that begins with `sequences`: float64 [8, S, V]."""
    tokens = np.zeros((8, lm.config.model.context_length), np.int32)
    token_mask = np.zeros(tokens.shape, bool)
    for i, sequence in enumerate(sequences):
        tokens[i, : len(sequence)], token_mask[i, : len(sequence)] = sequence, True
    segments = np.cumsum(token_mask & (tokens == 256), axis=1, dtype=np.int32)
    logits = np.asarray(logits_of(lm.config.model, lm.params, tokens, token_mask, segments), np.float64)[..., :257]
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


@pytest.mark.parametrize("model", [GROUPED, INDEPENDENT], ids=["grouped", "independent"])
def test_equals_the_log_softmax_of_one_pass(model):
    """Also in a group that is not full. Only the most likely token is greedy."""
    lm = language_model(model)
    contexts = [np.append(256, ids(text)) for text in ("import ", "x", "def f(", "a", "class")]
    expected = [row[len(c) - 1] for row, c in zip(log_softmax(lm, contexts), contexts, strict=False)]
    for tokens in ([int(row.argmax()) for row in expected], [7] * 5):
        pairs = [(context, np.array([token])) for context, token in zip(contexts, tokens, strict=True)]
        for row, token, likelihood in zip(expected, tokens, lm.log_likelihoods(pairs), strict=True):
            assert likelihood.log_prob == pytest.approx(row[token], abs=1e-4)
            assert likelihood.greedy == (token == row.argmax())


def test_the_likelihood_of_a_continuation_is_that_of_all_its_tokens():
    lm = language_model(INDEPENDENT)
    for (context, continuation), likelihood in zip(PAIRS, lm.log_likelihoods(PAIRS), strict=True):
        begin, tokens = max(len(context), 1), ids(context + continuation)
        tokens = tokens if context else np.append(256, tokens)  # after the end of a text
        row, *_ = log_softmax(lm, [tokens[:-1]])
        positions = range(begin - 1, len(tokens) - 1)
        assert likelihood.log_prob == pytest.approx(sum(row[i, tokens[i + 1]] for i in positions), abs=1e-4)
        assert likelihood.greedy == all(row[i].argmax() == tokens[i + 1] for i in positions)
        assert continuation or likelihood == (0.0, True)


@pytest.mark.parametrize(
    "mode", ["companions", *(pytest.param(m, marks=SLOW) for m in ("sparse", "mean_field", "token_choice"))]
)
def test_other_pairs_do_not_matter_in_independent_modes(mode):
    """Bit for bit in batches of one shape: neither their number, nor their order, nor their text."""
    lm = language_model(GROUPED, mode)
    single = [lm.log_likelihoods([pair])[0] for pair in PAIRS]
    assert lm.log_likelihoods(PAIRS) == single
    assert lm.log_likelihoods(PAIRS[::-1] * 3)[::-1][: len(PAIRS)] == single
    others = [(letter * 30, letter) for letter in "abcdefghijk"]
    assert lm.log_likelihoods([*others, *PAIRS])[len(others) :] == single
    for likelihood, expected in zip(lm.log_likelihoods(PAIRS[:2], batch_size=1), single, strict=False):
        assert likelihood.log_prob == pytest.approx(expected.log_prob, rel=1e-5)


def test_other_pairs_matter_in_groups():
    lm, pair = language_model(GROUPED), ("import", "s")
    single = lm.log_likelihoods([pair])[0].log_prob
    assert abs(lm.log_likelihoods([pair, ("struct", "A")])[0].log_prob - single) > 1e-3


def test_only_the_end_of_a_long_context_is_read():
    lm = language_model(INDEPENDENT)
    text = "".join(map(chr, range(40, 110)))
    (cut, whole, other) = lm.log_likelihoods([(text[-29:], "xyzw"), (text, "xyzw"), (text[-28:], "xyzw")])
    assert whole == cut != other


def test_a_long_text_is_scored_in_windows():
    """Each token once, as in the lm-evaluation-harness: the last window is as long as the context."""
    tokens = np.arange(11)
    windows = [(w.tokens[:-1].tolist(), w.tokens[-w.scored :].tolist()) for w in scoring_windows(tokens, 1, 4)]
    assert windows == [([0, 1, 2, 3], [1, 2, 3, 4]), ([4, 5, 6, 7], [5, 6, 7, 8]), ([6, 7, 8, 9], [9, 10])]
    assert [(w.tokens.tolist(), w.scored) for w in scoring_windows(tokens, 8, 4)] == [([6, 7, 8, 9, 10], 3)]
    assert scoring_windows(tokens, 11, 4) == []
    lm = language_model(INDEPENDENT)
    text = "".join(map(chr, range(40, 110)))
    pairs = [("", text[:32]), (text[31], text[32:64]), (text[37:64], text[64:])]
    parts = [likelihood.log_prob for likelihood in lm.log_likelihoods(pairs)]
    assert lm.log_likelihoods([("", text)])[0].log_prob == pytest.approx(sum(parts), rel=1e-12)


class SubwordTokenizer(ByteTokenizer):
    """Encodes `ab` as one token, 1."""

    def encode(self, text: bytes) -> np.ndarray:
        return super().encode(text.replace(b"ab", b"\1"))


def test_contexts_and_continuations_are_encoded_together():
    """A token that spans both belongs to the continuation."""
    lm = dataclasses.replace(language_model(INDEPENDENT), tokenizer=SubwordTokenizer())
    pairs = [("xa", "bc"), ("a", "b"), ("xab", "c"), (np.array([120]), "abc"), ("", "ab")]
    as_tokens = [([120], [1, 99]), ([256], [1]), ([120, 1], [99]), ([120], [1, 99]), ([256], [1])]
    expected = lm.log_likelihoods([(np.array(a), np.array(b)) for a, b in as_tokens])
    assert lm.log_likelihoods(pairs) == expected


def test_all_lengths_share_two_programs():
    lm = language_model(INDEPENDENT)
    lm.log_likelihoods([("a", "b"), ("a" * 30, "b")])
    before = scoring.score._cache_size()
    for pairs in ([("a", "b")] * 9, [("a" * 9, "b"), ("", "c")], [("a" * 99, "b" * 99)]):
        lm.log_likelihoods(pairs)
    assert scoring.score._cache_size() == before


@pytest.mark.parametrize("mode", ["grouped", pytest.param("companions", marks=SLOW)])
@pytest.mark.parametrize("axes", [{"data": 2, "expert": 2, "tensor": 2}, pytest.param({"fsdp": 8}, marks=SLOW)])
def test_scores_on_a_mesh_equal_scores_on_one_device(axes, mode, mesh_of):
    lm, pairs = language_model(GROUPED, mode), [("a" * n, "b") for n in range(1, 9)]
    mesh = mesh_of(**axes)
    shardings = {name: NamedSharding(mesh, parameter_spec(name, v.ndim)) for name, v in lm.params.items()}
    sharded = dataclasses.replace(lm, params=jax.device_put(lm.params, shardings), mesh=mesh)
    for likelihood, expected in zip(sharded.log_likelihoods(pairs), lm.log_likelihoods(pairs), strict=True):
        assert likelihood.log_prob == pytest.approx(expected.log_prob, rel=1e-4)


def test_masked_models_and_bad_batch_sizes_are_refused():
    masked = LanguageModel(
        Config(model=dataclasses.replace(GROUPED, objective="masked")), {}, ByteTokenizer(), "grouped", 0
    )
    with pytest.raises(UserError, match="no probability; try `mot evaluate`"):
        masked.log_likelihoods(PAIRS)
    with pytest.raises(UserError, match="batch_size = 0: must be at least 1; try 8"):
        language_model(GROUPED).log_likelihoods(PAIRS, batch_size=0)
