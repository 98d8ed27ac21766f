"""Studies are trained by the command, killed, resumed and refused."""

import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import study_kills
from etils import epath

from mot_jax import cli
from mot_jax.benchmark.study import execute, load_study, results, times
from mot_jax.benchmark.study.plan import identity_hash
from mot_jax.config import ExpertChoiceConfig, ExpertThresholdConfig, to_json
from mot_jax.errors import DivergedError, UserError
from mot_jax.runs import manifest
from mot_jax.runtime import strict_json

# A study of two kinds and 12 steps: 3 rates, 1 seed and at most one shorter schedule. Its function `alternatives` has
# another scale of the controller.
STUDY = """
import dataclasses
import importlib.util

spec = importlib.util.spec_from_file_location("smoke", {smoke!r})
smoke = importlib.util.module_from_spec(spec)
spec.loader.exec_module(smoke)


def alternatives(config):
    layer = dataclasses.replace(config.model.feed_forward, controller_init_scale=1.0)
    model = dataclasses.replace(config.model, feed_forward=layer)
    return {{"mixture_of_tokens": {{"scale_1": dataclasses.replace(config, model=model)}}}}


def get_study():
    study = smoke.get_study()
    entrants = {{}}
    for name in ("dense", "mixture_of_tokens"):
        config = study.entrants[name]
        optimizer = dataclasses.replace(config.training.optimizer, warmup_steps=2)
        training = dataclasses.replace(config.training, steps=12, validate_every=6, checkpoint_every=4, log_every=2)
        training = dataclasses.replace(training, optimizer=optimizer)
        data = dataclasses.replace(config.data, directory={data!r}, validation_windows=32)
        model = dataclasses.replace(config.model, num_blocks=1)
        entrants[name] = dataclasses.replace(config, training=training, data=data, model=model)
    return dataclasses.replace(study, entrants=entrants, seeds=(1,), max_extensions=0, horizons=(0.5,){more})
"""
ALTERNATIVES = ", alternatives=alternatives(entrants['mixture_of_tokens'])"
SMOKE = Path(__file__).parents[3] / "configs" / "studies" / "smoke.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def write_study(folder: Path, data: Path, more: str = "", name: str = "small.py") -> str:
    path = folder / name
    path.write_text(STUDY.format(smoke=str(SMOKE), data=str(data), more=more))
    return str(path)


def directory(study: str, folder: Path) -> execute.Directory:
    return execute.Directory(load_study(study), Path(study).stem, epath.Path(folder))


def refusal(capsys, *arguments: str) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", "train", *arguments])
    code = exit_.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err.splitlines()


