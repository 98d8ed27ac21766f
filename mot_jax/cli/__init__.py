"""The command line: parse, call, print. One function per command, whose docstring is its line in `mot --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mot_jax.cli import bench, convert, data, models, runs, tuning
from mot_jax.cli.boundary import boundary
from mot_jax.errors import UserError, nearest
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
DEBUG = "--debug"  # accepted by every command, anywhere among the arguments
MEASURING = ("bench", "plan")  # no compilation cache: they report compile times
HELP = """usage: mot COMMAND [arguments] [--debug]

Train, run and benchmark Mixture-of-Tokens language models in JAX.

{commands}

`mot COMMAND --help` explains a command and its flags. --debug prints the traceback of a reported error as well.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `mot COMMAND ...`.

    arguments: those of this process by default, and then an error ends the process at once.
    """
    program = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in arguments
    arguments = [argument for argument in arguments if argument != DEBUG]
    if arguments[:1] in (["-h"], ["--help"]):
        print(HELP.format(commands="\n".join(f"  {name:11}{c.__doc__}" for name, c in COMMANDS.items())), end="")
        return
    allocator.retain_freed_memory()
    compilation.ignore_tracing_variables()
    with distributed.ending(), boundary(debug, program):
        if not arguments:
            raise UserError(f"COMMAND is missing; try mot train, or one of {', '.join(COMMANDS)}")
        command, *rest = arguments
        if command not in COMMANDS:
            raise UserError(f"{command}: no such command{nearest(command, COMMANDS)}")
        if command not in MEASURING:
            compilation.enable_cache()
        COMMANDS[command](rest)


def train() -> None:
    """Run `python train.py ...`, the same as `mot train ...`."""
    sys.argv.insert(1, "train")
    main()
