"""Start a program, say which process it is, wait for it, and say how it ended.

Run as a script by its path: `python supervise.py RUN_DIR -- PROGRAM ARGUMENT...`. It lives in a
session of its own, so that the program's exit code is on disk even when the runner is long dead. It
needs nothing but the standard library, and touches nothing of the program's output.

    process.json  {"pid", "ticks", "supervisor_pid", "supervisor_ticks", "boot_id"}
    exit.json     {"returncode", "finished"}; a negative code is a signal's number

Room for exit.json is taken before the program starts: a disk that the program fills cannot cost its
status. Its own exit code says the same (128 + N for signal N), for a runner that stands by where
not even that can be written.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

PROCESS_FILE = "process.json"
EXIT_FILE = "exit.json"
NOT_FOUND = 127

_ROOM = ".exit.json.room"
_ROOM_BYTES = 256


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when it is dead or a zombie.

    Source: proc(5), /proc/pid/stat, fields 3 (state) and 22 (starttime).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()  # the name in parentheses may hold anything
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def boot_id() -> str:
    """Differs after each boot; empty where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _write(path: Path, record: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="ascii") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def supervise(run_dir: Path, command: list[str]) -> int:
    """Run the command to its end, leave both records, and give its exit code, 128 + N of a signal.

    What it holds open by inheritance, the lock of the host's chips, the program holds too.
    """
    if _is_closed(run_dir):
        return NOT_FOUND
    with contextlib.suppress(OSError):
        (run_dir / _ROOM).write_bytes(b" " * _ROOM_BYTES)
    try:
        # A process group of its own: killing it and all it started leaves this process alive.
        program = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, process_group=0, close_fds=False
        )
    except OSError as error:
        sys.stderr.write(f"headroom: cannot start {command[0]}: {error}\n")
        return _write_exit(run_dir, NOT_FOUND)

    def forward(number: int, _: FrameType | None) -> None:
        if program.returncode is None:
            os.kill(program.pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _write(
        run_dir / PROCESS_FILE,
        {
            "pid": program.pid,
            "ticks": start_ticks(program.pid),
            "supervisor_pid": os.getpid(),
            "supervisor_ticks": start_ticks(os.getpid()),
            "boot_id": boot_id(),
        },
    )
    # Seen dead but not yet reaped, its number still names its group: what it left behind (and
    # would keep the chips) goes now, and nothing else can be hit.
    os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)
    with contextlib.suppress(PermissionError):
        os.killpg(program.pid, signal.SIGKILL)
    return _write_exit(run_dir, program.wait())


def _is_closed(run_dir: Path) -> bool:
    """The runner was killed when it had just started us, and the run given up for lost."""
    try:
        manifest = json.loads((run_dir / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return False
    return bool(manifest.get("exit_status"))


def _write_exit(run_dir: Path, returncode: int) -> int:
    record = {"returncode": returncode, "finished": datetime.now(UTC).isoformat()}
    room = run_dir / _ROOM
    with contextlib.suppress(OSError):  # a folder that became read-only: our exit code tells
        with room.open("r+b") as file:
            file.write(json.dumps(record).encode().ljust(_ROOM_BYTES))
            file.flush()
            os.fsync(file.fileno())
        room.replace(run_dir / EXIT_FILE)
    return 128 - returncode if returncode < 0 else returncode


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1]), sys.argv[3:]))
