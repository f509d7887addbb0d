"""The ledger: who holds one chip's HBM in each phase of a step, and whether it all has room. Pure.

What is resident when a program is loaded (`phases.py`), and what that program takes besides, is the
phase's sum; of several programs of a phase only one runs at a time, and the fullest counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jobs.records import (
    Contiguity,
    MemFractionInterval,
    MemoryPlan,
    PeakTensors,
    PlannedProgram,
    gib,
)
from jobs.spec import Job
from trainer import budget
from trainer.architecture import Architecture
from trainer.budget import EngineBuild
from trainer.contiguity import doubts
from trainer.estimate import Program
from trainer.phases import Engine, Owners, Residents, residents
from trainer.refusal import Refusal

_GIB = 2**30

# A program's code where none was generated, by docs/memory.md: 0.04 GiB where layers are a loop,
# 0.23 of the sampler, in which they are unrolled twice.
CODE_SCANNED, CODE_UNROLLED = int(0.04 * _GIB), int(0.23 * _GIB)
# sglang-jax 0.0.2's prefill of 4096 tokens of 7B, compiled to the end; its decode 0.04.
CODE_PREFILL = int(0.16 * _GIB)
PHASE_OF = {
    "update": "update",
    "logprobs": "update",
    "reference_logprobs": "update",
    "sampler": "rollout",
    "engine_prefill": "rollout",
    "engine_decode": "rollout",
    "engine_probe": "rollout",
    "hand_over": "hand_over",
}
_NAMED = 0.9  # of a heap, at least, by the tensors that `why` lists


class PlanError(Refusal):
    """There is nothing to plan, or what is needed for it is not here."""


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What every part of the ledger is made of."""

    job: Job
    architecture: Architecture
    programs: Mapping[str, Program]
    residents: Residents


def programs_of(job: Job, architecture: Architecture) -> tuple[str, ...]:
    """The programs that a job runs and that can be compiled here."""
    found = ["update"]
    if job.needs_old_logprobs:
        found.append("logprobs")
    if job.train.beta:
        found.append("reference_logprobs")
    if job.rollout.engine == "naive":
        found.append("sampler")
        copies = not budget.by_reference(job)
    else:
        found += ["engine_prefill", "engine_decode", "engine_probe"]
        copies = budget.engine_copied_bytes(job, architecture, "sharded") > 0
    return (*found, "hand_over") if copies else tuple(found)


def check_target(job: Job) -> None:
    """Refuse what has no HBM.

    Raises:
        PlanError: the accelerator has none.
    """
    if not job.target.usable_hbm_bytes:
        raise PlanError(
            f"accelerator = {job.accelerator} has no HBM to plan: name a TPU, --accelerator v4-8"
        )


def ledger(
    job: Job, architecture: Architecture, programs: Mapping[str, Program], *, build: EngineBuild
) -> MemoryPlan:
    """The plan of a job whose programs' memory is known; without advice.

    Args:
        job: of an accelerator with HBM.
        architecture: the model's.
        programs: by name, those of `programs_of`.
        build: how sglang-jax lays embedding and head.

    Raises:
        PlanError: the accelerator has no HBM.
    """
    check_target(job)
    usable = job.target.usable_hbm_bytes
    held = residents(job, architecture, build=build)
    known = _Known(job=job, architecture=architecture, programs=programs, residents=held)
    phases = {phase: {**owners, **_running(known, phase)} for phase, owners in held.phases.items()}
    totals = {name: sum(owners.values()) for name, owners in phases.items()}
    fullest = max(totals, key=lambda name: totals[name])
    verdict, phase = _verdict(known, totals[fullest]), fullest
    owner = max(phases[fullest], key=lambda name: phases[fullest][name])
    if verdict == "engine_refused":
        phase, owner = "load", "KV pool"
    heap, engine = _largest(known, fullest) or "update", held.engine
    return MemoryPlan(
        job=job.name,
        job_sha256=job.digest,
        accelerator=job.accelerator,
        verdict=verdict,
        usable_bytes=usable,
        peak_bytes=totals[fullest],
        headroom_bytes=usable - totals[fullest],
        deciding_phase=phase,
        deciding_owner=owner,
        phases=phases,
        programs={name: _planned(known, name) for name in programs},
        host_bytes=budget.state_bytes(job, architecture).host_bytes,
        kv_pool_tokens=engine.pool.tokens if engine else None,
        mem_fraction_interval=_interval(known, engine, phases) if engine else None,
        why=_why(heap, programs[heap]),
        fragmentation_bytes=programs[heap].memory.fragmentation_bytes,
        contiguity=_contiguity(known),
        assumptions=_assumptions(known),
    )


def _verdict(known: _Known, peak: int) -> Literal["fits", "does_not_load", "engine_refused"]:
    # Without room for the state itself no engine is ever asked.
    engine = known.residents.engine
    if engine is not None and engine.free_bytes > 0 and not engine.pool.tokens:
        return "engine_refused"
    return "fits" if peak <= known.job.target.usable_hbm_bytes else "does_not_load"


def _largest(known: _Known, phase: str) -> str | None:
    """The program that takes most in a phase."""
    names = [name for name in known.programs if PHASE_OF[name] == phase]
    needs = lambda name: sum(_of_program(known, name).values())
    return max(names, key=needs) if names else None


def _running(known: _Known, phase: str) -> Owners:
    """What runs in a phase: the fullest of its programs."""
    name = _largest(known, phase)
    return {} if name is None else _of_program(known, name)


