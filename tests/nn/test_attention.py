"""Attention: every option against the plain formula, masks, rotary positions, parameters."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mot_jax.config import ModelConfig
from mot_jax.nn.attention import Attention, rotate
from mot_jax.nn.sharding import parameter_spec, reshard

B, S, D, H = 2, 6, 16, 4
K = D // H
# The random generator that compiles fastest.
KEY = jax.random.key(0, impl="rbg")
MODEL = ModelConfig(d_model=D, num_heads=H)
X = np.random.default_rng(0).normal(size=(B, S, D)).astype("float32")
SEGMENTS = np.array([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]], "int32")
MASK = np.random.default_rng(1).random((B, S)) < 0.6


@lru_cache
def layer_of(**choices) -> Attention:
    layer = Attention(dataclasses.replace(MODEL, **choices), rngs=nnx.Rngs(params=KEY))
    for i, bias in enumerate((layer.query_bias, layer.key_value_bias, layer.out_bias)):
        if bias is not None:
            assert not bias[...].any()
            bias[...] = jax.random.normal(jax.random.fold_in(KEY, i), bias.shape)
    return layer


def rotated(x: np.ndarray, base: float) -> np.ndarray:
    """Rotary positions by complex numbers. x [S, K]."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] / base ** (2 * np.arange(half) / x.shape[-1])
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=-1)


