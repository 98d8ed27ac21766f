"""Loading and storing configs: the Python file of an experiment, and the strict, versioned JSON of a run."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import json
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from mot_jax.config import fields
from mot_jax.config.checks import check
from mot_jax.config.fields import Config
from mot_jax.config.hints import leaves, matches, options
from mot_jax.config.renamed import new_field
from mot_jax.errors import ReportedError, UserError, error_words, nearest

T = TypeVar("T")
KINDS_VARIABLE = "MOT_JAX_KINDS"  # of the environment: files that register kinds, separated as in PATH
FORMAT_VERSION = 3


def load_config(name: str | os.PathLike[str]) -> Config:
    """Load the config of `FILE.py` or `FILE.py:VARIANT`, or of a run: its directory or the `config.json` in it.

    The file defines `get_config() -> Config`, or `VARIANTS: dict[str, Callable[[], Config]]` and
    `get_config(variant: str | None = None) -> Config`, see `select`.

    Raises:
        UserError: the file is missing or broken, or has no such variant.
    """
    path, _ = _split(name)
    if (stored := _stored_config(path)) is not None:
        try:
            return from_json(stored.read_bytes(), os.fspath(stored))
        except OSError as error:
            raise UserError(f"config = {stored}: cannot be read ({error.strerror}); use another one") from None
    config = call_in_file("config", name, "get_config() -> Config", "configs/demo.py")
    if not isinstance(config, Config):
        raise UserError(f"config = {name}: get_config() must return a mot_jax Config, and returned {config!r}")
    return config


def select(variants: Mapping[str, Callable[[], T]], variant: str | None, *, has_default: bool = True) -> T:
    """Build one of the `VARIANTS` of a config's or a study's file: the body of its `get_config` or `get_study`.

    Args:
        variants: functions that build the configs or studies, by name.
        variant: the name of one, or None for the first.
        has_default: False if the variant must be named.

    Raises:
        UserError: there is no such variant, or none is named and there is no default.
    """
    if not variants:
        raise UserError("VARIANTS is empty: must have at least one function")
    if variant is None and has_default:
        variant = next(iter(variants))
    if variant is None or variant not in variants:
        raise _VariantError(variant, list(variants))
    return variants[variant]()


class _VariantError(UserError):
    """A variant that is missing or unknown; `call_in_file` adds the name of the file."""

    def __init__(self, variant: str | None, names: list[str]):
        rule = "a variant must be named" if variant is None else f"no variant '{variant}'"
        super().__init__(f"{rule}; the variants are {', '.join(names)}")
        self.nearest = difflib.get_close_matches(variant or "", names, n=1, cutoff=0)[0] if variant else names[0]


def call_in_file(argument: str, name: str | os.PathLike[str], signature: str, example: str) -> Any:
    """Call a function of a user's Python file, `FILE.py` or `FILE.py:VARIANT`: its argument is the variant, if any.

    Args:
        argument: the argument that names the file, for errors.
        name: of the file, with a variant or without.
        signature: of the function, as `get_study() -> Study`.
        example: a file that has such a function.

    Raises:
        UserError: the file is missing or broken, or has no such variant.
    """
    path, variant = _split(name)
    module = _load_module(path, argument, signature, example)
    if variant is not None and not hasattr(module, "VARIANTS"):
        raise UserError(f"{argument} = {name}: the file has no VARIANTS; try {path}")
    function = getattr(module, signature.partition("(")[0])
    try:
        return function() if variant is None else function(variant)
    except _VariantError as error:
        raise UserError(f"{argument} = {name}: {error}; try {path}:{error.nearest}") from None
    except ReportedError:
        raise
    except Exception as error:
        raise UserError(f"{argument} = {path}{_place_of(error, path)}: {_load_error(error)}") from error


def name_of_variant(name: str | os.PathLike[str]) -> str:
    """Return `FILE` for `FILE.py`, and `FILE_VARIANT` for `FILE.py:VARIANT`."""
    path, variant = _split(name)
    return path.stem if variant is None else f"{path.stem}_{variant}"


def variants_of(path: str | os.PathLike[str]) -> dict[str, Callable[[], Any]]:
    """The `VARIANTS` of a file of configs or studies; empty if it has none."""
    return dict(getattr(execute_file(Path(path), "config", "configs/demo.py"), "VARIANTS", {}))


def default_workdir(name: str | os.PathLike[str]) -> str:
    """The directory of a run of this config.

    That is `runs/FILE` for the default variant of a file, `runs/FILE_VARIANT` for the others, and for the config of a
    run the directory of this run.
    """
    if "://" in os.fspath(name):  # a run on an object store
        return os.fspath(name).removesuffix("/config.json")
    path, variant = _split(name)
    if (stored := _stored_config(path)) is not None and stored.name == "config.json":
        return str(stored.parent)
    is_default = variant is None or (variant == next(iter(variants_of(path)), None) and _has_default(path))
    return f"runs/{path.stem if is_default else name_of_variant(name)}"


def _has_default(path: Path) -> bool:
    try:
        _load_module(path).get_config()
    except Exception:  # of a function that requires a variant
        return False
    return True


def _stored_config(path: Path) -> Path | None:
    """The JSON file that `path` names: the `config.json` of a run's directory, or the file itself."""
    files = (path / "config.json", path)
    return next((file for file in files if file.suffix == ".json" and file.is_file()), None)


