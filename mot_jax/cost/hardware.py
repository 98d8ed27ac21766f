"""What a chip and its network can do: the one table, with sources.

Peaks of matrix products stand in `accounting.peak_flops`. Bandwidths are bytes per second. Sources:
    [cloud] Google Cloud documentation, cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, tables of specifications;
    [book] "How to Scale Your Model", jax-ml.github.io/scaling-book, part 2 ("How to think about TPUs"), table of ICI
        and DCN bandwidths. Its one-way 90 GB/s a link on v5p is what is reached of the 1,200 GB/s that [cloud] gives
        for six links in both directions (100 each way); the others likewise;
    [libtpu] what libtpu 0.0.42 says is available when a program does not fit, which is a little less than [cloud].
"""

from __future__ import annotations

import dataclasses
import re

from mot_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One generation.

    dimensions: of the torus, 0 for a switch that every chip has one link to. hbm_bytes: what programs may use.
    link_bandwidth: of one link in one direction; dcn_bandwidth: of one chip's share of the data-center network, in one
    direction. chips: of the largest slice. ring: a dimension of the torus closes to a ring where it is a multiple of
    this (of 16: a full pod); in three dimensions all must be.
    """

    name: str
    device_kind: str
    dimensions: int
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    chips: int
    ring: int

    def rings(self, torus: tuple[int, ...]) -> tuple[bool, ...]:
        """Of each dimension of a slice, whether it closes to a ring."""
        closed = [size % self.ring == 0 for size in torus]
        return tuple(closed if self.dimensions == 2 else [all(closed)] * len(closed))


_GIB = 2**30
HARDWARE = {
    hardware.name: hardware
    for hardware in (
        # HBM [libtpu] and bandwidth [cloud]; ICI and DCN [book]. Rings [cloud]: "each dimension is a multiple of 4".
        Hardware("v4", "TPU v4", 3, 30.75 * _GIB, 1.2e12, 4.5e10, 3.1e9, 4096, 4),
        Hardware("v5e", "TPU v5 lite", 2, 15.75 * _GIB, 8.19e11, 4.5e10, 3.1e9, 256, 16),
        Hardware("v5p", "TPU v5", 3, 95.74 * _GIB, 2.765e12, 9e10, 6.25e9, 6144, 4),
        Hardware("v6e", "TPU v6 lite", 2, 31.25 * _GIB, 1.638e12, 9e10, 12.5e9, 256, 16),
        # NVIDIA H100 data sheet, SXM: HBM3 3.35 TB/s, NVLink 900 GB/s in both directions, 80 GB. One host: no DCN.
        Hardware("h100", "NVIDIA H100 80GB HBM3", 0, 79.6 * _GIB, 3.35e12, 4.5e11, 0.0, 8, 1),
    )
}
KNOWN = "v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16 (any even sizes up to the largest slice), local, local:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine by name. hardware: None for `local`, whose devices say what they are. count: chips of one slice."""

    name: str
    hardware: Hardware | None
    sizes: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int | None:
        """Of all slices; None for `local` without a number."""
        total = self.slices if self.sizes else None
        for size in self.sizes:
            total = (total or 1) * size
        return total


def parse_topology(text: str, slices: int = 1) -> Topology:
    """`v5p:8x8x8`, `local` or `local:8`. Raises UserError."""
    name, _, sizes_text = text.partition(":")
    sizes = tuple(int(size) for size in sizes_text.split("x")) if re.fullmatch(r"\d+(x\d+)*", sizes_text) else ()
    if name == "local":
        if slices != 1:
            raise UserError(f"--slices = {slices}: the devices that are here are one slice; try --slices 1")
        if len(sizes) > 1 or bool(sizes) != bool(sizes_text) or 0 in sizes:
            raise UserError(f"--topology = {text}: a number of devices may follow local; try local:8")
        return Topology(text, None, sizes, 1)
    tpus = [known for known, hardware in HARDWARE.items() if hardware.dimensions]
    if name not in tpus:
        raise UserError(f"--topology = {text}: no such topology{nearest(name, tpus)}; known: {KNOWN}")
    hardware = HARDWARE[name]
    example = f"{name}:{'x'.join(['4'] * hardware.dimensions)}"
    if len(sizes) != hardware.dimensions:
        raise UserError(f"--topology = {text}: {name} has {hardware.dimensions} dimensions; try {example}")
    topology = Topology(text, hardware, sizes, slices)
    if any(size < 1 or size % 2 for size in sizes[:2]) or 0 in sizes:
        raise UserError(f"--topology = {text}: a host holds 2x2 chips, so the first two sizes are even; try {example}")
    if (count := (topology.chips or 0) // slices) > hardware.chips:
        raise UserError(f"--topology = {text}: {count} chips; the largest slice has {hardware.chips}; try {example}")
    return topology
