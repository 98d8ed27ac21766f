"""Matrix products and memory traffic of one feed-forward layer: a class for each kind, listed in `COSTS`.

A new kind needs one class here; everything else in `mot_jax.cost` reads these classes. The layer's definition is in
`docs/paper.md`, section 2. Conventions:

FLOPs: a multiply-add is 2. Only matrix products count, not norms, softmax, activations or gathers. Mixing takes D E
    multiply-adds per token for each of controller, merge and emit, learned or not, and D E more where emit has its own
    controller. Token choice takes D E for the router and k experts per token, dropped tokens and empty slots included
    as if they were processed. Expert choice takes D E for the router and E C / G experts per token, where an expert
    takes C of G tokens. ReLU routing takes D E for the router and k experts per token, the target, although all E are
    executed. Hash layers have k experts per token and no router. Soft MoE takes D E P for each of controller, dispatch
    and combine, and E P / S experts per token, S the context length.
Traffic: each part is taken as one program that reads every argument once and writes every result once, while
    intermediate values stay on the chip. Norms and residual connections are not part of the layer.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import ClassVar, Literal

from mot_jax.config import (
    DenseConfig,
    ExpertChoiceConfig,
    ExpertThresholdConfig,
    FeedForwardConfig,
    HashConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    ReluRoutingConfig,
    SoftMoEConfig,
    ThresholdConfig,
    TokenChoiceConfig,
)
from mot_jax.nn import routing

Number = int | Fraction
NETWORKS = ("dense FFN", "experts", "shared experts")  # the parts that are feed-forward networks


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Total sizes of a set of arrays, as counts of numbers.

    activations: per token, in the activations' dtype. logits: per token, in float32 or wider: router logits and mixing
    weights. parameters: per layer, in the parameters' dtype.
    """

    activations: Number = 0
    logits: Number = 0
    parameters: int = 0

    def __add__(self, other: Arrays) -> Arrays:
        return Arrays(
            self.activations + other.activations, self.logits + other.logits, self.parameters + other.parameters
        )

    def __mul__(self, factor: int) -> Arrays:
        return Arrays(self.activations * factor, self.logits * factor, self.parameters * factor)

    def bytes(self, tokens: int, itemsize: int, logits_itemsize: int, param_itemsize: int) -> float:
        """Bytes for a batch of `tokens` tokens, given the bytes of a number of each dtype."""
        per_token = self.activations * itemsize + self.logits * logits_itemsize
        return float(tokens * per_token + self.parameters * param_itemsize)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a layer, executed as one program.

    products: FLOPs per token of each matrix product of the forward pass; the backward pass has two of the same size
    for each. summary: the entry of `flops.forward_flops` that includes them. forward, backward: arrays that the pass
    reads or writes. saved: arrays that the forward pass writes in addition if a backward pass follows.
    """

    name: str
    summary: str
    products: dict[str, Number]
    forward: Arrays
    backward: Arrays
    saved: Arrays = Arrays()

    @property
    def flops(self) -> float:
        """FLOPs of the forward pass per token."""
        return float(sum(self.products.values()))


@dataclasses.dataclass(frozen=True)
class FeedForwardCost:
    """Cost of a layer of one kind. The defaults of the methods are those of a dense layer.

    tokens: those that a device processes at once, on which the executed FLOPs of experts without a capacity depend;
    None: these are taken as equal to the useful ones.
    """

    config: FeedForwardConfig
    d_model: int
    d_ff: int
    gated: bool
    context_length: int
    tokens: int | None = None

    def parts(self) -> tuple[Part, ...]:
        """The parts in order of execution."""
        raise NotImplementedError

    def saved(self) -> Arrays:
        """Arrays that the whole layer saves for its backward pass: pre-activations, router logits, mixing weights."""
        return sum((part.saved for part in self.parts()), Arrays())

    def product_flops(self, *names: str) -> float:
        """FLOPs per token of the named matrix products of the forward pass; 0 for those that the layer lacks."""
        return float(sum(part.products.get(name, 0) for part in self.parts() for name in names))

    def flops(self) -> float:
        """FLOPs of the forward pass per token."""
        return sum(part.flops for part in self.parts())

    def executed_flops(self) -> float:
        """FLOPs that the forward pass executes per token: also for empty slots, gates of 0, and to move tokens."""
        return self.flops() + self._idle_flops(*_inputs("experts"), *_outputs("experts"))

    def executed_product_flops(self, *names: str) -> float:
        """`product_flops`, as executed."""
        return self.product_flops(*names) + self._idle_flops(*names)

    def _idle_flops(self, *names: str) -> float:
        """Executed minus useful FLOPs of the named products, of which only those of the experts differ."""
        experts = {*_inputs("experts"), *_outputs("experts")}.intersection(names)
        return (self.executed_over_useful() - 1) * self.product_flops(*experts)

    def runs_in_blocks(self) -> bool:
        """Whether `routing.apply_experts` runs the experts, whose work is not in proportion to the tokens."""
        return False

    def executed_over_useful(self) -> float:
        """Executed FLOPs of the experts over useful ones: above 1 with empty slots or gates of 0."""
        return 1.0

    def expert_flops(self) -> float:
        """FLOPs of the experts per token, shared ones included, without router and mixing; those of a dense layer."""
        return sum(part.flops for part in self.parts() if part.summary in NETWORKS)

    def recomputed_products(self) -> tuple[str, ...]:
        """Products of the forward pass that the backward pass runs again, without `remat`."""
        return ()

    def final_products(self) -> tuple[str, ...]:
        """Products whose results are only added to the residual stream, so that no derivative reads them."""
        raise NotImplementedError

    def active_experts(self, parameters: int) -> int:
        """The share of the experts' parameters that a token pays FLOPs for."""
        return parameters

    def sequences_per_group(self) -> int:
        """The smallest number of sequences that the layer can process."""
        return max(self.config.mixed_sequences, self.config.routed_sequences(self.context_length))

    def sizes(self, batch_size: int, microbatch_size: int) -> dict[str, int | float | str]:
        """The kind's sizes in `mot describe`."""
        return {}

    def save_policies(self) -> dict[str, FeedForwardConfig]:
        """Configs that differ in the arrays saved for the backward pass; empty if the kind offers no choice."""
        return {}

    @classmethod
    def flop_matched(cls, group_size: int, num_experts: int, length: int) -> FeedForwardConfig | None:
        """A config whose experts have the FLOPs of the dense layer (`cost.layers.Shape`); None: the kind has none."""
        return None

    def _product(self, width: int, per_token: Number = 1) -> Number:
        """FLOPs per token of a product between the widths D and `width`, executed `per_token` times for each token."""
        return 2 * self.d_model * width * per_token

    def _networks(self, name: str, width: int, count: int = 1, per_token: Number = 1) -> Part:
        """`count` two-layer networks of a hidden width, executed `per_token` times for each token.

        The forward pass reads inputs and weights, writes outputs and saves pre-activations. The backward pass reads
        inputs, pre-activations, cotangents and weights, and writes the cotangents of the inputs and of the weights.
        """
        first = ("input", "gate") if self.gated else ("input",)
        products = {f"{name} {layer}": self._product(width, per_token) for layer in (*first, "output")}
        weights = Arrays(parameters=len(products) * count * self.d_model * width)
        inputs, hidden = Arrays(self.d_model * per_token), Arrays(len(first) * width * per_token)
        return Part(name, name, products, inputs * 2 + weights, inputs * 3 + hidden + weights * 2, hidden)

    def _shared(self) -> tuple[Part, ...]:
        width = self.config.shared_dim(self.d_ff)
        return (self._networks("shared experts", width),) if width else ()


