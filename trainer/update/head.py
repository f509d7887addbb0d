"""Both ends of the decoder, shared out by vocabulary: embedding, final norm, head and loss.

All functions run inside a shard_map over the axis FSDP. The head's logits exist for one chunk of
tokens at a time, each device computing its share of the vocabulary for the tokens of all devices;
loss and gradients leave in the same pass.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jobs.spec import Job
from trainer.architecture import Architecture
from trainer.grpo import token_loss
from trainer.model import rms_norm
from trainer.update.rows import Rows

FSDP = "fsdp"
_gather = partial(jax.lax.all_gather, axis_name=FSDP, axis=0, tiled=True)
_scatter = partial(jax.lax.psum_scatter, axis_name=FSDP, scatter_dimension=0, tiled=True)


def _rows_of_shard(tokens: jax.Array, vocab: int) -> tuple[jax.Array, jax.Array]:
    """Where tokens lie in this device's share of the vocabulary, and whether they do."""
    local = tokens - jax.lax.axis_index(FSDP) * vocab
    return jnp.clip(local, 0, vocab - 1), (local >= 0) & (local < vocab)


def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Embeddings of this device's tokens [rows, seq], from every device's share of the table.

    Args:
        table: [vocab / devices, embed].
        tokens: i32[rows, seq].
    """
    row, here = _rows_of_shard(_gather(tokens), table.shape[0])
    return _scatter(jnp.where(here[..., None], table[row], 0))


def embed_gradient(gradient: jax.Array, tokens: jax.Array, dx: jax.Array) -> jax.Array:
    """`gradient`, f32[vocab / devices, embed], with what flows back through `embed` added."""
    row, here = _rows_of_shard(_gather(tokens), gradient.shape[0])
    # A row outside the share is dropped by indexing past the end.
    at = jnp.where(here, row, gradient.shape[0]).reshape(-1)
    back = _gather(dx).reshape(-1, dx.shape[-1]).astype(jnp.float32)
    return gradient.at[at].add(back, mode="drop")


class HeadPass(NamedTuple):
    """What one pass over the head gives.

    Attributes:
        loss: f32[], of all devices' tokens.
        sums: f32[] each over all devices' completion tokens: entropy, clipped, kl, tokens.
        dx: [rows, seq, embed], gradient of the last layer's output.
        head: f32[vocab / devices, embed], gradient of this device's share of the head.
        norm: f32[embed], gradient of the final norm, of this device's tokens.
    """

    loss: jax.Array
    sums: dict[str, jax.Array]
    dx: jax.Array
    head: jax.Array
    norm: jax.Array


class _Chunk(NamedTuple):
    """Tokens of one chunk: x [chunk, embed], the rest [chunk]."""

    x: jax.Array
    targets: jax.Array
    mask: jax.Array
    weights: jax.Array
    advantages: jax.Array
    old: jax.Array | None
    ref: jax.Array | None
    sequence_ratio: jax.Array | None


def _chunks(x: jax.Array, rows: Rows, job: Job) -> tuple[_Chunk, int]:
    """The completion tokens' predictors and constants, [chunks, chunk, ...], zero-padded."""
    tokens = rows.targets.size
    # Chunks of equal size, so that little is padded; at least one.
    count = max(1, math.ceil(tokens / job.update.loss_chunk_tokens))
    size = math.ceil(tokens / count)

    def shape(values: jax.Array | None) -> Any:
        if values is None:
            return None
        flat = values.reshape(tokens, *values.shape[2:])
        flat = jnp.pad(flat, [(0, count * size - tokens), *[(0, 0)] * (flat.ndim - 1)])
        return flat.reshape(count, size, *flat.shape[1:])

    parts = _Chunk(
        x,
        rows.targets,
        rows.mask,
        rows.weights,
        rows.advantages,
        rows.old_logprobs,
        rows.ref_logprobs,
        rows.sequence_ratio,
    )
    return _Chunk(*(shape(part) for part in parts)), tokens


class _Scores(NamedTuple):
    """One chunk of all devices' tokens against this device's share of the vocabulary."""

    logprobs: jax.Array  # f32[tokens]
    entropy: jax.Array  # f32[tokens]
    probabilities: jax.Array  # f32[tokens, vocab / devices]
    chosen: jax.Array  # bool[tokens, vocab / devices]


