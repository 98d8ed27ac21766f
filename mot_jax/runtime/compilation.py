"""What one process has compiled, the next reads back."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mot_jax.runtime.paths import DATA_DIRECTORY

if TYPE_CHECKING:
    from jax.sharding import Mesh

MOST_BYTES = 10 * 10**9  # of programs that are kept


def keep_compiled() -> None:
    """Has JAX keep what took more than a second to compile in ~/.cache/mot_jax/compiled, and look there first.

    Only where JAX_COMPILATION_CACHE_DIR names no other directory, and that one can be written. Beyond 10 GB, what was
    used longest ago is removed. To be called before JAX is imported, which reads the variable then;
    JAX_ENABLE_COMPILATION_CACHE=false turns it off. JAX tells programs apart by their text, the options and versions
    that made them and the kind of device.
    """
    directory = Path(DATA_DIRECTORY).expanduser() / "compiled"
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(directory, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
        _forget(directory)


def compile_anew_for(mesh: Mesh) -> None:
    """From here on this process reads no program back and keeps none, if the mesh has more than one CPU device.

    What XLA reads back for CPUs has lost the order of its collectives (jaxlib 0.10.2): one device waits in the first of
    two for the others, which wait in the second, until XLA gives up and ends the process.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX has looked at the option once, if anything was compiled before


def _forget(directory: Path) -> None:
    """Not by JAX's own limit: that locks every reading, and fails on what was written without it."""
    with contextlib.suppress(OSError):  # such as that of a file that another process has removed meanwhile
        programs = [(path.stat(), path) for path in directory.glob("*-cache")]
        programs.sort(key=lambda program: max(program[0].st_atime, program[0].st_mtime), reverse=True)
        kept = 0
        for found, path in programs:
            kept += found.st_size
            if kept > MOST_BYTES:
                path.unlink(missing_ok=True)
