"""Former names of fields and values: each is refused in one line that has the present name."""

import dataclasses
import json

import pytest

from mot_jax.cli import parsing
from mot_jax.config import (
    Config,
    MixtureOfTokensConfig,
    TokenChoiceConfig,
    check,
    fields,
    from_json,
    load_config,
    to_json,
)
from mot_jax.config.renamed import FIELDS, VALUES
from mot_jax.errors import UserError

RENAMED = [(cls, old, new) for cls, names in FIELDS.items() for old, new in names.items()]
PLACES = {
    "MixingConfig": "model.feed_forward.mixing",
    "MixtureOfTokensConfig": "model.feed_forward",
    "TokenChoiceConfig": "model.feed_forward",
    "ModelConfig": "model",
    "DataConfig": "data",
    "TrainingConfig": "training",
    "OptimizerConfig": "training.optimizer",
    "CheckpointConfig": "checkpoint",
}


def config_with(cls: str) -> Config:
    """A config that has an instance of this class."""
    kind = TokenChoiceConfig() if cls == "TokenChoiceConfig" else MixtureOfTokensConfig()
    return dataclasses.replace(Config(), model=dataclasses.replace(Config().model, feed_forward=kind))


def line_of(error: pytest.ExceptionInfo[UserError]) -> str:
    (line,) = error.value.faults
    assert "\n" not in line
    return line


@pytest.mark.parametrize(("cls", "old", "new"), RENAMED)
def test_new_names_are_fields_and_old_ones_are_not(cls, old, new):
    names = {field.name for field in dataclasses.fields(getattr(fields, cls))}
    assert new in names and old not in names


@pytest.mark.parametrize(("cls", "old", "new"), RENAMED)
def test_an_old_name_in_json(cls, old, new):
    content = json.loads(to_json(config_with(cls)))
    group = content
    for part in PLACES[cls].split("."):
        group = group[part]
    group[old] = group.pop(new)
    with pytest.raises(UserError) as error:
        from_json(json.dumps(content))
    assert line_of(error) == f"{PLACES[cls]}.{old}: is now {PLACES[cls]}.{new}"


def test_json_of_an_older_format():
    with pytest.raises(UserError) as error:
        from_json('{"version": 2, "model": {"stacked": true}}')
    assert line_of(error).startswith("config.json: version = 2: this mot_jax reads version 3; use the mot_jax that")


@pytest.mark.parametrize(("cls", "old", "new"), RENAMED)
def test_an_old_name_in_a_config_file(cls, old, new, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"from mot_jax.config import *\n\n\ndef get_config():\n    return {cls}({old}=1)\n")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert line_of(error) == f"config = {path}, line 5: {cls}.{old}: is now {cls}.{new}"


@pytest.mark.parametrize(("cls", "old", "new"), RENAMED)
def test_an_old_name_of_a_flag(cls, old, new):
    old, new = (f"--{PLACES[cls]}.{name}".replace("_", "-") for name in (old, new))
    for flags in ([old, "1"], [f"{old}=1"]):
        with pytest.raises(UserError) as error:
            parsing.override("mot train", config_with(cls), flags, [])
        assert line_of(error) == f"{flags[0]}: is now {new}"


def test_an_old_name_of_a_negated_flag():
    with pytest.raises(UserError) as error:
        parsing.override("mot train", Config(), ["--model.no-stacked"], [])
    assert line_of(error) == "--model.no-stacked: is now --model.no-scan-layers"


@pytest.mark.parametrize(("old", "new"), VALUES["kernel"].items())
def test_an_old_value(old, new):
    start = f"model.feed_forward.kernel = {old!r}: is now {new!r}"
    config = config_with("MixtureOfTokensConfig")
    kind = dataclasses.replace(config.model.feed_forward, kernel=old)
    broken = dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=kind))
    for refuse in (lambda: check(broken), lambda: from_json(to_json(broken))):
        with pytest.raises(UserError) as error:
            refuse()
        assert line_of(error).startswith(start)
    with pytest.raises(UserError) as error:
        parsing.override("mot train", config, ["--model.feed-forward.kernel", old], [])
    assert line_of(error) == start
