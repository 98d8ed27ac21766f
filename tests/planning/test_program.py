"""FLOPs and bytes of scans, and collectives by kind, axis, bytes and executions, against hand-computed values."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mot_jax.planning import hlo
from mot_jax.planning.program import read_program

DEPTH, ROWS, WIDTH = 5, 128, 64


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    explicit = (AxisType.Explicit,) * len(sizes)
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=explicit, devices=devices)


def compiled_text(mesh, function, *arrays: tuple[tuple[int, ...], P]) -> str:
    """The compiled text of `function` for float32 arrays with these shapes and partitions."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in arrays]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*shapes).compile().as_text()


def read(mesh, function, *arrays):
    return read_program(hlo.parse(compiled_text(mesh, function, *arrays)), dict(mesh.shape))


def scanned(weights, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_a_scan_has_a_product_for_each_iteration():
    mesh = mesh_of(data=1)
    program = read(mesh, scanned, ((DEPTH, WIDTH, WIDTH), P()), ((ROWS, WIDTH), P()))
    assert program.flops == DEPTH * 2 * ROWS * WIDTH * WIDTH
    [_, loop] = program.bodies
    assert loop.executions == DEPTH
    # An iteration reads one matrix of the stack, not the whole stack; the compiler may copy it and x a few times.
    slice_bytes, x_bytes = 4 * WIDTH * WIDTH, 4 * ROWS * WIDTH
    assert slice_bytes + 2 * x_bytes <= loop.hbm_bytes <= 4 * slice_bytes + 10 * x_bytes
    assert not program.collectives and not program.unknown


def test_trip_counts_of_nested_scans_multiply():
    def nested(weights, x):
        return jax.lax.scan(lambda x, _: (scanned(weights, x), None), x, length=3)[0]

    program = read(mesh_of(data=1), nested, ((DEPTH, WIDTH, WIDTH), P()), ((ROWS, WIDTH), P()))
    assert program.flops == 3 * DEPTH * 2 * ROWS * WIDTH * WIDTH


def test_a_loop_with_an_unknown_trip_count_is_reported():
    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ x, x)

    program = read(mesh_of(data=1), until, ((WIDTH, WIDTH), P()))
    assert program.flops == 2 * WIDTH**3
    assert "counted once" in program.unknown[0]


@pytest.mark.parametrize(
    "batch, axes",
    [("data", ("data",)), ("expert", ("expert",)), (("data", "expert"), ("data", "expert"))],
)
def test_an_all_reduce_is_named_by_its_axes(batch, axes):
    def product(x, y):
        return jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())), out_sharding=P())

    x = ((ROWS, WIDTH), P(batch))
    program = read(mesh_of(data=2, expert=4), product, x, x)
    [collective] = program.collectives
    assert (collective.kind, collective.axes, collective.executions) == ("all-reduce", axes, 1)
    assert collective.bytes == 4 * WIDTH * WIDTH
    shards = {"data": 2, "expert": 4}
    assert len(collective.members) == math.prod(shards[axis] for axis in axes)


def test_a_collective_in_a_scan_is_executed_in_each_iteration():
    def gathered(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ jax.reshard(w, P())), None

        return jax.lax.scan(layer, x, weights)[0]

    mesh = mesh_of(data=2, fsdp=4)
    arrays = ((DEPTH, WIDTH, WIDTH), P(None, "fsdp")), ((ROWS, WIDTH), P(("data", "fsdp")))
    program = read(mesh, gathered, *arrays)
    [collective] = program.collectives
    assert (collective.kind, collective.axes, collective.executions) == ("all-gather", ("fsdp",), DEPTH)
    assert collective.bytes == 4 * WIDTH * WIDTH  # of the whole matrix, which each device receives
    assert sorted([collective.members, *collective.others]) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    total = program.by_kind()["collective"]
    assert total["hbm_bytes"] == DEPTH * 4 * WIDTH * WIDTH * (1 + 1 / 4)  # a shard is read, the whole is written


