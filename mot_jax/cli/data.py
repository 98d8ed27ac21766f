"""`mot data`."""

from __future__ import annotations

import functools
from pathlib import Path

from mot_jax.cli.options import Parser
from mot_jax.errors import UserError
from mot_jax.runtime.paths import DATA_DIRECTORY, local_path


def data(arguments: list[str]) -> None:
    """Build or inspect a corpus, or train a tokenizer on one: mot data build | inspect | train-tokenizer."""
    parser = Parser(prog="mot data", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="build | inspect | train-tokenizer")
    command = commands.add_parser("build", help="build a corpus from files", allow_abbrev=False)
    command.add_argument("name", metavar="NAME", help="its name in data.corpus")
    command.add_argument(
        "files", nargs="+", metavar="FILE", help="files, patterns or directories, gzip-compressed or not"
    )
    command.add_argument("--text-feature", default="text", help="field or column with the text (default: text)")
    command.add_argument(
        "--documents",
        default="file",
        choices=["file", "line", "paragraph"],
        help="unit of plain text that is one document (default: file)",
    )
    command.add_argument(
        "--validation",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of the documents in the validation split (0.01)",
    )
    command.add_argument("--workers", type=int, metavar="N", help="number of processes (default: one per core)")
    for name, text in {"inspect": "contents of a corpus", "train-tokenizer": "a tokenizer out of a corpus"}.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("name", metavar="NAME", help="name of the corpus, as in data.corpus")
        command.add_argument("--split", default="train", metavar="SPLIT", help="split of the corpus (train)")
        command.add_argument("--text-feature", default="text", help="field or column of the text (text)")
        if name == "inspect":
            command.add_argument("--tokenizer", help="tokenizer whose bytes per token are printed")
            command.add_argument("-n", type=int, default=3, metavar="N", help="number of documents to print (3)")
        else:
            command.add_argument("--vocab-size", type=int, default=8192, metavar="V", help="number of tokens (8192)")
            command.add_argument(
                "--kind", default="bpe", choices=["bpe", "sentencepiece"], help="kind of tokenizer (bpe)"
            )
            command.add_argument("--output", required=True, metavar="FILE", help="file for the tokenizer")
    for command in commands.choices.values():
        command.add_argument("--directory", metavar="DIR", help="directory of prepared text, as data.directory")
    options = parser.parse_args(arguments)
    directory = Path(local_path("--directory", options.directory or DATA_DIRECTORY)).absolute()
    if options.command == "build":
        from mot_jax.data.build import build, spec_from_files

        if options.workers is not None and options.workers < 1:
            raise UserError(f"--workers = {options.workers}: must be at least 1; try 1")
        plan = spec_from_files(options.name, options.files, options.documents, options.text_feature, options.validation)
        build(plan, directory / "corpora", options.workers, functools.partial(print, flush=True))
        return
    from mot_jax.data import corpora, report, tokenizers

    if options.command == "train-tokenizer":
        tokenizers.check_suffix(options.output, options.kind)
    corpus = corpora.open_corpus(options.name, options.split, directory, options.text_feature)
    if options.command == "inspect":
        tokenizer = tokenizers.load_tokenizer(options.tokenizer) if options.tokenizer else None
        for line in report.describe_corpus(corpus, tokenizer, options.n):
            print(line)
    else:
        train = functools.partial(tokenizers.train_tokenizer, vocab_size=options.vocab_size, kind=options.kind)
        print(report.write_tokenizer(corpus, train, options.output))
