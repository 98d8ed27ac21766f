"""Start two runs in one workdir, round after round, kill one now and then, and compare every row with undisturbed ones.

    python tests/two_starts.py RECORD [ROUNDS]     # 50 rounds in about 20 minutes on two cores

A campaign, too long for the test suite: it resumes after the rounds that RECORD has, one line of JSON each, and ends
with exit code 1 if a row was lost or written twice, a number differs, or a checkpoint was removed before newer ones
were complete. The delays and signals of a round depend on its number only.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMES = {"tokens_per_second", "model_flops_per_second", "mfu", "data_wait", "seconds_left"}
CONFIG = """
from mot_jax.config import *

def get_config():
    kind = MixtureOfTokensConfig(group_size=4, num_experts=8)
    return Config(
        model=ModelConfig(
            num_blocks=2, d_model=16, d_ff=32, num_heads=4, context_length=16, loss_chunk=8, feed_forward=kind
        ),
        data=DataConfig(validation_split="validation[:10%]", validation_windows=64),
        training=TrainingConfig(steps=300, batch_size=32, log_every=1, validate_every=50, checkpoint_every=10),
        logging=LoggingConfig(tensorboard=False, sample_tokens=0),
    )
"""


def start(config: Path, workdir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mot_jax", "train", str(config), "--workdir", str(workdir)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def rows_of(workdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def steps_of(workdir: Path) -> set[int]:
    return {int(path.parent.name) for path in workdir.glob("checkpoints/*/manifest.json")}


def play(number: int, config: Path, workdir: Path, expected: list[dict]) -> dict:
    """One round: two starts, perhaps a signal to the first, and further starts until the run is finished."""
    draw, begin, known, faults = random.Random(number), time.monotonic(), set(), []
    second_at, signal_at = draw.uniform(0, 8), draw.uniform(4, 16)
    sent = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, None])
    processes = [start(config, workdir)]
    codes: list[int] = []
    signaled = None
    while processes or not (workdir / "result.json").exists():
        now = time.monotonic() - begin
        if len(processes) + len(codes) == 1 and now > second_at:
            processes.append(start(config, workdir))
        if sent is not None and signaled is None and now > signal_at and processes and not codes:
            processes[0].send_signal(sent)
            signaled = sent.name
        steps = steps_of(workdir)
        if known - steps and (len(steps) < 2 or max(known - steps) > min(steps)):
            faults.append(f"of the checkpoints {sorted(known)} there are {sorted(steps)}")
        known |= steps
        for process in [process for process in processes if process.poll() is not None]:
            processes.remove(process)
            codes.append(process.returncode)
            if process.returncode not in (0, 75, 143, -signal.SIGKILL, -signal.SIGTERM):
                faults.append(f"exit code {process.returncode}: {process.communicate()[1][-500:]}")
        if not processes and len(codes) > 1 and not (workdir / "result.json").exists():
            processes.append(start(config, workdir))
        if len(codes) > 6:
            faults.append("is not finished after six starts")
            break
        time.sleep(0.02)
    if rows_of(workdir) != expected:
        faults.append("the rows differ from those of an undisturbed run")
    return {"round": number, "signal": signaled, "exit codes": codes, "faults": faults}


def main(record: str, rounds: str = "50") -> int:
    path = Path(record)
    played = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary, "small.py")
        config.write_text(CONFIG)
        process = start(config, Path(temporary, "undisturbed"))
        if process.wait() != 0:
            print(process.communicate()[1])
            return 1
        expected = rows_of(Path(temporary, "undisturbed"))
        for number in range(len(played), int(rounds)):
            played.append(play(number, config, Path(temporary, f"round{number}"), expected))
            with path.open("a") as file:
                file.write(json.dumps(played[-1]) + "\n")
            print(played[-1], flush=True)
    outcomes = collections.Counter((str(one["signal"]), str(one["exit codes"])) for one in played)
    for (sent, codes), count in outcomes.most_common():
        print(f"{count:3} rounds: signal {sent}, exit codes {codes}")
    faulty = [one for one in played if one["faults"]]
    print(f"{len(played)} rounds, {len(faulty)} with faults")
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
