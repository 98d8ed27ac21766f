"""The numbers of `accounting` against the paper's, against the arrays, and against what the compiler says."""

import dataclasses
import functools
import json
import math

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from mot_jax.config import (
    Config,
    DenseConfig,
    MixingConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    TokenChoiceConfig,
    TrainingConfig,
)
from mot_jax.cost import accounting
from mot_jax.nn.kernels.fused_attention import splash
from mot_jax.nn.transformer import bind, init_params

POLICIES = ("nothing", "pre_activations", "all")

# PAPER.md section 5.
MEDIUM = ModelConfig(
    num_blocks=8, d_model=512, d_ff=2048, num_heads=8, vocab_size=50257, context_length=256, moe_blocks="last_half"
)
BASE = dataclasses.replace(MEDIUM, num_blocks=12, d_model=768, d_ff=3072, num_heads=12)
V1 = ModelConfig(num_blocks=4, d_model=256, d_ff=1024, num_heads=4, vocab_size=50257, context_length=256)


# All that is not the paper's.
CHOICES = {"num_kv_heads": 1, "positions": "rotary", "document_mask": True, "norm": "rms", "final_norm": True}
CHOICES |= {"activation": "silu", "gated": True, "tie_embeddings": True}


def with_kind(model, group_size=None, num_experts=None, **fields):
    """`model` with a mixture, or dense."""
    kind = MixtureOfTokensConfig(group_size, num_experts, **fields) if group_size else DenseConfig()
    return dataclasses.replace(model, feed_forward=kind)


# --- parameters -------------------------------------------------------------------------------------------------------


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
        # Version 1's blocks are all mixtures: head and embeddings, attention, experts of width 64 and controllers.
        (with_kind(V1, 32, 512), 0.256 * (2 * 50.257 + 0.256 + 4 * (4 * 0.256 + 2 * 0.512 * 64 + 0.512))),
    ],
)
def test_parameters_are_the_papers(model, millions):
    assert sum(accounting.count_parameters(model).values()) == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize(
    "model",
    [
        with_kind(V1),
        with_kind(V1, 8, 32, shared_expert_dim=256),
        dataclasses.replace(with_kind(V1, 8, 32), moe_blocks="every_other", final_norm=True),
    ],
)
def test_every_parameter_has_one_part(model):
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    parts = accounting.count_parameters(model)
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


def test_token_choice_in_numbers():
    """Four of 128 experts: the sizes of a MoT of granularity 4, in FLOPs the router alone in place of mixing."""
    mot = with_kind(V1, 32, 128, shared_expert_dim=256)
    model = dataclasses.replace(mot, feed_forward=TokenChoiceConfig(128, top_k=4, shared_expert_dim=256))
    assert accounting.count_parameters(model) == accounting.count_parameters(mot)
    assert accounting.active_parameters(model) == accounting.active_parameters(mot)
    mixed, routed = accounting.forward_flops(mot), accounting.forward_flops(model)
    assert routed.pop("router") == mixed.pop("mixing") / 3 and routed == mixed
    lines = "\n".join(accounting.describe(Config(model=model, training=TrainingConfig(batch_size=8))).lines())
    assert "choices k" in lines and "capacity C" in lines and "router" in lines
    dropless = dataclasses.replace(model.feed_forward, capacity_factor=None)
    again = accounting.recomputed_flops(dataclasses.replace(model, feed_forward=dropless))
    assert accounting.recomputed_flops(model) == 0 and again == routed["experts"] / 2


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
    plain, model = with_kind(V1, 32, 64), with_kind(V1, 32, 64, mixing=mixing)
    before, after = accounting.count_parameters(plain), accounting.count_parameters(model)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    assert sum(after.values()) == sum(math.prod(shape.shape) for shape in shapes.values())
    assert after["controllers"] == 3 * before["controllers"] + 4 * (2 + 2 * 64)
    assert after["norms"] == before["norms"] + 4 * 4 * 256
    flops = [accounting.forward_flops(m)["mixing"] for m in (plain, model)]
    assert flops[1] == flops[0] * 4 / 3  # a controller more


