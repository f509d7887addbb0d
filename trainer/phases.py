"""Who is resident on one chip in each phase of a step, programs aside. Pure.

Phases are the loop's own (`train.py`): load, then rollout, update and hand_over for ever.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jobs.spec import Job
from trainer import budget
from trainer.architecture import Architecture
from trainer.budget import EngineBuild, Pool

Owners = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """sglang-jax beside the trainer.

    Attributes:
        build: how it lays embedding and head.
        weight_bytes: all of its weights.
        copied_bytes: those of them that are not the trainer's own arrays.
        free_bytes: when it starts, its weights not loaded yet.
        pool: of keys and values.
    """

    build: EngineBuild
    weight_bytes: int
    copied_bytes: int
    free_bytes: int
    pool: Pool


@dataclass(frozen=True, kw_only=True)
class Residents:
    """Who holds what in each phase.

    Attributes:
        state: the trainer's own, resident in all of them.
        phases: by phase, by owner, what is there besides programs; the state included.
        engine: of another program, if any.
    """

    state: Owners
    phases: Mapping[str, Owners]
    engine: Engine | None


def residents(job: Job, architecture: Architecture, *, build: EngineBuild) -> Residents:
    """Who holds what, by arithmetic."""
    state = budget.state_bytes(job, architecture)
    always = dict(state.owners)
    if frozen := budget.reference_policy_bytes(job, architecture):
        always["reference policy"] = frozen
    engine = _engine(job, architecture, always, build)
    if engine is None:
        loaded, phases = always, _with_sampler(job, architecture, always)
    else:
        loaded, phases = _awake(always, engine), _with_engine(job, always, engine)
    load = _load(job, always, loaded, state.largest_f32_bytes)
    return Residents(state=always, phases={"load": load, **phases}, engine=engine)


def _engine(
    job: Job, architecture: Architecture, always: Owners, build: EngineBuild
) -> Engine | None:
    if job.rollout.engine == "naive":
        return None
    free = job.target.usable_hbm_bytes - sum(always.values())
    # As `Driver` tells the engine: of its share only what is copied takes anything.
    copied = budget.engine_copied_bytes(job, architecture, build)
    pool = budget.kv_pool(job, architecture, free_bytes=free, weight_bytes=copied)
    return Engine(
        build=build,
        weight_bytes=budget.engine_weight_bytes(job, architecture, build),
        copied_bytes=copied,
        free_bytes=free,
        pool=pool,
    )


def _awake(always: Owners, engine: Engine) -> Owners:
    weights = {"engine weights": engine.copied_bytes} if engine.copied_bytes else {}
    return {**always, **weights, "KV pool": engine.pool.size_bytes}


def _with_engine(job: Job, always: Owners, engine: Engine) -> dict[str, Owners]:
    """By engine.residency; see `SglangRollout.sleep` and `Driver.wake`."""
    awake = _awake(always, engine)
    kept = dict(awake)
    if job.engine.residency != "keep":
        del kept["KV pool"]
    # The old weights go before the new ones come: those are outputs of the hand-over's program.
    handed = {owner: size for owner, size in kept.items() if owner != "engine weights"}
    # Of weights by reference none may outlive a donating update, and then none is kept.
    if job.engine.residency == "sleep" or engine.copied_bytes < engine.weight_bytes:
        kept = handed
    return {
        "rollout": {**awake, "request": budget.engine_request_bytes(job, prefill=True)},
        "update": {**kept, "batch": budget.batch_bytes(job)},
        "hand_over": handed,
    }


def _with_sampler(job: Job, architecture: Architecture, always: Owners) -> dict[str, Owners]:
    copy: Owners = {}
    if not budget.by_reference(job):
        copy = {"sampler weights": budget.sampler_bytes(job, architecture)}
    return {
        "rollout": {**always, **copy, "request": budget.request_bytes(job)},
        "update": {**always, "batch": budget.batch_bytes(job)},
        "hand_over": always,  # the copy is an output of its program
    }


def _load(job: Job, always: Owners, loaded: Owners, leaf: int) -> Owners:
    """The fuller of two moments: the last leaf comes in; everything is there."""
    if job.update.design == "reference":  # leaves are placed as they are
        return loaded
    coming = {**always, "leaf on its way (f32)": leaf}
    return max(loaded, coming, key=lambda owners: sum(owners.values()))
