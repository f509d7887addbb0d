"""A run as the page shows it: a row of one cell, read from the run's directory."""

import contextlib
import shlex
from collections.abc import Mapping
from typing import Any, cast

from pydantic import JsonValue, ValidationError

from jobs.records import Diagnosis, Manifest, StepRecord
from runner import measured
from runner.archive import RunDir
from runner.conclude import diagnosis_of
from runner.show import records
from runner.sweep_row import Outcome, Row

# The diagnoses (causes_memory.py) of a job that found no room in HBM; the engine's is one of them.
OUT_OF_HBM = (
    "hbm_program_load", "hbm_fragmentation", "hbm_alloc", "hbm_compile", "engine_not_enough_memory",
)  # fmt: skip
_BY_REASON: dict[str, Outcome] = {
    "done": "fits", "refused": "refused", "interrupted": "interrupted", "preempted": "interrupted",
    "lost": "lost",
}  # fmt: skip


def outcome_of(manifest: Manifest, diagnosis: Diagnosis | None) -> Outcome:
    """What a run tells of its job."""
    status = manifest.exit_status
    if status is None:
        return "running"
    if status.reason == "failed" and diagnosis is not None and diagnosis.cause in OUT_OF_HBM:
        return "out_of_hbm"
    return _BY_REASON.get(status.reason, "failed")


def row_of(run: RunDir, manifest: Manifest) -> Row:
    """What is known of a run; a file that cannot be read, or is another version's, is left out."""
    diagnosis = diagnosis_of(run)
    plan = measured.plan_of(run, manifest)
    steps: list[StepRecord] = []
    for line in records(run.steps_file):
        with contextlib.suppress(ValidationError):  # an evaluation, or another version's
            steps.append(StepRecord.model_validate(line))
    asked = [] if manifest.verb == "train" else ["--verb", manifest.verb]
    return Row(
        cell=run.name,
        settings=dict(_dotted(run.read_json(run.job_file) or {})),
        place={},
        job_file=str(run.job_file),
        command=shlex.join(["headroom", "run", str(run.job_file), *asked]),
        steps=steps,
        measured=[] if plan is None else measured.compare(plan, run, diagnosis),
        planned=None if plan is None else plan.verdict,
        plan=plan,
        outcome=outcome_of(manifest, diagnosis),
        run=str(run.path),
        manifest=manifest,
        diagnosis=diagnosis,
    )


def _dotted(values: Mapping[str, Any], above: str = "") -> list[tuple[str, JsonValue]]:
    """A job's values by dotted key, as --set has them."""
    found: list[tuple[str, JsonValue]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found += _dotted(cast("dict[str, Any]", value), f"{above}{key}.")
        else:
            found.append((above + key, cast("JsonValue", value)))
    return found
