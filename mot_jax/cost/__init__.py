"""Parameters, FLOPs and bytes of an experiment, computed from its config without building an array.

`feed_forward.py` has the matrix products and memory traffic of each feed-forward kind; `flops.py`, `parameters.py`,
`memory.py` and `layers.py` add them up for a model, a training step or a single layer; `hardware.py` lists peaks and
bandwidths; `describe.py` collects the figures that `mot describe` prints.
"""
