"""Commands about a run: before it, itself, after it."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from typing import Annotated

import tyro

from mot_jax.cli.options import PROCESS, positive, process, write_json
from mot_jax.cli.options import parse as parse_config
from mot_jax.cli.parsing import DirectoryOrNone, File, NumberOrNone, Workdir, parse
from mot_jax.config import default_workdir
from mot_jax.errors import UserError, error_words
from mot_jax.modes import MODES, lacking, mode_of, regrouped, trained_mode
from mot_jax.runtime import distributed
from mot_jax.runtime.paths import user_path

DOES_NOT_FIT = 1


def train(arguments: list[str]) -> None:
    """train, or go on with, a model: mot train [CONFIG] [--workdir DIR] [--training.steps N ...]"""
    options, config = parse_config("mot train", arguments, "configs/demo.py", ["--workdir", *PROCESS])
    distributed.connect(process(options, config), config.mesh)
    # Only here: a mistake on the command line should not wait for these imports.
    from mot_jax import training
    from mot_jax.inference.sample import SampleHook

    training.train(config, options.workdir or default_workdir(options.config), [SampleHook()])


def describe(arguments: list[str]) -> None:
    """parameters, FLOPs and memory of a config: mot describe CONFIG [--json FILE] [--model.d-model N ...]"""
    options, config = parse_config("mot describe", arguments, None, ["--json"])
    from mot_jax.cost.describe import describe

    description = describe(config)
    for line in description.lines():
        print(line)
    if options.json:
        write_json(options.json, description.to_dict())


def plan(arguments: list[str]) -> None:
    """memory, collectives and modelled time on a machine you need not have: mot plan CONFIG --topology v5p:8x8x8"""
    options, config = parse_config("mot plan", arguments, None, ["--topology", "--slices", "--json"])
    from mot_jax.cost.hardware import KNOWN, parse_topology

    if options.topology is None:
        raise UserError(f"--topology is missing; known: {KNOWN}")
    slices = positive("--slices", options.slices or "1")
    if parse_topology(options.topology, slices).hardware:
        os.environ["JAX_PLATFORMS"] = "cpu"  # the chips are not here
    from mot_jax.planning.plan import plan_training

    result = plan_training(config, options.topology, slices, functools.partial(print, flush=True))
    for line in result.lines():
        print(line)
    if options.json:
        write_json(options.json, {"config": options.config, **result.to_dict()})
    if not result.fits:
        sys.exit(DOES_NOT_FIT)


def evaluate(arguments: list[str]) -> None:
    """score a model on a split: mot evaluate WORKDIR [--split S] [--mode companions|...|all] [--group-size G]"""
    from mot_jax.runs.restore import load_run_config

    own = ["--split", "--mode", "--group-size", "--windows", "--json", *PROCESS]
    options, config = parse_config("mot evaluate", arguments, None, own, load_run_config)
    if options.group_size is not None:
        config = regrouped(config, positive("--group-size", options.group_size))
    limit = None if options.windows is None else positive("--windows", options.windows)
    mode, split = options.mode or trained_mode(config), options.split or config.data.validation_split
    if mode != "all":
        mode_of(mode, also=["all"]).change(config)  # or say why not
    distributed.connect(process(options, config), config.mesh, trains=False)
    from mot_jax.modes.companions import load_companions
    from mot_jax.runs import scores
    from mot_jax.training import evaluation

    faults = {}
    if mode == "all":
        companions = load_companions(options.config)
        faults = {name: fault for name in MODES if (fault := lacking(name, config, companions))}
    modes = [name for name in MODES if name not in faults] if mode == "all" else [mode]
    found = evaluation.evaluate_run(options.config, config, split, limit, modes)
    if not distributed.is_first():
        return
    scores.show(config, found)
    for name, fault in faults.items():
        print(f"{name} is left out: {fault}")
    if options.json:
        about = found[0] if len(found) == 1 else {"split": split, "modes": found}
        write_json(options.json, {"workdir": options.config, **about})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvesOptions:
    """Draw the loss curves of runs into one picture."""

    workdirs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="WORKDIR")]]
    """Directories of runs, one or more."""
    output: File = "curves.png"
    """File for the picture, a PNG."""


def curves(arguments: list[str]) -> None:
    """Draw the loss curves of runs into one picture."""
    options = parse("mot curves", CurvesOptions, arguments)
    from mot_jax.runs import metrics

    workdirs = [user_path("WORKDIR", path) for path in options.workdirs]
    runs = {path.name: metrics.read_rows(path) for path in workdirs}
    for path, rows in zip(options.workdirs, runs.values(), strict=True):
        if not rows:
            raise UserError(f"WORKDIR = {path}: holds no rows of metrics; try the --workdir of a training run")
    try:
        user_path("--output", options.output).write_bytes(metrics.plot_curves(runs))
    except OSError as error:
        raise UserError(
            f"--output = {options.output}: cannot be written ({error.strerror or error_words(error)}); try curves.png"
        ) from None
    print(options.output)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Draw pictures of a trained model's mixing weights."""

    workdir: Workdir
    """Directory of a run."""
    output: DirectoryOrNone = None
    """Directory for the pictures. None: `WORKDIR/inspect`."""
    group: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Index of the group of sequences in the validation split."""
    position: NumberOrNone = None
    """Position in the sequences. None: the middle."""


def inspect(arguments: list[str]) -> None:
    """Draw pictures of a trained model's mixing weights."""
    options = parse("mot inspect", InspectOptions, arguments)
    from mot_jax.analysis.inspect import inspect

    for line in inspect(options.workdir, options.output, options.group, options.position):
        print(line)
