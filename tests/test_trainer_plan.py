"""The plan: against sums worked out here, and the SOP's truth table by the compiler."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import spec
from jobs.records import MemoryPlan
from trainer import budget, compiled, ledger
from trainer.architecture import ARCHITECTURES
from trainer.buffers import ProgramMemory, Tensors
from trainer.compiled import Programs, TooLongError
from trainer.estimate import Program, estimate
from trainer.plan import Options, changed, options_of, plan, what_if
from trainer.refusal import Refusal

REPOSITORY = Path(__file__).parents[1]
JOBS = REPOSITORY / "jobs"
GIB = 2**30
OURS = ("update.design=layer_major", "update.clip=per_layer", "rollout.engine=naive")
QUICK = Options(quick=True)


def a_job(file="sop_bs32_len1024", *overrides):
    return spec.load(JOBS / f"{file}.yaml", overrides=overrides)


def known(reserved_gib, **changes):
    """Every program takes so much, as if the compiler had said so."""
    memory = ProgramMemory(
        arguments_bytes=GIB,
        outputs_bytes=0,
        reserved_bytes=int(reserved_gib * GIB),
        code_bytes=0,
        host_bytes=0,
        peak=(),
        fragmentation_bytes=0,
    )
    program = Program(memory=replace(memory, **changes), estimated=False)
    return lambda *_: program


def known_update(reserved_gib):
    """The update takes so much, every other program a little."""
    update, other = known(reserved_gib), known(0.02)
    return lambda _job, _architecture, name: update() if name == "update" else other()


def test_the_sop_s_step_3_does_not_load_and_the_numbers_are_its_logs():
    found = plan(a_job(), Options(advice=False), known_update(7.82))
    assert found.verdict == "does_not_load"
    assert found.deciding_phase == "update"
    assert found.deciding_owner == "update temporaries"
    # "Attempting to reserve 7.82G ... There are 5.68G free": short by 2.14 GiB.
    program = found.programs["update"]
    assert program.free_bytes_at_load / GIB == pytest.approx(5.68, abs=0.005)
    assert -found.headroom_bytes / GIB == pytest.approx(2.14, abs=0.005)
    assert found.kv_pool_tokens == 18044
    assert found.mem_fraction_interval.above == pytest.approx(0.375, abs=0.001)
    # No share is both enough for the engine and little enough for the update.
    assert found.mem_fraction_interval.up_to < found.mem_fraction_interval.above


def test_every_phase_adds_up_and_the_fullest_decides():
    found = plan(a_job(), Options(advice=False), known(0.3, outputs_bytes=4 * GIB))
    totals = {phase: sum(owners.values()) for phase, owners in found.phases.items()}
    assert list(totals) == ["load", "rollout", "update", "hand_over"]
    assert found.peak_bytes == max(totals.values())
    assert found.headroom_bytes == found.usable_bytes - found.peak_bytes
    assert totals[found.deciding_phase] == found.peak_bytes
    # All programs take the same: what the engine's prefill is given makes the difference.
    assert found.deciding_phase == "rollout"
    assert found.verdict == "fits"


@pytest.mark.parametrize("reserved", [2.0, 4.0, 5.5])
def test_the_largest_share_that_is_promised_just_fits_and_a_little_more_does_not(reserved):
    # No cap that matters, and halves that no weight of the engine can be.
    settings = ("engine.max_total_tokens=10000000", "engine.dtype=float32", OURS[0])
    edge = plan(a_job("sop_bs32_len1024", *settings), QUICK, known(reserved)).mem_fraction_interval
    assert edge.above < edge.up_to < 1
    for share, verdict in (
        (edge.above - 0.001, "engine_refused"),
        (edge.above + 0.001, "fits"),
        (edge.up_to - 0.001, "fits"),
        (edge.up_to + 0.001, "does_not_load"),
    ):
        tried = a_job("sop_bs32_len1024", *settings, f"engine.mem_fraction_static={share}")
        assert plan(tried, Options(advice=False), known(reserved)).verdict == verdict


def test_a_pool_with_a_cap_takes_any_share_above_the_least():
    more = ("update.design=layer_major", "engine.max_total_tokens=49152")
    found = plan(a_job("sop_bs32_len1024", *more), QUICK, known(4.0))
    assert found.mem_fraction_interval.up_to == 1.0


def test_a_share_of_35_percent_is_refused_as_the_engine_refuses_it():
    found = plan(a_job("sop_bs32_len1024_mem035"), QUICK, estimate)
    assert (found.verdict, found.deciding_phase) == ("engine_refused", "load")
    assert found.kv_pool_tokens == 0


def test_what_pypi_s_engine_would_take_is_told_beside_the_sop_s():
    job = a_job()
    sop, pypi = (
        plan(job, Options(quick=True, advice=False, build=b), estimate)
        for b in ("sharded", "replicated")
    )
    assert sop.phases["load"]["engine weights"] / GIB == pytest.approx(3.55, abs=0.005)
    assert pypi.phases["load"]["engine weights"] / GIB == pytest.approx(5.07, abs=0.005)
    assert any("5.07 GiB" in note and "0.535" in note for note in sop.assumptions)
    assert pypi.verdict == "engine_refused"  # 0.4 is below 0.535


BF16_LAYERS = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944) * 2 / 4
BF16_ENDS = 2 * 152064 * 3584 * 2 / 4


@pytest.mark.parametrize(
    ("residency", "in_update"),
    [("keep", {"engine weights", "KV pool"}), ("drop_kv", {"engine weights"}), ("sleep", set())],
)
def test_what_the_engine_holds_through_the_update_is_what_its_residency_says(residency, in_update):
    job = a_job("sop_bs32_len1024", f"engine.residency={residency}")
    phases = plan(job, Options(advice=False), known(3.0)).phases
    engine = {"engine weights", "KV pool"}
    assert engine <= set(phases["rollout"])
    assert engine & set(phases["update"]) == in_update
    # One copy of the weights while they are handed over, and the pool only if it never went.
    assert "engine weights" in phases["hand_over"]
    assert ("KV pool" in phases["hand_over"]) == (residency == "keep")
    assert not any("new" in owner for owner in phases["hand_over"])


@pytest.mark.parametrize("residency", ["keep", "drop_kv", "sleep"])
@pytest.mark.parametrize("layers", ["stacked", "per_layer"])
def test_weights_by_reference_are_counted_once_and_never_kept_through_an_update(residency, layers):
    settings = (OURS[0], f"update.layers={layers}", f"engine.residency={residency}")
    job = a_job("sop_bs32_len1024", *settings)
    made = plan(job, Options(advice=False), estimate)
    assert "engine weights" not in made.phases["update"]
    assert ("KV pool" in made.phases["update"]) == (residency == "keep")
    if layers == "per_layer":
        assert "engine weights" not in made.phases["rollout"]
        assert "hand_over" not in made.programs
    else:
        # The ends, embedding and head, are the masters' own; biases and norms are a thousandth.
        copied = made.phases["rollout"]["engine weights"]
        assert copied == pytest.approx(BF16_LAYERS, rel=1e-3)
        assert made.programs["hand_over"].outputs_bytes == copied
    whole = budget.engine_weight_bytes(job, ARCHITECTURES[job.model.lower()], "sharded")
    assert whole == pytest.approx(BF16_LAYERS + BF16_ENDS, rel=1e-3)


def test_a_model_whose_heads_the_engine_s_kernel_does_not_take_is_refused_with_a_way_out():
    job = a_job("sop_bs32_len1024", "model=Qwen/Qwen2.5-0.5B")
    with pytest.raises(Refusal, match=r"heads of 64.*128.*--set rollout\.engine=naive"):
        plan(job, QUICK, estimate)
    assert plan(changed(job, ["rollout.engine=naive"]), QUICK, estimate).programs


def test_the_sampler_reads_the_masters_where_it_can_and_a_copy_where_it_must():
    by_reference = plan(a_job("sop_bs32_len1024", *OURS), QUICK, estimate)
    copied = plan(a_job("sop_bs32_len1024", *OURS, "update.layers=stacked"), QUICK, estimate)
    assert set(by_reference.programs) == {"update", "sampler"}
    assert set(copied.programs) == {"update", "sampler", "hand_over"}
    assert "sampler weights" not in by_reference.phases["rollout"]
    weights = copied.phases["rollout"]["sampler weights"]
    assert weights / GIB == pytest.approx(3.55, abs=0.005)
    assert copied.phases["hand_over"]["sampler weights"] == weights
    assert "sampler weights" not in copied.phases["update"]  # asleep


def test_the_kl_term_s_policy_is_resident_in_every_phase():
    found = plan(a_job("sop_bs32_len1024", *OURS, "train.beta=0.1"), QUICK, estimate)
    sizes = {owners["reference policy"] for owners in found.phases.values()}
    assert len(sizes) == 1
    assert sizes.pop() / GIB == pytest.approx(3.55, abs=0.005)


def test_code_that_was_not_generated_is_an_owner_of_its_own_and_a_note():
    found = plan(a_job("sop_bs32_len1024", *OURS), QUICK, known(4.0, code_bytes=None))
    assert found.phases["update"]["update code (assumed)"] == ledger.CODE_UNROLLED
    assert found.programs["update"].code_assumed
    assert any("code was not generated" in note for note in found.assumptions)
    generated = plan(a_job("sop_bs32_len1024", *OURS), QUICK, known(4.0, code_bytes=7))
    assert generated.phases["update"]["update code"] == 7
    assert not any("code was not generated" in note for note in generated.assumptions)


def test_nine_tenths_of_the_heap_are_named_or_fragmentation():
    peak = tuple(Tensors(op=f"op{i}", shape="f32[1]", count=1, size_bytes=GIB) for i in range(20))
    job = a_job("sop_bs32_len1024", *OURS)
    found = plan(job, QUICK, known(22.0, peak=peak, fragmentation_bytes=2 * GIB))
    named = sum(kind.size_bytes for kind in found.why)
    assert 0.9 * 22 * GIB <= named + found.fragmentation_bytes < (0.9 * 22 + 1) * GIB


def test_an_update_that_loads_where_the_engine_s_pool_was_may_find_it_in_pieces():
    # A pool of all that is left: what the update then wants was never free before.
    pool = ("engine.max_total_tokens=10000000", "engine.mem_fraction_static=0.9")
    job = a_job("sop_bs32_len1024", OURS[0], "engine.residency=sleep", *pool)
    [one] = plan(job, Options(advice=False), known_update(9.0)).contiguity
    assert one.program == "update"
    assert one.untouched_bytes < one.needs_bytes == 9 * GIB <= one.free_bytes
    assert "KV pool" in one.freed
    # A pool of what the requests need leaves room beside it, and no doubt.
    capped = a_job("sop_bs32_len1024", OURS[0], "engine.residency=sleep")
    assert plan(capped, Options(advice=False), known_update(9.0)).contiguity == []


def test_every_advice_is_the_job_with_those_settings_planned():
    job = a_job()
    found = plan(job, QUICK, estimate)
    assert found.advice
    assert found.advice[0].fits
    for one in found.advice:
        again = plan(changed(job, one.settings), Options(quick=True, advice=False), estimate)
        assert one.headroom_bytes == again.headroom_bytes
        assert one.saves_bytes == found.peak_bytes - again.peak_bytes
        assert one.fits == (again.verdict == "fits")


def test_a_job_that_fits_needs_no_advice():
    assert plan(a_job("sop_bs32_len1024", *OURS), QUICK, estimate).advice == []


def test_a_step_s_seconds_are_told_as_a_model_and_none_where_the_engine_does_not_start():
    made = plan(a_job("sop_bs32_len1024", *OURS), QUICK, estimate)
    # docs/memory.md: 3.30 s of compute without attention's kernel, 3.41 ms a token.
    assert 3.2 < made.step["update_compute_s"] < 3.7
    assert made.step["decode_s"] == pytest.approx(1024 * 3.41e-3, rel=0.02)
    assert any("never a measurement" in note for note in made.assumptions)
    refused = plan(a_job("sop_bs32_len1024_mem035"), Options(quick=True, advice=False), estimate)
    assert refused.step == {}
    assert not any("never a measurement" in note for note in refused.assumptions)


def test_a_change_that_contradicts_the_job_is_none():
    job = a_job("sop_bs32_len1024", "mesh.tp=4")
    assert changed(job, ["update.design=layer_major"]) is None
    assert changed(job, ["rollout.engine=naive"]).rollout.engine == "naive"


def test_every_type_of_tpu_is_planned_that_the_job_can_be_laid_out_on():
    job = a_job("sop_bs32_len1024", *OURS, "train.micro_batch_size=null")
    found = {made.accelerator: made for made in what_if(job, QUICK, estimate)}
    assert {"v4-8", "v5e-8", "v6e-8", "v5p-8"} <= set(found)
    assert found["v2-8"].verdict == "does_not_load"
    assert found["v5p-8"].verdict == "fits"


def test_an_accelerator_without_hbm_is_refused():
    with pytest.raises(Refusal, match=r"accelerator = cpu has no HBM .* --accelerator v4-8"):
        plan(spec.load(JOBS / "smoke.yaml"), QUICK, estimate)


@pytest.mark.parametrize(
    ("overrides", "gib"),
    [
        # docs/memory.md, column temporaries, by the compiler.
        (("update.layers=stacked",), 4.00),
        (("update.layers=stacked", "update.clip=global"), 7.71),
        (("update.layers=stacked", "rollout.prompts_per_step=128"), 11.14),
        (("update.layers=stacked", "rollout.max_completion_tokens=8192"), 16.81),
        (("update.layers=stacked", "model=Qwen/Qwen2.5-14B"), 7.59),
        (("update.layers=stacked", "model=Qwen/Qwen2.5-32B"), 11.00),
        (("update.layers=stacked", "accelerator=v5e-8"), 2.81),
        ((), 4.22),
    ],
)
def test_the_formula_of_the_update_is_near_what_the_compiler_says(overrides, gib):
    job = a_job("sop_bs32_len1024", *OURS, "train.micro_batch_size=null", *overrides)
    found = estimate(job, ARCHITECTURES[job.model.lower()], "update")
    assert found.memory.reserved_bytes / GIB == pytest.approx(gib, rel=0.07)


class Compiler:
    """Compiles nothing, and counts."""

    def __init__(self):
        self.asked = []

    def __call__(self, job, _architecture, name, limit_s):
        assert limit_s > 0
        self.asked.append((job.name, name))
        peak = (Tensors(op="o", shape="f32[2]", count=1, size_bytes=8),)
        return known(1.5, peak=peak)().memory


def cached(folder, compiler, *overrides, seconds=100.0, versions=None):
    job = a_job("sop_bs32_len1024", *OURS, f"cache_dir={folder}", *overrides)
    programs = Programs(
        say=lambda _: None,
        until=time.monotonic() + seconds,
        compile_one=compiler,
        versions={"libtpu": "1"} if versions is None else versions,
    )
    return programs.of(job, ARCHITECTURES[job.model.lower()], "update")


def test_what_was_compiled_is_found_again_and_what_decides_it_compiles_anew(tmp_path):
    compiler = Compiler()
    first = cached(tmp_path, compiler)
    assert cached(tmp_path, compiler) == first
    assert cached(tmp_path, compiler, "steps=3", "engine.mem_fraction_static=0.7") == first
    assert len(compiler.asked) == 1
    cached(tmp_path, compiler, "rollout.max_completion_tokens=512")
    cached(tmp_path, compiler, "accelerator=v5p-8")
    cached(tmp_path, compiler, versions={"libtpu": "2"})
    assert len(compiler.asked) == 4


def test_what_decides_the_engine_s_programs_compiles_them_anew_and_nothing_else(tmp_path):
    compiler = Compiler()

    def asked(name, build, *overrides):
        job = a_job("sop_bs32_len1024", f"cache_dir={tmp_path}", *overrides)
        Programs(
            say=lambda _: None,
            until=time.monotonic() + 100,
            compile_one=compiler,
            build=build,
            versions={"libtpu": "1"},
        ).of(job, ARCHITECTURES[job.model.lower()], name)
        return len(compiler.asked)

    assert asked("engine_decode", "sharded") == 1
    assert asked("engine_decode", "sharded", "engine.residency=sleep") == 1
    assert asked("engine_decode", "replicated") == 2
    assert asked("engine_decode", "sharded", "engine.page_size=16") == 3
    assert asked("engine_decode", "sharded", "engine.mem_fraction_static=0.39") == 4  # its pool
    assert asked("update", "sharded") == 5
    assert asked("update", "replicated", "engine.page_size=16") == 5


def test_a_broken_cache_file_is_compiled_anew(tmp_path):
    compiler = Compiler()
    cached(tmp_path, compiler)
    [file] = (tmp_path / "plan").glob("*.json")
    file.write_text("{")
    cached(tmp_path, compiler)
    assert len(compiler.asked) == 2


def test_without_the_compiler_or_time_nothing_is_compiled(tmp_path):
    with pytest.raises(Refusal, match=r"no package libtpu.*--quick"):
        cached(tmp_path, Compiler(), versions={"jax": "1"})
    with pytest.raises(TooLongError, match="raise --limit"):
        cached(tmp_path, Compiler(), seconds=-1.0)


def test_the_files_that_only_plan_are_no_part_of_a_program():
    # Else a change of them would have to compile anew: see compiled.PLANNING.
    modules = {f"trainer.{name.removesuffix('.py')}" for name in compiled.PLANNING}
    code = (
        "import sys, trainer.update.layer_major, trainer.update.reference, trainer.rollout.programs"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"{code}; print(*sys.modules)"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not modules & set(run.stdout.split())


def test_options_are_read_and_wrong_ones_end_with_the_usage():
    assert options_of([]) == Options()
    asked = options_of(["--quick", "--no-advice", "--limit", "5", "--what-if", "accelerators"])
    assert asked == Options(quick=True, advice=False, limit_s=5.0, what_if=True)
    with pytest.raises(SystemExit):
        options_of(["--fast"])


def verb(folder, *arguments, file="sop_bs32_len1024", overrides=()):
    """(exit code, plan.json, what it printed) of the trainer's verb, in a process of its own."""
    (folder / "job.json").write_text(a_job(file, *overrides).to_json())
    ours = ("JAX_PLATFORMS", "XLA_FLAGS")
    environment = {k: v for k, v in os.environ.items() if k not in ours}  # noqa: TID251
    run = subprocess.run(
        [sys.executable, "-m", "trainer", "plan", str(folder / "job.json"), *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    written = folder / "plan.json"
    return run.returncode, written.read_text() if written.exists() else None, run.stdout


def test_the_verb_writes_the_plan_and_says_by_its_code_whether_it_fits(tmp_path):
    code, text, _ = verb(tmp_path, "--quick")
    assert code == 3
    assert MemoryPlan.model_validate_json(text).verdict == "does_not_load"
    assert verb(tmp_path, "--quick", overrides=OURS)[0] == 0
    code, text, _ = verb(
        tmp_path,
        "--quick",
        "--what-if",
        "accelerators",
        overrides=(*OURS, "train.micro_batch_size=null"),
    )
    assert len(json.loads(text)) > 5
    assert code == 0


def test_the_verb_refuses_what_cannot_be_planned(tmp_path):
    code, text, said = verb(tmp_path, "--quick", file="smoke")
    assert (code, text) == (1, None)
    assert said.startswith("Error: accelerator = cpu has no HBM")


# What must be true of the SOP's jobs, by the compiler. One update serves three of the rows.
@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def by_the_compiler(folder, cache, file, *overrides):
    where = (*overrides, f"cache_dir={cache}")
    code, text, said = verb(folder, "--no-advice", "--limit", "280", file=file, overrides=where)
    assert text is not None, said
    made = MemoryPlan.model_validate_json(text)
    assert code == (0 if made.verdict == "fits" else 3)
    # Budget and compiler agree to the byte on what the update is given.
    job = a_job(file, *overrides)
    state = budget.state_bytes(job, ARCHITECTURES[job.model.lower()])
    arguments = sum(state.owners.values()) + budget.batch_bytes(job)
    assert made.programs["update"].arguments_bytes == arguments
    return made


@pytest.mark.aot
@pytest.mark.parametrize(
    ("file", "verdict", "free"),
    [
        ("sop_bs32_len1024", "does_not_load", 5.68),
        ("sop_bs32_len1024_kv1536", "does_not_load", 5.90),
        ("sop_bs32_len1024_mem035", "engine_refused", None),
        ("sop_smoke", "fits", None),
    ],
)
def test_the_sop_s_jobs_end_as_they_did_on_hardware(tmp_path, cache, file, verdict, free):
    made = by_the_compiler(tmp_path, cache, file)
    assert made.verdict == verdict
    program = made.programs["update"]
    if free is not None:
        assert program.free_bytes_at_load / GIB == pytest.approx(free, abs=0.005)
        # The SOP's own program: 7.82.
        assert program.reserved_bytes / GIB == pytest.approx(7.82, rel=0.05)
        named = sum(kind.size_bytes for kind in made.why) + made.fragmentation_bytes
        assert named >= 0.9 * program.reserved_bytes
    if verdict == "engine_refused":
        assert made.mem_fraction_interval.above == pytest.approx(0.375, abs=0.001)


@pytest.mark.aot
def test_layer_major_has_12_gib_to_spare_where_the_sop_s_design_did_not_load(tmp_path, cache):
    made = by_the_compiler(tmp_path, cache, "sop_bs32_len1024", *OURS, "update.layers=stacked")
    assert made.verdict == "fits"
    assert made.headroom_bytes >= 12 * GIB
    assert set(made.programs) == {"update", "sampler", "hand_over"}
