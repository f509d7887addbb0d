"""The truth about runs: checked against this machine and Docker, not only read from manifests."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from docker import DockerClient
from docker.errors import NotFound

from jobs.records import ExitStatus, Manifest
from runner import container, container_task, ending
from runner.archive import NotFinishedError, RunDir
from runner.conclude import conclude
from runner.process import ProcessTask
from runner.provenance import host
from runner.watch import Task, stop_and_wait

Connect = Callable[[], DockerClient]

# A finisher that we wait for only writes a few small files and hashes a log.
_FINISHER_S = 60.0
_START_S = 60.0
_SUPERVISOR_S = 5.0
_DEFAULT_GRACE_S = 30


class CannotTellError(Exception):
    """Whether a run still runs cannot be seen from here; the message says why."""


def settle(run: RunDir, *, connect: Connect = container.connect) -> Manifest:
    """The manifest, made true: a run that ended with nobody there is finished now.

    Raises:
        CannotTellError: the run belongs to another machine, or Docker does not answer.
        NoSuchRunError: its manifest cannot be read.
    """
    manifest = run.manifest()
    if manifest.exit_status is not None:
        return manifest
    with run.held() as ours:
        # Not ours: a runner stands by it, and will finish it.
        if not ours:
            return manifest
        status = _look(run, run.manifest(), connect=connect)
        if status is None:
            return run.manifest()
        manifest = _concluded(run, status)
    if manifest.where == "docker":
        container.remove(connect(), run)
    return manifest


def _look(run: RunDir, manifest: Manifest, *, connect: Connect) -> ExitStatus | None:
    """How a run that nobody stands by ended, its log brought up to date; None when it goes on."""
    _same_host(manifest)
    if manifest.where == "process":
        _await_supervisor(run, manifest)
        return ProcessTask(run).ended()
    try:
        # By its name: a runner that was killed while the daemon made it has not written its id.
        found = _client(manifest, connect).containers.get(container.name_of(run.path))
    except NotFound:
        return ending.LOST
    if found.labels.get("headroom.run_dir") != str(run.path):
        return ending.LOST
    state = found.attrs["State"]
    try:
        container_task.copy_log(found, run.log_file, follow=False)
    except container_task.LogNotWrittenError as error:
        raise CannotTellError(f"its log cannot be written: {error}") from error
    if state["Running"]:
        if manifest.state == "created":  # its runner was killed when it had just started it
            run.update(state="running", started=state["StartedAt"], container=found.id)
        return None
    return container_task.state_status(run, state)


def _await_supervisor(run: RunDir, manifest: Manifest) -> None:
    """Give a supervisor that has just been started the time to say so: its runner may be dead."""
    deadline = time.monotonic() + _SUPERVISOR_S
    while (
        manifest.state == "running"
        and not run.process_file.exists()
        and not run.exit_file.exists()
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)


def _concluded(run: RunDir, status: ExitStatus) -> Manifest:
    try:
        return conclude(run, status)
    except NotFinishedError as error:
        raise CannotTellError(str(error)) from error


def _same_host(manifest: Manifest) -> None:
    name = host()["name"]
    if manifest.host["name"] != name:
        raise CannotTellError(f"it runs on {manifest.host['name']}, this is {name}: ask there")


def _client(manifest: Manifest, connect: Connect) -> DockerClient:
    try:
        return connect()
    except container.NoDaemonError as error:
        name = container.name_of(Path(manifest.run))
        raise CannotTellError(f"its container {name} cannot be seen: {error}") from error


def cancel(run: RunDir, *, connect: Connect = container.connect) -> Manifest:
    """Stop a run, SIGTERM first, and see its archive finished; an ended one is left as it is.

    Raises:
        CannotTellError: the run cannot be reached from here.
        NoSuchRunError: its manifest cannot be read.
    """
    manifest = settle(run, connect=connect)
    if manifest.exit_status is not None:
        return manifest
    _same_host(manifest)
    manifest = _once_started(run, manifest, connect=connect)
    if manifest.exit_status is not None:
        return manifest
    run.ask_to_stop("SIGTERM")
    stop_and_wait(_task(run, manifest, connect=connect), grace_s=grace_s(run))
    # Its runner, if it has one, sees the end as we do and finishes the archive.
    deadline = time.monotonic() + _FINISHER_S
    while (manifest := settle(run, connect=connect)).exit_status is None:
        if time.monotonic() > deadline:
            raise CannotTellError(f"it has ended, but its runner did not finish {run.path}")
        time.sleep(0.05)
    return manifest


def _once_started(run: RunDir, manifest: Manifest, *, connect: Connect) -> Manifest:
    """The manifest when there is a job that can be signalled, or when the run has ended.

    Raises:
        CannotTellError: its runner is still about to start it.
    """
    deadline = time.monotonic() + _START_S
    while manifest.exit_status is None and not _is_started(run, manifest):
        if time.monotonic() > deadline:
            raise CannotTellError(
                f"its runner has not started it within {_START_S:g} s and it is not stopped: "
                "cancel it again, or stop its runner"
            )
        time.sleep(0.05)
        manifest = settle(run, connect=connect)
    return manifest


def _is_started(run: RunDir, manifest: Manifest) -> bool:
    # A process is known by its supervisor's record, a little after the manifest says running.
    if manifest.where == "process":
        return run.process_file.exists() or run.exit_file.exists()
    return manifest.state == "running"


def _task(run: RunDir, manifest: Manifest, *, connect: Connect) -> Task:
    if manifest.where == "process":
        return ProcessTask(run)
    return container_task.OthersTask(_client(manifest, connect), run, str(manifest.container))


def grace_s(run: RunDir) -> float:
    """Seconds between SIGTERM and SIGKILL: the job's, or a default where job.json does not tell."""
    # Not `load`: data that has moved since, or a job.json of another version, must not change it.
    part = (run.read_json(run.job_file) or {}).get("container")
    asked = cast("dict[str, Any]", part).get("stop_grace_s") if isinstance(part, dict) else None
    if isinstance(asked, int | float) and not isinstance(asked, bool):
        return asked
    return _DEFAULT_GRACE_S
