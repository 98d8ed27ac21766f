"""The command line: arguments, outputs and errors."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mot_jax import cli, interop, training
from mot_jax.config import Config, leaves, load_config, to_json
from mot_jax.data import tokenizers
from mot_jax.errors import RetryableError, UserError
from mot_jax.runs import metrics, restore

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = str(CONFIGS / "demo.py")


def fails(capsys, *arguments: str) -> list[str]:
    """The lines of a command that exits with 2 and prints nothing else."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.splitlines()


@pytest.fixture
def started(monkeypatch) -> list[tuple[Config, str]]:
    """The arguments with which `mot train` calls the training loop."""
    calls: list[tuple[Config, str]] = []
    monkeypatch.setattr(training, "train", lambda config, workdir, *_: calls.append((config, str(workdir))))
    return calls


def test_flags_change_fields(started):
    flags = ["--training.steps", "7", "--training.log-every=3", "--model.feed-forward.num-experts", "64"]
    cli.main(
        [
            "train",
            DEMO,
            "--workdir",
            "/tmp/somewhere",
            *flags,
            "--model.no-final-norm",
            "--data.shuffle-group-size",
            "None",
        ]
    )
    ((config, workdir),) = started
    assert workdir == "/tmp/somewhere"
    assert (config.training.steps, config.training.log_every, config.model.feed_forward.num_experts) == (7, 3, 64)
    assert config.model.final_norm is False and config.data.shuffle_group_size is None


@pytest.mark.parametrize("config", ["real/foo", "real/foo/config.json"])
def test_training_the_config_of_a_run_resumes_this_run(started, monkeypatch, tmp_path, config):
    (run := tmp_path / "real" / "foo").mkdir(parents=True)
    (run / "config.json").write_text(to_json(load_config(DEMO)))
    monkeypatch.chdir(tmp_path)
    cli.main(["train", config, "--training.steps", "2000"])
    cli.main(["train", config, "--workdir", "other"])
    (longer, workdir), (same, other) = started
    assert (workdir, longer.training.steps) == ("real/foo", 2000)
    assert (other, same) == ("other", load_config(DEMO))


def test_without_a_config_it_is_the_demo(started, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    monkeypatch.setattr(cli.sys, "argv", ["train.py", "--training.steps", "5"])
    cli.train()
    ((config, workdir),) = started
    assert workdir == "runs/demo"
    assert config == dataclasses.replace(
        load_config(DEMO), training=dataclasses.replace(load_config(DEMO).training, steps=5)
    )


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (["--model.d-modle", "3"], ["error: --model.d-modle: no such flag; did you mean '--model.d-model'?"]),
        (["--trainng.steps=3"], ["error: --trainng.steps=3: no such flag; did you mean '--training.steps'?"]),
        (["--workdri", "x"], ["error: --workdri: no such flag; did you mean '--workdir'?"]),
        (["--training.steps", "many"], ["error: training.steps = 'many': must be int; here it is"]),
        (
            ["--model.remat", "all"],
            ["error: model.remat = 'all': must be 'none' or 'attention' or 'blocks'; here it is"],
        ),
        (
            ["--training.steps", "many", "--model.d-model", "x"],
            ["error: training.steps = 'many'", "error: model.d_model = 'x'"],
        ),
        (["--training.batch-size", "33"], ["error: training.batch_size = 33: must be a multiple of group size 32"]),
        (
            ["--training.batch-size", "32", "--training.gradient_accumulation_steps", "2"],
            ["error: training.batch_size = 32: must be a multiple of group size 32 x accumulation 2 = 64; try 64"],
        ),
        (
            ["--model.feed-forward.expert-dim", "100", "--model.feed-forward.flop-matched"],
            ["error: model.feed_forward.expert_dim = 100: breaks the rule num_experts x expert_dim"],
        ),
        (
            ["--training.steps", "0", "--model.num-heads", "7"],
            ["error: training.steps = 0", "error: model.num_heads = 7"],
        ),
        (["stray"], ["error: stray: not understood"]),
    ],
)
def test_every_mistake_on_the_command_line_is_one_line(capsys, flags, lines):
    found = fails(capsys, "train", DEMO, *flags)
    assert len(found) == len(lines)
    for line, start in zip(found, lines, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def get_config(:\n", ", line 1: SyntaxError"),
        ("x = 1\nimport nowhere_to_be_found\n", ", line 2: ModuleNotFoundError: No module named"),
        ("x = 1\n", ": must define get_config() -> Config"),
        ("def get_config():\n    return 5\n", ": get_config() must return a mot_jax Config, and returned 5"),
        (
            "from mot_jax.config import ModelConfig\n\ndef get_config():\n    return ModelConfig(d_modle=3)\n",
            ", line 4: ModelConfig has no field 'd_modle'; did you mean 'd_model'?",
        ),
        (
            "from mot_jax.config import *\nget_config = lambda: Config(training=TrainingConfig(steps='9'))\n",
            "training.steps = '9': must be int; try 1000",
        ),
    ],
)
def test_a_broken_config_file_is_one_line(capsys, tmp_path, text, line):
    (tmp_path / "mine.py").write_text(text)
    (found,) = fails(capsys, "describe", str(tmp_path / "mine.py"))
    assert line in found


