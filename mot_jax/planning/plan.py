"""`mot plan`: ahead-of-time compilation of a config's training step for a target topology, and its figures."""

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

from mot_jax.config import Config, check
from mot_jax.cost.describe import table
from mot_jax.cost.flops import flops_per_token
from mot_jax.cost.hardware import GPUS, Topology, hardware_of, parse_topology, peak_flops
from mot_jax.data.objectives import Batch
from mot_jax.errors import UserError
from mot_jax.nn.sharding import batch_multiple, batch_sharding, make_mesh
from mot_jax.planning import hlo
from mot_jax.planning.checkpoints import BANDWIDTH, CheckpointBytes, checkpoint_bytes
from mot_jax.planning.hlo import UnknownTextError
from mot_jax.planning.nvidia import Products, compile_for, devices_of_gpus, without_cudnn
from mot_jax.planning.program import Collective, Program, read_program
from mot_jax.planning.times import StepTimes, label, model_times
from mot_jax.runs.state import TrainState, abstract_state
from mot_jax.training.step import make_train_step

LARGEST = 8  # number of tensors listed if a program does not fit
SHARE_OF_PEAK = 0.7  # of matrix products, in the second set of times
SMALL = 2**16  # bytes below which collectives share a row


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training step on a topology. All bytes, FLOPs and seconds are for one device and one step.

    chips: number of devices, of which a chip of TPU7x has two.
    memory: bytes by purpose; `HBM limit` and `needed` are None if unknown. largest: (bytes, description) of tensors of
    the traced program, and advice: changes of the config, if it does not fit. program, times: None if it does not fit;
    times also if the device's figures are not known. times_below_peak: with products at SHARE_OF_PEAK of the peak.
    efficiency: roofline MFU, that of `times`, without and with overlap, by the FLOPs of the model, or of the program if
    it has fewer; None if the times lack a part of the program that was not understood; efficiency_below_peak: that of
    `times_below_peak`. notes: about the sharding and the attention of the program. checkpoint: of all devices and of a
    host. copies: the number of instructions of the program that copy or transpose an array, and transposes, of those
    that transpose; None if it does not fit.
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
    times: StepTimes | None
    efficiency: tuple[float, float] | None
    notes: tuple[str, ...] = ()
    times_below_peak: StepTimes | None = None
    efficiency_below_peak: tuple[float, float] | None = None
    checkpoint: CheckpointBytes | None = None
    copies: int | None = None
    transposes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        content = dataclasses.asdict(self)
        if self.program:
            content["program"] |= {"flops": self.program.flops, "hbm_bytes": self.program.hbm_bytes}
            for collective in content["program"]["collectives"]:
                members = collective.pop("members")
                del collective["others"]
                collective["group_size"] = 2 if collective["kind"] == "collective-permute" else len(members)
            for body, figures in zip(self.program.bodies, content["program"]["bodies"], strict=True):
                figures |= {"flops": body.flops, "hbm_bytes": body.hbm_bytes, "kernels": len(body.kernels)}
            content["program"]["kernels"] = self.program.by_kind()
        return content

    def lines(self) -> list[str]:
        """Plain text for a terminal."""
        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        memory = [(n, "unknown" if size is None else f"{size / 2**30:,.3f}") for n, size in self.memory.items()]
        title = f"{self.topology}: {self.chips:,} devices ({self.device_kind}), {self.slices} slice(s), mesh {mesh}"
        out = [title, *self.notes, "", *table("GiB per device", memory)]
        if self.checkpoint:
            title = f"Checkpoint, GiB, and seconds at {BANDWIDTH / 1e9:.0f} GB/s per host"
            out += table(title, self.checkpoint.rows())
        if not self.fits:
            out += table("It does not fit. Largest tensors (some may be fused away), MiB per device", self._largest())
            return [*out, "Changes that reduce memory:", *(f"  {line}" for line in self.advice)]
        assert self.program
        flops = [("of the model, 3 x forward", self.model_flops / 1e9), ("of the program", self.program.flops / 1e9)]
        out += table("GFLOPs per device and step", flops)
        out += table(
            "Kernels, per device and step",
            [("", "executions", "GFLOPs", "GiB read and written"), *self._kernel_rows()],
        )
        out += table(
            "Collectives, per device and step",
            [("", "in the program", "executions", "MiB per execution", "MiB"), *self._collective_rows()],
        )
        out += [f"not understood: {description}" for description in self.program.unknown]
        out += [f"not known: {description}" for description in self.program.overcounted]
        return [*out, *self._time_lines()]

    def _largest(self) -> list[tuple[str | float, ...]]:
        return [(description, size / 2**20) for size, description in self.largest]

    def _kernel_rows(self) -> list[tuple[str, int, float, float]]:
        assert self.program
        return [
            (kind, int(total["executions"]), total["flops"] / 1e9, total["hbm_bytes"] / 2**30)
            for kind, total in self.program.by_kind().items()
        ]

    def _collective_rows(self) -> list[tuple[str, int, int, float, float]]:
        """A row for each set of equal collectives, the largest first; those of an axis below SMALL share one."""
        assert self.program
        groups: dict[tuple[str, float], list[Collective]] = {}
        for c in self.program.collectives:
            name, size = (label(c), c.bytes) if c.bytes >= SMALL else (f"{label(c)}, small", 0.0)
            groups.setdefault((name, size), []).append(c)
        rows = []
        for (name, _), equal in groups.items():
            largest, total = max(c.bytes for c in equal), sum(c.executions * c.bytes for c in equal)
            rows.append((name, len(equal), sum(c.executions for c in equal), largest / 2**20, total / 2**20))
        return sorted(rows, key=lambda row: -row[-1])

    def _time_lines(self) -> list[str]:
        if not (self.times and self.program):
            return ["No modeled time: the peak, memory bandwidth or network of these devices is not known."]
        t, bound = self.times, self.program.bound
        parts = {"kernels bound by FLOPs": t.compute, "kernels bound by HBM": t.hbm, **t.collectives}
        rows: list[tuple[str | float, ...]] = [(name, 1e3 * s, f"{s / t.serial:.1%}") for name, s in parts.items()]
        lines = table("Modeled milliseconds", rows)
        below_peak = f", products at {SHARE_OF_PEAK:.0%} of peak"
        cases = [("", t, self.efficiency), (below_peak, self.times_below_peak, self.efficiency_below_peak)]
        for case, times, efficiency in cases:
            if times:
                mfu = [f", roofline MFU {share:.1%}" for share in efficiency or ()] or ["", ""]
                lines += [
                    f"  without overlap{case}  {bound}{1e3 * times.serial:,.2f} ms{mfu[0]}; "
                    f"largest part: {times.bound}",
                    f"  full overlap{case}     {bound}{1e3 * times.overlapped:,.2f} ms{mfu[1]}; "
                    f"bound by: {times.overlapped_bound}",
                ]
        return lines


