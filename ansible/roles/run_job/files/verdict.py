"""How a job ended on every worker, and the first cause where it failed.

    verdict.py FETCHED WORKER...    ends with 0 where every worker ended with exit_status=0

FETCHED has a folder for each worker, as roles/run_job fetches it: runs/RUN/manifest.json and so on,
runner.log (what the command headroom said) and unit.txt (how systemd says it ended).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from jobs.records import DIAGNOSIS_FILE, MANIFEST_FILE, Diagnosis, Manifest

_LAST_LINES = 5


@dataclass(frozen=True)
class End:
    """How it ended on one worker.

    Attributes:
        worker: its name in the inventory.
        text: in words, on one line.
        done: it ended with exit_status=0.
        stopped: it was stopped, because of another or by a person.
        when: UTC, ISO 8601, "" where nothing says.
        why: lines about the cause.
    """

    worker: str
    text: str
    done: bool
    stopped: bool
    when: str
    why: list[str]


def end_of(fetched: Path, worker: str) -> End:
    """What the fetched folder of a worker says; the last attempt counts."""
    folder = fetched / worker
    manifests = sorted(folder.glob(f"runs/*/{MANIFEST_FILE}"))
    if not manifests:
        said = last_lines(folder / "runner.log")
        text = "was not started" if folder.is_dir() else "nothing was fetched"
        return End(worker, text, done=False, stopped=False, when="", why=said)
    manifest = Manifest.model_validate_json(manifests[-1].read_text())
    run = manifests[-1].parent
    if manifest.exit_status is None:
        text = f"{manifest.state}, its end is not known: {run}"
        return End(worker, text, done=False, stopped=False, when="", why=unit(folder))
    status = manifest.exit_status
    diagnosis = diagnosis_of(run)
    cause = [f"{diagnosis.cause}: {diagnosis.explanation}"] if diagnosis else []
    line = [f"  {diagnosis.root_line}"] if diagnosis and diagnosis.root_line else []
    return End(
        worker,
        f"exit_status={status.code} {status.reason}, {run}",
        done=status.code == 0,
        stopped=status.reason == "interrupted",
        when=manifest.finished or "",
        why=[*cause, *line] or last_lines(run / "run.log"),
    )


def diagnosis_of(run: Path) -> Diagnosis | None:
    """The named cause, if there is one."""
    path = run / DIAGNOSIS_FILE
    return Diagnosis.model_validate_json(path.read_text()) if path.is_file() else None


def last_lines(path: Path) -> list[str]:
    """The end of a log, [] where there is none."""
    if not path.is_file():
        return []
    return path.read_text(errors="replace").splitlines()[-_LAST_LINES:]


def unit(folder: Path) -> list[str]:
    """What systemd said of the runner."""
    return last_lines(folder / "unit.txt") + last_lines(folder / "runner.log")


def first(ends: list[End]) -> End | None:
    """Whose failure came first; a worker that was stopped did not begin it."""
    failed = [end for end in ends if not end.done]
    began = [end for end in failed if not end.stopped] or failed
    # One that tells no time was never started, or was lost: before any other's end.
    return min(began, key=lambda end: end.when, default=None)


def lines(ends: list[End]) -> list[str]:
    """All of it in words; the last line is the verdict."""
    said = [f"{end.worker}: {end.text}" for end in ends]
    cause = first(ends)
    if cause is None:
        return [*said, f"exit_status=0 on {len(ends)} of {len(ends)} workers"]
    done = sum(end.done for end in ends)
    return [
        *said,
        *(f"{cause.worker}: {why}" for why in cause.why),
        f"failed: {done} of {len(ends)} workers ended with exit_status=0; {cause.worker} was first",
    ]


def main(folder: str, *workers: str) -> None:
    """Print the verdict, end with 1 where one did not end well."""
    ends = [end_of(Path(folder), worker) for worker in workers]
    print("\n".join(lines(ends)))
    sys.exit(0 if all(end.done for end in ends) else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
