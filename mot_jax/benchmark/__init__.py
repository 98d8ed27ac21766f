"""Benchmarks of layers, steps, input and generation; the programs that are compared take turns in one process."""
