"""Secrets never reach a log: what the job prints passes through a process that knows their values.

A process of its own, because the trainer can end in the middle of a line (libtpu aborts, the kernel
kills), and what it had printed must still arrive. Only jobs that are handed secrets have one.
"""

import contextlib
import ctypes
import json
import os
import re
import resource
import select
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

LEAST = 8
"""Characters of a value that is taken for a secret; shorter ones would star out common words."""

_CHUNK = 1 << 16
_SILENCE_S = 0.2
_AFTER_S = 2.0  # for which a child of the trainer may still write after the trainer has ended
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Redactor:
    """Replaces secrets in a stream by as many stars, wherever the stream is cut.

    >>> redactor = Redactor([b"hf_0123456789"])
    >>> redactor.feed(b"token=hf_0123") + redactor.feed(b"456789 ok") + redactor.end()
    b'token=************* ok'
    """

    def __init__(self, secrets: Iterable[bytes]) -> None:
        """Know the secrets, as libraries read them, and each line of those that have several."""
        parts = {part.strip() for secret in secrets for part in (secret, *secret.splitlines())}
        known = {part for part in parts if len(part) >= LEAST and re.search(rb"\w", part)}
        # The longest first: one may be the beginning of another.
        self._secrets = sorted(known, key=len, reverse=True)
        # Looking ahead it finds those that begin inside another, too.
        either = b"|".join(map(re.escape, self._secrets)) or b"(?!)"
        self._pattern = re.compile(b"(?=(" + either + b"))")
        self._held = b""

    def __bool__(self) -> bool:
        """There is something to look for."""
        return bool(self._secrets)

    def whole(self, data: bytes) -> bytes:
        """The same of all there is."""
        if not self._is_in(data):
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
        if self._is_in(text):
            for begin, end in reversed([found.span(1) for found in self._pattern.finditer(text)]):
                if begin < cut < end:
                    cut = begin
        self._held = text[cut:]
        return self.whole(text[:cut])

    def end(self) -> bytes:
        """What was held back."""
        rest, self._held = self._held, b""
        return self.whole(rest)

    def text(self, text: str) -> str:
        """The same of a text."""
        return self.whole(text.encode(errors="surrogateescape")).decode(errors="surrogateescape")

    def _is_in(self, data: bytes) -> bool:
        # Much faster than the pattern where there is none, as nearly always.
        return any(secret in data for secret in self._secrets)

    def _begun(self, text: bytes) -> int:
        """Bytes at the end that are the beginning, but not the whole, of a secret."""
        longest = 0
        for secret in self._secrets:
            tail = text[-(len(secret) - 1) :]
            at = tail.find(secret[:1])
            while at >= 0 and not secret.startswith(tail[at:]):
                at = tail.find(secret[:1], at + 1)
            if at >= 0:
                longest = max(longest, len(tail) - at)
        return longest


def redactor_of(job_file: Path, environment: Mapping[str, str]) -> Redactor:
    """One for the values that the job is handed by container.pass_env, and a proxy's password.

    It reads the one key by itself: whatever else is wrong with the file is told by who loads it.
    """
    values: list[str] = []
    for name, value in environment.items():
        if name.lower().endswith("_proxy"):
            with contextlib.suppress(ValueError):  # no URL: whoever uses it will say so
                values.append(urlsplit(value).password or "")
    try:
        names = json.loads(job_file.read_bytes())["container"]["pass_env"]
        values += [environment[name] for name in names if name in environment]
    except (OSError, ValueError, KeyError, TypeError):
        pass
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
        # Where this process is killed nobody may be left that stops the child.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(writing)
        return program()
    os.close(writing)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would hold the secrets
    # The child is reaped last of all, so its number stays its own until then.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    _copy(reading, child, redactor)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return 128 + number  # the first process of a container does not die by it
    return os.WEXITSTATUS(status)


def _copy(reading: int, child: int, redactor: Redactor) -> None:
    """Copy the child's output to our own until nobody writes any more, or the child has ended.

    What it left behind may hold its output open, and go on writing: only what was there shortly
    after its end is copied.
    """
    deadline: float | None = None
    while True:
        ready, _, _ = select.select([reading], [], [], _SILENCE_S)
        data = os.read(reading, _CHUNK) if ready else b""
        ended = bool(ready and not data) or (deadline is not None and not ready)
        late = deadline is not None and time.monotonic() >= deadline
        if ended or late:
            _write(redactor.feed(data) + redactor.end())
            return
        _write(redactor.feed(data))
        if deadline is None and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            deadline = time.monotonic() + _AFTER_S


def _write(data: bytes) -> None:
    """Write all of it; where there is no room it is lost, and the job goes on, as without us."""
    view = memoryview(data)
    with contextlib.suppress(OSError):
        while view:
            view = view[os.write(1, view) :]
