"""Run a sweep's cells one after the other, each once, and no more of them than needed."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.problems import JobError
from jobs.records import PLAN_FILE, Manifest
from runner import archive, environment, launch, status
from runner.conclude import diagnosis_of
from runner.ending import signal_name
from runner.monotone import told
from runner.provenance import checkout
from runner.run_row import outcome_of
from runner.sweep import CellDir, ResultRecord, SweepDir
from runner.sweep_file import SweepError, check_sets
from runner.sweep_plan import Open, order_of, planned_of
from runner.sweep_row import DOES_NOT_FIT, Outcome
from runner.watch import Interrupts, Say

if TYPE_CHECKING:
    from jobs.spec import Job
    from runner.archive import RunDir

PLANNED_NOT_TO_FIT = "planned not to fit"
# How `launch` ends a run that the machine could not start: that tells nothing of the job.
_NOT_STARTED = 125
_POLL_S = 0.5


class StoppedError(Exception):
    """A signal came; the sweep goes on from here when it is run again.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal_name(number)}: the sweep was stopped; run it again to go on")
        self.number = number


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of the sweep that one of several hosts runs, from 1."""

    number: int
    of: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How to run a sweep.

    Attributes:
        where: auto, process or docker.
        sets: key=value each, for this host alone.
        only: cells to run, whatever others tell of them; none: all.
        again: cells to run although they have run, whatever others tell of them; beside `only`,
            those too.
        share: of the cells; None: all.
        run_anyway: cells, too, that are planned not to fit.
        every_cell: cells, too, of which others tell.
    """

    where: launch.Where
    sets: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    share: Share | None = None
    run_anyway: bool = False
    every_cell: bool = False


def is_result(manifest: Manifest, outcome: Outcome) -> bool:
    """The cell need not be run again: it ended by itself, and was started."""
    code = manifest.exit_status.code if manifest.exit_status else None
    unstarted = outcome == "refused" and code == _NOT_STARTED
    return outcome not in ("running", "interrupted", "lost") and not unstarted


def selected(sweep: SweepDir, asked: Asked) -> list[str]:
    """The cells that were asked for, in order.

    Raises:
        SweepError: there is no cell of a name, or no such share.
    """
    names = [cell.name for cell in sweep.record.cells]
    for name in (*asked.only, *asked.again):
        if name not in names:
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise SweepError(f"no cell {name!r} in {sweep.record.name}; its cells: {shown}")
    if asked.only:
        names = [name for name in names if name in (*asked.only, *asked.again)]
    if asked.share is None:
        return names
    if not 1 <= asked.share.number <= asked.share.of:
        raise SweepError(f"--share {asked.share.number}/{asked.share.of} is none: the first is 1/N")
    mine = set(share_of(sweep, asked.share))
    return [name for name in names if name in mine]


def check(sweep: SweepDir, asked: Asked) -> list[str]:
    """What can be told before anything is planned or run; see `selected`.

    Raises:
        SweepError: there is no such cell or share; a value of `sets` is one that no job takes.
        launch.HostNotFit: this machine cannot run the first cell that is to run.
    """
    names, cells = selected(sweep, asked), sweep.cells
    if names and asked.sets:
        check_sets(cells[names[0]].tree(), asked.sets)
    planned = planned_of(sweep)
    for name in names:
        verdict, _ = planned.get(name, (None, None))
        found = cells[name].result()
        has_run = found is not None and found.outcome is not None and name not in asked.again
        if has_run or (verdict in DOES_NOT_FIT and not asked.run_anyway):
            continue
        with contextlib.suppress(JobError):  # the cell's row will tell
            launch.place(asked.where, cells[name].load([*sweep.record.run_set, *asked.sets]))
            break
    return names


def share_of(sweep: SweepDir, share: Share) -> Iterator[str]:
    """A host's cells. Those in a line of the longest monotone axis stay together."""
    axes = {axis: len(sweep.record.axes[axis]) for axis in sweep.record.monotone}
    longest = max(axes, key=lambda axis: axes[axis], default=None)
    lines: dict[str, list[str]] = {}
    for cell in sweep.record.cells:
        others = {axis: value for axis, value in cell.place.items() if axis != longest}
        alone = cell.name if not cell.place or longest is None else ""
        lines.setdefault(f"{alone} {others}", []).append(cell.name)
    for number, line in enumerate(lines.values()):
        if number % share.of == share.number - 1:
            yield from line


