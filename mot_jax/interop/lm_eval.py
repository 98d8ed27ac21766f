"""Our models in EleutherAI's lm-evaluation-harness, which `pip install 'mot_jax[lm-eval]'` brings.

Once this module is imported the harness knows the model `mot_jax`, with the arguments of `MotJax`:

    import lm_eval, mot_jax.lm_eval
    lm_eval.simple_evaluate("mot_jax", {"workdir": "runs/demo", "mode": "companions"}, tasks=["arc_easy"])
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table, pattern_match
from tqdm import tqdm

from mot_jax.errors import UserError, error_words, nearest
from mot_jax.inference.language_model import LanguageModel, Likelihood, Prompt, about_mode, load
from mot_jax.runtime import distributed

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_TOLD = 64  # batches after which the progress is shown


class HarnessModel(TemplateLM):
    """A model that is loaded. The harness tokenizes, as it does for all causal models."""

    max_gen_toks = 256  # where a task does not say

    def __init__(self, model: LanguageModel, batch_size: int | str = 8):
        """batch_size: rows, rounded up to whole groups; `auto` is 8."""
        super().__init__()
        self.model, self.batch_size = model, 8 if batch_size == "auto" else int(batch_size)
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
        """A continuation that the harness leaves no token to, since one has some of both, stays text."""
        pairs: list[tuple[Prompt, Prompt]] = [
            (np.array(context, np.int32), np.array(continuation, np.int32)) if continuation else texts
            for texts, context, continuation in requests
        ]
        texts = [texts for texts, *_ in requests]
        return [*self._score("loglikelihood", texts, pairs, disable_tqdm)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args for request in requests]
        found = self._score("loglikelihood_rolling", texts, [("", text) for (text,) in texts], disable_tqdm)
        return [likelihood.log_prob for likelihood in found]

    def _score(self, kind: str, texts: list[tuple], pairs: list[tuple], disable_tqdm: bool) -> list[Likelihood]:
        found: list[Likelihood] = []
        with tqdm(total=len(pairs), desc=f"Running {kind} requests", disable=disable_tqdm) as bar:
            for first in range(0, len(pairs), _TOLD * self.batch_size):
                part = self.model.log_likelihoods(pairs[first : first + _TOLD * self.batch_size], self.batch_size)
                for text, one in zip(texts[first:], part, strict=False):
                    self.cache_hook.add_partial(kind, text, tuple(one) if kind == "loglikelihood" else one.log_prob)
                found += part
                bar.update(len(part))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Requests of the same options share batches, the longest first."""
        found, by_options = [""] * len(requests), {}  # type: ignore[var-annotated]
        prompts = [self.tok_encode(request.args[0]) or [self.eot_token_id] for request in requests]
        for index in sorted(range(len(requests)), key=lambda i: -len(prompts[i])):
            by_options.setdefault(json.dumps(requests[index].args[1], sort_keys=True), []).append(index)
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for indices in by_options.values():
                options = _options(requests[indices[0]].args[1], self.max_gen_toks)
                room = max(self.max_length - options["max_tokens"], self.max_length // 2, 1)
                for number, first in enumerate(range(0, len(indices), self.batch_size)):
                    part = indices[first : first + self.batch_size]
                    rows = [np.array(prompts[index][-room:], np.int32) for index in part]
                    for index, written in zip(part, self.model.generate(rows, seed=number, **options), strict=True):
                        found[index] = written.text
                        self.cache_hook.add_partial("generate_until", requests[index].args, written.text)
                    bar.update(len(part))
        return found


@register_model("mot_jax")
class MotJax(HarnessModel):
    """The newest checkpoint of the run in `workdir`, by default in a mode in which no row hears another."""

    def __init__(self, workdir: epath.PathLike, mode: str | None = None, batch_size: int | str = 8):
        model = load(workdir, mode)
        for line in about_mode(model, workdir, chosen=mode is not None):
            print(line, file=sys.stderr)
        super().__init__(model, batch_size)


def _options(asked: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """A task's `generation_kwargs` as options of `LanguageModel.stream`. Raises UserError for those it lacks."""
    known = ("until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS)
    if unknown := [name for name in asked if name not in known]:
        raise UserError(*(f"generation_kwargs.{name}: no such option{nearest(name, known)}" for name in unknown))
    until = asked.get("until") or []
    sampled = asked.get("do_sample", asked.get("temperature", 0) > 0)
    return {
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
        "max_tokens": next((int(asked[name]) for name in _LENGTHS if name in asked), max_tokens),
        "temperature": float(asked.get("temperature", 1.0)) if sampled else 0.0,
        "top_k": asked.get("top_k") or None,
        "top_p": asked.get("top_p", 1.0),
    }


def evaluate(
    model: LanguageModel,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """The harness' results of tasks, by name or pattern; `include_path`: a directory with more of them, in YAML.

    Raises UserError for a task that there is none of, or whose data cannot be read.
    """
    manager = TaskManager(include_path=include_path)
    faults = [
        f"--tasks = {task!r}: no such task{nearest(task, manager.all_tasks)}"
        for task in tasks
        if not pattern_match([task], manager.all_tasks)
    ]
    if faults:
        raise UserError(*faults)
    try:
        loaded = manager.load(pattern_match(tasks, manager.all_tasks))
    except Exception as error:  # the harness and its data sets raise what they like
        raise UserError(f"--tasks = {','.join(tasks)}: cannot be loaded ({error_words(error)})") from error
    manager.load = lambda _: loaded  # not again
    return simple_evaluate(
        HarnessModel(model, batch_size),
        tasks=list(loaded["tasks"]),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )


def table(results: dict[str, Any]) -> str:
    """For people."""
    return "\n".join(make_table(results, part) for part in ("results", "groups") if part in results)
