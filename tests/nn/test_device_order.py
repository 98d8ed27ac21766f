"""The order of devices on tori and on hosts of GPUs, and its modeled time."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import mesh_utils

from mot_jax.config import load_config
from mot_jax.cost.hardware import HARDWARE
from mot_jax.nn import sharding
from mot_jax.nn.device_order import Traffic, _Layout, _layouts, _torus, arrange
from mot_jax.planning.program import Collective
from mot_jax.planning.times import Network
from mot_jax.runtime.network import torus_dimensions

AXES = 4


def chips(*sizes: int, kind: str = "v5p", first: int = 0, slice_index: int | None = None) -> list:
    """The TPU chips of a slice, in JAX's order: hosts of 2 x 2 chips, the first coordinate varying fastest."""
    places = [(x, y, z) for z, y, x in itertools.product(*map(range, reversed([*sizes, 1][:3])))]
    places.sort(key=lambda at: (at[2], at[1] // 2, at[0] // 2, at[1], at[0]))
    return [
        SimpleNamespace(
            id=first + i,
            platform="tpu",
            coords=list(at),
            core_on_chip=0,
            device_kind=HARDWARE[kind].device_kind,
            process_index=i // 4,
            slice_index=slice_index,
        )
        for i, at in enumerate(places)
    ]


def chips_of_two(*sizes: int) -> list:
    """The devices of a slice of TPU7x, in JAX's order."""
    return [
        SimpleNamespace(**{**vars(chip), "id": 2 * chip.id + core, "core_on_chip": core})
        for chip in chips(*sizes, kind="tpu7x")
        for core in (0, 1)
    ]


def gpus(hosts: int, gpus_per_host: int, processes_per_host: int = 1) -> list:
    per_process = gpus_per_host // processes_per_host
    return [
        SimpleNamespace(
            id=i, platform="gpu", device_kind="H100", process_index=i // per_process, slice_index=i // gpus_per_host
        )
        for i in range(hosts * gpus_per_host)
    ]


def milliseconds(array: np.ndarray, traffic: list[Traffic], kind: str = "v5p") -> float:
    """By the model of `mot plan`, of the devices' coordinates."""
    numbers, network = np.arange(array.size).reshape(array.shape), Network(HARDWARE[kind], list(array.ravel()))
    total = 0.0
    for name, axes, size in traffic:
        group = numbers[tuple(slice(None) if axis in axes else 0 for axis in range(AXES))].ravel()
        total += network.seconds(Collective(name, (), size, tuple(group.tolist()), 1, ""))
    return 1e3 * total


def pod(batch_size: int, *sizes: int) -> tuple[tuple[int, ...], list[Traffic]]:
    """Sizes of the mesh, and traffic, of the config for 512 chips on a slice of these sizes."""
    config = load_config("configs/pods/mot_20b_v5p_512.py")
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=batch_size))
    mesh = sharding._axis_sizes(config.mesh, math.prod(sizes))
    return mesh, sharding._traffic(config, mesh)


def test_the_traffic_of_a_pod_is_that_of_its_compiled_program():
    """4,608 MiB of all-to-alls, 1,152 MiB of experts' gradients and 1,956 MiB of others (docs/notes, 26 November)."""
    sizes, traffic = pod(2048, 8, 8, 8)
    by_kind = {(kind, axes): sum(b for k, a, b in traffic if (k, a) == (kind, axes)) for kind, axes, _ in traffic}
    assert sizes == (16, 1, 32, 1)
    assert by_kind["all-to-all", (2,)] == 4608 * 2**20 and by_kind["all-reduce", (0,)] == 1152 * 2**20
    assert by_kind["all-reduce", (0, 2)] == pytest.approx(1956 * 2**20, rel=0.01)
    assert len(by_kind) == 3


