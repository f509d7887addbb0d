"""Planned bytes beside measured ones."""

from jobs.records import Diagnosis, MemoryPlan
from runner.archive import RunDir
from runner.sweep_row import Measured


def compare(plan: MemoryPlan, run: RunDir, diagnosis: Diagnosis | None) -> list[Measured]:
    """What could be compared. A placeholder: nothing is."""
    del plan, run, diagnosis
    return []
