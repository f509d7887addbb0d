"""`headroom diagnose`: the named cause of a log, with its numbers and the way out.

Pure: bytes in, a `Diagnosis` out. What is known of the causes is data (runner/causes*.py), what is
read of a log is runner/excerpt.py and runner/findings.py, and runner/verdict.py decides.
"""

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, cast

from pydantic import TypeAdapter, ValidationError

from jobs.records import Advice, Diagnosis, ExitStatus, gib
from runner.cause import Cause
from runner.causes import KEY_PHRASES, KEY_WORDS
from runner.excerpt import Excerpt, one_search, physical_lines
from runner.verdict import Log, Verdict, decide, read

_WORDS = one_search(KEY_WORDS)
_PHRASES = one_search(KEY_PHRASES)
_SHOWN = 240  # characters of a root line on a terminal
# Section of the job, its knobs, and the causes that ask about them.
_KNOBS = (
    (
        "engine",
        ("mem_fraction_static", "max_total_tokens", "max_running_requests", "context_length"),
        (
            *("hbm_program_load", "hbm_alloc", "engine_not_enough_memory"),
            *("kv_pool_too_small", "context_too_long", "smem_compile"),
        ),
    ),
    (
        "train",
        ("micro_batch_size",),
        ("hbm_program_load", "hbm_compile", "hbm_alloc", "shard_indivisible"),
    ),
)


