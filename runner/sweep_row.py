"""A cell of a sweep as its readers see it: the table, the JSON, the CSV and the page. A record."""

from typing import Literal

from pydantic import JsonValue

from jobs.records import Diagnosis, Manifest, MemoryPlan, Record, StepRecord


class Measured(Record):
    """The same bytes of one chip, as they were planned and as the chips said.

    Attributes:
        what: whose, in words: "in use before update", "temporaries of jit_training_step".
        planned_bytes: by the plan.
        measured_bytes: by the runtime: a sample of hbm.jsonl, or a number of the log's.
    """

    what: str
    planned_bytes: int
    measured_bytes: int

    @property
    def error_bytes(self) -> int:
        """Measured less planned: positive where the plan promised too much room."""
        return self.measured_bytes - self.planned_bytes


Planned = Literal["fits", "does_not_load", "engine_refused", "refused", "failed"]
# Verdicts of a plan that promises a failure.
DOES_NOT_FIT: tuple[Planned, ...] = ("does_not_load", "engine_refused")
Outcome = Literal["running", "fits", "out_of_hbm", "refused", "failed", "interrupted", "lost"]


class Row(Record):
    """One cell of a sweep.

    Attributes:
        cell: its name.
        settings: what it changes of the base job, value by dotted key.
        place: its place in the matrix, value by dotted key; empty for a named cell.
        job_file: relative to the sweep's folder.
        command: that runs it again, as one would type it.
        planned: the plan's verdict; refused, failed: there is no plan, `plan_said` tells why; None:
            not planned, or an accelerator without HBM.
        planned_from: the cell whose plan told, by a monotone axis; None: its own.
        plan_said: why there is no plan.
        plan: its own plan.
        outcome: of its newest run; None: it was not run.
        skipped: why it was not run: "planned not to fit", "cell X ran out of HBM, and memory grows
            along rollout.group_size"; None where it ran, or was not come to yet.
        run: its newest run's directory, relative to the sweep's folder.
        manifest, diagnosis, steps: of that run.
        measured: planned against measured, what could be compared; empty on a CPU.
    """

    cell: str
    settings: dict[str, JsonValue]
    place: dict[str, JsonValue]
    job_file: str
    command: str
    steps: list[StepRecord]
    measured: list[Measured]
    planned: Planned | None = None
    planned_from: str | None = None
    plan_said: str = ""
    plan: MemoryPlan | None = None
    outcome: Outcome | None = None
    skipped: str | None = None
    run: str | None = None
    manifest: Manifest | None = None
    diagnosis: Diagnosis | None = None


class Sweep(Record):
    """A whole sweep, as it stands.

    Attributes:
        name: the sweep's.
        accelerator: planned for.
        axes: values of the matrix by dotted key, in the file's order; empty without a matrix.
        rows: named cells first, then the matrix, in the file's order.
        notes: what a reader should know: a cell whose files cannot be read, ...
    """

    name: str
    accelerator: str
    axes: dict[str, list[JsonValue]]
    rows: list[Row]
    notes: list[str]
