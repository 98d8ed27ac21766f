"""Modeled seconds of collectives on tori, against hand-computed values."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from mot_jax.cost.hardware import HARDWARE
from mot_jax.planning.program import Body, Collective, Kernel, Program
from mot_jax.planning.times import Network, model_times

LINK = 9e10  # v5p, one direction
SIZE = 8e6


def chips(*sizes: int) -> list:
    """Devices of a slice; the last coordinate varies fastest."""
    return [SimpleNamespace(coords=at) for at in itertools.product(*map(range, sizes))]


def chips_of_two(*sizes: int) -> list:
    """Devices of a slice of TPU7x."""
    return [SimpleNamespace(coords=chip.coords, core_on_chip=core) for chip in chips(*sizes) for core in (0, 1)]


def seconds(name: str, sizes: tuple[int, ...], kind: str, axes: tuple[int, ...], step: int = 1) -> float:
    """Seconds of a collective of SIZE bytes over every `step`th chip along these axes, with other coordinates 0."""
    devices = chips(*sizes)
    members = [
        number
        for number, device in enumerate(devices)
        if all(at % step == 0 if axis in axes else at == 0 for axis, at in enumerate(device.coords))
    ]
    return Network(HARDWARE[name], devices).seconds(Collective(kind, ("x",), SIZE, tuple(members), 1, ""))


@pytest.mark.parametrize(
    "sizes, kind, axes, expected",
    [
        # A ring of 8 gives each chip two links.
        ((8, 8, 8), "all-gather", (2,), 7 / 8 * SIZE / (2 * LINK)),
        ((8, 8, 8), "reduce-scatter", (2,), 7 / 8 * SIZE / (2 * LINK)),
        ((8, 8, 8), "all-reduce", (2,), 2 * 7 / 8 * SIZE / (2 * LINK)),
        # Two dimensions: 64 chips, four links each; three: six.
        ((8, 8, 8), "all-reduce", (0, 1), 2 * 63 / 64 * SIZE / (4 * LINK)),
        ((4, 4, 4), "all-gather", (0, 1, 2), 63 / 64 * SIZE / (6 * LINK)),
        # No rings below a cube of 4: the end of a line has one link.
        ((2, 2, 1), "all-reduce", (0, 1), 2 * 3 / 4 * SIZE / (2 * LINK)),
        ((2, 2, 4), "all-gather", (2,), 3 / 4 * SIZE / LINK),
    ],
)
def test_gathers_and_reductions_use_all_links(sizes, kind, axes, expected):
    assert seconds("v5p", sizes, kind, axes) == pytest.approx(expected)


def brute_all_to_all(ring: bool, n: int) -> float:
    """Load of the busiest link, in units of one chip's message to another; each message takes the shorter way."""
    load = np.zeros((n, 2))
    for a, b in itertools.permutations(range(n), 2):
        forward, backward = (b - a) % n, (a - b) % n
        ways = [(forward, 1), (backward, -1)] if ring else [(abs(a - b), 1 if b > a else -1)]
        shortest = min(hops for hops, _ in ways)
        ways = [(hops, way) for hops, way in ways if hops == shortest]
        for hops, way in ways:
            for hop in range(hops):
                load[(a + way * hop) % n, (way + 1) // 2] += 1 / len(ways)
    return load.max()


@pytest.mark.parametrize("name, sizes, ring", [("v5p", (4, 4, 8), True), ("v5p", (2, 2, 8), False)])
def test_an_all_to_all_loads_the_busiest_link(name, sizes, ring):
    expected = SIZE / 8 * brute_all_to_all(ring, 8) / LINK
    assert seconds(name, sizes, "all-to-all", (2,)) == pytest.approx(expected)


def test_an_all_to_all_over_two_dimensions_waits_for_the_longer():
    both, longer = (seconds("v5p", (4, 4, 8), "all-to-all", axes) for axes in ((1, 2), (2,)))
    assert both == longer > seconds("v5p", (4, 4, 8), "all-to-all", (1,))


def test_chips_at_a_distance_share_their_links():
    assert seconds("v5e", (16, 16), "all-gather", (0,), step=4) == pytest.approx(3 / 4 * SIZE / (2 / 4 * 4.5e10))
    # A part of a dimension is a line.
    assert seconds("v5e", (8, 8), "all-gather", (0,)) == pytest.approx(7 / 8 * SIZE / 4.5e10)


@pytest.mark.parametrize("target, hops", [(1, 1), (7, 1), (4, 4), (8 + 1, 2)])
def test_a_permutation_takes_the_shorter_way(target, hops):
    permutation = Collective("collective-permute", ("x",), SIZE, (0, target), 1, "")
    assert Network(HARDWARE["v5p"], chips(8, 8, 8)).seconds(permutation) == pytest.approx(hops * SIZE / LINK)


LINK_SHARE, CORE = LINK / 2, 6 * LINK  # of TPU7x: a device's share of a link, and the connection of a chip's devices
RING = range(16)  # of 8 chips in a slice of 4 x 4 x 8


@pytest.mark.parametrize(
    "kind, members, expected",
    [
        ("all-reduce", (0, 1), 2 / 2 * SIZE / CORE),
        ("all-to-all", (0, 1), 1 / 2 * SIZE / CORE),
        ("collective-permute", (0, 1), SIZE / CORE),
        ("collective-permute", (0, 2), SIZE / LINK_SHARE),
        # One device of each chip; both, each of which receives a half.
        ("all-gather", RING[::2], 7 / 8 * SIZE / (2 * LINK_SHARE)),
        ("all-gather", RING, 7 / 8 * SIZE / 2 / (2 * LINK_SHARE)),
        # Four messages between two chips, over links of which a device has a half.
        ("all-to-all", RING, 4 * SIZE / 16 * brute_all_to_all(True, 8) / LINK),
        # Not a box: one device of the first chip, both of the second.
        ("all-gather", (0, 2, 3), 2 / 3 * SIZE / LINK_SHARE),
    ],
)
def test_two_devices_of_a_chip_share_its_links(kind, members, expected):
    collective = Collective(kind, ("x",), SIZE, tuple(members), 1, "")
    assert Network(HARDWARE["tpu7x"], chips_of_two(4, 4, 8)).seconds(collective) == pytest.approx(expected)


def test_a_permutation_takes_as_long_as_its_longest_way():
    """A shift by one along a line of 8: the last chip sends over all seven links."""
    shift = tuple(end for a in range(8) for end in (a, (a + 1) % 8))
    permutation = Collective("collective-permute", ("x",), SIZE, shift, 1, "")
    assert Network(HARDWARE["v5p"], chips(1, 1, 8)).seconds(permutation) == pytest.approx(7 * SIZE / LINK)


def test_a_collective_takes_as_long_as_its_slowest_group():
    """Three GPUs of eight in each of 3 hosts: the third group spans two of them."""
    groups = [tuple(range(first, first + 3)) for first in range(0, 24, 3)]
    devices = [SimpleNamespace(process_index=number // 8) for number in range(24)]
    gather = Collective("all-gather", ("fsdp",), SIZE, groups[0], 1, "", tuple(groups[1:]))
    assert Network(HARDWARE["h100"], devices).seconds(gather) == pytest.approx(1 / 2 * SIZE / 2 / 5e10)


def test_collectives_between_slices_use_the_data_center_network():
    all_reduce = Collective("all-reduce", ("slices",), SIZE, (0, 64), 1, "")
    assert Network(HARDWARE["v5p"], chips(4, 4, 4) * 2).seconds(all_reduce) == pytest.approx(2 / 2 * SIZE / 6.25e9)


def test_a_switch_has_one_link_per_chip():
    devices = [SimpleNamespace() for _ in range(8)]
    for kind, share in (("all-reduce", 2 * 7 / 8), ("all-to-all", 7 / 8)):
        collective = Collective(kind, ("x",), SIZE, tuple(range(8)), 1, "")
        assert Network(HARDWARE["h100"], devices).seconds(collective) == pytest.approx(share * SIZE / 4.5e11)


@pytest.mark.parametrize(
    "kind, members, expected",
    [
        # 4 hosts of 8 H100: NVLink 450 GB/s, InfiniBand 50 GB/s per GPU.
        # All GPUs: 7 / 8 over NVLink takes longer than 3 / 4 / 8 over InfiniBand; with two GPUs of each host, shorter.
        ("all-gather", range(32), 7 / 8 * SIZE / 4.5e11),
        ("reduce-scatter", (0, 1, 8, 9, 16, 17, 24, 25), 3 / 4 * SIZE / 2 / 5e10),
        ("all-reduce", (0, 1, 8, 9, 16, 17, 24, 25), 2 * 3 / 4 * SIZE / 2 / 5e10),
        ("all-gather", range(0, 32, 8), 3 / 4 * SIZE / 5e10),  # one GPU of each host
        ("all-gather", range(8, 16), 7 / 8 * SIZE / 4.5e11),  # all GPUs of one host
        ("all-to-all", range(32), 24 / 32 * SIZE / 5e10),
        ("all-to-all", range(16), 8 / 16 * SIZE / 5e10),
        ("collective-permute", (0, 1, 1, 2), SIZE / 4.5e11),
        ("collective-permute", (0, 1, 7, 8), SIZE / 5e10),  # one pair crosses
    ],
)
def test_groups_that_span_hosts_take_the_longer_of_both_networks(kind, members, expected):
    devices = [SimpleNamespace(process_index=number // 8) for number in range(32)]
    collective = Collective(kind, ("x",), SIZE, tuple(members), 1, "")
    assert Network(HARDWARE["h100"], devices).seconds(collective) == pytest.approx(expected)


def test_kernels_run_one_after_the_other_and_asynchronous_copies_next_to_them():
    peak, float32, hbm = 989e12, 494e12, 3.35e12
    ms = 1e-3
    kernels = (
        Kernel("a", "Triton product", 2 * ms * peak, 1 * ms * hbm, "bf16"),  # 2 ms; 1 of HBM
        Kernel("b", "cuBLAS product", 1 * ms * float32, 0.5 * ms * hbm, "f32"),  # 1 ms at float32's peak
        Kernel("c", "Triton product", 1 * ms * peak, 3 * ms * hbm, "bf16"),  # 3 ms of HBM
        Kernel("d", "other", 0.0, 0.5 * ms * hbm),
        Kernel("e", "copy", 0.0, 1 * ms * hbm, overlaps=True),  # 6 ms of HBM in all, below 6.5 of kernels
    )
    devices = [SimpleNamespace()]
    program = Program((Body("loop", 3, kernels),), (), ())
    times = model_times(program, HARDWARE["h100"], peak, devices)
    assert (times.compute, times.hbm) == pytest.approx((3 * 3 * ms, 3 * 3.5 * ms))
    assert times.kernels == pytest.approx({"Triton product": 15 * ms, "cuBLAS product": 3 * ms, "other": 1.5 * ms})
    # One maximum over the body would give 3 x 6 ms.
    assert times.serial == times.overlapped == pytest.approx(19.5 * ms)
    below = model_times(program, HARDWARE["h100"], peak, devices, 0.7)
    assert below.serial == pytest.approx(3 * (2 / 0.7 + 1 / 0.7 + 3 + 0.5) * ms)
    copies = Body("copies", 1, (*kernels, Kernel("f", "copy", 0.0, 2 * ms * hbm, overlaps=True)))  # 8 ms of HBM
    times = model_times(Program((copies,), (), ()), HARDWARE["h100"], peak, devices)
    assert times.serial == pytest.approx(8 * ms) and times.kernels["exposed copies"] == pytest.approx(1.5 * ms)


def test_a_step_takes_the_sum_or_the_maximum_of_its_parts():
    peak, hbm = 1e14, 2.765e12
    products = Kernel("a", "product", 1e12, 0, "bf16"), Kernel("b", "product", 1e10, hbm / 100, "bf16")
    bodies = Body("a", 1, products[:1]), Body("b", 4, products[1:])  # 10 ms of FLOPs; 4 x 10 ms of HBM, not 4 x 0.1
    one = Collective("all-reduce", ("data",), LINK / 100, (0, 1), 3, "")  # a line of 2: 2 x 1/2 x 10 ms
    two = Collective("all-gather", ("data",), LINK / 100, (0, 1), 1, "")  # 5 ms
    times = model_times(Program(bodies, (one, two), ()), HARDWARE["v5p"], peak, chips(2, 2, 1)[::2])
    assert (times.compute, times.hbm) == pytest.approx((0.01, 0.04))
    assert times.collectives == pytest.approx({"all-reduce over data": 0.03, "all-gather over data": 0.005})
    assert (times.serial, times.overlapped) == pytest.approx((0.085, 0.05))
    assert (times.bound, times.overlapped_bound) == ("HBM", "HBM")
    slow = Program(bodies[:1], (one, two), ())
    times = model_times(slow, HARDWARE["v5p"], peak, chips(2, 2, 1)[::2])
    assert times.overlapped == pytest.approx(0.035)
    assert times.overlapped_bound == "all-reduce over data"
