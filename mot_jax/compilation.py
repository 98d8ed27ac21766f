"""What one process has compiled, the next reads back."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from mot_jax.data import DATA_DIRECTORY

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
