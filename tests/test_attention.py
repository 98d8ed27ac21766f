"""Attention: the plain formula, the mask, and its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mot_jax.attention import Attention
from mot_jax.config import ModelConfig

B, S, D, H = 2, 5, 8, 2
# The generator that compiles in a fraction of the time.
KEY = jax.random.key(0, impl="rbg")
LAYER = Attention(ModelConfig(d_model=D, num_heads=H), rngs=nnx.Rngs(params=KEY))
X = np.random.default_rng(0).normal(size=(B, S, D)).astype("float32")


def plainly(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One row, head and query after the other."""
    w_q, w_kv, w_o = (np.asarray(p[...], "float64") for p in (LAYER.query, LAYER.key_value, LAYER.out))
    y = np.zeros(x.shape)
    for b in range(B):
        for h in range(H):
            queries, keys, values = x[b] @ w_q[:, h], x[b] @ w_kv[:, 0, h], x[b] @ w_kv[:, 1, h]
            for s in np.flatnonzero(mask[b]):
                seen = [t for t in range(s + 1) if mask[b, t]]
                powers = np.exp(keys[seen] @ queries[s] / (D // H) ** 0.5)
                y[b, s] += powers @ values[seen] / powers.sum() @ w_o[h]
    return y


@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_plain_formula(masked):
    mask = np.random.default_rng(1).random((B, S)) < 0.6 if masked else np.ones((B, S), bool)
    y = LAYER(X, jnp.asarray(mask) if masked else None)
    np.testing.assert_allclose(np.asarray(y)[mask], plainly(X, mask)[mask], atol=1e-5)


def test_parameters():
    assert (LAYER.query.shape, LAYER.key_value.shape, LAYER.out.shape) == ((D, H, 4), (D, 2, H, 4), (H, 4, D))


def test_computes_in_the_dtype_of_the_model():
    layer = Attention(ModelConfig(d_model=D, num_heads=H, dtype="bfloat16"), rngs=nnx.Rngs(params=KEY))
    assert layer(X).dtype == "bfloat16" and layer.out.dtype == "float32"
