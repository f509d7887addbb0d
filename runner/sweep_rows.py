"""A sweep's rows, read from its files as they stand: what its table, its JSON and its page show."""

import shlex
from pathlib import Path

from pydantic import ValidationError

from jobs.records import MemoryPlan
from runner import archive, status
from runner.monotone import contradictions
from runner.run_row import row_of
from runner.sweep import CellDir, SweepDir
from runner.sweep_plan import answers_of, order_of, planned_of
from runner.sweep_row import Row, Sweep


def read(sweep: SweepDir) -> Sweep:
    """All of a sweep, as it stands."""
    planned = planned_of(sweep)
    notes: list[str] = []
    rows = [_row(sweep, cell, notes) for cell in sweep.cells.values()]
    for number, row in enumerate(rows):
        verdict, by = planned.get(row.cell, (None, None))
        rows[number] = row.model_copy(update={"planned": verdict, "planned_from": by})
    answers = answers_of({name: verdict for name, (verdict, by) in planned.items() if by is None})
    for grid in order_of(sweep):
        for below, above in contradictions(grid, answers):
            along = ", ".join(sweep.record.monotone)
            notes.append(f"{above} is planned to fit and {below} not: no growth along {along}")
    return Sweep(
        name=sweep.record.name,
        accelerator=sweep.record.accelerator,
        axes=sweep.record.axes,
        rows=rows,
        notes=notes,
    )


def _row(sweep: SweepDir, cell: CellDir, notes: list[str]) -> Row:
    """A cell's row but for what its plan says, or another's of it."""
    found, result, run = cell.planned(), cell.result(), _run(cell, notes)
    job_file = cell.job_file.relative_to(sweep.path)
    sets = [f"--set={override}" for override in sweep.record.run_set]
    return Row(
        cell=cell.name,
        settings=cell.record.settings,
        place=cell.record.place,
        job_file=str(job_file),
        command=shlex.join(["headroom", "run", str(sweep.path / job_file), *sets]),
        plan_said=found.said if found else "",
        plan=_plan(cell, notes),
        outcome=run.outcome if run else result.outcome if result else None,
        skipped=result.skipped if result and not run else None,
        run=str(Path(str(run.run)).relative_to(sweep.path.absolute())) if run else None,
        manifest=run.manifest if run else None,
        diagnosis=run.diagnosis if run else None,
        steps=run.steps if run else [],
        measured=run.measured if run else [],
    )


def _plan(cell: CellDir, notes: list[str]) -> MemoryPlan | None:
    found = cell.planned()
    if found is None or found.verdict in ("refused", "failed"):
        return None
    try:
        return MemoryPlan.model_validate_json(cell.plan_file.read_bytes())
    except (OSError, ValidationError) as error:
        notes.append(f"{cell.name}: {cell.plan_file} cannot be read: {_first(error)}")
        return None


def _run(cell: CellDir, notes: list[str]) -> Row | None:
    """A cell's newest run; one that ended with nobody there is finished first."""
    run = cell.newest()
    if run is None:
        return None
    try:
        found = row_of(run, status.settle(run))
    except status.CannotTellError as error:
        notes.append(f"{run.name}: as last recorded: {error}")
        found = row_of(run, run.manifest())
    except archive.NoSuchRunError as error:
        notes.append(str(error))
        return None
    if found.diagnosis is None and run.diagnosis_file.is_file():
        notes.append(f"{run.diagnosis_file} cannot be read")
    return found


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]
