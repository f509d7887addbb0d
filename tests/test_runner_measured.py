"""Planned beside measured: the SOP's own log, and samples as a v4-8 would have given them."""

import json
import re

import pytest

from jobs import spec
from jobs.calibration import read_calibration
from jobs.records import PLAN_FILE, HbmSample
from runner import archive, measured
from runner.conclude import conclude, diagnosis_of
from runner.diagnose import diagnose
from runner.ending import of_process
from runner.provenance import Checkout
from tests.test_runner_cli import OOM, call
from tests.test_trainer_plan import GIB, JOBS, known_update
from trainer.calibration import calibrated
from trainer.plan import Options, plan

CHIPS = 4


@pytest.fixture
def job(tmp_path):
    return spec.load(JOBS / "sop_bs32_len1024.yaml", overrides=(f"cache_dir={tmp_path / 'cache'}",))


@pytest.fixture
def planned(job):
    return plan(job, Options(advice=False), known_update(7.5))


@pytest.fixture
def run(job, tmp_path):
    """A run's directory, its job under way."""
    code = Checkout(commit=None, dirty=None)
    with archive.create(
        job, verb="train", where="process", runs=tmp_path / "runs", code=code
    ) as made:
        made.update(packages={"libtpu": "0.0.32.1"}, state="running")
        yield made


def sampled(run, *lines, free_gib=30.75):
    """Lines of hbm.jsonl: (step, phase, GiB in use by the fullest chip)."""
    with (run.path / "hbm.jsonl").open("a") as file:
        for step, phase, used in lines:
            sample = HbmSample(
                step=step,
                phase=phase,
                in_use_bytes=[int((used - 0.1 * i) * GIB) for i in reversed(range(CHIPS))],
                peak_bytes=[int(used * GIB)] * CHIPS,
                limit_bytes=[int(free_gib * GIB)] * CHIPS,
                peak_reserved_bytes=[int(7.82 * GIB)] * CHIPS,
            )
            file.write(sample.model_dump_json() + "\n")


def test_the_sop_s_own_log_beside_its_plan(planned, run):
    found = measured.compare(planned, run, diagnose([OOM.encode()]))
    told = {m.what: (m.planned_bytes / GIB, m.measured_bytes / GIB) for m in found}
    # 30.75 usable - 21.28 state - 3.55 engine - 0.24 KV pool - 0.0008 batch, as its log says: 5.68.
    in_use = told["in use when jit_training_step was loaded"]
    assert in_use == (pytest.approx(30.75 - 5.68, abs=0.005),) * 2
    wanted = told["temporaries of jit_training_step"]
    assert wanted == (pytest.approx(7.5), pytest.approx(7.82, abs=0.005))


def test_samples_are_compared_with_what_the_plan_has_when_a_phase_begins(planned, run):
    sampled(run, (-1, "load", 0), (0, "rollout", 25.1), (0, "update", 25.0), (1, "update", 25.2))
    told = {m.what: m for m in measured.compare(planned, run, None)}
    assert set(told) == {
        "usable", "in use before rollout", "in use before update",
        "temporaries of the largest program",
    }  # fmt: skip
    # f32 parameters, momentum and accumulator, the engine's weights, its KV pool.
    own = sum(
        planned.phases["update"][owner]
        for owner in planned.phases["update"]
        if not owner.startswith(("update ", "batch"))
    )
    update = told["in use before update"]
    assert update.planned_bytes == own
    assert own / GIB == pytest.approx(30.75 - 5.68, abs=0.01)
    assert update.measured_bytes == int(25.2 * GIB)
    reserved = told["temporaries of the largest program"]
    assert reserved.error_bytes / GIB == pytest.approx(7.82 - 7.5, abs=1e-6)


def test_a_torn_line_is_left_out_and_a_cpu_has_nothing_to_compare(planned, run):
    assert measured.compare(planned, run, None) == []
    sampled(run, (-1, "load", 0))
    with (run.path / "hbm.jsonl").open("a") as file:
        file.write('{"step": 0, "pha')
    assert [m.what for m in measured.compare(planned, run, None)] == [
        "usable",
        "temporaries of the largest program",
    ]


