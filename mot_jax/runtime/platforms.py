"""The platforms of JAX on this machine, before JAX is imported."""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os

# A driver's files: of TPUs on older and on newer VMs, of GPUs of NVIDIA, also under WSL, and of AMD.
_DEVICE_FILES = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")
_VARIABLES = ("TPU_", "MEGASCALE_", "JAX_FORCE_TPU_INIT")  # set on TPU hosts, or by a user who has one
_NO_HINTS = ("TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH")  # set by importing JAX and libtpu, inherited by processes


def only_cpus() -> bool:
    """Whether JAX can have no devices but CPUs; False if in doubt."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    if importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(group="jax_plugins"):
        return False
    variables = (name for name in os.environ if name not in _NO_HINTS)
    return not any(map(glob.glob, _DEVICE_FILES)) and not any(name.startswith(_VARIABLES) for name in variables)


def skip_absent_tpu() -> None:
    """Set JAX_PLATFORMS to `cpu` where libtpu is installed but JAX can have no devices but CPUs.

    JAX would otherwise load libtpu, whose search for a TPU prints errors. Call it before JAX is imported, which reads
    the variable then.
    """
    if importlib.util.find_spec("libtpu") and only_cpus():
        os.environ["JAX_PLATFORMS"] = "cpu"
