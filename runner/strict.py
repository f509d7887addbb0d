"""`headroom run --strict-plan`: the job is planned first, and its chips are held to the plan."""

from collections.abc import Sequence

from jobs.records import MemoryPlan, gib
from jobs.spec import Job
from runner import planning
from runner.sweep_row import Measured
from runner.watch import Interrupts, Say


class PlanDoesNotFitError(Exception):
    """The job is planned not to fit; the message says by how much."""


def planned(job: Job, *, say: Say, trainer: Sequence[str]) -> MemoryPlan:
    """The plan of a job that fits, by the compiler.

    Raises:
        PlanDoesNotFitError: it does not.
        PlanRefusedError, PlanFailedError, PlanStoppedError: there is none.
    """
    if not job.target.usable_hbm_bytes:
        raise planning.PlanRefusedError(
            f"--strict-plan: accelerator = {job.accelerator} has no HBM to plan or to measure: "
            "leave it out"
        )
    asked = planning.Asked(
        quick=False, engine_weights="sharded", advice=False, what_if=False, limit_s=planning.LIMIT_S
    )
    with Interrupts() as interrupts:
        (plan,) = planning.plan(job, asked, say=say, interrupts=interrupts, trainer=trainer)
    if plan.verdict != "fits":
        raise PlanDoesNotFitError(
            f"--strict-plan: {plan.verdict}: {plan.deciding_phase} needs {gib(plan.peak_bytes)} of "
            f"a chip's {gib(plan.usable_bytes)}, most of it {plan.deciding_owner}; headroom fit "
            "finds a setting that fits"
        )
    return plan


def differences(rows: Sequence[Measured], *, tolerance_gib: float) -> list[str]:
    """What is wrong of a plan, a line each; also where nothing could be compared."""
    if not rows:
        return ["--strict-plan: the run measured nothing that could be compared with its plan"]
    return [
        f"--strict-plan: {row.what}: planned {gib(row.planned_bytes)}, measured "
        f"{gib(row.measured_bytes)}: {gib(abs(row.error_bytes))} "
        f"{'more' if row.error_bytes > 0 else 'less'}, {tolerance_gib:g} GiB allowed"
        for row in rows
        if not abs(row.error_bytes) <= tolerance_gib * 2**30  # nor with a tolerance of nan
    ]
