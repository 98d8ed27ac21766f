"""Commands that use a trained model: write, fill in, pass tests."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from mot_jax.cli.options import JsonOptions, ProcessOptions, process, write_json
from mot_jax.cli.parsing import (
    AtLeast,
    DirectoryOrNone,
    FileOrNone,
    NumberOrNone,
    Positive,
    PositiveOrNone,
    Texts,
    Workdir,
    Written,
    load_run,
    parse_with_config,
)
from mot_jax.config import Config
from mot_jax.errors import UserError
from mot_jax.modes import MODES
from mot_jax.runtime import distributed, exit_codes
from mot_jax.runtime.progress import progress

_MODES = " | ".join(f"{name}[:K]" if mode.chooses else name for name, mode in MODES.items()) + "; K experts a token"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(JsonOptions, ProcessOptions):
    """A trained model and its inference mode."""

    workdir: Workdir
    """Directory of a run, or of an export."""
    mode: Annotated[str | None, tyro.conf.arg(metavar="MODE", help=f"Inference mode: {_MODES}.")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions):
    """Continue texts with a trained causal model."""

    prompt: Texts = ()
    """Text to continue; may be repeated. `-` reads the standard input."""
    prompts: FileOrNone = None
    """File with one prompt per line, or JSON with a field `prompt` and optionally `id`; it may be compressed."""
    output: Annotated[str | None, Written("answers.jsonl"), tyro.conf.arg(metavar="FILE")] = None
    """File for the answers to `--prompts`, one per line of JSON. If it exists, the same command continues it."""
    batch_size: Positive = 32
    """Number of sequences of `--prompts` in a batch, rounded up to whole groups."""
    tokens: Positive = 200
    """Number of tokens to generate after each prompt."""
    temperature: Annotated[float, tyro.conf.arg(metavar="T")] = 0.7
    """Temperature of sampling. 0: the most likely token."""
    top_k: NumberOrNone = None
    """Number of most likely tokens to sample from. None: all."""
    top_p: Annotated[float, tyro.conf.arg(metavar="P")] = 1.0
    """Total probability of the most likely tokens to sample from."""
    stop: Texts = ()
    """Text that ends a sequence; may be repeated."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Seed of sampling."""
    samples: Positive = 1
    """Number of continuations of each prompt."""


