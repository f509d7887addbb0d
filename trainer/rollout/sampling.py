"""One token of every sequence, from its logits: what both engines draw by, and the logprobs of it.

The noise of a token is decided by the job's seed, the sequence's number and the token's place in
the completion, and by nothing else: not by the engine, the batch or the order of its rows.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NEVER = jnp.finfo(jnp.float32).min


class Drawn(NamedTuple):
    """What was drawn, one of each for a sequence.

    Attributes:
        tokens: i32[sequences].
        logprobs: f32[sequences], ln p under logits / temperature, before top-k and top-p: of the
            distribution that the trainer learns.
        raw_logprobs: f32[sequences], ln p under the logits as they are.
    """

    tokens: jax.Array
    logprobs: jax.Array
    raw_logprobs: jax.Array


class Places(NamedTuple):
    """Which sequence each row is, and where in its completion.

    Attributes:
        sequence_numbers: u32[sequences], of the whole job.
        positions: i32[sequences] or i32[], completion tokens sampled before.
    """

    sequence_numbers: Any
    positions: Any


def draw(
    logits: jax.Array,
    key: jax.Array,
    places: Places,
    temperature: jax.Array,
    *,
    top_k: int | None,
    top_p: float,
) -> Drawn:
    """Sample one token a row.

    Args:
        logits: f32[sequences, vocab].
        key: of the job's seed.
        places: of the rows.
        temperature: f32[], 0 is greedy.
        top_k: see `restrict`.
        top_p: see `restrict`.
    """
    scores = logits / jnp.where(temperature > 0, temperature, 1.0)
    choices = restrict(scores, top_k=top_k, top_p=top_p)
    noise = gumbel_noise(key, places, choices.shape[1])
    noisy = jnp.where(temperature > 0, choices + noise, logits)
    token = jnp.argmax(noisy, axis=-1).astype(jnp.int32)

    def of_token(values: jax.Array) -> jax.Array:
        chosen = jnp.take_along_axis(values, token[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(values, axis=-1)

    return Drawn(token, of_token(scores), of_token(logits))


draw_alone = partial(jax.jit, static_argnames=("top_k", "top_p"))(draw)


def gumbel_noise(key: jax.Array, places: Places, vocab: int) -> jax.Array:
    """Noise that depends on seed, sequence and position alone, f32[sequences, vocab].

    The largest of logits + noise is a sample of their softmax (Gumbel-max).
    """

    def one(number: jax.Array, position: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, number), position)
        return jax.random.gumbel(own, (vocab,), jnp.float32)

    numbers = places.sequence_numbers
    return jax.vmap(one)(numbers, jnp.broadcast_to(places.positions, numbers.shape))


def restrict(scores: jax.Array, *, top_k: int | None, top_p: float) -> jax.Array:
    """Scores with every token outside top-k, and then top-p of the rest, made impossible.

    Args:
        scores: f32[sequences, vocab], tempered logits.
        top_k: keep so many; ties with the last are kept too. None: all.
        top_p: keep the likeliest until they reach this probability together, the one that crosses
            it included. 1: all.
    """
    if top_k is not None and top_k < scores.shape[1]:
        least = jax.lax.top_k(scores, top_k)[0][:, -1:]
        scores = jnp.where(scores >= least, scores, NEVER)
    if top_p < 1.0:
        ranked = jnp.sort(scores, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ranked), axis=-1) - jax.nn.softmax(ranked)
        least = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores >= least, scores, NEVER)
    return scores
