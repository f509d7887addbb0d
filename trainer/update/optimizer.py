"""The optimizer of a job: learning rate by update, what is decayed, Lion or AdamW from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jobs.spec import Job

_NOT_DECAYED = {"norm", "ln1", "ln2", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias"}


def learning_rate(job: Job) -> optax.Schedule:
    """The learning rate of update n, counted from 0.

    Linear from 0 over warmup_steps updates, then constant, or by a half cosine to 0 at the job's
    last update (arXiv:1608.03983, equation 5, without restarts).
    """
    t = job.train
    after = max(1, job.total_updates - t.warmup_steps)
    main = (
        optax.cosine_decay_schedule(t.learning_rate, decay_steps=after)
        if t.schedule == "cosine"
        else optax.constant_schedule(t.learning_rate)
    )
    if not t.warmup_steps:
        return main
    # Update 0 already learns: the ramp's first step is 1 / warmup_steps of the peak, not 0.
    ramp = lambda n: t.learning_rate * (n + 1) / t.warmup_steps
    return optax.join_schedules([ramp, main], [t.warmup_steps])


def optimizer(job: Job) -> optax.GradientTransformation:
    """Clip to the global norm, then Lion (arXiv:2302.06675) or AdamW (arXiv:1711.05101)."""
    t = job.train
    make = optax.lion if t.optimizer == "lion" else optax.adamw
    step = make(learning_rate(job), b1=t.b1, b2=t.b2, weight_decay=t.weight_decay, mask=decayed)
    if t.max_grad_norm is None:
        return step
    return optax.chain(optax.clip_by_global_norm(t.max_grad_norm), step)


def decayed(params: Any) -> Any:
    """True for matrices, False for norms and biases, in the shape of the parameter tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in _NOT_DECAYED, params
    )


def state_shardings(
    job: Job, abstract_params: Any, params_shardings: Any, replicated: Any
) -> tuple[Any, Any]:
    """The optimizer's state as shapes, and where it lies: moments where their parameters lie.

    Args:
        job: names the optimizer.
        abstract_params: the parameter tree as shapes.
        params_shardings: the same tree of shardings.
        replicated: sharding of what belongs to no parameter (counters).
    """
    transform = optimizer(job)
    abstract = jax.eval_shape(transform.init, abstract_params)
    shardings = optax.tree_map_params(
        transform,
        lambda _, sharding: sharding,
        abstract,
        params_shardings,
        transform_non_params=lambda _: replicated,
    )
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    return placed, shardings


def global_norm(gradients: Any) -> jax.Array:
    """The 2-norm of all gradients together, f32[]."""
    return optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), gradients))
