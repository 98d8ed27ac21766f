"""The Mixture-of-Tokens layer in plain float64 NumPy, forward and backward, written from PAPER.md section 2 alone.

Nothing here is shared with the library, and nothing is clever: one group and one position after the other, matrices
of two dimensions. The gradients are derived by hand; `test_mixture_of_tokens.py` checks them by finite differences.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class Layer:
    """What defines the layer beside its parameters. mask: bool [B, S], True = real; None: all are."""

    group_size: int
    merge: str = "softmax"
    temperature: float = 1.0
    mask: np.ndarray | None = None

    def cells(self, batch: int, length: int):
        """(rows of the group, position, which of its tokens are real) of each group at each position."""
        for start in range(0, batch, self.group_size):
            rows = slice(start, start + self.group_size)
            for s in range(length):
                yield rows, s, np.ones(self.group_size, bool) if self.mask is None else self.mask[rows, s]

    def weights(self, logits: np.ndarray, real: np.ndarray) -> np.ndarray:
        """[G, E]: for each expert, how much of each of the G tokens it reads."""
        weights = np.zeros(logits.shape)
        members = np.flatnonzero(real)
        for e in range(logits.shape[1]):
            column = logits[members, e]
            if len(members) == 0:
                continue
            if self.merge == "uniform":
                weights[members, e] = 1 / len(members)
            elif self.merge == "one_hot" or self.temperature == 0:
                weights[members[int(np.argmax(column))], e] = 1
            else:
                powers = np.exp((column - column.max()) / self.temperature)
                weights[members, e] = powers / powers.sum()
        return weights

    def forward(self, p: dict[str, np.ndarray]) -> np.ndarray:
        """The update [B, S, D]; p has x, controller, w_in, w_out and, for a shared expert, kernel_in, kernel_out."""
        x = p["x"]
        y = np.zeros(x.shape)
        for rows, s, real in self.cells(*x.shape[:2]):
            tokens = x[rows, s]
            weights = self.weights(tokens @ p["controller"], real)
            mixtures = weights.T @ tokens
            for e, mixture in enumerate(mixtures):
                output = np.maximum(mixture @ p["w_in"][e], 0) @ p["w_out"][e]
                y[rows, s] += np.outer(weights[:, e], output)
        if "kernel_in" in p:
            y += np.maximum(x @ p["kernel_in"], 0) @ p["kernel_out"]
        return y

    def backward(self, p: dict[str, np.ndarray], dy: np.ndarray) -> dict[str, np.ndarray]:
        """The gradient of sum(forward(p) * dy) with respect to everything in p."""
        x = p["x"]
        d = {name: np.zeros(value.shape) for name, value in p.items()}
        for rows, s, real in self.cells(*x.shape[:2]):
            tokens, dy_here = x[rows, s], dy[rows, s]
            weights = self.weights(tokens @ p["controller"], real)
            d_weights = np.zeros(weights.shape)
            for e in range(weights.shape[1]):
                column = weights[:, e]
                mixture = column @ tokens
                h = mixture @ p["w_in"][e]
                output = np.maximum(h, 0) @ p["w_out"][e]
                d_output = column @ dy_here
                d_h = (p["w_out"][e] @ d_output) * (h > 0)
                d_mixture = p["w_in"][e] @ d_h
                d["w_out"][e] += np.outer(np.maximum(h, 0), d_output)
                d["w_in"][e] += np.outer(mixture, d_h)
                d["x"][rows, s] += np.outer(column, d_mixture)
                d_weights[:, e] = dy_here @ output + tokens @ d_mixture
            if self.merge == "softmax" and self.temperature > 0:  # the others do not depend on the logits
                d_logits = weights * (d_weights - (weights * d_weights).sum(axis=0)) / self.temperature
                d["controller"] += tokens.T @ d_logits
                d["x"][rows, s] += d_logits @ p["controller"].T
        if "kernel_in" in p:
            h = x @ p["kernel_in"]
            d_h = (dy @ p["kernel_out"].T) * (h > 0)
            d["kernel_out"] += np.einsum("bsf,bsd->fd", np.maximum(h, 0), dy)
            d["kernel_in"] += np.einsum("bsd,bsf->df", x, d_h)
            d["x"] += d_h @ p["kernel_in"].T
        return d
