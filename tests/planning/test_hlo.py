"""Parsing the text of compiled programs: arrays, groups of devices, FLOPs of products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mot_jax.planning import hlo
from mot_jax.planning.program import read_program


@pytest.mark.parametrize(
    "text, expected",
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=[1,4]<=[4]", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ],
)
def test_all_forms_of_device_groups(text, expected):
    groups = hlo.device_groups(f", channel_id=1, {text}, use_global_device_ids=true", 4)
    assert sorted(map(sorted, groups.tolist())) == expected


@pytest.mark.parametrize("text", ["replica_groups=mesh['a'=2], device_ids=(x) {'a'}", "replica_groups={{0,1},{2}}", ""])
def test_unknown_forms_of_device_groups_are_an_error(text):
    with pytest.raises(hlo.UnknownTextError):
        hlo.device_groups(text, 4)


def test_bytes_of_arrays_and_of_their_part_in_hbm():
    arrays = "((bf16[4,8]{1,0:T(8,128)(2,1)}), s32[], /*index=2*/u4[3]{0:T(8)S(1)})"
    line = f"  ROOT %x.1 = {arrays} slice-start(%a), slice={{[0:4]}}"
    module = hlo.parse(f"ENTRY %main (a: bf16[4,8]) -> s32[] {{\n  %a = bf16[4,8]{{1,0}} parameter(0)\n{line}\n}}\n")
    root = module.computations["main"].root
    assert (root.opcode, root.operands) == ("slice-start", ("a",))
    assert [array.bytes for array in root.arrays] == [64, 4, 1.5]
    assert [array.hbm_bytes for array in root.arrays] == [64, 4, 0]


@pytest.mark.parametrize("text", ["", "ENTRY %main (a: f32[]) -> f32[] {\n  unknown text\n}\n"])
def test_text_that_is_not_a_program_is_an_error(text):
    with pytest.raises(hlo.UnknownTextError):
        hlo.parse(text)


@pytest.mark.parametrize(
    "line, missing",
    [
        ("ROOT %x = f32[4]{0} fusion(%a), kind=kLoop, calls=%gone", "KeyError: 'gone'"),
        ("ROOT %x = f32[4]{0} dot(%a), lhs_contracting_dims={0}", "ValueError: not enough values"),
        ("ROOT %x = f32[4]{0} add(%b, %a)", "KeyError: 'b'"),
        ("%x = f32[4]{0} while(%a), condition=%main, body=%main", "no ROOT"),
    ],
)
def test_errors_while_a_program_is_read_are_of_one_class(line, missing):
    with pytest.raises(hlo.UnknownTextError, match=missing):
        text = f"ENTRY %main (a: f32[4]) -> f32[4] {{\n  %a = f32[4]{{0}} parameter(0)\n  {line}\n}}\n"
        read_program(hlo.parse(text), {})


def convolution(left, right, strides, padding, left_holes, right_holes, groups=1):
    return jax.lax.conv_general_dilated(
        left, right, strides, padding, left_holes, right_holes, ("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


@pytest.mark.parametrize(
    "strides, padding, left_holes, right_holes",
    [
        ((1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1)),
        ((2, 1), ((1, 1), (2, 0)), (1, 1), (1, 1)),
        ((1, 2), ((2, 2), (3, 1)), (3, 1), (1, 2)),
    ],
)
def test_products_with_padding_and_holes_are_not_counted(strides, padding, left_holes, right_holes):
    left, right = jnp.ones((2, 6, 5, 3)), jnp.ones((2, 3, 3, 4))
    arguments = left, right, strides, padding, left_holes, right_holes
    compiled = jax.jit(convolution, static_argnums=(2, 3, 4, 5)).lower(*arguments).compile()
    program = read_program(hlo.parse(compiled.as_text()), {"data": 1})
    # Ones times ones: the sum of all outputs is the number of products.
    products = compiled(left, right).sum()
    assert program.flops == 2 * products and not program.unknown
