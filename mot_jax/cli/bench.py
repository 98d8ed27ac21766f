"""`mot bench`: measure costs on this machine."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mot_jax.cli.options import JsonOptions, write_json
from mot_jax.cli.parsing import (
    AtLeast,
    ConfigFile,
    Directory,
    DirectoryOrNone,
    Flag,
    PictureFileOrNone,
    Positive,
    PositiveOrNone,
    dispatch,
    parse,
    parse_with_config,
)
from mot_jax.config import check, default_workdir, load_config, name_of_variant
from mot_jax.errors import UserError, error_words
from mot_jax.runtime import compilation, distributed
from mot_jax.runtime.paths import user_path

Names = Annotated[str | None, tyro.conf.arg(metavar="NAME,...")]
_PARTS = "numerics,attention,mesh,collectives,step,layers,decoding"  # of `mot bench accelerator`
RoundsOrNone = Annotated[int | None, AtLeast(3), tyro.conf.arg(metavar="N")]


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersOptions(JsonOptions):
    """Time one layer of each kind in comparison with the dense one, count its work, or compile it for a target."""

    shapes: Names = None
    """Names of shapes in `cost/layers.py`. None: `cpu_e32,cpu_e128` on a CPU, the paper's elsewhere."""
    kinds: Names = None
    """Kinds to compare with dense. None: all trainable ones; on accelerators also other implementations."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Data type of the activations. None: float32 on a CPU, otherwise bfloat16."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the parameters."""
    rounds: RoundsOrNone = None
    """Number of rounds, in each of which all programs run. None: 20."""
    routing: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """Workdir of a finished run, whose widths, activations and controller are used, or `random`. It must be given where
    layers are timed."""
    block: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Block of the run, whose layer is timed. None: the middle one."""
    peers: Flag = False
    """Also time MaxText's and tokamax's layers and `jax.lax.ragged_dot`; all experts are gated."""
    counts: Flag = False
    """Print FLOPs, least bytes and lower bounds; nothing is run."""
    topology: Annotated[str | None, tyro.conf.arg(metavar="TOPOLOGY")] = None
    """Target device, as `v5p:2x2x1` or `h100:1`: compile for it and count bytes; nothing is timed."""
    products: Literal["both", "triton", "cublas"] | None = None
    """Matrix products of a program for a target GPU: Triton fusions with default tiles, calls of cuBLAS, or both.
    None: both."""
    plot: PictureFileOrNone = None
    """File for a picture of the ratios to dense, a PNG."""
    profile: DirectoryOrNone = None
    """Directory for a trace for XProf, which slows the rounds down."""


def _layers(arguments: list[str]) -> None:
    """Time one layer of each kind in comparison with the dense one."""
    options = parse("mot bench layers", LayersOptions, arguments)
    _check_routing(options)
    if options.counts:
        rule = "has no part in --counts, which runs and compiles nothing"
        _refuse(options, rule, "topology", "products", "kinds", "rounds", "plot", "profile", "routing")
    elif options.topology:
        _refuse(options, _COMPILES, "kinds", "rounds", "plot", "profile", "routing", "block")
    else:
        _refuse(options, _NEEDS_TOPOLOGY, "products")
        if options.routing is None:
            rule = "must be given, since times of layers with experts depend on it"
            raise UserError(f"--routing: {rule}; try --routing random, or a finished run")
    rounds = options.rounds or 20
    from mot_jax.cost.layers import SHAPES, count_rows, paper_shapes, shape_of

    shapes = [shape_of(name) for name in options.shapes.split(",")] if options.shapes else None
    if options.counts:
        from mot_jax.benchmark.layers import COUNT_COLUMNS

        dtype = options.dtype or "bfloat16"
        rows = count_rows(shapes or [s for s in SHAPES.values() if s.name != "tiny"], dtype, options.param_dtype)
        about: dict[str, str] = {"dtype": dtype, "parameters in": options.param_dtype}
        _report(options.json, about, rows, COUNT_COLUMNS, dtype=dtype, param_dtype=options.param_dtype)
        return
    if options.topology:
        from mot_jax.benchmark import ahead_of_time
        from mot_jax.runs.checkpoint import versions

        dtype = options.dtype or "bfloat16"
        shapes = shapes or paper_shapes(on_cpu=False)
        rows = ahead_of_time.bytes_of_layers(
            shapes, options.topology, dtype, options.param_dtype, _progress, _products(options)
        )
        about = {"topology": options.topology, "dtype": str(dtype), "parameters in": options.param_dtype} | versions()
        _report(options.json, about, rows, ahead_of_time.COLUMNS, machine=about)
        return
    import jax

    from mot_jax.benchmark import layers
    from mot_jax.benchmark.timing import machine

    on_cpu = jax.default_backend() == "cpu"
    dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    kinds = options.kinds.split(",") if options.kinds else None
    trained, routing = None, "random routing"
    if options.routing and options.routing != "random":
        from mot_jax.benchmark.trained_layer import read_trained_layer

        trained = read_trained_layer(options.routing, options.block)
        routing = f"routing of {options.routing}, block {trained.block}, step {trained.step}"
        shapes = [trained.shape]
        for kind, reason in trained.left_out.items():
            _progress(f"{kind}: left out, {reason}")
    shapes = shapes or paper_shapes(on_cpu)
    if options.peers:
        from mot_jax.benchmark.peers import comparable

        shapes = [comparable(shape) for shape in shapes]
    rows, bandwidth = layers.bench_layers(
        shapes,
        kinds,
        dtype,
        rounds,
        _progress,
        options.param_dtype,
        options.profile,
        trained=trained,
        peers=options.peers,
    )
    title = f"{routing}, gated experts" if options.peers else routing
    about = machine() | {"memory bandwidth": f"{bandwidth / 1e9:.1f} GB/s", "dtype": dtype, "rounds": str(rounds)}
    print(f"Layers on {title}")
    _report(options.json, about, rows, layers.COLUMNS, title=title, machine=about, bandwidth=bandwidth)
    if options.plot:
        _write("--plot", options.plot, layers.plot(rows, title))
    if not all(row.get("ok", True) for row in rows):
        sys.exit(1)


def _check_routing(options: LayersOptions) -> None:
    """Raise UserError for options of the routing that contradict others."""
    run = None if options.routing == "random" else options.routing
    if options.peers and (options.counts or options.topology):
        raise UserError("--peers: has no part in --counts and --topology, which time nothing; try without --peers")
    if options.block is not None and run is None:
        raise UserError(f"--block = {options.block}: needs the run that has this block; try with --routing RUN")
    if run is not None and options.shapes:
        raise UserError(f"--shapes = {options.shapes}: the sizes are those of --routing = {run}; try without --shapes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions(JsonOptions):
    """Time the training step of a config and of another one, or compile both for a target device."""

    config: ConfigFile
    """Config file: `FILE.py`, or `FILE.py:VARIANT`."""
    against: Annotated[str | None, tyro.conf.arg(metavar="CONFIG")] = None
    """Config to compare with, as it is in its file. None: the dense model of the same widths."""
    rounds: RoundsOrNone = None
    """Number of rounds in which both models take turns. None: 20."""
    topology: Annotated[str | None, tyro.conf.arg(metavar="TOPOLOGY")] = None
    """Target device, as `v5p:2x2x1` or `h100:1`: compile for it and count memory; nothing is timed."""
    products: Literal["both", "triton", "cublas"] | None = None
    """Matrix products of a program for a target GPU: Triton fusions with default tiles, calls of cuBLAS, or both.
    None: both."""
    profile: DirectoryOrNone = None
    """Directory for a trace for XProf, which slows the rounds down."""


def _step(arguments: list[str]) -> None:
    """Time the training step of a config in comparison with another one."""
    options, config = parse_with_config("mot bench step", StepOptions, arguments)
    if options.topology:
        _refuse(options, _COMPILES, "rounds", "profile")
    else:
        _refuse(options, _NEEDS_TOPOLOGY, "products")
    rounds = options.rounds or 20
    from mot_jax.benchmark.step import COLUMNS, bench_step
    from mot_jax.benchmark.timing import machine
    from mot_jax.benchmark.workloads import dense_of_equal_width

    name = Path(default_workdir(options.config)).absolute().name
    if options.against:
        baseline_name, baseline = Path(default_workdir(options.against)).absolute().name, load_config(options.against)
        check(baseline)
    else:
        baseline_name, baseline = f"{name}, dense", dense_of_equal_width(config)
    if baseline_name == name:
        baseline_name = options.against or name
    configs = {name: config, baseline_name: baseline}
    if options.topology:
        from mot_jax.benchmark import ahead_of_time
        from mot_jax.runs.checkpoint import versions

        rows = ahead_of_time.memory_of_steps(configs, options.topology, _progress, _products(options))
        about = {"topology": options.topology, "chips": "1"} | versions()
        _report(options.json, about, rows, ahead_of_time.STEP_COLUMNS, config=options.config, machine=about)
        for line in dict.fromkeys(f"{row['config']}: {note}" for row in rows for note in row["notes"]):
            print(line)
        return
    rows, rates = bench_step(configs, rounds, _progress, options.profile)
    about = machine() | {
        "matrix products": f"{rates['peak'] / 1e9:,.1f} GFLOP/s",
        "memory bandwidth": f"{rates['bandwidth'] / 1e9:.1f} GB/s",
        "rounds": str(rounds),
    }
    _report(options.json, about, rows, COLUMNS, config=options.config, machine=about, **rates)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputOptions(JsonOptions):
    """Time the input pipeline of a config."""

    config: ConfigFile
    """Config file: `FILE.py`, or `FILE.py:VARIANT`."""
    batches: PositiveOrNone = None
    """Number of batches to time. None: two blocks of the order."""


def _input(arguments: list[str]) -> None:
    """Time the input pipeline of a config."""
    options, config = parse_with_config("mot bench input", InputOptions, arguments)
    from mot_jax.benchmark.input import COLUMNS, bench_input
    from mot_jax.benchmark.timing import machine

    about = machine()
    row = bench_input(config, _progress, options.batches)
    _report(options.json, about, [row], COLUMNS, config=options.config, machine=about)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingOptions(JsonOptions):
    """Time the generation of texts by a config's model with random parameters."""

    config: ConfigFile
    """Config file: `FILE.py`, or `FILE.py:VARIANT`."""
    batch: Annotated[str, tyro.conf.arg(metavar="N,...")] = "1,8,32"
    """Numbers of texts that are generated at one time."""
    rounds: Annotated[int, AtLeast(3), tyro.conf.arg(metavar="N")] = 20
    """Number of rounds in which all take turns."""


