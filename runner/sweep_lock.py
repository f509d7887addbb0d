"""One sweep at a time: in a folder, and on a machine. Both locks end with their process."""

import contextlib
import fcntl
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

from runner.chips import open_shared
from runner.supervise import boot_id, start_ticks
from runner.sweep_file import SweepError

LOCK_FILE = "lock"


@contextlib.contextmanager
def held(path: Path, what: str) -> Generator[None]:
    """Hold a lock file until the `with` ends, or its process does.

    Args:
        path: of the file; made where it is missing, and left there.
        what: is done by whoever holds it, in words.

    Raises:
        SweepError: another holds it; the message has its process id, once that is written.
        OSError: the file cannot be made or opened.
    """
    handle = open_shared(path)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SweepError(f"{_holder(handle)} {what} ({path})") from None
        pid = os.getpid()
        record = {"pid": pid, "ticks": start_ticks(pid), "boot_id": boot_id()}
        text = json.dumps(record).encode()
        os.pwrite(handle, text.ljust(os.fstat(handle).st_size), 0)
        yield
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    """Who holds the lock, in words; what one that has ended has left in the file is not told."""
    with contextlib.suppress(ValueError):
        read: Any = json.loads(os.pread(handle, 1 << 16, 0))
        record = cast("dict[str, Any]", read) if isinstance(read, dict) else {}
        pid, ticks = record.get("pid"), record.get("ticks")
        if isinstance(pid, int) and ticks is not None and record.get("boot_id") == boot_id():
            return f"process {pid}" if start_ticks(pid) == ticks else "another process"
    return "another process"


@contextlib.contextmanager
def held_folder(folder: Path) -> Generator[None]:
    """Hold a sweep's folder: nobody else expands, plans or runs in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / LOCK_FILE, f"is at work on this sweep already, in {folder}"):
        yield
