"""Import of other projects' models: the logits must be those of a forward pass in the project's own conventions."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from exports import assert_same, config_of, tensors_of
from other_projects import AUTHORS, KIND, OTHERS, PORT, authors_tensors, port_tensors
from safetensors.numpy import save_file

from mot_jax.config import HashConfig, ModelConfig, TokenChoiceConfig
from mot_jax.errors import UserError
from mot_jax.interop.export import export_model
from mot_jax.interop.importing import import_model
from mot_jax.nn.transformer import bind, unroll
from mot_jax.runs.restore import load_run
from mot_jax.runs.tensor_files import MODEL


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_file(tensors, path)
    return path


@partial(jax.jit, static_argnums=0)
def logits(model: ModelConfig, params: dict, tokens: np.ndarray) -> jax.Array:
    bound = bind(model, params)
    return bound.logits(bound(tokens).hidden)


@pytest.mark.parametrize("project", OTHERS)
def test_imported_models_have_the_logits_of_the_original(tmp_path, project):
    model, make_tensors, original_logits = OTHERS[project]
    tensors = make_tensors()
    file = save(tmp_path / "theirs.safetensors", tensors)
    (line,) = import_model(file, tmp_path / "ours", config_of(model))
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (8, 7)).astype(np.int32)
    expected = original_logits({name: value.astype(np.float64) for name, value in tensors.items()}, tokens)
    run = load_run(tmp_path / "ours")
    imported = logits(model, run.params, tokens)
    assert np.abs(imported - expected).max() < 1e-4 * np.abs(expected).max()
    assert run.config == config_of(model) and run.step == 0
    assert f"{sum(value.size for value in run.params.values()):,} parameters" in line


def test_wrapper_names_and_buffers_are_ignored(tmp_path):
    tensors = authors_tensors()
    import_model(save(tmp_path / "a.safetensors", tensors), tmp_path / "a", config_of(AUTHORS))
    wrapped = {
        "module." + name.replace("block_1.", "block_1._checkpoint_wrapped_module."): v for name, v in tensors.items()
    }
    rope = "module.encoder.blocks.block_0.block.residual_attention.layer.attention.rope."
    wrapped |= {rope + name: np.zeros((7, 4), np.float32) for name in ("sin", "cos")}
    import_model(save(tmp_path / "b.safetensors", wrapped), tmp_path / "b", config_of(AUTHORS))
    assert (tmp_path / "a" / MODEL).read_bytes() == (tmp_path / "b" / MODEL).read_bytes()
    port = port_tensors()
    import_model(save(tmp_path / "c.safetensors", port), tmp_path / "c", config_of(PORT))
    bare = {name.removeprefix("transformer."): v for name, v in port.items()}
    bare |= {"h.0.attn.masked_bias": np.ones((), np.float32), "lm_head.weight": bare["wte.weight"]}
    import_model(save(tmp_path / "d.safetensors", bare), tmp_path / "d", config_of(PORT))
    assert (tmp_path / "c" / MODEL).read_bytes() == (tmp_path / "d" / MODEL).read_bytes()


def test_import_into_unrolled_and_scanned_layers(tmp_path):
    file = save(tmp_path / "theirs.safetensors", authors_tensors())
    for scanned in (True, False):
        import_model(file, tmp_path / str(scanned), config_of(dataclasses.replace(AUTHORS, scan_layers=scanned)))
    assert_same(tensors_of(tmp_path / "False"), unroll(AUTHORS, tensors_of(tmp_path / "True"))[1])


@pytest.mark.parametrize(
    "kind", [TokenChoiceConfig(8, routing_group_tokens=7), HashConfig(8)], ids=lambda kind: kind.kind
)
def test_tensors_of_a_mixture_are_refused_for_a_model_of_another_kind(tmp_path, kind):
    file = save(tmp_path / "theirs.safetensors", authors_tensors())
    rule = f"model.feed_forward = {kind.kind}: .* has no such layers; try a mixture_of_tokens or dense config"
    with pytest.raises(UserError, match=rule):
        import_model(file, tmp_path / "ours", config_of(dataclasses.replace(AUTHORS, feed_forward=kind)))


def test_float16_becomes_float32_and_nan_is_a_warning(tmp_path):
    tensors = {name: value.astype(np.float16) for name, value in authors_tensors().items()}
    tensors["head.weight"][3, 4] = np.nan
    file = save(tmp_path / "half.safetensors", tensors)
    warning, _ = import_model(file, tmp_path / "ours", config_of(AUTHORS))
    assert warning == "warning: head: 1 of 3120 values are infinite or NaN"
    head = tensors_of(tmp_path / "ours")["head"]
    np.testing.assert_array_equal(head, tensors["head.weight"].T.astype(np.float32))


def import_errors(tmp_path: Path, model: ModelConfig, tensors: dict[str, np.ndarray]) -> list[str]:
    """Return the lines of the error of an import, without the file's name."""
    file = save(tmp_path / "wrong.safetensors", tensors)
    with pytest.raises(UserError) as error:
        import_model(file, tmp_path / "new", config_of(model))
    assert not (tmp_path / "new").exists()
    assert all("\n" not in fault for fault in error.value.faults)
    return [fault.removeprefix(f"{file}: ") for fault in error.value.faults]


