import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import spec
from trainer.data import Batch
from trainer.update.rows import abstract_rows, row_mask, to_rows

PROMPT, COMPLETION, PAD = 4, 3, 0


def make_job(*, prompts, group_size, shared, beta=0.0, updates=1):
    return spec.Job(
        name="rows",
        accelerator="cpu",
        model="tiny",
        rollout=spec.Rollout(
            prompts_per_step=prompts,
            group_size=group_size,
            max_prompt_tokens=PROMPT,
            max_completion_tokens=COMPLETION,
        ),
        train=spec.Train(beta=beta, updates_per_rollout=updates),
        update=spec.Update(completions_per_row="group" if shared else "one"),
    )


def make_batch(job, *, prompt_lengths, completion_lengths, seed=0):
    """Every token and number of its own, so that a wrong place cannot pass for the right one."""
    random = np.random.default_rng(seed)
    group, batch = job.rollout.group_size, job.sequences_per_step
    tokens = np.full((batch, PROMPT + COMPLETION), PAD, np.int32)
    names = iter(random.permutation(np.arange(1, 1 + tokens.size)))
    lengths = np.repeat(prompt_lengths, group).astype(np.int32)
    for p, length in enumerate(prompt_lengths):
        prompt = [next(names) for _ in range(length)]
        for b in range(p * group, (p + 1) * group):
            tokens[b, :length] = prompt
            for t in range(completion_lengths[b]):
                tokens[b, length + t] = next(names)
    mask = (np.arange(COMPLETION)[None] < np.array(completion_lengths)[:, None]).astype(np.float32)
    number = lambda shape: random.standard_normal(shape).astype(np.float32)
    return Batch(
        tokens=tokens,
        prompt_lengths=lengths,
        completion_mask=mask,
        weights=mask * number(mask.shape),
        advantages=number(batch),
        old_logprobs=number(mask.shape) if job.needs_old_logprobs else None,
        ref_logprobs=number(mask.shape) if job.train.beta else None,
    )


def slow_rows(batch, per_row):
    """The rows, a token at a time: what holds where there is a token; None where there is none."""
    rows = []
    for first in range(0, len(batch.tokens), per_row):
        length = int(batch.prompt_lengths[first])
        prompt = [int(batch.tokens[first, i]) if i < length else None for i in range(PROMPT)]
        row = {"tokens": prompt, "positions": [i if i < length else None for i in range(PROMPT)]}
        row |= {name: [] for name in ("before", "targets", "weights", "advantages", "old", "ref")}
        for b in range(first, first + per_row):
            for t in range(COMPLETION):
                there = bool(batch.completion_mask[b, t])
                # The token's own place in the row; the first is predicted by the prompt's last.
                place = PROMPT + COMPLETION * (b - first) + t
                token = int(batch.tokens[b, length + t]) if there else None
                found = {
                    "tokens": token,
                    "targets": token,
                    "positions": length + t,
                    "before": length - 1 if t == 0 else place - 1,
                    "weights": batch.weights[b, t],
                    "advantages": batch.advantages[b],
                    "old": None if batch.old_logprobs is None else batch.old_logprobs[b, t],
                    "ref": None if batch.ref_logprobs is None else batch.ref_logprobs[b, t],
                }
                for name, value in found.items():
                    row[name].append(value if there else None)
        rows.append(row)
    return rows


def check(batch, job):
    rows, per_row = to_rows(batch, job), job.sequences_per_row
    slow = slow_rows(batch, per_row)
    assert rows.tokens.shape == (len(slow), PROMPT + per_row * COMPLETION)
    fields = {name: getattr(rows, name) for name in slow[0] if name not in ("old", "ref")}
    fields |= {"old": rows.old_logprobs, "ref": rows.ref_logprobs}
    for name, values in fields.items():
        for r, row in enumerate(slow):
            for i, expected in enumerate(row[name]):
                if expected is not None:
                    assert values[r, i] == expected, (name, r, i)
    for r, row in enumerate(slow):
        real = [token is not None for token in row["tokens"]]
        np.testing.assert_array_equal(rows.real[r], real)
        np.testing.assert_array_equal(rows.mask[r] > 0, real[PROMPT:])
    # Of padding, two things matter: it is no weight in the loss, and it lies inside the arrays.
    assert (rows.weights[rows.mask == 0] == 0).all()
    assert (rows.before >= 0).all()
    assert (rows.before < rows.tokens.shape[1]).all()
    assert (rows.positions < PROMPT + COMPLETION).all()


