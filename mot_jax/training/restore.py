"""A trained model from its workdir, only by reading: a training run may be writing there."""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from mot_jax.config import Config, ConfigError, from_json
from mot_jax.model import Params, init_params
from mot_jax.paths import user_path
from mot_jax.sharding import parameter_spec
from mot_jax.training.stores import orbax_path


class Run(NamedTuple):
    """config: of the run. params: by name, after `step` updates."""

    config: Config
    params: Params
    step: int


def load_run_config(workdir: epath.PathLike) -> Config:
    """The config of the run in `workdir`. Raises ConfigError if there is none."""
    workdir = user_path("workdir", workdir)
    if not workdir.is_dir():
        raise ConfigError(f"workdir = {workdir}: no such directory; try the --workdir of a training run")
    path = workdir / "config.json"
    if not path.exists():
        raise ConfigError(f"workdir = {workdir}: holds no run (no config.json); try the --workdir of a training run")
    return from_json(path.read_text())


def check_data(data: dict[str, str], config: Config, workdir: epath.PathLike) -> None:
    """Raises ConfigError if the run in `workdir` reads other text: the standard library of another Python, say.

    data: fingerprints by their names in data.json; those that are not there are not compared.
    """
    path = epath.Path(workdir) / "data.json"
    there = json.loads(path.read_text()) if path.exists() else {}
    changes = {k: f"{k}: {there[k]} there, {data[k]} here" for k in data if there.get(k, data[k]) != data[k]}
    if "tokenizer" in changes:
        raise ConfigError(
            f"data.tokenizer = {config.data.tokenizer!r}: does not match the checkpoints in workdir = {workdir}, which "
            f"are of another tokenizer ({changes['tokenizer']}); try the file that the run began with, or another "
            "workdir"
        )
    if changes:
        raise ConfigError(
            *(f"workdir = {workdir} was trained on other text: {c}; try another workdir" for c in changes.values())
        )


def load_run(workdir: epath.PathLike, mesh: Mesh | None = None) -> Run:
    """The newest complete checkpoint of the run in `workdir`: its parameters, without the optimizer's state.

    They come to lie on `mesh`, on the mesh that is set where none is given, and where none is set on the first device;
    the mesh that they were trained on does not matter. Raises ConfigError if there is no run or no checkpoint yet.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it also raises, and much else
    config = load_run_config(workdir)
    abstract = _abstract_params(config, jax.sharding.get_mesh() if mesh is None else mesh)
    folder = orbax_path(user_path("workdir", workdir) / "checkpoints")
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    while True:
        step = _newest(folder)
        if step is None:
            raise ConfigError(f"workdir = {workdir}: has no checkpoint yet; try again after the run has saved one")
        try:
            with context:
                params = ocp.load(folder / str(step), {"params": abstract})["params"]
        except Exception:
            if _newest(folder) == step:
                raise
            continue  # the run saved a newer one, and may have deleted this one meanwhile
        missing = [name for name in abstract if not isinstance(params.get(name), jax.Array)]
        if missing:
            raise ConfigError(f"workdir = {workdir}: its checkpoint is of another mot_jax, without {missing[0]}")
        return Run(config, params, step)


def _newest(folder: epath.Path) -> int | None:
    """The step of the newest complete checkpoint."""
    found = ocp.path.step.standard_name_format().find_all(folder) if folder.exists() else ()
    return max((checkpoint.step for checkpoint in found), default=None)


def _abstract_params(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = jax.eval_shape(partial(init_params, config.model), jax.random.key(0))

    def place(name: str, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = parameter_spec(name, len(shape.shape))
        sharding = SingleDeviceSharding(jax.devices()[0]) if mesh.empty else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return {name: place(name, shape) for name, shape in shapes.items()}
