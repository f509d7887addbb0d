"""GRPO's mathematics and its relatives': advantages, token weights, objectives, the KL estimate.

Arrays of tokens are [batch, completion]: one row a completion, one column a completion token. A
`Loss` is three choices: how rewards become advantages, what share each token has in the loss, and
what happens to its probability ratio. `LOSSES` names the published combinations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jobs.spec import Job


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


def centered_advantages(rewards: jax.Array, group_size: int) -> jax.Array:
    """Rewards less their group's mean, f32[prompts * group_size]; no division by the std.

    Source: arXiv:2503.20783 (Dr. GRPO), section 3.2.
    """
    groups = rewards.reshape(-1, group_size)
    return (groups - groups.mean(axis=1, keepdims=True)).reshape(-1)


def leave_one_out_advantages(rewards: jax.Array, group_size: int) -> jax.Array:
    """Rewards less the mean of the rest of their group; 0 in a group of 1.

    Source: arXiv:2402.14740 (RLOO), equation 8: r - (sum - r) / (G - 1) = (r - mean) G / (G - 1).
    """
    return centered_advantages(rewards, group_size) * (group_size / max(group_size - 1, 1))


def batch_advantages(rewards: jax.Array, group_size: int) -> jax.Array:
    """Rewards normalised over the whole batch, whatever their group: (r - mean) / (std + 1e-8).

    Source: arXiv:2501.03262 (REINFORCE++), equation 9; population std.
    """
    del group_size
    normed = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    # Equal rewards differ from their mean by rounding, which the division would blow up.
    return jnp.where(rewards.max() == rewards.min(), 0.0, normed)


def sequence_mean_weights(completion_mask: jax.Array, max_tokens: int) -> jax.Array:
    """The mean over completions of the mean over tokens: 1 / (its tokens x completions).

    Args:
        completion_mask: f32[batch, completion] of ALL completions of the update, not of a
            micro-batch: the weights of all micro-batches together sum to 1 (less the share of
            completions that have no token).
        max_tokens: not used here.

    Returns:
        f32[batch, completion].

    Source: arXiv:2402.03300, equation 3.
    """
    del max_tokens
    lengths = completion_mask.sum(axis=1, keepdims=True)
    return completion_mask / jnp.maximum(lengths, 1.0) / completion_mask.shape[0]


def token_mean_weights(completion_mask: jax.Array, max_tokens: int) -> jax.Array:
    """The mean over all tokens of the batch. arXiv:2503.14476 (DAPO), section 3.3."""
    del max_tokens
    return completion_mask / jnp.maximum(completion_mask.sum(), 1.0)


def constant_weights(completion_mask: jax.Array, max_tokens: int) -> jax.Array:
    """1 / (max_tokens x completions): a token weighs the same in short and long completions.

    Source: arXiv:2503.20783 (Dr. GRPO), listing 1 of its appendix: masked sum over a constant.
    """
    return completion_mask / (max_tokens * completion_mask.shape[0])


def sequence_sum_weights(completion_mask: jax.Array, max_tokens: int) -> jax.Array:
    """The mean over completions of the sum over tokens. arXiv:2402.14740 (RLOO), equation 7."""
    del max_tokens
    return completion_mask / completion_mask.shape[0]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One published loss.

    Attributes:
        advantages: (f32[batch] rewards, group_size) -> f32[batch].
        weights: (completion_mask of the whole update, max_completion_tokens) -> f32 token weights.
        ratio: token: each token's own, clipped; sequence: the geometric mean of its completion's,
            clipped; free: each token's own, not clipped.
        clip_low, clip_high: the paper's, where the job does not say.
    """

    advantages: Callable[[jax.Array, int], jax.Array]
    weights: Callable[[jax.Array, int], jax.Array]
    ratio: Literal["token", "sequence", "free"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2


LOSSES = {
    "grpo": Loss(advantages=group_advantages, weights=sequence_mean_weights),
    "dr_grpo": Loss(advantages=centered_advantages, weights=constant_weights),
    # Clip-higher: arXiv:2503.14476, section 3.1, and its section 4.1 for the two figures.
    "dapo": Loss(advantages=group_advantages, weights=token_mean_weights, clip_high=0.28),
    # arXiv:2507.18071, equation 5 with the gradient of its GSPO-token form, section 4.3; clips of
    # section 5.1.
    "gspo": Loss(
        advantages=group_advantages,
        weights=sequence_mean_weights,
        ratio="sequence",
        clip_low=3e-4,
        clip_high=4e-4,
    ),
    "rloo": Loss(advantages=leave_one_out_advantages, weights=sequence_sum_weights, ratio="free"),
    "reinforce_pp": Loss(advantages=batch_advantages, weights=token_mean_weights),
}


class TokenLoss(NamedTuple):
    """What one token has in the loss.

    Attributes:
        loss: f32[batch, completion], to be weighted and summed.
        clipped: f32[batch, completion], 1 where the clip took the gradient away.
        kl: f32[batch, completion], k3 estimate; 0 without a reference.
    """

    loss: jax.Array
    clipped: jax.Array
    kl: jax.Array


def token_loss(
    logprobs: jax.Array,
    advantages: jax.Array,
    job: Job,
    *,
    old_logprobs: jax.Array | None,
    ref_logprobs: jax.Array | None,
    sequence_ratio: jax.Array | None = None,
) -> TokenLoss:
    """The job's loss of each token, a function of its own logprob: any shape, token by token.

    Args:
        logprobs: f32, of the policy.
        advantages: f32, of each token's completion.
        job: names the loss, its clips and beta.
        old_logprobs: f32, of the policy that sampled; None: of this very policy.
        ref_logprobs: f32, of the reference; None: no KL term.
        sequence_ratio: f32, the ratio of each token's completion, from `sequence_ratios`, for a
            loss whose ratio is the sequence's; None: 1, as it is for the policy that sampled.
    """
    variant = LOSSES[job.train.loss]
    old = jax.lax.stop_gradient(logprobs) if old_logprobs is None else old_logprobs
    if variant.ratio == "sequence":
        # The value is the completion's ratio, the gradient that of its own token (GSPO-token).
        here = 1.0 if sequence_ratio is None else sequence_ratio
        ratio = here * jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
    else:
        ratio = jnp.exp(logprobs - old)
    plain = ratio * advantages
    if variant.ratio == "free":
        gain, clipped = plain, jnp.zeros_like(plain)
    else:
        # min(plain, clipped) spelled out: where a ratio lies on its bound, as every first one does
        # with a clip of 0, the gradient is whole, not the half that autodiff gives to ties.
        least, most = clip_range(job)
        outside = jnp.where(advantages > 0, ratio > most, ratio < least) & (advantages != 0)
        bounded = jax.lax.stop_gradient(jnp.clip(ratio, least, most)) * advantages
        gain, clipped = jnp.where(outside, bounded, plain), outside.astype(jnp.float32)
    if ref_logprobs is None:
        return TokenLoss(-gain, clipped, jnp.zeros_like(plain))
    kl = kl_k3(logprobs, ref_logprobs)
    return TokenLoss(-gain + job.train.beta * kl, clipped, kl)


def clip_range(job: Job) -> tuple[float, float]:
    """The least and the greatest ratio: the job's clips, else the paper's.

    Source: arXiv:1707.06347, equation 7; two clips: arXiv:2503.14476, section 3.1.
    """
    t, variant = job.train, LOSSES[job.train.loss]
    low = variant.clip_low if t.clip_low is None else t.clip_low
    high = variant.clip_high if t.clip_high is None else t.clip_high
    return 1.0 - low, 1.0 + high


def sequence_ratios(
    logprobs: jax.Array, old_logprobs: jax.Array, completion_mask: jax.Array
) -> jax.Array:
    """The geometric mean of each completion's token ratios, f32[batch, 1].

    Args:
        logprobs: f32[batch, completion] of the policy.
        old_logprobs: f32[batch, completion] of the policy that sampled.
        completion_mask: f32[batch, completion].

    Source: arXiv:2507.18071 (GSPO), equation 7.
    """
    total = jnp.sum((logprobs - old_logprobs) * completion_mask, axis=1, keepdims=True)
    return jnp.exp(total / jnp.maximum(completion_mask.sum(axis=1, keepdims=True), 1.0))


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


def truncated_importance(trainer_logprobs: Any, engine_logprobs: Any, *, cap: float) -> jax.Array:
    """Weights min(p_trainer / p_engine, cap) that correct for how an engine computes otherwise.

    Args:
        trainer_logprobs: f32[batch, completion] of the policy that sampled, by the trainer.
        engine_logprobs: the same by the engine.
        cap: the largest weight, 2 in the source.

    Source: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
    2025 (truncated importance sampling, TIS).
    """
    return jnp.minimum(jnp.exp(trainer_logprobs - engine_logprobs), cap)
