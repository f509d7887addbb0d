"""f32 masters as two halves: bf16 `hi`, which engines read as it is, and int16 `lo`, the rest.

hi is the f32 value rounded to the nearest bf16 (half-way cases away from zero), lo the distance in
units of the last place of the f32: bits(f32) = (bits(hi) << 16) + lo. The pair is the exact f32
value for every finite f32 that does not round up to infinity, so no copy of the weights in bf16
beside the masters is ever needed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LARGEST = 3.396177326406364e38  # bits 0x7F7F7FFF; above it, f32 values round to a bf16 infinity


class Split(NamedTuple):
    """An f32 array in two halves of the same shape.

    Attributes:
        hi: bf16.
        lo: int16.
    """

    hi: Any
    lo: Any


def split(master: jax.Array) -> Split:
    """The halves of an f32 array; of its magnitude at most LARGEST, both ways are bit-exact."""
    bits = jax.lax.bitcast_convert_type(master, jnp.uint32)
    high = (bits + jnp.uint32(0x8000)) >> 16
    low = (bits - (high << 16)).astype(jnp.int32).astype(jnp.int16)
    return Split(jax.lax.bitcast_convert_type(high.astype(jnp.uint16), jnp.bfloat16), low)


def join(halves: Split) -> jax.Array:
    """The f32 array of its halves."""
    high = jax.lax.bitcast_convert_type(halves.hi, jnp.uint16).astype(jnp.uint32) << 16
    low = halves.lo.astype(jnp.int32).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(high + low, jnp.float32)


def cast(leaf: Any, dtype: Any) -> jax.Array:
    """A parameter in a dtype, whether it is split or a plain array; bf16 of a split one is free."""
    if not isinstance(leaf, Split):
        return leaf.astype(dtype)
    return leaf.hi if jnp.dtype(dtype) == jnp.bfloat16 else join(leaf).astype(dtype)


def cast_tree(params: Any, dtype: Any) -> Any:
    """Every parameter of a tree in a dtype."""
    return jax.tree.map(
        lambda leaf: cast(leaf, dtype), params, is_leaf=lambda x: isinstance(x, Split)
    )
