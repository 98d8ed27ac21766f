"""Models in and out: `mot export`, `mot import`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from mot_jax.cli.options import ProcessOptions, process
from mot_jax.cli.parsing import Directory, File, Flag, NumberOrNone, Workdir, parse
from mot_jax.config import check, load_config
from mot_jax.runtime import distributed


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Directory of an export."""

    output: Directory
    """Directory for the export. It is created, or must be empty."""
    overwrite: Flag = False
    """Replace the export in this directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(OutputOptions, ProcessOptions):
    """Write the model of a run as safetensors."""

    workdir: Workdir
    """Directory of a run."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="DTYPE")] = None
    """Data type of the tensors, `float32` or `bfloat16`. None: that of the parameters."""
    step: NumberOrNone = None
    """Step of the checkpoint. None: the newest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions(OutputOptions):
    """Import a model of the paper's authors, or of the Hugging Face port, as an export of mot_jax."""

    file: tyro.conf.Positional[File]
    """File of the tensors, `.safetensors`, or the index of several."""
    config: Annotated[str | None, tyro.conf.arg(metavar="CONFIG")] = None
    """Config of the model. None: `config.json` next to the tensors, for an export of mot_jax."""


def export(arguments: list[str]) -> None:
    """Write a model as safetensors."""
    options = parse("mot export", ExportOptions, arguments)
    from mot_jax.runs.restore import load_run_config

    config = load_run_config(options.workdir)
    distributed.connect(process(options, config), config.mesh, trains=False)
    import jax

    from mot_jax.interop.export import export_model
    from mot_jax.nn.sharding import host_device, make_mesh

    several = jax.process_count() > 1  # else this machine's memory must hold the model, and its accelerators need not
    with jax.set_mesh(make_mesh(config, trains=False)) if several else jax.default_device(host_device()):
        lines = export_model(options.workdir, options.output, options.dtype, options.overwrite, step=options.step)
    for line in lines:
        print(line)


def import_(arguments: list[str]) -> None:
    """Import a model of the paper's authors, or of the Hugging Face port."""
    options = parse("mot import", ImportOptions, arguments)
    config = None
    if options.config is not None:
        config = load_config(options.config)
        check(config)
    from mot_jax.interop.importing import import_model

    for line in import_model(options.file, options.output, config, options.overwrite):
        print(line)
