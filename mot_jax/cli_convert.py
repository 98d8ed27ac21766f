"""`mot export` and `mot import`: parse, call, print."""

from __future__ import annotations

import argparse
import contextlib

from mot_jax import distributed
from mot_jax.config import check, load_config


def export(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Writes a run's model as safetensors."""
    parser.add_argument("workdir", metavar="WORKDIR")
    parser.add_argument("--output", required=True, metavar="DIR", help="made, or empty, or an export to overwrite")
    parser.add_argument("--dtype", metavar="DTYPE", help="float32 or bfloat16 (default: as they are)")
    parser.add_argument("--overwrite", action="store_true", help="an export that is there")
    for flag in ("--coordinator", "--num-processes", "--process-id"):
        parser.add_argument(flag)
    options = parser.parse_args(arguments)
    from mot_jax.training.restore import load_run_config

    config = load_run_config(options.workdir)
    named = distributed.from_flags(options.coordinator, options.num_processes, options.process_id)
    distributed.connect(named or distributed.detect(config.mesh.wait_seconds), config.mesh, trains=False)
    import jax

    from mot_jax.convert import export
    from mot_jax.sharding import make_mesh

    several = jax.process_count() > 1  # else this process's memory must hold the model, and its devices need not
    with jax.set_mesh(make_mesh(config, trains=False)) if several else contextlib.nullcontext():
        lines = export(options.workdir, options.output, options.dtype, options.overwrite)
    for line in lines:
        print(line)


def import_(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Makes an export of other tensors."""
    parser.add_argument("file", metavar="FILE", help="of tensors, .safetensors, or an index of several")
    parser.add_argument("--config", metavar="CONFIG", help="of the model; config.json beside tensors of mot export")
    parser.add_argument("--output", required=True, metavar="DIR", help="made, or empty, or an export to overwrite")
    parser.add_argument("--overwrite", action="store_true", help="an export that is there")
    options = parser.parse_args(arguments)
    config = None
    if options.config is not None:
        config = load_config(options.config)
        check(config)
    from mot_jax.convert import import_model

    for line in import_model(options.file, options.output, config, options.overwrite):
        print(line)