def run(
    sweep: SweepDir,
    asked: Asked,
    *,
    say: Say,
    trainer: Sequence[str],
    interrupts: Interrupts,
    chips_lock: Path,
) -> list[str]:
    """Run what has no result yet; the cells that still have none.

    Args:
        sweep: whose folder we hold.
        asked: what to run, and how.
        say: is told a line for each cell.
        trainer: the program of the process way.
        interrupts: entered; a signal stops the job that runs.
        chips_lock: says who has the chips of this host.

    Raises:
        StoppedError: a signal came.
        SweepError: see `selected`; a run of another host has not ended.
        launch.HostNotFit: this machine can run none of them.
    """
    sweeping = _Sweeping(sweep, asked, say, trainer, interrupts, chips_lock)
    cells, names = sweep.cells, selected(sweep, asked)
    wanted = set(names)
    again = wanted.intersection(asked.again)
    # What one cell tells of others is not for those that were named.
    open_ = Open(sweep, every_cell=asked.every_cell or bool(asked.only), alone=again)
    for name, cell in cells.items():
        outcome = sweeping.before(cell, wanted=name in wanted)
        if outcome is not None and name not in again:
            open_.answer(name, _answer_of(outcome))
    to_run = wanted.difference(sweeping.not_to_run(names))
    for name in again & to_run:
        cells[name].drop_result()
    open_.left &= to_run
    while (name := open_.next()) is not None:
        open_.answer(name, _answer_of(sweeping.run(cells[name])))
        say(f"{len(names) - len(open_.left)}/{len(names)} {name}: {told_of(cells[name])}")
        if interrupts.numbers and cells[name].result() is None:
            raise StoppedError(interrupts.numbers[0])
    if not (asked.every_cell or asked.only):
        sweeping.skip_told(names)
    return [name for name in names if cells[name].result() is None]


def _answer_of(outcome: Outcome | None) -> bool | None:
    if outcome == "fits":
        return True
    return False if outcome == "out_of_hbm" else None


