"""The chunked cross-entropy has the loss and gradients of the plain one, in less memory, on any mesh."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mot_jax.nn.losses import cross_entropy_sum
from mot_jax.nn.sharding import batch_sharding, positions_dimension, reshard

B, S, D, V = 8, 6, 5, 11


def batch(dtype: str = "float32"):
    """hidden, head, targets, mask."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, S, D), (D, V)))
    return hidden, head, rng.integers(V, size=(B, S), dtype="int32"), rng.random((B, S)) < 0.7


def plainly(hidden, head, targets, mask):
    log_p = jax.nn.log_softmax(hidden @ head, axis=-1)
    return -jnp.where(mask, jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], 0).sum()


def plain_z(hidden, head, targets, mask):
    """Sum of (log Z)^2."""
    return jnp.where(mask, jnp.log(jnp.exp(hidden @ head).sum(axis=-1)) ** 2, 0).sum()


def loss_in_chunks(*arguments, chunk=2):
    return cross_entropy_sum(*arguments, chunk).loss


def value_and_grad(loss, arguments):
    return jax.jit(jax.value_and_grad(lambda *a: 3.0 * loss(*a), argnums=(0, 1)))(*arguments)


@pytest.mark.parametrize("chunk, head_z", [(1, 0.0), (2, 0.3), (6, 0.0)])
def test_equals_the_plain_loss(chunk, head_z):
    with jax.enable_x64(True):
        arguments = batch("float64")
        sums = partial(cross_entropy_sum, chunk=chunk, head_z=head_z, accuracy=True)
        actual = value_and_grad(lambda *a: sums(*a).loss, arguments)
        expected = value_and_grad(lambda *a: plainly(*a) + head_z * plain_z(*a), arguments)
        chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)
        loss, nats, correct = sums(*arguments)
        chex.assert_trees_all_close((3.0 * loss, nats), (actual[0], plainly(*arguments)), rtol=1e-10)
        hidden, head, targets, mask = arguments
        assert correct == (mask & (np.argmax(hidden @ head, axis=-1) == targets)).sum() > 0


def test_only_the_loss_has_a_gradient_and_accuracy_is_optional():
    gradients = jax.grad(lambda *a: cross_entropy_sum(*a, 2, 0.5).nats, argnums=(0, 1))(*batch())
    assert not any(g.any() for g in gradients)
    programs = [str(jax.make_jaxpr(partial(cross_entropy_sum, chunk=2, accuracy=a))(*batch())) for a in (False, True)]
    assert ["argmax" in program for program in programs] == [False, True]
    assert cross_entropy_sum(*batch(), 2).correct == 0


def test_nothing_to_predict_is_zero():
    hidden, head, targets, mask = batch()
    arguments = (hidden, head, targets, np.zeros_like(mask))
    loss, gradients = value_and_grad(loss_in_chunks, arguments)
    assert loss == 0 and not any(g.any() for g in gradients)


def test_huge_logits_are_finite():
    hidden, *rest = batch()
    chex.assert_tree_all_finite(value_and_grad(loss_in_chunks, (1e15 * hidden, *rest)))


def test_bfloat16_gives_a_float32_loss():
    arguments = batch("bfloat16")
    loss, gradients = value_and_grad(loss_in_chunks, arguments)
    assert loss.dtype == "float32" and all(g.dtype == "bfloat16" for g in gradients)
    wide = [jnp.asarray(a, "float32") for a in arguments[:2]]
    expected = value_and_grad(plainly, (*wide, *arguments[2:]))
    chex.assert_trees_all_close(loss, expected[0], rtol=1e-5)
    chex.assert_trees_all_close([g.astype("float32") for g in gradients], list(expected[1]), rtol=0.05, atol=0.05)


def sizes(jaxpr) -> set[int]:
    """The numbers of elements of all values in a jaxpr and in its inner jaxprs."""
    counts = set()
    for equation in jaxpr.eqns:
        counts |= {math.prod(v.aval.shape) for v in equation.outvars}
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                counts |= sizes(getattr(inner, "jaxpr", inner))
    return counts


@pytest.mark.parametrize("loss, has_all_logits", [(loss_in_chunks, False), (plainly, True)])
def test_the_logits_of_the_whole_batch_are_never_in_memory(loss, has_all_logits):
    """V is by far the largest dimension, so no other array is as large. The plain loss is the positive control."""
    hidden, _, targets, mask = batch()
    head = jnp.zeros((D, 997))
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head, targets, mask)
    assert (max(sizes(jaxpr.jaxpr)) >= B * S * 997) == has_all_logits
    assert B * 2 * 997 in sizes(jaxpr.jaxpr) or has_all_logits


@pytest.mark.parametrize(
    "sizes", [{"expert": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"expert": 4, "tensor": 2}], ids=str
)
def test_equals_one_device_on_a_mesh(mesh_of, sizes):
    mesh, arguments = mesh_of(**sizes), batch()
    expected = value_and_grad(loss_in_chunks, arguments)
    sharded, replicated = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, replicated if i == 1 else sharded) for i, a in enumerate(arguments)]
        placed[0] = reshard(placed[0], "sequences", positions_dimension(S), None)
        actual = value_and_grad(loss_in_chunks, placed)
    chex.assert_trees_all_close(jax.device_get(actual), jax.device_get(expected), rtol=1e-5, atol=1e-5)
