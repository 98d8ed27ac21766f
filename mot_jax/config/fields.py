"""The fields of an experiment: frozen dataclasses, plain data. Each says whether it is part of a run's identity."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal


def _free(default: Any) -> Any:
    """A field that may differ when a run is resumed: it changes no number of the training."""
    return dataclasses.field(default=default, metadata={"resume": "free"})


def _extendable(default: Any) -> Any:
    """A field that may grow when a run is resumed."""
    return dataclasses.field(default=default, metadata={"resume": "extendable"})


@dataclasses.dataclass(frozen=True)
class MixingConfig:
    """How the tokens of a group are mixed: every variant of the paper's code, composed (PAPER.md sections 2 and 3).

    merge: the weights that tokens are averaged by: `softmax` of the logits over the group; `uniform`, 1/G, not learned;
        `logits`, as they are.
    emit: the weights that expert outputs are handed back by: `merge`, the same; `softmax` over the group and
        `softmax_over_experts`, of the emit controller's logits; `ones`; `top_token`, 1 for the token with the largest
        merge weight of each expert, 0 for the others.
    temperature: T of softmax(logits / T); 0 is the one-hot limit: each expert takes its first arg-max token.
    groups: `across`, G rows at one position; `within`, G neighbouring positions of one row, for masked models only.
    controllers: `shared`, one for merge and emit; `separate`; `common_base`, separate ones to which a third is added.
    base_weight: of the common base: `sum`, C + C_base; `one`, a C + (1 - a) C_base with one learned a; `two`, one for
        merge and one for emit.
    layer_norm: normalise mixtures and expert outputs.
    annealing: T moves from `temperature` to `final_temperature` between the two `annealing_steps`.
    learned_temperature: T is `temperature` x exp(θ), θ = 0 at first, one number a layer (`scalar`) or one per expert.
    positive_temperature: False is the authors' first form, `temperature` x (1 + θ), which nothing keeps positive.
    separate_temperatures: merge and emit learn one each. frozen_steps: θ stays 0 for so many steps.
    straight_through: forward softmax(logits / T), backward as if T were 1.
    """

    merge: Literal["softmax", "uniform", "logits"] = "softmax"
    emit: Literal["merge", "softmax", "softmax_over_experts", "ones", "top_token"] = "merge"
    temperature: float = 1.0
    groups: Literal["across", "within"] = "across"
    controllers: Literal["shared", "separate", "common_base"] = "shared"
    base_weight: Literal["sum", "one", "two"] = "sum"
    layer_norm: bool = False
    annealing: Literal["none", "linear", "cosine"] = "none"
    final_temperature: float = 0.0
    annealing_steps: tuple[int, int] = (0, 1)
    learned_temperature: Literal["none", "scalar", "per_expert"] = "none"
    positive_temperature: bool = True
    separate_temperatures: bool = False
    frozen_steps: int = 0
    straight_through: bool = False

    @property
    def own_emit(self) -> bool:
        """Whether emit has a softmax of its own."""
        return self.emit in ("softmax", "softmax_over_experts")

    @property
    def uses_temperature(self) -> bool:
        """Whether merge or emit has a softmax."""
        return self.merge == "softmax" or self.own_emit


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
    expert_dim: F, the hidden width of an expert; None is the paper's rule E F = G (d_ff - shared_expert_dim), which costs the
        FLOPs of the dense layer.
    flop_matched: refuse an `expert_dim` that breaks that rule.
    shared_expert_dim: the hidden width of a dense expert beside the mixture that sees every token; 0 for none.
    *_init_scale: multiplies the standard deviation of the model's init for that matrix.
    save_for_backward: what is kept from the forward to the backward pass besides the layer's input and the mixing weights:
        `nothing`, the experts' `pre_activations`, or `all` (mixtures and expert outputs as well). What is not kept is
        computed again.
    kernel: what merges, runs the experts and emits: `xla`, or on TPU `fused_mixture` (`fused_mixture_tpu.py`), for small
        experts, or `fused_experts` (`fused_experts_tpu.py`), for wide ones. Fewer bytes, for more FLOPs.
    """

    kind: ClassVar[str] = "mixture_of_tokens"
    group_size: int = 32
    num_experts: int = 32
    expert_dim: int | None = None
    flop_matched: bool = False
    shared_expert_dim: int = 0
    mixing: MixingConfig = MixingConfig()
    controller_init_scale: float = 1.0
    w_in_init_scale: float = 1.0
    w_out_init_scale: float = 1.0
    save_for_backward: Literal["nothing", "pre_activations", "all"] = _free("pre_activations")
    kernel: Literal["xla", "fused_mixture", "fused_experts"] = _free("xla")

    def hidden_dim(self, d_ff: int) -> int:
        """F: `expert_dim` as given, or by the rule for the dense width `d_ff`."""
        if self.expert_dim is not None:
            return self.expert_dim
        return self.group_size * (d_ff - self.shared_expert_dim) // self.num_experts


