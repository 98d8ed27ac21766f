"""Inference modes: functions Config -> Config over the same weights, and the reference sequences that some need."""

from mot_jax.modes.registry import (
    MODES,
    Mode,
    default_mode,
    enter,
    lacking,
    mode_of,
    needs_companions,
    regrouped,
    token_choice,
    trained_mode,
)

__all__ = [
    "MODES",
    "Mode",
    "default_mode",
    "enter",
    "lacking",
    "mode_of",
    "needs_companions",
    "regrouped",
    "token_choice",
    "trained_mode",
]
