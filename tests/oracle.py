"""Reference implementations in float64 NumPy, forward and backward, of the feed-forward kinds with experts.

Written from `docs/paper.md`, sections 2 to 5, without any code of the library, and as simple as possible: loops over
groups and positions, products of two-dimensional matrices. The gradients of the paper's layer and of the other kinds
are derived by hand; those of the mixing variants are central differences.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass
class MixtureOfTokens:
    """The configuration of the layer. Its methods take the parameters `p`, named as in the library.

    Variants follow from the fields and from the names among the parameters: `emit_controller`, `base_controller` and
    their weights `base_weight` and `emit_base_weight`, learned `temperature` and `emit_temperature` (θ), `w_gate`, the
    layer norms `mixture_norm` and `output_norm`.
    """

    group_size: int
    merge: str = "softmax"
    temperature: float = 1.0
    mask: np.ndarray | None = None
    """bool [B, S], True = non-padding; None: no padding."""
    emit: str = "merge"
    within: bool = False
    """Whether groups are within a sequence."""
    positive: bool = True
    """Whether T is `temperature` x exp(θ), or else `temperature` x (1 + θ)."""
    anchor: dict[str, np.ndarray] | None = None
    """The parameters at which a straight-through softmax has the value of temperature T. For others it changes as the
    softmax of temperature 1 does, so that its derivatives at the anchor are those of temperature 1."""

    def groups(self, batch: int, length: int):
        """(sequences, positions, whether non-padding) of the tokens of each group at each position."""
        mask = np.ones((batch, length), bool) if self.mask is None else self.mask
        g = self.group_size
        if self.within:
            indices = [(np.full(g, b), np.arange(s, s + g)) for b in range(batch) for s in range(0, length, g)]
        else:
            indices = [(np.arange(b, b + g), np.full(g, s)) for b in range(0, batch, g) for s in range(length)]
        for rows, positions in indices:
            yield rows, positions, mask[rows, positions]

    def softmax(self, logits: np.ndarray, valid: np.ndarray, temperature, over_experts: bool = False) -> np.ndarray:
        """Softmax [G, E] over the non-padding tokens for each expert, or over the experts for each of these tokens."""
        weights = np.zeros(logits.shape)
        temperature = np.broadcast_to(temperature, logits.shape[1:])
        members = np.flatnonzero(valid)
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

    def mixing_weights(self, p: dict[str, np.ndarray], tokens: np.ndarray, valid: np.ndarray, index) -> tuple:
        """Merge and emit weights [G, E] of one group at one position; `index` is that of its tokens in x."""

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
                return self.softmax(logits, valid, t, over_experts)
            at_anchor = self.anchor["x"][index] @ self.anchor["controller"]
            change = self.softmax(logits, valid, 1, over_experts) - self.softmax(at_anchor, valid, 1, over_experts)
            return self.softmax(at_anchor, valid, t, over_experts) + change

        logits = tokens @ controller("controller", "base_weight")
        if self.merge == "uniform":
            merge = np.repeat(valid[:, None] / max(valid.sum(), 1), logits.shape[1], axis=1)
        elif self.merge == "logits":
            merge = logits * valid[:, None]
        else:
            merge = soft(logits, temperature("temperature"))
        if self.emit == "merge":
            return merge, merge
        if self.emit == "ones":
            return merge, np.repeat(valid[:, None].astype(float), logits.shape[1], axis=1)
        if self.emit == "top_token":
            return merge, self.softmax(merge, valid, 0)
        if "emit_controller" in p:
            logits = tokens @ controller("emit_controller", "emit_base_weight")
        return merge, soft(logits, temperature("emit_temperature"), self.emit == "softmax_over_experts")

    def forward(self, p: dict[str, np.ndarray]) -> np.ndarray:
        """The update [B, S, D]; p has x, controller, w_in, w_out and, for a shared expert, kernel_in, kernel_out."""
        x = p["x"]
        y = np.zeros(x.shape)
        for rows, positions, valid in self.groups(*x.shape[:2]):
            tokens = x[rows, positions]
            merge, emit = self.mixing_weights(p, tokens, valid, (rows, positions))
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
        """Mean of the normalized entropies of merge and emit, of each that is a distribution of its own."""
        entropies = {"merge": [], "emit": []}
        for rows, positions, valid in self.groups(*p["x"].shape[:2]):
            merge, emit = self.mixing_weights(p, p["x"][rows, positions], valid, (rows, positions))
            if self.merge != "logits" and valid.sum() > 1:  # of each expert's weights over the tokens
                entropies["merge"].append(np.mean([shannon(column[valid]) for column in merge.T]))
            if self.emit == "softmax" and valid.sum() > 1:
                entropies["emit"].append(np.mean([shannon(column[valid]) for column in emit.T]))
            if self.emit == "softmax_over_experts":  # of each token's weights over the experts
                entropies["emit"] += [shannon(row) for row in emit[valid]]
        return float(np.mean([np.mean(values) for values in entropies.values() if values]))

    def differences(
        self, p: dict[str, np.ndarray], dy: np.ndarray, name: str, step: float = 1e-6, entropy: float = 0.0
    ) -> np.ndarray:
        """The gradient of sum(forward(p) * dy) + entropy * self.entropy(p) by p[name], by central differences."""
        gradient = np.zeros(p[name].shape)
        for index in np.ndindex(*gradient.shape):
            values = []
            for sign in (1, -1):
                moved = p[name].copy()
                moved[index] += sign * step
                q = p | {name: moved}
                values.append((self.forward(q) * dy).sum() + (entropy * self.entropy(q) if entropy else 0))
            gradient[index] = (values[0] - values[1]) / (2 * step)
        return gradient

    def backward(self, p: dict[str, np.ndarray], dy: np.ndarray) -> dict[str, np.ndarray]:
        """The gradients of sum(forward(p) * dy) by everything in p, for the paper's layer without variants."""
        x = p["x"]
        d = {name: np.zeros(value.shape) for name, value in p.items()}
        for rows, s, valid in self.groups(*x.shape[:2]):
            tokens, d_update = x[rows, s], dy[rows, s]
            weights, _ = self.mixing_weights(p, tokens, valid, (rows, s))
            d_weights = np.zeros(weights.shape)
            for e in range(weights.shape[1]):
                column = weights[:, e]
                mixture = column @ tokens
                h = mixture @ p["w_in"][e]
                output = np.maximum(h, 0) @ p["w_out"][e]
                d_output = column @ d_update
                d_h = (p["w_out"][e] @ d_output) * (h > 0)
                d_mixture = p["w_in"][e] @ d_h
                d["w_out"][e] += np.outer(np.maximum(h, 0), d_output)
                d["w_in"][e] += np.outer(mixture, d_h)
                d["x"][rows, s] += np.outer(column, d_mixture)
                d_weights[:, e] = d_update @ output + tokens @ d_mixture
            if self.merge == "softmax" and self.temperature > 0:  # other weights do not depend on the logits
                d_logits = weights * (d_weights - (weights * d_weights).sum(axis=0)) / self.temperature
                d["controller"] += tokens.T @ d_logits
                d["x"][rows, s] += d_logits @ p["controller"].T
        add_shared_expert(p, dy, np.zeros(x.shape), d)
        return d


