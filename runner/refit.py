"""After a job ran out of HBM: the same job in a setting that fits, or why there is none."""

from collections.abc import Sequence
from pathlib import Path

from jobs.records import gib
from jobs.spec import load
from runner import fit_file, planning
from runner.archive import RunDir
from runner.watch import Interrupts, Say

REFIT_FILE = "refit.yaml"
_ASKED = planning.FitAsked(
    margin_gib=1.0, exact=False, quick=False, engine_weights="sharded", limit_s=planning.LIMIT_S
)


def refit(run: RunDir, *, say: Say, trainer: Sequence[str]) -> Path | None:
    """Write a job that fits into the run's directory; None, and a word why, where there is none.

    Args:
        run: that ran out of memory; its job.json is fitted.
        say: is told what a person should know.
        trainer: the program that plans.

    Raises:
        PlanStoppedError: a signal came.
    """
    try:
        with Interrupts() as interrupts:
            found = planning.fit(
                load(run.job_file), _ASKED, say=say, interrupts=interrupts, trainer=trainer
            )
        if found.plan is None:
            short = (
                "" if found.shortfall_bytes is None else f": short by {gib(found.shortfall_bytes)}"
            )
            say(f"no refit: nothing fits {found.accelerator}{short}")
            return None
        if not found.changes:
            say("no refit: by the plan it fits as it is, and unchanged it would only fail again")
            return None
        file = run.path / REFIT_FILE
        fit_file.write(run.job_file, (), found, to=file, force=True)
    except (
        planning.PlanRefusedError, planning.PlanFailedError, fit_file.FitFileError, OSError,
    ) as error:  # fmt: skip
        say(f"no refit: {error}")
        return None
    changes = ", ".join(f"{change.key} = {change.new}" for change in found.changes)
    say(f"refit: {changes} ({file})")
    return file
