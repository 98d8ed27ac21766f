"""Former names of config fields and of their values, for error messages: old names are not accepted."""

from __future__ import annotations

from typing import Any

FIELDS = {
    "MixingConfig": {"learnt_temperature": "learned_temperature"},
    "MixtureOfTokensConfig": {"saved": "save_for_backward", "shared_dim": "shared_expert_dim"},
    "TokenChoiceConfig": {"shared_dim": "shared_expert_dim"},
    "ModelConfig": {"stacked": "scan_layers", "tied_head": "tie_embeddings"},
    "DataConfig": {"feature": "text_feature", "group_size": "shuffle_group_size", "mask_share": "mask_rate"},
    "TrainingConfig": {"accumulation": "gradient_accumulation_steps"},
    "OptimizerConfig": {"final_fraction": "min_lr_ratio", "moments_dtype": "mu_dtype"},
    "CheckpointConfig": {"keep": "max_to_keep"},
}
VALUES = {"kernel": {"pallas": "fused_mixture", "pallas_experts": "fused_experts"}}


def new_field(cls: type, name: str) -> str | None:
    """The present name of a field of this config class that was called `name`, if it was renamed."""
    for base in cls.__mro__:
        if name in (names := FIELDS.get(base.__name__, {})):
            return names[name]
    return None


def new_value(name: str, value: Any) -> str | None:
    """The present name of a former value of the field of this (dotted) name, if it was renamed."""
    values = VALUES.get(name.rpartition(".")[2], {})
    return values.get(value) if isinstance(value, str) else None


def new_flag(config: Any, flag: str) -> str | None:
    """The present form of a flag such as `--model.no-stacked` for a field of `config`, if the field was renamed."""
    path, _, field = flag.removeprefix("--").partition("=")[0].replace("-", "_").rpartition(".")
    for part in path.split("."):
        config = getattr(config, part, None)
    negation = "no_" if field.startswith("no_") else ""
    name = new_field(type(config), field.removeprefix(negation))
    return name and f"--{path}.{negation}{name}".replace("_", "-")
