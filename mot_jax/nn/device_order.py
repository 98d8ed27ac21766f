"""The order of devices in a mesh: that in which the collectives of a training step take least time by the model of
`mot_jax.runtime.network`.

Each mesh axis is a product of factors, each of them a part of one dimension of the physical network: 32 chips of an
8 x 16 x 16 torus can be 8 x 4 x 1 or 2 x 16 x 1 chips. The two devices of a TPU7x chip are one more dimension. All such
factorizations are compared, with each order of the axes within a dimension. JAX's own order
(`jax.experimental.mesh_utils`) is used unless another one is faster by more than 5 %, and where the network is not
known. The result depends only on the arguments, so that all processes of a run agree.

GPUs are in the order of their numbers, in which those of a host follow each other: the last axes are inside a host,
`expert` among them, and `data` is across hosts. Its sums of gradients can overlap with the backward pass, and the
all-to-alls of `expert` cannot. XLA for GPUs supports no other order in all of its passes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils

from mot_jax.runtime.network import torus_dimensions, torus_links, torus_seconds

_TOLERANCE = 1.05  # the model's: differences below it do not change JAX's order


class Traffic(NamedTuple):
    """Bytes of the collectives of one kind over some mesh axes, in a step on one device."""

    kind: str
    axes: tuple[int, ...]
    bytes: float


def arrange(sizes: Sequence[int], devices: Sequence[jax.Device], traffic: Sequence[Traffic]) -> np.ndarray:
    """An array of these devices with the shape `sizes`, for a mesh.

    Args:
        sizes: of the mesh axes. With several slices the first one is across them, outermost.
        devices: as many as there are places.
        traffic: of a step. Axes are indices into `sizes`.

    Raises:
        NotImplementedError, ValueError: if the network is not known and JAX has no order for it.
    """
    if devices[0].platform == "gpu":
        return np.array(sorted(devices, key=lambda device: device.id), object).reshape(tuple(sizes))
    by_slice = defaultdict(list)
    for device in devices:
        by_slice[slice_of(device)].append(device)
    inside = (sizes[0] // len(by_slice), *sizes[1:])
    arrays = [_arrange_slice(inside, by_slice[index], traffic) for index in sorted(by_slice)]
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def slice_of(device: jax.Device) -> int:
    """The TPU slice of a device, of which several are joined by a slower network; 0 for other devices.

    JAX gives GPUs of several hosts different slices, too, but any mesh axis may span hosts.
    """
    return 0 if device.platform == "gpu" else getattr(device, "slice_index", 0) or 0


def _arrange_slice(sizes: tuple[int, ...], devices: list[jax.Device], traffic: Sequence[Traffic]) -> np.ndarray:
    if (torus := _torus(devices)) is None:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)

    def seconds(lines_of: Callable[[tuple[int, ...]], list[list[int]]]) -> float:
        return sum(_seconds(kind, size, lines_of(axes), torus.shape[:-1]) for kind, axes, size in traffic)

    best, layout = min(
        ((seconds(layout.lines), layout) for layout in _layouts(torus.shape, sizes)),
        key=lambda pair: (pair[0], pair[1].number_of_parts()),
    )
    array = layout.array(torus)
    try:
        default = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError):
        return array
    coordinates = {device.id: at for at, device in np.ndenumerate(torus)}

    def lines_of_default(axes: tuple[int, ...]) -> list[list[int]] | None:
        group = default[tuple(slice(None) if axis in axes else 0 for axis in range(len(sizes)))].ravel()
        lines = [sorted(set(at)) for at in zip(*(coordinates[device.id] for device in group), strict=True)]
        return lines if math.prod(map(len, lines)) == len(group) else None

    lines = {axes: lines_of_default(axes) for _, axes, _ in traffic}
    boxes = {axes: value for axes, value in lines.items() if value is not None}
    if len(boxes) == len(lines) and seconds(boxes.__getitem__) <= best * _TOLERANCE:
        return default
    return array


def _torus(devices: list[jax.Device]) -> np.ndarray | None:
    """TPUs by their coordinates in the torus and core on the chip; None if these are not those of a whole torus."""
    if devices[0].platform != "tpu":
        return None
    if devices[0].device_kind != "TPU7x" and any(device.core_on_chip for device in devices):  # v2, v3
        return None
    dimensions = torus_dimensions(devices[0].device_kind)
    coordinates = np.array([(*device.coords[:dimensions], device.core_on_chip) for device in devices])
    coordinates -= coordinates.min(axis=0)
    torus = tuple(int(n) for n in coordinates.max(axis=0) + 1)
    if math.prod(torus) != len(devices) or len(np.unique(coordinates, axis=0)) != len(devices):
        return None
    array = np.empty(torus, object)
    for at, device in zip(coordinates, devices, strict=True):
        array[tuple(at)] = device
    return array


def _seconds(kind: str, size: float, lines: list[list[int]], torus: tuple[int, ...]) -> float:
    """Time of a collective among the devices with these coordinates, the core last, in units of one link's."""
    n, (*lines, cores) = math.prod(map(len, lines)), lines
    return torus_seconds(kind, size, n, torus_links(lines, torus), 1.0, len(cores)) if n > 1 else 0.0


