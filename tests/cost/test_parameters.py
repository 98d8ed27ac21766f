"""Numbers of parameters against the paper's and against the model's arrays."""

import dataclasses
import math

import jax
import pytest
from paper_models import BASE, CHOICES, MEDIUM, V1, with_kind

from mot_jax.config import Config, MixingConfig, MixtureOfTokensConfig
from mot_jax.cost.flops import forward_flops
from mot_jax.cost.memory import memory_bytes
from mot_jax.cost.parameters import active_parameters, count_parameters
from mot_jax.nn.transformer import init_params


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        (with_kind(MEDIUM), 77),
        (with_kind(MEDIUM, 8, 8), 136),
        (with_kind(MEDIUM, 32, 32), 337),
        (with_kind(MEDIUM, 32, 256), 338),
        (with_kind(MEDIUM, 32, 512), 338),
        (with_kind(MEDIUM, 32, 1024), 339),
        (with_kind(MEDIUM, 128, 128), 1140),
        (with_kind(BASE), 162),
        (with_kind(BASE, 32, 32), 1040),
        (with_kind(BASE, 64, 1024), 1950),
        # All blocks of version 1 are mixtures: head and embeddings, attention, experts of width 64 and controllers.
        (with_kind(V1, 32, 512), 0.256 * (2 * 50.257 + 0.256 + 4 * (4 * 0.256 + 2 * 0.512 * 64 + 0.512))),
    ],
)
def test_parameters_match_the_paper(model, millions):
    assert sum(count_parameters(model).values()) == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize(
    "model",
    [
        with_kind(V1),
        with_kind(V1, 8, 32, shared_expert_dim=256),
        dataclasses.replace(with_kind(V1, 8, 32), moe_blocks="every_other", final_norm=True),
    ],
)
def test_every_parameter_belongs_to_one_part(model):
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    parts = count_parameters(model)
    assert sum(parts.values()) == sum(math.prod(shape.shape) for shape in shapes.values())
    assert parts["embeddings"] == (model.vocab_size + model.context_length) * model.d_model
    assert parts["attention"] == model.num_blocks * 4 * model.d_model**2
    assert parts["norms"] == (2 * model.num_blocks + model.final_norm) * 2 * model.d_model
    blocks = [kind for kind in model.block_kinds() if isinstance(kind, MixtureOfTokensConfig)]
    for kind in blocks[:1]:
        per_block = model.d_model * kind.num_experts
        assert parts["controllers"] == len(blocks) * per_block
        assert parts["experts"] == len(blocks) * per_block * 2 * kind.hidden_dim(model.d_ff)
        assert parts.get("shared experts", 0) == len(blocks) * 2 * model.d_model * kind.shared_expert_dim


def test_parameters_of_a_mixing_variant():
    """Three controllers, two base weights, two learned temperatures per expert, two layer norms."""
    mixing = MixingConfig(
        emit="softmax",
        controllers="common_base",
        base_weight="two",
        layer_norm=True,
        learned_temperature="per_expert",
        separate_temperatures=True,
    )
    plain, variant = with_kind(V1, 32, 64), with_kind(V1, 32, 64, mixing=mixing)
    plain_parts, variant_parts = count_parameters(plain), count_parameters(variant)
    shapes = jax.eval_shape(lambda: init_params(variant, jax.random.key(0)))
    assert sum(variant_parts.values()) == sum(math.prod(shape.shape) for shape in shapes.values())
    assert variant_parts["controllers"] == 3 * plain_parts["controllers"] + 4 * (2 + 2 * 64)
    assert variant_parts["norms"] == plain_parts["norms"] + 4 * 4 * 256
    plain_mixing, variant_mixing = (forward_flops(model)["mixing"] for model in (plain, variant))
    assert variant_mixing == plain_mixing * 4 / 3  # one more controller


def test_parameters_and_memory_without_the_biases_of_dense_blocks():
    model = dataclasses.replace(with_kind(V1, 8, 32), moe_blocks=(1, 3))
    without_bias = dataclasses.replace(model, dense_bias=False)
    before, after = count_parameters(model), count_parameters(without_bias)
    assert before == after | {"dense FFN": after["dense FFN"] + 2 * (1024 + 256)}
    assert forward_flops(without_bias) == forward_flops(model)
    memory = [memory_bytes(Config(m))["parameters"] for m in (model, without_bias)]
    assert memory[0] - memory[1] == 4 * 2 * (1024 + 256)


def test_parameters_with_every_choice_beyond_the_paper():
    """By part. The token embedding is active if it is the head as well."""
    d, f, v = 256, 1024, 50257
    model = dataclasses.replace(with_kind(V1), **CHOICES)
    parts = count_parameters(model)
    attention, dense = 4 * (2 * d * d + 2 * d * d // 4), 4 * (3 * d * f + 2 * f + d)
    assert parts == {"embeddings": v * d, "attention": attention, "norms": 9 * d, "dense FFN": dense}
    assert active_parameters(model) == sum(parts.values())
    untied = dataclasses.replace(model, tie_embeddings=False)
    assert active_parameters(untied) == active_parameters(model)
