"""Hand-written kernels, each for one kind of accelerator, and the count of the bytes that they move."""
