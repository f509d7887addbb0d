import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jobs.spec import Job, Train
from trainer.grpo import (
    LOSSES,
    batch_advantages,
    centered_advantages,
    constant_weights,
    group_advantages,
    kl_k3,
    leave_one_out_advantages,
    sequence_mean_weights,
    sequence_ratios,
    sequence_sum_weights,
    token_loss,
    token_mean_weights,
    truncated_importance,
)

# f32 has 24 bits: 6e-8 relative; the largest sums here are of 64 numbers.
NEAR = {"rtol": 1e-5, "atol": 1e-5}
quick = settings(max_examples=40, deadline=None)  # a first call compiles
logprob = st.floats(-4.0, 0.0, width=32)
SHAPES = st.sampled_from([(1, 2), (2, 1), (3, 4), (4, 8)])
rewards_of_groups = SHAPES.flatmap(
    lambda shape: arrays.arrays(
        np.float32, shape, elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0])
    )
)


def job(**train):
    return Job(name="grpo", accelerator="cpu", model="tiny", train=Train(**train))


# Advantages


def test_advantages_of_a_group_worked_out_by_hand():
    # Mean 1, population variance (1 + 1 + 0 + 0) / 4 = 0.5, std 0.70711: +-1 / 0.70721.
    found = group_advantages(jnp.array([2.0, 0.0, 1.0, 1.0]), 4)
    np.testing.assert_allclose(found, [1.41401, -1.41401, 0.0, 0.0], atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_rewards_get_zero_advantage(name):
    found = LOSSES[name].advantages(jnp.full(6, 0.5), 3)
    np.testing.assert_array_equal(found, np.zeros(6))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "rloo"])
def test_a_group_of_one_gets_zero_advantage(name):
    found = LOSSES[name].advantages(jnp.array([0.0, 1.0, 2.0]), 1)
    np.testing.assert_array_equal(found, np.zeros(3))


@quick
@given(rewards_of_groups)
def test_advantages_are_each_groups_own_standard_scores(rewards):
    found = np.asarray(group_advantages(jnp.asarray(rewards.reshape(-1)), rewards.shape[1]))
    exact = rewards.astype(np.float64)
    expected = np.array([(g - np.mean(g)) / (np.std(g) + 1e-4) for g in exact]).reshape(-1)
    np.testing.assert_allclose(found, expected, **NEAR)
    np.testing.assert_allclose(found.reshape(rewards.shape).sum(axis=1), 0, atol=1e-4)


@quick
@given(rewards_of_groups)
def test_leave_one_out_compares_with_the_mean_of_the_others(rewards):
    size = rewards.shape[1]
    found = leave_one_out_advantages(jnp.asarray(rewards.reshape(-1)), size)
    expected = [
        float(group[i]) - np.mean(np.delete(group, i)) if size > 1 else 0.0
        for group in rewards.astype(np.float64)
        for i in range(size)
    ]
    np.testing.assert_allclose(found, expected, **NEAR)


def test_centered_and_batch_advantages_by_hand():
    rewards = jnp.array([2.0, 0.0, 1.0, 1.0])
    # Group means 1 and 1.
    np.testing.assert_array_equal(centered_advantages(rewards, 2), [1.0, -1.0, 0.0, 0.0])
    # Mean 1 and std 0.7071 of all four, whatever the group.
    np.testing.assert_allclose(
        batch_advantages(rewards, 2), [np.sqrt(2), -np.sqrt(2), 0.0, 0.0], atol=1e-6
    )


# Token weights


def test_sequence_mean_weights_share_the_loss_over_completions_and_then_over_tokens():
    mask = jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    # A third a completion: 4 tokens of 1/12, 2 of 1/6, 1 of 1/3.
    expected = np.array([[1 / 12] * 4, [1 / 6, 1 / 6, 0, 0], [1 / 3, 0, 0, 0]])
    np.testing.assert_allclose(sequence_mean_weights(mask, 4), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "each"),
    [
        (token_mean_weights, 1 / 6),  # 6 tokens in all
        (constant_weights, 1 / 20),  # 2 completions of at most 10 tokens
        (sequence_sum_weights, 1 / 2),  # 2 completions
    ],
)
def test_the_other_weights_are_the_same_for_every_token(weights, each):
    mask = np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(weights(jnp.asarray(mask), 10), mask * each, rtol=1e-6)