@dataclasses.dataclass
class TokenChoice:
    """Token choice, forward and backward, as a loop over tokens."""

    top_k: int
    tokens: int
    """T, of a routing group."""
    capacity: int | None = None
    """The slots of an expert in a routing group; None: unlimited."""
    mask: np.ndarray | None = None
    """bool [B, S], True = non-padding; None: no padding."""
    balance: float = 0.0
    """The weight of the load-balancing loss."""
    z: float = 0.0
    """The weight of the router z-loss."""
    sigmoid: bool = False
    """Scores are sigmoids, not a softmax; weights are divided by their sum if top_k > 1."""

    def __call__(self, p: dict[str, np.ndarray], dy: np.ndarray) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
        """Return y [B, S, D], the sum of the weighted losses, and the gradients of sum(y dy) + losses."""
        x = p["x"].reshape(-1, p["x"].shape[-1])
        valid = np.ones(len(x), bool) if self.mask is None else self.mask.reshape(-1)
        dy, y, d = dy.reshape(x.shape), np.zeros(x.shape), {name: np.zeros(v.shape) for name, v in p.items()}
        dx = d["x"].reshape(x.shape)
        groups = [np.arange(start, start + self.tokens) for start in range(0, len(x), self.tokens)]
        groups = [group[valid[group]] for group in groups if valid[group].any()]
        loss, count = 0.0, p["controller"].shape[1]
        for group in groups:
            logits = x[group] @ p["controller"]
            sums = np.log(np.exp(logits).sum(axis=1))
            probabilities = scores = np.exp(logits - sums[:, None])
            if self.sigmoid:
                scores = 1 / (1 + np.exp(-logits))
                probabilities = scores / scores.sum(axis=1, keepdims=True)
            chosen = np.argsort(-scores - p.get("balance_bias", 0), axis=1, kind="stable")
            chosen = chosen[:, : self.top_k]
            is_chosen = (chosen[:, :, None] == np.arange(count)).any(axis=1)
            divisor = (is_chosen * scores).sum(axis=1, keepdims=True) if self.sigmoid and self.top_k > 1 else 1
            weights = is_chosen * scores / divisor
            share = np.bincount(chosen.reshape(-1), minlength=count) / chosen.size
            loss += self.balance * count * (share * probabilities.mean(axis=0)).sum() / len(groups)
            loss += self.z * (sums**2).mean() / len(groups)
            d_probabilities = np.tile(self.balance * count * share / len(group) / len(groups), (len(group), 1))
            d_weights = np.zeros(weights.shape)
            d_logits = self.z * 2 * sums[:, None] * np.exp(logits - sums[:, None]) / len(group) / len(groups)
            taken = np.zeros(count, int)
            for i, t in enumerate(group):
                for e in chosen[i]:
                    if self.capacity is not None and taken[e] == self.capacity:
                        continue
                    taken[e] += 1
                    output, d_token = run_expert(p, e, x[t], weights[i, e] * dy[t], d)
                    y[t] += weights[i, e] * output
                    d_weights[i, e] += output @ dy[t]
                    dx[t] += d_token
            if self.sigmoid:
                if self.top_k > 1:
                    d_weights = is_chosen * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True)) / divisor
                centered = d_probabilities - (probabilities * d_probabilities).sum(axis=1, keepdims=True)
                d_logits += scores * (1 - scores) * (d_weights + centered / scores.sum(axis=1, keepdims=True))
            else:
                d_probabilities += d_weights
                centered = d_probabilities - (probabilities * d_probabilities).sum(axis=1, keepdims=True)
                d_logits += probabilities * centered
            d["controller"] += x[group].T @ d_logits
            dx[group] += d_logits @ p["controller"].T
        add_shared_expert(p, dy, y, d)
        return y.reshape(p["x"].shape), loss, d


