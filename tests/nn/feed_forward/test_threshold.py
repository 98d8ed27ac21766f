"""The layer of mode `threshold` against float64 NumPy."""

import numpy as np
from flax import nnx

from mot_jax.config import MixingConfig, ThresholdConfig
from mot_jax.nn.feed_forward import FeedForwardContext, Threshold

D, E, F = 8, 8, 6


def test_the_layer_equals_the_oracle():
    """With a temperature, gated experts and padding; every token is processed by another number of experts."""
    rng, t = np.random.default_rng(0), 0.5
    config = ThresholdConfig(4, E, F, mixing=MixingConfig(temperature=t))
    layer = Threshold(D, 12, config, gated=True, activation="silu", rngs=nnx.Rngs(0))
    names = ("controller", "w_in", "w_gate", "w_out", "gate_offset", "logit_threshold")
    p = {name: rng.normal(size=getattr(layer, name).shape).astype("float32") for name in names}
    for name, value in p.items():
        getattr(layer, name)[...] = value
    x, mask = rng.normal(size=(3, 5, D)).astype("float32"), rng.random((3, 5)) < 0.8
    y = layer(x, FeedForwardContext(token_mask=mask)).y

    p, x = {name: value.astype("float64") for name, value in p.items()}, x.astype("float64")
    logits = np.einsum("bsd,de->bse", x, p["controller"]) / t
    taken = (logits >= p["logit_threshold"]) & mask[..., None]
    gates = taken / (1 + np.exp(p["gate_offset"] - logits))
    gate, hidden = (np.einsum("bsd,edf->bsef", x, p[name]) for name in ("w_gate", "w_in"))
    outputs = np.einsum("bsef,efd->bsed", gate / (1 + np.exp(-gate)) * hidden, p["w_out"])
    expected = np.einsum("bse,bsed->bsd", gates, outputs)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())
    assert len(np.unique(taken.sum(axis=-1))) > 2 and not np.asarray(y)[~mask].any()
