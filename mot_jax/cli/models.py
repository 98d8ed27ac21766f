"""Commands that use a trained model: write, fill in, pass tests."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mot_jax.cli.options import PROCESS, Parser, parse, positive, process, write_json
from mot_jax.config import Config
from mot_jax.errors import UserError, error_words
from mot_jax.modes import MODES
from mot_jax.runtime import distributed
from mot_jax.runtime.paths import user_path

_MODES = " | ".join(f"{name}[:K]" if mode.chooses else name for name, mode in MODES.items()) + "; K experts a token"


def generate(arguments: list[str]) -> None:
    """continue texts: mot generate WORKDIR --prompt TEXT [--mode M] [--tokens N] [--temperature T] [--top-k K] ..."""
    parser = _parser("mot generate", "prompt")
    parser.add_argument("--tokens", default="200", metavar="N", help="to write after each prompt (200)")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0: the likeliest token (0.7)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="from the likeliest that have P together")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="which ends a row; may be repeated")
    parser.add_argument("--seed", default=0, type=int, metavar="N")
    parser.add_argument("--samples", default="1", metavar="N", help="of each prompt (1)")
    options, prompts, model = _load(parser, arguments, "prompt")
    prompts = [prompt for prompt in prompts for _ in range(positive("--samples", options.samples))]
    shown = 0
    found: list[Any] = []
    first = distributed.is_first()
    for found in model.stream(
        prompts,
        max_tokens=positive("--tokens", options.tokens),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=options.stop,
        seed=options.seed,
    ):
        if len(prompts) == 1 and first:  # while it is generated, except for a possibly incomplete character
            text = prompts[0] + found[0].text.rstrip("\N{REPLACEMENT CHARACTER}")
            print(text[shown:], end="", flush=True)
            shown = len(text)
    if not first:
        return
    if len(prompts) == 1:
        print((prompts[0] + found[0].text)[shown:])
    for prompt, continuation in zip(prompts, found, strict=True):
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
            for prompt, f in zip(prompts, found, strict=True)
        ]
        write_json(options.json, {"workdir": options.config, "mode": model.mode, "step": model.step, "texts": rows})


def fill(arguments: list[str]) -> None:
    """fill gaps in texts by a masked model: mot fill WORKDIR --text 'def _ead(' [--gap _] [--mode M]"""
    parser = _parser("mot fill", "text")
    parser.add_argument("--gap", default="_", metavar="MARK", help="the character for a missing token (_)")
    options, texts, model = _load(parser, arguments, "text")
    filled = model.fill(texts, options.gap)
    if not distributed.is_first():
        return
    for row in filled:
        print(row.text)
        print("  " + "  ".join(f"{token!r} {share:.0%}" for token, share in row.gaps))
    if options.json:
        rows = [{"given": text, "text": row.text, "gaps": row.gaps} for text, row in zip(texts, filled, strict=True)]
        write_json(options.json, {"workdir": options.config, "mode": model.mode, "step": model.step, "texts": rows})


def lm_eval(arguments: list[str]) -> None:
    """score a model on tasks of the lm-evaluation-harness: mot lm-eval WORKDIR --tasks NAME,... [--mode M] ..."""
    usage = "mot lm-eval WORKDIR --tasks NAME,... [options] [--mesh.data N ...]"
    parser = Parser("mot lm-eval", usage=usage, allow_abbrev=False)
    parser.add_argument("--tasks", metavar="NAME,...", help="or patterns of names")
    parser.add_argument("--include-path", metavar="DIR", help="with tasks of your own, in YAML")
    parser.add_argument("--num-fewshot", metavar="N", help="examples before each question (default: those of the task)")
    parser.add_argument("--limit", metavar="N", help="only the first examples of each task")
    parser.add_argument("--batch-size", default="8", metavar="N", help="rows (8), rounded up to whole groups")
    parser.add_argument("--mode", help=_MODES)
    for option in ("--json", *PROCESS):
        parser.add_argument(option)
    from mot_jax.runs.restore import load_run_config

    options, config = parse(parser.prog, arguments, None, parser, load_run_config)
    if not options.tasks:
        raise UserError(f"--tasks is missing; try {parser.prog} {options.config} --tasks arc_easy")
    numbers: dict[str, Any] = {
        "batch_size": positive("--batch-size", options.batch_size),
        "limit": None if options.limit is None else positive("--limit", options.limit),
        "num_fewshot": None if options.num_fewshot is None else positive("--num-fewshot", options.num_fewshot, 0),
    }
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise UserError(f"--include-path = {options.include_path}: must be a directory; leave it out for known tasks")
    try:
        from mot_jax.interop import lm_eval
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; try pip install lm-eval") from None
    model = _model(options, config)
    results = lm_eval.evaluate(model, options.tasks.split(","), include_path=options.include_path, **numbers)
    if not distributed.is_first():
        return
    print(lm_eval.table(results))
    if options.json:
        about = {"workdir": options.config, "mode": model.mode, "step": model.step, **numbers}
        parts = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
        write_json(options.json, about | {part: results[part] for part in parts if part in results})


def _parser(prog: str, word: str) -> Parser:
    usage = f"{prog} WORKDIR --{word} TEXT [options] [--mesh.data N ...]"
    parser = Parser(prog, usage=usage, allow_abbrev=False)
    parser.add_argument(
        f"--{word}", action="append", default=[], metavar="TEXT", help="may be repeated; - is the input"
    )
    parser.add_argument(f"--{word}s", metavar="FILE", help="one a line")
    parser.add_argument("--mode", help=_MODES)
    for option in ("--json", *PROCESS):
        parser.add_argument(option)
    return parser


def _load(parser: Parser, arguments: list[str], word: str) -> tuple[argparse.Namespace, list[str], Any]:
    """The options, the texts, and the model, see `_model`."""
    from mot_jax.runs.restore import load_run_config

    options, config = parse(parser.prog, arguments, None, parser, load_run_config)
    texts, path = list(getattr(options, word)), getattr(options, f"{word}s")
    texts = [sys.stdin.read() if text == "-" else text for text in texts]
    if path is not None:
        try:
            texts += user_path(f"--{word}s", path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--{word}s = {path}: cannot be read ({error_words(error)}); try --{word} TEXT") from None
    if not texts:
        raise UserError(f"--{word} is missing; try {parser.prog} {options.config} --{word} 'def '")
    return options, texts, _model(options, config)


def _model(options: argparse.Namespace, config: Config) -> Any:
    """The model in its mode on its mesh, after lines about the dependence of sequences on each other."""
    distributed.connect(process(options, config), config.mesh, trains=False)
    from mot_jax.inference.language_model import about_mode, load
    from mot_jax.nn.sharding import make_mesh

    model = load(options.config, options.mode, make_mesh(config, trains=False))
    if distributed.is_first():
        for line in about_mode(model, options.config, chosen=options.mode is not None):
            print(line, file=sys.stderr)
    return model
