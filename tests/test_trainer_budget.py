"""Bytes by arithmetic, against the shard shapes of what the trainer really builds, and hardware."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jobs import spec
from jobs.accelerators import ACCELERATORS
from trainer import budget
from trainer.architecture import ARCHITECTURES, parameter_count
from trainer.buffers import tiled_bytes
from trainer.data import abstract_batch
from trainer.mesh import by_sequence, make_mesh, replicated, sampler_shardings
from trainer.rollout.sglang.settings import settings_of
from trainer.train import _reference_params
from trainer.update import layout, reference
from trainer.update.rows import abstract_rows

JOBS = Path(__file__).parents[1] / "jobs"
GIB = 2**30
LAYER_MAJOR = ("update.design=layer_major",)


def a_job(*overrides, file="sop_bs32_len1024"):
    job = spec.load(JOBS / f"{file}.yaml", overrides=overrides)
    return job, ARCHITECTURES[job.model.lower()]


def on_chip(tree, *, kind=None):
    """Bytes of a chip's shards, as the compiler lays them; of one memory kind."""
    return sum(
        tiled_bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding.memory_kind == kind
    )


@pytest.mark.parametrize("layers", ["stacked", "per_layer"])
@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-4B"])
def test_the_state_of_layer_major_is_its_shards_to_the_byte(layers, optimizer, moments, model):
    job, a = a_job(
        *LAYER_MAJOR,
        f"update.layers={layers}",
        f"update.moments={moments}",
        f"train.optimizer={optimizer}",
        f"model={model}",
    )
    state = layout.abstract_state(job, a, make_mesh(job, jax.devices()[:4]))
    found = budget.state_bytes(job, a)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)}
    assert len(kinds) == 1
    assert sum(found.owners.values()) == on_chip(state, kind=kinds.pop())
    assert found.host_bytes == 0


def test_what_is_offloaded_is_on_the_host_to_the_byte_and_no_hbm():
    job, a = a_job(*LAYER_MAJOR, "update.layers=stacked", "update.host_offload=[momentum,lo]")
    mesh = make_mesh(job, jax.devices()[:4])
    state = layout.abstract_state(job, a, mesh)
    away = "pinned_host"
    here = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)} - {away}
    found = budget.state_bytes(job, a)
    assert found.host_bytes == on_chip(state, kind=away)
    assert sum(found.owners.values()) == on_chip(state, kind=here.pop())
    # docs/memory.md, row host, by the compiler: 6.08 GiB of the host, 4.56 of arguments.
    assert found.host_bytes / GIB == pytest.approx(6.08, abs=0.005)


@pytest.mark.parametrize("layers", ["stacked", "per_layer"])
@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
@pytest.mark.parametrize("mesh", [(1, 4, 1), (2, 2, 1), (1, 2, 2), (1, 1, 4)])
def test_the_state_of_the_reference_is_its_shards_to_the_byte(layers, optimizer, mesh):
    dp, fsdp, tp = mesh
    job, a = a_job(
        f"update.layers={layers}",
        f"train.optimizer={optimizer}",
        f"mesh.dp={dp}",
        f"mesh.fsdp={fsdp}",
        f"mesh.tp={tp}",
    )
    state = reference.abstract_state(job, a, make_mesh(job, jax.devices()[:4]))
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)}
    assert len(kinds) == 1
    assert sum(budget.state_bytes(job, a).owners.values()) == on_chip(state, kind=kinds.pop())


