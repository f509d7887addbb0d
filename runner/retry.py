"""Whether a run that has ended is tried again as it is, and when; the causes say what may pass.

Failures and preemptions have budgets of their own: a job on spot VMs is taken often and fails
rarely, and neither may use up what was meant for the other.
"""

from dataclasses import dataclass, replace

from jobs.records import Diagnosis, Manifest

_FIRST_WAIT_S, _LONGEST_WAIT_S = 10.0, 300.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What is left to try.

    Attributes:
        retries: attempts after a failure that may pass by itself.
        preemptions: attempts after the cloud took the machine.
        waits: attempts in a row that were waited for.
    """

    retries: int = 0
    preemptions: int = 0
    waits: int = 0


@dataclass(frozen=True, kw_only=True)
class Again:
    """Another attempt.

    Attributes:
        after_s: seconds until then.
        why: in words.
        left: of the budget.
    """

    after_s: float
    why: str
    left: Budget


def again(
    manifest: Manifest,
    diagnosis: Diagnosis | None,
    *,
    budget: Budget,
    progress: bool,
    stopped: bool,
) -> Again | None:
    """The next attempt; None: it would only fail again, was stopped, or its budget is used up.

    A preempted run goes on at once, as did what it had done; one that was taken before it had done
    a step waits as a failure does, twice as long each time: the notice still stands.

    Args:
        manifest: of the run that has ended.
        diagnosis: of its log; None where nothing was looked for.
        budget: before the attempt.
        progress: the run did a step.
        stopped: somebody asked us to stop, too: the VM that goes, or a person.
    """
    if stopped:
        return None
    status = manifest.exit_status
    reason = "running" if status is None else status.reason
    waits = 0 if progress else budget.waits
    after_s = min(_FIRST_WAIT_S * 2**waits, _LONGEST_WAIT_S)
    if reason == "preempted" and budget.preemptions:
        rest = budget.preemptions - 1
        left = replace(budget, preemptions=rest, waits=0 if progress else waits + 1)
        why = f"preempted; {left.preemptions} of --preemptions left"
        return Again(after_s=0.0 if progress else after_s, why=why, left=left)
    failed = reason in ("failed", "oom_killed", "lost")
    if failed and budget.retries and diagnosis is not None and diagnosis.retry == "retryable":
        left = replace(budget, retries=budget.retries - 1, waits=waits + 1)
        why = f"{diagnosis.cause} may pass by itself; {left.retries} of --retries left"
        return Again(after_s=after_s, why=why, left=left)
    return None
