"""Arguments of a command: its own options, a dataclass per command, and the flags that change fields of a config."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar

import tyro

from mot_jax.config import (
    Config,
    ModelConfig,
    check,
    default_workdir,
    from_json,
    identity_changes,
    leaves,
    load_config,
    type_words,
)
from mot_jax.config.hints import options as union_members
from mot_jax.config.renamed import new_flag, new_value
from mot_jax.errors import ReportedError, UserError, nearest
from mot_jax.runtime.paths import is_remote, read_file, user_path

Options = TypeVar("Options")
HELP = ("-h", "--help")
ABOUT_DEBUG = "--debug, at any place, prints the traceback of a reported error as well."
_EXAMPLES = {
    "CONFIG": "configs/demo.py",
    "WORKDIR": "runs/demo",
    "DIR": "runs/mine",
    "KIND": "token_choice",
    "N": "100",
    "STUDY": "configs/studies/smoke.py",
}  # values that work, by metavar


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """Annotation of a whole number with its smallest allowed value."""

    least: int


@dataclasses.dataclass(frozen=True)
class Written:
    """Annotation of a file that a command writes."""

    example: str


Positive = Annotated[int, AtLeast(1), tyro.conf.arg(metavar="N")]
PositiveOrNone = Annotated[int | None, AtLeast(1), tyro.conf.arg(metavar="N")]
NumberOrNone = Annotated[int | None, tyro.conf.arg(metavar="N")]
Text = Annotated[str, tyro.conf.arg(metavar="TEXT")]
Texts = tyro.conf.UseAppendAction[Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")]]
File = Annotated[str, tyro.conf.arg(metavar="FILE")]
FileOrNone = Annotated[str | None, tyro.conf.arg(metavar="FILE")]
OutputFileOrNone = Annotated[str | None, Written("result.json"), tyro.conf.arg(metavar="FILE")]
PictureFile = Annotated[str, Written("picture.png"), tyro.conf.arg(metavar="FILE")]
PictureFileOrNone = Annotated[str | None, Written("picture.png"), tyro.conf.arg(metavar="FILE")]
Directory = Annotated[str, tyro.conf.arg(metavar="DIR")]
DirectoryOrNone = Annotated[str | None, tyro.conf.arg(metavar="DIR")]
ConfigFile = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CONFIG")]]
Workdir = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="WORKDIR")]]
Flag = tyro.conf.FlagCreatePairsOff[bool]  # without `--no-flag`


class Option(NamedTuple):
    """One field of a command's dataclass, as an argument."""

    field: str
    flags: tuple[str, ...]  # empty: a positional argument
    metavar: str
    hint: Any  # the type without annotations
    least: int | None
    written: Written | None  # of a file that the command writes
    default: Any  # `dataclasses.MISSING` of a required one

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def name(self) -> str:
        return self.flags[0] if self.flags else self.metavar


def options_of(command: type) -> list[Option]:
    """The arguments that a command's dataclass defines, of which some are annotated with `tyro.conf.Positional`."""
    positional = typing.get_args(tyro.conf.Positional[str])[1]
    hints = typing.get_type_hints(command, include_extras=True)
    arguments = []
    for field in dataclasses.fields(command):
        hint, *notes = _unwrap(hints[field.name])
        names = [field.name.replace("_", "-")]
        metavar, least, written = names[0].upper(), None, None
        for note in notes:
            if isinstance(note, AtLeast):
                least = note.least
            if isinstance(note, Written):
                written = note
            metavar = getattr(note, "metavar", None) or metavar
            names = [getattr(note, "name", None) or names[0], *(getattr(note, "aliases", None) or names[1:])]
        flags = () if positional in notes else tuple(n if n.startswith("-") else f"--{n}" for n in names)
        arguments.append(Option(field.name, flags, metavar, hint, least, written, field.default))
    return arguments


def _unwrap(hint: Any) -> list[Any]:
    """A type without annotations, and its annotations."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Annotated else [hint]


def flags_of(command: type) -> list[str]:
    """The flags of a command's own options."""
    return [flag for option in options_of(command) for flag in option.flags]


