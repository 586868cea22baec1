"""The text of a compiled program as a list of kernels: what each reads and writes, computes, and belongs to.

On a GPU or a TPU every instruction of the scheduled program that computes is one kernel. Its bytes follow from the
shapes of what it takes and gives, and its operations from the matrix products and convolutions in it; elementwise
operations are not counted.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier")
FREE += ("partition-id", "replica-id", "domain", "conditional")
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
PARTS = ("slice", "dynamic-slice", "gather")  # they read no more than they give
CALLS = ("call", "async-start", "while")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the text: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str:
        """What the group of `pattern` matches among the attributes, or ''."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]  # by name, in order


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, or a copy in the background, and how often it runs."""

    op_name: str  # where it comes from: 'jit(step)/jvp(...)/Generator/conv_in/...'
    times: int
    is_copy: bool
    bytes: int  # read and written in the device's main memory
    operations: dict[str, float]  # by type: 'bf16', 'f32', or 'highest' for float32 that is not rounded
    cycles: int  # that the compiler expects, on a TPU


def kernels(text: str) -> list[Kernel]:
    """Those of a compiled program, as `compiled.as_text()` gives it."""
    program, entry = parse(text)
    return list(_kernels(program, entry, 1))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """(the computations of a program by name, the name of the first)."""
    program: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = program[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line):
            instruction = _instruction(found[2], found[3], bool(found[1]))
            current[instruction.name] = instruction
    return program, entry


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    shape = rest[: _closing(rest, 0)] if rest.startswith("(") else rest.partition(" ")[0]
    opcode, _, _ = rest[len(shape) + 1 :].partition("(")
    start = len(shape) + 1 + len(opcode)
    end = _closing(rest, start)
    names = {"constant": "$^", "parameter": r"(\d+)"}.get(opcode, r"%([\w.\-]+)")  # or the number of the parameter
    operands = tuple(re.findall(names, rest[start:end]))
    return Instruction(name, shape, opcode, operands, rest[end:], is_root)


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for bracket in re.finditer(r"[()]", text[start:]):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return start + bracket.end()
    return len(text)


# --- Shapes -----------------------------------------------------------------------------------------------------


@functools.cache
def arrays(shape: str) -> tuple[tuple[str, tuple[int, ...], bool], ...]:
    """(type, sizes, is it in main memory?) of each array of a shape, which is one or a tuple."""
    found = re.findall(r"\b(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape)
    return tuple((kind, tuple(map(int, filter(None, sizes.split(",")))), "S(" not in at) for kind, sizes, at in found)


def width(kind: str) -> float:
    """Bytes of a number: 2 of a bf16."""
    bits = re.search(r"\d+", kind)
    return int(bits[0]) / 8 if bits else 1 if kind == "pred" else 0


def size(shape: str) -> int:
    """Bytes of a shape, without what lies in a chip's own memory."""
    return int(sum(width(kind) * math.prod(sizes) for kind, sizes, in_main in arrays(shape) if in_main))


# --- What a kernel moves ----------------------------------------------------------------------------------------


def _kernels(program: dict[str, Computation], name: str, times: int) -> Iterator[Kernel]:
    computation = program[name]
    for one in computation.values():
        if one.opcode in CALLS:
            turns = int(one.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1)
            yield from _kernels(program, one.attribute(r"(?:body|to_apply|calls)=%?([\w.\-]+)"), times * turns)
        elif one.opcode not in FREE and not one.opcode.endswith("-done") and not one.opcode.startswith(COLLECTIVES):
            yield Kernel(
                one.attribute(r'op_name="([^"]*)"'),
                times,
                one.opcode.endswith("-start"),
                moved(program, computation, one),
                operations(program, computation, one),
                int(one.attribute(r'"estimated_cycles":"(\d+)"') or 0),
            )


def moved(program: dict[str, Computation], computation: Computation, one: Instruction) -> int:
    """Bytes that `one` reads and writes. Of an array that it takes only slices of, the slices; so for updates."""
    if one.opcode.endswith("-start"):  # a copy: its result names both places, of which one may be a part of the other
        places = arrays(one.shape)[:2]
        return int(min(width(kind) * math.prod(sizes) for kind, sizes, _ in places) * sum(x[2] for x in places))
    given = [size(computation[name].shape) if name in computation else 0 for name in one.operands]
    if one.opcode == "custom-call":  # of a library: beside its result it names a workspace
        return sum(given) + size(one.shape.partition("}, ")[0])
    body = program.get(one.attribute(r"calls=%?([\w.\-]+)"), {one.name: dataclasses.replace(one, is_root=True)})
    parameters = {int(x.operands[0]): x.name for x in body.values() if x.opcode == "parameter"}
    names = [parameters[i] if parameters else name for i, name in enumerate(one.operands)]
    read = sum(min(whole, _read(body, name, whole)) for name, whole in zip(names, given, strict=True))
    (root,) = (x for x in body.values() if x.is_root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    updates = [x for x in results if x.opcode == "dynamic-update-slice"]
    shapes = body if parameters else computation
    saved = sum(size(x.shape) - size(shapes[x.operands[1]].shape) for x in updates)
    return read + max(size(one.shape) - saved, 0)


def _read(body: Computation, name: str, whole: int) -> int:
    """Bytes that the instructions of `body` read of `name`."""
    total = 0
    for user in body.values():
        if name not in user.operands:
            continue
        if user.opcode in PARTS and user.operands[0] == name:
            total += size(user.shape)
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
            return whole
    return total


# --- What a kernel computes -------------------------------------------------------------------------------------


def operations(program: dict[str, Computation], computation: Computation, one: Instruction) -> dict[str, float]:
    """Floating-point operations of the matrix products and convolutions in `one`, by type."""
    if inner := program.get(one.attribute(r"calls=%?([\w.\-]+)")):
        total: dict[str, float] = {}
        for instruction in inner.values():
            for kind, number in operations(program, inner, instruction).items():
                total[kind] = total.get(kind, 0) + number
        return total
    target = one.attribute(r'custom_call_target="([^"]*)"')
    if not (one.opcode in ("dot", "convolution") or target.startswith(("__cublas$", "__cudnn$conv"))):
        return {}
    left, right = (arrays(computation[name].shape)[0] for name in one.operands[:2])
    result = arrays(one.shape)[0]
    kind = left[0]
    if kind == "f32" and re.search(r"operand_precision[^}\]]*highest", one.attributes, re.IGNORECASE):
        kind = "highest"
    if one.opcode == "dot" or target.startswith("__cublas$"):
        listed = one.attribute(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)')
        number = math.prod(result[1]) * math.prod(left[1][int(i)] for i in re.findall(r"\d+", listed))
    else:
        # A gradient is counted as the convolution x * kernel = y that it is of: of each y, all of a kernel's products.
        x_kernel_y = {"BackwardInput": (result, right, left), "BackwardFilter": (left, result, right)}
        _, kernel, y = x_kernel_y.get(target.removeprefix("__cudnn$conv"), (left, right, result))
        features = one.attribute(r"dim_labels=\w+_(\w+)->").index("o")
        number = math.prod(y[1]) * math.prod(kernel[1]) / kernel[1][features]
    return {kind: 2 * number}
