"""The command line: parses, calls, prints. One function a command; its docstring is the line that `mot --help` has."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mot_jax.cli import bench, convert, data, models, runs, tuning
from mot_jax.cli.boundary import boundary
from mot_jax.cli.options import Parser
from mot_jax.runtime import allocator, compilation, distributed

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
        bench.bench,
        convert.export,
    )
} | {"import": convert.import_}
DEBUG = "--debug"  # of all commands, anywhere among the arguments: reported errors have their traceback too
MEASURING = ("bench", "plan")  # how long compiling takes, among other things


def main(arguments: Sequence[str] | None = None) -> None:
    """`mot COMMAND ...`

    arguments: those of this process by default, and then an error ends the process at once.
    """
    program = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in arguments
    arguments = [argument for argument in arguments if argument != DEBUG]
    epilog = "\n".join(f"{name:10} {command.__doc__}" for name, command in COMMANDS.items())
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("mot", description="Mixture-of-Tokens language models in JAX.", epilog=epilog, formatter_class=form)
    parser.add_argument("command", choices=COMMANDS)
    allocator.retain_freed_memory()
    with distributed.ending(), boundary(debug, program):
        command = parser.parse_args(arguments[:1]).command
        if command not in MEASURING:
            compilation.enable_cache()
        COMMANDS[command](arguments[1:])


def train() -> None:
    """`python train.py ...`, the same as `mot train ...`."""
    sys.argv.insert(1, "train")
    main()
