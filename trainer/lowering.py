"""Each program of a job, lowered for its TPU and not run: those that `train.py` calls."""

from functools import partial
from typing import Any

import jax

from jobs.spec import Job
from trainer.ahead import CompileError, described_devices
from trainer.architecture import Architecture
from trainer.budget import EngineBuild
from trainer.mesh import make_mesh
from trainer.phases import residents
from trainer.rollout import programs
from trainer.train import _reference_params as reference_params
from trainer.update.masters import Split
from trainer.update.program import make_update


def lowered(job: Job, architecture: Architecture, program: str, *, build: EngineBuild) -> Any:
    """A program of `ledger.programs_of`, lowered (`jax.stages.Lowered`).

    Args:
        job: for a TPU.
        architecture: the model's.
        program: its name.
        build: how sglang-jax's embedding, head and biases lie.

    Raises:
        Refusal: it cannot be made for those shapes, or that accelerator, or the engine is not here.
    """
    devices = described_devices(job.target)
    mesh = make_mesh(job, devices)
    if program == "sampler":
        return programs.lowered_sampler(job, architecture, mesh)
    if program in ("engine_prefill", "engine_decode"):
        held = residents(job, architecture, build=build).engine
        # A pool that the engine refuses to make is planned with one token: its verdict is known.
        tokens = held.pool.tokens if held else 0
        engine = _engine().Engine(job, architecture, devices, build=build)
        return engine.lowered(prefill=program == "engine_prefill", pool_tokens=max(1, tokens))
    update = make_update(job, architecture, mesh)
    params = update.params(update.abstract)
    makers = {
        "update": update.lower,
        "logprobs": lambda: update.lower_logprobs(params),
        "reference_logprobs": lambda: update.lower_logprobs(frozen(job, params)),
        "engine_probe": lambda: _engine().lowered_probe(job, architecture, params),
        "hand_over": lambda: _hand_over(job, architecture, mesh, params, build=build),
    }
    return makers[program]()


def _hand_over(
    job: Job, architecture: Architecture, mesh: Any, params: Any, *, build: EngineBuild
) -> Any:
    if job.rollout.engine == "naive":
        return programs.lowered_hand_over(job, architecture, mesh, params)
    devices = list(mesh.devices.flat)
    return _engine().Engine(job, architecture, devices, build=build).lowered_hand_over(params)


def _engine() -> Any:
    """The module of the engine's programs.

    Raises:
        CompileError: sglang-jax is not installed.
    """
    try:
        # Imported here: it takes seconds, and most jobs' programs have no use for it.
        from trainer.rollout.sglang import ahead  # noqa: PLC0415
    except ImportError as error:
        raise CompileError(
            f"the engine's programs cannot be made without its package ({error}): install "
            "docker/trainer.txt, or plan by arithmetic alone, --quick"
        ) from error
    return ahead


def frozen(job: Job, params: Any) -> Any:
    """The frozen policy's parameters as shapes, each where the policy's lies."""
    made = jax.eval_shape(partial(reference_params, job), params)
    is_split = lambda leaf: isinstance(leaf, Split)
    where = jax.tree.map(
        lambda leaf: (leaf.hi if is_split(leaf) else leaf).sharding, params, is_leaf=is_split
    )
    put = lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)
    return jax.tree.map(put, made, where)
