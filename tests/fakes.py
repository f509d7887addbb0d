"""Stand-ins for what a test cannot have: a trainer that does as it is told."""

import json
import sys
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
