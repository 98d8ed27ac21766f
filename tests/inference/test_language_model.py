"""Models loaded from workdirs, the commands that use them, and their lines about the mode."""

import dataclasses
import gzip
import io
import json
import os
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

import mot_jax
from mot_jax import cli
from mot_jax.config import Config, DataConfig, DenseConfig, MixtureOfTokensConfig, ModelConfig, to_json
from mot_jax.errors import UserError
from mot_jax.modes import enter
from mot_jax.modes.companions import save_companions
from mot_jax.nn.sharding import make_mesh
from mot_jax.runs.checkpoint import Checkpoints
from mot_jax.runs.scores import record_score
from mot_jax.runs.state import create_state

KIND = MixtureOfTokensConfig(group_size=4, num_experts=8)
MODEL = ModelConfig(2, 16, 32, 2, context_length=16, loss_chunk=16, feed_forward=KIND)


def save(workdir: Path, model: ModelConfig = MODEL, step: int = 3) -> Config:
    """Write the workdir of a run with initial parameters, as if it had been trained."""
    config = Config(
        model=model, data=DataConfig(directory=str(workdir / "data")), mesh=mot_jax.config.MeshConfig(data=1)
    )
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(to_json(config))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(step, create_state(config, make_mesh(config)), 0, config)
    companions = np.random.default_rng(0).integers(0, 256, (2, 4, 16)).astype(np.int32)
    companions[1] = 0
    save_companions(epath.Path(workdir), companions if model.group_size > 1 else None, {"tokenizer": "bytes/1"})
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    save(path)
    return path


def mot(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments])


def error_of(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit:
        mot(*arguments)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exit.value.code == 2 and len(errors) == 1
    return errors[0]


def test_the_default_mode_keeps_sequences_independent(workdir):
    model = mot_jax.load(workdir)
    assert (model.mode, model.step) == ("companions", 3)
    (single,) = model.generate(["import os"], max_tokens=6, seed=1)
    assert len(single.tokens) == 6
    batch = model.generate(["import os", "def f", "class"], max_tokens=6, seed=1)
    np.testing.assert_array_equal(single.tokens, batch[0].tokens)
    np.testing.assert_allclose(single.log_probs, batch[0].log_probs, rtol=1e-5)
    config = mot_jax.load(workdir, "grouped").config
    assert enter("grouped", config, {}, 0)[0].model.feed_forward == KIND


@pytest.mark.slow
def test_parameters_are_sharded_over_a_users_mesh(workdir):
    expected = mot_jax.load(workdir).generate(["import os"], max_tokens=6, seed=1)
    types = (jax.sharding.AxisType.Explicit,) * 4
    mesh = jax.make_mesh((1, 2, 2, 1), ("data", "fsdp", "expert", "tensor"), types, devices=jax.devices()[:4])
    model = mot_jax.load(workdir, mesh=mesh)
    assert not jax.config.jax_enable_compilation_cache  # its programs lose the order of collectives
    (continuation,) = model.generate(["import os"], max_tokens=6, seed=1)
    np.testing.assert_array_equal(continuation.tokens, expected[0].tokens)
    weights = [value for name, value in model.params.items() if name.endswith("w_in")]
    assert weights and all(4 * shard.data.size == w.size for w in weights for shard in w.addressable_shards)


def test_text_goes_to_stdout_and_lines_about_the_mode_to_stderr(workdir, capsys, monkeypatch, tmp_path):
    mot("generate", workdir, "--prompt", "import os", "--tokens", 5, "--temperature", 0)
    (expected,) = mot_jax.load(workdir).generate(["import os"], max_tokens=5, temperature=0)
    out, err = capsys.readouterr()
    assert out == "import os" + expected.text + "\n"
    assert "mode companions: no sequence depends on another; the default, since" in err
    assert f"not measured yet: mot evaluate {workdir} --mode all" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("import os"))
    file = tmp_path / "generated.json"
    mot("generate", workdir, "--prompt", "-", "--samples", 2, "--tokens", 5, "--mode", "grouped", "--json", file)
    out, err = capsys.readouterr()
    assert out.count("--- prompt\nimport os\n--- continued\n") == 2
    assert "mode grouped: the sequences of a group influence each other" in err and "warning" not in err
    first, second = (text["tokens"] for text in json.loads(file.read_text())["texts"])
    assert len(first) == len(second) == 5 and first != second


def test_the_measured_loss_of_a_mode_is_compared_with_that_of_training(workdir, capsys, tmp_path):
    common = {"split": "validation", "step": 3, "windows": 512, "group_size": 4, "independent": True, "loss": 1.0}
    for mode, bits in {"grouped": 2.1, "token_choice": 3.21}.items():
        record_score(workdir, {"mode": mode, "bits_per_byte": bits, **common})
    mot("generate", workdir, "--prompt", "x", "--tokens", 1, "--mode", "token_choice")
    words = "3.210 in token_choice against 2.100 in grouped, bits per byte of 512 validation windows"
    assert f"warning: the model was trained in mode grouped; {words}" in capsys.readouterr().err
    (workdir / "modes.json").unlink()


