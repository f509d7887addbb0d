"""The naive sampler's programs for a job's shapes, lowered and not run."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jobs.spec import Job
from trainer.architecture import Architecture, leaf_shapes
from trainer.mesh import replicated, sampler_shardings
from trainer.rollout.naive import (
    Request,
    Settings,
    hi_by_reference,
    layer_by_layer,
    sample,
    to_sampler,
)

_EOS_IDS = (151645, 151643)  # Qwen2.5's; which they are changes no byte


def lowered_sampler(job: Job, architecture: Architecture, mesh: Mesh) -> Any:
    """Prefill and decode, as `NaiveRollout.generate` calls it."""
    r, everywhere = job.rollout, replicated(mesh)
    array = lambda shape, kind: jax.ShapeDtypeStruct(shape, kind, sharding=everywhere)
    request = Request(
        prompts=array((r.prompts_per_step, r.max_prompt_tokens), jnp.int32),
        lengths=array((r.prompts_per_step,), jnp.int32),
        sequence_numbers=array((job.sequences_per_step,), jnp.uint32),
        temperature=array((), jnp.float32),
        seed=array((), jnp.uint32),
    )
    settings = Settings(
        architecture=architecture,
        eos_ids=_EOS_IDS,
        max_tokens=r.max_completion_tokens,
        top_k=r.top_k,
        top_p=r.top_p,
    )
    jitted = jax.jit(sample, static_argnames=("settings",))
    return jitted.lower(_weights(job, architecture, mesh), request, settings=settings)


def lowered_hand_over(job: Job, architecture: Architecture, mesh: Mesh, params: Any) -> Any:
    """The map from the trainer's parameters to the sampler's, or None where nothing is copied.

    Args:
        job: its sampler's dtype.
        architecture: the model's.
        mesh: of devices that may be only described.
        params: as `Update.params` gives them, abstract.
    """
    shardings = layer_by_layer(sampler_shardings(mesh, architecture), architecture)
    if hi_by_reference(params, shardings) is not None and job.rollout.dtype == "bfloat16":
        return None
    return to_sampler(job, architecture, shardings).lower(params)


def _weights(job: Job, architecture: Architecture, mesh: Mesh) -> dict[str, Any]:
    """The sampler's weights as shapes, dtypes and shardings."""
    where, dtype = sampler_shardings(mesh, architecture), jnp.dtype(job.rollout.dtype)
    weights: dict[str, Any] = {"layers": {}}
    for path, shape in leaf_shapes(architecture).items():
        in_layers = path[0] == "layers"
        own, shardings = (weights["layers"], where["layers"]) if in_layers else (weights, where)
        one = shape[1:] if in_layers else shape
        own[path[-1]] = jax.ShapeDtypeStruct(one, dtype, sharding=shardings[path[-1]])
    weights["layers"] = [weights["layers"]] * architecture.layers
    return weights
