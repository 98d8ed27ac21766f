"""The training and validation text of a config: tokenizer, windows of both splits, and the training order."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

from etils import epath

from mot_jax.config import Config, is_corpus_path
from mot_jax.data.corpora import Corpus, open_corpus, shared_documents
from mot_jax.data.order import ORDER_VERSION, MixtureOrder, Order, TrainingOrder
from mot_jax.data.report import sample_texts
from mot_jax.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from mot_jax.data.windows import JoinedWindows, Windows, open_windows, store_windows
from mot_jax.errors import UserError
from mot_jax.runtime import distributed
from mot_jax.runtime.paths import DATA_DIRECTORY, is_remote, user_path

_ROUND_TRIP_BYTES = 1 << 16  # of text that is encoded and decoded to detect a lossy tokenizer


class ExperimentText(NamedTuple):
    """The opened text of a config.

    Attributes:
        fingerprints: Of `train`, `validation` and `tokenizer`, and the version of the `order`, stored in data.json; a
            resumed run must have the same ones.
    """

    tokenizer: Tokenizer
    train: Windows
    validation: Windows
    order: Order
    fingerprints: dict[str, str]


def open_text(config: Config, tokenizer: Tokenizer | None = None) -> ExperimentText:
    """Open the text of `config`; tokenize it first if that has not been done.

    Args:
        tokenizer: The tokenizer of `config`, if it is open already.

    Raises:
        UserError: A corpus, split or tokenizer does not exist, or does not fit the config.
    """
    data = config.data
    tokenizer = tokenizer or open_tokenizer(config)
    train, validation = (open_split(config, split, tokenizer) for split in (data.train_split, data.validation_split))
    fingerprints = {"train": train.fingerprint, "validation": validation.fingerprint, "order": ORDER_VERSION}
    seed = config.training.seed
    order: Order
    if data.weights and isinstance(train, JoinedWindows) and len(data.corpus) > 1:
        sizes = [len(part) for part in train.parts]
        order = MixtureOrder(train.documents, sizes, data.weights, config.group_size, seed)
        fingerprints["train"] = _digest([train.fingerprint, data.weights])
    else:
        order = TrainingOrder(train.documents, config.group_size, seed)
    return ExperimentText(tokenizer, train, validation, order, fingerprints | {"tokenizer": tokenizer.fingerprint})


def store_text(config: Config, tokenizer: Tokenizer, *splits: str) -> None:
    """Build, tokenize and upload the splits that a `data.directory` on an object store lacks; `open_split` copies them.

    Raises:
        UserError: As `open_split`.
        RetryableError: The store does not respond.
    """
    directory = data_directory(config)
    for split, name in itertools.product(splits, config.data.corpus):
        corpus = _open_corpus(config, name, split)
        store_windows(corpus, split, tokenizer, config.model.context_length, directory)


def store_text_once(config: Config, tokenizer: Tokenizer, *splits: str) -> None:
    """Let process 0 of several call `store_text`, if `data.directory` is on a store, while the others wait.

    All processes call this before `open_text` or `open_split`, which then only copy.
    """
    if distributed.is_connected() and is_remote(config.data.directory or ""):
        with distributed.together():
            if distributed.is_first():
                store_text(config, tokenizer, *splits)


def data_directory(config: Config) -> epath.Path:
    """The path of `data.directory`. Raises UserError or RetryableError for a store that refuses or does not respond."""
    return user_path("data.directory", config.data.directory or DATA_DIRECTORY)


def text_warnings(config: Config, tokenizer: Tokenizer) -> list[str]:
    """Warnings about losses that would look better than they are: of text trained on, or of a lossy tokenizer."""
    data, warnings = config.data, []
    directory = data_directory(config)
    for name in data.corpus:
        shared = shared_documents(name, (data.train_split, data.validation_split), directory)
        if shared:
            warnings.append(
                f"warning: data.validation_split = {data.validation_split!r} has {shared:,} documents of "
                f"data.train_split = {data.train_split!r} of {name}: the validation loss is that of text trained on; "
                "try data.train_split = 'train[:90%]', data.validation_split = 'train[90%:]'"
            )
        if tokenizer.fingerprint == ByteTokenizer.fingerprint:
            continue
        corpus = open_corpus(name, data.validation_split, directory, data.text_feature)
        if not corpus.is_local():  # a start copies no shards, which can take hours, for a warning
            continue
        texts = [text.decode(errors="replace").encode() for text in sample_texts(corpus, _ROUND_TRIP_BYTES)]
        lost = sum(tokenizer.decode(tokenizer.encode(text)).strip() != text.strip() for text in texts)
        if lost:
            warnings.append(
                f"warning: data.tokenizer = {data.tokenizer!r} is lossy: of {len(texts)} documents of {name}, {lost} "
                "differ after encoding and decoding; bits per byte look better than those of a lossless tokenizer, "
                "such as 'bytes' or one of mot data train-tokenizer"
            )
    return warnings


def with_absolute_paths(config: Config) -> Config:
    """Return `config` with absolute paths of its inputs, so that its run can be read from any directory."""
    data, training = config.data, config.training
    corpus = tuple(_absolute(name) if is_corpus_path(name) else name for name in data.corpus)
    tokenizer = data.tokenizer if data.tokenizer == "bytes" else _absolute(data.tokenizer)
    upcycle_from, transition_from = (
        path if path is None else _absolute(path) for path in (training.upcycle_from, training.transition_from)
    )
    directory = data.directory and _absolute(data.directory)
    data = dataclasses.replace(data, corpus=corpus, tokenizer=tokenizer, directory=directory)
    training = dataclasses.replace(training, upcycle_from=upcycle_from, transition_from=transition_from)
    return dataclasses.replace(config, data=data, training=training)


def _absolute(path: str) -> str:
    path = os.path.expanduser(path)
    return path if is_remote(path) or not path or path.startswith("~") else str(Path(path).absolute())


def open_tokenizer(config: Config) -> Tokenizer:
    """Open the tokenizer of `config`. Raises UserError if it does not exist, or exceeds the model's vocabulary."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    needed, and_mask = tokenizer.vocab_size, ""
    if config.model.objective == "masked" and tokenizer.mask_token >= needed:
        needed, and_mask = tokenizer.mask_token + 1, ", plus a mask token"
    if needed > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}: must be at least the {tokenizer.vocab_size} tokens of "
            f"{config.data.tokenizer!r}{and_mask}; try {needed}"
        )
    return tokenizer


def open_split(config: Config, split: str, tokenizer: Tokenizer) -> Windows:
    """The windows of one split of every corpus of `config`, concatenated. Raises UserError."""
    length, directory = config.model.context_length, data_directory(config)
    parts = [
        open_windows(_open_corpus(config, name, split), split, tokenizer, length, directory)
        for name in config.data.corpus
    ]
    return parts[0] if len(parts) == 1 else JoinedWindows(parts, _digest([part.fingerprint for part in parts]))


def _open_corpus(config: Config, name: str, split: str) -> Corpus:
    data = config.data
    fields = {data.validation_split: "data.validation_split", data.train_split: "data.train_split"}
    return open_corpus(name, split, data_directory(config), data.text_feature, fields.get(split, "--split"))


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
