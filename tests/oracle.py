"""The Mixture-of-Tokens layer in plain float64 NumPy, forward and backward, from PAPER.md sections 2 and 3 alone.

Nothing here is shared with the library, and nothing is clever: one group and one position after the other, matrices
of two dimensions. The gradients of the paper's layer are derived by hand, those of its variants are differences.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class Layer:
    """What defines the layer beside its parameters. mask: bool [B, S], True = real; None: all are.

    Of the variants: which softmax emit has, whether groups lie within rows, layer norms (when `mixture_norm` is among
    the parameters), T of a step, and how T is made of a learned θ. What else there is follows from the parameters: an
    `emit_controller`, a `base_controller`, their weights `base_weight` and `emit_base_weight`, `w_gate`.
    anchor: parameters at which a straight-through softmax has the value of temperature T; it moves from there as the
    softmax of temperature 1 does, and so its derivatives there are those of temperature 1.
    """

    group_size: int
    merge: str = "softmax"
    temperature: float = 1.0
    mask: np.ndarray | None = None
    emit: str = "merge"
    within: bool = False
    positive: bool = True
    anchor: dict[str, np.ndarray] | None = None

    def cells(self, batch: int, length: int):
        """(rows, positions, which of them are real) of the tokens of each group."""
        mask = np.ones((batch, length), bool) if self.mask is None else self.mask
        g = self.group_size
        if self.within:
            places = [(np.full(g, b), np.arange(s, s + g)) for b in range(batch) for s in range(0, length, g)]
        else:
            places = [(np.arange(b, b + g), np.full(g, s)) for b in range(0, batch, g) for s in range(length)]
        for rows, positions in places:
            yield rows, positions, mask[rows, positions]

    def softmax(self, logits: np.ndarray, real: np.ndarray, temperature, over_experts: bool = False) -> np.ndarray:
        """Over the real tokens for each expert, or over the experts for each real token. [G, E]."""
        weights = np.zeros(logits.shape)
        temperature = np.broadcast_to(temperature, logits.shape[1:])
        members = np.flatnonzero(real)
        lines = [(m, np.arange(logits.shape[1])) for m in members] if over_experts else []
        lines = lines or [(members, e) for e in range(logits.shape[1]) if len(members)]
        for line in lines:
            values, t = logits[line], temperature[line[1]]
            if np.all(t == 0):
                one = np.zeros(len(values))
                one[int(np.argmax(values))] = 1
                weights[line] = one
            else:
                scaled = values / t
                powers = np.exp(scaled - scaled.max())
                weights[line] = powers / powers.sum()
        return weights

    def pair(self, p: dict[str, np.ndarray], tokens: np.ndarray, real: np.ndarray, place) -> tuple:
        """Merge and emit weights [G, E] of one group."""

        def controller(name: str, weight: str) -> np.ndarray:
            if "base_controller" not in p:
                return p[name]
            a = p.get(weight, p.get("base_weight"))
            if a is None:
                return p[name] + p["base_controller"]
            return a * p[name] + (1 - a) * p["base_controller"]

        def temperature(name: str):
            theta = p.get(name, p.get("temperature"))
            if theta is None:
                return self.temperature
            return self.temperature * (np.exp(theta) if self.positive else 1 + theta)

        def soft(logits: np.ndarray, t, over_experts: bool = False) -> np.ndarray:
            if self.anchor is None:
                return self.softmax(logits, real, t, over_experts)
            there = self.anchor["x"][place] @ self.anchor["controller"]
            moved = self.softmax(logits, real, 1, over_experts) - self.softmax(there, real, 1, over_experts)
            return self.softmax(there, real, t, over_experts) + moved

        logits = tokens @ controller("controller", "base_weight")
        if self.merge == "uniform":
            merge = np.repeat(real[:, None] / max(real.sum(), 1), logits.shape[1], axis=1)
        elif self.merge == "logits":
            merge = logits * real[:, None]
        else:
            merge = soft(logits, temperature("temperature"))
        if self.emit == "merge":
            return merge, merge
        if self.emit == "ones":
            return merge, np.repeat(real[:, None].astype(float), logits.shape[1], axis=1)
        if self.emit == "top_token":
            return merge, self.softmax(merge, real, 0)
        if "emit_controller" in p:
            logits = tokens @ controller("emit_controller", "emit_base_weight")
        return merge, soft(logits, temperature("emit_temperature"), self.emit == "softmax_over_experts")

    def forward(self, p: dict[str, np.ndarray]) -> np.ndarray:
        """The update [B, S, D]; p has x, controller, w_in, w_out and, for a shared expert, kernel_in, kernel_out."""
        x = p["x"]
        y = np.zeros(x.shape)
        for rows, positions, real in self.cells(*x.shape[:2]):
            tokens = x[rows, positions]
            merge, emit = self.pair(p, tokens, real, (rows, positions))
            for e in range(merge.shape[1]):
                mixture = normed(merge[:, e] @ tokens, p.get("mixture_norm"))
                hidden = mixture @ p["w_in"][e]
                gate = mixture @ p["w_gate"][e] if "w_gate" in p else None
                hidden = np.maximum(hidden, 0) if gate is None else np.maximum(gate, 0) * hidden
                output = normed(hidden @ p["w_out"][e], p.get("output_norm"))
                y[rows, positions] += np.outer(emit[:, e], output)
        if "kernel_in" in p:
            y += np.maximum(x @ p["kernel_in"], 0) @ p["kernel_out"]
        return y

    def entropy(self, p: dict[str, np.ndarray]) -> float:
        """The mean of the normalised entropies of merge and emit, of those that are softmaxes of their own."""
        found = {"merge": [], "emit": []}
        for rows, positions, real in self.cells(*p["x"].shape[:2]):
            merge, emit = self.pair(p, p["x"][rows, positions], real, (rows, positions))
            if self.merge != "logits" and real.sum() > 1:  # of the expert's weights over the tokens, mean over experts
                found["merge"].append(np.mean([shannon(column[real]) for column in merge.T]))
            if self.emit == "softmax" and real.sum() > 1:
                found["emit"].append(np.mean([shannon(column[real]) for column in emit.T]))
            if self.emit == "softmax_over_experts":  # of each token's weights over the experts
                found["emit"] += [shannon(row) for row in emit[real]]
        return float(np.mean([np.mean(values) for values in found.values() if values]))

    def differences(
        self, p: dict[str, np.ndarray], dy: np.ndarray, name: str, step: float = 1e-6, entropy: float = 0.0
    ) -> np.ndarray:
        """The gradient of sum(forward(p) * dy) with respect to p[name], one number at a time by central differences.

        `entropy` times `entropy(p)` is added to that sum.
        """
        found = np.zeros(p[name].shape)
        for index in np.ndindex(*found.shape):
            values = []
            for sign in (1, -1):
                moved = p[name].copy()
                moved[index] += sign * step
                q = p | {name: moved}
                values.append((self.forward(q) * dy).sum() + (entropy * self.entropy(q) if entropy else 0))
            found[index] = (values[0] - values[1]) / (2 * step)
        return found

    def backward(self, p: dict[str, np.ndarray], dy: np.ndarray) -> dict[str, np.ndarray]:
        """The gradient of sum(forward(p) * dy) with respect to everything in p; of the paper's layer, no variant."""
        x = p["x"]
        d = {name: np.zeros(value.shape) for name, value in p.items()}
        for rows, s, real in self.cells(*x.shape[:2]):
            tokens, dy_here = x[rows, s], dy[rows, s]
            weights, _ = self.pair(p, tokens, real, (rows, s))
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


