"""Models in and out: `mot export`, `mot import`."""

from __future__ import annotations

import contextlib

from mot_jax.cli.options import PROCESS, Parser, process
from mot_jax.config import check, load_config
from mot_jax.runtime import distributed


def export(arguments: list[str]) -> None:
    """a model as safetensors: mot export WORKDIR --output DIR [--dtype bfloat16] [--overwrite]"""
    parser = Parser("mot export", allow_abbrev=False)
    parser.add_argument("workdir", metavar="WORKDIR")
    parser.add_argument("--dtype", metavar="DTYPE", help="float32 or bfloat16 (default: as they are)")
    _add_output(parser)
    for flag in PROCESS:
        parser.add_argument(flag)
    options = parser.parse_args(arguments)
    from mot_jax.runs.restore import load_run_config

    config = load_run_config(options.workdir)
    distributed.connect(process(options, config), config.mesh, trains=False)
    import jax

    from mot_jax.interop.export import export_model
    from mot_jax.nn.sharding import make_mesh

    several = jax.process_count() > 1  # else this process's memory must hold the model, and its devices need not
    with jax.set_mesh(make_mesh(config, trains=False)) if several else contextlib.nullcontext():
        lines = export_model(options.workdir, options.output, options.dtype, options.overwrite)
    for line in lines:
        print(line)


def import_(arguments: list[str]) -> None:
    """the authors' model, or the Hugging Face port's: mot import FILE.safetensors --config CONFIG --output DIR"""
    parser = Parser("mot import", allow_abbrev=False)
    parser.add_argument("file", metavar="FILE", help="of tensors, .safetensors, or an index of several")
    parser.add_argument("--config", metavar="CONFIG", help="of the model; config.json beside tensors of mot export")
    _add_output(parser)
    options = parser.parse_args(arguments)
    config = None
    if options.config is not None:
        config = load_config(options.config)
        check(config)
    from mot_jax.interop.importing import import_model

    for line in import_model(options.file, options.output, config, options.overwrite):
        print(line)


def _add_output(parser: Parser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="made, or empty, or an export to overwrite")
    parser.add_argument("--overwrite", action="store_true", help="an export that is there")
