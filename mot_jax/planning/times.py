"""Modeled time of a step, from the work of its program (`program.py`) and the device's figures (`cost/hardware.py`).

A kernel takes the larger of FLOPs / peak and HBM bytes / bandwidth; the kernels of a body run one after the other.
Asynchronous copies, and the memory traffic of collectives, run next to them, so that a body takes at least all its HBM
bytes / bandwidth. float32 products have a peak of their own.

Collectives within a slice, or of GPUs, take the time of `mot_jax.runtime.network`, by which the order of devices is
chosen, too; that of their slowest group. A group of TPUs whose coordinates do not form a box is modeled with one link
for each chip, and in an uneven group of GPUs the host with most members counts. A permutation of B bytes takes B x
hops / bandwidth of one link, between the two devices of a chip B / bandwidth of their connection, and between hosts of
GPUs B / bandwidth of a port.

Between slices, where XLA has separate collectives (an all-reduce over both becomes a reduce-scatter in each slice, an
all-reduce between slices and an all-gather), the same formulas hold for n slices and a chip's share of the data-center
network; an all-to-all sends (n - 1) / n of its bytes there.

Latency and contention between collectives are not modeled: on hundreds of chips, small collectives take longer.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import jax

from mot_jax.cost.hardware import Hardware
from mot_jax.planning.program import SLICES, Collective, Program
from mot_jax.runtime.network import CORE_LINKS, hosts_seconds, ring_share, torus_links, torus_seconds


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds of a step on one chip.

    compute, hbm: of the kernels that are bound by FLOPs and by HBM bandwidth. collectives: by kind and axes. serial: if
    nothing overlaps. overlapped: if all collectives overlap with all computation. bound, overlapped_bound: the largest
    contribution to each. kernels: of compute and hbm together, by kind of kernel, and `exposed copies`.
    """

    compute: float
    hbm: float
    collectives: dict[str, float]
    serial: float
    overlapped: float
    bound: str
    overlapped_bound: str
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)


class Network:
    """The links between devices, which are given in the mesh's order."""

    def __init__(self, hardware: Hardware, devices: list[jax.Device]):
        self.hardware = hardware
        dimensions = hardware.dimensions
        self.hosts = [getattr(device, "process_index", 0) for device in devices]
        self.coords = [tuple(device.coords)[:dimensions] if dimensions else () for device in devices]
        self.cores = [getattr(device, "core_on_chip", 0) for device in devices]
        self._seconds: dict[Any, float] = {}
        self.torus = tuple(max(at) + 1 for at in zip(*self.coords, strict=True)) if dimensions else ()

    def seconds(self, collective: Collective) -> float:
        """Seconds of one execution."""
        kind, size, n = collective.kind, collective.bytes, len(collective.members)
        if collective.axes == (SLICES,):
            share = {"all-to-all": (n - 1) / n, "collective-permute": 1.0}.get(kind, ring_share(kind, n))
            return size * share / self.hardware.dcn_bandwidth
        key = (kind, size, collective.members, collective.others)
        if key not in self._seconds:
            model = self._ici if self.torus else self._switches
            self._seconds[key] = max(model(kind, size, group) for group in (collective.members, *collective.others))
        return self._seconds[key]

    def _switches(self, kind: str, size: float, members: tuple[int, ...]) -> float:
        """GPUs: the longer of the transfers in hosts and between them."""
        hosts, n = [self.hosts[member] for member in members], len(members)
        inside, between = self.hardware.link_bandwidth, self.hardware.dcn_bandwidth
        if kind == "collective-permute":
            crosses = any(a != b for a, b in zip(hosts[::2], hosts[1::2], strict=True))
            return size / (between if crosses else inside)
        g, h = max(collections.Counter(hosts).values()), len(set(hosts))
        return hosts_seconds(kind, size, h, n, g, inside, between)

    def _ici(self, kind: str, size: float, members: tuple[int, ...]) -> float:
        bandwidth, n = self.hardware.link_bandwidth, len(members)
        if kind == "collective-permute":
            hops = max(map(self._hops, members[::2], members[1::2]))
            return size / bandwidth * (hops or 1 / CORE_LINKS)
        lines = [sorted(set(at)) for at in zip(*(self.coords[m] for m in members), strict=True)]
        cores = len({self.cores[m] for m in members})
        if cores * math.prod(map(len, lines)) != n:
            share = ring_share(kind, n) if kind != "all-to-all" else (n - 1) / n
            return size * share / bandwidth
        return torus_seconds(kind, size, n, torus_links(lines, self.torus), bandwidth, cores)

    def _hops(self, a: int, b: int) -> int:
        """Links from chip to chip; 0 between devices of one chip."""
        total = 0
        for x, y, size, closed in zip(
            self.coords[a], self.coords[b], self.torus, self.hardware.rings(self.torus), strict=True
        ):
            total += min(abs(x - y), size - abs(x - y)) if closed else abs(x - y)
        return total


def model_times(
    program: Program, hardware: Hardware, peak: float, devices: list[jax.Device], share_of_peak: float = 1.0
) -> StepTimes:
    """Model the time of a step.

    Args:
        program: of the step.
        hardware: of the devices.
        peak: FLOP/s of one chip for products of the model's dtype; those of float32 have the peak in `hardware`.
        devices: of the mesh, flattened.
        share_of_peak: share of the peak that products reach.

    Returns:
        Seconds on one chip.
    """
    network = Network(hardware, devices)
    parts, kernels = {"compute": 0.0, "HBM": 0.0}, dict[str, float]()

    def add(part: str, kind: str, seconds: float) -> None:
        parts[part] += seconds
        kernels[kind] = kernels.get(kind, 0.0) + seconds

    for body in program.bodies:
        busy = 0.0
        for kernel in body.kernels:
            kernel_peak = min(peak, hardware.float32_peak) if kernel.dtype == "f32" else peak
            compute = kernel.flops / (kernel_peak * share_of_peak)
            hbm = kernel.hbm_bytes / hardware.hbm_bandwidth
            if not kernel.overlaps:
                busy += max(compute, hbm)
                add("compute" if compute >= hbm else "HBM", kernel.kind, body.executions * max(compute, hbm))
        exposed = body.hbm_bytes / hardware.hbm_bandwidth - busy
        if exposed > 0:
            add("HBM", "exposed copies", body.executions * exposed)
    collectives: dict[str, float] = {}
    for collective in program.collectives:
        name, seconds = label(collective), collective.executions * network.seconds(collective)
        collectives[name] = collectives.get(name, 0.0) + seconds
    chip, net = sum(parts.values()), sum(collectives.values())
    all_parts = {**parts, **collectives}
    longer = collectives if net > chip else parts
    return StepTimes(
        compute=parts["compute"],
        hbm=parts["HBM"],
        collectives=collectives,
        serial=chip + net,
        overlapped=max(chip, net),
        bound=max(all_parts, key=all_parts.__getitem__, default="nothing"),
        overlapped_bound=max(longer, key=longer.__getitem__, default="nothing"),
        kernels=kernels,
    )


def label(collective: Collective) -> str:
    """Kind and axes, such as `all-reduce over data x expert`."""
    return f"{collective.kind} over {' x '.join(collective.axes) or 'other groups'}"