def _outputs(*names: str) -> tuple[str, ...]:
    return tuple(f"{name} output" for name in names)


def _inputs(*names: str) -> tuple[str, ...]:
    return tuple(f"{name} {layer}" for name in names for layer in ("input", "gate"))


def _recomputed(dispatch: str, config: MixtureOfTokensConfig | ExpertChoiceConfig) -> tuple[str, ...]:
    """The products, of that which makes the experts' inputs and of those of the experts, that are run again."""
    outputs = (dispatch, *_outputs("experts"))
    return {"nothing": (*outputs, *_inputs("experts")), "pre_activations": outputs, "all": ()}[config.save_for_backward]


def _save_policies(config: MixtureOfTokensConfig | ExpertChoiceConfig) -> dict[str, FeedForwardConfig]:
    choices: tuple[Literal["nothing", "pre_activations", "all"], ...] = ("nothing", "pre_activations", "all")
    return {f"save_for_backward: {c}": dataclasses.replace(config, save_for_backward=c) for c in choices}


class DenseCost(FeedForwardCost):
    """One network of width d_ff."""

    config: DenseConfig

    def parts(self) -> tuple[Part, ...]:
        return (self._networks("dense FFN", self.d_ff),)

    def final_products(self) -> tuple[str, ...]:
        return _outputs("dense FFN")

    @classmethod
    def flop_matched(cls, group_size: int, num_experts: int, length: int) -> DenseConfig:
        return DenseConfig()


