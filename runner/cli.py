"""The command `headroom`: each subcommand parses, calls one function, and prints.

stdout is the result, stderr the progress; `--json` is for programs.
"""

# ruff: noqa: PLC0415 - `headroom --help` must not wait for Docker's client and the like

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runner.cli_export import export
from runner.cli_fit import fit
from runner.cli_plan import plan
from runner.cli_run import run
from runner.cli_sweep import sweep
from runner.terminal import (
    Refused,
    console,
    json_option,
    picture_errors,
    print_diagnosis,
    print_json,
    raw,
    run_name,
    runs_option,
    say,
    settle,
    settled,
)

if TYPE_CHECKING:
    from jobs.records import Manifest
    from runner.archive import RunDir


_INTERRUPTED = 130  # 128 + SIGINT


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
@run_name
@click.option("--html", type=click.Path(path_type=Path), help="Write it as one page, too.")
@runs_option
@json_option
def show(*, name: str, html: Path | None, runs: Path, as_json: bool) -> None:
    """Show a run: what ran, its steps, how it ended.

    RUN: a name, its beginning, the path of a run directory, or latest.

    \b
    headroom show latest
    headroom show latest --html run.html
    """
    from runner import show as shown

    found, manifest = settled(runs, name)
    if html is not None:
        from runner import report, run_row

        with picture_errors():
            report.write_run(run_row.row_of(found, manifest), html)
    data = shown.as_data(found, manifest)
    if as_json:
        print_json(data)
    else:
        shown.print_run(data, console())


@main.command()
@click.option("-n", "--number", default=10, show_default=True, help="Ended runs to list.")
@runs_option
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
        manifest = settle(found)
        ended = sum(m.exit_status is not None for m in manifests)
        if manifest is not None and (manifest.exit_status is None or ended < number):
            manifests.append(manifest)
    if as_json:
        print_json([m.model_dump(mode="json") for m in manifests])
    else:
        shown.print_list(manifests, console())


@main.command()
@run_name
@click.option("-f", "--follow", is_flag=True, help="Go on until the run has ended.")
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only so many of the last lines.")
@runs_option
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
@run_name
@runs_option
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

    found, before = settled(runs, name)
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
@runs_option
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
            print_diagnosis(conclude.explain(found, manifest), as_json=as_json)
            return
        stream = blocks(found.log_file, ended=lambda: _is_over(found))
    elif log == "-":
        stream = sys.stdin.buffer
    else:
        stream = blocks(Path(log), ended=(lambda: False) if follow else None)
        known = conclude.beside(Path(log).parent)
    for diagnosis in find_causes(stream) if follow else [find_cause(stream, **known)]:
        print_diagnosis(diagnosis, as_json=as_json)


@main.command()
@run_name
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Of the jobs that will be planned; their default cache_dir when not given.",
)
@runs_option
@json_option
def calibrate(*, name: str, cache_dir: Path | None, runs: Path, as_json: bool) -> None:
    """Compare a run's HBM with its plan, and let later plans count on what it measured.

    `headroom run` does so by itself at the end of each run on real chips; this is for a run that
    was fetched from another machine. Plans use the newest run of their accelerator and libtpu.

    RUN: a name, its beginning, the path of a run directory, or latest.

    \b
    headroom calibrate fetched/20260119-084640-sop/my-tpu-w0/runs/20260119-084640-sop-15154fc
    """
    from jobs.records import HBM_FILE
    from jobs.spec import DEFAULT_CACHE_DIR
    from runner import conclude, measured
    from runner import show as shown

    found, manifest = settled(runs, name)
    plan = measured.plan_of(found, manifest)
    rows = measured.compare(plan, found, conclude.diagnosis_of(found)) if plan is not None else []
    cache_dir = cache_dir or Path(DEFAULT_CACHE_DIR).expanduser()
    taught = measured.calibration(found, manifest)
    if taught is None and not rows:
        raise Refused(
            f"{found.name} measured no HBM that could be compared: it has no samples of a TPU "
            f"({HBM_FILE}), or no plan of its job"
        )
    if as_json:
        print_json([row.model_dump(mode="json") for row in rows])
    else:
        shown.print_measured(rows, console())
    if taught is None:
        return
    try:
        kept = measured.keep(taught, cache_dir)
    except OSError as error:
        raise Refused(f"what it measured is not kept: {error}; see --cache-dir") from error
    say(
        f"plans for {kept.accelerator} by libtpu {kept.libtpu} count on {kept.run}"
        + ("" if kept == taught else ", which is later")
    )


def _with_log(runs: Path, name: str) -> tuple["RunDir", "Manifest"]:
    """As `settled`, of a run whose log is there."""
    found, manifest = settled(runs, name)
    if not found.log_file.is_file():
        raise Refused(f"{found.path} has no {found.log_file.name}: was it copied whole?")
    return found, manifest


def _is_over(found: "RunDir") -> bool:
    manifest = settle(found)
    return manifest is None or manifest.exit_status is not None


for command in (run, plan, fit, export, sweep):
    main.add_command(command)
