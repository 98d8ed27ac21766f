"""Modeled against measured times, and one factor per class of kernel that calibrates the model.

A program's modeled time is a sum over classes c of kernels, m_c. The factors f_c > 0 minimize

    sum over programs of (sum over c of f_c m_c / measured - 1)^2  +  RIDGE^2 sum over c of (f_c / f - 1)^2

On accelerators the sum over c also has a constant, *launch*, which is equal for all programs: a short program does not
take less time than its launch. It has no model, so that its second term is (launch / (f LAUNCH_SECONDS))^2, and it may
be 0. Errors are relative, so that every program counts the same, whether it takes a microsecond or a second. f is the
median of measured over modeled times. The second term decides only where the first does not: a class that takes little
of every program gets the factor f, and classes that are in the same proportion in every program get the same factor.
The *resolution* of a factor, the diagonal of the resolution matrix of this least-squares problem, is then near 0 or a
fraction; it is near 1 for a factor that the measurements determine. A class whose best factor is not positive, because
of noise or since it overlaps with others, gets f with a resolution of 0, and the others are fitted again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from scipy.optimize import nnls

from mot_jax.benchmark.report import Column, number
from mot_jax.benchmark.timing import bandwidth, matmul_peak
from mot_jax.cost.hardware import Hardware, hardware_of
from mot_jax.errors import error_words
from mot_jax.planning import hlo
from mot_jax.planning.program import Program, read_program
from mot_jax.planning.times import model_times

RIDGE = 0.05
LAUNCH, LAUNCH_SECONDS = "launch", 1e-4
# Classes of kernels, which have a factor each, by their kinds in `planning.program`; collectives are another class, and
# all other kinds (copies, fusions without products) are `elementwise`.
CLASSES = {
    "Triton product": "products",
    "cuBLAS product": "products",
    "product": "products",
    "cuDNN attention": "attention",
    "splash attention": "attention",
    "custom call": "library",
}
Row = dict[str, Any]


class NotModeledError(Exception):
    """Why a program has no modeled time."""


class Model:
    """The model of `mot plan` for programs of the attached devices.

    measured: whether the device is not in `cost.hardware`, so that its peak and bandwidth are measured. The network of
    virtual CPU devices is as fast as their memory, that of others is not known.
    """

    def __init__(self) -> None:
        self._device = jax.devices()[0]
        self.measured = hardware_of(self._device) is None

    def seconds(self, compiled: jax.stages.Compiled, dtype: str, mesh: Mesh | None = None) -> dict[str, float]:
        """Modeled seconds of an executable by class of kernel. Raises UnknownTextError and NotModeledError."""
        devices = [self._device] if mesh is None else list(mesh.devices.flat)
        shape = {} if mesh is None else dict(mesh.shape)
        program = read_program(hlo.parse(compiled.as_text() or ""), shape)
        if program.unknown:
            raise NotModeledError(f"not understood: {program.unknown[0]}")
        if program.overcounted:
            raise NotModeledError(f"not known: {program.overcounted[0]}")
        if program.collectives and self.measured and self._device.platform != "cpu":
            raise NotModeledError("the network of these devices is not known")
        return seconds_by_class(program, self._hardware, self._peak(dtype), devices)

    @functools.cached_property
    def _hardware(self) -> Hardware:
        if known := hardware_of(self._device):
            return known
        kind, rate, peaks = self._device.device_kind, bandwidth(), (matmul_peak("bfloat16"), matmul_peak("float32"))
        return Hardware((kind,), *peaks, kind, 0, math.inf, rate, rate, rate, jax.device_count())

    def _peak(self, dtype: str) -> float:
        return self._hardware.bfloat16_peak if dtype == "bfloat16" else self._hardware.float32_peak


def modeled(model: Model, compiled: jax.stages.Compiled, dtype: str, mesh: Mesh | None = None) -> Row:
    """A part of a row: `modeled_s`, modeled seconds by class of kernel; with none, the reason as `not_modeled`."""
    try:
        return {"modeled_s": model.seconds(compiled, dtype, mesh)}
    except NotModeledError as error:
        return {"modeled_s": {}, "not_modeled": str(error)}
    except Exception as error:  # the measured time is valid
        return {"modeled_s": {}, "not_modeled": error_words(error)}


def seconds_by_class(program: Program, hardware: Hardware, peak: float, devices: list[jax.Device]) -> dict[str, float]:
    """Modeled seconds of a program (`planning.times`) by class of kernel, for the classes that take any.

    peak: FLOP/s of a device. devices: of the mesh, flattened.
    """
    times, seconds = model_times(program, hardware, peak, devices), dict[str, float]()
    for kind, value in times.kernels.items():
        name = CLASSES.get(kind, "elementwise")
        seconds[name] = seconds.get(name, 0.0) + value
    if times.collectives:
        seconds["collectives"] = sum(times.collectives.values())
    return seconds


@dataclasses.dataclass(frozen=True)
class Factor:
    """Measured over modeled time of a class; of LAUNCH the seconds of a program.

    share: the largest that it has of the modeled time of any program; of LAUNCH of the measured time.
    """

    factor: float
    resolution: float
    share: float


def fit(modeled: Sequence[Mapping[str, float]], measured: Sequence[float], launch: bool = False) -> dict[str, Factor]:
    """The factor of each class that takes any time.

    Args:
        modeled: seconds of each class, for each program.
        measured: seconds of each program.
        launch: whether to fit the time of a launch, too.
    """
    names = sorted({name for row in modeled for name, seconds in row.items() if seconds > 0})
    if not names:
        return {}
    seconds = np.array([[row.get(name, 0.0) for name in names] for row in modeled])
    totals, times = seconds.sum(axis=1), np.asarray(measured)
    overall = statistics.median(times / totals)
    if launch:
        names, seconds = [*names, LAUNCH], np.column_stack([seconds, np.full(len(times), LAUNCH_SECONDS)])
    relative = seconds / times[:, None] * overall  # the unknowns are f_c / f
    factors, resolution = np.ones(len(names)), np.zeros(len(names))
    free, expected = np.ones(len(names), bool), np.array([name != LAUNCH for name in names], float)
    while free.any():
        columns, rest = relative[:, free], 1 - relative[:, ~free].sum(axis=1)
        ridge = RIDGE * np.eye(free.sum())
        factors[free], _ = nnls(np.concatenate([columns, ridge]), np.concatenate([rest, RIDGE * expected[free]]))
        gram = columns.T @ columns
        resolution[free] = np.diag(np.linalg.solve(gram + ridge**2, gram))
        failed = (factors == 0) & (expected > 0)
        if not failed.any():
            break
        resolution[failed], factors[failed], free = 0.0, 1.0, free & ~failed
    shares = (seconds / totals[:, None]).max(axis=0)
    if launch:
        factors[-1] *= LAUNCH_SECONDS
        shares[-1] = (factors[-1] * overall / times).max()
    values = zip(names, factors * overall, resolution, shares, strict=True)
    return {name: Factor(*map(float, row)) for name, *row in values}


def calibrate(rows: Sequence[Row], launch: bool = False) -> tuple[list[Row], dict[str, Factor]]:
    """Add modeled, ratio, calibrated and calibrated_ratio to rows with a name, measured_s and modeled_s by class.

    Rows with `not_modeled` are last, without these.
    """
    not_modeled = [row for row in rows if "not_modeled" in row]
    rows = [row for row in rows if sum(row["modeled_s"].values()) > 0]
    factors = fit([row["modeled_s"] for row in rows], [row["measured_s"] for row in rows], launch)
    constant = factors[LAUNCH].factor if LAUNCH in factors else 0.0
    table = []
    for row in rows:
        total = sum(row["modeled_s"].values())
        classes = row["modeled_s"].items()
        calibrated = constant + sum(factors[name].factor * seconds for name, seconds in classes if seconds)
        ratios = {"ratio": row["measured_s"] / total, "calibrated_ratio": row["measured_s"] / (calibrated or total)}
        table.append(row | {"modeled_total_s": total, "calibrated_s": calibrated} | ratios)
    return table + not_modeled, factors


def _by_class(modeled: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {1e3 * seconds:,.3f}" for name, seconds in modeled.items() if seconds)


COLUMNS: list[Column] = [
    ("program", lambda row: row["name"]),
    ("modeled ms", partial(number, "modeled_total_s", 1e3, ",.3f")),
    ("of it, by class", lambda row: row.get("not_modeled") or _by_class(row["modeled_s"])),
    ("measured ms", partial(number, "measured_s", 1e3, ",.3f")),
    ("measured / modeled", partial(number, "ratio", 1, ".2f")),
    ("measured / calibrated", partial(number, "calibrated_ratio", 1, ".2f")),
]
FACTOR_COLUMNS: list[Column] = [
    ("class of kernel", lambda row: row["class"]),
    ("factor", lambda row: f"{1e6 * row['factor']:.1f} µs" if row["class"] == LAUNCH else f"{row['factor']:.2f}"),
    ("determined by the measurements", partial(number, "resolution", 1, ".0%")),
    ("largest share of a program", partial(number, "share", 1, ".0%")),
]
