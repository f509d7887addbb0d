"""`headroom sweep`: planned, run, killed, gone on with and read; the trainer is a stand-in."""

import contextlib
import csv
import fcntl
import io
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from fakes import headroom, trainer, write_job

from runner import chips
from runner.cli import main
from runner.sweep_file import SweepError
from runner.sweep_lock import held
from runner.sweep_row import Sweep
from runner.terminal import World

OOM = (
    "jaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED: Error loading program 'jit_training_step': "
    "Attempting to reserve 7.82G at the bottom of memory. That was not possible. There are 5.68G "
    "free, 0B reserved, and 5.68G reservable."
)
# A chip takes prompts x tokens up to 64, by the plan and when it runs. Each verb is written down,
# and a cell whose name says so waits until it is told to go, or to stop.
STAND_IN = f"""
import json, pathlib, sys, time
verb, file = sys.argv[1], pathlib.Path(sys.argv[2])
job = json.loads(file.read_text())
told = pathlib.Path(job["cache_dir"]).parent
size = job["rollout"]["prompts_per_step"] * job["rollout"]["max_completion_tokens"]
with (told / "asked").open("a") as asked:
    asked.write(f"{{verb}} {{job['name']}} {{job['accelerator']}}\\n")
if job["name"] == "waits":
    print("step=0", flush=True)
    (told / "up").touch()
    while not (told / "go").exists(): time.sleep(0.01)
if verb == "plan":
    if job["name"] == "breaks" and not (told / "mended").exists(): raise SystemExit(70)
    if job["name"] == "unknown": print("Error: no such model"); raise SystemExit(1)
    fits = size <= 64
    plan = dict(
        job=job["name"], job_sha256="0", accelerator=job["accelerator"],
        verdict="fits" if fits else "does_not_load", usable_bytes=64 << 20,
        peak_bytes=size << 20, headroom_bytes=(64 - size) << 20, deciding_phase="update",
        deciding_owner="update temporaries", phases={{}}, programs={{}}, host_bytes=0)
    (file.parent / "plan.json").write_text(json.dumps(plan))
    raise SystemExit(0 if fits else 3)
if size > 64 or job["name"] == "surprise":
    print({OOM!r}); raise SystemExit(70)
if job["name"] == "crashes": print("who knows"); raise SystemExit(70)
print("step=0 loss=0")
"""
JOB = "rollout: {prompts_per_step: 4, max_completion_tokens: 8}\n"
AXES = (
    "matrix:\n  rollout.prompts_per_step: [4, 8, 12, 16]\n"
    "  rollout.max_completion_tokens: [2, 4, 8, 16]\n"
    "monotone: [rollout.prompts_per_step, rollout.max_completion_tokens]\n"
)


