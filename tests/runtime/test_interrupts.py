"""Ctrl-C ends a command within seconds, whatever its main thread does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mot_jax.runtime import exit_codes

ROOT = Path(__file__).parents[2]
LINE = "error: interrupted; a training run resumes from its last checkpoint with the same command"
BEGIN = """
import hashlib, os, signal, sys, time
from mot_jax.cli.boundary import boundary
from mot_jax.runtime import distributed
signal.signal(signal.SIGINT, signal.default_int_handler)
with boundary(program=True, trains=True):
"""
WAITING = """
    print("ready", flush=True)
    time.sleep(60)
"""
COMPILING = """  # as in a compiler: Python's handler runs when the call returns
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 ** 31 - 1)
"""
CALLBACK = """  # as in a library that drops exceptions of its callbacks
    print("ready", flush=True)
    for _ in range(600):
        try:
            time.sleep(0.1)
        except KeyboardInterrupt:
            pass
"""
SAVING = """  # after a first Ctrl-C, whose handler restores Python's before another thread runs
    sys.setswitchinterval(10)
    with distributed.preemption() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.is_due(1)
        print("ready", flush=True)
        time.sleep(3)
        print("saved", flush=True)
        sys.exit(5)
"""


@pytest.mark.parametrize(
    ("program", "presses", "output", "code", "errors"),
    [
        (WAITING, 1, "", exit_codes.INTERRUPTED, [LINE]),
        (COMPILING, 1, "", exit_codes.INTERRUPTED, [LINE]),
        (COMPILING, 2, "", exit_codes.INTERRUPTED, [LINE]),
        (CALLBACK, 1, "", exit_codes.INTERRUPTED, [LINE]),
        (SAVING, 0, "saved\n", 5, []),
        (SAVING, 1, "", exit_codes.INTERRUPTED, [LINE]),
    ],
    ids=["waiting", "compiling", "compiling, twice", "callback", "saving", "saving, twice"],
)
def test_ctrl_c_ends_the_process_with_one_line_unless_it_saves(program, presses, output, code, errors):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BEGIN + program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(command, env=env, **pipes) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            for _ in range(presses):
                process.send_signal(signal.SIGINT)
            assert process.wait(30) == code
            assert (process.stdout.read(), process.stderr.read().splitlines()) == (output, errors)
        finally:
            process.kill()
