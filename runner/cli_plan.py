"""`headroom plan`: does the job fit, who holds the memory, what would help."""

# ruff: noqa: PLC0415 - `headroom --help` must not wait for Docker's client and the like

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner.terminal import (
    World,
    console,
    json_option,
    limit_option,
    load_job,
    pass_world,
    picture_errors,
    planner_errors,
    print_json,
    say,
)

if TYPE_CHECKING:
    from jobs.records import MemoryPlan


@click.command()
@click.argument("job_file", metavar="JOB", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one key.")
@click.option("--from-env", is_flag=True, help="Take the SOP's variables (BATCH_SIZE, ...) too.")
@click.option("--accelerator", help="Plan for this TPU type, not the job's own.")
@click.option("--quick", is_flag=True, help="By arithmetic and formulas, without the compiler.")
@click.option(
    "--engine-weights",
    type=click.Choice(["sharded", "replicated"]),
    default="sharded",
    show_default=True,
    help="sglang-jax's embedding and head: as in the SOP's build, or as in PyPI's 0.0.2.",
)
@click.option("--no-advice", is_flag=True, help="Do not look for what would help.")
@click.option("--what-if", type=click.Choice(["accelerators"]), help="A line for each TPU type.")
@click.option("--png", type=click.Path(path_type=Path), help="Draw the ledger into this file.")
@click.option("--html", type=click.Path(path_type=Path), help="The same, with every number.")
@limit_option
@json_option
@pass_world
def plan(  # noqa: PLR0913 - click hands in each option by its name
    world: World,
    *,
    job_file: Path,
    overrides: tuple[str, ...],
    from_env: bool,
    accelerator: str | None,
    quick: bool,
    engine_weights: str,
    no_advice: bool,
    what_if: str | None,
    png: Path | None,
    html: Path | None,
    limit: float,
    as_json: bool,
) -> None:
    """Tell whether a job fits, before a TPU is booked.

    Compiles the very programs of the job for its TPU type, on this machine, as far as their memory
    is known, and adds up who holds the HBM of a chip in each phase.

    Exit codes: 0 fits, 1 refused, 2 usage, 3 does not fit, 5 the planner failed.

    \b
    headroom plan jobs/sop_bs32_len1024.yaml
    headroom plan jobs/smoke.yaml --accelerator v4-8 --set rollout.prompts_per_step=4
    headroom plan jobs/sop_smoke.yaml --quick --html plan.html
    """
    from runner import planning
    from runner.watch import Interrupts

    if what_if is not None and (png or html):
        raise click.UsageError("--png and --html draw one plan, --what-if makes many")
    own = () if accelerator is None else (f"accelerator={accelerator}",)
    job = load_job(job_file, (*overrides, *own), from_env=from_env)
    asked = planning.Asked(
        quick=quick,
        engine_weights=engine_weights,
        advice=not no_advice,
        what_if=what_if is not None,
        limit_s=limit,
    )
    with planner_errors(), Interrupts() as interrupts:
        plans = planning.plan(job, asked, say=say, interrupts=interrupts, trainer=world.program())
    _show(plans, as_json=as_json, what_if=asked.what_if)
    sets = [f"--set={one}" for one in (*overrides, *own)]
    sets += ["--from-env"] * from_env + ["--quick"] * quick
    sets += [f"--engine-weights={engine_weights}"] if engine_weights != "sharded" else []
    _draw(plans[0], png=png, html=html, job_file=job_file, sets=sets)
    fits = any(one.verdict == "fits" for one in plans)
    sys.exit(0 if fits else planning.DOES_NOT_FIT)


def _show(plans: "list[MemoryPlan]", *, as_json: bool, what_if: bool) -> None:
    from runner import plan_table

    if as_json:
        data = [one.model_dump(mode="json") for one in plans]
        print_json(data if what_if else data[0])
    elif what_if:
        plan_table.print_what_if(plans, console())
    else:
        plan_table.print_plan(plans[0], console())


def _draw(
    plan: "MemoryPlan", *, png: Path | None, html: Path | None, job_file: Path, sets: list[str]
) -> None:
    from runner import chart, report
    from runner.archive import write_whole

    with picture_errors():
        if png is not None:
            write_whole(png, chart.plan_png(plan))
        if html is not None:
            command = shlex.join(["headroom", "plan", str(job_file), *sets])
            row = report.planned_row(plan, job_file=str(job_file), command=command)
            report.write_run(row, html)
