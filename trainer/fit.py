"""`python -m trainer fit`: the fastest setting of a job that fits, with a margin.

Every combination of what `choices.py` lists is timed by a model (`timemodel.py`) and weighed by
formulas (`estimate.py`); the best is then planned as `plan` plans, by the compiler, and the next
best, until one truly fits. What alters the mathematics is taken only where nothing else fits.
"""

import itertools
import json
import logging
import math
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.accelerators import ACCELERATORS
from jobs.records import FIT_FILE, Fit, FitChange, FitPoint, MemoryPlan, gib
from jobs.spec import Job
from trainer.architecture import Architecture
from trainer.budget import EngineBuild
from trainer.choices import ALTERS, SAYS, choices_of, pointless, value_of
from trainer.compiled import TooLongError
from trainer.estimate import estimate
from trainer.ledger import check_target, ledger, programs_of
from trainer.plan import (
    DOES_NOT_FIT,
    LIMIT_S,
    Memory,
    Options,
    architecture_of,
    changed,
    memory_of,
    plan,
    write_record,
)
from trainer.refusal import Refusal
from trainer.rollout import ENGINES
from trainer.rollout.sglang.settings import EngineError, check_engine
from trainer.timemodel import NOTE, StepModel, step_model

log = logging.getLogger(__name__)

# The model tells no times apart that are nearer; then the fewest changes win. The compiler's own
# cycles of docs/memory.md's row 7b are 3.30, 3.35 and 3.12 s with 8, 4 and 1 micro-batches.
TIE = 0.05
_VERIFIED = 6  # settings that are compiled, at most
_FRONT = 12


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How to search.

    Attributes:
        margin_bytes: to be left of a chip's usable HBM.
        exact: nothing that alters the mathematics.
        quick: by formulas alone, without the compiler.
        build: how sglang-jax lays embedding and head.
        limit_s: seconds for all of it.
    """

    margin_bytes: int = 2**30
    exact: bool = False
    quick: bool = False
    build: EngineBuild = "sharded"
    limit_s: float = LIMIT_S


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One combination, weighed by formulas.

    Attributes:
        job: with it.
        changes: (key, new value) each.
        step: its modelled time.
        peak_bytes: of the fullest phase.
        headroom_bytes: left; -1 at most where the engine refuses to start.
        altering: changes that alter the mathematics.
        runs: the trainer has the engine.
    """

    job: Job
    changes: tuple[tuple[str, Any], ...]
    step: StepModel
    peak_bytes: int
    headroom_bytes: int
    altering: int
    runs: bool

    @property
    def settings(self) -> list[str]:
        """As --set has them."""
        return [f"{key}={json.dumps(value)}" for key, value in self.changes]


def settings_of(job: Job, architecture: Architecture, options: FitOptions) -> Iterator[Setting]:
    """Every combination that contradicts nothing, the job's own among them."""
    for design in dict.fromkeys((job.update.design, "layer_major")):
        choices = {"update.design": [design], **choices_of(job, design, exact=options.exact)}
        asked = {key: value_of(job, key) for key in choices}
        for values in itertools.product(*choices.values()):
            pairs = zip(choices, values, strict=True)
            changes = tuple((key, new) for key, new in pairs if new != asked[key])
            if pointless(job, dict(changes)):
                continue
            made = weighed(job, architecture, changes, options)
            if made is not None:
                yield made


def weighed(
    job: Job, architecture: Architecture, changes: tuple[tuple[str, Any], ...], options: FitOptions
) -> Setting | None:
    """A job with changes, by model and formulas; None where they contradict it."""
    with_them = changed(job, [f"{key}={json.dumps(value)}" for key, value in changes])
    if with_them is None:
        return None
    try:
        check_engine(with_them, architecture)
    except EngineError:
        return None
    programs = {
        n: estimate(with_them, architecture, n) for n in programs_of(with_them, architecture)
    }
    sketch = ledger(with_them, architecture, programs, build=options.build)
    return Setting(
        job=with_them,
        changes=changes,
        step=step_model(with_them, architecture, build=options.build),
        peak_bytes=sketch.peak_bytes,
        headroom_bytes=_headroom(sketch),
        altering=sum(key in ALTERS for key, _ in changes),
        runs=with_them.rollout.engine in ENGINES,
    )


