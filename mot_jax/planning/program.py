"""FLOPs, bytes and collectives of a compiled program, from its optimized text (`hlo.py`); loops are multiplied out.

A *body* is a part of the program that is executed a known number of times: the program itself, or the body of a loop.
    JAX's scans are loops; the text contains their trip count, or their condition implies it.
A *kernel* is an instruction of a body that computes, reads or writes: a fusion, product, call, copy or collective.
FLOPs: those of dots, convolutions, and calls of cuBLAS and of cuDNN's attention, a multiply-add being 2. Elementwise
    operations are not counted.
HBM bytes: read and written by the instructions of a body. A fusion is one instruction, whose intermediate values stay
    on the chip. An operand of which only a slice is read counts as that slice, and an in-place update as the updated
    part. Arrays in the core's own memory cost nothing. Padding of tiles and repeated reads are not counted: a lower
    bound.
Collectives: each once, asynchronous or not, inside a fusion or not. Their `bytes` are those of the whole array that one
    chip contributes; for an all-gather, of the array that it receives.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator

import numpy as np

from mot_jax.planning import hlo
from mot_jax.planning.hlo import Computation, Instruction, Module, UnknownTextError

SLICES = "slices"  # axis of collectives over the data-center network between slices
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that neither read nor write memory.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "partition-id"}
_FREE |= {"replica-id", "add-dependency", "send", "recv"}
_FREE_CALLS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding"}
# The collective is an instruction of its own. The last two, of TPU7x, are libtpu's with jax 0.10.
_FREE_CALLS |= {"AsyncCollectiveStart", "AsyncCollectiveDone", "PrepareAsyncCallStart", "PrepareAsyncCallDone"}
_ASYNC_CALLS = ("async-start", "call-start")  # of a computation, such as a collective on a TPU7x chip's SparseCores
# Calls without matrix products: of XLA for GPUs, and JAX's random numbers.
_NO_PRODUCTS = ("__cub$", "__gpu$TopK", "cu_threefry2x32")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective.

    axes: of the mesh; () if no set of axes has these groups; ("slices",) for the separate collectives that XLA creates
    between slices. bytes: per execution and chip. members: the devices of one group, as indices into the mesh; for a
    permutation, every device that sends, each followed by the one that it sends to. executions: per step. others: the
    other groups of devices, which communicate at the same time.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    members: tuple[int, ...]
    executions: int
    source: str
    others: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel, with FLOPs and HBM bytes of one execution.

    kind: `Triton product`, `cuBLAS product`, `cuDNN attention`, `splash attention`, `product` (another, with
    elementwise operations fused into it), `copy`, `collective`, `custom call`, or `other`. dtype: of the operands of
    its products, in XLA's names; "" without products. overlaps: whether it runs next to other kernels: asynchronous
    copies, and collectives.
    """

    name: str
    kind: str
    flops: float
    hbm_bytes: float
    dtype: str = ""
    overlaps: bool = False


