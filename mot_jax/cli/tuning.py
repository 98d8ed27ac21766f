"""The command that makes a trained model another kind of model."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from mot_jax.cli.options import ProcessOptions, process
from mot_jax.cli.parsing import (
    DirectoryOrNone,
    Flag,
    Positive,
    PositiveOrNone,
    Workdir,
    chunks,
    flags_of,
    override,
    parse_with_config_flags,
)
from mot_jax.config import check
from mot_jax.runtime import distributed


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransitionOptions(ProcessOptions):
    """Tune a trained Mixture-of-Tokens model to route tokens to experts instead of mixing them."""

    workdir: Workdir
    """Directory of a Mixture-of-Tokens run."""
    to: Annotated[str, tyro.conf.arg(metavar="KIND")]
    """Kind of feed-forward layer to tune the model to: `token_choice`."""
    steps: Positive
    """Number of steps of the tuning; a tenth of those of the run suffices."""
    output: DirectoryOrNone = None
    """Directory of the tuning run. None: `WORKDIR-KIND`."""
    anneal: PositiveOrNone = None
    """Number of further steps of mixing before the tuning, in which the temperature decreases to 0. None: none."""
    windows: PositiveOrNone = None
    """Number of validation windows on which each inference mode is scored. None: all."""
    top_k: PositiveOrNone = None
    """Number of experts per token, as `--model.feed-forward.top-k`."""
    capacity_factor: Annotated[float | None, tyro.conf.arg(metavar="C")] = None
    """Capacity of an expert in multiples of its even share, as `--model.feed-forward.capacity-factor`."""
    router: Literal["controller", "random"] | None = None
    """Initial router, as `--training.transition-router`."""
    take_over: Flag = False
    """End a run that is in progress in the directory, in place of waiting for it."""


def transition(arguments: list[str]) -> None:
    """Tune a trained model to route tokens instead of mixing them."""
    prog = "mot transition"
    options, flags = parse_with_config_flags(prog, TransitionOptions, arguments)
    fields = {
        "--model.feed-forward.top-k": options.top_k,
        "--model.feed-forward.capacity-factor": options.capacity_factor,
        "--training.transition-router": options.router,
    }
    flags += [text for flag, value in fields.items() if value is not None for text in (flag, str(value))]
    from mot_jax.runs.restore import load_run_config
    from mot_jax.training import transition as tuning

    workdir = options.workdir.rstrip("/")
    output = (options.output or f"{workdir}-{options.to}").rstrip("/")
    source, runs = load_run_config(workdir), []
    if options.anneal is not None:
        source = tuning.annealing_config(source, workdir, options.anneal)
        shared = [part for chunk in chunks(flags) if chunk[0].startswith(("--mesh.", "--logging.")) for part in chunk]
        source, workdir = override(prog, source, shared), f"{output}-annealed"
        runs.append((source, workdir))
    config = tuning.tuning_config(source, workdir, options.to, options.steps)
    runs.append((override(prog, config, flags, flags_of(TransitionOptions)), output))
    for config, _ in runs:
        check(config)
    distributed.connect(process(options, config), config.mesh)
    from mot_jax import training
    from mot_jax.inference.sample import SampleHook

    for config, place in runs:
        training.train(config, place, [SampleHook()], options.take_over)
    for line in tuning.report(*runs[-1], options.workdir, options.windows):
        print(line)
