"""How long a compiled TPU program would take: a model from its text, never a measurement.

Compute is the sum of the compiler's own `estimated_cycles`, times the trips of the loops around
each instruction, over the clock. What the model assumes, and leaves out:

- The compiler's estimates hold. It gives a 2048 x 4096 x 4096 matmul on v4 89 % of the peak.
- Pallas kernels have no estimate and count as nothing: splash attention, about 0.2 s of the 7B step
  of 32 x 1536 tokens on v4-8 by its FLOPs.
- Collectives' transfers are counted in bytes, not in time; they overlap with compute, or do not.
- A loop's trips are the one constant of its condition; a loop that may end earlier (decoding until
  all is done) takes them all.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from jobs.accelerators import Accelerator
from trainer.refusal import Refusal

# Multiply-adds a cycle of all matrix units of one JAX device: peak FLOP/s over twice this is the
# clock. v4 and v5p: 2 cores x 4 units of 128 x 128, and so on; v4's gives 1.05 GHz.
_PRODUCTS = {
    "TPU v2": 128**2,
    "TPU v3": 2 * 128**2,
    "TPU v4": 8 * 128**2,
    "TPU v5 lite": 4 * 128**2,
    "TPU v5": 8 * 128**2,
    "TPU v6 lite": 4 * 256**2,
}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_BODY, _CONDITION = re.compile(r"body=%?([\w.\-]+)"), re.compile(r"condition=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BOUND = re.compile(r"^s32\[\]\S* constant\((\d+)\)")
_COLLECTIVE = re.compile(
    r"^(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?$"
)
_GROUPS, _GROUP = re.compile(r"replica_groups=\[\d+,(\d+)\]"), re.compile(r"=\{\{([\d,]*)\}")
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
_ITEM_BYTES = {"pred": 1, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A loop of the program's outermost level.

    Attributes:
        op: the operation of the traced program that it is.
        trips: how often its body runs; None where the text does not tell, and once is counted.
        compute_s: of all its trips.
        ici_bytes: of all its trips.
    """

    op: str
    trips: int | None
    compute_s: float
    ici_bytes: int


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A program's modelled time on every chip, side by side.

    Attributes:
        compute_s: seconds of compute, Pallas kernels left out.
        ici_bytes: bytes that a chip must receive over the interconnect.
        loops: the outermost loops, in program order.
        unknown_loops: loops at any depth whose trips the text does not tell; counted once.
    """

    compute_s: float
    ici_bytes: int
    loops: tuple[Loop, ...]
    unknown_loops: tuple[str, ...]


@dataclass
class _Instruction:
    name: str
    text: str
    opcode: str


class _Module:
    """The computations of a module's text."""

    def __init__(self, hlo: str) -> None:
        self.computations: dict[str, list[_Instruction]] = defaultdict(list)
        self.entry, current = "", ""
        for line in hlo.splitlines():
            if found := _COMPUTATION.match(line):
                current = found[2]
                self.entry = current if found[1] else self.entry
            elif line.startswith("}"):
                current = ""
            elif current and (found := _INSTRUCTION.match(line)):
                opcode = _OPCODE.search(found[2])
                name = opcode[1] if opcode else ""
                self.computations[current].append(_Instruction(found[1], found[2], name))

    def trips(self, loop: _Instruction) -> int | None:
        """The one constant that a loop's condition holds; None where it holds several or none."""
        condition = _CONDITION.search(loop.text)
        inside = self.computations[condition[1]] if condition else []
        bounds = {int(m[1]) for i in inside if (m := _BOUND.match(i.text))}
        return bounds.pop() if len(bounds) == 1 else None


def clock_hz(target: Accelerator) -> float:
    """Cycles a second of the accelerator's cores.

    Raises:
        Refusal: its matrix units are not known to us.

    >>> from jobs.accelerators import accelerator
    >>> round(clock_hz(accelerator("v4-8")) / 1e9, 2)
    1.05
    """
    products = _PRODUCTS.get(target.device_kind)
    if products is None:
        raise Refusal(
            f"no clock is known for {target.name} ({target.device_kind}), so no time can be "
            f"modelled; known: {', '.join(_PRODUCTS)}"
        )
    return target.peak_flops / (2 * products)


