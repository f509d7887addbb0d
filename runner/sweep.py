"""A sweep's folder: all that is known stands in files, so a killed sweep goes on where it was.

sweeps/NAME/sweep.json               the cells in order, with settings and places
sweeps/NAME/cells/CELL/job.yaml      the keys that the user wrote, the cell's on top
sweeps/NAME/cells/CELL/plan.json     its plan, and planned.json: how it was planned
sweeps/NAME/cells/CELL/runs/, logs/  its runs, as everywhere (archive.py)
sweeps/NAME/cells/CELL/result.json   how its run ended, or why it was not run
sweeps/NAME/cells/CELL/earlier-N/    runs of another job that the cell once was
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import JsonValue, ValidationError

from jobs.records import PLAN_FILE, Record
from jobs.source import Problem, parse_file
from jobs.spec import Job, load
from runner import archive, status
from runner.archive import RunDir, write_whole
from runner.sweep_file import Cell, Expanded, SweepError
from runner.sweep_lock import LOCK_FILE
from runner.sweep_row import Outcome, Planned

SWEEP_FILE = "sweep.json"
JOB_YAML = "job.yaml"
PLANNED_FILE = "planned.json"
RESULT_FILE = "result.json"


class CellRecord(Record):
    """A cell as sweep.json has it.

    Attributes:
        name: its folder's, and its job's.
        settings: what it changes of the base job, value by dotted key.
        place: in the matrix; empty for a named cell.
        job_sha256: of job.yaml.
        planned_for: an accelerator; None: there is no HBM to plan.
    """

    name: str
    settings: dict[str, JsonValue]
    place: dict[str, JsonValue]
    job_sha256: str
    planned_for: str | None


class SweepRecord(Record):
    """sweep.json: what a sweep file was expanded into.

    Attributes:
        name: the sweep's.
        accelerator: planned for; several with commas between them.
        axes: values of the matrix by dotted key, in the file's order.
        monotone: axes along which memory only grows.
        run_set: key=value each, to run with.
        cells: in the file's order.
    """

    name: str
    accelerator: str
    axes: dict[str, list[JsonValue]]
    monotone: list[str]
    run_set: list[str]
    cells: list[CellRecord]


class PlannedRecord(Record):
    """planned.json: that a cell was planned, and of which job.

    Attributes:
        job_sha256, planned_for: as the cell had them.
        quick, engine_weights: how it was planned.
        verdict: the plan's; refused, failed: there is none.
        said: why there is none.
    """

    job_sha256: str
    planned_for: str | None
    quick: bool
    engine_weights: str
    verdict: Planned
    said: str = ""


class ResultRecord(Record):
    """result.json: how a cell's run ended, or why it was not run.

    Attributes:
        run_sha256: of the job and the sweep's run_set.
        outcome: of the run; None: it was skipped.
        skipped: why.
        run: the run directory's name.
        host: that it ran on.
    """

    run_sha256: str
    outcome: Outcome | None = None
    skipped: str | None = None
    run: str | None = None
    host: str | None = None


@dataclass(frozen=True)
class CellDir:
    """The files of one cell.

    Attributes:
        path: its folder.
        record: as sweep.json has it.
        run_sha256: of its job and the sweep's run_set: what result.json must have.
    """

    path: Path
    record: CellRecord
    run_sha256: str

    @property
    def name(self) -> str:
        """The cell's."""
        return self.record.name

    @property
    def job_file(self) -> Path:
        """The keys that the user wrote, the cell's on top."""
        return self.path / JOB_YAML

    @property
    def plan_file(self) -> Path:
        """The plan, where there is one."""
        return self.path / PLAN_FILE

    @property
    def runs(self) -> Path:
        """The folder of its runs."""
        return self.path / "runs"

    def newest(self) -> RunDir | None:
        """Its newest run."""
        return next(iter(archive.all_runs(self.runs)), None)

    def load(self, overrides: list[str]) -> Job:
        """Its job.

        Raises:
            JobError: the job is refused.
            SweepError: see `tree`.
        """
        self._vouch()
        return load(self.job_file, overrides=overrides)

    def tree(self) -> dict[str, Any]:
        """The keys of its job, as written.

        Raises:
            SweepError: job.yaml is not the one that sweep.json tells of.
        """
        self._vouch()
        tree = parse_file(self.job_file)
        if isinstance(tree, Problem):
            raise SweepError(str(tree))
        return tree

    def _vouch(self) -> None:
        try:
            found = _sha256(self.job_file.read_bytes())
        except OSError as error:
            raise SweepError(f"{self.job_file} cannot be read: {error}") from error
        if found != self.record.job_sha256:
            raise SweepError(
                f"{self.job_file} is not what was expanded: change the sweep file instead, and "
                "expand that again"
            )

    def planned(self) -> PlannedRecord | None:
        """How it was planned, if it was, as the job that it is now."""
        found = _read(PlannedRecord, self.path / PLANNED_FILE)
        mine = (self.record.job_sha256, self.record.planned_for)
        return found if found and (found.job_sha256, found.planned_for) == mine else None

    def result(self) -> ResultRecord | None:
        """What came of running it, as the job that it is now."""
        found = _read(ResultRecord, self.path / RESULT_FILE)
        return found if found and found.run_sha256 == self.run_sha256 else None

    def put_planned(self, record: PlannedRecord, plan: str | None) -> None:
        """Keep a plan, or why there is none; planned.json last, so that it vouches for the plan."""
        if plan is None:
            self.plan_file.unlink(missing_ok=True)
        else:
            write_whole(self.plan_file, plan)
        write_whole(self.path / PLANNED_FILE, record.model_dump_json(indent=2) + "\n")

    def put_result(self, record: ResultRecord) -> None:
        """Keep what came of running it."""
        write_whole(self.path / RESULT_FILE, record.model_dump_json(indent=2) + "\n")

    def drop_result(self) -> None:
        """Forget that it has a result: it will be run again."""
        (self.path / RESULT_FILE).unlink(missing_ok=True)


