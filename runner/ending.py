"""How a run ended: what codes and signals mean, for the manifest and our own exit code. Pure."""

import signal as signals

from jobs.records import Diagnosis, ExitStatus, Manifest

DONE, REFUSED, KNOWN_CAUSE, UNKNOWN_CAUSE = 0, 1, 4, 5
INTERRUPTED, TERMINATED = 128 + signals.SIGINT, 128 + signals.SIGTERM

# Stands in the manifest where no code is known, beside the reason "lost".
CODE_OF_LOST = 255
LOST = ExitStatus(code=CODE_OF_LOST, reason="lost")


def signal_name(number: int) -> str:
    """The name of a signal, "SIGKILL"; real-time signals have none and go by number.

    >>> signal_name(9)
    'SIGKILL'
    >>> signal_name(40)
    'SIG40'
    """
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def before_start(number: int) -> ExitStatus:
    """How a run ended that a signal stopped before its job was started."""
    return ExitStatus(code=128 + number, signal=signal_name(number), reason="interrupted")


def of_process(returncode: int, *, stopped: bool, refusal: bool) -> ExitStatus:
    """How a process ended.

    Args:
        returncode: as Python tells it, -N for signal N.
        stopped: somebody asked it to stop.
        refusal: its log has the trainer's own words for one.
    """
    if returncode < 0:
        return _status(128 - returncode, signal_name(-returncode), stopped=stopped, refusal=False)
    return _status(returncode, None, stopped=stopped, refusal=refusal)


def of_container(code: int, *, oom_killed: bool, stopped: bool, refusal: bool) -> ExitStatus:
    """How a container ended; its engine tells 128 + N for signal N, and whether memory was why."""
    name = signal_name(code - 128) if 128 < code <= 128 + 64 else None
    if oom_killed and code != 0:
        return ExitStatus(code=code, signal=name, oom_killed=True, reason="oom_killed")
    return _status(code, name, stopped=stopped, refusal=refusal)


def _status(code: int, signal: str | None, *, stopped: bool, refusal: bool) -> ExitStatus:
    if code == DONE:
        return ExitStatus(code=code, reason="done")
    if stopped or code in (INTERRUPTED, TERMINATED):
        return ExitStatus(code=code, signal=signal, reason="interrupted")
    # Python ends with 1 as well, where the trainer could not even be imported.
    if code == REFUSED and refusal:
        return ExitStatus(code=code, reason="refused")
    return ExitStatus(code=code, signal=signal, reason="failed")


def with_notice(status: ExitStatus, *, noticed: bool) -> ExitStatus:
    """How a run ended, where the trainer had stopped by the cloud's notice.

    A SIGTERM that came without one stays `interrupted`, even where none of us sent it: `kill`,
    `docker stop` and a scheduler's limit look the same, and a run that somebody stopped by hand
    must not be started again. With one it is `preempted`, whatever followed: the VM that goes sends
    its own SIGTERM, to this runner as well, and then SIGKILL.

    Args:
        status: by its code.
        noticed: the trainer left notice.json.
    """
    stopped = status.reason == "interrupted" or status.signal == "SIGKILL"
    if not noticed or not stopped or status.oom_killed:
        return status
    return status.model_copy(update={"reason": "preempted"})


def runner_code(manifest: Manifest, *, stop_signal: str | None, diagnosis: Diagnosis | None) -> int:
    """Our own exit code for a run that has ended.

    0 done, 1 refused, 4 failed with a known cause, 5 with an unknown one, 130 and 143 interrupted;
    143 preempted, too.

    Args:
        manifest: of the run, finished.
        stop_signal: what it was asked to stop with, "SIGINT"; None when nobody did.
        diagnosis: the cause; None when it was not looked for.
    """
    status = manifest.exit_status or LOST
    match status.reason:
        case "preempted":
            return TERMINATED
        case "done":
            return DONE
        case "refused":
            return REFUSED
        case "interrupted":
            by_hand = stop_signal == "SIGINT" if stop_signal else status.code == INTERRUPTED
            return INTERRUPTED if by_hand else TERMINATED
        case _:
            pass
    known = diagnosis is not None and diagnosis.cause not in ("unknown", "success")
    return KNOWN_CAUSE if known else UNKNOWN_CAUSE