class Site:
    """A folder with a base job, a sweep file, and what the stand-in was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dir = folder / "out"
        write_job(folder, JOB)

    def write(self, text: str, name: str = "s") -> Path:
        path = self.folder / "s.yaml"
        path.write_text(f"name: {name}\njob: job.yaml\nplan_for: v4-8\n{text}")
        return path

    def world(self) -> World:
        return World(
            trainer=trainer(STAND_IN),
            sweep_lock=self.folder / "sweeps",
            chips_lock=self.folder / "chips",
        )

    def call(self, command, target, *more, out=True):
        argv = ["sweep", command, target, *(("--out", self.dir) if out else ()), *more]
        if command == "run":
            argv += ["--where", "process"]
        return CliRunner().invoke(main, [str(a) for a in argv], obj=self.world())

    def start(self, command, target, *more) -> subprocess.Popen[str]:
        program = headroom(STAND_IN, "sweep", command, target, *more)
        program[2] = program[2].replace(
            "World(",
            f"World(sweep_lock=__import__('pathlib').Path({str(self.folder / 'sweeps')!r}), ",
        )
        return subprocess.Popen(
            program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder
        )

    def asked(self, verb: str) -> list[str]:
        path = self.folder / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split()[1] for line in lines if line.startswith(f"{verb} ")]

    def rows(self) -> dict:
        done = self.call("report", self.dir, "--json", out=False)
        assert done.exit_code == 0, done.output
        return {row.cell: row for row in Sweep.model_validate_json(done.stdout).rows}

    def until(self, name: str) -> None:
        deadline = time.monotonic() + 120
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    (tmp_path / "go").touch()
    for file in tmp_path.glob("out/cells/*/runs/*/process.json"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(json.loads(file.read_text())["pid"], signal.SIGKILL)


def test_a_planned_matrix_has_every_verdict_and_few_plans(site):
    done = site.call("plan", site.write(AXES))
    assert done.exit_code == 0, done.output
    rows = site.rows()
    assert len(rows) == 16
    for row in rows.values():
        prompts, tokens = row.place.values()
        fits = prompts * tokens <= 64
        assert row.planned == ("fits" if fits else "does_not_load")
        # Its own plan, or the name of the cell whose plan told.
        own = row.plan is not None
        assert own == (row.planned_from is None) == (row.cell in site.asked("plan"))
        assert own or rows[row.planned_from].planned == row.planned
    assert len(site.asked("plan")) == len(set(site.asked("plan"))) <= 8
    lines = [line for line in done.stderr.splitlines() if re.search(r"planned \d+/16: ", line)]
    assert len(lines) == len(site.asked("plan"))
    assert "planned 16/16: " in lines[-1]
    # The plan is of the TPU that was asked for, though the job is a CPU's.
    assert {line.split()[2] for line in (site.folder / "asked").read_text().splitlines()} == {
        "v4-8"
    }
    # Again: all is known.
    before = site.asked("plan")
    assert site.call("plan", site.dir, out=False).exit_code == 0
    assert site.asked("plan") == before
    every = site.call("plan", site.dir, "--every-cell", "--parallel", "3", out=False)
    assert sorted(site.asked("plan")) == sorted(rows)
    assert every.exit_code == 0


def test_named_cells_and_a_matrix_are_planned_several_at_once(site):
    text = f"cells: {{a: {{}}, b: {{set: {{rollout.prompts_per_step: 64}}}}}}\n{AXES}"
    done = site.call("plan", site.write(text), "--parallel", "3")
    assert done.exit_code == 0, done.output
    rows = site.rows()
    assert len(rows) == 18
    for row in rows.values():
        prompts = row.settings.get("rollout.prompts_per_step", 4)
        tokens = row.settings.get("rollout.max_completion_tokens", 8)
        assert row.planned == ("fits" if prompts * tokens <= 64 else "does_not_load")
    assert len(site.asked("plan")) == len(set(site.asked("plan"))) < 18


def test_a_sweep_of_which_nothing_fits_ends_with_3_and_one_whose_planner_breaks_with_5(site):
    assert (
        site.call("plan", site.write("cells: {a: {set: {rollout.prompts_per_step: 64}}}")).exit_code
        == 3
    )
    done = site.call("plan", site.write("cells: {breaks: {}}"))
    assert done.exit_code == 5
    row = site.rows()["breaks"]
    assert row.planned == "failed"
    assert row.plan_said.startswith("planning ended with exit status 70")
    # What failed is planned again, what was refused is not.
    (site.folder / "mended").touch()
    assert site.call("plan", site.dir, out=False).exit_code == 0
    assert site.rows()["breaks"].planned == "fits"


def test_a_job_that_contradicts_itself_is_a_row_with_the_reason(site):
    text = "cells: {odd: {set: {train.micro_batch_size: 5}}, unknown: {}, fine: {}}"
    assert site.call("run", site.write(text)).exit_code == 0
    rows = site.rows()
    assert rows["odd"].planned == rows["unknown"].planned == "refused"
    assert "train.micro_batch_size = 5 does not divide the 16 sequences" in rows["odd"].plan_said
    assert rows["unknown"].plan_said == "no such model"
    assert rows["odd"].skipped.startswith("the job is refused: ")
    assert (rows["odd"].outcome, rows["unknown"].outcome) == (None, "fits")
    assert site.asked("train") == ["unknown", "fine"]


def test_a_run_tells_fits_out_of_hbm_failed_and_skipped_and_runs_none_twice(site):
    sizes = {"rollout.prompts_per_step": 32}
    cells = {"fine": {}, "big": {"set": sizes}, "surprise": {}, "crashes": {}}
    target = site.write(f"cells: {json.dumps(cells)}")
    done = site.call("run", target)
    assert done.exit_code == 0, done.output
    rows = site.rows()
    assert {name: row.outcome for name, row in rows.items()} == {
        "fine": "fits",
        "big": None,
        "surprise": "out_of_hbm",
        "crashes": "failed",
    }
    assert rows["big"].skipped == "planned not to fit"
    assert rows["surprise"].diagnosis.cause == "hbm_program_load"
    assert rows["surprise"].diagnosis.numbers["free_bytes"] == round(5.68 * 2**30)
    assert re.search(
        r"headroom: 3/4 surprise: out of hbm after \d+ s: hbm_program_load", done.stderr
    )
    logs = site.dir / "cells" / "surprise" / "logs" / "surprise_latest.log"
    assert OOM in logs.read_text()
    assert (site.dir / rows["fine"].run / "manifest.json").is_file()
    # The command of a row runs that very job.
    assert rows["fine"].command == f"headroom run {site.dir}/cells/fine/job.yaml"
    assert site.asked("train") == ["fine", "surprise", "crashes"]
    assert site.call("run", target).exit_code == 0
    assert site.call("run", site.dir, "--again", "fine", out=False).exit_code == 0
    assert site.asked("train") == ["fine", "surprise", "crashes", "fine"]
    assert site.call("run", site.dir, "--run-anyway", "--only", "big", out=False).exit_code == 0
    assert site.asked("train")[4:] == ["big"]
    row = site.rows()["big"]
    assert (row.outcome, row.skipped) == ("out_of_hbm", None)


def test_a_run_skips_what_other_cells_tell_of_and_every_cell_runs_all(site):
    text = "matrix: {rollout.prompts_per_step: [4, 8, 12]}\nmonotone: [rollout.prompts_per_step]\n"
    # Nothing is planned: a plan would tell before. 12 x 8 runs out of HBM.
    assert site.call("run", site.write(text), "--no-plan").exit_code == 0
    rows = site.rows()
    assert [rows[f"prompts_per_step-{n}"].outcome for n in (4, 8, 12)] == [
        None,
        "fits",
        "out_of_hbm",
    ]
    assert rows["prompts_per_step-4"].skipped == (
        "cell prompts_per_step-8 ran, and memory grows along rollout.prompts_per_step"
    )
    assert rows["prompts_per_step-4"].planned is None
    assert site.call("run", site.dir, "--no-plan", "--every-cell", out=False).exit_code == 0
    assert sorted(site.asked("train")) == sorted(rows)


def test_a_value_to_run_with_is_not_planned_with(site):
    target = site.write("cells: {a: {set: {accelerator: v4-8}}}\nrun_set: [accelerator=cpu]\n")
    assert site.call("run", target).exit_code == 0
    assert (site.folder / "asked").read_text() == "plan a v4-8\ntrain a cpu\n"
    assert site.rows()["a"].command.endswith("job.yaml --set=accelerator=cpu")


def test_a_changed_cell_loses_its_plan_and_its_runs_and_no_other_does(site):
    target = site.write("cells: {a: {}, b: {}, c: {}}")
    assert site.call("run", target).exit_code == 0
    target = site.write("cells: {a: {}, b: {set: {seed: 7}}}")
    done = site.call("expand", target)
    assert done.exit_code == 0
    said = done.stderr.splitlines()
    assert said == [
        "headroom: b: its job has changed, its plan is dropped",
        "headroom: b: its job has changed, its runs are now in earlier-1",
        "headroom: c: no longer in the sweep; its folder is left there",
    ]
    rows = site.rows()
    assert (rows["a"].planned, rows["a"].outcome) == ("fits", "fits")
    assert (rows["b"].planned, rows["b"].outcome) == (None, None)
    assert len(list(site.dir.glob("cells/b/earlier-1/runs/*/manifest.json"))) == 1
    # Nor is that run its result when it is the first job again.
    site.call("expand", site.write("cells: {a: {}, b: {}}"))
    assert site.rows()["b"].outcome is None
    target = site.write("cells: {a: {}, b: {set: {seed: 7}}}")
    assert site.call("run", target).exit_code == 0
    assert site.asked("train") == ["a", "b", "c", "b"]
    # Other values to run with: every run was another job's, every plan is still its own.
    site.call("run", site.write("cells: {a: {}}\nrun_set: [steps=3]\n"))
    assert site.asked("train")[4:] == ["a"]
    assert len(site.asked("plan")) == 4


@pytest.mark.parametrize(
    ("target", "more", "code", "says"),
    [
        ("{file}", ["--only", "x"], 1, "no cell 'x' in s; its cells: a, b"),
        ("{file}", ["--share", "3/2"], 1, "--share 3/2 is none"),
        ("{file}", ["--share", "x"], 2, "--share x is not of the form K/N, as 1/2"),
        ("{other}", [], 1, "is the sweep s's, this is other: name another folder with --out"),
        ("{full}", [], 1, "holds no sweep (sweep.json)"),
        ("{edited}", [], 1, "is not what was expanded: change the sweep file instead"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(site, target, more, code, says):
    site.call("expand", site.write("cells: {a: {}, b: {}}"))
    places = {"full": site.folder, "edited": site.dir}
    out = target not in ("{full}", "{edited}")
    places["file"] = site.folder / "s.yaml"
    places["other"] = site.folder / "other.yaml"
    places["other"].write_text("name: other\njob: job.yaml\ncells: {a: {}}\n")
    if target == "{edited}":
        with (site.dir / "cells" / "a" / "job.yaml").open("a") as file:
            file.write("seed: 5\n")
    done = site.call("run", target.format(**places), "--no-plan", *more, out=out)
    assert done.exit_code == code, done.output
    assert says in done.stderr
    assert site.asked("train") == []


def test_a_folder_with_other_things_is_not_taken(site):
    done = site.call("expand", site.write("cells: {a: {}}"), "--out", site.folder, out=False)
    assert done.exit_code == 1
    assert "and is no sweep's: name another folder" in done.stderr


def test_a_mistake_of_the_machine_ends_the_sweep_and_is_no_result(site, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    argv = ["sweep", "run", site.write("cells: {a: {}, b: {}}"), "--out", site.dir]
    argv += ["--where", "docker"]
    done = CliRunner().invoke(main, [str(a) for a in argv], obj=site.world())
    assert done.exit_code == 1
    # It is told before the hours that planning may take.
    assert site.asked("plan") == []
    assert done.stderr.count("Error: --where docker") == 1
    assert {row.outcome for row in site.rows().values()} == {None}


def test_shares_have_whole_lines_and_together_every_cell_once(site):
    text = f"cells: {{a: {{}}, b: {{}}}}\n{AXES}".replace("[2, 4, 8, 16]", "[2, 4]")
    site.call("expand", site.write(text))
    names = json.loads((site.dir / "sweep.json").read_text())["cells"]
    for share in ("1/2", "2/2"):
        done = site.call("run", site.dir, "--no-plan", "--every-cell", "--share", share, out=False)
        assert done.exit_code == 0
        rows = site.rows()
        ran = {n for n, row in rows.items() if row.outcome}
        # The longest monotone axis is prompts_per_step: its four cells are on one host.
        for tokens in (2, 4):
            line = {n for n in rows if n.endswith(f"max_completion_tokens-{tokens}")}
            assert len(line) == 4
            assert line <= ran or not line & ran
    assert sorted(site.asked("train")) == sorted(cell["name"] for cell in names)


def test_results_that_were_sent_without_their_runs_are_results(site):
    """As another host's are sent: what a cell was, without its run directory."""
    site.call("run", site.write("cells: {a: {}, b: {}}"), "--only", "a")
    [runs] = site.dir.glob("cells/a/runs")
    runs.rename(site.folder / "elsewhere")
    assert site.rows()["a"].outcome == "fits"
    assert site.call("run", site.dir, out=False).exit_code == 0
    assert site.asked("train") == ["a", "b"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_job_and_the_sweep_goes_on_where_it_was(site, number, code):
    site.write("cells: {first: {}, waits: {}, last: {}}")
    sweep = site.start("run", "s.yaml", "--out", "out", "--where", "process", "--no-plan")
    site.until("up")
    sweep.send_signal(number)
    _, said = sweep.communicate(timeout=60)
    assert sweep.returncode == code, said
    assert "run it again to go on" in said
    rows = site.rows()
    assert [row.outcome for row in rows.values()] == ["fits", "interrupted", None]
    (site.folder / "go").touch()
    assert site.call("run", site.dir, out=False).exit_code == 0
    assert site.asked("train") == ["first", "waits", "waits", "last"]
    assert [row.outcome for row in site.rows().values()] == ["fits"] * 3


def test_a_run_that_outlived_its_sweep_is_waited_for_and_not_run_again(site):
    site.write("cells: {waits: {}, last: {}}")
    sweep = site.start("run", "s.yaml", "--out", "out", "--where", "process", "--no-plan")
    site.until("up")
    # One at a time in a folder, and on a machine.
    locked = site.call("run", site.dir, out=False)
    assert locked.exit_code == 1
    assert f"process {sweep.pid} is at work on this sweep already" in locked.stderr
    other = site.call("run", site.folder / "s.yaml", "--out", site.folder / "two", out=False)
    assert site.asked("plan") == []
    assert other.exit_code == 1
    assert f"process {sweep.pid} runs a sweep on this machine already" in other.stderr
    assert site.rows()["waits"].outcome == "running"
    sweep.kill()
    sweep.communicate()
    changed = site.call("expand", site.write("cells: {waits: {set: {seed: 1}}, last: {}}"))
    assert changed.exit_code == 1
    assert "cell waits still runs, as the job that it was: headroom cancel" in changed.stderr
    again = site.start("run", site.dir, "--where", "process", "--no-plan")
    for line in again.stderr:
        if "is waited for" in line:
            break
    (site.folder / "go").touch()
    _, said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert site.asked("train") == ["waits", "last"]
    assert [row.outcome for row in site.rows().values()] == ["fits", "fits"]


def test_a_cell_that_is_run_again_is_run_whatever_its_neighbours_tell(site):
    text = "matrix: {rollout.prompts_per_step: [4, 8]}\nmonotone: [rollout.prompts_per_step]\n"
    low, high = "prompts_per_step-4", "prompts_per_step-8"
    site.call("run", site.write(text), "--every-cell")
    done = site.call("run", site.dir, "--again", low, out=False)
    assert done.exit_code == 0, done.output
    assert site.asked("train") == [low, high, low]
    result = json.loads((site.dir / "cells" / low / "result.json").read_text())
    assert (result["outcome"], result["skipped"]) == ("fits", None)


def test_cells_to_run_again_are_run_beside_those_that_are_named(site):
    site.call("run", site.write("cells: {a: {}, b: {}, c: {}}"), "--only", "a")
    assert site.call("run", site.dir, "--again", "a", "--only", "b", out=False).exit_code == 0
    assert site.asked("train") == ["a", "a", "b"]


def test_a_result_is_not_forgotten_for_a_run_that_is_not_done(site):
    site.call("run", site.write("cells: {big: {set: {rollout.prompts_per_step: 32}}}"), "--no-plan")
    before = (site.dir / "cells/big/result.json").read_text()
    assert json.loads(before)["outcome"] == "out_of_hbm"
    done = site.call("run", site.dir, "--again", "big", out=False)
    assert "big: not run: planned not to fit" in done.stderr
    assert site.asked("train") == ["big"]
    assert (site.dir / "cells/big/result.json").read_text() == before


def test_a_cell_that_still_runs_is_run_again_only_when_it_has_ended(site):
    site.write("cells: {waits: {}}")
    sweep = site.start("run", "s.yaml", "--out", "out", "--where", "process", "--no-plan")
    site.until("up")
    sweep.kill()
    sweep.communicate()
    more = ("--where", "process", "--no-plan", "--again", "waits")
    again = site.start("run", site.dir, *more)
    for line in again.stderr:
        if "is waited for" in line:
            break
    assert site.asked("train") == ["waits"]
    (site.folder / "go").touch()
    _, said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert site.asked("train") == ["waits", "waits"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("stepz=3", "Error: --set stepz=3: unknown key 'stepz'; did you mean 'steps'?"),
        ("steps=x", "Error: --set steps=x: steps = x is not a whole number"),
        ("steps", "Error: --set steps: is not of the form key.path=value"),
    ],
)
def test_a_mistyped_value_to_run_with_is_refused_before_anything_is_planned(site, value, says):
    done = site.call("run", site.write("cells: {a: {}, b: {}}"), "--set", value)
    assert done.exit_code == 1
    assert says in done.stderr
    assert site.asked("plan") == []
    assert not list(site.dir.glob("cells/*/result.json"))


