"""The allocator: freed pages of large arrays are retained."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
from mot_jax.runtime import allocator
import jax, jax.numpy as jnp
RETAIN
jax.config.update("jax_cpu_enable_async_dispatch", False)  # else the number of results alive at a time varies
x, double = jnp.ones(2**24), jax.jit(lambda x: 2 * x)  # 64 MB: 16,384 pages
for _ in range(5):  # at first the heap grows
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        double(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(retain: str) -> int:
    """Page faults of ten products of 64 MB."""
    command = [sys.executable, "-c", FAULTS.replace("RETAIN", retain)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_freed_memory_is_retained():
    default = page_faults("")
    assert default > 100_000
    assert page_faults("allocator.retain_freed_memory()") < default / 10


RELEASED = """
from mot_jax.runtime import allocator
allocator.retain_freed_memory()
import numpy as np

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

first, large, last = np.ones(2**17), np.ones(2**25), np.ones(2**17)  # the second has 256 MB, with others around it
del large
before = resident()
allocator.release_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_retained_memory_is_returned_on_request():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", RELEASED]
    released = int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert released > 0.9 * 2**28
