"""HBM traffic of a Pallas kernel, from its grid and block specs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from jax.experimental import pallas as pl


def moved_bytes(grid: Sequence[int], blocks: Sequence[tuple[pl.BlockSpec, Any]]) -> int:
    """Count the bytes that blocks (spec, dtype) of inputs and outputs move between HBM and VMEM, without padding.

    Pallas moves a block at each grid step at which its index differs from that of the step before.
    """
    steps = list(itertools.product(*map(range, grid)))
    total = 0
    for spec, dtype in blocks:
        assert spec.block_shape is not None and spec.index_map is not None
        indices = [tuple(spec.index_map(*step)) for step in steps]
        moves = sum(1 for before, index in zip([None, *indices], indices, strict=False) if index != before)
        total += moves * math.prod(n for n in spec.block_shape if isinstance(n, int)) * dtype.itemsize
    return total
