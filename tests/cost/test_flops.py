"""FLOPs per token against the paper's rule and against the compiler's count."""

import dataclasses

import jax
import jax.extend.core
import pytest
from paper_models import BATCH, CHOICES, PROBE, ROUTED, SAVE_POLICIES, V1, compiled_cost, probe, routed, with_kind

from mot_jax.config import Config, ExpertChoiceConfig, HashConfig, ReluRoutingConfig, TokenChoiceConfig, TrainingConfig
from mot_jax.cost.describe import describe
from mot_jax.cost.feed_forward import feed_forward_cost
from mot_jax.cost.flops import flops_per_token, forward_flops, idle_flops, recomputed_flops
from mot_jax.cost.parameters import active_parameters, count_parameters
from mot_jax.nn.kernels.fused_attention import splash


def test_token_choice_costs_a_router_instead_of_mixing():
    """Four of 128 experts have the sizes of a mixture of granularity 4."""
    mot = with_kind(V1, 32, 128, shared_expert_dim=256)
    model = dataclasses.replace(mot, feed_forward=TokenChoiceConfig(128, top_k=4, shared_expert_dim=256))
    assert count_parameters(model) == count_parameters(mot)
    assert active_parameters(model) == active_parameters(mot)
    mot_flops, routed_flops = forward_flops(mot), forward_flops(model)
    assert routed_flops.pop("router") == mot_flops.pop("mixing") / 3 and routed_flops == mot_flops
    lines = "\n".join(describe(Config(model=model, training=TrainingConfig(batch_size=8))).lines())
    assert "choices k" in lines and "capacity C" in lines and "router" in lines
    dropless = dataclasses.replace(model.feed_forward, capacity_factor=None)
    recomputed = recomputed_flops(dataclasses.replace(model, feed_forward=dropless))
    assert recomputed_flops(model) == 0 and recomputed == routed_flops["experts"] / 2


@pytest.mark.parametrize(("group_size", "num_experts"), [(4, 4), (4, 32), (32, 8), (32, 512)])
def test_flop_matched_experts_cost_as_much_as_the_dense_layer(group_size, num_experts):
    dense, mixture = with_kind(V1), with_kind(V1, group_size, num_experts)
    dense_flops, mixture_flops = forward_flops(dense), forward_flops(mixture)
    assert mixture_flops["experts"] == dense_flops["dense FFN"]
    extra = flops_per_token(Config(mixture)) - flops_per_token(Config(dense))
    assert extra == 3 * mixture_flops["mixing"]
    # Active parameters are equal too, except for the controllers and the dense layer's biases.
    biases, controllers = V1.num_blocks * (V1.d_ff + V1.d_model), V1.num_blocks * V1.d_model * num_experts
    assert active_parameters(mixture) - controllers == active_parameters(dense) - biases


# --- against the compiler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("save_for_backward", "choices"), [(None, {}), ("all", {}), (None, CHOICES)])
def test_forward_flops_match_the_compiler(save_for_backward, choices):
    model = probe(1, save_for_backward, **choices)
    expected = sum(forward_flops(model).values())
    assert compiled_cost(model, backward=False)[0] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("save_for_backward", [None, *SAVE_POLICIES])
def test_training_flops_match_the_compiler(save_for_backward):
    """With several scanned blocks: in a single one the compiler merges a product with its recomputation."""
    model, one_block = probe(5, save_for_backward), probe(1, save_for_backward)
    expected = flops_per_token(Config(one_block)) + recomputed_flops(one_block)
    assert compiled_cost(model, backward=True)[0] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("save_for_backward", SAVE_POLICIES[:2])
def test_recomputed_flops_match_the_compiler(save_for_backward):
    flops = [compiled_cost(probe(5, policy), backward=True)[0] for policy in (save_for_backward, "all")]
    assert flops[0] - flops[1] == pytest.approx(recomputed_flops(probe(1, save_for_backward)), rel=0.02)


@pytest.mark.parametrize(
    ("save_for_backward", "remat"), [(None, "blocks"), ("pre_activations", "blocks"), (None, "attention")]
)
def test_rematerialized_flops_match_the_compiler(save_for_backward, remat):
    base = compiled_cost(probe(5, save_for_backward and "all"), backward=True)[0]
    difference = compiled_cost(probe(5, save_for_backward, remat=remat), backward=True)[0] - base
    # The compiler also counts the exponentials of the scores, which are noticeable next to a single product.
    tolerance = 0.05 if remat == "attention" else 0.02
    expected = recomputed_flops(probe(1, save_for_backward, remat=remat))
    assert difference == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name in ROUTED if name != "expert_threshold, unlimited"])
