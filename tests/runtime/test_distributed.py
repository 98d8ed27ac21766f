"""Several processes: identity, agreement and exit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from etils import epath
from processes import free_port, start

from mot_jax.config import Config, to_json
from mot_jax.config import fields as f
from mot_jax.data.build import build, spec_from_files
from mot_jax.errors import ReportedError, RetryableError, UserError
from mot_jax.runs import status
from mot_jax.runs.metrics import read_rows
from mot_jax.runtime import distributed, exit_codes
from mot_jax.runtime.rendezvous import Process


def test_flags_name_a_process():
    assert distributed.from_flags(None, None, None) is None
    assert distributed.from_flags("node7:8476", "4", "3") == Process(3, 4, "node7:8476")
    assert distributed.from_flags(None, "1", None) == Process(0, 1, "")


@pytest.mark.parametrize(
    ("flags", "starts"),
    [
        ((None, "2", "0"), ["--coordinator: missing; the three flags go together; try"]),
        (("a:1", None, None), ["--num-processes and --process-id: missing"]),
        (("a", "2", "0"), ["--coordinator = 'a': must be HOST:PORT"]),
        (("a:99999", "2", "0"), ["--coordinator = 'a:99999': must be HOST:PORT"]),
        (("a:1", "0", "0"), ["--num-processes = '0': must be a whole number, at least 1"]),
        (("a:1", "2", "2"), ["--process-id = '2': must be 0 to 1, different in each process; try 0"]),
        ((":1", "x", "-1"), ["--coordinator = ':1'", "--num-processes = 'x'"]),
    ],
)
def test_mistakes_in_flags(flags, starts):
    with pytest.raises(UserError) as error:
        distributed.from_flags(*flags)
    assert [fault.startswith(start) for fault, start in zip(error.value.faults, starts, strict=True)] == [True] * len(
        starts
    )


def test_a_mistake_in_flags_does_not_wait_for_jax():
    code = "import sys; sys.modules['jax'] = None; from mot_jax.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "train", "configs/demo.py", "--num-processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --coordinator and --process-id: missing") and "\n" not in done.stderr[:-1]


@pytest.fixture
def no_cluster(monkeypatch):
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_outside_of_a_cluster_a_process_is_alone(no_cluster):
    assert distributed.detect(1) is None


def test_slurm_and_open_mpi_say_which_process_this_is(no_cluster):
    with no_cluster.context() as slurm:
        numbers = {"JOB_ID": 4097, "NTASKS": 4, "PROCID": 2, "LOCALID": 0, "STEP_NODELIST": "node[07-10]"}
        for name, value in numbers.items():
            slurm.setenv(f"SLURM_{name}", str(value))
        assert distributed.detect(1) == Process(2, 4, "node07:61441", (0,))
        slurm.setenv("JAX_COORDINATOR_ADDRESS", "node07:1234")
        assert distributed.detect(1) == Process(2, 4, "node07:1234", (0,))
        slurm.setenv("SLURM_NTASKS", "many")
        with pytest.raises(UserError, match=r"cluster: the process cannot be identified .* try --coordinator HOST"):
            distributed.detect(1)
    no_cluster.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    for name, value in {"SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        no_cluster.setenv(f"OMPI_COMM_WORLD_{name}", value)
    found = distributed.detect(1)
    assert found is not None and found.coordinator.startswith("10.96.0.1:") and found[:2] == (1, 2)


def test_a_single_process_connects_to_nothing(capsys):
    for process in (None, Process(0, 1, "")):
        distributed.connect(process, None)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    assert distributed.is_first() and distributed.gather({"a": 1}) == [{"a": 1}]


@pytest.mark.parametrize("trains", [True, False])
def test_only_training_takes_the_sigterm(monkeypatch, trains):
    taken = []
    monkeypatch.setattr(distributed, "meet", lambda *_: None)
    monkeypatch.setattr(distributed, "_connected", False)
    monkeypatch.setattr(distributed, "_watch_peers", lambda: None)

    def initialize(*_: object, **__: object) -> None:
        taken.append(jax.config.jax_enable_preemption_service)  # type: ignore[attr-defined]

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    distributed.connect(Process(0, 2, "localhost:1"), f.MeshConfig(), trains)
    jax.config.update("jax_enable_preemption_service", True)
    assert taken == [trains]


def test_faults_of_all_processes_are_told_once():
    def found(faults: list[str], data: str) -> dict:
        return {"faults": faults, "facts": {"config": "c", "data": data}}

    assert distributed._united([found([], "1"), found([], "1")]) == []
    assert distributed._united([found(["a"], "1"), found(["a", "b"], "2"), found(["a"], "1")]) == ["a", "process 1: b"]
    (fault,) = distributed._united([found([], "1"), found([], "2"), found([], "1")])
    assert fault == (
        "data: must be the same in all processes, and is 1 in processes 0 and 2, 2 in process 1; try one for all"
    )


@pytest.mark.parametrize(
    ("mine", "of_others", "kind"),
    [
        (RetryableError("late"), {"faults": [], "mistaken": False}, RetryableError),
        (RetryableError("late"), {"faults": ["wrong"], "mistaken": True}, UserError),
        (UserError("wrong"), {"faults": ["late"], "mistaken": False}, UserError),
        (None, {"faults": ["ZeroDivisionError"], "mistaken": False, "bug": True}, RetryableError),  # and none published
        (UserError("wrong"), {"faults": ["ZeroDivisionError"], "mistaken": False, "bug": True}, UserError),
        (None, {"faults": [], "mistaken": False, "facts": {"data": "another"}}, UserError),
    ],
)
def test_all_end_for_good_where_one_is_mistaken(monkeypatch, mine, of_others, kind):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, {"bug": False, "facts": {}, **of_others}])
    monkeypatch.setattr(distributed, "_all_exiting", False)
    monkeypatch.setattr(distributed, "_PUBLISH_SECONDS", 0)
    with pytest.raises(ReportedError) as error, distributed.together() as same:
        same |= {"data": "text"} if mine is None else {}
        if mine is not None:
            raise mine
    assert type(error.value) is kind


def test_what_fails_in_a_single_process_fails_as_it_did():
    for error in (UserError("a", "b"), ZeroDivisionError()):
        with pytest.raises(type(error)) as found, distributed.together():
            raise error
        assert found.value is error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (SystemExit(2), 2, ""),
        (ZeroDivisionError("ours"), 1, "ZeroDivisionError: ours"),
        (KeyboardInterrupt(), 1, "KeyboardInterrupt"),
        (OSError("503 Service Unavailable"), 1, "OSError: 503 Service Unavailable"),  # of a store
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"), 75, "error: another process was lost outside of"),
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), 75, "error: another process was"),
    ],
)
def test_one_of_many_that_fails_alone_ends_at_once(monkeypatch, capsys, error, code, words):
    def end(code: int) -> None:
        raise InterruptedError(code)

    monkeypatch.setattr(distributed.os, "_exit", end)
    monkeypatch.setattr(distributed, "_PUBLISH_SECONDS", 0)
    monkeypatch.setattr(distributed, "_all_exiting", False)  # True after a test that stops a run
    with pytest.raises(type(error)), distributed.ending():
        raise error  # a single process: as ever
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(distributed, "_connected", True)
    with pytest.raises(InterruptedError) as ended, distributed.ending():
        raise error
    assert ended.value.args == (code,)
    assert words in capsys.readouterr().err
    monkeypatch.setattr(distributed, "_all_exiting", False)
    distributed._failing.clear()
    with pytest.raises(SystemExit) as stopped, distributed.ending():
        distributed.stop(143)
    assert stopped.value.code == 143  # all of them, in the usual way


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_has_the_effect_that_it_has_without_training(number):
    before = signal.getsignal(number)
    with distributed.preemption() as request:
        assert not request.is_due(1)
        os.kill(os.getpid(), number)
        assert request.is_due(2) and request.is_due(3)
        assert request.is_interrupt() == (number == signal.SIGINT)
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def test_an_ignored_interrupt_remains_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with distributed.preemption() as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert not request.is_due(1)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# --- real processes ---------------------------------------------------------------------------------------------------

STEPS, ROWS = 200, 8
LOST = {exit_codes.RETRYABLE, -signal.SIGABRT}  # by Python, or by JAX's runtime: 134 in a shell


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `tiny.py`, a config of one block and four groups of two rows, and its corpus."""
    here = tmp_path_factory.mktemp("many")
    texts = here / "texts"
    texts.mkdir()
    for i in range(60):
        (texts / f"{i}.txt").write_text("".join(f"{i * n % 997} is {i} times {n}.\n" for n in range(60)))
    build(spec_from_files("sums", [str(texts)], "file", "text", 0.2), here / "data" / "corpora", 1, lambda line: None)
    kind = f.MixtureOfTokensConfig(group_size=2, num_experts=4, shared_expert_dim=8, controller_init_scale=3.0)
    sizes = {"num_blocks": 1, "d_model": 16, "d_ff": 32, "num_heads": 2, "context_length": 16, "loss_chunk": 16}
    training = f.TrainingConfig(
        steps=STEPS,
        batch_size=ROWS,
        optimizer=f.OptimizerConfig(learning_rate=3e-3, warmup_steps=4),
        log_every=1,
        validate_every=60,
        checkpoint_every=5,
    )
    config = Config(
        model=f.ModelConfig(**sizes, feed_forward=kind),
        data=f.DataConfig(corpus=("sums",), directory=str(here / "data"), validation_windows=32),
        training=training,
        mesh=f.MeshConfig(wait_seconds=100, heartbeat_seconds=20),
        logging=f.LoggingConfig(tensorboard=False, sample_tokens=4),
    )
    write_config(here / "tiny.py", config)
    masked = dataclasses.replace(config.model, objective="masked", vocab_size=258)
    few = dataclasses.replace(training, steps=3, validate_every=3, checkpoint_every=3)
    write_config(here / "masked.py", dataclasses.replace(config, model=masked, training=few))
    return here


