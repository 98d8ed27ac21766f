"""The dense layer: its formula for every option, and its parameters."""

import jax
import numpy as np
import pytest
from flax import nnx

from mot_jax.config import DenseConfig, InitConfig
from mot_jax.nn.feed_forward import Dense
from mot_jax.nn.feed_forward.interface import activate
from mot_jax.nn.transformer import get_params

D, F = 8, 300
X = np.random.default_rng(0).normal(size=(2, 3, D)).astype("float32")
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_gates(activation):
    x, act = np.linspace(-4, 4, 33), ACTIVATIONS[activation]
    np.testing.assert_allclose(activate(activation, x, None), act(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(activate(activation, x, x[::-1]), act(x[::-1]) * x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_equals_its_formula(gated, bias):
    rngs = nnx.Rngs(params=jax.random.key(0, impl="rbg"))
    layer = Dense(D, F, DenseConfig(bias), activation="silu", gated=gated, init=InitConfig("normal"), rngs=rngs)
    start = get_params(layer)
    kernels = {"kernel_in": (D, F), "kernel_out": (F, D)} | ({"kernel_gate": (D, F)} if gated else {})
    biases = {"bias_in": (F,), "bias_out": (D,)} | ({"bias_gate": (F,)} if gated else {})
    assert {k: v.shape for k, v in start.items()} == kernels | (biases if bias else {})
    for name, value in start.items():  # fan_in is the first dimension
        assert np.std(value) == pytest.approx((0.1 / value.shape[0]) ** 0.5 if name in kernels else 0, rel=0.06)

    rng = np.random.default_rng(1)
    p = {name: rng.normal(size=value.shape).astype("float32") for name, value in start.items()}
    nnx.update(layer, nnx.State({name: nnx.Param(value) for name, value in p.items()}))
    h, gate = (
        X.astype("float64") @ p.get(f"kernel_{n}", 0 * p["kernel_in"]) + p.get(f"bias_{n}", 0) for n in ("in", "gate")
    )
    h = ACTIVATIONS["silu"](gate) * h if gated else ACTIVATIONS["silu"](h)
    np.testing.assert_allclose(jax.jit(layer)(X).y, h @ p["kernel_out"] + p.get("bias_out", 0), rtol=1e-4, atol=1e-3)
