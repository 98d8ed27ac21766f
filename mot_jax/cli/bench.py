"""`mot bench`: measure costs on this machine."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from mot_jax.cli.options import JsonOptions, Parser, positive, write_json
from mot_jax.cli.parsing import AtLeast, ConfigFile, DirectoryOrNone, PositiveOrNone, parse_with_config
from mot_jax.config import check, default_workdir, load_config
from mot_jax.errors import UserError, error_words
from mot_jax.runtime.paths import user_path

RoundsOrNone = Annotated[int | None, AtLeast(3), tyro.conf.arg(metavar="N")]


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def bench(arguments: list[str]) -> None:
    """Measure layers, steps, input or decoding: mot bench layers | step | input | decoding | accelerator."""
    parser = Parser(prog="mot bench", allow_abbrev=False)
    commands = {
        "layers": _layers,
        "step": _step,
        "input": _input,
        "decoding": _decoding,
        "accelerator": _accelerator,
    }
    parser.add_argument("what", choices=commands)
    options = parser.parse_args(arguments[:1])
    commands[options.what](arguments[1:])


def _layers(arguments: list[str]) -> None:
    parser = Parser(prog="mot bench layers", allow_abbrev=False)
    shapes = "default: cpu_e32,cpu_e128 on a CPU, the paper's elsewhere"
    parser.add_argument("--shapes", metavar="NAME,...", help=f"names of shapes in cost/layers.py ({shapes})")
    parser.add_argument(
        "--kinds",
        metavar="KIND,...",
        help="kinds to compare with dense (default: all trainable ones; on accelerators also other implementations)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="data type of activations (default: float32 on a CPU, else bfloat16)",
    )
    parser.add_argument(
        "--param-dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="data type of the parameters (float32)",
    )
    parser.add_argument("--rounds", metavar="N", help="number of rounds, in each of which all programs run (20)")
    parser.add_argument(
        "--counts", action="store_true", help="print FLOPs, least bytes and lower bounds; nothing is run"
    )
    parser.add_argument("--topology", metavar="v5p:2x2x1", help="compile for a target device and count bytes")
    parser.add_argument("--json", metavar="FILE", help="file for the results as JSON")
    parser.add_argument("--plot", metavar="FILE", help="file for a PNG of the ratios to dense")
    parser.add_argument("--profile", metavar="DIR", help="directory for a trace for XProf, which slows the rounds down")
    options = parser.parse_args(arguments)
    rounds = positive("--rounds", options.rounds or "20", least=3)
    from mot_jax.cost.layers import SHAPES, count_rows, paper_shapes, shape_of

    chosen = [shape_of(name) for name in options.shapes.split(",")] if options.shapes else None
    if options.counts:
        from mot_jax.benchmark.layers import COUNT_COLUMNS

        dtype = options.dtype or "bfloat16"
        rows = count_rows(chosen or [s for s in SHAPES.values() if s.name != "tiny"], dtype, options.param_dtype)
        about = {"dtype": dtype, "parameters in": options.param_dtype}
        _tell(options.json, about, rows, COUNT_COLUMNS, dtype=dtype, param_dtype=options.param_dtype)
        return
    if options.topology:
        _refuse_timing(options, "kinds", "rounds", "plot", "profile")
        from mot_jax.benchmark import ahead_of_time
        from mot_jax.runs.checkpoint import versions

        dtype = options.dtype or "bfloat16"
        wanted = chosen or paper_shapes(on_cpu=False)
        rows = ahead_of_time.bytes_of_layers(wanted, options.topology, dtype, options.param_dtype, _progress)
        about = {"topology": options.topology, "dtype": dtype, "parameters in": options.param_dtype} | versions()
        _tell(options.json, about, rows, ahead_of_time.COLUMNS, machine=about)
        return
    import jax

    from mot_jax.benchmark import layers
    from mot_jax.benchmark.timing import machine

    on_cpu = jax.default_backend() == "cpu"
    dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    kinds = options.kinds.split(",") if options.kinds else None
    found, rate = layers.bench_layers(
        chosen or paper_shapes(on_cpu), kinds, dtype, rounds, _progress, options.param_dtype, options.profile
    )
    about = machine() | {"memory bandwidth": f"{rate / 1e9:.1f} GB/s", "dtype": dtype, "rounds": str(rounds)}
    _tell(options.json, about, found, layers.COLUMNS, machine=about, bandwidth=rate)
    if options.plot:
        _write("--plot", options.plot, layers.plot(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions(JsonOptions):
    """Time the training step of a config and of another one, or compile both for a target device."""

    config: ConfigFile
    """Config file: `FILE.py`, or `FILE.py:VARIANT`."""
    against: Annotated[str | None, tyro.conf.arg(metavar="CONFIG")] = None
    """Config to compare with. None: the dense model of the same widths."""
    rounds: RoundsOrNone = None
    """Number of rounds in which both models take turns. None: 20."""
    topology: Annotated[str | None, tyro.conf.arg(metavar="TOPOLOGY")] = None
    """Target device, as `v5p:2x2x1`: compile for it and count memory; nothing is timed."""
    profile: DirectoryOrNone = None
    """Directory for a trace for XProf, which slows the rounds down."""


def _step(arguments: list[str]) -> None:
    options, config = parse_with_config("mot bench step", StepOptions, arguments)
    if options.topology:
        _refuse_timing(options, "rounds", "profile")
    rounds = options.rounds or 20
    from mot_jax.benchmark.step import COLUMNS, bench_step
    from mot_jax.benchmark.timing import machine
    from mot_jax.benchmark.workloads import dense_of_equal_width

    name = Path(default_workdir(options.config)).name
    if options.against:
        other, twin = Path(default_workdir(options.against)).name, load_config(options.against)
        check(twin)
    else:
        other, twin = f"{name}, dense", dense_of_equal_width(config)
    if other == name:
        other = options.against or name
    if options.topology:
        from mot_jax.benchmark import ahead_of_time
        from mot_jax.runs.checkpoint import versions

        rows = ahead_of_time.memory_of_steps({name: config, other: twin}, options.topology, _progress)
        about = {"topology": options.topology, "chips": "1"} | versions()
        _tell(options.json, about, rows, ahead_of_time.STEP_COLUMNS, config=options.config, machine=about)
        return
    rows, reached = bench_step({name: config, other: twin}, rounds, _progress, options.profile)
    about = machine() | {
        "matrix products": f"{reached['peak'] / 1e9:,.1f} GFLOP/s",
        "memory bandwidth": f"{reached['bandwidth'] / 1e9:.1f} GB/s",
        "rounds": str(rounds),
    }
    _tell(options.json, about, rows, COLUMNS, config=options.config, machine=about, **reached)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputOptions(JsonOptions):
    """Time the input pipeline of a config."""

    config: ConfigFile
    """Config file: `FILE.py`, or `FILE.py:VARIANT`."""
    batches: PositiveOrNone = None
    """Number of batches to time. None: two blocks of the order."""


def _input(arguments: list[str]) -> None:
    options, config = parse_with_config("mot bench input", InputOptions, arguments)
    from mot_jax.benchmark.input import COLUMNS, bench_input
    from mot_jax.benchmark.timing import machine

    about = machine()
    row = bench_input(config, _progress, options.batches)
    _tell(options.json, about, [row], COLUMNS, config=options.config, machine=about)


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
    options, config = parse_with_config("mot bench decoding", DecodingOptions, arguments)
    batches = [positive("--batch", number) for number in options.batch.split(",")]
    from mot_jax.benchmark.decoding import COLUMNS, bench_decoding
    from mot_jax.benchmark.timing import machine

    rows, rate = bench_decoding(config, batches, options.rounds, _progress)
    about = machine() | {"memory bandwidth": f"{rate / 1e9:.1f} GB/s"}
    _tell(options.json, about, rows, COLUMNS, config=options.config, machine=about)


def _accelerator(arguments: list[str]) -> None:
    parser = Parser(prog="mot bench accelerator", allow_abbrev=False)
    parts = "numerics,layers,step,decoding"
    parser.add_argument(
        "--out", default="benchmarks/results", metavar="DIR", help="directory for results as JSON and Markdown"
    )
    parser.add_argument(
        "--parts", default=parts, metavar="PART,...", help=f"in their order ({parts}; step_base_32e, step_d2048)"
    )
    parser.add_argument(
        "--minutes", default="7", metavar="N", help="minutes after which no part starts and a run stops (7)"
    )
    parser.add_argument("--small", action="store_true", help="use tiny sizes, to test that all parts run")
    headline = "instead: train v1's models, vocabulary 8,192, 4,000 steps each; a second call resumes"
    parser.add_argument("--small-headline", action="store_true", help=headline)
    options = parser.parse_args(arguments)
    minutes = positive("--minutes", options.minutes)
    # The float64 reference needs a CPU device in addition; JAX is not initialized yet.
    named = os.environ.get("JAX_PLATFORMS")
    import jax

    if named and "cpu" not in named.split(","):
        jax.config.update("jax_platforms", f"{named},cpu")
    from mot_jax.benchmark.accelerator import bench_accelerator

    chosen = ["headline"] if options.small_headline else options.parts.split(",")
    failed = bench_accelerator(options.out, chosen, options.small, 60.0 * minutes, _progress)
    if failed:
        sys.exit(1)


def _refuse_timing(options: object, *names: str) -> None:
    """Raises UserError with every one of these options that is given, since nothing is run under --topology."""
    given = [(name, value) for name in names if (value := getattr(options, name)) is not None]
    rule = "has no part in --topology, which compiles and runs nothing"
    if given:
        raise UserError(*(f"--{name} = {value}: {rule}; try without --{name}" for name, value in given))


def _tell(json: str | None, about: dict[str, str], rows: list[dict], columns: Sequence[Any], **content: Any) -> None:
    """Prints the table; writes `content` and the rows into the file `json`, if there is one to be."""
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
