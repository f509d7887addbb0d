"""A job in a process of this machine, known by the records that its supervisor leaves."""

import contextlib
import os
import signal
import subprocess
import time

from jobs.records import ExitStatus
from runner import ending
from runner.archive import RunDir
from runner.supervise import boot_id, start_ticks


class ProcessTask:
    """A job's process, ours (`child` is its supervisor) or one that another runner started."""

    def __init__(self, run: RunDir, *, child: subprocess.Popen[bytes] | None = None) -> None:
        self._run, self._child = run, child
        self._known = run.read_json(run.process_file)

    @property
    def pid(self) -> int | None:
        """The trainer's process; None when it was never started."""
        return self._known["pid"] if self._known else None

    def ended(self) -> ExitStatus | None:
        """How it ended, `lost` when nobody saw it; None while it lives."""
        for last_look in (False, True):
            if record := self._run.read_json(self._run.exit_file):
                return ending.of_process(
                    record["returncode"],
                    stopped=self._run.stop_file.exists(),
                    refusal=record["returncode"] == ending.REFUSED and bool(self._run.refusals()),
                )
            # Alive, or gone between our two looks: then the record is there by now.
            if not last_look and (self._lives("supervisor_pid") or self._lives("pid")):
                return None
        return self._told_by_child() or ending.LOST

    def _told_by_child(self) -> ExitStatus | None:
        """How it ended by our supervisor's own exit code; None where that was killed, or not ours.

        For a run directory that became read-only, or was taken away, under the run.
        """
        code = self._child.poll() if self._child else None
        if code is None or code < 0:
            return None
        return ending.of_container(
            code, oom_killed=False, stopped=self._run.stop_file.exists(), refusal=False
        )

    def wait(self, seconds: float) -> ExitStatus | None:
        """How it ended; None when it has not after so many seconds."""
        if self._child is None:
            time.sleep(seconds)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(seconds)
        status = self.ended()
        if status is not None and self._child is not None:
            self._child.wait()  # its record is written: it ends now
        return status

    def stop(self, number: int) -> None:
        """Pass on a signal to the trainer."""
        if self._lives("pid") and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End the trainer and all it started."""
        if self._lives("pid") and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _lives(self, which: str) -> bool:
        """The very process, not another that got its number later or after a boot."""
        known = self._known
        if known is None or known["boot_id"] != boot_id():
            return False
        ticks = known[which.replace("pid", "ticks")]
        return ticks is not None and start_ticks(known[which]) == ticks
