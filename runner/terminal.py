"""What the commands of `headroom` share: how they read a job, refuse, and print."""

# ruff: noqa: PLC0415 - `headroom --help` must not wait for Docker's client and the like

import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

import click

if TYPE_CHECKING:
    from rich.console import Console

    from jobs.records import Diagnosis, Manifest
    from jobs.spec import Job
    from runner.archive import RunDir


@dataclass(frozen=True)
class World:
    """What the commands reach outside of Python for: `main(obj=World(...))` hands in another.

    Attributes:
        trainer: the program of the process way; None: the trainer beside this runner.
        pause: waits so many seconds before a run is tried again.
        chips_lock: says who has the chips; None: the host's own.
        sweep_lock: held by the one sweep that runs on this machine; None: the host's own.
    """

    trainer: tuple[str, ...] | None = None
    pause: Callable[[float], None] = time.sleep
    chips_lock: Path | None = None
    sweep_lock: Path | None = None

    def lock(self) -> Path:
        """Says who has the chips of this host."""
        from runner.chips import LOCK

        return LOCK if self.chips_lock is None else self.chips_lock

    def lock_of_sweeps(self) -> Path:
        """Held by the one sweep that runs on this host."""
        from runner.chips import LOCK

        return LOCK.with_name("headroom-sweep.lock") if self.sweep_lock is None else self.sweep_lock

    def program(self) -> tuple[str, ...]:
        """The program of the process way."""
        from runner.environment import TRAINER

        return TRAINER if self.trainer is None else self.trainer


pass_world = click.make_pass_decorator(World, ensure=True)
runs_option = click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="The folder of runs; logs/ lies beside it.",
)
run_name = click.argument("name", metavar="RUN")
limit_option = click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    default=900.0,
    show_default=True,
    metavar="SECONDS",
    help="For all of it.",
)
where_option = click.option(
    "--where",
    type=click.Choice(["auto", "process", "docker"]),
    default="auto",
    show_default=True,
    help="auto: Docker when a daemon answers, else a process.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Refused(click.ClickException):
    """One `Error: ...` line for each thing that is wrong, and exit code 1."""

    def show(self, file: Any = None) -> None:
        """Print the lines on stderr."""
        for line in self.message.splitlines():
            click.echo(f"Error: {line}", file=file, err=True)


class Failed(Refused):
    """The same of what should not have happened: exit code 5."""

    exit_code = 5


def load_job(path: Path, overrides: tuple[str, ...], *, from_env: bool) -> "Job":
    """The job of a file with overrides on top, or the command ends with what is wrong."""
    from jobs.spec import JobError, load
    from runner.environment import here

    try:
        return load(path, overrides=overrides, environment=here() if from_env else None)
    except JobError as error:
        raise Refused(str(error)) from error


@contextmanager
def planner_errors() -> Generator[None]:
    """What the planner raises, as its commands end with it: 1 refused, 5 failed, 128 + signal."""
    from runner import planning

    try:
        yield
    except planning.PlanRefusedError as error:
        raise Refused(str(error)) from error
    except (planning.PlanFailedError, OSError) as error:
        raise Failed(str(error)) from error
    except planning.PlanStoppedError as error:
        say(str(error))
        sys.exit(128 + error.number)


@contextmanager
def picture_errors() -> Generator[None]:
    """Pages and pictures that cannot be drawn or written are refused."""
    from runner.chart import NoPicturesError

    try:
        yield
    except (NoPicturesError, OSError) as error:
        raise Refused(str(error)) from error


def say(text: str) -> None:
    """A line for the person, on stderr."""
    click.echo(f"headroom: {text}", err=True)


def print_json(data: Any) -> None:
    """The result for a program."""
    click.echo(json.dumps(data, indent=2))


def console() -> "Console":
    """Where tables are printed."""
    from rich.console import Console

    # Without a terminal nothing is cut to a width of 80.
    return Console() if sys.stdout.isatty() else Console(width=200, soft_wrap=True)


def raw(name: Literal["stdout", "stderr"]) -> BinaryIO:
    """The stream without a buffer of its own: what was written is there, whatever comes."""
    stream = sys.stdout.buffer if name == "stdout" else sys.stderr.buffer
    return cast("BinaryIO", getattr(stream, "raw", stream))


def settled(runs: Path, name: str) -> "tuple[RunDir, Manifest]":
    """A run, and its manifest made true; the command ends where there is no such run."""
    from runner import archive

    try:
        found = archive.find(runs, name)
        manifest = settle(found)
        return found, manifest or found.manifest()
    except archive.NoSuchRunError as error:
        raise Refused(str(error)) from error


def settle(found: "RunDir") -> "Manifest | None":
    """The manifest made true; as last recorded where that cannot be told; None for a broken one."""
    from runner import archive
    from runner import status as state

    try:
        return state.settle(found)
    except state.CannotTellError as error:
        say(f"{found.name}: as last recorded: {error}")
        return found.manifest()
    except archive.NoSuchRunError as error:
        say(str(error))
        return None


def print_diagnosis(diagnosis: "Diagnosis", *, as_json: bool) -> None:
    """The cause of a failure, for a person or a program."""
    from runner.diagnose import format_diagnosis

    click.echo(diagnosis.model_dump_json() if as_json else format_diagnosis(diagnosis))
