"""Shared by all commands: a config with changes by flags, errors in one line, JSON output."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NoReturn

import tyro

from mot_jax.cli.parsing import FileOrNone
from mot_jax.config import Config, check, identity_changes, leaves, load_config, type_words
from mot_jax.config.renamed import new_flag, new_value
from mot_jax.errors import UserError, error_words, nearest
from mot_jax.runtime import distributed, strict_json
from mot_jax.runtime.paths import user_path


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are reported like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def positive(name: str, text: str, least: int = 1) -> int:
    if not text.isdigit() or int(text) < least:
        raise UserError(f"{name} = {text!r}: must be a whole number, at least {least}; try 32")
    return int(text)


def write_json(path: str, content: dict) -> None:
    try:
        user_path("--json", path).write_text(strict_json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"--json = {path}: cannot be written ({error.strerror or error_words(error)}); try result.json"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonOptions:
    """Output of a command as JSON."""

    json: FileOrNone = None
    """File for the results as JSON, in addition to the printed ones."""


# --- several processes -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """Description of this process, one of several of a run."""

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Address of process 0, if the command runs in several processes. None: from the cluster's environment."""
    num_processes: Annotated[str | None, tyro.conf.arg(metavar="N")] = None
    """Number of processes. 1: a single process, also in a cluster. None: from the cluster's environment."""
    process_id: Annotated[str | None, tyro.conf.arg(metavar="N")] = None
    """Index of this process, from 0. None: from the cluster's environment."""


PROCESS = ["--coordinator", "--num-processes", "--process-id"]


def process(options: argparse.Namespace | ProcessOptions, config: Config) -> distributed.Process | None:
    """This process, of several, by the flags or else by the cluster."""
    named = distributed.from_flags(options.coordinator, options.num_processes, options.process_id)
    return named or distributed.detect(config.mesh.wait_seconds)


# --- configs ----------------------------------------------------------------------------------------------------------


def parse(
    prog: str,
    arguments: list[str],
    default: str | None,
    own: list[str] | Parser,
    load: Callable[[str], Config] = load_config,
) -> tuple[argparse.Namespace, Config]:
    """The command's own options, and the config of the named file or workdir with the changes by flags."""
    if isinstance(own, Parser):
        parser = own
    else:
        parser = Parser(prog=prog, add_help=False, allow_abbrev=False)
        for option in own:
            parser.add_argument(option)
    options, rest = parser.parse_known_args(arguments)
    names = [f"--{name}".replace("_", "-") for name in vars(options)]
    options.config = "configs/demo.py" if "--help" in rest else default
    if rest and not rest[0].startswith("-"):
        options.config = rest.pop(0)
    if options.config is None:
        word, example = ("CONFIG", "configs/demo.py") if load is load_config else ("WORKDIR", "runs/demo")
        raise UserError(f"{word} is missing; try {prog} {example}")
    loaded = load(options.config)
    check(loaded)
    config = override(prog, loaded, rest, names)
    check(config)
    if load is not load_config and (changes := identity_changes(loaded, config)):
        raise UserError(*changes)
    return options, config


def override(prog: str, config: Config, flags: list[str], own: list[str]) -> Config:
    """The config with the fields that `--group.field VALUE` flags name. Raises UserError with every mistake."""
    help_wanted = any(flag in ("-h", "--help") for flag in flags)
    if help_wanted:
        print(f"usage: {prog} [CONFIG] {' '.join(f'[{o} VALUE]' for o in own)} [--group.field VALUE ...]\n")
        _tyro(prog, config, ["--help"])
    given = chunks(flags)
    names = {name: hint for name, _, hint, _ in leaves(config)}
    faults = []
    for chunk in given:
        name = chunk[0].removeprefix("--").partition("=")[0].replace("-", "_")
        if not chunk[0].startswith("--"):
            faults.append(f"{chunk[0]}: not understood; flags are --group.field VALUE, as --training.steps 100")
        elif name.rpartition(".no_")[1] and name.replace(".no_", ".") in names:
            pass  # tyro's way to say False
        elif now := new_flag(config, chunk[0]):
            faults.append(f"{chunk[0]}: is now {now}")
        elif name not in names:
            faults.append(f"{chunk[0]}: no such field{nearest(name, [*names, *(o.strip('-') for o in own)])}")
    if not faults:
        with contextlib.suppress(SystemExit), _silence():
            return _tyro(prog, config, flags)
        for chunk in given:  # each by itself, to find which
            try:
                with _silence():
                    _tyro(prog, config, chunk)
            except SystemExit:
                name = chunk[0].removeprefix("--").partition("=")[0].replace("-", "_")
                value = " ".join(chunk[1:]) or chunk[0].partition("=")[2]
                hint = type_words(names.get(name, bool))
                if now := new_value(name, value):
                    faults.append(f"{name} = {value!r}: is now {now!r}")
                    continue
                faults.append(f"{name} = {value!r}: must be {hint}; here it is {_get(config, name)!r}")
    raise UserError(*faults)


def _tyro(prog: str, config: Config, flags: Sequence[str]) -> Config:
    """The kind of feed-forward layer is the file's: flags change its fields, never the kind."""
    return tyro.cli(tyro.conf.AvoidSubcommands[Config], prog=prog, default=config, args=flags)


def chunks(flags: list[str]) -> list[list[str]]:
    """Each flag with its values."""
    chunks: list[list[str]] = []
    for flag in flags:
        if flag.startswith("--") or not chunks:
            chunks.append([flag])
        else:
            chunks[-1].append(flag)
    return chunks


def _get(config: Config, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
