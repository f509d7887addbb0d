"""The search for what fits: against every combination weighed anew, and the SOP's job."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import spec
from jobs.records import Fit
from runner.fit_file import write
from trainer.architecture import ARCHITECTURES
from trainer.estimate import estimate
from trainer.fit import TIE, FitOptions, fit, options_of, settings_of
from trainer.plan import Options, changed, plan
from trainer.refusal import Refusal
from trainer.timemodel import step_model

REPOSITORY = Path(__file__).parents[1]
SOP = REPOSITORY / "jobs" / "sop_bs32_len1024.yaml"
GIB = 2**30
QUICK = FitOptions(quick=True)
# Few sequences, so that there are few combinations.
SMALL = ("rollout.prompts_per_step=8", "rollout.engine=naive", "train.micro_batch_size=4")


def a_job(*overrides):
    return spec.load(SOP, overrides=overrides)


def with_margin(gib, **changes):
    return replace(QUICK, margin_bytes=int(gib * GIB), **changes)


def every_combination(job):
    """Written out once more: (settings, step, plan) of all that contradicts nothing."""
    shape = ARCHITECTURES[job.model.lower()]
    common = [
        [f"update.clip={clip}" for clip in ("global", "per_layer")],
        [f"update.layers={layers}" for layers in ("stacked", "per_layer")],
        [f"update.loss_chunk_tokens={n}" for n in (256, 512)],
        [f"train.micro_batch_size={n}" for n in (4, 8)],
    ]
    ours = [
        [f"update.moments={moments}" for moments in ("bfloat16", "int8")],
        [
            f"update.host_offload={parts}"
            for parts in ("[]", '["momentum"]', '["lo"]', '["momentum", "lo"]')
        ],
    ]
    for design, lists in (("reference", common), ("layer_major", common + ours)):
        for values in itertools.product(*lists):
            made = changed(job, [f"update.design={design}", *values])
            step = step_model(made, shape, build="sharded").step_s
            yield made, step, plan(made, Options(quick=True, advice=False), estimate)


@pytest.mark.parametrize("margin", [1.0, 14.0, 16.0, 22.0])
def test_the_search_finds_what_trying_everything_finds(margin):
    job = a_job(*SMALL)
    tried = list(every_combination(job))
    fitting = [one for one in tried if one[2].headroom_bytes >= margin * GIB]
    alters = lambda made: (made.update.clip != "global") + (made.update.moments != "bfloat16")
    least = min(alters(made) for made, _, _ in fitting)
    fastest = min(step for made, step, _ in fitting if alters(made) == least)
    found = fit(job, with_margin(margin), estimate)
    made = changed(job, [f"{change.key}={json.dumps(change.new)}" for change in found.changes])
    assert found.plan.job_sha256 == made.digest
    assert found.plan.headroom_bytes >= margin * GIB
    assert alters(made) == least
    assert sum(found.step.values()) <= fastest * (1 + TIE)
    assert len(tried) == len(list(settings_of(job, ARCHITECTURES[job.model.lower()], QUICK)))
    # The front: nothing tried is both faster and smaller than a point of it.
    for point in found.front:
        assert not any(
            step < point.step_s and made.peak_bytes < point.peak_bytes for _, step, made in tried
        )
    assert found.front[0].step_s == min(step for _, step, _ in tried)
    assert found.front[-1].peak_bytes == min(made.peak_bytes for _, _, made in tried)


def test_the_sop_s_job_keeps_its_mathematics_and_its_engine_which_sleeps():
    found = fit(a_job(), with_margin(12), estimate)
    assert {change.key for change in found.changes} == {"update.design", "engine.residency"}
    assert found.plan.headroom_bytes >= 12 * GIB
    assert sum(found.step.values()) < found.asked_step_s
    assert all(point.runs for point in found.front)


def test_an_engine_that_cannot_run_the_model_is_not_tried():
    job = a_job("model=Qwen/Qwen2.5-0.5B", "update.design=layer_major")  # heads of 64
    tried = list(settings_of(job, ARCHITECTURES[job.model.lower()], QUICK))
    assert {one.job.rollout.engine for one in tried} == {"naive"}


def test_other_mathematics_only_where_nothing_else_fits_and_never_if_exact():
    job = a_job("model=Qwen/Qwen2.5-14B-Instruct", "update.host_offload=[]")
    shape = ARCHITECTURES[job.model.lower()]
    exact = [one for one in settings_of(job, shape, QUICK) if not one.altering and one.runs]
    most = max(one.headroom_bytes for one in exact) / GIB
    for margin, altering in ((most - 0.1, False), (most + 0.1, True)):
        found = fit(job, with_margin(margin), estimate)
        keys = {change.key for change in found.changes}
        assert bool(keys & {"update.clip", "update.moments"}) == altering
        for change in found.changes:
            assert ("alters the mathematics" in change.price) == (
                change.key in ("update.clip", "update.moments")
            )
    none = fit(job, with_margin(most + 0.1, exact=True), estimate)
    assert none.plan is None
    assert none.shortfall_bytes == pytest.approx(0.1 * GIB, abs=2)


def test_where_nothing_fits_the_shortfall_and_the_smallest_accelerator_are_told():
    job = a_job("model=Qwen/Qwen2.5-32B-Instruct", "rollout.max_completion_tokens=4096")
    found = fit(job, with_margin(4), estimate)
    assert (found.plan, found.changes) == (None, [])
    assert found.shortfall_bytes > 0
    assert found.smallest_accelerator is not None
    there = fit(changed_accelerator(job, found.smallest_accelerator), with_margin(4), estimate)
    assert there.plan.verdict == "fits"


def changed_accelerator(job, name):
    return job.model_copy(update={"accelerator": name})


def test_what_the_compiler_wants_more_than_the_formulas_is_allowed_for():
    asked = []

    def wants_more(job, architecture, name):
        program = estimate(job, architecture, name)
        asked.append(job.digest)
        grown = replace(program.memory, reserved_bytes=program.memory.reserved_bytes + GIB)
        return replace(program, memory=grown, estimated=False)

    found = fit(a_job(), with_margin(12), wants_more)
    assert found.plan.headroom_bytes >= 12 * GIB
    assert len(set(asked)) > 1


def test_a_program_that_cannot_be_compiled_is_passed_over():
    def refuses(job, architecture, name):
        if job.update.layers == "per_layer":
            raise Refusal("too long")
        return estimate(job, architecture, name)

    found = fit(a_job(), with_margin(1), refuses)
    assert {change.key for change in found.changes} >= {"update.layers"}


def test_a_job_without_hbm_is_refused():
    with pytest.raises(Refusal, match="has no HBM"):
        fit(a_job("accelerator=cpu-4"), QUICK, estimate)


def test_options_are_read():
    assert options_of([]) == FitOptions()
    asked = options_of(["--margin", "2.5", "--exact", "--quick", "--limit", "9"])
    assert asked == FitOptions(margin_bytes=5 * GIB // 2, exact=True, quick=True, limit_s=9.0)


def verb(name, folder, job, *arguments):
    (folder / "job.json").write_text(job.to_json())
    ours = ("JAX_PLATFORMS", "XLA_FLAGS")
    environment = {k: v for k, v in os.environ.items() if k not in ours}  # noqa: TID251
    run = subprocess.run(
        [sys.executable, "-m", "trainer", name, str(folder / "job.json"), *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    return run.returncode, run.stdout


def test_the_verb_writes_the_record_and_its_code_is_the_answer(tmp_path):
    job = a_job(*SMALL)
    assert verb("fit", tmp_path, job, "--quick")[0] == 0
    assert Fit.model_validate_json((tmp_path / "fit.json").read_text()).plan is not None
    assert verb("fit", tmp_path, job, "--quick", "--margin", "30")[0] == 3
    assert Fit.model_validate_json((tmp_path / "fit.json").read_text()).plan is None


@pytest.mark.aot
@pytest.mark.timeout(600)
def test_the_sop_s_job_becomes_one_that_fits_with_12_gib_to_spare(tmp_path):
    job = a_job(f"cache_dir={tmp_path}")
    code, said = verb("fit", tmp_path, job, "--margin", "12", "--limit", "570")
    assert code == 0, said
    found = Fit.model_validate_json((tmp_path / "fit.json").read_text())
    assert found.plan.headroom_bytes >= 12 * GIB
    assert not any(program.estimated for program in found.plan.programs.values())
    file = tmp_path / "sop.fit.yaml"
    write(SOP, [f"cache_dir={tmp_path}"], found, to=file, force=False)
    assert verb("plan", tmp_path, spec.load(file))[0] == 0
