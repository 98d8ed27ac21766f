"""Curves of a run's layer metrics over the steps of training, for `mot inspect`.

The loss curves that a run itself writes (`loss.png`) are drawn by `runs.metrics`.
"""

from __future__ import annotations

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from mot_jax.runs.metrics import Row, png


def mixing_curves(rows: list[Row], title: str) -> bytes:
    """Draw the entropies of merge and emit weights, and the update/residual ratios, of each block over the steps.

    Args:
        rows: of `metrics.jsonl`.
        title: of the figure.

    Returns:
        A PNG file.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    last_block = 0
    for axes, name, style, label in (
        (left, "mixing_entropy", "-", "block {}"),
        (left, "emit_entropy", "--", "block {}, emit"),
        (right, "update_ratio", "-", "block {}"),
    ):
        series = _series(rows, name)
        last_block = max(last_block, *series, 0)
        for block, points in series.items():
            color = colormaps["viridis"](block / max(last_block, 1) * 0.9)
            axes.plot(*zip(*points, strict=True), style, color=color, label=label.format(block))
    left.set(title="normalized entropy of the mixing weights; 1: uniform", ylim=(-0.02, 1.02))
    right.set(title="RMS of the layer's update / RMS of the residual stream", yscale="log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))  # few enough for two decades
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_locator(NullLocator())
    figure.suptitle(title)
    for axes in (left, right):
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small", ncols=2)
    return png(figure)


def _series(rows: list[Row], name: str) -> dict[int, list[tuple[int, float]]]:
    """Return the (step, value) pairs of a layer metric by block."""
    series: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(name + "/") and value is not None:
                series.setdefault(int(key.rpartition("/")[2]), []).append((row["step"], value))
    return dict(sorted(series.items()))
