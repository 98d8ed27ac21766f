"""The interface of the feed-forward kinds: `layer(x, context) -> FeedForwardOutput`.

The transformer depends on nothing else of a kind. `docs/add-a-kind.md` has the steps that add one: config, inference
mode, layer, cost, tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mot_jax.config import DenseConfig, InitConfig, ModelConfig, check_part, layer_errors
from mot_jax.errors import UserError
from mot_jax.nn.initializers import draw
from mot_jax.runtime.compilation import default_promotion

_ARRAYS = ["token_mask", "token_ids", "positions", "step", "key", "loss_counts"]


@partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=["losses", "train"])
@dataclasses.dataclass(frozen=True)
class FeedForwardContext:
    """Inputs of a layer other than its activations. The transformer passes the same context to all blocks."""

    token_mask: jax.Array | None = None
    """bool [B, S], True = non-padding; None: no padding."""

    token_ids: jax.Array | None = None
    """int32 [B, S]. The transformer passes those of its input if they are None."""

    positions: jax.Array | None = None
    """int32 [B, S], the number of earlier tokens of each token's text; None: 0 to S - 1 in every sequence."""

    step: jax.Array | None = None
    """int32 scalar, the number of training steps so far; None: training has ended. Annealed and frozen temperatures and
    the warmup of thresholds depend on it, and must have it in training."""

    key: jax.Array | None = None
    """A PRNG key."""

    losses: tuple[str, ...] = ()
    """Static: names of the losses with a weight in training. A layer returns those of them that it defines."""

    loss_counts: dict[str, jax.Array] | None = None
    """`FeedForward.loss_counts` summed over all microbatches of the batch; None: x is the whole batch."""

    train: bool = False
    """Static: whether this is a training step, in which padding is at the ends of sequences only."""


def needs_step(field: str, value: Any) -> UserError:
    """The error of a layer in training whose `field` depends on a step that `FeedForwardContext` lacks."""
    return UserError(
        f"{field} = {value!r}: requires the step in training; try FeedForwardContext(step=step, train=True)"
    )


