"""The kernels for wide experts, interpreted, equal einsums; their blocks; their compilation for a TPU."""

import importlib.util
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mot_jax.config import MixtureOfTokensConfig
from mot_jax.errors import UserError
from mot_jax.nn import mixing
from mot_jax.nn.feed_forward.mixture_of_tokens import MixtureOfTokens
from mot_jax.nn.kernels import fused_experts_tpu, tiles_tpu
from mot_jax.nn.sharding import AXES

N, G, S, E, D, F = 2, 4, 16, 4, 24, 256


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def arguments():
    weights = jax.nn.softmax(normal(1, N, G, S, E), axis=1)
    return normal(0, N, G, S, D), weights, normal(2, E, D, F) / D**0.5, normal(3, E, F, D) / F**0.5


def reference(activation, x, weights, w_in, w_out):
    o = jnp.einsum("ensf,efd->nsed", activation(jnp.einsum("nsed,edf->ensf", mixing.merge(weights, x), w_in)), w_out)
    return mixing.emit(weights, o)


@pytest.mark.parametrize("width, positions", [(128, 8), pytest.param(256, 16, marks=pytest.mark.slow)])
def test_values_and_gradients_equal_einsums(width, positions, monkeypatch):
    """With two blocks of F, two slices of rows and two blocks of positions, where one of each would fit."""

    def expert_blocks(kernel, *sizes_and_dtypes):
        return fused_experts_tpu.make_blocks(kernel, *sizes_and_dtypes, width)

    def pass_blocks(kernel, *sizes_and_dtype):
        return tiles_tpu.make_pass_blocks(kernel, *sizes_and_dtype, positions)

    monkeypatch.setattr(fused_experts_tpu, "choose_blocks", expert_blocks)
    monkeypatch.setattr(fused_experts_tpu, "MAX_ROWS", N * S // 2)
    monkeypatch.setattr(tiles_tpu, "choose_pass_blocks", pass_blocks)
    args, dy = arguments(), normal(4, N, G, S, D)
    functions = (partial(f, jax.nn.gelu) for f in (fused_experts_tpu.fused_experts, reference))
    with jax.default_matmul_precision("highest"):
        (y, pull), (expected, expected_pull) = (jax.vjp(jax.jit(f), *args) for f in functions)
        chex.assert_trees_all_close((y, pull(dy)), (expected, expected_pull(dy)), rtol=1e-5, atol=1e-5)


def layer(kernel: str, **fields) -> MixtureOfTokens:
    config = MixtureOfTokensConfig(G, E, F, save_for_backward="all", kernel=kernel)
    return MixtureOfTokens(D, 4 * D, config, rngs=nnx.Rngs(0), **fields)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), *(pytest.param(s, marks=pytest.mark.slow) for s in ((2, 2, 1, 1), (2, 4, 1, 1)))]
)
def test_the_layer_on_a_mesh_equals_xla(shape, mesh_of):
    """Values and gradients, for groups that are whole on a device and groups that span two."""
    x = normal(5, 4 * G if shape[1] < 4 else 4 * G // 2, S, D)
    mesh = mesh_of(**dict(zip(AXES, shape, strict=True)))
    results = []
    for kernel in ("xla", "fused_experts"):
        graph, state = nnx.split(layer(kernel))
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
            state = jax.device_put(state, NamedSharding(mesh, PartitionSpec(None, "fsdp")))

            def loss(state, x, graph=graph):
                return jnp.square(nnx.merge(graph, state)(x).y).sum()

            results.append(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, jax.device_put(x, rows)))
    first, second = (jax.tree.map(np.asarray, jax.tree.leaves(f)) for f in results)
    chex.assert_trees_all_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_gradients_of_experts_sharded_over_fsdp_are_not_rounded_to_bfloat16(mesh_of):
    mesh = mesh_of(fsdp=2)
    x = jnp.asarray(normal(5, 2 * G, S, D), "bfloat16")
    graph, state = nnx.split(layer("fused_experts", dtype="bfloat16"))
    with jax.set_mesh(mesh):
        state = jax.device_put(state, NamedSharding(mesh, PartitionSpec(None, "fsdp")))
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp")))

        def loss(state, x):
            return jnp.square(nnx.merge(graph, state)(x).y).astype("float32").sum()

        gradients = jax.jit(jax.grad(loss))(state, x)
    for name in ("w_in", "w_out"):
        gradient = np.asarray(gradients[name][...])
        assert gradient.dtype == np.float32 and (gradient.astype("bfloat16") != gradient).mean() > 0.9