@quick
@given(st.lists(st.integers(0, 6), min_size=4, max_size=4))
def test_mean_weights_sum_to_one_less_the_share_of_what_has_no_token(lengths):
    mask = (np.arange(6)[None] < np.array(lengths)[:, None]).astype(np.float32)
    by_sequence = np.asarray(sequence_mean_weights(jnp.asarray(mask), 6))
    by_token = np.asarray(token_mean_weights(jnp.asarray(mask), 6))
    assert (by_sequence[mask == 0] == 0).all()
    assert (by_token[mask == 0] == 0).all()
    np.testing.assert_allclose(by_sequence.sum(), np.count_nonzero(lengths) / 4, rtol=1e-5)
    np.testing.assert_allclose(by_token.sum(), float(any(lengths)), rtol=1e-5)


# The loss of each token


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, 0),  # nothing to clip
        (1.5, 2.0, -2.6, 1),  # 1.3 x 2: likelier by more than clip_high already
        (1.2, 2.0, -2.4, 0),
        (0.5, 2.0, -1.0, 0),  # less likely, though good: the way back stays open
        (0.5, -2.0, 1.6, 1),  # 0.8 x -2: less likely by more than clip_low already
        (0.9, -2.0, 1.8, 0),
        (1.5, -2.0, 3.0, 0),  # likelier, though bad: the way back stays open
        (1.5, 0.0, 0.0, 0),
    ],
)
def test_the_clipped_objective_by_hand(ratio, advantage, loss, clipped):
    asked, old = job(clip_low=0.2, clip_high=0.3), jnp.array([[-1.0]])

    def total(logprobs):
        found = token_loss(
            logprobs, jnp.array([[advantage]]), asked, old_logprobs=old, ref_logprobs=None
        )
        return found.loss.sum(), found

    (value, found), gradient = jax.value_and_grad(total, has_aux=True)(old + np.log(ratio))
    np.testing.assert_allclose(value, loss, rtol=1e-5, atol=1e-6)
    assert float(found.clipped[0, 0]) == clipped
    assert float(found.kl[0, 0]) == 0
    # d(-ratio A) / d logprob = -ratio A where the clip leaves it.
    expected = 0.0 if clipped else -ratio * advantage
    np.testing.assert_allclose(gradient, [[expected]], rtol=1e-5, atol=1e-6)


@quick
@given(
    arrays.arrays(np.float32, (3, 4), elements=logprob),
    arrays.arrays(np.float32, (3, 4), elements=logprob),
    arrays.arrays(np.float32, (3,), elements=st.floats(-2, 2, width=16)),
    st.sampled_from([("grpo", 0.8, 1.2), ("dapo", 0.8, 1.28), ("rloo", 0.0, np.inf)]),
)
def test_token_losses_are_the_papers_formula_token_by_token(new, old, advantages, variant):
    name, least, most = variant
    found = token_loss(
        jnp.asarray(new),
        jnp.asarray(np.broadcast_to(advantages[:, None], new.shape)),
        job(loss=name),
        old_logprobs=jnp.asarray(old),
        ref_logprobs=None,
    )
    for row in range(3):
        for column in range(4):
            ratio = np.exp(float(new[row, column]) - float(old[row, column]))
            gain = float(advantages[row])
            bounded = min(max(ratio, least), most)
            # exp(4) x 2 = 109 is the largest, with f32's relative error.
            np.testing.assert_allclose(
                found.loss[row, column], -min(ratio * gain, bounded * gain), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("name", LOSSES)
def test_an_update_on_its_own_samples_has_the_policy_gradient(name):
    """Without old logprobs the ratio is 1 and its gradient is -A: the REINFORCE estimate."""
    logprobs = jnp.array([[-0.5, -2.0], [-1.0, -0.1]])
    advantages = jnp.array([[1.5, 1.5], [-0.5, -0.5]])
    loss = lambda x: token_loss(x, advantages, job(loss=name), old_logprobs=None, ref_logprobs=None)
    np.testing.assert_allclose(loss(logprobs).loss, -advantages)
    np.testing.assert_array_equal(loss(logprobs).clipped, np.zeros((2, 2)))
    np.testing.assert_allclose(jax.grad(lambda x: loss(x).loss.sum())(logprobs), -advantages)


def test_gspo_clips_by_the_sequence_and_learns_by_the_token():
    new, old = jnp.log(jnp.array([[0.4, 0.9]])), jnp.log(jnp.array([[0.2, 0.2]]))
    mask = jnp.ones((1, 2))
    # Token ratios 2 and 4.5: the geometric mean is sqrt(9) = 3.
    ratio = sequence_ratios(new, old, mask)
    np.testing.assert_allclose(ratio, [[3.0]], rtol=1e-6)
    # A masked token does not count: 2 alone.
    np.testing.assert_allclose(
        sequence_ratios(new, old, jnp.array([[1.0, 0.0]])), [[2.0]], rtol=1e-6
    )

    def total(logprobs, advantage):
        found = token_loss(
            logprobs,
            jnp.full((1, 2), advantage),
            job(loss="gspo", clip_low=0.2, clip_high=0.2),
            old_logprobs=old,
            ref_logprobs=None,
            sequence_ratio=ratio,
        )
        return found.loss.sum(), found.clipped

    grad = jax.value_and_grad(total, has_aux=True)
    (value, clipped), gradient = grad(new, -1.0)
    # Likelier though bad: not clipped, -3 x -1 twice, and 3 of gradient for each token.
    np.testing.assert_allclose((value, *gradient[0]), (6.0, 3.0, 3.0), rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[0.0, 0.0]])
    (value, clipped), gradient = grad(new, 1.0)
    np.testing.assert_allclose((value, *gradient[0]), (-2.4, 0.0, 0.0), rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[1.0, 1.0]])


