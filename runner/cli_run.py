"""`headroom run`: a job to its end, again where that may help, on from where it was.

stdout is the log, or with --json the record; stderr what a person should know.
"""

# ruff: noqa: PLC0415 - `headroom --help` must not wait for Docker's client and the like

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from runner.terminal import (
    Refused,
    World,
    json_option,
    load_job,
    pass_world,
    planner_errors,
    print_diagnosis,
    print_json,
    raw,
    runs_option,
    say,
    settled,
    where_option,
)

if TYPE_CHECKING:
    from jobs.records import ExitStatus, Manifest, MemoryPlan
    from jobs.spec import Job
    from runner.archive import RunDir

OTHER_THAN_PLANNED = 4


@click.command()
@click.argument("job_file", metavar="[JOB]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--resume",
    metavar="RUN",
    help="Instead of JOB: go on with a run from its newest checkpoint.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one key.")
@click.option("--from-env", is_flag=True, help="Take the SOP's variables (BATCH_SIZE, ...) too.")
@where_option
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
    "--preemptions",
    type=click.IntRange(min=0),
    default=0,
    metavar="M",
    help="Go on at once, up to M times, after a preemption; they count for nothing else.",
)
@click.option(
    "--refit",
    is_flag=True,
    help="Out of HBM: find a setting that fits (headroom fit) and run that, once.",
)
@click.option(
    "--strict-plan",
    is_flag=True,
    help="Plan first, run only what fits, and fail where a chip differs from the plan by more than "
    "--tolerance.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0.0, max=1024.0),
    default=0.25,
    show_default=True,
    metavar="GIB",
    help="Of --strict-plan.",
)
@runs_option
@json_option
@pass_world
def run(  # noqa: PLR0913 - click hands in each option by its name
    world: World,
    *,
    job_file: Path | None,
    resume: str | None,
    overrides: tuple[str, ...],
    from_env: bool,
    where: Literal["auto", "process", "docker"],
    verb: str,
    retries: int,
    preemptions: int,
    refit: bool,
    strict_plan: bool,
    tolerance: float,
    runs: Path,
    as_json: bool,
) -> None:
    """Run a job to its end; its log streams here and is archived.

    With --retries every attempt is a run of its own. What would only fail again is not tried again:
    a job that ran out of HBM, whatever must be cleaned up first, a mistake in the job. With --refit
    a job that ran out of HBM is run once more, in a setting that fits. With --preemptions a run
    that ended by the cloud's notice goes on at once, or after a while where it had done no step.

    With --resume a run goes on, as a run of its own, from its newest checkpoint; its job must have
    set checkpoint.every_steps. So does a retry. Later steps are done again, alike.

    Exit codes: 0 done, 1 refused, 2 usage, 3 planned not to fit, 4 failed with a known cause (or,
    with --strict-plan, other than planned), 5 with an unknown one, 130 and 143 interrupted, 143
    preempted.

    \b
    headroom run jobs/smoke.yaml --set steps=3 --where process
    headroom run jobs/smoke.yaml --retries 3 --preemptions 20 --refit
    headroom run --resume latest --set steps=100
    """
    from runner.conclude import diagnosis_of
    from runner.retry import Budget, again

    if strict_plan and verb != "train":
        raise click.UsageError("--strict-plan plans the training: leave --verb out.")
    job_file, overrides, before = _asked(runs, job_file, resume, overrides, from_env=from_env)
    load = partial(load_job, job_file, overrides, from_env=from_env)
    attempt = partial(
        _attempt,
        world,
        where=where,
        verb=verb,
        runs=runs,
        as_json=as_json,
        strict=strict_plan,
    )
    made, manifest = attempt(load, retry_of=before)
    budget = Budget(retries=retries, preemptions=preemptions)
    while then := again(
        manifest,
        diagnosis_of(made),
        budget=budget,
        progress=_did_a_step(made),
        stopped=made.stop_file.exists(),
    ):
        anew = "" if _go_on(made) else ", from the beginning: it left no checkpoint"
        say(f"{made.name}: {then.why}; again in {then.after_s:g} s{anew} (Ctrl-C: no more)")
        world.pause(then.after_s)
        budget = then.left
        # As it was first read: the file may be another by now.
        load = partial(load_job, made.job_file, _go_on(made), from_env=False)
        made, manifest = attempt(load, retry_of=made.name)
    diagnosis = diagnosis_of(made)
    if refit and diagnosis is not None and diagnosis.retry == "after_refit":
        say(f"{made.name}: {diagnosis.cause}; looking for a setting that fits")
        if (fitted := _refitted(world, made)) is not None:
            if _go_on(made):
                say("it begins anew: a checkpoint goes on with the settings that it was made with")
            load = partial(load_job, fitted, ("checkpoint.resume=null",), from_env=False)
            made, manifest = attempt(load, retry_of=made.name)
    code = _end(made, manifest, as_json=as_json)
    sys.exit(code or (_held_to_plan(made, manifest, tolerance) if strict_plan else 0))


