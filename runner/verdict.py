"""Which of the causes found in a log is its root.

1. What a program survived is no cause: a finding before a later good step is set aside, and so is
   a warning, unless nothing else is left.
2. Of the rest the deepest wins (`Cause.depth`): a named error in the program before the device,
   the host, a missing partner, a signal, the wrappers around it, and a bare exit status.
3. A program that ended with 0 has succeeded, except for what fails silently: NaN, the CPU instead
   of the TPU, a preemption it handled.
"""

import re
from dataclasses import dataclass, field

from jobs.records import ExitStatus
from runner.cause import Cause
from runner.causes import BY_ID, CAUSES
from runner.excerpt import Excerpt
from runner.findings import (
    Finding,
    Raised,
    Text,
    findings,
    largest_allocation,
    numbers,
    raised,
    texts,
    unbroken,
)
from runner.logtext import Line

_EXIT = re.compile(
    r"(?:\bexit[_ ]?(?:status|code)?\s?[=:]\s?|\bExitCode[=\":\s]+"
    r"|exited with (?:exit )?(?:code|status) |[Ee]xit (?:[Cc]ode|status):?\s+)(\d{1,3})\b"
)
_DONE = re.compile(r"\b(?:[Tt]raining|[Rr]un|[Jj]ob) (?:has )?(?:finished|completed?|done)\b")
_POOL = re.compile(r"max_total_num_tokens[:=]\s*(\d+)")
_SERVED = re.compile(r"(?:Prefill|Decode) batch")
_WAITING = re.compile(r"remaining number of requests [1-9]")
_USAGE = re.compile(r"token usage: (\d\.\d+)")
_NEARLY_FULL = 0.8  # of the KV pool: from here on sglang-jax retracts requests or cuts completions
_GPU = re.compile(r"CudaDevice|cuda:\d|NVIDIA|[Gg]pu\(id=|GPU devices?:")
_SUICIDE = re.compile(r"Received sigquit from a child process")
_CPU = re.compile(r"CpuDevice\(|TFRT_CPU_\d")
_NO_TPU = re.compile(r"could not determine TPU")

# What an exit status means where the log says no more.
_BY_EXIT = {
    **dict.fromkeys((137, 143), "container_killed"),
    **dict.fromkeys((132, 134, 135, 136, 139), "native_crash"),
    124: "timeout",
    130: "interrupted",
}
_SILENT = ("nan_loss", "tpu_cpu_fallback", "preempted")
# Causes that an unknown exception later in the log may well be the consequence of.
_ANY_MOMENT = ("multihost_missing_worker", "nan_loss", "host_oom")
_SIGNALLED = ("preempted", "container_killed")
# Added to the depth of what is set aside, so that it still counts where nothing else is found.
_SURVIVED, _WARNING, _STALE = 4000, 1000, 600


@dataclass(frozen=True, slots=True)
class Verdict:
    """The cause that was decided for, the line that tells, and the numbers of its message.

    Attributes:
        cause, line, certain, numbers, evidence: as in `Diagnosis`.
        largest: a sentence on the largest allocation, where the compiler printed its table.
    """

    cause: Cause
    line: Line | None
    certain: bool
    numbers: dict[str, int | float | str] = field(default_factory=dict[str, int | float | str])
    evidence: tuple[int, ...] = ()
    largest: str | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """What was read: each process's text, what was found in it, and how it ended.

    Attributes:
        texts, found, raised: the kept text, the signs and the tracebacks in it.
        progress: number of the last line that tells of a good step; 0 for none.
        code: exit status, given or as the log says; None when neither does.
        exit_line: the line that says it.
        status: the exit status as given.
    """

    texts: list[Text]
    found: list[Finding]
    raised: list[Raised]
    progress: int
    code: int | None
    exit_line: Line | None
    status: ExitStatus | None

    def first(self, pattern: re.Pattern[str]) -> Line | None:
        """The first line in which the pattern is found."""
        for text in self.texts:
            if match := pattern.search(text.text):
                return text.line_at(match.start())
        return None