def test_an_all_to_all_and_a_permutation():
    mesh = mesh_of(data=2, expert=4)
    x = ((ROWS, WIDTH), P("expert", None))
    [collective] = read(mesh, lambda x: jax.reshard(x, P(None, "expert")), x).collectives
    assert (collective.kind, collective.axes) == ("all-to-all", ("expert",))
    assert collective.bytes == 4 * ROWS * WIDTH / 4

    def shift(x):
        return jax.shard_map(
            lambda x: jax.lax.ppermute(x, "expert", [(i, (i + 1) % 4) for i in range(4)]),
            in_specs=P("expert", None),
            out_specs=P("expert", None),
        )(x)

    [collective] = read(mesh, shift, x).collectives
    assert (collective.kind, collective.axes) == ("collective-permute", ("expert",))
    assert collective.bytes == 4 * ROWS * WIDTH / 4


GPU = """%fused (p: bf16[8,16], q: bf16[16,32]) -> bf16[8,32] {
  %p = bf16[8,16]{1,0} parameter(0)
  %q = bf16[16,32]{1,0} parameter(1)
  %dot = bf16[8,32]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %relu = bf16[8,32]{1,0} negate(%dot)
}

ENTRY %main (x: bf16[8,16], w: bf16[16,32], v: f32[3,32,4], q: bf16[2,6,4,8]) -> bf16[2,6,4,8] {
  %x = bf16[8,16]{1,0} parameter(0)
  %w = bf16[16,32]{1,0} parameter(1)
  %v = f32[3,32,4]{2,1,0} parameter(2)
  %q = bf16[2,6,4,8]{3,2,1,0} parameter(3)
  %triton = bf16[8,32]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused, backend_config={"kind":"__triton_nested_gemm_fusion"}
  %lt = (f32[3,4,4]{2,1,0}, s8[33554432]{0}) custom-call(%v, %v), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  %gemm = bf16[8,32]{1,0} custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %fwd = (bf16[2,6,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","4","6","6"]},"mask_type":"MASK"}}
  %bwd = (bf16[2,6,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","4","6","6"]},"mask_type":"CAUSAL"}}
  %other = (f32[8]{0}) custom-call(%v), custom_call_target="__gpu$xla.gpu.triton"
  %start = bf16[8,16]{1,0} all-reduce-start(%x), replica_groups={{0}}, to_apply=%add
  ROOT %out = bf16[2,6,4,8]{3,2,1,0} get-tuple-element(%fwd), index=0
}
"""  # noqa: E501


SPLASH = """ENTRY %main (q: bf16[2,4,1024,64], k: bf16[2,1,1024,64], mask: s8[1,2,2], s: s32[1024,128]) -> bf16[2,4,1024,64] {
  %q = bf16[2,4,1024,64]{3,2,1,0} parameter(0)
  %k = bf16[2,1,1024,64]{3,2,1,0} parameter(1)
  %mask = s8[1,2,2]{2,1,0:S(1)} parameter(2)
  %s = s32[1024,128]{1,0} parameter(3)
  %splash_mha_fwd_residuals.1 = (bf16[2,4,1024,64]{3,2,1,0}, f32[2,4,1024,128]{3,2,1,0}) custom-call(%mask, %mask, %q, %k, %k, %s), custom_call_target="tpu_custom_call"
  %splash_mha_dq_no_residuals.1 = bf16[2,4,1024,64]{3,2,1,0} custom-call(%q, %k, %k, %q), custom_call_target="tpu_custom_call"
  %splash_mqa_fwd.1 = bf16[2,4,1024,64]{3,2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call"
  ROOT %out = bf16[2,4,1024,64]{3,2,1,0} get-tuple-element(%splash_mha_fwd_residuals.1), index=0
}
"""  # noqa: E501


def test_splash_attention_is_counted_by_the_blocks_that_it_visits():
    program = read_program(hlo.parse(SPLASH), {"data": 1})
    causal, full = (kernel for kernel in program.bodies[0].kernels if kernel.flops)
    assert (causal.kind, causal.flops, causal.dtype) == ("splash attention", 2 * 2 * (8 * 3 * 512**2 * 64), "bf16")
    assert (full.kind, full.flops, full.dtype) == ("splash attention", 3 * 2 * (8 * 1024**2 * 64), "bf16")
    query, key = 2 * 2 * 4 * 1024 * 64, 2 * 2 * 1024 * 64
    assert causal.hbm_bytes == 2 * query + 2 * key + 4 * 1024 * 128 + 4 * 2 * 4 * 1024 * 128
    assert program.unknown == ("FLOPs of the custom call tpu_custom_call",)  # the variant with one head for keys


