"""The config files: valid, the paper's values, and documented variant by variant."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import pytest

from mot_jax.config import (
    Config,
    DenseConfig,
    InitConfig,
    MixtureOfTokensConfig,
    ModelConfig,
    OptimizerConfig,
    check,
    default_workdir,
    load_config,
    to_json,
)
from mot_jax.config.files import variants_of
from mot_jax.cost.parameters import active_parameters, count_parameters
from mot_jax.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = [
    f"{path.relative_to(CONFIGS.parent)}:{variant}".removesuffix(":None")
    for path in sorted(CONFIGS.rglob("*.py"))
    if path.parent.name != "studies"
    for variant in variants_of(path) or [None]
]
DEFAULTS = {"configs/demo.py:mot", "configs/v1.py:mot"}


def parameter_count(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_has_command_parameters_and_results(name):
    config = load_config(CONFIGS.parent / name)
    check(config)
    assert config.training.checkpoint_every < config.training.steps
    file, _, variant = name.partition(":")
    text = (CONFIGS.parent / file).read_text()
    if variant:
        function = variants_of(CONFIGS.parent / file)[variant]
        assert function.__name__ == variant and function.__doc__
        text = re.sub("^    ", "", function.__doc__, flags=re.MULTILINE)
    total = sum(count_parameters(config.model).values())
    active = active_parameters(config.model)
    assert f"\nParameters: {parameter_count(total)} ({parameter_count(active)} active)\n" in text
    shown = file if name in DEFAULTS else name
    argument = "" if shown == "configs/demo.py" else f" {re.escape(shown)}"
    assert re.search(rf"^Command:    (python train\.py|mot train){argument}(\s|$)", text, re.MULTILINE)
    assert re.search(r"^Here:       \S", text, re.MULTILINE)
    if file.startswith("configs/v"):
        claim = re.search(r"^The paper:  ((?:.+\n)(?: {12}.+\n)*)", text, re.MULTILINE)
        assert claim and len(claim[1].split()) >= 8, "must be a sentence about the paper's result"


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_the_first_variant_is_the_default(name):
    file = name.partition(":")[0]
    assert load_config(CONFIGS.parent / file) == load_config(CONFIGS.parent / name)
    assert default_workdir(file) == default_workdir(CONFIGS.parent / name) == f"runs/{Path(file).stem}"


def test_the_default_workdir_names_file_and_variant():
    assert default_workdir(CONFIGS / "demo.py:dense") == "runs/demo_dense"
    assert default_workdir(CONFIGS / "v2.py:medium_dense") == "runs/v2_medium_dense"
    assert default_workdir(CONFIGS / "pods" / "mot_medium_8gpu.py") == "runs/mot_medium_8gpu"
    assert len({default_workdir(CONFIGS.parent / name) for name in NAMES}) == len(NAMES)


def test_the_config_of_a_run_belongs_to_its_directory(tmp_path, monkeypatch):
    (run := tmp_path / "real" / "foo").mkdir(parents=True)
    (run / "config.json").write_text(to_json(load_config(CONFIGS / "demo.py")))
    (tmp_path / "copy.json").write_text(to_json(Config()))
    monkeypatch.chdir(tmp_path)
    for name in ("real/foo", "real/foo/config.json"):
        assert load_config(name) == load_config(CONFIGS / "demo.py") and default_workdir(name) == "real/foo"
    assert default_workdir(run) == str(run)
    assert load_config("copy.json") == Config() and default_workdir("copy.json") == "runs/copy"
    monkeypatch.chdir(run)
    assert default_workdir(".") == default_workdir("config.json") == "."


def error_of(name: Path | str) -> str:
    with pytest.raises(UserError) as error:
        load_config(name)
    (line,) = error.value.faults
    assert "\n" not in line
    return line


def test_a_variant_that_is_missing_or_unknown_is_one_line():
    names = ", ".join(variants_of(CONFIGS / "v2.py"))
    assert error_of(CONFIGS / "v2.py") == (
        f"config = {CONFIGS}/v2.py: a variant must be named; the variants are {names}; try {CONFIGS}/v2.py:medium_dense"
    )
    assert error_of(CONFIGS / "v2.py:mediun_32") == (
        f"config = {CONFIGS}/v2.py:mediun_32: no variant 'mediun_32'; the variants are {names}; "
        f"try {CONFIGS}/v2.py:medium_32e"
    )
    assert error_of(CONFIGS / "demo.py:").endswith(
        f"the variants are mot, all_blocks, dense, token_choice, masked; try {CONFIGS}/demo.py:mot"
    )
    pod = CONFIGS / "pods" / "mot_medium_8gpu.py"
    assert error_of(f"{pod}:dense") == f"config = {pod}:dense: the file has no VARIANTS; try {pod}"


@pytest.mark.parametrize("name", ["demo_dense", "demo_token_choice", "v1_mot", "v2_medium_32e_8"])
def test_a_file_that_became_a_variant_names_it(name):
    file, _, variant = name.partition("_")
    path = CONFIGS / f"{name}.py"
    assert error_of(path) == f"config = {path}: no such file; did you mean '{CONFIGS}/{file}.py:{variant}'?"


def test_a_missing_file_names_the_path_and_where_configs_are(tmp_path, monkeypatch):
    assert error_of(CONFIGS / "dmo.py").endswith(f"dmo.py: no such file; did you mean '{CONFIGS}/demo.py'?")
    monkeypatch.chdir(tmp_path)
    line = error_of("configs/demo.py")
    assert line.startswith(
        f"config = configs/demo.py: no such file in {tmp_path}; name a file that defines get_config()"
    )
    assert error_of(tmp_path).startswith(f"config = {tmp_path}: no such file")


def test_a_file_outside_the_checkout_derives_from_its_neighbour(tmp_path, monkeypatch):
    """A user's file needs no VARIANTS, and finds others relative to its own path."""
    (tmp_path / "demo.py").write_text((CONFIGS / "demo.py").read_text())
    (tmp_path / "mine.py").write_text(
        "import dataclasses\n"
        "from pathlib import Path\n"
        "from mot_jax.config import Config, load_config\n\n\n"
        "def get_config() -> Config:\n"
        "    demo = load_config(Path(__file__).with_name('demo.py:dense'))\n"
        "    return dataclasses.replace(demo, training=dataclasses.replace(demo.training, seed=7))\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", tmp_path / "mine.py"):
        config: Config = load_config(name)
        assert config.training.seed == 7 and isinstance(config.model.feed_forward, DenseConfig)
        assert default_workdir(name) == "runs/mine"


