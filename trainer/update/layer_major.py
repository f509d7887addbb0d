"""The layer-major update: one donated program in which no gradient of the whole model ever exists.

The state is stored once, each matrix shared out over all devices along the axis that the rollout
engine shares it out along. Forward, layer by layer, the weights of one layer are gathered, all
sequences go through it, and only its inputs are kept. Backward, a layer's gradient is accumulated
in f32 over all micro-batches, reduced, clipped, given to the optimizer, and dropped. What a layer
costs in communication does not depend on the number of micro-batches, and neither does the result.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jobs.spec import Job
from trainer.architecture import Architecture
from trainer.data import Batch
from trainer.grpo import LOSSES, sequence_ratios
from trainer.mesh import replicated
from trainer.model import decoder_layer, position_angles
from trainer.update import head as heads
from trainer.update import optimizer as optimizers
from trainer.update.attention import RowAttention, row_attention
from trainer.update.head import FSDP
from trainer.update.layout import (
    State,
    abstract_state,
    layer_masters,
    layer_of,
    put_layer,
    shared_axis,
)
from trainer.update.masters import cast
from trainer.update.optimizer import LeafState, clip_scale, update_leaf
from trainer.update.program import Learned, Update
from trainer.update.rows import Rows, abstract_rows, to_rows


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the program is compiled for.

    Attributes:
        job: its update, train and rollout parts.
        architecture: the model's.
        shards: devices that the state and the rows are shared out over.
        attention: inside a row.
    """

    job: Job
    architecture: Architecture
    shards: int
    attention: RowAttention

    @property
    def dtype(self) -> Any:
        """Of activations and gathered matrices."""
        return jnp.dtype(self.job.update.update_dtype)

    @property
    def rows_at_once(self) -> int:
        """Rows of one micro-batch on one device."""
        return self.job.micro_batch_size // self.job.sequences_per_row // self.shards


def make(job: Job, architecture: Architecture, mesh: Mesh) -> Update:
    """The layer-major design of `program.Update`."""
    program = Program(
        job=job,
        architecture=architecture,
        shards=mesh.shape[FSDP],
        attention=row_attention(job, architecture),
    )
    abstract = abstract_state(job, architecture, mesh)
    state_shardings = jax.tree.map(lambda x: x.sharding, abstract)
    specs = jax.tree.map(lambda s: s.spec, state_shardings)
    by_row, whole = PartitionSpec(FSDP), PartitionSpec()
    share = partial(jax.shard_map, mesh=mesh, check_vma=False)
    jitted = jax.jit(
        share(partial(update, program), in_specs=(specs, by_row), out_specs=(specs, whole)),
        donate_argnums=0,
        out_shardings=(state_shardings, replicated(mesh)),
    )

    @cache
    def forward(params_specs: Any) -> Any:
        specs = jax.tree.unflatten(*params_specs)
        return jax.jit(
            share(partial(logprobs, program), in_specs=(specs, by_row), out_specs=by_row)
        )

    rate = optimizers.learning_rate(job)
    place = lambda rows: jax.device_put(rows, NamedSharding(mesh, by_row))

    def step(state: State, batch: Batch) -> tuple[State, Learned]:
        state, said = jitted(state, place(to_rows(batch, job)))
        return state, Learned.of(said, learning_rate=rate(int(state["updates"]) - 1))

    def logprobs_of(params: Any, batch: Batch) -> np.ndarray:
        leaves, tree = jax.tree.flatten(params)
        run = forward((tree, tuple(leaf.sharding.spec for leaf in leaves)))
        found = run(params, place(to_rows(batch, job)))
        return np.asarray(found).reshape(np.shape(batch.completion_mask))

    return Update(
        init=_init(abstract),
        params=_masters,
        step=step,
        logprobs=logprobs_of,
        lower=lambda: jitted.lower(abstract, abstract_rows(job, NamedSharding(mesh, by_row))),
    )


def _init(abstract: State) -> Callable[[Any], State]:
    """The first state from f32 parameters, a leaf at a time, each let go as soon as it is split."""

    @cache  # layers of a list are alike: one program serves them all
    def splitter(like: LeafState) -> Any:
        shardings = jax.tree.map(lambda x: x.sharding, like)
        return jax.jit(partial(optimizers.first_state, like=like), out_shardings=shardings)

    def take(leaf: Any, at: LeafState) -> LeafState:
        return splitter(at)(jax.device_put(leaf, at.master.hi.sharding))

    def init(params: Any) -> State:
        layers = abstract["layers"]
        names = list(layers if isinstance(layers, dict) else layers[0])
        taken: Any = {} if isinstance(layers, dict) else [{} for _ in layers]
        for name in names:
            leaf = params["layers"].pop(name)
            if isinstance(layers, dict):
                taken[name] = take(leaf, layers[name])
            else:
                for i, layer in enumerate(layers):
                    taken[i][name] = take(leaf[i], layer[name])
        rest = {
            name: take(params.pop(name), abstract[name])
            for name in abstract
            if name not in ("layers", "updates")
        }
        # Where the program leaves it: elsewhere, the second update would be another program.
        updates = jax.device_put(jnp.int32(0), abstract["updates"].sharding)
        return {**rest, "layers": taken, "updates": updates}

    return init


