"""Bytes of a run's checkpoint, and those that each host writes and reads."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

BANDWIDTH = 1e9  # bytes per second of one host to and from its storage, for the printed seconds


@dataclasses.dataclass(frozen=True)
class CheckpointBytes:
    """Bytes of a checkpoint.

    total: of all arrays, each element once. written: by the host that writes most. read: by the host that reads most,
    on the mesh that wrote it.
    """

    total: float
    written: float
    read: float

    def rows(self) -> list[tuple[str | float, ...]]:
        """For each number its name, GiB, and the seconds at `BANDWIDTH`."""
        sizes = {"in all": self.total, "written by a host": self.written, "read by a host": self.read}
        seconds = {name: "" if name == "in all" else f"{size / BANDWIDTH:,.1f}" for name, size in sizes.items()}
        return [(name, f"{size / 2**30:,.3f}", seconds[name]) for name, size in sizes.items()]


def checkpoint_bytes(state: Any) -> CheckpointBytes:
    """Count the bytes of a checkpoint of `state`, a tree of arrays or `jax.ShapeDtypeStruct` on a mesh.

    Of a shard that n devices hold, each writes an equal part, if n divides one of its dimensions (Orbax's
    `use_replica_parallel`), else the first of them writes it. To restore it, a host reads each distinct shard of its
    devices once.
    """
    arrays = Counter((x.shape, x.dtype.itemsize, x.sharding) for x in jax.tree.leaves(state))
    written: dict[int, float] = defaultdict(float)
    read: dict[int, float] = defaultdict(float)
    total = 0.0
    for (shape, itemsize, sharding), count in arrays.items():
        total += count * math.prod(shape) * itemsize
        shard_shape = sharding.shard_shape(shape)
        shard_bytes = count * math.prod(shard_shape) * itemsize
        holders = _holders(sharding, shape)
        for hosts in holders.values():
            shared = any(size % len(hosts) == 0 for size in shard_shape)
            writers = hosts if shared else hosts[:1]
            for host in writers:
                written[host] += shard_bytes / len(writers)
            for host in set(hosts):
                read[host] += shard_bytes
    return CheckpointBytes(total, max(written.values()), max(read.values()))


def _holders(sharding: NamedSharding, shape: tuple[int, ...]) -> dict[tuple, list[int]]:
    """The hosts of the devices that hold each shard, by the place of the shard in the array."""
    holders: dict[tuple, list[int]] = defaultdict(list)
    indices: Mapping[Any, Any] = sharding.devices_indices_map(shape)
    for device, index in indices.items():
        holders[tuple(part.start or 0 for part in index)].append(device.process_index)
    return holders