def test_only_the_cells_that_are_to_run_are_planned(site):
    site.call("run", site.write("cells: {a: {}, b: {}, c: {}, d: {}}"), "--only", "b")
    assert site.asked("plan") == ["b"]
    site.call("run", site.dir, "--share", "2/2", out=False)
    assert site.asked("plan") == ["b", "d"]


def test_a_plan_of_jobs_that_are_all_refused_ends_with_3(site):
    target = site.write("cells: {odd: {set: {train.micro_batch_size: 5}}, unknown: {}}")
    assert site.call("plan", target).exit_code == 3
    # A CPU's job has no plan, and is none that does not fit.
    text = target.read_text().replace("plan_for: v4-8\n", "")
    target.write_text(text)
    assert site.call("plan", target).exit_code == 0
    assert site.rows()["odd"].planned == "refused"


def test_a_sweep_json_that_cannot_be_read_is_made_anew_and_what_the_cells_have_is_kept(site):
    site.call("run", site.write("cells: {a: {}, b: {}}"))
    (site.dir / "sweep.json").write_text('{"name": "s", "of": "another version"}')
    assert site.call("report", site.dir, out=False).exit_code == 1
    done = site.call("expand", site.write("cells: {a: {}, b: {set: {seed: 7}}}"))
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines() == [
        f"headroom: {site.dir}/sweep.json cannot be read, or is another version's: it is made anew",
        "headroom: b: its job has changed, its plan is dropped",
        "headroom: b: its job has changed, its runs are now in earlier-1",
    ]
    rows = site.rows()
    assert (rows["a"].planned, rows["a"].outcome) == ("fits", "fits")
    assert (rows["b"].planned, rows["b"].outcome) == (None, None)


