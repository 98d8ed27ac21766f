"""The project's prose: comments, docstrings, other strings and pages, and the words that they should not use.

As a script, `python tests/words.py [PATH ...]`: the counts of each file, most words to replace first.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# Personification and coined words, with the terms of the field that replace them.
REFUSED = {
    r"hears?|heard": "is mixed with, depends on",
    r"says|speaks|tells": "outputs, returns, value of, prints",
    r"born": "initialized",
    r"twins?": "FLOP-matched dense baseline",
    r"anew": "again",
    r"likewise": "also",
    r"meanwhile": "while, in the meantime",
    r"(?:made|computed) again": "recomputed, rematerialized",
    r"goes on": "resumes, continues",
    r"goes over": "transitions",
    r"real tokens?": "non-padding token",
}
# Allowed now and then: at most ODD_RATE per 1,000 words of comments and docstrings.
ODD = (
    r"hear|say|said|tell|told|know|knows|lie|lies|lay|apart|alone|besides?|speak|whoever|awake|asleep|nobody|somebody|"
    r"people|ourselves|itself alone|one by one|not here"
)
ODD_RATE, WHAT_RATE = 1.5, 1.0
_REFUSED = re.compile(r"\b(?:" + "|".join(REFUSED) + r")\b", re.IGNORECASE)
_ODD = re.compile(rf"\b(?:{ODD})\b", re.IGNORECASE)
_WHAT = re.compile(r"\bwhat\b", re.IGNORECASE)
# "what" as a headless relative: at the start of a clause, after a word or a comma; not in a question.
_HEADLESS = re.compile(r"\bwhat\b(?![^.?!]*\?)", re.IGNORECASE)


class Text(NamedTuple):
    """One comment, docstring, string or paragraph. kind: `comment`, `docstring`, `string` or `page`."""

    path: Path
    line: int
    kind: str
    text: str


def python_texts(path: Path) -> Iterator[Text]:
    source = path.read_text()
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for i, statement in enumerate(body):
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                continue
            of_definition = i == 0 and isinstance(node, documented)
            under_field = i > 0 and isinstance(body[i - 1], ast.AnnAssign)
            if isinstance(statement.value.value, str) and (of_definition or under_field):
                docstrings.add(statement.value)
                yield Text(path, statement.lineno, "docstring", statement.value.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            phrase = " " in node.value.strip()  # and not a name
            if phrase:
                yield Text(path, node.lineno, "string", node.value)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Text(path, token.start[0], "comment", token.string)


def page_texts(path: Path) -> Iterator[Text]:
    """Paragraphs outside of fenced code."""
    fenced = False
    for i, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield Text(path, i, "page", re.sub(r"`[^`]*`|\]\([^)]*\)", "", line))


def texts(paths: list[Path]) -> Iterator[Text]:
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix == ".py":
                yield from python_texts(file)
            elif file.suffix == ".md":
                yield from page_texts(file)


def refused(text: Text) -> list[str]:
    """The refused words of a text; a headless `what` counts as one."""
    return [m.group() for m in _REFUSED.finditer(text.text)] + [m.group() for m in _HEADLESS.finditer(text.text)]


def rates(prose: list[Text]) -> tuple[int, float, float]:
    """Words of comments and docstrings, and the odd words and `what`s in 1,000 of them."""
    chosen = [t.text for t in prose if t.kind in ("comment", "docstring")]
    words = sum(len(t.split()) for t in chosen)
    odd, what = (sum(len(rule.findall(t)) for t in chosen) for rule in (_ODD, _WHAT))
    return words, 1000 * odd / max(words, 1), 1000 * what / max(words, 1)


def _main() -> None:
    prose = list(texts([Path(p) for p in sys.argv[1:]] or [ROOT / "mot_jax"]))
    for text in prose:
        marked = refused(text) + [f"({m.group()})" for m in _ODD.finditer(text.text)]
        if marked:
            line = " ".join(text.text.split())
            print(f"{text.path}:{text.line}: {', '.join(marked)}: {line[:160]}")
    words, odd, what = rates(prose)
    print(f"{words} words of comments and docstrings; per 1,000: {odd:.1f} odd words, {what:.1f} what")


if __name__ == "__main__":
    _main()
