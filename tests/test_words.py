"""The prose of the project: no refused words, and few odd ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from words import ODD_RATE, ROOT, WHAT_RATE, page_texts, python_texts, rates, refused, texts

PLACES = ["mot_jax", "tests", "configs", "launch", "examples", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
ITSELF = {ROOT / "tests" / "words.py", ROOT / "tests" / "test_words.py"}


@pytest.mark.parametrize("place", PLACES)
def test_no_refused_words(place: str) -> None:
    lines = [
        f"{text.path.relative_to(ROOT)}:{text.line}: {', '.join(refused(text))}"
        for text in texts([ROOT / place])
        if text.path not in ITSELF and refused(text)
    ]
    assert not lines, "CONTRIBUTING.md, Write, has the rules:\n" + "\n".join(lines)


def test_odd_words_are_rare() -> None:
    words, odd, what = rates(list(texts([ROOT / "mot_jax"])))
    assert words > 10_000
    assert odd <= ODD_RATE
    assert what <= WHAT_RATE


def test_the_counter_finds_each_kind_of_text(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text(
        '"""A layer that hears others."""\n\n\nclass Config:\n    size: int = 1\n    """Its twin."""\n\n\n'
        "def name():  # what the router says\n    return 'made again by it'\n"
    )
    kinds = {(text.kind, *sorted(refused(text))) for text in python_texts(code) if refused(text)}
    assert kinds == {
        ("docstring", "hears"),
        ("docstring", "twin"),
        ("comment", "says", "what"),
        ("string", "made again"),
    }
    page = tmp_path / "page.md"
    page.write_text("What is a group? A set.\n`what says`\n```\nsays\n```\nIt does what it says.\n")
    assert [refused(text) for text in page_texts(page)] == [[], [], ["says", "what"]]
