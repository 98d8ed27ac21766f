"""Exports, and the models of others, which must say what they said."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from etils import epath
from other_projects import AUTHORS, KIND, OTHERS, PORT, authors_tensors, port_tensors
from processes import start
from safetensors.numpy import save_file

from mot_jax import cli
from mot_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig, to_json
from mot_jax.data.tokenizers import ByteTokenizer
from mot_jax.errors import UserError
from mot_jax.interop.convert import export, import_model
from mot_jax.nn.sharding import parameter_spec
from mot_jax.nn.transformer import bind, unstack
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.runs.restore import load_run, load_run_config
from mot_jax.runs.state import TrainState, abstract_state
from mot_jax.runs.tensor_files import INDEX, MODEL, open_tensors


def config_of(model: ModelConfig, **data) -> Config:
    return Config(model=model, data=DataConfig(**data), training=TrainingConfig(batch_size=8))


# --- others' models ---------------------------------------------------------------------------------------------------


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_file(tensors, path)
    return path


def tensors_of(export: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_tensors(epath.Path(export)).tensors.items()}


@partial(jax.jit, static_argnums=0)
def logits(model: ModelConfig, params: dict, tokens: np.ndarray) -> jax.Array:
    bound = bind(model, params)
    return bound.logits(bound(tokens).hidden)


@pytest.mark.parametrize("whose", OTHERS)
def test_the_models_of_others_say_what_they_said(tmp_path, whose):
    model, tensors, expected = OTHERS[whose]
    there = tensors()
    file = save(tmp_path / "theirs.safetensors", there)
    (line,) = import_model(file, tmp_path / "ours", config_of(model))
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (8, 7)).astype(np.int32)
    wanted = expected({name: value.astype(np.float64) for name, value in there.items()}, tokens)
    run = load_run(tmp_path / "ours")
    found = logits(model, run.params, tokens)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert run.config == config_of(model) and run.step == 0
    assert f"{sum(value.size for value in run.params.values()):,} parameters" in line


def test_names_that_training_code_adds_and_buffers_are_no_matter(tmp_path):
    there = authors_tensors()
    import_model(save(tmp_path / "a.safetensors", there), tmp_path / "a", config_of(AUTHORS))
    wrapped = {
        "module." + name.replace("block_1.", "block_1._checkpoint_wrapped_module."): v for name, v in there.items()
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


def test_blocks_may_be_apart(tmp_path):
    file = save(tmp_path / "theirs.safetensors", authors_tensors())
    for stacked in (True, False):
        import_model(file, tmp_path / str(stacked), config_of(dataclasses.replace(AUTHORS, scan_layers=stacked)))
    assert_same(tensors_of(tmp_path / "False"), unstack(AUTHORS, tensors_of(tmp_path / "True"))[1])


def test_narrow_numbers_become_wide_and_infinite_ones_are_told(tmp_path):
    there = {name: value.astype(np.float16) for name, value in authors_tensors().items()}
    there["head.weight"][3, 4] = np.nan
    file = save(tmp_path / "half.safetensors", there)
    warning, _ = import_model(file, tmp_path / "ours", config_of(AUTHORS))
    assert warning == "warning: head: 1 of 3120 numbers are infinite or no numbers"
    found = tensors_of(tmp_path / "ours")["head"]
    np.testing.assert_array_equal(found, there["head.weight"].T.astype(np.float32))


def faults_of(tmp_path: Path, model: ModelConfig, tensors: dict[str, np.ndarray]) -> list[str]:
    file = save(tmp_path / "wrong.safetensors", tensors)
    with pytest.raises(UserError) as error:
        import_model(file, tmp_path / "new", config_of(model))
    assert not (tmp_path / "new").exists()
    assert all("\n" not in fault for fault in error.value.faults)
    return [fault.removeprefix(f"{file}: ") for fault in error.value.faults]


def test_every_tensor_is_used_and_every_parameter_filled(tmp_path):
    there = authors_tensors()
    lin1 = "encoder.blocks.block_2.block.residual_feedforward.layer.feedforward.lin1"
    bias = "encoder.blocks.block_3.block.residual_attention.layer.pre_norm.bias"
    there["encoder.blocks.block_9.more"] = there.pop(bias)
    there[lin1] = there[lin1].transpose(1, 0, 2).copy()
    assert sorted(faults_of(tmp_path, AUTHORS, there)) == [
        f"tensor {lin1}: has shape (12, 8, 6), must have (8, 12, 6)",
        f"tensor {bias}: is missing, must have shape (12,)",
        "tensor encoder.blocks.block_9.more: the model has no parameter for it",
    ]


def test_what_a_config_asks_that_others_do_not_have(tmp_path):
    kind = dataclasses.replace(KIND, shared_expert_dim=4)
    model = dataclasses.replace(AUTHORS, final_norm=True, num_heads=2, num_kv_heads=1, feed_forward=kind)
    faults = faults_of(tmp_path, model, authors_tensors())
    assert (
        "model.num_kv_heads = 1: the authors' PyTorch code (llm-random) shares no keys and values; try None" in faults
    )
    for name in ("final_norm/scale", "stacks/1/0/feed_forward/shared/kernel_in"):
        assert f"{name}: the authors' PyTorch code (llm-random) has nothing for this parameter" in faults


def test_biases_and_heads_of_the_port(tmp_path):
    there = port_tensors()
    faults = faults_of(tmp_path, dataclasses.replace(PORT, attention_bias=False, tie_embeddings=False), there)
    assert faults[0] == "tensor lm_head.weight: is missing; try model.tie_embeddings = True"
    assert "tensor h.2.attn.c_attn.bias: the model has no parameter for it" in faults
    there["lm_head.weight"] = there["transformer.wte.weight"] + 1
    assert faults_of(tmp_path, PORT, there) == [
        "tensor lm_head.weight: is not wte.weight; try model.tie_embeddings = False"
    ]


def test_foreign_files_and_a_missing_config(tmp_path):
    file = save(tmp_path / "x.safetensors", {"model.layers.0.self_attn.q_proj.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(UserError, match=r"of no model that is known \(the first is model.layers.0.self_attn.q_proj"):
        import_model(file, tmp_path / "new", config_of(AUTHORS))
    file = save(tmp_path / "theirs.safetensors", authors_tensors())
    with pytest.raises(UserError, match=r"--config is missing: .* is of the authors' PyTorch code"):
        import_model(file, tmp_path / "new")


# --- exports ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, TrainState]:
    """A workdir with a checkpoint of random numbers, and its state, on a mesh of two by two devices."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    workdir.mkdir()
    shape, axes = (1, 2, 2, 1), ("data", "fsdp", "expert", "tensor")
    types = (jax.sharding.AxisType.Explicit,) * 4
    config = config_of(AUTHORS)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding),
        abstract_state(config, jax.make_mesh(shape, axes, axis_types=types, devices=jax.devices()[:4])),
    )
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(12, state, 0, config)
    (workdir / "config.json").write_text(to_json(config))
    (workdir / "data.json").write_text(json.dumps({"train": "1", "tokenizer": ByteTokenizer.fingerprint}))
    np.save(workdir / "companions.npy", np.arange(28, dtype=np.int32).reshape(4, 7))
    return workdir, state


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "out"
    export(saved[0], folder)
    return folder