def diagnose(
    log: Iterable[bytes] | BinaryIO,
    *,
    exit_status: ExitStatus | None = None,
    plan: Mapping[str, Any] | None = None,
    job: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """The root cause of a log, in bounded memory.

    Args:
        log: blocks of bytes of any size, or a file opened in binary mode.
        exit_status: how the program ended; without it, what the log says of that counts.
        plan: plan.json of the run, as a mapping: its bytes go into the advice.
        job: job.json of the run, as a mapping: its present values go into the advice.
    """
    excerpt = Excerpt(_WORDS, _PHRASES)
    for batch in physical_lines(_blocks(log)):
        excerpt.read(batch)
    return _diagnosis(excerpt, exit_status, plan, job)


def follow(stream: Iterable[bytes]) -> Iterator[Diagnosis]:
    """A diagnosis of a growing log each time it names another cause.

    Args:
        stream: lines or blocks, as they come; it ends with the stream.
    """
    excerpt = Excerpt(_WORDS, _PHRASES)
    named = ""
    for batch in physical_lines(stream):
        if excerpt.read(batch):
            found = _diagnosis(excerpt, None, None, None)
            if found.cause not in (named, "unknown", "success"):
                named = found.cause
                yield found


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """The diagnosis as a paragraph for a terminal, numbers in GiB.

    The first line is the cause and its arithmetic: `hbm_program_load: jit_training_step needs
    7.82 GiB, 5.68 GiB is free: short by 2.14 GiB`.
    """
    sums = arithmetic(diagnosis.numbers)
    head = sums or diagnosis.explanation
    doubt = "" if diagnosis.confidence != "likely" else " (likely)"
    rows = [f"{diagnosis.cause}{doubt}: {head}"]
    if diagnosis.root_line is not None:
        told = textwrap.shorten(diagnosis.root_line, _SHOWN, placeholder=" ...")
        rows.append(f"  line {diagnosis.line}: {told}")
    if sums:
        rows.append(f"  {diagnosis.explanation}")
    rows += [f"  {place}. {advice}" for place, advice in enumerate(diagnosis.advice, 1)]
    return "\n".join(rows)


def arithmetic(numbers: Mapping[str, int | float | str]) -> str:
    """What was asked, what there was, and the difference, in GiB; "" where no sizes are known.

    >>> arithmetic({"program": "jit_f", "requested_bytes": 2**31, "free_bytes": 2**30})
    'jit_f needs 2.00 GiB, 1.00 GiB is free: short by 1.00 GiB'
    """
    asked = numbers.get("requested_bytes", numbers.get("used_bytes"))
    if not isinstance(asked, int):
        return ""
    needs = f"{numbers.get('program', 'it')} needs {_size(asked)}"
    # Reservable decides, not free: a program must lie at the bottom of memory in one piece.
    for name, verb in (
        ("reservable_bytes", "can be reserved"),
        ("largest_free_bytes", "is free in one piece"),
        ("free_bytes", "is free"),
        ("capacity_bytes", "is there"),
    ):
        there = numbers.get(name)
        if isinstance(there, int):
            short = numbers.get("exceeded_bytes", asked - there)
            missing = f": short by {_size(short)}" if isinstance(short, int) and short > 0 else ""
            return f"{needs}, {_size(there)} {verb}{missing}"
    return needs


def _size(size_bytes: int) -> str:
    # On-core memories are a few MiB: in GiB their numbers would all read 0.02.
    if size_bytes >= 2**27:
        return gib(size_bytes)
    unit, power = ("MiB", 20) if size_bytes >= 2**18 else ("KiB", 10)
    return f"{size_bytes / 2**power:.2f} {unit}"


def _blocks(log: Iterable[bytes] | BinaryIO) -> Iterable[bytes]:
    if hasattr(log, "read"):
        file = cast("BinaryIO", log)
        return iter(lambda: file.read(1 << 20), b"")
    return log


def _diagnosis(
    excerpt: Excerpt,
    status: ExitStatus | None,
    plan: Mapping[str, Any] | None,
    job: Mapping[str, Any] | None,
) -> Diagnosis:
    log = read(excerpt, status)
    verdict = decide(log)
    cause = verdict.cause
    told = dict(verdict.numbers)
    if cause.exit_code and log.code is not None and log.code > 1:
        told["exit_code"] = log.code
    return Diagnosis(
        cause=cause.id,
        confidence=_confidence(verdict),
        explanation=_explanation(cause, log),
        root_line=verdict.line.shown if verdict.line else None,
        line=verdict.line.number if verdict.line else None,
        evidence=list(verdict.evidence),
        numbers=told,
        advice=[
            *([verdict.largest] if verdict.largest else []),
            *_of_job(cause, job),
            *_of_plan(cause, told, plan),
            *cause.advice,
        ],
        retry=cause.retry,
    )


def _explanation(cause: Cause, log: Log) -> str:
    if cause.id == "success" and not log.found and not log.raised:
        return "The program ended well."
    return cause.explanation


def _confidence(verdict: Verdict) -> Any:
    if verdict.cause.id == "unknown":
        return "none"
    return "certain" if verdict.certain else "likely"


def _of_job(cause: Cause, job: Mapping[str, Any] | None) -> Iterator[str]:
    """The present values of the knobs that this cause asks about."""
    now = [
        f"{section}.{key} = {values[key]}"
        for section, keys, causes in _KNOBS
        if job is not None and cause.id in causes
        for values in [cast("Mapping[str, Any]", job.get(section) or {})]
        for key in keys
        if values.get(key) is not None
    ]
    if now:
        yield f"This job has {', '.join(now)}."


def _changes(advice: Any) -> list[Advice]:
    """Those of a plan with which the job fits; none of what another version wrote otherwise."""
    try:
        return [one for one in TypeAdapter(list[Advice]).validate_python(advice or []) if one.fits]
    except ValidationError:
        return []


def _of_plan(
    cause: Cause, told: Mapping[str, int | float | str], plan: Mapping[str, Any] | None
) -> Iterator[str]:
    """What the plan had promised, beside what the log says, and the changes that it had planned."""
    if plan is None or cause.retry != "after_refit":
        return
    promised = plan.get("headroom_bytes")
    if isinstance(promised, int) and promised < 0:
        yield f"The plan had said so: short by {gib(-promised)} a chip."
    for change in _changes(plan.get("advice")):
        options = " ".join(f"--set {setting}" for setting in change.settings)
        yield (
            f"{options}: {gib(change.saves_bytes)} less at the peak, then "
            f"{gib(change.headroom_bytes)} left by the plan; price: {change.price}."
        )
    if isinstance(promised, int) and promised >= 0 and "requested_bytes" in told:
        yield (
            f"The plan had {gib(promised)} of headroom a chip: something is resident that it does"
            " not know of (`headroom plan` again with the packages of this run)."
        )