@dataclasses.dataclass(frozen=True)
class CompanionsConfig(MixtureOfTokensConfig):
    """A trained Mixture-of-Tokens layer whose rows share a group with G - 1 fixed sequences each, not with each other.

    An inference mode makes it; it is not for training, and of no run. What the others of a group say at a position is
    worked out once (`feed_forward.companions`).

    num_positions: for how many positions that is kept: the context length; or 1, which stands for all positions.
    experts_per_token: how many experts a token runs, those that it weighs most; None: all.
    """

    kind: ClassVar[str] = "companions"
    num_positions: int = 1
    experts_per_token: int | None = None


@dataclasses.dataclass(frozen=True)
class TokenChoiceConfig:
    """A sparse mixture of experts: each token goes to the `top_k` experts that the controller finds likeliest.

    num_experts: E. expert_dim: F, the hidden width of an expert; None is the rule top_k F = d_ff - shared_expert_dim, which
        costs the FLOPs of the dense layer. shared_expert_dim: as in MixtureOfTokensConfig, and so the init scales.
    capacity_factor: an expert takes at most so many times its even share of a routing group; None: whatever comes.
    routing_group_tokens: neighbouring tokens, row after row, within which capacity is shared and balance measured, so
        that both are the same on every mesh. Divides the context length, or is a multiple of it: whole rows.
    mixture: the Mixture-of-Tokens layer that these weights were trained as, if they were.
    """

    kind: ClassVar[str] = "token_choice"
    num_experts: int = 32
    expert_dim: int | None = None
    top_k: int = 1
    shared_expert_dim: int = 0
    capacity_factor: float | None = 1.25
    routing_group_tokens: int = 256
    controller_init_scale: float = 1.0
    w_in_init_scale: float = 1.0
    w_out_init_scale: float = 1.0
    mixture: MixtureOfTokensConfig | None = _free(None)

    def hidden_dim(self, d_ff: int) -> int:
        """F: `expert_dim` as given, or by the rule for the dense width `d_ff`."""
        return self.expert_dim if self.expert_dim is not None else (d_ff - self.shared_expert_dim) // self.top_k


