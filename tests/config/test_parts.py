"""Parts of a config that enter the library from Python: a value that does not exist is refused, never ignored."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mot_jax import Dense, MixtureOfTokens, TokenChoice, Transformer
from mot_jax.config import (
    Config,
    DenseConfig,
    InitConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TokenChoiceConfig,
    to_json,
)
from mot_jax.cost.describe import describe
from mot_jax.errors import UserError
from mot_jax.nn import mixing
from mot_jax.runs.optimizer import make_optimizer

MIXING = {
    "merge": "Softmax",
    "emit": "softmaxx",
    "groups": "witihin",
    "controllers": "seperate",
    "base_weight": "three",
    "annealing": "lineal",
    "learned_temperature": "per_epxert",
    "temperature": -1.0,
    "final_temperature": float("nan"),
    "layer_norm": "yes",
}
SMALL = ModelConfig(1, 8, 16, 2, context_length=8, loss_chunk=8, feed_forward=MixtureOfTokensConfig(2, 4))
MODELS = {
    "objective": "casual",
    "positions": "rotery",
    "norm": "rmss",
    "activation": "rellu",
    "attention_kernel": "flash",
    "remat": "block",
    "dtype": "float16",
    "moe_blocks": "last_hlaf",
    "norm_epsilon": float("nan"),
    "num_heads": 3,
}


def rngs() -> nnx.Rngs:
    return nnx.Rngs(params=0)


@pytest.mark.parametrize("field", MIXING)
def test_mixing_is_checked_by_layers_models_and_functions(field):
    wrong = MixingConfig(**{field: MIXING[field]})
    layer = MixtureOfTokensConfig(2, 4, mixing=wrong)
    logits = jnp.zeros((1, 2, 1, 4))
    for use in (
        lambda: MixtureOfTokens(8, 16, layer, rngs=rngs()),
        lambda: Transformer(dataclasses.replace(SMALL, feed_forward=layer), rngs=rngs()),
        lambda: mixing.mixing_weights(logits, wrong),
        lambda: mixing.emit_weights(logits, logits, wrong),
        lambda: mixing.temperature_at_step(wrong, None),
        lambda: describe(Config(model=dataclasses.replace(SMALL, feed_forward=layer))),
    ):
        with pytest.raises(UserError) as error:
            use()
        assert f"{field} = {MIXING[field]!r}: must be" in str(error.value) and len(error.value.faults) == 1


@pytest.mark.parametrize("field", MODELS)
def test_a_model_is_checked(field):
    with pytest.raises(UserError) as error:
        Transformer(dataclasses.replace(SMALL, **{field: MODELS[field]}), rngs=rngs())
    assert str(error.value).startswith(f"model.{field} = {MODELS[field]!r}: ")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Dense(8, 16, activation="rellu", rngs=rngs()), "activation = 'rellu': must be 'relu' or"),
        (lambda: TokenChoice(8, 16, dtype="float", rngs=rngs()), "dtype = 'float': must be"),
        (
            lambda: Dense(8, 16, dtype=jnp.float16, rngs=rngs()),
            "dtype = 'float16': must be 'float32' or 'bfloat16'; try ",
        ),
        (lambda: Dense(8, 16, dtype=jnp, rngs=rngs()), "must be 'float32' or 'bfloat16'; try 'float32'"),
        (lambda: Dense(np.int64(0), 16, rngs=rngs()), "d_model = 0: must be at least 1; try 1"),
        (lambda: Dense(8.0, 16, rngs=rngs()), "d_model = 8.0: must be int; try 256"),
        (lambda: Dense(0, 16, rngs=rngs()), "d_model = 0: must be at least 1"),
        (lambda: Dense(8, 16, init=InitConfig("guassian"), rngs=rngs()), "init.distribution = 'guassian'"),
        (lambda: MixtureOfTokens(8, 16, MixingConfig(), rngs=rngs()), "must be a MixtureOfTokensConfig"),
        (lambda: MixtureOfTokens(8, 16, MixtureOfTokensConfig(kernel="pallas"), rngs=rngs()), "'fused_mixture'"),
        (lambda: MixtureOfTokens(8, 16, MixtureOfTokensConfig(kernel="xlaa"), rngs=rngs()), "kernel = 'xlaa'"),
        (
            lambda: MixtureOfTokens(8, 16, MixtureOfTokensConfig(save_for_backward="saved"), rngs=rngs()),
            "save_for_backward = 'saved': must be 'nothing' or",
        ),
        (lambda: TokenChoice(8, 16, TokenChoiceConfig(capacity_factor=-1.0), rngs=rngs()), "capacity_factor = -1.0"),
        (lambda: make_optimizer(OptimizerConfig(name="adam"), 10), "training.optimizer.name = 'adam'"),
        (lambda: mixing.group(jnp.zeros((2, 2, 1)), 2, "witihin"), "did you mean 'within'?"),
    ],
)
def test_other_arguments_are_checked(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize("bfloat16", [jnp.bfloat16, jnp.dtype("bfloat16"), jnp.zeros((), jnp.bfloat16).dtype])
def test_data_types_and_numpy_numbers_are_those_of_a_config_file(bfloat16):
    plain = Dense(8, 16, dtype="bfloat16", param_dtype="bfloat16", rngs=rngs())
    layer = Dense(np.int64(8), np.int32(16), dtype=bfloat16, param_dtype=bfloat16, rngs=rngs())
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer), nnx.state(plain))
    assert layer(jnp.ones((2, 2, 8))).y.dtype == jnp.bfloat16
    kind = MixtureOfTokensConfig(np.int64(2), np.int64(4), mixing=MixingConfig(temperature=np.float32(0.5)))
    model = dataclasses.replace(SMALL, d_model=np.int64(8), feed_forward=kind, dtype=bfloat16, param_dtype=np.float32)
    written = dataclasses.replace(
        SMALL, feed_forward=MixtureOfTokensConfig(2, 4, mixing=MixingConfig(temperature=0.5)), dtype="bfloat16"
    )
    assert to_json(Config(model=model)) == to_json(Config(model=written)) and hash(model) == hash(written)
    assert Transformer(model, rngs=rngs()).config == written


def test_valid_parts_are_accepted():
    Dense(8, 16, DenseConfig(bias=False), activation="silu", gated=True, dtype="bfloat16", rngs=rngs())
    x = jnp.ones((4, 2, 8))
    layer = MixtureOfTokens(8, 16, MixtureOfTokensConfig(2, 4, mixing=MixingConfig("uniform")), rngs=rngs())
    assert jax.jit(lambda layer, x: layer(x).y)(layer, x).shape == x.shape