@dataclass(frozen=True)
class SweepDir:
    """A sweep's folder.

    Attributes:
        path: of it.
        record: sweep.json.
    """

    path: Path
    record: SweepRecord

    @property
    def cells(self) -> dict[str, CellDir]:
        """Every cell, in order."""
        return {
            cell.name: CellDir(
                path=self.path / "cells" / cell.name,
                record=cell,
                run_sha256=_run_sha256(cell, self.record),
            )
            for cell in self.record.cells
        }


def open_folder(path: Path) -> SweepDir:
    """The sweep that lies in a folder.

    Raises:
        SweepError: there is none.
    """
    file = path / SWEEP_FILE
    if not file.is_file():
        raise SweepError(f"{path} holds no sweep ({SWEEP_FILE}): headroom sweep expand FILE first")
    record = _read(SweepRecord, file)
    if record is None:
        raise SweepError(f"{file} cannot be read, or is another version's: expand the sweep again")
    return SweepDir(path, record)


def expand(sweep: Expanded, folder: Path) -> tuple[SweepDir, list[str]]:
    """Write a sweep's cells into its folder, which we hold; and what a person should know.

    A cell that is the job it was keeps all it has. One that is another loses its plan, and its runs
    are put aside.

    Raises:
        SweepError: the folder is of another sweep; a changed cell still runs, or that cannot be
            told.
    """
    before = _before(sweep, folder)
    texts = {cell.name: _yaml(cell.tree) for cell in sweep.cells}
    record = _record(sweep, {name: _sha256(text.encode()) for name, text in texts.items()})
    made = SweepDir(folder, record)
    notes: list[str] = []
    if before is not None:
        notes = _put_aside(before.cells, made.cells)
    elif (folder / SWEEP_FILE).exists():
        notes = [f"{folder / SWEEP_FILE} cannot be read, or is another version's: it is made anew"]
        notes += _put_aside(_as_they_lie(made), made.cells)
    for cell, asked in zip(made.cells.values(), sweep.cells, strict=True):
        cell.path.mkdir(parents=True, exist_ok=True)
        text = texts[cell.name]
        if not cell.job_file.is_file() or cell.job_file.read_text(encoding="utf-8") != text:
            cell.job_file.write_text(text, encoding="utf-8")
            if parse_file(cell.job_file) != asked.tree:
                raise SweepError(f"cell {cell.name}: YAML does not hold all of its values")
    write_whole(folder / SWEEP_FILE, record.model_dump_json(indent=2) + "\n")
    return made, notes