def test_a_changed_cell_with_a_broken_run_is_refused_in_a_line(site):
    site.call("run", site.write("cells: {a: {}}"))
    [manifest] = site.dir.glob("cells/a/runs/*/manifest.json")
    manifest.write_text("{")
    done = site.call("expand", site.write("cells: {a: {set: {seed: 7}}}"))
    assert done.exit_code == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("Error: cell a is another job now, and whether ")
    assert f"move {manifest.parent} away" in line


@pytest.mark.parametrize("limit", ["-1", "0"])
def test_a_limit_is_above_zero(site, limit):
    assert site.call("plan", site.write("cells: {a: {}}"), "--limit", limit).exit_code == 2


def test_a_page_without_matplotlib_is_refused_in_a_line(site):
    assert site.call("plan", site.write("cells: {a: {}}")).exit_code == 0
    page = site.folder / "page.html"
    program = headroom(STAND_IN, "sweep", "report", site.dir, "--html", page)
    program[2] = f"import sys; sys.modules['matplotlib'] = None\n{program[2]}"
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "matplotlib" in line
    assert not page.exists()


def test_a_csv_file_is_replaced_whole(site):
    site.call("expand", site.write("cells: {a: {}}"))
    file, other = site.folder / "table.csv", site.folder / "other.csv"
    file.write_text("old\n")
    os.link(file, other)
    assert site.call("report", site.dir, "--csv", file, out=False).exit_code == 0
    assert file.read_text().startswith("cell,planned,")
    assert other.read_text() == "old\n"


