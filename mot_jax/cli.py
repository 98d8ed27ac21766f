"""The command line: parses, calls, prints."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import tyro

from mot_jax import cli_convert, distributed
from mot_jax.config import (
    Config,
    ConfigError,
    TransientError,
    check,
    error_words,
    identity_changes,
    leaves,
    load_config,
    nearest,
    type_words,
)
from mot_jax.inference.modes import MODES, regrouped
from mot_jax.paths import local_path, user_path

DOES_NOT_FIT = 1
BAD_INPUT = 2


class _Parser(argparse.ArgumentParser):
    """Tells a mistake as we tell all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help tells more")


def main(arguments: Sequence[str] | None = None) -> None:
    """`mot COMMAND ...`"""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"train": _train, "describe": _describe, "data": _data, "evaluate": _evaluate}
    commands |= {"inspect": _inspect, "curves": _curves, "plan": _plan, "export": _export, "import": _import}
    epilog = "\n".join(f"{name:9} {command.__doc__}" for name, command in commands.items())
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        "mot", description="Mixture-of-Tokens language models in JAX.", epilog=epilog, formatter_class=form
    )
    parser.add_argument("command", choices=commands)
    with distributed.ending(), _errors_for_people():
        commands[parser.parse_args(arguments[:1]).command](arguments[1:])


def train() -> None:
    """`python train.py ...`, the same as `mot train ...`."""
    main(["train", *sys.argv[1:]])


def _train(arguments: list[str]) -> None:
    """train, or go on with, a model: mot train [CONFIG] [--workdir DIR] [--training.steps N ...]"""
    options, config = _parse("mot train", arguments, "configs/demo.py", ["--workdir", *_PROCESS])
    distributed.connect(_process(options, config), config.mesh)
    from mot_jax.training import loop  # only here: a mistake on the command line should not wait for these imports

    loop.train(config, options.workdir or f"runs/{Path(options.config).stem}")


_PROCESS = ["--coordinator", "--num-processes", "--process-id"]


def _process(options: argparse.Namespace, config: Config) -> distributed.Process | None:
    """This process, of several, by the flags or else by the cluster."""
    named = distributed.from_flags(options.coordinator, options.num_processes, options.process_id)
    return named or distributed.detect(config.mesh.wait_seconds)


def _describe(arguments: list[str]) -> None:
    """parameters, FLOPs and memory of a config: mot describe CONFIG [--json FILE] [--model.d-model N ...]"""
    options, config = _parse("mot describe", arguments, None, ["--json"])
    from mot_jax import accounting

    description = accounting.describe(config)
    for line in description.lines():
        print(line)
    if options.json:
        _write_json(options.json, description.to_dict())


def _plan(arguments: list[str]) -> None:
    """memory, collectives and modelled time on a machine you need not have: mot plan CONFIG --topology v5p:8x8x8"""
    options, config = _parse("mot plan", arguments, None, ["--topology", "--slices", "--json"])
    from mot_jax.planning.hardware import KNOWN, parse_topology

    if options.topology is None:
        raise ConfigError(f"--topology is missing; known: {KNOWN}")
    slices = _positive("--slices", options.slices or "1")
    if parse_topology(options.topology, slices).hardware:
        os.environ["JAX_PLATFORMS"] = "cpu"  # the chips are not here
    from mot_jax.planning.plan import plan

    result = plan(config, options.topology, slices, functools.partial(print, flush=True))
    for line in result.lines():
        print(line)
    if options.json:
        _write_json(options.json, {"config": options.config, **result.to_dict()})
    if not result.fits:
        sys.exit(DOES_NOT_FIT)


def _evaluate(arguments: list[str]) -> None:
    """score a model on a split: mot evaluate WORKDIR [--split S] [--mode grouped|discrete] [--group-size G]"""
    from mot_jax.training.restore import load_run_config

    own = ["--split", "--mode", "--group-size", "--windows", "--json", *_PROCESS]
    options, config = _parse("mot evaluate", arguments, None, own, load_run_config)
    if options.mode not in (None, *MODES):
        raise ConfigError(f"--mode = {options.mode!r}: no such mode{nearest(options.mode, MODES)}")
    config = MODES[options.mode or "grouped"](config)
    if options.group_size is not None:
        config = regrouped(config, _positive("--group-size", options.group_size))
    limit = None if options.windows is None else _positive("--windows", options.windows)
    distributed.connect(_process(options, config), config.mesh, trains=False)
    from mot_jax.training import evaluation, metrics

    split = options.split or config.data.validation_split
    result = evaluation.evaluate_run(options.config, config, split, limit)
    if not distributed.is_first():
        return
    print(f"{split} split of {' + '.join(config.data.corpus)}, groups of {config.group_size}")
    print(metrics.validation_line(result))
    if options.json:
        _write_json(options.json, {"workdir": options.config, "split": split, "mode": options.mode, **result})


