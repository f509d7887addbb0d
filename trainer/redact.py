"""Secrets never reach a log: what the job prints passes through a process that knows their values.

A process of its own, because the trainer can end in the middle of a line (libtpu aborts, the kernel
kills), and what it had printed must still arrive. Only jobs that are handed secrets have one.
"""

import json
import os
import re
import select
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

LEAST = 8
"""Characters of a value that is taken for a secret; shorter ones would star out common words."""

_CHUNK = 1 << 16
_SILENCE_S = 0.2  # what a child of the trainer may still write after the trainer has ended


class Redactor:
    """Replaces secrets in a stream by as many stars, wherever the stream is cut.

    >>> redactor = Redactor([b"hf_0123456789"])
    >>> redactor.feed(b"token=hf_0123") + redactor.feed(b"456789 ok") + redactor.end()
    b'token=************* ok'
    """

    def __init__(self, secrets: Iterable[bytes]) -> None:
        """Know the secrets, and each line of those that have several."""
        parts = {part for secret in secrets for part in (secret, *secret.split(b"\n"))}
        # The longest first: one may be the beginning of another.
        self._secrets = sorted((p for p in parts if len(p) >= LEAST), key=len, reverse=True)
        # Looking ahead it finds those that begin inside another, too.
        either = b"|".join(map(re.escape, self._secrets)) or b"(?!)"
        self._pattern = re.compile(b"(?=(" + either + b"))")
        self._held = b""

    def __bool__(self) -> bool:
        """There is something to look for."""
        return bool(self._secrets)

    def whole(self, data: bytes) -> bytes:
        """The same of all there is."""
        if not self._pattern.search(data):
            return data
        shown = bytearray(data)
        for found in self._pattern.finditer(data):
            begin, end = found.span(1)
            shown[begin:end] = b"*" * (end - begin)
        return bytes(shown)

    def feed(self, data: bytes) -> bytes:
        """What can be shown by now; what may be the beginning of a secret is held back."""
        text = self._held + data
        cut = len(text) - self._begun(text)
        for begin, end in reversed([found.span(1) for found in self._pattern.finditer(text)]):
            if begin < cut < end:
                cut = begin
        self._held = text[cut:]
        return self.whole(text[:cut])

    def end(self) -> bytes:
        """What was held back."""
        rest, self._held = self._held, b""
        return self.whole(rest)

    def _begun(self, text: bytes) -> int:
        """Bytes at the end that are the beginning, but not the whole, of a secret."""
        longest = len(self._secrets[0]) - 1 if self._secrets else 0
        for size in range(min(longest, len(text)), 0, -1):
            tail = text[-size:]
            if any(len(s) > size and s.startswith(tail) for s in self._secrets):
                return size
        return 0


def redactor_of(job_file: Path, environment: Mapping[str, str]) -> Redactor:
    """One for the values that the job is handed by container.pass_env.

    It reads the one key by itself: whatever else is wrong with the file is told by who loads it.
    """
    try:
        names = json.loads(job_file.read_bytes())["container"]["pass_env"]
        values = [environment[name] for name in names if name in environment]
    except (OSError, ValueError, KeyError, TypeError):
        return Redactor([])
    return Redactor([os.fsencode(value) for value in values])


def guarded(program: Callable[[], int], redactor: Redactor) -> int:
    """Run a program in a child whose output is redacted; end as it ends.

    Called before there are threads. SIGTERM and SIGINT are passed on to the child.

    Returns:
        its exit status; this process dies by the child's signal where one ended it.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(writing)
        return program()
    os.close(writing)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    status = _copy(reading, child, redactor)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return 128 + number  # the first process of a container does not die by it
    return os.WEXITSTATUS(status)


def _copy(reading: int, child: int, redactor: Redactor) -> int:
    """Copy the child's output to our own until both have ended, and tell how it ended."""
    status: int | None = None
    while True:
        ready, _, _ = select.select([reading], [], [], _SILENCE_S)
        if ready:
            data = os.read(reading, _CHUNK)
            _write(redactor.feed(data) if data else redactor.end())
            if not data:
                return os.waitpid(child, 0)[1] if status is None else status
        elif status is not None:  # some child of the child lives on, and is silent
            _write(redactor.end())
            return status
        if status is None:
            done, ended = os.waitpid(child, os.WNOHANG)
            status = ended if done else None


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]
