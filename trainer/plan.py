"""`python -m trainer plan`: the verdict on a job before a TPU is booked, why, and what would help.

The programs are those that `train.py` runs, from the same calls, compiled for the job's accelerator
as far as their buffers (`compiled.py`); the rest is arithmetic (`budget.py`, `ledger.py`).
"""

import json
import logging
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jobs.accelerators import ACCELERATORS
from jobs.calibration import read_calibration
from jobs.contradictions import contradictions
from jobs.records import PLAN_FILE, Advice, MemoryPlan, gib
from jobs.spec import Job
from trainer.architecture import ARCHITECTURES, Architecture
from trainer.budget import EngineBuild
from trainer.calibration import calibrated
from trainer.compiled import Programs, TooLongError, compile_program
from trainer.estimate import Program, estimate
from trainer.files import write_record
from trainer.ledger import check_target, ledger, programs_of
from trainer.libtpu import versions
from trainer.refusal import Refusal
from trainer.remedies import remedies
from trainer.rollout.sglang.settings import check_engine
from trainer.timemodel import NOTE, step_model

log = logging.getLogger(__name__)

LIMIT_S = 900.0
DOES_NOT_FIT = 3
_ADVISED = 3  # as many changes are planned, at most

# A program's memory by its name.
Memory = Callable[[Job, Architecture, str], Program]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to plan.

    Attributes:
        quick: by arithmetic and formulas, without the compiler.
        build: how sglang-jax lays embedding and head.
        advice: plan changes, too, where the job does not fit.
        what_if: plan for every TPU type.
        limit_s: seconds for all of it.
    """

    quick: bool = False
    build: EngineBuild = "sharded"
    advice: bool = True
    what_if: bool = False
    limit_s: float = LIMIT_S


def architecture_of(job: Job) -> Architecture:
    """The shape of the job's model: a well-known one, else what its files say."""
    if known := ARCHITECTURES.get(job.model.lower()):
        return known
    # Imported here: the well-known shapes need neither files nor the hub's client.
    from trainer.weights import open_model  # noqa: PLC0415

    return open_model(job.model).architecture


def plan(job: Job, options: Options, memory: Memory) -> MemoryPlan:
    """The plan of a job, with advice where it does not fit.

    Args:
        job: to plan.
        options: build and advice.
        memory: gives each program's.

    Raises:
        Refusal: nothing can be planned.
    """
    check_target(job)
    architecture = architecture_of(job)
    found = _planned(job, architecture, options, memory)
    if found.verdict == "fits" or not options.advice:
        return found
    log.info("%s: short by %s; planning what would help", found.verdict, gib(-found.headroom_bytes))
    return found.model_copy(update={"advice": _advice(job, architecture, found, options, memory)})


def _planned(job: Job, architecture: Architecture, options: Options, memory: Memory) -> MemoryPlan:
    check_engine(job, architecture)
    programs = {name: memory(job, architecture, name) for name in programs_of(job, architecture)}
    made = ledger(job, architecture, programs, build=options.build)
    more: dict[str, Any] = {"versions": versions()}
    measured = read_calibration(
        Path(job.cache_dir),
        accelerator=job.accelerator,
        libtpu=more["versions"].get("libtpu", "none"),
    )
    if measured is not None:
        made = calibrated(made, measured)
    if made.verdict != "engine_refused":
        more["step"] = step_model(job, architecture, build=options.build).parts()
        more["assumptions"] = [*made.assumptions, NOTE]
    return made.model_copy(update=more)


