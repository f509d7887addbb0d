"""Stand-ins for what a test cannot have: a trainer that does as it is told."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

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
        "from runner.cli import World, main\n"
        f"main(obj=World(trainer={trainer(code)!r}))\n"
    )
    return [sys.executable, "-c", program, *map(str, arguments)]


class FakeContainer:
    """A container whose log comes in the given pieces, as docker-py's `Container.logs` gives it."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

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
            return iter(self.pieces)
        assert not follow
        return b"".join(b"".join(self.pieces).splitlines(keepends=True)[-int(tail) :])
