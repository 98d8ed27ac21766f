"""Load a trained model from its workdir or an export. Nothing is written: a training run may be using the workdir."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from mot_jax.config import Config, ModelConfig, from_json, model_changes
from mot_jax.data.fingerprints import load_fingerprints
from mot_jax.data.tokenizers import tokenizer_copy
from mot_jax.errors import RetryableError, UserError
from mot_jax.nn.sharding import parameter_spec
from mot_jax.nn.transformer import Params, init_params, init_router
from mot_jax.runs.manifest import left_out_lines, newest_intact, steps_of
from mot_jax.runs.state import COUNTERS, TrainState, abstract_state, spread, state_of
from mot_jax.runs.stores import by_itself, orbax_path, quieten, unreadable
from mot_jax.runs.tensor_files import FLOATS, Tensors, holds_tensors, open_tensors
from mot_jax.runtime import distributed, strict_json
from mot_jax.runtime.paths import read_file, user_path


class TrainedModel(NamedTuple):
    """A trained model: the config of its run, and its parameters and router state by name, after `step` updates."""

    config: Config
    params: Params
    step: int


class SavedTraining(NamedTuple):
    """All that another run needs to continue a run: config, state without counters, index of the next example."""

    config: Config
    state: TrainState
    next_example: int


def load_run_config(workdir: epath.PathLike) -> Config:
    """The config of the run or export in `workdir`, with its own copy of the tokenizer, if it has one.

    Raises UserError if there is neither.
    """
    workdir = user_path("workdir", workdir)
    if not workdir.is_dir():
        raise UserError(f"workdir = {workdir}: no such directory; try the --workdir of a training run")
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"workdir = {workdir}: holds no run (no config.json); try the --workdir of a training run")
    return with_tokenizer_copy(read_config(path), workdir)


def read_config(path: epath.Path) -> Config:
    """The config in the `config.json` of a run or an export. Raises UserError or RetryableError if it is unreadable."""
    return from_json(read_file(path, "use another workdir"), str(path))


def check_saved_config(checkpoint: epath.Path, saved: dict[str, Any] | None, config: Config) -> None:
    """Raise UserError if `config`, that of `config.json`, is of another model than the one that a checkpoint holds.

    saved: the config in the metadata of the checkpoint. It is not compared if it is None or of another format, both of
    other versions.
    """
    if saved is None:
        return
    try:
        trained = from_json(strict_json.dumps(saved))
    except UserError:
        return
    place, step = checkpoint.parent.parent / "config.json", checkpoint.name
    faults = [
        f"{place}: {name} = {new}: checkpoint {step} was trained with {old}; set it back"
        for name, *values in model_changes(trained, config)
        for old, new in [map(strict_json.dumps, values)]
    ]
    if faults:
        raise UserError(*faults)


def with_tokenizer_copy(config: Config, workdir: epath.Path) -> Config:
    """Return `config` with the copy of its tokenizer that the run or export in `workdir` has, if it has one."""
    copy = tokenizer_copy(workdir, config.data.tokenizer)
    if copy is None or not copy.exists():
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(copy)))


def check_data(data: dict[str, str], config: Config, workdir: epath.PathLike) -> None:
    """Raise UserError if the run in `workdir` reads other text, for example the standard library of another Python.

    data: fingerprints by their names in `data.json`; those that it lacks are not compared.
    """
    saved = load_fingerprints(epath.Path(workdir))
    if "train" in saved:
        saved.setdefault("order", "1")  # runs from before the order had a version
    changes = {k: f"{k}: {saved[k]} in the run, now {data[k]}" for k in data if saved.get(k, data[k]) != data[k]}
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


def load_run(workdir: epath.PathLike, mesh: Mesh | None = None, step: int | None = None) -> TrainedModel:
    """Load the parameters of an export, or of a checkpoint of the run in `workdir`.

    They are placed on `mesh`; if it is None, on the mesh that is set; if there is none, on the first device. The mesh
    of the training does not matter. With several processes, each calls this.

    Args:
        step: that of the checkpoint; None for the newest one that is intact, or for an export.

    Raises:
        UserError: if there is no run, no such checkpoint yet, or no intact one.
        RetryableError: if it cannot be read now.
    """
    with distributed.together():
        config = load_run_config(workdir)
        mesh = jax.sharding.get_mesh() if mesh is None else mesh
        params, router = (_placed(kinds(config.model), mesh) for kinds in (parameter_kinds, router_kinds))
        path = user_path("workdir", workdir)
        if holds_tensors(path):
            if step is not None:
                raise UserError(f"--step = {step}: {workdir} is an export, without checkpoints; try it without --step")
            return _load_export(path, config, params | router)
    abstract = {"params": params} | ({"router": router} if router else {})
    checkpoint, content, _ = _load_checkpoint(workdir, config, abstract, step)
    return TrainedModel(config, content["params"] | content.get("router", {}), int(checkpoint.name))


def load_training(workdir: epath.PathLike, mesh: Mesh) -> SavedTraining:
    """Load the whole state of the newest complete checkpoint of the run in `workdir`; otherwise as `load_run`."""
    with distributed.together():
        config = load_run_config(workdir)
        abstract = abstract_state(config, mesh).content()
        for name in COUNTERS:  # of the other run
            del abstract[name]
    checkpoint, content, metadata = _load_checkpoint(workdir, config, abstract)
    with distributed.together():
        try:
            next_example = int(metadata["next_example"])
        except (KeyError, TypeError, ValueError) as error:
            raise unreadable(checkpoint, error, "has no readable metadata") from error
    return SavedTraining(config, state_of(content), next_example)


def _load_checkpoint(
    workdir: epath.PathLike, config: Config, abstract: dict[str, Any], wanted: int | None = None
) -> tuple[epath.Path, dict[str, Any], dict[str, Any]]:
    """Load parts of a checkpoint, the newest that is intact if none is wanted.

    Returns its path, these parts, and its metadata.
    """
    quieten()
    with distributed.together():
        folder = orbax_path(user_path("workdir", workdir) / "checkpoints")
    while True:
        step, left_out = newest_intact(folder, step=wanted)
        problems = left_out_lines(folder, left_out)
        if step is None and not problems and wanted is not None:
            steps = distributed.from_first(lambda: steps_of(folder))
            raise UserError(f"--step = {wanted}: {workdir} has no such checkpoint; try one of {steps}, or no --step")
        if step is None:
            advice = "try again after the run has saved one"
            raise UserError(*problems or [f"workdir = {workdir}: has no checkpoint yet; {advice}"])
        content, metadata, read_error = _load(folder / str(step), config, abstract)
        if not any(distributed.gather(read_error is not None)):
            for problem in problems if distributed.is_first() else ():
                print(f"warning: {problem}; step {step} is used instead", file=sys.stderr)
            return folder / str(step), content, metadata
        if step in distributed.from_first(lambda: steps_of(folder)):  # else the run has removed it since
            with distributed.together():
                if read_error is not None:
                    raise read_error


def _load_export(folder: epath.Path, config: Config, abstract: dict[str, jax.ShapeDtypeStruct]) -> TrainedModel:
    """Load an export, one parameter at a time, of which each process retains its shards. Raises UserError."""
    file = open_tensors(folder)
    faults = tensor_faults(file, abstract, folder)
    step = file.metadata.get("step", "")
    if not step.isdecimal():
        faults.append(f"{folder}: its step is {step!r}, must be a number; export it again")
    if faults:
        raise UserError(*faults)
    values = ((name, file.tensors[name].read().astype(kind.dtype)) for name, kind in abstract.items())
    return TrainedModel(config, {name: spread(value, abstract[name].sharding) for name, value in values}, int(step))


def tensor_faults(file: Tensors, parameters: Mapping[str, jax.ShapeDtypeStruct], place: object) -> list[str]:
    """Compare the tensors of a file with the parameters of a model.

    The dtype of a tensor may be narrower than that of the parameter, since converting it changes no value; not wider.

    Returns:
        An error for each tensor that is missing, superfluous or of another shape or dtype, with `place` in front.
    """
    faults = [f"{name}: the model has no parameter for it" for name in file.tensors if name not in parameters]
    for name, kind in parameters.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            faults.append(f"{name}: is missing, must have shape {kind.shape}")
        elif tensor.shape != kind.shape:
            faults.append(f"{name}: has shape {tensor.shape}, must have {kind.shape}")
        elif jnp.issubdtype(kind.dtype, jnp.integer) and tensor.dtype != kind.dtype:
            faults.append(f"{name}: is {tensor.dtype}, must be {kind.dtype}; try mot export again")
        elif jnp.issubdtype(kind.dtype, jnp.floating) and not _is_narrower(tensor.dtype, kind.dtype):
            words = f"is {tensor.dtype}, must be {kind.dtype} or narrower; try model.param_dtype = 'float32'"
            faults.append(f"{name}: {words}")
    return [f"{place}: tensor {fault}" for fault in faults]


def _is_narrower(dtype: str, of: jnp.dtype) -> bool:
    """Whether `dtype` is a float type all of whose values `of` has too."""
    return dtype in FLOATS.values() and jnp.promote_types(dtype, of) == of


def _load(
    checkpoint: epath.Path, config: Config, abstract: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], UserError | RetryableError | None]:
    """Load parts of a checkpoint of `config`. Returns them and its metadata, or the error to raise."""
    context = by_itself()
    context.pytree.loading.partial_load = True
    try:
        with context:
            metadata = ocp.metadata(checkpoint).custom_metadata or {}
            check_saved_config(checkpoint, metadata.get("config"), config)
            content = ocp.load(checkpoint, abstract)
    except UserError as error:
        return {}, {}, error
    except jax.errors.JaxRuntimeError:  # for example a lost process
        raise
    except Exception as error:  # Orbax passes on all errors of the libraries below it
        return {}, {}, unreadable(checkpoint, error, "cannot be read")
    parts = [part for part in ("params", "router") if part in abstract]
    missing = [name for part in parts for name in abstract[part] if not isinstance(content[part].get(name), jax.Array)]
    if missing:
        place = f"workdir = {checkpoint.parent.parent}"
        return {}, {}, UserError(f"{place}: its checkpoint is of another mot_jax, without {missing[0]}")
    return content, metadata, None


def newest_step(folder: epath.Path) -> int | None:
    """The step of the newest complete checkpoint in `folder`, as process 0 sees it; None if there is none.

    On a shared file system, other hosts may still see an older state. With several processes, each calls this.
    """
    return distributed.from_first(lambda: max(steps_of(folder), default=None))


@lru_cache
def parameter_kinds(model: ModelConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a model's parameters, by name."""
    return _kinds(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))  # no device is used


@lru_cache
def router_kinds(model: ModelConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a model's router state, by name."""
    return _kinds(jax.eval_shape(partial(init_router, model)))


def _kinds(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape.shape, shape.dtype) for name, shape in shapes.items()}


def _placed(kinds: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays with their shardings on a mesh, or on JAX's default device if it is empty."""

    def place(name: str, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = parameter_spec(name, len(shape.shape))
        (device,) = jax.device_put(0).devices()
        sharding = SingleDeviceSharding(device) if mesh.empty else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return {name: place(name, shape) for name, shape in kinds.items()}