def test_parameters_and_memory_without_the_biases_of_dense_blocks():
    model = dataclasses.replace(with_kind(V1, 8, 32), moe_blocks=(1, 3))
    bare = dataclasses.replace(model, dense_bias=False)
    before, after = accounting.count_parameters(model), accounting.count_parameters(bare)
    assert before == after | {"dense FFN": after["dense FFN"] + 2 * (1024 + 256)}
    assert accounting.forward_flops(bare) == accounting.forward_flops(model)
    memory = [accounting.memory_bytes(Config(m))["parameters"] for m in (model, bare)]
    assert memory[0] - memory[1] == 4 * 2 * (1024 + 256)


def test_parameters_of_every_choice():
    """By part; a token pays for the embedding where that is the head."""
    d, f, v = 256, 1024, 50257
    model = dataclasses.replace(with_kind(V1), **CHOICES)
    parts = accounting.count_parameters(model)
    attention, dense = 4 * (2 * d * d + 2 * d * d // 4), 4 * (3 * d * f + 2 * f + d)
    assert parts == {"embeddings": v * d, "attention": attention, "norms": 9 * d, "dense FFN": dense}
    assert accounting.active_parameters(model) == sum(parts.values())
    untied = dataclasses.replace(model, tie_embeddings=False)
    assert accounting.active_parameters(untied) == accounting.active_parameters(model)


@pytest.mark.parametrize(("group_size", "num_experts"), [(4, 4), (4, 32), (32, 8), (32, 512)])
def test_flop_matched_experts_cost_what_the_dense_layer_costs(group_size, num_experts):
    dense, mixture = with_kind(V1), with_kind(V1, group_size, num_experts)
    dense_flops, mixture_flops = accounting.forward_flops(dense), accounting.forward_flops(mixture)
    assert mixture_flops["experts"] == dense_flops["dense FFN"]
    extra = accounting.flops_per_token(Config(mixture)) - accounting.flops_per_token(Config(dense))
    assert extra == 3 * mixture_flops["mixing"]
    # A token pays for as many parameters too, apart from the controllers and the dense layer's biases.
    biases, controllers = V1.num_blocks * (V1.d_ff + V1.d_model), V1.num_blocks * V1.d_model * num_experts
    assert accounting.active_parameters(mixture) - controllers == accounting.active_parameters(dense) - biases


@pytest.mark.parametrize(
    ("model", "share"),
    [(with_kind(MEDIUM, 32, 32), 0.02), (with_kind(MEDIUM, 32, 512), 0.38), (with_kind(V1, 32, 512), 0.75)],
)
def test_mixing_share_is_the_papers(model, share):
    description = accounting.describe(Config(model, training=TrainingConfig(batch_size=32)))
    assert round(description.mixing_share, 2) == share


# --- against the compiler ---------------------------------------------------------------------------------------------

# Matrix products dominate; the rest, which the compiler counts and we do not, is below 2 % of the FLOPs.
ROWS, PROBE = 8, ModelConfig(d_model=256, d_ff=1024, num_heads=4, context_length=64, vocab_size=256)
PROBE_MIXTURE = {"group_size": 4, "num_experts": 16, "shared_expert_dim": 256}


def loss_of(model, params, tokens, targets, mask):
    bound = bind(model, params)
    return bound.loss_sum(bound(tokens, segments=jnp.zeros_like(tokens)).hidden, targets, mask).loss


def inputs_of(model, rows):
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((rows, model.context_length), jnp.int32)
    return params, tokens, tokens, jax.ShapeDtypeStruct(tokens.shape, jnp.bool)


@functools.cache
def compiled(model, backward):
    """(FLOPs per token, bytes of temporaries) by the compiler, which counts the body of a scan once."""
    loss = functools.partial(loss_of, model)
    lowered = jax.jit(jax.grad(loss) if backward else loss).lower(*inputs_of(model, ROWS))
    program = lowered.compile({"xla_backend_optimization_level": 0})  # of machine code, which does not run
    flops = program.cost_analysis()["flops"] / (ROWS * model.context_length)
    return flops, program.memory_analysis().temp_size_in_bytes


def probe(num_blocks, save_for_backward=None, **fields):
    model = dataclasses.replace(PROBE, num_blocks=num_blocks, **fields)
    return (
        with_kind(model, **PROBE_MIXTURE, save_for_backward=save_for_backward)
        if save_for_backward
        else with_kind(model)
    )


@pytest.mark.parametrize(("save_for_backward", "choices"), [(None, {}), ("all", {}), (None, CHOICES)])
def test_forward_flops_are_the_compilers(save_for_backward, choices):
    model = probe(1, save_for_backward, **choices)
    expected = sum(accounting.forward_flops(model).values())
    assert compiled(model, backward=False)[0] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("save_for_backward", [None, *POLICIES])
def test_training_flops_are_the_compilers(save_for_backward):
    """In a stack of several: in a stack of one the compiler merges what is computed twice."""
    model, one = probe(5, save_for_backward), probe(1, save_for_backward)
    expected = accounting.flops_per_token(Config(one)) + accounting.recomputed_flops(one)
    assert compiled(model, backward=True)[0] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("save_for_backward", POLICIES[:2])
def test_recomputed_flops_are_the_compilers(save_for_backward):
    more = compiled(probe(5, save_for_backward), backward=True)[0] - compiled(probe(5, "all"), backward=True)[0]
    assert more == pytest.approx(accounting.recomputed_flops(probe(1, save_for_backward)), rel=0.02)


@pytest.mark.parametrize(
    ("save_for_backward", "remat"), [(None, "blocks"), ("pre_activations", "blocks"), (None, "attention")]
)
def test_rematerialised_flops_are_the_compilers(save_for_backward, remat):
    base = compiled(probe(5, save_for_backward and "all"), backward=True)[0]
    more = compiled(probe(5, save_for_backward, remat=remat), backward=True)[0] - base
    # The compiler also counts the exponentials of the scores, which matter beside a single product.
    share = 0.05 if remat == "attention" else 0.02
    assert more == pytest.approx(accounting.recomputed_flops(probe(1, save_for_backward, remat=remat)), rel=share)


def test_what_splash_makes_again_is_what_its_kernels_hold():
    def products(jaxpr, inside=False):
        here = sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns) if inside else 0
        for equation in jaxpr.eqns:
            for part in jax.extend.core.jaxprs_in_params(equation.params):
                here += products(part, inside or equation.primitive.name == "pallas_call")
        return here

    def attend(query, key, value):
        return splash(query, key, value, None, causal=True, interpret=True).sum()

    x = jax.ShapeDtypeStruct((1, 128, 1, 64), "float32")
    made = products(jax.make_jaxpr(jax.grad(attend, argnums=(0, 1, 2)))(x, x, x).jaxpr)
    again = made - 3 * 2  # forward, two for each gradient
    model = dataclasses.replace(PROBE, num_blocks=3, context_length=128)
    for remat in ("none", "blocks"):
        xla = dataclasses.replace(model, remat=remat)
        more = accounting.recomputed_flops(dataclasses.replace(xla, attention_kernel="splash"))
        assert more - accounting.recomputed_flops(xla) == 3 * again * 2 * 128 * 256


