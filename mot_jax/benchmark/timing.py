"""Times of several programs that take turns in one process, and the machine's measured peak and bandwidth."""

from __future__ import annotations

import dataclasses
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mot_jax.planning import hlo
from mot_jax.planning.hlo import UnknownTextError
from mot_jax.planning.program import read_program
from mot_jax.runs.checkpoint import versions
from mot_jax.runtime import allocator
from mot_jax.runtime.progress import progress

_SAMPLE_SECONDS = 5e-3  # least time of a sample on an accelerator
_MOST_CALLS = 1024  # of a sample
_SLOW = 10.0  # times the shortest program
_LEAST_ROUNDS = 3
_LONG = 1.0  # seconds of a program whose temporaries may be a large part of memory


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of one program in each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return (third - first) / self.median


def in_turns(
    programs: Mapping[str, Callable[[], Callable[[], Any]]],
    rounds: int = 10,
    title: str | None = None,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timings]:
    """Time each program once per round, in a random order every round, so that disturbances affect all of them.

    No program always follows the same one, which may leave it cold caches or memory that the system has taken back.
    The orders are the same in every call with as many programs. A program that takes `_SLOW` times as long as the
    shortest one disturbs most: after one round, such programs take turns of their own, in a quarter of the rounds.

    A program first prepares its inputs, untimed, and returns the function that is timed; its result is awaited. The
    first time of each program, which may include compilation, is discarded.

    On an accelerator a round has as many calls of a short program as take some milliseconds. Each is prepared, all are
    enqueued, and the last result is awaited, so that dispatch and synchronization are in the time only as far as they
    are longer than the program.

    title: of the progress that is shown. None: nothing is shown.

    failed: called with the error of a program that JAX's runtime cannot execute, such as for lack of memory; the others
    continue. None: the error is raised.
    """
    calls: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    orders = random.Random(0)

    def take_turns(names: list[str]) -> None:
        for name in orders.sample(names, len(names)):
            try:
                if name in calls:
                    seconds[name].append(_seconds(programs[name], calls[name]))
                    if seconds[name][-1] > _LONG:
                        allocator.release_freed_memory()
                else:
                    calls[name] = _calls_per_sample(programs[name])
            except jax.errors.JaxRuntimeError as error:
                if failed is None:
                    raise
                del seconds[name]
                failed(name, error)

    for _ in range(2):  # the first round is not timed
        take_turns(list(seconds))
    shortest = min((times[0] for times in seconds.values()), default=0.0)
    slow = [name for name, (first,) in seconds.items() if first > _SLOW * shortest]
    slow_rounds = min(rounds, max(_LEAST_ROUNDS, rounds // 4))
    fast = [name for name in seconds if name not in slow]
    for names, number, about in ((fast, rounds, ""), (slow, slow_rounds, ", slow programs")):
        with progress(f"{title}{about}", number, quiet=title is None or not names, done=1) as advance:
            for _ in range(number - 1):
                take_turns([name for name in names if name in seconds])
                advance(1)
    return {name: Timings(tuple(times)) for name, times in seconds.items()}


def _seconds(program: Callable[[], Callable[[], Any]], calls: int) -> float:
    """Seconds of a call."""
    functions = [program() for _ in range(calls)]
    start = time.perf_counter()
    for function in functions:
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def _calls_per_sample(program: Callable[[], Callable[[], Any]]) -> int:
    """Execute a program for the first time, and on an accelerator until a sample takes _SAMPLE_SECONDS."""
    _seconds(program, 1)
    calls = 1
    if jax.default_backend() != "cpu":
        while calls < _MOST_CALLS and calls * _seconds(program, calls) < _SAMPLE_SECONDS:
            calls *= 2
    return calls


def bandwidth(size: int | None = None) -> float:
    """Bytes per second at which the first device reads its memory: the best of several sums of `size` bytes.

    size: much more than the device's caches; None is 2**30, or 2**28 on a CPU.
    """
    size = size or (2**28 if jax.default_backend() == "cpu" else 2**30)
    x = jnp.ones(size // 4)
    total = jax.jit(jnp.sum)
    timings = in_turns({"read": lambda: lambda: total(x)}, rounds=7)["read"]
    return size / min(timings.seconds)


def matmul_peak(dtype: str, size: int | None = None) -> float:
    """FLOP/s that the first device reaches in the product of two square matrices: the best of several.

    size: side of the matrices; None is 8,192, or 2,048 on a CPU.
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    timings = in_turns({"product": lambda: lambda: product(x, x)}, rounds=7)["product"]
    return 2 * size**3 / min(timings.seconds)


Buffers = dict[tuple[Any, Any], list[jax.Array]]  # results of previous executions, by shape and dtype


class Program:
    """A compiled function of arrays, ready to be timed.

    Each execution writes its results into the buffers of previous results, so that the time is the program's and not
    that of allocating memory: on a CPU, allocating a layer's gradients costs up to a tenth of the layer.

    Args:
        function: of the arguments.
        arguments: arrays.
        buffers: shared by programs that take turns, whose results then need memory once; None: buffers of its own.

    Attributes:
        compiled: the executable.
        seconds_to_compile: time of lowering and compilation.
        temporaries: bytes that XLA allocates in addition to arguments and results; None if it does not report them.
        copies: instructions of the compiled program that copy or transpose (`count_copies`).
        bytes: read and written by its instructions (`planning.program`). Both are None if its text cannot be parsed.
        not_read: the reason for this, else None.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, buffers: Buffers | None = None):
        self._arguments, self._buffers = arguments, {} if buffers is None else buffers
        results = jax.tree.leaves(jax.eval_shape(function, *arguments))
        self._results = [(leaf.shape, leaf.dtype) for leaf in results]

        def with_donated_results(arguments: tuple[Any, ...], buffers: list[jax.Array]) -> Any:
            del buffers
            return function(*arguments)

        start = time.perf_counter()
        jitted = jax.jit(with_donated_results, donate_argnums=1, keep_unused=True)
        self.compiled = jitted.lower(arguments, [jax.ShapeDtypeStruct(*result) for result in self._results]).compile()
        self.seconds_to_compile = time.perf_counter() - start
        self.temporaries = temporaries(self.compiled)
        self.copies: int | None = None
        self.bytes: float | None = None
        self.not_read: str | None = None
        try:
            module = hlo.parse(self.compiled.as_text() or "")
            self.copies, self.bytes = hlo.count_copies(module), read_program(module, {}).hbm_bytes
        except UnknownTextError as error:
            self.not_read = str(error)

    def __call__(self) -> Callable[[], Any]:
        """The function that `in_turns` times."""
        return self._execute

    def _execute(self) -> Any:
        free = [self._buffers.setdefault(result, []) for result in self._results]
        buffers = [
            arrays.pop() if arrays else jnp.zeros(*result) for arrays, result in zip(free, self._results, strict=True)
        ]
        results = self.compiled(self._arguments, buffers)
        for arrays, array in zip(free, jax.tree.leaves(results), strict=True):
            arrays.append(array)
        return results


def temporaries(compiled: jax.stages.Compiled) -> int | None:
    """Bytes that a program allocates in addition to arguments and results; None if XLA does not report them."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


class CpuTimes(NamedTuple):
    """Seconds of CPU time so far: total of all cores, idle or not; busy; and of these in this process (own)."""

    total: float
    busy: float
    own: float


def cpu_times(path: str = "/proc/stat") -> CpuTimes | None:
    """Read the CPU times of the machine; None where the operating system has no such file."""
    try:
        with open(path) as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]  # user to steal; guests are part of user
        total, idle = sum(ticks), ticks[3] + ticks[4]  # idle and iowait
    except (OSError, ValueError, IndexError):
        return None
    per_second = os.sysconf("SC_CLK_TCK")
    return CpuTimes(total / per_second, (total - idle) / per_second, time.process_time())


def share_of_others(before: CpuTimes | None, after: CpuTimes | None) -> float | None:
    """The share of the CPU time of all cores, between two readings, that other processes or virtual machines used."""
    if before is None or after is None or after.total <= before.total:
        return None
    total, busy, own = (end - begin for begin, end in zip(before, after, strict=True))
    return max(0.0, busy - own) / total


def machine() -> dict[str, str]:
    """The machine that figures are measured on: device, processor, versions, date."""
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
