"""The fields of an experiment: frozen dataclasses of plain data.

The docstring under each field is its text in `--help`. A field is part of a run's identity, so that a run cannot be
resumed with another value, unless it is declared with `_free`, `_extendable`, `_by_content` or `_directory`.
"""

from __future__ import annotations

import dataclasses
import numbers
import operator
from typing import Any, ClassVar, Literal


def _free(default: Any) -> Any:
    """A field that may differ when a run is resumed, since no number of the training depends on it."""
    return dataclasses.field(default=default, metadata={"resume": "free"})


def _extendable(default: Any) -> Any:
    """A field that may grow when a run is resumed."""
    return dataclasses.field(default=default, metadata={"resume": "extendable"})


def _by_content(default: Any) -> Any:
    """The path of an input. A run can be resumed with another path to the same content, by its fingerprint."""
    return dataclasses.field(default=default, metadata={"resume": "content"})


def _directory(default: Any) -> Any:
    """The directory of another run. It is part of a run's identity, but its path may be spelled in another way."""
    return dataclasses.field(default=default, metadata={"resume": "directory"})


class _PlainData:
    """Base of all groups of fields: converts NumPy numbers to Python's, and data types to their names.

    Users of JAX pass `jnp.bfloat16` or an `np.int64` from Python; a config must be equal, hashed and stored as the same
    one from a file or a flag. Other values are left to `check`.
    """

    def __post_init__(self) -> None:
        for name, value in [*vars(self).items()]:
            plain = _dtype_name(value) if name.endswith("dtype") else _plain_number(value)
            object.__setattr__(self, name, plain)


def _plain_number(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain_number, value))
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _dtype_name(value: Any) -> Any:
    if value is None or isinstance(value, (str, dict, list, tuple)):  # NumPy would read these as structured types
        return value
    import numpy as np  # here, since configs of files and flags have names, and the command line starts sooner without

    try:
        return np.dtype(value).name
    except (TypeError, ValueError):
        return value


@dataclasses.dataclass(frozen=True)
class MixingConfig(_PlainData):
    """How the tokens of a group are mixed: the variants of `docs/paper.md`, sections 2 and 3."""

    merge: Literal["softmax", "uniform", "logits"] = "softmax"
    """Merge weights, which average tokens into mixtures.
    `softmax`: of the logits, over the group. `uniform`: 1/G, not learned. `logits`: the logits themselves."""
    emit: Literal["merge", "softmax", "softmax_over_experts", "ones", "top_token"] = "merge"
    """Emit weights, which distribute expert outputs to tokens. `merge`: the merge weights. `ones`: 1.
    `softmax` over the group, `softmax_over_experts`: of the emit controller's logits.
    `top_token`: 1 for each expert's token with the largest merge weight, 0 for the others."""
    temperature: float = 1.0
    """Temperature T of softmax(logits / T). 0 is the one-hot limit: each expert takes its first arg-max token."""
    groups: Literal["across", "within"] = "across"
    """Tokens of a group. `across`: of G sequences at one position.
    `within`: at G neighboring positions of one sequence, for masked models only."""
    controllers: Literal["shared", "separate", "common_base"] = "shared"
    """Controllers of merge and emit. `shared`: one for both. `separate`: one each.
    `common_base`: one each, to both of which a third is added."""
    base_weight: Literal["sum", "one", "two"] = "sum"
    """Weight of the common base. `sum`: C + C_base. `one`: a C + (1 - a) C_base with one learned a.
    `two`: the same with one a for merge and one for emit."""
    layer_norm: bool = False
    """Layer normalization of the mixtures and of the expert outputs."""
    annealing: Literal["none", "linear", "cosine"] = "none"
    """Schedule by which T moves from `temperature` to `final_temperature`: `linear`, `cosine`, or `none` (constant)."""
    final_temperature: float = 0.0
    """Temperature after annealing."""
    annealing_steps: tuple[int, int] = (0, 1)
    """First and last step of annealing."""
    learned_temperature: Literal["none", "scalar", "per_expert"] = "none"
    """Learned temperature, `temperature` x exp(θ) with θ = 0 initially.
    `none`: T is not learned. `scalar`: one θ per layer. `per_expert`: one θ per expert."""
    positive_temperature: bool = True
    """Keep the learned temperature positive.
    False: `temperature` x (1 + θ), the authors' first form, at least 1e-6, where θ has no gradient."""
    separate_temperatures: bool = False
    """Learn one temperature for merge and one for emit."""
    frozen_steps: int = 0
    """Number of initial steps in which θ stays 0."""
    straight_through: bool = False
    """Straight-through estimator: softmax(logits / T) in the forward pass, with the gradient of T = 1."""

    @property
    def emit_has_own_softmax(self) -> bool:
        """Whether emit has a softmax of its own, rather than the merge weights or none."""
        return self.emit in ("softmax", "softmax_over_experts")

    @property
    def uses_temperature(self) -> bool:
        """Whether merge or emit has a softmax."""
        return self.merge == "softmax" or self.emit_has_own_softmax