class MixtureOfTokensCost(FeedForwardCost):
    """Controller, merge, experts on E mixtures for each group of G tokens, emit."""

    config: MixtureOfTokensConfig

    def parts(self) -> tuple[Part, ...]:
        kind, product = self.config, self._product(self.config.num_experts)
        per_token = Fraction(kind.num_experts, kind.group_size)
        controllers = {"shared": 1, "separate": 2, "common_base": 3}[kind.mixing.controllers]
        used = min(controllers, 2)  # a common base is added to the weights of both before the products
        x, mixtures, weights = Arrays(self.d_model), Arrays(self.d_model * per_token), Arrays(logits=kind.num_experts)
        read = x + Arrays(parameters=controllers * self.d_model * kind.num_experts)
        return (
            Part(
                "controller, softmax, merge",
                "mixing",
                {"controller": used * product, "merge": product},
                read + weights * used + mixtures,
                read * 2 + mixtures + weights * (2 * used),
            ),
            self._networks("experts", kind.hidden_dim(self.d_ff), kind.num_experts, per_token),
            Part("emit", "mixing", {"emit": product}, mixtures + weights + x, x + (mixtures + weights) * 2),
            *self._shared(),
        )

    def saved(self) -> Arrays:
        """The mixing weights too: a result of the first part, but internal to the whole layer."""
        emit_has_own_softmax = self.config.mixing.controllers != "shared"
        return super().saved() + Arrays(logits=self.config.num_experts * (1 + emit_has_own_softmax))

    def recomputed_products(self) -> tuple[str, ...]:
        """By `save_for_backward`: the merge and the experts' products whose results are not saved."""
        return _recomputed("merge", self.config)

    def final_products(self) -> tuple[str, ...]:
        return ("emit", *_outputs("shared experts"))

    def active_experts(self, parameters: int) -> int:
        """1/G: the G tokens of a group share one execution of each of its E experts."""
        return parameters // self.config.group_size

    def sizes(self, batch_size: int, microbatch_size: int) -> dict[str, int | float | str]:
        kind, g, e = self.config, self.config.group_size, self.config.num_experts
        sizes: dict[str, int | float | str] = {"group_size_G": g, "experts_E": e}
        sizes["expert_dim_F"] = kind.hidden_dim(self.d_ff)
        if kind.expert_dim is None:
            product = g * (self.d_ff - kind.shared_expert_dim)
            sizes["expert_dim_rule"] = f"E F = G (d_ff - shared_expert_dim) = {product:,}"
        sizes |= {"granularity_E/G": e // g if e % g == 0 else e / g, "groups_per_batch": batch_size // g}
        return sizes | {"groups_per_microbatch": microbatch_size // g}

    def save_policies(self) -> dict[str, FeedForwardConfig]:
        return _save_policies(self.config)

    @classmethod
    def flop_matched(cls, group_size: int, num_experts: int, length: int) -> MixtureOfTokensConfig:
        return MixtureOfTokensConfig(group_size, num_experts)


class _TopKCost(FeedForwardCost):
    """A layer in which a token pays FLOPs for k of E experts. k_name: of k in `mot describe`."""

    config: TokenChoiceConfig | ExpertThresholdConfig | ReluRoutingConfig | HashConfig
    k_name: ClassVar[str]

    def active_experts(self, parameters: int) -> int:
        """k/E."""
        return parameters * self.config.top_k // self.config.num_experts

    def sizes(self, batch_size: int, microbatch_size: int) -> dict[str, int | float | str]:
        kind = self.config
        return {"experts_E": kind.num_experts, "expert_dim_F": kind.hidden_dim(self.d_ff), self.k_name: kind.top_k}

    def _rows_of_blocks(self) -> float:
        """Rows of the blocks of `routing.apply_experts`, of which some are filled in part, over assignments."""
        if self.tokens is None:
            return 1.0
        assignments, experts = self.tokens * self.config.top_k, self.config.num_experts
        return routing.blocks(assignments, experts) * routing.block_size(assignments, experts) / assignments


class TokenChoiceCost(_TopKCost):
    """Router, dispatch to the k chosen experts of each token, experts, combine."""

    config: TokenChoiceConfig | ExpertThresholdConfig
    k_name = "choices_k"

    def parts(self) -> tuple[Part, ...]:
        kind = self.config
        x, sent, logits = Arrays(self.d_model), Arrays(self.d_model * kind.top_k), Arrays(logits=kind.num_experts)
        read = x + Arrays(parameters=self.d_model * kind.num_experts)
        router = {"router": self._product(kind.num_experts)}
        return (
            Part("router", "router", router, read, logits + read * 2, logits),
            Part("dispatch", "", {}, x + sent, sent + x),
            self._networks("experts", kind.hidden_dim(self.d_ff), kind.num_experts, kind.top_k),
            Part("combine", "", {}, sent + x, x + sent * 2),
            *self._shared(),
        )

    def runs_in_blocks(self) -> bool:
        return self.config.capacity_factor is None

    def executed_over_useful(self) -> float:
        """Experts process all their slots or blocks, filled or not, and with a capacity no token that is dropped."""
        kind, tokens = self.config, self.config.routing_group_tokens
        if kind.capacity_factor is None:
            return self._rows_of_blocks()
        slots = routing.capacity(tokens, kind.top_k, kind.num_experts, kind.capacity_factor) * kind.num_experts
        return slots / (tokens * kind.top_k)

    def recomputed_products(self) -> tuple[str, ...]:
        """Without a capacity the experts' outputs are not saved (`routing.sum_experts`)."""
        return _outputs("experts") if self.config.capacity_factor is None else ()

    def final_products(self) -> tuple[str, ...]:
        return _outputs("shared experts")

    def sizes(self, batch_size: int, microbatch_size: int) -> dict[str, int | float | str]:
        kind, tokens = self.config, self.config.routing_group_tokens
        sizes = super().sizes(batch_size, microbatch_size) | {"routing_group_tokens_T": tokens}
        if kind.capacity_factor is not None:
            sizes["capacity_C"] = routing.capacity(tokens, kind.top_k, kind.num_experts, kind.capacity_factor)
        return sizes

    @classmethod
    def flop_matched(cls, group_size: int, num_experts: int, length: int) -> TokenChoiceConfig | ExpertThresholdConfig:
        """The experts of a mixture, of which each token takes as many as have the FLOPs of the dense layer."""
        top_k = max(1, num_experts // group_size)
        return TokenChoiceConfig(num_experts, top_k=top_k, routing_group_tokens=max(256, length))


class ExpertThresholdCost(TokenChoiceCost):
    """As token choice: thresholds are set so that a token has k experts on average."""

    config: ExpertThresholdConfig

    def runs_in_blocks(self) -> bool:
        return False

    def executed_over_useful(self) -> float:
        """Without a capacity, every expert is run on every token."""
        kind = self.config
        return kind.num_experts / kind.top_k if kind.capacity_factor is None else super().executed_over_useful()

    def recomputed_products(self) -> tuple[str, ...]:
        """Without a capacity nothing of the experts is saved (`routing.sum_all_experts`)."""
        if self.config.capacity_factor is not None:
            return ()
        return (*_inputs("experts"), *_outputs("experts"))

    def sizes(self, batch_size: int, microbatch_size: int) -> dict[str, int | float | str]:
        return super().sizes(batch_size, microbatch_size) | {"group_size_G": self.config.group_size}

    @classmethod
    def flop_matched(cls, group_size: int, num_experts: int, length: int) -> ExpertThresholdConfig:
        """The experts of a mixture, of which each token takes as many as have the FLOPs of the dense layer."""
        return ExpertThresholdConfig(
            num_experts,
            top_k=max(1, num_experts // group_size),
            routing_group_tokens=max(256, length),
            group_size=group_size,
        )


class ExpertChoiceCost(FeedForwardCost):
    """Router, dispatch of C tokens to each expert, experts, combine."""

    config: ExpertChoiceConfig

    def _candidates(self) -> int:
        """G, the number of tokens from which an expert takes C: of a group at a position, or of a sequence."""
        return self.config.candidates(self.context_length)

    def _taken(self) -> int:
        """E C, the number of tokens that all experts take of G."""
        return self.config.num_experts * self.config.capacity(self._candidates())

    def parts(self) -> tuple[Part, ...]:
        kind, taken = self.config, self._taken()
        per_token = Fraction(taken, self._candidates())
        x, sent, logits = Arrays(self.d_model), Arrays(self.d_model * per_token), Arrays(logits=kind.num_experts)
        one_hot, weights = Arrays(taken), Arrays(logits=taken)
        read, router = x + Arrays(parameters=self.d_model * kind.num_experts), self._product(kind.num_experts)
        return (
            Part("router", "router", {"router": router}, read + one_hot + weights, logits + weights + read * 2, logits),
            Part("dispatch", "", {}, x + one_hot + sent, sent + one_hot + x),
            self._networks("experts", kind.hidden_dim(self.d_ff), kind.num_experts, per_token),
            Part("combine", "", {}, sent + weights + x, x + (sent + weights) * 2),
            *self._shared(),
        )

    def saved(self) -> Arrays:
        """The one-hot matrix, and the probabilities in it, too: results of the first part, internal to the layer."""
        return super().saved() + Arrays(self._taken(), self._taken())

    def executed_flops(self) -> float:
        """Dispatch and combine are products with one-hot matrices, D E C each, which only move tokens."""
        return super().executed_flops() + 2 * self._product(self._taken())

    def executed_product_flops(self, *names: str) -> float:
        """Dispatch is executed, and no useful product."""
        return super().executed_product_flops(*names) + self._product(self._taken() if "dispatch" in names else 0)

    def recomputed_products(self) -> tuple[str, ...]:
        """By `save_for_backward`: dispatch and the experts' products whose results are not saved."""
        return _recomputed("dispatch", self.config)

    def save_policies(self) -> dict[str, FeedForwardConfig]:
        return _save_policies(self.config)

    def final_products(self) -> tuple[str, ...]:
        return _outputs("shared experts")

    def active_experts(self, parameters: int) -> int:
        """C/G: a token takes part in E C / G experts, on average."""
        return parameters * self.config.capacity(self._candidates()) // self._candidates()

    def sizes(self, batch_size: int, microbatch_size: int) -> dict[str, int | float | str]:
        kind, candidates = self.config, self._candidates()
        sizes: dict[str, int | float | str] = {"group_size_G": candidates, "experts_E": kind.num_experts}
        sizes |= {"expert_dim_F": kind.hidden_dim(self.d_ff), "capacity_C": kind.capacity(candidates)}
        return sizes | {"experts_per_token": self._taken() / candidates}

    @classmethod
    def flop_matched(cls, group_size: int, num_experts: int, length: int) -> ExpertChoiceConfig:
        """The experts of a mixture, each of which takes as many tokens as have the FLOPs of the dense layer."""
        return ExpertChoiceConfig(group_size, num_experts, top_k=max(1, num_experts // group_size))


class ReluRoutingCost(_TopKCost):
    """Router; all experts as one network of width E F, whose hidden layer is multiplied by the gates."""

    config: ReluRoutingConfig
    k_name = "target_k"

    def parts(self) -> tuple[Part, ...]:
        kind, width = self.config, self.config.hidden_dim(self.d_ff)
        x, gates = Arrays(self.d_model), Arrays(logits=kind.num_experts)
        read = x + Arrays(parameters=self.d_model * kind.num_experts)
        router = {"router": self._product(kind.num_experts)}
        executed = self._networks("experts", kind.num_experts * width)
        experts = dataclasses.replace(
            executed,
            products=dict.fromkeys(executed.products, self._product(width, kind.top_k)),
            forward=executed.forward + gates,
            backward=executed.backward + gates * 2,
        )
        return (
            Part("router", "router", router, read + gates, gates + read * 2, gates),
            experts,
            *self._shared(),
        )

    def executed_over_useful(self) -> float:
        """All experts process all tokens, also those whose gate is 0."""
        return self.config.num_experts / self.config.top_k

    def final_products(self) -> tuple[str, ...]:
        return _outputs("experts", "shared experts")

    @classmethod
    def flop_matched(cls, group_size: int, num_experts: int, length: int) -> ReluRoutingConfig:
        """The experts of a mixture, of which as many as have the FLOPs of the dense layer are the target."""
        return ReluRoutingConfig(num_experts, top_k=max(1, num_experts // group_size))


class HashCost(_TopKCost):
    """Dispatch to the k experts of each token, experts, combine with equal weights."""

    config: HashConfig
    k_name = "experts_per_token_k"

    def parts(self) -> tuple[Part, ...]:
        kind = self.config
        x, sent = Arrays(self.d_model), Arrays(self.d_model * kind.top_k)
        return (
            Part("dispatch", "", {}, x + sent, sent + x),
            self._networks("experts", kind.hidden_dim(self.d_ff), kind.num_experts, kind.top_k),
            Part("combine", "", {}, sent + x, x + sent),
            *self._shared(),
        )

    def runs_in_blocks(self) -> bool:
        return True

    def executed_over_useful(self) -> float:
        """Experts process all rows of their blocks."""
        return self._rows_of_blocks()

    def final_products(self) -> tuple[str, ...]:
        """The experts' outputs too, whose weights are constants."""
        return _outputs("experts", "shared experts")

    @classmethod
    def flop_matched(cls, group_size: int, num_experts: int, length: int) -> HashConfig:
        """The experts of a mixture, of which each token has as many as have the FLOPs of the dense layer."""
        return HashConfig(num_experts, top_k=max(1, num_experts // group_size))


class SoftMoECost(FeedForwardCost):
    """Controller, dispatch to the E P slots of a sequence, experts, combine."""

    config: SoftMoEConfig

    def _slots(self) -> int:
        """E P, the number of slots of a sequence."""
        return self.config.num_experts * self.config.slots(self.context_length)

    def parts(self) -> tuple[Part, ...]:
        kind, slots = self.config, self._slots()
        per_token, product = Fraction(slots, self.context_length), self._product(slots)
        x, sent, weights = Arrays(self.d_model), Arrays(self.d_model * per_token), Arrays(logits=slots)
        read = x + Arrays(parameters=self.d_model * slots)
        return (
            Part(
                "controller, softmax, dispatch",
                "mixing",
                {"controller": product, "dispatch": product},
                read + weights * 2 + sent,
                read * 2 + sent + weights * 4,
            ),
            self._networks("experts", kind.hidden_dim(self.d_ff), kind.num_experts, per_token),
            Part("combine", "mixing", {"combine": product}, sent + weights + x, x + (sent + weights) * 2),
            *self._shared(),
        )

    def saved(self) -> Arrays:
        """Both weights too, and the slots before and after the experts, which are internal to the whole layer."""
        slots = self._slots()
        return super().saved() + Arrays(2 * self.d_model * Fraction(slots, self.context_length), 2 * slots)

    def final_products(self) -> tuple[str, ...]:
        return ("combine", *_outputs("shared experts"))

    def active_experts(self, parameters: int) -> int:
        """P/S: an expert runs P times for a sequence."""
        return parameters * self.config.slots(self.context_length) // self.context_length

    def sizes(self, batch_size: int, microbatch_size: int) -> dict[str, int | float | str]:
        kind = self.config
        sizes: dict[str, int | float | str] = {"experts_E": kind.num_experts}
        sizes |= {"expert_dim_F": kind.hidden_dim(self.d_ff), "slots_per_expert_P": kind.slots(self.context_length)}
        return sizes

    @classmethod
    def flop_matched(cls, group_size: int, num_experts: int, length: int) -> SoftMoEConfig:
        """Experts of the dense width, as many as have the parameters of the mixture, and as many slots as tokens."""
        experts = min(group_size, length)
        return SoftMoEConfig(experts, max(1, round(length / experts)))


COSTS: dict[type, type[FeedForwardCost]] = {
    DenseConfig: DenseCost,
    MixtureOfTokensConfig: MixtureOfTokensCost,
    TokenChoiceConfig: TokenChoiceCost,
    ExpertThresholdConfig: ExpertThresholdCost,
    ExpertChoiceConfig: ExpertChoiceCost,
    ReluRoutingConfig: ReluRoutingCost,
    HashConfig: HashCost,
    SoftMoEConfig: SoftMoECost,
}


def feed_forward_cost(model: ModelConfig, kind: FeedForwardConfig, tokens: int | None = None) -> FeedForwardCost:
    """The cost of a layer with the model's widths; an inference kind has that of the config class that it extends.

    `threshold` has that of `expert_threshold`. tokens: as in `FeedForwardCost`.
    """
    if isinstance(kind, ThresholdConfig):
        width, top_k = kind.hidden_dim(model.d_ff), kind.experts_per_token
        kind = ExpertThresholdConfig(kind.num_experts, width, top_k, kind.shared_expert_dim, capacity_factor=None)
    cost = next(COSTS[base] for base in type(kind).__mro__ if base in COSTS)
    return cost(kind, model.d_model, model.d_ff, model.gated, model.context_length, tokens)


def trainable_kinds() -> dict[str, type[FeedForwardCost]]:
    """The costs of the kinds that train, by the name of the kind."""
    return {config.kind: cost for config, cost in COSTS.items()}  # type: ignore[attr-defined]


def flop_matched_kinds(group_size: int, num_experts: int, length: int) -> dict[str, FeedForwardConfig]:
    """The kinds that train, by name, all with the FLOPs of the dense layer in their experts."""
    configs = (cost.flop_matched(group_size, num_experts, length) for cost in COSTS.values())
    return {config.kind: config for config in configs if config is not None}
