"""Generation: what the cache writes is what the whole model would write; drawing, ends, mesh."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mot_jax.config import Config, DenseConfig, MixtureOfTokensConfig, ModelConfig
from mot_jax.data.tokenizers import ByteTokenizer
from mot_jax.errors import UserError
from mot_jax.inference import generate
from mot_jax.inference.generate import Sampler, left_padded, sample_tokens
from mot_jax.inference.language_model import GAP, LanguageModel
from mot_jax.modes import MODES, enter
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.sharding import parameter_spec
from mot_jax.nn.transformer import bind, init_params

MODEL = ModelConfig(2, 16, 32, 2, context_length=24, loss_chunk=24, feed_forward=MixtureOfTokensConfig(4, 8))
ROTARY = {"positions": "rotary", "num_kv_heads": 1, "final_norm": True}
MODELS = {
    "learned positions": MODEL,
    "other attention": dataclasses.replace(MODEL, document_mask=True, moe_blocks="every_other", **ROTARY),
    "dense": dataclasses.replace(MODEL, feed_forward=DenseConfig()),
}
SLOW, FAST = pytest.mark.slow, ("grouped", "companions", "token_choice")
PROMPTS = [b"import os", b"x", b"def f(x):\n", b"class A"]


@functools.lru_cache
def drawn(model: ModelConfig) -> dict[str, jax.Array]:
    return jax.jit(functools.partial(init_params, model))(jax.random.key(0, impl="rbg"))


@functools.partial(jax.jit, static_argnums=0)
def log_probs(model: ModelConfig, params, tokens, real, positions=None, segments=None):
    """By one pass without a cache, [B, S, V]."""
    bound = bind(model, params)
    hidden = bound(tokens, FeedForwardContext(real, tokens, positions), segments).hidden
    return jax.nn.log_softmax(bound.logits(hidden)[..., :257])


@functools.lru_cache
def language_model(model: ModelConfig, mode: str = "grouped") -> LanguageModel:
    """Decided enough that its tokens differ."""
    params = {name: 4.0 * v for name, v in drawn(model).items()}
    companions = np.random.default_rng(5).integers(0, 256, (2, 4, model.context_length)).astype(np.int32)
    companions[1] = 0
    config, params = enter(mode, Config(model=model), params, 0, companions)
    return LanguageModel(config, params, ByteTokenizer(), mode, 0)


def score(lm: LanguageModel, prompts: list[np.ndarray], found: list) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [B, T, V] by one pass over the same left-padded batch, and where its columns of text begin."""
    width = max(map(len, prompts))
    length = width + max(len(f.tokens) for f in found)
    tokens, real = left_padded(prompts, len(prompts), width)
    pad = ((0, 0), (0, length - width))
    tokens, real = np.pad(tokens, pad), np.pad(real, pad)
    for row, f in enumerate(found):
        tokens[row, width : width + len(f.tokens)] = f.tokens
        real[row, width : width + len(f.tokens)] = True
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    segments = np.cumsum(real & (tokens == 256), axis=1).astype(np.int32)
    return np.asarray(log_probs(lm.config.model, lm.params, tokens, real, positions, segments)), width


