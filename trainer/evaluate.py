"""pass@1 and pass@K of the policy on the test split."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jobs.records import EvalRecord
from jobs.spec import Job
from trainer import reward
from trainer.data import Prompt
from trainer.rollout import Rollout

# Sequence numbers of evaluations lie far above those of training, so that no noise is used twice.
_FIRST_SEQUENCE = 2**31


def evaluate(
    job: Job,
    rollout: Rollout,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    after_steps: int,
    alive: Callable[[], None] = lambda: None,
) -> EvalRecord:
    """Ask every prompt and score the completions.

    Prompts are asked prompts_per_step at a time, as the rollout's program is compiled for; the last
    call is filled up with its own first prompts, whose completions are not counted.

    Args:
        job: group size, temperature, reward weights.
        rollout: holds the policy's weights.
        prompts: to ask, at least one.
        tokenizer: decodes the completions.
        after_steps: steps of training done.
        alive: is told after each call of the engine.
    """
    began = time.monotonic()
    e, at_once = job.evaluation, job.rollout.prompts_per_step
    correct: list[np.ndarray] = []
    rewards: list[np.ndarray] = []
    for first in range(0, len(prompts), at_once):
        part = list(prompts[first : first + at_once])
        filled = [part[i % len(part)] for i in range(at_once)]
        completions = rollout.generate(
            [p.tokens for p in filled],
            group_size=e.group_size,
            temperature=e.temperature,
            first_sequence=_FIRST_SEQUENCE + first * e.group_size,
        )
        alive()
        counted = len(part) * e.group_size
        texts = completions.texts(tokenizer)[:counted]
        answers = [p.row.answer for p in part for _ in range(e.group_size)]
        scores = reward.score(texts, answers)
        correct.append(scores["correct"].reshape(-1, e.group_size))
        rewards.append(reward.total(scores, job.reward))
    right = np.concatenate(correct)
    return EvalRecord(
        eval_step=after_steps,
        prompts=len(prompts),
        group_size=e.group_size,
        pass_at_1=float(right.mean()),
        pass_at_k=float(right.max(axis=1).mean()),
        reward_mean=float(np.concatenate(rewards).mean()),
        dt_s=time.monotonic() - began,
    )