def test_a_run_s_end_leaves_what_it_measured_for_the_next_plan(job, planned, run, tmp_path):
    (run.path / PLAN_FILE).write_text(planned.model_dump_json())
    sampled(run, (-1, "load", 0.25), (0, "update", 25.0))
    conclude(run, of_process(0, stopped=False, refusal=False))
    known = read_calibration(tmp_path / "cache", accelerator="v4-8", libtpu="0.0.32.1")
    assert known.free_bytes == int(30.75 * GIB) - int(0.25 * GIB)
    assert known.reserved_beyond_plan_bytes / GIB == pytest.approx(0.32, abs=1e-6)
    assert known.run == run.name


def test_a_plan_of_another_job_teaches_nothing_of_programs(planned, run):
    other = json.loads(planned.model_dump_json()) | {"job_sha256": "0" * 64}
    (run.path / PLAN_FILE).write_text(json.dumps(other))
    sampled(run, (-1, "load", 0.25))
    found = measured.calibration(run, run.manifest())
    assert found.reserved_beyond_plan_bytes is None
    assert found.free_bytes == int(30.75 * GIB) - int(0.25 * GIB)


def test_a_run_that_went_on_without_a_first_sample_teaches_nothing(run):
    sampled(run, (0, "update", 25.0))
    assert measured.calibration(run, run.manifest()) is None


def test_calibrate_shows_both_and_keeps_what_a_fetched_run_measured(planned, run, tmp_path):
    (run.path / PLAN_FILE).write_text(planned.model_dump_json())
    sampled(run, (-1, "load", 0.25), (0, "update", 25.0))
    run.finish(of_process(0, stopped=False, refusal=False))
    here = tmp_path / "another-cache"
    done = call(tmp_path, "calibrate", run.name, "--cache-dir", here)
    assert done.exit_code == 0, done.output
    assert re.search(
        r"temporaries of the largest program +7\.50 GiB +7\.82 GiB +0\.32 GiB", done.output
    )
    assert read_calibration(here, accelerator="v4-8", libtpu="0.0.32.1").run == run.name


def test_calibrate_refuses_a_run_that_measured_nothing(run, tmp_path):
    run.finish(of_process(0, stopped=False, refusal=False))
    done = call(tmp_path, "calibrate", run.name)
    assert done.exit_code == 1
    assert "measured no HBM that could be compared" in done.output
    assert not list(tmp_path.glob("**/calibration"))


def test_a_plan_that_has_been_calibrated_is_right_about_the_same_chips(planned, run, tmp_path):
    (run.path / PLAN_FILE).write_text(planned.model_dump_json())
    sampled(run, (-1, "load", 0.25), (0, "update", 25.0))
    taught = measured.calibration(run, run.manifest())
    again = calibrated(planned, taught)
    before, now = (
        {m.what: m for m in measured.compare(plan, run, None)} for plan in (planned, again)
    )
    largest = "temporaries of the largest program"
    assert before[largest].error_bytes == taught.reserved_beyond_plan_bytes > 0
    assert now[largest].error_bytes == 0
    # What the runtime keeps is in the plan now; what programs took too much is not in use before.
    held = now["in use before update"].planned_bytes - before["in use before update"].planned_bytes
    assert held == int(0.25 * GIB)
    # And a run that was planned so teaches the same, not nothing.
    (run.path / PLAN_FILE).write_text(again.model_dump_json())
    assert measured.calibration(run, run.manifest()) == taught


def test_an_earlier_run_does_not_take_a_later_one_s_place(planned, run, tmp_path):
    sampled(run, (-1, "load", 0.25))
    run.finish(of_process(0, stopped=False, refusal=False))
    taught = measured.calibration(run, run.manifest())
    earlier = taught.model_copy(update={"run": "earlier", "measured": "2025-01-01T00:00:00+00:00"})
    assert measured.keep(taught, tmp_path) == taught
    assert measured.keep(earlier, tmp_path) == taught
    assert read_calibration(tmp_path, accelerator="v4-8", libtpu="0.0.32.1") == taught


def test_a_calibration_that_cannot_be_kept_is_told(run, tmp_path):
    sampled(run, (-1, "load", 0.25))
    run.finish(of_process(0, stopped=False, refusal=False))
    (tmp_path / "file").touch()
    done = call(tmp_path, "calibrate", run.name, "--cache-dir", tmp_path / "file" / "x")
    assert done.exit_code == 1
    assert "what it measured is not kept" in done.output


def test_a_diagnosis_of_another_version_is_none(run):
    run.diagnosis_file.write_text('{"old": 1}')
    assert diagnosis_of(run) is None
