"""Lines of a log as a person reads them: decoded, without colours, wrappers peeled off.

A log line may come through docker compose, Ansible, Airflow, vLLM, `kubectl logs --prefix` or a
notebook before it reaches us; each puts something in front of it or escapes it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ANSI = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]|[\x00-\x08\x0e-\x1a]"
)
# Colour codes whose escape byte was lost on the way: `[1;34mwandb[0m`.
_BARE_ANSI = re.compile(r"\[(?:\d{1,3}(?:;\d{1,3})*)m")

# What stands before a line and says which process wrote it.
_STREAM = re.compile(
    r"""(?:
      \[(?:worker|rank|host|node|task|process|pod|proc|gpu|tpu)[\s_:/-]?[\w./-]*\]:?[ ]?
    | \[\d{1,4}\]:[ ]
    | (?:worker|rank|host|node|task|process)[\s_-]?\d+\s?[:|>][ ]
    | \((?:\w[\w ]*?\s)?(?:pid|rank)=[^)]{1,60}\)[ ]?
    | [A-Za-z][\w.-]*\d\s*\|[ ]?
    )""",
    re.VERBOSE,
)
# What stands before a line and says when and where it was written.
_STAMP = re.compile(
    r"""(?:
      \[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|\s?[+-]\d\d:?\d\d|\s(?:UTC|GMT))?
        (?:\s(?:TP|DP|PP|EP)\d+)*\]?:?[ ]?
    | \[\d\d:\d\d:\d\d(?:\.\d+)?\][ ]?
    | [A-Z][a-z]{2}[ ][ \d]\d[ ]\d\d:\d\d:\d\d[ ][\w.-]+[ ][\w./@-]+(?:\[\d+\])?:[ ]
    | \{[\w./-]+:\d+\}[ ](?:DEBUG|INFO|WARNING|ERROR|CRITICAL)[ ]-[ ]
    | (?:DEBUG|INFO|WARNING|ERROR|CRITICAL)[ ]\d\d-\d\d[ ]\d\d:\d\d:\d\d[ ]\[[^\]]{1,60}\][ ]?
    )""",
    re.VERBOSE,
)
_LEVELS = re.compile(
    r"\W{0,3}(?:(?P<word>DEBUG|INFO|WARNING|WARN|FutureWarning|DeprecationWarning|UserWarning)\b"
    r"|(?P<glog>[IW])(?:\d{4} |\d{4}$| \S+\.(?:cc|py)[:\]]))"
)
# Loggers that print their own name between the time and the level.
_NAMED_LEVEL = re.compile(
    r"[a-z][\w.]{0,40}(?: - | +)(?:DEBUG|INFO|WARNING|WARN)\b|[a-z][\w.-]*: WARNING\b"
)


class Line(NamedTuple):
    """A line of a log, or a part of one that was written with escaped line breaks.

    Attributes:
        number: of the line in the log, from 1.
        stream: which process wrote it, "" when the line does not say.
        low: it calls itself a warning, or less.
        text: what the program printed.
        shown: the whole line, without colours.
    """

    number: int
    stream: str
    low: bool
    text: str
    shown: str


def uncoloured(raw: bytes) -> str:
    r"""The bytes as text, with colours and control characters taken out.

    >>> uncoloured(b"\x1b[31mRESOURCE_EXHAUSTED\x1b[0m: \xff")
    'RESOURCE_EXHAUSTED: �'
    """
    text = raw.decode("utf-8", errors="replace")
    if "\x1b" in text or not text.isprintable():
        text = _ANSI.sub("", text)
    return _BARE_ANSI.sub("", text) if "m" in text and "[" in text else text


def peeled(text: str) -> tuple[str, bool, str]:
    """The process that wrote the line, whether a wrapper calls it a warning or less, and the rest.

    >>> peeled("trainer-1  | 2026-01-19 08:46:40,123 ValueError: x")
    ('trainer-1', False, 'ValueError: x')
    """
    stream = ""
    low = False
    for _ in range(6):
        named = _STREAM.match(text)
        stamp = None if named else _STAMP.match(text)
        found = named or stamp
        if found is None:
            break
        if named:
            stream = f"{stream}{named[0].strip(' |:>')}"
        elif stamp and " - " not in stamp[0]:
            # Airflow says INFO of everything a task prints: that level is the wrapper's.
            low = low or stamp[0].startswith(("DEBUG", "INFO", "WARNING"))
        text = text[found.end() :]
    return stream, low, text


def readable(raw: bytes) -> str:
    """A line or the end of one without colours and wrappers."""
    return peeled(uncoloured(raw))[2]


def is_low(text: str) -> bool:
    """Whether the line calls itself a warning, or less.

    >>> is_low("W1123 03:36:54.310160   18850 x.cc:90] slow"), is_low("ERROR: failed")
    (True, False)
    """
    return bool(_LEVELS.match(text) or _NAMED_LEVEL.match(text))


def unescaped(text: str) -> list[str]:
    r"""The lines of a text that was written as one line of JSON, or as a Python string.

    >>> unescaped('{"stderr": "Traceback:\\n  File \\"x.py\\"\\nValueError: y"}')
    ['{"stderr": "Traceback:', '  File "x.py"', 'ValueError: y"}']
    """
    if "\\n" not in text and '\\"' not in text:
        return [text]
    plain = re.sub(r"\\{2,}(?=[nrt\"'])", r"\\", text).replace("\\r", "").replace("\\t", "\t")
    return plain.replace("\\n", "\n").replace('\\"', '"').replace("\\'", "'").split("\n")


def lines(number: int, raw: bytes) -> Iterator[Line]:
    """The readable parts of one physical line: progress bars split, wrappers peeled off.

    Args:
        number: of the line, from 1.
        raw: its bytes, without the line break.
    """
    for segment in uncoloured(raw).rstrip("\r\n").split("\r"):
        stream, low, text = peeled(segment)
        for part in unescaped(text):
            yield Line(number, stream, low or is_low(part), part, segment)


def read_log(path: Path, *, block_bytes: int = 1 << 20) -> Iterator[bytes]:
    """A log file's bytes, block by block: input for `diagnose`, whatever its size."""
    with path.open("rb") as log:
        while block := log.read(block_bytes):
            yield block