def step_time(hlo: str, target: Accelerator) -> StepTime:
    """The model's figures for a finished module's text (`ahead.Compiled.hlo`)."""
    module, hertz = _Module(hlo), clock_hz(target)
    unknown: list[str] = []
    loops: list[Loop] = []

    def cost(computation: str, *, outermost: bool) -> tuple[int, int]:
        """(cycles, bytes received) of one run of a computation."""
        cycles = received = 0
        for one in module.computations[computation]:
            own = _CYCLES.search(one.text)
            cycles += int(own[1]) if own and not one.opcode.endswith("-done") else 0
            received += received_bytes(one.text, one.opcode, devices=target.devices)
            inner, inner_received = inside(one, outermost=outermost)
            cycles, received = cycles + inner, received + inner_received
        return cycles, received

    def inside(one: _Instruction, *, outermost: bool) -> tuple[int, int]:
        """The same of all that an instruction runs besides itself."""
        if one.opcode == "while":
            trips, body = module.trips(one), _BODY.search(one.text)
            if trips is None:
                unknown.append(one.name)
            a_trip = cost(body[1], outermost=False) if body else (0, 0)
            whole = tuple(n * (1 if trips is None else trips) for n in a_trip)
            if outermost:
                op = _OP_NAME.search(one.text)
                name, seconds = op[1] if op else one.name, whole[0] / hertz
                loops.append(Loop(op=name, trips=trips, compute_s=seconds, ici_bytes=whole[1]))
            return whole[0], whole[1]
        if one.opcode in ("call", "conditional"):
            branches = _BRANCHES.search(one.text)
            names = re.findall(r"[\w.\-]+", branches[1]) if branches else _CALLED.findall(one.text)
            # Of a conditional's branches the dearest is taken.
            return max((cost(name, outermost=False) for name in names), default=(0, 0))
        return 0, 0

    cycles, received = cost(module.entry, outermost=True)
    return StepTime(
        compute_s=cycles / hertz,
        ici_bytes=received,
        loops=tuple(loops),
        unknown_loops=tuple(unknown),
    )


def received_bytes(text: str, opcode: str, *, devices: int) -> int:
    """Bytes that a chip receives for one collective, by the least that any algorithm can do.

    Args:
        text: the instruction, from its shape on.
        opcode: its operation; what is no collective receives nothing.
        devices: of the program, where the text names no groups.

    >>> received_bytes("bf16[8,4]{1,0} all-gather(%x), replica_groups=[1,4]", "all-gather",
    ...                devices=4)
    48
    """
    found = _COLLECTIVE.match(opcode)
    if not found:
        return 0
    kind, started = found[1], found[2] is not None
    shape = text.split(f" {opcode}(", maxsplit=1)[0]
    size, group = _bytes(shape), _group_size(text, devices)
    # A -start gives operand and result; their sizes are to each other as 1 to the group, or 1 to 1.
    if kind == "all-gather":
        whole = size * group / (group + 1) if started else size
        return round(whole * (group - 1) / group)
    if kind == "reduce-scatter":
        return round((size / (group + 1) if started else size) * (group - 1))
    once = size / 2 if started else size
    if kind == "all-reduce":
        return round(2 * once * (group - 1) / group)
    return round(once * (group - 1) / group if kind == "all-to-all" else once)


def _group_size(text: str, devices: int) -> int:
    if found := _GROUPS.search(text):
        return int(found[1])
    found = _GROUP.search(text)
    return len(found[1].split(",")) if found and found[1] else devices


def _bytes(shape: str) -> int:
    """Bytes of all arrays in a shape's text."""
    total = 0
    for dtype, axes in _ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        size = _ITEM_BYTES.get(dtype) or (int(bits[0]) // 8 if bits else 0)
        total += size * math.prod(int(n) for n in axes.split(",") if n)
    return total
