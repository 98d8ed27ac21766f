"""Generation: equal to a pass of the whole model without a cache; sampling, stops, meshes, gap filling."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from tokenizer_files import FILES, tokenizer_of

from mot_jax.config import Config, DenseConfig, MixtureOfTokensConfig, ModelConfig, SoftMoEConfig
from mot_jax.data.objectives import Batch
from mot_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from mot_jax.errors import UserError
from mot_jax.inference import generate
from mot_jax.inference.generate import Sampler, left_padded, sample_tokens
from mot_jax.inference.language_model import GAP, LanguageModel
from mot_jax.modes import MODES, enter
from mot_jax.modes.thresholds import measure
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.sharding import parameter_spec
from mot_jax.nn.transformer import bind, init_params

MODEL = ModelConfig(2, 16, 32, 2, context_length=24, loss_chunk=24, feed_forward=MixtureOfTokensConfig(4, 8))
ROTARY = {"positions": "rotary", "num_kv_heads": 1, "final_norm": True}
MODELS = {
    "learned positions": MODEL,
    "other attention": dataclasses.replace(MODEL, document_mask=True, moe_blocks="every_other", **ROTARY),
}
SLOW = pytest.mark.slow
PROMPTS = [b"import os", b"x", b"def f(x):\n", b"class A"]


@functools.lru_cache
def initial_params(model: ModelConfig) -> dict[str, jax.Array]:
    return jax.jit(functools.partial(init_params, model))(jax.random.key(0, impl="rbg"))


@functools.partial(jax.jit, static_argnums=0)
def log_probs(model: ModelConfig, params, tokens, token_mask, positions=None, segments=None):
    """Log-probabilities by one pass without a cache, [B, S, V]."""
    bound = bind(model, params)
    hidden = bound(tokens, FeedForwardContext(token_mask, tokens, positions), segments).hidden
    return jax.nn.log_softmax(bound.logits(hidden)[..., :257])


@functools.lru_cache
def language_model(model: ModelConfig, mode: str = "grouped") -> LanguageModel:
    """A model whose parameters are scaled up, so that it generates different tokens."""
    params = {name: 4.0 * v for name, v in initial_params(model).items()}
    companions = np.random.default_rng(5).integers(0, 256, (2, 4, model.context_length)).astype(np.int32)
    companions[1] = 0
    thresholds = None
    if mode == "threshold":
        mask = np.ones(companions[0].shape, bool)
        thresholds = measure(model, params, 0, [Batch(companions[0], companions[0], mask, mask, companions[1])])
    config, params = enter(mode, Config(model=model), params, 0, companions, thresholds)
    return LanguageModel(config, params, ByteTokenizer(), mode, 0)


def score(lm: LanguageModel, prompts: list[np.ndarray], continuations: list) -> tuple[np.ndarray, int]:
    """Log-probabilities [B, T, V] by one pass over the same left-padded batch, and the width of the prompts."""
    width = max(map(len, prompts))
    length = width + max(len(c.tokens) for c in continuations)
    tokens, token_mask = left_padded(prompts, len(prompts), width)
    pad = ((0, 0), (0, length - width))
    tokens, token_mask = np.pad(tokens, pad), np.pad(token_mask, pad)
    for i, continuation in enumerate(continuations):
        tokens[i, width : width + len(continuation.tokens)] = continuation.tokens
        token_mask[i, width : width + len(continuation.tokens)] = True
    positions = np.maximum(np.cumsum(token_mask, axis=1) - 1, 0).astype(np.int32)
    segments = np.cumsum(token_mask & (tokens == 256), axis=1).astype(np.int32)
    return np.asarray(log_probs(lm.config.model, lm.params, tokens, token_mask, positions, segments)), width


@pytest.mark.parametrize(
    "name, mode",
    [
        pytest.param("other attention", "grouped", marks=SLOW),
        *(pytest.param("learned positions", mode, marks=[] if mode == "grouped" else SLOW) for mode in MODES),
    ],
)
def test_generation_with_a_cache_equals_a_pass_of_the_whole_model(name, mode):
    """Greedy tokens and log-probabilities, at every position, of sequences that begin and end at different columns."""
    lm = language_model(MODELS[name], mode)
    prompts = [np.frombuffer(prompt, np.uint8).astype(np.int32) for prompt in PROMPTS]
    if MODELS[name].document_mask:
        for prompt in prompts:
            prompt[len(prompt) // 2] = 256  # a document ends within the prompt
    without_stops = lm.generate(prompts, max_tokens=14, temperature=0)
    candidates = [c.tokens[2 * i + 1] for i, c in enumerate(without_stops) if i % 2]
    stops = [bytes([token]) for token in candidates if token < 256]
    assert stops
    continuations = lm.generate(prompts, max_tokens=14, temperature=0, stop=stops)
    assert any(c.finished for c in continuations) and len({len(c.tokens) for c in continuations}) > 1
    expected, width = score(lm, prompts, continuations)
    for sequence, c in zip(expected, continuations, strict=True):
        generated = sequence[width - 1 : width - 1 + len(c.tokens)]
        np.testing.assert_array_equal(generated.argmax(axis=-1), c.tokens)
        np.testing.assert_allclose(generated[np.arange(len(c.tokens)), c.tokens], c.log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_sequence_that_outgrows_the_context_continues_from_its_last_half():
    lm = language_model(MODEL)
    continuations = lm.generate(PROMPTS, max_tokens=40, temperature=0, ends=False)
    assert [len(c.tokens) for c in continuations] == [40] * 4
    room = MODEL.context_length - max(map(len, PROMPTS)) + 1
    texts = [
        np.append(np.frombuffer(p, np.uint8), c.tokens[:room]) for p, c in zip(PROMPTS, continuations, strict=True)
    ]
    assert len(texts[2]) == 25 and max(len(text) for text in texts if text is not texts[2]) <= 24
    texts = [text[-12:] if len(text) > 24 else text for text in texts]
    restarted = lm.generate(texts, max_tokens=40 - room, temperature=0, ends=False)
    for before, after in zip(continuations, restarted, strict=True):
        np.testing.assert_array_equal(before.tokens[room:], after.tokens)


@pytest.mark.slow
def test_the_lengths_of_other_prompts_do_not_matter_in_companions():
    """Also past the context: each sequence is cut when it has outgrown the context itself."""
    lm = language_model(MODEL, "companions")
    first, second = [
        lm.generate([b"import os", *others], max_tokens=30, temperature=0, ends=False)[0]
        for others in ([], [b"x" * 24, b"yy"])
    ]
    np.testing.assert_array_equal(second.tokens, first.tokens)
    np.testing.assert_allclose(second.log_probs, first.log_probs, rtol=1e-4, atol=1e-4)


def test_a_sequence_ends_with_the_first_stop_among_its_generated_tokens():
    """A stop that begins in the prompt does not count."""
    lm = language_model(MODEL)
    (free, *_) = lm.generate(PROMPTS, max_tokens=12, temperature=0, ends=False)
    pair = bytes(free.tokens[4:6].tolist())
    length = next(i for i in range(12) if bytes(free.tokens[i : i + 2].tolist()) == pair) + 2
    (stopped, *_) = lm.generate(PROMPTS, max_tokens=12, temperature=0, ends=False, stop=[pair, b"a longer one"])
    assert stopped.finished and not free.finished
    np.testing.assert_array_equal(stopped.tokens, free.tokens[:length])
    assert stopped.text == ByteTokenizer().decode(free.tokens[: length - 2]).decode(errors="replace")
    across = PROMPTS[0][-1:] + bytes(free.tokens[:1].tolist())
    (continued, *_) = lm.generate(PROMPTS, max_tokens=12, temperature=0, ends=False, stop=[across])
    assert len(continued.tokens) > 1


def test_streamed_continuations_are_prefixes_of_the_result():
    lm = language_model(MODEL)
    parts = list(lm.stream(PROMPTS, max_tokens=14, seed=3))
    assert len(parts) > 2
    for before, after in itertools.pairwise(parts):
        for b, a in zip(before, after, strict=True):
            np.testing.assert_array_equal(a.tokens[: len(b.tokens)], b.tokens)
    last = lm.generate(PROMPTS, max_tokens=14, seed=3)
    assert [f.tokens.tolist() for f in parts[-1]] == [f.tokens.tolist() for f in last]
    assert [f.tokens.tolist() for f in lm.generate(PROMPTS, max_tokens=14, seed=4)] != [f.tokens.tolist() for f in last]


def test_sampling_options_do_not_recompile():
    """Nor do prompts and results of about the same length."""
    lm = language_model(MODEL)
    lm.generate([b"import"], max_tokens=14, top_k=3)
    programs = generate.prefill._cache_size(), generate.decode._cache_size()
    lm.generate([b"def"], max_tokens=15, temperature=0.1, top_p=0.5, seed=9)
    lm.generate([b"x", b"class"], max_tokens=9, top_k=9, top_p=0.9, seed=1)
    assert (generate.prefill._cache_size(), generate.decode._cache_size()) == programs


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "expert": 2, "tensor": 2},
        *(pytest.param(axes, marks=SLOW) for axes in ({"data": 8}, {"expert": 8}, {"fsdp": 4})),
    ],
)
def test_generation_on_a_mesh_equals_generation_on_one_device(axes, mesh_of):
    """Groups span devices, and a single column cannot be sharded over positions."""
    lm = language_model(MODEL)
    expected = lm.generate(PROMPTS * 2, max_tokens=10, seed=1)
    mesh = mesh_of(**axes)
    shardings = {name: NamedSharding(mesh, parameter_spec(name, v.ndim)) for name, v in lm.params.items()}
    sharded = dataclasses.replace(lm, params=jax.device_put(lm.params, shardings), mesh=mesh)
    continuations = sharded.generate(PROMPTS * 2, max_tokens=10, seed=1)
    assert [c.tokens.tolist() for c in continuations] == [c.tokens.tolist() for c in expected]
    for a, b in zip(continuations, expected, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-3)


# --- other tokenizers -------------------------------------------------------------------------------------------------


@functools.cache
def model_of(tokenizer) -> LanguageModel:
    """A dense model of the tokenizer's vocabulary."""
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size, feed_forward=DenseConfig())
    params = {name: 4.0 * v for name, v in initial_params(model).items()}
    return LanguageModel(Config(model=model), params, tokenizer, "grouped", 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pieces.model", "metaspace.json"])
def test_prompt_and_text_are_the_text_of_all_tokens(name, tmp_path):
    """Also where a stop is normalized to nothing, and one of several sequences ends early."""
    tokenizer = tokenizer_of(name, tmp_path)
    lm, prompts = model_of(tokenizer), ["def f", "return x", "ein Satz"]
    ids = [tokenizer.encode(prompt.encode()) for prompt in prompts]
    options = {"max_tokens": 14, "seed": 1, "temperature": 2.0, "ends": False}
    continuations = lm.generate(prompts, **options)
    whole = [tokenizer.decode(np.append(i, c.tokens)).decode() for i, c in zip(ids, continuations, strict=True)]
    for prompt, c, text in zip(prompts, continuations, whole, strict=True):
        assert prompt + c.text == text and len(c.tokens) == 14
    if not len(tokenizer.encode(b"\n")):
        assert [c.text for c in lm.generate(prompts, stop=["\n"], **options)] == [c.text for c in continuations]
    free = continuations[0].text
    stop = free[len(free) // 2 :][:3]
    stopped, *others = lm.generate(prompts, stop=[stop], **options)
    assert stopped.finished and stopped.text == free[: free.index(stop)]
    for other, before in zip(others, continuations[1:], strict=True):
        assert other.text == (before.text.split(stop)[0] if other.finished else before.text)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_outputs_that_are_not_finite_are_refused_in_one_line():
    lm = language_model(MODEL)
    bad = dataclasses.replace(lm, params=lm.params | {"head": lm.params["head"].at[0, 5].set(np.nan)})
    huge = dataclasses.replace(lm, params={name: 1e30 * value for name, value in lm.params.items()})
    for model, words in ((bad, "1 of its .* parameters have, head first"), (huge, "by overflow")):
        for use in (lambda model=model: model.generate(["x"]), lambda model=model: model.log_likelihoods([("x", "y")])):
            with pytest.raises(UserError, match=f"not finite, .*{words}.*; try an earlier checkpoint") as error:
                use()
            assert len(error.value.faults) == 1


def test_the_options_of_the_program_do_not_matter():
    """64-bit types, and no promotion of ranks and dtypes."""
    lm = language_model(MODEL)
    (expected,) = lm.generate(["import os"], max_tokens=10, seed=2, top_k=5)
    scored = lm.log_likelihoods([("import", " os")])
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        (text,) = lm.generate(["import os"], max_tokens=10, seed=2, top_k=5)
        assert lm.log_likelihoods([("import", " os")]) == scored
    np.testing.assert_array_equal(text.tokens, expected.tokens)
    np.testing.assert_array_equal(text.log_probs, expected.log_probs)


# --- sampling ---------------------------------------------------------------------------------------------------------


def sampled_shares(logits: list[float], n: int = 2000, **options) -> np.ndarray:
    """The share of each token in n samples."""
    size = len(logits)
    options = {"temperature": 1.0, "top_k": size, "top_p": 1.0, "seed": 0, "stops": np.zeros((0, 1), int)} | options
    batch = np.tile(np.array(logits, np.float32), (n, 1))
    options["numbers"] = np.arange(n, dtype=np.uint32)
    filtered = options["top_k"] < size or options["top_p"] < 1
    tokens = jax.jit(sample_tokens, static_argnums=3)(batch, Sampler(**options), np.int32(0), filtered)
    return np.bincount(np.asarray(tokens), minlength=size) / n


def test_tokens_are_sampled_by_their_probability():
    shares = np.array([0.5, 0.25, 0.15, 0.1])
    logits = (np.log(shares) + 3).tolist()
    np.testing.assert_allclose(sampled_shares(logits), shares, atol=0.04)
    sharp = shares**2 / (shares**2).sum()
    np.testing.assert_allclose(sampled_shares(logits, temperature=0.5), sharp, atol=0.04)
    np.testing.assert_array_equal(sampled_shares(logits, temperature=0.0), [1, 0, 0, 0])
    np.testing.assert_allclose(sampled_shares(logits, top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.04)
    np.testing.assert_allclose(sampled_shares(logits, top_p=0.8), np.array([0.5, 0.25, 0.15, 0]) / 0.9, atol=0.04)
    np.testing.assert_array_equal(sampled_shares(logits, top_p=0.4), [1, 0, 0, 0])
    np.testing.assert_allclose(sampled_shares(logits, top_k=3, top_p=0.6), [2 / 3, 1 / 3, 0, 0], atol=0.04)
    np.testing.assert_array_equal(sampled_shares(logits, top_k=1, temperature=5.0), [1, 0, 0, 0])


# --- errors -----------------------------------------------------------------------------------------------------------


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
        ([np.array([300])], {}, "prompt = int64[1] [300]: must be token ids, [n] whole numbers from 0 to 256"),
        ([np.arange(8) - 1], {}, "int64[8] [-1, 0, 1, 2, 3, 4, 5, 6]: must be token ids"),
        ([np.array([0.5])], {}, "must be token ids"),
        ([b"x", b"y", b"z"], {"numbers": [5]}, "numbers = int64[1] [5]: must be one for each of the 3 prompts"),
        ([b"x"], {"numbers": [-1]}, "numbers = int64[1] [-1]: must be one for each of the 1 prompts, at least 0"),
    ],
)
def test_bad_options_are_errors_of_one_line(prompts, options, words):
    with pytest.raises(UserError) as caught:
        language_model(MODEL).generate(prompts, **options)
    assert words in str(caught.value) and len(caught.value.faults) == 1


# --- masked models ----------------------------------------------------------------------------------------------------

MASKED = dataclasses.replace(MODEL, objective="masked", vocab_size=258)


@pytest.mark.parametrize("kind", [MASKED.feed_forward, SoftMoEConfig(4)], ids=lambda kind: kind.kind)
def test_gaps_are_filled_with_the_likeliest_tokens(kind):
    lm = language_model(dataclasses.replace(MASKED, feed_forward=kind))
    texts = [f"impo{GAP}t {GAP}s", f"{GAP}", "de_ f():".replace("_", GAP)]
    tokens, token_mask = np.full((4, 24), 0, np.int32), np.zeros((4, 24), bool)
    for i, text in enumerate(texts):
        ids = [257 if c == GAP else ord(c) for c in text]
        tokens[i, : len(ids)], token_mask[i, : len(ids)] = ids, True
    probs = np.exp(log_probs(lm.config.model, lm.params, tokens, token_mask))
    for i, (text, filled) in enumerate(zip(texts, lm.fill(texts), strict=True)):
        gaps = [j for j, c in enumerate(text) if c == GAP]
        likeliest = probs[i, gaps].argmax(axis=-1)
        np.testing.assert_allclose([p for _, p in filled.gaps], probs[i, gaps, likeliest], rtol=1e-4)
        expected = [likeliest[gaps.index(j)] if j in gaps else ord(c) for j, c in enumerate(text)]
        assert filled.text == ByteTokenizer().decode(expected).decode(errors="replace")


def test_batches_of_texts_are_filled_as_one_batch():
    """Groups of 4 are the same, whatever the size of the batches; the last one is not full."""
    lm = language_model(MASKED)
    texts = [f"{first}{GAP}x{GAP}" for first in "abcdefghij"]
    whole, batches = lm.fill(texts), lm.fill(texts, batch_size=3)  # 3 batches of a group
    assert [row.text for row in whole] == [row.text for row in batches] and len(whole) == 10
    for one, other in zip(whole, batches, strict=True):
        np.testing.assert_allclose([p for _, p in one.gaps], [p for _, p in other.gaps], rtol=1e-4)
    ids = np.array([257, ord("x"), 257])
    assert len(lm.fill([ids])[0].gaps) == 2 and ids[0] == 257


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ("a_b", {}, r"texts = 'a_b': must be a list of texts"),
        (["a_b"], {"batch_size": 0}, "batch_size = 0: must be at least 1; try 32"),
        ([np.array([258])], {}, r"text = int64\[1\] \[258\]: must be token ids, \[n\] whole numbers from 0 to 257"),
    ],
)
def test_arguments_of_fill_are_checked(texts, options, words):
    with pytest.raises(UserError, match=words):
        language_model(MASKED).fill(texts, **options)


