"""Programs that are planned: against what train.py runs of them, and sums worked out here."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.plan_table import at_2048
from jobs import spec
from trainer import budget, train
from trainer.architecture import ARCHITECTURES, leaf_shapes
from trainer.compiled import compile_program
from trainer.data import abstract_batch
from trainer.estimate import estimate
from trainer.ledger import programs_of
from trainer.lowering import frozen
from trainer.mesh import by_sequence, make_mesh
from trainer.plan import Options, plan
from trainer.update.program import make_update
from trainer.update.rows import to_rows

JOBS = Path(__file__).parents[1] / "jobs"
GIB = 2**30
SMALL = replace(
    ARCHITECTURES["qwen/qwen2.5-0.5b"],
    vocab=48,
    embed=16,
    mlp=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
)
WITH_LOGPROBS = ("rollout.engine=naive", "train.beta=0.1", "train.updates_per_rollout=2")
# Qwen2.5-7B, a v4-8's chip, docs/memory.md's row 7b: GiB, by the compiler.
RESERVED = [
    ("layer_major", "logprobs", 0.608),
    ("layer_major", "reference_logprobs", 0.608),
    ("reference", "logprobs", 1.600),
    ("reference", "reference_logprobs", 1.340),
]


def a_job(design, *overrides):
    settings = (*WITH_LOGPROBS, f"update.design={design}", *overrides)
    return spec.load(JOBS / "sop_bs32_len1024.yaml", overrides=settings)


def tiny(design, devices):
    settings = ("model=tiny", "train.beta=0.1", "update.completions_per_row=one")
    settings += ("train.micro_batch_size=8",)
    changes = (*settings, f"accelerator=cpu-{devices}", f"update.design={design}")
    return spec.load(JOBS / "smoke.yaml", overrides=changes)


def shape_of(job):
    return ARCHITECTURES[job.model.lower()] if job.model != "tiny" else SMALL


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ((), set()),
        (("train.beta=0.1",), {"reference_logprobs"}),
        (("train.updates_per_rollout=2",), {"logprobs"}),
        (("train.rollout_correction=2.0",), {"logprobs"}),
        (WITH_LOGPROBS, {"logprobs", "reference_logprobs"}),
    ],
)
def test_a_job_has_the_programs_of_logprobs_that_it_needs(settings, names):
    job = spec.load(JOBS / "sop_bs32_len1024.yaml", overrides=settings)
    assert set(programs_of(job, shape_of(job))) >= {"update", *names}


@pytest.mark.parametrize("design", ["layer_major", "reference"])
@pytest.mark.parametrize("devices", [1, 2])
def test_the_frozen_policy_s_shapes_are_those_of_what_train_makes(design, devices):
    job = tiny(design, devices)
    shape = shape_of(job)
    update = make_update(job, shape, make_mesh(job, jax.devices()[:devices]))
    told = frozen(job, update.params(update.abstract))
    # The real ones, of zeros that lie where the state's lie.
    zeros = lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)
    real = train._reference_params(job, update.params(jax.tree.map(zeros, update.abstract)))
    assert jax.tree.structure(told) == jax.tree.structure(real)
    for one, other in zip(jax.tree.leaves(told), jax.tree.leaves(real), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


@pytest.mark.parametrize(("design", "name", "gib"), RESERVED)
def test_the_formula_of_logprobs_is_near_what_the_compiler_says(design, name, gib):
    job = a_job(design)
    found = estimate(job, shape_of(job), name)
    assert found.memory.reserved_bytes / GIB == pytest.approx(gib, rel=0.07)


def test_a_second_program_of_a_phase_counts_where_it_is_the_fuller_one():
    job = a_job("layer_major", "update.clip=per_layer")
    made = plan(job, Options(quick=True, advice=False), estimate)
    update = made.phases["update"]
    assert "update temporaries (estimated)" in update
    assert not any(owner.startswith("logprobs") for owner in update)
    free = {made.programs[name].free_bytes_at_load for name in ("update", "logprobs")}
    assert len(free) == 1

    def huge(job, architecture, name):
        program = estimate(job, architecture, name)
        if name != "logprobs":
            return program
        memory = replace(program.memory, reserved_bytes=20 * GIB)
        return replace(program, memory=memory)

    other = plan(job, Options(quick=True, advice=False), huge).phases["update"]
    assert other["logprobs temporaries (estimated)"] == 20 * GIB
    assert not any(owner.startswith("update") for owner in other)


@pytest.mark.aot
@pytest.mark.parametrize(("design", "name", "gib"), RESERVED)
def test_the_programs_of_logprobs_take_of_a_chip_what_the_table_says(design, name, gib):
    job = a_job(design)
    found = compile_program(job, shape_of(job), name, 280.0, build="sharded")
    assert found.reserved_bytes / GIB == pytest.approx(gib, rel=0.01)
    # Weights of bf16: 28 layers of matrices and k, q, v's biases; norms in f32 or, split, twice
    # bf16. Biases of one layer, 4608 numbers, are whole on each chip. Of f32 in the reference's.
    wide = 4 if (design, name) == ("reference", "logprobs") else 2
    matrices = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 2 * 152064 * 3584
    assert found.arguments_bytes == pytest.approx(matrices * wide / 4, rel=0.003)
    # One f32 a completion token of the chip's share: all of it, or of one micro-batch of four.
    rows = 8 if design == "layer_major" else 1
    assert found.outputs_bytes == rows * 1024 * 4 or found.outputs_bytes == 0


# The engine's, 7B on v4-8: program, build, pool, arguments as in the prototype that first compiled
# them, temporaries by the compiler, GiB.
ENGINE = [
    ("engine_decode", "sharded", 49152, 4.203, 0.0184, ()),
    ("engine_prefill", "sharded", 49152, 4.203, 0.0227, ()),
    ("engine_prefill", "replicated", 49152, 5.726, 0.0681, ("engine.chunked_prefill_size=4096",)),
    (
        "engine_decode",
        "sharded",
        49152,
        4.205,
        0.0184,
        ("engine.page_size=128", "engine.chunked_prefill_size=1024"),
    ),
    ("engine_decode", "replicated", 8192, 5.179, 0.0229, ()),
]


@pytest.mark.aot
@pytest.mark.engine
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the engine's packages on this JAX
@pytest.mark.parametrize(("name", "build", "tokens", "arguments", "reserved", "settings"), ENGINE)
def test_the_engine_s_programs_take_weights_pool_and_batch_to_the_byte(
    name, build, tokens, arguments, reserved, settings
):
    shared = ("update.design=layer_major", "engine.mem_fraction_static=0.5")
    shared += (f"engine.max_total_tokens={tokens}", *settings)
    job = spec.load(JOBS / "sop_bs32_len1024.yaml", overrides=shared)
    shape = shape_of(job)
    found = compile_program(job, shape, name, 280.0, build=build)
    assert found.arguments_bytes / GIB == pytest.approx(arguments, abs=6e-4)
    # A page more than the pool's tokens, 28 layers, one KV head of 128 a chip, K and V of bf16.
    pool = (tokens + (job.engine.page_size or 1)) * 28 * 2 * 128 * 2
    weights = budget.engine_weight_bytes(job, shape, build)
    given = budget.engine_request_bytes(job, prefill=name == "engine_prefill")
    assert found.arguments_bytes == weights + pool + given
    assert found.reserved_bytes / GIB == pytest.approx(reserved, rel=0.05)


@pytest.mark.aot
@pytest.mark.engine
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the engine's packages on this JAX
@pytest.mark.parametrize(
    ("settings", "copied", "reserved"),
    [
        (("update.design=reference",), 3.547, 2.008),
        # Embedding and head are the masters' own halves: 2 x 152064 x 3584 bf16, a quarter of it.
        (("update.design=layer_major", "update.layers=stacked"), 3.039, 0.0),
    ],
)
def test_the_hand_over_to_the_engine_gives_the_weights_that_it_has_not_yet(
    settings, copied, reserved
):
    job = spec.load(JOBS / "sop_bs32_len1024.yaml", overrides=settings)
    found = compile_program(job, shape_of(job), "hand_over", 280.0, build="sharded")
    # And a table of where the 12 leaves of 28 layers, and three more, are: 4 bytes each, by 512.
    assert found.outputs_bytes == budget.engine_copied_bytes(job, shape_of(job), "sharded") + 1536
    assert found.outputs_bytes / GIB == pytest.approx(copied, abs=6e-4)
    assert found.reserved_bytes / GIB == pytest.approx(reserved, abs=0.01)
    guess = estimate(job, shape_of(job), "hand_over").memory
    assert guess.reserved_bytes / GIB == pytest.approx(reserved, abs=0.05)


@pytest.mark.aot
@pytest.mark.engine
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the engine's packages on this JAX
@pytest.mark.parametrize(
    ("settings", "reserved"),
    [(("update.design=reference",), 0.620), (("update.design=layer_major",), 0.094)],
)
def test_the_probe_makes_no_copy_of_the_weights(settings, reserved):
    job = spec.load(JOBS / "sop_bs32_len1024.yaml", overrides=settings)
    found = compile_program(job, shape_of(job), "engine_probe", 280.0, build="sharded")
    assert found.reserved_bytes / GIB == pytest.approx(reserved, rel=0.02)
    guess = estimate(job, shape_of(job), "engine_probe").memory
    assert guess.reserved_bytes / GIB == pytest.approx(reserved, rel=0.07)


@pytest.mark.aot
@pytest.mark.parametrize(("sequences", "least", "most"), [(8, 19.0, 21.0), (16, 29.8, 30.75)])
def test_the_sop_s_sweep_on_v4_16_has_room_with_8_sequences_and_none_with_16(
    sequences, least, most
):
    # It ran with 8 and was out of memory with 16; the limit is 30.75, and code comes on top.
    job = spec.load(JOBS / "sop_bs32_len1024.yaml", overrides=at_2048(sequences))
    found = compile_program(job, shape_of(job), "update", 290.0, build="sharded")
    assert least < (found.arguments_bytes + found.reserved_bytes) / GIB < most


def test_planning_without_an_engine_never_imports_its_package():
    run = subprocess.run(
        [sys.executable, "-c", "import sys, trainer.lowering, trainer.fit; print(*sys.modules)"],
        cwd=JOBS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "trainer.lowering" in run.stdout.split()
    assert not [name for name in run.stdout.split() if name.startswith("sgl_jax")]


@pytest.mark.parametrize("design", ["layer_major", "reference"])
def test_what_is_lowered_gives_the_logprobs_that_train_s_call_gives(design):
    job = tiny(design, 2)
    shape, mesh = shape_of(job), make_mesh(job, jax.devices()[:2])
    update, random = make_update(job, shape, mesh), np.random.default_rng(0)
    tree = {"layers": {}}
    for path, size in leaf_shapes(shape).items():
        leaf = 1 + 0.1 * random.standard_normal(size).astype(np.float32)
        (tree["layers"] if path[0] == "layers" else tree)[path[-1]] = leaf
    params = train._reference_params(job, update.params(update.init(tree)))
    like = abstract_batch(job, sequences=job.sequences_per_step, sharding=by_sequence(mesh))
    made = lambda x: random.integers(1, 9, x.shape).astype(x.dtype)
    batch = jax.tree.map(made, like)
    batch = replace(batch, completion_mask=np.ones_like(batch.completion_mask))
    given, at = batch, by_sequence(mesh)
    if design == "layer_major":
        given, at = to_rows(batch, job), NamedSharding(mesh, PartitionSpec("fsdp"))
    run = update.lower_logprobs(params).compile()
    found = np.asarray(run(params, jax.device_put(given, at)))
    expected = np.asarray(update.logprobs(params, batch))
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)
