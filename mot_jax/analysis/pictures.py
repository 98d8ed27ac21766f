"""The pictures of `mot inspect`, as PNG files in memory."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from mot_jax.runs.metrics import Row, png

_SHOWN = 48  # experts of a heat map
_FONT: dict[str, Any] = {"family": "DejaVu Sans Mono", "parse_math": False}  # comes with matplotlib


def visible(text: str, space: str = "␣") -> str:
    """`text` in one line, its white space to be seen."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍").replace(" ", space)


def entropy(rows: list[Row], title: str) -> bytes:
    """Entropies of merge and emit weights, and update/residual ratios, by block over the steps of training."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    last = 0
    for axes, name, style, label in (
        (left, "mixing_entropy", "-", "block {}"),
        (left, "emit_entropy", "--", "block {}, emit"),
        (right, "update_ratio", "-", "block {}"),
    ):
        series = _series(rows, name)
        last = max(last, *series, 0)
        for block, points in series.items():
            color = colormaps["viridis"](block / max(last, 1) * 0.9)
            axes.plot(*zip(*points, strict=True), style, color=color, label=label.format(block))
    left.set(title="normalised entropy of the mixing weights; 1: uniform", ylim=(-0.02, 1.02))
    right.set(title="RMS of the layer's update / RMS of the residual stream", yscale="log")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    figure.suptitle(title)
    for axes in (left, right):
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small", ncols=2)
    return png(figure)


def _series(rows: list[Row], name: str) -> dict[int, list[tuple[int, float]]]:
    """(step, value) of a layer metric, by block."""
    series: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(name + "/") and value is not None:
                series.setdefault(int(key.rpartition("/")[2]), []).append((row["step"], value))
    return dict(sorted(series.items()))


def weights(shares: dict[int, np.ndarray], labels: list[str], title: str) -> bytes:
    """Heat maps of shares [G, E] by block; `labels` are of the G rows."""
    size, experts = next(iter(shares.values())).shape
    figure, panels = _panels(len(shares), 3, (4.2, 0.17 * size + 1.2), sharey=True)
    for axes, (block, share) in zip(panels, shares.items(), strict=True):
        order = np.argsort(-np.square(share).sum(axis=0), kind="stable")[:_SHOWN]  # the least spread first
        order = order[np.argsort(share[:, order].argmax(axis=0), kind="stable")]
        norm = PowerNorm(0.5, 0, 1)
        image = axes.imshow(share[:, order], aspect="auto", interpolation="nearest", norm=norm, cmap="magma")
        axes.set(title=f"block {block}", xlabel="expert")
        axes.set_xticks(range(len(order)), order, rotation=90, fontsize=5)
        axes.set_yticks(range(size), [_drawable(label) for label in labels], fontsize=7, **_FONT)
        axes.tick_params(length=0)
    figure.colorbar(image, ax=panels, label=f"share in the mixture (uniform: {1 / size:.3f})", aspect=40)
    some = f"{_SHOWN} of {experts} experts, the most decided here" if experts > _SHOWN else f"all {experts} experts"
    figure.suptitle(f"{title}\n{some}, in the order of their heaviest token")
    return png(figure)


def tokens(report: dict[str, Any], group_size: int) -> bytes:
    """The table of the tokens that the most decided experts weigh most, by block."""
    blocks = report["blocks"]
    most = max(len(block["experts"]) for block in blocks.values())
    figure, panels = _panels(len(blocks), 2, (8.5, 0.24 * most + 0.7))
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
        f"Tokens that the most decided experts weigh more than uniform mixing: how many times as much ({group_size} at "
        f"most)\nstep {report['step']}, {report['tokens_read']:,} validation tokens; beside each expert its entropy; "
        f"tokens seen less than {report['least_count']} times are left out",
        fontsize=10,
    )
    return png(figure)


def _panels(count: int, most: int, size: tuple[float, float], sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """`count` axes of a size in inches, at most `most` in a line."""
    columns = min(count, most)
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