@pytest.mark.parametrize(
    ("save_for_backward", "remat"), [("pre_activations", r) for r in ("none", "attention", "blocks")]
)
def test_kept_bytes_are_the_compilers(save_for_backward, remat):
    """Four more blocks need the temporaries that four blocks keep, to a part in a thousand, in the compiled program.

    In float32: on CPU the compiler holds bfloat16 as float32.
    """
    few, many = probe(5, save_for_backward, remat=remat), probe(9, save_for_backward, remat=remat)
    expected = sum(accounting.kept_bytes(many, ROWS).values()) - sum(accounting.kept_bytes(few, ROWS).values())
    assert compiled(many, backward=True)[1] - compiled(few, backward=True)[1] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "model",
    [
        with_kind(PROBE),
        with_kind(PROBE, **PROBE_MIXTURE),
        dataclasses.replace(with_kind(PROBE, 4, 64, save_for_backward="all"), moe_blocks="last_half", final_norm=True),
        dataclasses.replace(with_kind(PROBE, 4, 64, save_for_backward="nothing"), moe_blocks="every_other"),
        dataclasses.replace(with_kind(PROBE), **CHOICES),
        dataclasses.replace(with_kind(PROBE, **PROBE_MIXTURE), objective="masked"),
    ],
)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_kept_bytes_are_the_residuals(model, dtype):
    """Of the whole model's derivative. It also keeps masks and zeros, once a stack: below 2 % in stacks this deep."""
    model, rows = dataclasses.replace(model, num_blocks=64, dtype=dtype), 12

    def pull(params, *rest):
        return jax.vjp(lambda params: loss_of(model, params, *rest), params)[1]

    inputs = inputs_of(model, rows)
    parameters = {(a.shape, a.dtype) for a in inputs[0].values()}
    leaves = jax.tree.leaves(jax.eval_shape(pull, *inputs))
    # A residual that is a parameter is no array of its own; the loss's gradient by the head looks like one, but is.
    real = sum(a.size * a.dtype.itemsize for a in leaves if (a.shape, a.dtype) not in parameters)
    if dtype == "float32":
        real += model.d_model * model.vocab_size * 4
    kept = sum(accounting.kept_bytes(model, rows).values())
    assert kept <= real <= 1.02 * kept


