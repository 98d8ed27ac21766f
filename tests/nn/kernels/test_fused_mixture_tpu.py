"""The kernels, interpreted, equal `mixing.merge_experts_emit`; their blocks; their compilation for a TPU."""

import importlib.util
import os
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from mot_jax.config import MixingConfig, MixtureOfTokensConfig
from mot_jax.errors import UserError
from mot_jax.nn import mixing
from mot_jax.nn.feed_forward.mixture_of_tokens import MixtureOfTokens
from mot_jax.nn.kernels import fused_mixture_tpu
from mot_jax.nn.kernels.counting import moved_bytes
from mot_jax.nn.sharding import AXES

N, G, S, E, D, F = 2, 4, 16, 16, 24, 12


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def arguments():
    weights = jax.nn.softmax(normal(1, N, G, S, E), axis=1)
    return normal(0, N, G, S, D), weights, normal(2, E, D, F) / D**0.5, normal(3, E, F, D) / F**0.5


def reference(activation, x, weights, w_in, w_out):
    def project_in(u, w):
        return jnp.einsum("nsed,edf->nsef", u, w)

    def project_out(h, w):
        return jnp.einsum("nsef,efd->nsed", activation(h), w)

    return mixing.merge_experts_emit(project_in, project_out, "nothing", x, weights, w_in, w_out)


@pytest.fixture
def small_blocks(monkeypatch):
    """Use several blocks of positions and of experts, where one of each would fit."""

    def blocks_of_eight(kernel, n, g, s, e, d, f, dtype):
        return fused_mixture_tpu.make_blocks(kernel, n, g, s, e, d, f, jnp.dtype(dtype), 8, 8)

    monkeypatch.setattr(fused_mixture_tpu, "choose_blocks", blocks_of_eight)


def assert_equals_reference(activation):
    args, dy = arguments(), normal(4, N, G, S, D)
    functions = (partial(f, activation) for f in (fused_mixture_tpu.fused_mixture, reference))
    with jax.default_matmul_precision("highest"):
        (y, pull), (expected, expected_pull) = (jax.vjp(jax.jit(f), *args) for f in functions)
        chex.assert_trees_all_close((y, pull(dy)), (expected, expected_pull(dy)), rtol=1e-5, atol=1e-5)


def test_values_and_gradients_equal_xla(small_blocks):
    assert_equals_reference(jax.nn.gelu)


def test_an_output_does_not_depend_on_other_positions_or_groups(small_blocks):
    """Outputs have the same bits for any later positions and any other group, also within a tile of eight positions."""
    (x, weights, *experts), draw = arguments(), np.random.default_rng(5)
    run = jax.jit(partial(fused_mixture_tpu.fused_mixture, jax.nn.relu))
    for last in (3, 8, 12):
        expected = run(x, weights, *experts)[0, :, :last]
        for _ in range(3):
            other_x, other = (np.array(a) for a in (x, weights))
            for array in (other_x, other):
                array[0, :, last:] = 100 * draw.normal(size=array[0, :, last:].shape)
                array[1] = 100 * draw.normal(size=array[1].shape)
            outputs = run(other_x, other, *experts)
            np.testing.assert_array_equal(outputs[0, :, :last], expected)
            assert (outputs[0, :, last:] != run(x, weights, *experts)[0, :, last:]).any()


@pytest.mark.slow
@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.silu])
def test_other_activations_in_one_block(activation):
    assert_equals_reference(activation)


def layer(kernel: str, gated: bool = False, num_experts: int = E, **mixing_fields) -> MixtureOfTokens:
    config = MixtureOfTokensConfig(
        G, num_experts, F, save_for_backward="nothing", kernel=kernel, mixing=MixingConfig(**mixing_fields)
    )
    return MixtureOfTokens(D, 4 * D, config, gated=gated, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 1, 1), (2, 4, 1, 1)], ids=["one", "groups", "groups of two"])
def test_the_layer_on_a_mesh_equals_xla(shape, mesh_of):
    """Values and gradients, for groups that are whole on a device and groups that span two."""
    x = normal(5, 4 * G if shape[1] < 4 else 4 * G // 2, S, D)
    results = {}
    mesh = mesh_of(**dict(zip(AXES, shape, strict=True)))
    for kernel in ("xla", "fused_mixture"):
        graph, state = nnx.split(layer(kernel))
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
            state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))

            def loss(state, x, graph=graph):
                return jnp.square(nnx.merge(graph, state)(x).y).sum()

            results[kernel] = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, jax.device_put(x, rows))
    first, second = (jax.tree.map(np.asarray, jax.tree.leaves(results[kernel])) for kernel in ("xla", "fused_mixture"))
    chex.assert_trees_all_close(first, second, rtol=1e-4, atol=1e-4)