# --- layouts ----------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """factors[d][a]: the part of dimension d that axis a has. order: of axes within a dimension, outermost first."""

    factors: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]

    def number_of_parts(self) -> int:
        return sum(factor > 1 for factors in self.factors for factor in factors)

    def lines(self, axes: tuple[int, ...]) -> list[list[int]]:
        """In each dimension, the coordinates of the devices that differ from the first in these axes only."""
        return [_line(factors, self.order, axes) for factors in self.factors]

    def array(self, devices: np.ndarray) -> np.ndarray:
        """The devices with the mesh axes as dimensions."""
        n, dimensions = len(self.order), range(len(self.factors))
        split = devices.reshape([factors[axis] for factors in self.factors for axis in self.order])
        place = {axis: i for i, axis in enumerate(self.order)}
        split = split.transpose([d * n + place[axis] for axis in range(n) for d in dimensions])
        return split.reshape([math.prod(factors[axis] for factors in self.factors) for axis in range(n)])


@functools.cache
def _line(factors: tuple[int, ...], order: tuple[int, ...], axes: tuple[int, ...]) -> list[int]:
    """`_Layout.lines` in one dimension."""
    line, stride = [0], 1
    for axis in reversed(order):
        if axis in axes:
            line = [at + stride * i for i in range(factors[axis]) for at in line]
        stride *= factors[axis]
    return sorted(line)


def _layouts(shape: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[_Layout]:
    """All layouts of mesh axes of these sizes on the dimensions of a network."""
    large = [axis for axis, size in enumerate(sizes) if size > 1]
    ones = tuple(axis for axis, size in enumerate(sizes) if size == 1)
    for factors in _factorizations(shape, sizes):
        for order in itertools.permutations(large):
            yield _Layout(factors, ones + order)


def _factorizations(shape: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to write each size of `shape` as a product of factors, one an axis, whose products are `sizes`."""
    if not shape:
        yield from [()] if all(size == 1 for size in sizes) else []
        return
    for factors in _products(shape[0], sizes):
        rest = tuple(size // factor for size, factor in zip(sizes, factors, strict=True))
        for others in _factorizations(shape[1:], rest):
            yield (factors, *others)


def _products(number: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All tuples of divisors of `sizes` whose product is `number`."""
    if not sizes:
        yield from [()] if number == 1 else []
        return
    divisor = math.gcd(number, sizes[0])
    for factor in (n for n in range(1, divisor + 1) if divisor % n == 0):
        for others in _products(number // factor, sizes[1:]):
            yield (factor, *others)
