"""Inference modes: functions Config -> Config over the same weights.

`registry` has the table of modes; `companions` chooses, stores and summarizes the reference sequences that some modes
need; `thresholds` measures and stores the thresholds of mode `threshold`; `recording` reads values out of a forward
pass. `docs/inference.md` compares the modes.
"""

from mot_jax.modes.registry import (
    MODES,
    Mode,
    default_mode,
    enter,
    is_independent,
    lacking,
    mode_of,
    needs_companions,
    offers,
    read_files,
    regrouped,
    token_choice,
    trained_mode,
    with_kind,
)

__all__ = [
    "MODES",
    "Mode",
    "default_mode",
    "enter",
    "is_independent",
    "lacking",
    "mode_of",
    "needs_companions",
    "offers",
    "read_files",
    "regrouped",
    "token_choice",
    "trained_mode",
    "with_kind",
]
