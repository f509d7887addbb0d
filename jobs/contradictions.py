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
    try:
        target = job.target
    except KeyError as error:
        unknown = f"is no accelerator we know; {error.args[0]}"
        return [*found, Problem("accelerator", job.accelerator, unknown)]
    return [*found, *_batch_contradictions(job, target)]


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
    if u.design == "reference":
        found += [
            Problem(f"update.{key}", value, "is an option of update.design layer_major")
            for key, value, default in (
                ("moments", u.moments, "bfloat16"),
                ("layers", u.layers, "stacked"),
                ("completions_per_row", u.completions_per_row, "one"),
                ("host_offload", ", ".join(u.host_offload), ""),
                ("attention", u.attention, "auto"),
            )
            if value != default
        ]
    if target.platform != "tpu":
        text = f"needs a TPU, and accelerator = {target.name}"
        if u.host_offload:
            found.append(Problem("update.host_offload", ", ".join(u.host_offload), text))
        if u.attention == "splash":
            found.append(Problem("update.attention", u.attention, text))
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
