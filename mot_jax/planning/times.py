"""Modeled time of a step, from the work of its program (`program.py`) and the device's figures (`cost/hardware.py`).

A body takes the larger of FLOPs / peak and HBM bytes / bandwidth. Collectives within a slice take the time of
`mot_jax.runtime.network`, by which the order of devices is chosen, too. A group whose coordinates do not form a box is
modeled with one link for each chip. A permutation of B bytes takes B x hops / bandwidth of one link.

Between slices, where XLA has separate collectives (an all-reduce over both becomes a reduce-scatter in each slice, an
all-reduce between slices and an all-gather), the same formulas hold for n slices and a chip's share of the data-center
network; an all-to-all sends (n - 1) / n of its bytes there.

Latency and contention between collectives are not modeled: on hundreds of chips, small collectives take longer.
"""

from __future__ import annotations

import dataclasses
import math

import jax

from mot_jax.cost.hardware import Hardware
from mot_jax.planning.program import SLICES, Collective, Program
from mot_jax.runtime.network import ring_share, torus_links, torus_seconds


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds of a step on one chip.

    compute, hbm: of the bodies that are bound by FLOPs and by HBM bandwidth. collectives: by kind and axes. serial: if
    nothing overlaps. overlapped: if all collectives overlap with all computation. bound, overlapped_bound: the largest
    contribution to each.
    """

    compute: float
    hbm: float
    collectives: dict[str, float]
    serial: float
    overlapped: float
    bound: str
    overlapped_bound: str


class Network:
    """The links between devices, which are given in the mesh's order."""

    def __init__(self, hardware: Hardware, devices: list[jax.Device]):
        self.hardware = hardware
        dimensions = hardware.dimensions
        self.coords = [tuple(device.coords)[:dimensions] if dimensions else () for device in devices]
        self.torus = tuple(max(at) + 1 for at in zip(*self.coords, strict=True)) if dimensions else ()

    def seconds(self, collective: Collective) -> float:
        """Seconds of one execution."""
        kind, size, n = collective.kind, collective.bytes, len(collective.members)
        if collective.axes == (SLICES,):
            share = {"all-to-all": (n - 1) / n, "collective-permute": 1.0}.get(kind, ring_share(kind, n))
            return size * share / self.hardware.dcn_bandwidth
        return self._ici(kind, size, list(collective.members))

    def _ici(self, kind: str, size: float, members: list[int]) -> float:
        bandwidth, n = self.hardware.link_bandwidth, len(members)
        if kind == "collective-permute":
            return size * self._hops(*members[:2]) / bandwidth
        lines = [sorted(set(at)) for at in zip(*(self.coords[m] for m in members), strict=True)]
        if math.prod(map(len, lines)) != len(members) or not lines:
            share = ring_share(kind, n) if kind != "all-to-all" else (n - 1) / n
            return size * share / bandwidth
        return torus_seconds(kind, size, n, torus_links(lines, self.torus), bandwidth)

    def _hops(self, a: int, b: int) -> int:
        if not self.torus:
            return 1
        total = 0
        for x, y, size, closed in zip(
            self.coords[a], self.coords[b], self.torus, self.hardware.rings(self.torus), strict=True
        ):
            total += min(abs(x - y), size - abs(x - y)) if closed else abs(x - y)
        return max(total, 1)


def model_times(program: Program, hardware: Hardware, peak: float, devices: list[jax.Device]) -> StepTimes:
    """Model the time of a step. peak: FLOP/s of one chip. devices: of the mesh, flattened."""
    network = Network(hardware, devices)
    parts = {"compute": 0.0, "HBM": 0.0}
    for body in program.bodies:
        compute, hbm = body.flops / peak, body.hbm_bytes / hardware.hbm_bandwidth
        parts["compute" if compute >= hbm else "HBM"] += body.executions * max(compute, hbm)
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
    )


def label(collective: Collective) -> str:
    """Kind and axes, such as `all-reduce over data x expert`."""
    return f"{collective.kind} over {' x '.join(collective.axes) or 'other groups'}"
