"""How layer_major's state lies on the devices: axes, dtypes, memory kinds, one layer of it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jobs.spec import Job
from trainer.architecture import Architecture, leaf_shapes
from trainer.axes import LEAF_AXES, on_host, shared_axis
from trainer.mesh import MeshError
from trainer.update.head import FSDP
from trainer.update.masters import Split
from trainer.update.optimizer import LeafState, Quantized

# {"embed", "norm", "head": LeafState, "layers": {name: LeafState} stacked or [{name: LeafState}],
#  "updates": i32[], optimizer applications so far}
State = dict[str, Any]


def abstract_state(job: Job, architecture: Architecture, mesh: Mesh) -> State:
    """The state as shapes, dtypes and shardings, with no memory behind it.

    Raises:
        MeshError: an axis that does not divide over the devices.
    """
    state: State = {"layers": {}}
    for path, shape in leaf_shapes(architecture).items():
        in_layers = path[0] == "layers"
        single = in_layers and job.update.layers == "per_layer"
        leaf = _abstract_leaf(job, mesh, path[-1], shape[1:] if single else shape)
        (state["layers"] if in_layers else state)[path[-1]] = leaf
    if job.update.layers == "per_layer":
        state["layers"] = [dict(state["layers"]) for _ in range(architecture.layers)]
    everywhere = NamedSharding(mesh, PartitionSpec())
    state["updates"] = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return state


def _abstract_leaf(job: Job, mesh: Mesh, name: str, shape: tuple[int, ...]) -> LeafState:
    shards, axis = mesh.shape[FSDP], shared_axis(name)
    if axis is not None:
        axis += len(shape) - len([a for a in LEAF_AXES[name] if a != "layers"])
        if shape[axis] % shards:
            raise MeshError(
                f"{name}: its {LEAF_AXES[name][axis - len(shape)]} axis of {shape[axis]} cannot be "
                f"shared out over {shards} devices: use an accelerator with a divisor of that many"
            )
    spec = [FSDP if i == axis else None for i in range(len(shape))]

    def array(shape: tuple[int, ...], dtype: Any, part: str, spec: list[Any] = spec) -> Any:
        kind = "pinned_host" if on_host(name, part, job.update.host_offload) else None
        sharding = NamedSharding(mesh, PartitionSpec(*spec), memory_kind=kind)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def moment(part: str) -> Any:
        if job.update.moments == "bfloat16":
            return array(shape, jnp.bfloat16, part)
        # A device's rows have a scale of their own where the last axis is shared out.
        last = shards if axis == len(shape) - 1 else 1
        scales = array((*shape[:-1], last), jnp.float32, part)
        return Quantized(array(shape, jnp.int8, part), scales)

    master = Split(array(shape, jnp.bfloat16, "hi"), array(shape, jnp.int16, "lo"))
    root = moment("momentum") if job.train.optimizer == "adamw" else None
    return LeafState(master, moment("momentum"), root)


def index_layer(layers: Any, i: Any) -> dict[str, Any]:
    """One layer of either layout, each part where it lives."""
    if isinstance(layers, list):
        return layers[i]
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), layers)


def layer_masters(layers: Any, i: Any, job: Job) -> dict[str, Any]:
    """One layer's masters for a forward pass in device memory, from either layout.

    Where `lo` lives on the host and the compute dtype is bf16, it stays there: hi alone is read.
    """
    found: dict[str, Any] = {}
    for name, leaf in index_layer(layers, i).items():
        away = isinstance(leaf, Split) and on_host(name, "lo", job.update.host_offload)
        if away and job.update.update_dtype == "bfloat16":
            found[name] = leaf.hi
        elif away:
            found[name] = Split(leaf.hi, jax.device_put(leaf.lo, jax.memory.Space.Device))
        else:
            found[name] = leaf
    return found


def layer_of(layers: Any, i: Any, job: Job) -> dict[str, LeafState]:
    """One layer's whole state in device memory, from either layout."""
    return _moved(index_layer(layers, i), job, jax.memory.Space.Device)


def put_layer(layers: Any, i: Any, layer: dict[str, LeafState], job: Job) -> Any:
    """The layers with one layer's state replaced, each part back where it lives."""
    layer = _moved(layer, job, jax.memory.Space.Host)
    if isinstance(layers, list):
        return [*layers[:i], layer, *layers[i + 1 :]]
    put = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0)
    return jax.tree.map(put, layers, layer)


def _moved(layer: dict[str, LeafState], job: Job, space: Any) -> dict[str, LeafState]:
    """The offloaded parts of a layer moved to a memory space; the others as they are."""
    move = lambda tree: jax.tree.map(lambda x: jax.device_put(x, space), tree)

    def parts(name: str, leaf: LeafState) -> LeafState:
        lo_too, moments_too = (
            on_host(name, part, job.update.host_offload) for part in ("lo", "momentum")
        )
        master = Split(leaf.master.hi, move(leaf.master.lo)) if lo_too else leaf.master
        moments = (move(leaf.m), move(leaf.v)) if moments_too else (leaf.m, leaf.v)
        return LeafState(master, *moments)

    return {name: parts(name, leaf) for name, leaf in layer.items()}
