"""Where a run's files lie, and how they are written: run directory, manifest, archived log.

    runs/20260119-084640-smoke-15154fc/   job.json manifest.json run.log steps.jsonl ...
    logs/smoke_15154fc_20260119-084640.log   the same file as run.log, by another name
    logs/smoke_latest.log                 a link to the newest of them, from its start on

`logs` lies beside the folder of the runs. Whoever holds a run's lock (`create` does, until its
`with` ends, even by SIGKILL) may finish it; all others may read.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError

from jobs.records import (
    CHECKPOINTS,
    DIAGNOSIS_FILE,
    FAILURE_FILE,
    JOB_FILE,
    LOG_FILE,
    MANIFEST_FILE,
    STEPS_FILE,
    ExitStatus,
    Manifest,
)
from jobs.spec import Job
from runner import runlog
from runner.provenance import Checkout, host, short_commit
from runner.supervise import EXIT_FILE, PROCESS_FILE

STOP_FILE = "stop.json"

# Kept free for the records of a run's end, and given back for them: a job that fills the disk must
# not cost its own archive. A manifest with its packages is some 10 KiB, twice while it is replaced.
_ROOM, _ROOM_BYTES = ".room", 1 << 16

_STAMP = "%Y%m%d-%H%M%S"
_RUN_NAME = re.compile(r"\d{8}-\d{6}-.+")


class NoSuchRunError(LookupError):
    """No run, or more than one, goes by that name; or its manifest cannot be read."""


class NotFinishedError(Exception):
    """A job has ended, and its archive cannot be finished now; `headroom status` does it later.

    Attributes:
        run: whose.
        status: how the job ended.
    """

    def __init__(self, run: "RunDir", status: ExitStatus, why: Exception) -> None:
        self.run, self.status = run, status
        super().__init__(
            f"the job has ended ({status.reason}, {status.code}), but its archive cannot be "
            f"finished: {why}; nothing of it is removed: headroom status finishes {run.name} once "
            "it can"
        )


@dataclass(frozen=True)
class RunDir:
    """Every path of one run.

    Attributes:
        path: the run directory, absolute.
    """

    path: Path

    @property
    def name(self) -> str:
        """The run's name: the directory's."""
        return self.path.name

    @property
    def logs(self) -> Path:
        """Where the logs of all runs are archived: beside the folder of the runs."""
        return self.path.parent.parent / "logs"

    @property
    def job_file(self) -> Path:
        """The job as the trainer reads it."""
        return self.path / JOB_FILE

    @property
    def manifest_file(self) -> Path:
        """What ran, where, when and how it ended."""
        return self.path / MANIFEST_FILE

    @property
    def log_file(self) -> Path:
        """All that the trainer printed, and the exit status as its last line."""
        return self.path / LOG_FILE

    @property
    def steps_file(self) -> Path:
        """A record a step."""
        return self.path / STEPS_FILE

    def newest_checkpoint(self) -> Path | None:
        """The folder of the newest whole checkpoint that the trainer left."""
        found = sorted((self.path / CHECKPOINTS).glob("step_*"))
        return found[-1] if found else None

    def cache_dir(self) -> Path | None:
        """The job's cache_dir; None where job.json cannot be read."""
        named = (self.read_json(self.job_file) or {}).get("cache_dir")
        return Path(named) if isinstance(named, str) else None

    @property
    def failure_file(self) -> Path:
        """Why the trainer stopped, in its own words."""
        return self.path / FAILURE_FILE

    @property
    def diagnosis_file(self) -> Path:
        """The named cause of a failure."""
        return self.path / DIAGNOSIS_FILE

    @property
    def process_file(self) -> Path:
        """Which processes run it (runner/supervise.py writes it)."""
        return self.path / PROCESS_FILE

    @property
    def exit_file(self) -> Path:
        """How the trainer's process ended (runner/supervise.py writes it)."""
        return self.path / EXIT_FILE

    @property
    def stop_file(self) -> Path:
        """That somebody asked the run to stop, and by which signal."""
        return self.path / STOP_FILE

    def manifest(self) -> Manifest:
        """The manifest as it stands.

        Raises:
            NoSuchRunError: there is none, or it is not one.
        """
        try:
            return Manifest.model_validate_json(self.manifest_file.read_bytes())
        except (OSError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise NoSuchRunError(f"{self.manifest_file} cannot be read: {reason}") from error

    def write(self, manifest: Manifest) -> Manifest:
        """Put a manifest in place, whole."""
        write_whole(self.manifest_file, manifest.model_dump_json(indent=2) + "\n")
        return manifest

    def update(self, **changes: Any) -> Manifest:
        """Change fields of the manifest."""
        changed = {**self.manifest().model_dump(), **changes}
        return self.write(Manifest.model_validate(changed))

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """One of the run's small records, None where it is not there or is not whole."""
        try:
            record = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return cast("dict[str, Any]", record) if isinstance(record, dict) else None

    def refusals(self) -> list[tuple[int, str]]:
        """The lines in which the trainer refuses, `Error: ...`, with their numbers, from 1."""
        with self.log_file.open("rb") as log:
            return [
                (number, line.decode(errors="replace").rstrip())
                for number, line in enumerate(log, start=1)
                if line.startswith(b"Error: ")
            ]

    def ask_to_stop(self, signal_name: str) -> None:
        """Leave word that the job is to stop, so that whoever finishes the run knows why it did."""
        if not self.stop_file.exists():
            write_whole(self.stop_file, json.dumps({"signal": signal_name, "asked": now()}) + "\n")

    @contextlib.contextmanager
    def held(self) -> Generator[bool]:
        """Hold the run's lock if nobody does: true, then only we may finish it."""
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
        finally:
            os.close(handle)

    def end_log(self, status: ExitStatus) -> None:
        """Write the last line of the log, if it is not there already."""
        (self.path / _ROOM).unlink(missing_ok=True)
        runlog.end(self.log_file, "lost" if status.reason == "lost" else status.code)

    def finish(self, status: ExitStatus) -> Manifest:
        """Write the last line of the log, archive it, and close the manifest.

        Only for who holds the run's lock. What an earlier, killed finisher did is not done twice.
        """
        manifest = self.manifest()
        if manifest.exit_status is not None:
            return manifest
        self.end_log(status)
        runlog.keep(self.log_file, archived_log(self, manifest))
        return self.update(
            state="lost" if status.reason == "lost" else "finished",
            finished=now(),
            exit_status=status.model_dump(),
            log_sha256=runlog.sha256(self.log_file),
        )


@contextlib.contextmanager
def create(
    job: Job, *, verb: str, where: Literal["process", "docker"], runs: Path, code: Checkout
) -> Generator[RunDir]:
    """A new run directory with job.json, an empty log and a manifest; ours until the `with` ends.

    Args:
        job: what was asked.
        verb: what the trainer shall do: train or evaluate.
        where: process or docker.
        runs: the folder of all runs; made where it is missing.
        code: the repository's state.
    """
    created = datetime.now(UTC)
    run = _make_directory(
        runs.absolute(), f"{created.strftime(_STAMP)}-{job.name}-{short_commit(code.commit)}"
    )
    manifest = Manifest(
        run=run.name,
        job=job.name,
        job_sha256=job.digest,
        verb=verb,
        state="created",
        where=where,
        command=[],
        commit=code.commit,
        dirty=code.dirty,
        packages={},
        host=host(),
        created=created.isoformat(),
    )
    with run.held():
        try:
            write_whole(run.job_file, job.to_json())
            run.log_file.touch()
            (run.path / _ROOM).write_bytes(bytes(_ROOM_BYTES))
            run.write(manifest)
            runlog.publish(
                run.log_file, archived_log(run, manifest), latest=latest_log(run, manifest)
            )
        except OSError:  # logs/ may be read-only where runs/ is not: nothing was started
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        yield run


def _make_directory(runs: Path, name: str) -> RunDir:
    runs.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = runs / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return RunDir(path)


def find(runs: Path, name: str) -> RunDir:
    """The run that goes by a name, the beginning of one, a path, or "latest".

    Raises:
        NoSuchRunError: none or several do; the message lists what is there.
    """
    every = all_runs(runs)
    if name == "latest" and every:
        return every[0]
    exact = runs.absolute() / name
    # A name is looked up in the folder, so that ".." or "" never means a run by accident.
    if _RUN_NAME.fullmatch(name) and (exact / MANIFEST_FILE).is_file():
        return RunDir(exact)
    if "/" in name and (Path(name) / MANIFEST_FILE).is_file():
        return RunDir(Path(name).resolve())
    fitting = [run for run in every if name and run.name.startswith(name)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(run.name for run in fitting[:5])
        raise NoSuchRunError(
            f"{name!r} begins {len(fitting)} runs ({names}...): write more of the name"
        )
    newest = ", ".join(run.name for run in every[:5])
    known = f"the newest are {newest}" if every else "there are none yet: headroom run jobs/..."
    raise NoSuchRunError(f"no run {name!r} in {runs}; {known}")


def all_runs(runs: Path) -> list[RunDir]:
    """All runs in a folder, newest first."""
    if not runs.is_dir():
        return []
    found = [
        RunDir(path.absolute())
        for path in runs.iterdir()
        if _RUN_NAME.fullmatch(path.name) and (path / MANIFEST_FILE).is_file()
    ]
    # Runs of one second share a stamp: the directory's own birth cannot be read everywhere, its
    # job.json is written once.
    return sorted(found, key=lambda r: (r.name[:15], _written_ns(r.job_file)), reverse=True)


def _written_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def archived_log(run: RunDir, manifest: Manifest) -> Path:
    """logs/<job>_<commit>_<UTC stamp>.log, with the run's number where a second has several."""
    short = short_commit(manifest.commit)
    stamp = run.name[:15]
    number = run.name.removeprefix(f"{stamp}-{manifest.job}-{short}")
    return run.logs / f"{manifest.job}_{short}_{stamp}{number}.log"


def latest_log(run: RunDir, manifest: Manifest) -> Path:
    """logs/<job>_latest.log."""
    return run.logs / f"{manifest.job}_latest.log"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or all of the new one, even after a crash."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat()