def parse(prog: str, command: type[Options], arguments: Sequence[str]) -> Options:
    """Parse the arguments of a command without a config. Prints the help and exits for `--help`.

    Raises UserError with every error of the arguments.
    """
    own_options = options_of(command)
    values, chunks = _separate(arguments, _arities(own_options))
    if _asks_for_help(chunks):
        _show_help(prog, command)
    known = flags_of(command)
    unknown = [chunk[0] for chunk in chunks if _flag(chunk) not in known]
    faults = [f"{flag}: no such flag{nearest(flag.partition('=')[0], known)}" for flag in unknown]
    faults += _own_faults(prog, own_options, values, chunks)
    if faults:
        raise UserError(*faults)
    return _build(prog, command, [*values, *_joined(chunks)])


def parse_with_config(
    prog: str, command: type[Options], arguments: Sequence[str], load: Callable[[str], Config] | None = None
) -> tuple[Options, Config]:
    """Parse the arguments of a command whose positional argument, at any place, names a config or a run's directory.

    Args:
        prog: the command as the user writes it.
        command: the dataclass of its own options; its only positional field is the config or directory.
        arguments: the arguments after the command.
        load: function from that argument to a Config, `load_run_config` for a run's directory; no flag may then change
            a field that is part of the run's identity. None: `load_target`.

    Returns:
        The command's own options, and the config with the changes by `--group.field VALUE` flags.

    Raises:
        UserError: with every error of the arguments.
    """
    target, own_arguments, config_flags, faults = _split(prog, command, arguments)
    loaded = (load or load_target)(target)
    check(loaded)
    config = override(prog, loaded, config_flags, flags_of(command), faults)
    options = _build(prog, command, own_arguments)
    check(config)
    if load is not None and (changes := identity_changes(loaded, config)):
        raise UserError(*changes)
    return options, config


