"""`headroom sweep`: many jobs from one file; which fit, which ran, what was measured."""

# ruff: noqa: PLC0415 - `headroom --help` must not wait for Docker's client and the like

import os
import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from runner.terminal import (
    Refused,
    World,
    console,
    json_option,
    pass_world,
    picture_errors,
    planner_errors,
    print_json,
    say,
    where_option,
)

if TYPE_CHECKING:
    from runner.sweep import SweepDir
    from runner.sweep_row import Sweep
    from runner.sweep_run import Share

_target = click.argument("target", metavar="FILE|DIR", type=click.Path(path_type=Path))
_out = click.option(
    "--out",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="The sweep's folder; sweeps/NAME when not given.",
)


def _planner_options[F: Callable[..., Any]](command: F) -> F:
    options = (
        click.option(
            "--parallel",
            type=click.IntRange(min=1),
            default=max(1, (os.cpu_count() or 1) // 2),
            show_default="half of the cores",
            metavar="N",
            help="Cells to plan at once.",
        ),
        click.option("--quick", is_flag=True, help="Plan by formulas, without the compiler."),
        click.option(
            "--engine-weights",
            type=click.Choice(["sharded", "replicated"]),
            default="sharded",
            show_default=True,
            help="As of headroom plan.",
        ),
        click.option(
            "--limit",
            type=click.FloatRange(min=0, min_open=True),
            default=900.0,
            show_default=True,
            help="Seconds for one plan.",
        ),
        click.option(
            "--every-cell",
            is_flag=True,
            help="Those cells, too, of which others tell by a monotone axis.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def sweep() -> None:
    """Plan and run many jobs from one file, and tell which fit.

    All is kept in the sweep's folder: a command that was killed goes on where it was. The form of
    the file is in docs/sweep.md.

    \b
    headroom sweep plan jobs/oom_sweep.yaml
    headroom sweep run jobs/oom_sweep.yaml --only sop_smoke
    headroom sweep report sweeps/oom_sweep --html sweep.html
    """


@sweep.command()
@_target
@_out
@json_option
def expand(*, target: Path, out: Path | None, as_json: bool) -> None:
    """Write a sweep's jobs into its folder.

    \b
    headroom sweep expand jobs/oom_sweep.yaml --out /tmp/oom
    """
    with _refusals(), _at_work(target, out) as found:
        if as_json:
            print_json(found.record.model_dump(mode="json"))
        else:
            click.echo(f"{len(found.record.cells)} cells in {found.path}")


@sweep.command()
@_target
@_out
@_planner_options
@json_option
@pass_world
def plan(world: World, *, target: Path, out: Path | None, as_json: bool, **planner: Any) -> None:
    """Plan every cell, several at once, and no more of them than needed.

    Exit codes: 0 some cell fits (or is without HBM, and no other has a plan), 1 refused, 2 usage,
    3 no cell fits, 5 the planner failed for all that it was asked.

    \b
    headroom sweep plan jobs/oom_sweep.yaml --parallel 4
    headroom sweep plan sweeps/oom_sweep --quick --json
    """
    with _refusals(), _at_work(target, out) as found:
        _plan(world, found, **planner)
        rows = _read(found)
        _show(rows, as_json=as_json)
    verdicts = {row.planned for row in rows.rows}
    if "fits" in verdicts or (None in verdicts and verdicts <= {None, "refused"}):
        sys.exit(0)
    sys.exit(5 if verdicts - {None, "refused"} == {"failed"} else 3)


@sweep.command()
@_target
@_out
@_planner_options
@click.option("--no-plan", is_flag=True, help="Plan nothing: take the plans that are there.")
@where_option
@click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change a key, on this host alone."
)
@click.option("--only", multiple=True, metavar="NAME", help="Run this cell; may be repeated.")
@click.option(
    "--again",
    multiple=True,
    metavar="NAME",
    help="Run this cell although it has run; may be repeated.",
)
@click.option("--share", metavar="K/N", help="Run the share of the Kth of N hosts, from 1.")
@click.option("--run-anyway", is_flag=True, help="Cells, too, that are planned not to fit.")
@json_option
@pass_world
def run(  # noqa: PLR0913 - click hands in each option by its name
    world: World,
    *,
    target: Path,
    out: Path | None,
    no_plan: bool,
    where: Literal["auto", "process", "docker"],
    sets: tuple[str, ...],
    only: tuple[str, ...],
    again: tuple[str, ...],
    share: str | None,
    run_anyway: bool,
    as_json: bool,
    **planner: Any,
) -> None:
    """Plan what has no plan, then run the cells that fit, one after the other.

    A cell that has run is not run again, one that was interrupted or lost is. Logs are in the
    cells' folders.

    Exit codes: 0 every cell has its result, 1 refused, 2 usage, 5 some cell has none, 130 and 143
    interrupted: given again, the command goes on.

    \b
    headroom sweep run jobs/oom_sweep.yaml --where docker
    headroom sweep run sweeps/oom_sweep --share 1/2 --no-plan
    """
    from runner import archive, launch, sweep_run
    from runner.sweep_lock import held
    from runner.watch import Interrupts

    asked = sweep_run.Asked(
        where=where,
        sets=sets,
        only=only,
        again=again,
        share=_share(share),
        run_anyway=run_anyway,
        every_cell=bool(planner["every_cell"]),
    )
    with _refusals(), _at_work(target, out) as found:
        try:
            with held(world.lock_of_sweeps(), "runs a sweep on this machine already"):
                names = sweep_run.check(found, asked)
                if not no_plan:
                    _plan(world, found, names=names, **planner)
                with Interrupts() as interrupts:
                    left = sweep_run.run(
                        found,
                        asked,
                        say=say,
                        trainer=world.program(),
                        interrupts=interrupts,
                        chips_lock=world.lock(),
                    )
        except (launch.HostNotFit, archive.NotFinishedError) as error:
            raise Refused(str(error)) from error
        except sweep_run.StoppedError as error:
            say(str(error))
            sys.exit(128 + error.number)
        _show(_read(found), as_json=as_json)
    if left:
        say(f"without a result: {', '.join(left)}; run the sweep again to go on")
    sys.exit(5 if left else 0)


@sweep.command()
@_target
@_out
@json_option
def status(*, target: Path, out: Path | None, as_json: bool) -> None:
    """Tell how far a sweep is.

    \b
    headroom sweep status sweeps/oom_sweep
    """
    from runner import sweep_table

    with _refusals():
        rows = _read(_found(target, out))
    states = {row.cell: _state(row.outcome, row.skipped, row.planned) for row in rows.rows}
    if as_json:
        print_json({"sweep": rows.name, "cells": states})
        return
    for cell, state in states.items():
        if state in ("running", "interrupted", "lost"):
            click.echo(f"{cell}: {state}")
    click.echo(f"{rows.name}: {sweep_table.summary(rows)}")


@sweep.command()
@_target
@_out
@click.option(
    "--csv", "csv_file", type=click.Path(path_type=Path, allow_dash=True), help="CSV; -: stdout."
)
@click.option("--html", type=click.Path(path_type=Path), help="A page of it, in one file.")
@json_option
def report(
    *, target: Path, out: Path | None, csv_file: Path | None, html: Path | None, as_json: bool
) -> None:
    """Tell of every cell what was planned, what came of it, and how far the plan was right.

    \b
    headroom sweep report sweeps/oom_sweep
    headroom sweep report sweeps/oom_sweep --csv - --html sweep.html
    """
    from runner import sweep_table
    from runner.archive import write_whole

    to_stdout = csv_file is not None and str(csv_file) == "-"
    if to_stdout and as_json:
        raise click.UsageError("--csv - and --json both write to stdout: name a file for one")
    with _refusals():
        rows = _read(_found(target, out))
        if html is not None:
            from runner.report import write_sweep

            with picture_errors():
                write_sweep(rows, html)
            say(f"page: {html}")
        if to_stdout:
            click.echo(sweep_table.csv_text(rows), nl=False)
            return
        if csv_file is not None:
            write_whole(csv_file, sweep_table.csv_text(rows))
        _show(rows, as_json=as_json)


@contextmanager
def _refusals() -> Generator[None]:
    """What a sweep refuses, as commands end with it."""
    from runner.sweep_file import SweepError

    try:
        yield
    except (SweepError, OSError) as error:
        raise Refused(str(error)) from error


def _found(target: Path, out: Path | None) -> "SweepDir":
    """The folder of a sweep that was expanded before, by it or by its file."""
    from runner import sweep as folder
    from runner.sweep_file import expand as read

    if target.is_dir():
        if out is not None:
            raise click.UsageError("--out is for a FILE: a folder is where it is")
        return folder.open_folder(target)
    return folder.open_folder(out or _folder_of(read(target).name))


def _folder_of(name: str) -> Path:
    return Path("sweeps") / name


@contextmanager
def _at_work(target: Path, out: Path | None) -> "Generator[SweepDir]":
    """The sweep's folder, held; of a file, expanded."""
    from runner import sweep as folder
    from runner.sweep_file import expand as read
    from runner.sweep_lock import held_folder

    if target.is_dir():
        found = _found(target, out)
        with held_folder(found.path):
            yield found
        return
    expanded = read(target)
    path = out or _folder_of(expanded.name)
    with held_folder(path):
        found, notes = folder.expand(expanded, path)
        for note in notes:
            say(note)
        yield found


def _plan(  # noqa: PLR0913 - the options of the planner
    world: World,
    found: "SweepDir",
    *,
    parallel: int,
    quick: bool,
    engine_weights: str,
    limit: float,
    every_cell: bool,
    names: "list[str] | None" = None,
) -> None:
    from runner import planning, sweep_plan
    from runner.watch import Interrupts

    how = planning.Asked(
        quick=quick, engine_weights=engine_weights, advice=False, what_if=False, limit_s=limit
    )
    asked = sweep_plan.Asked(how=how, parallel=parallel, every_cell=every_cell, names=names)
    with planner_errors(), Interrupts() as interrupts:
        sweep_plan.plan(found, asked, say=say, interrupts=interrupts, trainer=world.program())


def _read(found: "SweepDir") -> "Sweep":
    from runner import sweep_rows

    return sweep_rows.read(found)


def _show(rows: "Sweep", *, as_json: bool) -> None:
    from runner import sweep_table

    if as_json:
        print_json(rows.model_dump(mode="json"))
    else:
        sweep_table.print_table(rows, console())


def _share(text: str | None) -> "Share | None":
    from runner.sweep_run import Share

    if text is None:
        return None
    if not (found := re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)):
        raise click.UsageError(f"--share {text} is not of the form K/N, as 1/2")
    return Share(number=int(found[1]), of=int(found[2]))


def _state(outcome: str | None, skipped: str | None, planned: str | None) -> str:
    """How a cell stands, in a word."""
    if outcome is not None:
        return outcome
    return "skipped" if skipped is not None else "planned" if planned is not None else "open"