def test_an_output_does_not_depend_on_other_positions_or_groups():
    run, draw = jax.jit(partial(fused_experts_tpu.fused_experts, jax.nn.relu)), np.random.default_rng(5)
    x, weights = normal(0, N, G, S, D), jax.nn.softmax(normal(1, N, G, S, E), axis=1)
    weights_of_experts = normal(2, E, D, F), normal(3, E, F, D)
    expected = run(x, weights, *weights_of_experts)
    for last in (3, 8, 12):
        other_x, other = (np.array(a) for a in (x, weights))
        for array in (other_x, other):
            array[0, :, last:] = 100 * draw.normal(size=array[0, :, last:].shape)
            array[1] = 100 * draw.normal(size=array[1].shape)
        outputs = run(other_x, other, *weights_of_experts)
        np.testing.assert_array_equal(outputs[0, :, :last], expected[0, :, :last])
        assert (outputs[0, :, last:] != expected[0, :, last:]).any()


def test_unsupported_configs_are_refused():
    with pytest.raises(UserError, match="kernel = 'fused_experts': has experts without a gate, and gated = True"):
        layer("fused_experts", gated=True)
    config = MixtureOfTokensConfig(G, E, F, kernel="fused_experts")
    with pytest.raises(UserError, match="save_for_backward = 'pre_activations'; try save_for_backward = 'all'"):
        MixtureOfTokens(D, 4 * D, config, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"65536 mixtures of d_model = 768 .* try fewer sequences per device, or"):
        fused_experts_tpu.choose_blocks("forward", 32, 65536, 768, 3072, "bfloat16", "float32", "float32")


SHAPES = {
    "d2048": (4, 32, 256, 32, 2048, 8192),
    "Base/32E": (8, 32, 256, 32, 768, 3072),
    "Medium/32E/8": (8, 32, 256, 256, 512, 256),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_block_is_moved_once(name):
    """The count by hand, of tokens, of mixtures (E / G times as many) and of mixing weights, 2 bytes each.

    Forward: x and u, u and o, o and y. Backward: dy and do; u, do and du; x, dy, o, du and dx. The gradient of the
    mixing weights is in 4 bytes, and so are the experts' parameters, read twice, and their gradients.
    """
    n, g, s, e, d, f = SHAPES[name]
    tokens, mixtures, weights = n * g * s * d, n * s * e * d, n * g * s * e
    expected = 2 * (6 * tokens + 10 * mixtures + 4 * weights) + 4 * weights + 3 * 4 * 2 * e * d * f
    assert fused_experts_tpu.layer_bytes(*SHAPES[name], "bfloat16", "float32") == expected


# Blocks that are no powers of 2; values as large as the blocks.
UNUSUAL = [(1, 4, 360, 4, 768, 3072), (2, 8, 256, 4, 256, 6144)]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("n, g, s, e, d, f", [*SHAPES.values(), *UNUSUAL])
def test_the_kernels_compile_for_a_v5p(n, g, s, e, d, f):
    """Also if JAX's matmul precision is set to the highest, as in the benchmark of numerics."""
    from jax.sharding import SingleDeviceSharding

    from mot_jax.cost.hardware import parse_topology
    from mot_jax.planning.plan import devices_of

    chip = SingleDeviceSharding(devices_of(parse_topology("v5p:2x2x1"))[0])

    def forward_and_backward(dy, *args):
        y, pull = jax.vjp(partial(fused_experts_tpu.fused_experts, jax.nn.gelu), *args)
        return y, pull(dy)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=chip)

    x, weights = array("bfloat16", n, g, s, d), array("float32", n, g, s, e)
    of_experts = array("float32", e, d, f), array("float32", e, f, d)
    with jax.default_matmul_precision("highest"):
        text = jax.jit(forward_and_backward, out_shardings=chip).lower(x, x, weights, *of_experts).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 6
    assert f"{e},{n * s},{f}]" not in text and f"{e},{n},{s},{f}]" not in text  # no pre-activations in the program
