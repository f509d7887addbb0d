"""What stands in an excerpt: wordings of known causes, and tracebacks, with their lines."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice

from jobs.records import gib
from runner.cause import SIZE, Cause, Sign, key_words, size_bytes, spaced
from runner.logtext import Line, lines

_MOST_MATCHES = 60  # of one sign in one process's text
_MESSAGE = 3000  # characters after a sign in which its numbers are looked for
_BEFORE = 300  # and before it, where a message was broken over lines
_GAP = "\x00\n"

_HEADER = re.compile(r"Traceback \(most recent call last\)")
_EXCEPTION = re.compile(
    r"\W{0,3}(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)(?::[\w.]*:|:? ))?"
    r"((?:[A-Za-z_]\w*\.)*[A-Z]\w*)(?::(?:\s|$)|\s*[\"'}\]]*$)"
)
_CHAINED = re.compile(r"During handling of the above exception|direct cause of the following")
_IGNORED = re.compile(r"Exception ignored in|--- Logging error ---")
_HANDLED = re.compile(
    r"disabled due to|(?<!while )[Rr]etrying|will (?:be )?retr|entering retry"
    r"|[Ii]gnor(?:ed|ing)\b|non-fatal|[Cc]ontinuing (?:without|anyway)|[Ss]kipping\b|not a failure"
)
_TABLE = 6000  # characters after a sign in which the table of allocations may stand
_LARGEST = re.compile(rf"^\s*1\. Size: ({SIZE})(?:\n(?!\s*2\. Size).*){{0,8}}", re.MULTILINE)
_OPERATOR = re.compile(r"Operator: .*?op_name=\\?\"([^\"\\]{1,200})")
_SHAPE = re.compile(r"Shape: (\S+)")
_PADDING = re.compile(r"\(([\d.]+)x expansion\)")
_MUCH_PADDING = 1.5
_TASK_NAMES = re.compile(r"[Tt]imed out task names:\s*((?:\S*/task:\d+\S*\s*)+)")


@dataclass(slots=True)
class Text:
    """What one process printed, as far as it was kept, with the place of every line in it."""

    stream: str
    text: str = ""
    rows: list[Line] = field(default_factory=list[Line])
    starts: list[int] = field(default_factory=list[int])

    def line_at(self, offset: int) -> Line:
        """The line that holds a character of the text."""
        return self.rows[max(0, bisect_right(self.starts, offset) - 1)]


@dataclass(frozen=True, slots=True)
class Finding:
    """A sign of a cause that stands in the log.

    Attributes:
        cause, sign, match: what was found; `rank` is the sign's place in its cause.
        text: the process's text it was found in.
        line: where.
        low: the line calls itself a warning or less, or says that the error was handled.
    """

    cause: Cause
    sign: Sign
    rank: int
    match: re.Match[str]
    text: Text
    line: Line
    low: bool


@dataclass(frozen=True, slots=True)
class Raised:
    """A chain of Python tracebacks that belong together.

    Attributes:
        first, last: line numbers of the first header and of the last exception's line.
        line: the last exception's line.
        name: its class, with its module as printed.
    """

    first: int
    last: int
    line: Line
    name: str
    stream: str


def texts(kept: Iterable[tuple[int, bytes]]) -> list[Text]:
    """The kept lines of each process, put together; nothing matches over a gap between them.

    Args:
        kept: line numbers from 1 and lines, in order.
    """
    found: dict[str, Text] = {}
    parts: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    run, before = 0, 0
    runs: dict[str, int] = {}
    for number, raw in kept:
        run += number != before + 1
        before = number
        for line in lines(number, raw):
            text = found.setdefault(line.stream, Text(line.stream))
            part = parts.setdefault(line.stream, [])
            gap = _GAP if runs.get(line.stream, run) != run else ""
            runs[line.stream] = run
            start = sizes.get(line.stream, 0) + len(gap)
            text.rows.append(line)
            text.starts.append(start)
            part.append(f"{gap}{line.text}\n")
            sizes[line.stream] = start + len(line.text) + 1
    for stream, text in found.items():
        text.text = "".join(parts[stream])
    return list(found.values())


@cache
def _compiled(pattern: str, *, loose: bool = False) -> re.Pattern[str]:
    return spaced(pattern, loose=loose)


@cache
def _words(pattern: str) -> frozenset[str]:
    return key_words(pattern)


def findings(text: Text, causes: Iterable[Cause], *, loose: bool = False) -> Iterator[Finding]:
    """Every sign of every cause in a process's text.

    Args:
        text: of one process.
        causes: to look for.
        loose: white space may also be missing: for a text whose lines were broken inside words.
    """
    for cause in causes:
        for rank, sign in enumerate(cause.signs):
            if not loose and not any(word in text.text for word in _words(sign.pattern)):
                continue
            matches = _compiled(sign.pattern, loose=loose).finditer(text.text)
            for match in islice(matches, _MOST_MATCHES):
                blank = len(match[0]) - len(match[0].lstrip())
                line = text.line_at(match.start() + blank)
                low = not sign.quiet and (line.low or bool(_HANDLED.search(line.text)))
                yield Finding(cause, sign, rank, match, text, line, low)


def unbroken(text: Text) -> Text:
    """The same text without its line breaks: for messages that a terminal broke inside words."""
    joined = Text(text.stream, rows=text.rows)
    size = 0
    for start, end in zip(text.starts, [*text.starts[1:], len(text.text)], strict=True):
        joined.starts.append(size)
        size += len(text.text[start:end].replace("\n", ""))
    joined.text = text.text.replace("\n", "")
    return joined


def raised(text: Text) -> Iterator[Raised]:
    """The chains of tracebacks in a process's text, those that Python itself ignored left out."""
    chain: Raised | None = None
    first, chained, ignored = 0, False, False
    for line in text.rows:
        if _HEADER.search(line.text):
            if chain and not chained:
                yield chain
                chain = None
            first = chain.first if chain else line.number
            chained = False
        elif _CHAINED.search(line.text):
            chained = chain is not None
        elif _IGNORED.search(line.text):
            ignored = True
        elif first and (name := _exception(line)):
            chain = chain if ignored else Raised(first, line.number, line, name, text.stream)
            first, ignored = 0, False
    if chain:
        yield chain


