"""The command line: parse, call, print. One function per command, whose docstring is its line in `mot --help`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mot_jax.cli import bench, convert, data, models, runs, tuning
from mot_jax.cli.boundary import boundary
from mot_jax.cli.parsing import dispatch
from mot_jax.config.files import KINDS_VARIABLE, execute_file
from mot_jax.runtime import allocator, compilation, distributed, platforms

COMMANDS = {
    command.__name__.replace("_", "-"): command
    for command in (
        runs.train,
        runs.describe,
        runs.plan,
        data.data,
        runs.evaluate,
        tuning.transition,
        models.generate,
        models.fill,
        models.lm_eval,
        runs.inspect,
        runs.curves,
        runs.status,
        runs.verify,
        bench.bench,
        convert.export,
    )
} | {"import": convert.import_}
DEBUG = "--debug"  # accepted by every command, anywhere among the arguments
MEASURING = ("bench", "plan")  # no compilation cache: they report compile times
# Commands that retain freed memory, since every step allocates and frees large arrays. Generation does not, and is
# slower with this setting (docs/notes/2026-11-28-allocator.md).
LARGE_ARRAYS = ("train", "transition", "evaluate", "bench layers", "bench step", "bench train")
TRAINING = ("train", "transition", "bench train")  # commands that do not wait for the reader of their output


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `mot COMMAND ...`.

    arguments: those of this process by default, and then an error ends the process at once.
    """
    program = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in arguments
    arguments = [argument for argument in arguments if argument != DEBUG]
    platforms.skip_absent_accelerators()
    command = {" ".join(arguments[:1]), " ".join(arguments[:2])}
    if not command.isdisjoint(LARGE_ARRAYS):
        allocator.retain_freed_memory()
    compilation.ignore_tracing_variables()
    with distributed.ending(), boundary(debug, program, trains=not command.isdisjoint(TRAINING)):
        if set(arguments[:1]) & (COMMANDS.keys() - set(MEASURING)):
            compilation.enable_cache()
        for path in filter(None, os.environ.get(KINDS_VARIABLE, "").split(os.pathsep)):
            execute_file(Path(path), KINDS_VARIABLE, "examples/own_kind.py")
        about = "Train, run and benchmark Mixture-of-Tokens language models in JAX."
        dispatch("mot", about, COMMANDS, arguments)


def train() -> None:
    """Run `python train.py ...`, the same as `mot train ...`."""
    sys.argv.insert(1, "train")
    main()