@dataclasses.dataclass
class Routed:
    """Token choice, forward and backward, one token after the other. capacity: slots of an expert in a routing group of
    so many `tokens`; None: without end. mask: bool [B, S]. balance, z: weights of the two losses.
    """

    top_k: int
    tokens: int
    capacity: int | None = None
    mask: np.ndarray | None = None
    balance: float = 0.0
    z: float = 0.0

    def __call__(self, p: dict[str, np.ndarray], dy: np.ndarray) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
        """(y [B, S, D], the two losses times their weights, gradients of sum(y dy) + losses); p as for `Layer`."""
        x = p["x"].reshape(-1, p["x"].shape[-1])
        real = np.ones(len(x), bool) if self.mask is None else self.mask.reshape(-1)
        dy, y, d = dy.reshape(x.shape), np.zeros(x.shape), {name: np.zeros(v.shape) for name, v in p.items()}
        dx = d["x"].reshape(x.shape)
        groups = [np.arange(start, start + self.tokens) for start in range(0, len(x), self.tokens)]
        groups = [group[real[group]] for group in groups if real[group].any()]
        loss, count = 0.0, p["controller"].shape[1]
        for group in groups:
            logits = x[group] @ p["controller"]
            sums = np.log(np.exp(logits).sum(axis=1))
            probabilities = np.exp(logits - sums[:, None])
            chosen = np.argsort(-probabilities, axis=1, kind="stable")[:, : self.top_k]
            share = np.bincount(chosen.reshape(-1), minlength=count) / chosen.size
            loss += self.balance * count * (share * probabilities.mean(axis=0)).sum() / len(groups)
            loss += self.z * (sums**2).mean() / len(groups)
            d_probabilities = np.tile(self.balance * count * share / len(group) / len(groups), (len(group), 1))
            d_logits = self.z * 2 * sums[:, None] * probabilities / len(group) / len(groups)
            taken = np.zeros(count, int)
            for i, t in enumerate(group):
                for e in chosen[i]:
                    if self.capacity is not None and taken[e] == self.capacity:
                        continue
                    taken[e] += 1
                    h, gate = x[t] @ p["w_in"][e], x[t] @ p["w_gate"][e] if "w_gate" in p else None
                    hidden = np.maximum(h, 0) if gate is None else np.maximum(gate, 0) * h
                    output = hidden @ p["w_out"][e]
                    y[t] += probabilities[i, e] * output
                    d_probabilities[i, e] += output @ dy[t]
                    d_output = probabilities[i, e] * dy[t]
                    d["w_out"][e] += np.outer(hidden, d_output)
                    d_hidden = p["w_out"][e] @ d_output
                    if gate is None:
                        parts = {"w_in": d_hidden * (h > 0)}
                    else:
                        parts = {"w_in": d_hidden * np.maximum(gate, 0), "w_gate": d_hidden * h * (gate > 0)}
                    for name, part in parts.items():
                        d[name][e] += np.outer(x[t], part)
                        dx[t] += p[name][e] @ part
            d_logits += probabilities * (d_probabilities - (probabilities * d_probabilities).sum(axis=1, keepdims=True))
            d["controller"] += x[group].T @ d_logits
            dx[group] += d_logits @ p["controller"].T
        if "kernel_in" in p:
            h = x @ p["kernel_in"]
            d_h = (dy @ p["kernel_out"].T) * (h > 0)
            y += np.maximum(h, 0) @ p["kernel_out"]
            d["kernel_out"] += np.maximum(h, 0).T @ dy
            d["kernel_in"] += x.T @ d_h
            dx += d_h @ p["kernel_in"].T
        return y.reshape(p["x"].shape), loss, d


def shannon(weights: np.ndarray) -> float:
    """Entropy over that of as many equal weights: 1 is uniform, 0 is one-hot."""
    positive = weights[weights > 0]
    return -(positive * np.log(positive)).sum() / np.log(len(weights))


def normed(vector: np.ndarray, norm: np.ndarray | None) -> np.ndarray:
    """Layer norm with scale norm[0] and bias norm[1]; the vector itself without them."""
    if norm is None:
        return vector
    centred = vector - vector.mean()
    return centred / np.sqrt((centred**2).mean() + 1e-5) * norm[0] + norm[1]
