"""The memory allocator of a process that computes on CPUs."""

from __future__ import annotations

import contextlib
import ctypes

from mot_jax.runtime import platforms

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def retain_freed_memory() -> None:
    """Make glibc's malloc retain freed memory for the next array, if JAX has only CPU devices.

    By default glibc returns large blocks to the system at once, and every step has the system map and zero their pages
    again. Call this before JAX starts its threads: the arena of a thread has no room for large blocks. Nothing happens
    where there may be an accelerator, or no glibc.
    """
    if not platforms.only_cpus():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(option, value)


def release_freed_memory() -> None:
    """Return freed memory to the system, also that between blocks in use. Nothing happens where there is no glibc.

    For after large temporary arrays: retained blocks that are split among small ones would let the process grow.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
