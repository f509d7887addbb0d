"""Which axes an array of the model has, and which of them is shared out over the devices.

Without JAX: `budget.py` counts bytes by these tables; `mesh.py` and `update/layout.py` lay arrays
by them.
"""

from collections.abc import Collection

MESH_AXES = ("dp", "fsdp", "tp")

# Logical axes of each leaf; "layers" is the stacked leading axis of everything under "layers".
LEAF_AXES: dict[str, tuple[str, ...]] = {
    "embed": ("vocab", "embed"),
    "head": ("vocab", "embed"),
    "norm": ("norm",),
    "ln1": ("layers", "norm"),
    "ln2": ("layers", "norm"),
    "q": ("layers", "embed", "heads"),
    "k": ("layers", "embed", "kv_heads"),
    "v": ("layers", "embed", "kv_heads"),
    "o": ("layers", "heads", "embed"),
    "gate": ("layers", "embed", "mlp"),
    "up": ("layers", "embed", "mlp"),
    "down": ("layers", "mlp", "embed"),
    "q_bias": ("layers", "heads"),
    "k_bias": ("layers", "kv_heads"),
    "v_bias": ("layers", "kv_heads"),
    "q_norm": ("layers", "norm"),
    "k_norm": ("layers", "norm"),
}

# The mesh axes over which a logical axis is shared out: in the reference's state, in the sampler.
_SIDES = ("vocab", "heads", "kv_heads", "mlp")
OVER_MESH: dict[str, str] = {**dict.fromkeys(_SIDES, "tp"), "embed": "fsdp"}
OVER_SAMPLER: dict[str, tuple[str, ...]] = dict.fromkeys(_SIDES, MESH_AXES)


def shared_axis(name: str) -> int | None:
    """The axis of a leaf that is shared out over the devices, layers axis not counted; or None.

    The axis that a tensor-parallel engine shares out: outputs of q, k, v, gate and up, inputs of o
    and down, the vocabulary of embedding and head.
    """
    axes = [axis for axis in LEAF_AXES[name] if axis != "layers"]
    return next((i for i, axis in enumerate(axes) if axis in OVER_SAMPLER), None)


def of_kv_heads(name: str) -> bool:
    """Whether a leaf has an axis of key and value heads, which engines may repeat."""
    return "kv_heads" in LEAF_AXES[name]


def on_host(name: str, part: str, offloaded: Collection[str]) -> bool:
    """Whether layer_major keeps a part of a leaf in the host's memory, by `update.host_offload`.

    The matrices of the layers go; what is small, or above and below the layers, stays.
    """
    in_layers = LEAF_AXES[name][0] == "layers" and shared_axis(name) is not None
    return part in offloaded and in_layers and "bias" not in name