def test_a_job_with_chips_takes_the_chips_lock_that_was_handed_in(site):
    target = site.write("cells: {a: {set: {accelerator: v4-8}}}")
    assert site.call("run", target, "--no-plan").exit_code == 0
    record = json.loads((site.folder / "chips").read_text())
    assert record["run_dir"].startswith(f"{site.dir}/cells/a/runs/")


def test_the_lock_of_a_machine_is_every_users_and_names_no_process_that_has_ended(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert World().lock_of_sweeps() == chips.LOCK.with_name("headroom-sweep.lock")
    lock = tmp_path / "lock"
    before = os.umask(0o077)
    try:
        with (
            held(lock, "runs"),
            pytest.raises(SweepError, match=rf"process {os.getpid()} runs"),
            held(lock, "runs"),
        ):
            pass
    finally:
        os.umask(before)
    assert lock.stat().st_mode & 0o777 == 0o666
    # One that has just come, and has not written who it is over who was there before.
    record = json.loads(lock.read_text()) | {"ticks": 1}
    lock.write_text(json.dumps(record))
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SweepError, match="another process runs"), held(lock, "runs"):
            pass


def test_planning_that_is_stopped_keeps_what_it_has(site):
    site.write("cells: {first: {}, waits: {}, last: {}}")
    sweep = site.start("plan", "s.yaml", "--out", "out", "--parallel", "1")
    site.until("up")
    sweep.send_signal(signal.SIGINT)
    _, said = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, said
    (site.folder / "go").touch()
    assert site.call("plan", site.dir, out=False).exit_code == 0
    assert site.asked("plan") == ["first", "waits", "waits", "last"]


