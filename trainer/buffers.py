"""What a compiled program takes of one chip's memory, read from XLA's own buffer assignment.

XLA writes it before it generates any code: every allocation with its size, and what lies in the one
that the program's temporaries share. The runtime reserves just that allocation when it loads the
program: 7.816 GiB by the dump of the SOP's training step, "Attempting to reserve 7.82G" in its log,
where `memory_analysis().temp_size_in_bytes` says 8.327. So these are the figures to plan with.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

DUMPED = "after_optimizations-buffer-assignment.txt"  # the end of the dump file's name

# Memory spaces of an allocation, as the compiler numbers them: HBM has no number in the text.
_HBM, _HOST = 0, 5

_ALLOCATION = re.compile(r"allocation \d+: size (\d+), (.*)")
_COLOR = re.compile(r"\bcolor (\d+)")
_VALUE = re.compile(r" value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)")
_ALIVE = re.compile(r"^\s+(\S+):(\d+)-(\d+)$")
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"')
_LAYOUT, _INDEX = re.compile(r"\{[^}]*\}"), re.compile(r"\{[\d,]*\}$")


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Temporaries of one kind that are alive when the heap is fullest.

    Attributes:
        op: the operation of the traced program that makes them; empty where XLA's own.
        shape: dtype and axes of one, on one chip.
        count: how many.
        size_bytes: of all of them.
    """

    op: str
    shape: str
    count: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class ProgramMemory:
    """What one chip's HBM must hold for a program to run. All figures are bytes a chip.

    Attributes:
        arguments_bytes: of its arguments, donated ones included.
        outputs_bytes: of outputs that take no donated argument's place.
        reserved_bytes: the heap of its temporaries, which the runtime reserves whole.
        code_bytes: of its instructions and constants; None where no code was generated.
        host_bytes: of arguments and outputs in the host's memory: no HBM.
        peak: what fills the heap when it is fullest, largest first.
        fragmentation_bytes: of the heap, covered by nothing at that moment.
    """

    arguments_bytes: int
    outputs_bytes: int
    reserved_bytes: int
    code_bytes: int | None
    host_bytes: int
    peak: tuple[Tensors, ...]
    fragmentation_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it; without code where none was generated."""
        held = self.arguments_bytes + self.outputs_bytes + self.reserved_bytes
        return held + (self.code_bytes or 0)


@dataclass(frozen=True)
class _Value:
    """A temporary's place in the heap."""

    name: str
    size: int
    offset: int
    shape: str


@dataclass
class _Sums:
    """Bytes of allocations by what they are for."""

    arguments: int = 0
    outputs: int = 0
    heap: int = 0
    host: int = 0

    def add(self, size: int, what: str) -> bool:
        """Count an allocation; whether it is the heap in HBM."""
        color = _COLOR.search(what)
        space = int(color[1]) if color else _HBM
        of_caller = "parameter" in what or "maybe-live-out" in what
        if space == _HOST and of_caller:
            self.host += size
        elif space == _HBM and "preallocated-temp" in what:
            self.heap += size
            return True
        elif space == _HBM and "parameter" in what:
            self.arguments += size
        elif space == _HBM and of_caller:
            self.outputs += size
        return False


def program_memory_of(assignment: str, *, hlo: str, code_bytes: int | None) -> ProgramMemory:
    """The figures of one dumped buffer assignment.

    Args:
        assignment: text of the dump, `DUMPED`.
        hlo: text of the optimized module dumped beside it, for the operations' names.
        code_bytes: what the finished program says of its code; None where there is none.

    Raises:
        ValueError: the text is no buffer assignment.
    """
    if not assignment.startswith("BufferAssignment"):
        raise ValueError("not a buffer assignment of XLA: its first line is another")
    sums, values = _Sums(), list[_Value]()
    alive: dict[str, tuple[int, int]] = {}
    in_heap = in_ranges = False
    for line in assignment.splitlines():
        if found := _ALLOCATION.match(line):
            in_heap = sums.add(int(found[1]), found[2])
        elif in_heap and (found := _VALUE.match(line)):
            values.append(_Value(_bare(found[1]), int(found[2]), int(found[3]), found[4]))
        elif "BufferLiveRange:" in line:
            in_ranges = True
        elif in_ranges and (found := _ALIVE.match(line)):
            alive[_bare(found[1])] = int(found[2]), int(found[3])
    peak, covered = _peak(values, alive, _op_names(hlo))
    return ProgramMemory(
        arguments_bytes=sums.arguments,
        outputs_bytes=sums.outputs,
        reserved_bytes=sums.heap,
        code_bytes=code_bytes,
        host_bytes=sums.host,
        peak=peak,
        fragmentation_bytes=sums.heap - covered,
    )


