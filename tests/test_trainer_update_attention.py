import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from jobs import spec
from trainer.architecture import Architecture
from trainer.refusal import Refusal
from trainer.update.attention import LANES, row_attention
from trainer.update.rows import row_mask

PROMPT, COMPLETION, GROUP, ROWS = 5, 4, 3, 2
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def make_job(
    *, prompt=PROMPT, completion=COMPLETION, group=GROUP, attention="auto", accelerator="cpu"
):
    return spec.Job(
        name="attention",
        accelerator=accelerator,
        model="tiny",
        rollout=spec.Rollout(
            group_size=group, max_prompt_tokens=prompt, max_completion_tokens=completion
        ),
        update=spec.Update(completions_per_row="group", attention=attention),
    )


def make_architecture(head_dim=HEAD_DIM):
    return Architecture(
        family="qwen3",
        vocab=16,
        embed=16,
        mlp=16,
        layers=1,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=head_dim,
        rope_theta=1e4,
        norm_eps=1e-6,
        tied_head=True,
        attention_bias=False,
        qk_norm=False,
        max_position=64,
    )


def make_inputs(*, rows, seq, head_dim, seed=0):
    random = np.random.default_rng(seed)
    normal = lambda heads: random.standard_normal((rows, seq, heads, head_dim)).astype(np.float32)
    return normal(HEADS), normal(KV_HEADS), normal(KV_HEADS)


def real_tokens(prompt_lengths, completion_lengths, *, prompt=PROMPT, completion=COMPLETION):
    """bool[rows, seq] of rows with those lengths: one prompt, then a list of completions, each."""
    rows = [
        np.concatenate(
            [np.arange(prompt) < p, *(np.arange(completion) < length for length in lengths)]
        )
        for p, lengths in zip(prompt_lengths, completion_lengths, strict=True)
    ]
    return np.array(rows)


# The longest prompt and the shortest; the longest completion, a short one and none.
REAL = real_tokens([PROMPT, 1], [[COMPLETION, 0, 1], [2, 3, COMPLETION]])


