"""Trains a model: `python train.py [configs/NAME.py] [--workdir DIR] [--training.steps N ...]`, the same as `mot train`."""

from mot_jax.cli import train

train()
