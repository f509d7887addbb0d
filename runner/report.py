"""The page of a sweep, of a run, or of a plan: one file that needs nothing else. Records in.

What the page says is in runner/templates, what it shows of the records is worked out here, and
runner/chart.py draws. The same records make the same bytes.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jinja2
from markupsafe import Markup
from pydantic import JsonValue

from jobs.records import MemoryPlan, StepRecord, gib
from runner import chart, plan_table
from runner.archive import write_whole
from runner.diagnose import arithmetic
from runner.show import ending_text, when
from runner.sweep_row import DOES_NOT_FIT, Row, Sweep

_GIB = 2**30
_STEPS = 24  # rows of a table of steps; more are left out evenly
_TENSORS = 8  # of a plan's `why`


@dataclass(frozen=True)
class Verdict:
    """How a cell stands, the strongest thing that is known of it.

    Attributes:
        kind: the class of its colours in page.css.
        by: who says so: run, plan, inferred, or nobody.
        word: what it says.
        means: the same in a sentence, for the legend.
    """

    kind: str
    by: str
    word: str
    means: str


_RUN_FITS = Verdict("run-fits", "run", "fits", "it ran to its end")
_DONE = Verdict("run-fits", "run", "done", "it ran to its end, where there is no plan of HBM")
_OUT_OF_HBM = Verdict("run-out", "run", "out of HBM", "it ran, and found no room")
_FAILED = Verdict("run-failed", "run", "failed", "it ran, and ended otherwise than by HBM")
_RUNS = {
    "fits": _RUN_FITS,
    "out_of_hbm": _OUT_OF_HBM,
    "failed": _FAILED,
    "refused": Verdict("run-failed", "run", "refused", "the trainer or the host refused it"),
    "interrupted": Verdict("run-other", "run", "interrupted", "somebody stopped it"),
    "lost": Verdict("run-other", "run", "lost", "nobody saw it end"),
    "running": Verdict("run-other", "run", "running", "it has not ended"),
}
_PLANNED = {
    "fits": Verdict("plan-fits", "plan", "fits", "planned, not run"),
    "does_not_load": Verdict("plan-out", "plan", "does not fit", "planned: short of HBM"),
    "engine_refused": Verdict("plan-out", "plan", "engine refuses", "planned: its share is small"),
    "refused": Verdict("plan-none", "plan", "refused", "the job cannot be planned as asked"),
    "failed": Verdict("plan-none", "plan", "failed", "the planner failed"),
}
_SKIPPED = Verdict("skipped", "", "skipped", "not run, for the reason that the cell tells")
_OPEN = Verdict("open", "", "open", "neither planned nor run")
_INFERRED = "by a neighbour's plan: memory grows along the axis"
_LEGEND = (
    *(_RUN_FITS, _OUT_OF_HBM, _FAILED, _RUNS["lost"]),
    *(_PLANNED["fits"], _PLANNED["does_not_load"]),
    Verdict("inferred-fits", "inferred", "fits", _INFERRED),
    Verdict("inferred-out", "inferred", "does not fit", _INFERRED),
    *(_PLANNED["failed"], _SKIPPED, _OPEN),
)


def verdict(row: Row) -> Verdict:
    """What the page says of a cell: the run's word before the plan's."""
    if row.outcome is not None:
        return _DONE if row.outcome == "fits" and row.planned is None else _RUNS[row.outcome]
    if row.skipped is not None and row.planned in (None, "fits"):
        return _SKIPPED
    if row.planned is None:
        return _OPEN
    found = _PLANNED[row.planned]
    if row.planned_from is None:
        return found
    return Verdict(found.kind.replace("plan", "inferred"), "inferred", found.word, _INFERRED)


def against_plan(row: Row) -> bool:
    """The plan promised one thing, and the run did the other."""
    if row.planned == "fits":
        return row.outcome == "out_of_hbm"
    return row.planned in DOES_NOT_FIT and row.outcome == "fits"


@dataclass(frozen=True)
class HeatMap:
    """One table of verdicts.

    Attributes:
        fixed: value by key of the axes that the table does not show.
        down, across: the keys of the axes that it does; `across` is empty with one axis.
        columns: values across.
        lines: of each value down: the value, and a row for each column, None where there is none.
    """

    fixed: dict[str, JsonValue]
    down: str
    across: str
    columns: list[JsonValue]
    lines: list[tuple[JsonValue, list[Row | None]]]


def heat_maps(sweep: Sweep) -> list[HeatMap]:
    """The first axis down, the second across, a table for each combination of the others."""
    if not sweep.axes:
        return []
    found = {_place(list(row.place.items())): row for row in sweep.rows if row.place}
    (down, downs), *more = sweep.axes.items()
    across, columns = more[0] if more else ("", cast("list[JsonValue]", [None]))
    others = more[1:]
    maps: list[HeatMap] = []
    for values in itertools.product(*(values for _, values in others)):
        fixed = dict(zip((key for key, _ in others), values, strict=True))
        lines: list[tuple[JsonValue, list[Row | None]]] = []
        for value in downs:
            keys = [
                [(down, value), *([(across, column)] if across else []), *fixed.items()]
                for column in columns
            ]
            lines.append((value, [found.get(_place(key)) for key in keys]))
        maps.append(HeatMap(fixed, down, across, columns if across else ["verdict"], lines))
    return maps


def _place(values: Sequence[tuple[str, JsonValue]]) -> str:
    return json.dumps(sorted(values))


def write_sweep(sweep: Sweep, path: Path) -> None:
    """Write the page of a sweep, whole or not at all.

    Raises:
        NoPicturesError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    page = _template("sweep.html").render(
        sweep=sweep,
        maps=heat_maps(sweep),
        named=[row for row in sweep.rows if not row.place],
        anchors={row.cell: f"cell-{at}" for at, row in enumerate(sweep.rows, start=1)},
        counts=Counter((v.kind, v.by, v.word) for v in map(verdict, sweep.rows)).most_common(),
        legend=_LEGEND,
        compared=[(row, one) for row in sweep.rows for one in row.measured],
        causes=_causes(sweep.rows),
        assumptions=Counter(
            note for row in sweep.rows if row.plan for note in row.plan.assumptions
        ),
        plans=sum(row.plan is not None for row in sweep.rows),
    )
    write_whole(path, page)


