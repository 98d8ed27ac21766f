"""The table of devices, and names of topologies."""

from __future__ import annotations

import jax
import pytest

from mot_jax.cost.hardware import HARDWARE, hardware_of, parse_topology, peak_flops
from mot_jax.errors import UserError


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 156e12
    assert peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert peak_flops("TPU v5", "bfloat16") == 459e12
    assert peak_flops("NVIDIA H200", "float64") is None
    assert peak_flops("TPU v4 lite", "bfloat16") is None
    assert peak_flops(jax.devices("cpu")[0], "float32") is None
    assert peak_flops("NVIDIA B200", "bfloat16") == 2250e12


@pytest.mark.parametrize("name", HARDWARE)
def test_hardware_of_a_device_includes_its_peak(name, monkeypatch):
    class Device:
        device_kind = HARDWARE[name].device_kind

    assert hardware_of(Device()) is HARDWARE[name]
    assert peak_flops(Device(), "bfloat16") == HARDWARE[name].bfloat16_peak
    monkeypatch.setattr(Device, "device_kind", "NVIDIA H100 PCIe")  # its peak is known, its network is not
    assert hardware_of(Device()) is None and peak_flops(Device(), "bfloat16")


@pytest.mark.parametrize(
    "name, chips", [("v5p:8x8x8", 512), ("v5e:16x16", 256), ("v4:2x2x1", 4), ("tpu7x:4x4x4", 64), ("local:8", 8)]
)
def test_topologies_by_name(name, chips):
    assert parse_topology(name).chips == chips
    if not name.startswith("local"):
        assert parse_topology(name, 2).chips == 2 * chips


@pytest.mark.parametrize(
    "name, hosts, gpus", [("a100", 1, 1), ("h100:8", 1, 8), ("h200:8x8", 8, 8), ("b200:7x2", 7, 2)]
)
def test_topologies_of_gpus_are_hosts_by_gpus(name, hosts, gpus):
    topology = parse_topology(name)
    assert (topology.sizes, topology.chips) == ((hosts, gpus), hosts * gpus)


@pytest.mark.parametrize(
    "name, slices, message",
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
        ("h101:8", 1, "no such topology; did you mean h100|no such topology.*h100"),
        ("h100:9", 1, "up to 8, .*; try h100:8, h100:8x8"),
        ("h100:8x16", 1, "up to 8, "),
        ("h100:0x8", 1, "up to 8, "),
        ("h100:2x8x8", 1, "up to 8, "),
        ("h100:x", 1, "up to 8, "),
        ("h100:8", 2, "GPUs form no slices; try --topology h100:2x8"),
        ("local:x", 1, "try local:8"),
        ("local", 2, "try --slices 1"),
    ],
)
def test_an_impossible_topology_is_refused_in_one_line(name, slices, message):
    with pytest.raises(UserError, match=message) as error:
        parse_topology(name, slices)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, torus, rings",
    [
        ("v5p", (4, 4, 8), (True, True, True)),
        ("v5p", (2, 4, 4), (False, False, False)),
        ("v5e", (8, 16), (False, True)),
    ],
)
def test_dimensions_that_close_to_rings(name, torus, rings):
    assert HARDWARE[name].rings(torus) == rings