def _decoding(arguments: list[str]) -> None:
    """Time the generation of texts in each inference mode."""
    options, config = parse_with_config("mot bench decoding", DecodingOptions, arguments)
    batches = _batch_sizes(options.batch)
    from mot_jax.benchmark.decoding import COLUMNS, bench_decoding
    from mot_jax.benchmark.timing import machine

    rows, rate = bench_decoding(config, batches, options.rounds, _progress)
    about = machine() | {"memory bandwidth": f"{rate / 1e9:.1f} GB/s"}
    _report(options.json, about, rows, COLUMNS, config=options.config, machine=about)


def _batch_sizes(text: str) -> list[int]:
    sizes = text.split(",")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"--batch = {text!r}: must be whole numbers, at least 1, with commas between them; try 1,8,32")
    return [int(size) for size in sizes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceleratorOptions:
    """Compare the numbers of an attached accelerator with those of the CPU, then time layers, steps and decoding."""

    out: Directory = "benchmarks/results"
    """Directory for the results as JSON and Markdown."""
    parts: Annotated[str | None, tyro.conf.arg(metavar="PART,...")] = None
    """Parts to run, in this order. None: `numerics,attention,mesh,collectives,step,layers,decoding`. Further ones are
    `peers`, `step_base_32e` and `step_d2048`."""
    minutes: Positive = 7
    """Minutes after which no part starts and a training run stops."""
    small: Flag = False
    """Use tiny sizes, to test that all parts run."""
    small_headline: Flag = False
    """Instead of the parts, train v1's two models for 4,000 steps each; another call resumes."""


def _accelerator(arguments: list[str]) -> None:
    """Run all benchmarks on one attached accelerator, after a comparison of its numbers with the CPU's."""
    options = parse("mot bench accelerator", AcceleratorOptions, arguments)
    if options.small_headline:
        _refuse(options, "has no part in --small-headline, which trains two models only", "parts")
    _refuse_several_tasks()
    # The float64 reference needs a CPU device in addition; JAX is not initialized yet.
    platforms = os.environ.get("JAX_PLATFORMS")
    import jax

    if platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")
    from mot_jax.benchmark.accelerator import bench_accelerator

    parts = ["headline"] if options.small_headline else (options.parts or _PARTS).split(",")
    if bench_accelerator(options.out, parts, options.small, 60.0 * options.minutes, _progress):
        sys.exit(1)


def _refuse_several_tasks() -> None:
    """Raise UserError in a task of a job with several, each of which would use all devices of its host by itself."""
    command = "mot bench accelerator"
    command = (
        f"srun --nodes=1 --ntasks=1 {command}" if "SLURM_JOB_ID" in os.environ else f"{command} in a single process"
    )
    try:
        process = distributed.detect(60)
    except UserError as error:
        raise UserError(f"{str(error).partition('; try ')[0]}; try {command}") from None
    if process is not None and process.total > 1:
        raise UserError(f"cluster: {process}, each of which would use all devices by itself; try {command}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train all runs of a study, or those that are left, and write a report about the comparison."""

    study: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="STUDY")]]
    """Study file, as `configs/studies/smoke.py`, which defines `get_study()`, or `FILE.py:VARIANT`."""
    workdir: Directory
    """Directory of the study; each run has its own below `runs`."""
    run: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Name of a run, to train only this one, as in an array job. None: all, one after the other."""
    dry_run: Flag = False
    """Print the runs with their FLOPs and estimated hours; nothing is trained."""
    hours: Annotated[float | None, tyro.conf.arg(metavar="N")] = None
    """Allowed hours of the runs that are left. None: the budget of the study."""
    times: Flag = False
    """Time the training steps once more: several sittings, at different hours, give the ratios of times an interval."""


def _train(arguments: list[str]) -> None:
    """Train the runs of a study, and report the comparison."""
    options = parse("mot bench train", TrainOptions, arguments)
    if options.run is not None and (options.dry_run or options.times or options.hours is not None):
        other = "--dry-run" if options.dry_run else "--times" if options.times else "--hours"
        raise UserError(f"--run = {options.run}: has no part in {other}, which is about all runs; try without {other}")
    if options.dry_run:
        _refuse(options, "has no part in --dry-run, which trains nothing", "hours")
        if options.times:
            raise UserError("--times: has no part in --dry-run, which runs nothing; try without --times")
    compilation.enable_cache()  # most runs of an entrant differ in their seed only
    from mot_jax.benchmark.study import execute, load_study, report, results, times

    study, name = load_study(options.study), name_of_variant(options.study)
    folder = user_path("--workdir", options.workdir)
    directory = execute.Directory(study, name, folder)
    if options.dry_run:
        from mot_jax.benchmark.report import markdown

        rows, lines = execute.dry_run(directory)
        print("\n".join([*markdown({"study": study.title}, rows, execute.COLUMNS), "", *lines]))
        return
    if options.run is not None:
        print(execute.train_named(directory, options.run))
        return
    command = shlex.join(["mot", "bench", "train", options.study, "--workdir", options.workdir])
    for line in execute.train_study(directory, options.hours):
        print(line, flush=True)
        results.write(directory, command)
    if options.times or times.read_times(directory) is None:
        times.measure(directory, _progress)
    results.write(directory, command)
    for path in report.write_report(folder):
        print(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write the report of a study again, from its `results.json` alone."""

    directory: tyro.conf.Positional[Directory]
    """Directory with the `results.json` of a study."""
    output: DirectoryOrNone = None
    """Directory for the report. None: the same."""


