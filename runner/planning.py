"""Plan a job's memory: the trainer's verb `plan`, in a child that libtpu may abort.

Nothing is archived: the plan is what the command prints. The child gets the environment of a job in
a process, its lines are shown as they come, and it is stopped when its time is up.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, cast

from pydantic import TypeAdapter

from jobs.records import FIT_FILE, JOB_FILE, PLAN_FILE, ExitStatus, Fit, MemoryPlan
from jobs.spec import Job
from runner import ending
from runner.environment import TRAINER, here, process_environment
from runner.watch import Interrupts, Say, watch

DOES_NOT_FIT = 3
LIMIT_S = 900.0
"""Seconds for a plan, or a search, where nobody says."""
_WROTE_A_PLAN = (0, DOES_NOT_FIT)
_GRACE_S = 10.0  # from SIGTERM, or from the end of its own time, to SIGKILL
_PLANS: TypeAdapter[list[MemoryPlan]] = TypeAdapter(list[MemoryPlan])


class PlanRefusedError(Exception):
    """The job cannot be planned as asked: a line for each reason."""


class PlanFailedError(Exception):
    """The planner ended otherwise than it should: how, and its last lines."""


class PlanStoppedError(Exception):
    """Somebody stopped it.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, what: str = "planning") -> None:
        super().__init__(f"{ending.signal_name(number)}: {what} was stopped")
        self.number = number


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How to plan.

    Attributes:
        quick: by arithmetic and formulas, without the compiler.
        engine_weights: sharded or replicated, see the trainer's budget.
        advice: plan changes, too, where the job does not fit.
        what_if: plan for every TPU type.
        limit_s: seconds for all of it.
    """

    quick: bool
    engine_weights: str
    advice: bool
    what_if: bool
    limit_s: float


def plan_argv(trainer: Sequence[str], job_file: Path, asked: Asked) -> list[str]:
    """The child's command."""
    argv = [*trainer, "plan", str(job_file), "--limit", f"{asked.limit_s:g}"]
    argv += ["--engine-weights", asked.engine_weights]
    argv += ["--quick"] if asked.quick else []
    argv += [] if asked.advice else ["--no-advice"]
    return argv + (["--what-if", "accelerators"] if asked.what_if else [])


@dataclass(frozen=True, kw_only=True)
class FitAsked:
    """How to look for a setting that fits.

    Attributes:
        margin_gib: to be left of a chip.
        exact: change nothing that alters the mathematics.
        quick: by formulas alone, without the compiler.
        engine_weights: sharded or replicated, see the trainer's budget.
        limit_s: seconds for all of it.
    """

    margin_gib: float
    exact: bool
    quick: bool
    engine_weights: str
    limit_s: float


def fit_argv(trainer: Sequence[str], job_file: Path, asked: FitAsked) -> list[str]:
    """The child's command."""
    argv = [*trainer, "fit", str(job_file), "--limit", f"{asked.limit_s:g}"]
    argv += ["--engine-weights", asked.engine_weights, "--margin", f"{asked.margin_gib:g}"]
    argv += ["--quick"] if asked.quick else []
    return argv + (["--exact"] if asked.exact else [])


class _Planner:
    """The child, as `watch` stands by it."""

    def __init__(self, child: subprocess.Popen[str], *, limit_s: float) -> None:
        self._child = child
        self._ends = time.monotonic() + limit_s + _GRACE_S
        self.late = False

    def wait(self, seconds: float) -> ExitStatus | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._child.wait(seconds)
            return ending.of_process(code, stopped=False, refusal=code == ending.REFUSED)
        if time.monotonic() >= self._ends:
            # Asked first: it ends the compiler that it started.
            self.kill() if self.late else self.stop(signal.SIGTERM)
            self.late, self._ends = True, time.monotonic() + _GRACE_S
        return None

    def stop(self, number: int) -> None:
        self._child.send_signal(number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)


def plan(
    job: Job, asked: Asked, *, say: Say, interrupts: Interrupts, trainer: Sequence[str] = TRAINER
) -> list[MemoryPlan]:
    """The plan of a job; of the job on each TPU type where that is asked.

    Raises:
        PlanRefusedError, PlanFailedError, PlanStoppedError: there is none.
    """
    argv = partial(plan_argv, trainer, asked=asked)
    text = child(job, argv, PLAN_FILE, asked.limit_s, say=say, interrupts=interrupts)
    return _PLANS.validate_json(text if text.startswith("[") else f"[{text}]")


def fit(
    job: Job, asked: FitAsked, *, say: Say, interrupts: Interrupts, trainer: Sequence[str] = TRAINER
) -> Fit:
    """The fastest setting of a job that fits.

    Raises:
        PlanRefusedError, PlanFailedError, PlanStoppedError: nothing was found out.
    """
    argv = partial(fit_argv, trainer, asked=asked)
    text = child(job, argv, FIT_FILE, asked.limit_s, say=say, interrupts=interrupts)
    return Fit.model_validate_json(text)


def child(  # noqa: PLR0913 - all of a verb that answers with a file
    job: Job,
    argv: Callable[[Path], list[str]],
    result: str,
    limit_s: float,
    *,
    say: Say,
    interrupts: Interrupts,
    what: str = "planning",
) -> str:
    """The text of the file that the trainer's verb leaves beside a job file of its own.

    Raises:
        PlanRefusedError, PlanFailedError, PlanStoppedError: it left none.
    """
    with tempfile.TemporaryDirectory(prefix="headroom-plan-") as name:
        folder = Path(name)
        job_file = folder / JOB_FILE
        job_file.write_text(job.to_json(), encoding="utf-8")
        child = subprocess.Popen(
            argv(job_file),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=process_environment(here(), job.container.pass_env),
            cwd=folder,
            start_new_session=True,
        )
        planner = _Planner(child, limit_s=limit_s)
        refusals, last = list[str](), list[str]()
        stream = cast("IO[str]", child.stdout)
        reader = threading.Thread(target=_read, args=(stream, refusals, last, say), daemon=True)
        reader.start()
        try:
            status = watch(planner, interrupts, grace_s=_GRACE_S, asked=lambda _: None)
        finally:
            planner.kill()
            reader.join(_GRACE_S)
        if interrupts.numbers:
            raise PlanStoppedError(interrupts.numbers[0], what)
        if planner.late:
            raise PlanFailedError(f"{what} took more than {limit_s:g} s: raise --limit")
        if status.code == ending.REFUSED and refusals:
            raise PlanRefusedError("\n".join(refusals))
        if status.code not in _WROTE_A_PLAN or status.signal:
            how = status.signal or f"exit status {status.code}"
            raise PlanFailedError(f"{what} ended with {how}: {' | '.join(last) or 'no word'}")
        return (folder / result).read_text(encoding="utf-8")


def _read(stream: IO[str], refusals: list[str], last: list[str], say: Say) -> None:
    """Show the child's lines; keep its refusals and its last words."""
    with stream:
        for raw in stream:
            line = raw.rstrip("\n")
            if line.startswith("Error: "):
                refusals.append(line.removeprefix("Error: "))
            elif line.strip():
                say(line)
                last[:] = [*last[-2:], line]
