"""The mesh, and the one table from dimension and parameter names to mesh axes.

All axes are Explicit: an array's sharding is part of its type, and a wrong one is an error at trace time. Without a
mesh (`jax.set_mesh`) every function here is a no-op, so that the layers also run as they are in anybody's model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mot_jax.config import Config, ConfigError, MeshConfig, batch_faults

AXES = ("data", "expert")

# The rows of the batch are spread over every device. Between the two exchanges around the experts, each device
# holds the mixtures of all groups of its row of the mesh, but for its own experts alone.
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "rows": ("data", "expert"),
    "groups": ("data", "expert"),
    "exchanged_groups": ("data",),
    "experts": ("expert",),
}
# By the last part of a parameter's name, the dimensions that come after a stack's leading ones. All else is replicated.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "w_in": ("experts", None, None),
    "w_gate": ("experts", None, None),
    "w_out": ("experts", None, None),
}


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None, trains: bool = True) -> jax.sharding.Mesh:
    """The Explicit mesh `data` x `expert` of `config.mesh` over `devices` (default: all).

    Raises ConfigError if the axes do not multiply to the number of devices, or if the experts, or the batch of a config
    that `trains`, do not divide among them.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _sizes(config.mesh, len(devices))
    shards = math.prod(sizes)
    faults = list(batch_faults(config, shards)) if trains else []
    experts = getattr(config.model.feed_forward, "num_experts", None)
    if experts and experts % sizes[1]:
        good = math.gcd(experts, sizes[1])
        faults.append(f"mesh.expert = {sizes[1]}: must divide model.feed_forward.num_experts = {experts}; try {good}")
    if faults:
        raise ConfigError(*faults)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices[:shards])


def _sizes(mesh: MeshConfig, count: int) -> tuple[int, int]:
    known = math.prod(size for size in (mesh.data, mesh.expert) if size != -1)
    if known > count or (-1 in (mesh.data, mesh.expert) and count % known):
        raise ConfigError(
            f"mesh.data = {mesh.data}, mesh.expert = {mesh.expert}: must divide the {count} devices there are; "
            f"try mesh.data = -1, mesh.expert = {math.gcd(count, max(mesh.expert, 1))}"
        )
    return (
        count // known if mesh.data == -1 else mesh.data,
        count // known if mesh.expert == -1 else mesh.expert,
    )


def axis_size(name: str) -> int:
    """The size of a mesh axis where the code runs; 1 where there is none."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def shards(dimension: str) -> int:
    """Into how many parts the mesh cuts a dimension of the table."""
    return math.prod(axis_size(axis) for axis in DIMENSIONS[dimension])


def spec(*dimensions: str | None) -> PartitionSpec | None:
    """The partition of an array with these dimensions (a name of the table, or None) on the mesh that is set.

    None, which leaves the sharding to JAX, where no mesh with our Explicit axes is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = {name for name in AXES if types.get(name) == AxisType.Explicit}
    if not axes:
        return None
    return PartitionSpec(*(tuple(a for a in DIMENSIONS[d] if a in axes) if d else None for d in dimensions))


def reshard(x: jax.Array, *dimensions: str | None) -> jax.Array:
    """`x` moved to the partition of these dimensions: a collective where the devices must exchange."""
    target = spec(*dimensions)
    return x if target is None else jax.reshard(x, target)


def parameter_spec(name: str, rank: int) -> PartitionSpec:
    """The partition of the parameter with this name (`…/w_in`, say); stacked leading dimensions are not split."""
    dimensions = PARAMETERS.get(name.rpartition("/")[2], ())
    leading = (None,) * (rank - len(dimensions))
    return PartitionSpec(*leading, *(DIMENSIONS[d] if d else None for d in dimensions))


def rows_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of arrays whose first dimension is the rows of the batch."""
    return NamedSharding(mesh, PartitionSpec(DIMENSIONS["rows"]))


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, ascending. int [rows]."""
    index = rows_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in index.values()]))


def place_rows(mesh: jax.sharding.Mesh, rows: np.ndarray) -> jax.Array:
    """A global array [B, ...] from the rows [b, ...] that `local_rows` names on each process."""
    return jax.make_array_from_process_local_data(rows_sharding(mesh), rows)
