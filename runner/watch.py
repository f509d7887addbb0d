"""Stand by a job until it ends: show its log, pass on what stops it, insist where it lingers."""

import signal
import threading
import time
from collections.abc import Buffer, Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol, Self

from jobs.records import ExitStatus
from runner.ending import signal_name

Say = Callable[[str], None]  # is told what a person should know

_POLL_S = 0.1
_CHUNK_BYTES = 1 << 16


class Task(Protocol):
    """A job under way, in a process or in a container."""

    def wait(self, seconds: float) -> ExitStatus | None:
        """How it ended; None when it has not after so many seconds."""
        ...

    def stop(self, number: int) -> None:
        """Pass on a signal that asks it to stop; nothing happens when it has ended."""
        ...

    def kill(self) -> None:
        """End it, and all it started, at once."""
        ...


class Sink(Protocol):
    """Where a log is shown."""

    def write(self, data: Buffer, /) -> int | None:
        """Take some bytes, and tell how many."""
        ...

    def flush(self) -> None:
        """Show what was taken."""
        ...


class Interrupts:
    """SIGINT and SIGTERM, kept for `watch` to act on while the `with` lasts.

    Attributes:
        numbers: what came, in order.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._before: dict[int, signal.Handlers | Callable[..., object] | int | None] = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.numbers.append(number)

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            # A shell's background job ignores SIGINT, and shall go on doing so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the signals back to who had them, before the `with` ends."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def watch(
    task: Task, interrupts: Interrupts, *, grace_s: float, asked: Callable[[int], None]
) -> ExitStatus:
    """How the task ended.

    The first signal is passed on to it; it is killed when it lingers for `grace_s` seconds after
    that, or at a second Ctrl-C.

    Args:
        task: the job.
        interrupts: the signals that came.
        grace_s: seconds between the signal and SIGKILL.
        asked: is told the signal before it is passed on.
    """
    deadline = float("inf")
    handled = 0
    while (status := task.wait(_POLL_S)) is None:
        for number in interrupts.numbers[handled:]:
            handled += 1
            if handled == 1:
                asked(number)
                task.stop(number)
                deadline = time.monotonic() + grace_s
            elif number == signal.SIGINT:
                deadline = 0.0
        if time.monotonic() >= deadline:
            task.kill()
            deadline = time.monotonic() + grace_s
    return status


def stop_and_wait(task: Task, *, grace_s: float) -> ExitStatus:
    """Ask with SIGTERM, kill after the grace, and tell how it ended."""
    ask = Interrupts()
    ask.numbers.append(signal.SIGTERM)
    return watch(task, ask, grace_s=grace_s, asked=lambda _: None)


class Follower:
    """Copies a growing file to a stream, in a thread of its own, until the `with` ends.

    A slow or broken reader holds up nothing but this thread. All that stands in the file when the
    `with` ends is still written.
    """

    def __init__(self, path: Path, out: Sink, *, patience_s: float | None = None) -> None:
        """Follow the file at `path`.

        Args:
            path: the file.
            out: where to.
            patience_s: how long a reader may be slow at the end; None: as long as it likes.
        """
        self.patience_s = patience_s
        self._path, self._out = path, out
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(self.patience_s)

    def _follow(self) -> None:
        with self._path.open("rb", buffering=0) as log:
            while True:
                ended = self._ended.is_set()
                while data := log.read(_CHUNK_BYTES):
                    if not self._show(data):
                        return
                if ended:
                    return
                self._ended.wait(_POLL_S)

    def _show(self, data: bytes) -> bool:
        try:
            write_out(self._out, data)
        except OSError:  # nobody reads any more: the job and its log go on
            return False
        return True


def write_out(out: Sink, data: bytes) -> None:
    """Write all of it: a stream without a buffer may take less at a time."""
    taken = out.write(data) or 0
    if taken < len(data):
        view = memoryview(data)[taken:]
        while view:
            view = view[out.write(view) or 0 :]
    out.flush()


def describe(number: int, grace_s: float) -> str:
    """What a person who pressed Ctrl-C is told."""
    return (
        f"{signal_name(number)}: the job is asked to stop; SIGKILL follows in {grace_s:g} s, "
        "or at once with Ctrl-C"
    )
