"""Real processes that train together, and a record of the examples that each of them read.

As a script, `processes.py RECORD ...` runs `mot ...`; for each batch that a training step takes, it appends to the file
RECORD a line of JSON with the step, and the examples and windows that this process read for it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def start(
    arguments: list[str],
    count: int,
    devices: int,
    record: Path,
    extra: dict[int, list[str]] | None = None,
    command: str = "train",
) -> list[subprocess.Popen]:
    """Start `mot train`, or another command, in `count` processes, each with this number of virtual devices.

    Process i writes its output to `<record>.<i>.log` and its examples to `<record>.<i>`.

    Args:
        extra: further arguments of single processes, by index.
    """
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    together = ["--coordinator", f"localhost:{free_port()}", "--num-processes", str(count), "--process-id"]
    processes = []
    for i in range(count):
        call = [sys.executable, __file__, f"{record}.{i}", command, *arguments, *((extra or {}).get(i, ()))]
        with open(f"{record}.{i}.log", "w") as output:
            flags = [*together, str(i)] if count > 1 else []
            processes.append(subprocess.Popen([*call, *flags], env=environment, stdout=output, stderr=output))
    return processes


def _record(path: str) -> None:
    """Patch the trainer's batches so that each is recorded when a step takes it."""
    from mot_jax.training import trainer

    train_batches, reading = trainer.train_batches, threading.local()

    class Windows:
        def __init__(self, windows):
            self._windows, self.context_length = windows, windows.context_length

        def read(self, ids):
            reading.ids = ids.tolist()
            return self._windows.read(ids)

    class Batches:
        def __init__(self, windows, order, objective, batch_size, rows, first_example):
            self._made, self._step = {}, first_example // batch_size
            self._batches = train_batches(Windows(windows), order, self._objective, batch_size, rows, first_example)
            self._inner = objective

        def _objective(self, batch, examples):
            made = self._inner(batch, examples)
            ids, reading.ids = reading.ids[: len(examples)], reading.ids[len(examples) :]  # several batches' at once
            self._made[id(made.inputs)] = (examples.tolist(), ids)
            return made

        def __next__(self):
            batch = next(self._batches)
            self._step += 1
            examples, ids = self._made.pop(id(batch.sequences.inputs))
            with open(path, "a") as file:
                file.write(json.dumps({"step": self._step, "examples": examples, "windows": ids}) + "\n")
            return batch

        def close(self):
            self._batches.close()

    trainer.train_batches = Batches


if __name__ == "__main__":
    from mot_jax import cli

    connect = cli.distributed.connect

    def connect_and_record(*arguments, **named):
        connect(*arguments, **named)
        _record(sys.argv[1])

    cli.distributed.connect = connect_and_record
    cli.main(sys.argv[2:])
