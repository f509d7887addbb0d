"""A progress bar under a run's log, where a person watches."""

import sys
from collections.abc import Buffer, Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from runner.watch import Sink

# What the trainer prints when a step is done (design.md, the SOP's line).
_STEP = b"step="
_STEPS = "steps"


class ProgressLog:
    """A stream for a run's log on a terminal: its lines, and below them how many steps are done."""

    def __init__(self, console: Console, *, steps: int) -> None:
        self._console = console
        self._line = b""
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # What is said on stderr is shown above the bar; in a file it stays in the file.
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(_STEPS, total=steps)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._line:
            self._show(self._line)
        self._progress.stop()

    def write(self, data: Buffer, /) -> int:
        """Show the lines that are whole; the beginning of one waits for its end."""
        *lines, self._line = (self._line + bytes(data)).split(b"\n")
        for line in lines:
            self._show(line)
        # Bars of libraries rewrite their line: what it says now stands before our bar.
        self._progress.update(self._task, description=_last_rewrite(self._line) or _STEPS)
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing is held back but the beginning of a line."""

    def _show(self, line: bytes) -> None:
        text = Text.from_ansi(
            _last_rewrite(line) if b"\r" in line else line.decode(errors="replace")
        )
        self._progress.console.print(text, soft_wrap=True)
        if line.startswith(_STEP):
            self._progress.advance(self._task)


def _last_rewrite(line: bytes) -> str:
    """What a terminal shows of a line that begins anew at carriage returns; "" of any other."""
    parts = [part for part in line.split(b"\r") if part.strip()]
    return parts[-1].decode(errors="replace") if b"\r" in line and parts else ""


@contextmanager
def log_stream(out: Sink, terminal: Console, *, steps: int | None) -> Generator[Sink]:
    """Where a run's log goes: `out`, or with a progress bar to the terminal if that is one.

    Args:
        out: takes bytes.
        terminal: the same stream for rich.
        steps: of the job; None: it has no steps to count.
    """
    if steps is None or not terminal.is_terminal or terminal.is_dumb_terminal:
        yield out
        return
    with ProgressLog(terminal, steps=steps) as shown:
        yield shown