def _split(name: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The parts of `FILE.py` or `FILE.py:VARIANT`."""
    name = os.path.expanduser(name)
    file, separator, variant = name.rpartition(".py:")
    return (Path(file + ".py"), variant) if separator else (Path(name), None)


def execute_file(path: Path, name: str, example: str) -> ModuleType:
    """Execute a user's Python file, once for each content. Arguments and errors are those of `call_in_file`."""
    if not path.is_file():
        raise UserError(f"{name} = {path}: no such file{_instead_of(path)}")
    try:
        module = _execute(path.absolute(), path.read_bytes())
    except ReportedError:
        raise
    except Exception as error:
        raise UserError(f"{name} = {path}{_place_of(error, path)}: {_load_error(error)}") from error
    if module is None:
        raise UserError(f"{name} = {path}: must be a Python file; try {example}")
    return module


def _load_module(
    path: Path, name: str = "config", signature: str = "get_config() -> Config", example: str = "configs/demo.py"
) -> ModuleType:
    module = execute_file(path, name, example)
    if not hasattr(module, signature.partition("(")[0]):
        raise UserError(f"{name} = {path}: must define {signature}")
    return module


@functools.cache
def _execute(path: Path, source: bytes) -> ModuleType | None:
    """Execute a file, once for each content; None if it is no Python file."""
    spec = importlib.util.spec_from_file_location(f"mot_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses with annotations that are strings look it up
    # Not by the loader: its bytecode cache misses an edit within a second that does not change the size.
    exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    return module


def _instead_of(path: Path) -> str:
    """Advice for a config file that is missing: a variant of that name, the nearest file, or where configs are."""
    stem, _, variant = path.stem.partition("_")
    other = path.with_name(f"{stem}.py")
    if variant and other.is_file() and variant in variants_of(other):
        return f"; did you mean '{other}:{variant}'?"
    folder = path.parent if path.parent.is_dir() else Path("configs")
    if files := sorted(map(str, folder.glob("*.py"))):
        return nearest(str(path), files)
    advice = "name a file that defines get_config() -> Config, or work in a checkout of mot_jax, which has configs/"
    return f"{'' if path.is_absolute() else f' in {Path.cwd()}'}; {advice}"


def _place_of(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.absolute()]
    return f", line {lines[-1]}" if lines else ""


def _load_error(error: Exception) -> str:
    """An error of a config file in one line, with the nearest or present name for a field that does not exist."""
    text = error_words(error)
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if unknown:
        cls = getattr(fields, unknown[1], None)
        if isinstance(cls, type) and dataclasses.is_dataclass(cls):
            if name := new_field(cls, unknown[2]):
                return f"{unknown[1]}.{unknown[2]}: is now {unknown[1]}.{name}"
            names = [field.name for field in dataclasses.fields(cls)]
            return f"{unknown[1]} has no field '{unknown[2]}'{nearest(unknown[2], names)}"
    return text


def to_json(config: Config) -> str:
    """The whole config as JSON text, in which a feed-forward layer has its `kind` as one more field."""
    return json.dumps({"version": FORMAT_VERSION, **_encode(config)}, indent=1, allow_nan=False) + "\n"


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}
        return kind | {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_encode(item) for item in value] if isinstance(value, tuple) else value


def from_json(text: str | bytes, name: str = "config.json") -> Config:
    """The config of a text that `to_json` wrote; `name` is that of its file in errors.

    Raises:
        UserError: the text is not JSON or of another format version, or a field is unknown or has a wrong value.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}, line {error.lineno}: not JSON ({error.msg}); use another workdir") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON ({error_words(error)}); use another workdir") from None
    version = data.pop("version", None) if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        advice = "use the mot_jax that wrote the run, or try a new workdir"
        raise UserError(f"{name}: version = {version}: this mot_jax reads version {FORMAT_VERSION}; {advice}")
    config = _decode(data, Config, "")
    check(config)
    return config


def _decode(data: Any, hint: Any, path: str) -> Any:
    classes: list[Any] = [option for option in options(hint) if dataclasses.is_dataclass(option)]
    if not classes or (data is None and matches(data, hint)):
        return tuple(_decode(item, None, path) for item in data) if isinstance(data, list) else data
    if not isinstance(data, dict):
        raise UserError(f"{path} = {data!r}: must be a group of fields")
    data = dict(data)
    if hasattr(classes[0], "kind"):
        kinds = {c.kind: c for c in classes}
        kind = str(data.pop("kind", None))
        if kind not in kinds:
            advice = nearest(kind, kinds)
            if "did you mean" not in advice:
                advice += f"; try {KINDS_VARIABLE}=FILE.py, if a file registers it"
            raise UserError(f"{path}.kind = {kind!r}: no such kind{advice}")
        classes = [kinds[kind]]
    hints = typing.get_type_hints(classes[0])
    names = [f.name for f in dataclasses.fields(classes[0])]
    for name in data:
        if name not in names:
            full_name = ".".join(filter(None, [path, name]))
            if now := new_field(classes[0], name):
                raise UserError(f"{full_name}: is now {full_name.removesuffix(name)}{now}")
            raise UserError(f"{full_name}: no such field{nearest(name, names)}")
    return classes[0](**{k: _decode(v, hints[k], ".".join(filter(None, [path, k]))) for k, v in data.items()})


def is_corpus_path(name: str) -> bool:
    """Whether the name of a corpus is the path of its directory."""
    return "://" in name or name.startswith(("/", "~", "."))


def _are_paths(name: str, old: Any, new: Any) -> bool:
    """Whether two values of a field by content differ in paths only, whose content is compared elsewhere."""
    if name == "data.tokenizer":
        return "bytes" not in (old, new)
    if len(old) != len(new):
        return False
    return all(a == b or (is_corpus_path(a) and is_corpus_path(b)) for a, b in zip(old, new, strict=True))


def _are_one_directory(old: str | None, new: str | None) -> bool:
    """Whether two paths name the same directory, which need not exist any more; of a store, the same URL."""
    if old is None or new is None:
        return old == new
    return os.path.realpath(os.path.expanduser(old)) == os.path.realpath(os.path.expanduser(new))


SAME_FUNCTION = ("dtype", "attention_kernel", "remat", "loss_chunk")  # fields of a model that change rounding or memory


class _Change(NamedTuple):
    """A field whose new value does not allow to resume a run, and the reason."""

    name: str
    old: Any
    new: Any
    reason: str


def identity_changes(old: Config, new: Config) -> list[str]:
    """One line for each field whose value in `new` does not allow to resume a run of `old`."""
    return [f"{name}: {before!r} in the run, now {now!r}; {reason}" for name, before, now, reason in _changes(old, new)]


def model_changes(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(Name, old value, new value) of each field that has changed and makes it a model of another function."""
    free = {f"model.{name}" for name in SAME_FUNCTION}
    return [change[:3] for change in _changes(old, new) if change.name.startswith("model.") and change.name not in free]


def _changes(old: Config, new: Config) -> Iterator[_Change]:
    old_values = {name: value for name, _, _, value in leaves(old)}
    identity = "it is part of a run's identity"
    kinds = old.model.feed_forward.kind, new.model.feed_forward.kind
    if kinds[0] != kinds[1]:
        yield _Change("model.feed_forward.kind", *kinds, identity)
    for name, field, _, value in leaves(new):
        rule = field.metadata.get("resume", "identity")
        if name not in old_values or value == old_values[name] or rule == "free":
            continue
        if rule == "content" and _are_paths(name, old_values[name], value):
            continue
        if rule == "directory" and _are_one_directory(old_values[name], value):
            continue
        if rule != "extendable":
            yield _Change(name, old_values[name], value, identity)
        elif value < old_values[name]:
            yield _Change(name, old_values[name], value, "a run can be extended, not shortened")
