"""Plan a sweep's cells, several at once, and no more of them than needed."""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from jobs.problems import JobError
from jobs.records import MemoryPlan, gib
from runner import planning
from runner.monotone import Grid, ask_next, grids, told
from runner.sweep import CellDir, PlannedRecord, SweepDir
from runner.sweep_row import DOES_NOT_FIT, Planned
from runner.watch import Interrupts, Say

FITS = "fits"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How to plan a sweep.

    Attributes:
        how: to plan each cell.
        parallel: children at once.
        every_cell: those, too, of which others tell.
        names: of the cells to plan; None: all.
    """

    how: planning.Asked
    parallel: int
    every_cell: bool
    names: Sequence[str] | None = None


def answer_of(verdict: Planned | None) -> bool | None:
    """Whether a cell fits, by its plan; None where there is none."""
    if verdict == FITS:
        return True
    return False if verdict in DOES_NOT_FIT else None


def order_of(sweep: SweepDir) -> list[Grid]:
    """The sweep's cells by what they tell of each other."""
    places = {cell.name: cell.place for cell in sweep.record.cells}
    return grids(places, sweep.record.monotone)


def planned_of(sweep: SweepDir) -> dict[str, tuple[Planned, str | None]]:
    """Verdicts by cell, and the cell whose plan told; None: its own."""
    own: dict[str, Planned] = {
        cell.name: found.verdict for cell in sweep.cells.values() if (found := cell.planned())
    }
    answers = answers_of(own)
    verdicts: dict[str, tuple[Planned, str | None]] = {n: (v, None) for n, v in own.items()}
    planned_for = {cell.name: cell.planned_for for cell in sweep.record.cells}
    for grid in order_of(sweep):
        for name, by in told(grid, answers).items():
            if name not in own and planned_for[name] is not None:
                verdicts[name] = (own[by.by], by.by)
    return verdicts


def answers_of(verdicts: Mapping[str, Planned]) -> dict[str, bool]:
    """Which cells fit, and which do not; those without a plan lack."""
    found = {name: answer_of(verdict) for name, verdict in verdicts.items()}
    return {name: fits for name, fits in found.items() if fits is not None}


class Open:
    """The cells that have no answer yet, as answers come.

    Args:
        sweep: whose.
        every_cell: no cell is settled by another's answer.
        alone: nor are these.
        names: of the cells that need an answer; None: all.

    Attributes:
        left: their names.
    """

    def __init__(
        self,
        sweep: SweepDir,
        *,
        every_cell: bool,
        alone: AbstractSet[str] = frozenset(),
        names: Sequence[str] | None = None,
    ) -> None:
        every = [cell.name for cell in sweep.record.cells]
        self.left = set(every if names is None else names)
        self._alone = alone
        self._grids = order_of(sweep)
        self._grid_of = {name: grid for grid in self._grids for name in grid.ranks}
        self._every_cell = every_cell

    def answer(self, name: str, fits: bool | None) -> set[str]:  # noqa: FBT001 - it is the answer
        """A cell has its answer, None where it tells nothing of others; those it settled."""
        told_of = {name}
        if fits is not None and not self._every_cell:
            told_of |= self._grid_of[name].settled(name, fits=fits) - self._alone
        told_of &= self.left
        self.left -= told_of
        return told_of

    def next(self, busy: Sequence[str] = ()) -> str | None:
        """The cell to ask now; None: wait for those that are being asked, or all is known."""
        self._grids = [grid for grid in self._grids if not self.left.isdisjoint(grid.ranks)]
        if self._every_cell:
            every = (name for grid in self._grids for name in grid.ranks)
            return next((name for name in every if name in self.left and name not in busy), None)
        for grid in self._grids:
            name = ask_next(grid, self.left, [name for name in busy if name in grid.ranks])
            if name is not None:
                return name
        return None


