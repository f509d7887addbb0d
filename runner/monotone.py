"""Which cells of a sweep need an answer, where memory only grows along some axes. Pure.

A cell that fits tells of all below it in those axes, one that does not of all above it, where the
cells' other coordinates are equal.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from pydantic import JsonValue

Place = Mapping[str, JsonValue]
Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """Cells that differ in monotone axes alone; a cell by itself has no axes.

    Attributes:
        names: by rank along each axis; a place that is left out of the sweep lacks.
        ranks: the same the other way round.
        shape: places along each axis.
    """

    names: dict[Ranks, str]
    ranks: dict[str, Ranks]
    shape: Ranks

    def below(self, name: str) -> set[str]:
        """The cells at most as large in every axis, the cell itself among them."""
        top = self.ranks[name]
        return {n for n, at in self.ranks.items() if _at_most(at, top)}

    def above(self, name: str) -> set[str]:
        """The cells at least as large in every axis, the cell itself among them."""
        bottom = self.ranks[name]
        return {n for n, at in self.ranks.items() if _at_most(bottom, at)}

    def settled(self, name: str, *, fits: bool) -> set[str]:
        """The cells of which an answer tells."""
        return self.below(name) if fits else self.above(name)


def grids(places: Mapping[str, Place], monotone: Sequence[str]) -> list[Grid]:
    """The cells by what they tell of each other, in the order of the first of each.

    Args:
        places: of each cell, by its name; empty where it is in no matrix.
        monotone: the axes along which memory only grows; their values are numbers.
    """
    found: dict[str, dict[str, Place]] = {}
    for name, place in places.items():
        others = {axis: value for axis, value in place.items() if axis not in monotone}
        alone = name if not place or not monotone else ""
        found.setdefault(json.dumps([alone, others]), {})[name] = place
    return [_grid(cells, monotone) for cells in found.values()]


def _grid(cells: Mapping[str, Place], monotone: Sequence[str]) -> Grid:
    if not all(axis in place for place in cells.values() for axis in monotone):
        monotone = ()
    axes: list[dict[float, int]] = []
    for axis in monotone:
        values = sorted({_number(place[axis]) for place in cells.values()})
        axes.append({value: rank for rank, value in enumerate(values)})
    ranks = {
        name: tuple(rank[_number(place[axis])] for axis, rank in zip(monotone, axes, strict=True))
        for name, place in cells.items()
    }
    names = {at: name for name, at in ranks.items()}
    return Grid(names=names, ranks=ranks, shape=tuple(len(values) for values in axes))


def _number(value: JsonValue) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} on a monotone axis is no number: sweep_file.py refuses it")
    return value


def _at_most(low: Ranks, high: Ranks) -> bool:
    return all(a <= b for a, b in zip(low, high, strict=True))


def ask_next(grid: Grid, open_: AbstractSet[str], busy: Iterable[str] = ()) -> str | None:
    """The cell to ask next, so that few are needed; None: there is none now.

    Of the open cells the one whose worse answer settles most; of equal ones the one whose answers
    settle most together, then the first.

    Args:
        grid: the cells.
        open_: those without an answer, of this grid and others.
        busy: those of this grid that are being asked. A cell that an answer of theirs may settle
            waits for it.
    """
    waits = {name for asked in busy for name in grid.below(asked) | grid.above(asked)}
    askable = (open_ & grid.ranks.keys()) - waits
    if not askable:
        return None
    below = _sums(grid, open_, step=1)
    above = _sums(grid, open_, step=-1)

    def worth(name: str) -> tuple[int, int]:
        down, up = below[grid.ranks[name]], above[grid.ranks[name]]
        return min(down, up), down + up

    return max((name for name in grid.ranks if name in askable), key=worth)


def _sums(grid: Grid, open_: AbstractSet[str], *, step: int) -> dict[Ranks, int]:
    """The open cells from the first place (step 1), or the last (-1), up to each place."""
    places = list(itertools.product(*(range(size)[::step] for size in grid.shape)))
    sums = {at: int(grid.names.get(at, "") in open_) for at in places}
    for axis in range(len(grid.shape)):
        for at in places:
            before = (*at[:axis], at[axis] - step, *at[axis + 1 :])
            sums[at] += sums.get(before, 0)
    return sums


@dataclass(frozen=True)
class Told:
    """What other cells' answers tell of a cell.

    Attributes:
        fits: whether it does.
        by: the cell that told.
    """

    fits: bool
    by: str


def told(grid: Grid, answers: Mapping[str, bool]) -> dict[str, Told]:
    """What the answers tell of the cells without one.

    Of several that tell the same the nearest is named. Where they contradict each other, the cell
    is taken not to fit.
    """
    fitting = [name for name in grid.ranks if answers.get(name) is True]
    others = [name for name in grid.ranks if answers.get(name) is False]
    found: dict[str, Told] = {}
    for name, at in grid.ranks.items():
        if name in answers:
            continue
        # A cell with a name of its own tells of itself alone, and has its answer or none.
        above = [n for n in fitting if grid.shape and _at_most(at, grid.ranks[n])]
        below = [n for n in others if grid.shape and _at_most(grid.ranks[n], at)]
        # Of those above a cell the nearest has the smallest ranks, of those below the largest.
        fits_by = min(above, key=lambda n: sum(grid.ranks[n]), default=None)
        not_by = max(below, key=lambda n: sum(grid.ranks[n]), default=None)
        if not_by is not None:
            found[name] = Told(fits=False, by=not_by)
        elif fits_by is not None:
            found[name] = Told(fits=True, by=fits_by)
    return found


def contradictions(grid: Grid, answers: Mapping[str, bool]) -> list[tuple[str, str]]:
    """Pairs of cells where the first does not fit, and the second, above it, does; one a cell."""
    found: list[tuple[str, str]] = []
    for name in grid.ranks:
        if answers.get(name) is False:
            above = grid.above(name)
            wrong = [n for n in grid.ranks if answers.get(n) is True and n in above]
            found += [(name, n) for n in wrong[:1]]
    return found
