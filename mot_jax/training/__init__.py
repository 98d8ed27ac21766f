"""From a config to a trained model: `train`, or a loop of your own with `prepare`, `begin`, `Trainer` and `finish`."""

from mot_jax.training.loop import train
from mot_jax.training.run import Run, Start, begin, finish, is_finished, prepare
from mot_jax.training.trainer import Hook, Trainer

__all__ = ["Hook", "Run", "Start", "Trainer", "begin", "finish", "is_finished", "prepare", "train"]
