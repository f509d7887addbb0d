"""The layer-major update: one donated program in which no gradient of the whole model ever exists.

The state is stored once, each matrix shared out over all devices along the axis that the rollout
engine shares it out along. Forward, layer by layer, the weights of one layer are gathered, all
sequences go through it, and only its inputs are kept. Backward, a layer's gradient is accumulated
in f32 over all micro-batches, reduced, clipped, given to the optimizer, and dropped. What a layer
costs in communication does not depend on the number of micro-batches, and neither does the result.
"""

from collections.abc import Callable
from dataclasses import replace
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
from trainer.update import head as heads
from trainer.update import optimizer as optimizers
from trainer.update.attention import row_attention
from trainer.update.backward import (
    Apply,
    apply_kept,
    backward_fused,
    backward_kept,
    in_place,
    square_norm,
)
from trainer.update.forward import Program, behind, forward, micro_batches
from trainer.update.head import FSDP
from trainer.update.layout import State, abstract_state
from trainer.update.masters import cast
from trainer.update.optimizer import LeafState, clip_scale, update_leaf
from trainer.update.program import Learned, Update
from trainer.update.rows import Rows, abstract_rows, to_rows


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
    def reader_of(tree: Any, params_specs: tuple[PartitionSpec, ...]) -> Any:
        specs = jax.tree.unflatten(tree, params_specs)
        return jax.jit(
            share(partial(logprobs, program), in_specs=(specs, by_row), out_specs=by_row)
        )

    def reader(params: Any) -> Any:
        leaves, tree = jax.tree.flatten(params)
        return reader_of(tree, tuple(leaf.sharding.spec for leaf in leaves))

    rate = optimizers.learning_rate(job)
    place = lambda rows: jax.device_put(rows, NamedSharding(mesh, by_row))
    rows = abstract_rows(job, NamedSharding(mesh, by_row))

    def step(state: State, batch: Batch) -> tuple[State, Learned]:
        state, said = jitted(state, place(to_rows(batch, job)))
        return state, Learned.of(said, learning_rate=rate(int(state["updates"]) - 1))

    def logprobs_of(params: Any, batch: Batch) -> np.ndarray:
        found = reader(params)(params, place(to_rows(batch, job)))
        return np.asarray(found).reshape(np.shape(batch.completion_mask))

    return Update(
        abstract=abstract,
        init=_init(abstract),
        params=_masters,
        step=step,
        logprobs=logprobs_of,
        lower=lambda: jitted.lower(abstract, rows),
        lower_logprobs=lambda params: reader(params).lower(params, rows),
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


def _head(program: Program, params: Any) -> jax.Array:
    return cast(params["embed" if program.architecture.tied_head else "head"], program.dtype)


def logprobs(program: Program, params: Any, rows: Rows) -> jax.Array:
    """Logprobs of this device's completion tokens, f32[rows, token].

    Args:
        program: what it is compiled for.
        params: this device's share of the masters, split or plain.
        rows: this device's.
    """
    x, _ = forward(program, params, rows, keep=False)
    return _logprobs_of(program, params, behind(program, rows, x), x)


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
    x, inputs = forward(program, params, rows, keep=True)
    rows = behind(program, rows, x)
    rows = _with_sequence_ratio(program, params, rows, x)
    flat, norm = x.reshape(-1, *x.shape[2:]), cast(params["norm"], jnp.float32)
    top = heads.head_pass(flat, _head(program, params), norm, rows, job, program.architecture)
    count = state["updates"]
    rate = jnp.asarray(optimizers.learning_rate(job)(count))
    apply = partial(update_leaf, job=job, count=count, rate=rate)
    finish = _clipped_by_layer if job.update.clip == "per_layer" else _clipped_by_global_norm
    after, square = finish(program, state, rows, inputs, top, apply)
    said = {"loss": top.loss, "grad_norm": jnp.sqrt(square), **top.sums}
    return {**after, "updates": count + 1}, said


def _clipped_by_layer(
    program: Program, state: State, rows: Rows, inputs: Any, top: heads.HeadPass, apply: Apply
) -> tuple[State, jax.Array]:
    """The new state, each group of leaves clipped by its own norm; the square of the whole norm.

    Groups: each layer; an untied head with the final norm, updated before the layers so that its
    gradient is gone by then (0.5 GiB a chip of 7B); what is left, after them.
    """

    def group(gradients: dict[str, jax.Array]) -> tuple[dict[str, LeafState], jax.Array]:
        square = square_norm(gradients)
        scale = clip_scale(jnp.sqrt(square), program.job)
        return in_place(apply, {name: state[name] for name in gradients}, gradients, scale), square

    dx = top.dx.reshape(micro_batches(program, rows)[0].shape + top.dx.shape[-1:])
    above, square = _above(program, top), jnp.float32(0)
    after: State = {}
    if not program.architecture.tied_head:
        after, square = group(above)
        after, dx = jax.lax.optimization_barrier((after, dx))
        dx, above = behind(program, dx, square), {}
    else:
        dx = behind(program, dx, above["norm"])
    dx, layers, of_layers = backward_fused(program, state, rows, dx, inputs, apply)
    dx = behind(program, dx, of_layers)
    rest, of_rest = group(_with_embedding(program, rows, dx, above))
    return {**after, **rest, "layers": layers}, square + of_layers + of_rest


def _clipped_by_global_norm(
    program: Program, state: State, rows: Rows, inputs: Any, top: heads.HeadPass, apply: Apply
) -> tuple[State, jax.Array]:
    """The new state, all gradients clipped by their norm together; the square of that norm."""
    dx = top.dx.reshape(micro_batches(program, rows)[0].shape + top.dx.shape[-1:])
    above = _above(program, top)
    dx = behind(program, dx, above["norm"])
    (dx, square), kept = backward_kept(program, state, rows, dx, inputs)
    rest = _with_embedding(program, rows, behind(program, dx, square), above)
    square = square + square_norm(rest)
    scale = clip_scale(jnp.sqrt(square), program.job)
    after: State = in_place(apply, {name: state[name] for name in rest}, rest, scale)
    return {**after, "layers": apply_kept(program, state, kept, scale, apply)}, square


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
    tokens = behind(program, micro_batches(program, rows)[0], dx)
    embed, _ = jax.lax.scan(add, start, (tokens, dx))
    return {**above, "embed": embed}
