"""The few lines of a log that are worth reading, whatever its size.

A line is kept, with its neighbours, when it holds a key word of the table of causes and, by itself
or together with the line before it, a key phrase; so are the last lines. Lines that differ only in
their digits are judged once and kept a few times: a log of a million steps costs little more than
a log of a hundred. Memory is bounded.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator

from runner.logtext import readable

BEFORE = 3  # lines kept before a line with a key word: the start of a message broken over lines
AFTER = 28  # and after it: the table below a compile-time OOM
TAIL = 400  # lines kept at the end, whatever they say
SAME_SHAPE = 24  # times that a line is kept whose digits alone differ
MOST_LINES = 2000  # kept of the first part of a log and, again, of the rest
LONGEST_LINE = 1 << 17  # bytes; a longer line is read in pieces of this size
_SEAM = 200  # bytes of a line that are read together with the next one
FRAMES = 4  # states of a progress bar kept from its start and from its end
_MOST_SHAPES = 100_000
_DIGITS = b"0123456789"
_COMMON = "etaoinshrdlcumwfgypbvkjxqz"  # English letters, the commonest first
_SHORTEST_PIECE = 4

# A step that went well says that everything before it had been survived.
_PROGRESS = re.compile(
    rb"\bstep['\"]?\s?[=:]?\s?\d.{0,80}?\bloss['\"]?\s?[=:]\s?-?\d"
    rb"|\bloss['\"]?\s?[=:]\s?-?\d.{0,200}?\bstep\b"
)


class _Node(dict[str, "_Node"]):
    """The letters that may come next in a key word; `""` marks the end of one."""


def _pattern(node: _Node) -> str:
    if "" in node:
        return ""
    branches = [re.escape(letter) + _pattern(after) for letter, after in sorted(node.items())]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def _piece(word: str) -> str:
    starts = range(max(1, len(word) - _SHORTEST_PIECE + 1))
    return word[max(starts, key=lambda start: (_COMMON.find(word[start]) % 27, -start)) :]


def one_search(words: Iterable[str]) -> re.Pattern[bytes]:
    """One search that finds at least every text that holds one of the words.

    Fast on ordinary text: of each word a piece is taken that begins with a rare letter, and pieces
    share their beginnings, so that most bytes cost one test.

    >>> one_search(["already", "alive", "OOM"]).pattern
    b'(?:OOM|l(?:ive|ready))'
    """
    pieces = {_piece(word) for word in words}
    root = _Node()
    for word in pieces:
        if any(other in word for other in pieces if other != word):
            continue
        node = root
        for letter in word:
            node = node.setdefault(letter, _Node())
        node[""] = _Node()
    return re.compile(_pattern(root).encode())


def physical_lines(log: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Lines of a log given in blocks of any size, some at a time, without their line breaks.

    A line of more than LONGEST_LINE bytes comes in pieces.
    """
    rest: list[bytes] = []
    waiting = 0
    for block in log:
        head, *more = block.split(b"\n")
        rest.append(head)
        waiting += len(head)
        if more:
            yield [b"".join(rest), *more[:-1]]
            rest, waiting = [more[-1]], len(more[-1])
        if waiting > LONGEST_LINE:
            yield [b"".join(rest)]
            rest, waiting = [], 0
    if waiting:
        yield [b"".join(rest)]


def _last_frames(line: bytes) -> bytes:
    """A line that was written over and over, without most of its overwritten states."""
    frames = line.split(b"\r")
    return line if len(frames) <= 2 * FRAMES else b"\r".join(frames[:FRAMES] + frames[-FRAMES:])


def _plain(line: bytes) -> bytes:
    """The line without colours, wrappers and runs of spaces; itself where it has none."""
    if b"\x1b" not in line and b"  " not in line and b"\t" not in line:
        return line
    return " ".join(readable(line).split()).encode()


class Excerpt:
    """What is kept of a log; grows as the log is read.

    Attributes:
        seen: lines read so far.
        progress: number of the last line that tells of a step with a finite loss; 0 for none.
    """

    def __init__(self, words: re.Pattern[bytes], phrases: re.Pattern[bytes]) -> None:
        self.seen = 0
        self.progress = 0
        self._words = words
        self._phrases = phrases
        # How many more lines of a shape to keep. A hash instead of the line keeps memory small.
        self._left: dict[int, int] = {}
        self._steps: set[int] = set()
        self._head: dict[int, bytes] = {}
        self._later: deque[tuple[int, bytes]] = deque(maxlen=MOST_LINES)
        self._recent: deque[bytes] = deque(maxlen=TAIL)
        self._until = 0
        # The line that may end a phrase which the line before it began.
        self._open = 0

    def read(self, batch: list[bytes]) -> bool:
        """Read more lines; True when one of them is kept for what it says."""
        # What follows runs once for each line of the log: names are local, the dull case is short.
        batch = [_last_frames(line) if b"\r" in line else line for line in batch]
        left, steps, until = self._left, self._steps, self._until
        found = False
        before = self._recent[-1] if self._recent else b""
        for number, line in enumerate(batch, self.seen + 1):
            shape = hash(line.translate(None, _DIGITS))
            wanted = left.get(shape, -1)
            if wanted < 0 or number == self._open:
                wanted = self._judge(number, line, before, shape)
            if shape in steps:
                self.progress = number
            before = line
            if wanted:
                found = True
                left[shape] = wanted - 1
                self._keep_before(number, batch)
                self._keep(number, line)
                until = number + AFTER
            elif number <= until:
                self._keep(number, line)
        self.seen += len(batch)
        self._until = until
        self._recent.extend(batch[-TAIL:])
        return found

    def lines(self) -> list[tuple[int, bytes]]:
        """The kept lines with their numbers from 1, in order."""
        tail = dict(enumerate(self._recent, self.seen - len(self._recent) + 1))
        return sorted({**self._head, **dict(self._later), **tail}.items())

    def _judge(self, number: int, line: bytes, before: bytes, shape: int) -> int:
        if len(self._left) >= _MOST_SHAPES:
            self._left.clear()
            self._steps.clear()
        if b"loss" in line and _PROGRESS.search(line):
            self._steps.add(shape)
        said = self._words.search(line) is not None
        wanted = said and self._phrases.search(_plain(line)) is not None
        if not wanted and number == self._open:
            seam = f"{readable(before[-_SEAM:])[-_SEAM // 4 :]} {readable(line[:_SEAM])}"
            wanted = self._phrases.search(" ".join(seam.split()).encode()) is not None
        elif said and not wanted:
            self._open = number + 1
        wanted = SAME_SHAPE if wanted else 0
        self._left[shape] = wanted
        return wanted

    def _keep_before(self, number: int, batch: list[bytes]) -> None:
        place = number - self.seen - 1
        earlier = batch[max(0, place - BEFORE) : place]
        if place < BEFORE and self._recent:
            earlier = [*list(self._recent)[place - BEFORE :], *earlier]
        for back, line in enumerate(reversed(earlier), 1):
            self._keep(number - back, line)

    def _keep(self, number: int, line: bytes) -> None:
        if len(self._head) < MOST_LINES:
            self._head[number] = line
        else:
            self._later.append((number, line))
