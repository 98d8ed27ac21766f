"""The memory allocator of a process that computes on CPUs."""

from __future__ import annotations

import ctypes
import importlib.util
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed() -> None:
    """Retain freed memory for the next array instead of returning it to the system, if JAX has only CPUs.

    glibc returns large blocks at once, and in every step the system would then find and zero their pages again. Call it
    before JAX starts its threads: a thread's own pool has no room for large blocks. Nothing happens where there may be
    an accelerator, or no glibc.
    """
    if not _only_cpus():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(option, value)


def _only_cpus() -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
