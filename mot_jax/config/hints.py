"""The types of config fields at run time: values that match them, and their names in messages."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

_ADDED: dict[Any, list[type]] = {}  # members of a union in addition to those of its definition


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return (*typing.get_args(hint), *_ADDED.get(hint, ())) if union else (hint,)


def add_option(union: Any, option: type) -> None:
    """Let values of a union, wherever it is a field's type, also be of this type."""
    if option not in options(union):
        _ADDED.setdefault(union, []).append(option)


def matches(value: Any, hint: Any) -> bool:
    """Whether a value is of a type. An int is a float, and a bool is neither."""
    for option in options(hint):
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option) and isinstance(value, str):
                return True
        elif typing.get_origin(option) is tuple:
            if isinstance(value, tuple) and _items_match(value, typing.get_args(option)):
                return True
        elif option is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return True
        elif isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return True
    return False


def _items_match(items: tuple, hints: tuple[Any, ...]) -> bool:
    """Whether the items are those of a `tuple[X, ...]` or a `tuple[X, Y]`."""
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(items)
    return len(items) == len(hints) and all(map(matches, items, hints))


def type_words(hint: Any) -> str:
    """A type in words, for messages."""
    words = []
    for option in options(hint):
        if typing.get_origin(option) is Literal:
            words += [repr(v) for v in typing.get_args(option)]
        elif typing.get_origin(option) is tuple:
            items = [item for item in typing.get_args(option) if item is not Ellipsis]
            words.append("a tuple of " + " and ".join(map(type_words, items)))
        else:
            words.append("None" if option is type(None) else option.__name__)
    return " or ".join(words)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, dataclasses.Field, Any, Any]]:
    """Yield (dotted name, field, type, value) of every field that is not a group of fields."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            yield from leaves(item, f"{path}{field.name}.")
        else:
            yield path + field.name, field, hints[field.name], item