def _advice(
    job: Job, architecture: Architecture, found: MemoryPlan, options: Options, memory: Memory
) -> list[Advice]:
    """Changes, each planned as the job was; sorted by formulas first, because compiling is dear."""
    quick: list[tuple[MemoryPlan, Job, tuple[str, ...], str]] = []
    for settings, price in remedies(job, architecture, found):
        changed_job = changed(job, settings)
        if changed_job is not None:
            sketch = _planned(changed_job, architecture, options, estimate)
            quick.append((sketch, changed_job, settings, price))
    # Those that fit; of them those that change least.
    quick.sort(key=lambda one: (one[0].verdict != "fits", len(one[2]), -one[0].headroom_bytes))
    advice: list[Advice] = []
    for _, changed_job, settings, price in quick[:_ADVISED]:
        try:
            made = _planned(changed_job, architecture, options, memory)
        except TooLongError:
            break
        except Refusal as error:
            log.info("%s is not advised: %s", ", ".join(settings), error)
            continue
        advice.append(
            Advice(
                settings=list(settings),
                saves_bytes=found.peak_bytes - made.peak_bytes,
                headroom_bytes=made.headroom_bytes,
                price=price,
                fits=made.verdict == "fits",
                estimated=any(program.estimated for program in made.programs.values()),
            )
        )
    return sorted(advice, key=lambda one: (not one.fits, -one.headroom_bytes))


def changed(job: Job, settings: Sequence[str]) -> Job | None:
    """The job with settings on top, values in JSON; None where they contradict it."""
    tree = job.model_dump(mode="json")
    for setting in settings:
        key, _, value = setting.partition("=")
        *parts, last = key.split(".")
        node = tree
        for part in parts:
            node = node[part]
        try:
            node[last] = json.loads(value)
        except ValueError:
            node[last] = value
    made = Job.model_validate_json(json.dumps(tree))
    return None if contradictions(made) else made


def what_if(job: Job, options: Options, memory: Memory) -> list[MemoryPlan]:
    """The job on every TPU type that it can be laid out on, without advice."""
    plans: list[MemoryPlan] = []
    architecture = architecture_of(job)
    for name in ACCELERATORS:
        moved = changed(job, [f"accelerator={name}"])
        if moved is None:
            log.info("%s: the job's sequences or mesh do not divide over it", name)
            continue
        try:
            plans.append(_planned(moved, architecture, options, memory))
        except TooLongError:
            raise
        except Refusal as error:
            log.info("%s: %s", name, error)
    return plans


def options_of(argv: Sequence[str]) -> Options:
    """The options behind the verb and the job.

    Raises:
        SystemExit: they are not understood.
    """
    parser = ArgumentParser(prog="python -m trainer plan JOB")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--engine-weights", choices=("sharded", "replicated"), default="sharded")
    parser.add_argument("--no-advice", action="store_true")
    parser.add_argument("--what-if", choices=("accelerators",))
    parser.add_argument("--limit", type=float, default=LIMIT_S)
    read = parser.parse_args(argv)
    return Options(
        quick=read.quick,
        build=read.engine_weights,
        advice=not read.no_advice,
        what_if=read.what_if is not None,
        limit_s=read.limit,
    )


def memory_of(*, quick: bool, limit_s: float, build: EngineBuild) -> Memory:
    """Each program's memory by formulas, or by the compiler within so many seconds for all."""
    if quick:
        return estimate
    until = time.monotonic() + limit_s
    compile_one = partial(compile_program, build=build)
    return Programs(say=log.info, until=until, compile_one=compile_one, build=build).of


def main(job: Job, folder: Path, options: Options) -> int:
    """Plan, write plan.json (one record, or a list of them), and say by the code whether it fits.

    Raises:
        Refusal: nothing can be planned.
    """
    memory = memory_of(quick=options.quick, limit_s=options.limit_s, build=options.build)
    if options.what_if:
        plans = what_if(job, options, memory)
        text = json.dumps([made.model_dump(mode="json") for made in plans], indent=2)
        fits = any(made.verdict == "fits" for made in plans)
    else:
        made = plan(job, options, memory)
        text, fits = made.model_dump_json(indent=2), made.verdict == "fits"
    write_record(folder / PLAN_FILE, text)
    return 0 if fits else DOES_NOT_FIT
