"""Train `configs/demo.py` for 20 steps at two revisions, and compare every logged number bit for bit.

    python tests/compare_revisions.py BASE [REVISION]     # REVISION: the working tree if it is left out

The guard of moves and renames: they may change no bit of the training. Both runs use this Python, one after the other,
on one machine. Exit code 1 if they differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMES = {"tokens_per_second", "model_flops_per_second", "mfu", "data_wait", "seconds_left", "seconds"}
STEPS = 20


def rows_of(tree: Path, workdir: Path) -> list[dict]:
    """The logged rows of a short run of the code in `tree`, without its timings."""
    flags = ["--training.steps", STEPS, "--training.log-every", 1, "--data.validation-windows", 64]
    command = [sys.executable, "train.py", "configs/demo.py", "--workdir", workdir, *flags]
    environment = os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    subprocess.run([str(part) for part in command], cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def main(base: str, revision: str | None = None) -> int:
    """Prints the first difference, if any."""
    with tempfile.TemporaryDirectory() as temporary:
        results = []
        for i, name in enumerate((base, revision)):
            tree = ROOT
            if name is not None:
                tree = Path(temporary) / f"tree{i}"
                subprocess.run(["git", "worktree", "add", "-q", "--detach", tree, name], cwd=ROOT, check=True)
            try:
                results.append(rows_of(tree, Path(temporary) / f"run{i}"))
            finally:
                if name is not None:
                    subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    before, after = results
    if other := {name for old, new in zip(before, after, strict=True) for name in old.keys() ^ new.keys()}:
        print(f"not compared, logged by one revision only: {', '.join(sorted(other))}")
    for rows in results:
        rows[:] = [{name: value for name, value in row.items() if name not in other} for row in rows]
    for old, new in zip(before, after, strict=True):
        if old != new:
            print(f"differ at step {old['step']} ({old['split']}): {old} before, {new} after")
            return 1
    last = [row["loss"] for row in after if row["split"] == "train"][-1]
    print(f"{len(after)} rows are equal bit for bit; training loss {last!r} at step {STEPS}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