def read(excerpt: Excerpt, status: ExitStatus | None) -> Log:
    """Everything the verdict needs, from what was kept of a log."""
    every = texts(excerpt.lines())
    found = [one for text in every for one in findings(text, CAUSES)]
    if not found:
        found = [one for text in every for one in findings(unbroken(text), CAUSES, loose=True)]
    ends = [
        (text.line_at(match.start()), int(match[1]))
        for text in every
        for match in _EXIT.finditer(text.text)
    ]
    exit_line, said = max(ends, key=lambda end: end[0].number) if ends else (None, None)
    return Log(
        texts=every,
        found=found,
        raised=[chain for text in every for chain in raised(text)],
        progress=excerpt.progress,
        code=status.code if status else said,
        exit_line=exit_line,
        status=status,
    )


def decide(log: Log) -> Verdict:
    """The root cause; `unknown` where nothing tells, and never a guess."""
    if log.code == 0:
        return _silent(log) or _success(log, certain=True)
    named = _deepest(log)
    for verdict in (
        _up_to(BY_ID["container_killed"].depth - 1, named),
        _engine_waits(log),
        _up_to(_WARNING - 1, named),
        _by_exit(log),
        _up_to(_SURVIVED - 1, named),
        _ended_well(log),
        # The good steps after it may be another process's.
        named.verdict if named and len(log.texts) > 1 else None,
    ):
        if verdict:
            return verdict
    return Verdict(BY_ID["unknown"], None, certain=False)


def _up_to(depth: int, named: "_Named | None") -> Verdict | None:
    return named.verdict if named and named.depth <= depth else None


def _ended_well(log: Log) -> Verdict | None:
    """Without an exit status: what failed silently, or a last line that says it is done."""
    if log.code is not None:
        return None
    silent = _silent(log) if log.first(_DONE) or log.first(_CPU) else None
    return silent or (_success(log, certain=False) if log.first(_DONE) else None)


@dataclass(frozen=True, slots=True)
class _Named:
    depth: int
    verdict: Verdict


def _deepest(log: Log) -> _Named | None:
    last = _last_raised(log)
    ranked = [(_depth(one, log, last), one) for one in log.found if _counts(one, log)]
    unknown = BY_ID["unknown_exception"]
    if last:
        survived = last.last < log.progress
        depth = unknown.depth + (_SURVIVED if survived else 0)
        if last.stream and not survived:
            # A worker's own exception comes before its partners' complaint that it is gone.
            depth = BY_ID["multihost_missing_worker"].depth - 10
        if not ranked or depth < min(depth for depth, _ in ranked):
            verdict = Verdict(unknown, last.line, certain=False, evidence=(last.first,))
            return _Named(depth, verdict)
    if not ranked:
        return None
    depth = min(depth for depth, _ in ranked)
    cause = next(one.cause for at, one in ranked if at == depth)
    ranked = _explained(cause, log) or [(at, one) for at, one in ranked if one.cause is cause]
    depth = min(depth, *(at for at, _ in ranked))
    return _Named(depth, _told(ranked, depth, log))


def _explained(cause: Cause, log: Log) -> list[tuple[int, Finding]]:
    """Findings of the first cause that explains this one, if any stands in the log."""
    for other in cause.because:
        found = [(BY_ID[other].depth, one) for one in log.found if one.cause.id == other]
        if found:
            return found
    return []


def _told(ranked: list[tuple[int, Finding]], depth: int, log: Log) -> Verdict:
    """The verdict for findings of one cause: which of their lines tells it best."""
    best = [one for at, one in ranked if at == depth] or [one for _, one in ranked]
    chosen = min(best, key=lambda one: (one.rank, one.line.number))
    if chosen.cause.last:
        chosen = max(best, key=lambda one: (one.line.number, -one.rank))
    cause = _by_signal(chosen.cause, log) if chosen.cause.id in _SIGNALLED else chosen.cause
    others = {one.line.number for one in best} - {chosen.line.number}
    return Verdict(
        cause,
        chosen.line,
        certain=depth < _STALE + 200 and any(one.sign.sure for one in best),
        numbers=numbers(chosen) if cause is chosen.cause else {},
        evidence=tuple(sorted(others)[:8]),
        largest=largest_allocation(chosen) if chosen.cause.id.endswith("_compile") else None,
    )