def _exception(line: Line) -> str | None:
    """The class of the exception whose traceback this line ends, if it ends one."""
    found = None if line.text.startswith((" ", "\t")) else _EXCEPTION.match(line.text)
    return found[1] if found else None


def numbers(found: Finding) -> dict[str, int | float | str]:
    """The numbers of a finding's own message, by the names of the patterns' groups."""
    start = found.match.start()
    text = found.text.text
    rest = text[start : start + _MESSAGE].split(_GAP)[0]
    # The same words on a later line begin the same message again, with its own numbers.
    again = rest.find(found.match[0], max(rest.find("\n"), 1))
    after = rest if again < 0 else rest[:again]
    # A sign may stand in the middle of its message, the message over some lines.
    before = text[max(0, start - _BEFORE) : start].split(_GAP)[-1]
    values: dict[str, int | float | str] = _values([found.match])
    for loose in (False, True):
        for pattern in found.cause.details:
            compiled = _compiled(pattern, loose=loose)
            here = after.replace("\n", "") if loose else after
            match = compiled.search(here) or _nearest(compiled, before)
            values = {**_values([match]), **values}
    tasks = _TASK_NAMES.search(after) if found.cause.id == "multihost_missing_worker" else None
    if tasks:
        values["timeout_tasks"] = len(set(re.findall(r"/task:(\d+)", tasks[1])))
    return values


def largest_allocation(found: Finding) -> str | None:
    """The first entry of the compiler's table of allocations, as a sentence; None without one."""
    table = found.text.text[found.match.start() :][:_TABLE].split(_GAP)[0]
    entry = _LARGEST.search(table)
    if entry is None:
        return None
    told = [match[1] for match in (_OPERATOR.search(entry[0]), _SHAPE.search(entry[0])) if match]
    padding = _PADDING.search(entry[0])
    if padding and float(padding[1]) >= _MUCH_PADDING:
        told.append(f"{padding[1]} times its size by padding")
    return ", ".join([f"The largest allocation is {gib(size_bytes(entry[1]))}", *told]) + "."


def _nearest(pattern: re.Pattern[str], before: str) -> re.Match[str] | None:
    return max(pattern.finditer(before), key=lambda match: match.start(), default=None)


def _values(matches: Sequence[re.Match[str] | None]) -> dict[str, int | float | str]:
    return {
        name: _value(name, text)
        for match in matches
        if match
        for name, text in match.groupdict().items()
        if text is not None
    }


_WORDS = ("program", "device", "error_code", "plugin_api", "framework_api", "slice_failure")
_SECONDS = {"h": 3600, "m": 60, "s": 1}


def _value(name: str, text: str) -> int | float | str:
    if name in _WORDS:
        return text
    if name.endswith("_bytes"):
        return size_bytes(text)
    if name.endswith("_seconds"):
        parts = re.findall(r"([\d.]+)([hms])", text)
        total = sum(float(count) * _SECONDS[unit] for count, unit in parts)
        return int(total) if total.is_integer() else total
    return int(text.replace(",", ""))
