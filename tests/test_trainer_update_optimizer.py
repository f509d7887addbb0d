"""Moments in 8 bits: what rounding may not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jobs import spec
from trainer.update.masters import join, split
from trainer.update.optimizer import LeafState, Quantized, decode, encode, encode_root, update_leaf


def job(optimizer):
    return spec.Job(
        name="x",
        accelerator="cpu",
        model="tiny",
        train=spec.Train(optimizer=optimizer),
        update=spec.Update(moments="int8"),
    )


def moments(rows=64, columns=512):
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


def test_rounding_is_right_in_the_mean_and_never_off_by_a_step():
    exact = moments()
    rounded = [decode(encode(jnp.asarray(exact), job("lion"), count=n)) for n in range(400)]
    step = np.abs(exact).max(axis=1, keepdims=True) / 127
    off = (np.stack(rounded) - exact) / step
    assert np.abs(off).max() < 1 + 1e-3
    # The error of a mean of 400: each is at most 1/2 step wide in its standard deviation.
    assert np.abs(off.mean(axis=0)).max() < 6 * 0.5 / np.sqrt(400)
    assert abs(off.mean()) < 1e-3


@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_a_moment_decays_by_its_rate_where_there_is_no_gradient_any_more(optimizer):
    settings = job(optimizer)
    start = moments()
    start[:, 0] = 100.0  # the scale of its row: a hundredth of anything else is less than a step
    zero = jnp.zeros(start.shape)
    root = encode_root(jnp.abs(jnp.asarray(start)), settings, count=0)
    state = LeafState(
        split(zero), encode(jnp.asarray(start), settings, count=0),
        None if optimizer == "lion" else root,
    )  # fmt: skip
    begun = np.abs(decode(state.m))[:, 1:].mean()
    updates = 40
    step = jax.jit(
        lambda state, n: update_leaf("q", state, zero, settings, count=n, rate=jnp.float32(0))
    )
    for n in range(updates):
        state = step(state, jnp.int32(n))
    rate = settings.train.b2 if optimizer == "lion" else settings.train.b1
    # The first column carries the scale; the others decay around it.
    expected = np.sign(start[:, 1:]) * np.abs(start[:, 1:]) * rate**updates
    found = np.asarray(decode(state.m))[:, 1:]
    slope = (found * expected).sum() / (expected**2).sum()
    assert slope == pytest.approx(1.0, abs=0.2), begun
    np.testing.assert_array_equal(join(state.master), 0)


def test_a_root_that_is_divided_by_is_never_rounded_to_nothing():
    roots = np.full((4, 300), 1e-6, np.float32)
    roots[:, 0] = 1.0
    roots[:, 1] = 0.0
    for count in range(20):
        kept = encode_root(jnp.asarray(roots), job("adamw"), count=count)
        assert isinstance(kept, Quantized)
        found = np.asarray(decode(kept))
        assert (found[:, 2:] > 0).all()
        assert (found[:, 1] == 0).all()