@dataclasses.dataclass(frozen=True)
class FeedForwardKind(_PlainData):
    """Base of the feed-forward kinds: the properties on which batches, losses and inference modes depend.

    losses: the fields of `LossWeights` that weight losses of the kind. trained_mode: the inference mode (`modes.MODES`)
    in which layers of the kind work as in training, except for `for_inference`.
    """

    kind: ClassVar[str]
    losses: ClassVar[tuple[str, ...]] = ()
    trained_mode: ClassVar[str] = "grouped"

    @property
    def mixed_sequences(self) -> int:
        """Number of sequences whose tokens are processed together at each position; 1: sequences are independent."""
        return 1

    def routed_sequences(self, context_length: int) -> int:
        """Number of sequences of a routing group; 1 if it is part of one sequence, or no token is routed."""
        return 1

    def for_model(self, model: ModelConfig) -> Any:
        """The config with which the layers of a model are created."""
        return self

    def for_training(self, steps: int) -> Any:
        """The config with which a run of so many steps trains the layer."""
        return self

    def for_inference(self, context_length: int) -> Any:
        """The config with which a trained layer is evaluated and generates: without the capacity limit of training."""
        return self

    @property
    def experts_per_token(self) -> int | None:
        """Number of experts that a token is sent to at inference; None: a batch runs all experts."""
        return None

    @property
    def sizes_over_fsdp(self) -> dict[str, int]:
        """Sizes other than `d_model` that the mesh axis `fsdp` shards, by the names of their fields."""
        return {}

    @property
    def experts_share_computation(self) -> bool:
        """Whether the mesh axis `expert` divides the experts' computation in training, and not only their weights."""
        return True

    def shared_dim(self, d_ff: int) -> int:
        """Hidden width of the shared expert for the dense width `d_ff`; 0 without one."""
        return getattr(self, "shared_expert_dim", 0)


@dataclasses.dataclass(frozen=True)
class DenseConfig(FeedForwardKind):
    """A dense feed-forward layer of width `d_ff`."""

    kind: ClassVar[str] = "dense"
    bias: bool = True
    """Biases on both linear maps, as in the paper."""


@dataclasses.dataclass(frozen=True)
class MixtureOfTokensConfig(FeedForwardKind):
    """A Mixture-of-Tokens layer (`docs/paper.md`, section 2)."""

    kind: ClassVar[str] = "mixture_of_tokens"
    losses: ClassVar[tuple[str, ...]] = ("mixing_entropy",)
    group_size: int = 32
    """Group size G: the number of sequences whose tokens at one position are mixed together."""
    num_experts: int = 32
    """Number of experts E, and of mixtures per group and position."""
    expert_dim: int | None = None
    """Hidden width F of an expert.
    None: by the paper's rule E F = G (d_ff - shared_expert_dim), which costs the FLOPs of the dense layer."""
    flop_matched: bool = False
    """Refuse an `expert_dim` that breaks this rule."""
    shared_expert_dim: int = 0
    """Hidden width of the shared expert, a dense FFN next to the mixture that processes every token. 0: none."""
    mixing: MixingConfig = MixingConfig()
    """How the tokens of a group are mixed."""
    controller_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the controller."""
    w_in_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the experts' first matrices."""
    w_out_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the experts' second matrices."""
    save_for_backward: Literal["nothing", "pre_activations", "all"] = _free("pre_activations")
    """Saved for the backward pass in addition to the layer's input and the mixing weights.
    `nothing`, the experts' `pre_activations`, or `all` (also mixtures and expert outputs). The rest is recomputed."""
    kernel: Literal["xla", "fused_mixture", "fused_experts"] = _free("xla")
    """Implementation of merge, experts and emit. `xla`: einsums, on every platform.
    `fused_mixture`, `fused_experts`: Pallas kernels for TPU, for small and for wide experts.
    They move fewer bytes for more FLOPs."""

    def hidden_dim(self, d_ff: int) -> int:
        """F: `expert_dim` as given, or by the rule for the dense width `d_ff`."""
        if self.expert_dim is not None:
            return self.expert_dim
        return self.group_size * (d_ff - self.shared_expert_dim) // self.num_experts

    @property
    def mixed_sequences(self) -> int:
        return self.group_size if self.mixing.groups == "across" else 1


