"""--strict-plan: a planner and a trainer that say what they are told, and the real command."""

import json

import pytest
from click.testing import CliRunner
from fakes import trainer

from runner.cli import main
from runner.terminal import World
from tests.test_runner_planning import PLAN

GIB = 2**30
JOB = "name: a\naccelerator: {accelerator}\nmodel: tiny\ncache_dir: {cache}\n"
# Plans the job it is given, then runs it: each chip's HBM before the update is as told.
BOTH = (
    "import hashlib, json, pathlib, sys\n"
    "verb, job = sys.argv[1], pathlib.Path(sys.argv[2])\n"
    "if verb == 'plan':\n"
    "    digest = hashlib.sha256(job.read_bytes()).hexdigest()\n"
    "    job.with_name('plan.json').write_text(json.dumps({plan!r} | {{'job_sha256': digest}}))\n"
    "    raise SystemExit(3 if {plan!r}['verdict'] != 'fits' else 0)\n"
    "job.with_name('hbm.jsonl').write_text({samples!r})\n"
    "raise SystemExit({code})\n"
)


def sample(phase, used_gib):
    told = {"step": 0, "phase": phase, "peak_bytes": [0], "limit_bytes": [PLAN["usable_bytes"]]}
    return json.dumps(told | {"in_use_bytes": [int(used_gib * GIB)]}) + "\n"


def run(folder, *options, plan=None, samples="", code=0, accelerator="v4-8"):
    job = folder / "job.yaml"
    job.write_text(JOB.format(accelerator=accelerator, cache=folder / "cache"))
    program = BOTH.format(plan=plan or PLAN, samples=samples, code=code)
    argv = ["run", str(job), "--where", "process", "--runs", str(folder / "runs"), *options]
    return CliRunner().invoke(main, argv, obj=World(trainer=trainer(program)))


FITS = PLAN | {"verdict": "fits"}
RESIDENT = (
    sum(size for owner, size in PLAN["phases"]["update"].items() if not owner.startswith("update "))
    / GIB
)


@pytest.mark.parametrize(
    ("options", "off", "code"),
    [
        (["--strict-plan"], 0.2, 0),
        (["--strict-plan"], 0.3, 4),
        (["--strict-plan"], -0.3, 4),
        (["--strict-plan", "--tolerance", "0.5"], 0.3, 0),
        (["--strict-plan", "--tolerance=0.1"], 0.2, 4),
        ([], 5, 0),
    ],
)
def test_a_run_is_held_to_its_plan(tmp_path, options, off, code):
    done = run(tmp_path, *options, plan=FITS, samples=sample("update", RESIDENT + off))
    assert done.exit_code == code, done.output
    word = "more" if off > 0 else "less"
    line = f"Error: --strict-plan: in use before update: planned {RESIDENT:.2f} GiB"
    assert (line in done.output) == (code == 4)
    assert (f"{abs(off):.2f} GiB {word}" in done.output) == (code == 4)


def test_a_job_that_does_not_fit_is_not_run(tmp_path):
    done = run(tmp_path, "--strict-plan", plan=PLAN | {"verdict": "does_not_load"})
    assert done.exit_code == 3
    assert "Error: --strict-plan: does_not_load" in done.output
    assert not (tmp_path / "runs").exists()


def test_a_run_that_measures_nothing_is_not_what_was_asked_for(tmp_path):
    done = run(tmp_path, "--strict-plan", plan=FITS)
    assert done.exit_code == 4
    assert "measured nothing that could be compared" in done.output


def test_a_failure_stays_what_it_is(tmp_path):
    samples = sample("update", RESIDENT + 9)
    done = run(tmp_path, "--strict-plan", plan=FITS, samples=samples, code=7)
    assert done.exit_code == 5


def test_a_cpu_has_nothing_to_be_strict_about(tmp_path):
    done = run(tmp_path, "--strict-plan", accelerator="cpu")
    assert done.exit_code == 1
    assert "Error: --strict-plan: accelerator = cpu has no HBM" in done.output