def plan_training(
    config: Config,
    topology: str,
    slices: int = 1,
    progress: Callable[[str], None] = lambda line: None,
    chips: int | None = None,
    products: Products = "triton",
) -> Plan:
    """Compile the training step of `config` for `topology`.

    Args:
        config: An experiment.
        topology: Name of the target topology (`cost.hardware.parse_topology`).
        slices: Number of slices of that topology.
        progress: Receives lines about the progress.
        chips: Use only so many of the devices, the first ones; None uses all.
        products: Of a GPU: matrix products as Triton fusions or calls of cuBLAS.

    Returns:
        Memory, collectives and modeled times.

    Raises:
        UserError: For an invalid config, or an impossible topology or mesh, before anything is compiled.
    """
    check(config)
    target = parse_topology(topology, slices)
    devices = devices_of(target)[:chips]
    notes: list[str] = []
    if target.hardware and target.hardware.name in GPUS:
        config, note = without_cudnn(config)
        notes += [note] if note else []
    mesh = _mesh(config, devices)
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
    hardware, limit = hardware_of(devices[0]), _limit(target, devices[0])
    memory = _state_bytes(state)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        progress(f"tracing the training step for {mesh.size:,} devices")
        t = config.training
        train_step = make_train_step(config.model, t.optimizer, t.steps, t.losses, t.gradient_accumulation_steps)
        traced = jax.jit(train_step, donate_argnums=0).trace(state, batch)
        progress(f"compiling it for {topology}: a minute or more for large models")
        try:
            compiled = compile_for(devices[0], traced.lower(), products if target.hardware else None)
            module = hlo.parse(compiled.as_text() or "")
            program = read_program(module, dict(mesh.shape), target.slices)
            copies, transposes = hlo.count_copies(module), hlo.count_copies(module, opcodes=("transpose",))
            memory |= _program_bytes(compiled.memory_analysis(), limit, devices[0].platform)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if "memory space vmem" in str(error):
                field, kernel = "model.feed_forward.kernel", getattr(config.model.feed_forward, "kernel", "xla")
                if kernel == "xla":
                    field, kernel = "model.attention_kernel", config.model.attention_kernel
                raise UserError(f"{field} = {kernel!r}: needs more than a core's memory; try 'xla'") from None
            program, copies, transposes = None, None, None
            memory |= _refused_bytes(str(error), limit)
        except UnknownTextError as error:
            raise UserError(
                f"the text of the compiled program is not understood: {error}; try the versions in requirements.lock"
            ) from error
    seconds = time.perf_counter() - start
    progress(f"compiled it in {seconds:.1f} s")
    needed = memory["needed"]
    fits = program is not None and (needed is None or limit is None or needed <= limit)
    model_flops = flops_per_token(config) * config.training.batch_size * config.model.context_length / mesh.size
    peak = peak_flops(devices[0], config.model.dtype)
    # Kernels of attention skip masked blocks of scores, all of which are the model's.
    useful = min(model_flops, program.flops) if program else model_flops
    ideal, times, times_below_peak = useful / (peak or 1), None, None
    if fits and program and hardware and peak:
        flat = list(mesh.devices.flat)
        times = model_times(program, hardware, peak, flat)
        times_below_peak = model_times(program, hardware, peak, flat, SHARE_OF_PEAK)
    understood = program is not None and program.exact

    def efficiency(times: StepTimes | None) -> tuple[float, float] | None:
        return (ideal / times.serial, ideal / times.overlapped) if times and understood else None

    return Plan(
        topology=topology,
        device_kind=devices[0].device_kind,
        chips=mesh.size,
        slices=target.slices,
        mesh=dict(mesh.shape),
        seconds_to_compile=seconds,
        memory=memory,
        fits=fits,
        largest=[] if fits else largest_tensors(traced.jaxpr.jaxpr)[:LARGEST],
        advice=[] if fits else _advice(config, mesh),
        model_flops=model_flops,
        program=program if fits else None,
        times=times,
        efficiency=efficiency(times),
        notes=(*notes, *_notes(config, mesh)),
        times_below_peak=times_below_peak,
        efficiency_below_peak=efficiency(times_below_peak),
        checkpoint=checkpoint_bytes(state.content()),
        copies=copies if fits else None,
        transposes=transposes if fits else None,
    )


