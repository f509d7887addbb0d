"""One job at a time on the chips of a host: a lock that dies with whoever holds it.

libtpu's own lock lies in /tmp, and each container has its own /tmp; a second job would fail in the
midst of its start, or take HBM that the first was planned with.

The lock is a `flock`. A job's process inherits it from the runner, so it lasts as long as the job,
also where the runner was killed, and no longer: nothing has to be cleaned up. A container cannot
inherit it: its init is written into the file, and holds the chips while that very process lives.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

from docker import DockerClient

from runner.supervise import boot_id, start_ticks

# Every user of the host must find the same file, so neither a home nor $XDG_RUNTIME_DIR.
LOCK = (Path("/run/lock") if Path("/run/lock").is_dir() else Path("/tmp")) / "headroom-chips.lock"  # noqa: S108
LABEL = "headroom.chips"


class ChipsHeldError(Exception):
    """Another run has the chips; the message names it."""


class Hold:
    """The lock, held.

    Attributes:
        handle: the file that processes which shall hold it too must inherit.
    """

    def __init__(self, handle: int, run_dir: Path) -> None:
        self.handle = handle
        self._record: dict[str, Any] = {"run_dir": str(run_dir), "boot_id": boot_id()}
        self.note(os.getpid())

    def note(self, pid: int) -> None:
        """Write down which process has the chips, first our own, then the job's."""
        record = {**self._record, "pid": pid, "ticks": start_ticks(pid)}
        text = json.dumps(record).encode()
        os.pwrite(self.handle, text.ljust(os.fstat(self.handle).st_size), 0)


@contextlib.contextmanager
def hold(lock: Path, run_dir: Path, *, client: DockerClient | None) -> Generator[Hold]:
    """Have the chips of this host until the `with` ends, and as long as the job lives.

    Args:
        lock: the file.
        run_dir: of the run that shall have them.
        client: of the Docker daemon that shall run it; asked for our live containers with chips.

    Raises:
        ChipsHeldError: another run has them.
        OSError: the file cannot be made or written.
    """
    handle = open_shared(lock)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ChipsHeldError(_told(_read(handle), lock)) from None
        record = _read(handle)
        # A process of our own kind would hold the lock itself: this is a container's init.
        if _lives(record):
            raise ChipsHeldError(_told(record, lock))
        _none_in(client)
        yield Hold(handle, run_dir)
    finally:
        os.close(handle)


def open_shared(lock: Path) -> int:
    """A lock file that every user of the host can open and write, whoever made it.

    Raises:
        OSError: it cannot be made or opened.
    """
    # Not O_CREAT where it is there: the kernel forbids that for another user's file in a folder
    # like /tmp (fs.protected_regular).
    with contextlib.suppress(FileNotFoundError):
        return os.open(lock, os.O_RDWR)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT)
    with contextlib.suppress(PermissionError):  # another user has made it meanwhile
        os.fchmod(handle, 0o666)
    return handle


def _read(handle: int) -> dict[str, Any]:
    """Who had, or has, the chips; {} of a new file, or one that is being written."""
    with contextlib.suppress(ValueError):
        record = json.loads(os.pread(handle, 1 << 16, 0))
        if isinstance(record, dict) and {"run_dir", "pid", "ticks", "boot_id"} <= record.keys():
            return record  # pyright: ignore[reportUnknownVariableType]
    return {}


def _lives(record: dict[str, Any]) -> bool:
    """The very process that was noted, not one that got its number later or after a boot."""
    if not record or record["boot_id"] != boot_id() or record["ticks"] is None:
        return False
    return start_ticks(record["pid"]) == record["ticks"]


def _told(record: dict[str, Any], lock: Path) -> str:
    if not record:
        return f"the chips of this host are held by a run that is just starting ({lock})"
    who = f"run {Path(record['run_dir']).name} (pid {record['pid']})"
    if not _lives(record):
        return (
            f"the chips of this host are held by what {who} has left behind: "
            f"fuser {lock} names the process; end it"
        )
    return (
        f"the chips of this host are held by {who}: wait for it, or stop it with "
        f"headroom cancel {record['run_dir']}"
    )


def _none_in(client: DockerClient | None) -> None:
    """Refuse where the daemon runs a job with chips that the file does not know.

    As after a SIGKILL between the container's start and the file, or of a daemon whose processes
    have other numbers here.
    """
    if client is None:
        return
    # Docker's client is untyped here. It lists what runs, the paused too.
    listed = cast("list[dict[str, Any]]", client.api.containers(filters={"label": LABEL}))  # pyright: ignore[reportUnknownMemberType]
    for found in listed:
        labels = found["Labels"]
        raise ChipsHeldError(
            f"the chips of this host are held by run {labels['headroom.run']} (container "
            f"{found['Id'][:12]}): wait for it, or stop it with "
            f"headroom cancel {labels['headroom.run_dir']}"
        )