def test_ids_above_a_mask_token_that_is_in_the_vocabulary_are_texts(tmp_path):
    (tmp_path / "words.json").write_bytes(FILES["words.json"]())
    tokenizer = load_tokenizer(str(tmp_path / "words.json"))
    lm = language_model(dataclasses.replace(MASKED, vocab_size=tokenizer.vocab_size))
    lm = dataclasses.replace(lm, tokenizer=tokenizer)
    last = tokenizer.vocab_size - 1
    assert tokenizer.mask_token < last
    (filled,) = lm.fill([np.array([last, tokenizer.mask_token, last])])
    assert len(filled.gaps) == 1
    with pytest.raises(UserError, match=f"whole numbers from 0 to {last};"):
        lm.fill([np.array([last + 1])])


def test_token_ids_of_another_tokenizer_have_no_likelihood():
    with pytest.raises(UserError, match="must be token ids"):
        language_model(MODEL).log_likelihoods([(np.array([1]), np.array([60_000]))])


@pytest.mark.parametrize("text, words", [("no gap", "has no gap"), (GAP * 25, "has 25 tokens, and the context 24")])
def test_texts_and_models_without_gaps_are_refused(text, words):
    with pytest.raises(UserError, match=words):
        language_model(MASKED).fill([text])
    with pytest.raises(UserError, match="has no gaps to fill; try `mot generate`"):
        language_model(MODEL).fill([text + GAP])
    with pytest.raises(UserError, match="cannot continue a text; try `mot fill`"):
        language_model(MASKED).generate(["x"])
