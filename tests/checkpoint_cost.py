"""Time manifests next to saving and restoring a checkpoint.

    python tests/checkpoint_cost.py DIRECTORY MEGABYTES [ROUNDS]     # 10 000 MB need 12 GB of memory and of disk

Each round saves random float32 arrays with Orbax, writes the manifest, compares the files with it, and loads them. The
page cache holds the files, as it does after a save; a restore on another machine reads them from its disk first, once
for both parts. Prints the median seconds of each part.
"""

from __future__ import annotations

import statistics
import sys
import time

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from mot_jax.runs import manifest
from mot_jax.runs.stores import quieten

_ARRAY_BYTES = 2**26


def main(directory: str, megabytes: str, rounds: str = "3") -> None:
    quieten()
    draw, folder = np.random.default_rng(0), epath.Path(directory).absolute()
    count = max(int(megabytes) * 10**6 // _ARRAY_BYTES, 1)
    size = int(megabytes) * 10**6 // count // 4
    seconds: dict[str, list[float]] = {"save": [], "manifest": [], "compare": [], "load": []}
    for round_number in range(int(rounds)):
        state = {str(i): jax.device_put(draw.random(size, np.float32)) for i in range(count)}
        kinds = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in state.items()}
        path = folder / str(round_number)
        parts = {
            "save": lambda: ocp.save(path, state),  # noqa: B023
            "manifest": lambda: manifest.write(path, "cost"),  # noqa: B023
            "compare": lambda: manifest.damage(path),  # noqa: B023
            "load": lambda: jax.block_until_ready(ocp.load(path, kinds)),  # noqa: B023
        }
        for name, part in parts.items():
            if name == "load":
                state.clear()
            start = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - start)
        path.rmtree()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{megabytes} MB: " + ", ".join(f"{name} {median:.2f} s" for name, median in medians.items()))
    print(f"manifest / save {medians['manifest'] / medians['save']:.1%}", end=", ")
    print(f"compare / load {medians['compare'] / medians['load']:.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
