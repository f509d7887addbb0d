"""What a run was made from: the code's commit, the packages, the machine."""

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from runner.supervise import boot_id

NO_COMMIT = "nogit"


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """The repository that the code was started from.

    Attributes:
        commit: full; None outside a git checkout.
        dirty: files differ from the commit, or lie there without belonging to it; None outside one.
    """

    commit: str | None
    dirty: bool | None


def checkout(folder: Path) -> Checkout:
    """The commit of the code in that folder, if the folder is the top of a git checkout."""

    def git(*arguments: str) -> str:
        # Root runs a user's checkout and the other way round: we only read, so ownership is no
        # matter. Without optional locks a `git commit` elsewhere is never disturbed.
        head = ["git", "-c", "safe.directory=*", "-c", "core.fsmonitor=false"]
        argv = [*head, "--no-optional-locks", "-C", str(folder), *arguments]
        done = subprocess.run(argv, capture_output=True, timeout=60, check=True)
        return os.fsdecode(done.stdout).removesuffix("\n")

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder.resolve():
            return Checkout(commit=None, dirty=None)
        commit = git("rev-parse", "--verify", "HEAD")
        return Checkout(commit=commit, dirty=bool(git("status", "--porcelain")))
    except (OSError, subprocess.SubprocessError):
        return Checkout(commit=None, dirty=None)


def short_commit(commit: str | None) -> str:
    """The first seven digits of a commit, or the word that stands for none."""
    return commit[:7] if commit else NO_COMMIT


def installed_packages() -> dict[str, str]:
    """Version by distribution name of the Python that runs this, and a trainer in a process.

    Names are in the form of lock files (PEP 503), as a container's are.
    """
    # A broken installation can leave a distribution without a name.
    found = {_canonical(d.name): d.version for d in metadata.distributions() if d.metadata["Name"]}
    return dict(sorted(found.items()))


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def host() -> dict[str, str | int]:
    """This machine: name, system, CPUs, RAM in bytes, and which boot of it."""
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "cpus": os.cpu_count() or 0,
        "ram_bytes": int(psutil.virtual_memory().total),
        "boot_id": boot_id(),
    }