# --- the paper's values -----------------------------------------------------------------------------------------------

# docs/paper.md section 5: millions of parameters, blocks, d_model, d_ff, heads, G, E, F, peak learning rate.
V2 = {
    "medium_dense": (77, 8, 512, 2048, 8, None, None, None, 7e-4),
    "medium_8e": (136, 8, 512, 2048, 8, 8, 8, 2048, 7e-4),
    "medium_32e": (337, 8, 512, 2048, 8, 32, 32, 2048, 7e-4),
    "medium_32e_8": (338, 8, 512, 2048, 8, 32, 256, 256, 7e-4),
    "medium_32e_16": (338, 8, 512, 2048, 8, 32, 512, 128, 7e-4),
    "medium_32e_32": (338, 8, 512, 2048, 8, 32, 1024, 64, 7e-4),
    "medium_128e": (1_140, 8, 512, 2048, 8, 128, 128, 2048, 7e-4),
    "base_dense": (162, 12, 768, 3072, 12, None, None, None, 4e-4),
    "base_32e": (1_040, 12, 768, 3072, 12, 32, 32, 3072, 2e-4),
    "base_64e_16": (1_950, 12, 768, 3072, 12, 64, 1024, 192, 2e-4),
}
V2 |= {f"base_masked{name}": V2["base_32e"] for name in ("", "_within")} | {"base_masked_dense": V2["base_dense"]}


