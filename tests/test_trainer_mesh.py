import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jobs import spec
from trainer.architecture import ARCHITECTURES, leaf_shapes
from trainer.mesh import (
    LEAF_AXES,
    MeshError,
    abstract_params,
    by_sequence,
    make_mesh,
    replicated,
    sampler_shardings,
    state_shardings,
)
from trainer.weights import TINY_ARCHITECTURE

SMOL = ARCHITECTURES["huggingfacetb/smollm2-135m-instruct"]


def mesh_of(*, devices=4, **axes):
    job = spec.Job(name="mesh", accelerator=f"cpu-{devices}", model="tiny", mesh=spec.Mesh(**axes))
    return make_mesh(job, jax.devices()[:devices])


def test_devices_stand_in_the_order_dp_fsdp_tp_and_fsdp_takes_what_is_left():
    assert dict(mesh_of().shape) == {"dp": 1, "fsdp": 4, "tp": 1}
    mesh = mesh_of(tp=2)
    assert dict(mesh.shape) == {"dp": 1, "fsdp": 2, "tp": 2}
    # tp innermost: devices next to each other share a matrix.
    assert [d.id for d in mesh.devices[0, 0]] == [d.id for d in jax.devices()[:2]]


def test_other_devices_than_the_jobs_are_refused_with_both_counts():
    job = spec.Job(name="mesh", accelerator="cpu-4", model="tiny")
    with pytest.raises(MeshError, match="cpu-4 has 4 devices, but JAX lists 3"):
        make_mesh(job, jax.devices()[:3])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_leaf_of_every_model_has_an_axis_for_each_dimension(name):
    for path, shape in leaf_shapes(ARCHITECTURES[name]).items():
        assert len(LEAF_AXES[path[-1]]) == len(shape), path
        assert (LEAF_AXES[path[-1]][0] == "layers") == (path[0] == "layers"), path


def test_the_state_lies_where_the_table_says():
    found = state_shardings(mesh_of(tp=2), TINY_ARCHITECTURE)
    specs = {name: s.spec for name, s in (found | found["layers"]).items() if name != "layers"}
    assert specs == {
        "embed": PartitionSpec("tp", "fsdp"),
        "head": PartitionSpec("tp", "fsdp"),
        "norm": PartitionSpec(None),
        **dict.fromkeys(("ln1", "ln2"), PartitionSpec(None, None)),
        **dict.fromkeys(("q", "k", "v", "gate", "up"), PartitionSpec(None, "fsdp", "tp")),
        **dict.fromkeys(("o", "down"), PartitionSpec(None, "tp", "fsdp")),
        **dict.fromkeys(("q_bias", "k_bias", "v_bias"), PartitionSpec(None, "tp")),
    }


def test_each_device_holds_its_share_of_the_state_and_dp_holds_copies():
    abstract = abstract_params(mesh_of(dp=2, fsdp=1, tp=2), TINY_ARCHITECTURE, np.float32)
    # 128 x 256 over tp 2 on the heads' side, twice.
    q = jax.device_put(np.ones(abstract["layers"]["q"].shape), abstract["layers"]["q"].sharding)
    assert q.shape == leaf_shapes(TINY_ARCHITECTURE)["layers", "q"] == (2, 128, 256)
    assert [shard.data.shape for shard in q.addressable_shards] == [(2, 128, 128)] * 4
    assert sorted(shard.replica_id for shard in q.addressable_shards) == [0, 0, 1, 1]
    assert abstract["norm"].dtype == np.float32


def test_an_axis_that_does_not_divide_is_refused_by_its_name_and_size():
    five = jax.sharding.AbstractMesh((1, 5, 1), ("dp", "fsdp", "tp"))
    with pytest.raises(MeshError, match=r"embed axis of 576 cannot .* mesh\.fsdp = 5"):
        state_shardings(five, SMOL)


def test_the_sampler_shares_out_what_divides_and_keeps_the_rest_whole():
    five = jax.sharding.AbstractMesh((1, 5, 1), ("dp", "fsdp", "tp"))
    found = sampler_shardings(five, SMOL)
    # 576, 1536, 192 and 49152 are no multiples of 5.
    assert {s.spec for s in jax.tree.leaves(found)} == {
        PartitionSpec(None),
        PartitionSpec(None, None),
    }
    everything = ("dp", "fsdp", "tp")
    four = sampler_shardings(mesh_of(), SMOL)
    assert four["layers"]["q"].spec == PartitionSpec(None, everything)
    assert four["layers"]["down"].spec == PartitionSpec(everything, None)
    assert four["embed"].spec == PartitionSpec(everything, None)
    assert four["layers"]["ln1"].spec == PartitionSpec(None)


def test_sequences_are_shared_out_over_dp_and_fsdp_only():
    mesh = mesh_of(fsdp=2, tp=2)
    rows = jax.device_put(np.arange(8), by_sequence(mesh))
    held = {shard.device.id: shard.data.tolist() for shard in rows.addressable_shards}
    assert held == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3], 2: [4, 5, 6, 7], 3: [4, 5, 6, 7]}
    whole = jax.device_put(np.arange(8), replicated(mesh))
    assert {tuple(shard.data.tolist()) for shard in whole.addressable_shards} == {tuple(range(8))}
