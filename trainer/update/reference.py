"""The reference update: plain autodiff over f32 parameters, one jitted program a micro-batch.

The SOP's own state: f32 parameters, f32 moments, and an f32 gradient accumulator that lives between
micro-batches, where there are several. It is kept for ever as the numerical reference of the other
designs. With single layers it takes the SOP's memory too: unrolled, XLA keeps the weights that it
has gathered for the forward pass until the backward pass has used them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jobs.spec import Job
from trainer.architecture import Architecture
from trainer.data import Batch, abstract_batch
from trainer.mesh import abstract_params, by_sequence, replicated
from trainer.update import optimizer as optimizers
from trainer.update.program import Learned, Update, completion_logprobs, loss

_SUMS = ("loss", "entropy", "clipped", "kl", "tokens")


class ReferenceState(NamedTuple):
    """The state between micro-batches.

    Attributes:
        params: the parameter tree, f32.
        moments: optax's state.
        gradients: the accumulator, f32, in the shape of params; None where an update is one
            micro-batch.
        sums: f32[] each, over the micro-batches so far of this update.
        updates: i32[], optimizer applications so far.
    """

    params: Any
    moments: Any
    gradients: Any
    sums: Any
    updates: Any


def abstract_state(job: Job, architecture: Architecture, mesh: Mesh) -> ReferenceState:
    """The state as shapes, dtypes and shardings, with no memory behind it."""
    params = abstract_params(mesh, architecture, jnp.float32)
    if job.update.layers == "per_layer":
        one = {name: _without_first_axis(leaf) for name, leaf in params["layers"].items()}
        params["layers"] = [one] * architecture.layers
    everywhere = replicated(mesh)
    optimizer = optimizers.optimizer(job)
    # Moments lie where their parameters lie, counters everywhere.
    moments = optax.tree_map_params(
        optimizer,
        lambda moment, param: jax.ShapeDtypeStruct(
            moment.shape, moment.dtype, sharding=param.sharding
        ),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    )
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=everywhere)
    return ReferenceState(
        params=params,
        moments=moments,
        gradients=params if job.grad_accum_steps > 1 else None,
        sums={name: scalar(jnp.float32) for name in _SUMS},
        updates=scalar(jnp.int32),
    )


def _without_first_axis(leaf: Any) -> jax.ShapeDtypeStruct:
    mesh, spec = leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:])
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=NamedSharding(mesh, spec))


def _placed(params: Any, shardings: Any) -> Any:
    """Parameters from the host, layers stacked, as and where the state has them.

    A leaf at a time, each let go as soon as it is placed.
    """
    at, stacked = shardings["layers"], params.pop("layers")
    layers: Any = [{} for _ in at] if isinstance(at, list) else {}
    for name in list(stacked):
        leaf = stacked.pop(name)
        if isinstance(at, list):
            for i, where in enumerate(at):
                layers[i][name] = jax.device_put(leaf[i], where[name])
        else:
            layers[name] = jax.device_put(leaf, at[name])
    rest = {name: jax.device_put(params.pop(name), shardings[name]) for name in list(params)}
    return {**rest, "layers": layers}


def _accumulator(params: Any, job: Job) -> Any:
    """An empty accumulator; None where one micro-batch is the whole update."""
    return jax.tree.map(jnp.zeros_like, params) if job.grad_accum_steps > 1 else None


def _first_state(params: Any, *, job: Job) -> ReferenceState:
    """Before the first update, of f32 parameters."""
    return ReferenceState(
        params=params,
        moments=optimizers.optimizer(job).init(params),
        gradients=_accumulator(params, job),
        sums={name: jnp.float32(0) for name in _SUMS},
        updates=jnp.int32(0),
    )


def _go_on(state: ReferenceState, _: Any) -> tuple[ReferenceState, jax.Array]:
    """What `apply` gives where it is not time for it."""
    return state, jnp.float32(0)


def make(job: Job, architecture: Architecture, mesh: Mesh) -> Update:
    """The reference design of `program.Update`."""
    optimizer = optimizers.optimizer(job)
    rate = optimizers.learning_rate(job)
    abstract = abstract_state(job, architecture, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    everywhere, sequences = replicated(mesh), by_sequence(mesh)

    def micro_step(
        state: ReferenceState, batch: Batch, *, last: jax.Array
    ) -> tuple[ReferenceState, jax.Array]:
        (value, sums), gradients = jax.value_and_grad(loss, has_aux=True)(
            state.params, batch, job, architecture, activations=sequences
        )
        sums = jax.tree.map(jnp.add, state.sums, {"loss": value, **sums})
        state = state._replace(sums=sums)
        if state.gradients is None:
            return apply(state, gradients)
        state = state._replace(gradients=jax.tree.map(jnp.add, state.gradients, gradients))
        return jax.lax.cond(last, apply, _go_on, state, state.gradients)

    def apply(state: ReferenceState, gradients: Any) -> tuple[ReferenceState, jax.Array]:
        gradients, norm = optimizers.clip(gradients, job)
        changes, moments = optimizer.update(gradients, state.moments, state.params)
        return state._replace(
            params=optax.apply_updates(state.params, changes),
            moments=moments,
            gradients=_accumulator(state.params, job),
            updates=state.updates + 1,
        ), norm

    jitted = jax.jit(micro_step, donate_argnums=0, out_shardings=(shardings, everywhere))
    jitted_init = jax.jit(partial(_first_state, job=job), donate_argnums=0, out_shardings=shardings)
    place = partial(_placed, shardings=shardings.params)
    zero_sums = jax.jit(lambda: dict.fromkeys(_SUMS, jnp.float32(0)), out_shardings=everywhere)
    jitted_logprobs = jax.jit(
        lambda p, b: completion_logprobs(p, b, job, architecture, activations=sequences)[0]
    )

    def step(state: ReferenceState, batch: Batch) -> tuple[ReferenceState, Learned]:
        state = state._replace(sums=zero_sums())
        norm: Any = 0.0
        micro_batches = list(batch.micro_batches(job.micro_batch_size))
        for number, part in enumerate(micro_batches, start=1):
            placed = jax.device_put(part, sequences)
            state, norm = jitted(state, placed, last=jnp.bool_(number == len(micro_batches)))
        said = {**state.sums, "grad_norm": norm}
        return state, Learned.of(said, learning_rate=rate(int(state.updates) - 1))

    def logprobs(params: Any, batch: Batch) -> jax.Array:
        parts = [
            jitted_logprobs(params, jax.device_put(part, sequences))
            for part in batch.micro_batches(job.micro_batch_size)
        ]
        return jnp.concatenate(parts)

    part = abstract_batch(job, sequences=job.micro_batch_size, sharding=sequences)

    def lower() -> Any:
        last = jax.ShapeDtypeStruct((), jnp.bool_, sharding=everywhere)
        return jitted.lower(abstract, part, last=last)

    return Update(
        abstract=abstract,
        init=lambda params: jitted_init(place(params)),
        params=lambda s: s.params,
        step=step,
        logprobs=logprobs,
        lower=lower,
        lower_logprobs=lambda params: jitted_logprobs.lower(params, part),
    )
