"""A trained model from its workdir or an export, only by reading: a training run may be writing there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from mot_jax.config import Config, ModelConfig, from_json
from mot_jax.errors import UserError
from mot_jax.nn.sharding import parameter_spec
from mot_jax.nn.transformer import Params, init_params
from mot_jax.runs.state import TrainState, abstract_state, spread
from mot_jax.runs.stores import orbax_path, quieten, unreadable
from mot_jax.runs.tensor_files import FLOATS, Tensors, holds_tensors, open_tensors
from mot_jax.runtime import distributed
from mot_jax.runtime.paths import user_path

EXPORTED_TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # what an export calls its own


class Run(NamedTuple):
    """config: of the run. params: by name, after `step` updates."""

    config: Config
    params: Params
    step: int


class Whole(NamedTuple):
    """All that a run needs to go on: its config, its state, and the next example of its text."""

    config: Config
    state: TrainState
    next_example: int


def load_run_config(workdir: epath.PathLike) -> Config:
    """The config of the run, or the export, in `workdir`, whose tokenizer is its own. Raises UserError if there is
    none.
    """
    workdir = user_path("workdir", workdir)
    if not workdir.is_dir():
        raise UserError(f"workdir = {workdir}: no such directory; try the --workdir of a training run")
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"workdir = {workdir}: holds no run (no config.json); try the --workdir of a training run")
    config = from_json(path.read_text())
    own = workdir / config.data.tokenizer
    if config.data.tokenizer in EXPORTED_TOKENIZERS and own.exists():
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(own)))
    return config


def check_data(data: dict[str, str], config: Config, workdir: epath.PathLike) -> None:
    """Raises UserError if the run in `workdir` reads other text: the standard library of another Python, say.

    data: fingerprints by their names in data.json; those that are not there are not compared.
    """
    path = epath.Path(workdir) / "data.json"
    there = json.loads(path.read_text()) if path.exists() else {}
    if "train" in there:
        there.setdefault("order", "1")  # runs from before the order had a version
    changes = {k: f"{k}: {there[k]} there, {data[k]} here" for k in data if there.get(k, data[k]) != data[k]}
    if "tokenizer" in changes:
        raise UserError(
            f"data.tokenizer = {config.data.tokenizer!r}: does not match the checkpoints in workdir = {workdir}, which "
            f"are of another tokenizer ({changes['tokenizer']}); try the file that the run began with, or another "
            "workdir"
        )
    if "order" in changes:
        raise UserError(
            f"workdir = {workdir} was trained with another version of the training order ({changes['order']}), which "
            "cannot be resumed; try another workdir"
        )
    if changes:
        raise UserError(
            *(f"workdir = {workdir} was trained on other text: {c}; try another workdir" for c in changes.values())
        )


def load_run(workdir: epath.PathLike, mesh: Mesh | None = None) -> Run:
    """The newest complete checkpoint of the run in `workdir`, or an export: its parameters, without the optimizer's
    state.

    They come to lie on `mesh`, on the mesh that is set where none is given, and where none is set on the first device;
    the mesh that they were trained on does not matter. Of several processes, each calls it. Raises UserError if there
    is no run, no checkpoint yet or a damaged one; RetryableError if it cannot be read now.
    """
    with distributed.together():
        config = load_run_config(workdir)
        abstract = _abstract_params(config, jax.sharding.get_mesh() if mesh is None else mesh)
        path = user_path("workdir", workdir)
        if holds_tensors(path):
            return _load_export(path, config, abstract)
    checkpoint, content = _load_newest(workdir, {"params": abstract})
    return Run(config, content["params"], int(checkpoint.name))


def load_whole(workdir: epath.PathLike, mesh: Mesh) -> Whole:
    """The newest complete checkpoint of the run in `workdir`, the optimizer's state too; otherwise as `load_run`."""
    with distributed.together():
        config = load_run_config(workdir)
        abstract = abstract_state(config, mesh)._asdict()
    checkpoint, content = _load_newest(workdir, abstract)
    with distributed.together():
        try:
            next_example = int(ocp.metadata(checkpoint).custom_metadata["next_example"])
        except Exception as error:  # as below
            raise unreadable(checkpoint, error, "has no readable metadata") from error
    return Whole(config, TrainState(**content), next_example)


