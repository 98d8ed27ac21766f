"""What one process has compiled, the next reads back."""

from __future__ import annotations

import os

from mot_jax.data import DATA_DIRECTORY


def keep_compiled() -> None:
    """Has JAX keep what took more than a second to compile in ~/.cache/mot_jax/compiled, and look there first.

    Only where JAX_COMPILATION_CACHE_DIR names no other directory, and that one can be written. To be called before JAX
    is imported, which reads the variable then; JAX_ENABLE_COMPILATION_CACHE=false turns it off. JAX tells programs
    apart by their text, the options and versions that made them and the kind of device.
    """
    directory = os.path.expanduser(f"{DATA_DIRECTORY}/compiled")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError:
        return
    if os.access(directory, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