def _headroom(made: MemoryPlan) -> int:
    return min(made.headroom_bytes, -1) if made.verdict == "engine_refused" else made.headroom_bytes


def best(settings: Iterable[Setting]) -> Setting | None:
    """The one to take, of settings that all fit; None of none.

    One that the trainer can run before one that it cannot; then one that alters no mathematics;
    then the fastest, and of those that the model cannot tell from it, the one that changes least.
    """
    found = list(settings)
    if not found:
        return None
    tier = min((not one.runs, one.altering) for one in found)
    found = [one for one in found if (not one.runs, one.altering) == tier]
    limit = min(one.step.step_s for one in found) * (1 + TIE)
    found = [one for one in found if one.step.step_s <= limit]
    return min(
        found,
        key=lambda one: (len(one.changes), -one.headroom_bytes, one.step.step_s, one.settings),
    )


def front(settings: Iterable[Setting], options: FitOptions) -> list[FitPoint]:
    """Settings than which none is both faster and smaller, fastest first."""
    found: list[Setting] = []
    order = lambda one: (one.step.step_s, one.peak_bytes, len(one.changes))
    for one in sorted(settings, key=order):
        if not found or one.peak_bytes < found[-1].peak_bytes:
            found.append(one)
    return [
        FitPoint(
            settings=one.settings,
            step_s=one.step.step_s,
            peak_bytes=one.peak_bytes,
            fits=one.headroom_bytes >= options.margin_bytes,
            exact=not one.altering,
            runs=one.runs,
        )
        for one in found
    ]


def fit(job: Job, options: FitOptions, memory: Memory) -> Fit:
    """The fastest setting of a job that fits with the margin.

    Args:
        job: for an accelerator with HBM.
        options: margin, exactness, build.
        memory: gives each program's; `estimate` where `options.quick`.

    Raises:
        Refusal: nothing can be planned.
    """
    check_target(job)
    architecture = architecture_of(job)
    settings = list(settings_of(job, architecture, options))
    if not settings:
        raise Refusal(
            f"{job.name} cannot be laid out on accelerator = {job.accelerator} in any way that fit "
            f"tries: make mesh.* divide its {job.target.devices} devices, and "
            f"rollout.prompts_per_step x rollout.group_size = {job.sequences_per_step} a multiple"
        )
    log.info("%d settings are timed by a model and weighed by formulas", len(settings))
    common: dict[str, Any] = {
        "job": job.name,
        "accelerator": job.accelerator,
        "margin_bytes": options.margin_bytes,
        "asked_step_s": step_model(job, architecture, build=options.build).step_s,
        "front": _thinned(front(settings, options)),
        "notes": _notes(job, options),
    }
    found, made, smallest = _verified(settings, options, memory)
    if found is None or made is None:
        return Fit(
            **common,
            shortfall_bytes=options.margin_bytes - smallest,
            smallest_accelerator=_smallest(job, architecture, options, memory),
        )
    changes = [
        _told(job, architecture, found, i, options=options) for i in range(len(found.changes))
    ]
    return Fit(**common, changes=changes, plan=made, step=found.step.parts())


def _verified(
    settings: Sequence[Setting], options: FitOptions, memory: Memory
) -> tuple[Setting | None, MemoryPlan | None, int]:
    """The best setting that truly fits, its plan; and the most that any was seen to leave."""
    left, seen = list(settings), list[int]()
    # How much more the compiler wanted than the formulas.
    doubt: dict[tuple[str, str, str], float] = {}
    for _ in range(_VERIFIED):
        room = lambda one: one.headroom_bytes - doubt.get(_kind(one), 0)
        choice = best(one for one in left if room(one) >= options.margin_bytes)
        if choice is None:
            # Formulas may be wrong: the smallest is tried once.
            choice = max(left, key=lambda one: (one.runs, one.headroom_bytes))
            if seen and max(seen) >= choice.headroom_bytes:
                break
        left.remove(choice)
        log.info("%.2f s a step by the model: %s", choice.step.step_s, _names(choice))
        try:
            made = plan(choice.job, Options(advice=False, build=options.build), memory)
        except TooLongError:
            raise
        except Refusal as error:
            log.info("not possible, nor are those like it: %s", error)
            doubt[_kind(choice)] = math.inf
            continue
        log.info("%s: %s left", made.verdict, gib(made.headroom_bytes))
        if made.verdict == "fits" and made.headroom_bytes >= options.margin_bytes:
            return choice, made, made.headroom_bytes
        seen.append(_headroom(made))
        more = made.peak_bytes - choice.peak_bytes
        doubt[_kind(choice)] = max(doubt.get(_kind(choice), 0), more)
        if choice.headroom_bytes < options.margin_bytes or not left:
            break
    return None, None, max(seen, default=max(one.headroom_bytes for one in settings))


