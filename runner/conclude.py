"""Close a run that has ended: its archive, and the named cause where it failed."""

import contextlib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs.aftermath import BLACK_BOX_FILE, NOTICE_FILE
from jobs.records import PLAN_FILE, Diagnosis, ExitStatus, Manifest
from runner import measured
from runner.archive import NoSuchRunError, NotFinishedError, RunDir, write_whole
from runner.blackbox import in_a_line
from runner.ending import with_notice

# The others say themselves what they are: done, refused (the log has the reason), interrupted,
# preempted.
_UNEXPLAINED = ("failed", "oom_killed", "lost")


def conclude(run: RunDir, status: ExitStatus) -> Manifest:
    """Diagnose a run's log and finish its archive. Only for who holds the run's lock.

    In this order: a manifest that has an exit status is looked at no more.

    Raises:
        NotFinishedError: something could not be written; all of it can be done again.
    """
    noticed = run.read_json(run.path / NOTICE_FILE) is not None
    status = with_notice(status, noticed=noticed)
    try:
        if status.reason in _UNEXPLAINED and run.manifest().exit_status is None:
            run.end_log(status)
            found = explain(run, run.manifest().model_copy(update={"exit_status": status}))
            write_whole(run.diagnosis_file, found.model_dump_json(indent=2) + "\n")
        manifest = run.finish(status)
    except (OSError, NoSuchRunError) as error:
        raise NotFinishedError(run, status, error) from error
    taught, cache_dir = measured.calibration(run, manifest), run.cache_dir()
    if taught is not None and cache_dir is not None:
        # A run's end matters more than what the next plan could learn from it.
        with contextlib.suppress(OSError):
            measured.keep(taught, cache_dir)
    return manifest


def beside(folder: Path) -> dict[str, Any]:
    """The job and the plan that lie beside a log, as `diagnose` takes them; None where not."""
    run = RunDir(folder)
    return {"job": run.read_json(run.job_file), "plan": run.read_json(folder / PLAN_FILE)}


def explain(run: RunDir, manifest: Manifest) -> Diagnosis:
    """The named cause of a run's log, told with the run's own job, and its plan if there is one."""
    # The table of causes takes longer to load than a short job: only where something failed.
    from runner.diagnose import diagnose  # noqa: PLC0415

    with run.log_file.open("rb") as log:
        found = diagnose(
            log,
            exit_status=manifest.exit_status,
            **beside(run.path),
        )
    if (held := in_a_line(run.read_json(run.path / BLACK_BOX_FILE))) is not None:
        found = found.model_copy(update={"advice": [held, *found.advice]})
    refused = manifest.exit_status is not None and manifest.exit_status.reason == "refused"
    if found.cause != "unknown" or not (refused and (said := run.refusals())):
        return found
    return found.model_copy(
        update={
            "cause": "config_error",
            "confidence": "certain",
            "explanation": "The trainer refused the job, and says why.",
            "root_line": said[0][1],
            "line": said[0][0],
            "evidence": [number for number, _ in said[1:]],
            "advice": ["Each such line says what was found and what to change."],
        }
    )


def diagnosis_of(run: RunDir) -> Diagnosis | None:
    """The cause that was found when the run ended; None where it was not looked for."""
    try:
        return Diagnosis.model_validate(run.read_json(run.diagnosis_file))
    except ValidationError:  # there is none, or it is another version's
        return None
