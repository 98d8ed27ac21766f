"""`--topology` of `mot bench layers` and `mot bench step`: ahead-of-time compilation for a target device.

Nothing is executed: memory traffic and memory are read off the compiled programs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mot_jax.benchmark.layers import as_function, create_layer, forward_and_backward
from mot_jax.benchmark.report import Column, number
from mot_jax.benchmark.timing import count_copies, temporaries
from mot_jax.config import Config, DenseConfig, FeedForwardConfig, MeshConfig, MixtureOfTokensConfig, kernel_runs_on
from mot_jax.cost.hardware import parse_topology
from mot_jax.cost.layers import Shape
from mot_jax.errors import UserError
from mot_jax.nn.kernels import fused_experts_tpu, fused_mixture_tpu
from mot_jax.planning import hlo
from mot_jax.planning.nvidia import compiler_options
from mot_jax.planning.plan import devices_of, plan_training
from mot_jax.planning.program import read_program

Row = dict[str, Any]


def bytes_of_layers(
    shapes: Sequence[Shape], topology: str, dtype: str, param_dtype: str, progress: Callable[[str], None]
) -> list[Row]:
    """Compile one layer, forward and backward, for one chip of `topology`: a row for each shape and implementation.

    Rows: shape, kind; hbm_bytes, from the compiled program's text, in which arrays in the core's own memory cost
    nothing; cost_bytes, of XLA's `cost_analysis()`, which counts them; ratio and cost_ratio, these over dense's.
    kernel_bytes: traffic of the hand-written kernels by their grids and block specs; in hbm_bytes it replaces the
    kernels' operands and results, and in cost_bytes it is added to XLA's count. For target GPUs XLA has no cost model:
    cost_bytes and cost_ratio are None. copies; temporaries, bytes; compile_s.
    If a kernel does not support a shape, the row has the reason, `refused`, instead.
    """
    sharding = SingleDeviceSharding(devices_of(parse_topology(topology))[0])
    rows: list[Row] = []
    for shape in shapes:
        dense: Row = {}
        mixtures = {
            kind: config
            for kind, config in shape.implementations().items()
            if isinstance(config, MixtureOfTokensConfig)
        }
        for kind, config in ({"dense": DenseConfig(bias=False)} | mixtures).items():
            progress(f"{shape.name}, {kind}: compiling for {topology}")
            try:
                row = _compile_layer(shape, config, dtype, param_dtype, sharding)
            except UserError as error:
                rows.append({"shape": shape.name, "kind": kind, "refused": str(error)})
                continue
            dense = dense or row
            ratios = {"ratio": "hbm_bytes", "cost_ratio": "cost_bytes"}
            values = {name: row[of] / dense[of] if row[of] else None for name, of in ratios.items()}
            rows.append({"shape": shape.name, "kind": kind} | row | values)
    return rows


def _compile_layer(
    shape: Shape, config: FeedForwardConfig, dtype: str, param_dtype: str, sharding: SingleDeviceSharding
) -> Row:
    kernel_bytes = 0
    (device,) = sharding.device_set
    if isinstance(config, MixtureOfTokensConfig):
        if not kernel_runs_on(config, device):
            raise UserError(f"kernel = {config.kernel!r}: needs a TPU v5e, v5p or later; try --topology v5p:2x2x1")
        n, (e, d, f) = (
            shape.sequences // shape.group_size,
            (shape.num_experts, shape.d_model, config.hidden_dim(shape.d_ff)),
        )
        if config.kernel == "fused_mixture":
            kernel_bytes = fused_mixture_tpu.layer_bytes(n, shape.group_size, shape.length, e, d, f, dtype)
        if config.kernel == "fused_experts":
            kernel_bytes = fused_experts_tpu.layer_bytes(n, shape.group_size, shape.length, e, d, f, dtype, param_dtype)
    layer = nnx.eval_shape(lambda: create_layer(shape, config, dtype=dtype, param_dtype=param_dtype))
    forward, variables = as_function(layer)
    x = jax.ShapeDtypeStruct((shape.sequences, shape.length, shape.d_model), dtype)
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), (variables, x, x))
    start = time.perf_counter()
    lowered = jax.jit(forward_and_backward(forward), out_shardings=sharding).lower(*arguments)
    compiled = lowered.compile(compiler_options(device, "triton"))
    seconds, costs = time.perf_counter() - start, compiled.cost_analysis()
    module = hlo.parse(compiled.as_text() or "")
    return {
        "hbm_bytes": read_program(module, {}, kernels=not kernel_bytes).hbm_bytes + kernel_bytes,
        "cost_bytes": costs["bytes accessed"] + kernel_bytes if costs else None,
        "kernel_bytes": kernel_bytes,
        "copies": count_copies(module),
        "temporaries": temporaries(compiled),
        "compile_s": seconds,
    }


COLUMNS: list[Column] = [
    ("shape", lambda row: row["shape"]),
    ("kind", lambda row: row["kind"]),
    ("GB", lambda row: row.get("refused") or f"{row['hbm_bytes'] / 1e9:.2f}"),
    ("ratio to dense", lambda row: f"{row['ratio']:.2f}" if "ratio" in row else ""),
    ("GB, cost model", lambda row: f"{row['cost_bytes'] / 1e9:.2f}" if row.get("cost_bytes") else ""),
    ("ratio to dense, cost model", lambda row: f"{row['cost_ratio']:.2f}" if row.get("cost_ratio") else ""),
    ("GB of kernels", lambda row: f"{row['kernel_bytes'] / 1e9:.2f}" if row.get("kernel_bytes") else ""),
    ("copies", lambda row: f"{row['copies']}" if "copies" in row else ""),
    ("GB temporaries", lambda row: number("temporaries", 1e-9, ".2f", row) if "temporaries" in row else ""),
    ("s to compile", lambda row: f"{row['compile_s']:.0f}" if "compile_s" in row else ""),
]


def memory_of_steps(configs: Mapping[str, Config], topology: str, progress: Callable[[str], None]) -> list[Row]:
    """Compile the training step of each config for one chip of `topology`; the last config is the baseline.

    Rows: config; needed, bytes of the chip's memory; of these, arguments (parameters, optimizer state, batch) and
    temporaries including the gaps between them; live, the temporaries in use at the peak, on a TPU only, else None;
    ratio and live_ratio, temporaries and live over the baseline's; hbm_bytes of a step, from the compiled program's
    text; compile_s. For a step that does not fit, `fits` is False and only `needed` is known, or None if the compiler
    does not report it.
    """
    rows: list[Row] = []
    for name, config in configs.items():
        progress(f"{name}: compiling for one chip of {topology}, a minute or more for large models")
        plan = plan_training(dataclasses.replace(config, mesh=MeshConfig(data=1)), topology, chips=1)
        row: Row = {"config": name, "fits": plan.fits, "compile_s": plan.seconds_to_compile}
        row |= {part: plan.memory.get(part) for part in ("needed", "arguments", "temporaries")}
        row["live"] = plan.memory.get("in use at once")
        rows.append(row | {"hbm_bytes": plan.program and plan.program.hbm_bytes})
    baseline = rows[-1]

    def ratio(row: Row, part: str) -> float | None:
        return row[part] / baseline[part] if row[part] and baseline[part] else None

    return [row | {"ratio": ratio(row, "temporaries"), "live_ratio": ratio(row, "live")} for row in rows]


STEP_COLUMNS: list[Column] = [
    ("config", lambda row: row["config"] + ("" if row["fits"] else ", does not fit")),
    ("GB needed", partial(number, "needed", 1e-9, ".2f")),
    ("GB of arguments", partial(number, "arguments", 1e-9, ".2f")),
    ("GB of temporaries", partial(number, "temporaries", 1e-9, ".2f")),
    ("temporaries, ratio to dense", partial(number, "ratio", 1, ".2f")),
    ("GB live", partial(number, "live", 1e-9, ".2f")),
    ("live, ratio to dense", partial(number, "live_ratio", 1, ".2f")),
    ("GB read and written", partial(number, "hbm_bytes", 1e-9, ".1f")),
    ("s to compile", partial(number, "compile_s", 1, ".0f")),
]