def _kind(setting: Setting) -> tuple[str, str, str]:
    """Settings of a kind have like programs."""
    update = setting.job.update
    return update.design, update.layers, update.completions_per_row


def _smallest(
    job: Job, architecture: Architecture, options: FitOptions, memory: Memory
) -> str | None:
    """The accelerator of the least HBM in all on which a setting fits."""
    sizes = {name: a.devices * a.usable_hbm_bytes for name, a in ACCELERATORS.items()}
    own = sizes[job.accelerator]
    for name in sorted(sizes, key=lambda name: sizes[name]):
        if name == job.accelerator or sizes[name] < own:
            continue
        moved = job.model_copy(update={"accelerator": name})
        settings = list(settings_of(moved, architecture, options))
        if not any(one.headroom_bytes >= options.margin_bytes for one in settings):
            continue
        log.info("on %s it may fit", name)
        if _verified(settings, options, memory)[0] is not None:
            return name
    return None


def _told(
    job: Job, architecture: Architecture, found: Setting, index: int, *, options: FitOptions
) -> FitChange:
    """One change, and what the setting would be without it."""
    key, new = found.changes[index]
    others = found.changes[:index] + found.changes[index + 1 :]
    without = weighed(job, architecture, others, options)
    why, price = SAYS[key]
    return FitChange(
        key=key,
        old=value_of(job, key),
        new=new,
        why=why,
        saves_bytes=without.peak_bytes - found.peak_bytes if without else 0,
        saves_s=without.step.step_s - found.step.step_s if without else 0.0,
        price=price,
    )


def _notes(job: Job, options: FitOptions) -> list[str]:
    notes = [
        NOTE,
        f"of settings within {TIE:.0%} of the fastest, the one with the fewest changes is taken",
        "peaks of the front, and what a change saves, are by formulas",
    ]
    if job.rollout.engine not in ENGINES:
        notes.append(
            f"rollout.engine = {job.rollout.engine} is planned for, and the trainer of this "
            "version refuses it: a setting with it is taken only where nothing else fits"
        )
    if options.quick:
        notes.append("nothing was compiled: whether it fits is by formulas, too")
    return notes


def _thinned(points: list[FitPoint]) -> list[FitPoint]:
    """At most so many, both ends among them."""
    if len(points) <= _FRONT:
        return points
    step = (len(points) - 1) / (_FRONT - 1)
    return [points[round(i * step)] for i in range(_FRONT)]


def _names(setting: Setting) -> str:
    return ", ".join(setting.settings) or "the job as it is"


def options_of(argv: Sequence[str]) -> FitOptions:
    """The options behind the verb and the job.

    Raises:
        SystemExit: they are not understood.
    """
    parser = ArgumentParser(prog="python -m trainer fit JOB")
    parser.add_argument("--margin", type=float, default=1.0)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--engine-weights", choices=("sharded", "replicated"), default="sharded")
    parser.add_argument("--limit", type=float, default=LIMIT_S)
    read = parser.parse_args(argv)
    return FitOptions(
        margin_bytes=int(read.margin * 2**30),
        exact=read.exact,
        quick=read.quick,
        build=read.engine_weights,
        limit_s=read.limit,
    )


def main(job: Job, folder: Path, options: FitOptions) -> int:
    """Search, write fit.json, and say by the code whether a setting fits.

    Raises:
        Refusal: nothing can be planned.
    """
    memory = memory_of(quick=options.quick, limit_s=options.limit_s, build=options.build)
    found = fit(job, options, memory)
    write_record(folder / FIT_FILE, found.model_dump_json(indent=2))
    return DOES_NOT_FIT if found.plan is None else 0
