"""Peaks, memory and networks of accelerators, in one table with sources; names of topologies.

FLOP/s are dense peaks of matrix products. float32 products run at JAX's default precision: as TF32 on these GPUs, in
one bfloat16 pass on TPUs (docs.jax.dev, "Matmul precision"). NVIDIA's data sheets print the rates with sparsity, which
are twice these. Bandwidths are bytes per second. Sources:

    [cloud] Google Cloud documentation, cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x, tables of
        specifications;
    [book] "How to Scale Your Model", jax-ml.github.io/scaling-book, part 2 ("How to think about TPUs"), table of ICI
        and DCN bandwidths. Its one-way 90 GB/s per link on v5p is the bandwidth reached in practice, of the 1,200 GB/s
        that [cloud] gives for six links in both directions (100 each way); the same holds for the other generations.
        It has no TPU7x, whose six links have the same 1,200 GB/s;
    [libtpu] the available memory that libtpu 0.0.42 reports when a program does not fit, for TPU7x libtpu 0.0.50, a
        little less than [cloud];
    [nvidia] NVIDIA's data sheets of A100, H100, H200 (SXM) and HGX B200: peaks, HBM bandwidth, and NVLink, of which
        they print both directions together; user guides of DGX A100, H100, H200 and B200: one InfiniBand port per GPU,
        of 200 Gb/s in DGX A100 and 400 Gb/s in the others;
    [xla] device_memory_size in XLA's descriptions of these GPUs (openxla/xla, xla/backends/gpu/target_config/specs).
        Programs get 0.9 of it, which launch/slurm.sh lets JAX allocate (XLA_PYTHON_CLIENT_MEM_FRACTION; JAX's default
        is 0.75): NCCL and CUDA need the rest.
"""

from __future__ import annotations

import dataclasses
import re

import jax

from mot_jax.errors import UserError, nearest
from mot_jax.runtime.network import rings


@dataclasses.dataclass(frozen=True)
class Device:
    """A device whose peak is known. device_kinds: JAX's names of it. Peaks are FLOP/s of products of that dtype."""

    device_kinds: tuple[str, ...]
    bfloat16_peak: float
    float32_peak: float


@dataclasses.dataclass(frozen=True)
class Hardware(Device):
    """A device whose memory and network are known as well.

    dimensions: of the torus; 0 for GPUs, which a switch in each host connects, one link per GPU, and InfiniBand between
    hosts. hbm_bytes: available to programs. link_bandwidth: of one link in one direction; dcn_bandwidth: one chip's
    share of the network between slices, or between hosts of GPUs, in one direction. chips: in the largest slice, or
    GPUs in a host. Of a chip with two devices all other figures are those of one device, half of the chip's.
    """

    name: str
    dimensions: int
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    chips: int

    @property
    def device_kind(self) -> str:
        """The name that JAX gives to the device."""
        return self.device_kinds[0]

    def rings(self, torus: tuple[int, ...]) -> tuple[bool, ...]:
        """For each dimension of a slice, whether it closes to a ring."""
        return rings(torus)


_GIB = 2**30
_DEVICES: tuple[Device, ...] = (
    # Peaks: [cloud], peak compute per chip. HBM: [libtpu], its bandwidth: [cloud]. ICI and DCN: [book].
    Hardware(("TPU v4",), 275e12, 275e12, "v4", 3, 30.75 * _GIB, 1.2e12, 4.5e10, 3.1e9, 4096),
    Hardware(("TPU v5 lite", "TPU v5e"), 197e12, 197e12, "v5e", 2, 15.75 * _GIB, 8.19e11, 4.5e10, 3.1e9, 256),
    Hardware(("TPU v5", "TPU v5p"), 459e12, 459e12, "v5p", 3, 95.74 * _GIB, 2.765e12, 9e10, 6.25e9, 6144),
    Hardware(("TPU v6 lite", "TPU v6e"), 918e12, 918e12, "v6e", 2, 31.25 * _GIB, 1.638e12, 9e10, 12.5e9, 256),
    # Two devices a chip.
    Hardware(("TPU7x",), 1153.5e12, 1153.5e12, "tpu7x", 3, 94.74 * _GIB, 3.69e12, 4.5e10, 6.25e9, 9216),
    # [nvidia], [xla]; the bandwidth of B200, too, is from [xla]: data sheets of its systems round it up to 8 TB/s.
    Hardware(("NVIDIA A100-SXM4-80GB",), 312e12, 156e12, "a100", 0, 0.9 * 85100068864, 2.039e12, 3e11, 2.5e10, 8),
    Hardware(("NVIDIA H100 80GB HBM3",), 989e12, 494e12, "h100", 0, 0.9 * 84942979072, 3.35e12, 4.5e11, 5e10, 8),
    Hardware(("NVIDIA H200",), 989e12, 494e12, "h200", 0, 0.9 * 151397597184, 4.8e12, 4.5e11, 5e10, 8),
    Hardware(("NVIDIA B200",), 2250e12, 1125e12, "b200", 0, 0.9 * 191514411008, 7.672e12, 9e11, 5e10, 8),
    Device(("NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe"), 312e12, 156e12),  # NVIDIA A100 data sheet
    Device(("NVIDIA H100 PCIe",), 756e12, 378e12),  # NVIDIA H100 data sheet of 2022, PCIe
)
HARDWARE = {device.name: device for device in _DEVICES if isinstance(device, Hardware)}
GPUS = tuple(name for name, hardware in HARDWARE.items() if not hardware.dimensions)
MAX_HOSTS = 1024  # of GPUs: a bound on typing errors
KNOWN = (
    "v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4 (any even sizes up to the largest slice), "
    "a100, h100:8, h200:8, b200:8x8 (GPUs, or hosts x GPUs per host), local, local:8"
)


