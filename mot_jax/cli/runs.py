"""Commands about a run: before it, itself, after it."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from typing import Annotated, Literal

import tyro
from etils import epath

from mot_jax.cli.options import JsonOptions, ProcessOptions, process, write_json
from mot_jax.cli.parsing import (
    ConfigFile,
    DirectoryOrNone,
    Flag,
    NumberOrNone,
    PictureFile,
    Positive,
    PositiveOrNone,
    Workdir,
    is_target,
    load_run,
    parse,
    parse_with_config,
)
from mot_jax.config import default_workdir
from mot_jax.errors import ReportedError, UserError, error_words
from mot_jax.modes import mode_of, regrouped, trained_mode
from mot_jax.runtime import distributed, strict_json
from mot_jax.runtime.paths import user_path

DOES_NOT_FIT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(ProcessOptions):
    """Train a model, or resume the run in its directory."""

    config: ConfigFile = "configs/demo.py"
    """Config file: `FILE.py`, or `FILE.py:VARIANT`; or the directory of a run, to resume it."""
    workdir: DirectoryOrNone = None
    """Directory of the run. None: `runs/FILE`, or `runs/FILE_VARIANT` for a variant other than the default.
    If CONFIG is the directory of a run: that directory."""
    take_over: Flag = False
    """End a run that is in progress in the directory, in place of waiting for it."""


def train(arguments: list[str]) -> None:
    """Train a model, or resume a run."""
    options, config = parse_with_config("mot train", TrainOptions, arguments)
    distributed.connect(process(options, config), config.mesh)
    # Imported here, so that an error on the command line is reported without the time of these imports.
    from mot_jax import training
    from mot_jax.inference.sample import SampleHook

    workdir = default_workdir(options.config) if options.workdir is None else user_path("workdir", options.workdir)
    training.train(config, workdir, [SampleHook()], options.take_over)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescribeOptions(JsonOptions):
    """Print the parameters, FLOPs and memory of a config."""

    config: ConfigFile
    """Config file: `FILE.py`, or `FILE.py:VARIANT`; or the directory of a run."""
    matched: Annotated[Literal["layer_flops", "expert_flops", "parameters"] | None, tyro.conf.arg(metavar="[BY]")] = (
        None
    )
    """Print all feed-forward kinds at equal cost instead: `layer_flops` (also without a value), `expert_flops`, or
    `parameters` of the model. None: describe the config."""


def describe(arguments: list[str]) -> None:
    """Print the parameters, FLOPs and memory of a config, or all feed-forward kinds at its cost."""
    arguments = _with_value("--matched", "layer_flops", arguments)
    options, config = parse_with_config("mot describe", DescribeOptions, arguments)
    if options.matched:
        from mot_jax.cost import matched

        rows = matched.rows(config, options.matched)
        matched.show(config, options.matched, rows)
        if options.json:
            write_json(options.json, {"config": options.config, "by": options.matched, "kinds": rows})
        return
    from mot_jax.cost.describe import describe

    description = describe(config)
    for line in description.lines():
        print(line)
    if options.json:
        write_json(options.json, description.to_dict())


def _with_value(flag: str, value: str, arguments: list[str]) -> list[str]:
    """Return the arguments with `flag=value` for each `flag` that no value follows."""
    following = [*arguments[1:], "--"] if arguments else []
    return [
        f"{flag}={value}" if argument == flag and (after.startswith("-") or is_target(after)) else argument
        for argument, after in zip(arguments, following, strict=True)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(JsonOptions):
    """Compile the training step ahead of time for a target machine: memory, collectives and modelled time.

    The exit code is 1 if the training step does not fit into the memory of the target's devices.
    """

    config: ConfigFile
    """Config file: `FILE.py`, or `FILE.py:VARIANT`; or the directory of a run."""
    topology: Annotated[str | None, tyro.conf.arg(metavar="TOPOLOGY")] = None
    """Target machine, for example `v5p:8x8x8` or `h100:8`. Required; without it, the known ones are listed."""
    slices: Positive = 1
    """Number of slices of this topology."""
    products: Literal["triton", "cublas"] = "triton"
    """Matrix products of a GPU's program: Triton fusions with default tiles, or calls of cuBLAS."""


