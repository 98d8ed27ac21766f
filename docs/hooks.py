"""Hooks of MkDocs: the pages of the site that are made of other files, and links between them.

The reference is generated from the code. Pages outside of `docs/`, such as the README, are pages of the site at another
path; relative links are those of the repository everywhere, so that GitHub follows them too.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import dataclasses
import inspect
import io
import json
import os
import posixpath
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mot_jax
from mot_jax import cli
from mot_jax.config import Config, hints

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Pages of the site by the file of the repository that they show. Files of `docs/` are pages at their own paths.
PLACES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "launch/README.md": "clusters.md",
    "models/python/README.md": "model.md",
    "examples/custom_loop.py": "custom_loop.md",
    "examples/own_kind.py": "own_kind.md",
    "examples/mixture_of_tokens.ipynb": "notebook.md",
}
SUBCOMMANDS = {"data": cli.data.COMMANDS, "bench": cli.bench.COMMANDS}
LINK = re.compile(r"(?:\[([\w./-]+\.(?:md|py)))?\]\(([^)#:\s]+)((?:#[^)\s]*)?)\)")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the lab notes, newest first, at the place of `notes` in the navigation."""
    notes = [f"notes/{path.name}" for path in sorted((ROOT / "docs" / "notes").glob("*.md"), reverse=True)]
    config.nav = [{**entry, "Lab notes": notes} if "Lab notes" in entry else entry for entry in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of `docs/`."""
    from mkdocs.structure.files import File

    pages: dict[str, str | bytes] = {site: page(ROOT / source) for source, site in PLACES.items()}
    pages |= {"reference/config.md": config_page(), "reference/cli.md": cli_page(), "reference/api.md": api_page()}
    pages |= pictures(ROOT / "examples" / "mixture_of_tokens.ipynb")
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the links of the repository those of the site."""
    path = page.file.src_uri
    source = next((source for source, site in PLACES.items() if site == path), f"docs/{path}")
    return site_markdown(markdown, source, path, titles(config.nav)) if (ROOT / source).exists() else markdown


def titles(nav: Any) -> dict[str, str]:
    """The titles of the pages in the navigation, by path."""
    if isinstance(nav, list):
        return {path: title for entry in nav for path, title in titles(entry).items()}
    if not isinstance(nav, dict):
        return {}
    ((title, value),) = nav.items()
    return {value: title} if isinstance(value, str) else titles(value)


def site_markdown(markdown: str, source: str, path: str, titles: Mapping[str, str]) -> str:
    """Convert a page of GitHub's Markdown to that of MkDocs.

    Args:
        markdown: the page.
        source: its file in the repository, to which its links are relative.
        path: its path in the site.
        titles: the titles of pages by path, which replace names of files in links.
    """

    def link(match: re.Match[str]) -> str:
        name, target, anchor = match.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / target).exists():
            return match[0]
        site = PLACES.get(target, target.removeprefix("docs/"))
        text = f"[{titles.get(site, name)}" if name else ""
        return f"{text}]({posixpath.relpath(site, posixpath.dirname(path) or '.')}{anchor})"

    def convert(part: str) -> str:
        if part.startswith("`"):
            return part.replace(r"\|", "|")  # GitHub's tables need the backslash, also in code
        return LINK.sub(link, part)

    return "".join(map(convert, CODE.split(markdown)))


# --- files outside of docs/ -------------------------------------------------------------------------------------------


def page(path: Path) -> str:
    """A file of the repository as Markdown: a page as it is, a program with its docstring above, or a notebook."""
    text = path.read_text()
    if path.suffix == ".py":
        about = ast.get_docstring(ast.parse(text)) or ""
        code = text.split('"""', 2)[2].strip()
        first, _, rest = about.partition("\n")
        return f"# {first.rstrip('.')}\n\n```bash\n{rest.strip()}\n```\n\n```python\n{code}\n```\n"
    return "\n\n".join(cells(path)) + "\n" if path.suffix == ".ipynb" else text


def cells(path: Path) -> Iterator[str]:
    """The cells of a notebook as Markdown, each with the text and the picture that it printed."""
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        text = "".join(cell["source"])
        yield f"```python\n{text}\n```" if cell["cell_type"] == "code" else text
        outputs = cell.get("outputs", [])
        if printed := "".join(line for output in outputs for line in output.get("text", [])):
            yield f"```text\n{printed.rstrip()}\n```"
        if any("image/png" in output.get("data", {}) for output in outputs):
            yield f"![Output of the cell above](notebook_{number}.png)"


