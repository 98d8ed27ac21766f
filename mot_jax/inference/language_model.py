"""A trained model to write, fill in and score text with, in an inference mode."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mot_jax.config import Config
from mot_jax.data.text import open_tokenizer
from mot_jax.data.tokenizers import Tokenizer
from mot_jax.errors import UserError
from mot_jax.inference.continuation import Continuation, Row
from mot_jax.inference.generate import Decoding, Sampler, decode, fill, left_padded, prefill
from mot_jax.inference.scoring import right_padded, score, windows
from mot_jax.modes import default_mode, enter, mode_of, trained_mode
from mot_jax.modes.companions import load_companions
from mot_jax.nn.sharding import batch_multiple
from mot_jax.nn.transformer import Params, unroll
from mot_jax.runs.restore import check_data, load_run, load_run_config
from mot_jax.runs.scores import measured
from mot_jax.runtime.compilation import compile_anew_for

_STREAMED = 8  # tokens that the device writes before people see them
_FEWEST = 8  # columns that a prompt is padded to at least


Prompt = str | bytes | np.ndarray  # text, or its tokens, int [n]
GAP = "\N{WHITE SQUARE}"


class Filled(NamedTuple):
    """text: with the likeliest token in each gap. gaps: (token, its probability) of each."""

    text: str
    gaps: list[tuple[str, float]]


class Likelihood(NamedTuple):
    """log_prob: natural, of all tokens of a continuation together. greedy: whether each of them is the likeliest."""

    log_prob: float
    greedy: bool


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """config: in its mode. params: by name, with what the mode needs. mode, step: which, after how many updates.

    mesh: where the parameters lie; None is one device.
    """

    config: Config
    params: Params
    tokenizer: Tokenizer
    mode: str
    step: int
    mesh: Mesh | None = None

    @property
    def independent(self) -> bool:
        """Whether no row hears another."""
        return mode_of(self.mode).independent or self._grouping.group_size == 1

    # --- causal models --------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Continuation]:
        """What the model writes after each prompt, all in one batch; `options` are those of `stream`."""
        *_, last = self.stream(prompts, **options)
        return last

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 200,
        temperature: float = 0.7,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop: Sequence[str | bytes] = (),
        ends: bool = True,
        seed: int = 0,
    ) -> Iterator[list[Continuation]]:
        """The continuations so far, again and again while they grow.

        temperature: 0 takes the likeliest token. top_k, top_p: only the likeliest tokens, see `Sampler`. stop: texts
        that end a row; a group hears it no more from the next token on if they are written as the tokenizer would,
        and otherwise after a few. ends: the end of a text ends a row as well.

        A row that outgrows the context, prompt and all, goes on from its last half context, read anew, whatever the
        other rows do. Raises UserError for an empty prompt, one longer than the context, or an option out of range.
        """
        if isinstance(prompts, (str, bytes)) or isinstance(stop, (str, bytes)):
            raise UserError(f"prompts = {prompts!r:.40}, stop = {stop!r:.40}: must be lists of texts; try [...]")
        rows = [Row(self._encode(prompt)) for prompt in prompts]
        self._check(prompts, rows, stop, max_tokens, temperature, top_k, top_p, seed)
        stops, spelt = [self._encode(text) for text in stop], [_bytes(text) for text in stop]
        ended = [*stops, *([np.array([self.tokenizer.end_of_text])] if ends else [])]
        sampler = Sampler(
            temperature=np.float32(temperature),
            top_k=np.int32(min(top_k or self.tokenizer.vocab_size, self.tokenizer.vocab_size)),
            top_p=np.float32(top_p),
            seed=np.uint32(seed),
            stops=_table(ended),
        )
        filtered = top_k is not None or top_p < 1
        drawn = 0
        while drawn < max_tokens and not all(row.finished for row in rows):
            texts = [row.window(self.config.model.context_length) for row in rows]
            for state, new in self._fill_columns(texts, max_tokens, drawn, sampler, filtered):
                arrays = jax.device_get((state.tokens, state.real, state.log_probs, state.finished))
                for row, *(tokens, real, log_probs, finished) in zip(rows, *arrays, strict=False):  # absent ones follow
                    row.take(tokens[new][real[new]], log_probs[new][real[new]], finished)
                    row.end_at(spelt, self.tokenizer)
                drawn += new.stop - new.start
                yield [row.continuation(self.tokenizer) for row in rows]
                if all(row.finished for row in rows):
                    return

    def _fill_columns(
        self, texts: list[np.ndarray], max_tokens: int, drawn: int, sampler: Sampler, filtered: bool
    ) -> Iterator[tuple[Decoding, slice]]:
        """As many columns as the context has room for: the state, and the columns that are new, again and again."""
        longest, model = max(map(len, texts)), self.config.model
        room = min(max_tokens, model.context_length - longest + 1)
        width = self._round(max(longest, _FEWEST))
        last = width + min(room, max_tokens - drawn)
        sizes = {"vocab_size": self.tokenizer.vocab_size, "end_of_text": self.tokenizer.end_of_text}
        sizes["filtered"] = filtered
        batch = left_padded(texts, self._rows(len(texts)), width)
        with self._on_mesh():
            columns = width + self._round(room)
            state = prefill(
                model, self.params, np.int32(self.step), *batch, sampler, np.int32(drawn), columns=columns, **sizes
            )
        column = width
        while True:
            column, seen = int(state.column), column
            yield state, slice(seen, column)
            if column >= last or bool(state.finished.all()):
                return
            with self._on_mesh():
                until = np.int32(min(column + _STREAMED, last))
                state = decode(model, self.params, np.int32(self.step), state, sampler, until, **sizes)

    def log_likelihoods(self, pairs: Sequence[tuple[Prompt, Prompt]], batch_size: int = 8) -> list[Likelihood]:
        """Of each pair of a context and its continuation, how likely the model writes the latter after the former.

        Texts are encoded together, and tokens that hold some of both are the continuation's. An empty context is the
        end of a text before. Of what is longer than the context length the last tokens are read; a continuation that
        is longer itself is predicted a window at a time, each but the last from its own tokens alone.

        batch_size: rows of a batch, rounded up to whole groups and to the mesh. Raises UserError for a masked model.
        """
        model = self.config.model
        if model.objective != "causal":
            raise UserError("model.objective = 'masked': gives continuations no probability; try `mot evaluate`")
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size}: must be at least 1; try 8")
        length, rows = model.context_length, self._rows(batch_size)
        short = min(self._round(-(-length // 4)), length)
        # A window's own length chooses its width, so that its score depends on no other pair.
        by_width: dict[int, list] = {short: [], length: []}
        for index, pair in enumerate(pairs):
            for window in windows(*self._joined(*pair), length):
                by_width[short if len(window.tokens) <= short + 1 else length].append((index, window))
        sums, greedy = [0.0] * len(pairs), [True] * len(pairs)
        for width, items in by_width.items():
            for first in range(0, len(items), rows):
                indices, part = zip(*items[first : first + rows], strict=True)
                with self._on_mesh():
                    found = score(
                        model,
                        self.params,
                        np.int32(self.step),
                        *right_padded(part, rows, width),
                        vocab_size=self.tokenizer.vocab_size,
                        end_of_text=self.tokenizer.end_of_text,
                    )
                for index, log_probs, likeliest in zip(indices, *jax.device_get(found), strict=False):
                    sums[index] += float(log_probs.sum(dtype=np.float64))
                    greedy[index] &= bool(likeliest.all())
        return [Likelihood(*found) for found in zip(sums, greedy, strict=True)]

    def _joined(self, context: Prompt, continuation: Prompt) -> tuple[np.ndarray, int]:
        """The tokens of both, and where those of the continuation begin: at 1 at least, after an end of text."""
        before, after = self._encode(context), self._encode(continuation)
        tokens, begin = np.concatenate([before, after]), len(before)
        if not isinstance(context, np.ndarray) and not isinstance(continuation, np.ndarray):
            tokens = self._encode(_bytes(context) + _bytes(continuation))
            same = min(len(before), len(tokens))
            begin = int(np.argmin([*(before[:same] == tokens[:same]), False]))
        if begin == 0:
            tokens, begin = np.append(np.int32(self.tokenizer.end_of_text), tokens), 1
        return tokens, begin

    # --- masked models --------------------------------------------------------------------------------------------

    def fill(self, texts: Sequence[Prompt], gap: str = GAP) -> list[Filled]:
        """Each text with the likeliest token in the place of every `gap`, all of them in one batch.

        Where texts are tokens, mask tokens are the gaps, and there may be none. Raises UserError for a causal model,
        words without a gap, or a text longer than the context.
        """
        model, tokenizer, faults = self.config.model, self.tokenizer, []
        if model.objective != "masked":
            faults.append("model.objective = 'causal': has no gaps to fill; try `mot generate`")
        if not texts:
            faults.append(f"text: there must be at least one; try 'def {gap}ead('")
        if not gap:
            raise UserError("gap = '': must be a mark that stands for a missing token; try '_'")
        rows = [self._with_gaps(text, gap) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if isinstance(text, (str, bytes)) and tokenizer.mask_token not in row:
                faults.append(f"text = {_short(text)}: has no gap; try 'def {gap}ead('")
            elif len(row) > model.context_length:
                rule = f"has {len(row)} tokens, and the context {model.context_length}; try a part of it"
                faults.append(f"text = {_short(text)}: {rule}")
        if faults:
            raise UserError(*faults)
        tokens, real = np.zeros((2, self._rows(len(rows)), model.context_length), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], real[i, : len(row)] = row, 1
        segments = np.cumsum(tokens == tokenizer.end_of_text, axis=1, dtype=np.int32) if model.document_mask else None
        with self._on_mesh():
            found = fill(
                model, self.params, np.int32(self.step), tokens, real.astype(bool), segments, tokenizer.vocab_size
            )

        def words(tokens: np.ndarray) -> str:
            return tokenizer.decode(tokens).decode(errors="replace")

        filled = []
        for row, best, log_probs in zip(rows, *jax.device_get(found), strict=False):
            gaps = np.flatnonzero(row == tokenizer.mask_token)
            row[gaps] = best[gaps]
            filled.append(Filled(words(row), [(words(row[i : i + 1]), float(np.exp(log_probs[i]))) for i in gaps]))
        return filled

    def _with_gaps(self, text: Prompt, gap: str) -> np.ndarray:
        if isinstance(text, np.ndarray):
            return text.astype(np.int32)
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        first, *others = (self._encode(piece) for piece in text.split(gap))
        mask = np.array([self.tokenizer.mask_token], np.int32)
        return np.concatenate([first, *(part for other in others for part in (mask, other))])

    # --- both -----------------------------------------------------------------------------------------------------

    def _round(self, size: int) -> int:
        """Up to a power of two, so that few programs are compiled, and to parts for every device."""
        power, parts = 1 << (size - 1).bit_length(), 1 if self.mesh is None else self.mesh.size
        return -(-power // parts) * parts

    def _rows(self, texts: int) -> int:
        config = self._grouping
        multiple = config.group_size if self.mesh is None else batch_multiple(config, self.mesh)
        return -(-texts // multiple) * multiple

    @property
    def _grouping(self) -> Config:
        """Without what the shuffle of the training keeps together, which does not matter here."""
        return dataclasses.replace(self.config, data=dataclasses.replace(self.config.data, shuffle_group_size=None))

    def _on_mesh(self) -> Any:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _encode(self, text: Prompt) -> np.ndarray:
        if isinstance(text, np.ndarray):
            return text.astype(np.int32)
        return self.tokenizer.encode(_bytes(text)).astype(np.int32)

    def _check(self, prompts, rows, stop, max_tokens, temperature, top_k, top_p, seed) -> None:
        faults, context = [], self.config.model.context_length
        if self.config.model.objective != "causal":
            faults.append("model.objective = 'masked': continues no text; try `mot fill`")
        if not len(prompts):
            faults.append("prompt: there must be at least one; try 'def '")
        for prompt, row in zip(prompts, rows, strict=True):
            size = len(row.text)
            if not size:
                faults.append("prompt = '': is empty; try 'def '")
            elif size > context:
                faults.append(f"prompt = {_short(prompt)}: has {size} tokens, and the context {context}; try its end")
        if not all(map(len, stop)):
            faults.append("stop = '': is empty; try a line end")
        rules = {
            "max_tokens": (max_tokens, max_tokens >= 1, "at least 1", 200),
            "temperature": (temperature, 0 <= temperature < float("inf"), "finite and at least 0", 0.7),
            "top_k": (top_k, top_k is None or top_k >= 1, "at least 1", 40),
            "top_p": (top_p, 0 < top_p <= 1, "above 0 and at most 1", 0.9),
            "seed": (seed, 0 <= seed < 2**32, "at least 0 and below 2^32", 0),
        }
        faults += [
            f"{name} = {v}: must be {rule}; try {good}" for name, (v, fine, rule, good) in rules.items() if not fine
        ]
        if faults:
            raise UserError(*faults)


def load(
    workdir: epath.PathLike, mode: str | None = None, mesh: Mesh | None = None, apart: bool = False
) -> LanguageModel:
    """The newest checkpoint of a run, or an exported model, in an inference mode.

    mode: a name that `modes.mode_of` knows; None is the run's own default, in which no row sees another's text. mesh:
    with our Explicit axes, to spread the parameters over; None is one device. apart: every block by itself
    (`model.unroll`), for who writes much on a CPU. On several CPU devices JAX's compilation cache is off from here on,
    see `compilation.compile_anew_for`. Raises UserError for what is missing or does not match.
    """
    if mesh is not None:
        compile_anew_for(mesh)
    run = load_run(workdir, mesh)
    tokenizer = open_tokenizer(run.config)
    check_data({"tokenizer": tokenizer.fingerprint}, run.config, workdir)
    mode = default_mode(run.config)[0] if mode is None else mode
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        config, params = enter(mode, run.config, run.params, run.step, load_companions(workdir))
        if apart:
            model, params = unroll(config.model, params)
            config = dataclasses.replace(config, model=model)
    return LanguageModel(config, params, tokenizer, mode, run.step, mesh)


def about_mode(model: LanguageModel, workdir: epath.PathLike, chosen: bool) -> list[str]:
    """For people: who hears whom; why this mode, unless it was `chosen`; and what it costs beside that of training."""
    run, mode = load_run_config(workdir), model.mode
    heard = "no row hears another" if model.independent else "the rows of a group influence each other"
    lines = [f"mode {mode}: {heard}" + ("" if chosen else f"; the default, since {default_mode(run)[1]}")]
    if mode == (trained := trained_mode(run)):
        return lines
    try:
        scores = measured(workdir, model.step)
    except UserError:  # damaged, which is no reason not to write
        scores = {}
    if mode in scores and trained in scores:
        cost = " against ".join(f"{scores[name]['bits_per_byte']:.3f} in {name}" for name in (mode, trained))
        found = f"{cost}, bits per byte of {scores[mode]['windows']:,} validation windows"
    else:
        found = f"what that costs is not measured yet: mot evaluate {workdir} --mode all"
    return [*lines, f"warning: the model was trained in mode {trained}; {found}"]


def _table(stops: list[np.ndarray]) -> np.ndarray:
    """`Sampler.stops`, of few sizes, so that few programs are compiled."""
    size = len(stops) + -len(stops) % 4, 8 * -(-max(map(len, stops), default=1) // 8)
    table = np.full(size, -2, np.int32)  # no token
    for row, stop in zip(table, stops, strict=False):
        row[:] = [-1] * (size[1] - len(stop)) + stop.tolist()
    return table


def _bytes(text: str | bytes) -> bytes:
    return (
        text.encode(errors="surrogateescape") if isinstance(text, str) else text
    )  # what a shell gives may be no UTF-8


def _short(text: Prompt) -> str:
    return repr(text if len(text) < 30 else text[:30]) + ("" if len(text) < 30 else "...")
