"""Modeled seconds of a compiled program by class of kernel, which a measurement of the program can calibrate.

A kernel is an instruction of the program that is executed on its own: a fusion, a call of a library, a collective. It
takes the larger of FLOPs / peak and HBM bytes / bandwidth; a collective takes the time of the network (`times.py`).
Classes:

    products     contain a matrix product: dots, fusions with one, calls of cuBLAS
    attention    calls of cuDNN
    library      other calls whose inside is not in the program's text, such as sorts and Pallas kernels
    collectives
    elementwise  all else: fusions, copies, transposes, reductions, gathers
"""

from __future__ import annotations

import jax

from mot_jax.cost.hardware import Hardware
from mot_jax.planning.hlo import Computation, Instruction, Module
from mot_jax.planning.program import KINDS, _Reader, _target
from mot_jax.planning.times import Network

CLASSES = ("products", "elementwise", "attention", "library", "collectives")


def kernel_seconds(
    module: Module, mesh_shape: dict[str, int], hardware: Hardware, peak: float, devices: list[jax.Device]
) -> dict[str, float]:
    """Modeled seconds by class, for those of `CLASSES` that take any.

    Args:
        module: The result of `hlo.parse`, of a program of one slice.
        mesh_shape: Sizes of the mesh's axes, in order.
        hardware: Figures of a device.
        peak: FLOP/s of a device.
        devices: Those of the mesh, flattened.

    Raises:
        UnknownTextError: If the text cannot be understood.
    """
    reader = _KernelReader(module, mesh_shape)
    program, seconds = reader.read(), dict.fromkeys(CLASSES, 0.0)
    for name, executions, flops, size in reader.kernels:
        seconds[name] += executions * max(flops / peak, size / hardware.hbm_bandwidth)
    network = Network(hardware, devices)
    seconds["collectives"] = sum(c.executions * network.seconds(c) for c in program.collectives)
    return {name: value for name, value in seconds.items() if value}


class _KernelReader(_Reader):
    """A reader that also records (class, executions, FLOPs, bytes) of each kernel but the collectives."""

    def __init__(self, module: Module, mesh_shape: dict[str, int]):
        super().__init__(module, mesh_shape, slices=1, kernels=True)
        self.kernels: list[tuple[str, int, float, float]] = []
        self._inside_kernel = False

    def _collect(
        self,
        computation: Computation,
        instruction: Instruction,
        executions: int,
        chains: set[str],
        scatters: bool = False,
    ) -> None:
        """Record a kernel. It is called once for each, and by itself for the instructions inside."""
        if self._inside_kernel:
            super()._collect(computation, instruction, executions, chains, scatters)
            return
        collectives, self._inside_kernel = len(self.collectives), True
        super()._collect(computation, instruction, executions, chains, scatters)
        self._inside_kernel = False
        size = self._bytes(computation, instruction)
        is_collective = instruction.opcode.removesuffix("-start") in KINDS or len(self.collectives) > collectives
        if size and not is_collective:
            flops = self._flops(computation, instruction)
            self.kernels.append((_class(instruction, flops), executions, flops, size))


def _class(instruction: Instruction, flops: float) -> str:
    if instruction.opcode == "custom-call":
        target = _target(instruction)
        if "cublas" in target:
            return "products"
        return "attention" if "cudnn" in target else "library"
    return "products" if flops else "elementwise"