def test_table_csv_and_status_tell_what_the_rows_do(site):
    cells = {"fine": {}, "big": {"set": {"rollout.prompts_per_step": 32}}, "surprise": {}}
    site.call("run", site.write(f"cells: {json.dumps(cells)}"))
    table = site.call("report", site.dir, out=False).stdout
    assert re.search(r"^fine +fits +0\.03 GiB +fits ", table, re.MULTILINE)  # 32 MiB of 64
    assert re.search(r"^big +does not load +-0\.19 GiB +skipped +planned not", table, re.MULTILINE)
    assert re.search(r"^surprise .* out of HBM +hbm_program_load", table, re.MULTILINE)
    line = "3 cells; planned 2 fits, 1 does not load (3 by a plan of their own); ran 1 fits, "
    assert f"{line}1 out of HBM; 1 skipped" in table.replace("\n", " ")
    shown = site.call("report", site.dir, "--csv", "-", out=False)
    rows = {row["cell"]: row for row in csv.DictReader(io.StringIO(shown.stdout))}
    assert rows["big"]["headroom_bytes"] == str(-(192 << 20))
    assert rows["big"]["rollout.prompts_per_step"] == "32"
    assert rows["surprise"]["cause"] == "hbm_program_load"
    assert rows["fine"]["rollout.prompts_per_step"] == ""
    states = json.loads(site.call("status", site.dir, "--json", out=False).stdout)["cells"]
    assert states == {"fine": "fits", "big": "skipped", "surprise": "out_of_hbm"}