def test_a_dry_run_lists_the_runs_and_writes_nothing(capsys, tmp_path, data):
    study, out = write_study(tmp_path, data), tmp_path / "out"
    cli.main(["bench", "train", study, "--workdir", str(out), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    expected = [f"{name}-rate-{r}" for name in ("dense", "mixture_of_tokens") for r in ("0.005", "0.01", "0.02")]
    expected += ["dense-seed-1", "mixture_of_tokens-seed-1"]
    assert rows[1:] == expected
    assert any("the budget is 0.2" in line for line in lines) and not out.exists()


def test_of_an_entrant_with_alternatives_the_candidates_are_listed_and_the_others_wait(capsys, tmp_path, data):
    study, out = write_study(tmp_path, data, ALTERNATIVES), tmp_path / "out"
    cli.main(["bench", "train", study, "--workdir", str(out), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in lines if line.startswith("| mixture")]
    names = ["mixture_of_tokens-rate-0.01", "mixture_of_tokens-scale_1-rate-0.01"]
    expected = [[name, "tuning", "to train"] for name in names]
    assert rows == [*expected, ["mixture_of_tokens-seed-1", "seeds", "waits for the tuning"]]
    assert "and at most 3 runs more, which depend on the losses of these" in lines
    code, (line,) = refusal(capsys, study, "--workdir", str(out), "--run", "mixture_of_tokens-seed-1")
    assert code == 75 and line.endswith(f"try again after {', '.join(names)}")


def test_a_study_above_its_budget_is_refused_before_anything_is_trained(capsys, tmp_path, data):
    study, out = write_study(tmp_path, data, ", budget_hours=1e-6"), tmp_path / "out"
    code, (line,) = refusal(capsys, study, "--workdir", str(out))
    assert code == 2 and line.startswith("error: budget_hours = 1e-06: ") and "try --hours 1" in line
    assert not (out / "runs").exists()
    code, (line,) = refusal(capsys, study, "--workdir", str(out), "--hours", "0")
    assert code == 2 and line.startswith("error: --hours = 0: ")


def test_a_run_whose_rate_is_not_chosen_can_be_retried_later(capsys, tmp_path, data):
    study, out = write_study(tmp_path, data), tmp_path / "out"
    code, (line,) = refusal(capsys, study, "--workdir", str(out), "--run", "dense-seed-1")
    assert code == 75 and "try again after dense-rate-0.005, dense-rate-0.01, dense-rate-0.02" in line
    code, (line,) = refusal(capsys, study, "--workdir", str(out), "--run", "dense-seed-1", "--dry-run")
    assert code == 2 and line.startswith("error: --run = dense-seed-1: has no part in --dry-run")
    code, (line,) = refusal(capsys, study, "--workdir", str(out), "--run", "dense-seed-1", "--times")
    assert code == 2 and line.startswith("error: --run = dense-seed-1: has no part in --times")
    code, (line,) = refusal(capsys, study, "--workdir", str(out), "--dry-run", "--times")
    assert code == 2 and line.startswith("error: --times: has no part in --dry-run")
    code, (line,) = refusal(capsys, study, "--workdir", str(out), "--run", "mixture_of_tokens-seed-1-steps-6")
    assert code == 75 and "whether the study has this run is not decided yet" in line
    code, (line,) = refusal(capsys, study, "--workdir", str(out), "--run", "dense-rate-0.02.")
    assert code == 2 and "did you mean 'dense-rate-0.02'?" in line


def test_a_directory_has_one_study(capsys, tmp_path, data):
    first, second = write_study(tmp_path, data), write_study(tmp_path, data, name="other.py")
    out = tmp_path / "out"
    directory(first, out).claim()
    code, (line,) = refusal(capsys, second, "--workdir", str(out))
    assert code == 2 and "has the study 'small', not 'other'" in line
    (tmp_path / "elsewhere").mkdir()
    third = write_study(tmp_path / "elsewhere", data, ", title='Mine'")
    code, (line,) = refusal(capsys, third, "--workdir", str(out))
    assert code == 2 and ", not 'Mine'; try " in line and line.endswith("_2, or that title for the same study")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, (line,) = refusal(capsys, first, "--workdir", str(tmp_path / "full"))
    assert code == 2 and "has files, but no study" in line


def test_a_study_can_be_begun_by_several_processes_at_once(tmp_path, data):
    studies = [directory(write_study(tmp_path, data), tmp_path / "0")] * 8
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "study.json.0123.new").touch()  # of a process that is about to begin it
    with ThreadPoolExecutor(8) as pool:
        for number in range(10):
            studies = [execute.Directory(one.study, one.name, epath.Path(tmp_path / str(number))) for one in studies]
            list(pool.map(execute.Directory.claim, studies))
            assert "study.json" in [path.name for path in (tmp_path / str(number)).iterdir()]


def finished_run(study: execute.Directory, name: str, loss: float | None) -> Path:
    """Write the files of a run that has ended, as training does."""
    run = study.plan().run(name)
    assert run.config is not None
    workdir = Path(execute.workdir_of(study.folder, name))
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(to_json(run.config))
    row = {"step": run.steps, "split": "validation", "loss": loss, "bits_per_byte": loss, "windows": 32, "tokens": 992}
    (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (workdir / "result.json").write_text(json.dumps({"steps": run.steps}))
    return workdir


def test_results_have_the_chosen_candidate(tmp_path, data):
    study = directory(write_study(tmp_path, data, ALTERNATIVES), tmp_path / "out")
    for name, losses in (("", 3.0), ("-scale_1", 2.0)):
        workdir = finished_run(study, f"mixture_of_tokens{name}-rate-0.01", losses)
        (workdir / "record.json").write_text(json.dumps({"state": "finished", "curve": [[12, losses]]}))
    entrant = json.loads(json.dumps(results.collect(study, "")))["entrants"]["mixture_of_tokens"]
    assert entrant["candidate"] == "mixture_of_tokens-scale_1"
    assert entrant["config"]["model"]["feed_forward"]["controller_init_scale"] == 1.0
    assert [*entrant["tuning"]["rates"].values()] == [0.005, 0.01, 0.02]
    runs = {name: candidate["run"] for name, candidate in entrant["candidates"].items()}
    assert runs == {name: f"{name}-rate-0.01" for name in ("mixture_of_tokens", "mixture_of_tokens-scale_1")}


def test_results_have_the_fields_with_which_runs_were_trained_if_the_study_has_other_values(tmp_path, data):
    study = directory(write_study(tmp_path, data), tmp_path / "out")
    for entrant in study.study.entrants:
        workdir = finished_run(study, f"{entrant}-rate-0.01", 3.0)
        (workdir / "record.json").write_text(json.dumps({"state": "finished", "curve": [[12, 3.0]]}))
    path = tmp_path / "out" / "runs" / "mixture_of_tokens-rate-0.01" / "config.json"
    path.write_text(path.read_text().replace('"pre_activations"', '"nothing"'))
    entrants = results.collect(study, "")["entrants"]
    assert entrants["mixture_of_tokens"]["trained_with"] == {"model.feed_forward.save_for_backward": "nothing"}
    assert entrants["dense"]["trained_with"] == {}


def test_results_state_whether_sequences_are_independent_where_they_are_evaluated(tmp_path, data):
    """Expert threshold chooses along the batch in its warmup only, and by thresholds in evaluations."""
    study = directory(write_study(tmp_path, data), tmp_path / "out")
    config = study.study.entrants["dense"]
    layers = {"expert_threshold": ExpertThresholdConfig(group_size=4, num_experts=8)}
    layers["expert_choice"] = ExpertChoiceConfig(group_size=4, num_experts=4)
    for name, layer in layers.items():
        entrant = dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=layer))
        study.study = dataclasses.replace(study.study, entrants={**study.study.entrants, name: entrant})
    entrants = results.collect(study, "")["entrants"]
    expected = {"dense": True, "mixture_of_tokens": True, "expert_threshold": True, "expert_choice": False}
    assert {name: entrant["independent"] for name, entrant in entrants.items()} == expected
    assert entrants["expert_threshold"]["headline_mode"] == "trained"


def test_published_rows_are_all_evaluations_and_every_fiftieth_step(tmp_path, data):
    """With a row of every 20 steps, those of 100 and 200; of the scores, that of the study in the headline mode."""
    study = directory(write_study(tmp_path, data), tmp_path / "out")
    workdir = finished_run(study, "mixture_of_tokens-rate-0.01", 3.0)
    rows = [{"step": step, "split": "train", "loss": 4.0, "skipped": 2.0, "mfu": 0.1} for step in range(20, 221, 20)]
    with (workdir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    score = {"mode": "companions", "split": "validation[:10%]", "step": 12, "windows": 32, "group_size": 4, "loss": 2.5}
    others = [score | {"mode": "grouped", "loss": 3.0}, score | {"windows": 100, "loss": 2.6}]
    (workdir / "modes.json").write_text(json.dumps([*others, score]))
    record = {"state": "finished", "curve": [[12, 2.5]], "machine": {"python": "3", "date": "today"}}
    (workdir / "record.json").write_text(json.dumps(record | {"fingerprints": {"train": "a"}}))
    other = Path(execute.workdir_of(study.folder, "dense-rate-0.01"))
    other.mkdir()
    (other / "record.json").write_text(
        json.dumps({"machine": {"python": "2", "date": "today"}, "fingerprints": {"train": "b"}, "state": "begun"})
    )
    content = results.write(study, "")
    published = [
        json.loads(line) for line in gzip.decompress((study.folder / "rows.jsonl.gz").read_bytes()).splitlines()
    ]
    assert {row["run"] for row in published} == {"mixture_of_tokens-rate-0.01"} and "mfu" not in published[-1]
    assert [row["step"] for row in published if row["split"] == "train"] == [100, 200]
    evaluations = [(row["step"], row.get("mode"), row["loss"]) for row in published if row["split"] == "validation"]
    assert evaluations == [(12, None, 3.0), (12, "companions", 2.5)]
    by_name = {run["name"]: run for run in content["runs"]}
    rows = [
        by_name[f"{name}-rate-{rate}"] for name, rate in (("dense", 0.01), ("mixture_of_tokens", 0.01), ("dense", 0.02))
    ]
    assert [(row["machine"], row["same_text"], row["skipped_steps"]) for row in rows] == [
        (0, True, None),
        (1, False, 2),
        (None, None, None),
    ]


def test_outcomes_are_read_from_the_files_of_runs(tmp_path, data):
    study = directory(write_study(tmp_path, data), tmp_path / "out")
    for rate, loss in (("0.005", 3.0), ("0.01", None), ("0.02", 2.0)):
        finished_run(study, f"dense-rate-{rate}", loss)
    diverged = finished_run(study, "mixture_of_tokens-rate-0.01", 1.0)
    (diverged / "result.json").unlink()
    assert study.plan().run("mixture_of_tokens-rate-0.01").name not in study.losses()
    (diverged / "record.json").write_text(json.dumps({"state": "diverged"}))
    plan = study.plan()
    assert study.losses() == {
        "dense-rate-0.005": 3.0,
        "dense-rate-0.01": float("inf"),
        "dense-rate-0.02": 2.0,
        "mixture_of_tokens-rate-0.01": float("inf"),
    }
    assert plan.tunings["dense"].chosen == 0.02 and plan.run("dense-seed-1").config is not None


def test_a_run_that_no_study_has_evaluated_is_refused(tmp_path, data):
    study = directory(write_study(tmp_path, data), tmp_path / "out")
    workdir = finished_run(study, "mixture_of_tokens-rate-0.01", 3.0)
    with pytest.raises(
        UserError, match=f"{workdir}: has ended without a last evaluation in the mode companions; try mv"
    ):
        study.plan()


def test_a_run_that_diverges_is_recorded_and_the_study_resumes_with_the_next(monkeypatch, tmp_path, data):
    study = directory(write_study(tmp_path, data), tmp_path / "out")
    called: list[str] = []

    def train(config, workdir, hooks, quiet):
        called.append(workdir.name)
        if len(called) == 3:
            raise KeyboardInterrupt
        workdir.mkdir(parents=True)
        raise DivergedError("is not finite")

    monkeypatch.setattr(execute, "train", train)
    with pytest.raises(KeyboardInterrupt):
        list(execute.train_study(study, None))
    assert called == ["dense-rate-0.005", "dense-rate-0.01", "dense-rate-0.02"]
    again = directory(write_study(tmp_path, data), tmp_path / "out")
    assert again.plan() and again.losses() == dict.fromkeys(called[:2], float("inf"))


def test_runs_of_a_study_that_was_changed_are_named(capsys, tmp_path, data):
    study, out = write_study(tmp_path, data), tmp_path / "out"
    current = directory(study, out)
    current.claim()
    names = ["dense-rate-0.005", "dense-rate-0.01"]
    for name in names:
        finished_run(current, name, 3.0)
    changed = Path(study).read_text().replace("num_blocks=1", "num_blocks=3")
    Path(study).write_text(changed)
    code, lines = refusal(capsys, study, "--workdir", str(out), "--dry-run")
    assert code == 2 and [line.split(":")[1].strip() for line in lines] == names
    assert "is stale: model.num_blocks was 1, now 3" in lines[0] and f"mv {out}/runs/{names[0]} " in lines[0]


def test_a_run_is_not_resumed_on_another_machine(tmp_path, data):
    study = directory(write_study(tmp_path, data), tmp_path / "out")
    run = study.plan().run("dense-rate-0.01")
    workdir = execute.workdir_of(study.folder, run.name)
    workdir.mkdir(parents=True)
    (workdir / "record.json").write_text(json.dumps({"state": "begun", "machine": {"python": "2.7"}}))
    with pytest.raises(UserError, match=r"dense-rate-0.01: was begun on another machine .*python 2.7, now 3"):
        execute.train_run(study, run, lambda steps: None)


def checkpoint(workdir: Path) -> None:
    """Write the files that mark a checkpoint as committed and complete."""
    (workdir / "checkpoints" / "12").mkdir(parents=True)
    for name in ("_CHECKPOINT_METADATA", manifest.FILE):
        (workdir / "checkpoints" / "12" / name).write_text("{}")


def test_times_are_of_runs_with_a_checkpoint_and_of_the_configs_with_which_they_were_trained(tmp_path, data):
    study = directory(write_study(tmp_path, data), tmp_path / "out")
    study.study = dataclasses.replace(study.study, seeds=(1, 2))
    lines: list[str] = []
    times.measure(study, lines.append)  # no run has finished: nothing to time
    assert not (study.folder / "times.json").exists() and lines == []
    for entrant in ("dense", "mixture_of_tokens"):
        for rate in (0.005, 0.01, 0.02):
            record = {"state": "finished", "curve": [[12, 2.0]]}
            workdir = finished_run(study, f"{entrant}-rate-{rate:g}", 2.0)
            (workdir / "record.json").write_text(json.dumps(record))
        for seed in (1, 2):
            workdir = finished_run(study, f"{entrant}-seed-{seed}", 2.0)
            (workdir / "record.json").write_text(json.dumps(record | {"config_hash": f"{entrant} {seed}"}))
    times.measure(study, lines.append)
    assert not (study.folder / "times.json").exists()
    assert [line.split(";")[0] for line in lines] == [
        "times: dense is not timed: no checkpoint",
        "times: mixture_of_tokens is not timed: no checkpoint",
    ]
    runs = study.folder / "runs"
    checkpoint(Path(runs / "dense-seed-2"))
    assert times.timed_runs(study, 0) == times.timed_runs(study, 1) == {"dense": "dense-seed-2"}
    assert times.read_times(study) is None
    timed = {"dense": "dense-seed-2"}
    row = {"seconds": [0.1], "compiler_flops": None, "temporaries": 1}
    sitting = {"runs": timed, "identities": times._identities(study, timed), "rows": {"dense": row}}
    about = dict.fromkeys(("start", "machine", "commit", "share_of_others", "load_averages"))
    (study.folder / "times.json").write_text(json.dumps({"sittings": [sitting | about] * 2}))
    content = times.read_times(study)
    assert content["rows"] == {"dense": row | {"seconds": [[0.1], [0.1]]}} and len(content["sittings"]) == 2
    shutil.rmtree(runs / "dense-seed-2" / "checkpoints")  # as in a published archive: the times are still valid
    assert times.read_times(study) == content
    checkpoint(Path(runs / "mixture_of_tokens-seed-1"))  # can be timed, and has not been
    assert times.read_times(study) is None
    shutil.rmtree(runs / "mixture_of_tokens-seed-1" / "checkpoints")
    record = {"state": "finished", "curve": [[12, 2.0]], "config_hash": "of another layer"}
    (runs / "dense-seed-2" / "record.json").write_text(json.dumps(record))
    assert times.read_times(study) is None
    checkpoint(Path(runs / "dense-seed-1"))
    checkpoint(Path(runs / "dense-seed-2"))
    assert [times.timed_runs(study, i)["dense"][-1] for i in range(4)] == ["1", "2", "1", "2"]


def test_each_call_adds_a_sitting_of_the_same_machine(tmp_path, data, monkeypatch):
    study = directory(write_study(tmp_path, data), tmp_path / "out")
    program = types.SimpleNamespace(compiled=None, temporaries=8, step=lambda: lambda: None)
    plan = types.SimpleNamespace(run=lambda name: name, configs=lambda run: [None])
    loaded: list[str] = []

    def load(workdir, config):
        loaded.append(workdir.name)
        return program

    monkeypatch.setattr(study, "plan", lambda: plan)
    monkeypatch.setattr(times, "timed_runs", lambda directory, sitting: {"dense": f"dense-seed-{sitting}"})
    monkeypatch.setattr(times, "_finished", lambda directory, entrant: [])
    monkeypatch.setattr(times, "_program", load)
    monkeypatch.setattr(times, "_compiler_flops", lambda compiled: 7.0)
    study.folder.mkdir(parents=True)
    for number in (1, 2):
        times.measure(study, lambda line: None)
        content = times.read_times(study)
        assert [sitting["runs"] for sitting in content["sittings"]] == [
            {"dense": f"dense-seed-{i}"} for i in range(number)
        ]
        row = content["rows"]["dense"]
        assert [len(seconds) for seconds in row["seconds"]] == [content["rounds"]] * number
        assert row["compiler_flops"] == 7.0 and row["temporaries"] == 8
    assert loaded == ["dense-seed-0", "dense-seed-1"]
    stored = json.loads((study.folder / "times.json").read_text())
    stored["sittings"][-1]["machine"]["processor"] = "an abacus"
    (study.folder / "times.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"times.json: has sittings of another machine \(processor an abacus, now "):
        times.measure(study, lambda line: None)


def test_the_step_is_that_of_the_study_file_where_a_field_may_be_changed(tmp_path, data, monkeypatch):
    """The arrays that are saved for the backward pass, after the training."""
    study = directory(write_study(tmp_path, data), tmp_path / "out").study
    trained = study.entrants["mixture_of_tokens"]
    assert trained.model.feed_forward.save_for_backward == "pre_activations"
    model = dataclasses.replace(
        trained.model, feed_forward=dataclasses.replace(trained.model.feed_forward, save_for_backward="all")
    )
    monkeypatch.setattr(times, "load_run_config", lambda workdir: trained)
    monkeypatch.setattr(times, "load_training", lambda workdir, mesh: (trained, "state", 4))
    monkeypatch.setattr(times, "_batch", lambda config, mesh, next_example: (config, next_example))
    monkeypatch.setattr(times, "TrainingProgram", lambda config, state, batch: (config, state, batch))
    now = dataclasses.replace(trained, model=model)
    assert identity_hash(now) == identity_hash(trained)
    program = times._program(tmp_path, now)
    assert program == (now, "state", (trained, 4))


# --- whole studies ----------------------------------------------------------------------------------------------------


def command(study: str, out: Path) -> list[str]:
    return [sys.executable, "-m", "mot_jax", "bench", "train", study, "--workdir", str(out)]


def results_without_times(out: Path) -> dict:
    content = json.loads((out / "results.json").read_text())
    assert content["times"]["rows"].keys() == {"dense", "mixture_of_tokens"}
    assert len(content["times"]["sittings"]) == 1
    return study_kills.results(out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> tuple[str, Path]:
    """A study that was trained without a disturbance; tests must not change it."""
    folder = tmp_path_factory.mktemp("study")
    study, out = write_study(folder, data, ALTERNATIVES), folder / "out"
    subprocess.run(command(study, out), check=True, capture_output=True)
    return study, out


@pytest.mark.slow
def test_a_study_is_trained_and_reported(trained, capsys, tmp_path):
    study, out = trained
    content = results_without_times(out)
    runs = {run["name"]: run for run in content["runs"]}
    assert {run["state"] for run in runs.values()} == {"finished"} and 9 <= len(runs) <= 10
    entrant, names = content["entrants"]["mixture_of_tokens"], ["mixture_of_tokens", "mixture_of_tokens-scale_1"]
    chosen = min(names, key=lambda name: runs[f"{name}-rate-0.01"]["loss"])
    assert entrant["candidate"] == chosen
    assert entrant["tuning"]["rates"] == {f"{chosen}-rate-{rate}": rate for rate in (0.005, 0.01, 0.02)}
    trained_layer = json.loads((out / "runs/mixture_of_tokens-seed-1/config.json").read_text())["model"]["feed_forward"]
    assert trained_layer == entrant["candidates"][chosen]["config"]["model"]["feed_forward"]
    mot = runs["mixture_of_tokens-seed-1"]
    assert [step for step, _ in mot["curve"]] == [step for step, _ in mot["trained_curve"]] == [6, 12]
    assert all(a[1] != b[1] for a, b in zip(mot["curve"], mot["trained_curve"], strict=True))
    assert runs["dense-seed-1"]["curve"] == runs["dense-seed-1"]["trained_curve"]
    assert 32 <= content["data"]["validation_windows"] < 36  # in every evaluation, whole groups of 4
    scores = strict_json.load(epath.Path(out / "runs/mixture_of_tokens-seed-1/modes.json"), list, "")
    assert {score["windows"] for score in scores} == {content["data"]["validation_windows"]}
    assert 0 < mot["gradient_variation"] < 1
    assert len({run["config_hash"] for run in runs.values()}) == len(runs)
    assert "<svg" in (out / "report.html").read_text() and "How to refute this" in (out / "report.md").read_text()
    before = (out / "report.html").read_bytes()
    cli.main(["bench", "train", study, "--workdir", str(out)])
    assert (out / "report.html").read_bytes() == before  # nothing was trained or timed again
    shutil.copy(out / "results.json", tmp_path)
    cli.main(["bench", "report", str(tmp_path)])
    assert (tmp_path / "report.html").read_bytes() == before


@pytest.mark.slow
def test_a_study_that_is_killed_ends_with_the_same_results(trained, tmp_path):
    """Of a finished study, a candidate's run and some of the seeds are removed, and trained again between kills.

    One of them is then trained by two processes at once, of which the second one waits.
    """
    study, undisturbed = trained
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    removed = ["mixture_of_tokens-scale_1-rate-0.01", "dense-seed-1", "mixture_of_tokens-seed-1"]
    for name in removed:
        shutil.rmtree(out / "runs" / name)
    for name in ("results.json", "times.json"):
        (out / name).unlink()
    for file in (f"{removed[0]}/checkpoints/4", f"{removed[1]}/metrics.jsonl", f"{removed[2]}/config.json"):
        process = subprocess.Popen(command(study, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (out / "runs" / file).exists():
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()[1]
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    run, null = [*command(study, out), "--run", removed[-1]], subprocess.DEVNULL
    both = [subprocess.Popen(run, stdout=null, stderr=null) for _ in range(2)]
    assert 0 in [process.wait(120) for process in both]
    subprocess.run(command(study, out), check=True, capture_output=True)
    assert results_without_times(out) == results_without_times(undisturbed)
