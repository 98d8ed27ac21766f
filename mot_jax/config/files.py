"""Configs to and from files: the Python file of an experiment, and the strict, versioned JSON of a run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import traceback
import typing
from pathlib import Path
from typing import Any

from mot_jax.config import fields
from mot_jax.config.checks import check
from mot_jax.config.fields import Config
from mot_jax.config.hints import leaves, matches, options
from mot_jax.errors import UserError, error_words, nearest

FORMAT_VERSION = 3


def load_config(path: str | os.PathLike[str]) -> Config:
    """What `get_config()` of a config file returns. Raises UserError for a file that is missing or broken."""
    path = Path(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path("configs")
        found = [str(p) for p in sorted(folder.glob("*.py"))]
        raise UserError(f"config = {path}: no such file{nearest(str(path), found) if found else ''}")
    try:
        spec = importlib.util.spec_from_file_location(f"mot_jax_config_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config = {path}{_place_of(error, path)}: {_load_error(error)}") from error
    if not isinstance(config, Config):
        raise UserError(f"config = {path}: get_config() must return a mot_jax Config, and returned {config!r}")
    return config


def _place_of(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.absolute()]
    return f", line {lines[-1]}" if lines else ""


def _load_error(error: Exception) -> str:
    """An error of a config file in one line, with the nearest name for a field that does not exist."""
    text = error_words(error)
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if unknown:
        cls = getattr(fields, unknown[1], None)
        if dataclasses.is_dataclass(cls):
            names = [field.name for field in dataclasses.fields(cls)]
            return f"{unknown[1]} has no field '{unknown[2]}'{nearest(unknown[2], names)}"
    if isinstance(error, AttributeError) and "get_config" in text:
        return "must define get_config() -> Config"
    return text


def to_json(config: Config) -> str:
    """The whole config as JSON text; a feed-forward kind carries its tag as `kind`."""
    return json.dumps({"version": FORMAT_VERSION, **_encode(config)}, indent=1) + "\n"


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}
        return kind | {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_encode(item) for item in value] if isinstance(value, tuple) else value


def from_json(text: str) -> Config:
    """The config of `to_json`. Raises UserError on unknown or mistyped fields and on another format version."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"config.json, line {error.lineno}: not JSON ({error.msg}); start anew elsewhere") from None
    version = data.pop("version", None) if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"version = {version}: this mot_jax reads version {FORMAT_VERSION} of config.json")
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
            raise UserError(f"{path}.kind = {kind!r}: no such kind{nearest(kind, kinds)}")
        classes = [kinds[kind]]
    hints = typing.get_type_hints(classes[0])
    names = [f.name for f in dataclasses.fields(classes[0])]
    for name in data:
        if name not in names:
            raise UserError(f"{'.'.join(filter(None, [path, name]))}: no such field{nearest(name, names)}")
    return classes[0](**{k: _decode(v, hints[k], ".".join(filter(None, [path, k]))) for k, v in data.items()})


def identity_changes(old: Config, new: Config) -> list[str]:
    """One line for each field in which `new` may not continue a run that `old` began."""
    before = {name: value for name, _, _, value in leaves(old)}
    changes = []
    kinds = old.model.feed_forward.kind, new.model.feed_forward.kind
    if kinds[0] != kinds[1]:
        changes.append(f"model.feed_forward: {kinds[0]} there, {kinds[1]} here; it is part of a run's identity")
    for name, field, _, value in leaves(new):
        rule = field.metadata.get("resume", "identity")
        if name not in before or value == before[name] or rule == "free":
            continue
        if rule == "identity":
            changes.append(f"{name}: {before[name]!r} there, {value!r} here; it is part of a run's identity")
        elif value < before[name]:
            changes.append(f"{name}: {before[name]!r} there, {value!r} here; a run can be extended, not cut short")
    return changes