def _masters(state: State) -> Any:
    """The parameter tree of split masters, by reference."""
    return jax.tree.map(
        lambda leaf: leaf.master,
        {name: leaf for name, leaf in state.items() if name != "updates"},
        is_leaf=lambda x: isinstance(x, LeafState),
    )


# ---- inside the shard_map: arrays are one device's share --------------------------------------


def _gathered(program: Program, layer: dict[str, Any]) -> dict[str, jax.Array]:
    """One layer's masters, whole: matrices and biases in the compute dtype, norms exact f32."""
    weights: dict[str, jax.Array] = {}
    for name, leaf in layer.items():
        axis = shared_axis(name)
        if axis is None:
            weights[name] = cast(leaf, jnp.float32)
        else:
            own = cast(leaf, program.dtype)
            weights[name] = jax.lax.all_gather(own, FSDP, axis=axis, tiled=True)
    return weights


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


def _square_norm(gradients: dict[str, jax.Array]) -> jax.Array:
    """The squared 2-norm over all devices' shares, f32[]."""
    shared = [jnp.sum(g**2) for name, g in gradients.items() if shared_axis(name) is not None]
    whole = [jnp.sum(g**2) for name, g in gradients.items() if shared_axis(name) is None]
    return jax.lax.psum(sum(shared, start=jnp.float32(0)), FSDP) + sum(whole, start=jnp.float32(0))


def _layer(program: Program, x: jax.Array, weights: Any, rows: Any) -> jax.Array:
    """One layer on one micro-batch: x [rows, seq, embed], rows (positions, real)."""
    positions, real = rows
    attend = lambda q, k, v: (program.attention(q, k, v, real), None)
    angles = position_angles(positions, program.architecture)
    return decoder_layer(x, weights, program.architecture, angles=angles, attend=attend)[0]


