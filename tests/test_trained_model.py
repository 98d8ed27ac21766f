"""The trained model of `models/python`: its card has the figures of its files, and it predicts Python."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

import mot_jax
from mot_jax.runs.scores import read_scores

MODEL = Path(__file__).parents[1] / "models" / "python"


def test_the_card_has_the_scores_of_every_mode():
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|", (MODEL / "README.md").read_text(), re.MULTILINE)
    scores = read_scores(MODEL)
    assert {score["step"] for score in scores} == {json.loads((MODEL / "config.json").read_text())["training"]["steps"]}
    assert rows == [(s["mode"], f"{s['bits_per_byte']:.4f}", f"{s['loss']:.4f}") for s in scores] and len(rows) > 5


def test_the_losses_in_the_table_of_the_modes_are_those_of_its_files():
    page = (MODEL.parents[1] / "docs" / "inference.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\|[^|]*\| ([^|]+) \|", page.partition("after 6,000 |")[2], re.MULTILINE))
    losses = {score["mode"]: score["loss"] for score in read_scores(MODEL)}
    for mode in ("companions", "sparse", "mean_field", "threshold"):
        change = losses[mode] / losses["grouped"] - 1
        assert rows[mode] == f"{change:+.1%}".replace("+", "+ ").replace("-", "\N{MINUS SIGN} ").replace("%", " %"), (
            mode
        )


def test_its_files_stay_small():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 12e6


@pytest.mark.slow
def test_it_predicts_python():
    """In less than 2 bits per byte; reversed, the same bytes take more than twice as many."""
    model = mot_jax.load(str(MODEL))
    text = "    def __init__(self, name, value=None):\n        self.name = name\n"
    forward, backward = model.log_likelihoods([("import os\n\n", text), ("import os\n\n", text[::-1])])
    bits = [-likelihood.log_prob / math.log(2) / len(text) for likelihood in (forward, backward)]
    assert bits[0] < 2 and bits[1] > 2 * bits[0]
