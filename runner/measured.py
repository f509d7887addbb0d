"""Planned bytes beside what the chips said, and what a run teaches the planner.

The chips speak in two places: hbm.jsonl (samples of the loop) and, where a program did not load,
the runtime's own message in the log.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from jobs.accelerators import ACCELERATORS
from jobs.calibration import BEYOND, Calibration, calibration_file, read_calibration
from jobs.records import HBM_FILE, PLAN_FILE, Diagnosis, HbmSample, Manifest, MemoryPlan
from runner.archive import RunDir, write_whole
from runner.sweep_row import Measured

_SAMPLED = ("rollout", "update", "hand_over")  # at whose beginning the loop samples
_UPDATE = re.compile(r"update|step")
_NOT_YET = ("batch", "request")  # placed after the sample that a phase begins with


def samples_of(run: RunDir) -> list[HbmSample]:
    """The samples that can be read; a killed run's last line may be torn."""
    try:
        lines = (run.path / HBM_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found: list[HbmSample] = []
    for line in lines:
        try:
            found.append(HbmSample.model_validate_json(line))
        except ValidationError:
            continue
    return found


def plan_of(run: RunDir, manifest: Manifest) -> MemoryPlan | None:
    """The plan in a run's directory, where it is one of the run's own job."""
    try:
        plan = MemoryPlan.model_validate(run.read_json(run.path / PLAN_FILE))
    except ValidationError:
        return None
    return plan if plan.job_sha256 == manifest.job_sha256 else None


def compare(plan: MemoryPlan, run: RunDir, diagnosis: Diagnosis | None) -> list[Measured]:
    """What can be compared of a run; nothing on a platform that does not tell.

    Args:
        plan: of the run's job.
        run: its directory.
        diagnosis: of its log, where it failed.
    """
    return [*_sampled(plan, samples_of(run)), *_said(plan, run, diagnosis)]


def _sampled(plan: MemoryPlan, samples: Sequence[HbmSample]) -> list[Measured]:
    if not samples:
        return []
    found = [_measured("usable", plan.usable_bytes, min(samples[-1].limit_bytes))]
    for phase in _SAMPLED:
        # The steady loop: not the first rollout, before which nothing had ever run.
        inside = [s for s in samples if s.phase == phase and s.step >= 0]
        if inside and phase in plan.phases:
            most = max(max(s.in_use_bytes) for s in inside)
            found.append(_measured(f"in use before {phase}", _resident(plan, phase), most))
    beyond = max((owners.get(BEYOND, 0) for owners in plan.phases.values()), default=0)
    if (of_program := _largest_program(plan, samples)) is not None:
        planned, most = of_program
        found.append(_measured("temporaries of the largest program", planned + beyond, most))
    return found


def _largest_program(plan: MemoryPlan, samples: Sequence[HbmSample]) -> tuple[int, int] | None:
    """Bytes of the largest program's temporaries, by the compiler and by the runtime."""
    reserved = samples[-1].peak_reserved_bytes if samples else None
    if reserved is None or not plan.programs:
        return None
    return max(program.reserved_bytes for program in plan.programs.values()), max(reserved)


def _resident(plan: MemoryPlan, phase: str) -> int:
    """What the plan has on a chip when a phase begins: no program, not what the phase brings."""
    return sum(
        size
        for owner, size in plan.phases[phase].items()
        if owner not in (*_NOT_YET, BEYOND) and not _is_programs(plan, owner)
    )


def _is_programs(plan: MemoryPlan, owner: str) -> bool:
    return any(owner.startswith(f"{program} ") for program in plan.programs)


def _said(plan: MemoryPlan, run: RunDir, diagnosis: Diagnosis | None) -> list[Measured]:
    """What the runtime printed where a program of the update did not load."""
    if diagnosis is None or diagnosis.cause != "hbm_program_load" or "update" not in plan.programs:
        return []
    name = str(diagnosis.numbers.get("program", ""))
    if not _UPDATE.search(name):  # the log's name is that of the function that was compiled
        return []
    update, found = plan.programs["update"], list[Measured]()
    free, wanted = (diagnosis.numbers.get(key) for key in ("free_bytes", "requested_bytes"))
    if isinstance(free, int | float):
        planned, told = (plan.usable_bytes - b for b in (update.free_bytes_at_load, int(free)))
        found.append(_measured(f"in use when {name} was loaded", planned, told))
    if isinstance(wanted, int | float):
        found.append(_measured(f"temporaries of {name}", update.reserved_bytes, int(wanted)))
    return found


def _measured(what: str, planned: int, measured: int) -> Measured:
    return Measured(what=what, planned_bytes=planned, measured_bytes=measured)


def calibration(run: RunDir, manifest: Manifest) -> Calibration | None:
    """What a run teaches; None where its platform does not tell, or nothing says whose it was."""
    samples = samples_of(run)
    accelerator = (run.read_json(run.job_file) or {}).get("accelerator")
    libtpu = manifest.packages.get("libtpu")
    if not samples or samples[0].step >= 0 or accelerator not in ACCELERATORS or libtpu is None:
        return None
    first = samples[0]
    free = (limit - used for limit, used in zip(first.limit_bytes, first.in_use_bytes, strict=True))
    plan = plan_of(run, manifest)
    beyond = None
    if plan is not None:
        of_program = _largest_program(plan, samples)
        beyond = None if of_program is None else of_program[1] - of_program[0]
    return Calibration(
        accelerator=accelerator,
        libtpu=libtpu,
        run=manifest.run,
        measured=manifest.finished or manifest.created,
        free_bytes=min(free),
        reserved_beyond_plan_bytes=beyond,
    )


def keep(found: Calibration, cache_dir: Path) -> Calibration:
    """Write a calibration where the planner looks for it, unless a later run's is there.

    Returns:
        the one that plans count on now.
    """
    before = read_calibration(cache_dir, accelerator=found.accelerator, libtpu=found.libtpu)
    if before is not None and before.measured > found.measured:
        return before
    file = calibration_file(cache_dir, accelerator=found.accelerator, libtpu=found.libtpu)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(found.model_dump(), indent=2) + "\n")
    return found