def test_a_missing_config_file_names_the_nearest(capsys):
    (line,) = fails(capsys, "train", str(CONFIGS / "dmo.py"))
    assert f"no such file; did you mean '{CONFIGS / 'demo.py'}'?" in line
    (line,) = fails(capsys, "describe")
    assert line == "error: CONFIG is missing; try mot describe configs/demo.py"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("a: No space left on device [x]")]
)
def test_a_full_disk_is_one_line(capsys, monkeypatch, error):
    def full(*_):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("while saving") from cause

    monkeypatch.setattr(training, "train", full)
    (line,) = fails(capsys, "train", DEMO)
    assert line.startswith("error: no space left on the disk")


def test_other_errors_keep_their_traceback(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(training, "train", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", DEMO])


def test_describe_prints_and_writes(capsys, tmp_path):
    cli.main(["describe", DEMO, "--json", str(tmp_path / "demo.json")])
    text = capsys.readouterr().out
    assert "Parameters" in text and "mixing" in text
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["sizes"]["group_size_G"] == 32
    total = sum(written["parameters"].values())
    assert f"{total:,}" in text


@pytest.mark.parametrize("position", [0, 2, 4])
def test_the_config_may_stand_at_any_place(started, position):
    arguments = ["--training.steps", "7", "--workdir", "somewhere"]
    cli.main(["train", *arguments[:position], DEMO, *arguments[position:], "--model.no-final-norm"])
    ((config, workdir),) = started
    assert (config.training.steps, config.model.d_model, workdir) == (7, load_config(DEMO).model.d_model, "somewhere")


BENCHES = ("layers", "step", "input", "decoding", "accelerator", "train", "report")
HELPED = [[name] for name in cli.COMMANDS] + [["bench", name] for name in BENCHES]
HELPED += [["data", name] for name in ("build", "inspect", "train-tokenizer")]


def helps(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert exit_.value.code == 0 and not err
    return out


def texts_of_flags(page: str) -> dict[str, str]:
    """The text of each argument of a help page; a flag with its metavar is one key."""
    texts: dict[str, list[str]] = {}
    name = ""
    page = re.sub(r",\s*[│|]?\n[│| ]\s*(?=\w+[,}]|--)", ",", page)  # choices or names in two lines
    for line in re.findall(r"^[│| ] (.*?) *[│|]?$", page, re.M):
        if argument := re.match(r"(-{1,2}[a-z].*?|[A-Z]+)(?:  +(.*))?$", line):
            name, text = argument.groups()
            texts[name] = [text or ""]
        elif name and line.startswith("  "):
            texts[name].append(line.strip())
        else:
            name = ""  # the description of a group
    return {name: " ".join(lines).strip() for name, lines in texts.items()}


@pytest.mark.parametrize("command", HELPED, ids=" ".join)
def test_help_has_a_sentence_for_every_flag_without_a_config(capsys, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    page = helps(capsys, *command, "--help")
    assert helps(capsys, *command, "-h") == page and "--debug" in page
    texts = texts_of_flags(page)
    texts.pop("-h, --help", None)
    if command not in (["data"], ["bench"]):
        assert len(texts) >= 2
    for flag, text in texts.items():
        sentence = re.sub(r" \((default: .*|required|repeatable)\)$", "", text)
        assert re.fullmatch(r"[A-Z`].*\.", sentence) and sentence.count(" ") > 1, f"{flag}: {text}"


def test_help_of_training_has_every_field(capsys):
    texts = texts_of_flags(helps(capsys, "train", "--help"))
    flags = {re.split("[ ,]", flag)[0] for flag in texts}
    fields = {f"--{name.replace('_', '-')}" for name, *_ in leaves(load_config(DEMO))}
    assert fields <= flags


def test_help_and_mistakes_do_not_import_jax(tmp_path):
    """They end within the time of a few imports."""
    script = """
import sys
from mot_jax import cli
for line in sys.stdin:
    try:
        cli.main(line.split())
    except SystemExit:
        pass
    assert "jax" not in sys.modules, line
"""
    commands = [*([*command, "-h"] for command in HELPED), [], ["trian"], ["data", "biuld"], ["bench"], ["status", "."]]
    result = subprocess.run(
        [sys.executable, "-c", script],
        input="\n".join(map(" ".join, commands)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", DEMO, "--workdir", ""],
        ["transition", "runs/x", "--to", "token_choice", "--steps", "1", "--output", ""],
        ["describe", DEMO, "--json="],
        ["data", "inspect", "mine", "--directory", ""],
        ["data", "train-tokenizer", "mine", "--output", ""],
        ["bench", "layers", "--plot", ""],
        ["bench", "accelerator", "--out", ""],
        ["export", "runs/x", "--output", ""],
    ],
    ids=" ".join,
)
def test_an_empty_path_is_refused(capsys, monkeypatch, arguments):
    (line,) = fails(capsys, *arguments)
    assert re.match(r"error: --(workdir|output|json|directory|plot|out) = '': must be a path; try --", line)


def test_a_corpus_that_does_not_exist_touches_nothing(capsys, tmp_path):
    workdir = tmp_path / "run"
    flags = ["--data.corpus", "python_sauce/stdlib", "--data.directory", str(tmp_path / "data")]
    (line,) = fails(capsys, "train", DEMO, "--workdir", str(workdir), "--mesh.data", "1", *flags)
    assert line == "error: data.corpus = 'python_sauce/stdlib': no such corpus; did you mean 'python_source/stdlib'?"
    assert not workdir.exists()


def test_curves_of_runs_become_one_picture(capsys, tmp_path, monkeypatch):
    for name in ("mot", "dense", "a/base", "b/base"):
        (tmp_path / name).mkdir(parents=True)
        rows = [{"step": i, "split": split, "loss": 3.0 / i} for i in (1, 2) for split in ("train", "validation")]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = tmp_path / "both.png"
    labels, plot = [], metrics.plot_curves
    monkeypatch.setattr(metrics, "plot_curves", lambda runs: labels.extend(runs) or plot(runs))
    runs = [str(tmp_path / name) for name in ("mot", "a/base", "dense", "b/base", "mot")]
    cli.main(["curves", *runs, "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG") and labels == ["mot", runs[1], "dense", runs[3]]
    capsys.readouterr()
    (line,) = fails(capsys, "curves", str(tmp_path / "nothing"))
    assert "holds no rows of metrics" in line


def test_a_config_tells_all_its_faults(capsys):
    lines = fails(capsys, "describe", DEMO, "--training.steps", "0", "--training.seed", "-1", "--model.d-ff", "0")
    assert [line.split()[1] for line in lines] == [
        "model.d_ff",
        "training.steps",
        "training.seed",
        "model.feed_forward.shared_expert_dim",
    ]


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["train", "--workdir"], "error: --workdir: a value is missing; try --workdir runs/mine"),
        (
            ["describe", DEMO, "--json", "/no/such/place/x.json"],
            "error: --json = /no/such/place/x.json: cannot be written",
        ),
        (["curves"], "error: WORKDIR is missing; try mot curves runs/demo"),
        (["inspect"], "error: WORKDIR is missing; try mot inspect runs/demo"),
        (["inspect", "a", "--gruop", "1"], "error: --gruop: no such flag; did you mean '--group'?"),
        (["inspect", "a", "--group", "x"], "error: --group = 'x': must be a whole number; try 0"),
        (["inspect", "a", "--group"], "error: --group: a value is missing; try --group 0"),
        (["export", "a"], "error: --output is missing; try mot export runs/demo --output runs/mine"),
        (
            ["export", "a", "--output", "b", "--overwrite=1"],
            "error: --overwrite = '1': takes no value; try --overwrite",
        ),
        (["inspect", "/no/such/run"], "error: workdir = /no/such/run: no such directory; try the --workdir of"),
        (["trian"], "error: trian: no such command; did you mean 'train'?"),
        (["bench", "layer"], "error: layer: no such command; did you mean 'layers'?"),
        (["bench", "layers", "--topology", ""], "error: --topology = '': must not be empty; try --topology"),
        (["bench", "step", DEMO, "--against="], "error: --against = '': must not be empty; try --against configs"),
    ],
)
def test_mistakes_beside_the_config_are_one_line_too(capsys, arguments, start):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(start)


def test_data_builds_inspects_and_trains_a_tokenizer(capsys, tmp_path, monkeypatch):
    directory = ["--directory", str(tmp_path / "data")]
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}" for i in range(50)))
    build = ["data", "build", "mine", str(tmp_path / "*.txt"), "--documents", "line", "--workers", "1", *directory]
    cli.main(build)
    out, err = capsys.readouterr()
    assert "mine: 0.0 MB of text in" in out and "train: " in out and not err
    cli.main(["data", "inspect", "mine", "--tokenizer", "bytes", "-n", "1", *directory])
    assert "1.00 bytes per token" in (out := capsys.readouterr().out) and "a.txt@0 (6 bytes)\n  line 0\n" in out

    def train_tokenizer(texts, vocab_size: int, kind: str) -> bytes:
        return f"{kind} {vocab_size} {len(list(texts))}".encode()

    monkeypatch.setattr(tokenizers, "train_tokenizer", train_tokenizer, raising=False)
    output = tmp_path / "tokenizer.json"
    train = ["data", "train-tokenizer", "mine", "--split", "train[:10]", "--vocab-size", "300", "--output", str(output)]
    cli.main([*train, *directory])
    assert output.read_text() == "bpe 300 10" and "trained on" in capsys.readouterr().out
    (line,) = fails(capsys, *train, *directory)
    assert "exists, and is not overwritten" in line
    (line,) = fails(capsys, *build, "--validation", "0.5")
    assert line.startswith("error: NAME = 'mine': ") and line.endswith("try another name, or delete that directory")


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        ([], "error: COMMAND is missing; try mot data build, or one of build, inspect, train-tokenizer"),
        (["buidl"], "error: buidl: no such command; did you mean 'build'?"),
        (["build", "mine"], "error: FILE is missing; try mot data build NAME FILE"),
        (["build", "mine", "/no/such/*.txt"], "error: FILE = '/no/such/*.txt': no such file"),
        (
            ["build", "mine", "x.txt", "--documents", "word"],
            "error: --documents = 'word': must be 'file' or 'line' or 'paragraph'",
        ),
        (
            ["build", "mine", "x.txt", "--workers", "0"],
            "error: --workers = '0': must be a whole number, at least 1; try 32",
        ),
        (
            ["train-tokenizer", "mine"],
            "error: --output is missing; try mot data train-tokenizer NAME --output FILE",
        ),
        (
            ["train-tokenizer", "mine", "--output", "t.txt"],
            "error: --output = 't.txt': must end in .json for a tokenizer of kind bpe; try 't.json'",
        ),
        (
            ["train-tokenizer", "mine", "--kind", "sentencepiece", "--output", "a/t.json"],
            "error: --output = 'a/t.json': must end in .model for a tokenizer of kind sentencepiece; try 'a/t.model'",
        ),
    ],
)
def test_mistakes_of_data_are_one_line(capsys, arguments, start):
    (line,) = fails(capsys, "data", *arguments)
    assert line.startswith(start)