def plan(
    sweep: SweepDir, asked: Asked, *, say: Say, interrupts: Interrupts, trainer: Sequence[str]
) -> int:
    """Plan what has no plan yet; how many cells were planned now.

    Raises:
        PlanStoppedError: a signal came; what was planned by then is kept.
        SweepError: a cell's job is not the one that was expanded.
    """
    cells, open_ = sweep.cells, Open(sweep, every_cell=asked.every_cell, names=asked.names)
    for name, cell in cells.items():
        _answer_of_before(cell, asked.how, open_, name)
    planner = _Planner(asked.how, say, interrupts, trainer)
    total, planned = len(open_.left), 0
    with ThreadPoolExecutor(asked.parallel) as pool:
        busy: dict[Future[str], str] = {}

        def submit(name: str) -> Future[str]:
            return pool.submit(planner.plan, cells[name])

        while _fill(busy, 0 if interrupts.numbers else asked.parallel, open_, submit):
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                name = busy.pop(future)
                if isinstance(future.exception(), planning.PlanStoppedError):
                    continue
                text = future.result()
                found = cells[name].planned()
                open_.answer(name, answer_of(found.verdict) if found else None)
                planned += 1
                say(f"planned {total - len(open_.left)}/{total}: {name}: {text}")
    if interrupts.numbers:
        raise planning.PlanStoppedError(interrupts.numbers[0])
    if planned:
        others = ", the others follow from them" if planned < total else ""
        say(f"{planned} of {total} cells were planned{others}")
    return planned


def _fill(
    busy: dict[Future[str], str], parallel: int, open_: Open, submit: Callable[[str], Future[str]]
) -> bool:
    """Have as many cells planned at once as may be; false: nothing is left to wait for."""
    while len(busy) < parallel:
        name = open_.next(list(busy.values()))
        if name is None:
            break
        busy[submit(name)] = name
    return bool(busy)


def _answer_of_before(cell: CellDir, how: planning.Asked, open_: Open, name: str) -> None:
    """What need not be planned: it has its plan, or no HBM; of that only: is it a job at all?"""
    found = _kept(cell, how)
    if found is not None:
        open_.answer(name, answer_of(found.verdict))
    elif cell.record.planned_for is None and name in open_.left:
        if refusal := _refusal(cell):
            _keep(cell, how, "refused", said=refusal)
        open_.answer(name, None)


def _kept(cell: CellDir, how: planning.Asked) -> PlannedRecord | None:
    """A plan that need not be made again: not one that failed, nor a quicker one than asked."""
    found = cell.planned()
    if found is None or found.verdict == "failed" or found.engine_weights != how.engine_weights:
        return None
    return None if found.quick and not how.quick else found


def _refusal(cell: CellDir) -> str:
    try:
        cell.load([])
    except JobError as error:
        return str(error)
    return ""


def _keep(
    cell: CellDir,
    how: planning.Asked,
    verdict: Planned,
    *,
    said: str = "",
    plan: MemoryPlan | None = None,
) -> None:
    record = PlannedRecord(
        job_sha256=cell.record.job_sha256,
        planned_for=cell.record.planned_for,
        quick=how.quick,
        engine_weights=how.engine_weights,
        verdict=verdict,
        said=said,
    )
    cell.put_planned(record, None if plan is None else plan.model_dump_json(indent=2) + "\n")


@dataclass(frozen=True)
class _Planner:
    how: planning.Asked
    say: Say
    interrupts: Interrupts
    trainer: Sequence[str]

    def plan(self, cell: CellDir) -> str:
        """Plan one cell and keep what came of it; in words."""
        if self.interrupts.numbers:
            raise planning.PlanStoppedError(self.interrupts.numbers[0])
        try:
            job = cell.load([f"accelerator={cell.record.planned_for}"])
            [found] = planning.plan(
                job,
                self.how,
                say=lambda line: self.say(f"{cell.name}: {line}"),
                interrupts=self.interrupts,
                trainer=self.trainer,
            )
        except (JobError, planning.PlanRefusedError) as error:
            _keep(cell, self.how, "refused", said=str(error))
            return f"refused: {error}"
        except (planning.PlanFailedError, OSError) as error:
            _keep(cell, self.how, "failed", said=str(error))
            return f"the planner failed: {error}"
        _keep(cell, self.how, found.verdict, plan=found)
        left = found.headroom_bytes
        room = f"{gib(left)} to spare" if left >= 0 else f"short by {gib(-left)}"
        return f"{found.verdict.replace('_', ' ')}, {room}"
