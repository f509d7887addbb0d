"""Word problems in GSM8K's form, prompts made of them, and completions made into a batch."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jobs.spec import Job
from trainer.refusal import Refusal
from trainer.rollout import Completions

SYSTEM_PROMPT = (
    "Solve the problem. Reason step by step between <think> and </think>, then write nothing but "
    "the final number between <answer> and </answer>, like this:\n"
    "<think>3 apples and 4 apples are 3 + 4 = 7 apples.</think>\n<answer>7</answer>"
)


_FORM = 'a line is {"question": "...", "answer": "... #### 42"}'


class DataError(Refusal):
    """Rows that cannot be had or used: what was asked, what was found, what to change."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One word problem.

    Attributes:
        question: as the user would ask it.
        answer: the final number, as text: what stands behind GSM8K's "####".
    """

    question: str
    answer: str


def load_rows(job: Job, *, split: str) -> list[Row]:
    """The job's rows of a split, "train" or "test".

    Raises:
        DataError: the file or the data set cannot be had, or a line of it is no word problem.
    """
    if split == "test" and job.evaluation.path is not None:
        return read_jsonl(Path(job.evaluation.path), key="evaluation.path")
    if split == "test" and job.data.path is not None:
        raise DataError(
            f"data.path = {job.data.path} has no test split: set evaluation.path to a file of rows "
            "that are not trained on"
        )
    if job.data.path is not None:
        return read_jsonl(Path(job.data.path))
    if job.data.source == "gsm8k":
        return _hub_rows(split)
    return arithmetic_rows(seed=job.seed, split=split, count=job.data.rows)


def read_jsonl(path: Path, *, key: str = "data.path") -> list[Row]:
    """Rows of a GSM8K file: a JSON object with "question" and "answer" a line.

    Args:
        path: of the file.
        key: the job's, that named it.

    Raises:
        DataError: with the number of the first line that is none.
    """
    try:
        # Not splitlines: JSON may hold U+2028 and U+0085 as they are, which that would break at.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{key} = {path} cannot be read: {error}") from error
    rows = [
        _row(line, where=f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"{key} = {path} holds no rows")
    return rows


def _row(line: str, *, where: str) -> Row:
    try:
        fields = json.loads(line)
        question, answer = fields["question"], fields["answer"]
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise DataError(f"{where}: no word problem; {_FORM}") from error
    if not isinstance(question, str) or not isinstance(answer, str):
        raise DataError(f"{where}: question and answer must both be text; {_FORM}")
    return Row(question=question, answer=final_answer(answer, where=where))


def final_answer(solution: str, *, where: str) -> str:
    """What stands behind the last "####" of a worked solution, thousands separators taken out.

    >>> final_answer("48 / 2 = 24 ... 48 + 24 = 1,072\\n#### 1,072", where="line 1")
    '1072'
    """
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise DataError(f'{where}: the answer has no "#### number" at its end')
    return answer.strip().replace(",", "")


def _hub_rows(split: str) -> list[Row]:
    # Imported here: it takes a second, and no other source needs it.
    import datasets  # noqa: PLC0415

    try:
        rows: Any = datasets.load_dataset("openai/gsm8k", "main", split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.source = gsm8k cannot be had from the hub ({error}); on a machine without the "
            "hub, copy the data set's JSONL there and set data.path"
        ) from error
    return [
        Row(question=r["question"], answer=final_answer(r["answer"], where=f"gsm8k {split} {i}"))
        for i, r in enumerate(rows)
    ]


_NAMES = ("Ana", "Ben", "Chidi", "Dora", "Emil", "Fatima", "Goro", "Hana", "Ivan", "Jun", "Kofi")
_THINGS = ("apples", "marbles", "stamps", "pencils", "shells", "coins", "books", "cards")


def arithmetic_rows(*, seed: int, split: str, count: int) -> list[Row]:
    """Word problems of our own, of one or two steps, with whole numbers above 0 as answers.

    Args:
        seed: of the generator; another seed makes other problems.
        split: problems of "train" and "test" are drawn from different streams.
        count: how many.
    """
    draw = random.Random(f"{seed} {split}")  # noqa: S311
    return [_arithmetic_row(draw) for _ in range(count)]


def _arithmetic_row(draw: random.Random) -> Row:
    name, other = draw.sample(_NAMES, 2)
    thing = draw.choice(_THINGS)
    a, b, c = draw.randint(6, 12), draw.randint(2, 8), draw.randint(2, 5)
    question, answer = draw.choice(
        [
            (
                f"{name} has {a} {thing} and {other} gives {name} {b} more. "
                f"How many {thing} does {name} have now?",
                a + b,
            ),
            (
                f"{name} has {a} {thing} and gives {c} of them to {other}. "
                f"How many {thing} does {name} have left?",
                a - c,
            ),
            (
                f"{name} has {a} {thing}. {name} buys {b} more and then gives {c} to {other}. "
                f"How many {thing} does {name} have now?",
                a + b - c,
            ),
            (
                f"{name} fills {c} boxes with {b} {thing} each, and {a} {thing} are left over. "
                f"How many {thing} are there altogether?",
                c * b + a,
            ),
            (
                f"{name} has {a} {thing} and {other} has {b} more than {name}. "
                f"How many {thing} do they have together?",
                2 * a + b,
            ),
            (
                f"{other} sells {b} {thing} a day. How many {thing} does {other} sell in "
                f"{c} days, if {a} more are sold on the last day?",
                b * c + a,
            ),
        ]
    )
    return Row(question=question, answer=str(answer))


def messages(job: Job, row: Row) -> list[dict[str, str]]:
    """The chat that asks a row's question; an empty system prompt leaves its turn out."""
    system = SYSTEM_PROMPT if job.system_prompt is None else job.system_prompt
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": row.question}]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A row and its tokens, chat template applied."""

    row: Row
    tokens: list[int]


