"""What a known cause is: data, so that the table of causes holds no logic.

Patterns are written as the programs print them, with plain spaces; a space matches any run of
white space, so that a message broken over lines by a terminal or a logger still matches.
A space and a question mark together match white space or nothing.
"""

import re
from dataclasses import dataclass
from typing import Literal

Retry = Literal["retryable", "not_as_is", "after_clean_up", "after_refit"]

# A size as libtpu, XLA, PyTorch and numpy print it. The unit is required: "7.8" at the end of a
# broken line is half a number, not a number.
SIZE = r"-?\d+(?:\.\d+)?\s?(?:[KMGT]i?B?|B(?:ytes)?|bytes)(?![A-Za-z])"
# A count with thousands separators, as some programs print tokens.
COUNT = r"-?\d[\d,]*"

_OPTIONAL = re.compile(r"[?*]\??|\{0?,\d*\}\??")
_COUNTED = re.compile(r"\+\??|\{\d+(?:,\d*)?\}\??")
_GROUP = re.compile(r"\((?:\?(?:P<\w+>|<?[=!]|[a-z]*:))?")
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def size_bytes(text: str) -> int:
    """Bytes of a printed size; every unit is binary, as in all programs of the table.

    >>> size_bytes("7.82G"), size_bytes("13.4 GiB"), size_bytes("0B"), size_bytes("4096")
    (8396661064, 14388140442, 0, 4096)
    """
    number = re.match(r"-?[\d.]+", text)
    if number is None:
        raise ValueError(f"not a size: {text!r}; write it like 7.82G or 13.4 GiB")
    unit = text[number.end() :].strip()[:1].upper()
    return round(float(number[0]) * _UNITS[unit])


@dataclass(frozen=True, slots=True)
class Sign:
    """A wording that tells of a cause; its named groups are numbers of the diagnosis.

    Attributes:
        pattern: what is searched for; a space matches any white space.
        sure: only this cause is worded so.
        quiet: it counts at any log level, and although the program went on after it.
        depth: of this wording, where it tells less than the cause's others.
    """

    pattern: str
    sure: bool = True
    quiet: bool = False
    depth: int | None = None


@dataclass(frozen=True, slots=True)
class Cause:
    """A cause by its category id.

    Attributes:
        id: as in docs/oom.md.
        depth: the lower, the nearer to the root: of several causes in a log the lowest is named.
            A program that ran out of HBM had passed its imports, its hub and its locks before.
        explanation: one sentence for a person.
        signs: the wordings, best first.
        details: further patterns with named groups, searched in the message around the sign.
        advice: what to change, best first.
        retry: may the job run again.
        source: where the wording or the remedy comes from.
        last: the line shown is the last that fits, not the first.
        exit_code: the exit status is part of the evidence and is told.
        because: causes that explain this one wherever they stand, even as a mere warning.
    """

    id: str
    depth: int
    explanation: str
    signs: tuple[Sign, ...]
    advice: tuple[str, ...]
    retry: Retry
    source: str
    details: tuple[str, ...] = ()
    last: bool = False
    exit_code: bool = False
    because: tuple[str, ...] = ()


def spaced(pattern: str, *, loose: bool = False) -> re.Pattern[str]:
    """The compiled pattern, in which a space matches any white space; with loose, also none.

    Args:
        pattern: outside of brackets, every space stands for white space.
        loose: for text whose line breaks, in the middle of words, have been taken out.
    """
    optional = pattern.replace(" ?", r"\s*")
    return re.compile(optional.replace(" ", r"\s*" if loose else r"\s+"), re.MULTILINE)


def key_words(pattern: str, *, phrases: bool = False) -> frozenset[str]:
    r"""Words of which every text that fits the pattern holds at least one, without white space.

    They make the cheap searches that come before the patterns themselves. With phrases, pieces of
    several words, with one space between them.

    >>> sorted(key_words(r"(?:TPU|libtpu(?:\.so)?) is already in use by|Barrier timed out"))
    ['Barrier', 'already']
    >>> sorted(key_words(r"(?:TPU|libtpu(?:\.so)?) is already in use by", phrases=True))
    ['is already in use by']
    """
    # An escaped space is read as a letter of its own, a plain one ends a word.
    read = pattern.replace(" ", "\\ ") if phrases else pattern
    words, end = _alternatives(read, 0)
    if end != len(read) or not words:
        raise ValueError(f"no word must stand in a text that fits {pattern!r}; write one out")
    return frozenset(word.strip() for word in words)


def _alternatives(pattern: str, at: int) -> tuple[frozenset[str], int]:
    """Key words of a group's alternatives from `at` to its end; none if one of them has none."""
    every: list[frozenset[str]] = []
    while True:
        words, at = _sequence(pattern, at)
        every.append(words)
        if at >= len(pattern) or pattern[at] != "|":
            break
        at += 1
    return (frozenset[str]().union(*every) if all(every) else frozenset()), at


def _sequence(pattern: str, at: int) -> tuple[frozenset[str], int]:
    """Key words of one alternative: its longest literal, or the best group that it must hold."""
    best: frozenset[str] = frozenset()
    run = ""
    while at < len(pattern) and pattern[at] not in "|)":
        words, letter, end = _item(pattern, at)
        optional = _OPTIONAL.match(pattern, end)
        counted = _COUNTED.match(pattern, end)
        if letter and not optional:
            run += letter
        if not letter or optional or counted:
            best, run = _better(best, frozenset({run})), ""
        if words and not optional:
            best = _better(best, words)
        at = optional.end() if optional else counted.end() if counted else end
    return _better(best, frozenset({run})), at


def _item(pattern: str, at: int) -> tuple[frozenset[str], str, int]:
    """One item: a group's key words, or a literal letter, or neither; and where it ends."""
    letter = pattern[at]
    if letter == "(":
        look = pattern.startswith(("(?!", "(?<!", "(?i", "(?="), at)
        head = _GROUP.match(pattern, at)
        words, end = _alternatives(pattern, head.end() if head else at + 1)
        return (frozenset() if look else words), "", end + 1
    if letter == "[":
        end = pattern.index("]", at + 2)
        return frozenset(), "", end + 1
    if letter == "\\":
        plain = "" if pattern[at + 1].isalnum() else pattern[at + 1]
        return frozenset(), plain, at + 2
    return frozenset(), "" if letter in " .^$" else letter, at + 1


def _better(one: frozenset[str], other: frozenset[str]) -> frozenset[str]:
    """The words that fewer lines of ordinary text hold."""
    rare = [min(map(_rarity, words), default=0) for words in (one, other)]
    return one if rare[0] >= rare[1] else other


def _rarity(word: str) -> int:
    bare = word.strip()
    # What only programs write: capitals, underscores, dots.
    programs = not bare.replace(" ", "").isalpha() or not bare.islower()
    return len(bare) + (4 if programs else 0) if len(bare) > 1 else 0
