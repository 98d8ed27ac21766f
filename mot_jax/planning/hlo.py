"""Parser of XLA's text of an optimized program. Every assumption about the format of that text is in this module.

The format is not stable: text that is not understood raises UnknownTextError, so that nothing is ignored silently.
Tested with the XLA of jax 0.10 and 0.12 on CPU, with libtpu 0.0.42, and with XLA's CUDA plugin for target GPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from mot_jax.errors import error_words

_BITS = {"pred": 8, "token": 0, "opaque": 0}


class UnknownTextError(ValueError):
    """The text of a program does not have the expected format."""


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Around code that reads a program: any of its errors is raised as UnknownTextError."""
    try:
        yield
    except UnknownTextError:
        raise
    except Exception as error:  # the code expects a format that the text does not have
        raise UnknownTextError(error_words(error)) from error


@dataclasses.dataclass(frozen=True)
class Array:
    """An array. in_hbm: it is placed in the chip's main memory, not in the core's own memory (`S(1)` in the layout)."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def bytes(self) -> float:
        """Bytes without the padding of the layout's tiles."""
        return math.prod(self.dims) * _bits(self.dtype) / 8

    @property
    def hbm_bytes(self) -> float:
        return self.bytes if self.in_hbm else 0.0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """name = opcode(operands), attributes.

    arrays: of the result; for a tuple its leaves in order. text: between the parentheses of the operands.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    attributes: str
    is_root: bool = False

    def called(self, *words: str) -> list[str]:
        """The names of the computations in these attributes."""
        values = re.findall(rf"\b(?:{'|'.join(words)})=(\{{[^}}]*\}}|%[\w.-]+)", self.attributes)
        return [name for value in values for name in re.findall(r"%([\w.-]+)", value)]

    def ints(self, attribute: str) -> tuple[int, ...]:
        """`attribute={1,2}` as numbers; () where it is absent."""
        match = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(map(int, filter(None, match[1].split(",")))) if match else ()

    @property
    def source(self) -> str:
        """Origin in the Python program, by JAX's name stack."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def root(self) -> Instruction:
        roots = [i for i in self.instructions.values() if i.is_root]
        if not roots:
            raise UnknownTextError(f"no ROOT in {self.name}")
        return roots[0]

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        parameters = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(parameters, key=lambda i: int(i.text))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str


@reading()
def parse(text: str) -> Module:
    """Parse the result of `compiled.as_text()`. Raises UnknownTextError."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    text = text.replace('": ', '":')  # in the configuration of XLA's backends, JSON, by some versions with spaces
    text = re.sub(r"kernel_metadata=\{\n.*\n\}", "kernel_metadata={}", text)  # the one attribute that spans lines
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$", line):
            current = computations[head[2]] = Computation(head[2])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and line.strip():
            instruction = _instruction(line)
            current.instructions[instruction.name] = instruction
    if not entry:
        raise UnknownTextError("the compiled program has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    head = re.match(r"\s*(ROOT )?%?([\w.-]+) = ", line)
    if not head:
        raise UnknownTextError(f"not an instruction: {line.strip()[:120]}")
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    call = re.match(r"\s*([\w-]+)\(", rest[end:])
    if not call:
        raise UnknownTextError(f"no opcode: {line.strip()[:120]}")
    opening = end + call.end() - 1
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.-]+)", inside)) if call[1] != "constant" else ()
    return Instruction(head[2], call[1], _arrays(rest[:end]), operands, inside, rest[closing + 1 :], bool(head[1]))


def _closing(text: str, opening: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise UnknownTextError(f"brackets do not close: {text[:120]}")


def _arrays(text: str) -> tuple[Array, ...]:
    """The leaves of a type such as `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`."""
    leaves = re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", text)
    return tuple(
        Array(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), not re.search(r"S\([1-9]\)", layout))
        for dtype, dims, layout in leaves
    )


@functools.cache
def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.match(r"[a-z]+(\d+)", dtype)
    if not match:
        raise UnknownTextError(f"an array of {dtype}")
    return int(match[1])


# --- groups of devices ------------------------------------------------------------------------------------------------


def device_groups(attributes: str, count: int) -> np.ndarray:
    """The `replica_groups` of a collective over `count` devices, int [groups, members]; devices in the mesh's order.

    The text has one of three forms: a list, `{{0,1},{2,3}}`; a reshaped and transposed range, `[2,2]<=[2,2]T(1,0)`; or
    axes of a mesh that the compiler defines, `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}`, in which `'a':(2)4`
    is a part of an axis.
    """
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]
        if len({len(group) for group in groups}) > 1:
            raise UnknownTextError(f"groups of unequal size: {match[0][:120]}")
        return np.array(groups or [list(range(count))])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+?),? ", attributes + " "):
        return _range(match[2]).reshape(_ints(match[1]))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        devices = _range(match[2]) if match[2] else np.arange(math.prod(sizes.values()))
        return _axes_of_mesh(sizes, devices, match[3])
    raise UnknownTextError(f"replica groups: {attributes[:160]}")


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _range(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: 0 … 7 in that shape, transposed and flattened. The numbers in the first brackets are a shape."""
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        raise UnknownTextError(f"an order of devices: {text[:120]}")
    shape = _ints(match[1])
    return np.arange(math.prod(shape)).reshape(shape).transpose(_ints(match[2]) if match[2] else None).ravel()


