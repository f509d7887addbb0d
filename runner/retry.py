"""Whether a run that has ended is tried again as it is, and when; the causes say what may pass."""

from jobs.records import Diagnosis, Manifest

_FIRST_WAIT_S, _LONGEST_WAIT_S = 10.0, 300.0


def wait_s(manifest: Manifest, diagnosis: Diagnosis | None, *, attempts: int) -> float | None:
    """Seconds until the next attempt, doubled each time; None: it would only fail again.

    Args:
        manifest: of the run that has ended.
        diagnosis: of its log; None where nothing was looked for.
        attempts: made so far.
    """
    status = manifest.exit_status
    failed = status is not None and status.reason in ("failed", "oom_killed", "lost")
    if not failed or diagnosis is None or diagnosis.retry != "retryable":
        return None
    return min(_FIRST_WAIT_S * 2 ** (attempts - 1), _LONGEST_WAIT_S)
