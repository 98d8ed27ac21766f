"""`python -m mot_jax.cli COMMAND ...`, the same as `mot`."""

from mot_jax.cli import main

main()
