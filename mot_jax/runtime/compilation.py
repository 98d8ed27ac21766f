"""The persistent cache of compiled programs, and the options of JAX under which programs are traced."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mot_jax.runtime.paths import DATA_DIRECTORY

if TYPE_CHECKING:
    from jax.sharding import Mesh

MAX_CACHE_BYTES = 10 * 10**9


def enable_cache() -> None:
    """Cache programs that took more than a second to compile in ~/.cache/mot_jax/compiled.

    Nothing happens if JAX_COMPILATION_CACHE_DIR names another directory, if this one cannot be written, or without a
    home directory: in a temporary one, other users could replace programs. Beyond 10 GB the least recently used
    programs are removed. Call it before JAX is imported, which reads the variable then;
    JAX_ENABLE_COMPILATION_CACHE=false disables the cache. The key of a program is its text, the options and versions
    that compiled it, and the kind of device.
    """
    directory = Path(os.path.expanduser(DATA_DIRECTORY)) / "compiled"
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not directory.is_absolute():
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(directory, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
        _evict(directory)


_TRACING = ("JAX_ENABLE_X64", "JAX_NUMPY_RANK_PROMOTION", "JAX_NUMPY_DTYPE_PROMOTION")


def ignore_tracing_variables() -> None:
    """Remove the variables that change dtypes and promotion from this process's environment, before JAX reads them.

    For commands, whose numbers then do not depend on the user's environment. Optax and Flax promote, too.
    """
    for name in _TRACING:
        os.environ.pop(name, None)


@contextlib.contextmanager
def default_tracing() -> Iterator[None]:
    """Trace with JAX's default dtypes and promotion, whatever the options of the program that uses this library."""
    import jax

    with jax.enable_x64(False), default_promotion():
        yield


@contextlib.contextmanager
def default_promotion() -> Iterator[None]:
    """Trace with JAX's default promotion of ranks and dtypes: for layers in a program that refuses it in its own code.

    Backward passes need it as well: JAX traces them after the layer has returned.
    """
    import jax

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def disable_cache_for_cpu_mesh(mesh: Mesh) -> None:
    """Disable the cache for the rest of this process if the mesh has more than one CPU device.

    Cached CPU programs lose the order of their collectives (jaxlib 0.10.2): one device waits in the first of two
    collectives while the others wait in the second, until XLA aborts the process.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX has read the option already if anything was compiled


def _evict(directory: Path) -> None:
    """Remove the least recently used programs beyond the limit.

    JAX's own limit is not used: it locks every read, and fails on entries that were written without it.
    """
    with contextlib.suppress(OSError):  # another process may remove the same files
        programs = [(path.stat(), path) for path in directory.glob("*-cache")]
        programs.sort(key=lambda program: max(program[0].st_atime, program[0].st_mtime), reverse=True)
        total = 0
        for status, path in programs:
            total += status.st_size
            if total > MAX_CACHE_BYTES:
                path.unlink(missing_ok=True)
