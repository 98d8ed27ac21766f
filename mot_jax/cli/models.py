"""Commands that use a trained model: write, fill in, pass tests."""

from __future__ import annotations

import dataclasses
import sys
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
    load_run,
    parse_with_config,
)
from mot_jax.config import Config
from mot_jax.errors import UserError, error_words
from mot_jax.modes import MODES
from mot_jax.runtime import distributed
from mot_jax.runtime.paths import user_path

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
    """File with one prompt per line."""
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
    prompts, model = _texts("mot generate", options, "prompt"), _model(options, config)
    prompts = [prompt for prompt in prompts for _ in range(options.samples)]
    shown = 0
    continuations: list[Any] = []
    first = distributed.is_first()
    for continuations in model.stream(
        prompts,
        max_tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=list(options.stop),
        seed=options.seed,
    ):
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
            print(f"--- prompt\n{prompt}\n--- continued\n{continuation.text}\n")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillOptions(ModelOptions):
    """Fill gaps in texts with a trained masked model."""

    text: Texts = ()
    """Text with gaps; may be repeated. `-` reads the standard input."""
    texts: FileOrNone = None
    """File with one text per line."""
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
        try:
            texts += user_path(f"--{word}s", path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--{word}s = {path}: cannot be read ({error_words(error)}); try --{word} TEXT") from None
    if not texts:
        raise UserError(f"--{word} is missing; try {prog} {options.workdir} --{word} 'def '")
    return texts


def _model(options: ModelOptions, config: Config) -> Any:
    """The model in its mode on its mesh, after lines about the dependence of sequences on each other."""
    distributed.connect(process(options, config), config.mesh, trains=False)
    from mot_jax.inference.language_model import about_mode, load
    from mot_jax.nn.sharding import make_mesh

    model = load(options.workdir, options.mode, make_mesh(config, trains=False))
    if distributed.is_first():
        for line in about_mode(model, options.workdir, chosen=options.mode is not None):
            print(line, file=sys.stderr)
    return model
