"""Rollout: prompts in, completions out. `Rollout` is what train.py asks of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np  # a plan without the compiler must not wait for it

ENGINES = ("naive", "sglang_jax")  # of those that a job may name, the ones that this version has


@dataclass(frozen=True, kw_only=True)
class Completions:
    """What an engine sampled; completions of one prompt lie next to each other.

    Attributes:
        tokens: i32[sequences, completion], EOS included, anything after it.
        lengths: i32[sequences], tokens up to and with EOS.
        logprobs: f32[sequences, completion], ln p of each sampled token under the distribution
            that the trainer learns: logits / temperature, before top-k and top-p.
        truncated: bool[sequences], ended by the length limit and not by EOS.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    truncated: np.ndarray

    def texts(self, tokenizer: Any) -> list[str]:
        """Each completion as text, without special tokens."""
        rows = zip(self.tokens, self.lengths, strict=True)
        return [tokenizer.decode(row[:length]) for row, length in rows]


class Rollout(Protocol):
    """An engine that samples completions from the policy's weights."""

    name: str

    def hand_over(self, params: Any) -> None:
        """Take the policy's weights: the trainer's parameter tree, plain or split."""
        ...

    def sleep(self) -> None:
        """Let go of every weight and cache; the next call is `hand_over`."""
        ...

    def held(self) -> dict[str, Any]:
        """What of it lies on the devices now, by owner in the plan's words."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        temperature: float,
        first_sequence: int,
    ) -> Completions:
        """Sample group_size completions of each prompt.

        Args:
            prompts: token ids, each at most max_prompt_tokens.
            group_size: completions of each.
            temperature: 0 is greedy.
            first_sequence: number of the first sequence in the whole job: with the seed and the
                position it decides the noise of each token, whatever else is in the batch.
        """
        ...