def _device_of(device_kind: str) -> Device | None:
    return next((device for device in _DEVICES if device_kind in device.device_kinds), None)


def hardware_of(device: jax.Device) -> Hardware | None:
    """Memory and network of a device; None where they are not in the table."""
    entry = _device_of(device.device_kind)
    return entry if isinstance(entry, Hardware) else None


def peak_flops(device: jax.Device | str, dtype: str) -> float | None:
    """Dense peak of a device, or of a JAX device kind, in FLOP/s for products of arrays of `dtype`; None if unknown."""
    entry = _device_of(device if isinstance(device, str) else device.device_kind)
    if entry is None or dtype not in ("bfloat16", "float32"):
        return None
    return entry.bfloat16_peak if dtype == "bfloat16" else entry.float32_peak


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices that a program is compiled for.

    hardware: None for `local`, the devices of this process. sizes: of the torus of one slice; hosts and GPUs per host;
    or the number of local devices.
    """

    name: str
    hardware: Hardware | None
    sizes: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int | None:
        """Number of chips of all slices; None for `local` without a number."""
        total = self.slices if self.sizes else None
        for size in self.sizes:
            total = (total or 1) * size
        return total


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Parse a name such as `v5p:8x8x8`, `h100:8`, `h100:8x8`, `local` or `local:8`. Raises UserError."""
    name, _, sizes_text = text.partition(":")
    sizes = tuple(int(size) for size in sizes_text.split("x")) if re.fullmatch(r"\d+(x\d+)*", sizes_text) else ()
    if name == "local":
        if slices != 1:
            raise UserError(f"--slices = {slices}: local devices form one slice; try --slices 1")
        if len(sizes) > 1 or bool(sizes) != bool(sizes_text) or 0 in sizes:
            raise UserError(f"--topology = {text}: local may be followed by a number of devices only; try local:8")
        return Topology(text, None, sizes, 1)
    if name not in HARDWARE:
        raise UserError(f"--topology = {text}: no such topology{nearest(name, list(HARDWARE))}; known: {KNOWN}")
    hardware = HARDWARE[name]
    if name in GPUS:
        return _parse_gpus(text, hardware, sizes, slices, bare=not sizes_text)
    example = f"{name}:{'x'.join(['4'] * hardware.dimensions)}"
    if len(sizes) != hardware.dimensions:
        raise UserError(f"--topology = {text}: {name} has {hardware.dimensions} dimensions; try {example}")
    topology = Topology(text, hardware, sizes, slices)
    if any(size < 1 or size % 2 for size in sizes[:2]) or 0 in sizes:
        raise UserError(
            f"--topology = {text}: a host has 2x2 chips, so the first two sizes must be even; try {example}"
        )
    if (count := (topology.chips or 0) // slices) > hardware.chips:
        raise UserError(f"--topology = {text}: {count} chips; the largest slice has {hardware.chips}; try {example}")
    return topology


def _parse_gpus(text: str, hardware: Hardware, sizes: tuple[int, ...], slices: int, bare: bool) -> Topology:
    name, per_host = hardware.name, hardware.chips
    if slices != 1:
        raise UserError(f"--slices = {slices}: GPUs form no slices; try --topology {name}:{slices}x{per_host}")
    sizes = (1,) if bare else sizes
    hosts, gpus = (1, *sizes) if len(sizes) == 1 else sizes if len(sizes) == 2 else (0, 0)
    if not (1 <= gpus <= per_host and 1 <= hosts <= MAX_HOSTS):
        rule = f"a number of GPUs up to {per_host}, or hosts, up to {MAX_HOSTS:,}, x GPUs per host"
        raise UserError(f"--topology = {text}: must have {rule}; try {name}:{per_host}, {name}:8x{per_host}")
    return Topology(text, hardware, (hosts, gpus), 1)