def fitting_prompts(job: Job, rows: Sequence[Row], tokenizer: Any) -> tuple[list[Prompt], int]:
    """The prompts of at most max_prompt_tokens, and how many rows were longer.

    Raises:
        DataError: not one row fits.
    """
    prompts = [Prompt(row=r, tokens=tokenizer.encode_chat(messages(job, r))) for r in rows]
    limit = job.rollout.max_prompt_tokens
    fitting = [p for p in prompts if len(p.tokens) <= limit]
    if len(fitting) < 1:
        longest = max(len(p.tokens) for p in prompts)
        raise DataError(
            f"rollout.max_prompt_tokens = {limit} leaves none of {len(prompts)} prompts; the "
            f"shortest has {min(len(p.tokens) for p in prompts)} tokens, the longest {longest}"
        )
    return fitting, len(prompts) - len(fitting)


def prompts_of_step(job: Job, prompts: Sequence[Prompt], step: int) -> list[Prompt]:
    """The prompts of a step: every epoch has its own order, which seed and epoch alone decide.

    Args:
        job: its seed and prompts_per_step.
        prompts: all of them, always in the same order.
        step: from 0.
    """
    first = step * job.rollout.prompts_per_step
    wanted = range(first, first + job.rollout.prompts_per_step)
    orders = {
        epoch: np.random.default_rng([job.seed, epoch]).permutation(len(prompts))
        for epoch in {i // len(prompts) for i in wanted}
    }
    return [prompts[orders[i // len(prompts)][i % len(prompts)]] for i in wanted]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """What an update learns from, one row a sequence.

    Attributes:
        tokens: i32[batch, seq], prompt, completion, then padding.
        prompt_lengths: i32[batch].
        completion_mask: f32[batch, completion], 1 on completion tokens up to and with EOS.
        weights: f32[batch, completion], the share of each token in the loss.
        advantages: f32[batch].
        old_logprobs: f32[batch, completion] of the policy that sampled; None: those of the policy
            that is being updated, which is the same in a rollout's first and only update.
        ref_logprobs: f32[batch, completion] of the reference; None when beta is 0.
    """

    tokens: Any
    prompt_lengths: Any
    completion_mask: Any
    weights: Any
    advantages: Any
    old_logprobs: Any = None
    ref_logprobs: Any = None

    def micro_batches(self, size: int) -> Iterator["Batch"]:
        """Consecutive batches of `size` sequences."""
        for first in range(0, self.tokens.shape[0], size):
            rows = slice(first, first + size)
            yield jax.tree.map(lambda x, rows=rows: x[rows], self)


def abstract_batch(job: Job, *, sequences: int, sharding: Any) -> Batch:
    """A batch of that many sequences as shapes and dtypes, with the parts that the job needs."""
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    tokens = (sequences, job.rollout.max_completion_tokens)
    per_token = array(tokens, np.float32)
    return Batch(
        tokens=array((sequences, job.max_sequence_tokens), np.int32),
        prompt_lengths=array((sequences,), np.int32),
        completion_mask=per_token,
        weights=per_token,
        advantages=array((sequences,), np.float32),
        old_logprobs=per_token if job.needs_old_logprobs else None,
        ref_logprobs=per_token if job.train.beta else None,
    )


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Completions,
    *,
    sequence_tokens: int,
    pad_id: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts and their completions as right-padded rows.

    Args:
        prompts: one for each sequence (a prompt stands group_size times).
        completions: their completions, in the same order.
        sequence_tokens: width of the result.
        pad_id: fills the rest.

    Returns:
        tokens i32[batch, seq], prompt_lengths i32[batch], completion_mask f32[batch, completion].
    """
    batch, width = completions.tokens.shape
    tokens = np.full((batch, sequence_tokens), pad_id, np.int32)
    for row, (prompt, length) in enumerate(zip(prompts, completions.lengths, strict=True)):
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : len(prompt) + length] = completions.tokens[row, :length]
    mask = np.arange(width)[None] < completions.lengths[:, None]
    lengths = np.array([len(p) for p in prompts], np.int32)
    return tokens, lengths, mask.astype(np.float32)