def generate(arguments: list[str]) -> None:
    """Continue texts with a trained model."""
    options, config = parse_with_config("mot generate", GenerateOptions, arguments, load_run)
    if options.prompts is not None:
        return _generate_file(options, config)
    if options.output is not None:
        raise UserError(f"--output = {options.output}: needs --prompts FILE; try --json {options.output}")
    prompts, model = _texts("mot generate", options, "prompt"), _model(options, config)
    prompts = [prompt for prompt in prompts for _ in range(options.samples)]
    shown = 0
    continuations: list[Any] = []
    first = distributed.is_first()
    for continuations in model.stream(prompts, **_sampling(options)):
        if len(prompts) == 1 and first:  # while it is generated
            text = prompts[0] + continuations[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
    if not first:
        return
    if len(prompts) == 1:
        print((prompts[0] + continuations[0].text)[shown:])
    for prompt, continuation in zip(prompts, continuations, strict=True):
        if len(prompts) > 1:
            _print_continued(prompt, continuation.text)
    if options.json:
        rows = [
            {
                "prompt": prompt,
                "text": f.text,
                "tokens": f.tokens.tolist(),
                "log_probs": f.log_probs.tolist(),
                "finished": f.finished,
            }
            for prompt, f in zip(prompts, continuations, strict=True)
        ]
        write_json(options.json, {"workdir": options.workdir, "mode": model.mode, "step": model.step, "texts": rows})


def _generate_file(options: GenerateOptions, config: Config) -> None:
    """Continue the prompts of a file, of which a bounded number is in memory at a time."""
    if options.prompt:
        raise UserError("--prompt: must be left out with --prompts; try a further line of the file")
    if options.output and options.json:
        raise UserError("--json: must be left out with --output, whose lines have the same fields; try one of them")
    from mot_jax.inference.answers import AnswerFile, answers
    from mot_jax.inference.prompt_files import EXAMPLE, open_prompts

    assert options.prompts is not None
    _connect(options, config)
    first, rows = distributed.is_first(), []
    with contextlib.ExitStack() as stack:
        with distributed.together() as same:
            prompts = stack.enter_context(open_prompts(options.prompts))
            same["prompts"] = prompts.digest
        model, sampling = _load(options, config), _sampling(options)
        model.check_options(**sampling)
        total = prompts.count * options.samples
        batch = {"samples": options.samples, "batch_size": model.round_batch_size(min(options.batch_size, total))}
        about = {"model": model.fingerprint(), "step": model.step, "mode": model.mode, "prompts": prompts.digest}
        output, written = None, None
        with distributed.together():
            if options.output is not None and first:
                output = AnswerFile(options.output, about | sampling | batch, prompts.lines, options.samples)
                stack.callback(output.close)
        if options.output is not None:
            written = bytes.fromhex(distributed.gather(output and output.written.hex())[0])
        answered, failed = (output.answered, output.failed) if output else (0, 0)

        def state() -> str:
            assert output is not None
            possible = total - output.failed * options.samples
            return f"stopped after {output.answered:,} of {possible:,} answers, {output.failed:,} lines failed"

        quiet = options.output is None or not first
        advance = stack.enter_context(progress(f"answering {options.prompts}", total, quiet, sum(written or ())))
        stack.enter_context(_stopping(state, options))
        for rows_of_batch in answers(model, prompts, written=written, **sampling, **batch):
            if not first:
                continue
            if output:
                output.write(rows_of_batch)
            for row in rows_of_batch:
                if "error" in row:
                    failed += 1
                    print(f"line {row['line']} of {options.prompts}: {row['error']}", file=sys.stderr, flush=True)
                else:
                    answered += 1
                    if not output:
                        _print_continued(row["prompt"], row["text"])
            rows += rows_of_batch if options.json else []
            advance(sum(options.samples if "error" in row else 1 for row in rows_of_batch))
        changed = any(distributed.gather(prompts.has_changed()))
    if first and options.json:
        write_json(options.json, {"workdir": options.workdir, "mode": model.mode, "step": model.step, "texts": rows})
    faults = []
    if changed:
        faults.append("the file has changed since the command began; its answers stay; try a copy and another --output")
    if first and not answered:
        faults.append(f"all {failed:,} prompts failed, for the reasons above; {EXAMPLE}")
    elif first:
        print(f"{answered:,} answers, {failed:,} lines failed", file=sys.stderr)
        if prompts.damage:
            faults.append(f"{prompts.damage}; answers before it stay; correct the file and try another --output")
    with distributed.together():
        if faults:
            raise UserError(*(f"--prompts = {options.prompts}: {fault}" for fault in faults))


@contextlib.contextmanager
def _stopping(state: Callable[[], str], options: GenerateOptions) -> Iterator[None]:
    """End with one line after Ctrl-C or SIGTERM; answers are written as whole lines."""
    signals: list[int] = []

    def on_sigterm(number: int, _: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    handles = options.output is not None and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, on_sigterm) if handles else None
    try:
        yield
    except KeyboardInterrupt:
        if options.output is None:
            raise
        if distributed.is_first():
            print(f"{state()}; the same command continues {options.output}", file=sys.stderr)
        sys.exit(exit_codes.PREEMPTED if signals else exit_codes.INTERRUPTED)
    finally:
        if handles:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _sampling(options: GenerateOptions) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "seed")
    sampling = {name: getattr(options, name) for name in names}
    return sampling | {"max_tokens": options.tokens, "stop": list(options.stop)}


