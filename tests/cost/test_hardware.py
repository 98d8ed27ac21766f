"""The table of machines, and their names."""

from __future__ import annotations

import pytest

from mot_jax.cost.accounting import peak_flops
from mot_jax.cost.hardware import HARDWARE, parse_topology
from mot_jax.errors import UserError


@pytest.mark.parametrize("name, chips", [("v5p:8x8x8", 512), ("v5e:16x16", 256), ("v4:2x2x1", 4), ("local:8", 8)])
def test_topologies_by_name(name, chips):
    assert parse_topology(name).chips == chips
    if not name.startswith("local"):
        assert parse_topology(name, 2).chips == 2 * chips


@pytest.mark.parametrize(
    "name, slices, words",
    [
        ("v7:2x2", 1, "no such topology.*known: v4:4x4x4"),
        ("tpu", 1, "known: v4:4x4x4"),
        ("v5p", 1, "3 dimensions; try v5p:4x4x4"),
        ("v5p:8x8", 1, "3 dimensions"),
        ("v5e:8x8x8", 1, "2 dimensions; try v5e:4x4"),
        ("v5e:3x4", 1, "even"),
        ("v5p:4x4x0", 1, "even"),
        ("v6e:32x32", 1, "1024 chips; the largest slice has 256"),
        ("local:2x2", 1, "try local:8"),
        ("local:x", 1, "try local:8"),
        ("local", 2, "try --slices 1"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(name, slices, words):
    with pytest.raises(UserError, match=words) as error:
        parse_topology(name, slices)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", HARDWARE)
def test_every_chip_has_a_peak(name):
    assert peak_flops(HARDWARE[name].device_kind, "bfloat16")


@pytest.mark.parametrize(
    "name, torus, rings",
    [
        ("v5p", (4, 4, 8), (True, True, True)),
        ("v5p", (2, 4, 4), (False, False, False)),
        ("v5e", (8, 16), (False, True)),
    ],
)
def test_which_dimensions_close_to_rings(name, torus, rings):
    assert HARDWARE[name].rings(torus) == rings