@pytest.fixture
def a_run(monkeypatch):
    """Queries about runs/x use the demo's config."""
    monkeypatch.setattr(restore, "load_run_config", lambda workdir: load_config(DEMO))


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        ([], "error: --tasks is missing; try mot lm-eval runs/x --tasks arc_easy"),
        (["--tasks", "x", "--limit", "0"], "error: --limit = '0': must be a whole number, at least 1"),
        (["--tasks", "x", "--num-fewshot", "-1"], "error: --num-fewshot = '-1': must be a whole number, at least 0"),
        (["--tasks", "x", "--include-path", "/no/such"], "error: --include-path = /no/such: must be a directory"),
        (["--tasks", "x"], "error: lm_eval is not installed; try pip install lm-eval"),
    ],
)
def test_mistakes_of_lm_eval_are_one_line(capsys, monkeypatch, a_run, arguments, start):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mot_jax.interop.lm_eval", raising=False)
    monkeypatch.delattr(interop, "lm_eval", raising=False)
    (line,) = fails(capsys, "lm-eval", "runs/x", *arguments)
    assert line.startswith(start)


@pytest.mark.parametrize(("error", "code"), [(UserError("one", "two"), 2), (RetryableError("one", "two"), 75)])
def test_user_and_retryable_errors_have_exit_codes_of_their_own(capsys, monkeypatch, error, code):
    assert not issubclass(RetryableError, UserError) and not issubclass(UserError, RetryableError)

    def failing(*_):
        raise error

    monkeypatch.setattr(training, "train", failing)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", DEMO])
    assert exit_.value.code == code
    assert capsys.readouterr().err.splitlines() == ["error: one", "error: two"]