@pytest.mark.parametrize(
    "name, mode",
    [
        *(pytest.param(name, "grouped", marks=SLOW) for name in MODELS if name != "learned positions"),
        *(pytest.param("learned positions", mode, marks=[] if mode in FAST else SLOW) for mode in MODES),
    ],
)
def test_the_cache_writes_what_the_whole_model_would(name, mode):
    """Greedy tokens and log-probabilities, at every position, of rows that begin and end at different columns."""
    lm = language_model(MODELS[name], mode)
    prompts = [np.frombuffer(prompt, np.uint8).astype(np.int32) for prompt in PROMPTS]
    if MODELS[name].document_mask:
        for prompt in prompts:
            prompt[len(prompt) // 2] = 256  # a document ends within the prompt
    once = lm.generate(prompts, max_tokens=14, temperature=0)
    stops = [bytes(f.tokens[[2 * i + 1]].tolist()) for i, f in enumerate(once) if i % 2 and f.tokens[2 * i + 1] < 256]
    assert stops
    found = lm.generate(prompts, max_tokens=14, temperature=0, stop=stops)
    assert any(f.finished for f in found) and len({len(f.tokens) for f in found}) > 1
    expected, begin = score(lm, prompts, found)
    for row, f in zip(expected, found, strict=True):
        there = row[begin - 1 : begin - 1 + len(f.tokens)]
        np.testing.assert_array_equal(there.argmax(axis=-1), f.tokens)
        np.testing.assert_allclose(there[np.arange(len(f.tokens)), f.tokens], f.log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_text_that_outgrows_the_context_goes_on_from_its_last_half():
    lm = language_model(MODEL)
    found = lm.generate(PROMPTS, max_tokens=40, temperature=0, ends=False)
    assert [len(f.tokens) for f in found] == [40] * 4
    room = MODEL.context_length - max(map(len, PROMPTS)) + 1
    texts = [np.append(np.frombuffer(p, np.uint8), f.tokens[:room]) for p, f in zip(PROMPTS, found, strict=True)]
    assert len(texts[2]) == 25 and max(len(text) for text in texts if text is not texts[2]) <= 24
    texts = [text[-12:] if len(text) > 24 else text for text in texts]
    again = lm.generate(texts, max_tokens=40 - room, temperature=0, ends=False)
    for before, after in zip(found, again, strict=True):
        np.testing.assert_array_equal(before.tokens[room:], after.tokens)


@pytest.mark.slow
def test_a_row_goes_on_as_if_alone_whatever_its_neighbours_lengths():
    """Where no row hears another, also past the context: each is cut when it has outgrown it itself."""
    lm = language_model(MODEL, "companions")
    found = [
        lm.generate([b"import os", *others], max_tokens=30, temperature=0, ends=False)[0]
        for others in ([], [b"x" * 24, b"yy"])
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(other.tokens, found[0].tokens)
        np.testing.assert_allclose(other.log_probs, found[0].log_probs, rtol=1e-4, atol=1e-4)


def test_a_row_ends_with_the_first_stop_that_it_wrote_itself():
    lm = language_model(MODEL)
    (free, *_) = lm.generate(PROMPTS, max_tokens=12, temperature=0, ends=False)
    pair = bytes(free.tokens[4:6].tolist())
    first = next(i for i in range(12) if bytes(free.tokens[i : i + 2].tolist()) == pair) + 2
    (found, *_) = lm.generate(PROMPTS, max_tokens=12, temperature=0, ends=False, stop=[pair, b"a longer one"])
    assert found.finished and not free.finished
    np.testing.assert_array_equal(found.tokens, free.tokens[:first])
    assert found.text == ByteTokenizer().decode(free.tokens[: first - 2]).decode(errors="replace")
    across = PROMPTS[0][-1:] + bytes(free.tokens[:1].tolist())
    (found, *_) = lm.generate(PROMPTS, max_tokens=12, temperature=0, ends=False, stop=[across])
    assert len(found.tokens) > 1


def test_streaming_grows_what_is_returned_at_last():
    lm = language_model(MODEL)
    parts = list(lm.stream(PROMPTS, max_tokens=14, seed=3))
    assert len(parts) > 2
    for before, after in itertools.pairwise(parts):
        for b, a in zip(before, after, strict=True):
            np.testing.assert_array_equal(a.tokens[: len(b.tokens)], b.tokens)
    last = lm.generate(PROMPTS, max_tokens=14, seed=3)
    assert [f.tokens.tolist() for f in parts[-1]] == [f.tokens.tolist() for f in last]
    assert [f.tokens.tolist() for f in lm.generate(PROMPTS, max_tokens=14, seed=4)] != [f.tokens.tolist() for f in last]


def test_compiled_once():
    """Other prompts of about the same length, temperatures, thresholds, seeds and lengths make no new program."""
    lm = language_model(MODEL)
    lm.generate([b"import"], max_tokens=14, top_k=3)
    programs = generate.prefill._cache_size(), generate.decode._cache_size()
    lm.generate([b"def"], max_tokens=15, temperature=0.1, top_p=0.5, seed=9)
    lm.generate([b"x", b"class"], max_tokens=9, top_k=9, top_p=0.9, seed=1)
    assert (generate.prefill._cache_size(), generate.decode._cache_size()) == programs


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "expert": 2, "tensor": 2},
        *(pytest.param(axes, marks=SLOW) for axes in ({"data": 8}, {"expert": 8}, {"fsdp": 4})),
    ],
)
def test_a_mesh_writes_what_one_device_writes(axes, mesh_of):
    """Groups span devices, and a single column cannot be cut."""
    lm = language_model(MODEL)
    expected = lm.generate(PROMPTS * 2, max_tokens=10, seed=1)
    mesh = mesh_of(**axes)
    where = {name: NamedSharding(mesh, parameter_spec(name, v.ndim)) for name, v in lm.params.items()}
    found = dataclasses.replace(lm, params=jax.device_put(lm.params, where), mesh=mesh).generate(
        PROMPTS * 2, max_tokens=10, seed=1
    )
    assert [f.tokens.tolist() for f in found] == [f.tokens.tolist() for f in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-3)


