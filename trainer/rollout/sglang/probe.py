"""Does the engine have the trainer's policy? Its logprobs against the trainer's on a few tokens.

A wrong layout, or a leaf that is lost or damaged, changes every logprob by more than rounding does.
Weights of the step before are too near to be told from it in bf16.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jobs.spec import Job
from trainer.architecture import Architecture
from trainer.model import causal_attention, decoder_layer, logits, position_angles, rms_norm
from trainer.rollout import Completions
from trainer.rollout.sglang.settings import EngineFaultError
from trainer.update.masters import cast

TOKENS = 16  # of the first completion, at most
# Mean |ln p_engine - ln p_trainer| that goes unremarked, nats: docs/engine.md has what was seen.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}


class Probe:
    """Compares the first completion of a rollout with the trainer's own forward pass.

    Args:
        job: its lengths, and the engine's dtype.
        architecture: the model's.
    """

    def __init__(self, job: Job, architecture: Architecture) -> None:
        self._job = job
        self._logprobs = program(job, architecture)

    def check(
        self, params: Any, prompt: Any, completions: Completions, *, temperature: float
    ) -> float:
        """The mean distance, nats.

        Args:
            params: the policy's, as the hand-over had them.
            prompt: ids of the first prompt.
            completions: what the engine sampled; the first row is looked at.
            temperature: that it was sampled with; 0 is greedy.

        Raises:
            EngineFaultError: the distance is above what rounding explains.
        """
        count = min(TOKENS, int(completions.lengths[0]))
        sampled = completions.tokens[0, :count]
        known = np.concatenate([np.asarray(prompt, np.int32), sampled])
        tokens = np.zeros(tokens_shape(self._job), np.int32)
        tokens[0, : len(known)] = known
        found = self._logprobs(params, tokens, np.float32(temperature if temperature > 0 else 1.0))
        ours = np.asarray(found)[0, len(prompt) - 1 :][:count]
        distance = float(np.abs(ours - completions.logprobs[0, :count]).mean())
        limit = TOLERANCE[self._job.engine.dtype]
        if not distance <= limit:  # NaN is no agreement either
            raise EngineFaultError(
                f"sglang-jax does not have the trainer's policy: over {count} tokens its logprobs "
                f"are {distance:.4f} nats from the trainer's, and rounding explains {limit}; "
                "nothing was learned from them"
            )
        return distance


def program(job: Job, architecture: Architecture) -> Any:
    """The jitted (params, tokens, temperature) -> logprobs that a probe runs."""
    dtype = jnp.dtype(job.engine.dtype)
    return jax.jit(partial(token_logprobs, architecture=architecture, dtype=dtype))


def tokens_shape(job: Job) -> tuple[int, int]:
    """[1, seq] of its tokens, the same for every probe of a job."""
    return 1, job.rollout.max_prompt_tokens + TOKENS


def token_logprobs(
    params: Any,
    tokens: jax.Array,
    temperature: jax.Array,
    *,
    architecture: Architecture,
    dtype: Any,
) -> jax.Array:
    """Logprob of each token after the first, f32[batch, seq - 1], by the trainer's own functions.

    Weights are cast a layer at a time, so that no copy of them all is ever made.

    Args:
        params: plain or split, layers stacked or one by one.
        tokens: i32[batch, seq], padded on the right.
        temperature: f32[], above 0.
        architecture: the model's.
        dtype: of weights and activations.
    """
    a, (batch, seq) = architecture, tokens.shape
    angles = position_angles(jnp.broadcast_to(jnp.arange(seq), (batch, seq)), a)

    def layer(x: jax.Array, leaves: Any) -> tuple[jax.Array, None]:
        weights = {name: cast(leaf, dtype) for name, leaf in leaves.items()}
        return decoder_layer(x, weights, a, angles=angles, attend=causal_attention)

    x = cast(params["embed"], dtype)[tokens]
    layers = params["layers"]
    if isinstance(layers, list):
        for leaves in layers:
            x, _ = layer(x, leaves)
    else:
        x, _ = jax.lax.scan(layer, x, layers)
    top = {name: cast(params[name], dtype) for name in ("norm", "embed", "head") if name in params}
    scores = logits(top, rms_norm(x, top["norm"], a.norm_eps))[:, :-1] / temperature
    chosen = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(scores, axis=-1)