def test_sequences_that_are_not_whole_tiles_use_xla():
    x = normal(6, G, 1, D)
    np.testing.assert_array_equal(layer("fused_mixture")(x).y, layer("xla")(x).y)


@pytest.mark.parametrize(
    "fields",
    [{"emit": "ones"}, {"layer_norm": True}, {"groups": "within"}, {"gated": True}, {"num_experts": 12}],
    ids=lambda fields: next(iter(fields)),
)
def test_unsupported_configs_are_refused(fields):
    [name] = fields
    with pytest.raises(UserError, match=rf"kernel = 'fused_mixture': .*{name} = .*; try kernel = 'xla'"):
        layer("fused_mixture", **fields)
    layer("xla", **fields)


def test_the_kernel_requires_save_for_backward_nothing():
    config = MixtureOfTokensConfig(G, E, F, kernel="fused_mixture")
    with pytest.raises(UserError, match="save_for_backward = 'pre_activations'; try save_for_backward = 'nothing'"):
        MixtureOfTokens(D, 4 * D, config, rngs=nnx.Rngs(0))


def test_hbm_bytes_count_every_block_that_is_moved():
    """The count by hand: x and y once; the experts' parameters for each of two blocks of positions; 4 bytes a float."""
    blocks = fused_mixture_tpu.make_blocks("forward", N, G, S, E, D, F, jnp.dtype("float32"), 8, 8)
    assert blocks.grid == (N, 2, 2)
    tokens, weights, experts = N * G * S * D, N * G * S * 8 * E // 8, 2 * E * D * F
    assert blocks.hbm_bytes == 4 * (2 * tokens + weights + 2 * N * experts)
    [spec, dtype] = blocks.inputs[2]  # with all experts in one block, their parameters are loaded once
    assert moved_bytes((N, 2, 1), [(spec, dtype)]) == 4 * 8 * D * F


def test_experts_of_the_dense_width_do_not_fit():
    with pytest.raises(UserError, match=r"width 3072.* do not fit in a core's memory; try kernel = 'xla'"):
        fused_mixture_tpu.choose_blocks("forward", 8, 32, 256, 32, 768, 3072, "bfloat16")


SHAPES = {"Medium/32E/8": (512, 256, 256, 1.25e9, 1.35e9, 2.6e9), "v1": (256, 512, 64, 0.41e9, 0.51e9, 0.44e9)}


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_fit_in_vmem_and_move_few_bytes(name):
    d, e, f, *limits = SHAPES[name]
    kernels = ("forward", "backward", "gradients")
    choices = [fused_mixture_tpu.choose_blocks(kernel, 8, 32, 256, e, d, f, "bfloat16") for kernel in kernels]
    assert all(blocks.vmem_bytes < fused_mixture_tpu.VMEM_BYTES for blocks in choices)
    moved = [blocks.hbm_bytes for blocks in choices]
    assert all(count <= limit for count, limit in zip(moved, limits, strict=True)), moved


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernels_compile_for_a_v5p(name, monkeypatch):
    from jax.experimental import topologies

    for key, value in {"SKIP_MDS_QUERY": "1", "WORKER_HOSTNAMES": "localhost", "ACCELERATOR_TYPE": "v4-8"}.items():
        monkeypatch.setitem(os.environ, f"TPU_{key}", value)
    monkeypatch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    chip = SingleDeviceSharding(topologies.get_topology_desc("v5p:2x2x1", "tpu").devices[0])
    d, e, f, *_ = SHAPES[name]

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=chip)

    def forward_and_backward(dy, *args):
        y, pull = jax.vjp(partial(fused_mixture_tpu.fused_mixture, jax.nn.relu), *args)
        return y, pull(dy)

    x, wide = array("bfloat16", 8, 32, 256, d), partial(array, "float32")
    compiled = (
        jax.jit(forward_and_backward, out_shardings=chip)
        .lower(x, x, wide(8, 32, 256, e), wide(e, d, f), wide(e, f, d))
        .compile()
    )
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    # No mixtures [N, S, E, D] in the program.
    assert f"[8,256,{e},{d}]" not in text
