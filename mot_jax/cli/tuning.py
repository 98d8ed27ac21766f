"""The command that makes a trained model another kind of model."""

from __future__ import annotations

from mot_jax.cli.options import PROCESS, Parser, positive, process
from mot_jax.cli.parsing import chunks, override
from mot_jax.config import check
from mot_jax.runtime import distributed

# Flags that stand for fields.
_FIELDS = {
    "--top-k": "--model.feed-forward.top-k",
    "--capacity-factor": "--model.feed-forward.capacity-factor",
    "--router": "--training.transition-router",
}


def transition(arguments: list[str]) -> None:
    """Tune a trained model to route tokens instead of mixing them."""
    parser = Parser(prog="mot transition", allow_abbrev=False)
    parser.add_argument("workdir", metavar="WORKDIR", help="directory of a Mixture-of-Tokens run")
    parser.add_argument("--to", required=True, metavar="KIND", help="kind to tune the model to: token_choice")
    parser.add_argument("--steps", required=True, metavar="N", help="number of steps; a tenth of the run's suffices")
    parser.add_argument("--output", metavar="DIR", help="directory of the tuning run (default: WORKDIR-KIND)")
    parser.add_argument("--anneal", metavar="M", help="steps of mixing before, down to temperature 0")
    parser.add_argument("--windows", metavar="N", help="validation windows to score each mode on (all)")
    for flag in (*_FIELDS, *PROCESS):
        parser.add_argument(flag, help=f"the same as {_FIELDS[flag]}" if flag in _FIELDS else "as in mot train")
    options, flags = parser.parse_known_args(arguments)
    for short, long in _FIELDS.items():
        value = getattr(options, short.strip("-").replace("-", "_"))
        flags += [] if value is None else [long, value]
    from mot_jax.runs.restore import load_run_config
    from mot_jax.training import transition as tuning

    steps, workdir = positive("--steps", options.steps), options.workdir.rstrip("/")
    limit = None if options.windows is None else positive("--windows", options.windows)
    output = options.output or f"{workdir}-{options.to}"
    source, runs = load_run_config(workdir), []
    if options.anneal is not None:
        source = tuning.annealing_config(source, workdir, positive("--anneal", options.anneal))
        how = [part for chunk in chunks(flags) if chunk[0].startswith(("--mesh.", "--logging.")) for part in chunk]
        source, workdir = override(parser.prog, source, how, []), f"{output}-annealed"
        runs.append((source, workdir))
    config = tuning.tuning_config(source, workdir, options.to, steps)
    runs.append((override(parser.prog, config, flags, list(_FIELDS)), output))
    for config, _ in runs:
        check(config)
    distributed.connect(process(options, config), config.mesh)
    from mot_jax import training
    from mot_jax.inference.sample import SampleHook

    for config, place in runs:
        training.train(config, place, [SampleHook()])
    for line in tuning.report(*runs[-1], options.workdir, limit):
        print(line)
