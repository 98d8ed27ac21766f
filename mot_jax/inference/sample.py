"""Text for people to read at the end of a training run: a group of validation texts, mixed as in training."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh

from mot_jax.config import Config
from mot_jax.data.objectives import Objective
from mot_jax.data.pipeline import validation_batches
from mot_jax.data.tokenizers import Tokenizer
from mot_jax.data.windows import Windows
from mot_jax.inference.language_model import GAP, LanguageModel
from mot_jax.modes import trained_mode
from mot_jax.nn.transformer import Params


def sample_text(config: Config, mesh: Mesh, params: Params, windows: Windows, tokenizer: Tokenizer) -> str:
    """A group of validation texts, continued by the model, or with its guesses where a masked model has gaps."""
    model = LanguageModel(config, params, tokenizer, trained_mode(config), config.training.steps, mesh)
    objective, size = Objective.of(config, tokenizer), config.group_size
    shown = next(validation_batches(windows, objective, size, size, np.arange(size), None))
    present = shown.token_mask[:, 0]

    def words(tokens: np.ndarray) -> str:
        return tokenizer.decode(tokens).decode(errors="replace")

    if objective.masked:
        hidden = np.where(shown.target_mask, tokenizer.mask_token, shown.targets)[present]
        gaps = [GAP.join(words(piece) for piece in _cut(row, tokenizer.mask_token)) for row in hidden]
        filled = model.fill(list(hidden))
        return "\n".join(f"--- prompt\n{gap}\n--- filled\n{row.text}\n" for gap, row in zip(gaps, filled, strict=True))
    prompts = shown.inputs[present, : config.model.context_length // 2]
    found = model.generate(
        list(prompts), max_tokens=config.logging.sample_tokens, ends=False, seed=config.training.seed
    )
    pairs = [(words(prompt), continuation.text) for prompt, continuation in zip(prompts, found, strict=True)]
    return "\n".join(f"--- prompt\n{begin}\n--- continued\n{end}\n" for begin, end in pairs)


def _cut(row: np.ndarray, at: int) -> list[np.ndarray]:
    """The pieces of a row between the tokens `at`."""
    places = np.flatnonzero(row == at)
    return [row[begin:end] for begin, end in zip([0, *places + 1], [*places, len(row)], strict=True)]
