"""`mot generate --prompts`: bad lines, batches, files that are continued, refused or interrupted."""

import bz2
import contextlib
import errno
import gzip
import json
import os
import shutil
import signal
import tempfile
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import processes
import pytest
from etils.epath import backend
from object_store import open_bucket
from test_language_model import error_of, mot, save

import mot_jax
from mot_jax.errors import RetryableError, UserError
from mot_jax.inference import answers as answers_module
from mot_jax.inference.generate import prefill
from mot_jax.inference.prompt_files import PromptLine, open_prompts

MIXED = [
    b'{"prompt": "import os", "id": "a"}',
    b"not json",
    b'{"prompt": ""}',
    b'{"prompt": 5, "id": [3]}',
    b'{"x": 1}',
    b'{"prompt": "' + b"x" * 17 + b'"}',
    b'{"text": "class"}',
    b"",
    b'"def f"',
    b'{"prompt": "caf\xe9"}',
    b'{"prompt": "\\ud800"}',
    b"[1]",
    b'{"prompt": "ok", "id": 7}',
    b'{"prompt": "' + b"x" * 17000 + b'"}',
]
FAULTS = {
    2: "is not valid JSON",
    3: "is empty; try 'def '",
    4: "has no text in the field 'prompt'",
    5: "has no field 'prompt'; its fields: 'x'",
    6: "has 17 tokens, and the context 16; try its end",
    10: "is not UTF-8 at byte 16",
    11: "has invalid characters",
    12: "is neither an object with the field 'prompt' nor a text",
    14: "has 17,000 characters, and the context 16 tokens; try its end",
}
PROMPTS = {1: "import os", 7: "class", 9: "def f", 13: "ok"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    save(path)
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_bad_lines_are_reported_by_number_and_the_others_are_answered(workdir, tmp_path, capsys):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_bytes(b"\n".join(MIXED))
    mot("generate", workdir, "--prompts", prompts, "--output", output, "--tokens", 4, "--batch-size", 2)
    rows = {row["line"]: row for row in rows_of(output)}
    *_, last = lines = capsys.readouterr().err.splitlines()
    assert last == "4 answers, 9 lines failed"
    assert rows.keys() == FAULTS.keys() | PROMPTS.keys()
    for number, words in FAULTS.items():
        assert rows[number]["error"].startswith(words)
        assert f"line {number} of {prompts}: {rows[number]['error']}" in lines
    model = mot_jax.load(workdir)
    for number, prompt in PROMPTS.items():
        row = rows[number]
        (alone,) = model.generate([prompt], max_tokens=4, numbers=[number - 1], batch_size=2)
        assert (row["prompt"], row["text"], row["finished"]) == (prompt, alone.text, False)
        assert row["tokens"] == alone.tokens.tolist()
        np.testing.assert_allclose(row["log_probs"], alone.log_probs, rtol=1e-4)
    assert {number: row["id"] for number, row in rows.items() if "id" in row} == {1: "a", 4: [3], 13: 7}


@pytest.mark.parametrize("name, content", [
    ("prompts.txt", b"def f\r\nx = 1\n"),
    ("lines.txt", b'{"prompt": "def f"}\n{"id": 2, "text": "x = 1"}\n\n'),
    ("prompts", bz2.compress(b"def f\nx = 1\n")),
    ("prompts.jsonl.gz", gzip.compress(b'{"prompt": "def f"}\n{"prompt": "x = 1"}\n', mtime=0)),
    ("prompts.json", b'[\n {"prompt": "def f"},\n {"prompt": "x = 1"}\n]\n'),
    ("utf16.txt", "def f\nx = 1\n".encode("utf-16")),
], ids=["text", "lines", "bz2", "gzip", "array", "utf16"])  # fmt: skip
def test_prompts_are_read_by_content(workdir, tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    mot("generate", workdir, "--prompts", tmp_path / name, "--tokens", 4, "--json", tmp_path / "result.json")
    expected = mot_jax.load(workdir).generate(["def f", "x = 1"], max_tokens=4)
    texts = json.loads((tmp_path / "result.json").read_text())["texts"]
    assert [row["tokens"] for row in texts] == [c.tokens.tolist() for c in expected]
    assert "--- prompt\ndef f\n--- continued\n" in capsys.readouterr().out


def test_a_text_with_braces_is_not_json(tmp_path):
    (tmp_path / "prompts.txt").write_text('{"a": 1}\n{"prompt": "def f"}\n')
    with open_prompts(str(tmp_path / "prompts.txt")) as prompts:
        assert [line.prompt for line in prompts] == ['{"a": 1}', '{"prompt": "def f"}']


def test_a_line_without_a_prompt_among_lines_of_json_is_reported(tmp_path):
    (tmp_path / "prompts.txt").write_text('{"prompt": "a"}\n{"id": 2}\n{"id": 3, "prompt": "the cat"}\n')
    with open_prompts(str(tmp_path / "prompts.txt")) as prompts:
        lines = list(prompts)
    assert [(line.prompt, bool(line.fault)) for line in lines] == [("a", False), ("", True), ("the cat", False)]


def test_another_file_in_the_place_of_the_arguments_is_refused_and_left_as_it_is(workdir, tmp_path, capsys):
    other = tmp_path / "a.jsonl.meta.json"
    (tmp_path / "prompts.txt").write_text("a\n")
    for content in ("my notes", '{"model": 1}'):
        other.write_text(content)
        command = "generate", workdir, "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "a.jsonl"
        assert "a.jsonl.meta.json, the place of its arguments, holds another file" in error_of(capsys, *command)
        assert other.read_text() == content


@pytest.mark.parametrize("brackets", ["", "[]"], ids=["lines", "array"])
def test_ids_are_those_of_the_file(tmp_path, brackets):
    ids = ["7", "1.5", "[9007199254740993]", '"a"']
    objects = [f'{{"prompt": "x", "id": {label}, "other": {"1" * 5000}}}' for label in ids]
    text = f"[{','.join(objects)}]" if brackets else "\n".join(objects)
    (tmp_path / "prompts.json").write_text(text)
    with open_prompts(str(tmp_path / "prompts.json")) as prompts:
        assert [json.dumps(line.id) for line in prompts] == ids


@pytest.mark.parametrize("size", [16_000, 160_000], ids=["encoded", "refused by its size"])
def test_memory_does_not_grow_with_lines_that_are_too_long(workdir, size):
    model = mot_jax.load(workdir)
    lines = (PromptLine(number, "x" * size) for number in range(1, 8_000_000 // size + 1))
    tracemalloc.start()
    try:
        (errors,) = answers_module.answers(model, lines, 32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(errors) == 8_000_000 // size and peak < 2_000_000


class Answered(NamedTuple):
    """A file of 60 prompts, a command that answers them in 28 batches, and its output.

    programs: the number of programs that its prefills compiled.
    """

    arguments: list
    output: bytes
    about: str
    programs: int


@pytest.fixture(scope="module")
def many(workdir, tmp_path_factory) -> Answered:
    folder = tmp_path_factory.mktemp("many")
    rng, lines = np.random.default_rng(0), []
    for number in range(1, 61):
        lines.append(f'{{"prompt": "{"abcdefghij"[: rng.integers(1, 11)]}"}}' if number % 11 else "{")
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    arguments = ["generate", workdir, "--prompts", folder / "prompts.jsonl", "--tokens", 6, "--batch-size", 4]
    arguments += ["--mode", "grouped", "--samples", 2, "--top-k", 40]
    programs = prefill._cache_size()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers_module, "_WINDOW", 10)
        mot(*arguments, "--output", folder / "whole.jsonl")
    programs = prefill._cache_size() - programs
    about = (folder / "whole.jsonl.meta.json").read_text()
    return Answered(arguments, (folder / "whole.jsonl").read_bytes(), about, programs)


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(answers_module, "_WINDOW", 10)


def test_each_line_has_an_answer_for_each_sample_or_an_error(many):
    rows = [json.loads(line) for line in many.output.splitlines()]
    answered = sorted((row["line"], row["sample"]) for row in rows if "text" in row)
    assert answered == [(line, sample) for line in range(1, 61) if line % 11 for sample in range(2)]
    assert [row["line"] for row in rows if "error" in row] == [11, 22, 33, 44, 55]
    by_window = [(row["line"] - 1) // 20 for row in rows]  # 20 lines, two samples each, are ten batches of four
    assert by_window == sorted(by_window)


def test_few_programs_are_compiled_for_many_batches(many):
    """One for prompts of at most 8 tokens, one for those of 9 or 10."""
    assert many.programs == 2


@pytest.mark.parametrize("cut", [0, 1, 700, 5003, 9000, -1])
def test_a_cut_file_is_continued_to_the_output_of_an_uninterrupted_command(many, small_windows, tmp_path, cut):
    """Also in mode `grouped`, where an answer depends on the other sequences of its group."""
    output = tmp_path / "answers.jsonl"
    output.write_bytes(many.output[:cut])
    (tmp_path / "answers.jsonl.meta.json").write_text(many.about)
    mot(*many.arguments, "--output", output)
    assert output.read_bytes() == many.output


def test_lines_that_were_removed_are_answered_again(many, small_windows, tmp_path, capsys):
    output, lines = tmp_path / "answers.jsonl", many.output.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[50:] + lines[:30]))
    (tmp_path / "answers.jsonl.meta.json").write_text(many.about)
    mot(*many.arguments, "--output", output)
    assert sorted(output.read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert capsys.readouterr().err.endswith("\n110 answers, 5 lines failed\n")


@pytest.mark.slow
def test_a_file_of_other_arguments_is_refused_and_left_as_it_is(workdir, tmp_path, capsys):
    prompts, output, mine = (tmp_path / name for name in ("prompts.txt", "answers.jsonl", "mine.jsonl"))
    prompts.write_text("a\nb\n")
    command = ["generate", workdir, "--prompts", prompts, "--tokens", 4, "--output"]
    mot(*command, output)
    before, about = output.read_bytes(), (tmp_path / "answers.jsonl.meta.json").read_text()
    mine.write_text("text\n")
    other = tmp_path / "other"
    save(other, step=4)
    assert "with answers for seed = 0, and this command has 1;" in error_of(capsys, *command, output, "--seed", 1)
    assert "with answers for max_tokens = 4, " in error_of(capsys, *command, output, "--tokens", 3)
    assert "with answers of another model" in error_of(capsys, "generate", other, *command[2:], output)
    other = shutil.copytree(workdir, tmp_path / "companions")
    np.save(other / "companions.npy", np.load(workdir / "companions.npy") // 2)
    (other / "data.json").unlink()  # with the digest of the former
    assert "with answers of another model" in error_of(capsys, "generate", other, *command[2:], output)
    assert mot_jax.load(other, "grouped").fingerprint() == mot_jax.load(workdir, "grouped").fingerprint()
    assert "mine.jsonl.meta.json with its arguments does not" in error_of(capsys, *command, mine)
    assert "would replace a file of --prompts; try answers.jsonl" in error_of(capsys, *command, prompts)
    prompts.write_text("a\nc\n")
    assert "with answers to other prompts" in error_of(capsys, *command, output)
    prompts.write_text("a\nb\n")
    output.write_bytes(before + b"[]\n" + before)
    assert "line 3 is no answer" in error_of(capsys, *command, output)
    output.write_bytes(before)
    assert mine.read_text() == "text\n" and (tmp_path / "answers.jsonl.meta.json").read_text() == about
    mot(*command, output)
    assert output.read_bytes() == before


@pytest.mark.parametrize("content, arguments, words", [
    (b"", [], "has no prompts; try lines of JSON"),
    (b"\n\n", [], "all 2 prompts failed"),
    (b"PK\x03\x04\x14\0" * 9, [], "a zip archive"),
    (b"caf\xe9 \xfe\xff\xff\n" * 9, [], "not UTF-8"),
    (b"a", ["--prompt", "x"], "--prompt: must be left out"),
    (b"a", ["--output", "a.jsonl", "--json", "b.json"], "--json: must be left out"),
    (b"a", ["--output", "gs://bucket/a.jsonl"], "must be a local file"),
    (b"a", ["--output", "."], "cannot be written (IsADirectoryError"),
    (b"a", ["--output", "a.jsonl", "--top-p", "2"], "top_p = 2.0: must be above 0"),
])  # fmt: skip
def test_unusable_files_and_flags_are_errors_of_one_line(
    workdir, tmp_path, monkeypatch, capsys, content, arguments, words
):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_bytes(content)
    assert words in error_of(capsys, "generate", workdir, "--prompts", "prompts.txt", "--tokens", 2, *arguments)
    assert not Path("a.jsonl").exists()


def test_an_output_without_a_file_of_prompts_is_refused(workdir, capsys):
    assert "needs --prompts FILE" in error_of(capsys, "generate", workdir, "--prompt", "x", "--output", "a.jsonl")


def test_damage_in_the_middle_of_a_file_is_reported(workdir, tmp_path, capsys):
    data = gzip.compress("".join(f"prompt {i}\n" for i in range(9)).encode())
    (tmp_path / "prompts.gz").write_bytes(data[:-9])
    command = ["generate", workdir, "--prompts", tmp_path / "prompts.gz", "--tokens", 4, "--batch-size", 2]
    error = error_of(capsys, *command, "--output", tmp_path / "a.jsonl")
    *answered, failed = sorted(rows_of(tmp_path / "a.jsonl"), key=lambda row: row["line"])
    assert "the file is damaged from here on" in failed["error"] and answered[0]["prompt"] == "prompt 0"
    assert f"line {failed['line']} {failed['error']}; answers before it stay" in error


@pytest.mark.slow
def test_damage_in_an_array_ends_with_an_error_after_the_answers_before_it(workdir, tmp_path, capsys):
    prompts, output = tmp_path / "prompts.json", tmp_path / "a.jsonl"
    prompts.write_text('[{"prompt": "def f"}, {"prompt": "x = 1"}, {"prompt": oops}, {"prompt": "y"}]')
    error = error_of(capsys, "generate", workdir, "--prompts", prompts, "--tokens", 4, "--output", output)
    assert "line 3 is not valid JSON, and nothing after it can be read (no valid JSON after 2 values);" in error
    assert {row["line"]: row.get("prompt") for row in rows_of(output)} == {1: "def f", 2: "x = 1", 3: None}


def test_a_file_that_grows_is_answered_as_it_was_and_reported(many, small_windows, tmp_path, capsys, monkeypatch):
    prompts, output, write = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl", answers_module.AnswerFile.write
    shutil.copy(many.arguments[3], prompts)

    def write_and_append(self, batch):
        write(self, batch)
        with prompts.open("a") as file:
            file.write('\n{"prompt": "later"}')

    monkeypatch.setattr(answers_module.AnswerFile, "write", write_and_append)
    command = [*many.arguments[:3], prompts, *many.arguments[4:]]
    assert "the file has changed since the command began" in error_of(capsys, *command, "--output", output)
    assert output.read_bytes() == many.output


@pytest.mark.parametrize("number, code, words", [
    (errno.ENOSPC, 2, "; free some space, and the same command continues it"),
    (errno.EIO, 75, ""),
])  # fmt: skip
def test_a_disk_that_fails_is_reported_and_the_same_command_continues(
    many, small_windows, tmp_path, capsys, monkeypatch, number, code, words
):
    output, write = tmp_path / "answers.jsonl", os.write

    def write_half(descriptor, data):
        if output.stat().st_size > 4000:
            raise OSError(number, os.strerror(number))
        return write(descriptor, data[: len(data) // 2 + 1])

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(answers_module.os, "write", write_half)
        mot(*many.arguments, "--output", output)
    assert exit.value.code == code
    reason = f"cannot be written (OSError: [Errno {number}] {os.strerror(number)}){words}\n"
    assert capsys.readouterr().err.endswith(f"error: --output = {output}: {reason}")
    mot(*many.arguments, "--output", output)
    assert output.read_bytes() == many.output


def test_errors_of_a_store_and_of_the_disk_for_its_copy_are_reported(tmp_path, monkeypatch):
    with open_bucket("gs") as (bucket, _):
        (bucket / "full").write_text("def f\nx = 1\n")
        name = f"{bucket}/full"
        with open_prompts(name) as prompts:
            assert [line.prompt for line in prompts] == ["def f", "x = 1"]
        with pytest.raises(UserError, match=r"/absent: does not exist; try"), open_prompts(f"{bucket}/absent"):
            pass
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "TemporaryDirectory", lambda: contextlib.nullcontext("/dev"))  # it has a file full
            with pytest.raises(UserError, match=r"/full: its copy in /dev cannot be written .*No space"):
                open_prompts(name).__enter__()
        for error, kind, words in (
            (ConnectionError("reset"), RetryableError, "the store does not respond"),
            (PermissionError("Forbidden"), UserError, "the store refuses"),
        ):

            def fail(*_, error=error):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(backend.fsspec_backend, "open", fail)
                with pytest.raises(kind, match=words):
                    open_prompts(name).__enter__()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_at_a_whole_line_and_the_same_command_continues(
    many, small_windows, tmp_path, capsys, monkeypatch, number, code
):
    output, write = tmp_path / "answers.jsonl", answers_module.AnswerFile.write

    def write_and_stop(self, batch):
        write(self, batch)
        if len(output.read_bytes()) > 4000:
            signal.raise_signal(number)

    monkeypatch.setattr(answers_module.AnswerFile, "write", write_and_stop)
    with pytest.raises(SystemExit) as exit:
        mot(*many.arguments, "--output", output)
    assert exit.value.code == code
    done = output.read_bytes().count(b"\n")
    failed = sum("error" in row for row in rows_of(output))
    counts = f"stopped after {done - failed} of {120 - 2 * failed} answers, {failed} lines failed"
    assert failed and f"{counts}; the same command continues {output}" in capsys.readouterr().err
    assert 0 < done < 100 and many.output.startswith(output.read_bytes()) and output.read_bytes().endswith(b"\n")
    monkeypatch.setattr(answers_module.AnswerFile, "write", write)
    mot(*many.arguments, "--output", output)
    assert output.read_bytes() == many.output


@pytest.mark.slow
@pytest.mark.parametrize("content, words", [
    (b"b\n", "error: prompts: must be the same in all processes"),
    (None, "error: process 1: --prompts = {}: cannot be read (FileNotFoundError"),
], ids=["another", "none"])  # fmt: skip
def test_each_process_needs_the_same_prompts(workdir, tmp_path, content, words):
    files = [tmp_path / "first.txt", tmp_path / "second.txt"]
    files[0].write_bytes(b"a\n")
    if content is not None:
        files[1].write_bytes(content)
    extra = {index: ["--prompts", str(file)] for index, file in enumerate(files)}
    started = processes.start([str(workdir)], 2, 1, tmp_path / "process", extra, command="generate")
    assert [process.wait(60) for process in started] == [2, 2]
    for index in range(2):
        assert words.format(files[1]) in (tmp_path / f"process.{index}.log").read_text()
