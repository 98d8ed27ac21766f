"""`mot plan`: the training step of a config, compiled for a machine that need not be here, in numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from mot_jax.config import Config, MixtureOfTokensConfig
from mot_jax.cost.describe import table
from mot_jax.cost.flops import flops_per_token
from mot_jax.cost.hardware import Hardware, Topology, hardware_of, parse_topology, peak_flops
from mot_jax.data.objectives import Batch
from mot_jax.errors import UserError
from mot_jax.nn.sharding import make_mesh, rows_sharding
from mot_jax.planning import hlo
from mot_jax.planning.hlo import UnknownTextError
from mot_jax.planning.program import Collective, Program, read_program
from mot_jax.planning.times import Times, label, model_times
from mot_jax.runs.state import TrainState, abstract_state
from mot_jax.training.step import make_train_step

LARGEST = 8  # tensors that are named when a program does not fit
SMALL = 2**16  # bytes, of collectives that share a row


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training step on a machine. All bytes, FLOPs and seconds are of one chip and one step.

    memory: bytes by what they hold; `HBM limit` and `needed` may be None where nobody knows. largest: (bytes, what) of
    the traced program's tensors, and advice: what to change, where it does not fit. program, times: None where it does
    not fit; times also where the machine's figures are not known. efficiency: modelled MFU without and with overlap;
    None where something of the program was not understood, which the times lack.
    """

    topology: str
    device_kind: str
    chips: int
    slices: int
    mesh: dict[str, int]
    seconds_to_compile: float
    memory: dict[str, float | None]
    fits: bool
    largest: list[tuple[float, str]]
    advice: list[str]
    model_flops: float
    program: Program | None
    times: Times | None
    efficiency: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        content = dataclasses.asdict(self)
        if self.program:
            content["program"] |= {"flops": self.program.flops, "hbm_bytes": self.program.hbm_bytes}
            for collective in content["program"]["collectives"]:
                collective["group_size"] = len(collective.pop("members"))
        return content

    def lines(self) -> list[str]:
        """Plain text for a terminal."""
        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        memory = [(n, "unknown" if size is None else f"{size / 2**30:,.3f}") for n, size in self.memory.items()]
        title = f"{self.topology}: {self.chips:,} chips ({self.device_kind}), {self.slices} slice(s), mesh {mesh}"
        out = [title, "", *table("GiB per chip", memory)]
        if not self.fits:
            out += table("It does not fit. Largest tensors (some may be fused away), MiB per chip", self._largest())
            return [*out, "What to change:", *(f"  {line}" for line in self.advice)]
        assert self.program
        flops = [("of the model, 3 x forward", self.model_flops / 1e9), ("of the program", self.program.flops / 1e9)]
        out += table("GFLOPs per chip and step", flops)
        out += table(
            "Collectives, per chip and step", [("", "in the program", "runs", "MiB a run", "MiB"), *self._rows()]
        )
        out += [f"not understood: {what}" for what in self.program.unknown]
        return [*out, *self._time_lines()]

    def _largest(self) -> list[tuple[str | float, ...]]:
        return [(what, size / 2**20) for size, what in self.largest]

    def _rows(self) -> list[tuple[str, int, int, float, float]]:
        """One row for equal collectives, the largest first; those below SMALL of an axis share one."""
        assert self.program
        groups: dict[tuple[str, float], list[Collective]] = {}
        for c in self.program.collectives:
            name, size = (label(c), c.bytes) if c.bytes >= SMALL else (f"{label(c)}, small ones", 0.0)
            groups.setdefault((name, size), []).append(c)
        rows = []
        for (name, _), found in groups.items():
            largest, total = max(c.bytes for c in found), sum(c.executions * c.bytes for c in found)
            rows.append((name, len(found), sum(c.executions for c in found), largest / 2**20, total / 2**20))
        return sorted(rows, key=lambda row: -row[-1])

    def _time_lines(self) -> list[str]:
        if not (self.times and self.program):
            return ["No modelled time: this machine's peak, memory bandwidth or network is not in the table."]
        t, least = self.times, "at least " if self.program.unknown else ""
        serial, overlapped = (f", MFU {share:.1%}" for share in self.efficiency) if self.efficiency else ("", "")
        parts = {"computation bound by FLOPs": t.compute, "computation bound by HBM": t.hbm, **t.collectives}
        rows: list[tuple[str | float, ...]] = [(name, 1e3 * s, f"{s / t.serial:.1%}") for name, s in parts.items()]
        return [
            *table("Modelled milliseconds", rows),
            f"  without overlap  {least}{1e3 * t.serial:,.2f} ms{serial}; most of it: {t.bound}",
            f"  full overlap     {least}{1e3 * t.overlapped:,.2f} ms{overlapped}; bound by: {t.overlapped_bound}",
        ]


