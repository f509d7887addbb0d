"""Figures read from XLA's dumps: of small programs compiled here, and of the real one for a TPU."""

import json
import subprocess
import sys
import uuid
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jobs import spec
from jobs.accelerators import accelerator
from trainer.ahead import (
    CompileError,
    child_argv,
    compile_ahead,
    described_devices,
    program_memory,
)
from trainer.architecture import ARCHITECTURES
from trainer.buffers import DUMPED, program_memory_of, tiled_bytes
from trainer.libtpu import SETTINGS
from trainer.mesh import make_mesh
from trainer.steptime import clock_hz, received_bytes, step_time
from trainer.update.layout import abstract_state
from trainer.update.rows import abstract_rows

REPOSITORY = Path(__file__).parents[1]
GIB = 2**30


def dumped(function, *arguments, folder, donate=()):
    """The figures of a program compiled for this CPU, and what XLA itself says of it."""
    program = function
    program.__name__ = f"program_{uuid.uuid4().hex}"  # what comes from JAX's cache is not dumped
    lowered = jax.jit(program, donate_argnums=donate).lower(*arguments)
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    compiled = lowered.compile(compiler_options=options)
    [assignment] = folder.glob(f"*{DUMPED}")
    hlo = assignment.with_name(assignment.name.replace("-buffer-assignment", "")).read_text()
    return program_memory_of(assignment.read_text(), hlo=hlo, code_bytes=None), compiled


def square(size):
    return jax.ShapeDtypeStruct((size, size), jnp.float32)


def test_arguments_outputs_and_heap_are_what_the_compiled_program_says(tmp_path):
    memory, compiled = dumped(
        lambda x, y: jnp.tanh(x @ y) @ jnp.cos(y @ x), square(256), square(256), folder=tmp_path
    )
    stats = compiled.memory_analysis()
    assert memory.arguments_bytes == 2 * 256 * 256 * 4 == stats.argument_size_in_bytes
    assert memory.outputs_bytes == 256 * 256 * 4 == stats.output_size_in_bytes
    assert memory.reserved_bytes == stats.temp_size_in_bytes > 0
    assert memory.code_bytes is None
    assert memory.host_bytes == 0


def test_an_output_in_a_donated_argument_s_place_is_counted_once(tmp_path):
    memory, _ = dumped(lambda x: jnp.sin(x) * 2, square(256), folder=tmp_path, donate=(0,))
    assert memory.arguments_bytes == 256 * 256 * 4
    assert memory.outputs_bytes == 0


def test_the_heap_s_fullest_moment_is_named_by_operation_shape_and_count(tmp_path):
    # Four products are needed at once, and one of them may lie in the output's place.
    def function(x):
        parts = [jnp.dot(x + i, x) for i in range(4)]
        return jnp.linalg.multi_dot(jax.lax.optimization_barrier(parts))

    memory, _ = dumped(function, square(256), folder=tmp_path)
    products = [t for t in memory.peak if t.op.endswith("dot_general")]
    assert sum(t.count for t in products) >= 3
    assert {t.shape for t in products} == {"f32[256,256]"}
    named = sum(t.size_bytes for t in memory.peak)
    assert named + memory.fragmentation_bytes == memory.reserved_bytes
    assert named >= 0.9 * memory.reserved_bytes


def test_text_that_is_no_buffer_assignment_is_refused():
    with pytest.raises(ValueError, match="not a buffer assignment"):
        program_memory_of("HloModule x", hlo="", code_bytes=None)


@pytest.mark.parametrize(
    ("shape", "itemsize", "takes"),
    [
        ((), 4, 512),  # a scalar has a tile of its own
        ((3584,), 2, 4096 * 2),  # rows of 1024
        ((128,), 2, 512),
        ((28, 3584), 2, 32 * 3584 * 2),  # 28 rows in tiles of 8
        ((8, 1536), 1, 8 * 1536),
        ((1, 8704), 1, 4 * 8704),  # 1-byte numbers lie in fours
        ((28, 3584, 64), 2, 28 * 64 * 3584 * 2),  # transposed: nothing is padded
        ((38016, 1), 4, 38016 * 4),
    ],
)
def test_an_array_takes_what_libtpu_s_own_dump_says(shape, itemsize, takes):
    # Figures of dumped arguments of the update program, libtpu 0.0.32.1.
    assert tiled_bytes(shape, itemsize) == takes


@pytest.mark.parametrize(
    ("text", "opcode", "received"),
    [
        # 4 chips: of each array a chip lacks three quarters.
        ("bf16[8,4]{1,0} all-gather(%x), replica_groups=[1,4]<=[4]", "all-gather", 48),
        ("f32[2,4]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3}}", "reduce-scatter", 96),
        ("f32[8]{0} all-reduce(%x), replica_groups={}", "all-reduce", 48),
        ("(bf16[2], bf16[8]) all-gather-start(%x), replica_groups={}", "all-gather-start", 12),
        ("f32[8]{0} all-gather-done(%x)", "all-gather-done", 0),
        ("f32[8]{0} add(%x, %y)", "add", 0),
    ],
)
def test_a_collective_receives_what_the_chip_does_not_have(text, opcode, received):
    assert received_bytes(text, opcode, devices=4) == received


def test_the_clock_of_v4_is_the_published_1050_mhz():
    assert clock_hz(accelerator("v4-8")) == pytest.approx(1.05e9, rel=0.002)


def test_the_child_gets_libtpu_s_settings_and_a_folder_with_spaces_whole():
    argv = child_argv(Path("/runs/a b"), limit_s=3.0)
    assert argv[0] == "env"
    assert {f"{name}={value}" for name, value in SETTINGS.items()} < set(argv)
    assert argv[-4:] == ["-m", "trainer.ahead", "/runs/a b", "3.0"]


