"""Kill a study at random times, resume it until it ends, and compare its results with those of an undisturbed one.

    python tests/study_kills.py FOLDER [KILLS] [STUDY]     # ten kills of the smoke study, about 15 minutes

A campaign, too long for the test suite. Both studies are in FOLDER, `undisturbed` and `killed`; FOLDER/kills.jsonl has
a line for each kill, with which the command resumes after those. The exit code is 1 if results differ in more than
times, commits and the command. The times of the kills depend on their numbers only.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LONGEST = 40.0  # seconds between a start and the kill


def start(study: str, workdir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mot_jax", "bench", "train", study, "--workdir", str(workdir)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(study: str, workdir: Path) -> None:
    process = start(study, workdir)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{workdir}: exit code {process.returncode}: {errors[-2000:]}")


def results(workdir: Path) -> dict[str, Any]:
    """The content of results.json that does not depend on the time and the source of the execution."""
    content = json.loads((workdir / "results.json").read_text())
    del content["times"], content["command"], content["commits"]
    for run in content["runs"]:
        del run["commits"]  # more than one if the source has changed since
    return content


def done(workdir: Path) -> int:
    return len(list(workdir.glob("runs/*/result.json")))


def main(folder: str, kills: str = "10", study: str = "configs/studies/smoke.py") -> int:
    undisturbed, killed, record = Path(folder, "undisturbed"), Path(folder, "killed"), Path(folder, "kills.jsonl")
    if not (undisturbed / "results.json").exists():
        finish(study, undisturbed)
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for number in range(len(rows), int(kills)):
        process, seconds = start(study, killed), random.Random(number).uniform(1, LONGEST)
        try:
            _, errors = process.communicate(timeout=seconds)
            print(f"ended by itself, exit code {process.returncode}: {errors[-2000:]}")
            return 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        rows.append({"kill": number + 1, "after_s": round(seconds, 1), "finished_runs": done(killed)})
        with record.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(time.strftime("%H:%M:%S"), rows[-1], flush=True)
    finish(study, killed)
    equal = results(undisturbed) == results(killed)
    print(f"{len(rows)} kills, {done(killed)} runs; the results are {'equal' if equal else 'NOT equal'}")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
