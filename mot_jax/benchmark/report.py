"""Benchmark results as Markdown, together with the machine that they were measured on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Column = tuple[str, Callable[[dict[str, Any]], str]]  # title, and the text of a row's cell


def markdown(about: Mapping[str, str], rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> list[str]:
    """A line about the machine, and a table that is readable as plain text too."""
    cells = [[title for title, _ in columns], *([text_of(row) for _, text_of in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [", ".join(f"{name} {value}" for name, value in about.items()), "", lines[0], rule, *lines[1:]]


def number(name: str, scale: float, form: str, row: Mapping[str, Any]) -> str:
    """A value of a row times `scale`, formatted; a dash if it is missing, None, or not a number."""
    value = row.get(name)
    return "-" if value is None or math.isnan(value) else format(value * scale, form)
