"""The packages' order: a package imports those below it, never those above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mot_jax

ROOT = Path(mot_jax.__file__).parent
ORDER = (
    "cli",
    "benchmark",
    "planning",
    "interop",
    "analysis",
    "inference",
    "training",
    "cost",
    "runs",
    "modes",
    "data",
    "nn",
    "runtime",
    "config",
    "errors",
)


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of the mot_jax modules that `tree` imports, at any depth; TYPE_CHECKING blocks count as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("mot_jax"))
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"relative import of {node.module}, line {node.lineno}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mot_jax"):
            deeper = node.module != "mot_jax"
            yield from ([node.module] if deeper else [f"mot_jax.{alias.name}" for alias in node.names])


def package_of(module: str) -> str:
    return [*module.split("."), ""][1]


def test_every_package_is_in_the_order() -> None:
    found = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__", "__main__"} == set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_down(package: str) -> None:
    place = ROOT / package
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    upward = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imports(ast.parse(path.read_text()))
        if ORDER.index(package_of(module)) < ORDER.index(package)
    }
    assert not upward
