"""Each program of a job, lowered for its TPU and not run: those that `train.py` calls."""

from functools import partial
from typing import Any

import jax

from jobs.spec import Job
from trainer.ahead import described_devices
from trainer.architecture import Architecture
from trainer.mesh import make_mesh
from trainer.rollout import programs
from trainer.train import _reference_params as reference_params
from trainer.update.masters import Split
from trainer.update.program import make_update


def lowered(job: Job, architecture: Architecture, program: str) -> Any:
    """A program of `ledger.programs_of`, lowered (`jax.stages.Lowered`).

    Raises:
        Refusal: it cannot be made for those shapes, or that accelerator.
    """
    devices = described_devices(job.target)
    mesh = make_mesh(job, devices)
    if program == "sampler":
        return programs.lowered_sampler(job, architecture, mesh)
    if program in ("engine_prefill", "engine_decode"):
        from trainer.rollout.sglang import ahead  # noqa: PLC0415 - seconds, and the engine's package

        held = residents(job, architecture, build=build).engine
        tokens = held.pool.tokens if held else 0
        engine = ahead.Engine(job, architecture, devices, build=build)
        return engine.lowered(prefill=program == "engine_prefill", pool_tokens=max(1, tokens))
    update = make_update(job, architecture, mesh)
    if program == "update":
        return update.lower()
    params = update.params(update.abstract)
    if program == "logprobs":
        return update.lower_logprobs(params)
    if program == "reference_logprobs":
        return update.lower_logprobs(frozen(job, params))
    return _of_weights(job, architecture, params, program)


def frozen(job: Job, params: Any) -> Any:
    """The frozen policy's parameters as shapes, each where the policy's lies."""
    made = jax.eval_shape(partial(reference_params, job), params)
    is_split = lambda leaf: isinstance(leaf, Split)
    where = jax.tree.map(
        lambda leaf: (leaf.hi if is_split(leaf) else leaf).sharding, params, is_leaf=is_split
    )
    put = lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)
    return jax.tree.map(put, made, where)
