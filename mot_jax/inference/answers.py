"""Answers to files of prompts: in batches of similar length, written to a file that an interrupted command continues.

The batches depend on the prompts and options only. A continued file therefore has the answers that an uninterrupted
command writes, also in modes that mix the sequences of a batch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from mot_jax.errors import RetryableError, UserError, error_words
from mot_jax.inference.language_model import LanguageModel
from mot_jax.inference.prompt_files import PromptLine
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import is_passing, is_remote, replace_file, sync, user_path

Answer = dict[str, Any]  # one line of the output

_WINDOW = 32  # batches whose prompts are in memory, sorted by length


def answers(
    model: LanguageModel,
    prompts: Iterable[PromptLine],
    batch_size: int,
    samples: int = 1,
    written: Sequence[int] | None = None,
    **options: Any,
) -> Iterator[list[Answer]]:
    """Continue each prompt; yield the answers batch by batch, those of lines without a usable prompt by themselves.

    Some batches of lines at a time are sorted by length, so that little padding is processed. Of these, the errors are
    first, then batches go from short prompts to long ones. Lines of a batch are in their order.

    Args:
        model: a causal one.
        prompts: lines in the order of their numbers.
        batch_size: sequences of a batch, rounded up as by `LanguageModel.round_batch_size`.
        samples: continuations of each prompt.
        written: `AnswerFile.written`; a batch without an answer that is needed is skipped. None: all are needed.
        options: those of `LanguageModel.stream`. A sampled token depends on the seed, its line and its sample.

    Yields:
        Answers with `line`, `id` (if the line has one), and either `error` or `sample` (if there are several),
        `prompt`, `text`, `tokens`, `log_probs` and `finished`.
    """
    batch_size = model.round_batch_size(batch_size)
    lines = (_examined(model, line) for line in prompts)

    def is_needed(sequence: _Sequence) -> bool:
        return written is None or not written[sequence.number]

    while window := list(islice(lines, max(1, _WINDOW * batch_size // samples))):
        sequences = [_Sequence(line, size, sample, samples) for line, size in window for sample in range(samples)]
        if not any(map(is_needed, sequences)):
            continue
        failed = [s for s in sequences if s.line.fault and s.sample == 0 and is_needed(s)]
        yield [_head(s.line) | {"error": s.line.fault} for s in failed]
        sequences = sorted((s for s in sequences if not s.line.fault), key=lambda s: s.size)
        for first in range(0, len(sequences), batch_size):
            batch = sorted(sequences[first : first + batch_size], key=lambda s: s.number)
            if not any(map(is_needed, batch)):
                continue
            numbers = [s.number for s in batch]
            texts = [s.line.prompt for s in batch]
            continuations = model.generate(texts, numbers=numbers, batch_size=batch_size, **options)
            yield [
                _head(s.line)
                | ({"sample": s.sample} if samples > 1 else {})
                | {"prompt": s.line.prompt, "text": c.text, "tokens": c.tokens.tolist()}
                | {"log_probs": c.log_probs.tolist(), "finished": c.finished}
                for s, c in zip(batch, continuations, strict=True)
                if is_needed(s)
            ]


class _Sequence(NamedTuple):
    """One continuation of a prompt of `size` tokens."""

    line: PromptLine
    size: int
    sample: int
    samples: int

    @property
    def number(self) -> int:
        return (self.line.number - 1) * self.samples + self.sample


def _examined(model: LanguageModel, line: PromptLine) -> tuple[PromptLine, int]:
    """The line and the number of its tokens. A prompt that the model cannot continue is dropped: it may be long."""
    size, fault = (0, line.fault) if line.fault else model.examine_prompt(line.prompt)
    return (line._replace(prompt="", fault=fault) if fault else line), size


def _head(line: PromptLine) -> Answer:
    return {"line": line.number} | ({} if line.id is None else {"id": line.id})


class AnswerFile:
    """A file of answers, one per line of JSON, that is appended to; next to it, a file with the arguments.

    Attributes:
        written: for each line and sample, at (line - 1) x samples + sample, whether the file has its answer.
        answered: the number of answers in the file.
        failed: the number of errors in the file.
    """

    def __init__(self, name: str, about: dict[str, Any], lines: int, samples: int = 1):
        """Create the file, or continue one of the same arguments: remove a last line that a kill left incomplete.

        Args:
            name: a local path.
            about: the arguments on which answers depend, by name.
            lines: the number of lines with prompts, or of the last one.
            samples: continuations of each prompt.

        Raises:
            UserError: the file has answers of other arguments, or something else, or cannot be written.
            RetryableError: another process writes it.
        """
        if is_remote(name):
            raise UserError(f"--output = {name}: must be a local file, since lines are appended; try answers.jsonl")
        self._name, self._path = name, Path(user_path("--output", name))
        self._about_path = Path(f"{self._path}.meta.json")
        self.written, self._samples = bytearray(lines * samples), samples
        self.answered = self.failed = 0
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"--output = {name}: cannot be written ({error_words(error)}); try answers.jsonl") from None
        try:
            self._resume(about)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, batch: list[Answer]) -> None:
        """Append answers, whole lines in one write.

        Raises UserError if the disk is full, or another limit is reached; RetryableError if it does not respond.
        """
        data = memoryview("".join(strict_json.dumps(answer) + "\n" for answer in batch).encode())
        with self._write_errors():
            while data:
                data = data[os.write(self._descriptor, data) :]
        for answer in batch:
            self._count(answer)

    def close(self) -> None:
        """Write the file to the disk. Raises as `write` does."""
        with self._write_errors():
            try:
                os.fsync(self._descriptor)
            finally:
                os.close(self._descriptor)

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except (PermissionError, IsADirectoryError):
            raise  # of the file with the arguments; more space would not help
        except OSError as error:
            words = f"--output = {self._name}: cannot be written ({error_words(error)})"
            if is_passing(error):
                raise RetryableError(words) from None
            raise UserError(f"{words}; free some space, and the same command continues it") from None

    def _resume(self, about: dict[str, Any]) -> None:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise UserError(f"--output = {self._name}: must be a regular file; try answers.jsonl")
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RetryableError(f"--output = {self._name}: is being written by another process") from None
        except OSError:
            pass  # a file system without locks
        if os.fstat(self._descriptor).st_size:
            self._check_arguments(about)
            self._read()
        else:
            self._check_about_path()
            with self._write_errors():
                replace_file(epath.Path(self._about_path), (strict_json.dumps(about, indent=1) + "\n").encode())
                sync(self._path.parent)

    def _check_about_path(self) -> None:
        """Raise UserError if the place of the arguments holds another file."""
        try:
            other = json.loads(self._about_path.read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError):
            other = None
        if not isinstance(other, dict) or not {"model", "prompts"} <= other.keys():
            raise UserError(
                f"--output = {self._name}: {self._about_path.name}, the place of its arguments, holds another file; "
                "try another name"
            )

    def _check_arguments(self, about: dict[str, Any]) -> None:
        """Raise UserError unless the answers in the file are those of `about`."""
        refusal, advice = f"--output = {self._name}: exists, ", "; it is left as it is; try another name"
        try:
            before = json.loads(self._about_path.read_text())
        except (OSError, ValueError):
            raise UserError(f"{refusal}and {self._about_path.name} with its arguments does not{advice}") from None
        for key, value in json.loads(strict_json.dumps(about)).items():
            if not isinstance(before, dict) or key not in before or before[key] != value:
                other = before.get(key) if isinstance(before, dict) else None
                words = f"with answers for {key} = {other!r}, and this command has {value!r}"
                if key in ("model", "prompts"):
                    words = f"with answers {'of another model' if key == 'model' else 'to other prompts'}"
                raise UserError(f"{refusal}{words}{advice}")

    def _read(self) -> None:
        """Count the answers in the file."""
        end = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self._count(json.loads(line))
                except (ValueError, LookupError, TypeError):
                    raise UserError(
                        f"--output = {self._name}: line {number} is no answer; remove the line, or try another name"
                    ) from None
                end += len(line)
        os.ftruncate(self._descriptor, end)

    def _count(self, answer: Answer) -> None:
        failed, first = "error" in answer, (answer["line"] - 1) * self._samples
        for sample in range(self._samples) if failed else [answer.get("sample", 0)]:
            self.written[first + sample] = 1
        self.failed += failed
        self.answered += not failed
