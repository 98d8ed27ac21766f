"""`--topology` of `mot bench layers` and `mot bench step`: ahead-of-time compilation for a target device.

Nothing is executed: memory traffic and memory are read off the compiled programs.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mot_jax.benchmark.layers import as_function, create_layer, forward_and_backward
from mot_jax.benchmark.report import Column, number
from mot_jax.benchmark.timing import temporaries
from mot_jax.config import Config, DenseConfig, FeedForwardConfig, MeshConfig, MixtureOfTokensConfig, kernel_runs_on
from mot_jax.cost.hardware import hardware_of, parse_topology, peak_flops
from mot_jax.cost.layers import Shape
from mot_jax.errors import UserError
from mot_jax.nn.kernels import fused_experts_tpu, fused_mixture_tpu
from mot_jax.planning import hlo
from mot_jax.planning.nvidia import Products, compile_for
from mot_jax.planning.plan import devices_of, plan_training
from mot_jax.planning.program import read_program
from mot_jax.planning.times import model_times

Row = dict[str, Any]
PRODUCTS: tuple[Products, ...] = ("triton", "cublas")


def bytes_of_layers(
    shapes: Sequence[Shape],
    topology: str,
    dtype: str,
    param_dtype: str,
    progress: Callable[[str], None],
    products: Sequence[Products] = PRODUCTS,
) -> list[Row]:
    """Compile one layer, forward and backward, for one chip of `topology`: a row for each shape and implementation.

    For a GPU there is one for each of `products`, else `products` has no meaning, and is None in the row.
    Rows: shape, kind, products; hbm_bytes, from the compiled program's text, in which arrays in the core's own memory
    cost nothing; cost_bytes, of XLA's `cost_analysis()`, which counts them; ratio and cost_ratio, these over dense's.
    kernel_bytes: traffic of the hand-written kernels by their grids and block specs; in hbm_bytes it replaces the
    kernels' operands and results, and in cost_bytes it is added to XLA's count. For target GPUs XLA has no cost model:
    cost_bytes and cost_ratio are None. kernel_s, seconds by kernel (`planning.times`), None without the device's
    figures; copies, and of these transposes; temporaries, bytes; compile_s.
    If a kernel does not support a shape, the row has the reason, `refused`, instead.
    """
    device = devices_of(parse_topology(topology))[0]
    sharding = SingleDeviceSharding(device)
    rows: list[Row] = []
    for shape, by in itertools.product(shapes, _products(device, products)):
        dense: Row = {}
        mixtures = {
            kind: config
            for kind, config in shape.implementations().items()
            if isinstance(config, MixtureOfTokensConfig)
        }
        for kind, config in ({"dense": DenseConfig(bias=False)} | mixtures).items():
            progress(f"{shape.name}, {kind}: compiling for {topology}{f', {by}' if by else ''}")
            try:
                row = _compile_layer(shape, config, dtype, param_dtype, sharding, by)
            except UserError as error:
                rows.append({"shape": shape.name, "kind": kind, "products": by, "refused": str(error)})
                continue
            dense = row if kind == "dense" else dense
            ratios = {"ratio": "hbm_bytes", "cost_ratio": "cost_bytes"} if dense else {}
            values = {name: row[of] / dense[of] if row[of] else None for name, of in ratios.items()}
            rows.append({"shape": shape.name, "kind": kind, "products": by} | row | values)
    return rows


def _products(device: jax.Device, products: Sequence[Products]) -> Sequence[Products | None]:
    return products if device.platform == "gpu" else [None]


def _compile_layer(
    shape: Shape,
    config: FeedForwardConfig,
    dtype: str,
    param_dtype: str,
    sharding: SingleDeviceSharding,
    products: Products | None,
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
    forward, variables, _ = as_function(layer)
    x = jax.ShapeDtypeStruct((shape.sequences, shape.length, shape.d_model), dtype)
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), (variables, x, x))
    start = time.perf_counter()
    lowered = jax.jit(forward_and_backward(forward), out_shardings=sharding).lower(*arguments)
    compiled = compile_for(device, lowered, products)
    seconds, costs = time.perf_counter() - start, compiled.cost_analysis()
    module = hlo.parse(compiled.as_text() or "")
    program, hardware, peak = read_program(module, {}, kernels=not kernel_bytes), hardware_of(device), None
    if not kernel_bytes and program.exact:  # else FLOPs are not in the text, or may not be those of a run
        peak = peak_flops(device, dtype)
    return {
        "hbm_bytes": program.hbm_bytes + kernel_bytes,
        "kernel_s": model_times(program, hardware, peak, [device]).serial if hardware and peak else None,
        "cost_bytes": costs["bytes accessed"] + kernel_bytes if costs else None,
        "kernel_bytes": kernel_bytes,
        "copies": hlo.count_copies(module),
        "transposes": hlo.count_copies(module, opcodes=("transpose",)),
        "temporaries": temporaries(compiled),
        "compile_s": seconds,
    }


COLUMNS: list[Column] = [
    ("shape", lambda row: row["shape"]),
    ("kind", lambda row: row["kind"]),
    ("products", lambda row: row["products"] or ""),
    ("GB", lambda row: row.get("refused") or f"{row['hbm_bytes'] / 1e9:.2f}"),
    ("ratio to dense", lambda row: f"{row['ratio']:.2f}" if "ratio" in row else ""),
    ("GB, cost model", lambda row: f"{row['cost_bytes'] / 1e9:.2f}" if row.get("cost_bytes") else ""),
    ("ratio to dense, cost model", lambda row: f"{row['cost_ratio']:.2f}" if row.get("cost_ratio") else ""),
    ("GB of kernels", lambda row: f"{row['kernel_bytes'] / 1e9:.2f}" if row.get("kernel_bytes") else ""),
    ("ms by kernel", lambda row: number("kernel_s", 1e3, ".2f", row) if "kernel_s" in row else ""),
    ("copies", lambda row: f"{row['copies']}" if "copies" in row else ""),
    ("of these, transposes", lambda row: f"{row['transposes']}" if "transposes" in row else ""),
    ("GB temporaries", lambda row: number("temporaries", 1e-9, ".2f", row) if "temporaries" in row else ""),
    ("s to compile", lambda row: f"{row['compile_s']:.0f}" if "compile_s" in row else ""),
]


def memory_of_steps(
    configs: Mapping[str, Config],
    topology: str,
    progress: Callable[[str], None],
    products: Sequence[Products] = PRODUCTS,
) -> list[Row]:
    """Compile the training step of each config for one chip of `topology`; the last config is the baseline.

    For a GPU there is a row for each of `products`, else `products` has no meaning, and is None in the row.
    Rows: config, products; needed, bytes of the chip's memory; of these, arguments (parameters, optimizer state, batch)
    and temporaries including the gaps between them; live, the temporaries in use at the peak, on a TPU only, else None;
    ratio and live_ratio, temporaries and live over the baseline's; hbm_bytes of a step, from the compiled program's
    text; kernel_s, seconds by kernel, None without the device's figures and unless the plan is exact; copies and
    transposes, numbers of instructions as in `Plan`; unknown, the parts for which it is not exact; notes, of the plan;
    compile_s. For a step that does not fit, `fits` is False and only `needed` is known, or None if the compiler does
    not report it.
    """
    device = devices_of(parse_topology(topology))[0]
    return [row for by in _products(device, products) for row in _memory_of_steps(configs, topology, progress, by)]


def _memory_of_steps(
    configs: Mapping[str, Config], topology: str, progress: Callable[[str], None], products: Products | None
) -> list[Row]:
    rows: list[Row] = []
    for name, config in configs.items():
        progress(f"{name}: compiling for one chip of {topology}, a minute or more for large models")
        config = dataclasses.replace(config, mesh=MeshConfig(data=1))
        plan = plan_training(config, topology, chips=1, products=products or "triton")
        row: Row = {"config": name, "products": products, "fits": plan.fits, "compile_s": plan.seconds_to_compile}
        unknown = plan.program.unknown + plan.program.overcounted if plan.program else ()
        row |= {"notes": plan.notes, "unknown": unknown}
        row["kernel_s"] = plan.times.compute + plan.times.hbm if plan.times and not unknown else None
        row |= {part: plan.memory.get(part) for part in ("needed", "arguments", "temporaries")}
        row |= {"live": plan.memory.get("in use at once"), "copies": plan.copies, "transposes": plan.transposes}
        rows.append(row | {"hbm_bytes": plan.program and plan.program.hbm_bytes})
    baseline = rows[-1]

    def ratio(row: Row, part: str) -> float | None:
        return row[part] / baseline[part] if row[part] and baseline[part] else None

    return [row | {"ratio": ratio(row, "temporaries"), "live_ratio": ratio(row, "live")} for row in rows]


STEP_COLUMNS: list[Column] = [
    ("config", lambda row: row["config"] + ("" if row["fits"] else ", does not fit")),
    ("products", lambda row: row["products"] or ""),
    ("GB needed", partial(number, "needed", 1e-9, ".2f")),
    ("GB of arguments", partial(number, "arguments", 1e-9, ".2f")),
    ("GB of temporaries", partial(number, "temporaries", 1e-9, ".2f")),
    ("temporaries, ratio to dense", partial(number, "ratio", 1, ".2f")),
    ("GB live", partial(number, "live", 1e-9, ".2f")),
    ("live, ratio to dense", partial(number, "live_ratio", 1, ".2f")),
    ("GB read and written", partial(number, "hbm_bytes", 1e-9, ".1f")),
    ("ms by kernel", partial(number, "kernel_s", 1e3, ".1f")),
    ("copies", partial(number, "copies", 1, ",.0f")),
    ("of these, transposes", partial(number, "transposes", 1, ",.0f")),
    ("s to compile", partial(number, "compile_s", 1, ".0f")),
]
