"""Times of several programs that take turns in one process, and what the machine could do at best."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mot_jax.training.checkpoint import versions


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
