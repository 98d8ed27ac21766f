"""Modes with reference sequences in whole models: equal to mixing in groups with them, and independent sequences."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from mot_jax.config import Config, MixtureOfTokensConfig, ModelConfig
from mot_jax.data.objectives import Objective
from mot_jax.data.windows import WindowBatch
from mot_jax.errors import UserError
from mot_jax.inference.generate import Sampler, prefill
from mot_jax.inference.scoring import likeliest_tokens, score
from mot_jax.modes import MODES, enter
from mot_jax.modes.companions import choose, load_companions, save_companions, summaries
from mot_jax.modes.thresholds import Thresholds
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.feed_forward import companions as companions_layer
from mot_jax.nn.sharding import parameter_spec, place_sequences
from mot_jax.nn.transformer import Block, Params, Transformer, bind, init_params

G, S, V = 4, 8, 257
KIND = MixtureOfTokensConfig(G, 8, controller_init_scale=20.0)
MODEL = ModelConfig(4, 16, 32, 4, context_length=S, loss_chunk=S, feed_forward=KIND, document_mask=True)
CONFIG = Config(model=dataclasses.replace(MODEL, moe_blocks="every_other"))
INDEPENDENT = [name for name, mode in MODES.items() if mode.independent]
COMPANIONS = np.stack([np.random.default_rng(7).integers(0, 256, (G, S)), np.zeros((G, S))]).astype(np.int32)
THRESHOLDS = Thresholds(3, G, 100, np.zeros((2, 8), np.float32), np.full((2, 8), 0.7, np.float32))
COMPANIONS[0, :, 0] = 256
COMPANIONS[:, 1, 4:] = [[256, 8, 8, 8], [1, 1, 1, 1]]  # a second document


@pytest.fixture(scope="module")
def params() -> Params:
    """Parameters large enough that a sequence depends measurably on its group."""
    shapes = jax.eval_shape(lambda: init_params(CONFIG.model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return {n: jnp.asarray(0.4 * rng.normal(size=shape.shape), "float32") for n, shape in shapes.items()}


@pytest.fixture(scope="module")
def entered(params) -> Callable[[str], tuple[Config, Params]]:
    return functools.cache(lambda mode: enter(mode, CONFIG, params, 3, COMPANIONS, THRESHOLDS))


def some_slow(modes: Iterable[str], *fast: str) -> list:
    return [mode if mode in fast else pytest.param(mode, marks=pytest.mark.slow) for mode in modes]


def random_tokens(seed: int, batch_size: int = G) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch_size, S)).astype(np.int32)


@partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, params: Params, tokens: jax.Array, mask=None, positions=None) -> jax.Array:
    model = bind(config, params)
    segments = jnp.cumsum(tokens == 256, axis=1)
    return model.logits(model(tokens, FeedForwardContext(mask, tokens, positions), segments).hidden)


def blocks_of(config: ModelConfig, params: Params) -> list[Block]:
    model, blocks = bind(config, params), []
    for stack, (_, repeats) in zip(model.stacks, model.scan_groups, strict=True):
        graph, state = nnx.split(stack)
        for i in range(repeats):
            blocks += list(nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state)))
    return blocks


@jax.jit
def reference_logits(params: Params, users: jax.Array, texts: jax.Array, segments: jax.Array) -> jax.Array:
    """Run the model block by block, mixing each user's sequence in a group with all companions but the first.

    Attention is computed for each sequence; the companions are mixed among themselves, without a user.
    """
    model = bind(CONFIG.model, params)
    x, others = (model.token_embedding[...][t] + model.position_embedding[...] for t in (users, texts))
    for block in blocks_of(CONFIG.model, params):
        x = x + block.attention(block.attention_norm(x), None, jnp.zeros_like(users))
        others = others + block.attention(block.attention_norm(others), None, segments)
        normed, normed_others = block.feed_forward_norm(x), block.feed_forward_norm(others)
        groups = jnp.concatenate([jnp.concatenate([user[None], normed_others[1:]]) for user in normed])
        x = x + block.feed_forward(groups).y[::G]
        others = others + block.feed_forward(normed_others).y
    return model.logits(x)


def test_companions_equals_mixing_in_a_group_with_them(params, entered):
    users = random_tokens(1)
    expected = reference_logits(params, users, *COMPANIONS)
    config, params_of_mode = entered("companions")
    np.testing.assert_allclose(logits(config.model, params_of_mode, users), expected, rtol=1e-5, atol=1e-5)
    as_trained = logits(CONFIG.model, params, users)
    assert abs(np.asarray(as_trained - expected)).max() > 0.1  # the companions matter


@pytest.mark.parametrize("mode", some_slow(MODES, "companions", "sparse", "grouped"))
def test_no_bit_of_a_sequence_depends_on_other_sequences(entered, mode):
    """Replace the others by random text 100 times. In `grouped` and `discrete` the logits must change."""
    config, params = entered(mode)
    tokens = random_tokens(0)
    expected = np.asarray(logits(config.model, params, tokens)[0])
    changed = 0
    for draw in range(100):
        tokens[1:] = random_tokens(draw + 1)[1:]
        changed += (np.asarray(logits(config.model, params, tokens)[0]) != expected).any()
    assert changed == 0 if mode in INDEPENDENT else changed > 90
    assert np.ptp(expected) > 1


@pytest.mark.parametrize("mode", some_slow([mode for mode in INDEPENDENT if mode != "without"], "companions"))
def test_batch_size_and_left_padding_do_not_matter(entered, mode):
    """A batch of one, and sequences that are padded on the left: to 1e-5 of the largest logit."""
    config, params = entered(mode)
    tokens = random_tokens(0)
    expected = np.asarray(logits(config.model, params, tokens))
    close = {"rtol": 0, "atol": 1e-5 * abs(expected).max()}
    np.testing.assert_allclose(logits(config.model, params, tokens[:1])[0], expected[0], **close)
    gap = 3
    padded = np.concatenate([np.full((G, gap), 5, np.int32), tokens[:, :-gap]], axis=1)
    mask = np.tile(np.arange(S) >= gap, (G, 1))
    positions = np.tile(np.maximum(np.arange(S) - gap, 0), (G, 1)).astype(np.int32)
    padded_logits = logits(config.model, params, padded, mask, positions)
    np.testing.assert_allclose(padded_logits[:, gap:], expected[:, :-gap], **close)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [{"data": 2, "expert": 4}, {"data": 8}, {"expert": 8}, {"fsdp": 2, "tensor": 4}], ids=str
)
def test_modes_on_a_mesh_equal_modes_on_one_device(params, entered, mesh_of, shape):
    tokens, mesh = random_tokens(1, 8), mesh_of(**shape)
    for mode in ("companions", "sparse", "mean_field", "threshold"):
        config, params_of_mode = entered(mode)
        expected = np.asarray(logits(config.model, params_of_mode, tokens))
        with jax.set_mesh(mesh):
            sharded = {n: jax.device_put(v, NamedSharding(mesh, parameter_spec(n, v.ndim))) for n, v in params.items()}
            config, params_of_mode = enter(mode, CONFIG, sharded, 3, COMPANIONS, THRESHOLDS)
            on_mesh = logits(config.model, params_of_mode, place_sequences(mesh, tokens, 8))
            np.testing.assert_allclose(on_mesh, expected, rtol=1e-4, atol=1e-4)


def test_summaries_on_a_mesh_that_neither_length_nor_group_divides(mesh_of):
    """Nine positions and groups of four on eight devices: each has copies of whole groups."""
    model = dataclasses.replace(MODEL, num_blocks=1, context_length=9, loss_chunk=9)
    companions = np.concatenate([COMPANIONS, COMPANIONS[..., -1:]], axis=2)
    params = init_params(model, jax.random.key(0))
    kind = MODES["companions"].change(Config(model=model)).model.feed_forward
    expected = summaries(model, params, 3, companions, kind)
    mesh = mesh_of(data=8)
    with jax.set_mesh(mesh):
        sharded = {n: jax.device_put(v, NamedSharding(mesh, parameter_spec(n, v.ndim))) for n, v in params.items()}
        on_mesh = summaries(model, sharded, 3, companions, kind)
        assert on_mesh.keys() == expected.keys()
        for name, value in on_mesh.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


SLOW_PARTS = [("companions", {}), ("sparse", {}), ("companions", {"fsdp": 2, "tensor": 2}), ("sparse", {"expert": 4})]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, shape",
    [("companions", {"data": 2, "expert": 2}), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_PARTS)],
    ids=str,
)
def test_a_large_batch_is_processed_in_parts_with_the_same_result(entered, mesh_of, monkeypatch, mode, shape):
    """Parts of one or two tokens of a device, with left padding and without."""
    config, params_of_mode = entered(mode)
    tokens = random_tokens(1, 8)
    mask = np.arange(S) >= np.array([3, 0, 1, 0, 0, 5, 0, 2])[:, None]
    padded = (mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32))
    expected = [logits(config.model, params_of_mode, tokens, *extra) for extra in ((), padded)]
    monkeypatch.setattr(companions_layer, "TEMPORARY_BYTES", 4000)
    in_parts = jax.jit(lambda *arguments: logits.__wrapped__(config.model, *arguments))
    for extra, whole in zip(((), padded), expected, strict=True):
        if not shape:  # without a mesh
            split = in_parts(params_of_mode, tokens, *extra)
        else:
            mesh = mesh_of(**shape)
            with jax.set_mesh(mesh):
                sharded = {
                    n: jax.device_put(v, NamedSharding(mesh, parameter_spec(n, v.ndim)))
                    for n, v in params_of_mode.items()
                }
                split = in_parts(sharded, *(place_sequences(mesh, a, 8) for a in (tokens, *extra)))
        np.testing.assert_allclose(split, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", some_slow(("companions", "sparse"), "companions"))
def test_temporaries_of_mixtures_are_bounded(monkeypatch, mode):
    """Prefill, fill and score of 64 sequences need the budget and some copies of the activations.

    The mixtures of all tokens would be 64 times the activations, 32 times the budget.
    """
    batch_size, length, budget = 64, 128, 1 << 22
    kind = MixtureOfTokensConfig(4, 64)
    trained = ModelConfig(1, 64, 128, 2, context_length=length, loss_chunk=32, vocab_size=258, feed_forward=kind)
    monkeypatch.setattr(companions_layer, "TEMPORARY_BYTES", budget)

    def shape(*sizes: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    model = MODES[mode].change(Config(model=trained)).model
    states = jax.eval_shape(lambda: nnx.to_flat_state(nnx.state(Transformer(model, rngs=nnx.Rngs(params=0)))))
    params = {"/".join(map(str, path)): variable.get_value() for path, variable in states}
    step, numbers, no_stop = np.int32(0), np.zeros(batch_size, np.uint32), np.full((1, 1), -2, np.int32)
    sampler = Sampler(np.float32(0), np.int32(1), np.float32(1), np.uint32(0), numbers, no_stop)
    prompts = shape(batch_size, length), shape(batch_size, length, dtype="bool")
    sizes, count = {"vocab_size": 257, "end_of_text": 256}, shape(batch_size)
    for program in (
        prefill.lower(model, params, step, *prompts, sampler, step, **sizes, columns=length + 8, filtered=False),
        likeliest_tokens.lower(model, params, step, prompts[0], count, **sizes),
        score.lower(model, params, step, shape(batch_size, length + 1), count, count, **sizes),
    ):
        activations = 4 * batch_size * length * model.d_model
        assert program.compile().memory_analysis().temp_size_in_bytes < budget + 20 * activations


# --- choosing and storing ---------------------------------------------------------------------------------------------


class FakeWindows:
    """Windows, every fifth of which is not full, and their order. Tokens other than the first are the window's id."""

    context_length = S

    def read(self, ids) -> WindowBatch:
        tokens = np.tile(np.asarray(ids, np.int32)[:, None], (1, S + 1))
        tokens[:, 0] = tokens[:, 5] = 256
        mask = np.ones((len(ids), S), bool)
        mask[np.asarray(ids) % 5 == 0, 3:] = False
        return WindowBatch(tokens, mask)

    def window_ids(self, first: int, last: int) -> np.ndarray:
        return np.arange(first, last)


