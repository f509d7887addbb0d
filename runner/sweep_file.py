"""A sweep file, read as jobs are: all that is wrong at once, a line each. Pure but for the reading.

A sweep is a base job, named cells that change some of its keys, and a matrix of values. A cell
whose values are right by themselves and contradict each other is no mistake of the sweep: it is
found when the cell is planned, or run.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, JsonValue

from jobs.accelerators import Accelerator, accelerator
from jobs.problems import parse
from jobs.source import NO_VALUE, Problem, Source, parse_file, put, read_override
from jobs.spec import Job, Names, Part
from runner.matrix import named, places, text_of

MAX_CELLS = 10_000

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Values = Annotated[tuple[JsonValue, ...], Field(strict=False)]


class SweepError(Exception):
    """A sweep that is refused: a line for each thing that is wrong."""


class NamedCell(Part):
    """A cell with a name of its own."""

    job: str | None = None
    """Its base, relative to the sweep file; unset: the sweep's."""
    set: Annotated[dict[str, JsonValue], Field(default_factory=dict)]
    """What it changes of it, value by dotted key."""


class SweepFile(Part):
    """Jobs that differ in some keys, to be planned and run as one."""

    name: Name
    """Names the sweep and its folder."""
    job: Annotated[str, Field(min_length=1)]
    """The base job's file, relative to the sweep file."""
    plan_for: str | None = None
    """The accelerator to plan for, where a job's own has no HBM."""
    run_set: Names = ()
    """key=value each, as --set takes them: to run with, and not to plan with."""
    cells: Annotated[dict[Name, NamedCell], Field(default_factory=dict)]
    """Cells with names, the first of the sweep."""
    matrix: Annotated[dict[str, Values], Field(default_factory=dict)]
    """Values by dotted key; a cell for each combination."""
    exclude: Annotated[tuple[dict[str, JsonValue], ...], Field(strict=False)] = ()
    """Places of the matrix to leave out: all with these values."""
    monotone: Names = ()
    """Axes of the matrix along which memory only grows: what one cell tells of others is used."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One job of a sweep.

    Attributes:
        name: safe as a file's name and as a job's.
        settings: what it changes of the base job, value by dotted key.
        place: in the matrix; empty for a named cell.
        tree: the keys that the user wrote, those changes on top.
        planned_for: an accelerator's name; None: there is no HBM to plan.
    """

    name: str
    settings: dict[str, JsonValue]
    place: dict[str, JsonValue]
    tree: dict[str, Any]
    planned_for: str | None


@dataclass(frozen=True, kw_only=True)
class Expanded:
    """A sweep file's cells, in its order.

    Attributes:
        name: the sweep's.
        axes: values of the matrix by dotted key, in the file's order.
        monotone: axes along which memory only grows.
        run_set: key=value each, to run with.
        cells: at least one.
    """

    name: str
    axes: dict[str, list[JsonValue]]
    monotone: list[str]
    run_set: list[str]
    cells: list[Cell]


def expand(path: Path) -> Expanded:
    """The cells of a sweep file.

    Raises:
        SweepError: all that is wrong with it, a line each.
    """
    tree = parse_file(path)
    if isinstance(tree, Problem):
        text = tree.text.replace("not a job file", "not a sweep file")
        text = text.removesuffix("; the jobs that come along are in jobs/")
        raise SweepError(str(replace(tree, text=text)))
    source = Source(tree=tree, origins={}, default_origin=str(path), readable=True)
    parsed = parse(SweepFile, source, noun="sweep")
    if parsed.problems:
        raise SweepError(_lines([p.at(source) for p in parsed.problems]))
    sweep = parsed.job
    wrong = [Problem(key, NO_VALUE, text, origin=str(path)) for key, text in _form(sweep)]
    bases, of_bases = _bases(path, sweep)
    wrong += of_bases
    if not of_bases:
        wrong += _wrong_settings(path, sweep, bases)
    if wrong:
        raise SweepError(_lines(wrong))
    axes = {key: list(values) for key, values in sweep.matrix.items()}
    cells = list(_cells(sweep, bases))
    return Expanded(
        name=sweep.name,
        axes=axes,
        monotone=list(sweep.monotone),
        run_set=list(sweep.run_set),
        cells=cells,
    )


