"""The platforms of JAX on this machine, before JAX is imported."""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import pkgutil

_DEVICE_FILES = (  # of a driver
    *("/dev/accel*", "/dev/vfio/*"),  # of TPUs on older and on newer VMs
    *("/dev/nvidia*", "/dev/dxg", "/dev/nvhost*", "/dev/nvmap"),  # of GPUs of NVIDIA, also under WSL and on Jetson
    *("/proc/driver/nvidia*", "/sys/module/nvidia"),  # before the first CUDA program has created their devices
    "/dev/kfd",  # of GPUs of AMD
)
_CUDA_PLUGINS = {"xla_cuda12", "xla_cuda13"}  # of the extras cuda12, cuda13 and cuda-aot
_VARIABLES = ("TPU_", "MEGASCALE_", "JAX_FORCE_TPU_INIT")  # set on TPU hosts, or by a user who has one
_NO_HINTS = ("TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH")  # set by importing JAX and libtpu, inherited by processes


def only_cpus() -> bool:
    """Whether JAX can have no devices but CPUs; False if in doubt."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    if _plugins() - _CUDA_PLUGINS:
        return False
    variables = (name for name in os.environ if name not in _NO_HINTS)
    return not any(map(glob.glob, _DEVICE_FILES)) and not any(name.startswith(_VARIABLES) for name in variables)


def skip_absent_accelerators() -> None:
    """Set JAX_PLATFORMS to `cpu` where libtpu or XLA's CUDA plugin is installed but JAX can have no devices but CPUs.

    JAX would otherwise load them, and their search for a TPU and for CUDA's libraries prints errors. Compiling for
    described devices does not depend on the variable. Call it before JAX is imported, which reads the variable then.
    """
    if any(map(importlib.util.find_spec, ("libtpu", "jax_plugins"))) and only_cpus():
        os.environ["JAX_PLATFORMS"] = "cpu"


def _plugins() -> set[str]:
    """Names of the plugins that JAX would load: modules in `jax_plugins` and entry points of that group."""
    package = importlib.util.find_spec("jax_plugins")
    modules = pkgutil.iter_modules((package and package.submodule_search_locations) or ())
    entry_points = importlib.metadata.entry_points(group="jax_plugins")
    return {module.name for module in modules} | {entry_point.name for entry_point in entry_points}
