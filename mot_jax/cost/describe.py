"""The figures of an experiment that `mot describe` prints.

Units and conventions are those of `flops.py`, `parameters.py` and `memory.py`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mot_jax.config import Config, check
from mot_jax.config.kernels import attention_error
from mot_jax.cost.feed_forward import feed_forward_cost
from mot_jax.cost.flops import flops_per_token, forward_flops, recomputed_flops
from mot_jax.cost.memory import memory_bytes, saved_bytes
from mot_jax.cost.parameters import active_parameters, count_parameters


@dataclasses.dataclass(frozen=True)
class Description:
    """An experiment in numbers.

    sizes: of the blocks, the groups, the step and the run. parameters, flops (forward, per token), memory (bytes) and
    saved (bytes per microbatch) are by part. mixing_share: FLOPs of mixing over those of the experts. policies: for
    each choice of the arrays saved for the backward pass, FLOPs per token that are recomputed, and bytes saved per
    microbatch; `policy` is the config's choice.
    """

    sizes: dict[str, int | float | str]
    parameters: dict[str, int]
    total_parameters: int
    active_parameters: int
    flops: dict[str, float]
    forward_flops_per_token: float
    training_flops_per_token: float
    training_flops: float
    mixing_share: float
    memory: dict[str, int]
    saved: dict[str, int]
    policy: str
    policies: dict[str, tuple[float, int]]

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Plain text for a terminal."""
        total, forward, marks = self.total_parameters, self.forward_flops_per_token, {self.policy: " *"}
        sizes = {**self.sizes, "FLOPs_per_run": f"{self.training_flops:.3e}"}
        counts = {**self.parameters, "total": total, "active": self.active_parameters}
        flops = {**self.flops, "forward": forward, "training, 3 x forward": self.training_flops_per_token}
        flops["recomputed"] = self.policies[self.policy][0]
        memory = {**self.memory, **{f"  of it {name}": size for name, size in self.saved.items()}}
        policies = [
            (name + marks.get(name, ""), recomputed / 1e6, saved / 2**20)
            for name, (recomputed, saved) in self.policies.items()
        ]
        return [
            *table("Sizes", [(name.replace("_", " "), size) for name, size in sizes.items()]),
            *table("Parameters", [(name, n, f"{n / total:.1%}") for name, n in counts.items()]),
            *table("MFLOPs per token", [(name, n / 1e6, f"{n / forward:.1%}") for name, n in flops.items()]),
            *([f"  mixing costs {self.mixing_share:.1%} of the experts' FLOPs", ""] if self.mixing_share else []),
            *table("MiB, total over all devices", [(name, size / 2**20) for name, size in memory.items()]),
            *table(
                "Policies for the backward pass (* this config)", [("", "MFLOPs recomputed", "MiB saved"), *policies]
            ),
        ]


def describe(config: Config) -> Description:
    """Compute the figures of an experiment, in a second or two. Raises UserError for an invalid config."""
    check(config)
    m, t = config.model, config.training
    counts, flops, tokens = count_parameters(m), forward_flops(m), t.batch_size * m.context_length
    microbatch_size, cost = t.batch_size // t.gradient_accumulation_steps, feed_forward_cost(m, m.feed_forward)
    sizes: dict[str, int | float | str] = dict(Counter(f"{block.kind}_blocks" for block in m.block_kinds()))
    sizes |= cost.sizes(t.batch_size, microbatch_size)
    sizes |= {"windows_per_step": t.batch_size, "tokens_per_step": tokens}
    sizes |= {"steps": t.steps, "windows_per_run": t.batch_size * t.steps, "tokens_per_run": tokens * t.steps}
    choices = cost.save_policies() or {"remat: none": m.feed_forward}
    models = {name: dataclasses.replace(m, remat="none", feed_forward=kind) for name, kind in choices.items()}
    models["remat: attention"] = dataclasses.replace(m, remat="attention")
    models["remat: blocks"] = dataclasses.replace(m, remat="blocks")
    width = m.d_model // m.num_heads
    if m.attention_kernel == "auto" and not attention_error("cudnn", m.context_length, width, m.dtype):
        models["remat: none, cudnn"] = dataclasses.replace(m, remat="none", attention_kernel="cudnn")  # auto on NVIDIA
    return Description(
        sizes=sizes,
        parameters=counts,
        total_parameters=sum(counts.values()),
        active_parameters=active_parameters(m),
        flops=flops,
        forward_flops_per_token=sum(flops.values()),
        training_flops_per_token=flops_per_token(config),
        training_flops=flops_per_token(config) * tokens * t.steps,
        mixing_share=flops.get("mixing", 0) / (flops.get("experts", 0) + flops.get("shared experts", 0) or 1),
        memory=memory_bytes(config),
        saved=saved_bytes(m, microbatch_size),
        policy=next(name for name, model in models.items() if model == m),
        policies={
            name: (recomputed_flops(model), sum(saved_bytes(model, microbatch_size).values()))
            for name, model in models.items()
        },
    )


def table(title: str, rows: Sequence[tuple[str | float, ...]]) -> list[str]:
    """A titled table in plain text: the first column aligned to the left, the others to the right."""
    formats = {int: "{:,}", float: "{:,.2f}", str: "{}"}
    texts = [[formats[type(value)].format(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [title, *("  " + "  ".join([t[0].ljust(widths[0]), *map(str.rjust, t[1:], widths[1:])]) for t in texts), ""]