def _bare(name: str) -> str:
    """A value's name as its live range has it: `x{}` and `x` are one."""
    return name.removesuffix("{}")


def _op_names(hlo: str) -> dict[str, str]:
    found = (_INSTRUCTION.match(line) for line in hlo.splitlines())
    return {m[1]: m[2] for m in found if m}


def _fullest(values: Iterable[_Value], alive: Mapping[str, tuple[int, int]]) -> int:
    """The moment at which the values cover most of the heap; values of one place count once.

    XLA's own "peak" adds up aliases: a loop's carry and the update inside it twice.
    """
    events: list[tuple[int, int, tuple[int, int]]] = []
    for value in values:
        start, end = alive.get(value.name, (0, -1))
        if start <= end:
            place = value.offset, value.size
            events += [(start, 0, place), (end + 1, -1, place)]
    held: Counter[tuple[int, int]] = Counter()
    most = covered = at = 0
    # At the same moment what ends goes first.
    for moment, kind, place in sorted(events, key=lambda e: e[:2]):
        if kind:
            held[place] -= 1
            covered -= 0 if held[place] else place[1]
            continue
        covered += 0 if held[place] else place[1]
        held[place] += 1
        if covered > most:
            most, at = covered, moment
    return at


def _peak(
    values: list[_Value], alive: Mapping[str, tuple[int, int]], op_names: Mapping[str, str]
) -> tuple[tuple[Tensors, ...], int]:
    """What covers most of the heap at one moment, by kind; and how many bytes it covers."""
    at = _fullest(values, alive)
    live = [v for v in values if v.name in alive and alive[v.name][0] <= at <= alive[v.name][1]]
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    taken: list[tuple[int, int]] = []
    for value in sorted(live, key=lambda v: (-v.size, v.name)):
        end = value.offset + value.size
        if any(value.offset < b and a < end for a, b in taken):
            continue
        taken.append((value.offset, end))
        op = op_names.get(_INDEX.sub("", value.name), "")
        groups[op, _LAYOUT.sub("", value.shape)].append(value.size)
    kinds = [
        Tensors(op=op, shape=shape, count=len(sizes), size_bytes=sum(sizes))
        for (op, shape), sizes in groups.items()
    ]
    kinds.sort(key=lambda t: (-t.size_bytes, t.op, t.shape))
    return tuple(kinds), sum(b - a for a, b in taken)


@cache  # a search for what fits asks for the same few shapes a million times
def tiled_bytes(shape: Sequence[int], itemsize: int) -> int:
    """HBM that an array of a TPU program takes, in the layout that XLA gives arguments.

    Arrays lie in tiles of 8 x 128 words of 4 bytes, smaller types packed by rows; fewer rows than 8
    get a tile of the next power of two; an array of one axis lies in rows of up to 1024 items. The
    last two axes change places where less is padded then.

    Args:
        shape: of one device's share.
        itemsize: bytes of one number, 1 to 4.

    >>> tiled_bytes((28, 3584), 2) == 32 * 3584 * 2  # 28 rows are padded to four tiles
    True
    """
    packed = 4 // itemsize
    if len(shape) < 2:
        length = shape[0] if shape else 1
        tile = min(1024, max(128 * packed, power_of_two(length)))
        size = up_to(length, tile)
    else:
        one, other = shape[-2:]
        padded = min(_plane(one, other, packed), _plane(other, one, packed))
        size = math.prod(shape[:-2]) * padded
    return up_to(size * itemsize, 512)


def _plane(rows: int, columns: int, packed: int) -> int:
    """Items of a matrix with its padding."""
    return up_to(rows, min(8, max(packed, power_of_two(rows)))) * up_to(columns, 128)


def up_to(value: int, multiple: int) -> int:
    """The least multiple that is not below."""
    return -(-value // multiple) * multiple


def power_of_two(value: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(value - 1, 0).bit_length()
