"""A sample of generated text at the end of a training run: one group of validation texts, mixed as in training."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh

from mot_jax.config import Config
from mot_jax.data.objectives import Objective
from mot_jax.data.pipeline import validation_batches
from mot_jax.data.tokenizers import Tokenizer
from mot_jax.data.windows import Windows
from mot_jax.inference.language_model import GAP, LanguageModel, NotFiniteError
from mot_jax.modes import trained_mode
from mot_jax.nn.transformer import Params
from mot_jax.runtime import distributed
from mot_jax.runtime.paths import replace_file
from mot_jax.training.evaluation import evaluated_config
from mot_jax.training.trainer import Hook, Trainer


class SampleHook(Hook):
    """Writes `sample.txt` at the end of a run, unless `logging.sample_tokens` is 0."""

    def at_end(self, trainer: Trainer) -> None:
        run = trainer.run
        if not run.config.logging.sample_tokens:
            return
        config, params = evaluated_config(run.config), trainer.state.variables
        try:
            sample = sample_text(config, run.mesh, params, run.validation_windows, run.tokenizer)
        except NotFiniteError as error:  # of a diverged model, whose run ends all the same
            sample = f"no sample: {error}\n"
        with distributed.together():
            if distributed.is_first():
                replace_file(run.workdir / "sample.txt", sample.encode())


def sample_text(config: Config, mesh: Mesh, params: Params, windows: Windows, tokenizer: Tokenizer) -> str:
    """Generate text from the first group of validation windows.

    Returns the prompts (the first halves of the windows) with their continuations; for a masked model, the windows with
    gaps in place of masked tokens, and the same with the gaps filled.
    """
    model = LanguageModel(config, params, tokenizer, trained_mode(config), config.training.steps, mesh)
    objective, size = Objective.of(config, tokenizer), config.group_size
    group = next(validation_batches(windows, objective, size, size, np.arange(size), None))
    present = group.token_mask[:, 0]

    def decode(tokens: np.ndarray) -> str:
        return tokenizer.decode(tokens).decode(errors="replace")

    if objective.masked:
        masked = np.where(group.target_mask, tokenizer.mask_token, group.targets)[present]
        gaps = [GAP.join(decode(piece) for piece in _split(tokens, tokenizer.mask_token)) for tokens in masked]
        filled = model.fill(list(masked))
        return "\n".join(
            f"--- prompt\n{gap}\n--- filled\n{text.text}\n" for gap, text in zip(gaps, filled, strict=True)
        )
    prompts = group.inputs[present, : max(config.model.context_length // 2, 1)]
    continuations = model.generate(
        list(prompts), max_tokens=config.logging.sample_tokens, ends=False, seed=config.training.seed
    )
    pairs = [(decode(prompt), continuation.text) for prompt, continuation in zip(prompts, continuations, strict=True)]
    return "\n".join(f"--- prompt\n{begin}\n--- continued\n{end}\n" for begin, end in pairs)


def _split(tokens: np.ndarray, separator: int) -> list[np.ndarray]:
    """The pieces of a sequence between the tokens equal to `separator`."""
    places = np.flatnonzero(tokens == separator)
    return [tokens[begin:end] for begin, end in zip([0, *places + 1], [*places, len(tokens)], strict=True)]