def pictures(path: Path) -> dict[str, bytes]:
    """The pictures of a notebook, by the names that `cells` gives them."""
    return {
        f"notebook_{number}.png": base64.b64decode(output["data"]["image/png"])
        for number, cell in enumerate(json.loads(path.read_text())["cells"])
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    }


# --- reference --------------------------------------------------------------------------------------------------------


def docstrings(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, by the name of the field; of base classes as well."""
    texts = {}
    for base in reversed(cls.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts[ast.unparse(statement.target)] = inspect.cleandoc(ast.literal_eval(below.value))
    return texts


# By the metadata of a field in `mot_jax.config.fields`.
RESUME = {"free": "any", "extendable": "larger", "content": "same content", "directory": "same directory"}


def config_page() -> str:
    """All fields of a config, with types, defaults and docstrings."""
    about = """# Configuration

A config is a Python file with a function `get_config() -> mot_jax.Config`, and each of its fields is a flag of the
commands that read a config: `num_blocks` of `model` is `--model.num-blocks`. A tuple is given as several values; a
field of type `bool` is `--group.field` or `--group.no-field`.

*Resume* is the rule for a run that is resumed with another value: *same* refuses it, since the field is part of the
run's identity; *any* accepts every value, *larger* larger ones, and *same content* or *same directory* another path.
"""
    return "\n".join([about, *_groups(Config, "")])


def _groups(cls: type, path: str) -> Iterator[str]:
    """The table of a group's own fields, then the sections of the groups in it, with all kinds of a union."""
    types, texts = typing.get_type_hints(cls), docstrings(cls)
    groups, rows = [], []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            groups.append((f"{path}.{field.name}".removeprefix("."), hints.options(types[field.name])))
            continue
        words = hints.type_words(types[field.name]).replace("'", "`")
        default = "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        resume = RESUME.get(field.metadata.get("resume", ""), "same")
        text = " ".join(texts[field.name].split()).replace("|", r"\|")
        rows.append(f"| `{field.name}` | {words} | {default} | {resume} | {text} |")
    if rows:
        yield "| field | type | default | resume | |\n|---|---|---|---|---|"
        yield from (*rows, "")
    for name, classes in groups:
        for member in classes:
            title = f"{name}: {member.kind}" if len(classes) > 1 else name
            yield f"## {title}\n\n`{member.__name__}`: {' '.join(member.__doc__.split())}\n"
            yield from _groups(member, name)


def cli_page() -> str:
    """The help of every command, without the flags of config fields."""
    rows, sections = [], []
    for name, command in cli.COMMANDS.items():
        for subcommand, function in SUBCOMMANDS.get(name, {"": command}).items():
            prog = f"mot {name} {subcommand}".strip()
            rows.append(f"| [`{prog}`](#{prog.replace(' ', '-')}) | {function.__doc__} |")
            sections += [f"## {prog}\n", *_command(_help([*prog.split()[1:], "--help"]))]
    table = ["# Command line\n", "| command | |\n|---|---|", *rows, "", f"{cli.parsing.ABOUT_DEBUG}\n"]
    return "\n".join([*table, *sections])


def _help(arguments: list[str]) -> str:
    """The text that a command prints for `--help`, 80 columns wide, without frames."""
    output, columns = io.TextIOWrapper(io.BytesIO(), "utf-8"), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            cli.main(arguments)
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    output.seek(0)
    text = re.sub(r"^╭─ (.*?) ─*╮$", r"\n\1:", output.read(), flags=re.MULTILINE)
    text = re.sub(r"^╰─*╯\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^│ (.*?) *│$", r"  \1", text, flags=re.MULTILINE)


def _command(text: str) -> list[str]:
    """The help of one command as Markdown: the flags of config fields are on a page of their own."""
    own, *config = text.replace(cli.parsing.ABOUT_DEBUG, "").split("\nmodel options:")
    more = ["It also has the flags of all [config fields](config.md).\n"] if config else []
    return ["```text", own.strip(), "```\n", *more]


def api_page() -> str:
    """The public names of `mot_jax`, with their docstrings by mkdocstrings."""
    classes = [name for name in mot_jax.__all__ if name.endswith("Config")]
    rest = [name for name in mot_jax.__all__ if name not in classes]
    lines = ["# Python API\n", "`import mot_jax` has the following names; JAX is imported at the first use of one.\n"]
    for title, names, options in (("Functions and classes", rest, ""), ("Configs", classes, "members: false")):
        lines.append(f"## {title}\n")
        if names is classes:
            lines.append("The fields are explained in [Configuration](config.md).\n")
        for name in names:
            lines += [f"::: mot_jax.{name}", f"    options: {{{options}}}\n"]
    return "\n".join(lines)