def _by_signal(cause: Cause, log: Log) -> Cause:
    """What a SIGTERM was, by how the program ended; an explicit preemption stays one."""
    explicit = any(one.cause.id == "preempted" and one.sign.sure for one in log.found)
    if explicit:
        return BY_ID["preempted"]
    if log.status and log.status.oom_killed:
        return BY_ID["host_oom"]
    if log.code == 124:
        return BY_ID["timeout"]
    if log.status and log.status.reason in ("interrupted", "preempted"):
        return BY_ID[log.status.reason]
    # It went on after the notice until it was killed: JAX's preemption service swallows SIGTERM.
    caught = [one.line.number for one in log.found if one.cause is cause]
    ignored = log.code == 137 or (log.code is None and min(caught) < log.progress)
    return BY_ID["container_killed"] if ignored else cause


def _counts(one: Finding, log: Log) -> bool:
    """Findings that need more than their words."""
    if one.cause.id == "tpu_cpu_fallback":
        return _fell_back(one, log)
    # sglang-jax ends itself with SIGKILL on every failure: the shell's word for it means nothing.
    return one.sign.depth is None or log.first(_SUICIDE) is None


def _fell_back(one: Finding, log: Log) -> bool:
    # Raised, it is no fallback; on a GPU machine the same words are noise.
    calls_itself_low = one.line.low or one.sign.sure
    return calls_itself_low and log.first(_GPU) is None


def _depth(one: Finding, log: Log, last: Raised | None) -> int:
    depth = one.cause.depth if one.sign.depth is None else one.sign.depth
    if one.low:
        depth += _WARNING
    if one.line.number < log.progress and not one.sign.quiet:
        depth += _SURVIVED
    bare = not any(chain.first <= one.line.number <= chain.last for chain in log.raised)
    if last and bare and depth >= BY_ID["hf_rate_limit"].depth and one.line.number < last.first:
        # A line of an earlier moment than the exception that ended the program.
        depth += 0 if one.cause.id in _ANY_MOMENT else _STALE
    return depth


def _last_raised(log: Log) -> Raised | None:
    ended = [
        chain
        for chain in log.raised
        if chain.name.rpartition(".")[2] not in ("KeyboardInterrupt", "SystemExit")
        and not chain.line.low
    ]
    return max(ended, key=lambda chain: chain.last) if ended else None


def _silent(log: Log) -> Verdict | None:
    for name in _SILENT:
        found = [
            (one.cause.depth, one)
            for one in log.found
            if one.cause.id == name
            and _counts(one, log)
            and (one.sign.quiet or one.line.number > log.progress)
            and (one.sign.sure or name != "preempted")
        ]
        if found:
            reason = _explained(BY_ID[name], log)
            return _told(reason or found, min(at for at, _ in reason or found), log)
    on_cpu = log.first(_CPU)
    if on_cpu and log.first(_NO_TPU) and not log.first(_GPU):
        return Verdict(BY_ID["tpu_cpu_fallback"], on_cpu, certain=False)
    return None


def _success(log: Log, *, certain: bool) -> Verdict:
    pool = log.first(_POOL)
    usage = [float(found) for text in log.texts for found in _USAGE.findall(text.text)]
    told: dict[str, int | float | str] = {}
    evidence: tuple[int, ...] = ()
    if pool and usage and max(usage) >= _NEARLY_FULL:
        told["pool_tokens"] = _pool_tokens(pool)
        evidence = (pool.number,)
    line = log.exit_line or log.first(_DONE)
    return Verdict(BY_ID["success"], line, certain, told, evidence)


def _engine_waits(log: Log) -> Verdict | None:
    """A request that the KV pool can never hold: the engine says nothing, until it is killed."""
    pool = log.first(_POOL)
    stopped = log.code in (124, 137, 143) or log.first(_WAITING)
    if pool is None or log.first(_SERVED) or not stopped or log.progress:
        return None
    told: dict[str, int | float | str] = {"pool_tokens": _pool_tokens(pool)}
    return Verdict(BY_ID["kv_pool_too_small"], pool, certain=False, numbers=told)


def _pool_tokens(line: Line) -> int:
    found = _POOL.search(line.text)
    return int(found[1]) if found else 0


def _by_exit(log: Log) -> Verdict | None:
    if log.status and log.status.oom_killed:
        return Verdict(BY_ID["host_oom"], log.exit_line, certain=True)
    if log.status and log.status.reason in ("interrupted", "preempted"):
        return Verdict(BY_ID[log.status.reason], log.exit_line, certain=False)
    cause = _BY_EXIT.get(log.code) if log.code is not None else None
    return Verdict(BY_ID[cause], log.exit_line, certain=False) if cause else None
