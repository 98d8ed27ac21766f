"""Bytes of checkpoints that hosts write and read, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mot_jax.planning.checkpoints import checkpoint_bytes


class Device(NamedTuple):
    id: int
    process_index: int


class OnHosts:
    """The sharding of a mesh whose devices are in hosts of two."""

    def __init__(self, sharding: NamedSharding):
        self.shard_shape, self._map = sharding.shard_shape, sharding.devices_indices_map

    def devices_indices_map(self, shape):
        return {Device(d.id, d.id // 2): index for d, index in self._map(shape).items()}


def test_hosts_share_the_writing_of_replicas_and_read_what_their_devices_hold():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "expert"))

    def array(shape, *spec):
        sharding = OnHosts(NamedSharding(mesh, PartitionSpec(*spec)))
        return SimpleNamespace(shape=shape, dtype=jnp.dtype("float32"), sharding=sharding)

    # Four shards of 2 x 6, each on two devices of different hosts: each writes 1 x 6; a host reads two shards.
    experts = array((8, 6), "expert")
    # On all eight devices; 8 divides the size, so that each writes 2.
    shared = array((16,))
    # 8 does not divide it: the first host writes all.
    scalar = array(())
    result = checkpoint_bytes({"experts": experts, "shared": shared, "step": scalar})
    assert result.total == 4 * (48 + 16 + 1)
    assert result.written == 4 * (12 + 4 + 1)
    assert result.read == 4 * (24 + 16 + 1)
    assert [row[0] for row in result.rows()] == ["in all", "written by a host", "read by a host"]
