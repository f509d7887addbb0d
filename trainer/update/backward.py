"""The layers backward, inside layer_major's shard_map: arrays here are one device's share.

`backward_fused` updates a layer as soon as its gradient is whole. A clip by the global norm must
know all gradients first: `backward_kept` keeps them in bf16, `apply_kept` has them applied.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trainer.axes import shared_axis
from trainer.update.forward import (
    Program,
    gathered,
    layer_on_rows,
    micro_batches,
    over_layers,
    own_share,
    together,
)
from trainer.update.head import FSDP
from trainer.update.layout import State, index_layer, layer_of, put_layer
from trainer.update.optimizer import LeafState, clip_scale
from trainer.update.rows import Rows

_PARTS = 8  # of a matrix's rows, updated one after the other where it lies

Apply = Callable[[str, LeafState, jax.Array], LeafState]


def _layer_gradient(
    program: Program,
    layer: dict[str, LeafState],
    rows: Rows,
    dx: jax.Array,
    inputs: Callable[[jax.Array], jax.Array],
) -> tuple[dict[str, jax.Array], jax.Array]:
    """One layer's gradient, f32, this device's share, and the gradient of its inputs.

    `dx` is replaced where it lies, and `inputs` read, a micro-batch at a time: 0.08 GiB a chip each
    for 7B and 8 rows of 1536 tokens.
    """
    own = own_share(program, {name: leaf.master for name, leaf in layer.items()})
    (own, zero), dx = together(program, (own, jnp.float32(0)), dx)
    weights = gathered(own)
    _, positions, real = micro_batches(program, rows)

    def one(carry: Any, part: Any) -> tuple[Any, None]:
        total, dx = carry
        j, place = part
        _, back = jax.vjp(lambda x, w: layer_on_rows(program, x, w, place), inputs(j), weights)
        new, gradient = back(jax.lax.dynamic_index_in_dim(dx, j, 0, keepdims=False))
        total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, gradient)
        return (total, jax.lax.dynamic_update_index_in_dim(dx, new, j, 0)), None

    zeros = jax.tree.map(lambda w: jnp.broadcast_to(zero, w.shape), weights)
    count = jnp.arange(positions.shape[0])
    (total, dx), _ = jax.lax.scan(one, (zeros, dx), (count, (positions, real)))
    return _reduced(total), dx


def _reduced(gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The sum of all devices' gradients of one layer, f32, this device's share of it."""
    summed: dict[str, jax.Array] = {}
    for name, gradient in gradients.items():
        axis = shared_axis(name)
        summed[name] = (
            jax.lax.psum(gradient, FSDP)
            if axis is None
            else jax.lax.psum_scatter(gradient, FSDP, scatter_dimension=axis, tiled=True)
        )
    return summed


def _inputs_of(inputs: Any, i: Any) -> Callable[[jax.Array], jax.Array]:
    """A layer's kept inputs, by micro-batch."""
    return lambda j: inputs[i][j] if isinstance(inputs, list) else inputs[i, j]


def backward_fused(
    program: Program,
    state: State,
    rows: Rows,
    dx: jax.Array,
    inputs: Any,
    apply: Apply,
) -> tuple[jax.Array, Any, jax.Array]:
    """Backward, each layer updated as soon as its gradient is whole: no gradient is kept.

    Returns:
        Gradient of the embeddings, the layers' new state, the squared norm of all their gradients.
    """

    def body(carry: Any, i: Any) -> tuple[Any, None]:
        dx, layers, square = carry
        layer = layer_of(layers, i, program.job)
        gradients, dx = _layer_gradient(program, layer, rows, dx, _inputs_of(inputs, i))
        of_layer = square_norm(gradients)
        scale = clip_scale(jnp.sqrt(of_layer), program.job)
        new = _updated(program, apply, layer, gradients, scale)
        new, dx = together(program, new, dx)
        return (dx, put_layer(layers, i, new, program.job), square + of_layer), None

    layers = state["layers"]
    start = (dx, layers, jnp.float32(0))
    (dx, layers, square), _ = over_layers(body, start, layers=layers, reverse=True)
    return dx, layers, square


def backward_kept(
    program: Program, state: State, rows: Rows, dx: jax.Array, inputs: Any
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """Backward, every layer's gradient kept in bf16 until the norm of all is known.

    The norm is that of the f32 gradients: it is exact.
    """
    layers = state["layers"]

    def body(carry: Any, i: Any) -> tuple[Any, Any]:
        dx, square = carry
        layer = layer_of(layers, i, program.job)
        gradients, dx = _layer_gradient(program, layer, rows, dx, _inputs_of(inputs, i))
        kept = {name: g.astype(jnp.bfloat16) for name, g in gradients.items()}
        return (dx, square + square_norm(gradients)), kept

    start = (dx, jnp.float32(0))
    return over_layers(body, start, layers=layers, reverse=True)


def apply_kept(
    program: Program,
    state: State,
    gradients: Any,
    scale: jax.Array,
    apply: Apply,
) -> Any:
    """The layers' new state from their kept gradients."""

    def body(layers: Any, i: Any) -> tuple[Any, None]:
        layer, kept = layer_of(layers, i, program.job), index_layer(gradients, i)
        new = _updated(program, apply, layer, kept, scale)
        return put_layer(layers, i, new, program.job), None

    layers = state["layers"]
    return over_layers(body, layers, layers=layers)[0]


def _updated(
    program: Program,
    apply: Apply,
    layer: dict[str, LeafState],
    gradients: dict[str, jax.Array],
    scale: jax.Array,
) -> dict[str, LeafState]:
    """One layer updated by its gradients, f32 or bf16, times `scale`, f32[].

    A stack of layers is a loop's carry already.
    """
    if program.job.update.layers == "per_layer":
        return in_place(apply, layer, gradients, scale)
    return {name: apply(name, layer[name], g * scale) for name, g in gradients.items()}


def in_place(
    apply: Apply, leaves: dict[str, LeafState], gradients: dict[str, jax.Array], scale: jax.Array
) -> dict[str, LeafState]:
    """The leaves updated by their gradients times `scale`, matrices some rows at a time.

    Carried by a loop they are updated where they lie. Otherwise XLA makes `lo` aside, as both
    halves need the old ones, and copies it at the end: 0.25 GiB a chip for the head of 7B, 2.7 for
    single layers.
    """
    matrices = {name: leaf for name, leaf in leaves.items() if gradients[name].ndim == 2}
    parts = math.gcd(_PARTS, *(gradients[name].shape[0] for name in matrices))

    def one(name: str, leaf: LeafState, i: jax.Array) -> LeafState:
        rows = gradients[name].shape[0] // parts
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, i * rows, rows)
        put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, i * rows, 0)
        new = apply(name, jax.tree.map(take, leaf), take(gradients[name]) * scale)
        return jax.tree.map(put, leaf, new)

    body = lambda i, part: {name: one(name, leaf, i) for name, leaf in part.items()}
    done = jax.lax.fori_loop(0, parts, body, matrices)
    small = {
        name: apply(name, leaf, gradients[name] * scale)
        for name, leaf in leaves.items()
        if name not in matrices
    }
    return {**done, **small}


def square_norm(gradients: dict[str, jax.Array]) -> jax.Array:
    """The squared 2-norm over all devices' shares, f32[]."""
    shared = [jnp.sum(g**2) for name, g in gradients.items() if shared_axis(name) is not None]
    whole = [jnp.sum(g**2) for name, g in gradients.items() if shared_axis(name) is None]
    return jax.lax.psum(sum(shared, start=jnp.float32(0)), FSDP) + sum(whole, start=jnp.float32(0))
