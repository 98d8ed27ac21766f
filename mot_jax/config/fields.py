"""The fields of an experiment: frozen dataclasses, plain data. Each says whether it is part of a run's identity."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, ClassVar, Literal


class ConfigError(ValueError):
    """A mistake of the user's. Each fault is one line: the field, the value, the rule, a value that would work."""

    def __init__(self, *faults: str):
        super().__init__("\n".join(faults))
        self.faults = faults


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `names`, or all of them if none is close."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; there is {', '.join(names)}"


def _free(default: Any) -> Any:
    """A field that may differ when a run is resumed: it changes no number of the training."""
    return dataclasses.field(default=default, metadata={"resume": "free"})


def _extendable(default: Any) -> Any:
    """A field that may grow when a run is resumed."""
    return dataclasses.field(default=default, metadata={"resume": "extendable"})


@dataclasses.dataclass(frozen=True)
class MixingConfig:
    """How the tokens of a group are mixed (PAPER.md sections 2 and 3).

    merge: where the mixing weights come from: `softmax` of the controller's logits over the group; `uniform`, 1/G, not
        learned; `one_hot`, each expert takes its first arg-max token (the limit of temperature 0).
    temperature: T of softmax(logits / T); 0 is the one-hot limit.
    """

    merge: Literal["softmax", "uniform", "one_hot"] = "softmax"
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """A dense feed-forward layer of width `d_ff`; `bias`: biases on both linear maps, as in the paper's."""

    kind: ClassVar[str] = "dense"
    bias: bool = True


@dataclasses.dataclass(frozen=True)
class MixtureOfTokensConfig:
    """A Mixture-of-Tokens layer.

    group_size: G, the number of sequences whose tokens at one position are mixed.
    num_experts: E, the number of experts, and of mixtures per group and position.
    expert_dim: F, the hidden width of an expert; None is the paper's rule E F = G (d_ff - shared_dim), which costs the
        FLOPs of the dense layer.
    flop_matched: refuse an `expert_dim` that breaks that rule.
    shared_dim: the hidden width of a dense expert beside the mixture that sees every token; 0 for none.
    *_init_scale: multiplies the standard deviation of the model's init for that matrix.
    saved: what is kept from the forward to the backward pass besides the layer's input and the mixing weights:
        `nothing`, the experts' `pre_activations`, or `all` (mixtures and expert outputs as well). What is not kept is
        computed again.
    """

    kind: ClassVar[str] = "mixture_of_tokens"
    group_size: int = 32
    num_experts: int = 32
    expert_dim: int | None = None
    flop_matched: bool = False
    shared_dim: int = 0
    mixing: MixingConfig = MixingConfig()
    controller_init_scale: float = 1.0
    w_in_init_scale: float = 1.0
    w_out_init_scale: float = 1.0
    saved: Literal["nothing", "pre_activations", "all"] = "pre_activations"

    def hidden_dim(self, d_ff: int) -> int:
        """F: `expert_dim` as given, or by the rule for the dense width `d_ff`."""
        if self.expert_dim is not None:
            return self.expert_dim
        return self.group_size * (d_ff - self.shared_dim) // self.num_experts


FeedForwardConfig = DenseConfig | MixtureOfTokensConfig


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Every matrix starts with standard deviation sqrt(scale / fan_in) (PAPER.md section 5).

    fan_in is 1 for the embeddings. `cut`: a truncated normal's absolute bound; None means two standard deviations.
    """

    distribution: Literal["truncated_normal", "normal", "uniform"] = "truncated_normal"
    scale: float = 0.1
    cut: float | None = 0.2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A causal pre-LayerNorm decoder with learned positions and an untied head.

    moe_blocks: the blocks whose feed-forward layer is `feed_forward`; all others are dense.
    dtype: of activations and matrix products; logits, softmax, norms and loss are float32 at least.
    remat: what the backward pass computes again instead of keeping it: `attention`, its S x S scores; `blocks`, all but
        each block's input.
    loss_chunk: sequence positions whose logits exist at one time; divides context_length.
    """

    num_blocks: int = 4
    d_model: int = 256
    d_ff: int = 1024
    num_heads: int = 4
    context_length: int = 256
    vocab_size: int = 257
    feed_forward: FeedForwardConfig = MixtureOfTokensConfig()
    moe_blocks: Literal["all", "last_half", "every_other"] | tuple[int, ...] = "all"
    final_norm: bool = False
    norm_epsilon: float = 1e-5
    init: InitConfig = InitConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "attention", "blocks"] = "none"
    loss_chunk: int = 64

    def block_kinds(self) -> list[FeedForwardConfig]:
        """The feed-forward layer of each block."""
        dense = self.feed_forward if isinstance(self.feed_forward, DenseConfig) else DenseConfig()
        chosen = {
            "all": range(self.num_blocks),
            "last_half": range(self.num_blocks // 2, self.num_blocks),
            "every_other": range(1, self.num_blocks, 2),
        }
        moe = self.moe_blocks if isinstance(self.moe_blocks, tuple) else chosen[self.moe_blocks]
        return [self.feed_forward if i in moe else dense for i in range(self.num_blocks)]

    @property
    def group_size(self) -> int:
        """Rows that must stay together: G, or 1 for a model that mixes nothing."""
        return getattr(self.feed_forward, "group_size", 1)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text.

    corpus, tokenizer: names, see `mot_jax.data`.
    group_size: rows that the shuffle gives to different documents; None is the model's group size. A dense twin that is
        to see the same batches as its MoT sets it.
    directory: where prepared text is kept; None is `~/.cache/mot_jax`.
    validation_windows: score at most that many windows of the validation split; None is all of them.
    """

    corpus: str = "python_source/stdlib"
    tokenizer: str = "bytes"
    group_size: int | None = None
    directory: str | None = _free(None)
    validation_windows: int | None = _free(None)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with global-norm clipping; linear warm-up, then a cosine to `final_fraction` of the learning rate."""

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 0.5


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The training run. `batch_size` counts sequences of the whole mesh; `accumulation` splits it into microbatches."""

    steps: int = _extendable(1000)
    batch_size: int = 64
    accumulation: int = 1
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    log_every: int = _free(10)
    validate_every: int = _free(100)
    checkpoint_every: int = _free(100)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one may be -1, which takes the devices that are left."""

    data: int = _free(-1)
    expert: int = _free(1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """`keep`: how many of the newest checkpoints stay."""

    keep: int = _free(2)


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """`sample_tokens`: length of the text sampled at the end of a run; 0 samples none."""

    tensorboard: bool = _free(True)
    sample_tokens: int = _free(200)


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def group_size(self) -> int:
        """Rows that the data keeps together, and gives to different documents."""
        return self.data.group_size or self.model.group_size
