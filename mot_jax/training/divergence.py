"""Signs of a run that diverges, in the metrics of its steps: skipped updates, and spikes of the loss."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping

WATCHED = ("loss", "parameter_rms", "skipped_in_a_row")  # the metrics that are fetched after every step

_FACTOR = 1.5  # a spike is a loss above this multiple of the median of the losses before it
_MEDIAN_OF = 100  # steps
_ENOUGH = 20  # losses, without which there is no median


class DivergenceWatch:
    """Reads the metrics of one step after the other.

    Attributes:
        skipped_in_a_row: the number of steps, up to the latest, whose updates were all skipped.
        most_in_a_row: the largest value that `skipped_in_a_row` has had.
        usable: whether the parameters after the latest step have a finite norm, so that a checkpoint of them is of use.
    """

    def __init__(self) -> None:
        self.skipped_in_a_row, self.most_in_a_row, self.usable = 0, 0, True
        self._in_spike = False
        self._losses: deque[float] = deque(maxlen=_MEDIAN_OF)

    def read(self, metrics: Mapping[str, float]) -> str | None:
        """Read the `WATCHED` metrics of a step.

        Returns a remark if its update was skipped, a spike of the loss begins, or the parameters cease to be usable.
        """
        loss, was_usable, was_in_spike = metrics["loss"], self.usable, self._in_spike
        self.skipped_in_a_row, self.usable = int(metrics["skipped_in_a_row"]), math.isfinite(metrics["parameter_rms"])
        self.most_in_a_row = max(self.most_in_a_row, self.skipped_in_a_row)
        if self.skipped_in_a_row:
            return f"update skipped ({self.skipped_in_a_row} in a row), since its loss or gradient is not finite"
        before = list(self._losses)
        self._losses.append(loss)
        median = statistics.median(before) if len(before) >= _ENOUGH else math.inf
        self._in_spike = loss > _FACTOR * median
        if was_usable and not self.usable:
            return "the norm of the parameters is no longer finite, so no checkpoint is saved"
        if self._in_spike and not was_in_spike:
            return f"loss {loss:.4f} is over {_FACTOR} times {median:.4f}, the median of the {len(before)} steps before"
        return None
