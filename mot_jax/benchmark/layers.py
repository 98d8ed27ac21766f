"""`mot bench layers`: one feed-forward layer of each kind, forward and forward + backward, beside the dense one.

The dense layer is timed twice: as the project's own (`dense`, with biases) and as two plain products of [T, D]
(`dense_flat`, without). The faster of the two is what all ratios are over. `products` are the dense layer's matrix
products alone, on operands that are there already: the *measured peak* is their FLOPs over their median. A ratio is
*void* where the faster dense layer does not reach a share of that peak: the machine was disturbed, or the dense layer
is no good baseline.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from matplotlib.figure import Figure

from mot_jax.benchmark.report import Column, number
from mot_jax.benchmark.timing import Program, Times, bandwidth, in_turns
from mot_jax.config import FeedForwardConfig, InitConfig, kernel_runs_on
from mot_jax.cost.layers import FLOORS, MIXTURE, Shape, layer_parts
from mot_jax.errors import UserError, nearest
from mot_jax.nn.feed_forward import KINDS
from mot_jax.runs.metrics import png

DIRECTIONS = ("forward", "forward_backward")
BASELINES = ("dense", "dense_flat")
Row = dict[str, Any]


def needed_share() -> float:
    """Of the measured peak, that the dense layer must reach for a ratio to count."""
    return 0.85 if jax.default_backend() == "cpu" else 0.75


def kinds_of(shapes: Sequence[Shape], wanted: Sequence[str] | None) -> list[str]:
    """The kinds and ways to time, those that are `wanted`, or all; on a CPU, the kinds.

    Raises UserError for one that there is not, and for a kernel where no TPU is.
    """
    ways, device = shapes[0].ways(), jax.devices()[0]
    here = [name for name, config in ways.items() if kernel_runs_on(config, device)]
    for kind in wanted or ():
        if kind not in ways:
            raise UserError(f"--kinds = {kind}: no such kind{nearest(kind, list(ways))}")
        if kind not in here:
            raise UserError(
                f"--kinds = {kind}: its kernel is for later TPUs; try --topology v5p:2x2x1, or --kinds {MIXTURE}"
            )
    unless_told = list(shapes[0].kinds()) if device.platform == "cpu" else here
    return list(dict.fromkeys(["dense", *(wanted or unless_told)]))


def bench_layers(
    shapes: Sequence[Shape],
    kinds: Sequence[str] | None,
    dtype: str,
    rounds: int,
    progress: Callable[[str], None],
    param_dtype: str = "float32",
    profile: str | None = None,
    directions: Sequence[str] = DIRECTIONS,
    may_go_on: Callable[[], bool] = lambda: True,
) -> tuple[list[Row], float]:
    """A row for each shape, direction and kind; the memory's bytes/s. Raises UserError for an unknown kind.

    Besides kinds there are ways to compute one (`Shape.ways`); a kernel that does not do a shape is left out.

    profile: a directory for a trace of the timed rounds, which the tracing slows down. may_go_on: asked before each
    shape and direction.

    Rows: shape, direction, kind; dtype, param_dtype; median_s; spread; ratio_to_dense, and void, whether it does not
    count; dense_share, of the measured peak, that the dense layer reached; flops, useful ones; flops_per_second,
    peak_share of the measured peak, and peak itself; bytes, the fewest (`counts`), and bound_s, these over the measured
    bandwidth; floor_s, the larger of that and of FLOPs over the peak, of each pass; temporaries, program_bytes, copies,
    compile_s (`timing.Program`).
    """
    names, rate = kinds_of(shapes, kinds), bandwidth()
    rows: list[Row] = []
    for shape in shapes:
        for direction in directions:
            if not may_go_on():
                progress(f"{shape.name}, {direction}: no time is left")
                return rows, rate
            progress(f"{shape.name}, {direction}: compiling {len(names) + 2} programs")
            programs = _programs(shape, names, dtype, param_dtype, direction, progress)
            progress(f"{shape.name}, {direction}: {rounds} rounds")
            with jax.profiler.trace(profile) if profile else contextlib.nullcontext():
                times = in_turns(programs, rounds)
            rows += _rows(shape, direction, dtype, param_dtype, programs, times, rate)
            del programs
    return rows, rate


def _rows(
    shape: Shape,
    direction: str,
    dtype: str,
    param_dtype: str,
    programs: dict[str, Program],
    times: dict[str, Times],
    rate: float,
) -> list[Row]:
    dense = layer_parts(shape, "dense", dtype, param_dtype)[-1]
    peak = dense.of(direction)[0] / times["products"].median
    best = min(times[name].median for name in BASELINES)
    share = dense.of(direction)[0] / best / peak
    rows = []
    for name, program in programs.items():
        kind = name.partition(":")[0] if name in shape.ways() else "dense"
        count = layer_parts(shape, kind, dtype, param_dtype)[-1]
        flops, size = count.of(direction)
        median = times[name].median
        rows.append(
            {
                "shape": shape.name,
                "direction": direction,
                "kind": name,
                "dtype": dtype,
                "param_dtype": param_dtype,
                "median_s": median,
                "spread": times[name].spread,
                "ratio_to_dense": median / best,
                "void": share < needed_share(),
                "dense_share": share,
                "flops": flops,
                "flops_per_second": flops / median,
                "peak_share": flops / median / peak,
                "peak": peak,
                "bytes": size,
                "bound_s": size / rate,
                "floor_s": count.floor(peak, rate, direction),
                "temporaries": program.temporaries,
                "program_bytes": program.bytes,
                "copies": program.copies,
                "compile_s": program.seconds_to_compile,
            }
        )
    return rows


# --- what is timed ----------------------------------------------------------------------------------------------------


def _programs(
    shape: Shape,
    kinds: Sequence[str],
    dtype: str,
    param_dtype: str,
    direction: str,
    progress: Callable[[str], None],
) -> dict[str, Program]:
    x, dy = (
        jax.random.normal(jax.random.key(seed), (shape.rows, shape.length, shape.d_model), dtype) for seed in (0, 1)
    )
    programs = {"products": Program(*_products(shape, dtype, direction))}
    shared: dict[str, Any] = {}  # the parameters of a kind, which all ways to compute it have
    for name in (*kinds, "dense_flat"):
        try:
            if name == "dense_flat":
                run, params = _flat(shape, dtype, param_dtype)
            else:
                kind = name.partition(":")[0]
                run, params = layer(shape, name, dtype, param_dtype, shared.get(kind))
                shared[kind] = params
            programs[name] = Program(run, params, x) if direction == "forward" else Program(both(run), params, x, dy)
        except (UserError, jax.errors.JaxRuntimeError) as error:  # a kernel, or memory
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            progress(f"{shape.name}, {name}: {str(error).splitlines()[0]}")
    return programs


def layer(
    shape: Shape, way: str, dtype: str, param_dtype: str = "float32", params: nnx.State | None = None
) -> tuple[Callable[[nnx.State, jax.Array], jax.Array], nnx.State]:
    """(parameters, x [B, S, D]) -> update [B, S, D] of a layer; `params`, or else freshly drawn ones."""

    def draw() -> nnx.Module:
        return make(shape, shape.ways()[way], dtype=dtype, param_dtype=param_dtype)

    run, drawn = applied(draw() if params is None else nnx.eval_shape(draw))
    return run, drawn if params is None else params


def make(shape: Shape, config: FeedForwardConfig, **options: Any) -> nnx.Module:
    """A layer with what the kinds share in `options`, freshly drawn."""
    init = InitConfig(distribution="normal", scale=1.0, cut=None)
    return KINDS[type(config)](shape.d_model, shape.d_ff, config, init=init, rngs=nnx.Rngs(params=0), **options)


def applied(made: nnx.Module) -> tuple[Callable[[Any, jax.Array], jax.Array], nnx.State]:
    """(parameters, x [B, S, D]) -> update [B, S, D] of a layer, and its parameters."""
    graph, params = nnx.split(made)
    return lambda params, x: nnx.merge(graph, params)(x).y, params


def both(run: Callable[[Any, jax.Array], jax.Array]) -> Callable[[Any, jax.Array, jax.Array], Any]:
    """(parameters, x, dy) -> y, gradients of the parameters, dx. y too: the next layer needs it."""

    def both(params: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, pull = jax.vjp(run, params, x)
        return y, *pull(dy)

    return both


def _flat(shape: Shape, dtype: str, param_dtype: str) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    keys = jax.random.split(jax.random.key(2))
    sizes = [(shape.d_model, shape.d_ff), (shape.d_ff, shape.d_model)]
    kernels = [jax.random.normal(k, s, param_dtype) / s[0] ** 0.5 for k, s in zip(keys, sizes, strict=True)]

    def run(kernels: list[jax.Array], x: jax.Array) -> jax.Array:
        first, second = (kernel.astype(dtype) for kernel in kernels)
        return (jax.nn.relu(x.reshape(-1, shape.d_model) @ first) @ second).reshape(x.shape)

    return run, kernels


def _products(shape: Shape, dtype: str, direction: str) -> tuple[Any, ...]:
    """The dense layer's products, none of which waits for another, and their operands."""
    t, d, f = shape.tokens, shape.d_model, shape.d_ff
    keys = jax.random.split(jax.random.key(3), 6)
    sizes = [(t, d), (t, f), (d, f), (f, d), (t, d), (t, f)]
    x, h, w_in, w_out, dy, dh = (jax.random.normal(k, s, dtype) for k, s in zip(keys, sizes, strict=True))

    def forward(x, h, w_in, w_out):
        return x @ w_in, h @ w_out

    def both(x, h, w_in, w_out, dy, dh):
        return *forward(x, h, w_in, w_out), dy @ w_out.T, h.T @ dy, dh @ w_in.T, x.T @ dh

    return (forward, x, h, w_in, w_out) if direction == "forward" else (both, x, h, w_in, w_out, dy, dh)