def _lines(problems: list[Problem]) -> str:
    return "\n".join(dict.fromkeys(map(str, problems)))


def _form(sweep: SweepFile) -> Iterator[tuple[str, str]]:
    """What is wrong with the sweep but for the jobs' keys: the key, and a sentence."""
    matrix = math.prod(len(values) for values in sweep.matrix.values()) if sweep.matrix else 0
    if not sweep.cells and not sweep.matrix:
        yield "cells", "there are no cells: write some below cells, or axes below matrix"
    total = len(sweep.cells) + matrix
    if total > MAX_CELLS:
        sizes = " x ".join(f"{len(values)} ({key})" for key, values in sweep.matrix.items())
        text = f"{total} cells ({len(sweep.cells)} named, matrix {sizes}): {MAX_CELLS} at most"
        yield "matrix", text
        return
    for axis, values in sweep.matrix.items():
        if not values:
            yield axis, f"matrix: {axis} has no values: write some, or leave the axis out"
        counted = Counter(text_of(value) for value in values)
        if twice := next((text for text, times in counted.items() if times > 1), None):
            yield axis, f"matrix: {axis} has {twice} twice: leave one out"
    yield from _form_of_axes(sweep)
    yield from _form_of_monotone(sweep)
    if sweep.plan_for is not None and (text := _no_hbm(sweep.plan_for)):
        yield "plan_for", f"plan_for = {sweep.plan_for} {text}"


def _form_of_axes(sweep: SweepFile) -> Iterator[tuple[str, str]]:
    axes = {axis: {text_of(value) for value in values} for axis, values in sweep.matrix.items()}
    found = list(places(sweep.matrix, sweep.exclude))
    known = ", ".join(sweep.matrix) or "none"
    for excluded in sweep.exclude:
        shown = text_of(dict(excluded))
        strange = [key for key in excluded if key not in sweep.matrix]
        if strange:
            yield "exclude", f"exclude: {strange[0]!r} is no axis of the matrix; its axes: {known}"
        elif not excluded:
            yield "exclude", "exclude: {} is every cell of the matrix: leave it out"
        elif not all(text_of(value) in axes[axis] for axis, value in excluded.items()):
            yield "exclude", f"exclude: {shown} matches no cell of the matrix"
    every = math.prod(map(len, sweep.matrix.values())) if sweep.matrix else 0
    if every and all(sweep.exclude) and not found:
        yield "exclude", f"exclude leaves none of the {every} cells of the matrix"
    ours = {name.casefold(): name for name in named(found)}
    seen: dict[str, str] = {}
    for name in sweep.cells:
        other = ours.get(name.casefold()) or seen.get(name.casefold())
        if other is not None:
            yield "cells", f"cells: the name {name} is {other}'s already: give it another"
        seen[name.casefold()] = name


def _form_of_monotone(sweep: SweepFile) -> Iterator[tuple[str, str]]:
    known = ", ".join(sweep.matrix) or "none"
    for axis in dict.fromkeys(sweep.monotone):
        if axis not in sweep.matrix:
            yield "monotone", f"monotone: {axis!r} is no axis of the matrix; its axes: {known}"
            continue
        if sweep.monotone.count(axis) > 1:
            yield "monotone", f"monotone: {axis} stands twice: leave one out"
        odd = [v for v in sweep.matrix[axis] if isinstance(v, bool) or not _is_number(v)]
        if odd:
            text = f"monotone: {axis} has the value {text_of(odd[0])}: only numbers grow"
            yield "monotone", text


def _is_number(value: JsonValue) -> bool:
    return isinstance(value, int | float)


def _no_hbm(name: str) -> str:
    """Why nothing can be planned for an accelerator; "" where it can."""
    try:
        return "" if accelerator(name).usable_hbm_bytes else "has no HBM: name a TPU type"
    except KeyError as error:
        return f"is no accelerator we know; {error.args[0]}"