def test_what_each_policy_adds_to_the_mixture():
    """float32: pre-activations are E/G F numbers per token, mixtures and expert outputs E/G D each."""
    nothing, pre, everything = (accounting.kept_bytes(probe(3, s), ROWS)["mixture_of_tokens"] for s in POLICIES)
    kind, mixtures = probe(3, "all").feed_forward, 3 * ROWS * PROBE.context_length * 16 // 4
    assert pre - nothing == mixtures * kind.hidden_dim(PROBE.d_ff) * 4
    assert everything - pre == mixtures * 2 * PROBE.d_model * 4


def test_no_copy_of_a_matrix_is_kept_in_another_dtype():
    """They are cast, and gathered, where they are used, forward and backward."""
    model = with_kind(dataclasses.replace(V1, dtype="bfloat16"), 8, 16)
    copies = accounting.kept_bytes(model, 8)["copies of parameters"]
    assert copies < 0.01 * accounting.count_parameters(model)["attention"]


def test_kept_bytes_know_no_mesh(mesh_of):
    model = dataclasses.replace(with_kind(PROBE, 4, 12), d_ff=768)
    mesh = mesh_of(data=8)
    with jax.set_mesh(mesh):
        inside = accounting.describe(Config(model))
    accounting._trace_kept.cache_clear()
    assert inside == accounting.describe(Config(model))


# --- the whole --------------------------------------------------------------------------------------------------------

EXAMPLE = Config(
    dataclasses.replace(with_kind(MEDIUM, 32, 256), dtype="bfloat16"),
    training=TrainingConfig(steps=1000, batch_size=256, gradient_accumulation_steps=2),
)


def test_memory():
    memory = accounting.memory_bytes(EXAMPLE)
    assert memory["parameters"] == memory["gradients"] == memory["accumulated gradients"] == 4 * 337_357_824
    whole = dataclasses.replace(EXAMPLE, training=dataclasses.replace(EXAMPLE.training, gradient_accumulation_steps=1))
    assert "accumulated gradients" not in accounting.memory_bytes(whole)
    rows = {
        c.training.gradient_accumulation_steps: accounting.memory_bytes(c)["kept for backward"]
        for c in (EXAMPLE, whole)
    }
    assert 1.8 < rows[1] / rows[2] < 2