def _over_layers(
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    *,
    layers: Any,
    saved: Any = None,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """`body(carry, layer, saved of the layer)` for each layer: a scan, or unrolled for a list."""
    if not isinstance(layers, list):
        count = jax.tree.leaves(layers)[0].shape[0]
        step = lambda carry, at: body(carry, at[0], at[1])
        return jax.lax.scan(step, carry, (jnp.arange(count), saved), reverse=reverse)
    count = len(layers)
    kept: list[Any] = [None] * count
    for i in reversed(range(count)) if reverse else range(count):
        carry, kept[i] = body(carry, i, None if saved is None else saved[i])
    return carry, kept


def _tied(program: Program, layers: Any, layer: Any, to: jax.Array) -> Any:
    """The layer, to be touched only once `to` is there: unrolled, XLA would gather all first."""
    if isinstance(layers, list):
        layer = jax.lax.optimization_barrier((layer, to))[0]
    return _behind(program, layer, to)


def _behind(program: Program, value: Any, to: jax.Array) -> Any:
    """The value; on virtual CPU devices not before `to` is there.

    XLA's CPU runtime (jaxlib 0.8.2) starts a collective that follows a loop while the loop's own
    still run, unless one needs what the other gives: devices then wait for each other for ever, or
    take each other's arrays. Barriers are gone by then, so here a number of `to` decides what is
    read: a dependency that cannot be optimised away, and changes nothing until there is a NaN.
    """
    if program.shards == 1 or program.job.target.platform != "cpu":
        return value
    broken = jnp.isnan(to.reshape(-1)[0])
    return jax.tree.map(lambda x: jnp.where(broken, jnp.zeros_like(x), x), value)


def _micro_batches(program: Program, rows: Rows) -> Any:
    """(tokens, positions, real) as [micro-batches, rows, seq]."""
    split = lambda x: x.reshape(-1, program.rows_at_once, x.shape[-1])
    return split(rows.tokens), split(rows.positions), split(rows.real)


def _forward(program: Program, params: Any, rows: Rows, *, keep: bool) -> tuple[jax.Array, Any]:
    """The last layer's output [micro-batches, rows, seq, embed], and every layer's input."""
    tokens, positions, real = _micro_batches(program, rows)
    table, layers = cast(params["embed"], program.dtype), params["layers"]
    x = jax.lax.map(partial(heads.embed, table), tokens)

    def body(x: jax.Array, i: Any, _: Any) -> tuple[jax.Array, Any]:
        weights = _gathered(
            program, _tied(program, layers, layer_masters(layers, i, program.job), x)
        )
        one = lambda part: _layer(program, part[0], weights, part[1])
        return jax.lax.map(one, (x, (positions, real))), x if keep else None

    return _over_layers(body, x, layers=layers)


def _head(program: Program, params: Any) -> jax.Array:
    return cast(params["embed" if program.architecture.tied_head else "head"], program.dtype)


def logprobs(program: Program, params: Any, rows: Rows) -> jax.Array:
    """Logprobs of this device's completion tokens, f32[rows, token].

    Args:
        program: what it is compiled for.
        params: this device's share of the masters, split or plain.
        rows: this device's.
    """
    x, _ = _forward(program, params, rows, keep=False)
    return _logprobs_of(program, params, _behind(program, rows, x), x)


def _with_sequence_ratio(program: Program, params: Any, rows: Rows, x: jax.Array) -> Rows:
    """The rows with each completion's ratio, where the loss wants it: one more pass of the head."""
    wanted = LOSSES[program.job.train.loss].ratio == "sequence"
    if not wanted or rows.old_logprobs is None:
        return rows
    by_completion = lambda y: y.reshape(-1, program.job.rollout.max_completion_tokens)
    now = _logprobs_of(program, params, rows, x)
    ratios = sequence_ratios(*(by_completion(y) for y in (now, rows.old_logprobs, rows.mask)))
    spread = jnp.broadcast_to(ratios, by_completion(now).shape).reshape(rows.mask.shape)
    return replace(rows, sequence_ratio=spread)


def _logprobs_of(program: Program, params: Any, rows: Rows, x: jax.Array) -> jax.Array:
    x, norm = x.reshape(-1, *x.shape[2:]), cast(params["norm"], jnp.float32)
    head = _head(program, params)
    return heads.head_logprobs(x, head, norm, rows, program.job, program.architecture)


def update(program: Program, state: State, rows: Rows) -> tuple[State, dict[str, jax.Array]]:
    """One application of the optimizer to the whole state.

    Args:
        program: what it is compiled for.
        state: this device's share.
        rows: this device's.

    Returns:
        The state after it, and f32[] loss, grad_norm and the sums of `head.HeadPass`.
    """
    job = program.job
    params = _masters(state)
    x, inputs = _forward(program, params, rows, keep=True)
    rows = _behind(program, rows, x)
    rows = _with_sequence_ratio(program, params, rows, x)
    flat, norm = x.reshape(-1, *x.shape[2:]), cast(params["norm"], jnp.float32)
    top = heads.head_pass(flat, _head(program, params), norm, rows, job, program.architecture)
    count = state["updates"]
    apply = partial(_apply, job=job, count=count, rate=optimizers.learning_rate(job)(count))
    finish = _clipped_by_layer if job.update.clip == "per_layer" else _clipped_by_global_norm
    after, square = finish(program, state, rows, inputs, top, apply)
    said = {"loss": top.loss, "grad_norm": jnp.sqrt(square), **top.sums}
    return {**after, "updates": count + 1}, said


Apply = Callable[[str, LeafState, jax.Array], LeafState]


def _clipped_by_layer(
    program: Program, state: State, rows: Rows, inputs: Any, top: heads.HeadPass, apply: Apply
) -> tuple[State, jax.Array]:
    """The new state, each group of leaves clipped by its own norm; the square of the whole norm.

    Groups: each layer; an untied head with the final norm, updated before the layers so that its
    gradient is gone by then (0.5 GiB a chip of 7B); what is left, after them.
    """

    def group(gradients: dict[str, jax.Array]) -> tuple[dict[str, LeafState], jax.Array]:
        square = _square_norm(gradients)
        scale = clip_scale(jnp.sqrt(square), program.job)
        return {name: apply(name, state[name], g * scale) for name, g in gradients.items()}, square

    dx = top.dx.reshape(_micro_batches(program, rows)[0].shape + top.dx.shape[-1:])
    above, square = _above(program, top), jnp.float32(0)
    after: State = {}
    if not program.architecture.tied_head:
        after, square = group(above)
        after, dx = jax.lax.optimization_barrier((after, dx))
        dx, above = _behind(program, dx, square), {}
    else:
        dx = _behind(program, dx, above["norm"])
    dx, layers, of_layers = _backward_fused(program, state, rows, dx, inputs, apply)
    dx = _behind(program, dx, of_layers)
    rest, of_rest = group(_with_embedding(program, rows, dx, above))
    return {**after, **rest, "layers": layers}, square + of_layers + of_rest


def _clipped_by_global_norm(
    program: Program, state: State, rows: Rows, inputs: Any, top: heads.HeadPass, apply: Apply
) -> tuple[State, jax.Array]:
    """The new state, all gradients clipped by their norm together; the square of that norm."""
    dx = top.dx.reshape(_micro_batches(program, rows)[0].shape + top.dx.shape[-1:])
    above = _above(program, top)
    dx = _behind(program, dx, above["norm"])
    (dx, square), kept = _backward_kept(program, state, rows, dx, inputs)
    rest = _with_embedding(program, rows, _behind(program, dx, square), above)
    square = square + _square_norm(rest)
    scale = clip_scale(jnp.sqrt(square), program.job)
    after: State = {name: apply(name, state[name], g * scale) for name, g in rest.items()}
    return {**after, "layers": _apply_kept(program, state, kept, scale, apply)}, square


def _apply(
    name: str, leaf: LeafState, gradient: jax.Array, *, job: Job, count: Any, rate: Any
) -> LeafState:
    return update_leaf(name, leaf, gradient, job, count=count, rate=rate)


def _above(program: Program, top: heads.HeadPass) -> dict[str, jax.Array]:
    """Gradients of head and final norm, f32, this device's share; a tied head's is embed's."""
    head = "embed" if program.architecture.tied_head else "head"
    return {head: top.head, "norm": jax.lax.psum(top.norm, FSDP)}


def _with_embedding(
    program: Program, rows: Rows, dx: jax.Array, above: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The gradients with the embedding's, to which a tied head has already given its part."""
    a = program.architecture
    start = above.get("embed", jnp.zeros((a.vocab // program.shards, a.embed), jnp.float32))
    add = lambda gradient, part: (heads.embed_gradient(gradient, *part), None)
    tokens = _behind(program, _micro_batches(program, rows)[0], dx)
    embed, _ = jax.lax.scan(add, start, (tokens, dx))
    return {**above, "embed": embed}


def _layer_gradient(
    program: Program, layer: dict[str, LeafState], rows: Rows, dx: jax.Array, inputs: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """One layer's gradient, f32, this device's share, and the gradient of its inputs."""
    weights = _gathered(program, {name: leaf.master for name, leaf in layer.items()})
    _, positions, real = _micro_batches(program, rows)

    def one(total: Any, part: Any) -> tuple[Any, jax.Array]:
        x, dy, place = part
        _, back = jax.vjp(lambda x, w: _layer(program, x, w, place), x, weights)
        dx, gradient = back(dy)
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, gradient), dx

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    total, dx = jax.lax.scan(one, zeros, (inputs, dx, (positions, real)))
    return _reduced(total), dx


def _backward_fused(
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

    def body(carry: Any, i: Any, x: jax.Array) -> tuple[Any, None]:
        dx, layers, square = carry
        layer = _tied(program, layers, layer_of(layers, i, program.job), dx)
        gradients, dx = _layer_gradient(program, layer, rows, dx, x)
        of_layer = _square_norm(gradients)
        scale = clip_scale(jnp.sqrt(of_layer), program.job)
        new = {name: apply(name, layer[name], g * scale) for name, g in gradients.items()}
        return (dx, put_layer(layers, i, new, program.job), square + of_layer), None

    layers = state["layers"]
    start = (dx, layers, jnp.float32(0))
    (dx, layers, square), _ = _over_layers(body, start, layers=layers, saved=inputs, reverse=True)
    return dx, layers, square


def _backward_kept(
    program: Program, state: State, rows: Rows, dx: jax.Array, inputs: Any
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """Backward, every layer's gradient kept in bf16 until the norm of all is known.

    The norm is that of the f32 gradients: it is exact.
    """
    layers = state["layers"]

    def body(carry: Any, i: Any, x: jax.Array) -> tuple[Any, Any]:
        dx, square = carry
        layer = _tied(program, layers, layer_of(layers, i, program.job), dx)
        gradients, dx = _layer_gradient(program, layer, rows, dx, x)
        kept = {name: g.astype(jnp.bfloat16) for name, g in gradients.items()}
        return (dx, square + _square_norm(gradients)), kept

    start = (dx, jnp.float32(0))
    return _over_layers(body, start, layers=layers, saved=inputs, reverse=True)


def _apply_kept(
    program: Program,
    state: State,
    gradients: Any,
    scale: jax.Array,
    apply: Apply,
) -> Any:
    """The layers' new state from their kept gradients."""

    def body(layers: Any, i: Any, kept: Any) -> tuple[Any, None]:
        layer = layer_of(layers, i, program.job)
        new = {
            name: apply(name, layer[name], g.astype(jnp.float32) * scale)
            for name, g in kept.items()
        }
        return put_layer(layers, i, new, program.job), None

    layers = state["layers"]
    return _over_layers(body, layers, layers=layers, saved=gradients)[0]
