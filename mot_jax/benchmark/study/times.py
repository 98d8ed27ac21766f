"""The times of a study: training steps of the trained models in turns, on a batch of their own text.

Routing depends on the state and on the tokens, and with it the time of kinds whose experts process a varying number of
tokens. Nothing else should run on the machine; the CPU time of other processes during the timing is recorded.

Programs take their turns in several sittings, each with models that are loaded and compiled again, in another order.
The ratio of two times differs more between sittings than within one, as the place of the arrays in memory and the load
of the host differ, so that an interval of the rounds of one sitting would be too narrow.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from mot_jax.benchmark.step import TrainingProgram
from mot_jax.benchmark.study import plan as plans
from mot_jax.benchmark.study.execute import Directory, commit, read_record, workdir_of
from mot_jax.benchmark.timing import Timings, cpu_times, in_turns, machine, share_of_others
from mot_jax.config import Config
from mot_jax.data.objectives import Batch, Objective
from mot_jax.data.pipeline import train_batches
from mot_jax.data.text import open_text
from mot_jax.nn.sharding import local_sequences, make_mesh
from mot_jax.runs.manifest import steps_of
from mot_jax.runs.restore import load_run_config, load_training
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import replace_file

FILE = "times.json"
_SITTINGS, _ROUNDS = 8, 25


def timed_runs(directory: Directory) -> dict[str, str]:
    """By entrant, the run whose model is timed: of the first seed that has finished and has a checkpoint."""
    runs = {}
    for entrant in directory.study.entrants:
        for name in _finished(directory, entrant):
            if steps_of(workdir_of(directory.folder, name) / "checkpoints"):
                runs[entrant] = name
                break
    return runs


def _finished(directory: Directory, entrant: str) -> list[str]:
    """The finished runs of an entrant's seeds."""
    outcomes = {name: directory.outcome(name) for name in plans.seed_runs(directory.study, entrant).values()}
    return [name for name, outcome in outcomes.items() if outcome is not None and outcome.state == "finished"]


def _identities(directory: Directory, runs: Mapping[str, str]) -> dict[str, Any]:
    """Config and text with which runs were trained, by entrant."""
    records = {entrant: read_record(workdir_of(directory.folder, name)) for entrant, name in runs.items()}
    return {
        entrant: [record.get(key) for key in ("config_hash", "fingerprints")] for entrant, record in records.items()
    }


def read_times(directory: Directory) -> dict[str, Any] | None:
    """The times that have been measured of the runs in the directory.

    None if there are none, if they have no sittings, as those of earlier versions, if a run has been trained again with
    another config or text, or if an entrant can be timed and has not been.
    """
    path = directory.folder / FILE
    if not path.exists():
        return None
    times = strict_json.load(path, dict, f"try rm {path}, and it is measured again")
    runs = times.get("runs", {})
    same = times.get("identities") == _identities(directory, runs)
    return times if same and "sittings" in times and timed_runs(directory).keys() <= runs.keys() else None


def measure(directory: Directory, say: Callable[[str], None]) -> None:
    """Time the step of every entrant's trained model in turns, and write `times.json`.

    Entrants without a checkpoint of a finished run are left out, and nothing is written if there is none.
    """
    runs, plan = timed_runs(directory), directory.plan()
    for entrant in directory.study.entrants:
        for name in _finished(directory, entrant)[:1] if entrant not in runs else ():
            folder = workdir_of(directory.folder, name)
            say(f"times: {entrant} is not timed: no checkpoint; try mv {folder} {folder}.old, and it is trained again")
    if not runs:
        return
    seconds: dict[str, list[tuple[float, ...]]] = {entrant: [] for entrant in runs}
    costs: dict[str, dict[str, Any]] = {}
    before, loads, orders = cpu_times(), [os.getloadavg()[0]], random.Random(0)
    for sitting in range(_SITTINGS):
        title = f"times, sitting {sitting + 1} of {_SITTINGS}"
        say(f"{title}: compiling {len(runs)} training steps")
        programs = {}
        for entrant in orders.sample(list(runs), len(runs)):
            (config,) = plan.configs(plan.run(runs[entrant]))
            programs[entrant] = _program(workdir_of(directory.folder, runs[entrant]), config)
        for entrant, timing in in_turns({entrant: p.step for entrant, p in programs.items()}, _ROUNDS, title).items():
            seconds[entrant].append(timing.seconds)
        for entrant, program in programs.items():
            flops = _compiler_flops(program.compiled)
            costs[entrant] = {"compiler_flops": flops, "temporaries": program.temporaries}
        del programs, program  # before the next ones are loaded
    others = share_of_others(before, cpu_times())
    loads.append(os.getloadavg()[0])  # with the study's own, as the one before
    content: dict[str, Any] = {"runs": runs, "identities": _identities(directory, runs)}
    content |= {"machine": machine(), "commit": commit(), "sittings": _SITTINGS, "rounds": _ROUNDS}
    content["rows"] = {entrant: _row(seconds[entrant]) | costs[entrant] for entrant in runs}
    content |= {"share_of_others": others, "load_averages": loads}
    replace_file(directory.folder / FILE, (strict_json.dumps(content, indent=1) + "\n").encode())


def _row(sittings: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The times of a program: of all sittings, and the seconds of each."""
    timings = Timings(tuple(itertools.chain(*sittings)))
    seconds = [[float(f"{value:.5g}") for value in sitting] for sitting in sittings]
    return {"median_s": timings.median, "spread": timings.spread, "seconds": seconds}


def _program(workdir: epath.Path, config: Config) -> TrainingProgram:
    """The step of a run's model, with the study's choice of kernels and of arrays saved for the backward pass."""
    mesh = make_mesh(load_run_config(workdir))
    with jax.set_mesh(mesh):
        stored, state, next_example = load_training(workdir, mesh)
    batch = _batch(stored, mesh, next_example)
    return TrainingProgram(dataclasses.replace(stored, model=config.model), state, batch)


def _batch(config: Config, mesh: jax.sharding.Mesh, next_example: int) -> Batch:
    """The next training batch of a run."""
    t, text = config.training, open_text(config)
    rows = local_sequences(mesh, t.batch_size, t.gradient_accumulation_steps)
    objective = Objective.of(config, text.tokenizer)
    batches = train_batches(text.train, text.order, objective, t.batch_size, rows, next_example)
    try:
        return next(batches).sequences
    finally:
        batches.close()


def _compiler_flops(compiled: jax.stages.Compiled) -> float | None:
    """The FLOPs of a program by XLA's cost model, which counts the body of a scan once; None if it has none."""
    analysis = compiled.cost_analysis()
    return analysis.get("flops") if isinstance(analysis, dict) else None