FeedForwardConfig = DenseConfig | MixtureOfTokensConfig | TokenChoiceConfig


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
    """A pre-norm transformer; the defaults are the paper's.

    objective: `causal`, a decoder that predicts the next token; `masked`, a bidirectional encoder that predicts the
        tokens that were masked out.
    num_kv_heads: heads of keys and values, each shared by num_heads / num_kv_heads queries; None is num_heads.
    attention_bias: biases on attention's linear maps, which the paper's have not, and the Hugging Face port's have.
    positions: `learned` embeddings, or `rotary` ones in attention, with wavelengths up to 2π `rotary_base`.
    activation, gated: of dense layer and experts alike; a gated one multiplies its activation by a second projection.
    norm: `layer` or `rms`; final_norm: one more before the head. tie_embeddings: the head is the token embedding.
    document_mask: attention stays within the documents of a window.
    moe_blocks: the blocks whose feed-forward layer is `feed_forward`; all others are dense, with `dense_bias` as in
        DenseConfig.
    dtype: of activations and matrix products; logits, softmax, norms and loss are float32 at least.
    attention_kernel: `xla`, whose S x S scores are in memory; `cudnn` on NVIDIA, `splash` on TPU, `auto`: what fits.
    remat: what the backward pass computes again instead of keeping it: `attention`, its S x S scores; `blocks`, all but
        each block's input.
    loss_chunk: sequence positions whose logits exist at one time; divides context_length.
    scan_layers: equal neighbouring blocks are a loop over stacked parameters, so that compile time does not grow with
        depth. False: every block by itself, from the same initial values: a step moves far fewer bytes, and compiles
        for longer (docs/performance.md).
    """

    num_blocks: int = 4
    d_model: int = 256
    d_ff: int = 1024
    num_heads: int = 4
    num_kv_heads: int | None = None
    attention_bias: bool = False
    context_length: int = 256
    vocab_size: int = 257
    objective: Literal["causal", "masked"] = "causal"
    positions: Literal["learned", "rotary"] = "learned"
    rotary_base: float = 10_000.0
    document_mask: bool = False
    activation: Literal["relu", "gelu", "silu"] = "relu"
    gated: bool = False
    feed_forward: FeedForwardConfig = MixtureOfTokensConfig()
    moe_blocks: Literal["all", "last_half", "every_other"] | tuple[int, ...] = "all"
    dense_bias: bool = True
    norm: Literal["layer", "rms"] = "layer"
    final_norm: bool = False
    tie_embeddings: bool = False
    norm_epsilon: float = 1e-5
    init: InitConfig = InitConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    attention_kernel: Literal["auto", "xla", "cudnn", "splash"] = _free("xla")
    remat: Literal["none", "attention", "blocks"] = "none"
    loss_chunk: int = 64
    scan_layers: bool = True

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
        """Rows that must stay together: G, or 1 for a model that mixes nothing across rows."""
        kind = self.feed_forward
        if isinstance(kind, CompanionsConfig) or not isinstance(kind, MixtureOfTokensConfig):
            return 1
        return kind.group_size if kind.mixing.groups == "across" else 1

    @property
    def routing_rows(self) -> int:
        """Rows of a routing group; 1 where groups lie within rows, or nothing is routed."""
        kind = self.feed_forward
        if not isinstance(kind, TokenChoiceConfig):
            return 1
        return max(1, kind.routing_group_tokens // max(self.context_length, 1))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text.

    corpus: names of text corpora, see `mot_jax.data.corpora`; more than one are mixed.
    weights: share of each corpus in a batch, in any unit; none given: by their sizes.
    train_split, validation_split, text_feature: of the data sets, as TFDS names them.
    tokenizer: `bytes`, a `tokenizer.json` of the tokenizers library, or a SentencePiece `.model`.
    shuffle_group_size: rows that the shuffle gives to different documents; None is the model's group size, or the rows of its
        routing groups. A dense twin that is to see the same batches as its MoT sets it.
    mask_rate: of the tokens, for the masked objective.
    directory: where prepared text is kept; None is `~/.cache/mot_jax`.
    validation_windows: score at most that many windows of the validation split; None is all of them.
    """

    corpus: tuple[str, ...] = ("python_source/stdlib",)
    weights: tuple[float, ...] = ()
    train_split: str = "train"
    validation_split: str = "validation"
    text_feature: str = "text"
    tokenizer: str = "bytes"
    shuffle_group_size: int | None = None
    mask_rate: float = 0.15
    directory: str | None = _free(None)
    validation_windows: int | None = _free(None)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Global-norm clipping, the optimizer; linear warm-up, then a cosine to `min_lr_ratio` of the learning rate.

    name: all from optax. `muon` takes the matrices of the blocks, and AdamW the rest.
    decay: what `weight_decay` shrinks: `all` parameters, as in the paper, or the `matrices` of the blocks and the head.
    mu_dtype: what the optimizer's first moment is kept in.
    multipliers: (part of a parameter's name, factor of its learning rate), as ("controller", 3.0).
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["all", "matrices"] = "all"
    clip_norm: float = 0.5
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    multipliers: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """What is added to the cross-entropy, each mean times its weight.

    head_z: (log Z)² of the head's logits, Z being the sum of their exponentials. The others, of the layers, mean over
    them: mixing_entropy, normalised, of the mixing weights; load_balancing of token choice, 1 where all experts are
    alike; router_z: (log Z)² of its logits.
    """

    mixing_entropy: float = 0.0
    head_z: float = 0.0
    load_balancing: float = 0.0
    router_z: float = 0.0

    def of_layers(self) -> dict[str, float]:
        """The weights that are not 0, by the names of the layers' losses."""
        return {name: weight for name, weight in vars(self).items() if weight and name != "head_z"}


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The training run.

    batch_size counts sequences of the whole mesh; `gradient_accumulation_steps` splits it into microbatches. upcycle_from: workdir of
    a dense model of the same sizes, whose feed-forward layers the experts begin as. transition_from: workdir of a
    Mixture-of-Tokens run that this one begins as, weights, optimizer and text (PAPER.md section 4); learning rate and
    steps begin anew. transition_router: what routes at first, its `controller` or a `random` one, for comparison.
    """

    steps: int = _extendable(1000)
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    seed: int = 0
    upcycle_from: str | None = None
    transition_from: str | None = None
    transition_router: Literal["controller", "random"] = "controller"
    optimizer: OptimizerConfig = OptimizerConfig()
    losses: LossWeights = LossWeights()
    log_every: int = _free(10)
    validate_every: int = _free(100)
    checkpoint_every: int = _free(100)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one may be -1, which takes the devices that are left.

    data: spreads the rows of the batch. fsdp: rows, and between the steps every weight. expert: rows, and experts.
    tensor: heads and hidden widths.
    wait_seconds: for which several processes wait for each other at the start. heartbeat_seconds: without a sign of
    life, after which one counts as lost, and the others end.
    """

    data: int = _free(-1)
    fsdp: int = _free(1)
    expert: int = _free(1)
    tensor: int = _free(1)
    wait_seconds: int = _free(300)
    heartbeat_seconds: int = _free(30)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """`max_to_keep`: how many of the newest checkpoints stay. `preempted_exit_code`: of a run that a SIGTERM has stopped."""

    max_to_keep: int = _free(2)
    preempted_exit_code: int = _free(143)


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """`wandb`: log to Weights & Biases as well. `sample_tokens`: text sampled at the end of a run; 0 samples none."""

    tensorboard: bool = _free(True)
    wandb: bool = _free(False)
    wandb_project: str = _free("mot_jax")
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
        return self.data.shuffle_group_size or max(self.model.group_size, self.model.routing_rows)
