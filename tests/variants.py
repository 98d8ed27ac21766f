"""The mixing variants of `docs/paper.md`, section 3, by name, each as one value of MixingConfig."""

import dataclasses

from mot_jax.config import MixingConfig

LEARNED = MixingConfig(learned_temperature="scalar", temperature=0.8)
# Discrete evaluation, granularity below 1, another group size and upcycling use one of these, and have their own tests.
VARIANTS = {
    "default": MixingConfig(),
    "emit over experts": MixingConfig(emit="softmax_over_experts", temperature=0.7),
    "separate controllers": MixingConfig(emit="softmax", controllers="separate"),
    "common base": MixingConfig(emit="softmax", controllers="common_base"),
    "uniform emit": MixingConfig(emit="ones"),
    "top-token emit": MixingConfig(emit="top_token"),
    "no softmax": MixingConfig("logits", layer_norm=True),
    "layer norm": MixingConfig(layer_norm=True),
    "learnable temperature": LEARNED,
    "learnable temperature, separate": dataclasses.replace(LEARNED, emit="softmax", separate_temperatures=True),
    "learnable temperature, per expert": dataclasses.replace(
        LEARNED, emit="softmax_over_experts", learned_temperature="per_expert", separate_temperatures=True
    ),
    "learnable temperature, not positive": dataclasses.replace(LEARNED, positive_temperature=False),
    "uniform mixing": MixingConfig("uniform"),
    "within-sequence groups": MixingConfig(groups="within"),
    "discrete": MixingConfig(temperature=0.0),
    "temperature annealing": MixingConfig(annealing="linear", temperature=1.0, annealing_steps=(0, 10)),
    "temperature annealing, cosine": MixingConfig(annealing="cosine", temperature=1.0, annealing_steps=(0, 10)),
    "straight-through temperature": MixingConfig(temperature=0.3, straight_through=True),
    "straight through to one-hot": MixingConfig(temperature=0.0, straight_through=True),
    "weighted common base, one": MixingConfig(emit="softmax", controllers="common_base", base_weight="one"),
    "weighted common base, two": MixingConfig(emit="softmax", controllers="common_base", base_weight="two"),
    "several": MixingConfig(
        emit="softmax_over_experts",
        groups="within",
        controllers="common_base",
        base_weight="two",
        layer_norm=True,
        learned_temperature="per_expert",
        separate_temperatures=True,
    ),
}