def softmax_attention(q, k, v):
    """Causal attention of one sequence, a query at a time: q [seq, heads, head_dim]; f64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for i in range(q.shape[0]):
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            scores = k[: i + 1, kv] @ q[i, h] / np.sqrt(q.shape[-1])
            powers = np.exp(scores - scores.max())
            out[i, h] = powers / powers.sum() @ v[: i + 1, kv]
    return out


def sequences(real):
    """(row, places of one sequence: its prompt's, then one completion's), padding left out."""
    for r, seen in enumerate(real):
        prompt = [i for i in range(PROMPT) if seen[i]]
        for c in range(GROUP):
            start = PROMPT + c * COMPLETION
            yield r, prompt + [i for i in range(start, start + COMPLETION) if seen[i]]


@functools.cache
def xla():
    return jax.jit(row_attention(make_job(), make_architecture()))


def test_attention_in_a_row_is_that_of_each_sequence_by_itself():
    q, k, v = make_inputs(rows=ROWS, seq=REAL.shape[1], head_dim=HEAD_DIM)
    found = np.asarray(xla()(q, k, v, REAL))
    for r, places in sequences(REAL):
        expected = softmax_attention(q[r, places], k[r, places], v[r, places])
        # Sums of at most 9 products in f32.
        np.testing.assert_allclose(found[r, places], expected, rtol=1e-5, atol=1e-5)


def test_padding_is_invisible_and_never_a_nan():
    q, k, v = make_inputs(rows=ROWS, seq=REAL.shape[1], head_dim=HEAD_DIM)
    other = make_inputs(rows=ROWS, seq=REAL.shape[1], head_dim=HEAD_DIM, seed=1)
    padded = ~REAL[..., None, None]
    changed = [np.where(padded, 50 * y, x) for x, y in zip((q, k, v), other, strict=True)]
    before, after = np.asarray(xla()(q, k, v, REAL)), np.asarray(xla()(*changed, REAL))
    assert np.isfinite(after).all()
    np.testing.assert_array_equal(before[REAL], after[REAL])


def test_no_gradient_reaches_what_a_sequence_does_not_see():
    q, k, v = make_inputs(rows=ROWS, seq=REAL.shape[1], head_dim=HEAD_DIM)
    # The completions of row 1 but the second, at places 9 to 11.
    own, last = slice(9, 12), 11
    out = lambda k, v: xla()(q, k, v, REAL)[1, last].sum()
    by_k, by_v = (np.abs(np.asarray(g)).sum(axis=(2, 3)) for g in jax.grad(out, (0, 1))(k, v))
    seen = np.zeros(REAL.shape, bool)
    seen[1, 0] = seen[1, own] = True  # row 1's prompt has one token
    np.testing.assert_array_equal(by_v > 0, seen)
    np.testing.assert_array_equal(by_k > 0, seen)


# The splash kernel


@pytest.mark.parametrize(
    ("head_dim", "prompt", "completion", "found"),
    [
        (64, 128, 64, "head_dim 64, a row 256 tokens"),  # 128 + 2 x 64
        (128, 100, 64, "head_dim 128, a row 228 tokens"),
    ],
)
def test_splash_is_refused_where_it_does_not_have_the_shapes(head_dim, prompt, completion, found):
    job = make_job(
        prompt=prompt, completion=completion, group=2, attention="splash", accelerator="v4-8"
    )
    with pytest.raises(Refusal) as refused:
        row_attention(job, make_architecture(head_dim))
    said = str(refused.value)
    assert "update.attention = splash wants head_dim and row length in multiples of 128" in said
    assert found in said
    assert "use xla, or change rollout.max_prompt_tokens and rollout.max_completion_tokens" in said


@pytest.mark.parametrize(
    ("attention", "accelerator", "head_dim", "kernels"),
    [
        ("auto", "v4-8", 128, 1),
        ("splash", "v4-8", 128, 1),
        ("xla", "v4-8", 128, 0),
        ("auto", "v4-8", 64, 0),  # no such shape: XLA's
        ("auto", "cpu", 128, 0),
    ],
)
def test_auto_is_the_kernel_where_it_runs(attention, accelerator, head_dim, kernels):
    job = make_job(prompt=128, completion=64, group=2, attention=attention, accelerator=accelerator)
    q, k, v = make_inputs(rows=1, seq=256, head_dim=head_dim)
    attend = row_attention(job, make_architecture(head_dim))
    program = str(jax.make_jaxpr(attend)(q, k, v, np.ones((1, 256), bool)))
    assert program.count("pallas_call") == kernels


def test_the_kernel_computes_xlas_attention_with_our_mask_and_segments():
    """In Pallas' interpreter: the arguments that attention.py gives it mean what we mean."""
    prompt, completion, group = LANES, LANES // 2, 2
    seq = prompt + group * completion
    real = real_tokens([prompt, 3], [[completion, 5], [1, 0]], prompt=prompt, completion=completion)
    q, k, v = make_inputs(rows=2, seq=seq, head_dim=LANES)
    job = make_job(prompt=prompt, completion=completion, group=group)
    expected = np.asarray(row_attention(job, make_architecture(LANES))(q, k, v, real))
    mask = masks.MultiHeadMask([masks.NumpyMask(row_mask(prompt, completion, group))] * 2)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = kernel.BlockSizes(**{f"block_{name}": LANES for name in names})
    attend = kernel.make_splash_mqa_single_device(mask, block_sizes=sizes, interpret=True)
    for r in range(2):
        segments = kernel.SegmentIds(real[r].astype(np.int32), real[r].astype(np.int32))
        for kv in range(KV_HEADS):
            heads = slice(2 * kv, 2 * kv + 2)
            grouped = jnp.asarray(q[r, :, heads].transpose(1, 0, 2) * LANES**-0.5)
            found = attend(grouped, k[r, :, kv], v[r, :, kv], segments)
            # Only what is real: padding may look at padding.
            np.testing.assert_allclose(
                np.asarray(found).transpose(1, 0, 2)[real[r]],
                expected[r, real[r], heads],
                rtol=2e-5,
                atol=2e-5,  # sums of 128 products, and an online softmax, in f32
            )
