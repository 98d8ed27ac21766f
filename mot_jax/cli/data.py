"""`mot data`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Literal

import tyro
from etils import epath

from mot_jax.cli.parsing import DirectoryOrNone, File, PositiveOrNone, dispatch, parse
from mot_jax.runtime.paths import DATA_DIRECTORY, is_remote, user_path

Name = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]]
Files = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """A corpus."""

    name: Name
    """Name of the corpus, as in `data.corpus`."""
    text_feature: Annotated[str, tyro.conf.arg(metavar="NAME")] = "text"
    """Field of JSON lines, or column of a table, that holds the text."""
    directory: DirectoryOrNone = None
    """Directory of prepared text, as `data.directory`: local, `gs://` or `s3://`. None: its default."""

    def data_directory(self) -> epath.Path:
        directory = user_path("--directory", self.directory or DATA_DIRECTORY)
        return directory if is_remote(directory) else directory.absolute()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions(CorpusOptions):
    """Build a corpus from files."""

    files: Files
    """Files, patterns or directories of text, JSON, CSV or Parquet, compressed or not."""
    documents: Literal["file", "line", "paragraph"] = "file"
    """Unit of plain text that is one document."""
    validation: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.01
    """Share of the documents in the validation split."""
    workers: PositiveOrNone = None
    """Number of processes. None: one per core."""


def build(arguments: list[str]) -> None:
    """Build a corpus from files."""
    options = parse("mot data build", BuildOptions, arguments)
    from mot_jax.data.build import build, spec_from_files

    spec = spec_from_files(options.name, options.files, options.documents, options.text_feature, options.validation)
    build(spec, options.data_directory() / "corpora", options.workers, functools.partial(print, flush=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitOptions(CorpusOptions):
    """A split of a corpus."""

    split: Annotated[str, tyro.conf.arg(metavar="SPLIT")] = "train"
    """Split of the corpus, as `train[:10%]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectOptions(SplitOptions):
    """Print the contents of a corpus."""

    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Tokenizer whose bytes per token are printed: a file, or `bytes`."""
    number: Annotated[int, tyro.conf.arg(metavar="N", aliases=("-n",))] = 3
    """Number of documents to print."""


def inspect(arguments: list[str]) -> None:
    """Print the contents of a corpus."""
    options = parse("mot data inspect", InspectOptions, arguments)
    from mot_jax.data import corpora, report, tokenizers

    corpus = corpora.open_corpus(options.name, options.split, options.data_directory(), options.text_feature)
    tokenizer = tokenizers.load_tokenizer(options.tokenizer) if options.tokenizer else None
    for line in report.describe_corpus(corpus, tokenizer, options.number):
        print(line)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTokenizerOptions(SplitOptions):
    """Train a tokenizer on a corpus."""

    vocab_size: Annotated[int, tyro.conf.arg(metavar="V")] = 8192
    """Number of tokens."""
    kind: Literal["bpe", "sentencepiece"] = "bpe"
    """Kind of tokenizer: `bpe` of Hugging Face's tokenizers, or `sentencepiece`."""
    output: File
    """File for the tokenizer: `.json` for `bpe`, `.model` for `sentencepiece`."""


def train_tokenizer(arguments: list[str]) -> None:
    """Train a tokenizer on a corpus."""
    options = parse("mot data train-tokenizer", TrainTokenizerOptions, arguments)
    from mot_jax.data import corpora, report, tokenizers

    tokenizers.check_suffix(options.output, options.kind)
    corpus = corpora.open_corpus(options.name, options.split, options.data_directory(), options.text_feature)
    train = functools.partial(tokenizers.train_tokenizer, vocab_size=options.vocab_size, kind=options.kind)
    print(report.write_tokenizer(corpus, train, options.output))


COMMANDS = {"build": build, "inspect": inspect, "train-tokenizer": train_tokenizer}


def data(arguments: list[str]) -> None:
    """Build or inspect a corpus, or train a tokenizer on one."""
    dispatch("mot data", "Prepare text for training.", COMMANDS, arguments)