def _asked(
    runs: Path,
    job_file: Path | None,
    resume: str | None,
    overrides: tuple[str, ...],
    *,
    from_env: bool,
) -> tuple[Path, tuple[str, ...], str | None]:
    """The job file and settings to begin with, and the run that goes on, if one does."""
    if resume is not None:
        if job_file is not None or from_env:
            raise click.UsageError("--resume has the run's own job: leave JOB and --from-env out.")
        return _resumed(runs, resume, overrides)
    if job_file is None:
        raise click.UsageError("Name a JOB, or --resume RUN.")
    return job_file, overrides, None


def _resumed(
    runs: Path, name: str, overrides: tuple[str, ...]
) -> tuple[Path, tuple[str, ...], str]:
    """The job of a run that has ended, what it is to go on with, and the run's name."""
    found, manifest = settled(runs, name)
    if manifest.exit_status is None:
        raise Refused(f"{found.name} still runs: headroom cancel {found.name} first")
    go_on = _go_on(found)
    if not go_on:
        raise Refused(
            f"{found.name} left no checkpoint to go on from: set checkpoint.every_steps in its "
            f"job, and run that anew"
        )
    return found.job_file, (*go_on, *overrides), found.name


def _go_on(run: "RunDir") -> tuple[str, ...]:
    """The setting with which a run goes on where it was; none where it left no checkpoint.

    One that went on itself, and left none of its own, goes on from where it began.
    """
    job = run.read_json(run.job_file) or {}
    newest = run.newest_checkpoint() or job.get("checkpoint", {}).get("resume")
    return () if newest is None else (f"checkpoint.resume={newest}",)


def _did_a_step(run: "RunDir") -> bool:
    return run.steps_file.is_file() and run.steps_file.stat().st_size > 0


def _refitted(world: World, made: "RunDir") -> Path | None:
    from runner import refit

    with planner_errors():
        return refit.refit(made, say=say, trainer=world.program())


def _attempt(  # noqa: PLR0913 - the options of `run`
    world: World,
    load: Callable[[], "Job"],
    *,
    where: Literal["auto", "process", "docker"],
    verb: str,
    runs: Path,
    as_json: bool,
    strict: bool,
    retry_of: str | None,
) -> tuple["RunDir", "Manifest"]:
    """One run, from its job to its end."""
    from runner.watch import Interrupts

    plan = _plan_that_fits(world, load()) if strict else None

    # Before anything is made: from here on a signal ends in an exit status.
    with Interrupts() as interrupts:
        from rich.console import Console

        from jobs.records import PLAN_FILE
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
                if plan is not None:
                    archive.write_whole(
                        made.path / PLAN_FILE, plan.model_dump_json(indent=2) + "\n"
                    )
                manifest = launch.launch(
                    made,
                    job,
                    client=client,
                    out=out,
                    say=say,
                    trainer=world.program(),
                    interrupts=interrupts,
                    chips_lock=world.lock(),
                )
        except archive.NotFinishedError as error:
            say(f"Error: {error}")
            sys.exit(_code_of(error.run, error.status))
        except (launch.HostNotFit, OSError) as error:
            raise Refused(str(error)) from error
    return made, manifest


def _plan_that_fits(world: World, job: "Job") -> "MemoryPlan":
    """The plan; the command ends where there is none, or it does not fit."""
    from runner import strict
    from runner.planning import DOES_NOT_FIT

    try:
        with planner_errors():
            return strict.planned(job, say=say, trainer=world.program())
    except strict.PlanDoesNotFitError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(DOES_NOT_FIT)


def _held_to_plan(made: "RunDir", manifest: "Manifest", tolerance_gib: float) -> int:
    """Our exit code for a run that is done: was the plan right?"""
    from runner import conclude, measured, strict

    plan = measured.plan_of(made, manifest)
    rows = measured.compare(plan, made, conclude.diagnosis_of(made)) if plan is not None else []
    wrong = strict.differences(rows, tolerance_gib=tolerance_gib)
    for line in wrong:
        click.echo(f"Error: {line}", err=True)
    return OTHER_THAN_PLANNED if wrong else 0


def _leave_if_asked(numbers: list[int]) -> None:
    """End as the first signal asks: nothing was made yet."""
    from runner.ending import signal_name

    if numbers:
        say(f"{signal_name(numbers[0])}: stopped before the run was made")
        sys.exit(128 + numbers[0])


def _code_of(made: "RunDir", status: "ExitStatus | None") -> int:
    from jobs.records import Manifest
    from runner import conclude, ending

    stop = made.read_json(made.stop_file)
    return ending.runner_code(
        Manifest.model_construct(exit_status=status),
        stop_signal=stop["signal"] if stop else None,
        diagnosis=conclude.diagnosis_of(made),
    )


def _end(made: "RunDir", manifest: "Manifest", *, as_json: bool) -> int:
    """Say how the run ended and why, and give our exit code."""
    from runner import conclude

    diagnosis = conclude.diagnosis_of(made)
    code = _code_of(made, manifest.exit_status)
    try:
        if as_json:
            from runner.show import as_data

            print_json(as_data(made, manifest))
        else:
            if diagnosis is not None:
                print_diagnosis(diagnosis, as_json=False)
            click.echo(f"run directory: {made.path}")
            if code and _go_on(made):
                say(f"it can go on: headroom run --resume {made.name}")
    except OSError:  # nobody reads any more, or where they read is full: the job ended as it did
        sys.stdout = None  # pyright: ignore[reportAttributeAccessIssue] - nor flush at the end
    return code
