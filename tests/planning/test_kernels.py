"""Modeled seconds by class of kernel, by hand arithmetic on the text of a program."""

from types import SimpleNamespace

import pytest

from mot_jax.cost.hardware import HARDWARE
from mot_jax.planning import hlo
from mot_jax.planning.kernels import kernel_seconds

H100 = HARDWARE["h100"]
# Two devices; a fusion with a product and one without, calls of cuBLAS, cuDNN and another library, an all-reduce, and a
# loop of three iterations that negates x.
TEXT = """
HloModule step, num_partitions=2

%product (p0: f32[1024,512], p1: f32[512,256]) -> f32[1024,256] {
  %p0 = f32[1024,512]{1,0} parameter(0)
  %p1 = f32[512,256]{1,0} parameter(1)
  ROOT %dot = f32[1024,256]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%negate (q: f32[1024,512]) -> f32[1024,512] {
  %q = f32[1024,512]{1,0} parameter(0)
  ROOT %neg = f32[1024,512]{1,0} negate(%q)
}

%body (state: (s32[], f32[1024,512])) -> (s32[], f32[1024,512]) {
  %state = (s32[], f32[1024,512]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %v = f32[1024,512]{1,0} get-tuple-element(%state), index=1
  %w = f32[1024,512]{1,0} fusion(%v), kind=kLoop, calls=%negate
  ROOT %next = (s32[], f32[1024,512]{1,0}) tuple(%i, %w)
}

%condition (state.1: (s32[], f32[1024,512])) -> pred[] {
  %state.1 = (s32[], f32[1024,512]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main (x: f32[1024,512], y: f32[512,256], state.2: (s32[], f32[1024,512])) -> f32[1024,256] {
  %x = f32[1024,512]{1,0} parameter(0)
  %y = f32[512,256]{1,0} parameter(1)
  %state.2 = (s32[], f32[1024,512]{1,0}) parameter(2)
  %z = f32[1024,256]{1,0} fusion(%x, %y), kind=kOutput, calls=%product
  %n = f32[1024,512]{1,0} fusion(%x), kind=kLoop, calls=%negate
  %loop = (s32[], f32[1024,512]{1,0}) while(%state.2), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %g = f32[1024,256]{1,0} custom-call(%n, %y), custom_call_target="__cublas$gemm"
  %f = f32[1024,256]{1,0} custom-call(%g, %z), custom_call_target="__cudnn$fmhaSoftmax"
  %s = f32[1024,256]{1,0} custom-call(%f), custom_call_target="other"
  ROOT %r = f32[1024,256]{1,0} all-reduce(%s), replica_groups={{0,1}}, to_apply=%sum
}
"""
X, Y, Z = 4 * 1024 * 512, 4 * 512 * 256, 4 * 1024 * 256  # bytes


def test_each_kernel_takes_the_larger_of_flops_and_bytes():
    """The call of cuBLAS, without dimensions in its text, takes the time of its bytes."""
    devices, rate = [SimpleNamespace(coords=()) for _ in range(2)], H100.hbm_bandwidth
    expected = {
        "products": 2 * (X + Y + Z) / rate,
        "elementwise": 4 * 2 * X / rate,  # once, and three times in the loop
        "attention": 3 * Z / rate,
        "library": 2 * Z / rate,
        "collectives": Z / H100.link_bandwidth,  # twice a half
    }
    assert kernel_seconds(hlo.parse(TEXT), {"data": 2}, H100, 1e30, devices) == pytest.approx(expected)
    expected["products"] = 2 * 1024 * 512 * 256 / 1e12 + (X + Y + Z) / rate
    assert kernel_seconds(hlo.parse(TEXT), {"data": 2}, H100, 1e12, devices) == pytest.approx(expected)