def _of_program(known: _Known, name: str) -> Owners:
    """What a program takes besides its arguments, by owner."""
    program = known.programs[name]
    code, assumed = _code(known.job, name, program)
    return {
        **dict([_outputs_of(known, name)]),
        f"{name} temporaries{_how(program)}": program.memory.reserved_bytes,
        f"{name} code{' (assumed)' if assumed else ''}": code,
    }


def _outputs_of(known: _Known, name: str) -> tuple[str, int]:
    """Who owns a program's outputs, and their bytes."""
    program = known.programs[name]
    owner = f"{name} outputs{_how(program)}"
    if name == "hand_over":  # they are what stays
        owner = "sampler weights" if known.residents.engine is None else "engine weights"
    return owner, program.memory.outputs_bytes


def _how(program: Program) -> str:
    return " (estimated)" if program.estimated else ""


def _code(job: Job, name: str, program: Program) -> tuple[int, bool]:
    """Bytes of code, and whether they are an assumption."""
    if program.memory.code_bytes is not None:
        return program.memory.code_bytes, False
    if name == "engine_prefill":
        return CODE_PREFILL, True
    loops = name in ("hand_over", "engine_decode")
    unrolled = name == "sampler" or (not loops and job.update.layers == "per_layer")
    return CODE_UNROLLED if unrolled else CODE_SCANNED, True


def _planned(known: _Known, name: str) -> PlannedProgram:
    program = known.programs[name]
    code, assumed = _code(known.job, name, program)
    before = sum(known.residents.phases[PHASE_OF[name]].values())
    return PlannedProgram(
        arguments_bytes=program.memory.arguments_bytes,
        outputs_bytes=program.memory.outputs_bytes,
        reserved_bytes=program.memory.reserved_bytes,
        code_bytes=code,
        free_bytes_at_load=known.job.target.usable_hbm_bytes - before,
        code_assumed=assumed,
        estimated=program.estimated,
    )


def _contiguity(known: _Known) -> list[Contiguity]:
    arrays: dict[str, Owners] = {}
    for phase, owners in known.residents.phases.items():
        name = _largest(known, phase)
        outputs = dict([_outputs_of(known, name)]) if name else {}
        arrays |= {phase: owners, f"after {phase}": {**owners, **outputs}}
    needs: dict[str, tuple[str, int]] = {}
    for name, program in known.programs.items():
        code, _ = _code(known.job, name, program)
        needs[name] = PHASE_OF[name], program.memory.reserved_bytes + code
    return doubts(known.job.target.usable_hbm_bytes, arrays, needs)


def _interval(known: _Known, engine: Engine, phases: Mapping[str, Owners]) -> MemFractionInterval:
    """From the engine's own rule up to where the fullest phase just has room for the pool."""
    e = known.job.engine
    others = max(sum(o.values()) - o["KV pool"] for o in phases.values() if "KV pool" in o)
    room = known.job.target.usable_hbm_bytes - others
    up_to = (room + engine.copied_bytes) / engine.free_bytes if engine.free_bytes > 0 else 0.0
    if e.max_total_tokens is not None:
        most = e.max_total_tokens + (e.page_size or 1)
        if most * budget.kv_token_bytes(known.job, known.architecture) <= room:
            up_to = 1.0
    above = min(1.0, engine.pool.least_fraction)
    return MemFractionInterval(above=above, up_to=max(0.0, min(1.0, up_to)))


def _why(name: str, program: Program) -> list[PeakTensors]:
    """The largest tensors of a program's heap, so many that most of it is named."""
    memory = program.memory
    named, found = memory.fragmentation_bytes, list[PeakTensors]()
    for kind in memory.peak:
        if named >= _NAMED * memory.reserved_bytes:
            break
        named += kind.size_bytes
        found.append(
            PeakTensors(
                program=name,
                op=kind.op,
                shape=kind.shape,
                count=kind.count,
                size_bytes=kind.size_bytes,
            )
        )
    return found


def _assumptions(known: _Known) -> list[str]:
    programs = known.programs.values()
    said: list[str] = []
    if any(program.memory.code_bytes is None for program in programs):
        said.append(
            f"code was not generated: {gib(CODE_SCANNED)} where layers are a loop, "
            f"{gib(CODE_UNROLLED)} where they are unrolled (docs/memory.md), "
            f"{gib(CODE_PREFILL)} for the engine's prefill"
        )
    if any(program.estimated for program in programs):
        said.append("temporaries are by a formula (trainer/estimate.py), not by the compiler")
    engine = known.residents.engine
    return said if engine is None else said + _engine_assumptions(known, engine)


def _engine_assumptions(known: _Known, engine: Engine) -> list[str]:
    other: EngineBuild = "replicated" if engine.build == "sharded" else "sharded"
    weights = budget.engine_weight_bytes(known.job, known.architecture, other)
    copied = budget.engine_copied_bytes(known.job, known.architecture, other)
    least = copied / engine.free_bytes if engine.free_bytes > 0 else 1.0
    by_itself = "by itself" if engine.build == "sharded" else "as our hand-over lays them"
    said = [
        f"the engine's embedding, head and biases are {engine.build}: its weights take "
        f"{gib(engine.weight_bytes)}; {other} (PyPI's 0.0.2 {by_itself}) {gib(weights)}, with "
        f"engine.mem_fraction_static above {least:.3f}",
        "only the program that runs has code and temporaries in memory: the free bytes that the "
        "runtime printed on hardware leave no room for others",
    ]
    shared = engine.weight_bytes - engine.copied_bytes
    if shared:
        said.append(
            f"{gib(shared)} of the engine's weights are the masters' own halves: it lets go of all "
            "its weights through an update, whatever engine.residency says"
        )
    return said