def test_an_accelerator_without_a_compiler_is_refused_with_those_that_have_one():
    with pytest.raises(CompileError, match=r"cpu-4 is no TPU .* v4-8"):
        described_devices(accelerator("cpu-4"))


@pytest.fixture
def v4(monkeypatch):
    """A mesh of four v4 chips that are not here."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    return Mesh(np.array(described_devices(accelerator("v4-8"))), ("x",))


def shared(mesh, shape, *axes, kind=None, dtype=jnp.float32):
    sharding = NamedSharding(mesh, PartitionSpec(*axes), memory_kind=kind)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


@pytest.mark.aot
def test_any_program_s_memory_on_a_tpu_is_known_without_code(v4):
    x = shared(v4, (4096, 4096), "x")
    memory = program_memory(jax.jit(lambda x: jnp.tanh(x @ x.T) @ x).lower(x), limit_s=100)
    assert memory.arguments_bytes == 4096 * 4096 * 4 // 4
    assert memory.outputs_bytes == 4096 * 4096 * 4 // 4
    assert memory.code_bytes is None


@pytest.mark.aot
def test_arguments_on_the_host_are_no_hbm(v4):
    x, away = shared(v4, (1024, 1024), "x"), shared(v4, (1024, 1024), "x", kind="pinned_host")

    def function(x, away):
        return x + jax.device_put(away, jax.memory.Space.Device)

    memory = program_memory(jax.jit(function).lower(x, away), limit_s=100)
    assert memory.arguments_bytes == 1024 * 1024 * 4 // 4
    assert memory.host_bytes == 1024 * 1024 * 4 // 4


@pytest.mark.aot
def test_a_program_that_takes_too_long_is_given_up(v4):
    lowered = jax.jit(lambda x: x @ x).lower(shared(v4, (512, 512)))
    with pytest.raises(CompileError, match=r"more than 0 s"):
        program_memory(lowered, limit_s=0.01)


@pytest.mark.aot
def test_matmuls_in_a_loop_take_their_flops_over_the_peak_and_the_gather_its_bytes(v4):
    target, trips, rows, wide = accelerator("v4-8"), 7, 2048, 4096
    x = shared(v4, (rows, wide), dtype=jnp.bfloat16)
    w = shared(v4, (wide, wide), "x", dtype=jnp.bfloat16)

    @jax.jit
    @lambda f: jax.shard_map(
        f,
        mesh=v4,
        in_specs=(PartitionSpec(), PartitionSpec("x")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def function(x, w):
        def body(x, _):
            whole = jax.lax.all_gather(w * x[0, 0], "x", axis=0, tiled=True)
            return x @ whole, None

        return jax.lax.scan(body, x, length=trips)[0]

    compiled = compile_ahead(function.lower(x, w), code=True, limit_s=200)
    found = step_time(compiled.hlo, target)
    at_peak = trips * 2 * rows * wide * wide / target.peak_flops
    # The products are given 89 % of the peak; a copy of the carry and the scaling take the rest.
    assert 0.6 < at_peak / found.compute_s < 0.89
    assert found.ici_bytes == trips * wide * wide * 2 * 3 // 4
    assert [loop.trips for loop in found.loops] == [trips]
    assert found.unknown_loops == ()
    assert compiled.memory.code_bytes > 0


def first_row_s_arguments():
    """Bytes a chip of the first row's state and rows, by arithmetic: no compiler, any devices."""
    job = spec.load(
        REPOSITORY / "jobs" / "sop_bs32_len1024.yaml",
        overrides=["update.design=layer_major", "update.clip=per_layer", "update.layers=stacked"],
    )
    mesh = make_mesh(job, jax.devices()[:4])
    state = abstract_state(job, ARCHITECTURES[job.model.lower()], mesh)
    rows = abstract_rows(job, NamedSharding(mesh, PartitionSpec("fsdp")))
    return sum(
        tiled_bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize)
        for leaf in jax.tree.leaves((state, rows))
    )


def hbm_row(name):
    command = [sys.executable, "-m", "benchmarks.hbm", "--rows", name, "--full", "none", "--json"]
    run = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    [row] = json.loads(run.stdout)
    return row, run.returncode


@pytest.mark.aot
def test_the_sops_update_takes_what_its_own_log_says():
    row, _ = hbm_row("sop")
    # 7.62e9 parameters in f32, thrice, over four chips.
    assert row["arguments_gib"] == pytest.approx(7.616e9 * 4 * 3 / 4 / GIB, rel=0.001)
    # The hardware: "Attempting to reserve 7.82G at the bottom of memory".
    assert row["temporaries_gib"] == pytest.approx(7.82, rel=0.05)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "total_gib"),
    [("global", 18.354), ("host", 8.677), ("14b_int8", 24.787), ("per_layer", 14.857)],
)
def test_other_layouts_of_the_update_take_what_they_took(name, total_gib):
    row, returncode = hbm_row(name)
    assert row["failure"] is None
    assert row["total_gib"] == pytest.approx(total_gib, rel=0.01)
    assert returncode == 0


@pytest.mark.aot
def test_the_update_of_7b_on_v4_8_takes_what_it_took():
    row, returncode = hbm_row("7b")
    assert row["failure"] is None
    assert row["arguments_gib"] * GIB == first_row_s_arguments()
    assert row["arguments_gib"] == pytest.approx(10.640, abs=0.001)
    # Arguments and temporaries, without code (0.036 GiB). Lower it with the program.
    assert row["total_gib"] == pytest.approx(14.642, rel=0.01)
    assert returncode == 0