def plainly(layer: Attention, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Attention in a loop over sequences, heads and queries."""
    config = layer.config
    w_q, w_kv, w_o = (np.asarray(p[...], "float64") for p in (layer.query, layer.key_value, layer.out))
    b_q, b_kv, b_o = np.zeros(w_q.shape[1:]), np.zeros(w_kv.shape[1:]), np.zeros(x.shape[-1])
    if config.attention_bias:
        b_q, b_kv, b_o = (np.asarray(p[...]) for p in (layer.query_bias, layer.key_value_bias, layer.out_bias))
    y = np.zeros(x.shape) + b_o
    for b in range(len(x)):
        for h in range(H):
            shared = h * w_kv.shape[2] // H
            queries = x[b] @ w_q[:, h] + b_q[h]
            keys, values = (x[b] @ w_kv[:, i, shared] + b_kv[i, shared] for i in (0, 1))
            if config.positions == "rotary":
                queries, keys = rotated(queries, config.rotary_base), rotated(keys, config.rotary_base)
            for s in np.flatnonzero(mask[b]):
                attended = mask[b] & (SEGMENTS[b] == SEGMENTS[b, s] if config.document_mask else True)
                attended &= np.arange(S) <= s if config.objective == "causal" else True
                powers = np.exp(keys[attended] @ queries[s] / K**0.5)
                y[b, s] += powers @ values[attended] / powers.sum() @ w_o[h]
    return y


CHOICES = {
    "paper": {},
    "masked": {"objective": "masked"},
    "grouped": {"num_kv_heads": 2},
    "biased": {"num_kv_heads": 2, "attention_bias": True},
    "all": {"num_kv_heads": 1, "positions": "rotary", "rotary_base": 50.0, "document_mask": True},
}


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("case", CHOICES)
def test_equals_the_plain_formula(case, mask):
    layer, token_mask = layer_of(**CHOICES[case]), np.ones((B, S), bool) if mask is None else mask
    y = jax.jit(layer)(X, mask, SEGMENTS)
    np.testing.assert_allclose(np.asarray(y)[token_mask], plainly(layer, X, token_mask)[token_mask], atol=1e-5)


@pytest.mark.parametrize("case", ["paper", "masked", "all"])
def test_padding_at_the_end_in_training(case):
    layer, token_mask = layer_of(**CHOICES[case]), np.arange(S) < np.array([[4], [6]])
    y, trained = (np.asarray(layer(X, token_mask, SEGMENTS, train=train)) for train in (False, True))
    np.testing.assert_allclose(trained[token_mask], y[token_mask], atol=1e-6)
    x = np.where(token_mask[..., None], X, 100 * np.random.default_rng(7).normal(size=X.shape)).astype("float32")
    y = np.asarray(layer(x, token_mask, SEGMENTS, train=True))
    np.testing.assert_array_equal(y[token_mask], trained[token_mask])


def with_parameter_specs(state: nnx.State) -> nnx.State:
    """The state, sharded over the mesh that is set."""
    flat = nnx.to_flat_state(state)
    sharded = [(p, v.replace(jax.device_put(v[...], parameter_spec(p[-1], v.ndim)))) for p, v in flat]
    return nnx.from_flat_state(sharded)


def test_biases_on_a_mesh(mesh_of):
    """Values and gradients with sharded heads, and with sharded positions between the sub-layers."""
    layer = layer_of(**CHOICES["biased"])
    graph, state = nnx.split(layer)

    def loss(state: nnx.State, x: jax.Array) -> jax.Array:
        return (nnx.merge(graph, state)(reshard(x, "sequences", "positions", None)) ** 2).sum()

    expected = jax.jit(jax.value_and_grad(loss))(state, X)
    mesh = mesh_of(fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        actual = jax.jit(jax.value_and_grad(loss))(with_parameter_specs(state), X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


@pytest.mark.parametrize("num_kv_heads", [None, 1])
def test_a_single_sequence_on_a_mesh_of_one_device(mesh_of, num_kv_heads):
    """JAX 0.12 requires equal shardings even of dimensions of size 1."""
    layer, x = layer_of(num_kv_heads=num_kv_heads), X[:1]
    graph, state = nnx.split(layer)
    expected = layer(x)
    with jax.set_mesh(mesh_of()):
        sharded = nnx.merge(graph, with_parameter_specs(state))
        actual = jax.jit(lambda x: sharded(reshard(x, "sequences", "positions", None)))(x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_grouped_query_heads_equal_repeated_ones():
    grouped, full = layer_of(num_kv_heads=2), layer_of()
    copies = jnp.repeat(grouped.key_value[...], 2, axis=2)
    state = {"query": grouped.query, "key_value": nnx.Param(copies), "out": grouped.out}
    repeated = nnx.merge(nnx.graphdef(full), nnx.State(state))
    np.testing.assert_allclose(grouped(X), repeated(X), rtol=1e-5, atol=1e-6)


def test_documents_of_a_sequence_are_independent():
    """With rotary positions, which are relative, a document's position within its sequence does not matter."""
    layer = layer_of(positions="rotary", document_mask=True)
    together = layer(X, None, SEGMENTS)
    for part in (slice(0, 2), slice(2, 5)):
        separate = layer(X[:1, part], None, SEGMENTS[:1, part])
        np.testing.assert_allclose(together[:1, part], separate, rtol=1e-4, atol=1e-5)


def test_a_document_mask_requires_segments():
    with pytest.raises(ValueError, match=r"document_mask = True needs segments.*segments = None"):
        layer_of(document_mask=True)(X)


def test_rotary_products_depend_only_on_the_distance():
    query, key = (jnp.asarray(x) for x in np.random.default_rng(2).normal(size=(2, 1, 5, 1, K)).astype("float32"))

    def product(p: int, q: int):
        return (rotate(query, jnp.full(5, p), 10.0) * rotate(key, jnp.full(5, q), 10.0)).sum(axis=-1)

    np.testing.assert_allclose(product(7, 4), product(103, 100), rtol=1e-4, atol=1e-5)
    assert not np.allclose(product(7, 4), product(4, 7), atol=1e-2)
    np.testing.assert_array_equal(rotate(query, jnp.zeros(5, int), 10.0), query)
    positions = jnp.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])  # different in each sequence
    queries = rotate(jnp.concatenate([query, query]), positions, 10.0)
    for b in (0, 1):
        np.testing.assert_allclose(queries[b], rotate(query, positions[b], 10.0)[0], rtol=1e-6)


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_parameters(num_kv_heads):
    layer = layer_of(num_kv_heads=num_kv_heads)
    shapes = (D, H, K), (D, 2, num_kv_heads or H, K), (H, K, D)
    assert (layer.query.shape, layer.key_value.shape, layer.out.shape) == shapes


def test_computes_in_the_dtype_of_the_model():
    layer = layer_of(dtype="bfloat16", positions="rotary")
    assert layer(X).dtype == "bfloat16" and layer.out.dtype == "float32"
