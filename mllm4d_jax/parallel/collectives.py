"""What a compiled program sends between devices, and its large arrays, read from its text (HLO).

The compiler's own figures visit the body of a loop once; here every collective counts as often as its loop runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
          "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}  # fmt: skip
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r"|f8\w*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_PASSED_ON = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call",
              "optimization-barrier")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str  # e.g. "add.3"
    opcode: str  # e.g. "add"
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, dimensions) of the result, several for a tuple
    operands: tuple[str, ...]  # names
    rest: str  # the operands in brackets and what follows them
    root: bool  # it is the computation's result


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of the program."""

    kind: str  # "all-gather" and so on
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of its result on one device
    group: int  # devices that take part together
    received: int  # bytes a device receives in one execution, by a ring
    times: int  # executions in a run of the program
    source: str  # the operation of the model it comes from

    @property
    def total(self) -> int:
        return self.received * self.times


def _size(shape: tuple[str, tuple[int, ...]]) -> int:
    return _BYTES.get(shape[0], 1) * math.prod(shape[1])


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """(name of the entry computation, instructions of every computation) of an HLO module's text."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":  # the text of a kernel may break lines and begin some with brackets
            current = None
        elif current is not None and (found := _instruction(line)):
            current.append(found)
    return entry, computations


def _instruction(line: str) -> Instruction | None:
    name = _NAME.match(line)
    if name is None:
        return None
    rest = line[name.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    opened = rest.find("(", end)
    if end <= 0 or opened < 0:
        return None
    kind, after = rest[:end], rest[opened:]
    close = _closing(after)
    shapes = tuple((d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in _SHAPE.findall(kind))
    operands = tuple(re.findall(r"%([\w.\-]+)", after[: close + 1]))
    return Instruction(name[2], rest[end:opened].strip(), shapes, operands, after, bool(name[1]))


def _closing(text: str) -> int:
    """Index of the bracket that closes the one `text` starts with."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return i
    return len(text) - 1


def executions(entry: str, computations: Mapping[str, list[Instruction]]) -> dict[str, int]:
    """How often each computation runs in a run of the program; both branches of a conditional count."""
    times = dict.fromkeys(computations, 0)

    def visit(name: str, count: int) -> None:
        times[name] += count
        table = {i.name: i for i in computations[name]}
        for i in computations[name]:
            if i.opcode == "while":
                body, loops = _loop(i, table, computations)
                visit(body, count * loops)
                continue
            called = _CALLED.findall(i.rest)
            called += [b.strip(" %") for part in _BRANCHES.findall(i.rest) for b in part.split(",")]
            for other in called:
                if other in computations:
                    visit(other, count)

    visit(entry, 1)
    return times


def _loop(loop: Instruction, table, computations) -> tuple[str, int]:
    """(body, iterations) of a counting loop; one iteration where the count does not show in the text."""
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    body = re.search(r"body=%?([\w.\-]+)", loop.rest)
    known = re.search(r'known_trip_count\\?"?:\s*\{\\?"?n\\?"?:\s*\\?"?(\d+)', loop.rest)
    if known:
        return body[1], int(known[1])
    tests = {i.name: i for i in computations[condition[1]]}
    root = next(i for i in tests.values() if i.root)
    if root.opcode != "compare" or "direction=LT" not in root.rest:
        return body[1], 1
    counter, limit = (tests.get(name) for name in root.operands)
    end, index = _constant(limit), re.search(r"index=(\d+)", counter.rest) if counter is not None else None
    if end is None or index is None:
        return body[1], 1
    start, step = _start(loop, int(index[1]), table), _step(int(index[1]), computations[body[1]])
    return body[1], max(0, -(-(end - start) // step))


def _constant(i: Instruction | None) -> int | None:
    value = re.match(r"\((-?\d+)\)", i.rest) if i is not None and i.opcode == "constant" else None
    return int(value[1]) if value else None


def _start(loop: Instruction, at: int, table: Mapping[str, Instruction]) -> int:
    """First value of the counter; 0 unless a constant says otherwise."""
    initial = table.get(loop.operands[0])
    if initial is None or initial.opcode != "tuple":
        return 0
    value = table.get(initial.operands[at])
    while value is not None and value.opcode == "copy":
        value = table.get(value.operands[0])
    return _constant(value) or 0


def _step(at: int, body: list[Instruction]) -> int:
    """What the body adds to the counter; 1 unless a constant says otherwise."""
    table = {i.name: i for i in body}
    root = next(i for i in body if i.root)
    if root.opcode != "tuple":
        return 1
    value = table.get(root.operands[at])
    if value is None or value.opcode != "add":
        return 1
    return next((c for c in (_constant(table.get(name)) for name in value.operands) if c), 1)


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program, largest total first.

    A collective that the compiler has merged with computation appears in several pieces of the text under one channel;
    it counts once, as often as its most frequent piece.
    """
    entry, computations = parse(text)
    times = executions(entry, computations)
    found: dict[str, Collective] = {}
    for name, body in computations.items():
        for i in body:
            kind = i.opcode.removesuffix("-start")
            if kind not in _KINDS or not times[name]:
                continue
            one = _collective(kind, i, times[name])
            channel = re.search(r"channel_id=(\d+)", i.rest)
            key = f"{kind} {channel[1]}" if channel else f"{name} {i.name}"
            if key not in found or found[key].times < one.times:
                found[key] = one
    return sorted(found.values(), key=lambda c: -c.total)


def _collective(kind: str, i: Instruction, times: int) -> Collective:
    shapes = tuple(s for s in i.shapes if len(s[1]) or s[0] not in ("u32", "s32"))
    if i.opcode.endswith("-start"):
        # The result holds operands and results; the larger half are the results of a gather, the smaller of a scatter.
        half = max(1, len(shapes) // 2)
        shapes = shapes[half:] if len(shapes) > 1 and kind != "all-reduce" else shapes
    size, group = sum(_size(s) for s in shapes), _group(i.rest)
    others = (group - 1) / group
    shares = {"all-reduce": 2 * others, "reduce-scatter": group - 1, "collective-permute": 1}
    received = size * shares.get(kind, others)
    source = re.search(r'op_name="([^"]*)"', i.rest)
    return Collective(kind, shapes, group, round(received), times, source[1] if source else "")


def _group(rest: str) -> int:
    """Devices of a replica group, in any of its spellings. Raises ValueError for one that is not known."""
    # Between mesh and axes the order of the devices may stand: mesh['a'=16,'b'=16], device_ids=([16,16]T(1,0)) {'a'}.
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return len(listed[1].split(","))
    unknown = re.search(r"replica_groups=(?!\{\})[^ ]*", rest)
    if unknown:
        raise ValueError(f"a collective's devices are spelled in a way this reader does not know: {unknown[0]}")
    return 1


def received_bytes(found: list[Collective]) -> dict[str, int]:
    """Bytes a device receives in a run of the program, by kind."""
    return {kind: sum(c.total for c in found if c.kind == kind) for kind in dict.fromkeys(c.kind for c in found)}


def arrays(text: str) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """(opcode, dtype, dimensions, bytes) of every array that a device makes, pieces of fusions left out."""
    entry, computations = parse(text)
    every = (i for body in computations.values() for i in body)
    fused = {name for i in every if i.opcode == "fusion" for name in _CALLED.findall(i.rest)}
    times = executions(entry, computations)
    for name, body in computations.items():
        if name in fused or not times[name]:
            continue
        for i in body:
            if i.opcode not in _PASSED_ON:
                yield from ((i.opcode, *shape, _size(shape)) for shape in i.shapes)
