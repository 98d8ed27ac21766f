"""Pages of the site that `docs/hooks.py` generates. `.ci/run` builds the whole site, and executes the notebook."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import typing
from pathlib import Path

import pytest

import mot_jax
from mot_jax import cli
from mot_jax.config import Config, ModelConfig, fields, leaves

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections(page: str) -> dict[str, str]:
    """The text below each heading of the second level."""
    _, *parts = re.split(r"^## ", page, flags=re.MULTILINE)
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


def test_the_page_of_configs_has_every_field_of_every_kind(hooks):
    page = sections(hooks.config_page())
    for kind in typing.get_args(fields.FeedForwardConfig):
        for name, field, _, _ in leaves(Config(model=ModelConfig(feed_forward=kind()))):
            group = name.rpartition(".")[0]
            section = page[f"{group}: {kind.kind}" if group == "model.feed_forward" else group]
            (row,) = [row for row in section.splitlines() if row.startswith(f"| `{field.name}` |")]
            assert f"| `{field.default!r}` |" in row
            assert not row.endswith("|  |"), "a field without a docstring"
    assert "| extendable |" not in "".join(page.values())
    assert re.search(r"\| `steps` \| int \| `\d+` \| larger \|", page["training"])


def test_the_page_of_commands_has_every_command_and_no_config_field(hooks):
    page = sections(hooks.cli_page())
    assert {words.split()[1] for words in page} == cli.COMMANDS.keys()
    assert {"mot data build", "mot bench layers"} <= page.keys()
    for prog, text in page.items():
        assert f"usage: {prog} [-h]" in text, prog
        assert not re.search(r"^\s*--model\.|│|─────", text, re.MULTILINE), prog
    assert "--take-over" in page["mot train"] and "[config fields](config.md)" in page["mot train"]
    assert "[config fields]" not in page["mot curves"]


def test_the_page_of_the_api_has_every_public_name(hooks):
    assert re.findall(r"^::: mot_jax\.(\w+)$", hooks.api_page(), re.MULTILINE) == sorted(
        mot_jax.__all__, key=lambda name: (name.endswith("Config"), name)
    )


def test_the_navigation_has_every_page_outside_the_lab_notes():
    listed = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if not page.startswith("notes/")} <= set(listed)


@pytest.mark.parametrize(
    ("markdown", "source", "path", "expected"),
    [
        ("[a](docs/pods.md#planning)", "README.md", "index.md", "[a](pods.md#planning)"),
        ("[a](../README.md#use-it)", "docs/pods.md", "pods.md", "[a](index.md#use-it)"),
        ("[`a`](../../README.md)", "docs/results/index.md", "results/index.md", "[`a`](../index.md)"),
        ("[a](../docs/pods.md)", "launch/README.md", "clusters.md", "[a](pods.md)"),
        ("[a](pods.md) ![b](layers.png)", "docs/paper.md", "paper.md", "[a](pods.md) ![b](layers.png)"),
        ("[docs/pods.md](docs/pods.md)", "README.md", "index.md", "[Pods](pods.md)"),
        ("[a](https://arxiv.org) [b](#x) [c](absent.md)", "README.md", "index.md", None),
        ("`[a](docs/pods.md)`\n```\n[a](docs/pods.md)\n```", "README.md", "index.md", None),
        (r"| `a \| b` | c \| d |", "README.md", "index.md", r"| `a | b` | c \| d |"),
    ],
)
def test_links_of_the_repository_become_those_of_the_site(hooks, markdown, source, path, expected):
    titles = hooks.titles([{"Home": "index.md"}, {"How to": [{"Pods": "pods.md"}, "paper.md"]}])
    assert hooks.site_markdown(markdown, source, path, titles) == (markdown if expected is None else expected)


def test_a_notebook_is_a_page_with_its_outputs(hooks, tmp_path):
    picture = base64.b64encode(b"png").decode()
    outputs = [
        {"output_type": "stream", "text": ["a\n"]},
        {"output_type": "stream", "text": ["b\n"]},
        {"output_type": "display_data", "data": {"image/png": picture, "text/plain": ["<Figure>"]}},
    ]
    path = tmp_path / "note.ipynb"
    path.write_text(
        json.dumps(
            {
                "cells": [
                    {"cell_type": "markdown", "source": ["# Title\n", "text"]},
                    {"cell_type": "code", "source": ["print(1)"], "outputs": outputs},
                ]
            }
        )
    )
    image = "![Output of the cell above](notebook_1.png)"
    assert hooks.page(path) == f"# Title\ntext\n\n```python\nprint(1)\n```\n\n```text\na\nb\n```\n\n{image}\n"
    assert hooks.pictures(path) == {"notebook_1.png": b"png"}


def test_the_notebook_has_outputs_of_less_than_200_kb():
    path = ROOT / "examples" / "mixture_of_tokens.ipynb"
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert path.stat().st_size < 200_000
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "jupyter execute --inplace"
