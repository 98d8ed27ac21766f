"""The table of inference modes: each one's config, parameters, default, and errors."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from mot_jax.config import (
    CompanionsConfig,
    Config,
    DenseConfig,
    ExpertChoiceConfig,
    HashConfig,
    LossWeights,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    ReluRoutingConfig,
    TokenChoiceConfig,
    TrainingConfig,
    check,
)
from mot_jax.errors import UserError
from mot_jax.modes.registry import (
    MODES,
    default_mode,
    discrete,
    enter,
    grouped,
    lacking,
    mode_of,
    regrouped,
    token_choice,
)
from mot_jax.nn.feed_forward import make_feed_forward
from mot_jax.nn.transformer import bind, init_params

MIXINGS = {
    "default": MixingConfig(),
    "uniform": MixingConfig("uniform"),
    "no softmax": MixingConfig("logits", layer_norm=True),
    "separate": MixingConfig(emit="softmax", controllers="separate", temperature=0.5),
    "over experts": MixingConfig(emit="softmax_over_experts", annealing="cosine"),
    "learned": MixingConfig(emit="softmax", learned_temperature="per_expert", separate_temperatures=True),
    "straight through": MixingConfig(straight_through=True, temperature=0.1),
    "ones": MixingConfig(emit="ones"),
    "top token": MixingConfig(emit="top_token"),
}


def config_of(mixing: MixingConfig) -> Config:
    kind = MixtureOfTokensConfig(group_size=4, num_experts=8, mixing=mixing)
    model = ModelConfig(2, 8, 16, 2, context_length=8, loss_chunk=8, feed_forward=kind)
    return Config(model=model, training=TrainingConfig(batch_size=8, gradient_accumulation_steps=2))


def hidden_states(config: Config, params: dict) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.int32)
    return np.asarray(bind(config.model, params)(tokens).hidden)


@pytest.mark.parametrize("name", MIXINGS)
def test_discrete_is_the_limit_of_low_temperature(name):
    """The config is valid, and its temperature is 0 if merge has a softmax."""
    config = config_of(MIXINGS[name])
    other = discrete(config)
    check(other)
    mixing = other.model.feed_forward.mixing
    assert mixing.merge == ("uniform" if name == "uniform" else "softmax")
    assert mixing.temperature == (1 if name == "uniform" else 0)
    assert discrete(other) == other


@pytest.mark.slow
def test_discrete_runs_with_the_same_parameters():
    config = config_of(MIXINGS["learned"])
    params = init_params(config.model, jax.random.key(0, impl="rbg"))
    cold = dataclasses.replace(MIXINGS["default"], temperature=1e-30)
    np.testing.assert_allclose(
        hidden_states(discrete(config), params), hidden_states(config_of(cold), params), rtol=1e-5, atol=1e-6
    )
    assert (hidden_states(discrete(config), params) != hidden_states(config, params)).any()


@pytest.mark.slow
def test_another_group_size_keeps_experts_and_parameters():
    config = config_of(MixingConfig())
    params = init_params(config.model, jax.random.key(0, impl="rbg"))
    for size in (2, 8, 3):
        other = regrouped(config, size)
        assert other.model.feed_forward.hidden_dim(16) == 8 and other.group_size == size
        assert other.training.batch_size % size == 0
    # In groups of 2, the other half of a group of 4 has no influence.
    small = regrouped(config, 2)
    tokens = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.int32)
    model, changed = bind(small.model, params), tokens.copy()
    changed[2:4] = 7
    before, after = model(tokens).hidden, model(changed).hidden
    np.testing.assert_array_equal(before[:2], after[:2])
    assert (hidden_states(config, params)[:2] != before[:2]).any()


@pytest.mark.parametrize(
    "kind", [DenseConfig(), ExpertChoiceConfig(), ReluRoutingConfig(), HashConfig()], ids=lambda kind: kind.kind
)
def test_kinds_with_no_mode_but_grouped(kind):
    config = Config(model=ModelConfig(feed_forward=kind))
    others = [mode.change for name, mode in MODES.items() if name != "grouped"]
    for mode in (*others, lambda config: regrouped(config, 8)):
        with pytest.raises(UserError, match=r"is for mixture_of_tokens"):
            mode(config)
    mode, reason = default_mode(config)
    assert MODES["grouped"].change(config) == config and mode == "grouped"
    assert ("no sequence of a batch depends" in reason) == (kind.mixed_sequences == 1)


def test_models_that_do_not_mix_sequences_need_no_companions():
    """Groups of one, and groups within sequences."""
    within = config_of(MixingConfig(groups="within"))
    model = dataclasses.replace(within.model, objective="masked")
    for config in (regrouped(config_of(MixingConfig()), 1), dataclasses.replace(within, model=model)):
        for mode in ("companions", "sparse", "mean_field"):
            assert "the model does not mix sequences; try --mode grouped" in lacking(mode, config, None)
        assert lacking("without", config, None) is None and default_mode(config)[0] == "grouped"
    assert default_mode(config_of(MixingConfig()))[0] == "companions"


def test_modes_with_companions_keep_the_order_of_windows():
    """So that every mode is scored on the same windows. E = 8, G = 4: two experts a token."""
    config = config_of(MixingConfig())
    assert config.group_size == 4
    for mode, positions, k in (("companions", 8, None), ("sparse", 8, 2), ("mean_field", 1, 2)):
        changed = MODES[mode].change(config)
        kind = changed.model.feed_forward
        assert (changed.group_size, changed.model.group_size) == (4, 1) and kind.hidden_dim(16) == 8
        assert (kind.num_positions, kind.experts_per_token) == (positions, k)


def test_sparse_modes_are_refused_for_normed_expert_outputs():
    config = config_of(MixingConfig(layer_norm=True))
    for mode in ("sparse", "mean_field"):
        assert lacking(mode, config, None).endswith("mixing.layer_norm = False; try --mode companions")
    with pytest.raises(UserError, match=r"experts_per_token = 2: .* try None"):
        kind = CompanionsConfig(4, 8, mixing=MixingConfig(layer_norm=True), experts_per_token=2)
        make_feed_forward(config.model, kind, nnx.Rngs(0))


def test_an_unknown_mode_is_an_error_of_one_line():
    with pytest.raises(UserError, match="mode = 'companion': no such mode; did you mean 'companions'"):
        enter("companion", config_of(MixingConfig()), {}, 0)


def test_a_mode_may_name_the_number_of_experts_a_token_chooses():
    config, name = config_of(MixingConfig()), "experts_per_token"
    assert mode_of("token_choice:3").change(config) == token_choice(config, 3) != token_choice(config)
    for mode in ("sparse", "mean_field"):
        changed = [mode_of(f"{mode}{k}").change(config).model.feed_forward for k in ("", ":3")]
        assert changed[1] == dataclasses.replace(changed[0], **{name: 3}) and getattr(changed[0], name) == 2
    assert enter("token_choice:1", config, {}, 0)[0].model.feed_forward.top_k == 1


@pytest.mark.parametrize(
    "mode, words",
    [
        ("companions:2", "must be 'companions', where tokens choose no experts; try 'token_choice:2'"),
        ("token_choice:", "must end in the number of experts that a token chooses; try 'token_choice:2'"),
        ("token_choice:0", "must end in the number of experts that a token chooses"),
        ("token_choice:9", "top_k = 9: must be at most model.feed_forward.num_experts = 8"),
        ("sparse:9", "--mode sparse:9: must be at most model.feed_forward.num_experts = 8; try --mode sparse"),
    ],
)
def test_a_wrong_number_of_experts_is_an_error_of_one_line(mode, words):
    with pytest.raises(UserError, match=re.escape(words)):
        mode_of(mode).change(config_of(MixingConfig()))


@pytest.mark.parametrize("trained, chosen, other", [(2, 1, 3), (1, 2, 1)])
def test_sigmoid_scores_are_normalized_as_in_training(trained, chosen, other):
    """Weights of several experts are divided by their sum; that of one is not."""
    model = config_of(MixingConfig()).model
    model = dataclasses.replace(model, feed_forward=TokenChoiceConfig(8, top_k=trained, scores="sigmoid"))
    config = Config(model=model)
    assert mode_of(f"token_choice:{other}").change(config).model.feed_forward.top_k == other
    with pytest.raises(UserError, match=rf":{chosen}: weights .* was {trained} in training; try token_choice"):
        mode_of(f"token_choice:{chosen}").change(config)


@pytest.mark.parametrize("mixing", [MixingConfig(), MixingConfig(layer_norm=True)])
def test_without_zeroes_the_output_of_the_experts(mixing):
    config = config_of(mixing)
    params = init_params(config.model, jax.random.key(0, impl="rbg"))
    params = {name: value + 0.1 for name, value in params.items()}
    changed, zeroed = enter("without", config, params, 0)
    layer = bind(changed.model, zeroed).stacks[0][0].feed_forward
    layer = nnx.merge(nnx.graphdef(layer), jax.tree.map(lambda a: a[0], nnx.state(layer)))
    assert not np.asarray(layer(np.ones((4, 8, 8), np.float32)).y).any()


def test_token_choice_keeps_sequences_independent():
    """Bit for bit, unlike `grouped` and `discrete`, with the same weights; and its config converts back."""
    config = config_of(MixingConfig())
    routed = token_choice(config)
    kind = routed.model.feed_forward
    assert (kind.top_k, kind.hidden_dim(16), kind.capacity_factor) == (2, 8, None)
    params, rng = init_params(config.model, jax.random.key(0, impl="rbg")), np.random.default_rng(0)
    params = {name: value * (10 if "controller" in name else 1) for name, value in params.items()}
    tokens = rng.integers(0, 256, (8, 8)).astype(np.int32)
    depends = {}
    for mode in (grouped, discrete, token_choice):
        model = bind(mode(config).model, params)
        forward = jax.jit(lambda tokens, model=model: model(tokens).hidden)
        drawn = (np.concatenate([rng.integers(0, 256, (7, 8)), tokens[7:]]).astype(np.int32) for _ in range(20))
        expected = forward(tokens)[7]
        depends[mode.__name__] = any((forward(other)[7] != expected).any() for other in drawn)
    assert depends == {"grouped": True, "discrete": True, "token_choice": False}
    assert grouped(routed).model == config.model and discrete(routed).model == discrete(config).model
    assert regrouped(routed, 2) == regrouped(config, 2)


def test_token_choice_of_itself_only_loses_its_capacity():
    kind = TokenChoiceConfig(8, top_k=2, routing_group_tokens=16)
    losses = LossWeights(load_balancing=0.1)
    model = ModelConfig(2, 8, 16, 2, context_length=8, loss_chunk=8, feed_forward=kind)
    config = Config(model=model, training=TrainingConfig(batch_size=8, losses=losses))
    changed = token_choice(config).model.feed_forward
    assert changed == dataclasses.replace(kind, capacity_factor=None, routing_group_tokens=8, expert_dim=8)
    assert token_choice(config, experts=1).model.feed_forward == dataclasses.replace(changed, top_k=1)
    for mode in (grouped, discrete):
        with pytest.raises(UserError, match="is for mixture_of_tokens, and the model has token_choice layers"):
            mode(config)


@pytest.mark.parametrize(
    "mixing",
    [
        MixingConfig("uniform"),
        MixingConfig("logits", layer_norm=True),
        MixingConfig(emit="softmax", controllers="common_base"),
        MixingConfig(layer_norm=True),
        MixingConfig(learned_temperature="per_expert"),
    ],
    ids=repr,
)
def test_controllers_that_cannot_be_routers_are_refused(mixing):
    with pytest.raises(UserError) as error:
        token_choice(config_of(mixing))
    assert all(fault.startswith("--mode token_choice: has no meaning with ") for fault in error.value.faults)
    for valid in (MixingConfig(temperature=0.5), MixingConfig(emit="ones"), MixingConfig(annealing="linear")):
        check(token_choice(config_of(valid)))


def test_without_a_tpu_the_layers_kernel_is_replaced_by_xla(monkeypatch):
    kind = MixtureOfTokensConfig(4, 8, kernel="fused_mixture", save_for_backward="nothing")
    config = Config(model=ModelConfig(1, 16, 32, 2, context_length=16, loss_chunk=16, feed_forward=kind))
    changed, _ = enter("grouped", config, {}, 0)
    assert changed.model.feed_forward == dataclasses.replace(kind, kernel="xla")
    device = SimpleNamespace(platform="tpu", device_kind="TPU v5")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert enter("grouped", config, {}, 0)[0] == config