# KL


def test_k3_by_hand():
    # r = reference / policy = 2: 2 - ln 2 - 1; r = 1/2: 1/2 + ln 2 - 1; equal: 0.
    found = kl_k3(jnp.log(jnp.array([0.25, 0.5, 0.5])), jnp.log(jnp.array([0.5, 0.25, 0.5])))
    np.testing.assert_allclose(found, [1 - np.log(2), np.log(2) - 0.5, 0.0], atol=1e-6)


@quick
@given(
    arrays.arrays(np.float32, (2, 5), elements=logprob),
    arrays.arrays(np.float32, (2, 5), elements=logprob),
)
def test_k3_is_never_below_zero_and_zero_against_itself(policy, reference):
    found = np.asarray(kl_k3(jnp.asarray(policy), jnp.asarray(reference)))
    # r - ln r - 1 cancels to within f32's 6e-8 of its terms where r is near 1.
    assert (found >= -2e-7).all()
    np.testing.assert_array_equal(kl_k3(jnp.asarray(policy), jnp.asarray(policy)), np.zeros((2, 5)))


def test_k3_averages_to_the_kl_divergence():
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.5, 0.3])
    each = np.asarray(kl_k3(jnp.log(jnp.asarray(p)), jnp.log(jnp.asarray(q))))
    np.testing.assert_allclose(p @ each, np.sum(p * np.log(p / q)), rtol=1e-5)


def test_beta_adds_that_share_of_the_kl_and_its_gradient():
    new, reference = jnp.log(jnp.array([[0.25]])), jnp.log(jnp.array([[0.5]]))
    advantages = jnp.array([[1.0]])
    loss = lambda x: token_loss(
        x, advantages, job(beta=0.1), old_logprobs=None, ref_logprobs=reference
    )
    np.testing.assert_allclose(loss(new).kl, [[1 - np.log(2)]], rtol=1e-5)
    np.testing.assert_allclose(loss(new).loss, [[-1 + 0.1 * (1 - np.log(2))]], rtol=1e-5)
    # d k3 / d logprob = 1 - r = -1.
    np.testing.assert_allclose(jax.grad(lambda x: loss(x).loss.sum())(new), [[-1.1]], rtol=1e-5)


def test_importance_is_the_ratio_of_the_two_programs_up_to_the_cap():
    trainer, engine = jnp.log(jnp.array([0.5, 0.5, 0.1])), jnp.log(jnp.array([0.4, 0.1, 0.2]))
    # 1.25; 5, cut to 2; 0.5.
    np.testing.assert_allclose(
        truncated_importance(trainer, engine, cap=2.0), [1.25, 2.0, 0.5], rtol=1e-6
    )