def _print_continued(prompt: str, text: str) -> None:
    print(f"--- prompt\n{prompt}\n--- continued\n{text}\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillOptions(ModelOptions):
    """Fill gaps in texts with a trained masked model."""

    text: Texts = ()
    """Text with gaps; may be repeated. `-` reads the standard input."""
    texts: FileOrNone = None
    """File with one text per line, or JSON with a field `text`; it may be compressed."""
    gap: Annotated[str, tyro.conf.arg(metavar="MARK")] = "_"
    """Character that stands for a missing token."""


def fill(arguments: list[str]) -> None:
    """Fill gaps in texts with a masked model."""
    options, config = parse_with_config("mot fill", FillOptions, arguments, load_run)
    texts, model = _texts("mot fill", options, "text"), _model(options, config)
    filled = model.fill(texts, options.gap)
    if not distributed.is_first():
        return
    for row in filled:
        print(row.text)
        print("  " + "  ".join(f"{token!r} {share:.0%}" for token, share in row.gaps))
    if options.json:
        rows = [{"given": text, "text": row.text, "gaps": row.gaps} for text, row in zip(texts, filled, strict=True)]
        write_json(options.json, {"workdir": options.workdir, "mode": model.mode, "step": model.step, "texts": rows})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEvalOptions(ModelOptions):
    """Score a trained model on tasks of the lm-evaluation-harness."""

    tasks: Annotated[str | None, tyro.conf.arg(metavar="NAME,...")] = None
    """Names of tasks, or patterns of names. Required."""
    include_path: DirectoryOrNone = None
    """Directory with more tasks, in YAML."""
    num_fewshot: Annotated[int | None, AtLeast(0), tyro.conf.arg(metavar="N")] = None
    """Number of examples before each question. None: as the task defines it."""
    limit: PositiveOrNone = None
    """Number of examples of each task, from its first. None: all."""
    batch_size: Annotated[str, tyro.conf.arg(metavar="N")] = "8"
    """Number of sequences in a batch, rounded up to whole groups. `auto`, also `auto:N`: 8."""


def lm_eval(arguments: list[str]) -> None:
    """Score a trained model on tasks of the lm-evaluation-harness."""
    options, config = parse_with_config("mot lm-eval", LmEvalOptions, arguments, load_run)
    if not options.tasks:
        raise UserError(f"--tasks is missing; try mot lm-eval {options.workdir} --tasks arc_easy")
    numbers: dict[str, Any] = {
        "batch_size": int(options.batch_size) if options.batch_size.isdecimal() else options.batch_size,
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
    }
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise UserError(f"--include-path = {options.include_path}: must be a directory; leave it out for known tasks")
    try:
        from mot_jax.interop import lm_eval
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; try pip install lm-eval") from None
    lm_eval.parse_batch_size("--batch-size", options.batch_size)  # before the model is loaded
    model = _model(options, config)
    results = lm_eval.evaluate(model, options.tasks.split(","), include_path=options.include_path, **numbers)
    if not distributed.is_first():
        return
    print(lm_eval.table(results))
    if options.json:
        about = {"workdir": options.workdir, "mode": model.mode, "step": model.step, **numbers}
        parts = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
        write_json(options.json, about | {part: results[part] for part in parts if part in results})


def _texts(prog: str, options: ModelOptions, word: str) -> list[str]:
    """The texts of the flags `--word` and the lines of the file of `--words`."""
    texts, path = list(getattr(options, word)), getattr(options, f"{word}s")
    texts = [sys.stdin.read() if text == "-" else text for text in texts]
    if path is not None:
        from mot_jax.inference.prompt_files import open_prompts

        with open_prompts(path, f"--{word}s") as lines:
            for line in lines:
                if line.fault:
                    raise UserError(f"--{word}s = {path}: line {line.number} {line.fault}; correct it")
                texts.append(line.prompt)
    if not texts:
        raise UserError(f"--{word} is missing; try {prog} {options.workdir} --{word} 'def '")
    return texts


def _model(options: ModelOptions, config: Config) -> Any:
    """The model in its mode on its mesh, after lines about the dependence of sequences on each other."""
    _connect(options, config)
    return _load(options, config)


def _connect(options: ModelOptions, config: Config) -> None:
    distributed.connect(process(options, config), config.mesh, trains=False)


def _load(options: ModelOptions, config: Config) -> Any:
    from mot_jax.inference.language_model import about_mode, load
    from mot_jax.nn.sharding import make_mesh

    model = load(options.workdir, options.mode, make_mesh(config, trains=False))
    if distributed.is_first():
        for line in about_mode(model, options.workdir, chosen=options.mode is not None):
            print(line, file=sys.stderr)
    return model
