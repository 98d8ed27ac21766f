"""JSON as RFC 8259 defines it, for all files and lines that are written: without NaN and Infinity; and its reading."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from mot_jax.errors import UserError, error_words
from mot_jax.runtime.paths import read_file


def dumps(content: Any, **options: Any) -> str:
    """Serialize to strict JSON: NaN and infinities become null, scalars of NumPy and JAX numbers.

    Args:
        content: mappings, sequences, strings, numbers, booleans and None.
        options: those of `json.dumps`.

    Raises:
        TypeError: a value has no JSON form.
    """
    return json.dumps(_strict(content), allow_nan=False, **options)


def load(path: epath.Path, kind: type, advice: str) -> Any:
    """The content of a JSON file of a run or an export, of type `kind`.

    Raises UserError or RetryableError, in one line that ends with `advice`, for a file that is damaged or cannot be
    read.
    """
    content = read_file(path, advice)
    try:
        value = json.loads(content)
        if not isinstance(value, kind):
            raise ValueError(f"no JSON {'object' if kind is dict else 'array'}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error_words(error)}); {advice}") from None
    return value


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
