"""Heat maps and tables of mixing weights for `mot inspect`, as PNG files in memory."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from mot_jax.runs.metrics import png

_MAX_EXPERTS = 48  # of a heat map
_FONT: dict[str, Any] = {"family": "DejaVu Sans Mono", "parse_math": False}  # the font is part of matplotlib


def visible(text: str, space: str = "␣") -> str:
    """Return `text` in one line, with symbols in place of white space."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍").replace(" ", space)


def weight_maps(shares: dict[int, np.ndarray], labels: list[str], title: str) -> bytes:
    """Draw one heat map a block of one group's shares in the mixtures.

    Args:
        shares: by block, [G, E].
        labels: of the G group members.
        title: of the figure.
    """
    size, experts = next(iter(shares.values())).shape
    figure, panels = _panels(len(shares), 3, (4.2, 0.17 * size + 1.2), sharey=True)
    for axes, (block, share) in zip(panels, shares.items(), strict=True):
        order = np.argsort(-np.square(share).sum(axis=0), kind="stable")[:_MAX_EXPERTS]  # most concentrated first
        order = order[np.argsort(share[:, order].argmax(axis=0), kind="stable")]
        norm = PowerNorm(0.5, 0, 1)
        image = axes.imshow(share[:, order], aspect="auto", interpolation="nearest", norm=norm, cmap="magma")
        axes.set(title=f"block {block}", xlabel="expert")
        axes.set_xticks(range(len(order)), order, rotation=90, fontsize=5)
        axes.set_yticks(range(size), [_drawable(label) for label in labels], fontsize=7, **_FONT)
        axes.tick_params(length=0)
    figure.colorbar(image, ax=panels, label=f"share in the mixture (uniform: {1 / size:.3f})", aspect=40)
    if experts > _MAX_EXPERTS:
        selection = f"the {_MAX_EXPERTS} of {experts} experts with the most concentrated weights"
    else:
        selection = f"all {experts} experts"
    figure.suptitle(f"{title}\n{selection}, sorted by the token with the largest weight", wrap=True)
    return png(figure)


def token_table(report: dict[str, Any], group_size: int) -> bytes:
    """Draw, for each block, the tokens with the largest mean weight in the experts of lowest entropy."""
    blocks = report["blocks"]
    lines = max(len(block["experts"]) for block in blocks.values())
    figure, panels = _panels(len(blocks), 2, (8.5, 0.24 * lines + 0.7))
    for axes, (name, block) in zip(panels, blocks.items(), strict=True):
        ratios = [[token["ratio"] for token in expert["tokens"]] for expert in block["experts"]]
        width = max(1, *map(len, ratios))
        table = [row + [0] * (width - len(row)) for row in ratios]
        axes.imshow(table, aspect="auto", norm=PowerNorm(0.5, 0, max(group_size, 1.1)), cmap="Blues", alpha=0.6)
        for y, expert in enumerate(block["experts"]):
            for x, token in enumerate(expert["tokens"]):
                word = _drawable(visible(token["text"]))
                word = word if len(word) < 12 else word[:10] + "…"
                axes.text(x, y, f"{word} ({token['ratio']:.1f})", ha="center", va="center", fontsize=7, **_FONT)
        labels = [f"expert {expert['expert']} ({expert['entropy']:.2f})" for expert in block["experts"]]
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        axes.set(title=f"block {name}, mean entropy {block['entropy']:.2f}", xticks=[])
        axes.tick_params(length=0)
    figure.suptitle(
        f"Tokens with the largest mean weight in the experts of lowest entropy; (x): x times uniform mixing, at most "
        f"{group_size}\nstep {report['step']}, {report['tokens_read']:,} validation tokens; next to each expert its "
        f"entropy; tokens that occur less than {report['least_count']} times are left out",
        fontsize=10,
        wrap=True,
    )
    return png(figure)


def _panels(count: int, max_columns: int, size: tuple[float, float], sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Make a figure with `count` axes of `size` (width, height) in inches, at most `max_columns` in a line."""
    columns = min(count, max_columns)
    lines = math.ceil(count / columns)
    inches = (size[0] * columns + 2.5, max(3.5, size[1] * lines + 0.8))
    figure = Figure(figsize=inches, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=sharey).ravel()
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont(_FONT["family"])).get_charmap())


def _drawable(text: str) -> str:
    return "".join(c if ord(c) in _glyphs() else "□" for c in text)
