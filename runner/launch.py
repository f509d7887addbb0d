"""Start `python -m trainer VERB job.json` in a process or a container, and see it to its end.

What it may see of this machine's environment is spelled out in environment.py.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Literal

from docker import DockerClient

from jobs.records import ExitStatus, Manifest
from jobs.spec import Job
from runner import chips, container, ending, supervise
from runner.archive import RunDir, now
from runner.conclude import conclude
from runner.environment import TRAINER, container_environment, here, process_environment, unset
from runner.process import ProcessTask
from runner.provenance import installed_packages
from runner.watch import Follower, Interrupts, Say, Sink, Task, describe, watch

Where = Literal["auto", "process", "docker"]

# How long a reader of a stopped run's output is waited for.
_PATIENCE_S = 5.0


class HostNotFit(Exception):  # noqa: N818 - the design's name
    """This machine cannot run the job as asked; the message says what would help."""


def place(
    where: Where, job: Job, *, connect: Callable[[], DockerClient] = container.connect
) -> tuple[DockerClient | None, str]:
    """Where the job will run: a Docker client, or None for a process; and why, in words.

    Raises:
        HostNotFit: Docker was asked for and does not answer, or the job's image is not there.
    """
    if where == "process":
        return None, "a process, as asked"
    try:
        client = connect()
    except container.NoDaemonError as error:
        if where == "auto":
            return None, f"a process ({error})"
        raise HostNotFit(
            f"--where docker: {error}; start it, set DOCKER_HOST, or use --where process"
        ) from error
    try:
        revision = container.image_revision(client, job)
    except container.NoImageError as error:
        raise HostNotFit(f"--where {where}: {error}; or use --where process") from error
    return client, f"docker (a daemon answers; {job.image} was built from commit {revision})"


def launch(  # noqa: PLR0913 - all of the world that a run touches, handed in by name
    run: RunDir,
    job: Job,
    *,
    client: DockerClient | None,
    out: Sink,
    say: Say,
    trainer: Sequence[str] = TRAINER,
    interrupts: Interrupts | None = None,
    chips_lock: Path = chips.LOCK,
) -> Manifest:
    """Run a created run's job to its end, whatever comes, and finish its archive.

    Args:
        run: just created, its lock held by us; its manifest has the verb.
        job: as in its job.json.
        client: of the Docker daemon; None: in a process.
        out: where the log is shown as it grows.
        say: is told what a person should know.
        trainer: the program of the process way.
        interrupts: entered before the run was made, so that no signal is missed; released when
            its archive is finished. None: none will come.
        chips_lock: says who has the chips of this host, if the job wants them.

    Raises:
        HostNotFit: the job could not be started; the archive says so too.
        NotFinishedError: it has ended, and its archive cannot be finished now.
    """
    interrupts = Interrupts() if interrupts is None else interrupts
    for name in unset(here(), job.container.pass_env):
        say(f"container.pass_env: {name} is not set here: the job runs without it")
    grace_s = job.container.stop_grace_s

    def asked(number: int) -> None:
        run.ask_to_stop(ending.signal_name(number))
        follower.patience_s = _PATIENCE_S
        say(describe(number, grace_s))

    with Follower(run.log_file, out) as follower, contextlib.ExitStack() as until_it_ends:
        if interrupts.numbers:
            return _stopped_before_start(run, interrupts.numbers[0], say)
        try:
            hold = until_it_ends.enter_context(_hold(run, job, client=client, lock=chips_lock))
            task = start(run, job, client=client, trainer=trainer, hold=hold)
        except HostNotFit as error:
            with run.log_file.open("ab") as log:
                log.write(f"headroom: {error}\n".encode())
            conclude(run, ExitStatus(code=_NOT_STARTED, reason="refused"))
            raise
        status = watch(task, interrupts, grace_s=grace_s, asked=asked)
        manifest = conclude(run, status)
        if client is not None:
            container.remove(client, run)
        # What is left is to show the log: Ctrl-C may end that.
        interrupts.release()
    return manifest


def _stopped_before_start(run: RunDir, number: int, say: Say) -> Manifest:
    run.ask_to_stop(ending.signal_name(number))
    say(f"{ending.signal_name(number)}: the job is not started")
    return conclude(run, ending.before_start(number))


# What `docker run` says when the daemon, not the program, failed.
_NOT_STARTED = 125


@contextlib.contextmanager
def _hold(
    run: RunDir, job: Job, *, client: DockerClient | None, lock: Path
) -> Generator[chips.Hold | None]:
    """The chips of this host, where the job wants any.

    Raises:
        HostNotFit: another run has them.
    """
    if job.target.platform == "cpu":
        yield None
        return
    with contextlib.ExitStack() as until_it_ends:
        try:
            held = until_it_ends.enter_context(chips.hold(lock, run.path, client=client))
        except (chips.ChipsHeldError, OSError) as error:
            raise HostNotFit(str(error)) from error
        yield held


def start(
    run: RunDir,
    job: Job,
    *,
    client: DockerClient | None,
    trainer: Sequence[str],
    hold: chips.Hold | None = None,
) -> Task:
    """Start the job and write into the manifest what was started.

    Args:
        run: its manifest has the verb.
        job: as in its job.json.
        client: of the Docker daemon; None: in a process.
        trainer: the program of the process way.
        hold: of the chips, for the job to have; None: it wants none.

    Raises:
        HostNotFit: it could not be.
    """
    verb = run.manifest().verb
    if client is None:
        command = [*trainer, verb, str(run.job_file)]
        environment = process_environment(here(), job.container.pass_env)
        return _start_process(run, command, environment, hold=hold)
    owner = run.path.stat()
    try:
        options = container.container_options(
            job,
            run.path,
            manifest=run.manifest(),
            user=(owner.st_uid, owner.st_gid),
            environment=container_environment(here(), job.container.pass_env),
        )
        for folder in container.cache_folders(job):
            _make_for(folder, owner)
        task = container.start(client, run, options)
    except container.NotStartedError as error:
        raise HostNotFit(str(error)) from error
    except OSError as error:
        raise HostNotFit(f"the container was not made: {error}; see cache_dir") from error
    if hold is not None:
        hold.note(container.init_pid(client, task.container_id))
    return task


def _make_for(folder: Path, owner: os.stat_result) -> None:
    """Make a folder that the run directory's owner can write."""
    if folder.is_dir():
        return
    if not folder.parent.is_dir():
        _make_for(folder.parent, owner)
    folder.mkdir(exist_ok=True)
    if os.geteuid() == 0:
        os.chown(folder, owner.st_uid, owner.st_gid)


def _start_process(
    run: RunDir, command: list[str], environment: dict[str, str], *, hold: chips.Hold | None
) -> ProcessTask:
    # The supervisor is started by its path, apart from all settings of Python's: -I, -S.
    argv = [sys.executable, "-I", "-S", supervise.__file__, str(run.path), "--", *command]
    run.update(state="running", started=now(), command=command, packages=installed_packages())
    # The job writes the log itself: it lasts when the runner is killed, and no slow reader of ours
    # can hold the job up.
    with run.log_file.open("ab") as log:
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=run.path,
                start_new_session=True,
                pass_fds=() if hold is None else (hold.handle,),
            )
        except OSError as error:
            raise HostNotFit(f"the job's process cannot be started: {error}") from error
    while not run.process_file.exists() and child.poll() is None:
        time.sleep(0.005)
    task = ProcessTask(run, child=child)
    if hold is not None and task.pid is not None:
        hold.note(task.pid)
    run.update(pid=task.pid)
    return task