@pytest.mark.parametrize(
    ("optimizer", "per_parameter"),
    [
        (OptimizerConfig(), 8),
        (OptimizerConfig(mu_dtype="bfloat16"), 6),
        (OptimizerConfig("muon"), 4 + 4 * 51.5 / 337.4),  # a second moment of embeddings, head, norms and biases
        (OptimizerConfig("adafactor"), 4 + 4 * 10.1 / 337.4),  # attention's, rows and columns of the rest
        (OptimizerConfig("adafactor", beta1=0), 4 * 10.1 / 337.4),
    ],
)
def test_optimizer_state(optimizer, per_parameter):
    config = dataclasses.replace(EXAMPLE, training=TrainingConfig(batch_size=256, optimizer=optimizer))
    memory = accounting.memory_bytes(config)
    assert memory["optimizer state"] == pytest.approx(per_parameter * 337_357_824, rel=0.01)


def test_describe():
    description = accounting.describe(EXAMPLE)
    data = json.loads(json.dumps(description.to_dict()))
    assert data["sizes"] == {
        "dense_blocks": 4,
        "mixture_of_tokens_blocks": 4,
        "group_size_G": 32,
        "experts_E": 256,
        "expert_dim_F": 256,
        "expert_dim_rule": "E F = G (d_ff - shared_expert_dim) = 65,536",
        "granularity_E/G": 8,
        "groups_per_batch": 8,
        "groups_per_microbatch": 4,
        "windows_per_step": 256,
        "tokens_per_step": 65_536,
        "steps": 1000,
        "windows_per_run": 256_000,
        "tokens_per_run": 65_536_000,
    }
    assert data["total_parameters"] == 337_357_824
    assert data["training_flops"] == 65_536_000 * accounting.flops_per_token(EXAMPLE)
    assert data["policy"] == "save_for_backward: pre_activations"
    assert data["policies"][data["policy"]][1] == sum(data["kept"].values())
    again, kept = zip(*(data["policies"][f"save_for_backward: {s}"] for s in POLICIES), strict=True)
    assert again[0] > again[1] > again[2] == 0
    assert kept[0] < kept[1] < kept[2]
    lines = description.lines()
    assert max(map(len, lines)) <= 100
    assert "  total        337,357,824  100.0%" in lines
    assert "  mixing costs 18.8% of the experts' FLOPs" in lines
    assert any(line.startswith("  save_for_backward: pre_activations *") for line in lines)


@pytest.mark.parametrize("remat", ["none", "attention", "blocks"])
def test_describe_dense(remat):
    description = accounting.describe(Config(dataclasses.replace(with_kind(MEDIUM), remat=remat)))
    assert description.policy == f"remat: {remat}"
    assert set(description.policies) == {"remat: none", "remat: attention", "remat: blocks"}
    assert description.mixing_share == 0
    assert not any("group" in line or "expert" in line for line in description.lines())


def test_given_expert_dim_follows_no_rule():
    sizes = accounting.describe(Config(with_kind(PROBE, 8, 4, expert_dim=32))).sizes
    assert sizes["expert_dim_F"] == 32 and "expert_dim_rule" not in sizes
    assert sizes["granularity_E/G"] == 0.5


def test_peak_flops():
    assert accounting.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert accounting.peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 156e12
    assert accounting.peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert accounting.peak_flops("TPU v5", "bfloat16") == 459e12
    assert accounting.peak_flops("NVIDIA H200", "float64") is None
    assert accounting.peak_flops("TPU v4 lite", "bfloat16") is None
    assert accounting.peak_flops(jax.devices("cpu")[0], "float32") is None
    assert np.isclose(accounting.peak_flops("NVIDIA B200", "bfloat16"), 2250e12)