@dataclasses.dataclass
class ExpertThreshold:
    """Experts with thresholds, forward and backward, as a loop over tokens."""

    top_k: int
    tokens: int
    """T, of a routing group."""
    capacity: int | None = None
    """The slots of an expert in a routing group; None: unlimited."""
    thresholds: np.ndarray | None = None
    """[E]; None: experts choose along the batch."""
    group_size: int = 1
    """G, the number of sequences from which experts choose along the batch."""
    count: int = 1
    """The number of tokens that an expert takes there at a position."""
    mask: np.ndarray | None = None
    """bool [B, S], True = non-padding; None: no padding."""

    def taken(self, logits: np.ndarray) -> np.ndarray:
        """Whether an expert takes a token, before any are dropped: bool [B, S, E]."""
        batch, length, experts = logits.shape
        valid = np.ones((batch, length), bool) if self.mask is None else self.mask
        taken = np.zeros(logits.shape, bool)
        for b, s, e in np.ndindex(logits.shape):
            if self.thresholds is not None:
                taken[b, s, e] = valid[b, s] and logits[b, s, e] >= self.thresholds[e]
        if self.thresholds is None:
            for first, s, e in itertools.product(range(0, batch, self.group_size), range(length), range(experts)):
                members = [b for b in range(first, first + self.group_size) if valid[b, s]]
                members.sort(key=lambda b, s=s, e=e: -logits[b, s, e])
                taken[members[: self.count], s, e] = True
        return taken

    def quantiles(self, logits: np.ndarray) -> np.ndarray:
        """The mean over routing groups of the logit that k / E of their tokens reach, [E]."""
        rows = logits.reshape(-1, logits.shape[-1])
        valid = np.ones(len(rows), bool) if self.mask is None else self.mask.reshape(-1)
        groups = [np.arange(start, start + self.tokens) for start in range(0, len(rows), self.tokens)]
        groups = [rows[group[valid[group]]] for group in groups if valid[group].any()]
        ranks = [math.ceil(self.top_k * len(group) / rows.shape[-1]) for group in groups]
        return np.mean([np.sort(group, axis=0)[-rank] for group, rank in zip(groups, ranks, strict=True)], axis=0)

    def __call__(
        self, p: dict[str, np.ndarray], dy: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, float], np.ndarray]:
        """Return y [B, S, D], the gradients of sum(y dy), the metrics and the quantiles."""
        logits = p["x"] @ p["controller"]
        x, count, taken = p["x"].reshape(-1, p["x"].shape[-1]), logits.shape[-1], self.taken(logits)
        quantiles, taken, logits = self.quantiles(logits), taken.reshape(-1, count), logits.reshape(-1, count)
        dy, y, d = dy.reshape(x.shape), np.zeros(x.shape), {name: np.zeros(v.shape) for name, v in p.items()}
        dx, placed = d["x"].reshape(x.shape), np.zeros(taken.shape, bool)
        length, pairs = p["x"].shape[1], np.argwhere(taken)
        if self.thresholds is None:  # slots are filled position by position
            pairs = pairs[np.argsort(pairs[:, 0] % length, kind="stable")]
        for t, e in pairs:
            first = t - t % self.tokens
            if self.capacity is not None and placed[first : first + self.tokens, e].sum() == self.capacity:
                continue
            placed[t, e] = True
            weight = 1 / (1 + np.exp(-logits[t, e]))
            output, d_token = run_expert(p, e, x[t], weight * dy[t], d)
            y[t] += weight * output
            d_logit = (output @ dy[t]) * weight * (1 - weight)
            d["controller"][:, e] += d_logit * x[t]
            dx[t] += d_token + d_logit * p["controller"][:, e]
        add_shared_expert(p, dy, y, d)
        mask = np.ones(p["x"].shape[:2], bool) if self.mask is None else self.mask
        scores = 1 / (1 + np.exp(-logits.reshape(*mask.shape, count)))
        shares = scores / scores.sum(axis=-1, keepdims=True)
        entropies = [
            np.mean([shannon(token) for token in row[ok]]) for row, ok in zip(shares, mask, strict=True) if ok.any()
        ]
        metrics = {
            "dropped": 1 - placed.sum() / taken.sum(),
            "no_expert": 1 - placed.any(axis=1).sum() / mask.sum(),
            "experts_per_token": taken.sum() / mask.sum(),
            "load_max": taken.sum(axis=0).max() / taken.sum(axis=0).mean(),
            "router_entropy": np.mean(entropies),
        }
        return y.reshape(p["x"].shape), d, metrics, quantiles


