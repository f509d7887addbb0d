"""A sweep's rows, read from its files as they stand: what its table, its JSON and its page show."""

import contextlib
import shlex

from pydantic import ValidationError

from jobs.records import Diagnosis, Manifest, MemoryPlan, StepRecord
from runner import archive, status
from runner.archive import RunDir
from runner.measured import compare
from runner.monotone import contradictions
from runner.show import records
from runner.sweep import CellDir, SweepDir
from runner.sweep_plan import answers_of, order_of, planned_of
from runner.sweep_row import Outcome, Row, Sweep
from runner.sweep_run import outcome_of


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
    found, result, plan, run = cell.planned(), cell.result(), _plan(cell, notes), cell.newest()
    manifest, diagnosis, steps = _run(run, notes) if run else (None, None, [])
    outcome: Outcome | None = result.outcome if result else None
    if manifest is not None:
        outcome = outcome_of(manifest, diagnosis)
    job_file = cell.job_file.relative_to(sweep.path)
    sets = [f"--set={override}" for override in sweep.record.run_set]
    return Row(
        cell=cell.name,
        settings=cell.record.settings,
        place=cell.record.place,
        job_file=str(job_file),
        command=shlex.join(["headroom", "run", str(sweep.path / job_file), *sets]),
        plan_said=found.said if found else "",
        plan=plan,
        outcome=outcome,
        skipped=result.skipped if result and manifest is None else None,
        run=str(run.path.relative_to(sweep.path.absolute())) if run else None,
        manifest=manifest,
        diagnosis=diagnosis,
        steps=steps,
        measured=compare(plan, run, diagnosis) if plan is not None and run is not None else [],
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


def _run(
    run: RunDir, notes: list[str]
) -> tuple[Manifest | None, Diagnosis | None, list[StepRecord]]:
    """A run's records; one that ended with nobody there is finished first."""
    try:
        manifest = status.settle(run)
    except status.CannotTellError as error:
        notes.append(f"{run.name}: as last recorded: {error}")
        manifest = run.manifest()
    except archive.NoSuchRunError as error:
        notes.append(str(error))
        return None, None, []
    diagnosis: Diagnosis | None = None
    if run.diagnosis_file.is_file():
        try:
            diagnosis = Diagnosis.model_validate_json(run.diagnosis_file.read_bytes())
        except (OSError, ValidationError) as error:
            notes.append(f"{run.diagnosis_file} cannot be read: {_first(error)}")
    steps: list[StepRecord] = []
    for record in records(run.steps_file):
        with contextlib.suppress(ValidationError):  # an evaluation, or another version's
            steps.append(StepRecord.model_validate(record))
    return manifest, diagnosis, steps


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]
