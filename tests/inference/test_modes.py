"""Inference modes: other configs for the same parameters."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from mot_jax.config import (
    Config,
    ConfigError,
    DenseConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    TrainingConfig,
    check,
)
from mot_jax.inference.modes import MODES, default_mode, discrete, enter, lacking, regrouped
from mot_jax.model import bind, init_params

MIXINGS = {
    "default": MixingConfig(),
    "uniform": MixingConfig("uniform"),
    "no softmax": MixingConfig("logits", layer_norm=True),
    "separate": MixingConfig(emit="softmax", controllers="separate", temperature=0.5),
    "over experts": MixingConfig(emit="softmax_over_experts", annealing="cosine"),
    "learnt": MixingConfig(emit="softmax", learnt_temperature="per_expert", separate_temperatures=True),
    "straight through": MixingConfig(straight_through=True, temperature=0.1),
    "ones": MixingConfig(emit="ones"),
    "top token": MixingConfig(emit="top_token"),
}


def config_of(mixing: MixingConfig) -> Config:
    kind = MixtureOfTokensConfig(group_size=4, num_experts=8, mixing=mixing)
    model = ModelConfig(2, 8, 16, 2, context_length=8, loss_chunk=8, feed_forward=kind)
    return Config(model=model, training=TrainingConfig(batch_size=8, accumulation=2))


def run(config: Config, params: dict) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.int32)
    return np.asarray(bind(config.model, params)(tokens).hidden)


@pytest.mark.parametrize("name", MIXINGS)
def test_discrete_is_the_limit_of_low_temperature(name):
    """It is valid, runs on the trained parameters, and no weight is anything but 0 and 1 where there is a softmax."""
    config = config_of(MIXINGS[name])
    other = discrete(config)
    check(other)
    mixing = other.model.feed_forward.mixing
    assert mixing.merge == ("uniform" if name == "uniform" else "softmax")
    assert mixing.temperature == (1 if name == "uniform" else 0)
    assert discrete(other) == other


def test_discrete_runs_with_the_same_parameters():
    config = config_of(MIXINGS["learnt"])
    params = init_params(config.model, jax.random.key(0, impl="rbg"))
    cold = dataclasses.replace(MIXINGS["default"], temperature=1e-30)
    np.testing.assert_allclose(run(discrete(config), params), run(config_of(cold), params), rtol=1e-5, atol=1e-6)
    assert (run(discrete(config), params) != run(config, params)).any()


def test_another_group_size_keeps_experts_and_parameters():
    config = config_of(MixingConfig())
    params = init_params(config.model, jax.random.key(0, impl="rbg"))
    for size in (2, 8, 3):
        other = regrouped(config, size)
        assert other.model.feed_forward.hidden_dim(16) == 8 and other.group_size == size
        assert other.training.batch_size % size == 0
    # In groups of 2, what the other half of a group of 4 says is not heard.
    small = regrouped(config, 2)
    tokens = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.int32)
    model, changed = bind(small.model, params), tokens.copy()
    changed[2:4] = 7
    before, after = model(tokens).hidden, model(changed).hidden
    np.testing.assert_array_equal(before[:2], after[:2])
    assert (run(config, params)[:2] != before[:2]).any()


def test_a_dense_model_has_no_modes():
    dense = Config(model=ModelConfig(feed_forward=DenseConfig()))
    others = [mode.change for name, mode in MODES.items() if name != "grouped"]
    for mode in (*others, lambda config: regrouped(config, 8)):
        with pytest.raises(ConfigError, match="mix nothing"):
            mode(dense)
    assert MODES["grouped"].change(dense) == dense and default_mode(dense)[0] == "grouped"


def test_rows_that_hear_no_others_need_no_companions():
    """Groups of one, and within rows."""
    within = config_of(MixingConfig(groups="within"))
    model = dataclasses.replace(within.model, objective="masked")
    for config in (regrouped(config_of(MixingConfig()), 1), dataclasses.replace(within, model=model)):
        for mode in ("companions", "sparse", "mean_field"):
            assert "no row hears another anyway; try --mode grouped" in lacking(mode, config, None)
        assert lacking("without", config, None) is None and default_mode(config)[0] == "grouped"
    assert default_mode(config_of(MixingConfig()))[0] == "companions"


def test_rows_with_companions_stay_in_the_order_of_their_groups():
    """So that every mode is scored on the same windows; E 8, G 4: two experts a token."""
    config = config_of(MixingConfig())
    assert config.group_size == 4
    for mode, positions, k in (("companions", 8, None), ("sparse", 8, 2), ("mean_field", 1, 2)):
        changed = MODES[mode].change(config)
        kind = changed.model.feed_forward
        assert (changed.group_size, changed.model.group_size) == (4, 1) and kind.hidden_dim(16) == 8
        assert (kind.num_positions, kind.experts_per_token) == (positions, k)


def test_an_unknown_mode_is_one_line():
    with pytest.raises(ConfigError, match="mode = 'companion': no such mode; did you mean 'companions'"):
        enter("companion", config_of(MixingConfig()), {}, 0)


@pytest.mark.parametrize("mixing", [MixingConfig(), MixingConfig(layer_norm=True)])
def test_without_experts_nothing_is_heard(mixing):
    config = config_of(mixing)
    params = init_params(config.model, jax.random.key(0, impl="rbg"))
    params = {name: value + 0.1 for name, value in params.items()}
    changed, silent = enter("without", config, params, 0)
    layer = bind(changed.model, silent).stacks[0][0].feed_forward
    layer = nnx.merge(nnx.graphdef(layer), jax.tree.map(lambda a: a[0], nnx.state(layer)))
    assert not np.asarray(layer(np.ones((4, 8, 8), np.float32)).y).any()
