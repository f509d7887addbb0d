"""The layers forward, inside layer_major's shard_map: arrays here are one device's share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jobs.spec import Job
from trainer.architecture import Architecture
from trainer.axes import shared_axis
from trainer.model import decoder_layer, position_angles
from trainer.update import head as heads
from trainer.update.attention import RowAttention
from trainer.update.head import FSDP
from trainer.update.layout import layer_masters
from trainer.update.masters import cast
from trainer.update.rows import Rows


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


def own_share(program: Program, layer: dict[str, Any]) -> dict[str, jax.Array]:
    """This device's share of a layer: matrices and biases in the compute dtype, norms exact f32."""
    dtype = lambda name: jnp.float32 if shared_axis(name) is None else program.dtype
    return {name: cast(leaf, dtype(name)) for name, leaf in layer.items()}


def gathered(own: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A layer's weights, whole, from all devices' shares."""
    weights: dict[str, jax.Array] = {}
    for name, share in own.items():
        axis = shared_axis(name)
        gather = partial(jax.lax.all_gather, axis_name=FSDP, tiled=True)
        weights[name] = share if axis is None else gather(share, axis=axis)
    return weights


def layer_on_rows(program: Program, x: jax.Array, weights: Any, rows: Any) -> jax.Array:
    """One layer on one micro-batch: x [rows, seq, embed], rows (positions, real)."""
    positions, real = rows
    attend = lambda q, k, v: (program.attention(q, k, v, real), None)
    angles = position_angles(positions, program.architecture)
    return decoder_layer(x, weights, program.architecture, angles=angles, attend=attend)[0]


def over_layers(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, *, layers: Any, reverse: bool = False
) -> tuple[Any, Any]:
    """`body(carry, layer)` for each layer's index: a scan, or unrolled for a list."""
    if not isinstance(layers, list):
        count = jax.tree.leaves(layers)[0].shape[0]
        return jax.lax.scan(body, carry, jnp.arange(count), reverse=reverse)
    count = len(layers)
    kept: list[Any] = [None] * count
    for i in reversed(range(count)) if reverse else range(count):
        carry, kept[i] = body(carry, i)
    return carry, kept


def together(program: Program, values: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    """Both, neither of which exists before the other does.

    Unrolled, XLA would otherwise gather every layer's weights, and make every layer's accumulator,
    before the first layer's turn.
    """
    if program.job.update.layers == "per_layer":
        values, x = jax.lax.optimization_barrier((values, x))
    return behind(program, values, x), x


def behind(program: Program, value: Any, to: jax.Array) -> Any:
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


def micro_batches(program: Program, rows: Rows) -> Any:
    """(tokens, positions, real) as [micro-batches, rows, seq]."""
    split = lambda x: x.reshape(-1, program.rows_at_once, x.shape[-1])
    return split(rows.tokens), split(rows.positions), split(rows.real)


def forward(program: Program, params: Any, rows: Rows, *, keep: bool) -> tuple[jax.Array, Any]:
    """The last layer's output [micro-batches, rows, seq, embed], and every layer's input."""
    tokens, positions, real = micro_batches(program, rows)
    table, layers = cast(params["embed"], program.dtype), params["layers"]
    x = jax.lax.map(partial(heads.embed, table), tokens)

    def body(x: jax.Array, i: Any) -> tuple[jax.Array, Any]:
        own = own_share(program, layer_masters(layers, i, program.job))
        own, x = together(program, own, x)
        weights = gathered(own)
        one = lambda part: layer_on_rows(program, part[0], weights, part[1])
        return jax.lax.map(one, (x, (positions, real))), x if keep else None

    return over_layers(body, x, layers=layers)