# --- drawing ----------------------------------------------------------------------------------------------------------


def draws(logits: list[float], n: int = 2000, **options) -> np.ndarray:
    """How often each token is drawn, shares."""
    size = len(logits)
    given = {"temperature": 1.0, "top_k": size, "top_p": 1.0, "seed": 0, "stops": np.zeros((0, 1), int)} | options
    rows = np.tile(np.array(logits, np.float32), (n, 1))
    filtered = given["top_k"] < size or given["top_p"] < 1
    token = jax.jit(sample_tokens, static_argnums=3)(rows, Sampler(**given), np.int32(0), filtered)
    return np.bincount(np.asarray(token), minlength=size) / n


def test_tokens_are_drawn_by_their_probability():
    shares = np.array([0.5, 0.25, 0.15, 0.1])
    logits = (np.log(shares) + 3).tolist()
    np.testing.assert_allclose(draws(logits), shares, atol=0.04)
    sharp = shares**2 / (shares**2).sum()
    np.testing.assert_allclose(draws(logits, temperature=0.5), sharp, atol=0.04)
    np.testing.assert_array_equal(draws(logits, temperature=0.0), [1, 0, 0, 0])
    np.testing.assert_allclose(draws(logits, top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.04)
    np.testing.assert_allclose(draws(logits, top_p=0.8), np.array([0.5, 0.25, 0.15, 0]) / 0.9, atol=0.04)
    np.testing.assert_array_equal(draws(logits, top_p=0.4), [1, 0, 0, 0])
    np.testing.assert_allclose(draws(logits, top_k=3, top_p=0.6), [2 / 3, 1 / 3, 0, 0], atol=0.04)
    np.testing.assert_array_equal(draws(logits, top_k=1, temperature=5.0), [1, 0, 0, 0])


# --- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, options, words",
    [
        ([], {}, "prompt: there must be at least one"),
        ([b"x", b""], {}, "prompt = '': is empty"),
        ([b"x" * 25], {}, "has 25 tokens, and the context 24"),
        ([b"x"], {"temperature": -1.0}, "temperature = -1.0: must be finite and at least 0"),
        ([b"x"], {"max_tokens": 0}, "max_tokens = 0"),
        ([b"x"], {"top_k": 0}, "top_k = 0: must be at least 1"),
        ([b"x"], {"top_p": 1.5}, "top_p = 1.5"),
        ([b"x"], {"stop": [""]}, "stop = ''"),
        ([b"x"], {"seed": -1}, "seed = -1: must be at least 0"),
        ("text", {}, "must be lists of texts"),
    ],
)
def test_bad_requests_are_one_line(prompts, options, words):
    with pytest.raises(UserError) as caught:
        language_model(MODEL).generate(prompts, **options)
    assert words in str(caught.value) and len(caught.value.faults) == 1


# --- masked models ----------------------------------------------------------------------------------------------------

MASKED = dataclasses.replace(MODEL, objective="masked", vocab_size=258)


def test_gaps_are_filled_with_the_likeliest_tokens():
    lm = language_model(MASKED)
    texts = [f"impo{GAP}t {GAP}s", f"{GAP}", "de_ f():".replace("_", GAP)]
    found = lm.fill(texts)
    tokens, real = np.full((4, 24), 0, np.int32), np.zeros((4, 24), bool)
    for row, text in enumerate(texts):
        ids = [257 if c == GAP else ord(c) for c in text]
        tokens[row, : len(ids)], real[row, : len(ids)] = ids, True
    shares = np.exp(log_probs(lm.config.model, lm.params, tokens, real))
    for row, (text, filled) in enumerate(zip(texts, found, strict=True)):
        places = [i for i, c in enumerate(text) if c == GAP]
        best = shares[row, places].argmax(axis=-1)
        np.testing.assert_allclose([p for _, p in filled.gaps], shares[row, places, best], rtol=1e-4)
        written = [best[places.index(i)] if i in places else ord(c) for i, c in enumerate(text)]
        assert filled.text == ByteTokenizer().decode(written).decode(errors="replace")


@pytest.mark.parametrize("text, words", [("no gap", "has no gap"), (GAP * 25, "has 25 tokens, and the context 24")])
def test_what_has_no_gaps_is_not_filled(text, words):
    with pytest.raises(UserError, match=words):
        language_model(MASKED).fill([text])
    with pytest.raises(UserError, match="has no gaps to fill; try `mot generate`"):
        language_model(MODEL).fill([text + GAP])
    with pytest.raises(UserError, match="cannot continue a text; try `mot fill`"):
        language_model(MASKED).generate(["x"])
