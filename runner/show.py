"""What a person, or a program, is shown of a run: read from its records alone."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.aftermath import BLACK_BOX_FILE, NOTICE_FILE
from jobs.records import (
    LOG_FILE,
    Diagnosis,
    EvalRecord,
    ExitStatus,
    Failure,
    Manifest,
    Record,
    StepRecord,
    gib,
)
from runner.archive import RunDir
from runner.diagnose import format_diagnosis
from runner.sweep_row import Measured
from runner.watch import Sink, write_out

_POLL_S = 0.5
_BLOCK_BYTES = 1 << 16
_TAIL_LINES = 8
_STEP_COLUMNS = ("step", "loss", "entropy", "reward", "pass@1", "pass@K", "tokens", "tok/s", "dt s")


def records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; a last line that was cut off is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(cast("dict[str, Any]", record))
    return found


def _valid[R: Record](kind: type[R], lines: list[dict[str, Any]], console: Console) -> list[R]:
    """The lines as records; what another version wrote otherwise is counted and left out."""
    found: list[R] = []
    for line in lines:
        with contextlib.suppress(ValidationError):
            found.append(kind.model_validate(line))
    if other := len(lines) - len(found):
        console.print(Text(f"{other} not shown: no {kind.__name__} of this version (see --json)"))
    return found


def as_data(run: RunDir, manifest: Manifest) -> dict[str, Any]:
    """All that is known of a run, as JSON holds it: what `--json` prints."""
    lines = records(run.steps_file)
    return {
        "run": run.name,
        "path": str(run.path),
        "manifest": manifest.model_dump(mode="json"),
        "job": run.read_json(run.job_file),
        "steps": [line for line in lines if "step" in line],
        "evaluations": [line for line in lines if "eval_step" in line],
        "failure": run.read_json(run.failure_file),
        "diagnosis": run.read_json(run.diagnosis_file),
        "black_box": run.read_json(run.path / BLACK_BOX_FILE),
        "notice": run.read_json(run.path / NOTICE_FILE),
    }


def ending_text(manifest: Manifest) -> str:
    """How a run stands, in a few words.

    >>> ending_text(Manifest.model_construct(state="running", exit_status=None))
    'running'
    """
    status: ExitStatus | None = manifest.exit_status
    if status is None:
        return manifest.state
    signal = f", {status.signal}" if status.signal else ""
    return "lost" if status.reason == "lost" else f"{status.reason} ({status.code}{signal})"


def print_run(data: dict[str, Any], console: Console) -> None:
    """One run for a person: what ran, its steps, why it failed, and what it said last."""
    manifest = Manifest.model_validate(data["manifest"])
    _print_facts(manifest, data, console)
    if steps := _valid(StepRecord, data["steps"], console):
        console.print(_steps_table(steps))
    for e in _valid(EvalRecord, data["evaluations"], console):
        console.print(
            Text(
                f"evaluation after step {e.eval_step}: pass@1 {e.pass_at_1:.3f}"
                + (f", pass@{e.group_size} {e.pass_at_k:.3f}" if e.group_size > 1 else "")
                + f" of {e.prompts} prompts"
            )
        )
    for f in _valid(Failure, [data["failure"]] if data["failure"] else [], console):
        console.print(Text(f"failure: {f.kind}: {f.message}"))
    for d in _valid(Diagnosis, [data["diagnosis"]] if data["diagnosis"] else [], console):
        console.print(Text(format_diagnosis(d)))
    console.print(Text("last lines of the log (all of it: headroom logs):", style="dim"))
    try:
        last = tail(Path(data["path"]) / LOG_FILE, _TAIL_LINES).decode(errors="replace")
    except OSError as error:
        last = f"cannot be read: {error}"
    console.print(Text.from_ansi(last))


def _print_facts(manifest: Manifest, data: dict[str, Any], console: Console) -> None:
    commit = manifest.commit or "outside a git checkout"
    facts = {
        "run": data["path"],
        "status": ending_text(manifest),
        **({"retry of": manifest.retry_of} if manifest.retry_of else {}),
        "job": f"{manifest.job} ({manifest.verb})",
        "commit": commit + (" with changes" if manifest.dirty else ""),
        "where": manifest.where + (f" {manifest.image}" if manifest.image else ""),
        "host": f"{manifest.host.get('name', '?')}, {manifest.host.get('cpus', '?')} CPUs",
        "started": when(manifest.started),
        "finished": when(manifest.finished),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        table.add_row(Text(name), Text(value, overflow="fold"))
    console.print(table)


def _steps_table(steps: Iterable[StepRecord]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in _STEP_COLUMNS:
        table.add_column(column, justify="right")
    for s in steps:
        table.add_row(
            str(s.step),
            f"{s.loss:.4f}",
            f"{s.entropy:.3f}",
            f"{s.reward_mean:.3f}",
            f"{s.pass_at_1:.3f}",
            f"{s.pass_at_k:.3f}",
            f"{s.completion_tokens_mean:.0f}",
            f"{s.tokens_per_s:.1f}",
            f"{s.dt_s:.1f}",
        )
    return table


def print_measured(rows: Iterable[Measured], console: Console) -> None:
    """Planned beside measured, a line each, GiB a chip."""
    table = Table(box=None, pad_edge=False)
    for column in ("a chip", "planned", "measured", "difference"):
        table.add_column(column, justify="left" if column == "a chip" else "right")
    for row in rows:
        sizes = (gib(row.planned_bytes), gib(row.measured_bytes), gib(row.error_bytes))
        table.add_row(Text(row.what), *sizes)
    console.print(table)


def print_list(manifests: Iterable[Manifest], console: Console) -> None:
    """Runs, a line each."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "status", "where", "started", "finished"):
        table.add_column(column, overflow="fold")
    for m in manifests:
        cells = (m.run, ending_text(m), m.where, when(m.started), when(m.finished))
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


def when(iso: str | None) -> str:
    """A moment of a manifest for people, in UTC."""
    if iso is None:
        return "-"
    try:
        return datetime.fromisoformat(iso).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except ValueError:  # another version's, or a broken one
        return iso


def tail(path: Path, lines: int) -> bytes:
    """The last lines of a file, byte for byte."""
    if lines <= 0:
        return b""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        found = b""
        # One more line break than lines: the first found lies before the first line wanted.
        while end > 0 and found.count(b"\n") <= lines:
            begin = max(0, end - _BLOCK_BYTES)
            file.seek(begin)
            found = file.read(end - begin) + found
            end = begin
    return b"".join(found.splitlines(keepends=True)[-lines:])


def blocks(path: Path, *, ended: Callable[[], bool] | None, skip: int = 0) -> Iterator[bytes]:
    """A file's bytes from `skip` on, and what comes until `ended` says so; None: what is there."""
    with path.open("rb", buffering=0) as file:
        if skip:  # a pipe cannot be sought
            file.seek(skip)
        over = ended is None
        while True:
            while data := file.read(_BLOCK_BYTES):
                yield data
            if over or ended is None:
                return
            over = ended()
            if not over:
                time.sleep(_POLL_S)


def print_log(
    path: Path, out: Sink, *, lines: int | None, ended: Callable[[], bool] | None
) -> None:
    """Write a log, or its last lines, and go on with what comes until `ended` says so."""
    size = path.stat().st_size
    if lines is not None:
        write_out(out, tail(path, lines))
    for data in blocks(path, ended=ended, skip=0 if lines is None else size):
        write_out(out, data)
