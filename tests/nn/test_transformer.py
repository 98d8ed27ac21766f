"""The transformer: causality and isolation, scanned blocks, parameters, the model as a pure function."""

import dataclasses
import re
import time
from collections import Counter
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from mot_jax.config import DenseConfig, MixtureOfTokensConfig, ModelConfig, load_config
from mot_jax.nn.feed_forward import FeedForwardContext
from mot_jax.nn.transformer import Block, Transformer, bind, get_params, init_params, scan_groups, unroll

B, S, G = 4, 4, 2
MIXTURE = MixtureOfTokensConfig(group_size=G, num_experts=4)
# One token id for each token of a batch, so that the gradient of the embedding table is that of each token.
MODEL = ModelConfig(
    num_blocks=2,
    d_model=8,
    d_ff=16,
    num_heads=2,
    context_length=S,
    vocab_size=B * S,
    feed_forward=MIXTURE,
    loss_chunk=2,
)
DENSE = DenseConfig()
# Every option that differs from the paper: a model without mixing, and a bidirectional one.
CHOICES = {"num_kv_heads": 1, "positions": "rotary", "norm": "rms", "final_norm": True, "tie_embeddings": True}
CHOICES |= {"activation": "silu", "gated": True}
DECODER = dataclasses.replace(MODEL, feed_forward=DENSE, document_mask=True, **CHOICES)
ENCODER = dataclasses.replace(MODEL, objective="masked", **CHOICES)
TOKENS = np.arange(B * S, dtype="int32").reshape(B, S)
SEQUENCE, POSITION = np.indices((B, S))


@lru_cache
def abstract(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return jax.eval_shape(partial(init_params, config), jax.random.key(0))


@lru_cache
def params_of(config: ModelConfig) -> dict[str, jax.Array]:
    """Arbitrary parameters: compiling the real init takes longer than the tests that use them."""
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=v.shape) / v.shape[-1] ** 0.5, v.dtype) for k, v in abstract(config).items()}


@lru_cache
def initial_params(config: ModelConfig) -> dict[str, jax.Array]:
    """The real init, with a random generator that compiles quickly."""
    return jax.jit(partial(init_params, config))(jax.random.key(0, impl="rbg"))


@partial(jax.jit, static_argnums=0)
def hidden(config: ModelConfig, params: dict, tokens: jax.Array, mask=None, segments=None) -> jax.Array:
    return bind(config, params)(tokens, FeedForwardContext(token_mask=mask), segments).hidden


@partial(jax.jit, static_argnums=0)
def value_and_grad(config: ModelConfig, params: dict, tokens: jax.Array):
    def loss(params):
        model = bind(config, params)
        out = model(tokens)
        return model.loss_sum(out.hidden, jnp.roll(tokens, -1, 1), jnp.ones_like(tokens, bool)).loss, out.metrics

    return jax.value_and_grad(loss, has_aux=True)(params)


# --- causality and isolation ------------------------------------------------------------------------------------------


def changed(run, tokens: np.ndarray, replaced: np.ndarray, seed: int, draws: int = 3) -> np.ndarray:
    """bool [B, S]: the tokens whose output changes in any bit when the tokens in `replaced` change at random."""
    before, rng = np.asarray(run(tokens)), np.random.default_rng(seed)
    differs = np.zeros(tokens.shape, bool)
    for _ in range(draws):
        other = np.where(replaced, (tokens + rng.integers(1, B * S, size=tokens.shape)) % (B * S), tokens)
        differs |= (np.asarray(run(other)) != before).any(axis=-1)
    return differs


