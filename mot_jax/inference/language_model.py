"""A trained model in an inference mode: generates, fills in and scores text."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mot_jax.config import Config
from mot_jax.data.text import open_tokenizer
from mot_jax.data.tokenizers import Tokenizer
from mot_jax.errors import ReportedError, UserError
from mot_jax.inference.generate import Decoding, Sampler, decode, left_padded, prefill
from mot_jax.inference.scoring import likeliest_tokens, right_padded, score, scoring_windows
from mot_jax.inference.sequences import GeneratedSequence
from mot_jax.inference.types import GAP, Continuation, Filled, Likelihood, Prompt
from mot_jax.modes import default_mode, enter, mode_of, read_files, trained_mode
from mot_jax.nn import transformer
from mot_jax.nn.sharding import batch_multiple
from mot_jax.nn.transformer import Params
from mot_jax.runs.restore import check_data, load_run, load_run_config
from mot_jax.runs.scores import measured
from mot_jax.runtime.compilation import default_tracing, disable_cache_for_cpu_mesh

_DECODE_STEPS = 8  # between two outputs of `stream`
_MIN_PROMPT_WIDTH = 8  # columns that prompts are padded to at least
_MAX_CHARACTERS_PER_TOKEN = 1024  # of the context: longer texts are refused without encoding them


class NotFiniteError(UserError):
    """A model whose outputs are NaN, as those of a diverged one are."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A trained model in an inference mode. `load` makes one from a workdir.

    Attributes:
        config: the config of the mode, as `modes.enter` returns it.
        params: by name, including those that the mode adds.
        tokenizer: of the training run.
        mode: the name of the mode.
        step: the number of training steps.
        mesh: the mesh that the parameters are sharded over; None is one device.
        companions: a digest of the reference sequences; empty in the modes that do not use them.
    """

    config: Config
    params: Params
    tokenizer: Tokenizer
    mode: str
    step: int
    mesh: Mesh | None = None
    companions: str = ""

    @property
    def independent(self) -> bool:
        """Whether no sequence of a batch depends on another."""
        return mode_of(self.mode).independent or self._inference_config.group_size == 1

    # --- causal models --------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Continuation]:
        """Generate a continuation of each prompt, all in one batch; `options` are those of `stream`."""
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
        numbers: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> Iterator[list[Continuation]]:
        """Yield the continuations of all prompts generated so far, repeatedly, every few decode steps.

        The text of a continuation is a prefix of all later ones: an incomplete character, or an end that may begin a
        stop, is held back.

        A sequence that outgrows the context (prompt included) continues from its last half context, on which the model
        runs a new prefill; this does not depend on the other sequences.

        Args:
            prompts: one or more, each neither empty nor longer than the context.
            max_tokens: tokens to generate after each prompt, at most.
            temperature: 0 selects the most likely token.
            top_k: sample from this many most likely tokens only, see `Sampler`.
            top_p: sample from the most likely tokens with this total probability only, see `Sampler`.
            stop: texts that end a sequence: the one that is complete first does, and is not part of the text. The
                sequence leaves its group at the next token if the stop is tokenized as the tokenizer encodes it,
                otherwise a few tokens later.
            ends: whether the end-of-text token also ends a sequence.
            seed: of the sampling.
            numbers: one for each prompt, below 2^32: a sampled token depends on the seed, on the number of its prompt,
                and on the count of tokens sampled before. None: 0, 1, ...
            batch_size: sequences of the batch, absent ones included, so that few programs are compiled for many
                batches; at least as many as prompts, and rounded up as by `round_batch_size`. None: as many as prompts.

        Raises:
            UserError: a prompt is empty or longer than the context, or an option is out of range.
        """
        if isinstance(prompts, (str, bytes)) or isinstance(stop, (str, bytes)):
            raise UserError(f"prompts = {prompts!r:.40}, stop = {stop!r:.40}: must be lists of texts; try [...]")
        stops = [_bytes(text) for text in stop]
        faults = [] if len(prompts) else ["prompt: there must be at least one; try 'def '"]
        for prompt in prompts:
            if fault := self.examine_prompt(prompt)[1]:
                faults.append(f"prompt = {_short(prompt) if len(prompt) else repr('')}: {fault}")
        if numbers is not None and (len(numbers) != len(prompts) or not all(0 <= n < 2**32 for n in numbers)):
            rule = f"must be one for each of the {len(prompts)} prompts, at least 0 and below 2^32"
            faults.append(f"numbers = {_short(np.asarray(numbers))}: {rule}; try None")
        self.check_options(stop, max_tokens, temperature, top_k, top_p, seed, faults)
        sequences = [
            GeneratedSequence(
                self.tokenizer,
                self.encode(prompt),
                None if isinstance(prompt, np.ndarray) else _bytes(prompt),
                stops,
            )
            for prompt in prompts
        ]
        batch_size = self.round_batch_size(max(len(prompts), batch_size or 1))
        all_numbers = np.zeros(batch_size, np.uint32)  # those of absent sequences do not matter
        all_numbers[: len(prompts)] = np.arange(len(prompts)) if numbers is None else numbers
        # On the device, only tokens whose text ends in the stop: normalizers may change it, or leave none of it.
        stop_tokens = [ids for text in stops if self.tokenizer.decode(ids := self.encode(text)).endswith(text)]
        if ends:
            stop_tokens.append(np.array([self.tokenizer.end_of_text]))
        sampler = Sampler(
            temperature=np.float32(temperature),
            top_k=np.int32(min(top_k or self.tokenizer.vocab_size, self.tokenizer.vocab_size)),
            top_p=np.float32(top_p),
            seed=np.uint32(seed),
            numbers=all_numbers,
            stops=_stop_table(stop_tokens),
        )
        filtered = top_k is not None or top_p < 1
        drawn = 0
        while drawn < max_tokens and not all(sequence.finished for sequence in sequences):
            texts = [sequence.window(self.config.model.context_length) for sequence in sequences]
            for state, new in self._decode_window(sequences, texts, max_tokens, drawn, sampler, filtered):
                arrays = jax.device_get((state.tokens, state.token_mask, state.log_probs, state.finished))
                self._check_numbers(arrays[2])
                # Not strict: the arrays end with the absent sequences of incomplete groups.
                for sequence, *(tokens, token_mask, log_probs, finished) in zip(sequences, *arrays, strict=False):
                    sequence.append(tokens[new][token_mask[new]], log_probs[new][token_mask[new]], finished)
                drawn += new.stop - new.start
                yield [sequence.continuation(is_last=drawn >= max_tokens) for sequence in sequences]
                if all(sequence.finished for sequence in sequences):
                    return

    def _decode_window(
        self,
        sequences: list[GeneratedSequence],
        texts: list[np.ndarray],
        max_tokens: int,
        drawn: int,
        sampler: Sampler,
        filtered: bool,
    ) -> Iterator[tuple[Decoding, slice]]:
        """Generate until the longest text fills the context: yield the state and its new columns, repeatedly.

        texts: the windows of the sequences. A sequence that the caller finishes in between leaves its group.
        """
        longest, model = max(map(len, texts)), self.config.model
        room = min(max_tokens, model.context_length - longest + 1)
        width = self._round(max(longest, _MIN_PROMPT_WIDTH))
        end = width + min(room, max_tokens - drawn)
        sizes = {"vocab_size": self.tokenizer.vocab_size, "end_of_text": self.tokenizer.end_of_text}
        sizes["filtered"] = filtered
        batch = left_padded(texts, len(sampler.numbers), width)
        with self._on_mesh():
            columns = width + self._round(room)
            state = prefill(
                model, self.params, np.int32(self.step), *batch, sampler, np.int32(drawn), columns=columns, **sizes
            )
        column = width
        while True:
            first_new, column = column, int(state.column)
            yield state, slice(first_new, column)
            if column >= end or bool(state.finished.all()):
                return
            with self._on_mesh():
                until = np.int32(min(column + _DECODE_STEPS, end))
                stopped = np.ones(len(state.finished), bool)  # the absent sequences of incomplete groups included
                stopped[: len(sequences)] = [sequence.finished for sequence in sequences]
                state = decode(model, self.params, np.int32(self.step), state, sampler, until, stopped, **sizes)

    def log_likelihoods(self, pairs: Sequence[tuple[Prompt, Prompt]], batch_size: int = 8) -> list[Likelihood]:
        """Return the likelihood of the continuation in each pair (context, continuation).

        The two texts are encoded together; a token that spans both belongs to the continuation. An empty context stands
        for the end of a preceding text. If a pair is longer than the context length, the model reads its last tokens.
        A continuation that is longer itself is scored in windows, of which all but the last read only the tokens that
        they score.

        Args:
            batch_size: sequences of a batch, rounded up to whole groups and to a multiple that the mesh can split.

        Raises:
            UserError: the model is a masked one, or `batch_size` is less than 1.
        """
        model = self.config.model
        if model.objective != "causal":
            raise UserError("model.objective = 'masked': gives continuations no probability; try `mot evaluate`")
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size}: must be at least 1; try 8")
        length, batch_size = model.context_length, self.round_batch_size(batch_size)
        short = min(self._round(-(-length // 4)), length)
        # The padded width of a window depends on its length only, so that its score depends on no other pair.
        by_width: dict[int, list] = {short: [], length: []}
        for index, pair in enumerate(pairs):
            for window in scoring_windows(*self._joined(*pair), length):
                by_width[short if len(window.tokens) <= short + 1 else length].append((index, window))
        sums, greedy = [0.0] * len(pairs), [True] * len(pairs)
        for width, items in by_width.items():
            for first in range(0, len(items), batch_size):
                indices, batch = zip(*items[first : first + batch_size], strict=True)
                with self._on_mesh():
                    scores = score(
                        model,
                        self.params,
                        np.int32(self.step),
                        *right_padded(batch, batch_size, width),
                        vocab_size=self.tokenizer.vocab_size,
                        end_of_text=self.tokenizer.end_of_text,
                    )
                log_probs_and_likeliest = jax.device_get(scores)
                self._check_numbers(log_probs_and_likeliest[0])
                for index, log_probs, likeliest in zip(indices, *log_probs_and_likeliest, strict=False):
                    sums[index] += float(log_probs.sum(dtype=np.float64))
                    greedy[index] &= bool(likeliest.all())
        return [Likelihood(*values) for values in zip(sums, greedy, strict=True)]

    def _joined(self, context: Prompt, continuation: Prompt) -> tuple[np.ndarray, int]:
        """Return the tokens of both texts, and the index of the continuation's first token, at least 1.

        An end-of-text token is put in front if there is no token before the continuation.
        """
        before, after = self.encode(context), self.encode(continuation)
        tokens, begin = np.concatenate([before, after]), len(before)
        if not isinstance(context, np.ndarray) and not isinstance(continuation, np.ndarray):
            tokens = self.encode(_bytes(context) + _bytes(continuation))
            common = min(len(before), len(tokens))
            begin = int(np.argmin([*(before[:common] == tokens[:common]), False]))
        if begin == 0:
            tokens, begin = np.append(np.int32(self.tokenizer.end_of_text), tokens), 1
        return tokens, begin

    # --- masked models --------------------------------------------------------------------------------------------

    def fill(self, texts: Sequence[Prompt], gap: str = GAP, batch_size: int = 32) -> list[Filled]:
        """Replace every `gap` in each text by the most likely token.

        In texts that are token ids, the gaps are the mask tokens, and there may be none.

        Args:
            batch_size: sequences of a batch, rounded up as by `round_batch_size`. Groups are formed in order of the
                texts, whatever the size.

        Raises:
            UserError: the model is causal, a text (not token ids) has no gap, a text is longer than the context or has
                token ids that the tokenizer lacks, or `batch_size` is less than 1.
        """
        if isinstance(texts, (str, bytes)):
            raise UserError(f"texts = {texts!r:.40}: must be a list of texts; try [...]")
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size}: must be at least 1; try 32")
        model, tokenizer, errors = self.config.model, self.tokenizer, []
        if model.objective != "masked":
            errors.append("model.objective = 'causal': has no gaps to fill; try `mot generate`")
        if not len(texts):
            errors.append(f"text: there must be at least one; try 'def {gap}ead('")
        if not gap:
            raise UserError("gap = '': must be a mark that stands for a missing token; try '_'")
        for text in texts:
            if isinstance(text, np.ndarray) and (fault := self._fault_of_ids(text)):
                errors.append(f"text = {_short(text)}: {fault}")
        if errors:
            raise UserError(*errors)
        sequences = [self._encode_gaps(text, gap) for text in texts]
        for text, sequence in zip(texts, sequences, strict=True):
            if isinstance(text, (str, bytes)) and tokenizer.mask_token not in sequence:
                errors.append(f"text = {_short(text)}: has no gap; try 'def {gap}ead('")
            elif len(sequence) > model.context_length:
                rule = f"has {len(sequence)} tokens, and the context {model.context_length}; try a part of it"
                errors.append(f"text = {_short(text)}: {rule}")
        if errors:
            raise UserError(*errors)
        batch_size = self.round_batch_size(min(batch_size, len(sequences)))
        filled: list[Filled] = []
        for first in range(0, len(sequences), batch_size):
            filled += self._fill_batch(sequences[first : first + batch_size], batch_size)
        return filled

    def _fill_batch(self, sequences: list[np.ndarray], batch_size: int) -> Iterator[Filled]:
        model, tokenizer = self.config.model, self.tokenizer
        tokens, lengths = np.zeros((batch_size, model.context_length), np.int32), np.zeros(batch_size, np.int32)
        for i, sequence in enumerate(sequences):
            tokens[i, : len(sequence)], lengths[i] = sequence, len(sequence)
        with self._on_mesh():
            predictions = likeliest_tokens(
                model,
                self.params,
                np.int32(self.step),
                tokens,
                lengths,
                vocab_size=tokenizer.vocab_size,
                end_of_text=tokenizer.end_of_text,
            )

        def text_of(tokens: np.ndarray) -> str:
            return tokenizer.decode(tokens).decode(errors="replace")

        predictions = jax.device_get(predictions)
        self._check_numbers(predictions[1][: len(sequences)])
        for sequence, likeliest, log_probs in zip(sequences, *predictions, strict=False):
            gaps = np.flatnonzero(sequence == tokenizer.mask_token)
            sequence[gaps] = likeliest[gaps]
            guesses = [(text_of(sequence[i : i + 1]), float(np.exp(log_probs[i]))) for i in gaps]
            yield Filled(text_of(sequence), guesses)

    def _encode_gaps(self, text: Prompt, gap: str) -> np.ndarray:
        if isinstance(text, np.ndarray):
            return self.encode(text)
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        first, *others = (self.encode(piece) for piece in text.split(gap))
        mask = np.array([self.tokenizer.mask_token], np.int32)
        return np.concatenate([first, *(part for other in others for part in (mask, other))])

    # --- common -----------------------------------------------------------------------------------------------------

    def _round(self, size: int) -> int:
        """Round up to a power of two, so that few programs are compiled, and to a multiple of the number of devices."""
        power, devices = 1 << (size - 1).bit_length(), 1 if self.mesh is None else self.mesh.size
        return -(-power // devices) * devices

    def round_batch_size(self, sequences: int) -> int:
        """Round a number of sequences up to whole groups, and to a multiple that the mesh can split."""
        config = self._inference_config
        multiple = config.group_size if self.mesh is None else batch_multiple(config, self.mesh)
        return -(-sequences // multiple) * multiple

    @property
    def _inference_config(self) -> Config:
        """The config without `data.shuffle_group_size`, which concerns the order of the dataset only."""
        return dataclasses.replace(self.config, data=dataclasses.replace(self.config.data, shuffle_group_size=None))

    @contextlib.contextmanager
    def _on_mesh(self) -> Iterator[None]:
        with default_tracing(), contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            yield

    def _check_numbers(self, log_probs: np.ndarray) -> None:
        """Raise NotFiniteError if outputs of the model are NaN, which no token follows from; names the cause."""
        if not np.isnan(log_probs).any():
            return
        with self._on_mesh():
            bad = [name for name, value in self.params.items() if not bool(jnp.isfinite(value).all())]
        reason = f"as {len(bad)} of its {len(self.params)} parameters have, {bad[0]} first" if bad else "by overflow"
        raise NotFiniteError(
            f"model after {self.step} steps, mode {self.mode}: its outputs have values that are not finite, {reason}; "
            "try an earlier checkpoint"
        )

    def encode(self, text: Prompt) -> np.ndarray:
        """Return the tokens of a text, int32 [n].

        Raises UserError for token ids that the tokenizer, with the mask token of a masked model, does not have.
        """
        if not isinstance(text, np.ndarray):
            return self.tokenizer.encode(_bytes(text)).astype(np.int32)
        if fault := self._fault_of_ids(text):
            raise UserError(f"text = {_short(text)}: {fault}")
        return text.astype(np.int32)

    def _fault_of_ids(self, ids: np.ndarray) -> str:
        """Return the rule that token ids break, in words; empty if the model has them all."""
        masked = self.config.model.objective == "masked"
        most = max(self.tokenizer.vocab_size - 1, self.tokenizer.mask_token if masked else 0)
        if ids.ndim == 1 and ids.dtype.kind in "iu" and (not ids.size or 0 <= ids.min() <= ids.max() <= most):
            return ""
        return f"must be token ids, [n] whole numbers from 0 to {most}; try the text instead of its ids"

    def examine_prompt(self, prompt: Prompt) -> tuple[int, str]:
        """Return the number of tokens, and the rule that the prompt breaks, in words; empty if it can be continued."""
        context = self.config.model.context_length
        if not isinstance(prompt, np.ndarray) and len(prompt) > _MAX_CHARACTERS_PER_TOKEN * context:
            return 0, f"has {len(prompt):,} characters, and the context {context} tokens; try its end"
        if isinstance(prompt, np.ndarray) and (fault := self._fault_of_ids(prompt)):
            return 0, fault
        size = len(self.encode(prompt))
        if not size:
            return 0, "is empty; try 'def '"
        return size, f"has {size} tokens, and the context {context}; try its end" if size > context else ""

    def check_options(
        self,
        stop: Sequence[str | bytes] = (),
        max_tokens: int = 200,
        temperature: float = 0.7,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        faults: Sequence[str] = (),
    ) -> None:
        """Raise UserError with `faults` and those of the options of `stream`, if there are any."""
        errors = list(faults)
        if self.config.model.objective != "causal":
            errors.append("model.objective = 'masked': cannot continue a text; try `mot fill`")
        if not all(map(len, stop)):
            errors.append("stop = '': is empty; try a line end")
        rules = {
            "max_tokens": (max_tokens, max_tokens >= 1, "at least 1", 200),
            "temperature": (temperature, 0 <= temperature < float("inf"), "finite and at least 0", 0.7),
            "top_k": (top_k, top_k is None or top_k >= 1, "at least 1", 40),
            "top_p": (top_p, 0 < top_p <= 1, "above 0 and at most 1", 0.9),
            "seed": (seed, 0 <= seed < 2**32, "at least 0 and below 2^32", 0),
        }
        errors += [
            f"{name} = {value}: must be {rule}; try {good}"
            for name, (value, valid, rule, good) in rules.items()
            if not valid
        ]
        if errors:
            raise UserError(*errors)

    def fingerprint(self) -> str:
        """Return a digest of all that answers depend on, the same for any mesh and directory.

        It has the reference sequences instead of the summaries of them, whose last bits depend on the mesh.
        """
        trained = {name: value for name, value in self.params.items() if "/companion_" not in name}
        with self._on_mesh():
            sums = {name: int(value) for name, value in jax.device_get(_bit_sums(trained)).items()}
        names = repr(self.config.model), self.mode, self.tokenizer.fingerprint, self.companions
        identity = (*names, self.step, sorted(sums.items()))
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


@jax.jit
def _bit_sums(params: Params) -> dict[str, jax.Array]:
    """The sum of the bits of each parameter as whole numbers, modulo 2^32: independent of the order of summation."""

    def bit_sum(value: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(value, f"uint{8 * value.dtype.itemsize}")
        return bits.astype("uint32").sum(dtype="uint32")

    return {name: bit_sum(value) for name, value in params.items()}


@default_tracing()
def load(
    workdir: epath.PathLike, mode: str | None = None, mesh: Mesh | None = None, unroll: bool = False
) -> LanguageModel:
    """Load the newest checkpoint of a run, or an exported model, in an inference mode.

    Args:
        workdir: the run's directory, or the directory of an export.
        mode: a name that `modes.mode_of` accepts, such as `companions` or `token_choice:2`. None is the default of the
            run (`modes.default_mode`), in which no sequence depends on another.
        mesh: with Explicit axes, see `nn.sharding.make_mesh`; the parameters are sharded over it. None is one device.
        unroll: unroll scanned layers (`transformer.unroll`). This decodes faster on a CPU and takes longer to compile,
            so it pays off for long generations.

    On several CPU devices this turns JAX's compilation cache off for the rest of the process, see
    `compilation.disable_cache_for_cpu_mesh`.

    Raises:
        UserError: something is missing in `workdir`, or does not match its config.
    """
    if mesh is not None:
        disable_cache_for_cpu_mesh(mesh)
    run = load_run(workdir, mesh)
    tokenizer = open_tokenizer(run.config)
    check_data({"tokenizer": tokenizer.fingerprint}, run.config, workdir)
    mode = default_mode(run.config)[0] if mode is None else mode
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        companions, thresholds = read_files(mode, run.config, workdir, run.step)
        config, params = enter(mode, run.config, run.params, run.step, companions, thresholds)
        digest = "" if companions is None else hashlib.sha256(companions.tobytes()).hexdigest()[:16]
        if unroll:
            model, params = transformer.unroll(config.model, params)
            config = dataclasses.replace(config, model=model)
    return LanguageModel(config, params, tokenizer, mode, run.step, mesh, digest)


def about_mode(model: LanguageModel, workdir: epath.PathLike, chosen: bool) -> list[str]:
    """Describe the mode in lines for the user.

    The lines state whether sequences depend on each other, why this mode is the default (unless the user has `chosen`
    it), and its loss compared with that of the mode of training, if `mot evaluate` has measured both.
    """
    run_config, mode = load_run_config(workdir), model.mode
    dependence = (
        "no sequence depends on another" if model.independent else "the sequences of a group influence each other"
    )
    lines = [f"mode {mode}: {dependence}" + ("" if chosen else f"; the default, since {default_mode(run_config)[1]}")]
    if mode == (trained := trained_mode(run_config)):
        return lines
    try:
        scores = measured(workdir, model.step)
    except ReportedError:  # a damaged modes.json does not prevent generation
        scores = {}
    if mode in scores and trained in scores:
        losses = " against ".join(f"{scores[name]['bits_per_byte']:.3f} in {name}" for name in (mode, trained))
        comparison = f"{losses}, bits per byte of {scores[mode]['windows']:,} validation windows"
    else:
        comparison = f"the loss of this mode is not measured yet: mot evaluate {workdir} --mode all"
    return [*lines, f"warning: the model was trained in mode {trained}; {comparison}"]


def _stop_table(stops: list[np.ndarray]) -> np.ndarray:
    """Make `Sampler.stops`, in one of few shapes, so that few programs are compiled."""
    shape = len(stops) + -len(stops) % 4, 8 * -(-max(map(len, stops), default=1) // 8)
    table = np.full(shape, -2, np.int32)
    for row, stop in zip(table, stops, strict=False):
        row[:] = [-1] * (shape[1] - len(stop)) + stop.tolist()
    return table


def _bytes(text: str | bytes) -> bytes:
    # Command-line arguments that are not UTF-8 come with surrogate escapes.
    return text.encode(errors="surrogateescape") if isinstance(text, str) else text


def _short(text: Prompt) -> str:
    if isinstance(text, np.ndarray):
        return f"{text.dtype}{list(text.shape)} {text.ravel()[:8].tolist()}" + ("" if text.size <= 8 else "...")
    return repr(text if len(text) < 30 else text[:30]) + ("" if len(text) < 30 else "...")
