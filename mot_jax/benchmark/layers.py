"""`mot bench layers`: one feed-forward layer of each kind, forward and forward + backward, compared with dense.

The dense layer is timed twice: as the project's layer (`dense`, with biases) and as two plain products of [T, D]
(`dense_flat`, without biases). The faster of the two is the baseline of all ratios. `products` are the matrix products
of the dense layer only, on precomputed operands: the *measured peak* is their FLOPs over their median time. A ratio is
*void* if the faster dense layer does not reach a minimum share of that peak, since the machine was disturbed or the
dense layer is not a good baseline. It is also void if the dense layer exceeds the peak by more than noise: the layer
executes the same products and more, so the products were disturbed, and with them every share of the peak.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from matplotlib.figure import Figure

from mot_jax.benchmark.calibration import Model, modeled
from mot_jax.benchmark.peers import PEERS, Peer, PeerError
from mot_jax.benchmark.report import Column, number
from mot_jax.benchmark.timing import Buffers, Program, Timings, bandwidth, in_turns
from mot_jax.benchmark.trained_layer import TrainedLayer, Variables
from mot_jax.benchmark.workloads import LATE
from mot_jax.config import FeedForwardConfig, InitConfig, ModelConfig, kernel_runs_on
from mot_jax.cost.layers import DROPLESS, FLOORS, MIXTURE, TOKEN_IDS, Shape, layer_cost, layer_parts
from mot_jax.errors import UserError, nearest
from mot_jax.nn.feed_forward import KINDS, FeedForwardContext, FeedForwardOutput, RouterState, update_router_state
from mot_jax.nn.feed_forward.interface import activate
from mot_jax.runs.metrics import png

DIRECTIONS = ("forward", "forward_backward")
BASELINES = ("dense", "dense_flat")
PRODUCTS = ("products", "expert_products")  # no layers: the dense layer's matrix products, and as many FLOPs of experts
Row = dict[str, Any]
ROUTING = ("dropped", "load_max", "experts_per_token")  # metrics of layers that are printed


def valid_peak_shares() -> tuple[float, float]:
    """The least and the largest share of the measured peak that the dense layer may reach for a ratio to be valid.

    More than 1 is impossible except for noise: medians of equal programs in one run differ by some percent.
    """
    return 0.85 if jax.default_backend() == "cpu" else 0.75, 1.1


def select_implementations(shapes: Sequence[Shape], kinds: Sequence[str] | None, peers: bool = False) -> list[str]:
    """The names of `Shape.implementations` to time: `dense` and `kinds`.

    By default all that run on the first device; on a CPU one for each kind, and with `peers`, of which some have no
    capacity, also token choice without one. Raises UserError for an unknown name, and for a kernel that the device does
    not support.
    """
    implementations, device = shapes[0].implementations(), jax.devices()[0]
    supported = [name for name, config in implementations.items() if kernel_runs_on(config, device)]
    for kind in kinds or ():
        if kind not in implementations:
            raise UserError(f"--kinds = {kind}: no such kind{nearest(kind, list(implementations))}")
        if kind not in supported:
            raise UserError(
                f"--kinds = {kind}: needs a TPU v5e, v5p or later; try --topology v5p:2x2x1, or --kinds {MIXTURE}"
            )
    default = supported
    if device.platform == "cpu":
        default = [name for name in supported if name in shapes[0].kinds() or (peers and name == DROPLESS)]
    return list(dict.fromkeys(["dense", *(kinds or default)]))


def bench_layers(
    shapes: Sequence[Shape],
    kinds: Sequence[str] | None,
    dtype: str,
    rounds: int,
    progress: Callable[[str], None],
    param_dtype: str = "float32",
    profile: str | None = None,
    directions: Sequence[str] = DIRECTIONS,
    has_time: Callable[[], bool] = lambda: True,
    trained: TrainedLayer | None = None,
    peers: bool = False,
    model: Model | None = None,
) -> tuple[list[Row], float]:
    """Time one layer of each kind at each shape.

    Args:
        shapes: Sizes of the layers.
        kinds: Names of `Shape.implementations`; None for the default. A kernel skips the shapes that it does not
            support.
        dtype: Dtype of the activations.
        rounds: Number of timings of each program.
        progress: Receives lines about the progress.
        param_dtype: Dtype of the parameters.
        profile: Directory for a trace of the timed rounds; tracing slows them down.
        directions: A subset of `DIRECTIONS`.
        has_time: Called before each shape and direction; the benchmark ends when it returns False.
        trained: The layer of a run, of whose shape `shapes` consists: its activations and its router. None: random.
        peers: Also time the layers of other packages (`benchmark.peers`).
        model: If given, rows have `modeled_s`, the modeled seconds by class of kernel (`calibration.modeled`).

    Returns:
        Rows, and the measured bandwidth of the memory in bytes/s. A row has shape, direction, kind; dtype, param_dtype;
        median_s; spread; ratio_to_dense, and void, whether the ratio is invalid; dense_share, the share of the measured
        peak that the dense layer reached; flops, without recomputation; flops_per_second, peak_share of the measured
        peak, and peak; executed_flops, with empty slots, without recomputation; bytes, the minimum (`cost.layers`), and
        bound_s, these over the measured bandwidth; floor_s, for each pass the larger of that and of FLOPs over the
        peak; temporaries, program_bytes, copies, not_read, compile_s (`timing.Program`); those of the metrics `ROUTING`
        that the layer has. The row of a program that does not run has shape, direction, kind, and the reason; ok is
        False unless a package is missing or memory does not suffice.

    Raises:
        UserError: For an unknown kind.
    """
    names, rate = select_implementations(shapes, kinds, peers), bandwidth()
    rows: list[Row] = []
    for shape in shapes:
        for direction in directions:
            if not has_time():
                progress(f"{shape.name}, {direction}: skipped, no time left")
                return rows, rate
            progress(f"{shape.name}, {direction}: compiling {len(names) + 3 + peers * len(PEERS)} programs")
            # On a CPU each program has its own, which are in its caches as far as they fit.
            buffers: Buffers | None = None if jax.default_backend() == "cpu" else {}
            programs, absent, routing = _compile_programs(
                shape, names, dtype, param_dtype, direction, progress, trained, PEERS if peers else {}, buffers
            )
            timings = _time_programs(shape, direction, programs, absent, buffers, rounds, progress, profile)
            timed = _timing_rows(shape, direction, dtype, param_dtype, programs, timings, rate)
            if model:
                timed = [row | modeled(model, programs[row["kind"]].compiled, dtype) for row in timed]
            rows += [row | routing.get(row["kind"], {}) for row in timed]
            rows += [{"shape": shape.name, "direction": direction, "kind": n} | why for n, why in absent.items()]
            del programs
    return rows, rate


def _time_programs(
    shape: Shape,
    direction: str,
    programs: dict[str, Program],
    absent: dict[str, Row],
    buffers: Buffers | None,
    rounds: int,
    progress: Callable[[str], None],
    profile: str | None,
) -> dict[str, Timings]:
    """Time the programs. Those that fail, or have no baseline, are moved from `programs` to `absent`."""

    def failed(name: str, error: Exception) -> None:
        progress(f"{shape.name}, {name}: {_first_line(error)}")
        absent[name] = _reason(error)
        del programs[name]
        if buffers:
            buffers.clear()  # they may be results of the execution that has failed

    with jax.profiler.trace(profile) if profile else contextlib.nullcontext():
        timings = in_turns(programs, rounds, f"{shape.name}, {direction}: timing", failed)
    if "products" not in programs or not any(name in programs for name in BASELINES):
        absent |= {name: {"reason": "no dense layer to compare with"} for name in programs}
        programs.clear()
    return timings


def _timing_rows(
    shape: Shape,
    direction: str,
    dtype: str,
    param_dtype: str,
    programs: dict[str, Program],
    timings: dict[str, Timings],
    rate: float,
) -> list[Row]:
    if not programs:
        return []
    dense = layer_parts(shape, "dense", dtype, param_dtype)[-1]
    peak = dense.of(direction)[0] / timings["products"].median
    baseline = min(timings[name].median for name in BASELINES if name in programs)
    dense_share = dense.of(direction)[0] / baseline / peak
    least, largest = valid_peak_shares()
    rows = []
    for name, program in programs.items():
        config = shape.implementations().get(name, shape.kinds()["dense"])
        cost = layer_parts(shape, "token_choice" if name in PEERS else config.kind, dtype, param_dtype)[-1]
        flops, size = cost.of(direction)
        if name in PEERS:
            executed = PEERS[name].executed_flops(shape)
        else:
            executed = shape.tokens * layer_cost(shape, config).executed_flops()
        median = timings[name].median
        rows.append(
            {
                "shape": shape.name,
                "direction": direction,
                "kind": name,
                "dtype": dtype,
                "param_dtype": param_dtype,
                "median_s": median,
                "spread": timings[name].spread,
                "ratio_to_dense": median / baseline,
                "void": not least <= dense_share <= largest,
                "dense_share": dense_share,
                "flops": flops,
                "executed_flops": executed * (1 if direction == "forward" else 3),
                "flops_per_second": flops / median,
                "peak_share": flops / median / peak,
                "peak": peak,
                "bytes": size,
                "bound_s": size / rate,
                "floor_s": cost.floor(peak, rate, direction),
                "temporaries": program.temporaries,
                "program_bytes": program.bytes,
                "copies": program.copies,
                "not_read": program.not_read,
                "compile_s": program.seconds_to_compile,
            }
        )
    return rows


# --- the timed programs -----------------------------------------------------------------------------------------------


def _compile_programs(
    shape: Shape,
    kinds: Sequence[str],
    dtype: str,
    param_dtype: str,
    direction: str,
    progress: Callable[[str], None],
    trained: TrainedLayer | None,
    peers: Mapping[str, Peer],
    buffers: Buffers | None,
) -> tuple[dict[str, Program], dict[str, Row], dict[str, Row]]:
    """The programs by name, the reasons why others are missing, and the metrics `ROUTING` of the layers."""
    x, dy = (
        jax.random.normal(jax.random.key(seed), (shape.sequences, shape.length, shape.d_model), dtype)
        for seed in (0, 1)
    )
    x = x if trained is None else trained.x.astype(dtype)
    token_ids = None if trained is None else trained.token_ids
    variables_of: dict[str, Variables] = {}  # by kind; all of its implementations share them
    routing: dict[str, Row] = {}

    def create(name: str) -> Program:
        if name in PRODUCTS:
            return Program(*_matrix_products(shape, dtype, direction, name != "products"), buffers=buffers)
        if name == "dense_flat":
            forward, variables = _flat_dense(shape, dtype, param_dtype)
        else:
            kind = "token_choice" if name in peers else name.partition(":")[0]
            layer = kind if name in peers else name
            if name in peers and kind not in shape.kinds():
                raise PeerError(f"has the parameters of {kind}, which is left out")
            routed = layer_function(shape, layer, dtype, param_dtype, variables_of.get(kind), token_ids)
            forward, variables = routed.forward, routed.variables
            if name in peers:
                forward = peers[name].function(shape, dtype)
            else:
                if trained is not None:
                    variables = trained.with_router(variables)
                router, metrics = routed.after_a_step(variables, x)
                if trained is None or kind != trained.kind:
                    variables = (variables[0], router)
                routing[name] = {key: float(metrics[key]) for key in ROUTING if key in metrics}
            variables_of[kind] = variables
        if direction == "forward":
            return Program(forward, variables, x, buffers=buffers)
        return Program(forward_and_backward(forward), variables, x, dy, buffers=buffers)

    programs: dict[str, Program] = {}
    absent: dict[str, Row] = {}
    for name in (*PRODUCTS, *kinds, "dense_flat", *peers):
        try:
            programs[name] = create(name)
        except UserError as error:  # an unsupported kernel
            progress(f"{shape.name}, {name}: {_first_line(error)}")
        except Exception as error:
            if not isinstance(error, jax.errors.JaxRuntimeError) and name not in peers:
                raise
            progress(f"{shape.name}, {name}: {_first_line(error)}")
            absent[name] = _reason(error)
    return programs, absent, routing


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _reason(error: Exception) -> Row:
    """Why a program does not run, as a part of its row."""
    expected = isinstance(error, PeerError) or "RESOURCE_EXHAUSTED" in str(error)
    return {"reason": _first_line(error)} | ({} if expected else {"ok": False})


def layer_function(
    shape: Shape,
    name: str,
    dtype: str,
    param_dtype: str = "float32",
    variables: Variables | None = None,
    token_ids: jax.Array | None = None,
) -> LayerFunction:
    """A layer as functions, with `variables`, or initialized ones."""

    def create() -> nnx.Module:
        return create_layer(shape, shape.implementations()[name], dtype=dtype, param_dtype=param_dtype)

    function = as_function(create() if variables is None else nnx.eval_shape(create), token_ids)
    return function if variables is None else function._replace(variables=variables)


def create_layer(shape: Shape, config: FeedForwardConfig, **options: Any) -> nnx.Module:
    """Initialize a layer. options: further arguments that all kinds take, such as `dtype`."""
    init = InitConfig(distribution="normal", scale=1.0, cut=None)
    config = config.for_model(ModelConfig(vocab_size=shape.vocab_size, context_length=shape.length))
    options = {**_networks(shape), **options}
    return KINDS[type(config)](shape.d_model, shape.d_ff, config, init=init, rngs=nnx.Rngs(params=0), **options)


def _networks(shape: Shape) -> dict[str, Any]:
    return {"gated": shape.gated, "activation": shape.activation}


class LayerFunction(NamedTuple):
    """A layer as functions of its variables, as late in training.

    forward: (variables, x [B, S, D]) -> update [B, S, D]. variables: the parameters, and the router state.
    after_a_step: (variables, x) -> the router state that a training step on x leaves, such as thresholds that k of E
    experts reach, and the metrics of the layer with this state.
    """

    forward: Callable[[Variables, jax.Array], jax.Array]
    variables: Variables
    after_a_step: Callable[[Variables, jax.Array], tuple[Any, Mapping[str, jax.Array]]]


def as_function(layer: nnx.Module, token_ids: jax.Array | None = None) -> LayerFunction:
    """Split a layer into functions and variables.

    token_ids: int [B, S], on which hash layers depend. None: 0 to 255, again and again, which load all experts evenly.
    """
    graph, params, *others = nnx.split(layer, nnx.Not(RouterState), RouterState)
    (router,) = others

    def apply(layer: Any, x: jax.Array) -> FeedForwardOutput:
        ids = token_ids
        if ids is None:
            ids = (jnp.arange(x.shape[0] * x.shape[1], dtype=jnp.int32) % TOKEN_IDS).reshape(x.shape[:2])
        return layer(x, FeedForwardContext(token_ids=ids, step=jnp.int32(LATE), train=True))

    def forward(variables: Variables, x: jax.Array) -> jax.Array:
        return apply(nnx.merge(graph, *variables), x).y

    @jax.jit
    def after_a_step(variables: Variables, x: jax.Array) -> tuple[Any, Mapping[str, jax.Array]]:
        layer: Any = nnx.merge(graph, *variables)
        update_router_state([layer], [apply(layer, x).statistics])
        return nnx.state(layer, RouterState), apply(layer, x).metrics

    return LayerFunction(forward, (params, router), after_a_step)


def forward_and_backward(
    forward: Callable[[Variables, jax.Array], jax.Array],
) -> Callable[[Variables, jax.Array, jax.Array], Any]:
    """(variables, x, dy) -> y, gradients of the parameters, dx. y is a result because the next layer needs it."""

    def y_and_gradients(variables: Variables, x: jax.Array, dy: jax.Array) -> Any:
        params, router = variables
        y, vjp = jax.vjp(lambda params, x: forward((params, router), x), params, x)
        return y, *vjp(dy)

    return y_and_gradients


def _flat_dense(
    shape: Shape, dtype: str, param_dtype: str
) -> tuple[Callable[[Variables, jax.Array], jax.Array], Variables]:
    keys = jax.random.split(jax.random.key(2), 3)
    sizes = [(shape.d_model, shape.d_ff), (shape.d_ff, shape.d_model), (shape.d_model, shape.d_ff)][: 2 + shape.gated]
    kernels = [
        jax.random.normal(k, s, param_dtype) / s[0] ** 0.5 for k, s in zip(keys[: len(sizes)], sizes, strict=True)
    ]

    def forward(variables: Variables, x: jax.Array) -> jax.Array:
        first, second, *gate = (kernel.astype(dtype) for kernel in variables[0])
        flat = x.reshape(-1, shape.d_model)
        hidden = activate(shape.activation, flat @ first, flat @ gate[0] if gate else None)
        return (hidden @ second).reshape(x.shape)

    return forward, (kernels, None)


def _matrix_products(shape: Shape, dtype: str, direction: str, of_experts: bool) -> tuple[Any, ...]:
    """The matrix products of a layer, independent of each other, and their operands.

    Those of the dense layer, or with as many FLOPs of all experts, each with 1 / G of the tokens.
    """
    t, d, f = shape.tokens, shape.d_model, shape.d_ff
    if of_experts:
        t, f = t // shape.group_size, shape.group_size * f // shape.num_experts
    keys = jax.random.split(jax.random.key(3), 8)
    sizes = [(t, d), (t, f), (d, f), (f, d), (t, d), (t, f), (d, f), (t, f)]
    stack = (shape.num_experts,) if of_experts else ()
    arrays = [jax.random.normal(k, stack + s, dtype) for k, s in zip(keys, sizes, strict=True)]
    x, h, w_in, w_out, dy, dh, w_gate, dgate = arrays

    def forward(x, h, w_in, w_out, *gate):
        return x @ w_in, h @ w_out, *(x @ w for w in gate)

    def all_products(x, h, w_in, w_out, dy, dh, *gate):
        first = *forward(x, h, w_in, w_out, *gate[:1]), dy @ w_out.mT, h.mT @ dy, dh @ w_in.mT, x.mT @ dh
        return (*first, gate[1] @ gate[0].mT, x.mT @ gate[1]) if gate else first

    if direction == "forward":
        return forward, x, h, w_in, w_out, *([w_gate] if shape.gated else [])
    return all_products, x, h, w_in, w_out, dy, dh, *([w_gate, dgate] if shape.gated else [])


# --- reports ----------------------------------------------------------------------------------------------------------


def _ratio(row: Row) -> str:
    return (
        "-" if row.get("ratio_to_dense") is None else f"{row['ratio_to_dense']:.2f}" + (" void" if row["void"] else "")
    )


COLUMNS: list[Column] = [
    ("shape", lambda row: row["shape"]),
    ("direction", lambda row: row["direction"].replace("_", " + ")),
    ("kind", lambda row: f"{row['kind']} ({row['reason']})" if "reason" in row else row["kind"]),
    ("ms", partial(number, "median_s", 1e3, ".3f")),
    ("spread", partial(number, "spread", 1, ".0%")),
    ("ratio to dense", _ratio),
    ("GFLOP executed", partial(number, "executed_flops", 1e-9, ",.2f")),
    ("GFLOP/s", partial(number, "flops_per_second", 1e-9, ",.1f")),
    ("share of peak", partial(number, "peak_share", 1, ".0%")),
    ("ms bandwidth bound", partial(number, "bound_s", 1e3, ".3f")),
    ("ms floor", partial(number, "floor_s", 1e3, ".3f")),
    ("MB temporaries", partial(number, "temporaries", 1e-6, ",.1f")),
    ("MB read and written", partial(number, "program_bytes", 1e-6, ",.0f")),
    ("copies", partial(number, "copies", 1, "d")),
    ("dropped", partial(number, "dropped", 1, ".0%")),
    ("load of the fullest", partial(number, "load_max", 1, ".2f")),
    ("experts per token", partial(number, "experts_per_token", 1, ".2f")),
    ("s to compile", partial(number, "compile_s", 1, ".1f")),
]


def plot(rows: Sequence[Row], title: str | None = None) -> bytes:
    """A PNG of each kind's ratio to dense at each shape, with a panel for each direction; void ones are hatched."""
    rows = [row for row in rows if "reason" not in row]
    kinds = [k for k in dict.fromkeys(row["kind"] for row in rows) if k not in (*BASELINES, *PRODUCTS)]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    figure = Figure(figsize=(4.5 * len(directions), 4), layout="constrained")
    figure.suptitle(title or "")
    panels = figure.subplots(1, len(directions), squeeze=False, sharey=True)[0]
    width = 0.8 / max(len(kinds), 1)
    for axes, direction in zip(panels, directions, strict=True):
        for kind_index, kind in enumerate(kinds):
            kind_rows = [row for row in rows if (row["kind"], row["direction"]) == (kind, direction)]
            offset = (kind_index - (len(kinds) - 1) / 2) * width
            places = [shapes.index(row["shape"]) + offset for row in kind_rows]
            heights = [row["ratio_to_dense"] for row in kind_rows]
            bars = axes.bar(places, heights, width, label=kind.replace("_", " "), color=f"C{kind_index}")
            for bar, row in zip(bars, kind_rows, strict=True):
                bar.set_hatch("//" if row["void"] else "")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(shapes)), shapes, rotation=20)
        axes.set_title(direction.replace("_", " + "))
    panels[0].set_ylabel("time / time of the dense layer")
    if kinds:
        panels[0].legend()
    return png(figure)


def _floor_ms(name: str, row: dict[str, Any]) -> str:
    return f"{1e3 * row['floors'][name]:,.3f}"


COUNT_COLUMNS: list[Column] = [
    ("shape", lambda row: row["shape"]),
    ("kind", lambda row: row["kind"]),
    ("part", lambda row: row["part"]),
    ("GFLOP forward", lambda row: f"{row['flops'][0] / 1e9:,.1f}"),
    ("GFLOP backward", lambda row: f"{row['flops'][1] / 1e9:,.1f}"),
    ("MB forward", lambda row: f"{(row['bytes'][0] + row['saved']) / 1e6:,.1f}"),
    ("MB backward", lambda row: f"{row['bytes'][1] / 1e6:,.1f}"),
    *((f"ms {name}", partial(_floor_ms, name)) for name in FLOORS),
]
