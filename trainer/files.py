"""Small records on disk: a reader sees all of one, or none."""

from pathlib import Path


def write_record(file: Path, text: str) -> None:
    """Write a record beside its place, and put it there whole."""
    beside = file.with_suffix(".new")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(file)
