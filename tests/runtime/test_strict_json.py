"""JSON without NaN and Infinity, and the one place that writes it."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import mot_jax
from mot_jax.runtime import strict_json

ROOT = Path(mot_jax.__file__).parent

# Calls of json.dumps whose text is hashed, compared, searched or sent, never written to a file; its bytes must not
# change.
NOT_WRITTEN = {
    "data/build.py": 1,
    "data/text.py": 1,
    "data/tokenizers.py": 2,
    "data/windows.py": 2,
    "interop/lm_eval.py": 1,
    "runtime/distributed.py": 3,
}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (-math.inf, None),
        (np.float32(math.inf), None),
        (np.float64(math.nan), None),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array(2), 2),
        (jnp.bfloat16(1.5), 1.5),
        (jnp.float32(math.nan), None),
        ((1, math.nan), [1, None]),
        ({"a": [{"b": math.inf}], "c": "NaN", "d": None}, {"a": [{"b": None}], "c": "NaN", "d": None}),
        ({np.int64(4): 1}, {"4": 1}),
    ],
)
def test_values_become_strict_json(value, expected):
    text = strict_json.dumps({"value": value})
    assert json.loads(text, parse_constant=pytest.fail) == {"value": expected}


def test_finite_content_has_the_bytes_of_the_standard_library():
    content = {"a": [1, 2.5, "é", True, None], "b": {"c": 1e-30}}
    for options in ({}, {"indent": 1}, {"ensure_ascii": False, "sort_keys": True}):
        assert strict_json.dumps(content, **options) == json.dumps(content, **options)


def test_values_without_a_json_form_are_refused():
    with pytest.raises(TypeError):
        strict_json.dumps({"a": object()})
    with pytest.raises(TypeError):
        strict_json.dumps({"a": np.zeros(2)})


def permissive_calls(path: Path) -> int:
    """The number of calls of json.dump and json.dumps that may write NaN."""
    count = 0
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "json":
            raise AssertionError(f"{path}: must import json as a module")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
            strict = any(k.arg == "allow_nan" and ast.unparse(k.value) == "False" for k in node.keywords)
            count += not strict
    return count


def test_all_files_are_strict_json():
    counts = {path.relative_to(ROOT).as_posix(): permissive_calls(path) for path in ROOT.rglob("*.py")}
    assert {name: count for name, count in counts.items() if count} == NOT_WRITTEN