def _before(sweep: Expanded, folder: Path) -> SweepDir | None:
    """What lies in the folder already; None also where its sweep.json cannot be read."""
    if not (folder / SWEEP_FILE).exists():
        strange = [path.name for path in folder.iterdir() if path.name not in (LOCK_FILE, "cells")]
        if strange:
            raise SweepError(
                f"{folder} holds {strange[0]} and is no sweep's: name another folder with --out"
            )
        return None
    record = _read(SweepRecord, folder / SWEEP_FILE)
    if record is None:
        return None
    if record.name != sweep.name:
        raise SweepError(
            f"{folder} is the sweep {record.name}'s, this is {sweep.name}: name another folder "
            "with --out"
        )
    return SweepDir(folder, record)


def _as_they_lie(made: SweepDir) -> dict[str, CellDir]:
    """The cells as their own files tell of them, where no sweep.json does."""
    found: dict[str, CellDir] = {}
    for name, cell in made.cells.items():
        if cell.job_file.is_file():
            digest = _sha256(cell.job_file.read_bytes())
            record = cell.record.model_copy(update={"job_sha256": digest})
            result = _read(ResultRecord, cell.path / RESULT_FILE)
            run_sha256 = result.run_sha256 if result else _run_sha256(record, made.record)
            found[name] = CellDir(cell.path, record, run_sha256)
    return found


def _record(sweep: Expanded, digests: dict[str, str]) -> SweepRecord:
    planned = dict.fromkeys(c.planned_for for c in sweep.cells if c.planned_for is not None)
    own = dict.fromkeys(str(cell.tree["accelerator"]) for cell in sweep.cells)
    return SweepRecord(
        name=sweep.name,
        accelerator=", ".join(planned or own),
        axes=sweep.axes,
        monotone=sweep.monotone,
        run_set=sweep.run_set,
        cells=[_cell_record(cell, digests[cell.name]) for cell in sweep.cells],
    )


def _cell_record(cell: Cell, digest: str) -> CellRecord:
    return CellRecord(
        name=cell.name,
        settings=cell.settings,
        place=cell.place,
        job_sha256=digest,
        planned_for=cell.planned_for,
    )


def _put_aside(was: dict[str, CellDir], now: dict[str, CellDir]) -> list[str]:
    """Take away what cells have of jobs that they no longer are, and tell."""
    other = [n for n, cell in was.items() if n in now and cell.run_sha256 != now[n].run_sha256]
    for name in other:
        _see_ended(was[name])
    notes: list[str] = []
    for name in (n for n in was if n in now):
        if was[name].planned() and not now[name].planned():
            notes.append(f"{name}: its job has changed, its plan is dropped")
            (now[name].path / PLANNED_FILE).unlink()
            now[name].plan_file.unlink(missing_ok=True)
    for name in other:
        now[name].drop_result()
        if now[name].runs.is_dir():
            notes.append(f"{name}: its job has changed, its runs are now in {_earlier(now[name])}")
    gone = [name for name in was if name not in now]
    return [*notes, *(f"{n}: no longer in the sweep; its folder is left there" for n in gone)]


def _see_ended(cell: CellDir) -> None:
    run = cell.newest()
    if run is None:
        return
    try:
        ended = status.settle(run).exit_status is not None
    except (status.CannotTellError, archive.NoSuchRunError) as error:
        raise SweepError(
            f"cell {cell.name} is another job now, and whether {run.name} has ended cannot be told:"
            f" {error}; once nothing of it runs, move {run.path} away"
        ) from error
    if not ended:
        raise SweepError(
            f"cell {cell.name} still runs, as the job that it was: headroom cancel {run.name} "
            f"--runs {cell.runs} first"
        )


def _earlier(cell: CellDir) -> str:
    """Move a cell's runs and logs, side by side as they were; the new folder's name."""
    number = 1
    while (aside := cell.path / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    for name in ("logs", "runs"):
        if (cell.path / name).is_dir():
            (cell.path / name).rename(aside / name)
    return aside.name


def _yaml(tree: dict[str, Any]) -> str:
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def _run_sha256(cell: CellRecord, sweep: SweepRecord) -> str:
    return _sha256(json.dumps([cell.job_sha256, sweep.run_set]).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read[R: Record](kind: type[R], path: Path) -> R | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