def plan_training(
    config: Config,
    topology: str,
    slices: int = 1,
    say: Callable[[str], None] = lambda line: None,
    chips: int | None = None,
) -> Plan:
    """Compiles the training step of `config` for `topology` and says what it needs. `say`: progress, in lines.

    chips: for the first so many of them; None: for all.

    Raises UserError for a topology or a mesh that cannot be, before anything is compiled.
    """
    where = parse_topology(topology, slices)
    devices = devices_of(where)[:chips]
    mesh = _mesh(config, devices)
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
    hardware = hardware_of(devices[0])
    memory = _state_bytes(state)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        say(f"tracing the training step for {mesh.size:,} devices")
        traced = jax.jit(make_train_step(config), donate_argnums=0).trace(state, batch)
        say(f"compiling it for {topology}: a minute or more for large models")
        try:
            compiled = traced.lower().compile()
            program = read_program(hlo.parse(compiled.as_text()), dict(mesh.shape), where.slices)
            memory |= _program_bytes(compiled.memory_analysis(), _limit(hardware, devices[0]), devices[0].platform)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if "memory space vmem" in str(error):
                kernel = getattr(config.model.feed_forward, "kernel", "xla")
                words = "more of a core's memory than there is; try 'xla', and attention_kernel = 'xla'"
                raise UserError(f"model.feed_forward.kernel = {kernel!r}: the compiler wants {words}") from None
            program = None
            memory |= _refused_bytes(str(error), _limit(hardware, devices[0]))
        except UnknownTextError as error:
            raise UserError(f"the compiled program cannot be read: {error}; try the versions of the lock") from error
    seconds = time.perf_counter() - start
    say(f"compiled it in {seconds:.1f} s")
    needed, limit = memory["needed"], memory["HBM limit"]
    fits = program is not None and (needed is None or limit is None or needed <= limit)
    model_flops = flops_per_token(config) * config.training.batch_size * config.model.context_length / mesh.size
    peak = peak_flops(devices[0], config.model.dtype)
    ideal, times = model_flops / (peak or 1), None
    if fits and program and hardware and peak and (hardware.dcn_bandwidth or mesh.size <= hardware.chips):
        times = model_times(program, hardware, peak, list(mesh.devices.flat))
    return Plan(
        topology=topology,
        device_kind=devices[0].device_kind,
        chips=mesh.size,
        slices=where.slices,
        mesh=dict(mesh.shape),
        seconds_to_compile=seconds,
        memory=memory,
        fits=fits,
        largest=[] if fits else largest_tensors(traced.jaxpr.jaxpr)[:LARGEST],
        advice=[] if fits else _advice(config),
        model_flops=model_flops,
        program=program if fits else None,
        times=times,
        efficiency=(ideal / times.serial, ideal / times.overlapped)
        if times and program and not program.unknown
        else None,
    )


# --- the machine ------------------------------------------------------------------------------------------------------


