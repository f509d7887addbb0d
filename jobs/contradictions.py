"""What single values cannot tell: values of a job that do not go together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.source import Problem

if TYPE_CHECKING:
    from jobs.accelerators import Accelerator
    from jobs.spec import Job

BIND = re.compile(r"(/[^:]*):(/[^:]*)(?::(ro|rw))?", re.DOTALL)  # source, target, ro or rw


def contradictions(job: Job) -> list[Problem]:
    """Every contradiction between the values of a job, an unknown accelerator among them."""
    found = [*_data_contradictions(job), *_engine_contradictions(job), *_bind_contradictions(job)]
    resume = job.checkpoint.resume
    if resume is not None and not Path(resume).is_dir():
        text = "is not a folder that can be read from here"
        found.append(Problem("checkpoint.resume", resume, text))
    try:
        target = job.target
    except KeyError as error:
        unknown = f"is no accelerator we know; {error.args[0]}"
        return [*found, Problem("accelerator", job.accelerator, unknown)]
    return [*found, *_batch_contradictions(job, target), *_length_contradictions(job)]


def _data_contradictions(job: Job) -> list[Problem]:
    found: list[Problem] = []
    if job.data.path is not None and job.data.source is not None:
        found.append(
            Problem(
                "data.source",
                job.data.source,
                f"contradicts data.path = {job.data.path}: leave one out",
                others=("data.path",),
            )
        )
    for key, path in (("data.path", job.data.path), ("evaluation.path", job.evaluation.path)):
        if path is not None and not Path(path).is_file():
            found.append(Problem(key, path, "is not a file that can be read from here"))
    d = job.data
    if d.path is not None and d.rows != type(d).model_fields["rows"].default:
        text = "counts the rows that are made, and data.path reads a file: leave one out"
        found.append(Problem("data.rows", d.rows, text, others=("data.path",)))
    wanted = job.eval_every_steps > 0
    if wanted and job.data.path is not None and job.evaluation.path is None:
        found.append(
            Problem(
                "eval_every_steps",
                job.eval_every_steps,
                "evaluates on rows that are not trained on, and data.path has no test split: "
                "set evaluation.path to a file of other rows",
                others=("data.path", "evaluation.path"),
            )
        )
    return found


def _batch_contradictions(job: Job, target: Accelerator) -> list[Problem]:
    m = job.mesh
    taken = m.dp * m.tp * (m.fsdp or 1)
    if target.devices % taken or (m.fsdp is not None and taken != target.devices):
        shape = f"dp {m.dp} x fsdp {m.fsdp or 'rest'} x tp {m.tp}"
        return [
            Problem(
                "mesh",
                shape,
                f"does not make the {target.devices} devices of {target.name}; change mesh.dp, "
                "mesh.fsdp or mesh.tp",
                others=("mesh.dp", "mesh.fsdp", "mesh.tp", "accelerator"),
            )
        ]
    return [*_sharing_contradictions(job), *_design_contradictions(job, target)]


def _sharing_contradictions(job: Job) -> list[Problem]:
    """Sequences that do not divide into micro-batches, and those over the devices."""
    r, sequences, micro = job.rollout, job.sequences_per_step, job.train.micro_batch_size
    product = f"rollout.prompts_per_step {r.prompts_per_step} x rollout.group_size {r.group_size}"
    dp, fsdp, _ = job.mesh_shape
    unit = dp * fsdp * job.sequences_per_row
    shared = f"{dp * fsdp} devices (mesh dp {dp} x fsdp {fsdp})"
    if job.sequences_per_row > 1:
        shared += f" in rows of {job.sequences_per_row} (update.completions_per_row group)"
    others = ("rollout.prompts_per_step", "rollout.group_size", "mesh.dp", "mesh.fsdp", "mesh.tp")
    problems: list[str] = []
    if micro is None:
        if sequences % unit:
            text = (
                f"makes {sequences} sequences a step ({product}), which cannot be shared out over "
                f"{shared}: use a multiple of {unit}"
            )
            return [Problem("rollout.prompts_per_step", r.prompts_per_step, text, others=others)]
        return []
    if sequences % micro:
        problems.append(
            f"does not divide the {sequences} sequences of a step ({product}); "
            f"use one of {_divisors(sequences)}"
        )
    if micro % unit:
        problems.append(f"cannot be shared out over {shared}: use a multiple of {unit}")
    return [Problem("train.micro_batch_size", micro, text, others=others) for text in problems]


def _design_contradictions(job: Job, target: Accelerator) -> list[Problem]:
    """Options of the update that the design or the accelerator does not have."""
    u, m = job.update, job.mesh
    found: list[Problem] = []
    if u.design == "layer_major" and (m.dp, m.tp) != (1, 1):
        found.append(
            Problem(
                "update.design",
                u.design,
                f"shares its state out over all devices, and mesh is dp {m.dp} x tp {m.tp}: leave "
                "mesh.dp and mesh.tp at 1, or use update.design reference",
                others=("mesh.dp", "mesh.tp"),
            )
        )
    of_other_design = (
        ("moments", "completions_per_row", "host_offload", "attention")
        if u.design == "reference"
        else ("remat",)
    )
    other = "layer_major" if u.design == "reference" else "reference"
    for key in of_other_design:
        value = getattr(u, key)
        if value != type(u).model_fields[key].default:
            text = f"is an option of update.design {other}"
            found.append(Problem(f"update.{key}", value, text, others=("update.design",)))
    if target.platform != "tpu":
        text = f"needs a TPU, and accelerator = {target.name}"
        others = ("accelerator",)
        if u.host_offload:
            offload = ", ".join(u.host_offload)
            found.append(Problem("update.host_offload", offload, text, others=others))
        if u.attention == "splash":
            found.append(Problem("update.attention", u.attention, text, others=others))
    return found


def _engine_contradictions(job: Job) -> list[Problem]:
    e, needed = job.engine, job.max_sequence_tokens
    found: list[Problem] = []
    if job.rollout.engine != "sglang_jax":
        return found
    if e.context_length is not None and e.context_length < needed:
        found.append(
            Problem(
                "engine.context_length",
                e.context_length,
                f"is shorter than the {needed} tokens of a sequence (rollout.max_prompt_tokens "
                f"{job.rollout.max_prompt_tokens} + rollout.max_completion_tokens "
                f"{job.rollout.max_completion_tokens}): use at least {needed}",
                others=("rollout.max_prompt_tokens", "rollout.max_completion_tokens"),
            )
        )
    if e.max_total_tokens is not None and e.max_total_tokens < needed:
        found.append(
            Problem(
                "engine.max_total_tokens",
                e.max_total_tokens,
                f"is a KV pool too small for one sequence of {needed} tokens: sglang-jax 0.0.2 "
                f"would cut completions short or hang; use at least {needed}",
                others=("rollout.max_prompt_tokens", "rollout.max_completion_tokens"),
            )
        )
    return found


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _bind_contradictions(job: Job) -> list[Problem]:
    return [
        Problem("container.binds", bind, "is not of the form /host/folder:/inside, or with :ro")
        for bind in job.container.binds
        if not BIND.fullmatch(bind)
    ]


def _length_contradictions(job: Job) -> list[Problem]:
    """Sequences are numbered in 31 bits: their numbers choose the noise of sampling."""
    sequences = job.steps * job.sequences_per_step
    if sequences < 2**31:
        return []
    text = f"makes {sequences} sequences; at most 2147483647 can be numbered: take fewer steps"
    return [Problem("steps", job.steps, text, others=("rollout.prompts_per_step",))]
