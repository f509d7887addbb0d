"""`JOB.fit.yaml`: a job file with the changes that `headroom fit` found, and why, beside each."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from jobs.records import Fit, FitChange, gib
from jobs.schema import SCHEMA_FILE
from jobs.source import read_sources
from jobs.spec import load

_INDENT = "  "


class FitFileError(Exception):
    """The file was not written, and why."""


def fit_file_of(job_file: Path) -> Path:
    """Where the job that fits goes, beside the one that was asked.

    >>> fit_file_of(Path("jobs/sop_smoke.yaml")).as_posix()
    'jobs/sop_smoke.fit.yaml'
    """
    return job_file.with_name(f"{job_file.stem}.fit.yaml")


def asked_tree(job_file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The keys that the user wrote, those of --set on top, of a job that loads."""
    return read_sources(job_file, overrides=overrides, environment=None).tree


def fit_text(tree: Mapping[str, Any], fit: Fit, *, folder: Path, asked: str) -> str:
    """The file's text.

    Args:
        tree: the keys that the user wrote.
        fit: with a plan.
        folder: that the file will lie in, for the schema's path.
        asked: the name of the job file.

    Raises:
        FitFileError: nothing fits, so there is no such file.
    """
    if fit.plan is None:
        raise FitFileError(f"{fit.job} fits {fit.accelerator} with no setting that was tried")
    whole: dict[str, Any] = _copied(tree)
    for change in fit.changes:
        _put(whole, change.key, change.new)
    beside = {change.key: _comment(change) for change in fit.changes}
    left, seconds = gib(fit.plan.headroom_bytes), sum(fit.step.values())
    head = [
        f"# yaml-language-server: $schema={_schema_from(folder)}",
        f"# {asked}, made to fit {fit.accelerator} by `headroom fit`: {left} left of a chip's "
        f"{gib(fit.plan.usable_bytes)}.",
        f"# A step takes {seconds:.2f} s by a model, not by a measurement; as it was asked, "
        f"{fit.asked_step_s:.2f} s.",
    ]
    return "\n".join([*head, *_lines(whole, beside, path="", depth=0)]) + "\n"


def check(path: Path, *, force: bool) -> None:
    """Refuse to write over a file.

    Raises:
        FitFileError: it is there already, and `force` is not given; or its folder is not.
    """
    if path.exists() and not force:
        raise FitFileError(f"{path} is there already: name another, --out, or say --force")
    if not path.parent.is_dir():
        raise FitFileError(f"{path.parent} is no folder: make it, or name another file, --out")


def write(job_file: Path, overrides: Sequence[str], fit: Fit, *, to: Path, force: bool) -> None:
    """Write the job that fits, whole or not at all.

    Raises:
        FitFileError: see `check` and `fit_text`; or the text is not the job that was planned.
    """
    check(to, force=force)
    tree = asked_tree(job_file, overrides)
    text = fit_text(tree, fit, folder=to.parent, asked=job_file.name)
    descriptor, name = tempfile.mkstemp(dir=to.parent, prefix=f".{to.name}.", suffix=".yaml")
    beside = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        digest = load(beside).digest
        if fit.plan is None or digest != fit.plan.job_sha256:
            raise FitFileError(f"{to} is not written: it would be another job than was planned")
        beside.chmod(0o644)
        beside.replace(to)
    finally:
        beside.unlink(missing_ok=True)


def _comment(change: FitChange) -> str:
    said = [f"was {_flow(change.old)}: {change.why}"]
    if change.saves_bytes:
        word = "saves" if change.saves_bytes > 0 else "takes"
        said.append(f"{word} {gib(abs(change.saves_bytes))} of the peak by formulas")
    if abs(change.saves_s) >= 0.005:
        word = "faster" if change.saves_s > 0 else "slower"
        said.append(f"{abs(change.saves_s):.2f} s a step {word} by the model")
    return "; ".join([*said, f"price: {change.price}"])


def _lines(
    tree: Mapping[str, Any], beside: Mapping[str, str], *, path: str, depth: int
) -> Iterator[str]:
    """A line for each key, in the user's order."""
    for key, value in tree.items():
        whole = f"{path}{key}"
        begin = f"{_INDENT * depth}{_flow(key)}:"
        if isinstance(value, dict) and value:
            yield begin
            inner = cast("dict[str, Any]", value)
            yield from _lines(inner, beside, path=f"{whole}.", depth=depth + 1)
        else:
            comment = f"  # {beside[whole]}" if whole in beside else ""
            yield f"{begin} {_flow(value)}{comment}"


def _flow(value: Any) -> str:
    """A value in YAML, on one line."""
    plain = cast("Any", yaml.safe_dump)
    options = {"default_flow_style": True, "width": 2**31, "allow_unicode": False}
    text = str(plain(value, **options)).removesuffix("\n").removesuffix("\n...")
    if "\n" in text or (isinstance(value, str) and "\n" in value):
        text = str(plain(value, default_style='"', **options)).removesuffix("\n")
    return text


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parts, last = key.split(".")
    node = tree
    for part in parts:
        node = cast("dict[str, Any]", node.setdefault(part, {}))
    node[last] = value


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copied(cast("dict[str, Any]", value)) if isinstance(value, dict) else value
        for key, value in tree.items()
    }


def _schema_from(folder: Path) -> str:
    """The schema's path as an editor resolves it."""
    return Path(os.path.relpath(SCHEMA_FILE, folder)).as_posix()
