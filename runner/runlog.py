"""A run's log as a file: shown in logs/ while it grows, its last line, the copy that is kept."""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path


def publish(log: Path, archived: Path, *, latest: Path) -> None:
    """Show the growing log in logs/ at once: a killed runner must not keep it from there."""
    archived.parent.mkdir(exist_ok=True)
    try:
        archived.hardlink_to(log)
    except OSError:  # a file system without hard links; `keep` copies instead
        _replace_link(archived, Path(os.path.relpath(log, archived.parent)))
    _replace_link(latest, Path(archived.name))


def _replace_link(link: Path, target: Path) -> None:
    beside = link.with_name(f".{link.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(link)


def keep(log: Path, archived: Path) -> None:
    """Copy an ended log to logs/ where it is not the same file already."""
    if archived.exists() and not archived.is_symlink() and archived.samefile(log):
        return
    beside = archived.with_name(f".{archived.name}.{os.getpid()}")
    try:
        archived.parent.mkdir(exist_ok=True)
        shutil.copyfile(log, beside)
        beside.replace(archived)
    except OSError:  # no room for a second copy: the link to the log, from the start, stays
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def end(log: Path, code: int | str) -> None:
    """Write `exit_status=CODE` as the log's last line, if it is not there already."""
    line = f"exit_status={code}\n".encode()
    with log.open("r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(line) - 1))
        tail = file.read()
        if tail in (line, b"\n" + line):
            return
        missing = line if not tail or tail.endswith(b"\n") else b"\n" + line
        file.seek(0, os.SEEK_END)
        try:
            written = file.write(missing)
            while written < len(missing):
                written += file.write(missing[written:])
            os.fsync(file.fileno())
        except OSError:  # a part of it would be taken for the job's own words the next time
            file.truncate(size)
            raise


def sha256(path: Path) -> str:
    """Of the whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
