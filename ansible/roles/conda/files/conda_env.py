"""A conda environment without conda: looks at one, or makes it with py-rattler.

    conda_env.py look WANTED    any Python 3.10 or later; changes nothing
    conda_env.py make WANTED    a Python that has py-rattler

WANTED is JSON, see `Wanted`. Prints one JSON object; ends with 1 and the reason on stderr where the
place is taken by something else.
"""

# ruff: noqa: PLC0415 - `look` must run where py-rattler is not

import asyncio
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

# Stands in an environment of ours until all of it is there.
UNFINISHED = "headroom-unfinished"


@dataclass(frozen=True)
class Wanted:
    """The environment asked for.

    Attributes:
        prefix: its folder.
        channels: names or addresses, in order of priority.
        packages: what to solve for.
        python: the version of Python it must hold, "3.12".
        cache: where packages are kept.
    """

    prefix: str
    channels: list
    packages: list
    python: str
    cache: str


class TakenError(Exception):
    """The folder holds something that we must neither use nor replace."""


def look(wanted: Wanted) -> dict:
    """absent, unfinished or whole, and the Python of a whole one.

    Raises:
        TakenError: it is no conda environment, or has another Python.
    """
    prefix = Path(wanted.prefix)
    meta = prefix / "conda-meta"
    if not prefix.exists() or not any(prefix.iterdir()):
        return {"state": "absent", "python": None}
    if (meta / UNFINISHED).exists():
        return {"state": "unfinished", "python": None}
    if not meta.is_dir():
        raise TakenError(
            f"{prefix} is no conda environment: move it away, or choose another vm_conda_prefix"
        )
    found = [
        match[1]
        for path in meta.glob("python-*.json")
        if (match := re.fullmatch(r"python-(\d[^-]*)-.*", path.stem))
    ]
    version = found[0] if found else "none"
    if version.split(".")[:2] != wanted.python.split("."):
        raise TakenError(
            f"{prefix} has Python {version}, {wanted.python} wanted: choose another vm_conda_prefix"
        )
    return {"state": "whole", "python": version}


async def make(wanted: Wanted) -> dict:
    """Make the environment, anew where that was broken off; a whole one is left alone."""
    before = look(wanted)
    if before["state"] == "whole":
        return {**before, "changed": False}
    import rattler

    if before["state"] == "unfinished":
        shutil.rmtree(wanted.prefix)
    meta = Path(wanted.prefix) / "conda-meta"
    meta.mkdir(parents=True, exist_ok=True)
    (meta / UNFINISHED).touch()
    records = await rattler.solve(
        [rattler.Channel(channel) for channel in wanted.channels],
        wanted.packages,
        platforms=[str(rattler.Platform.current()), "noarch"],
        virtual_packages=rattler.VirtualPackage.detect(),
    )
    await rattler.install(
        records, target_prefix=wanted.prefix, cache_dir=wanted.cache, show_progress=False
    )
    # By this file conda knows an environment.
    (meta / "history").touch()
    (meta / UNFINISHED).unlink()
    packages = {
        record.name.normalized: {
            "version": str(record.version),
            "build": str(record.build),
            "sha256": record.sha256.hex() if record.sha256 else None,
        }
        for record in records
    }
    return {**look(wanted), "changed": True, "packages": packages}


def main(verb: str, text: str) -> None:
    """Print what was found or made."""
    wanted = Wanted(**json.loads(text))
    try:
        told = look(wanted) if verb == "look" else asyncio.run(make(wanted))
    except TakenError as error:
        sys.exit(f"Error: {error}")
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    # py-rattler 0.28.0 leaves threads that now and then abort an interpreter at its end.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:3])