def _notes(config: Config, mesh: Mesh) -> tuple[str, ...]:
    kind, devices = config.model.feed_forward, mesh.shape["expert"]
    if kind.experts_share_computation or devices == 1:
        return ()
    rule = f"{kind.kind} without a capacity: each device computes for the tokens of all {devices} along this axis"
    return (f"mesh.expert = {devices}: {rule}, which divides the experts' weights and not their computation",)


# --- devices ----------------------------------------------------------------------------------------------------------


def devices_of(topology: Topology) -> list[jax.Device]:
    """The devices of a topology: those of this process, or target devices of libtpu or of XLA's CUDA plugin."""
    if topology.hardware is None:
        if topology.chips:
            with contextlib.suppress(RuntimeError):  # JAX is initialized and its number of devices fixed
                jax.config.update("jax_num_cpu_devices", topology.chips)
        devices = jax.devices()
        if topology.chips and topology.chips > len(devices):
            raise UserError(f"--topology = {topology.name}: there are {len(devices)} devices; try local:{len(devices)}")
        return devices[: topology.chips]
    jax.config.update("jax_platforms", "cpu")  # the target devices are not attached: no plugin looks for them
    if topology.hardware.name in GPUS:
        return devices_of_gpus(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology = {topology.name}: needs libtpu, which is missing; try pip install 'jax[tpu]'")
    # libtpu reads these when it is initialized, and would otherwise look for a TPU or query the metadata server.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used, so none needs locking
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.hardware.name == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as in JAX
    try:
        return list(topologies.get_topology_desc(topology.name, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology = {topology.name}: refused by libtpu ({str(error).splitlines()[0]})") from None


def _mesh(config: Config, devices: list[jax.Device]) -> Mesh:
    mesh = make_mesh(config, devices)
    if mesh.size != len(devices):
        raise UserError(f"mesh = {dict(mesh.shape)}: leaves some of {len(devices)} devices idle; try --mesh.data -1")
    return mesh


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of the microbatches of a batch, the step's input."""
    t, sharding = config.training, batch_sharding(mesh, leading=1)
    shape = (t.gradient_accumulation_steps, t.batch_size // t.gradient_accumulation_steps, config.model.context_length)

    def array(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    segments = array(jnp.int32) if config.model.document_mask else None
    return Batch(array(jnp.int32), array(jnp.int32), array(jnp.bool_), array(jnp.bool_), segments)


# --- memory -----------------------------------------------------------------------------------------------------------


def _state_bytes(state: TrainState) -> dict[str, float | None]:
    def size(tree: Any) -> float:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    return {"parameters": size(state.variables), "optimizer": size(state.opt_state)}


def _limit(target: Topology, device: jax.Device) -> float | None:
    """Bytes that a program may take: of an attached device those that this process may allocate."""
    if target.hardware:
        return target.hardware.hbm_bytes
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def _program_bytes(analysis: Any, limit: float | None, platform: str) -> dict[str, float | None]:
    """Memory by the compiler's analysis. Outputs in the buffers of donated arguments are counted once.

    `temporaries` is the memory allocated for them, including gaps; `in use at once` is the part that is live at the
    peak, including arrays in the core's own memory. It is given for TPUs only: the peak that the CPU compiler reports
    does not include temporaries.
    """
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = {"arguments": arguments, "temporaries": temporaries}
    if platform == "tpu":
        memory["in use at once"] = analysis.peak_memory_in_bytes - arguments - outputs
    rest = outputs + analysis.generated_code_size_in_bytes
    return {**memory, "other outputs and code": rest, "needed": arguments + temporaries + rest, "HBM limit": limit}


def _refused_bytes(message: str, limit: float | None) -> dict[str, float | None]:
    """Parse libtpu's message about a program that does not fit: `… (24.13G) exceeds available HBM (15.75G)`."""
    number = r"([\d.]+)([KMGT]?)"
    forms = [rf"\({number}\) exceeds available HBM \({number}\)", rf"Used {number} of {number} hbm"]
    for form in forms:
        if match := re.search(form, message):
            sizes = [float(match[i]) * 1024 ** " KMGT".index(match[i + 1] or " ") for i in (1, 3)]
            return {"needed": sizes[0], "HBM limit": sizes[1]}
    return {"needed": None, "HBM limit": limit}


def largest_tensors(jaxpr: Any) -> list[tuple[float, str]]:
    """(bytes per device; dtype, shape and origin) of the results of a traced program's equations, the largest first."""
    sizes: dict[str, float] = {}
    for equation in _equations(jaxpr):
        for variable in equation.outvars:
            aval = variable.aval
            if getattr(aval, "shape", ()) and hasattr(aval.dtype, "itemsize"):
                in_shard_map = any(kind == AxisType.Manual for kind in aval.sharding.mesh.axis_types)
                shape = aval.shape if in_shard_map else aval.sharding.shard_shape(aval.shape)
                origin = str(equation.source_info.name_stack) or "the step"
                description = f"{aval.dtype.name}{list(shape)} {equation.primitive.name} in {origin}"
                sizes[description] = math.prod(shape) * aval.dtype.itemsize
    return sorted(((size, description) for description, size in sizes.items()), reverse=True)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        inner_jaxprs = list(jax.extend.core.jaxprs_in_params(equation.params))
        yield from [] if inner_jaxprs and equation.primitive.name == "jit" else [equation]
        for inner in inner_jaxprs:
            yield from _equations(inner)


def _advice(config: Config, mesh: Mesh) -> list[str]:
    """Changes of the config that reduce the memory of a step."""
    m, t = config.model, config.training
    axes = "--mesh.fsdp or --mesh.expert" if hasattr(m.feed_forward, "num_experts") else "--mesh.fsdp"
    advice = [f"a larger {axes}, to split parameters and optimizer state"]
    if getattr(m.feed_forward, "save_for_backward", "nothing") != "nothing":
        advice.append("--model.feed-forward.save-for-backward nothing")
    if m.remat != "blocks":
        advice.append("--model.remat blocks")
    steps = 2 * t.gradient_accumulation_steps
    advice.append(
        f"--training.gradient-accumulation-steps {steps}, if a microbatch still has whole groups on every chip"
    )
    half = t.batch_size // 2
    if half % (batch_multiple(config, mesh) * t.gradient_accumulation_steps) == 0 < half:
        advice.append(f"--training.batch-size {half}")
    return [*advice, "more devices"]