@pytest.mark.parametrize("shared", [False, True])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_hold_each_token_where_a_slow_construction_puts_it(shared, data):
    prompts, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    lengths = st.integers(1, PROMPT)
    job = make_job(
        prompts=prompts,
        group_size=group,
        shared=shared,
        beta=data.draw(st.sampled_from([0.0, 0.1])),
        updates=data.draw(st.sampled_from([1, 2])),
    )
    draw = lambda each, count: data.draw(st.lists(each, min_size=count, max_size=count))
    batch = make_batch(
        job,
        prompt_lengths=draw(lengths, prompts),
        completion_lengths=draw(st.integers(0, COMPLETION), prompts * group),
    )
    check(batch, job)


def test_a_row_of_a_group_by_hand():
    # Prompt 7 8, completions 1 2 and (none) and 3 4 5; 0 is padding.
    job = make_job(prompts=1, group_size=3, shared=True)
    tokens = [[7, 8, 1, 2, 0, 0, 0], [7, 8, 0, 0, 0, 0, 0], [7, 8, 3, 4, 5, 0, 0]]
    mask = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1]], np.float32)
    rows = to_rows(
        Batch(
            tokens=np.array(tokens, np.int32),
            prompt_lengths=np.array([2, 2, 2], np.int32),
            completion_mask=mask,
            weights=mask / 3,
            advantages=np.array([1.0, 2.0, 3.0], np.float32),
        ),
        job,
    )
    seen = rows.real[0]
    np.testing.assert_array_equal(rows.tokens[0][seen], [7, 8, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(rows.positions[0][seen], [0, 1, 2, 3, 2, 3, 4])
    np.testing.assert_array_equal(seen, [1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1])
    # Place 1 holds the prompt's last token, 4 the first completion's first, 10 the third's.
    np.testing.assert_array_equal(rows.before[0][rows.mask[0] > 0], [1, 4, 1, 10, 11])
    np.testing.assert_array_equal(rows.advantages[0], [1, 1, 1, 2, 2, 2, 3, 3, 3])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("beta", "updates"), [(0.0, 1), (0.1, 1), (0.0, 2), (0.1, 2)])
def test_the_abstract_rows_are_the_real_ones_in_shapes_and_dtypes(shared, beta, updates):
    job = make_job(prompts=2, group_size=2, shared=shared, beta=beta, updates=updates)
    batch = make_batch(job, prompt_lengths=[1, PROMPT], completion_lengths=[0, 1, 2, 3])
    real, told = to_rows(batch, job), abstract_rows(job, None)
    for field in dataclasses.fields(real):
        values, abstract = getattr(real, field.name), getattr(told, field.name)
        if values is None:
            assert abstract is None, field.name
        else:
            assert isinstance(abstract, jax.ShapeDtypeStruct)
            assert (values.shape, values.dtype) == (abstract.shape, abstract.dtype), field.name


@pytest.mark.parametrize(("prompt", "width", "completions"), [(4, 3, 1), (4, 3, 3), (1, 1, 4)])
def test_who_sees_whom_in_a_row(prompt, width, completions):
    """A token sees the prompt up to itself, and its own completion up to itself."""
    parts = [("prompt", prompt), *((f"completion {c}", width) for c in range(completions))]
    owners = [name for name, size in parts for _ in range(size)]
    found = row_mask(prompt, width, completions)
    assert found.shape == (len(owners), len(owners))
    for i, viewer in enumerate(owners):
        for j, viewed in enumerate(owners):
            expected = j <= i and viewed in ("prompt", viewer)
            assert found[i, j] == expected, (i, j)