def test_spaces_in_a_backends_configuration_change_nothing():
    """XLA of jax 0.12 writes them where it has compiled to machine code."""
    spaced = GPU.replace('":', '": ').replace('","', '", "')
    assert spaced != GPU and read_program(hlo.parse(spaced), {"data": 1}) == read_program(hlo.parse(GPU), {"data": 1})


def test_products_of_a_gpus_libraries_are_counted_and_told_apart():
    program = read_program(hlo.parse(GPU), {"data": 1})
    kernels = {kernel.name: kernel for kernel in program.bodies[0].kernels}
    product = 2 * 8 * 16 * 32
    kinds = {name: (kernel.kind, kernel.flops, kernel.dtype) for name, kernel in kernels.items()}
    assert kinds["triton"] == ("Triton product", product, "bf16")
    assert kinds["gemm"] == ("cuBLAS product", product, "bf16")
    assert kinds["lt"] == ("cuBLAS product", 3 * 2 * 4 * 32 * 4, "f32")
    assert kinds["fwd"] == ("cuDNN attention", 2 * (2 * 2 * 4 * 6 * 6 * 8), "bf16")
    assert kinds["bwd"] == ("cuDNN attention", 5 * (2 * 2 * 4 * 21 * 8), "bf16")  # 21 of 36 pairs are causal
    assert kernels["lt"].hbm_bytes == 4 * (2 * 3 * 32 * 4 + 3 * 4 * 4)  # without the workspace
    assert kernels["triton"].hbm_bytes == 2 * (8 * 16 + 16 * 32 + 8 * 32)
    assert kernels["start"].overlaps and kernels["start"].kind == "collective"
    assert program.unknown == ("FLOPs of the custom call __gpu$xla.gpu.triton",)
    assert program.by_kind()["cuBLAS product"] == {
        "executions": 2,
        "flops": product + 3 * 2 * 4 * 32 * 4,
        "hbm_bytes": kernels["lt"].hbm_bytes + kernels["gemm"].hbm_bytes,
    }


SLICES = """ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %t = token[] after-all()
  %s = (f32[8,4]{1,0}, u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true, MEGASCALE
  %r = (f32[8,4]{1,0}, u32[], token[]) recv(%t), channel_id=2, is_host_transfer=true, MEGASCALE
  ROOT %y = f32[8,4]{1,0} all-reduce(%x), channel_id=3, replica_groups={{0,1}}, to_apply=%add
}
"""


def test_sends_between_slices_are_collectives():
    text = SLICES.replace("MEGASCALE", 'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}')
    between, inside = read_program(hlo.parse(text), {"data": 4, "expert": 1}, slices=2).collectives
    assert (between.kind, between.axes, between.bytes, between.members) == ("all-reduce", ("slices",), 128, (0, 2))
    assert (inside.kind, inside.axes, inside.members) == ("all-reduce", ("data",), (0, 1))


def test_a_send_of_another_kind_is_reported():
    program = read_program(hlo.parse(SLICES.replace("MEGASCALE", "frontend_attributes={}")), {"data": 4}, slices=2)
    assert len(program.collectives) == 1 and "send" in program.unknown[0] and program.bound == "at least "


@pytest.mark.parametrize(("transfer", "kind"), [("ONE_TO_ONE", "collective-permute"), ("NEW_KIND", None)])
def test_sends_between_slices_are_never_left_out_silently(transfer, kind):
    attribute = f'frontend_attributes={{_xla_megascale_transfer_type="{transfer}"}}'
    program = read_program(hlo.parse(SLICES.replace("MEGASCALE", attribute)), {"data": 4}, slices=2)
    assert [c.kind for c in program.collectives] == ([kind] if kind else []) + ["all-reduce"]
    assert bool(program.unknown) == (kind is None)


def test_all_branches_of_a_conditional_are_counted_and_bound_the_step_from_above():
    def either(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x, x)

    program = read(mesh_of(data=1), either, ((WIDTH, WIDTH), P()))
    assert program.flops == 2 * WIDTH**3 and not program.unknown
    assert "all branches are counted" in program.overcounted[0] and program.bound == "at most "
