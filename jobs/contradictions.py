"""What single values cannot tell: values of a job that do not go together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jobs.source import Problem

if TYPE_CHECKING:
    from jobs.accelerators import Accelerator
    from jobs.spec import Job


def contradictions(job: Job) -> list[Problem]:
    """Every contradiction between the values of a job, an unknown accelerator among them."""
    found = [*_data_contradictions(job), *_engine_contradictions(job)]
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
    found: list[Problem] = []
    sequences, r, m = job.sequences_per_step, job.rollout, job.mesh
    product = f"rollout.prompts_per_step {r.prompts_per_step} x rollout.group_size {r.group_size}"
    batch_keys = ("rollout.prompts_per_step", "rollout.group_size")
    micro = job.micro_batch_size
    if sequences % micro:
        found.append(
            Problem(
                "train.micro_batch_size",
                micro,
                f"does not divide the {sequences} sequences of a step ({product}); "
                f"use one of {_divisors(sequences)}",
                others=batch_keys,
            )
        )
    taken = m.dp * m.tp * (m.fsdp or 1)
    if target.devices % taken or (m.fsdp is not None and taken != target.devices):
        shape = f"dp {m.dp} x fsdp {m.fsdp or 'rest'} x tp {m.tp}"
        return [
            *found,
            Problem(
                "mesh",
                shape,
                f"does not make the {target.devices} devices of {target.name}; change mesh.dp, "
                "mesh.fsdp or mesh.tp",
                others=("mesh.dp", "mesh.fsdp", "mesh.tp", "accelerator"),
            ),
        ]
    dp, fsdp, _ = job.mesh_shape
    shards = dp * fsdp
    key, value = (
        ("train.micro_batch_size", micro)
        if job.train.micro_batch_size is not None
        else ("rollout.prompts_per_step", r.prompts_per_step)
    )
    if micro % shards:
        found.append(
            Problem(
                key,
                value,
                f"makes micro-batches of {micro} sequences ({product}), which cannot be shared out "
                f"over {shards} devices (mesh dp {dp} x fsdp {fsdp}): use a multiple of {shards}",
                others=(*batch_keys, "train.micro_batch_size", "mesh.dp", "mesh.fsdp", "mesh.tp"),
            )
        )
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