def _axes_of_mesh(sizes: dict[str, int], devices: np.ndarray, axes: str) -> np.ndarray:
    """The groups of devices along `axes` of a mesh, int [groups, members]."""
    axis_parts = {name: [size] for name, size in sizes.items()}
    selected = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        if before:
            left, part = int(before), int(size)
            axis_parts[name] = [left, part, sizes[name] // left // part]
        selected.append((name, 1 if before else 0))
    starts = dict(zip(axis_parts, np.cumsum([0, *map(len, axis_parts.values())]), strict=False))
    shape = [size for parts in axis_parts.values() for size in parts]
    inner = [int(starts[name]) + part for name, part in selected]
    outer = [axis for axis in range(len(shape)) if axis not in inner]
    grid = devices.reshape(shape).transpose(outer + inner)
    return grid.reshape(-1, math.prod(shape[axis] for axis in inner))


def device_pairs(attributes: str) -> list[tuple[int, int]]:
    """The `source_target_pairs` of a permutation."""
    match = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    if not match:
        raise UnknownTextError(f"source_target_pairs: {attributes[:160]}")
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", match[1])]


# --- FLOPs of products ------------------------------------------------------------------------------------------------


def product_flops(instruction: Instruction, operands: list[Instruction]) -> float:
    """FLOPs of a dot or convolution: a multiply-add is 2; products with padding or dilation holes are not counted."""
    out, (left, right) = instruction.arrays[0].dims, (operand.arrays[0].dims for operand in operands[:2])
    if instruction.opcode == "dot":
        return 2.0 * math.prod(out) * math.prod(left[d] for d in instruction.ints("lhs_contracting_dims"))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not labels:
        raise UnknownTextError(f"a convolution without dim_labels: {instruction.name}")
    left_size, kernel, out_size = (
        dict(zip(names, dims, strict=True)) for names, dims in zip(labels.groups(), (left, right, out), strict=True)
    )
    batch_groups = _group_count(instruction, "batch_group_count")
    total = 2.0 * kernel["i"] * out_size["f"] * left_size["b"] / batch_groups
    window = _window(instruction, sum(name.isdigit() for name in labels[3]))
    for d, (size, stride, pad, left_holes, right_holes) in enumerate(window):
        if size != kernel[str(d)]:
            raise UnknownTextError(f"a window of {size} over {kernel[str(d)]}: {instruction.name}")
        at = (np.arange(out_size[str(d)]) * stride - pad)[:, None] + np.arange(size) * right_holes
        whole = (left_size[str(d)] - 1) * left_holes + 1
        total *= ((at >= 0) & (at < whole) & (at % left_holes == 0)).sum()
    return float(total)


def library_flops(instruction: Instruction, operands: list[Instruction], target: str) -> float | None:
    """FLOPs of a call of cuBLAS or of an attention kernel, of cuDNN or JAX's splash attention; None for another call.

    Those of cuBLAS and cuDNN are in the configuration of the call. cuDNN's attention has two products forward and five
    backward, which recomputes the scores. Under a causal mask those of positions that attend to each other are counted:
    the kernels leave out the blocks above the diagonal.
    """
    if target.startswith(("__cublas$gemm", "__cublas$lt$matmul")):
        match = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        if not match:
            raise UnknownTextError(f"{target} without contracting dimensions: {instruction.name}")
        left = operands[0].arrays[0].dims
        return 2.0 * math.prod(instruction.arrays[0].dims) * math.prod(left[d] for d in _quoted(match[1]))
    if target.startswith("__cudnn$fmha"):
        pattern = r'"intermediate_tensor_shape":\{[^}]*?"dimensions":\[([^\]]*)\]'
        match = re.search(pattern, instruction.attributes)
        if not match:
            raise UnknownTextError(f"{target} without the shape of its scores: {instruction.name}")
        *batch, queries, keys = _quoted(match[1])
        causal = re.search(r'"mask_type":"(?:PADDING_)?CAUSAL"', instruction.attributes)
        pairs = sum(min(query + 1, keys) for query in range(queries)) if causal else queries * keys
        products = 5 if "Backward" in target else 2
        return 2.0 * products * math.prod(batch) * pairs * operands[0].arrays[0].dims[-1]
    match = re.match(r"splash_mha_(fwd|dq|dkv)_", instruction.name)
    if match and target == "tpu_custom_call":
        return _SPLASH_PRODUCTS[match[1]] * _splash_flops(instruction.name, [operand.arrays[0] for operand in operands])
    return None


# Matrix products of the kernels of splash attention. Both backward ones recompute the scores and the gradient of the
# attention weights.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def _splash_flops(name: str, operands: list[Array]) -> float:
    """FLOPs of one product of splash attention, for the blocks of scores that the kernel visits.

    The operands are, in this order: figures of the blocks of scores, integers [heads, n, n] for n x n blocks; queries
    [B, H, S, K] and keys, without B if it is 1; if `name` has `segmented`, the segments of both; if the mask is causal,
    the positions of the queries, int32 [S, 128] or [8, S]. Of n x n blocks, n (n + 1) / 2 are visited then.
    """
    first = next(number for number, array in enumerate(operands) if array.dtype[0] in "bf")
    queries, keys = operands[first : first + 2]
    *heads, length, width = queries.dims
    by_query = [array for array in operands[first:] if array.dims in ((length, 128), (8, length))]
    of_segments = 2 if "_segmented_" in name and len(heads) == 1 else 0  # else they have B, too
    pairs = length * keys.dims[-2]
    if len(by_query) > of_segments:
        blocks = operands[0].dims[-1] if first else 1
        pairs = pairs * (blocks + 1) // (2 * blocks)
    return 2.0 * math.prod(heads) * pairs * width


def _quoted(text: str) -> list[int]:
    """`"1","0"` as numbers."""
    return [int(n) for n in re.findall(r"\d+", text)]


def _group_count(instruction: Instruction, name: str) -> int:
    match = re.search(rf"{name}=(\d+)", instruction.attributes)
    return int(match[1]) if match else 1


def _window(instruction: Instruction, rank: int) -> list[tuple[int, int, int, int, int]]:
    """For each dimension: size, stride, padding before, dilation of the left operand, dilation of the kernel."""
    if not rank:
        return []
    match = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in match[1].split()) if match else {}
    if unknown := set(fields) - {"size", "stride", "pad", "lhs_dilate", "rhs_dilate", "rhs_reversal"}:
        raise UnknownTextError(f"a window with {', '.join(unknown)}: {instruction.name}")

    def column(name: str, default: str) -> list[int]:
        return [int(value.split("_")[0]) for value in fields.get(name, "x".join([default] * rank)).split("x")]

    columns = [column(*pair) for pair in (("size", "1"), ("stride", "1"), ("pad", "0"))]
    columns += [column("lhs_dilate", "1"), column("rhs_dilate", "1")]
    return list(zip(*columns, strict=True))


# --- copies -----------------------------------------------------------------------------------------------------------

COPIES = ("copy", "copy-start", "transpose")


@reading()
def count_copies(module: Module, min_bytes: int = 4096, opcodes: tuple[str, ...] = COPIES) -> int:
    """Instructions of a compiled program that copy or transpose at least `min_bytes`; a fusion counts as one."""
    computations = module.computations
    instructions = (i for computation in computations.values() for i in computation.instructions.values())
    fused = {name for i in instructions if i.opcode == "fusion" for name in i.called("calls")}

    def copies(instruction: Instruction) -> bool:
        if instruction.opcode == "fusion":
            called = (computations[name] for name in instruction.called("calls"))
            return any(copies(i) for computation in called for i in computation.instructions.values())
        return instruction.opcode in opcodes and instruction.arrays[0].bytes >= min_bytes

    not_fused = (computation for name, computation in computations.items() if name not in fused)
    return sum(copies(i) for computation in not_fused for i in computation.instructions.values())