def devices_of(where: Topology) -> list[jax.Device]:
    """The devices of a topology: those that are here, or those that libtpu compiles for."""
    if where.hardware is None:
        if where.chips:
            with contextlib.suppress(RuntimeError):  # JAX is awake: its devices are what they are
                jax.config.update("jax_num_cpu_devices", where.chips)
        devices = jax.devices()
        if where.chips and where.chips > len(devices):
            raise UserError(f"--topology = {where.name}: there are {len(devices)} devices; try local:{len(devices)}")
        return devices[: where.chips]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology = {where.name}: needs libtpu, which is not here; try pip install 'mot_jax[tpu]'")
    # libtpu reads these when it wakes up, and would otherwise look for a TPU, or ask the cloud's metadata server.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used: nobody's lock is in the way
    options: dict[str, Any] = {"num_slices": where.slices} if where.slices > 1 else {}
    if where.hardware.name == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as JAX has it
    try:
        return list(topologies.get_topology_desc(where.name, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology = {where.name}: libtpu refuses it ({str(error).splitlines()[0]})") from None


def _mesh(config: Config, devices: list[jax.Device]) -> Mesh:
    mesh = make_mesh(config, devices)
    if mesh.size != len(devices):
        raise UserError(f"the mesh {dict(mesh.shape)} leaves chips of the {len(devices)} idle; try --mesh.data -1")
    return mesh


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a batch's microbatches, as the step takes them."""
    t, rows = config.training, rows_sharding(mesh, leading=1)
    shape = (t.gradient_accumulation_steps, t.batch_size // t.gradient_accumulation_steps, config.model.context_length)

    def array(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    segments = array(jnp.int32) if config.model.document_mask else None
    return Batch(array(jnp.int32), array(jnp.int32), array(jnp.bool_), array(jnp.bool_), segments)


# --- memory -----------------------------------------------------------------------------------------------------------


def _state_bytes(state: TrainState) -> dict[str, float | None]:
    def size(tree: Any) -> float:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    return {"parameters": size(state.params), "optimizer": size(state.opt_state)}


def _limit(hardware: Hardware | None, device: jax.Device) -> float | None:
    if hardware:
        return hardware.hbm_bytes
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def _program_bytes(analysis: Any, limit: float | None, platform: str) -> dict[str, float | None]:
    """The compiler's own figures. Outputs that take the place of arguments are counted once.

    `temporaries` is what is set aside for them, gaps between them included; of it `in use at once` is live at the peak,
    with what lies in the core's own memory. It is said of a TPU alone: the peak of a CPU's compiler has no temporaries.
    """
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = {"arguments": arguments, "temporaries": temporaries}
    if platform == "tpu":
        memory["in use at once"] = analysis.peak_memory_in_bytes - arguments - outputs
    more = outputs + analysis.generated_code_size_in_bytes
    return {**memory, "other outputs and code": more, "needed": arguments + temporaries + more, "HBM limit": limit}


def _refused_bytes(message: str, limit: float | None) -> dict[str, float | None]:
    """What libtpu says when a program does not fit: `… temporaries (24.13G) exceeds available HBM (15.75G)`."""
    number = r"([\d.]+)([KMGT]?)"
    forms = [rf"\({number}\) exceeds available HBM \({number}\)", rf"Used {number} of {number} hbm"]
    for form in forms:
        if found := re.search(form, message):
            sizes = [float(found[i]) * 1024 ** " KMGT".index(found[i + 1] or " ") for i in (1, 3)]
            return {"needed": sizes[0], "HBM limit": sizes[1]}
    return {"needed": None, "HBM limit": limit}


def largest_tensors(jaxpr: Any) -> list[tuple[float, str]]:
    """(bytes per chip, dtype, shape and origin) of what a traced program computes, the largest of each kind first."""
    found: dict[str, float] = {}
    for equation in _equations(jaxpr):
        for variable in equation.outvars:
            aval = variable.aval
            if getattr(aval, "shape", ()) and hasattr(aval.dtype, "itemsize"):
                inside = any(kind == AxisType.Manual for kind in aval.sharding.mesh.axis_types)  # of a shard_map
                shape = aval.shape if inside else aval.sharding.shard_shape(aval.shape)
                origin = str(equation.source_info.name_stack) or "the step"
                what = f"{aval.dtype.name}{list(shape)} {equation.primitive.name} in {origin}"
                found[what] = math.prod(shape) * aval.dtype.itemsize
    return sorted(((size, what) for what, size in found.items()), reverse=True)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        inner = list(jax.extend.core.jaxprs_in_params(equation.params))
        yield from [] if inner and equation.primitive.name == "jit" else [equation]
        for inside in inner:
            yield from _equations(inside)


def _advice(config: Config) -> list[str]:
    """What makes a step smaller, that this config does not do yet."""
    m, t = config.model, config.training
    advice = ["a larger --mesh.fsdp or --mesh.expert, which split parameters and optimizer state"]
    if isinstance(m.feed_forward, MixtureOfTokensConfig) and m.feed_forward.save_for_backward != "nothing":
        advice.append("--model.feed-forward.save-for-backward nothing")
    if m.remat != "blocks":
        advice.append("--model.remat blocks")
    advice.append(
        f"--training.gradient_accumulation_steps {2 * t.gradient_accumulation_steps}, if a microbatch still has whole groups on every chip"
    )
    return [*advice, f"--training.batch-size {t.batch_size // 2}", "more chips"]
