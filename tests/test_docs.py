"""The Python of README.md and docs/layer.md runs unchanged, its mixtures agree; shell commands are found and parsed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mot_jax
from mot_jax import FeedForwardContext, MixingConfig, MixtureOfTokens, MixtureOfTokensConfig, cli, training
from mot_jax.cli import bench, convert, data, models, parsing, runs, tuning
from mot_jax.config import (
    CompanionsConfig,
    Config,
    ModelConfig,
    SoftMoEConfig,
    ThresholdConfig,
    load_config,
    mixing_errors,
)
from mot_jax.config.files import variants_of
from mot_jax.errors import UserError
from mot_jax.modes import MODES, offers
from mot_jax.nn.feed_forward import KINDS
from mot_jax.runs import restore

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
LAYER, KINDS_PAGE, REPRODUCE = DOCS / "layer.md", DOCS / "kinds.md", DOCS / "reproduce.md"


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def programs() -> list[dict]:
    """The namespace of each block after running it."""
    found = []
    for code in [*blocks(README), *blocks(LAYER)]:
        found.append({"__name__": __name__})
        exec(compile(code, "block", "exec", dont_inherit=True), found[-1])
    return found


@pytest.mark.slow
def test_every_block_makes_a_loss_and_gradients(programs):
    assert len(programs) == 4
    for program in programs:
        assert np.isfinite(float(program["value"]))
        gradients = jax.tree.leaves(program["gradients"])
        assert gradients and all(jnp.isfinite(leaf).all() and jnp.any(leaf) for leaf in gradients)
    for program in programs[:3]:  # embedding to logits: at first no better than chance
        assert float(program["value"]) == pytest.approx(np.log(256), rel=0.3)


@pytest.mark.slow
def test_the_example_of_the_page_on_generation_continues_a_text():
    """With the trained model of the repository in place of the demo's run."""
    (block,) = blocks(DOCS / "generate.md")
    assert block.count('"runs/demo"') == 2
    names: dict = {}
    exec(block.replace('"runs/demo"', repr(str(ROOT / "models" / "python"))), names)
    answer = names["answer"]
    assert len(answer.text) > 0 and len(answer.log_probs) >= len(answer.text)


def test_the_step_of_the_sparse_example_updates_its_router_state(programs):
    """From 0, by the rate towards an even load, minus the mean of the changes."""
    layer = programs[1]["model"].experts
    bias = np.asarray(layer.balance_bias[...])
    changes = np.round((bias - bias.min()) / layer.config.bias_rate, 3)
    assert abs(bias.mean()) < 1e-9 and len(set(changes)) > 1 and set(changes) <= {0, 1, 2}


def test_the_table_of_kinds_is_complete():
    """Classes, router state, losses and inference modes of every kind that trains."""
    rows = [line.split(" | ") for line in KINDS_PAGE.read_text().splitlines() if re.match(r"\| `\w+` \| ", line)]
    rest = {name: cells for name, *cells in rows if len(cells) == 3}
    by_class = {}
    for name, classes, *cells in rows:
        if len(cells) == 4:
            layer, config = re.findall(r"`(\w+)`", classes)
            by_class[getattr(mot_jax, config)] = (layer, *(set(re.findall(r"`(\w+)`", cell)) for cell in rest[name]))
    assert len(rest) == len(by_class)
    kinds = {config: layer for config, layer in KINDS.items() if getattr(mot_jax, layer.__name__, None) is layer}
    assert by_class.keys() == kinds.keys() == KINDS.keys() - {CompanionsConfig, ThresholdConfig}
    for kind, (layer, state, losses, modes) in by_class.items():
        sizes = {"vocab_size": 8, "slots_per_expert": 1, "balance": "bias", "scores": "sigmoid"}
        config = kind(**{name: value for name, value in sizes.items() if hasattr(kind, name)})
        variables = nnx.eval_shape(lambda: KINDS[kind](8, 32, config, rngs=nnx.Rngs(0)))  # noqa: B023
        names = {path[0] for path, variable in nnx.to_flat_state(nnx.state(variables, mot_jax.RouterState))}
        model = ModelConfig(feed_forward=kind(), objective="masked" if kind is SoftMoEConfig else "causal")
        assert layer == KINDS[kind].__name__ and losses == set(kind.losses) and state - {"balance", "bias"} == names
        assert modes == {name for name in MODES if offers(name, Config(model=model))}, layer


