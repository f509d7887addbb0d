"""GRPO's mathematics: advantages, token weights, the clipped objective, the KL estimate.

Arrays of tokens are [batch, completion]: one row a completion, one column a completion token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def group_advantages(rewards: jax.Array, group_size: int) -> jax.Array:
    """Rewards relative to their group: (r - mean) / (std + 1e-4).

    Args:
        rewards: f32[prompts * group_size]; the completions of one prompt lie next to each other.
        group_size: completions per prompt; a group of 1 has advantage 0.

    Returns:
        f32[prompts * group_size]; all zero for a group whose rewards are all equal.

    Source: arXiv:2402.03300, section 4.1.2, with the seed's choices: population std and 1e-4
    (TRL: sample std, 1e-4; tunix: sample std, 1e-6).
    """
    groups = rewards.reshape(-1, group_size)
    centered = groups - groups.mean(axis=1, keepdims=True)
    return (centered / (groups.std(axis=1, keepdims=True) + 1e-4)).reshape(-1)


def token_weights(completion_mask: jax.Array) -> jax.Array:
    """The share of each token in the loss: 1 / (tokens of its completion x completions).

    Args:
        completion_mask: f32[batch, completion] of ALL completions of the update, not of a
            micro-batch: the weights of all micro-batches together sum to 1 (less the share of
            completions that have no token).

    Returns:
        f32[batch, completion].

    Source: arXiv:2402.03300, equation 3: the mean over completions of the mean over tokens.
    """
    lengths = completion_mask.sum(axis=1, keepdims=True)
    return completion_mask / jnp.maximum(lengths, 1.0) / completion_mask.shape[0]


class ClippedObjective(NamedTuple):
    """The clipped objective of each token.

    Attributes:
        loss: f32[batch, completion], to be weighted and summed.
        clipped: f32[batch, completion], 1 where the clip took the gradient away.
    """

    loss: jax.Array
    clipped: jax.Array


def clipped_objective(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
) -> ClippedObjective:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) of each token.

    Args:
        logprobs: f32[batch, completion] of the policy.
        old_logprobs: f32[batch, completion] of the policy that sampled.
        advantages: f32[batch].
        clip_low: the ratio's clip below 1.
        clip_high: the ratio's clip above 1.

    Source: arXiv:1707.06347, equation 7; the two clips of arXiv:2503.14476, section 3.1.
    """
    ratio = jnp.exp(logprobs - old_logprobs)
    gain = advantages[:, None]
    plain = ratio * gain
    bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * gain
    return ClippedObjective(-jnp.minimum(plain, bounded), (bounded < plain).astype(jnp.float32))


def kl_k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """The k3 estimate of KL(policy || reference) of each token: r - ln r - 1, r = ref / policy.

    Args:
        logprobs: f32[batch, completion] of the policy, on its own samples.
        ref_logprobs: f32[batch, completion] of the reference.

    Returns:
        f32[batch, completion], nats, never below 0.

    Source: arXiv:2402.03300, equation 4; Schulman, "Approximating KL divergence", 2020.
    """
    log_ratio = ref_logprobs - logprobs
    return jnp.exp(log_ratio) - log_ratio - 1.0
