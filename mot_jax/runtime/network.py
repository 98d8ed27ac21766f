"""Seconds of collectives on the networks of accelerators: tori of TPUs, and hosts of GPUs.

On a torus, with B bytes over n chips:

    all-gather, reduce-scatter   (n - 1) / n x B / bandwidth         each chip receives, or sends, all but its own part
    all-reduce                   twice that
    all-to-all                   B / 4 x size / bandwidth            of the slowest dimension, see below

The chips of a group extend along one or more dimensions of the torus, by their coordinates. A dimension gives each chip
two links if it is a ring and the group covers all of it, else one, because the chip at the end of a line has no more.
Chips at a distance of `stride` share their links with the groups between them, which divides the bandwidth by `stride`.
Gathers and reductions use the links of all dimensions at once. An all-to-all sends B / n from each chip to each: in a
ring of n, a message travels n / 4 links on average, so n chips x B x n / 4 pass over 2 n links; on a line, the middle
link carries n / 2 x n / 2 x B / n in each direction. Both are B / 4 x n / (links x bandwidth); other dimensions carry
their own share at the same time.

A chip of TPU7x has two devices, c = 1 or 2 of which are in a group. They share the links of the chip, half of the
bandwidth each, and have a connection of their own. As in hosts of GPUs, below, a gather or reduction passes (c - 1) / c
of B over this connection and B / c over the torus, an all-to-all (c - 1) / n and the rest, in pieces, at the same time.

GPUs of a host are connected by a switch with one link each, hosts by InfiniBand with one port per GPU. A group of n
GPUs in h hosts, g = n / h in each, uses both at the same time, in pieces, and takes the longer of the two:

                                 in the host, NVLink     between hosts, InfiniBand
    all-gather, reduce-scatter   (g - 1) / g x B         (h - 1) / h x B / g
    all-reduce                   twice that              twice that
    all-to-all                   (g - 1) / n x B         (n - g) / n x B

This is the bound of a hierarchical algorithm, in which a GPU exchanges with those of its own place in the other hosts
and then with those of its host.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

# A dimension of a torus is a ring where its size is a multiple of this, by the number of dimensions. In three
# dimensions all sizes must be (cloud.google.com/tpu/docs/v4, /v5p); in two, 16 is a full pod (/v5e, /v6e).
_RING = {2: 16, 3: 4}
_FLAT = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")  # device kinds with a torus of two dimensions

# Bandwidth between the two devices of a chip: that of six links (cloud.google.com/tpu/docs/tpu7x), of each of which a
# device has a half.
CORE_LINKS = 12


def torus_dimensions(device_kind: str) -> int:
    """The number of dimensions of a TPU's torus."""
    return 2 if device_kind in _FLAT else 3


def rings(torus: Sequence[int]) -> tuple[bool, ...]:
    """For each dimension of a slice, given by its sizes, whether it closes to a ring."""
    closed = [size % _RING[len(torus)] == 0 for size in torus]
    return tuple(closed if len(torus) == 2 else [all(closed)] * len(closed))


def torus_links(lines: Sequence[Sequence[int]], torus: Sequence[int]) -> list[tuple[int, float]]:
    """(length, links per chip) of each dimension that a group extends along.

    Args:
        lines: the group's coordinates in each dimension, ascending and without repetition; it has all of their
            combinations.
        torus: sizes of the slice.
    """
    dimensions = []
    for line, size, closed in zip(lines, torus, rings(torus), strict=True):
        if len(line) > 1:
            stride = max(b - a for a, b in itertools.pairwise(line))
            ring = closed and size > 2 and len(line) * stride == size
            dimensions.append((len(line), (2 if ring else 1) / stride))
    return dimensions


def ring_share(kind: str, n: int) -> float:
    """The share of its bytes that each of n devices sends in a gather or a reduction."""
    return (2 if kind == "all-reduce" else 1) * (n - 1) / n


def torus_seconds(
    kind: str, size: float, n: int, dimensions: list[tuple[int, float]], bandwidth: float, cores: int = 1
) -> float:
    """Seconds of a collective of `size` bytes over n devices.

    Args:
        kind: `all-gather`, `reduce-scatter`, `all-reduce` or `all-to-all`.
        size: B.
        n: number of devices.
        dimensions: the result of `torus_links`.
        bandwidth: bytes per second of one device's share of a link in one direction.
        cores: devices of the group in each of its chips.
    """
    core = CORE_LINKS * bandwidth
    if kind == "all-to-all":
        torus = [size / 4 * length / (links * bandwidth) for length, links in dimensions]
        return max(size * (cores - 1) / n / core, *torus, 0.0)
    inside, links = size * ring_share(kind, cores) / core, sum(links for _, links in dimensions)
    return max(inside, size / cores * ring_share(kind, n // cores) / (bandwidth * links)) if links else inside


def hosts_seconds(kind: str, size: float, hosts: int, n: int, gpus: int, inside: float, between: float) -> float:
    """Seconds of a collective of `size` bytes over n GPUs in `hosts` hosts.

    gpus: the most in one host. inside, between: bytes per second of one GPU in one direction, in its host and between
    hosts.
    """
    if kind == "all-to-all":
        return max(size * (gpus - 1) / n / inside, size * (n - gpus) / n / between)
    return max(size * ring_share(kind, gpus) / inside, size / gpus * ring_share(kind, hosts) / between)
