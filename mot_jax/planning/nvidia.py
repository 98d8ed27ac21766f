"""Ahead-of-time compilation for NVIDIA GPUs, by XLA's CUDA plugin on a machine without a GPU.

The plugin's compiler needs no driver, only a description of the GPU (XLA's GpuTargetConfigProto, in text form), ptxas
and libdevice. Autotuning would need the device, so it is off: a matrix product becomes a Triton fusion with default
tiles, or a call of cuBLAS (`products`; XLA leaves some small ones to cuBLAS in any case). An autotuned program chooses
between both, product by product.
"""

from __future__ import annotations

import ctypes.util
import dataclasses
import importlib.metadata
import re
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jaxlib
from jax.experimental import topologies

from mot_jax.config import Config, attention_error
from mot_jax.cost.hardware import Topology
from mot_jax.errors import UserError

Products = Literal["triton", "cublas"]
INSTALL = "pip install -c requirements.lock -e '.[cuda-aot]'"
INSTALL_CUDNN = "pip install -c requirements.lock -e '.[cuda-aot,cuda-aot-cudnn]'"


@dataclasses.dataclass(frozen=True)
class _Target:
    """Figures of a GPU for the compiler: compute capability, multiprocessors, bytes, and the clock in GHz.

    Source: openxla/xla, xla/backends/gpu/target_config/specs.
    """

    capability: int
    multiprocessors: int
    fpus: int
    shared_memory: int
    block_shared_memory: int
    l2_bytes: int
    bandwidth: int
    memory_bytes: int
    clock: float


_TARGETS = {
    "a100": _Target(8, 108, 64, 167936, 166912, 41943040, 2039040000000, 85100068864, 1.41),
    "h100": _Target(9, 132, 128, 233472, 232448, 52428800, 3352320000000, 84942979072, 1.98),
    "h200": _Target(9, 132, 128, 233472, 232448, 52428800, 4800000000000, 151397597184, 1.98),
    "b200": _Target(10, 148, 128, 233472, 232448, 132644864, 7672320000000, 191514411008, 1.965),
}


def devices_of_gpus(topology: Topology) -> list[jax.Device]:
    """The target devices of a topology of GPUs, host by host. Raises UserError if a wheel is missing or mismatches."""
    assert topology.hardware
    cuda = _cuda_version(topology.name)
    hosts, gpus = topology.sizes
    name = f"1x{hosts}x{gpus}"
    description = _target_config(_TARGETS[topology.hardware.name], topology.hardware.device_kind, cuda)
    try:
        return list(topologies.get_topology_desc(name, "cuda", target_config=description, topology=name).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        rule = f"refused by the CUDA plugin ({str(error).splitlines()[0]})"
        raise UserError(f"--topology = {topology.name}: {rule}; try {INSTALL}") from None


def compile_for(device: jax.Device, lowered: jax.stages.Lowered, products: Products | None) -> jax.stages.Compiled:
    """Compile a program for a device.

    products: of a target GPU; without meaning for a TPU. None for an attached device, whose options are the defaults.

    Raises:
        UserError: if XLA finds no tiles for a product as a Triton fusion; that of jax 0.10 has some widths without.
    """
    if products is None or device.platform != "gpu":
        return lowered.compile()
    options: dict[str, Any] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": products == "triton"}
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if match := re.search(r"output tile sizes that satisfy hlo: (?:%\S+ = )?([^{(]*)", str(error)):
            rule = f"XLA of jax {jax.__version__} has no tiles for a product of {match[1].strip()}"
            raise UserError(f"products = {products!r}: {rule}; try --products cublas, or a newer jax") from None
        raise


def without_cudnn(config: Config) -> tuple[Config, str | None]:
    """Replace cuDNN's attention, which the compiler cannot build without cuDNN, by XLA's.

    Returns:
        The config, and a line about the replacement, or None if nothing is replaced.

    Raises:
        UserError: if the config asks for cuDNN's attention and cuDNN is missing.
    """
    m = config.model
    possible = attention_error("cudnn", m.context_length, m.d_model // m.num_heads, m.dtype) is None
    if m.attention_kernel not in ("auto", "cudnn") or not possible or cudnn_installed():
        return config, None
    if m.attention_kernel == "cudnn":
        rule = "needs cuDNN to be compiled, which is missing"
        raise UserError(f"model.attention_kernel = 'cudnn': {rule}; try {INSTALL_CUDNN}")
    line = f"model.attention_kernel = 'auto': XLA's attention, not cuDNN's, which is missing; try {INSTALL_CUDNN}"
    return dataclasses.replace(config, model=dataclasses.replace(m, attention_kernel="xla")), line


def cudnn_installed() -> bool:
    """Whether the compiler finds cuDNN 9, in a wheel for the plugin's CUDA or among the libraries of the system."""
    try:
        versions = [_cuda_version("")]
    except UserError:  # reported with the topology
        versions = [13, 12]
    wheel = any(_version(f"nvidia-cudnn-cu{cuda}") for cuda in versions)
    return wheel or ctypes.util.find_library("cudnn") == "libcudnn.so.9"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_version(topology: str) -> int:
    """The CUDA version, 12 or 13, of the installed plugin, after a check of its wheels."""
    faults = list[str]()
    for cuda in (13, 12):
        if _version(f"jax-cuda{cuda}-plugin"):
            faults = list(_wheel_faults(cuda))
            if not faults:
                return cuda
    rule = faults[0] if faults else "needs XLA's CUDA plugin, which is missing"
    raise UserError(f"--topology = {topology}: {rule}; try {INSTALL}")


def _wheel_faults(cuda: int) -> Iterator[str]:
    for wheel in (f"jax-cuda{cuda}-plugin", f"jax-cuda{cuda}-pjrt"):
        version = _version(wheel)
        if version != jaxlib.__version__:
            yield f"needs {wheel} {jaxlib.__version__}, as of jaxlib, and {version or 'none'} is installed"
    wheels = ("nvidia-cuda-nvcc-cu12",) if cuda == 12 else ("nvidia-cuda-nvcc", "nvidia-nvvm")
    missing = [wheel for wheel in wheels if not _version(wheel)]
    if missing and not shutil.which("ptxas"):
        yield f"needs {' and '.join(missing)}, with which PTX is compiled, or CUDA's ptxas on the PATH"


def _target_config(target: _Target, device_kind: str, cuda: int) -> str:
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": target.shared_memory,
        "shared_memory_per_block_optin": target.block_shared_memory,
        "threads_per_core_limit": 2048,
        "core_count": target.multiprocessors,
        "fpus_per_core": target.fpus,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": target.bandwidth,
        "l2_cache_size": target.l2_bytes,
        "device_memory_size": target.memory_bytes,
        "clock_rate_ghz": target.clock,
    }
    info = "\n".join(f"  {name}: {value}" for name, value in fields.items())
    return f"""gpu_device_info {{
{info}
  cuda_compute_capability {{ major: {target.capability} }}
}}
platform_name: "CUDA"
runtime_version {{ major: {cuda} minor: {9 if cuda == 12 else 0} }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{device_kind}"
"""