def plan(arguments: list[str]) -> None:
    """Compile the training step ahead of time: memory, collectives, modelled time."""
    options, config = parse_with_config("mot plan", PlanOptions, arguments)
    from mot_jax.cost.hardware import KNOWN, parse_topology

    if options.topology is None:
        raise UserError(f"--topology is missing; known: {KNOWN}")
    if parse_topology(options.topology, options.slices).hardware:
        os.environ["JAX_PLATFORMS"] = "cpu"  # the target devices are not attached
    from mot_jax.planning.plan import plan_training

    progress = functools.partial(print, flush=True)
    result = plan_training(config, options.topology, options.slices, progress, products=options.products)
    for line in result.lines():
        print(line)
    if options.json:
        write_json(options.json, {"config": options.config, **result.to_dict()})
    if not result.fits:
        sys.exit(DOES_NOT_FIT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(JsonOptions, ProcessOptions):
    """Score a trained model on a split, in one inference mode or in all."""

    workdir: Workdir
    """Directory of a run."""
    split: Annotated[str | None, tyro.conf.arg(metavar="SPLIT")] = None
    """Split of the corpus. None: the validation split."""
    mode: Annotated[str | None, tyro.conf.arg(metavar="MODE")] = None
    """Inference mode, or `all`. None: the mode of training."""
    group_size: PositiveOrNone = None
    """Number of sequences in a group. None: as in training."""
    windows: PositiveOrNone = None
    """Number of windows to score. None: all of the split."""
    step: NumberOrNone = None
    """Step of the checkpoint. None: the newest."""


def evaluate(arguments: list[str]) -> None:
    """Score a trained model on a split."""
    options, config = parse_with_config("mot evaluate", EvaluateOptions, arguments, load_run)
    if options.group_size is not None:
        config = regrouped(config, options.group_size)
    mode, split = options.mode or trained_mode(config), options.split or config.data.validation_split
    if mode != "all":
        mode_of(mode, also=["all"]).change(config)  # raises UserError if the config has no such mode
    distributed.connect(process(options, config), config.mesh, trains=False)
    from mot_jax.runs import scores
    from mot_jax.training import evaluation

    of_run = options.workdir, config, split, options.windows
    if mode == "all":
        results, reasons = evaluation.evaluate_all_modes(*of_run, options.step)
    else:
        results, reasons = evaluation.evaluate_run(*of_run, [mode], options.step), {}
    if not distributed.is_first():
        return
    scores.show(config, results)
    for name, reason in reasons.items():
        print(f"{name} is left out: {reason}")
    if options.json:
        about = results[0] if len(results) == 1 else {"split": split, "modes": results}
        write_json(options.json, {"workdir": options.workdir, **about})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Print the state of runs: in progress, finished, killed, failed; with step, loss, speed and time left."""

    workdirs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="WORKDIR")]]
    """Directories of runs, or directories that contain some, one or more."""
    json: Flag = False
    """Print a list as JSON in place of a table."""


def status(arguments: list[str]) -> None:
    """Print the state of runs, in progress or not."""
    options = parse("mot status", StatusOptions, arguments)
    from mot_jax.runs import status

    reports, errors = [], []
    for directory in options.workdirs:
        try:
            reports += status.reports("WORKDIR", user_path("WORKDIR", directory))
        except ReportedError as error:  # the others are reported nevertheless
            errors.append(error)
    if options.json:
        print(strict_json.dumps(reports, indent=1))
    elif reports:
        status.show(reports)
    if errors:
        raise type(errors[0])(*(fault for error in errors for fault in error.faults))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvesOptions:
    """Draw the loss curves of runs into one picture."""

    workdirs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="WORKDIR")]]
    """Directories of runs, one or more."""
    output: PictureFile = "curves.png"
    """File for the picture, a PNG."""


def curves(arguments: list[str]) -> None:
    """Draw the loss curves of runs into one picture."""
    options = parse("mot curves", CurvesOptions, arguments)
    from mot_jax.runs import metrics

    workdirs = list(dict.fromkeys(user_path("WORKDIR", path) for path in options.workdirs))
    names, runs = [path.name for path in workdirs], {}
    for path, name in zip(workdirs, names, strict=True):
        rows = runs[name if names.count(name) == 1 else str(path)] = metrics.read_rows(path)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions(JsonOptions):
    """Read all files of all checkpoints of a run, and compare them with the checksums that were saved with them.

    The exit code is 2 if a checkpoint is damaged. Nothing is written without `--adopt`.
    """

    workdir: Workdir
    """Directory of a run."""
    adopt: Flag = False
    """First write the checksums of each checkpoint that has none (no manifest), if all its arrays can be read into the
    memory of this machine. Earlier damage to their values is not found."""


def verify(arguments: list[str]) -> None:
    """Compare all checkpoints of a run with their checksums."""
    options = parse("mot verify", VerifyOptions, arguments)
    from mot_jax.runs import manifest

    folder = user_path("WORKDIR", options.workdir) / "checkpoints"
    if options.adopt:
        _adopt(folder)
    problems = {step: manifest.damage(folder / str(step)) for step in manifest.committed_steps(folder)}
    present, complete = manifest.committed_steps(folder), manifest.steps_of(folder)
    problems = {step: problem for step, problem in problems.items() if step in present}  # without those removed since
    for step, problem in problems.items():
        if problem is None:
            print(f"checkpoint {step}: intact{manifest.read(folder / str(step)).remark()}")
        elif step not in complete:
            print(f"checkpoint {step}: does not count: {problem}")
    if problems.keys().isdisjoint(complete):
        raise UserError(f"WORKDIR = {options.workdir}: has no complete checkpoint; try the --workdir of a training run")
    if options.json:
        write_json(options.json, {"workdir": options.workdir, "checkpoints": problems})
    damaged = {step: problem for step, problem in problems.items() if problem is not None and step in complete}
    if damaged:
        raise UserError(*manifest.left_out_lines(folder, damaged))


def _adopt(folder: epath.Path) -> None:
    """Write the manifests of checkpoints without one. One that cannot be read is reported, and not changed."""
    from mot_jax.runs import manifest, owner
    from mot_jax.runs.checkpoint import adopt

    steps = set(manifest.committed_steps(folder)) - set(manifest.steps_of(folder))
    if not steps:
        return
    owner.acquire(folder.parent)
    try:
        for step in sorted(steps):
            try:
                adopt(folder / str(step))
            except UserError as error:
                print(f"checkpoint {step}: is not adopted: {error}")
    finally:
        owner.release(folder.parent)