@pytest.mark.parametrize("more", [(), ("train.beta=0.1",), ("train.updates_per_rollout=2",)])
def test_the_batch_of_either_design_is_its_shards_to_the_byte(more):
    job, _ = a_job(*more)
    mesh = make_mesh(job, jax.devices()[:4])
    part = abstract_batch(job, sequences=job.micro_batch_size, sharding=by_sequence(mesh))
    last = jax.ShapeDtypeStruct((), np.bool_, sharding=replicated(mesh))
    assert budget.batch_bytes(job) == _any_kind((part, last))
    group = ("rollout.prompts_per_step=4", "rollout.group_size=8", "train.micro_batch_size=null")
    for rows in ("one", "group"):
        job, _ = a_job(*LAYER_MAJOR, *group, f"update.completions_per_row={rows}", *more)
        found = abstract_rows(job, NamedSharding(mesh, PartitionSpec("fsdp")))
        assert budget.batch_bytes(job) == _any_kind(found)


def _any_kind(tree):
    return sum(
        tiled_bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-8B"])
def test_the_sampler_s_weights_are_its_shards_to_the_byte(model):
    job, a = a_job(f"model={model}")
    where = sampler_shardings(make_mesh(job, jax.devices()[:4]), a)
    expected = 0
    for path, shape in budget.leaf_shapes(a).items():
        one = shape[1:] if path[0] == "layers" else shape
        at = where["layers"][path[1]] if path[0] == "layers" else where[path[0]]
        times = a.layers if path[0] == "layers" else 1
        expected += tiled_bytes(at.shard_shape(one), 2) * times
    assert budget.sampler_bytes(job, a) == expected


@pytest.mark.parametrize("design", ["layer_major", "reference"])
def test_the_frozen_reference_policy_is_its_shards_to_the_byte(design):
    job, a = a_job("train.beta=0.1", f"update.design={design}", "accelerator=v4-8")
    mesh = make_mesh(job, jax.devices()[:4])
    if design == "reference":
        params = reference.abstract_state(job, a, mesh).params
    else:
        state = layout.abstract_state(job, a, mesh)
        top = {name: state[name].master for name in state if name not in ("layers", "updates")}
        layers = [{n: leaf.master for n, leaf in layer.items()} for layer in state["layers"]]
        params = {**top, "layers": layers}
    frozen = jax.eval_shape(lambda p: _reference_params(job, p), params)
    # The copy lies where its parameter lies.
    leaves = jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "hi"))
    expected = sum(
        tiled_bytes(getattr(leaf, "hi", leaf).sharding.shard_shape(one.shape), one.dtype.itemsize)
        for leaf, one in zip(leaves, jax.tree.leaves(frozen), strict=True)
    )
    assert budget.reference_policy_bytes(job, a) == expected


def test_the_sop_s_state_and_engine_take_what_its_logs_say():
    job, a = a_job()
    state = sum(budget.state_bytes(job, a).owners.values())
    assert state / GIB == pytest.approx(21.28, abs=0.005)
    # f32 parameters, momentum and accumulator over four chips; tiles pad next to nothing.
    assert state == pytest.approx(parameter_count(a) * 4 * 3 / 4, rel=1e-3)
    sharded, replicated = (budget.engine_weight_bytes(job, a, b) for b in ("sharded", "replicated"))
    assert sharded / GIB == pytest.approx(3.547, abs=0.001)
    assert replicated / GIB == pytest.approx(5.069, abs=0.001)
    assert budget.kv_token_bytes(job, a) == 14336


@pytest.mark.parametrize(
    ("file", "printed"),
    [("sop_bs32_len1024", 5.68), ("sop_bs32_len1024_kv1536", 5.90)],
)
def test_what_is_left_beside_the_engine_is_what_the_hardware_printed(file, printed):
    # "There are 5.68G free", "... 5.90G free": the runtime, when the update was to be loaded.
    job, a = a_job(file=file)
    free = job.target.usable_hbm_bytes - sum(budget.state_bytes(job, a).owners.values())
    weights = budget.engine_weight_bytes(job, a, "sharded")
    pool = budget.kv_pool(job, a, free_bytes=free, weight_bytes=weights)
    assert (free - weights - pool.size_bytes) / GIB == pytest.approx(printed, abs=0.005)


