"""The hand-over: the trainer's parameters as the engine's leaves, by reference where they lie so.

The engine's leaves have our shapes ([in, out], embedding and head [vocab, embed]) but for keys and
values, whose heads are repeated where there are more devices than heads. They are laid as the
engine's programs read them with the fewest bytes: embedding and head too are shared out, which
sglang-jax 0.0.2 by itself does not (5.07 against 3.55 GiB a chip for 7B on v4-8).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainer.architecture import Architecture
from trainer.axes import of_kv_heads, shared_axis
from trainer.update.masters import Split, cast

_TENSOR = "tensor"
_TOP = {
    "transformer.embed_tokens.embedding": "embed",
    "transformer.norm.scale": "norm",
    "lm_head.embedding": "head",
}
_IN_LAYER = {
    "input_layernorm.scale": "ln1",
    "post_attention_layernorm.scale": "ln2",
    "self_attn.q_norm.scale": "q_norm",
    "self_attn.k_norm.scale": "k_norm",
    "self_attn.o_proj.weight": "o",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
    **{f"self_attn.{name}_proj.weight": name for name in "qkv"},
    **{f"self_attn.{name}_proj.bias": f"{name}_bias" for name in "qkv"},
}


class Place(NamedTuple):
    """Where a leaf of the engine is in the trainer's tree.

    Attributes:
        name: of the trainer's leaf.
        layer: its layer, or None outside the layers.
    """

    name: str
    layer: int | None

    def of(self, params: Any) -> Any:
        """The trainer's leaf, one layer of it, or the whole stack that holds the layer."""
        if self.layer is None:
            return params[self.name]
        layers = params["layers"]
        return layers[self.name] if isinstance(layers, dict) else layers[self.layer][self.name]


def place_of(leaf: str) -> Place:
    """Where an engine's leaf is in the trainer's tree.

    Args:
        leaf: its path in the engine's model, such as transformer.layers.0.mlp.up_proj.weight.

    Raises:
        KeyError: no such leaf is known: the engine is another version.
    """
    if leaf in _TOP:
        return Place(_TOP[leaf], None)
    _, _, rest = leaf.partition("transformer.layers.")
    layer, _, name = rest.partition(".")
    if name not in _IN_LAYER:
        raise KeyError(leaf)
    return Place(_IN_LAYER[name], int(layer))


def leaf_sharding(mesh: Mesh, name: str, ndim: int) -> NamedSharding:
    """How the engine's leaf lies: the trainer's shared axis over the tensor axis."""
    axis = shared_axis(name)
    return NamedSharding(
        mesh, PartitionSpec(*[_TENSOR if i == axis else None for i in range(ndim)])
    )


class HandOver:
    """Trainer's parameters -> the engine's leaves, in the engine's order.

    Args:
        leaves: paths of the engine's leaves.
        shapes: of each.
        mesh: the engine's, of the trainer's devices in the trainer's order.
        architecture: the model's.
        dtype: of the engine's weights.
    """

    def __init__(
        self,
        leaves: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        mesh: Mesh,
        architecture: Architecture,
        dtype: Any,
    ) -> None:
        self.places = [place_of(leaf) for leaf in leaves]
        self.shardings = [
            leaf_sharding(mesh, place.name, len(shape))
            for place, shape in zip(self.places, shapes, strict=True)
        ]
        self._shapes = list(shapes)
        self._repeats = max(1, mesh.shape[_TENSOR] // architecture.kv_heads)
        self._head_dim = architecture.head_dim
        self._dtype = jnp.dtype(dtype)
        self._programs: dict[tuple[int, ...], Callable[[Any], list[jax.Array]]] = {}

    def missing(self, params: Any) -> tuple[int, ...]:
        """The leaves that need a copy; the others are masters that lie as the engine's leaves do.

        Args:
            params: the trainer's, arrays or shapes with shardings.
        """
        wanted = enumerate(zip(self.places, self.shardings, self._shapes, strict=True))
        return tuple(
            i
            for i, (place, sharding, shape) in wanted
            if not self._lies_so(_hi(place.of(params)), sharding, shape)
        )

    def _lies_so(self, hi: Any, sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
        same = hi.shape == shape and hi.dtype == self._dtype
        return same and hi.sharding.is_equivalent_to(sharding, len(shape))

    def __call__(self, params: Any, missing: tuple[int, ...]) -> list[jax.Array]:
        """Every leaf; those that need a copy are made by one program, no bytes of others move.

        Whoever donates the state must let go of the others before.

        Args:
            params: the trainer's.
            missing: `missing` of them.
        """
        made = dict(zip(missing, self.program(missing)(params), strict=True)) if missing else {}
        return [
            made[i] if i in made else self._reference(i, params) for i in range(len(self.places))
        ]

    def program(self, wanted: tuple[int, ...]) -> Any:
        """The jitted map from the parameters to some of the leaves."""
        if wanted not in self._programs:
            where = [self.shardings[i] for i in wanted]
            make = partial(self._make, wanted)
            self._programs[wanted] = jax.jit(make, out_shardings=where)
        return self._programs[wanted]

    def _make(self, wanted: tuple[int, ...], params: Any) -> list[jax.Array]:
        return [self._leaf(i, params) for i in wanted]

    def _leaf(self, i: int, params: Any) -> jax.Array:
        place = self.places[i]
        source = place.of(params)
        if place.layer is not None and isinstance(params["layers"], dict):
            source = jax.tree.map(lambda stack: stack[place.layer], source)
        leaf = cast(source, self._dtype)
        if of_kv_heads(place.name) and self._repeats > 1:
            heads = leaf.reshape(*leaf.shape[:-1], -1, self._head_dim)
            leaf = jnp.repeat(heads, self._repeats, axis=-2)
        return leaf.reshape(self._shapes[i])

    def _reference(self, i: int, params: Any) -> jax.Array:
        # The same bytes under the engine's own mesh: its programs know no other.
        hi = _hi(self.places[i].of(params))
        shards = [shard.data for shard in hi.addressable_shards]
        return jax.make_array_from_single_device_arrays(hi.shape, self.shardings[i], shards)


def _hi(source: Any) -> Any:
    """The half of a master that engines read; a plain one is read whole."""
    return source.hi if isinstance(source, Split) else source
