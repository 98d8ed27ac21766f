"""`python train.py [configs/NAME.py] [--workdir DIR] [--training.steps N ...]` trains a model, as `mot train` does."""

from mot_jax.cli import train

train()