@pytest.mark.slow
def test_a_dense_model_has_one_mode(tmp_path, capsys):
    save(tmp_path / "dense", dataclasses.replace(MODEL, feed_forward=DenseConfig()))
    mot("generate", tmp_path / "dense", "--prompt", "x", "--tokens", 2)
    assert "mode grouped: no sequence depends on another" in capsys.readouterr().err
    assert "must be left out" in error_of(
        capsys, "generate", tmp_path / "dense", "--prompt", "x", "--mode", "companions"
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt", ""], "prompt = '': is empty"),
        (["--prompt", "x" * 17], "has 17 tokens, and the context 16"),
        (["--prompt", "x", "--mode", "companion"], "no such mode; did you mean 'companions'?"),
        (["--prompt", "x", "--tokens", "0"], "--tokens = '0': must be a whole number"),
        (["--prompt", "x", "--temperature", "hot"], "--temperature"),
        (["--prompt", "x", "--top-p", "2"], "top_p = 2.0: must be above 0 and at most 1"),
        (["--prompt", "x", "--prompt-file", "y"], "--prompt-file: no such flag"),
        ([], "--prompt is missing"),
        (["--prompts", "nowhere.txt"], "--prompts = nowhere.txt: cannot be read"),
        (["--prompt", "x", "--model.d-model", "8"], "model.d_model"),
    ],
)
def test_bad_options_are_errors_of_one_line(workdir, capsys, arguments, words):
    assert words in error_of(capsys, "generate", workdir, *arguments)


def test_invalid_workdirs_are_errors_of_one_line(workdir, capsys, tmp_path):
    assert "no such directory" in error_of(capsys, "generate", tmp_path / "none", "--prompt", "x")
    assert "try `mot generate`" in error_of(capsys, "fill", workdir, "--text", "a_b")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((workdir / "config.json").read_text())
    assert "has no checkpoint yet" in error_of(capsys, "generate", empty, "--prompt", "x")
    other = tmp_path / "other"
    save(other)
    (other / "data.json").write_text(json.dumps({"tokenizer": "tokenizers/1/abc"}))
    assert "are of another tokenizer" in error_of(capsys, "generate", other, "--prompt", "x")
    (other / "data.json").unlink()
    (other / "companions.npy").unlink()
    assert "companions.npy: is missing" in error_of(capsys, "generate", other, "--prompt", "x")


@pytest.mark.slow
def test_gaps_are_filled_on_the_command_line(tmp_path, capsys):
    save(tmp_path / "masked", dataclasses.replace(MODEL, objective="masked", vocab_size=258))
    mot("fill", tmp_path / "masked", "--text", "d_f f_", "--mode", "grouped", "--json", tmp_path / "f.json")
    (text,) = json.loads((tmp_path / "f.json").read_text())["texts"]
    (expected,) = mot_jax.load(tmp_path / "masked", "grouped").fill(["d_f f_"], "_")
    assert text == {"given": "d_f f_", "text": expected.text, "gaps": [list(gap) for gap in expected.gaps]}
    assert expected.text in capsys.readouterr().out
    with pytest.raises(UserError, match="has no gap"):
        mot_jax.load(tmp_path / "masked").fill(["def"])
    contents = {
        "plain": b"d_f f_\r\nif_\n",
        "gzip": gzip.compress(b"d_f f_\nif_\n"),
        "utf16": "d_f f_\nif_\n".encode("utf-16"),
        "json": b'{"text": "d_f f_"}\n{"text": "if_"}\n',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        mot("fill", tmp_path / "masked", "--texts", tmp_path / name, "--mode", "grouped", "--json", tmp_path / "f.json")
        texts = json.loads((tmp_path / "f.json").read_text())["texts"]
        assert [text["given"] for text in texts] == ["d_f f_", "if_"] and len(texts[1]["gaps"]) == 1
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[contents["plain"]])
    writer.start()
    mot("fill", tmp_path / "masked", "--texts", tmp_path / "pipe", "--mode", "grouped", "--json", tmp_path / "p.json")
    writer.join()
    assert json.loads((tmp_path / "p.json").read_text())["texts"] == texts
    (tmp_path / "bad").write_bytes(b"d_f\n\xff_\nx_\n")
    words = error_of(capsys, "fill", tmp_path / "masked", "--texts", tmp_path / "bad")
    assert f"--texts = {tmp_path / 'bad'}: line 2 is not UTF-8" in words


@pytest.mark.slow
def test_a_run_of_more_devices_is_read_on_those_at_hand(workdir, tmp_path, capsys):
    shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    config["mesh"] |= {"data": 4, "expert": 16}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    expected = mot_jax.load(workdir).generate(["import os"], max_tokens=5)[0]
    mot("generate", tmp_path / "run", "--prompt", "import os", "--tokens", 5, "--json", tmp_path / "text.json")
    (text,) = json.loads((tmp_path / "text.json").read_text())["texts"]
    assert text["tokens"] == expected.tokens.tolist()


def test_the_config_of_a_run_is_described(workdir, capsys):
    for target in (workdir, workdir / "config.json"):
        mot("describe", target)
        assert "mixture of tokens blocks" in capsys.readouterr().out