@dataclasses.dataclass(frozen=True)
class CompanionsConfig(MixtureOfTokensConfig):
    """A trained Mixture-of-Tokens layer in which each sequence shares its group with G - 1 fixed reference sequences.

    Only an inference mode builds it; it cannot be trained. The contribution of the reference sequences at each position
    is computed once (`feed_forward.companions`).
    """

    kind: ClassVar[str] = "companions"
    num_positions: int = 1
    """Number of positions for which that contribution is stored: the context length, or 1 for all positions alike."""
    experts_per_token: int | None = None
    """Number of experts that a token runs, those with its largest weights. None: all experts."""

    @property
    def mixed_sequences(self) -> int:
        return 1


@dataclasses.dataclass(frozen=True)
class ThresholdConfig(MixtureOfTokensConfig):
    """A trained Mixture-of-Tokens layer whose experts process the unmixed tokens that reach their thresholds.

    Only an inference mode builds it; it cannot be trained. An expert takes E / G of E of the training tokens
    (`feed_forward.threshold`).
    """

    kind: ClassVar[str] = "threshold"

    @property
    def mixed_sequences(self) -> int:
        return 1

    @property
    def experts_per_token(self) -> int:
        """E / G, at least 1: the number of a training token, on average."""
        return max(1, self.num_experts // self.group_size)


@dataclasses.dataclass(frozen=True)
class TokenChoiceConfig(FeedForwardKind):
    """A token-choice (top-k routed) mixture of experts (`docs/paper.md`, section 4)."""

    kind: ClassVar[str] = "token_choice"
    losses: ClassVar[tuple[str, ...]] = ("load_balancing", "router_z")
    trained_mode: ClassVar[str] = "token_choice"
    num_experts: int = 32
    """Number of experts E."""
    expert_dim: int | None = None
    """Hidden width F of an expert.
    None: by the rule top_k F = d_ff - shared_expert_dim, which costs the FLOPs of the dense layer."""
    top_k: int = 1
    """Number of experts per token, those with its largest logits."""
    shared_expert_dim: int = 0
    """Hidden width of the shared expert, a dense FFN next to the mixture that processes every token. 0: none."""
    capacity_factor: float | None = 1.25
    """Capacity of an expert, as a multiple of its even share of a routing group. None: unlimited."""
    routing_group_tokens: int = 256
    """Number of consecutive tokens, sequence after sequence, that share capacity and over which balance is measured.
    It divides the context length or is a multiple of it, and makes both the same on every mesh."""
    controller_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the controller."""
    w_in_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the experts' first matrices."""
    w_out_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the experts' second matrices."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """Weights of the chosen experts. `softmax` over all experts, not renormalized.
    `sigmoid` of each logit, divided by their sum over the chosen experts if there is more than one."""
    balance: Literal["loss", "bias"] = "loss"
    """Load balancing. `loss`: by `training.losses.load_balancing`, if it has a weight.
    `bias`: a bias on the scores, for the choice only, which each step moves towards an even load."""
    bias_rate: float = 0.001
    """Change of that bias in a step."""
    mixture: MixtureOfTokensConfig | None = _free(None)
    """Mixture-of-Tokens layer as which these weights were trained. None: they were not."""

    def hidden_dim(self, d_ff: int) -> int:
        """F: `expert_dim` as given, or by the rule for the dense width `d_ff`."""
        return self.expert_dim if self.expert_dim is not None else (d_ff - self.shared_expert_dim) // self.top_k

    def routed_sequences(self, context_length: int) -> int:
        return max(1, self.routing_group_tokens // max(context_length, 1))

    def for_inference(self, context_length: int) -> TokenChoiceConfig:
        tokens = min(self.routing_group_tokens, context_length)
        return dataclasses.replace(self, capacity_factor=None, routing_group_tokens=tokens)

    @property
    def experts_per_token(self) -> int:
        return self.top_k

    @property
    def experts_share_computation(self) -> bool:
        return self.capacity_factor is not None


@dataclasses.dataclass(frozen=True)
class ExpertThresholdConfig(FeedForwardKind):
    """A mixture of experts, each of which takes the tokens whose logits reach its threshold (`docs/paper.md`)."""

    kind: ClassVar[str] = "expert_threshold"
    num_experts: int = 32
    """Number of experts E."""
    expert_dim: int | None = None
    """Hidden width F of an expert.
    None: by the rule top_k F = d_ff - shared_expert_dim, which costs the FLOPs of the dense layer on average."""
    top_k: int = 1
    """Number of experts per token, on average: thresholds are set so that an expert takes top_k / E of the tokens."""
    shared_expert_dim: int | None = None
    """Hidden width of the shared expert, a dense FFN next to the mixture that processes every token. 0: none.
    None: that of an expert, or without `expert_dim` d_ff / (top_k + 1), rounded up so that the rule holds."""
    capacity_factor: float | None = 2.0
    """Capacity of an expert in training, as a multiple of its even share of a routing group.
    None: unlimited; every expert is then run on every token, as in inference if any token reaches its threshold."""
    routing_group_tokens: int = 256
    """Number of consecutive tokens, sequence after sequence, that share capacity and over which quantiles are taken.
    It divides the context length or is a multiple of it, and makes both the same on every mesh."""
    group_size: int = 32
    """Group size G: the number of sequences from whose tokens at one position each expert chooses in the warmup."""
    warmup_steps: int | None = None
    """Number of initial steps in which experts choose along the batch, while thresholds are tracked.
    None: a fifth of `training.steps`, which moves if a run is extended. A layer on its own has no warmup then."""
    controller_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the controller."""
    w_in_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the experts' first matrices."""
    w_out_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the experts' second matrices."""

    def hidden_dim(self, d_ff: int) -> int:
        """F: `expert_dim` as given, or by the rule for the dense width `d_ff`."""
        if self.expert_dim is not None:
            return self.expert_dim
        if self.shared_expert_dim is None:
            return d_ff // (self.top_k + 1)
        return (d_ff - self.shared_expert_dim) // self.top_k

    def shared_dim(self, d_ff: int) -> int:
        if self.shared_expert_dim is not None:
            return self.shared_expert_dim
        return d_ff - self.top_k * self.hidden_dim(d_ff) if self.expert_dim is None else self.expert_dim

    def tokens_along_batch(self) -> int:
        """The number of tokens of a group that an expert takes at each position in the warmup."""
        return min(self.group_size, max(1, round(self.top_k * self.group_size / self.num_experts)))

    @property
    def mixed_sequences(self) -> int:
        return 1 if self.warmup_steps == 0 else self.group_size

    def routed_sequences(self, context_length: int) -> int:
        return max(1, self.routing_group_tokens // max(context_length, 1))

    def for_training(self, steps: int) -> ExpertThresholdConfig:
        return self if self.warmup_steps is not None else dataclasses.replace(self, warmup_steps=steps // 5)

    def for_inference(self, context_length: int) -> ExpertThresholdConfig:
        """Thresholds choose from the first step on, so that no sequence depends on another."""
        tokens = min(self.routing_group_tokens, context_length)
        return dataclasses.replace(self, warmup_steps=0, capacity_factor=None, routing_group_tokens=tokens)

    @property
    def experts_per_token(self) -> int:
        return self.top_k


@dataclasses.dataclass(frozen=True)
class ExpertChoiceConfig(FeedForwardKind):
    """An expert-choice mixture of experts (`docs/paper.md`, section 5): each expert takes its most probable tokens.

    An expert takes capacity_factor top_k G / num_experts tokens, rounded, at least 1 and at most G, of the G tokens of
    a group at each position.
    """

    kind: ClassVar[str] = "expert_choice"
    losses: ClassVar[tuple[str, ...]] = ("router_z",)
    group_size: int = 32
    """Group size G: the number of sequences from whose tokens at one position each expert chooses."""
    num_experts: int = 32
    """Number of experts E."""
    expert_dim: int | None = None
    """Hidden width F of an expert.
    None: by the rule top_k F = d_ff - shared_expert_dim, which costs the FLOPs of the dense layer."""
    top_k: int = 1
    """Number of experts per token, on average over the tokens of a group, with a capacity factor of 1."""
    capacity_factor: float = 1.0
    """Number of tokens that an expert takes, as a multiple of its even share top_k G / num_experts of the group."""
    over: Literal["batch", "tokens"] = "batch"
    """Tokens from which an expert chooses. `batch`: those of a group of sequences at one position.
    `tokens`: those of one whole sequence, for masked models only; `group_size` is not used then."""
    layer_norm: bool = False
    """Layer normalization of the layer's output, without the shared expert's, as in the paper."""
    shared_expert_dim: int = 0
    """Hidden width of the shared expert, a dense FFN next to the mixture that processes every token. 0: none."""
    controller_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the controller."""
    w_in_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the experts' first matrices."""
    w_out_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the experts' second matrices, whose fan-in is top_k F."""
    save_for_backward: Literal["nothing", "pre_activations", "all"] = _free("all")
    """Saved for the backward pass in addition to the layer's input, the choice and its probabilities.
    `nothing`, the experts' `pre_activations`, or `all` (also their inputs and outputs). The rest is recomputed."""

    def hidden_dim(self, d_ff: int) -> int:
        """F: `expert_dim` as given, or by the rule for the dense width `d_ff`."""
        return self.expert_dim if self.expert_dim is not None else (d_ff - self.shared_expert_dim) // self.top_k

    @property
    def mixed_sequences(self) -> int:
        return self.group_size if self.over == "batch" else 1

    def candidates(self, context_length: int) -> int:
        """The number of tokens from which an expert chooses: of a group at one position, or of a sequence."""
        return self.group_size if self.over == "batch" else context_length

    def capacity(self, candidates: int) -> int:
        """C: the number of tokens that an expert takes from so many."""
        return min(candidates, max(1, round(self.capacity_factor * self.top_k * candidates / self.num_experts)))


@dataclasses.dataclass(frozen=True)
class ReluRoutingConfig(FeedForwardKind):
    """A sparse mixture of experts with ReLU gates (`docs/paper.md`, section 5). Every expert processes every token."""

    kind: ClassVar[str] = "relu_routing"
    losses: ClassVar[tuple[str, ...]] = ("relu_l1",)
    num_experts: int = 32
    """Number of experts E."""
    expert_dim: int | None = None
    """Hidden width F of an expert.
    None: by the rule top_k F = d_ff - shared_expert_dim: k experts have the FLOPs of the dense layer."""
    top_k: int = 1
    """Target k of the mean number of experts per token with a gate above 0."""
    shared_expert_dim: int = 0
    """Hidden width of the shared expert, a dense FFN next to the mixture that processes every token. 0: none."""
    l1_weight: float = 1e-8
    """Initial weight λ of the L1 loss of the gates. Steps keep it between 1e-12 and 1e6."""
    l1_factor: float = 1.2
    """Factor by which a step multiplies λ, if more than k experts per token have a gate above 0, or else divides it."""
    controller_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the controller."""
    w_in_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the experts' first matrices."""
    w_out_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the experts' second matrices."""

    def hidden_dim(self, d_ff: int) -> int:
        """F: `expert_dim` as given, or by the rule for the dense width `d_ff`."""
        return self.expert_dim if self.expert_dim is not None else (d_ff - self.shared_expert_dim) // self.top_k


@dataclasses.dataclass(frozen=True)
class HashConfig(FeedForwardKind):
    """A mixture of experts in which a fixed table has the experts of each token id (`docs/paper.md`, section 5)."""

    kind: ClassVar[str] = "hash"
    num_experts: int = 32
    """Number of experts E."""
    expert_dim: int | None = None
    """Hidden width F of an expert.
    None: by the rule top_k F = d_ff - shared_expert_dim, which costs the FLOPs of the dense layer."""
    top_k: int = 1
    """Number of experts per token id, whose outputs are averaged."""
    shared_expert_dim: int = 0
    """Hidden width of the shared expert, a dense FFN next to the mixture that processes every token. 0: none."""
    vocab_size: int | None = None
    """Number of token ids in the table. None: that of the model."""
    w_in_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the experts' first matrices."""
    w_out_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the experts' second matrices."""

    def hidden_dim(self, d_ff: int) -> int:
        """F: `expert_dim` as given, or by the rule for the dense width `d_ff`."""
        return self.expert_dim if self.expert_dim is not None else (d_ff - self.shared_expert_dim) // self.top_k

    def for_model(self, model: ModelConfig) -> HashConfig:
        return dataclasses.replace(self, vocab_size=model.vocab_size)

    @property
    def experts_per_token(self) -> int:
        return self.top_k

    @property
    def experts_share_computation(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class SoftMoEConfig(FeedForwardKind):
    """A soft mixture of experts (`docs/paper.md`, section 5), for masked models only."""

    kind: ClassVar[str] = "soft_moe"
    num_experts: int = 32
    """Number of experts E."""
    slots_per_expert: int | None = None
    """Number of slots P of an expert, each an average of the tokens of a sequence.
    None: the context length / num_experts, rounded, at least 1. `mot describe --matched` sets k times as many."""
    expert_dim: int | None = None
    """Hidden width F of an expert.
    None: d_ff - shared_expert_dim, which costs the FLOPs of the dense layer if there are as many slots as tokens."""
    shared_expert_dim: int = 0
    """Hidden width of the shared expert, a dense FFN next to the mixture that processes every token. 0: none."""
    controller_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the controller, which is then normalized."""
    w_in_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the experts' first matrices."""
    w_out_init_scale: float = 1.0
    """Factor on the standard deviation of `model.init` for the experts' second matrices."""

    def hidden_dim(self, d_ff: int) -> int:
        """F: `expert_dim` as given, or by the rule for the dense width `d_ff`."""
        return self.expert_dim if self.expert_dim is not None else d_ff - self.shared_expert_dim

    @property
    def sizes_over_fsdp(self) -> dict[str, int]:
        """E, of the controller [D, E, P], whose norms over D are then local to a device."""
        return {"num_experts": self.num_experts}

    def slots(self, context_length: int) -> int:
        """P: `slots_per_expert` as given, or by the rule for a context length."""
        if self.slots_per_expert is not None:
            return self.slots_per_expert
        return max(1, round(context_length / self.num_experts))

    def for_model(self, model: ModelConfig) -> SoftMoEConfig:
        return dataclasses.replace(self, slots_per_expert=self.slots(model.context_length))


FeedForwardConfig = (
    DenseConfig
    | MixtureOfTokensConfig
    | TokenChoiceConfig
    | ExpertThresholdConfig
    | ExpertChoiceConfig
    | ReluRoutingConfig
    | HashConfig
    | SoftMoEConfig
)


@dataclasses.dataclass(frozen=True)
class InitConfig(_PlainData):
    """Initial values of the matrices, with standard deviation sqrt(scale / fan_in) (`docs/paper.md`, section 5)."""

    distribution: Literal["truncated_normal", "normal", "uniform"] = "truncated_normal"
    """Distribution: `truncated_normal` (bounded by `cut`), `normal` or `uniform`, with mean 0."""
    scale: float = 0.1
    """Variance times fan_in, where fan_in is the number of inputs of the matrix, and 1 for the embeddings."""
    cut: float | None = 0.2
    """Absolute bound of the truncated normal. None: two standard deviations."""


@dataclasses.dataclass(frozen=True)
class ModelConfig(_PlainData):
    """A pre-norm transformer. The defaults are the paper's."""

    num_blocks: int = 4
    """Number of blocks, each of attention and a feed-forward layer."""
    d_model: int = 256
    """Width of the residual stream."""
    d_ff: int = 1024
    """Hidden width of a dense feed-forward layer; the width of experts follows from it."""
    num_heads: int = 4
    """Number of attention heads; divides d_model."""
    num_kv_heads: int | None = None
    """Number of key and value heads, each shared by num_heads / num_kv_heads queries. None: num_heads."""
    attention_bias: bool = False
    """Biases on attention's linear maps. The paper's models have none, those of the Hugging Face port have them."""
    context_length: int = 256
    """Number of tokens in a sequence."""
    vocab_size: int = 257
    """Number of tokens in the vocabulary: at least the tokenizer's (257 for `bytes`).
    One more for the masked objective if the tokenizer has no mask token."""
    objective: Literal["causal", "masked"] = "causal"
    """Training objective. `causal`: a decoder that predicts the next token.
    `masked`: a bidirectional encoder that predicts the masked tokens."""
    positions: Literal["learned", "rotary"] = "learned"
    """Position embeddings. `learned`: added to the token embeddings. `rotary`: applied to queries and keys."""
    rotary_base: float = 10_000.0
    """Base of the rotary embeddings, whose wavelengths reach up to 2π times this number."""
    document_mask: bool = False
    """Restrict attention to the document of each token."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Activation function of the dense feed-forward layers and the experts: `relu`, `gelu` or `silu`."""
    gated: bool = False
    """Multiply the activation by a second projection of the input, as in GLU, in dense layers and experts."""
    feed_forward: FeedForwardConfig = MixtureOfTokensConfig()
    """Feed-forward layer of the blocks in `moe_blocks`."""
    moe_blocks: Literal["all", "last_half", "every_other"] | tuple[int, ...] = "all"
    """Blocks whose feed-forward layer is `feed_forward`; the others are dense.
    `all`, the `last_half`, `every_other` block from the second, or their indices."""
    dense_bias: bool = True
    """Biases on the linear maps of the dense layers outside `moe_blocks`."""
    norm: Literal["layer", "rms"] = "layer"
    """Normalization before each sub-layer: `layer` (LayerNorm) or `rms` (RMSNorm)."""
    final_norm: bool = False
    """One more normalization before the output head."""
    tie_embeddings: bool = False
    """Use the token embedding as the output head."""
    norm_epsilon: float = 1e-5
    """Constant added to the variance in normalizations."""
    init: InitConfig = InitConfig()
    """Initial values of the matrices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of activations and matrix products. Logits, softmax, norms and the loss are in float32 at least."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the parameters."""
    attention_kernel: Literal["auto", "xla", "cudnn", "splash"] = _free("auto")
    """Implementation of attention. `xla`: S x S scores in memory.
    `cudnn`: fused, on NVIDIA GPUs. `splash`: fused, on TPUs.
    `auto`: the platform's fused one if it supports the shapes (splash: from 1,024 positions on), else `xla`."""
    remat: Literal["none", "attention", "blocks"] = "none"
    """Rematerialization in the backward pass.
    `none`: of nothing. `attention`: of its S x S scores. `blocks`: of everything but each block's input."""
    loss_chunk: int = 64
    """Number of positions whose logits are in memory at one time; divides context_length."""
    scan_layers: bool = True
    """Scan over equal consecutive blocks with stacked parameters, so that compile time does not grow with depth.
    False: unrolled blocks with the same initial values.
    A step then moves far fewer bytes and compiles for longer (`docs/notes/2026-11-26-step.md`)."""

    def block_kinds(self) -> list[FeedForwardConfig]:
        """The feed-forward layer of each block."""
        dense = self.feed_forward if isinstance(self.feed_forward, DenseConfig) else DenseConfig(self.dense_bias)
        chosen = {
            "all": range(self.num_blocks),
            "last_half": range(self.num_blocks // 2, self.num_blocks),
            "every_other": range(1, self.num_blocks, 2),
        }
        moe = self.moe_blocks if isinstance(self.moe_blocks, tuple) else chosen[self.moe_blocks]
        return [self.feed_forward if i in moe else dense for i in range(self.num_blocks)]

    @property
    def group_size(self) -> int:
        """Number of sequences that are mixed together: G, or 1 for a model that does not mix across sequences."""
        return self.feed_forward.mixed_sequences

    @property
    def has_companions(self) -> bool:
        """Whether reference sequences can take the place of the other sequences of a group (`modes.companions`)."""
        return isinstance(self.feed_forward, MixtureOfTokensConfig) and self.group_size > 1

    @property
    def sequences_per_routing_group(self) -> int:
        """Number of sequences of a routing group; 1 if it is part of one sequence, or no token is routed."""
        return self.feed_forward.routed_sequences(self.context_length)


@dataclasses.dataclass(frozen=True)
class DataConfig(_PlainData):
    """The datasets and their preparation."""

    corpus: tuple[str, ...] = _by_content(("python_source/stdlib",))
    """Names of text corpora, see `mot_jax.data.corpora`. More than one are mixed."""
    weights: tuple[float, ...] = ()
    """Share of each corpus in a batch, in any unit. Empty: in proportion to their sizes."""
    train_split: str = "train"
    """Name of the training split, as in TFDS."""
    validation_split: str = "validation"
    """Name of the validation split, as in TFDS."""
    text_feature: str = "text"
    """Name of the feature that holds the text, as in TFDS."""
    tokenizer: str = _by_content("bytes")
    """Tokenizer: `bytes`, a `tokenizer.json` of the tokenizers library, or a SentencePiece `.model`."""
    shuffle_group_size: int | None = None
    """Number of consecutive sequences that the shuffle takes from different documents.
    None: the model's group size, or the sequences of a routing group.
    A dense baseline sets it to train on the same batches as its MoT model."""
    mask_rate: float = 0.15
    """Fraction of the tokens that the masked objective masks."""
    directory: str | None = _free(None)
    """Directory of the prepared datasets: local, or `gs://` or `s3://`, of which each host copies the windows.
    None: `~/.cache/mot_jax`."""
    validation_windows: int | None = _free(None)
    """Maximum number of windows (sequences) of the validation split to evaluate on, spread over it. None: all."""
    final_validation_windows: int | None = _free(None)
    """The same, for the last evaluation of a run. None: all."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_PlainData):
    """Optimizer, gradient clipping and schedule: linear warm-up, then cosine decay of the learning rate."""

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    """Optimizer, from Optax: `adamw`, `adafactor`, or `muon` for the matrices of the blocks with AdamW for the rest."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Number of steps of the linear warm-up."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the cosine decay, as a fraction of `learning_rate`."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.999
    """Decay rate of the second moment."""
    epsilon: float = 1e-8
    """Constant added to the denominator of the update."""
    weight_decay: float = 0.1
    """Weight decay coefficient."""
    decay: Literal["all", "matrices"] = "all"
    """Parameters with weight decay: `all`, as in the paper, or the `matrices` of the blocks and the output head."""
    clip_norm: float = 0.5
    """Maximum global norm of the gradient."""
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the first moment."""
    multipliers: tuple[tuple[str, float], ...] = ()
    """Pairs of a part of a parameter's name and a factor on its learning rate, as ("controller", 3.0)."""


@dataclasses.dataclass(frozen=True)
class LossWeights(_PlainData):
    """Weights of the losses that are added to the cross-entropy. Those of layers are averaged over the layers."""

    mixing_entropy: float = 0.0
    """Weight of the normalized entropy of the mixing weights."""
    head_z: float = 0.0
    """Weight of (log Z)² of the output head, where Z is the sum of the exponentials of its logits."""
    load_balancing: float = 0.0
    """Weight of the load-balancing loss of token choice, which is 1 if all experts are alike."""
    router_z: float = 0.0
    """Weight of (log Z)² of the controller of token choice or expert choice."""
    relu_l1: float = 1.0
    """Weight of the L1 loss of the gates of ReLU routing, next to its λ; 1 for other kinds, which have no such loss."""

    def of_layers(self, kind: FeedForwardConfig) -> dict[str, float]:
        """The nonzero weights of the losses that layers of this kind have, by name."""
        return {name: weight for name in kind.losses if (weight := getattr(self, name))}


@dataclasses.dataclass(frozen=True)
class TrainingConfig(_PlainData):
    """The training run."""

    steps: int = _extendable(1000)
    """Number of optimizer steps. A run can be resumed with more."""
    batch_size: int = 64
    """Number of sequences in a batch, over the whole mesh."""
    gradient_accumulation_steps: int = 1
    """Number of microbatches into which a batch is split, to need less memory for activations.
    Gradients are summed over devices once a step; over `fsdp` in each microbatch."""
    seed: int = 0
    """Seed of the initial values, the order of the data, and masking."""
    upcycle_from: str | None = _directory(None)
    """Workdir of a dense model of the same sizes, whose feed-forward layers initialize the experts."""
    transition_from: str | None = _directory(None)
    """Workdir of a Mixture-of-Tokens run from which to start transition tuning (`docs/paper.md`, section 4).
    Weights, optimizer state and position in the data are that run's.
    Steps and the learning rate schedule start from 0."""
    transition_router: Literal["controller", "random"] = "controller"
    """Initial router of transition tuning: the trained `controller`, or a `random` one for comparison."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate schedule."""
    losses: LossWeights = LossWeights()
    """Weights of the auxiliary losses."""
    log_every: int = _free(10)
    """Number of steps between logged training metrics."""
    validate_every: int = _free(100)
    """Number of steps between validations."""
    checkpoint_every: int = _free(100)
    """Number of steps between checkpoints."""
    max_skipped: int = _free(10)
    """Number of consecutive steps after which a run whose loss or gradient is not finite ends, with exit code 3.
    The updates of such steps are skipped."""


@dataclasses.dataclass(frozen=True)
class MeshConfig(_PlainData):
    """Sizes of the mesh axes, one of which may be -1 (all remaining devices), and time limits of its processes."""

    data: int = _free(-1)
    """Devices along `data`, over which the sequences of a batch are sharded."""
    fsdp: int = _free(1)
    """Devices along `fsdp`, over which sequences and, between steps, all parameters are sharded."""
    expert: int = _free(1)
    """Devices along `expert`, over which sequences and experts are sharded."""
    tensor: int = _free(1)
    """Devices along `tensor`, over which attention heads and hidden widths are sharded."""
    wait_seconds: int = _free(300)
    """Seconds for which processes wait for each other at the start."""
    heartbeat_seconds: int = _free(30)
    """Seconds without a heartbeat after which a process counts as lost, and the others end."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(_PlainData):
    """Checkpoints and preemption."""

    max_to_keep: int = _free(2)
    """Number of the newest checkpoints to retain."""
    keep_every: int = _free(0)
    """Number of steps of whose multiples all checkpoints are retained too. 0: none."""
    keep_best: int = _free(0)
    """Number of checkpoints with the lowest validation losses to retain too."""
    verify: Literal["checksums", "contents"] = _free("checksums")
    """Check of a checkpoint on an object store before training resumes: the store's `checksums`, or all `contents`.
    On a file system all contents are read."""
    preempted_exit_code: int = _free(143)
    """Exit code of a run that ended on SIGTERM, after a checkpoint."""


@dataclasses.dataclass(frozen=True)
class LoggingConfig(_PlainData):
    """Logging in addition to `metrics.jsonl`, and the sample at the end."""

    tensorboard: bool = _free(True)
    """Write TensorBoard event files."""
    wandb: bool = _free(False)
    """Log to Weights & Biases."""
    wandb_project: str = _free("mot_jax")
    """Project on Weights & Biases."""
    sample_tokens: int = _free(200)
    """Number of tokens to generate at the end of a run. 0: no sample."""


@dataclasses.dataclass(frozen=True)
class Config(_PlainData):
    """One experiment."""

    model: ModelConfig = ModelConfig()
    """The model."""
    data: DataConfig = DataConfig()
    """The datasets."""
    training: TrainingConfig = TrainingConfig()
    """The training run."""
    mesh: MeshConfig = MeshConfig()
    """The mesh of devices."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints and preemption."""
    logging: LoggingConfig = LoggingConfig()
    """Logging."""

    @property
    def group_size(self) -> int:
        """Number of consecutive sequences that come from different documents and stay in one microbatch."""
        return self.data.shuffle_group_size or max(self.model.group_size, self.model.sequences_per_routing_group)
