"""`mot bench`: what things cost on this machine."""

from __future__ import annotations

import functools
import sys

from mot_jax.cli.options import Parser, parse, positive, write_json


def bench(arguments: list[str]) -> None:
    """time things on this machine: mot bench decoding CONFIG [--batch 1,8,32] [--rounds 20] [--json FILE]"""
    parser = Parser(prog="mot bench", allow_abbrev=False)
    parser.add_argument("what", choices=["decoding"])
    options = parser.parse_args(arguments[:1])
    {"decoding": _decoding}[options.what](arguments[1:])


def _decoding(arguments: list[str]) -> None:
    usage = "mot bench decoding CONFIG [options] [--model.d-model N ...]"
    parser = Parser(prog="mot bench decoding", usage=usage, allow_abbrev=False)
    parser.add_argument("--batch", default="1,8,32", metavar="N,...", help="texts at one time (1,8,32)")
    parser.add_argument("--rounds", default="20", metavar="N", help="in which all take turns (20)")
    parser.add_argument("--json", metavar="FILE")
    options, config = parse(parser.prog, arguments, None, parser)
    batches = [positive("--batch", number) for number in options.batch.split(",")]
    from mot_jax.benchmark.decoding import COLUMNS, bench_decoding
    from mot_jax.benchmark.report import markdown
    from mot_jax.benchmark.timing import machine

    progress = functools.partial(print, file=sys.stderr, flush=True)
    rows, rate = bench_decoding(config, batches, positive("--rounds", options.rounds, least=3), progress)
    about = machine() | {"memory bandwidth": f"{rate / 1e9:.1f} GB/s"}
    print("\n".join(markdown(about, rows, COLUMNS)))
    if options.json:
        write_json(options.json, {"config": options.config, "machine": about, "rows": rows})
