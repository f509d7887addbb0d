import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.update.masters import LARGEST, Split, cast, cast_tree, join, split

# Bits of the largest f32 below the half-way point to a bf16 infinity: 0x7F7F, then 15 ones.
LARGEST_BITS = 0x7F7F7FFF
SIGN = 0x80000000
WIDTH = 256
jitted_split, jitted_join = jax.jit(split), jax.jit(join)

magnitudes = st.one_of(
    st.integers(0, LARGEST_BITS),
    st.integers(0, 0x007FFFFF),  # subnormals of f32, and of bf16 below 0x007F0000
    st.integers(0, 0x7F7F).map(lambda high: high << 16),  # bf16 values
    # Ties, and their neighbours on both sides.
    st.tuples(st.integers(0, 0x7F7E), st.sampled_from([0x7FFF, 0x8000, 0x8001])).map(
        lambda parts: (parts[0] << 16) + parts[1]
    ),
)
words = st.tuples(magnitudes, st.sampled_from([0, SIGN])).map(sum)


def floats(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def padded(bits):
    """f32[WIDTH], so that one program serves every example."""
    return floats(np.resize(np.array(bits, np.uint32), WIDTH))


@settings(max_examples=150, deadline=None)
@given(st.lists(words, min_size=1, max_size=WIDTH))
@example([0, SIGN])
@example([1, SIGN + 1, 0x7FFF, 0x8000, 0x8001, SIGN + 0x8000, 0x007FFFFF, 0x00800000])
@example([LARGEST_BITS, SIGN + LARGEST_BITS])
def test_every_finite_value_comes_back_bit_for_bit(bits):
    master = padded(bits)
    halves = jitted_split(master)
    assert (halves.hi.dtype, halves.lo.dtype) == (jnp.bfloat16, jnp.int16)
    back = np.asarray(jitted_join(halves))
    np.testing.assert_array_equal(back.view(np.uint32), master.view(np.uint32))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(words, st.integers(-(2**15), 2**15 - 1)), min_size=1, max_size=WIDTH))
def test_every_pair_of_halves_that_a_split_can_give_comes_back(pairs):
    """The other way: hi and lo -> f32 -> hi and lo, for hi finite and not beyond its last place."""
    high = np.array([word >> 16 for word, _ in pairs], np.uint16)
    low = np.array([low for _, low in pairs], np.int16)
    # Below zero in magnitude there is nothing: 0x0000 with a negative lo is no split.
    low = np.where((high & 0x7FFF) == 0, np.abs(low.astype(int)) % 2**15, low).astype(np.int16)
    high, low = np.resize(high, WIDTH), np.resize(low, WIDTH)
    halves = jitted_split(jitted_join(Split(high.view(ml_dtypes.bfloat16), low)))
    np.testing.assert_array_equal(np.asarray(halves.hi).view(np.uint16), high)
    np.testing.assert_array_equal(np.asarray(halves.lo), low)


@settings(max_examples=150, deadline=None)
@given(st.lists(words, min_size=1, max_size=WIDTH))
def test_hi_is_the_nearest_bfloat16_and_the_larger_of_two_equally_near(bits):
    master = padded(bits)
    hi = np.asarray(jitted_split(master).hi).view(np.uint16)
    tie = (master.view(np.uint32) & 0xFFFF) == 0x8000
    nearest = master.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(hi[~tie], nearest[~tie])
    away_from_zero = (master.view(np.uint32) >> 16) + 1
    np.testing.assert_array_equal(hi[tie], away_from_zero[tie])


def test_largest_is_the_last_value_whose_hi_is_finite():
    assert np.float32(LARGEST).view(np.uint32) == LARGEST_BITS
    last, next_one = floats([LARGEST_BITS]), floats([LARGEST_BITS + 1])
    assert np.isfinite(np.asarray(split(last).hi).astype(np.float32))
    assert np.isinf(np.asarray(split(next_one).hi).astype(np.float32))


def test_a_split_worked_out_by_hand():
    # 1 + 2^-8 is half way between the bf16 neighbours 1 (0x3F80) and 1 + 2^-7 (0x3F81): away from
    # zero, and the f32 lies 2^15 of its last places below hi. -3 is a bf16: nothing is left.
    halves = split(jnp.array([1 + 2**-8, -3.0], jnp.float32))
    np.testing.assert_array_equal(np.asarray(halves.hi, np.float32), [1 + 2**-7, -3.0])
    np.testing.assert_array_equal(halves.lo, [-(2**15), 0])


def test_bfloat16_of_a_split_is_hi_itself_and_f32_the_exact_value():
    master = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    halves = split(master)
    assert cast(halves, jnp.bfloat16) is halves.hi
    np.testing.assert_array_equal(cast(halves, jnp.float32), master)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float16])
def test_a_tree_of_split_and_plain_leaves_is_cast_as_its_values_would_be(dtype):
    random = np.random.default_rng(1)
    plain = {name: random.standard_normal((3, 4)).astype(np.float32) for name in "ab"}
    tree = {"a": split(plain["a"]), "layers": [{"b": jnp.asarray(plain["b"])}]}
    found = cast_tree(tree, dtype)
    assert found["a"].dtype == found["layers"][0]["b"].dtype == dtype
    # These values have no ties, so every rounding to the nearest is the same.
    np.testing.assert_array_equal(found["a"], plain["a"].astype(dtype))
    np.testing.assert_array_equal(found["layers"][0]["b"], plain["b"].astype(dtype))
