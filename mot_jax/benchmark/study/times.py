"""The times of a study: training steps of the trained models in turns, on a batch of their own text.

Routing depends on the state and on the tokens, and with it the time of kinds whose experts process a varying number of
tokens. Nothing else should run on the machine; the CPU time of other processes during the timing is recorded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from mot_jax.benchmark.step import TrainingProgram
from mot_jax.benchmark.study import plan as plans
from mot_jax.benchmark.study.execute import Directory, commit, workdir_of
from mot_jax.benchmark.timing import cpu_times, in_turns, machine, share_of_others
from mot_jax.config import Config
from mot_jax.data.objectives import Batch, Objective
from mot_jax.data.pipeline import train_batches
from mot_jax.data.text import open_text
from mot_jax.nn.sharding import local_sequences, make_mesh
from mot_jax.runs.restore import load_run_config, load_training
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import replace_file

FILE = "times.json"
_ROUNDS = 20


def timed_runs(directory: Directory) -> dict[str, str]:
    """The finished run of each entrant whose model is timed: that of the first seed that has not diverged."""
    runs = {}
    for entrant in directory.study.entrants:
        for name in plans.seed_runs(directory.study, entrant).values():
            outcome = directory.outcome(name)
            if outcome is not None and outcome.state == "finished":
                runs[entrant] = name
                break
    return runs


def read_times(directory: Directory) -> dict[str, Any] | None:
    """The times that have been measured of these runs; None if there are none."""
    path = directory.folder / FILE
    times = strict_json.load(path, dict, f"try rm {path}, and it is measured again") if path.exists() else None
    return times if times is not None and times.get("runs") == timed_runs(directory) else None


def measure(directory: Directory, say: Callable[[str], None]) -> None:
    """Time the step of every entrant's trained model in turns, and write `times.json`."""
    runs, programs = timed_runs(directory), {}
    for entrant, name in runs.items():
        say(f"times: compiling the step of {name}")
        programs[entrant] = _program(workdir_of(directory.folder, name))
    say(f"times: {_ROUNDS} rounds")
    before, loads = cpu_times(), [os.getloadavg()[0]]
    timings = in_turns({entrant: program.step for entrant, program in programs.items()}, _ROUNDS)
    others = share_of_others(before, cpu_times())
    loads.append(os.getloadavg()[0])  # with the study's own, as the one before
    rows = {
        entrant: {
            "median_s": timing.median,
            "spread": timing.spread,
            "compiler_flops": _compiler_flops(programs[entrant].compiled),
            "temporaries": programs[entrant].temporaries,
        }
        for entrant, timing in timings.items()
    }
    content = {"runs": runs, "machine": machine(), "commit": commit(), "rounds": _ROUNDS, "rows": rows}
    content |= {"share_of_others": others, "load_averages": loads}
    replace_file(directory.folder / FILE, (strict_json.dumps(content, indent=1) + "\n").encode())


def _program(workdir: epath.Path) -> TrainingProgram:
    mesh = make_mesh(load_run_config(workdir))
    with jax.set_mesh(mesh):
        config, state, next_example = load_training(workdir, mesh)
    return TrainingProgram(config, state, _batch(config, mesh, next_example))


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