@partial(jax.tree_util.register_dataclass, data_fields=["y", "losses", "metrics", "statistics"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class FeedForwardOutput:
    """The result of a layer."""

    y: jax.Array
    """The update [B, S, D], which the block adds to the residual stream."""

    losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    """Auxiliary losses by name: scalars, means over the batch, not yet multiplied by their weights.
    That of a microbatch is its sum divided by the count of the whole batch: those of all microbatches add up to the
    mean."""

    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    """Scalars to be logged, with the same keys in every block of a kind."""

    statistics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    """In training, sums and counts over the non-padding tokens, float32, from which `FeedForward.update_router` makes
    the next router state. Those of all microbatches add up."""


class RouterState(nnx.Variable):
    """A variable of a router that is not learned by gradients, such as a bias or a threshold of each expert.

    float32 (or an integer type) and replicated. The training step updates it once, after the parameters, from the
    statistics of all microbatches; nothing else changes it. It has no gradient, weight decay or clipping.
    """


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """The widths, dtypes and random numbers with which a layer creates its parameters."""

    d_model: int
    d_ff: int
    activation: str
    gated: bool
    init: InitConfig
    dtype: str
    param_dtype: str
    rngs: nnx.Rngs

    def matrix(self, shape: tuple[int, ...], fan_in: int, multiplier: float = 1.0) -> nnx.Param:
        """Draw a parameter by the model's init, see `mot_jax.nn.initializers.draw`."""
        return nnx.Param(draw(self.rngs.params(), shape, fan_in, self.init, self.param_dtype, multiplier))

    def constant(self, value: float, *shape: int) -> nnx.Param:
        """Create a parameter that is `value` everywhere."""
        return nnx.Param(jnp.full(shape, value, self.param_dtype))

    def norm(self) -> nnx.Param:
        """Create scale 1 and bias 0 of a layer norm, [2, D]."""
        return nnx.Param(jnp.array([[1.0], [0.0]], self.param_dtype).repeat(self.d_model, axis=1))

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments with which `FeedForward` creates another layer of these options."""
        return {name: getattr(self, name) for name in ("activation", "gated", "init", "dtype", "param_dtype", "rngs")}


_MODEL = ModelConfig(num_heads=1, feed_forward=DenseConfig())  # with which the other arguments of a layer are checked


class FeedForward(nnx.Module):
    """Base class of the feed-forward kinds: the constructor that they share.

    Args of the constructor:
        d_model: D, the width of x.
        d_ff: the hidden width of the dense baseline, from which a kind derives the width of its experts.
        config: the config of the kind; None for its defaults.
        activation: `relu`, `gelu` (tanh approximation) or `silu`.
        gated: multiply the hidden layer by an activated gate (SwiGLU and the like).
        init: distribution and scale of the initial values.
        dtype: of activations and products: a name such as `bfloat16`, or `jnp.bfloat16`.
        param_dtype: of parameters, in the same way.
        rngs: the stream `params` is used, in the order in which parameters are created.

    Raises UserError for an argument, or a field of the config, that has no such value, and for fields that contradict
    each other or the widths.
    """

    config_type: ClassVar[type]
    config: Any
    activation: str
    dtype: str

    def __init__(
        self,
        d_model: SupportsIndex,
        d_ff: SupportsIndex,
        config: Any = None,
        *,
        activation: str = "relu",
        gated: bool = False,
        init: InitConfig = InitConfig(),
        dtype: DTypeLike = "float32",
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        self.config = self.config_type() if config is None else config
        if not isinstance(self.config, self.config_type):
            name, type_name = type(self).__name__, self.config_type.__name__
            raise UserError(f"config = {config!r}: must be a {type_name} for {name}; try {type_name}()")
        check_part(self.config)
        fields: dict[str, Any] = {
            "d_model": d_model,
            "d_ff": d_ff,
            "activation": activation,
            "gated": gated,
            "init": init,
            "dtype": dtype,
            "param_dtype": param_dtype,
        }
        model = dataclasses.replace(_MODEL, **fields)  # which converts NumPy numbers and data types
        check_part(model)
        kind: Any = self.config
        if faults := list(layer_errors(dataclasses.replace(model, feed_forward=kind))):
            # By the names of the config's fields and of the arguments.
            raise UserError(*(f.replace("model.feed_forward.", "").replace("model.", "") for f in faults))
        self.activation, self.dtype = model.activation, model.dtype
        self._create_parameters(LayerOptions(**{name: getattr(model, name) for name in fields}, rngs=rngs))

    def _create_parameters(self, options: LayerOptions) -> None:
        """Assign the `nnx.Param`s of the layer; a parameter that the config does not need is None."""
        raise NotImplementedError

    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D], after the layer norm -> update [B, S, D] in `self.dtype`, losses and metrics."""
        raise NotImplementedError

    def loss_counts(self, token_mask: jax.Array) -> dict[str, jax.Array]:
        """The number of terms in each mean of the losses, by name, for sequences with this `token_mask` [B, S].

        A kind with losses divides by these counts, or by those of the whole batch in `context.loss_counts`.
        """
        return {}

    @classmethod
    def initial_router(cls, config: Any, layers: int, token_counts: Callable[[], np.ndarray]) -> dict[str, np.ndarray]:
        """The router state with which a training run begins, as far as it depends on the training text.

        Args:
            config: that of the kind.
            layers: the number of layers of the kind.
            token_counts: reads a part of the text and returns the number of tokens of each id, int64 [V]: the same
                numbers in every process.

        Returns:
            `RouterState` variables by name, stacked over the layers, [layers, ...]. The others keep the values with
            which layers are created.
        """
        del config, layers, token_counts
        return {}

    @classmethod
    def update_router(
        cls, config: Any, router: dict[str, jax.Array], statistics: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """The router state after a training step.

        Args:
            config: that of the kind.
            router: the layers' `RouterState` variables by name, stacked over all layers of the kind, [layers, ...].
            statistics: those of the step, summed over its microbatches and stacked in the same way.
        """
        del config, statistics
        return router


@default_promotion()
def update_router_state(layers: Sequence[FeedForward], statistics: Sequence[Mapping[str, jax.Array]]) -> None:
    """Set the router state of layers in a model other than `mot_jax.Transformer`, once per training step.

    Args:
        layers: all layers of the model that have this kind and config.
        statistics: `FeedForwardOutput.statistics` of each layer in the step, summed over its microbatches.
    """
    if not any(statistics):
        return  # a kind without router state, or whose state does not change
    kind, names = layers[0], [name for name, value in vars(layers[0]).items() if isinstance(value, RouterState)]
    router = {name: jnp.stack([getattr(layer, name)[...] for layer in layers]) for name in names}
    sums = {name: jnp.stack([of_layer[name] for of_layer in statistics]) for name in statistics[0]}
    for name, values in kind.update_router(kind.config, router, sums).items():
        for layer, value in zip(layers, values, strict=True):
            getattr(layer, name)[...] = value


@jax.custom_vjp
def _relu(x: jax.Array) -> jax.Array:
    """max(x, 0), with a derivative that reads the result, which the next product saves anyway, and not x or a mask."""
    return jax.nn.relu(x)


# `!= 0`, because XLA simplifies `max(x, 0) > 0` to `x > 0`, and then has to save x as well.
_relu.defvjp(
    lambda x: (jax.nn.relu(x),) * 2,
    lambda y, cotangent: (jax.lax.select(y != 0, cotangent, jnp.zeros_like(cotangent)),),
)
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": _relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


def activate(name: str, h: jax.Array, gate: jax.Array | None) -> jax.Array:
    """Return the hidden layer: act(h), or act(gate) h if there is a gate, in h's shape.

    name: `relu`, `gelu` (tanh approximation) or `silu`.
    """
    return _ACTIVATIONS[name](h) if gate is None else _ACTIVATIONS[name](gate) * h


def saves_result(name: str, gated: bool) -> bool:
    """Whether the backward pass of `activate` needs its result only: `relu` without a gate."""
    return name == "relu" and not gated


@jax.custom_vjp
def clip(h: jax.Array) -> jax.Array:
    """max(h, 0), with the derivative 1: for a caller that applies `relu`, and so its derivative, to the result."""
    return jax.nn.relu(h)


clip.defvjp(lambda h: (jax.nn.relu(h), None), lambda _, cotangent: (cotangent,))
