"""`--topology` of `mot bench layers` and `step`: what they move and need on a chip that is not here, by compiling."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mot_jax.benchmark.layers import applied, both, make
from mot_jax.benchmark.report import Column, number
from mot_jax.benchmark.timing import count_copies, temporaries
from mot_jax.config import Config, DenseConfig, FeedForwardConfig, MeshConfig, MixtureOfTokensConfig, kernel_runs_on
from mot_jax.cost.hardware import parse_topology
from mot_jax.cost.layers import Shape
from mot_jax.errors import UserError
from mot_jax.nn.kernels import fused_experts_tpu, fused_mixture_tpu
from mot_jax.planning import hlo
from mot_jax.planning.plan import devices_of, plan
from mot_jax.planning.program import read_program

Row = dict[str, Any]


def bytes_of_layers(
    shapes: Sequence[Shape], topology: str, dtype: str, param_dtype: str, progress: Callable[[str], None]
) -> list[Row]:
    """A row for each shape and way to compute it: one layer forward and backward on one chip of `topology`.

    Rows: shape, kind; hbm_bytes, by the compiled program's text, where what stays in the core's memory is free;
    cost_bytes, of XLA's `cost_analysis()`, where it is not; ratio and cost_ratio, these over dense's. kernel_bytes:
    those of the hand-written kernels, by their grids and block specs; they are in hbm_bytes in the place of what the
    text says of the kernels, and in cost_bytes beside what the cost model says of them. copies; temporaries, bytes;
    compile_s. Where a kernel does not do a shape, the row has `refused`, in words, instead.
    """
    where = SingleDeviceSharding(devices_of(parse_topology(topology))[0])
    rows: list[Row] = []
    for shape in shapes:
        dense: Row = {}
        ways = {kind: config for kind, config in shape.ways().items() if isinstance(config, MixtureOfTokensConfig)}
        for kind, config in ({"dense": DenseConfig(bias=False)} | ways).items():
            progress(f"{shape.name}, {kind}: compiling for {topology}")
            try:
                row = _row(shape, config, dtype, param_dtype, where)
            except UserError as error:
                rows.append({"shape": shape.name, "kind": kind, "refused": str(error)})
                continue
            dense = dense or row
            ratios = {"ratio": "hbm_bytes", "cost_ratio": "cost_bytes"}
            rows.append(
                {"shape": shape.name, "kind": kind} | row | {name: row[of] / dense[of] for name, of in ratios.items()}
            )
    return rows


def _row(shape: Shape, config: FeedForwardConfig, dtype: str, param_dtype: str, where: Any) -> Row:
    kernel_bytes = 0
    if isinstance(config, MixtureOfTokensConfig):
        (device,) = where.device_set
        if not kernel_runs_on(config, device):
            raise UserError(f"kernel = {config.kernel!r}: is for TPU v5e, v5p and later; try --topology v5p:2x2x1")
        n, (e, d, f) = shape.rows // shape.group_size, (shape.num_experts, shape.d_model, config.hidden_dim(shape.d_ff))
        if config.kernel == "fused_mixture":
            kernel_bytes = fused_mixture_tpu.layer_bytes(n, shape.group_size, shape.length, e, d, f, dtype)
        if config.kernel == "fused_experts":
            kernel_bytes = fused_experts_tpu.layer_bytes(n, shape.group_size, shape.length, e, d, f, dtype, param_dtype)
    run, params = applied(nnx.eval_shape(lambda: make(shape, config, dtype=dtype, param_dtype=param_dtype)))
    x = jax.ShapeDtypeStruct((shape.rows, shape.length, shape.d_model), dtype)
    given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), (params, x, x))
    start = time.perf_counter()
    compiled = jax.jit(both(run), out_shardings=where).lower(*given).compile()
    seconds, costs = time.perf_counter() - start, compiled.cost_analysis()
    module = hlo.parse(compiled.as_text() or "")
    assert costs is not None
    return {
        "hbm_bytes": read_program(module, {}, kernels=not kernel_bytes).hbm_bytes + kernel_bytes,
        "cost_bytes": costs["bytes accessed"] + kernel_bytes,
        "kernel_bytes": kernel_bytes,
        "copies": count_copies(module),
        "temporaries": temporaries(compiled),
        "compile_s": seconds,
    }


COLUMNS: list[Column] = [
    ("shape", lambda row: row["shape"]),
    ("kind", lambda row: row["kind"]),
    ("GB", lambda row: row.get("refused") or f"{row['hbm_bytes'] / 1e9:.2f}"),
    ("over dense", lambda row: f"{row['ratio']:.2f}" if "ratio" in row else ""),
    ("GB, cost model", lambda row: f"{row['cost_bytes'] / 1e9:.2f}" if "cost_bytes" in row else ""),
    ("over dense, cost model", lambda row: f"{row['cost_ratio']:.2f}" if "cost_ratio" in row else ""),
    ("GB of kernels", lambda row: f"{row['kernel_bytes'] / 1e9:.2f}" if row.get("kernel_bytes") else ""),
    ("copies", lambda row: f"{row['copies']}" if "copies" in row else ""),
    ("GB temporaries", lambda row: number("temporaries", 1e-9, ".2f", row) if "temporaries" in row else ""),
    ("s to compile", lambda row: f"{row['compile_s']:.0f}" if "compile_s" in row else ""),
]


def memory_of_steps(configs: Mapping[str, Config], topology: str, progress: Callable[[str], None]) -> list[Row]:
    """A row for the training step of each config on one chip of `topology`; the last one is the baseline.

    Rows: config; needed: bytes of the chip's memory, of which arguments (parameters, optimizer state, batch) and
    temporaries, gaps between them included; live: those of the temporaries that are in use at the peak, None but on a
    TPU. ratio, live_ratio: temporaries and live over the baseline's. hbm_bytes, of a step, by the compiled program's
    text; compile_s. Of a step that does not fit there is `needed` alone, None where the compiler does not say, and
    `fits` is False.
    """
    rows: list[Row] = []
    for name, config in configs.items():
        progress(f"{name}: compiling for one chip of {topology}, a minute or more for large models")
        found = plan(dataclasses.replace(config, mesh=MeshConfig(data=1)), topology, chips=1)
        row: Row = {"config": name, "fits": found.fits, "compile_s": found.seconds_to_compile}
        row |= {part: found.memory.get(part) for part in ("needed", "arguments", "temporaries")}
        row["live"] = found.memory.get("in use at once")
        rows.append(row | {"hbm_bytes": found.program and found.program.hbm_bytes})
    base = rows[-1]

    def over(row: Row, part: str) -> float | None:
        return row[part] / base[part] if row[part] and base[part] else None

    return [row | {"ratio": over(row, "temporaries"), "live_ratio": over(row, "live")} for row in rows]


STEP_COLUMNS: list[Column] = [
    ("config", lambda row: row["config"] + ("" if row["fits"] else ", does not fit")),
    ("GB needed", partial(number, "needed", 1e-9, ".2f")),
    ("GB of arguments", partial(number, "arguments", 1e-9, ".2f")),
    ("GB of temporaries", partial(number, "temporaries", 1e-9, ".2f")),
    ("temporaries over dense", partial(number, "ratio", 1, ".2f")),
    ("GB live", partial(number, "live", 1e-9, ".2f")),
    ("live over dense", partial(number, "live_ratio", 1, ".2f")),
    ("GB moved", partial(number, "hbm_bytes", 1e-9, ".1f")),
    ("s to compile", partial(number, "compile_s", 1, ".0f")),
]