def write_config(path: Path, config: Config) -> None:
    path.write_text(
        f"from mot_jax.config import from_json\n\ndef get_config():\n    return from_json({to_json(config)!r})\n"
    )


def reads(record: Path, count: int) -> list[dict[int, dict]]:
    """By process and step, the examples that it read."""
    found = []
    for i in range(count):
        lines = [json.loads(line) for line in Path(f"{record}.{i}").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(lines[0]["step"], lines[0]["step"] + len(lines)))
        found.append({line["step"]: line for line in lines})
    return found


def ends(processes: list[subprocess.Popen], within: float = 200) -> list[int]:
    """The exit codes."""
    return [process.wait(within) for process in processes]


# How many processes train, on which mesh, how they end, and the exit codes that this brings. Two go on as one and as
# four, four as one, two and four.
LIFE = [
    (2, "tensor 2", "SIGKILL of 1", LOST),
    (4, "expert 2", "SIGKILL of all", set()),
    (4, "fsdp 2", "SIGTERM to 3", {143}),
    (2, "data 4", "SIGINT to 1", {130}),
    (1, "data 4", "SIGTERM to 0", {143}),
    (4, "expert 2", "SIGKILL of 0", LOST),
    (1, "data 4", "finished", {0}),
]


@pytest.mark.slow
def test_processes_are_killed_and_go_on_in_other_numbers(experiment):
    """The losses of an undisturbed process, and over all processes exactly its examples: none twice, none left out."""
    workdir = epath.Path(experiment / "killed")
    arguments = [str(experiment / "tiny.py"), "--workdir", str(workdir)]
    lives = []
    for life, (count, axis, end, codes) in enumerate(LIFE):
        record = experiment / f"life{life}"
        begun = max((row["step"] for row in read_rows(workdir)), default=0)
        mesh = [f"--mesh.{axis[:-2]}", axis[-1]]
        processes = start([*arguments, *mesh], count, 4 // count, record)
        while end != "finished" and max((row["step"] for row in read_rows(workdir)), default=0) < begun + 8:
            time.sleep(0.02)
            assert all(process.poll() is None for process in processes), Path(f"{record}.0.log").read_text()
        targets = {"all": processes, "": []}.get(end[11:]) or [processes[int(i)] for i in re.findall(r" (\d)$", end)]
        for process in targets:
            process.send_signal(getattr(signal, end.split()[0]))
        signalled = time.monotonic()
        found = ends(processes)
        survivors = [code for code, process in zip(found, processes, strict=True) if code != -signal.SIGKILL]
        assert set(survivors) <= codes and len(survivors) == count - len(targets) * ("KILL" in end)
        if end != "finished":
            assert time.monotonic() - signalled < 60
        text = Path(f"{record}.0.log").read_text()
        if "KILL" not in end and end != "finished":
            assert f"{'Ctrl-C' if 'INT' in end else 'SIGTERM'}: stopped after step" in text
        if "SIGKILL of 1" in end and found[0] == exit_codes.RETRYABLE:
            assert "error: another process was lost at step" in text and "Traceback" not in text
        lives.append(reads(record, count))

    (alone,) = start([str(experiment / "tiny.py"), "--workdir", str(experiment / "alone")], 1, 1, experiment / "one")
    assert alone.wait(200) == 0
    (reference,) = reads(experiment / "one", 1)
    assert list(reference) == list(range(1, STEPS + 1))
    examples = list(itertools.chain(*(of["examples"] for of in reference.values())))
    assert examples == list(range(STEPS * ROWS))
    windows = list(itertools.chain(*(of["windows"] for of in reference.values())))
    assert len(set(windows)) == len(windows)  # less than an epoch: no window twice

    reached = 0
    for processes in lives:
        complete = set.intersection(*map(set, processes))
        assert min(complete) <= reached + 1  # it resumes from an existing checkpoint
        reached = max(complete)
        for step in complete:
            together = [of[step] for of in processes]
            numbers = list(itertools.chain(*(of["examples"] for of in together)))
            read = dict(zip(numbers, itertools.chain(*(of["windows"] for of in together)), strict=True))
            assert len(read) == len(numbers) == ROWS
            assert read == dict(zip(reference[step]["examples"], reference[step]["windows"], strict=True))
    assert reached == STEPS

    rows, expected = read_rows(workdir), read_rows(epath.Path(experiment / "alone"))
    assert [(row["step"], row["split"]) for row in rows] == [(row["step"], row["split"]) for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)


@pytest.mark.slow
def test_a_masked_run_of_two_processes_counts_and_shows_what_one_does(experiment):
    results = []
    for count in (2, 1):
        workdir = experiment / f"masked{count}"
        arguments = [str(experiment / "masked.py"), "--workdir", str(workdir)]
        assert set(ends(start(arguments, count, 2 // count, experiment / f"of_masked{count}"))) == {0}
        results.append((read_rows(epath.Path(workdir))[-1], (workdir / "sample.txt").read_text()))
    (of_two, sample), (of_one, expected) = results
    assert sample == expected
    assert of_two["most_frequent"] == of_one["most_frequent"]
    assert {k: of_two[k] for k in ("tokens", "windows")} == {k: of_one[k] for k in ("tokens", "windows")}
    assert of_two["loss"] == pytest.approx(of_one["loss"], rel=1e-5)
    second = (experiment / "of_masked2.1.log").read_text().splitlines()
    assert [line for line in second if "[Gloo]" not in line] == [
        re.sub(
            r"localhost:\d+",
            re.search(r"localhost:\d+", second[0])[0],
            "process 1 of 2 waiting for localhost:1, at most 100 s",
        )
    ]


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(experiment, tmp_path):
    workdir = str(tmp_path / "run")
    assert ends(start([str(experiment / "masked.py"), "--workdir", workdir], 1, 2, tmp_path / "record")) == [0]
    results = []
    for count in (2, 1):
        file, record = tmp_path / f"{count}.json", tmp_path / f"of{count}"
        processes = start([workdir, "--json", str(file)], count, 2 // count, record, command="evaluate")
        assert set(ends(processes)) == {0}, Path(f"{record}.0.log").read_text()
        results.append(json.loads(file.read_text()))
    of_two, of_one = results
    assert of_two["loss"] == pytest.approx(of_one["loss"], rel=1e-5) and of_two["windows"] > 32
    assert of_two | {"loss": 0, "bits_per_byte": 0} == of_one | {"loss": 0, "bits_per_byte": 0}


SLEEPS = """
import dataclasses, os, sys, time
from mot_jax.config import MeshConfig, load_config
from mot_jax.runtime import distributed
from mot_jax.runtime.rendezvous import Process
from mot_jax.training import Hook, status_hook, train

number, coordinator, file, workdir = int(sys.argv[1]), *sys.argv[2:]
status_hook.STALL_SECONDS, status_hook.PUBLISH_SECONDS = 3.0, 0.1

class Sleep(Hook):
    def after_step(self, trainer, metrics):
        while number == 1 and trainer.step == 5 and not os.path.exists(workdir + ".continue"):
            time.sleep(0.1)

config = load_config(file)
training = dataclasses.replace(config.training, steps=20, validate_every=20, checkpoint_every=20)
config = dataclasses.replace(config, training=training, mesh=MeshConfig(data=2))
with distributed.ending():
    distributed.connect(Process(number, 2, coordinator), MeshConfig(wait_seconds=60))
    train(config, workdir, [Sleep()])
"""


@pytest.mark.slow
def test_a_process_for_which_the_other_waits_is_named(experiment, tmp_path):
    workdir, coordinator = epath.Path(tmp_path / "run"), f"localhost:{free_port()}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    arguments = [coordinator, str(experiment / "tiny.py"), str(workdir)]
    calls = [[sys.executable, "-c", SLEEPS, str(number), *arguments] for number in (0, 1)]
    processes = [
        subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for call in calls
    ]
    try:
        output, line = "", r"step 6 has waited \d+ s for process 1, which is at step 5 \(waiting for hook Sleep\)"
        while not re.search(line + "\n", output):
            output += (text := processes[0].stdout.readline())
            assert text, output
        report = status.report(workdir)
        while report["behind"] is None:  # the line is printed before the file is written
            report = status.report(workdir)
        assert re.fullmatch(line, report["remark"]) and re.fullmatch(line, report["behind"])
        assert (report["state"], report["waiting_for"]) == ("training", "peers") and report["step"] in (4, 5)
        assert " of 2 on " in report["owner"]
    finally:
        epath.Path(f"{workdir}.continue").write_text("")
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert ends(processes) == [0, 0], outputs
    assert "has waited" not in outputs[0] and "has waited" not in outputs[1]  # once
    assert status.report(workdir)["state"] == "finished"


def errors(record: Path, count: int) -> list[list[str]]:
    return [
        [line for line in Path(f"{record}.{i}.log").read_text().splitlines() if line.startswith(("error", "Trace"))]
        for i in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "line"),
    [
        (["--data.tokenizer", "summs.json"], "error: process 1: data.tokenizer = '"),
        (["--training.seed", "1"], "error: config: must be the same in all processes, and is "),
    ],
)
def test_what_is_wrong_in_one_process_ends_both_with_the_same_line(experiment, tmp_path, own, line):
    arguments = [str(experiment / "tiny.py"), "--workdir", str(tmp_path / "run")]
    assert ends(start(arguments, 2, 1, tmp_path / "record", {1: own})) == [2, 2]
    first, second = errors(tmp_path / "record", 2)
    assert first == second and len(first) == 1 and first[0].startswith(line)
    assert not (tmp_path / "run").exists()


FAILS = """
import errno, hashlib, os, signal, sys, time
import jax
from mot_jax.cli.boundary import boundary
from mot_jax.config import MeshConfig
from mot_jax.runtime import distributed
from mot_jax.runtime.rendezvous import Process

number, count, failing = map(int, sys.argv[1:4])
coordinator, place = sys.argv[4:]
if number == 1:
    distributed._WATCH_SECONDS *= 1.7  # its queries come later than those of the others
signal.signal(signal.SIGINT, signal.default_int_handler)
with distributed.ending(), boundary(program=True):
    distributed.connect(Process(number, count, coordinator), MeshConfig(wait_seconds=60))
    if place == "interrupted" and number == failing:
        with distributed.preemption():
            pid = os.fork()
            if pid == 0:
                for _ in range(2):
                    time.sleep(0.5)
                    os.kill(os.getppid(), signal.SIGINT)
                os._exit(0)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2 ** 31 - 1)  # only the thread that watches Ctrl-C runs
    if place == "after the others":
        if number != failing:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out")
        time.sleep(3)
    if place != "together" and number == failing:
        raise OSError(errno.ENOSPC, "the disk is full")
    with distributed.together():
        if number == failing:
            raise ZeroDivisionError("a bug")
"""


@pytest.mark.parametrize(
    ("count", "failing", "place", "code"),
    [
        pytest.param(2, 0, "outside", exit_codes.USER_ERROR, marks=pytest.mark.slow),
        pytest.param(3, 2, "outside", exit_codes.USER_ERROR, marks=pytest.mark.slow),
        pytest.param(3, 0, "together", 1, marks=pytest.mark.slow),
        pytest.param(2, 1, "together", 1, marks=pytest.mark.slow),
        pytest.param(2, 1, "after the others", exit_codes.USER_ERROR, marks=pytest.mark.slow),
        pytest.param(2, 1, "interrupted", exit_codes.INTERRUPTED, marks=pytest.mark.slow),
    ],
)
def test_all_processes_end_with_the_exit_code_of_the_one_that_fails(count, failing, place, code):
    coordinator = f"localhost:{free_port()}"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    numbers = [[str(i), str(count), str(failing)] for i in range(count)]
    calls = [[sys.executable, "-c", FAILS, *number, coordinator, place] for number in numbers]
    processes = [subprocess.Popen(call, env=environment, stderr=subprocess.PIPE, text=True) for call in calls]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [code] * count, errors
    reasons = {1: "ZeroDivisionError: a bug", 2: "error: no space left on the disk", 130: "error: interrupted\n"}
    assert reasons[code] in errors[failing]
    del errors[failing]
    assert all(f"error: process {failing} ended with exit code {code}; its output has" in text for text in errors)


@pytest.mark.slow
def test_a_process_that_never_comes_is_missed_in_one_line(experiment, tmp_path):
    arguments = [str(experiment / "tiny.py"), "--workdir", str(tmp_path / "run"), "--mesh.wait-seconds", "4"]
    assert ends(start(arguments, 3, 1, tmp_path / "record", {2: ["--mesh.data", "0"]})) == [75, 75, 2]
    first, second, third = errors(tmp_path / "record", 3)
    assert first == second and re.match(r"error: coordinator = localhost:\d+: process 2 of 3 did not connect", first[0])
    assert third[0].startswith("error: mesh.data = 0") and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_service_keeps_the_values_of_the_last_call_only():
    """Of each thread, in a process of its own, since JAX connects once."""
    program = f"""
import jax
jax.distributed.initialize("localhost:{free_port()}", 1, 0)
from mot_jax.runtime import distributed
for i in range(3):
    assert distributed.gather(i) == [i] == distributed.gather(i, f"manifest/{{i}}/listing")
print(sorted(key for key, _ in distributed._coordination().client.key_value_dir_get("mot_jax/")))
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    keys = [f"mot_jax/{key}/{end}" for key in ("2", "manifest/2/listing") for end in ("0", "all")]
    assert out == f"{keys}\n"
