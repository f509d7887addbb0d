"""The command `headroom`: each subcommand parses, calls one function, and prints.

stdout is the result, stderr the progress; `--json` is for programs.
"""

# ruff: noqa: PLC0415 - `headroom --help` must not wait for Docker's client and the like

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from runner.cli_fit import fit
from runner.cli_plan import plan
from runner.terminal import (
    Refused,
    World,
    console,
    json_option,
    load_job,
    pass_world,
    planner_errors,
    print_json,
    raw,
    say,
)

if TYPE_CHECKING:
    from jobs.records import Diagnosis, Manifest
    from jobs.spec import Job
    from runner.archive import RunDir


_INTERRUPTED = 130  # 128 + SIGINT
_runs = click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="The folder of runs; logs/ lies beside it.",
)
_run_name = click.argument("name", metavar="RUN")


class Commands(click.Group):
    """Commands that end with 130 at Ctrl-C, as the shell and our own `run` have it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            say("interrupted")
            ctx.exit(_INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="headroom")
def main() -> None:
    """Run GRPO jobs, and know every byte of HBM before, during and after.

    \b
    headroom run jobs/smoke.yaml
    headroom show latest
    """


@main.command()
@click.argument("job_file", metavar="JOB", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one key.")
@click.option("--from-env", is_flag=True, help="Take the SOP's variables (BATCH_SIZE, ...) too.")
@click.option(
    "--where",
    type=click.Choice(["auto", "process", "docker"]),
    default="auto",
    show_default=True,
    help="auto: Docker when a daemon answers, else a process.",
)
@click.option(
    "--verb",
    type=click.Choice(["train", "evaluate"]),
    default="train",
    show_default=True,
    help="What the trainer does with the job.",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Try again, up to N times, where the cause of the failure may pass by itself.",
)
@click.option(
    "--refit",
    is_flag=True,
    help="Out of HBM: find a setting that fits (headroom fit) and run that, once.",
)
@_runs
@json_option
@pass_world
def run(  # noqa: PLR0913 - click hands in each option by its name
    world: World,
    *,
    job_file: Path,
    overrides: tuple[str, ...],
    from_env: bool,
    where: Literal["auto", "process", "docker"],
    verb: str,
    retries: int,
    refit: bool,
    runs: Path,
    as_json: bool,
) -> None:
    """Run a job to its end; its log streams here and is archived.

    With --retries every attempt is a run of its own. What would only fail again is not tried again:
    a job that ran out of HBM, whatever must be cleaned up first, a mistake in the job. With --refit
    a job that ran out of HBM is run once more, in a setting that fits.

    Exit codes: 0 done, 1 refused, 2 usage, 4 failed with a known cause, 5 with an unknown one,
    130 and 143 interrupted.

    \b
    headroom run jobs/smoke.yaml --set steps=3 --where process
    headroom run jobs/smoke.yaml --retries 3 --refit
    """
    from runner.conclude import diagnosis_of
    from runner.retry import wait_s

    load = lambda: load_job(job_file, overrides, from_env=from_env)
    made, manifest = _attempt(world, load, where=where, verb=verb, runs=runs, as_json=as_json)
    for number in range(retries):
        diagnosis = diagnosis_of(made)
        seconds = wait_s(manifest, diagnosis, attempts=number + 1)
        if seconds is None or diagnosis is None:
            break
        say(
            f"{made.name}: {diagnosis.cause} may pass by itself; "
            f"retry {number + 1} of {retries} in {seconds:g} s (Ctrl-C: no more)"
        )
        world.pause(seconds)
        # As it was first read: the file may be another by now.
        load = partial(load_job, made.job_file, (), from_env=False)
        made, manifest = _attempt(
            world, load, where=where, verb=verb, runs=runs, as_json=as_json, retry_of=made.name
        )
    diagnosis = diagnosis_of(made)
    if refit and diagnosis is not None and diagnosis.retry == "after_refit":
        say(f"{made.name}: {diagnosis.cause}; looking for a setting that fits")
        if (fitted := _refitted(world, made)) is not None:
            load = partial(load_job, fitted, (), from_env=False)
            made, manifest = _attempt(
                world, load, where=where, verb=verb, runs=runs, as_json=as_json, retry_of=made.name
            )
    sys.exit(_end(made, manifest, as_json=as_json))


def _refitted(world: World, made: "RunDir") -> Path | None:
    from runner import refit
    from runner.environment import TRAINER

    with planner_errors():
        return refit.refit(made, say=say, trainer=world.trainer or TRAINER)


def _attempt(  # noqa: PLR0913 - the options of `run`
    world: World,
    load: Callable[[], "Job"],
    *,
    where: Literal["auto", "process", "docker"],
    verb: str,
    runs: Path,
    as_json: bool,
    retry_of: str | None = None,
) -> tuple["RunDir", "Manifest"]:
    """One run, from its job to its end."""
    from runner.watch import Interrupts

    # Before anything is made: from here on a signal ends in an exit status.
    with Interrupts() as interrupts:
        from rich.console import Console

        from runner import archive, environment, launch
        from runner.progress import log_stream
        from runner.provenance import checkout

        job = load()
        try:
            client, why = launch.place(where, job)
            say(f"running in {why}")
            kind = "process" if client is None else "docker"
            code = checkout(environment.CODE)
            _leave_if_asked(interrupts.numbers)
            stream = raw("stderr" if as_json else "stdout")
            steps = job.steps if verb == "train" else None
            with (
                archive.create(job, verb=verb, where=kind, runs=runs, code=code) as made,
                log_stream(stream, Console(stderr=as_json), steps=steps) as out,
            ):
                say(f"run directory: {made.path}")
                made.update(retry_of=retry_of)
                manifest = launch.launch(
                    made,
                    job,
                    client=client,
                    out=out,
                    say=say,
                    trainer=environment.TRAINER if world.trainer is None else world.trainer,
                    interrupts=interrupts,
                )
        except (launch.HostNotFit, OSError) as error:
            raise Refused(str(error)) from error
    return made, manifest


@main.command()
@_run_name
@_runs
@json_option
def show(*, name: str, runs: Path, as_json: bool) -> None:
    """Show a run: what ran, its steps, how it ended.

    RUN: a name, its beginning, the path of a run directory, or latest.

    \b
    headroom show latest
    """
    from runner import show as shown

    found, manifest = _settled(runs, name)
    data = shown.as_data(found, manifest)
    if as_json:
        print_json(data)
    else:
        shown.print_run(data, console())


@main.command()
@click.option("-n", "--number", default=10, show_default=True, help="Ended runs to list.")
@_runs
@json_option
def status(*, number: int, runs: Path, as_json: bool) -> None:
    """List what runs now and what ran last, as it truly is.

    Checked against this machine and Docker; the archive of a run whose runner was killed is
    finished here.

    \b
    headroom status --json
    """
    from runner import archive
    from runner import show as shown

    manifests: list[Manifest] = []
    for found in archive.all_runs(runs):
        manifest = _settle(found)
        ended = sum(m.exit_status is not None for m in manifests)
        if manifest is not None and (manifest.exit_status is None or ended < number):
            manifests.append(manifest)
    if as_json:
        print_json([m.model_dump(mode="json") for m in manifests])
    else:
        shown.print_list(manifests, console())


@main.command()
@_run_name
@click.option("-f", "--follow", is_flag=True, help="Go on until the run has ended.")
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only so many of the last lines.")
@_runs
def logs(*, name: str, follow: bool, lines: int | None, runs: Path) -> None:
    """Print a run's log, byte for byte.

    RUN: a name, its beginning, the path of a run directory, or latest.

    \b
    headroom logs latest -f -n 20
    """
    from runner.show import print_log

    found, _ = _with_log(runs, name)
    print_log(
        found.log_file,
        raw("stdout"),
        lines=lines,
        ended=(lambda: _is_over(found)) if follow else None,
    )


@main.command()
@_run_name
@_runs
@json_option
def cancel(*, name: str, runs: Path, as_json: bool) -> None:
    """Stop a run and finish its archive.

    SIGTERM first, SIGKILL after container.stop_grace_s.

    RUN: a name, its beginning, the path of a run directory, or latest.

    \b
    headroom cancel latest
    """
    from runner import show as shown
    from runner import status as state

    found, before = _settled(runs, name)
    over = before.exit_status is not None
    try:
        manifest = before if over else state.cancel(found)
    except state.CannotTellError as error:
        raise Refused(f"{found.name}: {error}") from error
    if as_json:
        print_json(manifest.model_dump(mode="json"))
    else:
        words = "had already ended" if over else "has been stopped"
        click.echo(f"{found.name} {words}: {shown.ending_text(manifest)}")


@main.command()
@click.argument("log", metavar="LOG|RUN|-")
@click.option("-f", "--follow", is_flag=True, help="Watch a growing log; say each new cause.")
@_runs
@json_option
def diagnose(*, log: str, follow: bool, runs: Path, as_json: bool) -> None:
    """Name the cause of a failed log: of a run, of any file, or of stdin.

    A job.json or plan.json beside the log (headroom plan JOB --json) gives the advice its numbers.

    \b
    headroom diagnose latest
    headroom diagnose old/run.log --json
    """
    from runner import conclude
    from runner.diagnose import diagnose as find_cause
    from runner.diagnose import follow as find_causes
    from runner.show import blocks

    # A file may be a pipe: `diagnose <(kubectl logs ...)`.
    known: dict[str, Any] = {}
    if log != "-" and (Path(log).is_dir() or not Path(log).exists()):
        try:
            found, manifest = _with_log(runs, log)
        except Refused as error:
            raise Refused(f"{log!r} is neither a file nor a run: {error}") from error
        if not follow:
            _print_diagnosis(conclude.explain(found, manifest), as_json=as_json)
            return
        stream = blocks(found.log_file, ended=lambda: _is_over(found))
    elif log == "-":
        stream = sys.stdin.buffer
    else:
        stream = blocks(Path(log), ended=(lambda: False) if follow else None)
        known = conclude.beside(Path(log).parent)
    for diagnosis in find_causes(stream) if follow else [find_cause(stream, **known)]:
        _print_diagnosis(diagnosis, as_json=as_json)


def _leave_if_asked(numbers: list[int]) -> None:
    """End as the first signal asks: nothing was made yet."""
    from runner.ending import signal_name

    if numbers:
        say(f"{signal_name(numbers[0])}: stopped before the run was made")
        sys.exit(128 + numbers[0])


def _with_log(runs: Path, name: str) -> tuple["RunDir", "Manifest"]:
    """As `_settled`, of a run whose log is there."""
    found, manifest = _settled(runs, name)
    if not found.log_file.is_file():
        raise Refused(f"{found.path} has no {found.log_file.name}: was it copied whole?")
    return found, manifest


def _settled(runs: Path, name: str) -> "tuple[RunDir, Manifest]":
    from runner import archive

    try:
        found = archive.find(runs, name)
        manifest = _settle(found)
        return found, manifest or found.manifest()
    except archive.NoSuchRunError as error:
        raise Refused(str(error)) from error


def _settle(found: "RunDir") -> "Manifest | None":
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


def _is_over(found: "RunDir") -> bool:
    manifest = _settle(found)
    return manifest is None or manifest.exit_status is not None


def _end(made: "RunDir", manifest: "Manifest", *, as_json: bool) -> int:
    """Say how the run ended and why, and give our exit code."""
    from runner import conclude, ending
    from runner import show as shown

    diagnosis = conclude.diagnosis_of(made)
    stop = made.read_json(made.stop_file)
    code = ending.runner_code(
        manifest, stop_signal=stop["signal"] if stop else None, diagnosis=diagnosis
    )
    try:
        if as_json:
            print_json(shown.as_data(made, manifest))
        else:
            if diagnosis is not None:
                _print_diagnosis(diagnosis, as_json=False)
            click.echo(f"run directory: {made.path}")
    except OSError:  # nobody reads any more, or where they read is full: the job ended as it did
        sys.stdout = None  # pyright: ignore[reportAttributeAccessIssue] - nor flush at the end
    return code


def _print_diagnosis(diagnosis: "Diagnosis", *, as_json: bool) -> None:
    from runner.diagnose import format_diagnosis

    click.echo(diagnosis.model_dump_json() if as_json else format_diagnosis(diagnosis))


main.add_command(plan)
main.add_command(fit)