@dataclasses.dataclass
class ExpertChoice:
    """Expert choice, forward and backward, as a loop over groups, positions and experts."""

    group_size: int
    """G; the length of a sequence if `over_tokens`."""
    capacity: int
    """The number of tokens that an expert takes from a group at a position."""
    over_tokens: bool = False
    """Whether a group is a sequence."""
    mask: np.ndarray | None = None
    """bool [B, S], True = non-padding; None: no padding."""
    z: float = 0.0
    """The weight of the router z-loss."""

    def __call__(
        self, p: dict[str, np.ndarray], dy: np.ndarray
    ) -> tuple[np.ndarray, float, dict[str, np.ndarray], np.ndarray]:
        """Return y [B, S, D], the weighted loss, the gradients of sum(y dy) + loss, and experts per token [B, S]."""
        x, d, y, loss = p["x"], {name: np.zeros(v.shape) for name, v in p.items()}, np.zeros(p["x"].shape), 0.0
        experts_per_token = np.zeros(x.shape[:2], int)
        groups = MixtureOfTokens(self.group_size, mask=self.mask, within=self.over_tokens).groups(*x.shape[:2])
        count = x[..., 0].size if self.mask is None else self.mask.sum()
        for rows, positions, valid in groups:
            members = np.flatnonzero(valid)
            sequences, places = rows[members], positions[members]
            tokens, d_update = x[sequences, places], dy[sequences, places]
            if not len(tokens):
                continue
            logits = tokens @ p["controller"]
            sums = np.log(np.exp(logits).sum(axis=1))
            probabilities = np.exp(logits - sums[:, None])
            loss += self.z * (sums**2).sum() / count
            chosen = np.argsort(-probabilities, axis=0, kind="stable")[: self.capacity]
            update, experts = np.zeros(tokens.shape), range(chosen.shape[1])
            np.add.at(experts_per_token, (sequences[chosen], places[chosen]), 1)
            for e in experts:
                outputs = run_expert(p, e, tokens[chosen[:, e]])[0]
                update[chosen[:, e]] += probabilities[chosen[:, e], e, None] * outputs
            y[sequences, places] = np.stack([normed(vector, p.get("output_norm")) for vector in update])
            if "output_norm" in p:
                centered = update - update.mean(axis=1, keepdims=True)
                scale = 1 / np.sqrt((centered**2).mean(axis=1, keepdims=True) + 1e-5)
                unit = centered * scale
                d["output_norm"] += np.stack([(d_update * unit).sum(axis=0), d_update.sum(axis=0)])
                d_unit = d_update * p["output_norm"][0]
                d_update = d_unit - d_unit.mean(axis=1, keepdims=True)
                d_update = scale * (d_update - unit * (d_unit * unit).mean(axis=1, keepdims=True))
            d_probabilities, d_tokens = np.zeros(probabilities.shape), np.zeros(tokens.shape)
            for e in experts:
                taken = chosen[:, e]
                d_outputs = probabilities[taken, e, None] * d_update[taken]
                outputs, d_taken = run_expert(p, e, tokens[taken], d_outputs, d)
                d_probabilities[taken, e] = (outputs * d_update[taken]).sum(axis=1)
                d_tokens[taken] += d_taken
            d_logits = probabilities * (d_probabilities - (probabilities * d_probabilities).sum(axis=1, keepdims=True))
            d_logits += self.z * 2 * sums[:, None] * probabilities / count
            d["controller"] += tokens.T @ d_logits
            d["x"][sequences, places] += d_tokens + d_logits @ p["controller"].T
        add_shared_expert(p, dy, y, d)
        return y, loss, d, experts_per_token