def _positive(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{name} = {text!r}: must be a whole number, at least 1; try 32")
    return int(text)


def _write_json(path: str, content: dict) -> None:
    try:
        user_path("--json", path).write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(
            f"--json = {path}: cannot be written ({error.strerror or error_words(error)}); try result.json"
        ) from None


def _curves(arguments: list[str]) -> None:
    """draw the loss curves of runs into one picture: mot curves WORKDIR [WORKDIR ...] [--output curves.png]"""
    parser = _Parser(prog="mot curves", allow_abbrev=False)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    parser.add_argument("--output", default="curves.png", metavar="FILE")
    options = parser.parse_args(arguments)
    from mot_jax.training import metrics

    workdirs = [user_path("WORKDIR", path) for path in options.workdirs]
    runs = {path.name: metrics.read_rows(path) for path in workdirs}
    for path, rows in zip(options.workdirs, runs.values(), strict=True):
        if not rows:
            raise ConfigError(f"WORKDIR = {path}: holds no rows of metrics; try the --workdir of a training run")
    try:
        user_path("--output", options.output).write_bytes(metrics.plot_curves(runs))
    except OSError as error:
        raise ConfigError(
            f"--output = {options.output}: cannot be written ({error.strerror or error_words(error)}); try curves.png"
        ) from None
    print(options.output)


def _inspect(arguments: list[str]) -> None:
    """what a trained model mixes, in pictures: mot inspect WORKDIR [--output DIR] [--group N] [--position S]"""
    parser = _Parser(prog="mot inspect", allow_abbrev=False)
    parser.add_argument("workdir", metavar="WORKDIR")
    parser.add_argument("--output", metavar="DIR", help="default: WORKDIR/inspect")
    parser.add_argument("--group", type=int, default=0, metavar="N", help="of the validation split (default: 0)")
    parser.add_argument("--position", type=int, metavar="S", help="default: the middle of the window")
    options = parser.parse_args(arguments)
    from mot_jax.inference.inspect import inspect

    for line in inspect(options.workdir, options.output, options.group, options.position):
        print(line)


def _export(arguments: list[str]) -> None:
    """a model as safetensors: mot export WORKDIR --output DIR [--dtype bfloat16] [--overwrite]"""
    cli_convert.export(_Parser("mot export", allow_abbrev=False), arguments)


def _import(arguments: list[str]) -> None:
    """the authors' model, or the Hugging Face port's: mot import FILE.safetensors --config CONFIG --output DIR"""
    cli_convert.import_(_Parser("mot import", allow_abbrev=False), arguments)


def _data(arguments: list[str]) -> None:
    """corpora: mot data build NAME FILE ... | inspect NAME | train-tokenizer NAME --output FILE"""
    parser = _Parser(prog="mot data", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="build | inspect | train-tokenizer")
    command = commands.add_parser("build", help="make a corpus out of files", allow_abbrev=False)
    command.add_argument("name", metavar="NAME", help="what to call it in data.corpus")
    command.add_argument("files", nargs="+", metavar="FILE", help="files, patterns or directories; .gz too")
    command.add_argument("--feature", default="text", help="the field or column with the text (default: text)")
    command.add_argument("--documents", default="file", choices=["file", "line", "paragraph"], help="of plain text")
    command.add_argument("--validation", type=float, default=0.01, metavar="SHARE", help="of the documents (0.01)")
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: as many as there are cores)")
    for name, text in {"inspect": "what a corpus holds", "train-tokenizer": "a tokenizer out of a corpus"}.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("name", metavar="NAME", help="as in data.corpus")
        command.add_argument("--split", default="train")
        command.add_argument("--feature", default="text")
        if name == "inspect":
            command.add_argument("--tokenizer", help="tell its bytes per token")
            command.add_argument("-n", type=int, default=3, metavar="N", help="documents to show (3)")
        else:
            command.add_argument("--vocab-size", type=int, default=8192, metavar="V")
            command.add_argument("--kind", default="bpe", choices=["bpe", "sentencepiece"])
            command.add_argument("--output", required=True, metavar="FILE")
    for command in commands.choices.values():
        command.add_argument("--directory", metavar="DIR", help="of prepared text, as data.directory")
    options = parser.parse_args(arguments)
    from mot_jax.data import DATA_DIRECTORY

    directory = Path(local_path("--directory", options.directory or DATA_DIRECTORY)).absolute()
    if options.command == "build":
        from mot_jax.data.build import build, plan_files

        if options.workers is not None and options.workers < 1:
            raise ConfigError(f"--workers = {options.workers}: must be at least 1; try 1")
        plan = plan_files(options.name, options.files, options.documents, options.feature, options.validation)
        build(plan, directory / "corpora", options.workers, functools.partial(print, flush=True))
        return
    from mot_jax.data import corpora, report, tokenizers

    if options.command == "train-tokenizer":
        tokenizers.check_suffix(options.output, options.kind)
    corpus = corpora.open_corpus(options.name, options.split, directory, options.feature)
    if options.command == "inspect":
        tokenizer = tokenizers.load_tokenizer(options.tokenizer) if options.tokenizer else None
        for line in report.lines(corpus, tokenizer, options.n):
            print(line)
    else:
        train = functools.partial(tokenizers.train_tokenizer, vocab_size=options.vocab_size, kind=options.kind)
        print(report.write_tokenizer(corpus, train, options.output))