def _load_newest(workdir: epath.PathLike, abstract: dict[str, Any]) -> tuple[epath.Path, dict[str, Any]]:
    """Those parts of the newest complete checkpoint, and where it is."""
    quieten()
    with distributed.together():
        folder = orbax_path(user_path("workdir", workdir) / "checkpoints")
    while True:
        step = _newest(folder)
        if step is None:
            raise UserError(f"workdir = {workdir}: has no checkpoint yet; try again after the run has saved one")
        content, fault = _load(folder / str(step), abstract)
        if not any(distributed.gather(fault is not None)):
            return folder / str(step), content
        if _newest(folder) == step:  # else the run saved a newer one, and may have deleted this one meanwhile
            with distributed.together():
                if fault is not None:
                    raise fault


def _load_export(folder: epath.Path, config: Config, abstract: dict[str, jax.ShapeDtypeStruct]) -> Run:
    """One stack after the other; each process keeps what its devices hold. Raises UserError with every fault."""
    found = open_tensors(folder)
    faults = tensor_faults(found, abstract, folder)
    step = found.metadata.get("step", "")
    if not step.isdecimal():
        faults.append(f"{folder}: its step is {step!r}, must be a number; export it again")
    if faults:
        raise UserError(*faults)
    values = ((name, found.tensors[name].read().astype(kind.dtype)) for name, kind in abstract.items())
    return Run(config, {name: spread(value, abstract[name].sharding) for name, value in values}, int(step))


def tensor_faults(found: Tensors, wanted: Mapping[str, jax.ShapeDtypeStruct], where: object) -> list[str]:
    """A line for each tensor that is missing, of another shape or dtype than wanted, or not wanted at all.

    A tensor may be narrower than wanted, which changes no value, but not wider. where: the tensors are, for people.
    """
    faults = [f"{name}: the model has no parameter for it" for name in found.tensors if name not in wanted]
    for name, kind in wanted.items():
        tensor = found.tensors.get(name)
        if tensor is None:
            faults.append(f"{name}: is missing, must have shape {kind.shape}")
        elif tensor.shape != kind.shape:
            faults.append(f"{name}: has shape {tensor.shape}, must have {kind.shape}")
        elif tensor.dtype not in FLOATS.values() or jnp.promote_types(tensor.dtype, kind.dtype) != kind.dtype:
            words = f"is {tensor.dtype}, must be {kind.dtype} or narrower; try model.param_dtype = 'float32'"
            faults.append(f"{name}: {words}")
    return [f"{where}: tensor {fault}" for fault in faults]


def _load(checkpoint: epath.Path, abstract: dict[str, Any]) -> tuple[dict[str, Any], UserError | None]:
    """Those parts of a checkpoint, or what is wrong with it."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # Alone: a process that cannot read would leave the others at a barrier of Orbax's for five minutes.
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    try:
        with context:
            content = ocp.load(checkpoint, abstract)
    except jax.errors.JaxRuntimeError:  # a lost process, say
        raise
    except Exception as error:  # Orbax raises whatever its parts do
        return {}, unreadable(checkpoint, error, "cannot be read")
    found = content["params"]
    missing = [name for name in abstract["params"] if not isinstance(found.get(name), jax.Array)]
    if missing:
        words = f"workdir = {checkpoint.parent.parent}: its checkpoint is of another mot_jax, without {missing[0]}"
        return {}, UserError(words)
    return content, None


def _newest(folder: epath.Path) -> int | None:
    """The step of the newest complete checkpoint, as process 0 sees it: a shared file system may show others less."""
    newest = None
    with distributed.together():
        if distributed.is_first():
            found = ocp.path.step.standard_name_format().find_all(folder) if folder.exists() else ()
            newest = max((checkpoint.step for checkpoint in found), default=None)
    return distributed.gather(newest)[0]


@lru_cache
def parameter_kinds(model: ModelConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a model's parameters, by name."""
    shapes = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    return {name: jax.ShapeDtypeStruct(shape.shape, shape.dtype) for name, shape in shapes.items()}


def _abstract_params(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    def place(name: str, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = parameter_spec(name, len(shape.shape))
        sharding = SingleDeviceSharding(jax.devices()[0]) if mesh.empty else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return {name: place(name, shape) for name, shape in parameter_kinds(config.model).items()}