def reach(sequence: int, position: int) -> np.ndarray:
    """bool [B, S]: the tokens whose outputs may depend on a token: those of its group, from its position on."""
    return (sequence // G == SEQUENCE // G) & (position <= POSITION)


@given(seed=st.integers(0, 2**16))
def test_outputs_do_not_depend_on_later_tokens_or_other_documents(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(B * S, size=(B, S), dtype="int32")
    segments = rng.integers(2, size=(B, S), dtype="int32").cumsum(axis=1)
    run, start = partial(hidden, DECODER, params_of(DECODER), segments=segments), rng.integers(1, S)
    assert not changed(run, tokens, start <= POSITION, seed)[:, :start].any()
    others = segments != segments[:, [rng.integers(S)]]
    assert not changed(run, tokens, others, seed)[~others].any()


def test_an_encoder_attends_to_its_whole_sequence():
    run = partial(hidden, ENCODER, params_of(ENCODER))
    np.testing.assert_array_equal(changed(run, TOKENS, (SEQUENCE == 0) & (POSITION == S - 1), 0), SEQUENCE < G)


@given(seed=st.integers(0, 2**16))
def test_outputs_of_an_encoder_do_not_depend_on_masked_tokens(seed):
    """Masked are padding tokens of a sequence, and one whole sequence, as where it fills up a group."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(B * S, size=(B, S), dtype="int32")
    token_mask = rng.random((B, S)) < 0.7
    token_mask[rng.integers(B)] = False
    run = partial(hidden, ENCODER, params_of(ENCODER), mask=token_mask)
    assert not changed(run, tokens, ~token_mask, seed)[token_mask].any()


@pytest.mark.parametrize("sequence, position", [(0, 0), (1, 2), (3, 1)])
def test_a_token_affects_its_group_from_its_position_on(sequence, position):
    """A change reaches all allowed tokens, of the other group member too."""
    run, replaced = partial(hidden, MODEL, params_of(MODEL)), (sequence == SEQUENCE) & (position == POSITION)
    np.testing.assert_array_equal(changed(run, TOKENS, replaced, 0), reach(sequence, position))


def toy(weights: np.ndarray, axis: int):
    """A layer that mixes embeddings along one axis of [B, S]."""
    table = np.random.default_rng(0).normal(size=(B * S, 3)).astype("float32")
    return jax.jit(lambda tokens: jnp.moveaxis(jnp.tensordot(weights, jnp.asarray(table)[tokens], (1, axis)), 0, axis))


LEAKS = {
    "along the sequence": (toy(np.ones((S, S)), 1), POSITION >= 2, (slice(None), slice(0, 2)), True),
    "one step ahead": (toy(np.eye(S, k=1), 1), POSITION >= 2, (slice(None), slice(0, 2)), True),
    "causal": (toy(np.tril(np.ones((S, S))), 1), POSITION >= 2, (slice(None), slice(0, 2)), False),
    "over the batch": (toy(np.ones((B, B)), 0), SEQUENCE >= G, slice(0, G), True),
    "in the group": (toy(np.kron(np.eye(B // G), np.ones((G, G))), 0), SEQUENCE >= G, slice(0, G), False),
}


@pytest.mark.parametrize("case", LEAKS)
def test_the_check_detects_a_leak(case):
    run, replaced, unaffected, leaks = LEAKS[case]
    assert changed(run, TOKENS, replaced, 0)[unaffected].any() == leaks


def dependence(config: ModelConfig, mask: np.ndarray | None = None) -> np.ndarray:
    """bool [B, S, B, S]: whether the output of the first token has a gradient with respect to the second."""
    params, direction = params_of(config), np.random.default_rng(0).normal(size=config.d_model)

    def outputs(table):
        return hidden(config, params | {"token_embedding": table}, TOKENS, mask) @ direction

    return np.asarray(jax.jit(jax.jacrev(outputs))(params["token_embedding"]) != 0).any(axis=-1).reshape(B, S, B, S)


def test_gradients_reach_exactly_the_past_of_the_group():
    """The gradient is zero outside it, and nowhere zero in it."""
    expected = np.array([[reach(b, s) for s in range(S)] for b in range(B)]).transpose(2, 3, 0, 1)
    np.testing.assert_array_equal(dependence(MODEL), expected)


def test_gradients_do_not_reach_masked_tokens():
    config = dataclasses.replace(MODEL, feed_forward=dataclasses.replace(MIXTURE, shared_expert_dim=8))
    mask = np.random.default_rng(0).random((B, S)) < 0.6
    assert not dependence(config, mask)[mask][:, ~mask].any()


# --- scans ------------------------------------------------------------------------------------------------------------

SCAN_GROUPS = {
    "all": ("all", 8, [((MIXTURE,), 8)]),
    "last_half": ("last_half", 8, [((DENSE,), 4), ((MIXTURE,), 4)]),
    "every_other": ("every_other", 8, [((DENSE, MIXTURE), 4)]),
    "odd": ("every_other", 3, [((DENSE,), 1), ((MIXTURE,), 1), ((DENSE,), 1)]),
    "third": ((2, 5), 6, [((DENSE, DENSE, MIXTURE), 2)]),
    "few": ((1, 2), 4, [((DENSE,), 1), ((MIXTURE,), 2), ((DENSE,), 1)]),
    "none": ((), 5, [((DENSE,), 5)]),
    "one": ("all", 1, [((MIXTURE,), 1)]),
}


@pytest.mark.parametrize("case", SCAN_GROUPS)
def test_scan_groups(case):
    moe_blocks, num_blocks, expected = SCAN_GROUPS[case]
    config = dataclasses.replace(MODEL, num_blocks=num_blocks, moe_blocks=moe_blocks)
    assert scan_groups(config) == expected


@given(st.lists(st.sampled_from([DENSE, MIXTURE]), min_size=1, max_size=12), st.integers(1, 3))
def test_scan_groups_have_all_blocks_in_order(pattern, repeats):
    kinds = pattern * repeats
    moe_blocks = tuple(i for i, kind in enumerate(kinds) if kind == MIXTURE)
    groups = scan_groups(dataclasses.replace(MODEL, num_blocks=len(kinds), moe_blocks=moe_blocks))
    assert [kind for period, n in groups for _ in range(n) for kind in period] == kinds
    runs = 1 + sum(a != b for a, b in pairwise(kinds))
    assert len(groups) <= runs
    if repeats > 1:
        assert len(groups) == 1 and len(groups[0][0]) <= len(pattern)


@pytest.mark.slow
@pytest.mark.parametrize("moe_blocks", ["all", "every_other"])
def test_unrolled_blocks_are_the_same_model(moe_blocks):
    config = dataclasses.replace(MODEL, num_blocks=4, moe_blocks=moe_blocks)
    params = init_params(config, jax.random.key(0))
    unrolled, unrolled_params = unroll(config, params)
    assert len(scan_groups(unrolled)) == 4
    chex.assert_trees_all_equal(unrolled_params, init_params(unrolled, jax.random.key(0)))
    np.testing.assert_allclose(
        bind(unrolled, unrolled_params)(TOKENS).hidden, bind(config, params)(TOKENS).hidden, atol=1e-6
    )


def without_scan(config: ModelConfig, params: dict, tokens: np.ndarray) -> jax.Array:
    """Apply the same blocks without a scan, each with its slice of the parameters."""
    model = bind(config, params)
    x = params["token_embedding"][tokens] + params["position_embedding"][: tokens.shape[1]]
    for stack, (_, repeats) in zip(model.stacks, model.scan_groups, strict=True):
        for i in range(repeats):
            for stacked in stack:
                graph, state = nnx.split(stacked)
                x, _ = nnx.merge(graph, jax.tree.map(lambda value, i=i: value[i], state))(x, FeedForwardContext())
    return x


@pytest.mark.parametrize("moe_blocks", ["last_half", "every_other"])
def test_scan_equals_a_loop_over_the_blocks(moe_blocks):
    config = dataclasses.replace(MODEL, num_blocks=4, moe_blocks=moe_blocks)
    params = params_of(config)
    expected = jax.jit(partial(without_scan, config))(params, TOKENS)
    chex.assert_trees_all_close(hidden(config, params, TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_metrics_name_the_blocks():
    config = dataclasses.replace(MODEL, num_blocks=4, moe_blocks="every_other")
    (_, metrics), _ = jax.eval_shape(partial(value_and_grad, config), abstract(config), TOKENS)
    assert set(metrics) == {"mixing_entropy/01", "mixing_entropy/03", *(f"update_ratio/{i:02d}" for i in range(4))}
    assert all(value.shape == () for value in metrics.values())


def test_metrics_belong_to_their_block():
    """The scan returns the metrics of all blocks at once: here only the second block's update is zero."""
    params = dict(params_of(MODEL))
    params["stacks/0/0/feed_forward/w_out"] *= jnp.array([1.0, 0.0])[:, None, None, None]
    metrics = value_and_grad(MODEL, params, TOKENS)[0][1]
    assert metrics["update_ratio/00"] > 0 == metrics["update_ratio/01"]
    assert 0 < metrics["mixing_entropy/01"] != metrics["mixing_entropy/00"]


def test_remat_and_loss_chunks_change_no_number():
    params = params_of(MODEL)
    actual = value_and_grad(dataclasses.replace(MODEL, remat="blocks", loss_chunk=4), params, TOKENS)
    chex.assert_trees_all_close(actual, value_and_grad(MODEL, params, TOKENS), rtol=1e-5, atol=1e-5)


def test_remat_saves_less_for_the_backward_pass():
    deep = dataclasses.replace(MODEL, num_blocks=8)
    saved = {}
    for remat in ("none", "blocks"):
        config = dataclasses.replace(deep, remat=remat)
        pull = jax.eval_shape(lambda p, c=config: jax.vjp(lambda p: hidden(c, p, TOKENS), p)[1], params_of(deep))
        saved[remat] = sum(leaf.size for leaf in jax.tree.leaves(pull))
    assert saved["blocks"] < saved["none"]


@partial(jax.jit, static_argnums=0)
def gradients(config: ModelConfig, params: dict, tokens: jax.Array) -> dict[str, jax.Array]:
    return value_and_grad(config, params, tokens)[1]


@pytest.mark.parametrize("moe_blocks", ["all", "every_other"])
def test_the_program_does_not_grow_with_depth(moe_blocks):
    """24 blocks have the same operations as 6, except those that slice the metrics of each block."""
    counts = {}
    for depth in (6, 24):
        config = dataclasses.replace(MODEL, num_blocks=depth, moe_blocks=moe_blocks)
        operations = Counter(re.findall(r"stablehlo\.\w+", gradients.lower(config, abstract(config), TOKENS).as_text()))
        counts[depth] = {op: n for op, n in operations.items() if op not in {"stablehlo.slice", "stablehlo.reshape"}}
    assert counts[24] == counts[6] and counts[6]["stablehlo.dot_general"] > 10


@pytest.mark.slow
def test_compile_time_does_not_grow_with_depth():
    """CPU seconds for the whole program with its metrics: the best of three, in turns."""
    seconds = {}
    for depth in (6, 24) * 3:
        config = dataclasses.replace(MODEL, num_blocks=depth, moe_blocks="every_other", final_norm=True)
        shapes = abstract(config)
        jax.clear_caches()
        begin = time.process_time()
        value_and_grad.lower(config, shapes, TOKENS).compile()
        seconds[depth] = min(seconds.get(depth, np.inf), time.process_time() - begin)
    assert seconds[24] <= 1.3 * seconds[6]


# --- parameters -------------------------------------------------------------------------------------------------------

SIZED = ModelConfig(
    num_blocks=4,
    d_model=32,
    d_ff=64,
    num_heads=4,
    context_length=48,
    vocab_size=60,
    moe_blocks="every_other",
    feed_forward=MixtureOfTokensConfig(group_size=4, num_experts=8, shared_expert_dim=16),
    final_norm=True,
)
# Name -> (shape, fan_in; 0 for an initial value of 0, None for one of 1).
BLOCK = {
    "attention/query": ((2, 32, 4, 8), 32),
    "attention/key_value": ((2, 32, 2, 4, 8), 32),
    "attention/out": ((2, 4, 8, 32), 32),
    "attention_norm/scale": ((2, 32), None),
    "attention_norm/bias": ((2, 32), 0),
    "feed_forward_norm/scale": ((2, 32), None),
    "feed_forward_norm/bias": ((2, 32), 0),
}
FEED_FORWARD = {
    "0/feed_forward/kernel_in": ((2, 32, 64), 32),
    "0/feed_forward/bias_in": ((2, 64), 0),
    "0/feed_forward/kernel_out": ((2, 64, 32), 64),
    "0/feed_forward/bias_out": ((2, 32), 0),
    "1/feed_forward/controller": ((2, 32, 8), 32),
    "1/feed_forward/w_in": ((2, 8, 32, 24), 32),
    "1/feed_forward/w_out": ((2, 8, 24, 32), 24),
    "1/feed_forward/shared/kernel_in": ((2, 32, 16), 32),
    "1/feed_forward/shared/kernel_out": ((2, 16, 32), 16),
}
PARAMETERS = {
    "token_embedding": ((60, 32), 1),
    "position_embedding": ((48, 32), 1),
    "head": ((32, 60), 32),
    "final_norm/scale": ((32,), None),
    "final_norm/bias": ((32,), 0),
    **{f"stacks/0/{i}/{name}": value for i in (0, 1) for name, value in BLOCK.items()},
    **{f"stacks/0/{name}": value for name, value in FEED_FORWARD.items()},
}


def test_parameter_names_and_shapes():
    assert {name: value.shape for name, value in abstract(SIZED).items()} == {k: v[0] for k, v in PARAMETERS.items()}


def test_options_add_and_remove_parameters():
    names = {name.removeprefix("stacks/0/0/") for name in abstract(DECODER)}
    kernels = {f"feed_forward/{kind}_{part}" for kind in ("kernel", "bias") for part in ("in", "gate", "out")}
    scales = {f"{norm}/scale" for norm in ("attention_norm", "feed_forward_norm", "final_norm")}
    assert names == {"token_embedding", *scales, *kernels, *(n for n in BLOCK if n.startswith("attention/"))}


def v1_density(values: np.ndarray, fan_in: int) -> np.ndarray:
    """Uniform between -sqrt(3 / fan_in) and sqrt(3 / fan_in)."""
    return abs(values) <= (3 / fan_in) ** 0.5


def v2_density(values: np.ndarray, fan_in: int) -> np.ndarray:
    """Normal of std sqrt(0.1 / fan_in), truncated at 0.2: for the embeddings, that is nearly uniform."""
    return np.exp(-0.5 * values**2 / (0.1 / fan_in)) * (abs(values) <= 0.2)


@pytest.mark.parametrize("density", [v1_density, pytest.param(v2_density, marks=pytest.mark.slow)])
def test_parameters_start_as_in_the_paper(density):
    """Mean, standard deviation and truncation of every parameter (`docs/paper.md`, section 5)."""
    v1 = load_config(Path(__file__).parents[2] / "configs" / "v1.py")
    params = initial_params(SIZED if density is v2_density else dataclasses.replace(SIZED, init=v1.model.init))
    for name, (_, fan_in) in PARAMETERS.items():
        value = np.asarray(params[name], "float64")
        if not fan_in:
            assert (value == (1 if fan_in is None else 0)).all(), name
            continue
        grid = np.linspace(-2, 2, 200_001)
        weights = density(grid, fan_in) / density(grid, fan_in).sum()
        std, bound = (weights * grid**2).sum() ** 0.5, abs(grid[weights > 0]).max()
        assert abs(value.mean()) < 5 * std / value.size**0.5, name
        assert value.std() == pytest.approx(std, rel=4 / value.size**0.5), name
        assert abs(value).max() <= bound + 1e-4, name
        if value.size * weights[abs(grid) > 0.95 * bound].sum() > 10:
            assert abs(value).max() > 0.95 * bound, name


def test_blocks_have_different_initial_values():
    w_in = np.asarray(initial_params(SIZED)["stacks/0/1/feed_forward/w_in"]).reshape(2 * 8, -1)
    correlation = np.corrcoef(w_in)
    assert abs(correlation[~np.eye(16, dtype=bool)]).max() < 0.3


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_final_norm(norm):
    config = dataclasses.replace(MODEL, norm=norm, norm_epsilon=0.1)
    params = params_of(dataclasses.replace(config, final_norm=True))
    x, y = (hidden(dataclasses.replace(config, final_norm=on), params, TOKENS) for on in (False, True))
    if norm == "layer":
        x -= x.mean(axis=-1, keepdims=True)
    expected = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 0.1) * params["final_norm/scale"]
    np.testing.assert_allclose(y, expected + params.get("final_norm/bias", 0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_tied_embeddings():
    """Loss and gradients equal those of plain autodiff in float64; the embedding's gradient has both its uses."""
    segments, targets, mask = TOKENS // 2, np.roll(TOKENS, -1, 1), TOKENS % 3 > 0

    def loss(config, plain, params):
        model = bind(config, params)
        x = model(TOKENS, segments=segments).hidden
        if not plain:
            return model.loss_sum(x, targets, mask, head_z=0.3).loss
        logits = x @ params["token_embedding"].T
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nats = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.where(mask, nats + 0.3 * log_z**2, 0).sum()

    with jax.enable_x64(True):
        config = dataclasses.replace(DECODER, dtype="float64", param_dtype="float64")
        actual, expected = (
            jax.jit(jax.value_and_grad(partial(loss, config, plain)))(params_of(config)) for plain in (False, True)
        )
        chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_bind_and_get_params_are_inverse():
    model = bind(MODEL, params_of(MODEL))
    chex.assert_trees_all_equal(get_params(model), params_of(MODEL))
    assert isinstance(model, Transformer) and isinstance(model.stacks[0][0], Block)


def test_bind_names_the_missing_parameter():
    params = dict(params_of(MODEL))
    del params["head"]
    with pytest.raises(KeyError, match="head"):
        bind(MODEL, params)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_types(param_dtype):
    """Activations are bfloat16, logits and loss float32, gradients in the parameters' type."""
    narrow = dataclasses.replace(MODEL, dtype="bfloat16", param_dtype=param_dtype)
    params = abstract(narrow)
    (loss, _), gradients = jax.eval_shape(partial(value_and_grad, narrow), params, TOKENS)
    x = jax.eval_shape(partial(hidden, narrow), params, TOKENS)
    logits = jax.eval_shape(lambda params, x: bind(narrow, params).logits(x), params, x)
    assert (x.dtype, logits.dtype, loss.dtype) == ("bfloat16", "float32", "float32")
    assert {value.dtype for value in [*params.values(), *gradients.values()]} == {jnp.dtype(param_dtype)}


def test_bfloat16_is_near_float32():
    (loss, _), gradients = value_and_grad(dataclasses.replace(MODEL, dtype="bfloat16"), params_of(MODEL), TOKENS)
    (expected, _), expected_gradients = value_and_grad(MODEL, params_of(MODEL), TOKENS)
    assert float(loss) == pytest.approx(float(expected), rel=0.02)
    for name, gradient in gradients.items():
        error = np.linalg.norm(gradient - expected_gradients[name]) / np.linalg.norm(expected_gradients[name])
        assert error < 0.2, name


def test_loss_is_that_of_the_logits():
    params = params_of(MODEL)
    log_p = jax.nn.log_softmax(bind(MODEL, params).logits(hidden(MODEL, params, TOKENS)))
    expected = -jnp.take_along_axis(log_p, np.roll(TOKENS, -1, 1)[..., None], axis=-1).sum()
    chex.assert_trees_all_close(value_and_grad(MODEL, params, TOKENS)[0][0], expected, rtol=1e-5)


def test_shorter_sequences():
    """By causality, a shorter batch has the outputs of the first positions of the longer one."""
    params = params_of(MODEL)
    shorter = hidden(MODEL, params, TOKENS[:, :-1])
    chex.assert_trees_all_close(shorter, hidden(MODEL, params, TOKENS)[:, :-1], rtol=1e-5, atol=1e-5)


def test_dense_blocks_of_a_mixture_model_may_have_no_biases():
    plain = set(abstract(SIZED))
    bare = set(abstract(dataclasses.replace(SIZED, dense_bias=False)))
    assert plain - bare == {"stacks/0/0/feed_forward/bias_in", "stacks/0/0/feed_forward/bias_out"} and bare < plain
