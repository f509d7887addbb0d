"""The device mesh of a job, and where each array lies on it.

Axes: dp (copies of the state), fsdp (shares of the state), tp (shares of each matrix). Sequences
are shared out over dp x fsdp. A logical axis is laid on a mesh axis by one of two tables: the
trainer's state is shared out over fsdp and tp; the sampler's weights over all devices on the side
that keeps a layer's matmuls local (tensor-parallel).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jobs.spec import Job
from trainer.architecture import Architecture, Path, leaf_shapes
from trainer.axes import LEAF_AXES, MESH_AXES, OVER_MESH, OVER_SAMPLER
from trainer.refusal import Refusal

SEQUENCES = ("dp", "fsdp")


class MeshError(Refusal):
    """An array that does not divide over the mesh: which, its size, the devices, what to change."""


def make_mesh(job: Job, devices: Sequence[Any]) -> Mesh:
    """The job's mesh over those devices, axes (dp, fsdp, tp).

    Raises:
        MeshError: there are not as many devices as the job's accelerator has.
    """
    shape = job.mesh_shape
    if math.prod(shape) != len(devices):
        raise MeshError(
            f"accelerator = {job.accelerator} has {job.target.devices} devices, but JAX lists "
            f"{len(devices)}: run on that accelerator, or change the job's"
        )
    return Mesh(np.array(devices).reshape(shape), MESH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_sequence(mesh: Mesh) -> NamedSharding:
    """Leading axis shared out over the devices that have sequences of their own."""
    return NamedSharding(mesh, PartitionSpec(SEQUENCES))


def state_shardings(mesh: Mesh, architecture: Architecture) -> dict[str, Any]:
    """Sharding of each leaf of the parameter tree, as the trainer keeps it.

    Raises:
        MeshError: an axis that does not divide.
    """
    return _nested(
        {
            path: _sharding(mesh, path, shape, OVER_MESH)
            for path, shape in leaf_shapes(architecture).items()
        }
    )


def sampler_shardings(mesh: Mesh, architecture: Architecture) -> dict[str, Any]:
    """Sharding of each leaf as the naive sampler keeps it; "layers" holds one layer's leaves.

    An axis that does not divide over all devices is kept whole on each: heads of small models.
    """
    whole: dict[Path, NamedSharding] = {}
    for path, shape in leaf_shapes(architecture).items():
        axes, sizes = LEAF_AXES[path[-1]], shape
        if path[0] == "layers":
            axes, sizes = axes[1:], shape[1:]
        spec = [
            OVER_SAMPLER.get(axis) if size % mesh.size == 0 else None
            for axis, size in zip(axes, sizes, strict=True)
        ]
        whole[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return _nested(whole)


def _sharding(
    mesh: Mesh, path: Path, shape: tuple[int, ...], table: Mapping[str, str]
) -> NamedSharding:
    axes = LEAF_AXES[path[-1]]
    for axis, size in zip(axes, shape, strict=True):
        over = table.get(axis)
        if over is not None and size % mesh.shape[over]:
            raise MeshError(
                f"{'/'.join(path)}: its {axis} axis of {size} cannot be shared out over "
                f"mesh.{over} = {mesh.shape[over]}: use a divisor of {size}"
            )
    return NamedSharding(mesh, PartitionSpec(*[table.get(axis) for axis in axes]))


def _nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """{("layers", "q"): x} as {"layers": {"q": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def abstract_params(mesh: Mesh, architecture: Architecture, dtype: Any) -> dict[str, Any]:
    """The parameter tree as shapes, dtypes and shardings, with no memory behind it."""
    shardings = state_shardings(mesh, architecture)
    shapes = _nested(leaf_shapes(architecture))
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding),
        shapes,
        shardings,
        is_leaf=lambda x: isinstance(x, tuple),
    )