def test_a_share_of_35_percent_leaves_no_pool_and_the_rule_says_from_where_on():
    job, a = a_job(file="sop_bs32_len1024_mem035")
    free = job.target.usable_hbm_bytes - sum(budget.state_bytes(job, a).owners.values())
    found = {}
    for build in ("sharded", "replicated"):
        weights = budget.engine_weight_bytes(job, a, build)
        pool = budget.kv_pool(job, a, free_bytes=free, weight_bytes=weights)
        assert pool.tokens == pool.size_bytes == 0
        found[build] = pool.least_fraction
    assert found["sharded"] == pytest.approx(0.375, abs=0.001)
    assert found["replicated"] == pytest.approx(0.535, abs=0.001)


class Engine:
    """What `profile_max_num_token` and `init_memory_pool` of sglang-jax read of their runner."""

    def __init__(self, *, free, weights, heads, dim, layers, fraction, page, limit):
        self.left = free - weights
        self.mem_fraction_static = fraction
        self.tp_size = 4
        self.kv_cache_dtype = np.dtype("float16")  # two bytes
        self.limit, self.page = limit, page
        self.model_config = self
        self.head_dim, self.num_hidden_layers, self.heads = dim, layers, heads

    def get_available_device_memory(self):
        return self.left

    def get_num_kv_heads(self, tp):
        return max(1, self.heads // tp)


def engine_tokens(engine, free):
    """The pool's tokens by the engine's own code; None where it raises."""
    from sgl_jax.srt.model_executor.model_runner import ModelRunner  # noqa: PLC0415 - seconds

    try:
        tokens = ModelRunner.profile_max_num_token(engine, free)
    except RuntimeError:  # "Not enough memory. Please try to increase --mem-fraction-static."
        return None
    tokens = min(tokens, engine.limit) // engine.page * engine.page
    return tokens or None


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the engine's packages on this JAX
def test_the_engine_s_own_code_makes_the_same_pool_in_200_random_cases():
    random = np.random.default_rng(0)
    accepted = 0
    for _ in range(200):
        page = int(random.choice([1, 16, 128]))
        limit = [None, int(random.integers(1536, 50_000))][random.integers(2)]
        fraction = float(random.uniform(0.05, 0.95))
        overrides = [f"engine.mem_fraction_static={fraction}", f"engine.page_size={page}"]
        if limit is not None:
            overrides.append(f"engine.max_total_tokens={limit}")
        name = random.choice(["Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen3-8B"])
        job, a = a_job(f"model={name}", *overrides)
        free = int(random.uniform(2.0, 30.0) * GIB)
        weights = budget.engine_weight_bytes(job, a, "sharded")
        pool = budget.kv_pool(job, a, free_bytes=free, weight_bytes=weights)
        engine = Engine(
            free=free,
            weights=weights,
            heads=a.kv_heads,
            dim=a.head_dim,
            layers=a.layers,
            fraction=fraction,
            page=page,
            limit=settings_of(job).pool_tokens,
        )
        assert (pool.tokens or None) == engine_tokens(engine, free)
        if page == 1:  # a page may cost the last tokens above the least share
            assert (pool.tokens > 0) == (fraction > pool.least_fraction)
        accepted += pool.tokens > 0
    assert 50 < accepted < 190


def test_the_arithmetic_needs_no_jax():
    code = "import sys; import trainer.budget; print('jax' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=JOBS.parent, capture_output=True, text=True, check=True
    )
    assert run.stdout == "False\n"


@pytest.mark.parametrize("name", ACCELERATORS)
def test_a_layer_major_state_is_shared_out_over_every_device(name):
    job, a = a_job(*LAYER_MAJOR, f"accelerator={name}", "train.micro_batch_size=null")
    state = sum(budget.state_bytes(job, a).owners.values())
    # bf16 hi, 16 bits of lo, bf16 moment; at most 1 % of tiles and of what every device has whole.
    whole = parameter_count(a) * 6 / job.target.devices
    assert whole <= state < 1.01 * whole