# --- configs ----------------------------------------------------------------------------------------------------------


def _parse(
    prog: str,
    arguments: list[str],
    default: str | None,
    own: list[str],
    load: Callable[[str], Config] = load_config,
) -> tuple[argparse.Namespace, Config]:
    """The command's own options, and the config of the file (or workdir) it names with what the flags change of it."""
    parser = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    for option in own:
        parser.add_argument(option)
    options, rest = parser.parse_known_args(arguments)
    options.config = "configs/demo.py" if "--help" in rest else default
    if rest and not rest[0].startswith("-"):
        options.config = rest.pop(0)
    if options.config is None:
        word, example = ("CONFIG", "configs/demo.py") if load is load_config else ("WORKDIR", "runs/demo")
        raise ConfigError(f"{word} is missing; try {prog} {example}")
    loaded = load(options.config)
    check(loaded)
    config = _override(prog, loaded, rest, own)
    check(config)
    if load is not load_config and (changes := identity_changes(loaded, config)):
        raise ConfigError(*changes)
    return options, config


def _override(prog: str, config: Config, flags: list[str], own: list[str]) -> Config:
    """The config with the fields that `--group.field VALUE` flags name. Raises ConfigError with every mistake."""
    help_wanted = any(flag in ("-h", "--help") for flag in flags)
    if help_wanted:
        print(f"usage: {prog} [CONFIG] {' '.join(f'[{o} VALUE]' for o in own)} [--group.field VALUE ...]\n")
        _tyro(prog, config, ["--help"])
    chunks = _chunks(flags)
    names = {name: hint for name, _, hint, _ in leaves(config)}
    faults = []
    for chunk in chunks:
        name = chunk[0].removeprefix("--").partition("=")[0].replace("-", "_")
        if not chunk[0].startswith("--"):
            faults.append(f"{chunk[0]}: not understood; flags are --group.field VALUE, as --training.steps 100")
        elif name.rpartition(".no_")[1] and name.replace(".no_", ".") in names:
            pass  # tyro's way to say False
        elif name not in names:
            faults.append(f"{chunk[0]}: no such field{nearest(name, [*names, *(o.strip('-') for o in own)])}")
    if not faults:
        with contextlib.suppress(SystemExit), _silence():
            return _tyro(prog, config, flags)
        for chunk in chunks:  # each by itself, to find which
            try:
                with _silence():
                    _tyro(prog, config, chunk)
            except SystemExit:
                name = chunk[0].removeprefix("--").partition("=")[0].replace("-", "_")
                value = " ".join(chunk[1:]) or chunk[0].partition("=")[2]
                hint = type_words(names.get(name, bool))
                faults.append(f"{name} = {value!r}: must be {hint}; here it is {_get(config, name)!r}")
    raise ConfigError(*faults)


def _tyro(prog: str, config: Config, flags: Sequence[str]) -> Config:
    """The kind of feed-forward layer is the file's: flags change its fields, never the kind."""
    return tyro.cli(tyro.conf.AvoidSubcommands[Config], prog=prog, default=config, args=flags)


def _chunks(flags: list[str]) -> list[list[str]]:
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


# --- errors -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _errors_for_people() -> Iterator[None]:
    """One line for each of the user's mistakes, and for a full disk; exit code 2. Else it is ours: a traceback.

    What may pass by itself is told in one line too, with exit code 75.
    """
    try:
        yield
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        sys.exit(distributed.TEMPORARY if isinstance(error, TransientError) else BAD_INPUT)
    except Exception as error:
        if not _disk_is_full(error):
            raise
        advice = "free some and run the same command, which goes on from the last checkpoint"
        print(f"error: no space left on the disk ({error_words(error)}); {advice}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