# --- outputs ----------------------------------------------------------------------------------------------------------


def files_of_an_output(folder: Path) -> dict[str, list[str]]:
    """Commands by the file that their output would replace; all files exist but the last two."""
    for name in ("prompts.txt", "texts.txt", "run/config.json", "run/modes.json", "run/checkpoints/1/a"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "demo.py").write_text(Path(DEMO).read_text())
    (folder / "hard.json").hardlink_to(folder / "demo.py")
    (folder / "hard_modes.png").hardlink_to(folder / "run" / "modes.json")
    (folder / "soft.json").symlink_to(folder / "prompts.txt")
    (folder / "run" / "config.json").write_text(to_json(Config()))
    (folder / "link").symlink_to(folder)
    return {
        "demo.py": ["describe", "demo.py:dense", "--json", "run/../demo.py"],
        "hard.json": ["describe", "demo.py", "--json", "hard.json"],
        "soft.json": ["generate", "run", "--prompts", "prompts.txt", "--json", "soft.json"],
        "prompts.txt": ["generate", "run", "--prompts", "prompts.txt", "--output", "prompts.txt"],
        "texts.txt": ["fill", "run", "--texts", "texts.txt", "--json", "texts.txt"],
        "run/config.json": ["evaluate", "run", "--json", "run/config.json"],
        "run/checkpoints/1/a": ["curves", "run", "--output", "run/checkpoints/1/a"],
        "run/result.json": ["evaluate", "run", "--json", "link/run/result.json"],
        "run/modes.json": ["curves", "run", "--output", "hard_modes.png"],
        "new.png": ["bench", "layers", "--json", "new.png", "--plot", "link/new.png"],
    }


def test_no_output_replaces_an_input(capsys, tmp_path, monkeypatch):
    """Neither by a link, nor a file of a run, nor another output; before any work."""
    commands = files_of_an_output(tmp_path)
    monkeypatch.chdir(tmp_path)
    new = {"run/result.json", "new.png"}
    before = {name: (tmp_path / name).read_bytes() for name in commands if name not in new}
    for name, command in commands.items():
        (line,) = fails(capsys, *command)[:1]
        assert re.fullmatch(
            r"error: --\w+ = \S+: would replace a file of (CONFIG|WORKDIR|--\w+); try \w+\.\w+", line
        ), name
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    assert not any((tmp_path / name).exists() for name in new)


def test_a_result_in_a_runs_directory_is_replaced_by_that_of_the_same_command(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(to_json(Config()))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0}\n')
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        cli.main(["curves", "."])
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "curves.png").write_bytes(b"")
