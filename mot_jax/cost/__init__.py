"""Parameters, FLOPs and bytes of an experiment, from its config alone."""