@pytest.mark.parametrize("config", [MixingConfig(), MixingConfig(temperature=0.0)])
def test_linen_and_bare_jax_give_the_output_of_the_nnx_layer(programs, config):
    *_, linen, bare = programs
    layer = MixtureOfTokens(16, 32, MixtureOfTokensConfig(4, 8, mixing=config), rngs=nnx.Rngs(0))
    params = {name: getattr(layer, name)[...] for name in ("controller", "w_in", "w_out")}
    x = jax.random.normal(jax.random.key(0), (8, 5, 16))
    module = linen["MixtureOfTokens"](group_size=4, num_experts=8, expert_dim=16, config=config)

    @jax.jit
    def outputs(x, mask):
        return [
            layer(x, FeedForwardContext(mask)).y,
            module.apply({"params": params}, x, mask),
            bare["mixture_of_tokens"](params, x, 4, config, mask),
        ]

    for mask in (None, jax.random.bernoulli(jax.random.key(1), 0.7, (8, 5))):
        expected, *found = outputs(x, mask)
        for y in found:
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)


def test_linen_and_bare_jax_refuse_variants_that_they_do_not_implement(programs):
    *_, linen, bare = programs
    x, config = jnp.ones((8, 5, 16)), MixingConfig(layer_norm=True)
    with pytest.raises(AssertionError, match="layer_norm=True"):
        linen["MixtureOfTokens"](group_size=4, num_experts=8, expert_dim=16, config=config).init(jax.random.key(0), x)
    with pytest.raises(AssertionError, match="layer_norm=True"):
        bare["mixture_of_tokens"](bare["init"](jax.random.key(0), 16, 8, 16), x, 4, config)


def test_the_variants_of_the_table_are_valid():
    configs = [eval(text) for text in re.findall(r"`(MixingConfig\(.*?\))`", KINDS_PAGE.read_text())]
    assert len(configs) == len(set(configs)) >= 14
    for config in configs:
        assert not list(mixing_errors(config))


def test_the_commands_that_reproduce_the_paper_are_valid(monkeypatch):
    """Every config of the paper has a command, and no two commands share a workdir."""
    started: list[tuple[str, Config]] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(training, "train", lambda config, workdir, *_: started.append((workdir, config)))
    commands = re.findall(r"`python train\.py (.*?)`", REPRODUCE.read_text())
    for command in commands:
        cli.main(["train", *command.split()])
    assert len(dict(started)) == len(commands)
    assert {command.split()[0] for command in commands} == {
        "configs/v1.py",
        "configs/v1.py:dense",
        *(f"configs/v2.py:{variant}" for variant in variants_of(ROOT / "configs" / "v2.py")),
    }


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("launch/*.md"), *ROOT.glob("models/*/*.md"), *ROOT.glob("docs/**/*.md")]
CURRENT = [page for page in PAGES if "notes" not in page.parts and page.name != "CHANGELOG.md"]  # not those of a date

STUB = """#!/bin/sh
printf '%s\\t' "$(basename "$0")" "$@" >> "$LOG"
echo >> "$LOG"
"""
# Of `python3 -m venv .venv`: the commands that the installation adds are on the PATH only after the activation.
VENV = """#!/bin/sh
test "$*" = "-m venv .venv" || exit 1
mkdir -p .venv/bin
echo 'PATH=$PWD/.venv/bin:$PATH' > .venv/bin/activate
for name in python pip mot tfds pre-commit mkdocs jupyter; do cp stub .venv/bin/$name; done
"""


