"""The pages of large arrays are kept, or not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
from mot_jax.runtime import allocator
import jax, jax.numpy as jnp
KEEP
jax.config.update("jax_cpu_enable_async_dispatch", False)  # or else it is chance how many results there are at a time
x, double = jnp.ones(2**24), jax.jit(lambda x: 2 * x)  # 64 MB: 16,384 pages
for _ in range(5):  # at first the heap grows
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        double(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: str) -> int:
    """Page faults of ten products of 64 MB."""
    command = [sys.executable, "-c", FAULTS.replace("KEEP", keep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_what_is_freed_is_kept_for_the_next_array():
    often = faults("")
    assert often > 100_000
    assert faults("allocator.retain_freed_memory()") < often / 10
