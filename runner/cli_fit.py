"""`headroom fit`: the fastest setting of a job that fits, written as a job."""

# ruff: noqa: PLC0415 - `headroom --help` must not wait for Docker's client and the like

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner.terminal import (
    Refused,
    World,
    console,
    json_option,
    limit_option,
    load_job,
    pass_world,
    planner_errors,
    print_json,
    say,
)

if TYPE_CHECKING:
    from jobs.records import Fit


@click.command()
@click.argument("job_file", metavar="JOB", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one key.")
@click.option("--accelerator", help="Fit this TPU type, not the job's own.")
@click.option("--margin", default=1.0, show_default=True, help="GiB of a chip to leave free.")
@click.option("--exact", is_flag=True, help="Change nothing that alters the mathematics.")
@click.option("--quick", is_flag=True, help="By formulas alone, without the compiler.")
@click.option(
    "--engine-weights",
    type=click.Choice(["sharded", "replicated"]),
    default="sharded",
    show_default=True,
    help="sglang-jax's embedding and head: as in the SOP's build, or as in PyPI's 0.0.2.",
)
@limit_option
@click.option("--out", type=click.Path(path_type=Path), help="The file to write; JOB.fit.yaml.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@json_option
@pass_world
def fit(  # noqa: PLR0913 - click hands in each option by its name
    world: World,
    *,
    job_file: Path,
    overrides: tuple[str, ...],
    accelerator: str | None,
    margin: float,
    exact: bool,
    quick: bool,
    engine_weights: str,
    limit: float,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Find the fastest setting of a job that fits, and write it as a job.

    Times are a model's, never measured. What is found is planned as `headroom plan` plans, and
    written to JOB.fit.yaml with a comment beside each changed key.

    Exit codes: 0 found, 1 refused, 2 usage, 3 nothing fits, 5 the planner failed.

    \b
    headroom fit jobs/sop_bs32_len1024.yaml --margin 12
    headroom fit jobs/sop_bs32_len1024.yaml --accelerator v5e-8 --exact --out mine.yaml
    """
    from runner import fit_file, planning
    from runner.watch import Interrupts

    own = () if accelerator is None else (f"accelerator={accelerator}",)
    job = load_job(job_file, (*overrides, *own), from_env=False)
    file = out or fit_file.fit_file_of(job_file)
    if margin < 0:
        raise Refused(f"--margin {margin:g} is less than nothing: use 0 or more GiB")
    asked = planning.FitAsked(
        margin_gib=margin, exact=exact, quick=quick, engine_weights=engine_weights, limit_s=limit
    )
    try:
        fit_file.check(file, force=force)  # before minutes of work
        with planner_errors():
            with Interrupts() as interrupts:
                found = planning.fit(
                    job, asked, say=say, interrupts=interrupts, trainer=world.program()
                )
            if found.plan is not None:
                fit_file.write(job_file, (*overrides, *own), found, to=file, force=force)
                say(f"wrote {file}")
    except fit_file.FitFileError as error:
        raise Refused(str(error)) from error
    _print(found, as_json=as_json)
    sys.exit(planning.DOES_NOT_FIT if found.plan is None else 0)


def _print(found: "Fit", *, as_json: bool) -> None:
    from runner import fit_table

    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        fit_table.print_fit(found, console())
