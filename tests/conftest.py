"""Eight virtual CPU devices, deterministic property tests, and the fixtures that the test files share."""

import os

# Before JAX wakes up. Another platform named in the environment wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # gcsfs asks over gRPC, which our own store does not speak

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_num_cpu_devices", 8)

# The same examples in every run: a red test is red for everybody. Compilation makes first examples slow.
settings.register_profile(
    "mot_jax",
    deadline=None,
    max_examples=25,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("mot_jax")


@pytest.fixture
def mesh_of():
    """mesh_of(data, expert): the Explicit mesh of that shape over the first data x expert devices."""

    def make(data: int, expert: int) -> jax.sharding.Mesh:
        explicit = (jax.sharding.AxisType.Explicit,) * 2
        devices = jax.devices()[: data * expert]
        return jax.make_mesh((data, expert), ("data", "expert"), axis_types=explicit, devices=devices)

    return make