def assert_same(params: dict, expected: dict) -> None:
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        assert params[name].dtype == value.dtype
        assert np.asarray(params[name]).tobytes() == np.asarray(value).tobytes()


@pytest.mark.parametrize("meshed", [False, True])
def test_an_export_is_the_run_to_the_bit(saved, exported, tmp_path, mesh_of, meshed):
    workdir, state = saved
    mesh = None
    if meshed:
        mesh, exported = mesh_of(fsdp=2, expert=4), tmp_path / "out"
        with jax.set_mesh(mesh):
            export(workdir, exported)
    assert sorted(path.name for path in exported.iterdir()) == ["companions.npy", "config.json", "data.json", MODEL]
    run = load_run(exported, mesh)
    assert (run.config, run.step) == (config_of(AUTHORS), 12)
    assert_same(run.params, state.params)
    for name, value in run.params.items():
        if mesh is not None:
            assert value.sharding.spec == parameter_spec(name, value.ndim) and value.sharding.mesh == mesh
    for name in ("companions.npy", "data.json"):
        assert (exported / name).read_bytes() == (workdir / name).read_bytes()


def test_large_exports_are_several_files_and_come_back_by_import(saved, exported, tmp_path):
    params, out = saved[1].params, tmp_path / "out"
    export(exported, out, shard_bytes=4000)
    assert len(list(out.glob("model-*.safetensors"))) > 3 and (out / INDEX).exists()
    assert_same(load_run(out).params, params)
    for source in (out, out / INDEX):
        import_model(source, tmp_path / "again", overwrite=True)
        assert_same(tensors_of(tmp_path / "again"), params)
        assert (tmp_path / "again" / "config.json").read_text() == to_json(config_of(AUTHORS))
        assert open_tensors(epath.Path(tmp_path / "again")).metadata == {"step": "12"}
    export(exported, out, overwrite=True)  # in one file: of the others, none is left
    assert not list(out.glob("model-*")) and not (out / INDEX).exists()


def test_narrow_exports_are_read_as_the_parameters_are_wide(exported, tmp_path):
    export(exported, tmp_path / "out", "bfloat16")
    narrow = {name: value.astype(jnp.bfloat16) for name, value in tensors_of(exported).items()}
    assert_same(tensors_of(tmp_path / "out"), narrow)
    wide = {name: value.astype(np.float32) for name, value in narrow.items()}
    assert_same(load_run(tmp_path / "out").params, wide)
    with pytest.raises(UserError, match="--dtype = 'float16': no such dtype"):
        export(exported, tmp_path / "other", "float16")