def test_every_tensor_is_used_and_every_parameter_filled(tmp_path):
    tensors = authors_tensors()
    lin1 = "encoder.blocks.block_2.block.residual_feedforward.layer.feedforward.lin1"
    bias = "encoder.blocks.block_3.block.residual_attention.layer.pre_norm.bias"
    tensors["encoder.blocks.block_9.more"] = tensors.pop(bias)
    tensors[lin1] = tensors[lin1].transpose(1, 0, 2).copy()
    assert sorted(import_errors(tmp_path, AUTHORS, tensors)) == [
        f"tensor {lin1}: has shape (12, 8, 6), must have (8, 12, 6)",
        f"tensor {bias}: is missing, must have shape (12,)",
        "tensor encoder.blocks.block_9.more: the model has no parameter for it",
    ]


def test_config_options_that_the_project_does_not_have(tmp_path):
    kind = dataclasses.replace(KIND, shared_expert_dim=4)
    model = dataclasses.replace(AUTHORS, final_norm=True, num_heads=2, num_kv_heads=1, feed_forward=kind)
    errors = import_errors(tmp_path, model, authors_tensors())
    assert (
        "model.num_kv_heads = 1: the authors' PyTorch code (llm-random) shares no keys and values; try None" in errors
    )
    for name in ("final_norm/scale", "stacks/1/0/feed_forward/shared/kernel_in"):
        assert f"{name}: the authors' PyTorch code (llm-random) has no tensor for this parameter" in errors


def test_attention_biases_and_tied_embeddings_of_the_port(tmp_path):
    tensors = port_tensors()
    errors = import_errors(tmp_path, dataclasses.replace(PORT, attention_bias=False, tie_embeddings=False), tensors)
    assert errors[0] == "tensor lm_head.weight: is missing; try model.tie_embeddings = True"
    assert "tensor h.2.attn.c_attn.bias: the model has no parameter for it" in errors
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    assert import_errors(tmp_path, PORT, tensors) == [
        "tensor lm_head.weight: is not wte.weight; try model.tie_embeddings = False"
    ]


def test_unknown_tensor_names_and_a_missing_config(tmp_path):
    file = save(tmp_path / "x.safetensors", {"model.layers.0.self_attn.q_proj.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(UserError, match=r"of no known model \(the first is model.layers.0.self_attn.q_proj"):
        import_model(file, tmp_path / "new", config_of(AUTHORS))
    file = save(tmp_path / "theirs.safetensors", authors_tensors())
    with pytest.raises(UserError, match=r"--config is missing: .* is of the authors' PyTorch code"):
        import_model(file, tmp_path / "new")


def test_the_import_of_an_export_is_the_same_export(finished, tmp_path):
    export_model(finished, tmp_path / "exported")
    import_model(tmp_path / "exported", tmp_path / "imported")
    names = sorted(path.name for path in (tmp_path / "exported").iterdir())
    assert "companions.npy" in names and names == sorted(path.name for path in (tmp_path / "imported").iterdir())
    for name in names:
        assert (tmp_path / "imported" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes()
