"""A plan, with what runs on real chips have measured added to its ledger. Pure."""

from jobs.calibration import BEYOND, HELD, Calibration
from jobs.records import MemoryPlan, gib


def calibrated(plan: MemoryPlan, measured: Calibration) -> MemoryPlan:
    """The plan with two owners more: what the runtime keeps, and what programs took too much.

    What was measured may only take room away: a run that found more than the table says is told of
    in the assumptions, and counted on by nobody.
    """
    held = max(0, plan.usable_bytes - measured.free_bytes)
    beyond = max(0, measured.reserved_beyond_plan_bytes or 0)
    phases = {
        name: {**owners, **_more(held, beyond if _runs(plan, owners) else 0)}
        for name, owners in plan.phases.items()
    }
    totals = {name: sum(owners.values()) for name, owners in phases.items()}
    fullest = max(totals, key=lambda name: totals[name])
    peak, refused = totals[fullest], plan.verdict == "engine_refused"
    programs = {
        name: program.model_copy(update={"free_bytes_at_load": program.free_bytes_at_load - held})
        for name, program in plan.programs.items()
    }
    told = (
        f"measured by {measured.run} with libtpu {measured.libtpu}: "
        f"{gib(measured.free_bytes)} of a chip free before anything was placed (the table: "
        f"{gib(plan.usable_bytes)})"
    )
    if measured.reserved_beyond_plan_bytes is not None:
        told += f", programs' temporaries {_against(measured.reserved_beyond_plan_bytes)} its plan"
    changes = {
        "phases": phases,
        "programs": programs,
        "peak_bytes": peak,
        "headroom_bytes": plan.usable_bytes - peak,
        "assumptions": [*plan.assumptions, told],
    }
    if not refused:
        owners = phases[fullest]
        changes |= {
            "verdict": "fits" if peak <= plan.usable_bytes else "does_not_load",
            "deciding_phase": fullest,
            "deciding_owner": max(owners, key=lambda name: owners[name]),
        }
    return plan.model_copy(update=changes)


def _runs(plan: MemoryPlan, owners: dict[str, int]) -> bool:
    """A program runs in the phase."""
    return any(owner.startswith(f"{program} ") for owner in owners for program in plan.programs)


def _more(held: int, beyond: int) -> dict[str, int]:
    return {name: size for name, size in ((HELD, held), (BEYOND, beyond)) if size}


def _against(beyond: int) -> str:
    return f"{gib(abs(beyond))} {'over' if beyond >= 0 else 'under'}"