@dataclasses.dataclass
class ReluRouting:
    """ReLU routing, forward and backward, as a loop over tokens and experts."""

    mask: np.ndarray | None = None
    """bool [B, S], True = non-padding; None: no padding."""

    def __call__(
        self, p: dict[str, np.ndarray], dy: np.ndarray
    ) -> tuple[np.ndarray, float, dict[str, np.ndarray], dict[str, float]]:
        """Return y [B, S, D], the loss, the gradients of sum(y dy) + loss, and the metrics.

        `p` also has the router state `l1_weight` and `load`.
        """
        (batch, length, _), experts = p["x"].shape, p["controller"].shape[1]
        y, d = np.zeros(p["x"].shape), {name: np.zeros(v.shape) for name, v in p.items()}
        tokens = [index for index in np.ndindex(batch, length) if self.mask is None or self.mask[index]]
        loss, gate_sum, active = 0.0, 0.0, np.zeros(experts)
        for index in np.ndindex(batch, length):
            x, d_y = p["x"][index], dy[index]
            for e in range(experts):
                logit = x @ p["controller"][:, e]
                if index not in tokens or logit <= 0:
                    continue
                active[e] += 1
                gate_sum += logit
                loss += p["l1_weight"] * p["load"][e] * logit / len(tokens)
                output, d_token = run_expert(p, e, x, logit * d_y, d)
                y[index] += logit * output
                d_logit = output @ d_y + p["l1_weight"] * p["load"][e] / len(tokens)
                d["controller"][:, e] += d_logit * x
                d["x"][index] += d_token + d_logit * p["controller"][:, e]
        add_shared_expert(p, dy, y, d)
        metrics = {
            "gate_l1": gate_sum / len(tokens),
            "experts_per_token": active.sum() / len(tokens),
            "load_max": experts * active.max() / active.sum(),
            "l1_weight": float(p["l1_weight"]),
        }
        return y, loss, {name: value for name, value in d.items() if name not in ("l1_weight", "load")}, metrics


