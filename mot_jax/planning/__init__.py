"""Memory, collectives and modeled time of a training step, compiled ahead of time for a target topology."""
