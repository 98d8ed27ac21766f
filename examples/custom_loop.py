"""A training loop of your own, with the checks, data, sharding and resuming of `mot train`.

python examples/custom_loop.py configs/demo.py runs/custom
"""

import sys

from mot_jax.config import Config, load_config
from mot_jax.training import Trainer, begin, prepare


def main(config: Config, workdir: str) -> float:
    """Train, and return the bits per byte of the validation split."""
    run = prepare(config, workdir)  # all checks, tokenized text, mesh
    with Trainer(run, begin(run)) as trainer:  # a new state, or that of the newest checkpoint
        while not trainer.at_last_step:
            metrics = trainer.train_step()
            if trainer.step % 10 == 0:
                print(f"step {trainer.step}: loss {float(metrics['loss']):.4f}")
        return trainer.evaluate()["bits_per_byte"]


if __name__ == "__main__":
    print(f"{main(load_config(sys.argv[1]), sys.argv[2]):.4f} bits per byte")