def _report_study(arguments: list[str]) -> None:
    """Write the report of a study from its results."""
    options = parse("mot bench report", ReportOptions, arguments)
    from mot_jax.benchmark.study.report import write_report

    output = None if options.output is None else user_path("--output", options.output)
    for path in write_report(user_path("DIR", options.directory), output):
        print(path)


COMMANDS = {
    "layers": _layers,
    "step": _step,
    "input": _input,
    "decoding": _decoding,
    "accelerator": _accelerator,
    "train": _train,
    "report": _report_study,
}


def bench(arguments: list[str]) -> None:
    """Measure layers, training steps, input or decoding, or compare training runs."""
    about = "Measure costs on this machine, compile for a target device, or compare training runs."
    dispatch("mot bench", about, COMMANDS, arguments)


_COMPILES = "has no part in --topology, which compiles and runs nothing"
_NEEDS_TOPOLOGY = "has no part without --topology, since a program that runs has XLA's choice"


def _products(options: LayersOptions | StepOptions) -> Sequence[Literal["triton", "cublas"]]:
    """The values of `--products` for which a program is compiled."""
    from mot_jax.benchmark.ahead_of_time import PRODUCTS

    return PRODUCTS if options.products is None or options.products == "both" else [options.products]


def _refuse(options: object, rule: str, *names: str) -> None:
    """Raise UserError with the rule for each of these options that is given."""
    given = [(name, value) for name in names if (value := getattr(options, name)) is not None]
    if given:
        raise UserError(*(f"--{name} = {value}: {rule}; try without --{name}" for name, value in given))


def _report(json: str | None, about: dict[str, str], rows: list[dict], columns: Sequence[Any], **content: Any) -> None:
    """Print the table, and write `content` and the rows to the file `json`, unless it is None."""
    from mot_jax.benchmark.report import markdown

    print("\n".join(markdown(about, rows, columns)))
    if json:
        write_json(json, content | {"rows": rows})


def _write(name: str, path: str, content: bytes) -> None:
    try:
        user_path(name, path).write_bytes(content)
    except OSError as error:
        words = error.strerror or error_words(error)
        raise UserError(f"{name} = {path}: cannot be written ({words}); try ratios.png") from None
