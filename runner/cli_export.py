"""`headroom export`: a run's checkpoint as a Hugging Face folder."""

# ruff: noqa: PLC0415 - `headroom --help` must not wait for Docker's client and the like

from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner.terminal import (
    Refused,
    World,
    json_option,
    pass_world,
    planner_errors,
    print_json,
    run_name,
    runs_option,
    say,
    settled,
)

if TYPE_CHECKING:
    from jobs.spec import Job
    from runner.archive import RunDir

_LIMIT_S = 6 * 3600.0


@click.command()
@run_name
@click.option("--to", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="This one of its checkpoints; else the newest.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="bfloat16: the weights that were sampled with; float32: the exact masters.",
)
@runs_option
@json_option
@pass_world
def export(  # noqa: PLR0913 - click hands in each option by its name
    world: World,
    *,
    name: str,
    to: Path,
    checkpoint: Path | None,
    dtype: str,
    runs: Path,
    as_json: bool,
) -> None:
    """Write a checkpoint of a run as a Hugging Face folder.

    config.json, weights in safetensors and the tokenizer's files, as transformers, vLLM and sglang
    read them, and `model:` of a job. The folder appears whole, and must not be there. It is made on
    this machine's CPU, by the trainer beside this runner; the model's own files are read for its
    tokenizer.

    RUN: a name, its beginning, the path of a run directory, or latest.

    Exit codes: 0 done, 1 refused, 2 usage, 5 failed.

    \b
    headroom export latest --to models/mine
    headroom export latest --to models/mine-f32 --dtype float32
    """
    from jobs.aftermath import EXPORT_FILE, Export
    from jobs.records import gib
    from runner import planning
    from runner.watch import Interrupts

    found, _ = settled(runs, name)
    source = found.newest_checkpoint() if checkpoint is None else checkpoint.absolute()
    if source is None:
        raise Refused(f"{found.name} has no checkpoint: run its job with checkpoint.every_steps")
    job = _job_of(found)
    options = ["--to", str(to.absolute()), "--checkpoint", str(source), "--dtype", dtype]
    program = [*world.program(), "export"]
    with planner_errors(), Interrupts() as interrupts:
        text = planning.child(
            job,
            lambda file: [*program, str(file), *options],
            EXPORT_FILE,
            _LIMIT_S,
            say=say,
            interrupts=interrupts,
            what="export",
        )
    made = Export.model_validate_json(text)
    if as_json:
        print_json(made.model_dump(mode="json"))
        return
    click.echo(
        f"{made.folder}: {made.model} after {made.steps} steps, {gib(made.weights_bytes)} of "
        f"{made.dtype} in {len(made.files)} file{'' if len(made.files) == 1 else 's'}"
    )


def _job_of(found: "RunDir") -> "Job":
    """A job of the run's model and nothing else: its data may have moved since."""
    from jobs.spec import Job

    record = found.read_json(found.job_file) or {}
    if not isinstance(model := record.get("model"), str):
        raise Refused(f"{found.job_file} cannot be read: it names no model")
    return Job(name="export", accelerator="cpu", model=model)