class ParsedError(Exception):
    """The arguments of a command have been parsed, and the config that they give is valid."""


@pytest.fixture
def parse_only(monkeypatch):
    """parse_only(arguments): the errors of the arguments of `mot`, with the demo's config for a run's directory."""

    def stop_after(parse):
        def stopped(*arguments):
            parse(*arguments)
            raise ParsedError

        return stopped

    def load(target):
        return load_config(target if ".py" in target else "configs/demo.py")

    monkeypatch.chdir(ROOT)
    for command_module in (bench, convert, data, models, runs, tuning):
        for name in ("parse", "parse_with_config", "parse_with_config_flags"):
            if hasattr(command_module, name):
                monkeypatch.setattr(command_module, name, stop_after(getattr(parsing, name)))
    monkeypatch.setattr(parsing, "load_target", load)
    monkeypatch.setattr(restore, "load_run_config", load)

    def errors(arguments: list[str]) -> list[str]:
        try:
            parsing.dispatch("mot", "", cli.COMMANDS, arguments)
        except UserError as error:
            return str(error).splitlines()
        except (ParsedError, SystemExit):
            return []
        raise AssertionError(f"{arguments} ran")

    return errors


def arguments_of_mot(call: list[str]) -> list[str]:
    """Those of `mot` in a call of it, of `python train.py`, or of a launcher; none of another program."""
    if call[:2] == ["python", "train.py"]:
        return ["train", *call[2:]]
    return call[call.index("mot") + 1 :] if "mot" in call else []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_commands_are_found_in_the_order_in_which_they_are_printed(tmp_path, parse_only, name):
    """And their arguments are valid.

    In a new shell without `mot`; a page of docs/ comes after the first block of the README.
    """
    commands = re.findall(r"^```bash\n(.*?)^```$", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
    if name.startswith("docs"):
        commands = re.findall(r"^```bash\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)[:1] + commands
    system = tmp_path / "system"
    system.mkdir()
    for tool in ("sh", "mkdir", "cp", "basename", "test"):
        (system / tool).symlink_to(shutil.which(tool))
    for tool, text in {"python3": VENV, "srun": STUB, "gcloud": STUB, "../stub": STUB}.items():
        (system / tool).write_text(text)
        (system / tool).chmod(0o755)
    env = {"PATH": str(system), "HOME": str(tmp_path), "LOG": str(tmp_path / "log")}
    shell = [shutil.which("bash"), "-e", "-o", "pipefail", "-c", "".join(commands)]
    result = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    calls = [line.split("\t")[:-1] for line in (tmp_path / "log").read_text().splitlines()]
    assert calls[0][:2] == ["pip", "install"]
    for call in calls:
        if arguments := arguments_of_mot(call):
            assert parse_only(arguments) == [], call


@pytest.mark.parametrize("page", sorted(CURRENT), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences_are_parsed(parse_only, page):
    """Whole ones and names, as `mot generate`; not patterns, as `mot describe [CONFIG]`."""
    for command in re.findall(r"`((?:mot|python train\.py) [^`]+)`", prose(page)):
        if not re.search(r"\.\.\.|…|[\[\]|]", command):
            arguments = arguments_of_mot(["1" if word == "N" else word for word in shlex.split(command)])
            assert all(" is missing; try " in fault for fault in parse_only(arguments)), command


def prose(page: Path) -> str:
    """The text of a page outside of fenced code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_have_no_placeholders_and_no_broken_links(page):
    text = prose(page)
    assert "@@" not in text
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


SOURCES = [path for folder in ("mot_jax", "configs", "tests", "launch") for path in (ROOT / folder).rglob("*.py")]


def test_code_names_pages_that_exist():
    named = {page for path in SOURCES for page in re.findall(r"docs/[\w./-]+\.md", path.read_text())}
    assert named and not [page for page in named if not (ROOT / page).exists()]
