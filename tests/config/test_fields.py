"""The documentation of config fields: one docstring under each field, which `--help` shows."""

import ast
import dataclasses
import inspect
import re
import typing
from typing import Literal

import pytest
import tyro

from mot_jax.config import CompanionsConfig, Config, DenseConfig, TokenChoiceConfig, fields, hints, leaves

CLASSES = [item for item in vars(fields).values() if inspect.isclass(item) and dataclasses.is_dataclass(item)]


def docstrings(cls: type) -> dict[str, str]:
    """The string under each field of a class, by the name of the field."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        statement.target.id: inspect.cleandoc(below.value.value)
        for statement, below in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_has_a_docstring_of_at_most_three_lines(cls):
    documented = docstrings(cls)
    assert list(documented) == [field.name for field in dataclasses.fields(cls) if field.name in cls.__annotations__]
    for name, text in documented.items():
        assert text[0].isupper() and len(text.splitlines()) <= 3, name
        assert all(line.endswith(".") for line in text.splitlines()), f"{name}: --help breaks lines as the source does"
    assert len(cls.__doc__.splitlines()) <= 5


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_docstring_names_every_value_of_a_literal(cls):
    types = typing.get_type_hints(cls)
    for name, text in docstrings(cls).items():
        for option in hints.options(types[name]):
            if typing.get_origin(option) is Literal and "dtype" not in name:
                assert [value for value in typing.get_args(option) if f"`{value}`" not in text] == [], name


@pytest.mark.parametrize("kind", [None, DenseConfig(), TokenChoiceConfig(), CompanionsConfig()], ids=type)
def test_help_shows_the_docstring_of_every_flag(kind, capsys, monkeypatch):
    """That of the class in which a field is defined; `group_size` is inherited by companions."""
    config = Config()
    if kind is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=kind))
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        tyro.cli(tyro.conf.AvoidSubcommands[Config], default=config, args=["--help"])
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for name, field, _, _ in leaves(config):
        if name == "model.feed_forward.mixture":
            continue  # None, which is no flag
        parent: object = config
        for part in name.split(".")[:-1]:
            parent = getattr(parent, part)
        text = {k: v for cls in reversed(type(parent).__mro__) if cls is not object for k, v in docstrings(cls).items()}
        assert f"--{name}".replace("_", "-") in shown
        assert " ".join(text[field.name].split()) in shown, name
