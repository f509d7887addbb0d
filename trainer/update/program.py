"""The one door to the update: train.py runs it, plan.py compiles it, and both get it from here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jobs.spec import Job
from trainer.architecture import Architecture
from trainer.data import Batch
from trainer.grpo import LOSSES, sequence_ratios, token_loss
from trainer.model import hidden_states, token_logprobs

State = Any  # a design's own pytree; donated at every step


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What an update says of itself.

    Attributes:
        loss: the weighted loss of all its sequences.
        entropy: mean entropy of the policy over completion tokens, nats.
        clipped_fraction: share of completion tokens whose gradient the clip took away.
        kl: mean k3 estimate over completion tokens, nats; 0 without a reference.
        grad_norm: global norm of the gradient, before clipping.
        learning_rate: of this update.
    """

    loss: float
    entropy: float
    clipped_fraction: float
    kl: float
    grad_norm: float
    learning_rate: float

    @classmethod
    def of(cls, said: Mapping[str, Any], *, learning_rate: Any) -> "Learned":
        """From a program's loss, grad_norm, and sums over completion tokens."""
        tokens = max(float(said["tokens"]), 1.0)
        return cls(
            loss=float(said["loss"]),
            entropy=float(said["entropy"]) / tokens,
            clipped_fraction=float(said["clipped"]) / tokens,
            kl=float(said["kl"]) / tokens,
            grad_norm=float(said["grad_norm"]),
            learning_rate=float(learning_rate),
        )


@dataclass(frozen=True, kw_only=True)
class Update:
    """An update design, ready to run on a mesh.

    Attributes:
        abstract: the state as shapes, dtypes and shardings, with no memory behind it.
        init: parameters (f32, on the host) -> the first state, placed a leaf at a time; the
            tree is emptied as it goes.
        params: state -> the policy's parameters by reference, plain or split (masters.cast reads
            either), layers stacked or one by one.
        step: state and the batch of all sequences -> the next state, what was learned.
        logprobs: parameters (as `params` gives them, or a cast of those), batch ->
            f32[batch, completion] of its completion tokens.
        lower: the step's program for the job's shapes, lowered (`jax.stages.Lowered`) and not run:
            on a mesh of devices that are only described, it can still be compiled.
        lower_logprobs: the same of the program behind `logprobs`, for abstract parameters.
    """

    abstract: State
    init: Callable[[Any], State]
    params: Callable[[State], Any]
    step: Callable[[State, Batch], tuple[State, Learned]]
    logprobs: Callable[[Any, Batch], Any]
    lower: Callable[[], Any]
    lower_logprobs: Callable[[Any], Any]


def make_update(job: Job, architecture: Architecture, mesh: Mesh) -> Update:
    """The update that the job's `update.design` names, for that mesh.

    Raises:
        Refusal: an axis does not divide over the devices, or a kernel does not have the shapes.
    """
    # Imported here: the designs need what this file defines.
    from trainer.update import layer_major, reference  # noqa: PLC0415

    designs = {"layer_major": layer_major.make, "reference": reference.make}
    return designs[job.update.design](job, architecture, mesh)


def completion_logprobs(
    params: Any,
    batch: Batch,
    job: Job,
    architecture: Architecture,
    *,
    activations: NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The policy's logprob and entropy at each completion token, f32[batch, completion] both.

    Hidden states are computed for whole sequences, logits for completion positions only. For
    `activations` see `hidden_states`.
    """
    hidden = hidden_states(
        params,
        batch.tokens,
        architecture,
        dtype=jnp.dtype(job.update.update_dtype),
        remat=job.update.remat,
        activations=activations,
    )
    # Completion token t of a sequence lies behind its prompt; the position before it predicts it.
    # Where a row is too short for t, the mask is 0 and any token of the row will do.
    offsets = jnp.arange(batch.completion_mask.shape[1])
    at = jnp.minimum(batch.prompt_lengths[:, None] + offsets, batch.tokens.shape[1] - 1)
    targets = jnp.take_along_axis(batch.tokens, at, axis=1)
    before = jnp.take_along_axis(hidden, (at - 1)[..., None], axis=1)
    dp, fsdp, _ = job.mesh_shape
    sequences_a_device = max(1, batch.tokens.shape[0] // (dp * fsdp))
    return token_logprobs(
        params,
        before,
        targets,
        temperature=job.loss_temperature,
        chunk=max(1, job.update.loss_chunk_tokens // sequences_a_device),
    )


def loss(
    params: Any,
    batch: Batch,
    job: Job,
    architecture: Architecture,
    *,
    activations: NamedSharding | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The batch's share of the update's loss, and sums over its tokens.

    Returns:
        f32[], and f32[] sums over completion tokens: entropy, clipped, kl, tokens.
    """
    logprobs, entropy = completion_logprobs(
        params, batch, job, architecture, activations=activations
    )
    # Padding has a weight of 0, but what overflows there would still be 0 x inf.
    logprobs = jnp.where(batch.completion_mask > 0, logprobs, 0.0)
    ratio = None
    if LOSSES[job.train.loss].ratio == "sequence" and batch.old_logprobs is not None:
        current = jax.lax.stop_gradient(logprobs)
        ratio = sequence_ratios(current, batch.old_logprobs, batch.completion_mask)
    per_token = token_loss(
        logprobs,
        batch.advantages[:, None],
        job,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        sequence_ratio=ratio,
    )
    mask = batch.completion_mask
    sums = {"entropy": entropy, "clipped": per_token.clipped, "kl": per_token.kl, "tokens": mask}
    return jnp.sum(per_token.loss * batch.weights), {
        name: jnp.sum(value * mask) for name, value in sums.items()
    }
