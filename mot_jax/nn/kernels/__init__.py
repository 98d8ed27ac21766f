"""Kernels written by hand for one kind of chip each: one file a kernel, and what they move."""