def test_the_traffic_of_a_dense_model():
    """Per block 4 D^2 of attention and 2 D F, in float32, and two tables V D: gathered twice, and summed once."""
    config = load_config("configs/demo.py:dense")
    m = config.model
    blocks = 4 * m.num_blocks * (4 * m.d_model**2 + 2 * m.d_model * m.d_ff)
    tables = 4 * 2 * m.vocab_size * m.d_model
    assert sharding._traffic(config, (2, 2, 1, 1)) == [
        ("all-gather", (1,), 2 * (blocks + tables)),
        ("reduce-scatter", (1,), blocks + tables),
        ("all-reduce", (0,), (blocks + tables) / 2),
    ]


@pytest.mark.parametrize("capacity_factor, sums", [(1.25, 1), (None, 4)])
def test_the_traffic_of_experts_without_a_capacity_has_a_sum_per_microbatch(capacity_factor, sums):
    config = load_config("configs/demo.py:token_choice")
    kind = dataclasses.replace(config.model.feed_forward, capacity_factor=capacity_factor)
    model, training = config.model, dataclasses.replace(config.training, gradient_accumulation_steps=4)
    config = dataclasses.replace(config, model=dataclasses.replace(model, feed_forward=kind), training=training)
    blocks = sum(layer == model.feed_forward for layer in model.block_kinds())
    weights = 4 * blocks * kind.num_experts * 2 * model.d_model * kind.hidden_dim(model.d_ff)
    traffic = {(kind, axes): size for kind, axes, size in sharding._traffic(config, (2, 1, 4, 1))}
    assert traffic["all-reduce", (0,)] == sums * weights / 4


def test_two_thousand_chips_communicate_as_fast_as_five_hundred():
    """Per chip the work is the same; JAX's order takes 1.7 times as long, on a ring of 16 x 2 chips."""
    times = {}
    for batch_size, torus in ((2048, (8, 8, 8)), (8192, (8, 16, 16)), (8192, (16, 16, 8))):
        sizes, traffic = pod(batch_size, *torus)
        devices = chips(*torus)
        array = arrange(sizes, devices, traffic)
        assert array.shape == sizes and {d.id for d in array.ravel()} == set(range(len(devices)))
        times[torus] = milliseconds(array, traffic)
        group = np.array([device.coords for device in array[0, 0, :, 0]])
        assert sorted(map(len, map(set, group.T.tolist()))) == [1, 4, 8]
    default = milliseconds(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), traffic)
    assert times[8, 16, 16] == pytest.approx(times[16, 16, 8])
    assert times[8, 16, 16] <= 1.05 * times[8, 8, 8] and default > 1.7 * times[8, 8, 8]


def test_where_jax_is_as_fast_its_order_remains():
    sizes, traffic = pod(2048, 8, 8, 8)
    devices = chips(8, 8, 8)
    default = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    np.testing.assert_array_equal(arrange(sizes, devices, traffic), default)