def parse_with_config_flags(prog: str, command: type[Options], arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Parse as `parse_with_config`, and return the `--group.field VALUE` flags: their config depends on the options.

    Raises UserError with every error of the command's own arguments.
    """
    _, own_arguments, config_flags, faults = _split(prog, command, arguments)
    if faults:
        raise UserError(*faults)
    return _build(prog, command, own_arguments), config_flags


def _split(prog: str, command: type, arguments: Sequence[str]) -> tuple[str, list[str], list[str], list[str]]:
    """Split the arguments of a command with a config. Prints the help and exits for `--help`.

    Returns:
        The config or directory, the command's own arguments, the flags of config fields, and the errors of the former.
    """
    own_options = options_of(command)
    arities = _arities(own_options)
    values, chunks = _separate(arguments, _config_arities() | arities)
    target = next((value for value in values if is_target(value)), values[0] if values else None)
    if _asks_for_help(chunks):
        _show_help(prog, command, _config_for_help(target))
    own_chunks = [chunk for chunk in chunks if _flag(chunk) in arities]
    config_flags = [part for chunk in chunks if _flag(chunk) not in arities for part in chunk]
    if target is None:
        positional = next(option for option in own_options if not option.flags)
        if positional.required:
            raise UserError(f"{positional.metavar} is missing; try {_example(prog, own_options)}")
        target, values = positional.default, [positional.default]
    values.remove(target)
    faults = [f"{value}: not understood; flags are --group.field VALUE, as --training.steps 100" for value in values]
    faults += _own_faults(prog, own_options, [target], own_chunks)
    return target, [target, *_joined(own_chunks)], config_flags, faults


def dispatch(prog: str, about: str, commands: Mapping[str, Callable[[list[str]], None]], arguments: list[str]) -> None:
    """Call the subcommand that the first argument names, with the others.

    Args:
        prog: the command as the user writes it.
        about: sentence for the help.
        commands: functions by name; the docstring of each is its line in the help.
        arguments: those after `prog`.

    Raises:
        UserError: if there is no such subcommand.
    """
    if arguments[:1] and arguments[0] in HELP:
        width = max(map(len, commands))
        print(f"usage: {prog} COMMAND [arguments]\n\n{about}\n")
        for name, command in commands.items():
            print(f"  {name:{width}}  {command.__doc__}")
        print(f"\n`{prog} COMMAND --help` explains a command and its flags.\n{ABOUT_DEBUG}")
        raise SystemExit(0)
    if not arguments:
        raise UserError(f"COMMAND is missing; try {prog} {next(iter(commands))}, or one of {', '.join(commands)}")
    name, *rest = arguments
    if name not in commands:
        raise UserError(f"{name}: no such command{nearest(name, commands)}")
    commands[name](rest)


def load_run(workdir: str) -> Config:
    """Load the config of the run in a directory. The import of JAX is here: help and some errors do not wait for it."""
    from mot_jax.runs import restore

    return restore.load_run_config(workdir)


def override(
    prog: str, config: Config, flags: list[str], own_flags: Sequence[str] = (), faults: Sequence[str] = ()
) -> Config:
    """Change the fields of a config that `--group.field VALUE` flags name.

    Args:
        prog: the command as the user writes it.
        config: the config before the changes. Flags change fields of its feed-forward layer, never the kind.
        flags: the arguments.
        own_flags: flags of the command itself, among which the nearest one is looked for, too.
        faults: errors of other arguments, reported together with those of the flags.

    Raises:
        UserError: with every error.
    """
    hints = {name: hint for name, _, hint, _ in leaves(config)}
    known = [*own_flags, *map(_flag_of_field, hints)]
    given, faults = chunks(flags), [*faults]
    unknown = False
    for chunk in given:
        name = _flag(chunk).removeprefix("--").replace("-", "_")
        if name in hints or (name.rpartition(".no_")[1] and name.replace(".no_", ".") in hints):
            continue  # `--group.no-field` is tyro's form of False
        unknown = True
        now = new_flag(config, chunk[0])
        faults.append(f"{chunk[0]}: " + (f"is now {now}" if now else f"no such flag{nearest(_flag(chunk), known)}"))
    if not unknown:
        with contextlib.suppress(SystemExit), _silence():
            changed = _tyro(prog, config, flags)
            if not faults:
                return changed
        faults += [fault for chunk in given if (fault := _value_fault(prog, config, chunk, hints))]
    raise UserError(*faults)


def _value_fault(prog: str, config: Config, chunk: list[str], hints: Mapping[str, Any]) -> str | None:
    """The error of one flag of the config's fields with its values, if it has one."""
    try:
        with _silence():
            _tyro(prog, config, chunk)
    except SystemExit:
        name = _flag(chunk).removeprefix("--").replace("-", "_")
        value = " ".join(chunk[1:]) or chunk[0].partition("=")[2]
        if now := new_value(name, value):
            return f"{name} = {value!r}: is now {now!r}"
        current: object = config
        for field in name.split("."):
            current = getattr(current, field, None)
        return f"{name} = {value!r}: must be {type_words(hints.get(name, bool))}; here it is {current!r}"
    return None


def _tyro(prog: str, config: Config, flags: Sequence[str]) -> Config:
    with _registered_kinds():
        return tyro.cli(tyro.conf.AvoidSubcommands[Config], prog=prog, default=config, args=flags)


@contextlib.contextmanager
def _registered_kinds() -> Iterator[None]:
    """Accept the config of a kind that a file has registered, and that the type of the field does not have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"<class .*Config'> does not match any type in Union")
        yield


# --- arguments into flags and values ----------------------------------------------------------------------------------


def is_target(text: str) -> bool:
    """Whether an argument names a config, `FILE.py` or `FILE.py:VARIANT`, or the directory of a run."""
    if re.fullmatch(r".*\.py(:\w+)?", text):
        return True
    with contextlib.suppress(OSError, ValueError, ReportedError):
        return bool(text) and (user_path("config", text) / "config.json").exists()
    return False


def load_target(text: str) -> Config:
    """The config that an argument names: that of a file, or of a run, which may be on an object store.

    Raises UserError or RetryableError.
    """
    if not is_remote(text):
        return load_config(text)
    file = user_path("config", default_workdir(text)) / "config.json"
    return from_json(read_file(file, "try the directory of a run"), str(file))


def chunks(flags: Sequence[str]) -> list[list[str]]:
    """Each flag with its values."""
    chunks: list[list[str]] = []
    for flag in flags:
        if flag.startswith("--") or not chunks:
            chunks.append([flag])
        else:
            chunks[-1].append(flag)
    return chunks


def _separate(arguments: Sequence[str], arities: Mapping[str, int | None]) -> tuple[list[str], list[list[str]]]:
    """The positional values, and each flag with its values.

    arities: number of values by flag; None: any number. A flag that is not among them takes any number.
    """
    values: list[str] = []
    chunks: list[list[str]] = []
    free = 0  # number of values that the last flag may still take
    for argument in arguments:
        if argument.startswith("--") or argument in ("-h", *arities):
            chunks.append([argument])
            name, equals, _ = argument.partition("=")
            arity = 0 if equals or name in HELP else arities.get(name.replace("_", "-"))
            free = sys.maxsize if arity is None else arity
        elif free == 1 or (free > 1 and not is_target(argument)):
            chunks[-1].append(argument)
            free -= 1
        else:
            values.append(argument)
    return values, chunks


def _flag(chunk: list[str]) -> str:
    """The flag of a chunk, with hyphens."""
    return chunk[0].partition("=")[0].replace("_", "-")


def _flag_of_field(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _joined(chunks: list[list[str]]) -> list[str]:
    """The arguments `--flag=value`, so that a value may begin with a hyphen."""
    return ["=".join(chunk) for chunk in chunks]


def _arities(options: list[Option]) -> dict[str, int | None]:
    return {flag: 0 if option.hint is bool else 1 for option in options for flag in option.flags}


@functools.cache
def _config_arities() -> dict[str, int | None]:
    """Number of values by flag, for the fields of a Config with every kind of feed-forward layer."""
    arities: dict[str, int | None] = {}
    for kind in union_members(typing.get_type_hints(ModelConfig)["feed_forward"]):
        for name, _, hint, _ in leaves(Config(model=ModelConfig(feed_forward=kind()))):
            flag = _flag_of_field(name)
            members = union_members(hint)
            if hint is bool:
                group, _, field = flag.rpartition(".")
                arities[flag] = arities[f"{group}.no-{field}"] = 0
            else:
                arities[flag] = None if any(typing.get_origin(member) is tuple for member in members) else 1
    return arities


# --- a command's own options ------------------------------------------------------------------------------------------


def _own_faults(prog: str, options: list[Option], values: list[str], chunks: list[list[str]]) -> list[str]:
    """The errors of a command's own arguments: missing ones, and values of another type."""
    by_flag = {flag: option for option in options for flag in option.flags}
    given: dict[str, list[str]] = {}
    faults = []
    for chunk in chunks:
        if _flag(chunk) not in by_flag:
            continue
        option = by_flag[_flag(chunk)]
        value = chunk[1] if len(chunk) > 1 else chunk[0].partition("=")[2] if "=" in chunk[0] else None
        given.setdefault(option.name, []).append(value or "")
        if option.hint is bool:
            rule = None if value is None else f"takes no value; try {option.name}"
        elif value is None:
            rule = f"a value is missing; try {option.name} {_value_that_works(option)}"
        else:
            rule = _type_fault(option, value)
        if rule:
            faults.append(f"{_flag(chunk)}{'' if value is None else f' = {value!r}'}: {rule}")
    positional = [option for option in options if not option.flags]
    missing = [option for option in positional if option.required][len(values) :]
    missing += [option for option in options if option.flags and option.required and option.name not in given]
    faults += [f"{option.name} is missing; try {_example(prog, options)}" for option in missing]
    if positional and typing.get_origin(positional[-1].hint) is not tuple:
        faults += [f"{value}: not understood; try {_example(prog, options)}" for value in values[len(positional) :]]
    return faults


def _type_fault(option: Option, value: str) -> str | None:
    """The rule that a value of a command's own option breaks, with a value that works."""
    members = [member for member in union_members(option.hint) if member is not type(None)]
    if not value and str in members and option.metavar != "TEXT":
        rule = "be a path" if option.metavar in ("FILE", "DIR") else "not be empty"
        return f"must {rule}; try {option.name} {_value_that_works(option)}"
    choices = [
        choice for member in members if typing.get_origin(member) is Literal for choice in typing.get_args(member)
    ]
    if choices:
        return None if value in choices else f"must be {' or '.join(map(repr, choices))}{nearest(value, choices)}"
    if int in members:
        least = option.least
        number = re.fullmatch(r"-?[0-9]+", value)
        if not number or (least is not None and int(value) < least):
            rule = "" if least is None else f", at least {least}"
            return f"must be a whole number{rule}; try {_value_that_works(option)}"
    if float in members:
        try:
            float(value)
        except ValueError:
            return f"must be a number; try {_value_that_works(option)}"
    return None


def _value_that_works(option: Option) -> str:
    if isinstance(option.default, (int, float)):
        return str(option.default)
    members = union_members(option.hint)
    return "32" if int in members else "0.5" if float in members else _EXAMPLES.get(option.metavar, option.metavar)


def _example(prog: str, options: list[Option]) -> str:
    """The shortest command with all required arguments."""
    words = [prog]
    for option in options:
        value = _EXAMPLES.get(option.metavar, option.metavar)
        if not option.flags:
            words.insert(1 + sum(not o.flags for o in options[: options.index(option)]), value)
        elif option.required:
            words += [option.name, value]
    return " ".join(words)


def _build(prog: str, command: type[Options], arguments: list[str]) -> Options:
    with _silence() as output, contextlib.suppress(SystemExit):
        options = tyro.cli(command, prog=prog, args=arguments)
        _check_outputs(options)
        return options
    words = " ".join(re.sub(r"[╭╮╰╯│─]", " ", output.getvalue()).split())
    raise UserError(f"{words}; see {prog} --help")


_PATHS = ("FILE", "DIR", "CONFIG", "WORKDIR")
# Paths of a run's or an export's files in its directory.
RUN_FILES = (
    r"(config|data|result|status|owner|modes|transition)\.json|metrics\.jsonl|companions\.npy|thresholds\.json|tokenizer\.\w+|"
    r"(error(_\d+)?|sample)\.txt|(loss|transition)\.png|.*\.safetensors(\.index\.json)?|"
    r"(checkpoints|metrics|tensorboard)/.*"
)


def _check_outputs(options: object) -> None:
    """Raise UserError if a file that the command writes is another output, an input, or a file of a run that it reads.

    Results of earlier commands, in a run's directory too, may be replaced.
    """
    paths: list[tuple[Option, str]] = []
    for option in options_of(type(options)):
        value = getattr(options, option.field)
        values = value if isinstance(value, tuple) else (value,)
        if option.metavar.removesuffix(",...") in _PATHS:
            paths += [(option, _resolved(value)) for value in values if isinstance(value, str)]
    for option, output in paths:
        if option.written is None:
            continue
        for other, path in paths:
            if other is not option and (_is_same_file(output, path) or _is_file_of_run(output, path)):
                rule = f"would replace a file of {other.name}; try {option.written.example}"
                raise UserError(f"{option.name} = {getattr(options, option.field)}: {rule}")


def _resolved(path: str) -> str:
    """An absolute path without links, an address in a store, or the file of a config `FILE.py:VARIANT`."""
    path = re.sub(r"(\.py):\w+$", r"\1", path)
    return path if "://" in path else os.path.realpath(os.path.expanduser(path))


def _is_same_file(path: str, other: str) -> bool:
    """Whether two resolved paths are of one file, also by a hard link, or are equal if there is none."""
    with contextlib.suppress(OSError, ValueError):
        return os.path.samefile(path, other)
    return path == other


def _is_file_of_run(path: str, directory: str) -> bool:
    """Whether a resolved path is, or would be, of a file of the run or export in a directory."""
    if "://" not in directory and not os.path.isfile(os.path.join(directory, "config.json")):
        return False
    inside = directory.rstrip("/") + "/"
    if path.startswith(inside):
        return bool(re.fullmatch(RUN_FILES, path.removeprefix(inside)))
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return any(_is_same_file(path, inside + name) for name in names if re.fullmatch(RUN_FILES, name))


@contextlib.contextmanager
def _silence() -> Iterator[io.StringIO]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        yield output


# --- help -------------------------------------------------------------------------------------------------------------


def _asks_for_help(chunks: list[list[str]]) -> bool:
    return any(chunk[0] in HELP for chunk in chunks)


def _config_for_help(target: str | None) -> Config:
    """The config whose values the help shows as defaults: the named one if it can be loaded, else `Config()`."""
    if target is not None:
        with contextlib.suppress(ReportedError, OSError):
            return load_target(target)
    return Config()


def _show_help(prog: str, command: type, config: Config | None = None) -> NoReturn:
    """Print the help of a command, with the flags of the config's fields if it has a config, and exit."""
    shown, default = command, None
    if config is not None:
        defaults = {option.field: tyro.MISSING if option.required else option.default for option in options_of(command)}
        annotations = {
            "options": Annotated[command, tyro.conf.arg(name="")],
            "config": Annotated[tyro.conf.AvoidSubcommands[Config], tyro.conf.arg(name="")],
        }
        shown = dataclasses.make_dataclass("shown", annotations.items())
        shown.__doc__ = command.__doc__
        default = shown(command(**defaults), config)
    with contextlib.suppress(SystemExit), _registered_kinds():
        tyro.cli(shown, prog=prog, default=default, args=["--help"])
    print(ABOUT_DEBUG)
    raise SystemExit(0)