def sizes(model: ModelConfig) -> tuple:
    kind, mixture = model.feed_forward, (None, None, None)
    if isinstance(kind, MixtureOfTokensConfig):
        mixture = (kind.group_size, kind.num_experts, kind.hidden_dim(model.d_ff))
    return model.num_blocks, model.d_model, model.d_ff, model.num_heads, *mixture


def test_every_config_of_version_2_is_in_the_table():
    assert set(variants_of(CONFIGS / "v2.py")) == set(V2)


@pytest.mark.parametrize("name", V2)
def test_configs_of_version_2_are_the_papers(name):
    config = load_config(CONFIGS / f"v2.py:{name}")
    (millions, *expected, rate), model, training = V2[name], config.model, config.training
    total = sum(count_parameters(model).values())
    assert total == pytest.approx(millions * 1e6, rel=0.01) and sizes(model) == tuple(expected)
    masked = "masked" in name
    assert model == ModelConfig(
        *sizes(model)[:4],
        context_length=256,
        vocab_size=50_257 + masked,
        objective="masked" if masked else "causal",
        feed_forward=model.feed_forward,
        moe_blocks="last_half",
        init=InitConfig("truncated_normal", scale=0.1, cut=0.2),
        positions="learned",
        activation="relu",
        norm="layer",
        norm_epsilon=1e-5,
        final_norm=False,
        tie_embeddings=False,
        dtype="bfloat16",
        dense_bias=True,
        scan_layers=False,
    )
    assert (training.steps, training.batch_size) == (150_000, 256)
    assert training.optimizer == OptimizerConfig(
        "adamw", rate, 2_500, 0.1, beta1=0.9, beta2=0.999, weight_decay=0.1, decay="all", clip_norm=0.5
    )


@pytest.mark.parametrize(("name", "mixture", "rate"), [("mot", (32, 512, 64), 2e-3), ("dense", (None,) * 3, 4e-3)])
def test_configs_of_version_1_are_the_papers(name, mixture, rate):
    config = load_config(CONFIGS / f"v1.py:{name}")
    model, training = config.model, config.training
    assert sizes(model) == (4, 256, 1024, 4, *mixture) and (model.moe_blocks, model.context_length) == ("all", 256)
    assert model.init == InitConfig("uniform", scale=1.0, cut=None) and not model.final_norm  # between ±√(3 / fan_in)
    assert (training.steps, training.batch_size) == (250_000, 256)
    optimizer = training.optimizer
    assert optimizer.warmup_steps == 0.01 * training.steps and optimizer.min_lr_ratio == 0.1
    assert optimizer.learning_rate == rate and optimizer.decay == "all"


BASELINES = {
    "demo.py:dense": "demo.py:mot",
    "v1.py:dense": "v1.py:mot",
    "v2.py:medium_dense": "v2.py:medium_32e",
    "v2.py:base_dense": "v2.py:base_32e",
    "v2.py:base_masked_dense": "v2.py:base_masked",
}


@pytest.mark.parametrize("name", BASELINES)
def test_a_dense_baseline_differs_in_its_layer_and_trains_on_the_same_batches(name):
    dense, mixture = load_config(CONFIGS / name), load_config(CONFIGS / BASELINES[name])
    assert isinstance(dense.model.feed_forward, DenseConfig)
    assert dense.model.feed_forward.bias == mixture.model.dense_bias
    layer, bias = mixture.model.feed_forward, mixture.model.dense_bias
    assert dataclasses.replace(dense.model, feed_forward=layer, dense_bias=bias) == mixture.model
    assert dense.data.shuffle_group_size == mixture.model.group_size and dense.group_size == mixture.group_size
    for field in ("batch_size", "steps", "seed"):
        assert getattr(dense.training, field) == getattr(mixture.training, field)


def test_an_edit_that_keeps_the_size_and_time_of_a_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # as for users
    file, demo = tmp_path / "mine.py", (CONFIGS / "demo.py").read_text()
    for steps in (1600, 1700):
        assert "steps=1600," in demo
        file.write_text(demo.replace("steps=1600,", f"steps={steps},"))
        os.utime(file, (1, 1))
        assert load_config(file).training.steps == steps
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