@pytest.mark.parametrize("size", [2, 8])
def test_the_axis_with_most_traffic_has_both_devices_of_a_chip(size):
    devices, sizes = chips_of_two(4, 4, 4), (128 // size, 1, size, 1)
    array = arrange(sizes, devices, [Traffic("all-to-all", (2,), 1e9), Traffic("all-reduce", (0,), 1e8)])
    assert array.shape == sizes and {device.id for device in array.ravel()} == set(range(128))
    assert len({tuple(device.coords) for device in array[0, 0, :, 0]}) == size / 2


def test_older_chips_of_two_cores_have_the_order_of_jax():
    devices = [SimpleNamespace(**{**vars(device), "device_kind": "TPU v3"}) for device in chips_of_two(2, 2, 1)]
    assert _torus(chips_of_two(2, 2, 1)).shape == (2, 2, 1, 2) and _torus(devices) is None


def test_slices_are_along_the_first_axis_and_alike():
    first, second = chips(4, 4, 4, slice_index=0), chips(4, 4, 4, first=64, slice_index=1)
    traffic = [Traffic("all-to-all", (2,), 1e9), Traffic("all-reduce", (0,), 1e8)]
    mixed = [device for pair in zip(second, first, strict=True) for device in pair]
    array = arrange((4, 1, 32, 1), mixed, traffic)
    assert array.shape == (4, 1, 32, 1)
    for index, half in enumerate(np.split(array, 2)):
        assert {device.slice_index for device in half.ravel()} == {index}
    one, other = (np.vectorize(lambda device: device.id)(half) for half in np.split(array, 2))
    np.testing.assert_array_equal(one + 64, other)


@pytest.mark.parametrize("processes_per_host", [1, 8])
@pytest.mark.parametrize(
    "sizes, hosts",
    [  # along each axis, the number of hosts of its groups
        ((8, 1, 8, 1), (8, 1, 1, 1)),
        ((8, 1, 2, 4), (8, 1, 1, 1)),
        ((1, 8, 8, 1), (1, 8, 1, 1)),
        ((4, 4, 4, 1), (4, 2, 1, 1)),
        ((4, 1, 16, 1), (4, 1, 2, 1)),
    ],
)
def test_on_gpus_experts_are_in_one_host_and_data_is_across(sizes, hosts, processes_per_host):
    devices = gpus(8, 8, processes_per_host)
    traffic = [Traffic("all-to-all", (2,), 4e9), Traffic("all-gather", (1,), 2e9), Traffic("all-gather", (3,), 2e9)]
    array = arrange(sizes, devices, [*traffic, Traffic("all-reduce", (0,), 2e8)])
    host = np.vectorize(lambda device: device.slice_index)(array)
    groups = [host[tuple(slice(None) if i == axis else 0 for i in range(AXES))] for axis in range(AXES)]
    assert tuple(len(set(group.ravel().tolist())) for group in groups) == hosts


def test_gpus_are_in_the_order_of_their_numbers():
    array = arrange((2, 1, 4, 2), gpus(2, 8)[::-1], [])
    np.testing.assert_array_equal(np.vectorize(lambda device: device.id)(array).ravel(), np.arange(16))


def test_unknown_coordinates_have_the_order_of_jax():
    missing = chips(4, 4, 4)[:-4]
    assert _torus(missing) is None and _torus(gpus(1, 8)) is None
    two_cores = chips(2, 2, 1)
    two_cores[0].core_on_chip = 1
    assert _torus(two_cores) is None


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([(2, 4), (4, 4), (2, 3, 4)]), st.integers(0, 10**6))
def test_a_layout_has_each_device_once_and_the_lines_of_its_groups(shape, number):
    """`lines` are the coordinates of the devices in `array`, for all axes."""
    count = math.prod(shape)
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    sizes = [divisors[number % len(divisors)]]
    sizes += [math.gcd(count // sizes[0], 2), 1]
    sizes.append(count // math.prod(sizes))
    layouts = list(_layouts(shape, tuple(sizes)))
    layout = layouts[number % len(layouts)]
    assert isinstance(layout, _Layout)
    devices = np.arange(count).reshape(shape)
    array = layout.array(devices)
    assert array.shape == tuple(sizes) and sorted(array.ravel()) == list(range(count))
    for axes in itertools.chain(*(itertools.combinations(range(AXES), n) for n in (1, 2))):
        group = array[tuple(slice(None) if axis in axes else 0 for axis in range(AXES))].ravel()
        places = np.unravel_index(group, shape)
        assert layout.lines(axes) == [sorted(set(at.tolist())) for at in places]


def test_the_networks_dimensions_are_those_of_the_hardware_table():
    for hardware in HARDWARE.values():
        if hardware.dimensions:
            assert {torus_dimensions(kind) for kind in hardware.device_kinds} == {hardware.dimensions}


def test_only_slices_of_tpus_must_be_along_data():
    """JAX gives the GPUs of each host a slice of their own."""
    assert {sharding.slice_of(device) for device in gpus(2, 8)} == {0}
    assert {sharding.slice_of(device) for device in chips(2, 2, 1, slice_index=3)} == {3}
