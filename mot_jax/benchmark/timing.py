"""Times of several programs that take turns in one process, and what the machine could do at best."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mot_jax.planning import hlo
from mot_jax.planning.hlo import UnknownTextError
from mot_jax.planning.program import read_program
from mot_jax.runs.checkpoint import versions


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one program, one a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return (third - first) / self.median


def in_turns(programs: Mapping[str, Callable[[], Callable[[], Any]]], rounds: int = 10) -> dict[str, Times]:
    """Each program once a round, in another order every round, so that all see the same disturbances.

    A program prepares what it needs, untimed, and returns what is timed, with its result awaited. The first time of
    each, which may compile, is not counted.
    """
    names = list(programs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            run = programs[name]()
            start = time.perf_counter()
            jax.block_until_ready(run())
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: Times(tuple(times)) for name, times in seconds.items()}


def bandwidth(size: int = 2**28) -> float:
    """Bytes a second that the first device reads from its memory: the best of several sums of so many bytes."""
    x = jnp.ones(size // 4)
    total = jax.jit(jnp.sum)
    times = in_turns({"read": lambda: lambda: total(x)}, rounds=7)["read"]
    return size / min(times.seconds)


def matmul_peak(dtype: str, size: int | None = None) -> float:
    """FLOP/s that the first device reaches in the product of two square matrices: the best of several.

    size: of a side; None takes 8,192, or 2,048 on a CPU.
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    times = in_turns({"product": lambda: lambda: product(x, x)}, rounds=7)["product"]
    return 2 * size**3 / min(times.seconds)


class Program:
    """A compiled function of arrays, ready to be timed.

    Its results take the place of its last ones, so that what is timed is the program, and not the system's finding
    memory for them: on a CPU, that of a layer's gradients costs as much as a tenth of the layer.

    seconds_to_compile. temporaries: bytes that XLA allocates beside arguments and results; None where it does not
    say. copies: instructions of the compiled program that copy or transpose (`count_copies`). bytes: what its
    instructions read and write (`planning.program`). Both are None where its text cannot be read.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._arguments = arguments
        results = jax.eval_shape(function, *arguments)
        self._results = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), results)

        def into(arguments: tuple[Any, ...], places: Any) -> Any:
            del places
            return function(*arguments)

        start = time.perf_counter()
        jitted = jax.jit(into, donate_argnums=1, keep_unused=True)
        self._compiled = jitted.lower(arguments, self._results).compile()
        self.seconds_to_compile = time.perf_counter() - start
        self.temporaries = temporaries(self._compiled)
        self.copies: int | None = None
        self.bytes: float | None = None
        with contextlib.suppress(UnknownTextError):
            module = hlo.parse(self._compiled.as_text() or "")
            self.copies = count_copies(module)
            self.bytes = read_program(module, {}).hbm_bytes

    def __call__(self) -> Callable[[], Any]:
        """For `in_turns`."""
        return self._run

    def _run(self) -> Any:
        self._results = self._compiled(self._arguments, self._results)
        return self._results


def temporaries(compiled: jax.stages.Compiled) -> int | None:
    """Bytes that a program allocates beside arguments and results; None where XLA does not say."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def count_copies(module: hlo.Module, least: int = 4096) -> int:
    """Instructions of a compiled program that copy or transpose so many bytes or more; a fusion that does so is one."""
    computations = module.computations
    everything = (i for computation in computations.values() for i in computation.instructions.values())
    inside = {name for i in everything if i.opcode == "fusion" for name in i.called("calls")}

    def moves(instruction: hlo.Instruction) -> bool:
        if instruction.opcode == "fusion":
            called = (computations[name] for name in instruction.called("calls"))
            return any(moves(i) for computation in called for i in computation.instructions.values())
        moving = instruction.opcode in ("copy", "copy-start", "transpose")
        return moving and instruction.arrays[0].bytes >= least

    outside = (computation for name, computation in computations.items() if name not in inside)
    return sum(moves(i) for computation in outside for i in computation.instructions.values())


def machine() -> dict[str, str]:
    """What the figures are of: device, processor, versions, date."""
    device = jax.devices()[0]
    about = {"device": f"{jax.device_count()} x {device.device_kind}", "date": time.strftime("%Y-%m-%d")}
    if device.platform == "cpu":
        about["processor"] = _processor()
    return about | versions()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return f"{len(names)} x {names[0]}"
    except (OSError, IndexError):
        return platform.processor()
