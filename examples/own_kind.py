"""A feed-forward kind of your own in one file, which is also a config and a study.

Commands: python train.py examples/own_kind.py --training.steps 100
          mot bench train examples/own_kind.py --workdir runs/own_kind_study --dry-run
          MOT_JAX_KINDS=examples/own_kind.py mot evaluate runs/own_kind    (commands that read the run, not this file)
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax

from mot_jax import Config, DenseConfig, FeedForwardContext, FeedForwardOutput, ModelConfig, register_kind
from mot_jax.benchmark.study import Study
from mot_jax.config import FeedForwardKind, OptimizerConfig, TrainingConfig
from mot_jax.cost.feed_forward import DenseCost, Part
from mot_jax.nn.feed_forward.interface import FeedForward, LayerOptions
from mot_jax.nn.sharding import axes_of, product, spec


@dataclass(frozen=True)
class BilinearConfig(FeedForwardKind):
    """A bilinear layer, whose fields would be documented here."""

    kind: ClassVar[str] = "bilinear"

    def hidden_dim(self, d_ff: int) -> int:
        """F: three products of this width cost about as much as the two of a dense layer of width d_ff."""
        return 2 * d_ff // 3 // 8 * 8


class Bilinear(FeedForward):
    """(x W_in * x W_gate) W_out, a gated layer without an activation.

    Parameters: `kernel_in` and `kernel_gate` [D, F], `kernel_out` [F, D]. Parameters of these names are sharded over a
    mesh as those of dense layers, others are replicated.
    """

    config_type = BilinearConfig
    config: BilinearConfig

    def _create_parameters(self, options: LayerOptions) -> None:
        d, f = options.d_model, self.config.hidden_dim(options.d_ff)
        self.kernel_in, self.kernel_gate = options.matrix((d, f), d), options.matrix((d, f), d)
        self.kernel_out = options.matrix((f, d), f)

    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D] -> update [B, S, D]."""
        x = x.astype(self.dtype)
        hidden = product("bsd,df->bsf", x, self.kernel_in[...]) * product("bsd,df->bsf", x, self.kernel_gate[...])
        return FeedForwardOutput(product("bsf,fd->bsd", hidden, self.kernel_out[...], spec(*axes_of(x))))


class BilinearCost(DenseCost):
    """A gated network of the width F, whether other networks of the model are gated or not."""

    def parts(self) -> tuple[Part, ...]:
        return (replace(self, gated=True)._networks("dense FFN", self.config.hidden_dim(self.d_ff)),)

    @classmethod
    def flop_matched(cls, group_size: int, num_experts: int, length: int) -> None:
        """None: `mot describe --matched` has no such layer at other costs."""


register_kind(Bilinear, BilinearCost)


def get_config() -> Config:
    """A small model with the kind in all blocks."""
    model = ModelConfig(
        num_blocks=4, d_model=96, d_ff=384, num_heads=4, context_length=64, feed_forward=BilinearConfig(), loss_chunk=32
    )
    optimizer = OptimizerConfig(learning_rate=5e-3, warmup_steps=50)
    return Config(model=model, training=TrainingConfig(steps=400, batch_size=32, optimizer=optimizer))


def get_study() -> Study:
    """The kind against a dense layer, tuned."""
    config = get_config()
    dense = replace(config, model=replace(config.model, feed_forward=DenseConfig(bias=False)))
    entrants = {"dense": dense, "bilinear": config}
    return Study("A kind of my own", entrants, compared="bilinear", rate_factors=(0.5, 1.0, 2.0), budget_hours=4)