def test_companions_are_the_first_full_windows_of_the_training_order():
    for masked in (False, True):
        objective = Objective(masked, False, 0.5, 0, 256, 257, 256)
        companions = choose(FakeWindows(), FakeWindows(), objective, G)
        assert companions.dtype == np.int32 and companions.shape == (2, G, S)
        texts, segments = companions
        assert all(window in text for window, text in zip((1, 2, 3, 4), texts, strict=True))
        assert (texts == 257).any() == masked
        np.testing.assert_array_equal(segments, np.tile([1] * 5 + [2] * 3, (G, 1)))


def test_missing_damaged_or_misshapen_companions_are_errors_of_one_line(tmp_path, params):
    assert load_companions(tmp_path) is None
    with pytest.raises(UserError, match=r"companions.npy: is missing; a finished run writes it when .* --mode grou"):
        enter("companions", CONFIG, params, 3, None)
    save_companions(tmp_path, COMPANIONS, {"train": "1"})
    save_companions(tmp_path, COMPANIONS + 1, {"train": "2"})  # does not overwrite
    np.testing.assert_array_equal(load_companions(tmp_path), COMPANIONS)
    with pytest.raises(UserError, match=r"holds 3 sequences, too few for groups of 4; try --group-size 3"):
        enter("sparse", CONFIG, params, 3, COMPANIONS[:, :3])
    with pytest.raises(UserError, match=r"must be int32 \[2, G, 8\], and is int32 \[2, 4, 7\]; delete it: a fin"):
        enter("mean_field", CONFIG, params, 3, COMPANIONS[:, :, :7])
    content = (tmp_path / "companions.npy").read_bytes()
    for damaged in (b"", content[:-8], b"nothing of NumPy's", content[:20] + b"!" + content[21:]):
        (tmp_path / "companions.npy").write_bytes(damaged)
        with pytest.raises(UserError, match=r"companions.npy: is damaged \(.*\); delete it: a finished run writes"):
            load_companions(tmp_path)
