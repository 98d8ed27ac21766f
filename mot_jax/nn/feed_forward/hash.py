"""Hash layers: a mixture of experts in which the id of a token, and nothing else, determines its experts.

After arXiv 2106.04426, with its balanced assignment. A table has the k experts of each token id; it is not learned. The
update of a token is the mean of their outputs. Dimensions as in `mot_jax.nn.routing`, and V, the number of token ids.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mot_jax.config import HashConfig
from mot_jax.errors import UserError
from mot_jax.nn import routing
from mot_jax.nn.feed_forward.experts import ExpertFeedForward
from mot_jax.nn.feed_forward.interface import (
    FeedForwardContext,
    FeedForwardOutput,
    LayerOptions,
    RouterState,
    activate,
)
from mot_jax.nn.sharding import axes_of, replicate, reshard, spec
from mot_jax.runtime.compilation import default_promotion


def balanced_table(token_counts: np.ndarray, num_experts: int, top_k: int, seed: int) -> np.ndarray:
    """Assign k experts to each token id, such that all experts process about as many of the counted tokens.

    The ids are assigned by falling count, each to the k experts with the fewest tokens so far. Ids whose counts are
    within the same power of two are in a random order, so that tables of different seeds differ in the ids that share
    an expert, and are balanced nonetheless. Each id counts one time more than given: those without a count are spread
    over the experts, too.

    No table is even if an id is more than k / E of the text: its k experts process no other id then, and the largest
    load is E / k times the share of that id.

    Args:
        token_counts: int [V].
        num_experts: E.
        top_k: k, at most E.
        seed: of the order.

    Returns:
        int32 [V, k], different experts in each row.
    """
    counts = np.asarray(token_counts, np.int64) + 1
    random = np.random.Philox(key=seed).random_raw(len(counts))  # NumPy guarantees that raw bits never change
    order = np.lexsort((random, -np.frexp(counts)[1]))
    table = np.empty((len(counts), top_k), np.int32)
    heap = [(0, expert) for expert in range(num_experts)]
    for token, count in zip(order.tolist(), counts[order].tolist(), strict=True):
        least_loaded = [heapq.heappop(heap) for _ in range(top_k)]
        table[token] = [expert for _, expert in least_loaded]
        for load, expert in least_loaded:
            heapq.heappush(heap, (load + count, expert))
    return table


class Hash(ExpertFeedForward):
    """The update of a token is the mean of the outputs of the k experts that a table has for its id.

    Parameters: those of `ExpertFeedForward` without a controller. Router state: table, int32 [V, k]. In a training run
    it is `balanced_table` of the token counts of the training text, another one for each layer, so that ids that share
    an expert in one layer do not in the next. Otherwise all ids count as equally frequent: expert (i k + j) mod E is
    the j-th one of id i.

    Without a capacity: no token is dropped, and none depends on another. Needs `context.token_ids`. A layer on its own
    needs `config.vocab_size`; in a model its default is that of the model.
    """

    config_type = HashConfig
    config: HashConfig

    def _create_parameters(self, options: LayerOptions) -> None:
        config = self.config
        if config.vocab_size is None:
            rule = "must be given for a layer on its own, the number of token ids"
            raise UserError(f"vocab_size = None: {rule}; try 257")
        self._create_expert_parameters(options, None)
        choices = jnp.arange(config.vocab_size * config.top_k, dtype=jnp.int32) % config.num_experts
        self.table = RouterState(choices.reshape(config.vocab_size, config.top_k))

    @default_promotion()
    def __call__(self, x: jax.Array, context: FeedForwardContext = FeedForwardContext()) -> FeedForwardOutput:
        """x [B, S, D] -> update [B, S, D] in the layer's dtype.

        Metric: `load_max`, the largest load of an expert in the batch, 1 being an even share.
        """
        if context.token_ids is None:
            rule = "must be given, since they determine the experts"
            raise UserError(f"context.token_ids = None: {rule}; try FeedForwardContext(token_ids=tokens)")
        num_experts, x = self.config.num_experts, x.astype(self.dtype)
        ids = reshard(context.token_ids, "sequences", None)
        experts = replicate(self.table[...]).at[ids].get(out_sharding=spec("sequences", None, None))
        if context.token_mask is not None:
            mask = reshard(context.token_mask, "sequences", None)
            experts = jnp.where(mask[..., None], experts, num_experts)
        weights = jnp.full_like(experts, 1 / self.config.top_k, dtype=x.dtype)
        act = functools.partial(activate, self.activation)
        y = routing.sum_experts(x[:, :, None], experts, weights, act, *self._expert_parameters())
        y = reshard(y, *axes_of(x))
        if self.shared is not None:
            y += self.shared(x, context).y
        load = routing.total_load(experts, num_experts)
        return FeedForwardOutput(y, metrics={"load_max": num_experts * load.max() / jnp.maximum(load.sum(), 1)})

    @classmethod
    def initial_router(
        cls, config: HashConfig, layers: int, token_counts: Callable[[], np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Balance the table of each layer, with the layer's index as the seed."""
        counts = token_counts()
        tables = [balanced_table(counts, config.num_experts, config.top_k, layer) for layer in range(layers)]
        return {"table": np.stack(tables)}
