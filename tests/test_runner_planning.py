"""`headroom plan`: what it asks of the trainer, and what it makes of whatever comes back."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from fakes import headroom, trainer, write_job

from jobs.records import MemoryPlan
from runner.cli import main
from runner.plan_table import reason
from runner.planning import Asked, plan_argv
from runner.terminal import World

GIB = 2**30
ASKED = Asked(quick=False, engine_weights="sharded", advice=True, what_if=False, limit_s=900.0)
PLAN = {
    "job": "stand-in",
    "job_sha256": "0",
    "accelerator": "v4-8",
    "verdict": "does_not_load",
    "usable_bytes": int(30.75 * GIB),
    "peak_bytes": int(32.89 * GIB),
    "headroom_bytes": int(30.75 * GIB) - int(32.89 * GIB),
    "deciding_phase": "update",
    "deciding_owner": "update temporaries",
    "phases": {"load": {"moments": 7 * GIB}, "update": {"moments": 7 * GIB, "[b]batch": 1}},
    "programs": {
        "update": {
            "arguments_bytes": int(21.28 * GIB),
            "outputs_bytes": 0,
            "reserved_bytes": int(7.82 * GIB),
            "code_bytes": 0,
            "free_bytes_at_load": int(5.68 * GIB),
            "code_assumed": True,
            "estimated": False,
        }
    },
    "host_bytes": 0,
    "why": [
        {"program": "update", "op": "jit(a)/[dot]", "shape": "f32[2]", "count": 3, "size_bytes": 24}
    ],
    "advice": [
        {
            "settings": ["a.b=1", "c.d=[x]"],
            "saves_bytes": 5 * GIB,
            "headroom_bytes": 3 * GIB,
            "price": "time",
            "fits": True,
            "estimated": False,
        }
    ],
}
# A planner that writes PLAN beside the job, with changes, and ends with a code.
WRITES = (
    "import json, pathlib, sys\n"
    "print('update on v4-8: compiling ...', flush=True)\n"
    "folder = pathlib.Path(sys.argv[2]).parent\n"
    "(folder / 'plan.json').write_text(json.dumps({plan!r}))\n"
    "raise SystemExit({code})\n"
)


def call(folder, code, *arguments):
    job = write_job(folder)
    world = World(trainer=trainer(code))
    return CliRunner().invoke(main, ["plan", str(job), *arguments], obj=world)


@pytest.mark.parametrize(("verdict", "code"), [("fits", 0), ("does_not_load", 3)])
def test_the_exit_code_is_the_verdict_s_and_json_is_the_record(tmp_path, verdict, code):
    plan = PLAN | {"verdict": verdict}
    found = call(tmp_path, WRITES.format(plan=plan, code=code), "--json")
    assert found.exit_code == code
    assert MemoryPlan.model_validate_json(found.stdout) == MemoryPlan.model_validate(plan)
    assert "headroom: update on v4-8: compiling ..." in found.stderr


def test_the_table_has_every_phase_owner_and_number_and_brackets_as_they_are(tmp_path):
    found = call(tmp_path, WRITES.format(plan=PLAN, code=3))
    for part in (
        "load",
        "update",
        "moments",
        "5.68",
        "7.82",
        "32.89 GiB of 30.75 GiB a chip in update: short by 2.14 GiB",
        "update needs 7.82 GiB and finds 5.68 GiB free",
        "jit(a)/[dot]",
        "--set a.b=1 --set c.d=[x]",
        "saves 5.00 GiB, then fits with 3.00 GiB left; price: time",
    ):
        assert part in found.stdout, part


def test_what_may_not_be_in_one_piece_is_told_with_what_was_freed(tmp_path):
    doubt = {
        "program": "update",
        "needs_bytes": 9 * GIB,
        "free_bytes": 15 * GIB,
        "untouched_bytes": 2 * GIB,
        "freed": {"KV pool": 13 * GIB},
    }
    found = call(tmp_path, WRITES.format(plan=PLAN | {"contiguity": [doubt]}, code=3))
    told = found.stdout.replace("\n", " ")
    assert "update wants 9.00 GiB contiguous; of the 15.00 GiB free 2.00 GiB were never" in told
    assert "(KV pool 13.00 GiB)" in told
    assert "in one piece" not in call(tmp_path, WRITES.format(plan=PLAN, code=3)).stdout


def test_a_step_s_time_is_printed_as_a_model_longest_part_first(tmp_path):
    # 9.5 s in all; 0.05 of it is less than a hundredth.
    step = {"update_ici_s": 0.45, "decode_s": 6.0, "update_compute_s": 3.0, "hand_over_s": 0.05}
    found = call(tmp_path, WRITES.format(plan=PLAN | {"step": step}, code=3))
    told = "by a model and not measured: 9.5 s (decode 6.00, update_compute 3.00, update_ici 0.45)"
    assert told in found.stdout.replace("\n", " ")
    plans = [PLAN | {"step": step}, PLAN | {"accelerator": "v5p-8"}]
    found = call(tmp_path, WRITES.format(plan=plans, code=0), "--what-if", "accelerators")
    [line] = [line for line in found.stdout.splitlines() if "v4-8" in line]
    assert "9.5" in line


def test_what_if_is_a_line_for_each_and_fits_where_one_does(tmp_path):
    plans = [PLAN, PLAN | {"accelerator": "v5p-8", "verdict": "fits"}]
    found = call(tmp_path, WRITES.format(plan=plans, code=0), "--what-if", "accelerators")
    assert found.exit_code == 0
    assert "v4-8" in found.stdout
    assert "v5p-8" in found.stdout


def test_a_refusal_is_one_error_a_line_and_exit_code_1(tmp_path):
    found = call(tmp_path, "print('Error: no HBM'); print('Error: nor that'); raise SystemExit(1)")
    assert found.exit_code == 1
    assert found.stderr == "Error: no HBM\nError: nor that\n"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("print('libtpu: oh', flush=True)\nimport os\nos.abort()", "SIGABRT: libtpu: oh"),
        ("raise SystemExit(70)", "exit status 70: no word"),
    ],
)
def test_a_planner_that_dies_is_reported_with_its_last_words_and_exit_code_5(tmp_path, code, says):
    found = call(tmp_path, code)
    assert found.exit_code == 5
    assert says in found.stderr
    assert "Traceback" not in found.stderr


def test_a_bad_job_is_refused_before_anything_starts(tmp_path):
    found = call(tmp_path, "raise SystemExit(9)", "--accelerator", "v4-9")
    assert found.exit_code == 1
    assert "did you mean" in found.stderr


def test_the_child_is_asked_for_exactly_what_the_user_asked():
    file = Path("/runs/a b/job.json")
    plain = plan_argv(("python", "-m", "trainer"), file, ASKED)
    assert plain[:5] == ["python", "-m", "trainer", "plan", "/runs/a b/job.json"]
    assert plain[5:] == ["--limit", "900", "--engine-weights", "sharded"]
    everything = Asked(
        quick=True, engine_weights="replicated", advice=False, what_if=True, limit_s=1.5
    )
    assert plan_argv((), file, everything)[2:] == [
        *("--limit", "1.5", "--engine-weights", "replicated", "--quick", "--no-advice"),
        *("--what-if", "accelerators"),
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_planner_and_then_us(tmp_path, number):
    code = (
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    runner = subprocess.Popen(
        headroom(code, "plan", write_job(tmp_path)), stderr=subprocess.PIPE, text=True
    )
    assert runner.stderr.readline() == "headroom: up\n"
    runner.send_signal(number)
    runner.communicate(timeout=30)
    assert runner.returncode == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_planner_that_takes_too_long_is_stopped_and_told_to_be(tmp_path, monkeypatch):
    # Its own limit is the child's affair; past the grace we end it.
    monkeypatch.setattr("runner.planning._GRACE_S", 0.1)
    began = time.monotonic()
    found = call(tmp_path, "import time; time.sleep(600)", "--limit", "0.1")
    assert time.monotonic() - began < 20
    assert found.exit_code == 5
    assert "more than 0.1 s: raise --limit" in found.stderr


def test_an_engine_s_refusal_says_the_interval():
    plan = MemoryPlan.model_validate(
        PLAN
        | {"verdict": "engine_refused", "mem_fraction_interval": {"above": 0.375, "up_to": 0.5}}
    )
    assert "must be above 0.375 and at most 0.500" in reason(plan)
    none = plan.model_copy(
        update={
            "mem_fraction_interval": plan.mem_fraction_interval.model_copy(update={"up_to": 0.2})
        }
    )
    assert "must be above 0.375, and then the update has no room" in reason(none)


def test_neither_jax_nor_docker_is_imported_for_the_help():
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from runner.cli import main\n"
        "CliRunner().invoke(main, ['plan', '--help'])\n"
        "print({'jax', 'docker', 'rich'} & set(sys.modules))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_the_record_survives_its_json():
    plan = MemoryPlan.model_validate(PLAN)
    assert MemoryPlan.model_validate_json(json.dumps(plan.model_dump(mode="json"))) == plan


def test_the_picture_is_a_png_and_the_page_has_every_number_and_nothing_of_it_is_markup(tmp_path):
    changed = {"phases": {"load": {"moments": 7 * GIB}, "update": {"<b>batch": GIB // 2}}}
    png, html = tmp_path / "plan.png", tmp_path / "plan.html"
    code = WRITES.format(plan=PLAN | changed, code=3)
    call(tmp_path, code, "--png", str(png), "--html", str(html))
    image = png.read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", image[16:24])
    assert width > 400
    assert height > 300
    page = html.read_text()
    assert re.search(r"moments</th><td class=\"n\">7.000</td><td class=\"n\"></td>", page)
    assert re.search(r"&lt;b&gt;batch</th><td class=\"n\"></td><td class=\"n\">0.500</td>", page)
    assert "headroom plan " in page
    assert "<b>batch" not in page
    assert page.count("<svg") == 1
    assert "short by 2.14 GiB" in page


def test_pictures_of_many_plans_or_where_none_can_be_written_are_refused(tmp_path):
    code = WRITES.format(plan=PLAN, code=3)
    many = call(tmp_path, code, "--what-if", "accelerators", "--png", str(tmp_path / "x.png"))
    assert many.exit_code == 2
    nowhere = call(tmp_path, code, "--png", str(tmp_path / "none" / "x.png"))
    assert nowhere.exit_code == 1
    assert "Traceback" not in nowhere.output
    assert str(tmp_path / "none") in nowhere.stderr
