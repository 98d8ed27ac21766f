"""JSON as RFC 8259 defines it, for all files and lines that are written: without NaN and Infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(content: Any, **options: Any) -> str:
    """Serialize to strict JSON: NaN and infinities become null, scalars of NumPy and JAX numbers.

    Args:
        content: mappings, sequences, strings, numbers, booleans and None.
        options: those of `json.dumps`.

    Raises:
        TypeError: a value has no JSON form.
    """
    return json.dumps(_strict(content), allow_nan=False, **options)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_strict(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if not isinstance(value, (str, int, float)) and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
