"""Small random models of other projects: their tensors by name, and their logits in NumPy, in their conventions.

`AUTHORS` is the language model of the paper's authors (llm-random), `PORT` the Hugging Face port.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mot_jax.config import MixtureOfTokensConfig, ModelConfig

KIND = MixtureOfTokensConfig(group_size=4, num_experts=8, expert_dim=6)
AUTHORS = ModelConfig(
    num_blocks=4, d_model=12, d_ff=10, num_heads=3, context_length=7, vocab_size=260, loss_chunk=7,
    feed_forward=KIND, moe_blocks="last_half",
)  # fmt: skip
PORT = dataclasses.replace(
    AUTHORS, moe_blocks="all", activation="gelu", final_norm=True, tie_embeddings=True, attention_bias=True
)


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()}


def authors_tensors(model: ModelConfig = AUTHORS) -> dict[str, np.ndarray]:
    """A state dict of the authors' LLM; weights of `torch.nn.Linear` are [out, in]."""
    v, s, d, f, kind = model.vocab_size, model.context_length, model.d_model, model.d_ff, KIND
    shapes: dict[str, tuple[int, ...]] = {
        "embedding_layer.layers.0.weight": (v, d),
        "embedding_layer.layers.1.layer.weight": (s, d),
        "head.weight": (v, d),
    }
    for i in range(model.num_blocks):
        block = f"encoder.blocks.block_{i}.block."
        for part in ("attention", "feedforward"):
            shapes |= {f"{block}residual_{part}.layer.pre_norm.{name}": (d,) for name in ("weight", "bias")}
        attention, layer = (f"{block}residual_{n}.layer.{n}" for n in ("attention", "feedforward"))
        shapes |= {f"{attention}.input_projection.weight": (3 * d, d), f"{attention}.output_projection.weight": (d, d)}
        if i < model.num_blocks // 2:
            shapes |= {f"{layer}.logging_ff_pre_relu.weight": (f, d), f"{layer}.logging_ff_pre_relu.bias": (f,)}
            shapes |= {f"{layer}.logging_ff_post_relu.weight": (d, f), f"{layer}.logging_ff_post_relu.bias": (d,)}
        else:
            e, m = kind.num_experts, kind.expert_dim
            shapes |= {f"{layer}.lin1": (e, d, m), f"{layer}.lin2": (e, m, d), f"{layer}.controller": (d, e)}
    return draw(shapes)


def port_tensors(model: ModelConfig = PORT) -> dict[str, np.ndarray]:
    """A state dict of the port's language model: GPT-2's names; linear maps are [in, out]."""
    v, s, d, kind = model.vocab_size, model.context_length, model.d_model, KIND
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (v, d), "wpe.weight": (s, d)}
    shapes |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
    for i in range(model.num_blocks):
        shapes |= {f"h.{i}.ln_{n}.{name}": (d,) for n in (1, 2) for name in ("weight", "bias")}
        shapes |= {f"h.{i}.attn.c_attn.weight": (d, 3 * d), f"h.{i}.attn.c_proj.weight": (d, d)}
        shapes |= {f"h.{i}.attn.c_attn.bias": (3 * d,), f"h.{i}.attn.c_proj.bias": (d,)}
        e, m = kind.num_experts, kind.expert_dim
        shapes |= {f"h.{i}.mlp.lin1": (e, d, m), f"h.{i}.mlp.lin2": (e, m, d), f"h.{i}.mlp.controller": (d, e)}
    return {f"transformer.{name}": value for name, value in draw(shapes).items()}


def layer_norm(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def attend(query, key, value):
    """Causal attention of one head, [B, S, K] each."""
    scores = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1])
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True) @ value


def mix(x, controller, lin1, lin2, act):
    """The Mixture-of-Tokens layer, x [B, S, D]."""
    y = np.zeros_like(x)
    for begin in range(0, len(x), KIND.group_size):
        for s in range(x.shape[1]):
            tokens = x[begin : begin + KIND.group_size, s]
            powers = np.exp(tokens @ controller)
            weights = powers / powers.sum(0)
            outputs = np.stack([act(weights[:, e] @ tokens @ lin1[e]) @ lin2[e] for e in range(len(lin1))])
            y[begin : begin + KIND.group_size, s] = weights @ outputs
    return y


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def authors_logits(p: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """In the joint projection, the query, key and value of a head are adjacent, head after head."""
    x = p["embedding_layer.layers.0.weight"][tokens] + p["embedding_layer.layers.1.layer.weight"][: tokens.shape[1]]
    for i in range(AUTHORS.num_blocks):
        b, width = f"encoder.blocks.block_{i}.block.", AUTHORS.d_model // AUTHORS.num_heads
        n = layer_norm(x, *(p[f"{b}residual_attention.layer.pre_norm.{w}"] for w in ("weight", "bias")))
        projected = n @ p[f"{b}residual_attention.layer.attention.input_projection.weight"].T
        heads = [
            attend(*(projected[..., (3 * h + part) * width :][..., :width] for part in range(3)))
            for h in range(AUTHORS.num_heads)
        ]
        x = x + np.concatenate(heads, -1) @ p[f"{b}residual_attention.layer.attention.output_projection.weight"].T
        n = layer_norm(x, *(p[f"{b}residual_feedforward.layer.pre_norm.{w}"] for w in ("weight", "bias")))
        layer = {name.rpartition("feedforward.")[2]: v for name, v in p.items() if name.startswith(f"{b}residual_feed")}
        if "lin1" in layer:
            x = x + mix(n, layer["controller"], layer["lin1"], layer["lin2"], relu)
        else:
            h = relu(n @ layer["logging_ff_pre_relu.weight"].T + layer["logging_ff_pre_relu.bias"])
            x = x + h @ layer["logging_ff_post_relu.weight"].T + layer["logging_ff_post_relu.bias"]
    return x @ p["head.weight"].T


def port_logits(p: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """In the joint projection, the queries of all heads come first, then the keys, then the values."""
    p = {name.removeprefix("transformer."): value for name, value in p.items()}
    x = p["wte.weight"][tokens] + p["wpe.weight"][: tokens.shape[1]]
    for i in range(PORT.num_blocks):
        n = layer_norm(x, p[f"h.{i}.ln_1.weight"], p[f"h.{i}.ln_1.bias"])
        projected = n @ p[f"h.{i}.attn.c_attn.weight"] + p[f"h.{i}.attn.c_attn.bias"]
        parts = [np.split(part, PORT.num_heads, -1) for part in np.split(projected, 3, -1)]
        heads = np.concatenate([attend(*head) for head in zip(*parts, strict=True)], -1)
        x = x + heads @ p[f"h.{i}.attn.c_proj.weight"] + p[f"h.{i}.attn.c_proj.bias"]
        n = layer_norm(x, p[f"h.{i}.ln_2.weight"], p[f"h.{i}.ln_2.bias"])
        x = x + mix(n, *(p[f"h.{i}.mlp.{name}"] for name in ("controller", "lin1", "lin2")), gelu)
    return layer_norm(x, p["ln_f.weight"], p["ln_f.bias"]) @ p["wte.weight"].T


OTHERS = {"authors": (AUTHORS, authors_tensors, authors_logits), "port": (PORT, port_tensors, port_logits)}
