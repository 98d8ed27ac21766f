"""Training comparisons: entrants of equal cost, each tuned in the same way, and a report (`mot bench train`)."""

from mot_jax.benchmark.study.plan import Study, load_study

__all__ = ["Study", "load_study"]
