"""The command line: parses, calls, prints. One function a command; its docstring is the line that `mot --help` has."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence

from mot_jax.cli import bench, convert, data, models, runs, tuning
from mot_jax.cli.options import Parser
from mot_jax.errors import ReportedError, RetryableError, error_words
from mot_jax.runtime import allocator, compilation, distributed

BAD_INPUT = 2
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
MEASURING = ("bench", "plan")  # how long compiling takes, among other things


def main(arguments: Sequence[str] | None = None) -> None:
    """`mot COMMAND ...`"""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    epilog = "\n".join(f"{name:10} {command.__doc__}" for name, command in COMMANDS.items())
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("mot", description="Mixture-of-Tokens language models in JAX.", epilog=epilog, formatter_class=form)
    parser.add_argument("command", choices=COMMANDS)
    allocator.retain_freed_memory()
    with distributed.ending(), _errors_for_people():
        command = parser.parse_args(arguments[:1]).command
        if command not in MEASURING:
            compilation.enable_cache()
        COMMANDS[command](arguments[1:])


def train() -> None:
    """`python train.py ...`, the same as `mot train ...`."""
    main(["train", *sys.argv[1:]])


@contextlib.contextmanager
def _errors_for_people() -> Iterator[None]:
    """One line for each of the user's mistakes, and for a full disk; exit code 2. Else it is ours: a traceback.

    What may pass by itself is told in one line too, with exit code 75.
    """
    try:
        yield
    except ReportedError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        sys.exit(distributed.TEMPORARY if isinstance(error, RetryableError) else BAD_INPUT)
    except Exception as error:
        if not _disk_is_full(error):
            raise
        advice = "free some and run the same command, which resumes from the last checkpoint"
        print(f"error: no space left on the disk ({error_words(error)}); {advice}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
