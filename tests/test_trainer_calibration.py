"""What chips measured, in the ledger: sums worked out here, on the SOP's own job."""

import json

import pytest

from jobs.calibration import BEYOND, HELD, calibration_file
from jobs.records import gib
from tests.test_trainer_plan import GIB, OURS, a_job, known_update
from trainer.libtpu import versions
from trainer.plan import Options, plan

TABLE = int(30.75 * GIB)


@pytest.fixture
def planned(tmp_path):
    """Plans the SOP's job in our design, and with a measurement where one is given."""

    def make(**measured):
        if measured:
            libtpu = versions()["libtpu"]
            file = calibration_file(tmp_path, accelerator="v4-8", libtpu=libtpu)
            file.parent.mkdir(exist_ok=True)
            record = {
                "accelerator": "v4-8",
                "libtpu": libtpu,
                "run": "20260119-a",
                "measured": "now",
            }
            file.write_text(json.dumps({**record, **measured}))
        job = a_job("sop_bs32_len1024", *OURS, f"cache_dir={tmp_path}")
        return plan(job, Options(advice=False), known_update(5))

    return make


def told(found):
    """The one assumption that names the run."""
    (said,) = (line for line in found.assumptions if "20260119-a" in line)
    return said


def test_what_the_runtime_keeps_is_an_owner_in_every_phase_and_less_headroom(planned):
    before, after = planned(), planned(free_bytes=TABLE - GIB // 2)
    assert all(owners[HELD] == GIB // 2 for owners in after.phases.values())
    assert all(HELD not in owners for owners in before.phases.values())
    assert after.headroom_bytes == before.headroom_bytes - GIB // 2
    assert after.peak_bytes == before.peak_bytes + GIB // 2
    for name, program in before.programs.items():
        now = after.programs[name].free_bytes_at_load
        assert program.free_bytes_at_load - now == GIB // 2
    said = told(after)
    assert gib(TABLE - GIB // 2) in said


def test_temporaries_beyond_the_plan_count_where_a_program_runs(planned):
    before, after = planned(), planned(free_bytes=TABLE, reserved_beyond_plan_bytes=GIB)
    assert (
        {name for name, owners in after.phases.items() if BEYOND in owners}
        == {
            name
            for name, owners in before.phases.items()
            if any("temporaries" in o for o in owners)
        }
        >= {"rollout", "update"}
    )
    assert "1.00 GiB over its plan" in told(after)


def test_a_job_that_just_fits_by_the_table_does_not_with_what_was_measured(planned):
    spare = planned().headroom_bytes
    assert spare > 0
    assert planned(free_bytes=TABLE - spare).verdict == "fits"
    found = planned(free_bytes=TABLE - spare - 1)
    assert (found.verdict, found.headroom_bytes) == ("does_not_load", -1)


def test_more_room_than_the_table_says_is_told_and_not_counted_on(planned):
    before = planned()
    after = planned(free_bytes=TABLE + GIB, reserved_beyond_plan_bytes=-GIB)
    assert (after.phases, after.headroom_bytes) == (before.phases, before.headroom_bytes)
    assert "1.00 GiB under its plan" in told(after)


def test_a_measurement_of_another_libtpu_or_a_broken_file_changes_nothing(planned, tmp_path):
    before = planned()
    folder = tmp_path / "calibration"
    folder.mkdir()
    (folder / "v4-8_0.0.1.json").write_text('{"free_bytes": 1}')
    calibration_file(tmp_path, accelerator="v4-8", libtpu=versions()["libtpu"]).write_text("{")
    assert planned() == before
