"""A run that hangs ends by itself, tells where, and is known by it, whoever holds Python's lock."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from click.testing import CliRunner

from runner.cli import main
from runner.diagnose import diagnose
from runner.terminal import World
from trainer.hang import watchdog

REPOSITORY = Path(__file__).parents[1]


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=100,
        check=False,
    )


def test_a_hang_in_c_that_never_lets_go_of_pythons_lock_ends_with_its_stack():
    # PyDLL keeps the lock: no thread of Python's could ever run again.
    done = python(
        "import ctypes\n"
        "from trainer.hang import watchdog\n"
        "def waits_for_ever():\n"
        "    ctypes.PyDLL(None).sleep(1000)\n"
        "watchdog(1)()\n"
        "waits_for_ever()\n"
    )
    assert done.returncode == 1
    assert b"in waits_for_ever" in done.stderr
    found = diagnose([done.stderr])
    assert (found.cause, found.confidence, found.retry) == ("trainer_hang", "certain", "retryable")
    assert found.root_line == "Timeout (0:00:01)!"


def test_while_something_goes_on_nothing_happens_and_0_watches_nothing():
    # Three times the limit, but never so long between two signs of life.
    done = python(
        "import time\n"
        "from trainer.hang import watchdog\n"
        "alive = watchdog(30)\n"
        "for _ in range(3): alive()\n"
        "never = watchdog(0)\n"
        "never()\n"
        "print('done')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"done\n", b"")
    assert watchdog(0)() is None


def test_a_job_that_hangs_ends_and_is_diagnosed(tmp_path):
    # A metrics file that nobody reads: opening it never returns.
    seconds = 6
    job = (
        f"name: stuck\naccelerator: cpu\nmodel: tiny\nstuck_after_s: {seconds}\nsystem_prompt: ''\n"
        f"cache_dir: {json.dumps(str(REPOSITORY / '.cache'))}\n"
    )
    (tmp_path / "job.yaml").write_text(job)
    trap = tmp_path / "trap.py"
    trap.write_text(
        "import os, pathlib, sys\n"
        "os.mkfifo(pathlib.Path(sys.argv[2]).parent / 'steps.jsonl')\n"
        "os.execv(sys.executable, [sys.executable, '-P', '-m', 'trainer', *sys.argv[1:]])\n"
    )
    world = World(trainer=(sys.executable, str(trap)))
    argv = ["run", str(tmp_path / "job.yaml"), "--where", "process"]
    began = time.monotonic()
    done = CliRunner().invoke(main, [*argv, "--runs", str(tmp_path / "runs")], obj=world)
    assert time.monotonic() - began > seconds
    assert done.exit_code == 4, done.output
    [folder] = (tmp_path / "runs").iterdir()
    told = json.loads((folder / "diagnosis.json").read_text())
    assert (told["cause"], told["confidence"]) == ("trainer_hang", "certain")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["exit_status"]["code"], manifest["exit_status"]["reason"]) == (1, "failed")
    # Where it stood; on a slow machine that may still be an import.
    assert f"{os.sep}trainer{os.sep}" in (folder / "run.log").read_text()
