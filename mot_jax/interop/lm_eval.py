"""Adapter for EleutherAI's lm-evaluation-harness, which the extra `lm-eval` of this package installs.

Importing this module registers the model `mot_jax` with the harness, with the arguments of `MotJax`:

    import lm_eval, mot_jax.interop.lm_eval
    lm_eval.simple_evaluate("mot_jax", {"workdir": "runs/demo", "mode": "companions"}, tasks=["arc_easy"])
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table, pattern_match
from tqdm import tqdm

from mot_jax.errors import UserError, error_words, nearest
from mot_jax.inference.language_model import LanguageModel, about_mode, load
from mot_jax.inference.types import Likelihood, Prompt
from mot_jax.nn.sharding import make_mesh
from mot_jax.runs.restore import load_run_config
from mot_jax.runtime import distributed

_LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_AUTO_BATCH_SIZE = 8
_PROGRESS_BATCHES = 64  # between updates of the progress bar


class HarnessModel(TemplateLM):
    """A loaded model with the harness' interface. The harness splits texts into tokens, as for all causal models."""

    max_gen_toks = 256  # default for tasks that set no length

    def __init__(self, model: LanguageModel, batch_size: int | str = 8, max_batch_size: int | str | None = None):
        """Wrap `model`.

        Args:
            model: in its mode.
            batch_size: sequences, rounded up to whole groups; `auto`, also `auto:N`, is 8.
            max_batch_size: of `auto`.
        """
        super().__init__()
        self.model, self.batch_size = model, parse_batch_size("batch_size", batch_size, max_batch_size)
        if not model.independent and distributed.is_first():
            rule = "a score depends on the requests that share its batch"
            print(f"warning: in mode {model.mode} {rule}; try mode companions", file=sys.stderr)

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.end_of_text

    @property
    def max_length(self) -> int:
        return self.model.config.model.context_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.model.tokenizer.encode(string.encode()).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Score (context, continuation) pairs of tokens.

        If one token spans the end of the context and the whole continuation, the harness passes no continuation tokens;
        such a pair is scored from its texts.
        """
        pairs: list[tuple[Prompt, Prompt]] = [
            (np.array(context, np.int32), np.array(continuation, np.int32)) if continuation else texts
            for texts, context, continuation in requests
        ]
        texts = [texts for texts, *_ in requests]
        return [*self._score("loglikelihood", texts, pairs, disable_tqdm)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args for request in requests]
        likelihoods = self._score("loglikelihood_rolling", texts, [("", text) for (text,) in texts], disable_tqdm)
        return [likelihood.log_prob for likelihood in likelihoods]

    def _score(self, kind: str, texts: list[tuple], pairs: list[tuple], disable_tqdm: bool) -> list[Likelihood]:
        likelihoods: list[Likelihood] = []
        with tqdm(total=len(pairs), desc=f"Running {kind} requests", disable=disable_tqdm) as bar:
            count = _PROGRESS_BATCHES * self.batch_size
            for first in range(0, len(pairs), count):
                part = self.model.log_likelihoods(pairs[first : first + count], self.batch_size)
                for text, likelihood in zip(texts[first:], part, strict=False):
                    value = tuple(likelihood) if kind == "loglikelihood" else likelihood.log_prob
                    self.cache_hook.add_partial(kind, text, value)
                likelihoods += part
                bar.update(len(part))
        return likelihoods

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate texts. Requests with the same options share batches, the longest prompts first."""
        texts, by_options = [""] * len(requests), {}  # type: ignore[var-annotated]
        prompts = [self.tok_encode(request.args[0]) or [self.eot_token_id] for request in requests]
        for index in sorted(range(len(requests)), key=lambda i: -len(prompts[i])):
            by_options.setdefault(json.dumps(requests[index].args[1], sort_keys=True), []).append(index)
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for indices in by_options.values():
                options = _generation_options(requests[indices[0]].args[1], self.max_gen_toks)
                room = max(self.max_length - options["max_tokens"], self.max_length // 2, 1)
                for number, first in enumerate(range(0, len(indices), self.batch_size)):
                    part = indices[first : first + self.batch_size]
                    batch = [np.array(prompts[index][-room:], np.int32) for index in part]
                    continuations = self.model.generate(batch, seed=number, **options)
                    for index, continuation in zip(part, continuations, strict=True):
                        texts[index] = continuation.text
                        self.cache_hook.add_partial("generate_until", requests[index].args, continuation.text)
                    bar.update(len(part))
        return texts


@register_model("mot_jax")
class MotJax(HarnessModel):
    """The newest checkpoint of a run, by default in a mode in which no sequence depends on another."""

    def __init__(
        self,
        workdir: epath.PathLike,
        mode: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | str | None = None,
        device: str | None = None,
    ):
        """Load the model.

        Args:
            workdir: of a run, or an export.
            mode: as in `load`.
            batch_size, max_batch_size: as in `HarnessModel`.
            device: a platform of JAX, such as `cpu` or `gpu:1`, or PyTorch's `cuda:1`; None is JAX's default device.
        """
        mesh = None if device is None else make_mesh(load_run_config(workdir), [_device(device)], trains=False)
        model = load(workdir, mode, mesh)
        for line in about_mode(model, workdir, chosen=mode is not None):
            print(line, file=sys.stderr)
        super().__init__(model, batch_size, max_batch_size)


def parse_batch_size(name: str, batch_size: int | str, largest: int | str | None = None) -> int:
    """Convert the harness' batch size into a number; UserError for anything but one above 0, `auto` and `auto:N`."""
    auto, _, times = str(batch_size).partition(":")
    is_auto = auto == "auto" and times.strip("0123456789.") == ""
    size = _positive(name, _AUTO_BATCH_SIZE if is_auto else batch_size)
    return size if largest is None or not is_auto else min(size, _positive("max_batch_size", largest))


def _positive(name: str, number: int | str) -> int:
    if not str(number).isdecimal() or int(number) < 1:
        raise UserError(f"{name} = {number!r}: must be a number above 0; try 8")
    return int(number)


def _device(name: str) -> jax.Device:
    """Return the device of the harness' argument `device`."""
    platform, _, index = str(name).partition(":")
    try:
        return jax.devices({"cuda": "gpu"}.get(platform, platform))[int(index or 0)]
    except (RuntimeError, ValueError, IndexError):
        words = ", ".join(f"{device.platform}:{device.id}" for device in jax.devices())
        raise UserError(f"device = {name!r}: there is no such device; there is {words}") from None


def _generation_options(kwargs: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """Convert a task's `generation_kwargs` into options of `LanguageModel.stream`; UserError for unsupported ones."""
    known = ("until", "do_sample", "temperature", "top_k", "top_p", *_LENGTH_OPTIONS)
    if unknown := [name for name in kwargs if name not in known]:
        raise UserError(*(f"generation_kwargs.{name}: no such option{nearest(name, known)}" for name in unknown))
    until = kwargs.get("until") or []
    sampled = kwargs.get("do_sample", kwargs.get("temperature", 0) > 0)
    return {
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
        "max_tokens": next((int(kwargs[name]) for name in _LENGTH_OPTIONS if name in kwargs), max_tokens),
        "temperature": float(kwargs.get("temperature", 1.0)) if sampled else 0.0,
        "top_k": kwargs.get("top_k") or None,
        "top_p": kwargs.get("top_p", 1.0),
    }


def evaluate(
    model: LanguageModel,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | str = 8,
) -> dict[str, Any]:
    """Evaluate a model on tasks of the harness.

    Args:
        model: in its mode.
        tasks: names or patterns of names.
        include_path: a directory with further tasks, in YAML.
        num_fewshot: examples before each question; None is the default of each task.
        limit: only the first examples of each task.
        batch_size: as in `HarnessModel`.

    Returns:
        The results as the harness returns them.

    Raises:
        UserError: there is no such task, or its data cannot be read.
    """
    manager = TaskManager(include_path=include_path)
    errors = [
        f"--tasks = {task!r}: no such task{nearest(task, manager.all_tasks)}"
        for task in tasks
        if not pattern_match([task], manager.all_tasks)
    ]
    if errors:
        raise UserError(*errors)
    try:
        loaded = manager.load(pattern_match(tasks, manager.all_tasks))
    except Exception as error:  # the harness and its datasets raise exceptions of any type
        raise UserError(f"--tasks = {','.join(tasks)}: cannot be loaded ({error_words(error)})") from error
    manager.load = lambda _: loaded  # so that `simple_evaluate` does not load them a second time
    return simple_evaluate(
        HarnessModel(model, batch_size),
        tasks=list(loaded["tasks"]),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )


def table(results: dict[str, Any]) -> str:
    """Format results as text."""
    return "\n".join(make_table(results, part) for part in ("results", "groups") if part in results)
