"""Several devices: the losses and the time of a training step on one and on all of them, and single collectives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding

from mot_jax.benchmark.calibration import Model, modeled
from mot_jax.benchmark.report import Column, number
from mot_jax.benchmark.step import TrainingProgram
from mot_jax.benchmark.timing import in_turns
from mot_jax.config import Config, MeshConfig
from mot_jax.errors import UserError
from mot_jax.nn.sharding import AXES, make_mesh

Row = dict[str, Any]
STEPS = 4  # whose losses are compared
# Relative differences of losses that the order of summation explains, by the dtype of the model.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-3}


def meshes(config: Config, devices: int) -> dict[str, MeshConfig]:
    """One device, and each axis of the mesh over all of them, where the config allows it."""
    table = {"1 device": MeshConfig(data=1)}
    for axis in AXES if devices > 1 else ():
        mesh = dataclasses.replace(MeshConfig(data=1), **{axis: devices})
        try:
            make_mesh(dataclasses.replace(config, mesh=mesh), jax.devices()[:devices])
        except UserError:  # such as heads that this number of devices does not divide
            continue
        table[f"{axis} {devices}"] = mesh
    return table


def bench_mesh(config: Config, rounds: int, model: Model, progress: Callable[[str], None]) -> list[Row]:
    """Train a few steps of `config` on each of `meshes`, from equal states and with equal batches, and time a step.

    Rows: mesh; devices; losses of the first steps; loss_difference, the largest relative one from the losses of one
    device; tolerance; ok; median_s, spread; speedup over one device, with the same batch; temporaries, bytes of a
    device; compile_s; modeled_s, by class of kernel.
    """
    rows: list[Row] = []
    for name, mesh in meshes(config, jax.device_count()).items():
        progress(f"mesh, {name}: compiling")
        run, losses = train_on(config, mesh, STEPS)
        timing = in_turns({name: run.step}, rounds)[name]
        expected, tolerance = rows[0]["losses"] if rows else losses, TOLERANCES[config.model.dtype]
        difference = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
        row: Row = {"mesh": name, "devices": run.mesh.size, "losses": losses, "loss_difference": difference}
        row |= {"tolerance": tolerance, "ok": difference <= tolerance and all(map(math.isfinite, losses))}
        row |= {"median_s": timing.median, "spread": timing.spread}
        row["speedup"] = (rows[0]["median_s"] if rows else timing.median) / timing.median
        row |= {"temporaries": run.temporaries, "compile_s": run.seconds_to_compile}
        rows.append(row | modeled(model, run.compiled, config.model.dtype, run.mesh))
        del run
    return rows


def train_on(config: Config, mesh: MeshConfig, steps: int) -> tuple[TrainingProgram, list[float]]:
    """The training step of `config` on a mesh, after `steps` steps on one batch, and their losses."""
    run = TrainingProgram(dataclasses.replace(config, mesh=mesh))
    return run, [float(run.step()()[1]["loss"]) for _ in range(steps)]


COLUMNS: list[Column] = [
    ("mesh", lambda row: row["mesh"]),
    ("loss of the last step", lambda row: number("loss", 1, ".5f", {"loss": row["losses"][-1]})),
    ("difference", partial(number, "loss_difference", 1, ".1e")),
    ("tolerance", partial(number, "tolerance", 1, ".0e")),
    ("", lambda row: "ok" if row["ok"] else "WRONG"),
    ("ms per step", partial(number, "median_s", 1e3, ",.2f")),
    ("spread", partial(number, "spread", 1, ".0%")),
    ("speedup", partial(number, "speedup", 1, ".2f")),
    ("MB of temporaries", partial(number, "temporaries", 1e-6, ",.1f")),
    ("s to compile", partial(number, "compile_s", 1, ".1f")),
]


# --- single collectives -----------------------------------------------------------------------------------------------


def bench_collectives(size: int, rounds: int, model: Model, progress: Callable[[str], None]) -> list[Row]:
    """Time each kind of collective over all devices, with a bfloat16 array of about `size` bytes on each.

    Rows: collective; devices; bytes, of the array that a device contributes, or receives from an all-gather; median_s,
    spread; bytes_per_second, those that a device sends over the median; modeled_s, by class of kernel.
    """
    n = jax.device_count()
    mesh = Mesh(jax.devices(), ("x",), axis_types=(AxisType.Explicit,))
    progress(f"collectives over {n} devices")
    size = size // (2 * n) * (2 * n)
    x = jax.device_put(jnp.ones((n, size // 2), jnp.bfloat16), NamedSharding(mesh, jax.P("x")))
    ring = [(i, (i + 1) % n) for i in range(n)]
    # Functions of the array [1, m] of a device; bytes that a device sends, over those of the array.
    kinds: dict[str, tuple[Callable[[jax.Array], jax.Array], float]] = {
        "all-reduce": (lambda a: jax.lax.psum(a, "x"), 2 * (n - 1) / n),
        "all-gather": (lambda a: jax.lax.all_gather(a[:, : a.shape[1] // n], "x", axis=1, tiled=True), (n - 1) / n),
        "reduce-scatter": (lambda a: jax.lax.psum_scatter(a, "x", scatter_dimension=1, tiled=True), (n - 1) / n),
        "all-to-all": (lambda a: jax.lax.all_to_all(a.reshape(n, -1), "x", 0, 0), (n - 1) / n),
        "collective-permute": (lambda a: jax.lax.ppermute(a, "x", ring), 1.0),
    }
    programs: dict[str, Callable[[], Callable[[], Any]]] = {}
    times_of: dict[str, Row] = {}
    for kind, (f, _) in kinds.items():
        sharded = jax.shard_map(f, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"), check_vma=False)
        compiled = jax.jit(sharded).lower(x).compile()
        programs[kind], times_of[kind] = partial(partial, compiled, x), modeled(model, compiled, "bfloat16", mesh)
    timings = in_turns(programs, rounds)
    rows = []
    for kind, (_, sent) in kinds.items():
        row: Row = {"collective": kind, "devices": n, "bytes": size, "median_s": timings[kind].median}
        row |= {"spread": timings[kind].spread, "bytes_per_second": sent * size / timings[kind].median}
        rows.append(row | times_of[kind])
    return rows


COLLECTIVE_COLUMNS: list[Column] = [
    ("collective", lambda row: row["collective"]),
    ("MB", partial(number, "bytes", 1e-6, ",.1f")),
    ("ms", partial(number, "median_s", 1e3, ",.3f")),
    ("spread", partial(number, "spread", 1, ".0%")),
    ("GB/s sent by a device", partial(number, "bytes_per_second", 1e-9, ",.1f")),
]
