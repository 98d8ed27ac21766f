"""A training loop of your own, with the checks, data, sharding, checkpoints and resuming of `mot train`.

python examples/custom_loop.py configs/demo.py runs/custom
"""

import sys

from mot_jax.config import Config, load_config
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.training import Trainer, begin, prepare


def main(config: Config, workdir: str) -> float:
    """Train, or resume from the newest checkpoint, and return the bits per byte of the validation split."""
    run = prepare(config, workdir)  # all checks, tokenized text, mesh
    with Trainer(run, begin(run)) as trainer, Checkpoints(run.workdir / "checkpoints") as checkpoints:
        while not trainer.at_last_step:
            metrics = trainer.train_step()
            if trainer.step % config.training.checkpoint_every == 0 or trainer.at_last_step:
                print(f"step {trainer.step}: loss {float(metrics['loss']):.4f}")
                checkpoints.save(trainer.step, trainer.state, trainer.next_example, config)
        return trainer.evaluate()["bits_per_byte"]


if __name__ == "__main__":
    print(f"{main(load_config(sys.argv[1]), sys.argv[2]):.4f} bits per byte")
