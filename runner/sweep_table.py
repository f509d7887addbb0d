"""A sweep's rows as a table for a person, and as CSV for a spreadsheet."""

import csv
import io
from collections import Counter
from collections.abc import Iterator

from pydantic import JsonValue
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.records import gib
from runner.matrix import text_of
from runner.sweep_row import Measured, Row, Sweep

_COLUMNS = ("cell", "planned", "headroom", "outcome", "cause", "planned against measured")


def print_table(sweep: Sweep, console: Console) -> None:
    """A line for each cell, then what a reader should know."""
    console.print(Text(f"{sweep.name}: {len(sweep.rows)} cells, planned for {sweep.accelerator}"))
    table = Table(box=None, pad_edge=False)
    for column in _COLUMNS:
        right = column == "headroom"
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in sweep.rows:
        table.add_row(*(Text(text) for text in _texts(row)))
    console.print(table)
    for note in sweep.notes:
        console.print(Text(f"note: {note}"))
    console.print(Text(summary(sweep)))


def summary(sweep: Sweep) -> str:
    """How many cells stand how, on one line."""
    own = sum(row.planned is not None and row.planned_from is None for row in sweep.rows)
    planned = Counter(_word(row.planned) for row in sweep.rows if row.planned)
    ran = Counter(_word(row.outcome) for row in sweep.rows if row.outcome)
    skipped = sum(row.skipped is not None for row in sweep.rows)
    parts = [f"{len(sweep.rows)} cells"]
    if planned:
        parts.append(f"planned {_counts(planned)} ({own} by a plan of their own)")
    parts.append(f"ran {_counts(ran)}" if ran else "none ran")
    return "; ".join([*parts, *([f"{skipped} skipped"] if skipped else [])])


def _counts(found: Counter[str]) -> str:
    return ", ".join(f"{number} {word}" for word, number in found.items())


def _word(value: str | None) -> str:
    return "" if value is None else value.replace("_", " ").replace("hbm", "HBM")


def _texts(row: Row) -> Iterator[str]:
    yield row.cell
    by = f" (by {row.planned_from})" if row.planned_from else ""
    yield f"{_word(row.planned) or '-'}{by}"
    yield gib(row.plan.headroom_bytes) if row.plan else "-"
    yield _word(row.outcome) or ("skipped" if row.skipped else "-")
    yield _cause(row)
    yield "; ".join(_compared(one) for one in row.measured) or "-"


def _cause(row: Row) -> str:
    """Why it did not end well, or was not run, or has no plan."""
    if row.diagnosis is not None:
        return row.diagnosis.cause
    return row.skipped or row.plan_said.replace("\n", "; ") or "-"


def _compared(one: Measured) -> str:
    return (
        f"{one.what}: {gib(one.planned_bytes)} planned, {gib(one.measured_bytes)} measured "
        f"({one.error_bytes / 2**30:+.2f})"
    )


def csv_text(sweep: Sweep) -> str:
    """A line for each cell; bytes as whole numbers, a column for each key that a cell changes."""
    keys = list(dict.fromkeys(key for row in sweep.rows for key in row.settings))
    fixed = (
        "cell", "planned", "planned_from", "headroom_bytes", "peak_bytes", "usable_bytes",
        "outcome", "cause", "skipped", "plan_said", "steps", "run",
    )  # fmt: skip
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*fixed, *keys, "measured"])
    for row in sweep.rows:
        plan = row.plan
        sizes = (plan.headroom_bytes, plan.peak_bytes, plan.usable_bytes) if plan else ("", "", "")
        cause = row.diagnosis.cause if row.diagnosis else ""
        told = (row.outcome, cause, row.skipped, row.plan_said, len(row.steps), row.run)
        values = [_cell(row.settings[key]) if key in row.settings else "" for key in keys]
        compared = "; ".join(_compared(one) for one in row.measured)
        writer.writerow([row.cell, row.planned, row.planned_from, *sizes, *told, *values, compared])
    return out.getvalue()


def _cell(value: JsonValue) -> str:
    return value if isinstance(value, str) else text_of(value)
