"""`python -m mot_jax COMMAND ...`, the same as `mot`."""

from mot_jax.cli import main

if __name__ == "__main__":
    main()
