"""Rows: what layer_major computes on. A row is one prompt, and after it one or more completions.

    | prompt, padded to max_prompt_tokens | completion 0, padded | completion 1, padded | ...

Every completion sees its prompt and itself: the prompt is computed once, and its gradient is the
sum over its completions. Positions go on from the prompt's last token, whatever lies between.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jobs.spec import Job
from trainer.data import Batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rows:
    """A batch in rows; the axis `token` is the completion tokens of a row, completions in order.

    Attributes:
        tokens: i32[rows, seq].
        positions: i32[rows, seq], for the rotary angles.
        real: bool[rows, seq], no padding.
        before: i32[rows, token], where in seq the position lies that predicts each token.
        targets: i32[rows, token].
        mask: f32[rows, token].
        weights: f32[rows, token].
        advantages: f32[rows, token].
        old_logprobs: f32[rows, token], or None.
        ref_logprobs: f32[rows, token], or None.
        sequence_ratio: f32[rows, token], or None: see `grpo.token_loss`.
    """

    tokens: Any
    positions: Any
    real: Any
    before: Any
    targets: Any
    mask: Any
    weights: Any
    advantages: Any
    old_logprobs: Any = None
    ref_logprobs: Any = None
    sequence_ratio: Any = None


def to_rows(batch: Batch, job: Job) -> Rows:
    """The batch's sequences in rows, on the host; sequences of a row lie next to each other."""
    per_row, prompt_width = job.sequences_per_row, job.rollout.max_prompt_tokens
    tokens, lengths = np.asarray(batch.tokens), np.asarray(batch.prompt_lengths)
    mask = np.asarray(batch.completion_mask)
    width = mask.shape[1]
    row = lambda x: np.asarray(x).reshape(-1, per_row * width)
    at = np.minimum(lengths[:, None] + np.arange(width), tokens.shape[1] - 1)
    completions = np.take_along_axis(tokens, at, axis=1)
    prompts, prompt_lengths = tokens[::per_row, :prompt_width], lengths[::per_row]
    in_prompt = np.arange(prompt_width) < prompt_lengths[:, None]
    positions = [np.broadcast_to(np.arange(prompt_width), prompts.shape), row(at)]
    starts = prompt_width + width * np.arange(per_row)[:, None]
    before = np.broadcast_to(starts + np.arange(width) - 1, (len(prompts), per_row, width)).copy()
    before[:, :, 0] = prompt_lengths[:, None] - 1
    return Rows(
        tokens=np.concatenate([np.where(in_prompt, prompts, 0), row(completions)], axis=1),
        positions=np.concatenate(positions, axis=1).astype(np.int32),
        real=np.concatenate([in_prompt, row(mask) > 0], axis=1),
        before=before.reshape(len(prompts), -1).astype(np.int32),
        targets=row(completions),
        mask=row(mask),
        weights=row(batch.weights),
        advantages=row(np.broadcast_to(np.asarray(batch.advantages)[:, None], mask.shape)),
        old_logprobs=None if batch.old_logprobs is None else row(batch.old_logprobs),
        ref_logprobs=None if batch.ref_logprobs is None else row(batch.ref_logprobs),
    )


def abstract_rows(job: Job, sharding: Any) -> Rows:
    """A step's rows as shapes and dtypes, with the parts that the job needs."""
    per_row, r = job.sequences_per_row, job.rollout
    rows, tokens = job.sequences_per_step // per_row, per_row * r.max_completion_tokens
    array = lambda width, dtype: jax.ShapeDtypeStruct((rows, width), dtype, sharding=sharding)
    seq, f32 = r.max_prompt_tokens + tokens, np.float32
    return Rows(
        tokens=array(seq, np.int32),
        positions=array(seq, np.int32),
        real=array(seq, np.bool_),
        before=array(tokens, np.int32),
        targets=array(tokens, np.int32),
        mask=array(tokens, f32),
        weights=array(tokens, f32),
        advantages=array(tokens, f32),
        old_logprobs=array(tokens, f32) if job.needs_old_logprobs else None,
        ref_logprobs=array(tokens, f32) if job.train.beta else None,
    )


def row_mask(prompt_width: int, completion_width: int, completions: int) -> np.ndarray:
    """Who may see whom in a row, padding aside: bool[seq, seq], rows see columns."""
    seq = prompt_width + completion_width * completions
    place = np.arange(seq)
    # The prompt is everybody's; -1 stands for it.
    owner = np.where(place < prompt_width, -1, (place - prompt_width) // completion_width)
    causal = place[:, None] >= place[None]
    return causal & ((owner[None] == -1) | (owner[:, None] == owner[None]))
