"""What is no number stops a run, and leaves the batch after which it was so; it is never saved.

`bad_batch.npz` is read by numpy alone (`numpy.load(path)`, no pickle):

    step, update                        of the run; of the step's updates, from 0
    loss, grad_norm, entropy, kl, clipped_fraction, learning_rate    what the update said
    tokens i32[batch, seq], prompt_lengths i32[batch]                one row a sequence
    completion_mask, weights f32[batch, completion], advantages f32[batch]
    old_logprobs, ref_logprobs f32[batch, completion]                where the job computes them
    engine_logprobs f32[batch, completion], truncated bool[batch]    what was sampled
    rewards f32[batch], score_NAME f32[batch]                        weighted; each by itself
    questions, answers, completions     text
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jobs.aftermath import BAD_BATCH_FILE
from trainer.data import Batch
from trainer.update.program import Learned

if TYPE_CHECKING:
    from trainer.train import Rolled

_OF_BATCH = (
    "tokens", "prompt_lengths", "completion_mask", "weights", "advantages", "old_logprobs",
    "ref_logprobs",
)  # fmt: skip
_OF_LEARNED = ("loss", "grad_norm", "entropy", "kl", "clipped_fraction", "learning_rate")


class LossError(FloatingPointError):
    """A loss, a gradient norm or a saved array is NaN or infinite; the state is of no more use."""


def check_learned(
    said: Learned, *, batch: Batch, rolled: "Rolled", run_dir: Path, step: int, update: int
) -> None:
    """Refuse an update that is not finite, with its batch in the run's directory.

    Raises:
        LossError: loss or gradient norm is none.
    """
    if math.isfinite(said.loss) and math.isfinite(said.grad_norm):
        return
    file = run_dir / BAD_BATCH_FILE
    arrays: dict[str, Any] = contents(said, batch=batch, rolled=rolled, step=step, update=update)
    where = f"is in {file}"
    try:
        np.savez_compressed(file, **arrays)
    except OSError as error:
        where = f"could not be written: {error}"
    raise LossError(
        f"loss = {said.loss}, gradient norm = {said.grad_norm}: the update is not finite; its "
        f"batch {where}; lower train.learning_rate, or start from weights that are finite"
    )


def contents(
    said: Learned, *, batch: Batch, rolled: "Rolled", step: int, update: int
) -> dict[str, np.ndarray]:
    """The arrays of bad_batch.npz by name."""
    found: dict[str, Any] = {"step": step, "update": update}
    found |= {name: getattr(said, name) for name in _OF_LEARNED}
    found |= {name: getattr(batch, name) for name in _OF_BATCH if getattr(batch, name) is not None}
    found |= {
        "engine_logprobs": rolled.completions.logprobs,
        "truncated": rolled.completions.truncated,
        "rewards": rolled.rewards,
        "questions": [prompt.row.question for prompt in rolled.prompts],
        "answers": [str(prompt.row.answer) for prompt in rolled.prompts],
        "completions": rolled.texts,
    }
    found |= {f"score_{name}": value for name, value in rolled.scores.items()}
    return {name: np.asarray(value) for name, value in found.items()}


# One program for all arrays: many at once, each with its own all-reduce, can wait for each other
# for ever on the CPU's few threads.
_are_finite = jax.jit(lambda leaves: jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))


def not_finite(state: Any) -> str | None:
    """The path of an array of the state that holds NaN or infinity; None where none does.

    An update can be finite and what it leaves not: a weight that no token of the batch used, an
    optimizer that overflowed. Parts that live in host memory are left out: moving them to look
    would cost what they were moved away for.
    """
    leaves = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not _on_host(leaf)
    ]
    finite = np.asarray(_are_finite([leaf for _, leaf in leaves])) if leaves else []
    bad = [path for (path, _), one in zip(leaves, finite, strict=True) if not one]
    return jax.tree_util.keystr(bad[0], simple=True, separator=".") if bad else None


def _on_host(leaf: jax.Array) -> bool:
    return leaf.sharding.memory_kind == "pinned_host"
