"""The optimizer of a job: learning rate, what is decayed, clipping; Lion and AdamW twice.

`optimizer` is optax's, over whole trees, for the reference update. `update_leaf` is ours, one leaf
at a time, with moments in bf16 or int8, for layer_major.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jobs.spec import Job
from trainer.update.masters import Split, join, split

_NOT_DECAYED = {"norm", "ln1", "ln2", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias"}
ADAM_EPS = 1e-8  # optax's default; added to the root of the corrected second moment


def learning_rate(job: Job) -> optax.Schedule:
    """The learning rate of update n, counted from 0.

    Linear up over warmup_updates updates, then constant, or by a half cosine to 0 at the job's last
    update (arXiv:1608.03983, equation 5, without restarts).
    """
    t = job.train
    after = max(1, job.total_updates - t.warmup_updates)
    main = (
        optax.cosine_decay_schedule(t.learning_rate, decay_steps=after)
        if t.schedule == "cosine"
        else optax.constant_schedule(t.learning_rate)
    )
    if not t.warmup_updates:
        return main
    # Update 0 already learns: the ramp's first step is 1 / warmup_updates of the peak, not 0.
    ramp = lambda n: t.learning_rate * (n + 1) / t.warmup_updates
    return optax.join_schedules([ramp, main], [t.warmup_updates])


def optimizer(job: Job) -> optax.GradientTransformation:
    """Lion (arXiv:2302.06675) or AdamW (arXiv:1711.05101) over a tree of f32 gradients."""
    t = job.train
    make = optax.lion if t.optimizer == "lion" else optax.adamw
    mask = lambda params: jax.tree_util.tree_map_with_path(lambda p, _: decayed(p[-1].key), params)
    return make(learning_rate(job), b1=t.b1, b2=t.b2, weight_decay=t.weight_decay, mask=mask)


def decayed(leaf: str) -> bool:
    """Weight decay is for matrices, not for norms and biases."""
    return leaf not in _NOT_DECAYED


def clip(gradients: Any, job: Job) -> tuple[Any, jax.Array]:
    """The gradients as the job's clip leaves them, and their global norm before.

    Args:
        gradients: f32 in the shape of the parameter tree.
        job: train.max_grad_norm, update.clip.
    """
    norm = optax.tree.norm(gradients)
    if job.update.clip == "global":
        scale = clip_scale(norm, job)
        return jax.tree.map(lambda g: g * scale, gradients), norm
    one = partial(_clip_together, job=job)
    layers = gradients["layers"]
    clipped: dict[str, Any] = {
        "layers": [one(layer) for layer in layers]
        if isinstance(layers, list)
        else jax.vmap(one)(layers)
    }
    # An untied head goes with the final norm; a tied one is the embedding, which then does.
    groups = [("head", "norm"), ("embed",)] if "head" in gradients else [("embed", "norm")]
    for group in groups:
        clipped |= one({name: gradients[name] for name in group})
    return clipped, norm


def _clip_together(gradients: dict[str, jax.Array], job: Job) -> dict[str, jax.Array]:
    scale = clip_scale(optax.tree.norm(gradients), job)
    return {name: g * scale for name, g in gradients.items()}


def clip_scale(norm: Any, job: Job) -> Any:
    """What a gradient of that norm is multiplied by, f32, to have at most max_grad_norm."""
    limit = job.train.max_grad_norm
    return jnp.ones_like(norm) if limit is None else limit / jnp.maximum(norm, limit)


class Quantized(NamedTuple):
    """An array in int8 with a scale for each row of its last axis.

    Attributes:
        values: int8, -127 to 127.
        scales: f32, the last axis of size 1 on each device.
    """

    values: Any
    scales: Any


class LeafState(NamedTuple):
    """A parameter and its moments.

    Attributes:
        master: the parameter, split.
        m: the first moment (Lion's only one): bf16, or Quantized.
        v: the root of AdamW's second moment: bf16, or Quantized; None for Lion. The root, because
            its range is the square root of the moment's: an int8 of the moment itself would turn
            most of a row to 0, and divide by it.
    """

    master: Split
    m: Any
    v: Any


def _rounded(moment: jax.Array, *, count: Any, salt: int) -> Quantized:
    """To int8, rounded up or down at random so that the mean is right.

    Rounded to nearest, what changes by less than half a step would never change at all: a moment
    that decays by 1 % an update could not decay. The noise is a hash of count and of the place in
    this array: which moments are rounded up depends on how the state is shared out and laid.
    """
    scales = jnp.max(jnp.abs(moment), axis=-1, keepdims=True) / 127
    steps = moment / jnp.where(scales > 0, scales, 1.0)
    noise = jax.lax.broadcasted_iota(jnp.uint32, moment.shape, moment.ndim - 1)
    if moment.ndim > 1:
        rows = jax.lax.broadcasted_iota(jnp.uint32, moment.shape, moment.ndim - 2)
        noise = noise ^ (rows * jnp.uint32(0x85EBCA6B))
    noise = (
        noise + jnp.asarray(count).astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(salt)
    )
    # The finalizer of MurmurHash3, then the upper 24 bits as a number from 0 to 1.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        noise = (noise ^ (noise >> shift)) * jnp.uint32(factor)
    share = (noise >> 8).astype(jnp.float32) * 2.0**-24
    values = jnp.clip(jnp.floor(steps + share), -127, 127)
    return Quantized(values.astype(jnp.int8), scales)


def encode(moment: jax.Array, job: Job, *, count: Any) -> Any:
    """A moment, f32, as the job keeps it after `count` updates."""
    if job.update.moments == "bfloat16":
        return moment.astype(jnp.bfloat16)
    return _rounded(moment, count=count, salt=0)


def encode_root(root: jax.Array, job: Job, *, count: Any) -> Any:
    """A root of a second moment, f32; in int8 never 0 where it is not, for it is divided by."""
    if job.update.moments == "bfloat16":
        return root.astype(jnp.bfloat16)
    kept = _rounded(root, count=count, salt=1)
    least = (root > 0).astype(jnp.int8)
    return kept._replace(values=jnp.maximum(kept.values, least))


def decode(moment: Any) -> jax.Array:
    """A moment as f32."""
    if isinstance(moment, Quantized):
        return moment.values.astype(jnp.float32) * moment.scales
    return moment.astype(jnp.float32)


def first_state(master: jax.Array, like: LeafState) -> LeafState:
    """A parameter, f32, with moments of 0 in the shapes and dtypes of `like`."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (like.m, like.v))
    return LeafState(split(master), *zeros)


def update_leaf(
    name: str, state: LeafState, gradient: jax.Array, job: Job, *, count: jax.Array, rate: jax.Array
) -> LeafState:
    """One application of the job's optimizer to one leaf.

    Args:
        name: the leaf's, which decides whether it decays.
        state: the leaf's.
        gradient: f32, clipped.
        job: names the optimizer and its constants.
        count: i32[], applications before this one.
        rate: f32[], the learning rate.

    Source: arXiv:2302.06675, algorithm 2; arXiv:1711.05101, algorithm 2, as optax has it.
    """
    t = job.train
    master, m = join(state.master), decode(state.m)
    decay = t.weight_decay * master if decayed(name) else 0.0
    if t.optimizer == "lion":
        change = jnp.sign(t.b1 * m + (1 - t.b1) * gradient) + decay
        m = t.b2 * m + (1 - t.b2) * gradient
        return LeafState(split(master - rate * change), encode(m, job, count=count), None)
    m = t.b1 * m + (1 - t.b1) * gradient
    v = t.b2 * decode(state.v) ** 2 + (1 - t.b2) * gradient**2
    done = (count + 1).astype(jnp.float32)
    root = jnp.sqrt(v / (1 - t.b2**done))
    change = m / (1 - t.b1**done) / (root + ADAM_EPS) + decay
    return LeafState(
        split(master - rate * change),
        encode(m, job, count=count),
        encode_root(jnp.sqrt(v), job, count=count),
    )
