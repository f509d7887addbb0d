"""Attention inside a row: the splash kernel where it runs, XLA's elsewhere."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jobs.spec import Job
from trainer.architecture import Architecture
from trainer.refusal import Refusal
from trainer.update.rows import row_mask

# Of q [rows, seq, heads, head_dim], k and v [rows, seq, kv_heads, head_dim] and real
# bool[rows, seq]: what each query sees, as q.
RowAttention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

LANES = 128  # a TPU's vector lanes: the splash kernel's head_dim and seq are multiples of it


def row_attention(job: Job, architecture: Architecture) -> RowAttention:
    """The attention that the job's `update.attention` names, for rows of the job's shape.

    Raises:
        Refusal: the splash kernel was asked for and does not have the shapes.
    """
    mask = row_mask(
        job.rollout.max_prompt_tokens, job.rollout.max_completion_tokens, job.sequences_per_row
    )
    head_dim, seq = architecture.head_dim, len(mask)
    has_shapes = head_dim % LANES == 0 and seq % LANES == 0
    wanted = job.update.attention
    if wanted == "splash" and not has_shapes:
        raise Refusal(
            f"update.attention = splash wants head_dim and row length in multiples of {LANES}; "
            f"{job.model} has head_dim {head_dim}, a row {seq} tokens: use xla, or change "
            "rollout.max_prompt_tokens and rollout.max_completion_tokens"
        )
    if wanted == "splash" or (wanted == "auto" and has_shapes and job.target.platform == "tpu"):
        return _splash(mask, architecture)
    return _xla(mask)


def _xla(mask: np.ndarray) -> RowAttention:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array) -> jax.Array:
        # Padding sees padding only in rows of the mask where it sees anything real besides.
        seen = jnp.asarray(mask)[None, None] & real[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=seen)

    return attend


def _splash(mask: np.ndarray, architecture: Architecture) -> RowAttention:
    # Imported here: Pallas for TPU takes a second, and no CPU run needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (  # noqa: PLC0415
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (  # noqa: PLC0415
        splash_attention_mask as masks,
    )

    seq, a = len(mask), architecture
    block = next(size for size in (512, 384, 256, LANES) if seq % size == 0)
    sizes = kernel.BlockSizes(**dict.fromkeys(_BLOCKS, block))
    heads = masks.MultiHeadMask([masks.NumpyMask(mask)] * (a.heads // a.kv_heads))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array) -> jax.Array:
        one_kv_head: Any = kernel.make_splash_mqa_single_device(heads, block_sizes=sizes)
        rows = q.shape[0]
        grouped = (q * a.head_dim**-0.5).astype(q.dtype).transpose(0, 2, 1, 3)
        grouped = grouped.reshape(rows, a.kv_heads, -1, seq, a.head_dim)
        segments = kernel.SegmentIds(real.astype(jnp.int32), real.astype(jnp.int32))
        per_row = jax.vmap(one_kv_head, in_axes=(0, 0, 0, None))
        context = jax.vmap(per_row)(
            grouped, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), segments
        )
        return context.reshape(rows, a.heads, seq, a.head_dim).transpose(0, 2, 1, 3)

    return attend


_BLOCKS = (
    "block_q",
    "block_kv",
    "block_kv_compute",
    "block_q_dkv",
    "block_kv_dkv",
    "block_kv_dkv_compute",
    "block_q_dq",
    "block_kv_dq",
)
