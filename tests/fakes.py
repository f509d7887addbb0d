"""Stand-ins for what a test cannot have: a trainer that does as it is told."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

JOB = """\
name: {name}
accelerator: cpu
model: tiny
cache_dir: {cache}
"""


def write_job(folder: Path, more: str = "", *, name: str = "stand-in") -> Path:
    """A job file that loads; `more` is further YAML."""
    path = folder / "job.yaml"
    path.write_text(JOB.format(name=name, cache=json.dumps(str(folder / "cache"))) + more)
    return path


def trainer(code: str) -> tuple[str, ...]:
    """A program in the trainer's place; the code finds VERB and job.json in sys.argv[1:]."""
    return (sys.executable, "-S", "-c", code)


def headroom(code: str, *arguments: str | Path) -> list[str]:
    """argv of the real command `headroom`, with `trainer(code)` in the trainer's place."""
    program = (
        "import sys\n"
        "from runner.cli import main\n"
        "from runner.terminal import World\n"
        f"main(obj=World(trainer={trainer(code)!r}))\n"
    )
    return [sys.executable, "-c", program, *map(str, arguments)]


class FakeContainer:
    """A container as docker-py shows it, whose log comes in the given pieces.

    Attributes:
        pieces: of the log.
        breaks: after how many pieces each following of the log ends, as when a daemon restarts;
            past the last of them it ends with the container.
    """

    def __init__(self, pieces: list[bytes], *, breaks: tuple[int, ...] = (), code: int = 0) -> None:
        self.pieces = pieces
        self.breaks = list(breaks)
        self.state = {"Running": True, "Status": "running", "ExitCode": code, "OOMKilled": False}

    @property
    def attrs(self) -> dict[str, Any]:
        """What `inspect` tells."""
        return {"State": self.state}

    def reload(self) -> None:
        """Nothing is cached."""

    def wait(self, *, timeout: float) -> None:
        """Told at once."""
        assert timeout
        if self.state["Running"]:
            raise ConnectionError("read timed out")

    def logs(self, *, tail: int) -> bytes:
        """The last lines."""
        return b"".join(b"".join(self.pieces).splitlines(keepends=True)[-tail:])

    @property
    def client(self) -> Any:
        """Itself, also as the client's session and as the answer that a `get` has."""
        return self

    api, id, base_url, api_version, status_code = client, "fake", "http://fake", "1.41", 200

    @contextlib.contextmanager
    def get(self, url: str, *, params: dict[str, int], **_: Any) -> Iterator[Any]:
        """The daemon's answer to a question for the log."""
        assert url == "http://fake/v1.41/containers/fake/logs"
        self.followed = params == {"follow": 1, "stdout": 1, "stderr": 1}
        yield self

    def raise_for_status(self) -> None:
        """All is well."""

    def iter_content(self, size: int) -> Iterator[bytes]:
        """The pieces, each in a frame of its own, the stream cut where they are not."""
        assert size
        pieces = self.pieces[: self.breaks.pop(0)] if self.followed and self.breaks else None
        whole = pieces is None
        for piece in self.pieces if pieces is None else pieces:
            frame = b"\1\0\0\0" + len(piece).to_bytes(4) + piece
            yield frame[:5]
            yield frame[5:]
        if whole:
            self.state |= {"Running": False, "Status": "exited"}


class FakeClient:
    """A Docker client that knows one container; `away` is how often its daemon does not answer."""

    def __init__(self, container: FakeContainer, *, away: int = 0) -> None:
        self.container, self.away = container, away
        self.containers = self

    def get(self, _: str) -> FakeContainer:
        """The container."""
        if self.away > 0:
            self.away -= 1
            raise ConnectionError("connection refused")
        return self.container