def _score(x: jax.Array, head: jax.Array, targets: jax.Array, temperature: float) -> _Scores:
    logits = jnp.einsum("te,ve->tv", x, head, preferred_element_type=jnp.float32) / temperature
    top = jax.lax.pmax(jax.lax.stop_gradient(logits.max(axis=-1)), FSDP)
    powers = jnp.exp(logits - top[:, None])
    total = jax.lax.psum(powers.sum(axis=-1), FSDP)
    log_norm = top + jnp.log(total)
    row, here = _rows_of_shard(targets, head.shape[0])
    found = jnp.take_along_axis(logits, row[:, None], axis=-1)[:, 0]
    mean_logit = jax.lax.psum((powers * logits).sum(axis=-1), FSDP) / total
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return _Scores(
        logprobs=jax.lax.psum(jnp.where(here, found, 0), FSDP) - log_norm,
        entropy=log_norm - mean_logit,
        probabilities=powers / total[:, None],
        chosen=(places == row[:, None]) & here[:, None],
    )


def _predictors(x: jax.Array, rows: Rows) -> jax.Array:
    """The positions that predict the completion tokens, [rows, token, embed]."""
    return jnp.take_along_axis(x, rows.before[..., None], axis=1)


def head_logprobs(
    x: jax.Array, head: jax.Array, norm: jax.Array, rows: Rows, job: Job, a: Architecture
) -> jax.Array:
    """Logprobs of this device's completion tokens, f32[rows, token]; arguments as `head_pass`."""
    chunks, tokens = _chunks(_predictors(x, rows), rows, job)

    def one(chunk: _Chunk) -> jax.Array:
        seen = _gather(rms_norm(chunk.x, norm, a.norm_eps))
        scores = _score(seen, head, _gather(chunk.targets), job.loss_temperature)
        size = chunk.targets.shape[0]
        return jax.lax.dynamic_slice_in_dim(scores.logprobs, jax.lax.axis_index(FSDP) * size, size)

    return jax.lax.map(one, chunks).reshape(-1)[:tokens].reshape(rows.targets.shape)


def head_pass(
    x: jax.Array, head: jax.Array, norm: jax.Array, rows: Rows, job: Job, a: Architecture
) -> HeadPass:
    """Loss and gradients of all that lies above the last layer, in one pass over the tokens.

    Args:
        x: [rows, seq, embed], the last layer's output for this device's rows.
        head: [vocab / devices, embed], this device's share, in the compute dtype.
        norm: f32[embed].
        rows: this device's.
        job: the loss, its constants and the chunk size.
        a: the model's.
    """
    temperature = job.loss_temperature
    predictors, back_to_x = jax.vjp(lambda x: _predictors(x, rows), x)
    chunks, tokens = _chunks(predictors, rows, job)

    def one(carry: Any, chunk: _Chunk) -> tuple[Any, jax.Array]:
        loss, sums, d_head, d_norm = carry
        normed, back = jax.vjp(lambda x, w: rms_norm(x, w, a.norm_eps), chunk.x, norm)
        everybodys = jax.tree.map(_gather, chunk._replace(x=normed))
        scores = _score(everybodys.x, head, everybodys.targets, temperature)

        def chunk_loss(logprobs: jax.Array) -> tuple[jax.Array, Any]:
            # Padding has a weight of 0, but what overflows there would still be 0 x inf.
            per_token = token_loss(
                jnp.where(everybodys.mask > 0, logprobs, 0.0),
                everybodys.advantages,
                job,
                old_logprobs=everybodys.old,
                ref_logprobs=everybodys.ref,
                sequence_ratio=everybodys.sequence_ratio,
            )
            return jnp.sum(per_token.loss * everybodys.weights), per_token

        (value, said), slope = jax.value_and_grad(chunk_loss, has_aux=True)(scores.logprobs)
        d_logits = slope[:, None] * (scores.chosen - scores.probabilities) / temperature
        d_logits = d_logits.astype(x.dtype)
        dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_head = d_head + dot("tv,te->ve", d_logits, everybodys.x)
        d_normed = _scatter(dot("tv,ve->te", d_logits, head)).astype(x.dtype)
        dx, of_norm = back(d_normed)
        by_token = {
            "entropy": scores.entropy,
            "clipped": said.clipped,
            "kl": said.kl,
            "tokens": jnp.ones_like(scores.entropy),
        }
        sums = {name: sums[name] + jnp.sum(by_token[name] * everybodys.mask) for name in sums}
        return (loss + value, sums, d_head, d_norm + of_norm), dx

    zero = jnp.float32(0)
    start = (
        zero,
        dict.fromkeys(("entropy", "clipped", "kl", "tokens"), zero),
        jnp.zeros(head.shape, jnp.float32),
        jnp.zeros(norm.shape, jnp.float32),
    )
    (loss, sums, d_head, d_norm), dx = jax.lax.scan(one, start, chunks)
    d_predictors = dx.reshape(-1, x.shape[-1])[:tokens].reshape(predictors.shape)
    return HeadPass(
        loss=loss,
        sums=sums,
        dx=back_to_x(d_predictors)[0],
        head=d_head,
        norm=d_norm,
    )
