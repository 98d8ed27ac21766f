"""Modeled time of a step, from the work of its program (`program.py`) and the device's figures (`cost/hardware.py`).

A body takes the larger of FLOPs / peak and HBM bytes / bandwidth. A collective of B bytes over n chips:

    all-gather, reduce-scatter   (n - 1) / n x B / bandwidth         each chip receives, or sends, all but its own part
    all-reduce                   twice that
    all-to-all                   B / 4 x size / bandwidth            of the slowest dimension, see below
    collective-permute           B x hops / bandwidth of one link

The chips of a group extend along one or more dimensions of the torus, by their coordinates. A dimension gives each chip
two links if it is a ring and the group covers all of it, else one, because the chip at the end of a line has no more.
Chips at a distance of `stride` share their links with the groups between them, which divides the bandwidth by `stride`.
Gathers and reductions use the links of all dimensions at once. An all-to-all sends B / n from each chip to each: in a
ring of n, a message travels n / 4 links on average, so n chips x B x n / 4 pass over 2 n links; on a line, the middle
link carries n / 2 x n / 2 x B / n in each direction. Both are B / 4 x n / (links x bandwidth); other dimensions carry
their own share at the same time. A group whose coordinates do not form a box is modeled with one link for each chip.

Between slices, where XLA has separate collectives (an all-reduce over both becomes a reduce-scatter in each slice, an
all-reduce between slices and an all-gather), the same formulas hold for n slices and a chip's share of the data-center
network; an all-to-all sends (n - 1) / n of its bytes there.

Latency and contention between collectives are not modeled: on hundreds of chips, small collectives take longer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax

from mot_jax.cost.hardware import Hardware
from mot_jax.planning.program import SLICES, Collective, Program


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
            share = {"all-to-all": (n - 1) / n, "collective-permute": 1.0}.get(kind, _ring_share(kind, n))
            return size * share / self.hardware.dcn_bandwidth
        return self._ici(kind, size, list(collective.members))

    def _ici(self, kind: str, size: float, members: list[int]) -> float:
        bandwidth, n = self.hardware.link_bandwidth, len(members)
        if kind == "collective-permute":
            return size * self._hops(*members[:2]) / bandwidth
        dimensions = self._links(members)
        if dimensions is None:
            share = _ring_share(kind, n) if kind != "all-to-all" else (n - 1) / n
            return size * share / bandwidth
        if kind == "all-to-all":
            return max(size / 4 * length / (links * bandwidth) for length, links in dimensions)
        return size * _ring_share(kind, n) / (bandwidth * sum(links for _, links in dimensions))

    def _links(self, members: list[int]) -> list[tuple[int, float]] | None:
        """(length, links per chip) for each dimension of the torus that a group extends along; None if it is no box."""
        lines = [sorted(set(at)) for at in zip(*(self.coords[m] for m in members), strict=True)]
        if math.prod(map(len, lines)) != len(members) or not lines:
            return None
        dimensions = []
        for line, size, closed in zip(lines, self.torus, self.hardware.rings(self.torus), strict=True):
            if len(line) > 1:
                stride = max(b - a for a, b in itertools.pairwise(line))
                ring = closed and size > 2 and len(line) * stride == size
                dimensions.append((len(line), (2 if ring else 1) / stride))
        return dimensions

    def _hops(self, a: int, b: int) -> int:
        if not self.torus:
            return 1
        total = 0
        for x, y, size, closed in zip(
            self.coords[a], self.coords[b], self.torus, self.hardware.rings(self.torus), strict=True
        ):
            total += min(abs(x - y), size - abs(x - y)) if closed else abs(x - y)
        return max(total, 1)


def _ring_share(kind: str, n: int) -> float:
    return (2 if kind == "all-reduce" else 1) * (n - 1) / n


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