# --- what is told -----------------------------------------------------------------------------------------------------


def _ratio(row: Row) -> str:
    return f"{row['ratio_to_dense']:.2f}" + (" void" if row["void"] else "")


COLUMNS: list[Column] = [
    ("shape", lambda row: row["shape"]),
    ("direction", lambda row: row["direction"].replace("_", " + ")),
    ("kind", lambda row: row["kind"]),
    ("ms", partial(number, "median_s", 1e3, ".3f")),
    ("spread", partial(number, "spread", 1, ".0%")),
    ("over dense", _ratio),
    ("GFLOP/s", partial(number, "flops_per_second", 1e-9, ",.1f")),
    ("of peak", partial(number, "peak_share", 1, ".0%")),
    ("ms for bytes", partial(number, "bound_s", 1e3, ".3f")),
    ("ms floor", partial(number, "floor_s", 1e3, ".3f")),
    ("MB temporaries", partial(number, "temporaries", 1e-6, ",.1f")),
    ("MB moved", partial(number, "program_bytes", 1e-6, ",.0f")),
    ("copies", partial(number, "copies", 1, "d")),
    ("s to compile", partial(number, "compile_s", 1, ".1f")),
]


def plot(rows: Sequence[Row]) -> bytes:
    """A PNG: the ratio to dense of each kind at each shape, a panel for each direction; void ones are hatched."""
    kinds = [k for k in dict.fromkeys(row["kind"] for row in rows) if k not in (*BASELINES, "products")]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    figure = Figure(figsize=(4.5 * len(directions), 4), layout="constrained")
    panels = figure.subplots(1, len(directions), squeeze=False, sharey=True)[0]
    width = 0.8 / max(len(kinds), 1)
    for axes, direction in zip(panels, directions, strict=True):
        for place, kind in enumerate(kinds):
            found = [row for row in rows if (row["kind"], row["direction"]) == (kind, direction)]
            places = [shapes.index(row["shape"]) + (place - (len(kinds) - 1) / 2) * width for row in found]
            heights = [row["ratio_to_dense"] for row in found]
            bars = axes.bar(places, heights, width, label=kind.replace("_", " "), color=f"C{place}")
            for bar, row in zip(bars, found, strict=True):
                bar.set_hatch("//" if row["void"] else "")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(shapes)), shapes, rotation=20)
        axes.set_title(direction.replace("_", " + "))
    panels[0].set_ylabel("time over the dense layer's")
    if kinds:
        panels[0].legend()
    return png(figure)


def _milliseconds(name: str, row: dict[str, Any]) -> str:
    return f"{1e3 * row['floors'][name]:,.3f}"


COUNT_COLUMNS: list[Column] = [
    ("shape", lambda row: row["shape"]),
    ("kind", lambda row: row["kind"]),
    ("part", lambda row: row["part"]),
    ("GFLOP forward", lambda row: f"{row['flops'][0] / 1e9:,.1f}"),
    ("backward", lambda row: f"{row['flops'][1] / 1e9:,.1f}"),
    ("MB forward", lambda row: f"{(row['bytes'][0] + row['saved']) / 1e6:,.1f}"),
    ("backward", lambda row: f"{row['bytes'][1] / 1e6:,.1f}"),
    *((f"ms {name}", partial(_milliseconds, name)) for name in FLOORS),
]
