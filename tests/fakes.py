"""Stand-ins for what a test cannot have: a trainer that does as it is told."""

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

    def logs(
        self,
        *,
        stream: bool = False,
        follow: bool = False,
        tail: int | str = "all",
        stdout: bool = True,
        stderr: bool = True,
    ) -> Iterator[bytes] | bytes:
        """All pieces from the first, or the last lines in one."""
        assert stdout
        assert stderr
        if stream:
            return self._stream(follow=follow)
        return b"".join(b"".join(self.pieces).splitlines(keepends=True)[-int(tail) :])

    def _stream(self, *, follow: bool) -> Iterator[bytes]:
        if follow and self.breaks:
            yield from self.pieces[: self.breaks.pop(0)]
            return
        yield from self.pieces
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