def test_executed_flops_of_every_kind_match_the_compiler(name, backward):
    """The kind that is left out has a loop over experts, which the compiler's count has once."""
    model = routed(name)
    idle = idle_flops(Config(model, training=TrainingConfig(batch_size=BATCH)))
    forward, recomputed = sum(forward_flops(model).values()) + idle, recomputed_flops(model)
    if recomputed:  # partly filled blocks are recomputed, too
        recomputed *= 1 + idle / forward_flops(model)["experts"]
    expected = 3 * forward + recomputed if backward else forward
    assert compiled_cost(model, backward)[0] == pytest.approx(expected, rel=0.01)


def test_flops_of_expert_choice_match_the_compiler():
    """With two products by one-hot matrices, forward and backward; nothing is recomputed."""
    kind = ExpertChoiceConfig(4, 16, top_k=8, shared_expert_dim=256)
    scanned, one = (dataclasses.replace(PROBE, num_blocks=n, feed_forward=kind) for n in (5, 1))
    assert recomputed_flops(one) == 0
    cost = feed_forward_cost(one, kind)
    only_executed = cost.executed_flops() - cost.flops()
    assert only_executed == 2 * 2 * one.d_model * 16 * 2  # D E C each
    expected = flops_per_token(Config(one)) + 3 * only_executed
    assert compiled_cost(scanned, backward=True)[0] == pytest.approx(expected, rel=0.02)
    mixture, choice = with_kind(PROBE, 2, 16, expert_dim=96, shared_expert_dim=256), one
    assert active_parameters(dataclasses.replace(mixture, num_blocks=1)) == active_parameters(choice)


def test_flops_of_experts_in_blocks_match_the_compiler():
    """1,024 choices in blocks of 64 rows: 16 + (1,024 - 16) // 64 = 31 blocks, 1.94 times the choices."""
    hashed, model = (
        dataclasses.replace(PROBE, num_blocks=1, feed_forward=kind)
        for kind in (
            HashConfig(16, top_k=2),
            TokenChoiceConfig(16, top_k=2, capacity_factor=None, routing_group_tokens=64),
        )
    )
    idle = forward_flops(model)["experts"] * (31 * 64 / 1024 - 1)
    for of_blocks in (hashed, model):
        assert idle_flops(Config(of_blocks, training=TrainingConfig(batch_size=BATCH))) == pytest.approx(idle)
    expected = sum(forward_flops(model).values()) + idle
    assert compiled_cost(model, backward=False)[0] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "executed", "recomputed"),
    [
        (TokenChoiceConfig(8, top_k=2, capacity_factor=2.0), 2, 1),
        (ReluRoutingConfig(8, top_k=2), 4, 1 / 2),  # all eight; the second product of a block ends it
    ],
)
def test_rematerialization_executes_empty_slots_and_gates_of_0_again(kind, executed, recomputed):
    model = dataclasses.replace(PROBE, num_blocks=1, feed_forward=kind, remat="blocks")
    flops = forward_flops(model)
    experts = flops.pop("experts")
    expected = sum(flops.values()) - flops["head"] + experts * executed * recomputed
    assert recomputed_flops(model) == pytest.approx(expected)


def test_flops_that_splash_recomputes_match_the_products_in_its_kernels():
    def count_products(jaxpr, in_kernel=False):
        count = sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns) if in_kernel else 0
        for equation in jaxpr.eqns:
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                count += count_products(inner, in_kernel or equation.primitive.name == "pallas_call")
        return count

    def attend(query, key, value):
        return splash(query, key, value, None, causal=True, interpret=True).sum()

    x = jax.ShapeDtypeStruct((1, 128, 1, 64), "float32")
    total = count_products(jax.make_jaxpr(jax.grad(attend, argnums=(0, 1, 2)))(x, x, x).jaxpr)
    recomputed = total - 3 * 2  # two products forward, and two gradients of each
    model = dataclasses.replace(PROBE, num_blocks=3, context_length=128)
    for remat in ("none", "blocks"):
        xla = dataclasses.replace(model, remat=remat)
        with_splash = recomputed_flops(dataclasses.replace(xla, attention_kernel="splash"))
        assert with_splash - recomputed_flops(xla) == 3 * recomputed * 2 * 128 * 256