def test_a_tokenizer_goes_with_its_model(saved, tmp_path):
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "[UNK]": 1, "<|endoftext|>": 2}, unk_token="[UNK]")
    )
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(tmp_path / "words.json"))
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(saved[0] / "checkpoints")
    (workdir / "config.json").write_text(to_json(config_of(AUTHORS, tokenizer=str(tmp_path / "words.json"))))
    export(workdir, tmp_path / "out")
    (tmp_path / "words.json").rename(tmp_path / "elsewhere.json")
    config = load_run_config(tmp_path / "out")
    assert config.data.tokenizer == str(tmp_path / "out" / "tokenizer.json")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["data"]["tokenizer"] == "tokenizer.json"
    export(tmp_path / "out", tmp_path / "second")  # of an export, too
    assert (tmp_path / "second" / "tokenizer.json").read_bytes() == (tmp_path / "elsewhere.json").read_bytes()
    (workdir / "data.json").write_text(json.dumps({"tokenizer": "another"}))
    (tmp_path / "elsewhere.json").rename(tmp_path / "words.json")
    with pytest.raises(UserError, match="does not match the checkpoints in workdir"):
        export(workdir, tmp_path / "third")


@pytest.fixture
def out(exported, tmp_path) -> Path:
    """An export to spoil."""
    return Path(shutil.copytree(exported, tmp_path / "out"))


def test_nothing_is_overwritten_unasked(saved, exported, out, tmp_path):
    with pytest.raises(UserError, match="holds an export already; try another directory, or --overwrite"):
        export(exported, out)
    with pytest.raises(UserError, match="is where the tensors come from"):
        export(out, out, overwrite=True)
    with pytest.raises(UserError, match="is where the tensors come from"):
        import_model(out / MODEL, out, overwrite=True)
    with pytest.raises(UserError, match="holds checkpoints, which is of no export"):
        export(out, saved[0], overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; try a new directory"):
        export(out, tmp_path / "file")
    for path in out.iterdir():
        assert path.read_bytes() == (exported / path.name).read_bytes()


def test_a_kill_leaves_no_half_of_an_export(saved, exported, out, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mot_jax.interop.convert.to_json", killed)
        with pytest.raises(KeyboardInterrupt):
            export(exported, out, overwrite=True)
    with pytest.raises(UserError, match=r"holds no run \(no config.json\)"):
        load_run(out)
    export(exported, out, overwrite=True)
    assert_same(load_run(out).params, saved[1].params)


def test_damage_and_another_config_are_lines(out):
    content = (out / MODEL).read_bytes()
    for damaged, words in {
        content[:-1]: "cannot be read",
        content.replace(b'"12"', b'"1x"'): "its step is '1x', must be a number",
    }.items():
        (out / MODEL).write_bytes(damaged)
        with pytest.raises(UserError, match=words):
            load_run(out)
    (out / MODEL).write_bytes(content)
    model = dataclasses.replace(AUTHORS, final_norm=True, vocab_size=300)
    (out / "config.json").write_text(to_json(config_of(model)))
    with pytest.raises(UserError) as error:
        load_run(out)
    assert sorted(fault.removeprefix(f"{out}: ") for fault in error.value.faults) == [
        "tensor final_norm/bias: is missing, must have shape (12,)",
        "tensor final_norm/scale: is missing, must have shape (12,)",
        "tensor head: has shape (12, 260), must have (12, 300)",
        "tensor token_embedding: has shape (260, 12), must have (300, 12)",
    ]


def test_the_commands(saved, exported, tmp_path, capsys):
    workdir, state = exported, saved[1]
    cli.main(["export", str(workdir), "--output", str(tmp_path / "out")])
    size = sum(value.size for value in state.params.values())
    assert f"out: step 12, {size:,} parameters in " in capsys.readouterr().out
    cli.main(["import", str(tmp_path / "out" / MODEL), "--output", str(tmp_path / "again")])
    assert_same(tensors_of(tmp_path / "again"), state.params)
    capsys.readouterr()
    (tmp_path / "theirs.bin").write_bytes(b"")
    for arguments, words in {
        ("export", str(workdir)): "the following arguments are required: --output",
        ("export", str(tmp_path / "none"), "--output", "x"): "no such directory",
        ("import", str(tmp_path / "theirs.bin"), "--output", "x"): "is a pickle, which can run code",
        ("import", "x", "--config", str(tmp_path / "none.py"), "--output", "x"): "no such file",
    }.items():
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words in line


@pytest.mark.slow
def test_two_processes_gather_what_each_holds_a_part_of(saved, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(saved[0] / "checkpoints")
    config = dataclasses.replace(config_of(AUTHORS), mesh=MeshConfig(fsdp=2, expert=2))
    (workdir / "config.json").write_text(to_json(config))
    processes = start([str(workdir), "--output", str(tmp_path / "out")], 2, 2, tmp_path / "record", command="export")
    logs = [tmp_path / f"record.{i}.log" for i in range(2)]
    assert [process.wait(200) for process in processes] == [0, 0], [log.read_text() for log in logs]
    assert "parameters in" in logs[0].read_text() and "parameters in" not in logs[1].read_text()
    assert_same(load_run(tmp_path / "out").params, saved[1].params)