def write_run(row: Row, path: Path) -> None:
    """Write the page of one run, or of one plan, whole or not at all.

    Raises:
        NoPicturesError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    write_whole(path, _template("run.html").render(row=row))


def planned_row(plan: MemoryPlan, *, job_file: str, command: str) -> Row:
    """A plan as a cell that was not run."""
    return Row(
        cell=f"{plan.job} on {plan.accelerator}",
        settings={},
        place={},
        job_file=job_file,
        command=command,
        steps=[],
        measured=[],
        planned=plan.verdict,
        plan=plan,
    )


def _template(name: str) -> jinja2.Template:
    environment: Any = jinja2.Environment(
        loader=jinja2.PackageLoader("runner"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "gib": gib, "number": _number, "signed": _signed, "text": _text, "share": _share,
        "verdict": verdict, "against_plan": against_plan, "kind": chart.kind,
        "hyphened": chart.hyphened, "ending": ending_text, "when": when,
        "arithmetic": arithmetic, "told": _told,
        "reason": plan_table.reason, "doubt": plan_table.doubt, "step_line": plan_table.step_line,
        "sentence": _sentence,
        "plan_svg": _plan_svg, "steps_svg": _steps_svg,
        "ledger": _ledger, "some_steps": _some_steps, "phases": _phases,
    }  # fmt: skip
    environment.filters.update(filters)
    environment.globals.update(colours=chart.COLOURS, tensors=_TENSORS)
    return environment.get_template(name)


def _plan_svg(plan: MemoryPlan) -> Markup:
    return Markup(chart.plan_svg(plan))  # noqa: S704 - made of an XML tree, which escapes


def _steps_svg(steps: Sequence[StepRecord]) -> Markup:
    return Markup(chart.steps_svg(steps))  # noqa: S704 - the same


def _causes(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each cause, most frequent first; "success" is none."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.diagnosis is not None and row.diagnosis.cause != "success":
            found.setdefault(row.diagnosis.cause, []).append(row)
    return sorted(found.items(), key=lambda one: -len(one[1]))


def _ledger(plan: MemoryPlan) -> list[tuple[str, list[int | None]]]:
    """Each owner that holds anything, and its bytes in each phase; None where it is not there."""
    owners = dict.fromkeys(owner for phase in plan.phases.values() for owner in phase)
    lines = [(owner, [phase.get(owner) for phase in plan.phases.values()]) for owner in owners]
    return [(owner, sizes) for owner, sizes in lines if any(sizes)]


def _some_steps(steps: Sequence[StepRecord]) -> Sequence[StepRecord]:
    """Steps for a table: all, or as many as it holds, first and last among them."""
    if len(steps) <= _STEPS:
        return steps
    return [steps[at * (len(steps) - 1) // (_STEPS - 1)] for at in range(_STEPS)]


def _phases(steps: Sequence[StepRecord]) -> list[str]:
    return list(dict.fromkeys(phase for one in steps for phase in one.seconds))


def _number(size_bytes: int | None) -> str:
    """GiB without the unit, for a column that has it in its head; nothing where there is none."""
    return "" if size_bytes is None else f"{size_bytes / _GIB:.3f}".replace("-", "\u2212")


def _signed(size_bytes: int, digits: int = 2) -> str:
    """GiB with its sign, by the minus that is as wide as a plus.

    >>> _signed(-(2**30)), _signed(2**29)
    ('\u22121.00', '+0.50')
    """
    return f"{size_bytes / _GIB:+.{digits}f}".replace("-", "\u2212")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:+.1f}".replace("-", "\u2212") if whole else ""


def _text(value: JsonValue) -> str:
    """A value as the job file has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _told(name: str, value: float | str) -> str:
    """A number of a diagnosis: bytes as GiB, anything else as it is."""
    return gib(value) if name.endswith("_bytes") and not isinstance(value, str) else str(value)