@dataclasses.dataclass(frozen=True)
class Body:
    """A body: the kernels of one execution on one chip, and its executions per step."""

    name: str
    executions: int
    kernels: tuple[Kernel, ...]

    @property
    def flops(self) -> float:
        """FLOPs of one execution."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def hbm_bytes(self) -> float:
        """HBM bytes of one execution."""
        return sum(kernel.hbm_bytes for kernel in self.kernels)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    bodies: the whole program first. unknown: descriptions of everything that was not understood and is missing from the
    figures. overcounted: of everything that is in them although a step may not execute it.
    """

    bodies: tuple[Body, ...]
    collectives: tuple[Collective, ...]
    unknown: tuple[str, ...]
    overcounted: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the figures are those of a step."""
        return not (self.unknown or self.overcounted)

    @property
    def bound(self) -> str:
        """How the figures compare with those of a step, in words that precede them; empty if they are exact."""
        if self.exact:
            return ""
        return "about " if self.unknown and self.overcounted else "at least " if self.unknown else "at most "

    @property
    def flops(self) -> float:
        """FLOPs of one step on one chip."""
        return sum(body.executions * body.flops for body in self.bodies)

    @property
    def hbm_bytes(self) -> float:
        """HBM bytes of one step on one chip."""
        return sum(body.executions * body.hbm_bytes for body in self.bodies)

    def by_kind(self) -> dict[str, dict[str, float]]:
        """`executions`, `flops` and `hbm_bytes` of a step on one chip by kind of kernel, the most FLOPs first."""
        kinds: dict[str, dict[str, float]] = {}
        for body in self.bodies:
            for kernel in body.kernels:
                total = kinds.setdefault(kernel.kind, {"executions": 0, "flops": 0.0, "hbm_bytes": 0.0})
                total["executions"] += body.executions
                total["flops"] += body.executions * kernel.flops
                total["hbm_bytes"] += body.executions * kernel.hbm_bytes
        return dict(sorted(kinds.items(), key=lambda item: (-item[1]["flops"], -item[1]["hbm_bytes"])))


@hlo.reading()
def read_program(module: Module, mesh_shape: dict[str, int], slices: int = 1, kernels: bool = True) -> Program:
    """Analyze a parsed program.

    Args:
        module: The result of `hlo.parse`.
        mesh_shape: Sizes of the mesh's axes, in order.
        slices: Number of slices. They are along the first axis of size > 1, and XLA's program is that of one slice.
        kernels: Whether hand-written kernels are counted, as reading each operand and writing each result once. Pass
            False to count their traffic separately.

    Raises:
        UnknownTextError: If the text cannot be understood.
    """
    first = next((name for name, size in mesh_shape.items() if size > 1), None)
    slice_shape = {name: size // (slices if name == first else 1) for name, size in mesh_shape.items()}
    return _Reader(module, slice_shape, slices, kernels).read()


class _Reader:
    """One analysis of a program."""

    def __init__(self, module: Module, mesh_shape: dict[str, int], slices: int, kernels: bool):
        self.slices = slices
        self.free_calls = _FREE_CALLS if kernels else {*_FREE_CALLS, "tpu_custom_call"}
        self.computations = module.computations
        self.entry = module.computations[module.entry]
        self.axes = _axes_by_groups(mesh_shape)
        self.places = np.arange(int(np.prod([1, *mesh_shape.values()]))).reshape(tuple(mesh_shape.values()))
        self.names = tuple(mesh_shape)
        self.bodies: list[Body] = []
        self.collectives: list[Collective] = []
        self.unknown: dict[str, None] = {}
        self.overcounted: dict[str, None] = {}

    def read(self) -> Program:
        self._body(self.entry, 1, "once a step")
        return Program(tuple(self.bodies), tuple(self.collectives), tuple(self.unknown), tuple(self.overcounted))

    def _body(self, computation: Computation, executions: int, name: str) -> None:
        place = len(self.bodies)
        kernels = tuple(self._without_loops(computation, executions))
        self.bodies.insert(place, Body(name, executions, kernels))

    def _without_loops(self, computation: Computation, executions: int) -> list[Kernel]:
        """The kernels of a computation without those of its loops, which become separate bodies."""
        kernels: list[Kernel] = []
        chains: set[str] = set()
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                trips = self._trips(computation, instruction)
                if trips is None:
                    self.unknown[f"trip count of {instruction.name} ({instruction.source}): counted once"] = None
                for body in instruction.called("body") if trips != 0 else ():
                    name = f"{instruction.source or instruction.name} x {trips or 'unknown'}"
                    self._body(self.computations[body], executions * (trips or 1), name)
            elif instruction.opcode in ("call", "conditional"):
                if instruction.opcode == "conditional":
                    self.overcounted[f"branch taken by {instruction.name}: all branches are counted"] = None
                words = ("to_apply", "branch_computations", "true_computation", "false_computation")
                for called in instruction.called(*words):
                    kernels += self._without_loops(self.computations[called], executions)
            else:
                kernels += self._kernels(computation, instruction)
                self._collect(computation, instruction, executions, chains)
        return kernels

    def _kernels(self, computation: Computation, instruction: Instruction) -> list[Kernel]:
        """The kernel of an instruction; [] for one that costs nothing."""
        products = self._products(computation, instruction)
        flops, size = sum(products.values()), self._bytes(computation, instruction)
        if not flops and not size:
            return []
        dtype = max(products, key=products.__getitem__) if products else ""
        kind = self._kind(instruction, flops)
        overlaps = kind == "collective" or (instruction.opcode.endswith("-start") and not flops)
        return [Kernel(instruction.name, kind, flops, size, dtype, overlaps)]

    def _kind(self, instruction: Instruction, flops: float) -> str:
        opcode = instruction.opcode
        if opcode == "custom-call":
            target = _target(instruction)
            libraries = {"__cublas": "cuBLAS product", "__cudnn": "cuDNN attention"}
            other = "splash attention" if flops else "custom call"
            return next((kind for name, kind in libraries.items() if target.startswith(name)), other)
        if flops:
            return "Triton product" if '"kind":"__triton' in instruction.attributes else "product"
        inside = (i.opcode for c in self._inside(instruction) for i in c.instructions.values())
        if any(name.removesuffix("-start") in KINDS for name in (opcode, *inside)):
            return "collective"
        return "copy" if opcode in ("copy", "transpose") or opcode.endswith("-start") else "other"

    def _inside(self, instruction: Instruction) -> list[Computation]:
        """The computations that a fusion or an asynchronous start executes."""
        word = {"fusion": "calls", "async-start": "calls", "call-start": "to_apply"}.get(instruction.opcode)
        return [self.computations[name] for name in instruction.called(word)] if word else []

    def _products(self, computation: Computation, instruction: Instruction) -> dict[str, float]:
        """FLOPs by the dtype of the operands: float32 where one of them is."""
        operands, flops = computation.operands(instruction), None
        if instruction.opcode in ("dot", "convolution"):
            flops = hlo.product_flops(instruction, operands)
        elif instruction.opcode == "custom-call":
            target = _target(instruction)
            flops = hlo.library_flops(instruction, operands, target)
            if flops is None and target not in self.free_calls and not target.startswith(_NO_PRODUCTS):
                self.unknown[f"FLOPs of the custom call {target}"] = None
        if flops is not None:
            dtypes = [operand.arrays[0].dtype for operand in operands]
            if instruction.opcode == "custom-call" and _target(instruction) == "tpu_custom_call":
                dtypes = [dtype for dtype in dtypes if dtype[0] in "bf"]  # queries and keys follow on integers
            dtypes = dtypes[:2]
            return {"f32" if "f32" in dtypes else dtypes[0]: flops}
        total: dict[str, float] = {}
        for inside in self._inside(instruction):
            for part in inside.instructions.values():
                for dtype, part_flops in self._products(inside, part).items():
                    total[dtype] = total.get(dtype, 0.0) + part_flops
        return total

    # --- bytes --------------------------------------------------------------------------------------------------------

    def _bytes(self, computation: Computation, instruction: Instruction) -> float:
        opcode, operands = instruction.opcode, computation.operands(instruction)
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0.0
        if opcode == "custom-call" and _target(instruction) in self.free_calls:
            return 0.0
        kind = opcode.removesuffix("-start")
        results = instruction.arrays
        if opcode == "custom-call" and _target(instruction).startswith(("__cublas", "__cudnn")):
            results = tuple(a for a in results if a.dtype != "s8") or results  # the library's workspace
        if opcode.endswith("-start") and opcode not in _ASYNC_CALLS:  # the result is one of the operation's arrays
            if kind == "copy":
                results = results[:1]
            elif kind != "all-reduce":  # whose start has no array but its results
                results = results[len(operands) : 2 * len(operands)]
        if kind in ("dynamic-slice", "slice", "gather"):
            return (operands[0].arrays[0].in_hbm + results[0].in_hbm) * results[0].bytes
        if kind == "dynamic-update-slice":
            return operands[1].arrays[0].hbm_bytes + operands[0].arrays[0].in_hbm * operands[1].arrays[0].bytes
        if opcode == "fusion":
            return self._fusion_bytes(self._inside(instruction)[0], instruction, operands)
        if opcode in _ASYNC_CALLS:
            return sum(self._bytes(c, i) for c in self._inside(instruction) for i in c.instructions.values())
        return sum(a.hbm_bytes for operand in operands for a in operand.arrays) + sum(a.hbm_bytes for a in results)

    def _fusion_bytes(self, inside: Computation, instruction: Instruction, operands: list[Instruction]) -> float:
        read = sum(
            self._read(inside.name, number) for number, operand in enumerate(operands) if operand.arrays[0].in_hbm
        )
        root = inside.root
        written = inside.operands(root) if root.opcode == "tuple" else [root]
        if len(written) != len(instruction.arrays):
            return read + sum(a.hbm_bytes for a in instruction.arrays)
        return read + sum(
            self._written(inside, part) for part, a in zip(written, instruction.arrays, strict=True) if a.in_hbm
        )

    @functools.cache  # noqa: B019  a reader is used for one program only
    def _read(self, name: str, parameter: int) -> float:
        """Bytes of one of its parameters that a fused computation reads."""
        inside = self.computations[name]
        return self._read_of(inside, inside.parameters[parameter])

    def _read_of(self, inside: Computation, value: Instruction) -> float:
        whole, total = sum(a.bytes for a in value.arrays), 0.0
        for user in inside.users[value.name]:
            first = user.operands[0] == value.name
            if user.opcode == "bitcast":
                total += self._read_of(inside, user)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and first:
                total += user.arrays[0].bytes
            elif user.opcode == "dynamic-update-slice" and first:
                pass  # in place: the part that is not updated is not read
            elif user.opcode == "fusion":
                called = user.called("calls")[0]
                total += sum(self._read(called, n) for n, name in enumerate(user.operands) if name == value.name)
            else:
                return whole
        return min(total, whole)

    def _written(self, inside: Computation, part: Instruction) -> float:
        """Bytes of this part of its result that a fused computation writes."""
        if part.opcode == "bitcast":
            return self._written(inside, inside.operands(part)[0])
        if part.opcode == "dynamic-update-slice":
            return inside.operands(part)[1].arrays[0].bytes
        if part.opcode == "fusion" and len(part.arrays) == 1:
            nested = self._inside(part)[0]
            return self._written(nested, nested.root)
        return sum(a.bytes for a in part.arrays)

    # --- collectives --------------------------------------------------------------------------------------------------

    def _collect(
        self,
        computation: Computation,
        instruction: Instruction,
        executions: int,
        chains: set[str],
        scatters: bool = False,
    ) -> None:
        """Record the collectives of an instruction.

        chains: identifiers of the collective chains of this body that are recorded already. scatters: whether an
        all-reduce inside is one half of a reduce-scatter.
        """
        # libtpu writes a reduce-scatter as a fusion of an all-reduce and the slice of it that a chip retains.
        scatters |= "AllReduceScatterFusion" in instruction.attributes
        for inside in self._inside(instruction):
            for part in inside.instructions.values():
                self._collect(inside, part, executions, chains, scatters)
        kind = instruction.opcode.removesuffix("-start")
        kind = "reduce-scatter" if scatters and kind == "all-reduce" else kind
        if kind == "send":  # between slices; each has its `recv`
            match = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
            kind = match[1].lower().replace("_", "-") if match else kind
            kind = "collective-permute" if kind == "one-to-one" else kind if kind in KINDS else "send"
        if kind in ("send", "ragged-all-to-all", "collective-broadcast"):
            self.unknown[f"{instruction.opcode} {instruction.name} ({instruction.source}): not counted"] = None
        if kind not in KINDS:
            return
        # A collective that overlaps with a chain of fusions appears in each of them in libtpu's text.
        if chain := re.search(r'chain_id="\d+"', instruction.attributes):
            if chain[0] in chains:
                return
            chains.add(chain[0])
        size = sum(a.bytes for operand in computation.operands(instruction) for a in operand.arrays)
        axes: tuple[str, ...]
        others: list[tuple[int, ...]] = []
        if instruction.opcode == "send":
            axes, members = (SLICES,), tuple(range(0, self.slices * self.places.size, self.places.size))
        elif kind == "collective-permute":
            axes, members = self._permutation(hlo.device_pairs(instruction.attributes))
        else:
            groups = hlo.device_groups(instruction.attributes, self.places.size)
            members, *others = map(tuple, groups.tolist())
            axes = self.axes.get(_key(groups), ())
        if len(members) > 1:
            size *= len(members) if kind == "all-gather" else 1
            source = instruction.source
            self.collectives.append(Collective(kind, axes, size, members, executions, source, tuple(others)))

    def _permutation(self, pairs: list[tuple[int, int]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The axes along which data moves; each device that sends, followed by the one that it sends to."""
        moves = [pair for pair in pairs if pair[0] != pair[1]]
        if not moves:
            return (), ()
        a, b = (np.stack(np.unravel_index(ends, self.places.shape)) for ends in zip(*moves, strict=True))
        axes = (name for name, moved in zip(self.names, (a != b).any(axis=1), strict=True) if moved)
        return tuple(axes), tuple(itertools.chain(*moves))

    # --- loops --------------------------------------------------------------------------------------------------------

    def _trips(self, caller: Computation, loop: Instruction) -> int | None:
        """Trip count of a loop; None if neither the text nor the condition determines it."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition, body = (self.computations[loop.called(word)[0]] for word in ("condition", "body"))
        start = caller.operands(loop)[0]
        test = condition.root
        if test.opcode != "compare" or "direction=LT" not in test.attributes or start.opcode != "tuple":
            return None
        counter, limit = condition.operands(test)
        if counter.opcode != "get-tuple-element":
            return None
        number = _element(counter)
        first, last = _constant(caller, caller.operands(start)[number]), _constant(condition, limit)
        if last is None and limit.opcode == "get-tuple-element":  # carried through the loop
            last = _constant(caller, caller.operands(start)[_element(limit)])
        step = self._increment(body, number)
        if first is None or last is None or not step:
            return None
        return max(0, -(-(last - first) // step))

    def _increment(self, body: Computation, number: int) -> int | None:
        if body.root.opcode != "tuple":
            return None
        add = _through(body, body.operands(body.root)[number])
        if add.opcode != "add":
            return None
        steps = [_constant(body, part) for part in body.operands(add)]
        return next((step for step in steps if step is not None), None)


def _target(instruction: Instruction) -> str:
    match = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return match[1] if match else instruction.name


def _element(instruction: Instruction) -> int:
    match = re.search(r"index=(\d+)", instruction.attributes)
    if not match:
        raise UnknownTextError(f"a get-tuple-element without index: {instruction.name}")
    return int(match[1])


def _through(computation: Computation, instruction: Instruction) -> Instruction:
    """Skip copies and bitcasts: the instruction whose value this is."""
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        instruction = computation.operands(instruction)[0]
    return instruction


def _constant(computation: Computation, instruction: Instruction) -> int | None:
    source = _through(computation, instruction)
    return int(source.text) if source.opcode == "constant" and re.fullmatch(r"-?\d+", source.text) else None


def _key(groups: np.ndarray) -> frozenset[frozenset[int]]:
    return frozenset(frozenset(group) for group in groups.tolist())


def _axes_by_groups(mesh_shape: dict[str, int]) -> dict[frozenset[frozenset[int]], tuple[str, ...]]:
    """The axes of a mesh by the device groups of a collective over them; for equal groups the smallest set of axes."""
    sizes = list(mesh_shape.items())
    grid = np.arange(int(np.prod([1, *mesh_shape.values()]))).reshape([size for _, size in sizes])
    wide = [axis for axis, (_, size) in enumerate(sizes) if size > 1]
    axes_of: dict[frozenset[frozenset[int]], tuple[str, ...]] = {}
    for chosen in _subsets(wide):
        outer = [axis for axis in range(len(sizes)) if axis not in chosen]
        members = int(np.prod([1, *(sizes[axis][1] for axis in chosen)]))
        groups = grid.transpose([*outer, *chosen]).reshape(-1, members)
        axes_of.setdefault(_key(groups), tuple(sizes[axis][0] for axis in chosen))
    return axes_of


def _subsets(axes: list[int]) -> Iterator[tuple[int, ...]]:
    for count in range(1, len(axes) + 1):
        yield from itertools.combinations(axes, count)
