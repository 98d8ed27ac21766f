"""Attention: the plain formula of every choice, the masks, rotary positions, and its parameters."""

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
# The generator that compiles in a fraction of the time.
KEY = jax.random.key(0, impl="rbg")
MODEL = ModelConfig(d_model=D, num_heads=H)
X = np.random.default_rng(0).normal(size=(B, S, D)).astype("float32")
SEGMENTS = np.array([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]], "int32")
MASK = np.random.default_rng(1).random((B, S)) < 0.6


@lru_cache
def layer_of(**choices) -> Attention:
    layer = Attention(dataclasses.replace(MODEL, **choices), rngs=nnx.Rngs(params=KEY))
    for i, bias in enumerate((layer.query_bias, layer.key_value_bias, layer.out_bias)):
        if bias is not None:  # which are zero at first
            assert not bias[...].any()
            bias[...] = jax.random.normal(jax.random.fold_in(KEY, i), bias.shape)
    return layer


def turned(x: np.ndarray, base: float) -> np.ndarray:
    """Rotary positions by complex numbers. x [S, K]."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] / base ** (2 * np.arange(half) / x.shape[-1])
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=-1)


def plainly(layer: Attention, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One row, head and query after the other."""
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
                queries, keys = turned(queries, config.rotary_base), turned(keys, config.rotary_base)
            for s in np.flatnonzero(mask[b]):
                seen = mask[b] & (SEGMENTS[b] == SEGMENTS[b, s] if config.document_mask else True)
                seen &= np.arange(S) <= s if config.objective == "causal" else True
                powers = np.exp(keys[seen] @ queries[s] / K**0.5)
                y[b, s] += powers @ values[seen] / powers.sum() @ w_o[h]
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
    layer, real = layer_of(**CHOICES[case]), np.ones((B, S), bool) if mask is None else mask
    y = jax.jit(layer)(X, mask, SEGMENTS)
    np.testing.assert_allclose(np.asarray(y)[real], plainly(layer, X, real)[real], atol=1e-5)


@pytest.mark.parametrize("case", ["paper", "masked", "all"])
def test_in_training_the_ends_of_rows_may_be_padded(case):
    layer, real = layer_of(**CHOICES[case]), np.arange(S) < np.array([[4], [6]])
    y, trained = (np.asarray(layer(X, real, SEGMENTS, train=train)) for train in (False, True))
    np.testing.assert_allclose(trained[real], y[real], atol=1e-6)
    x = np.where(real[..., None], X, 100 * np.random.default_rng(7).normal(size=X.shape)).astype("float32")
    np.testing.assert_array_equal(np.asarray(layer(x, real, SEGMENTS, train=True))[real], trained[real])


def test_biases_on_a_mesh(mesh_of):
    """Values and gradients, where heads are spread, and positions between the sub-layers."""
    layer = layer_of(**CHOICES["biased"])
    graph, state = nnx.split(layer)

    def loss(state: nnx.State, x: jax.Array) -> jax.Array:
        return (nnx.merge(graph, state)(reshard(x, "rows", "positions", None)) ** 2).sum()

    expected = jax.jit(jax.value_and_grad(loss))(state, X)
    mesh = mesh_of(fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        spread = nnx.to_flat_state(state)
        spread = [(p, v.replace(jax.device_put(v[...], parameter_spec(p[-1], v.ndim)))) for p, v in spread]
        found = jax.jit(jax.value_and_grad(loss))(nnx.from_flat_state(spread), X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_grouped_heads_are_repeated_ones():
    grouped, whole = layer_of(num_kv_heads=2), layer_of()
    copies = jnp.repeat(grouped.key_value[...], 2, axis=2)
    state = {"query": grouped.query, "key_value": nnx.Param(copies), "out": grouped.out}
    same = nnx.merge(nnx.graphdef(whole), nnx.State(state))
    np.testing.assert_allclose(grouped(X), same(X), rtol=1e-5, atol=1e-6)


def test_documents_of_a_row_are_as_if_apart():
    """With rotary positions, which are relative: where in the row a document begins does not matter."""
    layer = layer_of(positions="rotary", document_mask=True)
    together = layer(X, None, SEGMENTS)
    for part in (slice(0, 2), slice(2, 5)):
        apart = layer(X[:1, part], None, SEGMENTS[:1, part])
        np.testing.assert_allclose(together[:1, part], apart, rtol=1e-4, atol=1e-5)


def test_a_document_mask_asks_for_documents():
    with pytest.raises(ValueError, match=r"document_mask = True needs segments.*segments = None"):
        layer_of(document_mask=True)(X)


def test_rotary_products_know_the_distance_alone():
    query, key = (jnp.asarray(x) for x in np.random.default_rng(2).normal(size=(2, 1, 5, 1, K)).astype("float32"))

    def product(p: int, q: int):
        return (rotate(query, jnp.full(5, p), 10.0) * rotate(key, jnp.full(5, q), 10.0)).sum(axis=-1)

    np.testing.assert_allclose(product(7, 4), product(103, 100), rtol=1e-4, atol=1e-5)
    assert not np.allclose(product(7, 4), product(4, 7), atol=1e-2)
    np.testing.assert_array_equal(rotate(query, jnp.zeros(5, int), 10.0), query)
    rows = jnp.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])  # each row its own positions
    found = rotate(jnp.concatenate([query, query]), rows, 10.0)
    for row in (0, 1):
        np.testing.assert_allclose(found[row], rotate(query, rows[row], 10.0)[0], rtol=1e-6)


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_parameters(num_kv_heads):
    layer = layer_of(num_kv_heads=num_kv_heads)
    shapes = (D, H, K), (D, 2, num_kv_heads or H, K), (H, K, D)
    assert (layer.query.shape, layer.key_value.shape, layer.out.shape) == shapes


def test_computes_in_the_dtype_of_the_model():
    layer = layer_of(dtype="bfloat16", positions="rotary")
    assert layer(X).dtype == "bfloat16" and layer.out.dtype == "float32"
