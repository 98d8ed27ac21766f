"""Bytes of a training step against the compiler's and against the residuals of JAX's derivative."""

import dataclasses

import jax
import pytest
from paper_models import (
    BATCH,
    CHOICES,
    MEDIUM,
    PROBE,
    PROBE_MIXTURE,
    ROUTED,
    SAVE_POLICIES,
    V1,
    abstract_inputs,
    compiled_cost,
    loss_of,
    probe,
    routed,
    with_kind,
)

from mot_jax.config import Config, OptimizerConfig, TrainingConfig
from mot_jax.cost import memory
from mot_jax.cost.describe import describe
from mot_jax.cost.memory import adamw_bytes, memory_bytes, saved_bytes
from mot_jax.cost.parameters import count_parameters

EXAMPLE = Config(
    dataclasses.replace(with_kind(MEDIUM, 32, 256), dtype="bfloat16"),
    training=TrainingConfig(steps=1000, batch_size=256, gradient_accumulation_steps=2),
)


@pytest.mark.parametrize(
    ("save_for_backward", "remat"),
    [
        ("pre_activations", "none"),
        *(pytest.param("pre_activations", r, marks=pytest.mark.slow) for r in ("attention", "blocks")),
    ],
)
def test_saved_bytes_match_the_compiler(save_for_backward, remat):
    """Four more blocks add the temporaries that four blocks save, to a part in a thousand, in the compiled program.

    In float32, because the CPU compiler stores bfloat16 as float32.
    """
    few, many = probe(5, save_for_backward, remat=remat), probe(9, save_for_backward, remat=remat)
    expected = sum(saved_bytes(many, BATCH).values()) - sum(saved_bytes(few, BATCH).values())
    temporaries = [compiled_cost(model, backward=True)[1] for model in (few, many)]
    assert temporaries[1] - temporaries[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "model",
    [
        *map(routed, ROUTED),
        with_kind(PROBE),
        with_kind(PROBE, **PROBE_MIXTURE),
        dataclasses.replace(with_kind(PROBE, 4, 64, save_for_backward="all"), moe_blocks="last_half", final_norm=True),
        dataclasses.replace(with_kind(PROBE, 4, 64, save_for_backward="nothing"), moe_blocks="every_other"),
        dataclasses.replace(with_kind(PROBE), **CHOICES),
        dataclasses.replace(with_kind(PROBE, **PROBE_MIXTURE), objective="masked"),
    ],
)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_saved_bytes_match_the_residuals(model, dtype):
    """The whole model's derivative also saves masks and zeros, once for a stack: below 2 % in stacks this deep."""
    model, batch = dataclasses.replace(model, num_blocks=64, dtype=dtype), 12

    def vjp_of(params, *rest):
        return jax.vjp(lambda params: loss_of(model, params, *rest), params)[1]

    inputs = abstract_inputs(model, batch)
    parameters = {(a.shape, a.dtype) for a in inputs[0].values()}
    leaves = jax.tree.leaves(jax.eval_shape(vjp_of, *inputs))
    # A residual that is a parameter takes no memory of its own. The loss's gradient with respect to the head has the
    # shape and dtype of a parameter, but is an array of its own.
    residuals = sum(a.size * a.dtype.itemsize for a in leaves if (a.shape, a.dtype) not in parameters)
    residuals += model.d_model * model.vocab_size * 4
    saved = sum(saved_bytes(model, batch).values())
    least = 0.98 if model.feed_forward.kind == "soft_moe" else 1  # some residuals have the shape of a parameter
    assert least * saved <= residuals <= 1.02 * saved


def test_bytes_that_each_policy_adds_to_the_mixture():
    """float32: pre-activations are E/G F numbers per token, mixtures and expert outputs E/G D each."""
    nothing, pre_activations, everything = (
        saved_bytes(probe(3, policy), BATCH)["mixture_of_tokens"] for policy in SAVE_POLICIES
    )
    kind, mixtures = probe(3, "all").feed_forward, 3 * BATCH * PROBE.context_length * 16 // 4
    assert pre_activations - nothing == mixtures * kind.hidden_dim(PROBE.d_ff) * 4
    assert everything - pre_activations == mixtures * 2 * PROBE.d_model * 4


@pytest.mark.parametrize("name", ROUTED)
def test_saved_bytes_of_every_kind(name):
    """A training step saves at least the pre-activations of the experts of each token, and no negative number."""
    model = routed(name, 2)
    kind = model.feed_forward
    saved, tokens = saved_bytes(model, BATCH), BATCH * PROBE.context_length
    assert min(saved.values()) >= 0
    per_token = getattr(kind, "top_k", 1) * kind.hidden_dim(PROBE.d_ff)
    assert saved[kind.kind] >= 2 * 4 * tokens * per_token
    assert memory_bytes(Config(model, training=TrainingConfig(batch_size=BATCH)))["saved for backward"] == sum(
        saved.values()
    )


def test_no_copy_of_a_matrix_is_saved_in_another_dtype():
    """Matrices are cast, and gathered, where they are used, forward and backward."""
    model = with_kind(dataclasses.replace(V1, dtype="bfloat16"), 8, 16)
    copies = saved_bytes(model, 8)["copies of parameters"]
    assert copies < 0.01 * count_parameters(model)["attention"]


def test_saved_bytes_do_not_depend_on_the_mesh(mesh_of):
    model = dataclasses.replace(with_kind(PROBE, 4, 12), d_ff=768)
    mesh = mesh_of(data=8)
    with jax.set_mesh(mesh):
        with_mesh = describe(Config(model))
    memory._trace_saved.cache_clear()
    assert with_mesh == describe(Config(model))


def test_memory_with_and_without_gradient_accumulation():
    sizes = memory_bytes(EXAMPLE)
    assert sizes["parameters"] == sizes["gradients"] == sizes["accumulated gradients"] == 4 * 337_357_824
    training = dataclasses.replace(EXAMPLE.training, gradient_accumulation_steps=1)
    one_pass = memory_bytes(dataclasses.replace(EXAMPLE, training=training))
    assert "accumulated gradients" not in one_pass
    assert 1.8 < one_pass["saved for backward"] / sizes["saved for backward"] < 2


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
    assert memory_bytes(config)["optimizer state"] == pytest.approx(per_parameter * 337_357_824, rel=0.01)


def test_an_adamw_update_reads_four_arrays_and_writes_three():
    assert adamw_bytes(10) == 10 * 4 * (4 + 3)
    assert adamw_bytes(10, "bfloat16", "bfloat16") == 10 * (3 * 2 + 2 * 2 + 2 * 4)