@dataclasses.dataclass
class Hash:
    """A hash layer, forward and backward, as a loop over tokens and their experts."""

    table: np.ndarray
    """int [V, k], the experts of each id."""
    ids: np.ndarray
    """int [B, S]."""
    mask: np.ndarray | None = None
    """bool [B, S], True = non-padding; None: no padding."""

    def __call__(self, p: dict[str, np.ndarray], dy: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
        """Return y [B, S, D], the gradients of sum(y dy), and the largest load, 1 being an even share."""
        d, y = {name: np.zeros(v.shape) for name, v in p.items()}, np.zeros(p["x"].shape)
        load = np.zeros(len(p["w_in"]))
        for token in np.ndindex(*self.ids.shape):
            if self.mask is not None and not self.mask[token]:
                continue
            x, chosen = p["x"][token], self.table[self.ids[token]]
            for e in chosen:
                load[e] += 1
                output, d_token = run_expert(p, e, x, dy[token] / len(chosen), d)
                y[token] += output / len(chosen)
                d["x"][token] += d_token
        add_shared_expert(p, dy, y, d)
        return y, d, len(load) * load.max() / load.sum()


@dataclasses.dataclass
class SoftMoE:
    """Soft MoE, forward and backward, as a loop over sequences."""

    mask: np.ndarray | None = None
    """bool [B, S], True = non-padding; None: no padding."""

    def __call__(
        self, p: dict[str, np.ndarray], dy: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, float]]:
        """Return y [B, S, D], the gradients of sum(y dy), and the metrics."""
        d, y = {name: np.zeros(v.shape) for name, v in p.items()}, np.zeros(p["x"].shape)
        width, experts, slots = p["controller"].shape
        columns = p["controller"].reshape(width, -1)  # slot c belongs to expert c // P
        units, d_units = columns / np.sqrt((columns**2).sum(axis=0) + 1e-6), np.zeros(columns.shape)
        dispatch_entropies, combine_entropies, load = [], [], np.zeros(experts)
        for b, sequence in enumerate(p["x"]):
            members = np.arange(len(sequence)) if self.mask is None else np.flatnonzero(self.mask[b])
            if not len(members):
                continue
            x, d_update = sequence[members], dy[b, members]
            x_units = x / np.sqrt((x**2).sum(axis=1, keepdims=True) + 1e-6)
            cosines = x_units @ units
            powers = np.exp(p["scale"] * cosines)
            dispatch, combine = powers / powers.sum(axis=0), powers / powers.sum(axis=1, keepdims=True)
            if len(members) > 1:
                dispatch_entropies += [shannon(column) for column in dispatch.T]
            combine_entropies += [shannon(weights) for weights in combine]
            load += combine.reshape(len(members), experts, slots).sum(axis=(0, 2))
            u = dispatch.T @ x
            d_o, o, du = combine.T @ d_update, np.zeros(u.shape), np.zeros(u.shape)
            for c in range(len(u)):
                o[c], du[c] = run_expert(p, c // slots, u[c], d_o[c], d)
            y[b, members] = combine @ o
            d_dispatch, d_combine = x @ du.T, d_update @ o.T
            d_logits = dispatch * (d_dispatch - (dispatch * d_dispatch).sum(axis=0))
            d_logits += combine * (d_combine - (combine * d_combine).sum(axis=1, keepdims=True))
            d["scale"] += (d_logits * cosines).sum()
            d_units += p["scale"] * x_units.T @ d_logits
            d["x"][b, members] += dispatch @ du + unit_gradient(x.T, (p["scale"] * d_logits @ units.T).T).T
        d["controller"] += unit_gradient(columns, d_units).reshape(p["controller"].shape)
        add_shared_expert(p, dy, y, d)
        metrics = {"load_max": experts * load.max() / load.sum()}
        metrics |= {"dispatch_entropy": np.mean(dispatch_entropies), "combine_entropy": np.mean(combine_entropies)}
        return y, d, metrics


def run_expert(
    p: dict[str, np.ndarray],
    e: int,
    x: np.ndarray,
    d_output: np.ndarray | None = None,
    d: dict[str, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Apply expert e to x [D] or [n, D].

    Args:
        p: w_in, w_out and, for gated experts, w_gate.
        d_output: the cotangent of the output; None for the forward pass only.
        d: the gradients of `p`, to which those of the expert are added.

    Returns:
        The output, and the gradient of x or None.
    """
    tokens = np.atleast_2d(x)
    h, gate = tokens @ p["w_in"][e], tokens @ p["w_gate"][e] if "w_gate" in p else None
    hidden = np.maximum(h, 0) if gate is None else np.maximum(gate, 0) * h
    output = (hidden @ p["w_out"][e]).reshape(x.shape)
    if d_output is None or d is None:
        return output, None
    d_output = np.atleast_2d(d_output)
    d["w_out"][e] += hidden.T @ d_output
    d_hidden = d_output @ p["w_out"][e].T
    if gate is None:
        parts = {"w_in": d_hidden * (h > 0)}
    else:
        parts = {"w_in": d_hidden * np.maximum(gate, 0), "w_gate": d_hidden * h * (gate > 0)}
    for name, part in parts.items():
        d[name][e] += tokens.T @ part
    return output, sum(part @ p[name][e].T for name, part in parts.items()).reshape(x.shape)


def add_shared_expert(p: dict[str, np.ndarray], dy: np.ndarray, y: np.ndarray, d: dict[str, np.ndarray]) -> None:
    """Add the output of the shared expert, if `p` has one, to y, and its gradients to d."""
    if "kernel_in" not in p:
        return
    x, dy = (a.reshape(-1, a.shape[-1]) for a in (p["x"], dy))
    h = x @ p["kernel_in"]
    d_h = (dy @ p["kernel_out"].T) * (h > 0)
    y += (np.maximum(h, 0) @ p["kernel_out"]).reshape(y.shape)
    d["kernel_out"] += np.maximum(h, 0).T @ dy
    d["kernel_in"] += x.T @ d_h
    d["x"] += (d_h @ p["kernel_in"].T).reshape(d["x"].shape)


def check_gradients(
    total: Callable[[dict[str, np.ndarray]], float],
    p: dict[str, np.ndarray],
    gradients: dict[str, np.ndarray],
    rtol: float = 1e-5,
) -> None:
    """Compare the gradients of `total` at p with central differences along random directions.

    The differences have step 1e-6, and an error of about 1e-9 away from kinks.
    """
    for name, gradient in gradients.items():
        direction = np.random.default_rng(3).normal(size=gradient.shape)
        up, down = (total(p | {name: p[name] + step * direction}) for step in (1e-6, -1e-6))
        actual = (gradient * direction).sum()
        np.testing.assert_allclose(actual, (up - down) / 2e-6, rtol=rtol, atol=1e-6, err_msg=name)


def unit_gradient(x: np.ndarray, d_unit: np.ndarray) -> np.ndarray:
    """The gradient of the columns x [D, n], given that of x / sqrt(sum x² + 1e-6)."""
    norm = np.sqrt((x**2).sum(axis=0) + 1e-6)
    return d_unit / norm - x * (x * d_unit).sum(axis=0) / norm**3


def shannon(weights: np.ndarray) -> float:
    """Entropy divided by that of as many equal weights: 1 is uniform, 0 is one-hot."""
    positive = weights[weights > 0]
    return -(positive * np.log(positive)).sum() / np.log(len(weights))


def normed(vector: np.ndarray, norm: np.ndarray | None) -> np.ndarray:
    """Layer norm with scale norm[0] and bias norm[1]; the vector itself without them."""
    if norm is None:
        return vector
    centred = vector - vector.mean()
    return centred / np.sqrt((centred**2).mean() + 1e-5) * norm[0] + norm[1]