@dataclass(frozen=True)
class _Sweeping:
    """One `headroom sweep run`."""

    sweep: SweepDir
    asked: Asked
    say: Say
    trainer: Sequence[str]
    interrupts: Interrupts
    chips_lock: Path

    def before(self, cell: CellDir, *, wanted: bool) -> Outcome | None:
        """The outcome that a cell has already. A run that still goes on is waited for."""
        found, newest = cell.result(), cell.newest()
        if wanted and found is not None and found.outcome is None:  # it was skipped, then
            cell.drop_result()
            found = None
        again = wanted and cell.name in self.asked.again
        if newest is None or (found is not None and not again):
            return found.outcome if found else None
        try:
            outcome = self._keep(cell, newest, self._ended(cell, newest))
        except (status.CannotTellError, archive.NoSuchRunError) as error:
            if not wanted:
                return None
            raise SweepError(f"cell {cell.name}: {newest.name}: {error}") from error
        return outcome if cell.result() else None

    def not_to_run(self, names: list[str]) -> Iterator[str]:
        """Cells whose job is refused or planned not to fit, unless that was asked for; recorded."""
        cells, planned = self.sweep.cells, planned_of(self.sweep)
        for name in names:
            verdict, _ = planned.get(name, (None, None))
            known = cells[name].result()
            has_run = known is not None and known.outcome is not None
            if has_run and name not in self.asked.again:
                continue
            if verdict in DOES_NOT_FIT and not self.asked.run_anyway:
                self._skip(cells[name], PLANNED_NOT_TO_FIT)
                yield name
                continue
            # Before the first is run, so that a mistake is not told after hours.
            try:
                self.job(cells[name])
            except JobError as error:
                self._skip(cells[name], f"the job is refused: {error}")
                yield name

    def job(self, cell: CellDir) -> "Job":
        """The job to run."""
        return cell.load([*self.sweep.record.run_set, *self.asked.sets])

    def run(self, cell: CellDir) -> Outcome:
        """One run of a cell, to its end."""
        job = self.job(cell)
        client, why = launch.place(self.asked.where, job)
        self.say(f"{cell.name}: running in {why}")
        if self.interrupts.numbers:
            raise StoppedError(self.interrupts.numbers[0])
        kind = "process" if client is None else "docker"
        code = checkout(environment.CODE)
        with (
            Interrupts() as interrupts,
            Path(os.devnull).open("wb") as nowhere,
            archive.create(job, verb="train", where=kind, runs=cell.runs, code=code) as made,
        ):
            # `launch` gives the signals back as it ends: to the sweep's own.
            interrupts.numbers.extend(self.interrupts.numbers)
            self._bring_plan(cell, made)
            manifest = launch.launch(
                made,
                job,
                client=client,
                out=nowhere,
                say=self.say,
                trainer=self.trainer,
                interrupts=interrupts,
                chips_lock=self.chips_lock,
            )
        self.interrupts.numbers[:] = [*self.interrupts.numbers, *interrupts.numbers]
        return self._keep(cell, made, manifest)

    def _bring_plan(self, cell: CellDir, made: "RunDir") -> None:
        """Lay the plan beside the log, for the diagnosis, where it is of the very job that runs."""
        job = made.read_json(made.job_file) or {}
        plan = made.read_json(cell.plan_file) or {}
        same = not self.sweep.record.run_set and plan.get("accelerator") == job.get("accelerator")
        if same and cell.planned() is not None:
            archive.write_whole(made.path / PLAN_FILE, cell.plan_file.read_bytes())

    def skip_told(self, names: list[str]) -> None:
        """Record of each cell that was not run which other's run told of it."""
        cells = self.sweep.cells
        results = {name: found for name, cell in cells.items() if (found := cell.result())}
        known = {name: _answer_of(found.outcome) for name, found in results.items()}
        answers = {name: fits for name, fits in known.items() if fits is not None}
        along = ", ".join(self.sweep.record.monotone)
        for grid in order_of(self.sweep):
            for name, by in told(grid, answers).items():
                if name not in self.asked.again and name in names and name not in results:
                    what = "ran" if by.fits else "ran out of HBM"
                    why = f"cell {by.by} {what}, and memory grows along {along}"
                    self._skip(cells[name], why)

    def _skip(self, cell: CellDir, why: str) -> None:
        known = cell.result()
        if known is None or known.skipped != why:
            self.say(f"{cell.name}: not run: {why}")
        if known is None or known.outcome is None:
            cell.put_result(ResultRecord(run_sha256=cell.run_sha256, skipped=why))

    def _keep(self, cell: CellDir, made: "RunDir", manifest: Manifest) -> Outcome:
        """Record what a run that has ended tells."""
        outcome = outcome_of(manifest, diagnosis_of(made))
        if is_result(manifest, outcome):
            cell.put_result(
                ResultRecord(
                    run_sha256=cell.run_sha256,
                    outcome=outcome,
                    run=made.name,
                    host=str(manifest.host["name"]),
                )
            )
        return outcome

    def _ended(self, cell: CellDir, run: "RunDir") -> Manifest:
        """The manifest of a run whose runner may be gone, once it has ended."""
        manifest = status.settle(run)
        if manifest.exit_status is None:
            self.say(f"{cell.name}: {run.name} still goes on, and is waited for")
        while manifest.exit_status is None:
            if self.interrupts.numbers:
                status.cancel(run)
                raise StoppedError(self.interrupts.numbers[0])
            time.sleep(_POLL_S)
            manifest = status.settle(run)
        return manifest


def told_of(cell: CellDir) -> str:
    """A cell's newest run in words: the outcome, the seconds, the cause."""
    newest = cell.newest()
    if newest is None:
        return "not run"
    manifest, diagnosis = newest.manifest(), diagnosis_of(newest)
    text = outcome_of(manifest, diagnosis).replace("_", " ")
    if manifest.started and manifest.finished:
        began, ended = (datetime.fromisoformat(t) for t in (manifest.started, manifest.finished))
        text += f" after {(ended - began).total_seconds():.0f} s"
    if diagnosis is None:
        return text
    line = (diagnosis.root_line or diagnosis.explanation).strip()
    return f"{text}: {diagnosis.cause}: {line if len(line) <= 160 else f'{line[:157]}...'}"
