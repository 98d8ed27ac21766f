"""The times of a study: training steps of the trained models in turns, on a batch of their own text.

Routing depends on the state and on the tokens, and with it the time of kinds whose experts process a varying number of
tokens. Nothing else should run on the machine; the CPU time of other processes during the timing is recorded.

A *sitting* is a number of rounds in one process. The ratio of two times differs more between processes and hours than
the rounds of one sitting suggest, so that only several sittings give an interval. Each has the models of another seed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from mot_jax.benchmark.step import TrainingProgram
from mot_jax.benchmark.study import plan as plans
from mot_jax.benchmark.study.execute import Directory, changes_of_machine, commit, now, read_record, workdir_of
from mot_jax.benchmark.timing import cpu_times, in_turns, machine, share_of_others
from mot_jax.config import Config
from mot_jax.data.objectives import Batch, Objective
from mot_jax.data.pipeline import train_batches
from mot_jax.data.text import open_text
from mot_jax.errors import UserError
from mot_jax.nn.sharding import local_sequences, make_mesh
from mot_jax.runs.manifest import steps_of
from mot_jax.runs.restore import load_run_config, load_training
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import replace_file

FILE = "times.json"
_ROUNDS = 50


def timed_runs(directory: Directory, sitting: int) -> dict[str, str]:
    """By entrant, the run that is timed: of the seeds that have finished and have a checkpoint, one after the other."""
    runs = {}
    for entrant in directory.study.entrants:
        folders = {name: workdir_of(directory.folder, name) for name in _finished(directory, entrant)}
        stored = [name for name, folder in folders.items() if steps_of(folder / "checkpoints")]
        if stored:
            runs[entrant] = stored[sitting % len(stored)]
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


def _stored(directory: Directory) -> list[dict[str, Any]]:
    """All sittings so far."""
    path = directory.folder / FILE
    if not path.exists():
        return []
    content = strict_json.load(path, dict, f"try rm {path}, and times are measured again")
    return list(content.get("sittings", []))


def _valid(directory: Directory, sittings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sittings that have all entrants that can be timed, with the config and the text of the runs now."""
    entrants = timed_runs(directory, 0).keys()
    return [
        sitting
        for sitting in sittings
        if sitting["identities"] == _identities(directory, sitting["runs"]) and entrants <= sitting["runs"].keys()
    ]


def read_times(directory: Directory) -> dict[str, Any] | None:
    """The step times of the entrants, a row of each with the seconds by sitting. None if there is no sitting.

    A sitting does not count if a run has been trained again with another config or text, or if it lacks an entrant that
    can be timed now.
    """
    sittings = _valid(directory, _stored(directory))
    if not sittings:
        return None
    about = ("start", "runs", "machine", "commit", "share_of_others", "load_averages")
    rows = {}
    for entrant in sittings[-1]["runs"]:
        of_sittings = [sitting["rows"][entrant] for sitting in sittings]
        rows[entrant] = of_sittings[-1] | {"seconds": [row["seconds"] for row in of_sittings]}
    return {
        "rounds": _ROUNDS,
        "sittings": [{key: sitting[key] for key in about} for sitting in sittings],
        "rows": rows,
    }


def measure(directory: Directory, say: Callable[[str], None]) -> None:
    """Time the step of every entrant's trained model in turns, and add the sitting to `times.json`.

    Entrants without a checkpoint of a finished run are left out, and nothing is written if there is none.

    Raises UserError if there are sittings of another machine.
    """
    stored, plan = _stored(directory), directory.plan()
    valid = _valid(directory, stored)
    if valid and (changes := changes_of_machine(valid[-1]["machine"])):
        path = directory.folder / FILE
        raise UserError(f"{path}: has sittings of another machine ({changes}); try there, or mv {path} {path}.old")
    runs, programs = timed_runs(directory, len(valid)), {}
    for entrant in directory.study.entrants:
        for name in _finished(directory, entrant)[:1] if entrant not in runs else ():
            folder = workdir_of(directory.folder, name)
            say(f"times: {entrant} is not timed: no checkpoint; try mv {folder} {folder}.old, and it is trained again")
    for entrant, name in runs.items():
        say(f"times: loading {name}")
        (config,) = plan.configs(plan.run(name))
        programs[entrant] = _program(workdir_of(directory.folder, name), config)
    if not programs:
        return
    start, before, loads = now(), cpu_times(), [os.getloadavg()[0]]
    title = f"times, sitting {len(valid) + 1}"
    timings = in_turns({entrant: program.step for entrant, program in programs.items()}, _ROUNDS, title)
    others = share_of_others(before, cpu_times())
    loads.append(os.getloadavg()[0])  # with the study's own, as the one before
    rows = {
        entrant: {
            "seconds": [float(f"{seconds:.5g}") for seconds in timing.seconds],
            "compiler_flops": _compiler_flops(programs[entrant].compiled),
            "temporaries": programs[entrant].temporaries,
        }
        for entrant, timing in timings.items()
    }
    sitting: dict[str, Any] = {
        "start": start,
        "runs": runs,
        "identities": _identities(directory, runs),
        "machine": machine(),
    }
    sitting |= {"commit": commit(), "share_of_others": others, "load_averages": loads, "rows": rows}
    content = {"sittings": [*stored, sitting]}
    replace_file(directory.folder / FILE, (strict_json.dumps(content, indent=1) + "\n").encode())


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