def _bases(path: Path, sweep: SweepFile) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """The base jobs' keys by the file's name as written, and what is wrong with the files."""
    names = dict.fromkeys([sweep.job, *(c.job for c in sweep.cells.values() if c.job is not None)])
    found: dict[str, dict[str, Any]] = {}
    wrong: list[Problem] = []
    for name in names:
        file = path.parent / name
        tree = parse_file(file)
        if isinstance(tree, Problem):
            wrong.append(replace(tree, origin=f"{path}: job {name}: {tree.origin}"))
            continue
        source = Source(tree=tree, origins={}, default_origin=str(file), readable=True)
        wrong += [p.at(source) for p in parse(Job, source).problems]
        found[name] = tree
    return found, wrong


def _wrong_settings(
    path: Path, sweep: SweepFile, bases: Mapping[str, dict[str, Any]]
) -> Iterator[Problem]:
    """What is wrong with each value that the sweep sets, by itself."""
    for name, cell in sweep.cells.items():
        base = bases[sweep.job if cell.job is None else cell.job]
        for key, value in cell.set.items():
            yield from _wrong_setting(base, key, value, f"{path}: cells.{name}.set")
    for key, values in sweep.matrix.items():
        for value in values:
            yield from _wrong_setting(bases[sweep.job], key, value, f"{path}: matrix")
    for override in sweep.run_set:
        yield from _wrong_override(bases[sweep.job], override, f"{path}: run_set: {override}")


def check_sets(base: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """See that each --set is of a key and a value that jobs take, by itself.

    Args:
        base: the keys of one of the jobs.
        overrides: key=value each.

    Raises:
        SweepError: some are not.
    """
    wrong = [p for text in overrides for p in _wrong_override(base, text, f"--set {text}")]
    if wrong:
        raise SweepError(_lines(wrong))


def _wrong_override(base: Mapping[str, Any], override: str, origin: str) -> list[Problem]:
    source = _changed(base, {})
    read_override(override, source)
    return _problems_of(source, override.partition("=")[0], origin)


def _wrong_setting(
    base: Mapping[str, Any], key: str, value: JsonValue, origin: str
) -> list[Problem]:
    if not all(key.split(".")):
        text = f"{key!r} is not of the form key.path, as in train.micro_batch_size"
        return [Problem("", NO_VALUE, text, origin=origin)]
    if key == "name":
        text = "name is the cell's own, its folder's too: leave it out"
        return [Problem("", NO_VALUE, text, origin=origin)]
    if isinstance(value, dict):
        text = f"{key} sets a group of keys: set them one by one, as in {key}.name"
        return [Problem("", NO_VALUE, text, origin=origin)]
    return _problems_of(_changed(base, {key: value}), key, origin)


def _problems_of(source: Source, key: str, origin: str) -> list[Problem]:
    found = [*source.problems, *parse(Job, source).problems]
    # Of the key, or of a group above it.
    ours = (p for p in found if not p.key or f"{key}.".startswith(f"{p.key}."))
    return [replace(p, origin=origin) for p in ours]


def _changed(base: Mapping[str, Any], settings: Mapping[str, Any]) -> Source:
    tree = copy.deepcopy(dict(base))
    source = Source(tree=tree, origins={}, default_origin="", readable=True)
    for key, value in settings.items():
        put(source, key, value, origin="")
    return source


def _cells(sweep: SweepFile, bases: Mapping[str, Mapping[str, Any]]) -> Iterator[Cell]:
    for name, cell in sweep.cells.items():
        base = bases[sweep.job if cell.job is None else cell.job]
        yield _cell(sweep, name, base, dict(cell.set), {})
    found = list(places(sweep.matrix, sweep.exclude))
    for name, place in zip(named(found), found, strict=True):
        yield _cell(sweep, name, bases[sweep.job], place, place)


def _cell(
    sweep: SweepFile,
    name: str,
    base: Mapping[str, Any],
    settings: dict[str, JsonValue],
    place: dict[str, JsonValue],
) -> Cell:
    tree = _changed(base, {"name": name, **settings}).tree
    own = tree["accelerator"]
    return Cell(
        name=name,
        settings=settings,
        place=place,
        tree=tree,
        planned_for=sweep.plan_for if _is_without_hbm(own) else own,
    )


def _is_without_hbm(name: str) -> bool:
    try:
        known: Accelerator = accelerator(name)
    except KeyError:  # its plan will be refused, and say so
        return False
    return known.usable_hbm_bytes == 0
