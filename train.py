"""`python train.py [configs/NAME.py] [--workdir DIR] [--training.steps N ...]` trains a model, as `mot train` does."""

from mot_jax.cli import train

if __name__ == "__main__":  # processes that build a corpus import this file again
    train()
