"""The text of an experiment, from its config: tokenizer, windows of both splits, and the order of training."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

from mot_jax.config import Config
from mot_jax.data.corpora import open_corpus
from mot_jax.data.order import MixtureOrder, Order, TrainingOrder
from mot_jax.data.tokenizers import Tokenizer, load_tokenizer
from mot_jax.data.windows import JoinedWindows, Windows, open_windows
from mot_jax.errors import UserError
from mot_jax.runtime.paths import DATA_DIRECTORY, local_path


class Text(NamedTuple):
    """fingerprints: of `train`, `validation` and `tokenizer`; a run that goes on must find the same again."""

    tokenizer: Tokenizer
    train: Windows
    validation: Windows
    order: Order
    fingerprints: dict[str, str]


def open_text(config: Config, tokenizer: Tokenizer | None = None) -> Text:
    """All text of `config`, tokenised now if it has not been before. `tokenizer`: its own, if it is open already.

    Raises UserError.
    """
    data = config.data
    tokenizer = tokenizer or open_tokenizer(config)
    train, validation = (open_split(config, split, tokenizer) for split in (data.train_split, data.validation_split))
    fingerprints = {"train": train.fingerprint, "validation": validation.fingerprint}
    seed = config.training.seed
    order: Order
    if data.weights and isinstance(train, JoinedWindows) and len(data.corpus) > 1:
        sizes = [len(part) for part in train.parts]
        order = MixtureOrder(train.documents, sizes, data.weights, config.group_size, seed)
        fingerprints["train"] = _digest([train.fingerprint, data.weights])
    else:
        order = TrainingOrder(train.documents, config.group_size, seed)
    return Text(tokenizer, train, validation, order, fingerprints | {"tokenizer": tokenizer.fingerprint})


def open_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of `config`. Raises UserError if there is none, or if its tokens are too many for the model."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    needed, what = tokenizer.vocab_size, ""
    if config.model.objective == "masked" and tokenizer.mask_token >= needed:
        needed, what = tokenizer.mask_token + 1, ", and a mask"
    if needed > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}: must be at least the {tokenizer.vocab_size} of tokenizer "
            f"{config.data.tokenizer!r}{what}; try {needed}"
        )
    return tokenizer


def open_split(config: Config, split: str, tokenizer: Tokenizer) -> Windows:
    """The windows of one split of every corpus of `config`, joined. Raises UserError."""
    data, length = config.data, config.model.context_length
    directory = local_path("data.directory", data.directory or DATA_DIRECTORY)
    fields = {data.validation_split: "data.validation_split", data.train_split: "data.train_split"}
    parts = []
    for name in data.corpus:
        corpus = open_corpus(name, split, directory, data.text_feature, fields.get(split, "--split"))
        parts.append(open_windows(corpus, split, tokenizer, length, directory))
    return parts[0] if len(parts) == 1 else JoinedWindows(parts, _digest([part.fingerprint for part in parts]))


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
