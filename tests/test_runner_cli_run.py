"""`headroom run --resume`, and a retry, go on from the newest checkpoint that a run left."""

import json

import pytest
from click.testing import CliRunner

from jobs.records import ExitStatus
from runner.cli import main
from runner.ending import with_notice
from runner.terminal import World
from tests.fakes import trainer, write_job

# A trainer that leaves two checkpoints and dies of what may pass, unless it goes on from one.
SAVES = (
    "import json, pathlib, sys\n"
    "job = json.loads(pathlib.Path(sys.argv[2]).read_text())\n"
    "resume = job['checkpoint']['resume']\n"
    "print('goes on from', resume)\n"
    "if resume: raise SystemExit(0)\n"
    "for step in (9, 10): pathlib.Path(f'checkpoints/step_{step:06d}').mkdir(parents=True)\n"
    "pathlib.Path('checkpoints/.step_000011.part').mkdir()\n"
    "print('OSError: [Errno 101] Network is unreachable')\n"
    "raise SystemExit(70)\n"
)


def call(folder, *arguments, code=SAVES):
    world = World(trainer=trainer(code), pause=lambda _: None)
    argv = [str(a) for a in (*arguments, "--where", "process", "--runs", folder / "runs")]
    return CliRunner().invoke(main, ["run", *argv], obj=world)


def jobs(folder):
    """Each run's job, in the order of the runs."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/job.json"))]


def manifests(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/manifest.json"))]


def test_a_run_goes_on_from_its_newest_whole_checkpoint(tmp_path):
    failed = call(tmp_path, write_job(tmp_path))
    assert failed.exit_code == 4
    [name] = [manifest["run"] for manifest in manifests(tmp_path)]
    assert f"it can go on: headroom run --resume {name}" in failed.stderr
    done = call(tmp_path, "--resume", "latest", "--set", "steps=100")
    assert done.exit_code == 0, done.output
    first, second = jobs(tmp_path)
    newest = tmp_path / "runs" / name / "checkpoints" / "step_000010"
    assert second["checkpoint"]["resume"] == str(newest)
    assert (first["steps"], second["steps"]) == (20, 100)
    assert manifests(tmp_path)[1]["retry_of"] == name


def test_a_run_that_went_on_and_left_none_of_its_own_goes_on_from_where_it_began(tmp_path):
    call(tmp_path, write_job(tmp_path))
    dies = "print('OSError: [Errno 101] Network is unreachable')\nraise SystemExit(70)"
    second = call(tmp_path, "--resume", "latest", code=dies)
    assert "it can go on" in second.stderr
    done = call(tmp_path, "--resume", "latest")
    assert done.exit_code == 0, done.output
    _, second, third = jobs(tmp_path)
    assert third["checkpoint"]["resume"] == second["checkpoint"]["resume"] is not None


def test_a_retry_goes_on_where_the_attempt_before_it_was(tmp_path):
    done = call(tmp_path, write_job(tmp_path), "--retries", "1")
    assert done.exit_code == 0, done.output
    assert [bool(job["checkpoint"]["resume"]) for job in jobs(tmp_path)] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "Name a JOB, or --resume RUN."),
        (("job.yaml", "--resume", "latest"), 2, "leave JOB and --from-env out"),
        (("--resume", "latest", "--from-env"), 2, "leave JOB and --from-env out"),
        (("--resume", "latest"), 1, "left no checkpoint to go on from: set checkpoint.every_steps"),
        (("--resume", "nope"), 1, "nope"),
    ],
)
def test_what_cannot_go_on_is_refused(tmp_path, arguments, code, said):
    call(tmp_path, write_job(tmp_path), code="pass")
    refused = call(tmp_path, *arguments)
    assert refused.exit_code == code
    assert said in refused.stderr
    assert len(jobs(tmp_path)) == 1


# A trainer that the cloud takes, by its notice, until it has been started so many times; what else
# it does first is `first`.
TAKEN = (
    "import json, os, pathlib, signal, sys\n"
    "run = pathlib.Path(sys.argv[2]).parent\n"
    "{first}\n"
    "if len(list(pathlib.Path('..').glob('*/job.json'))) < {times}:\n"
    "    notice = dict(key='preempted', value='TRUE', seen='2026-01-01T00:00:00+00:00')\n"
    "    (run / 'notice.json').write_text(json.dumps(notice))\n"
    "    raise SystemExit(143)\n"
)
A_STEP = "(run / 'steps.jsonl').write_text('{}')"


def waited(folder, code, *options):
    waits = []
    world = World(trainer=trainer(code), pause=waits.append)
    argv = ["run", write_job(folder), *options, "--where", "process", "--runs", folder / "runs"]
    return CliRunner().invoke(main, [str(part) for part in argv], obj=world), waits


def reasons(folder):
    return [manifest["exit_status"]["reason"] for manifest in manifests(folder)]


@pytest.mark.parametrize(("first", "waits"), [(A_STEP, [0, 0]), ("pass", [10, 20])])
def test_a_preempted_run_goes_on_at_once_and_later_where_it_did_no_step(tmp_path, first, waits):
    code = TAKEN.format(first=first, times=3)
    done, found = waited(tmp_path, code, "--preemptions", "5")
    assert done.exit_code == 0, done.output
    assert (reasons(tmp_path), found) == (["preempted", "preempted", "done"], waits)


def test_the_budgets_are_apart(tmp_path):
    # Retries are not for preemptions, preemptions not for failures.
    taken = TAKEN.format(first="pass", times=9)
    done, _ = waited(tmp_path, taken, "--retries", "5")
    assert (done.exit_code, reasons(tmp_path)) == (143, ["preempted"])
    other = tmp_path / "other"
    other.mkdir()
    fails = "print('OSError: [Errno 101] Network is unreachable')\nraise SystemExit(70)"
    done, _ = waited(other, fails, "--preemptions", "5")
    assert (done.exit_code, reasons(other)) == (4, ["failed"])


def test_no_more_preemptions_are_outlived_than_were_asked_for(tmp_path):
    done, _ = waited(tmp_path, TAKEN.format(first=A_STEP, times=9), "--preemptions", "2")
    assert (done.exit_code, reasons(tmp_path)) == (143, ["preempted"] * 3)


def test_a_sigterm_without_a_notice_is_no_preemption(tmp_path):
    done, _ = waited(tmp_path, "raise SystemExit(143)", "--preemptions", "2", "--retries", "2")
    assert (done.exit_code, reasons(tmp_path)) == (143, ["interrupted"])


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (ExitStatus(code=143, reason="interrupted"), "preempted"),
        # The VM's own SIGKILL, when its deadline is over.
        (ExitStatus(code=137, signal="SIGKILL", reason="failed"), "preempted"),
        (
            ExitStatus(code=137, signal="SIGKILL", oom_killed=True, reason="oom_killed"),
            "oom_killed",
        ),
        (ExitStatus(code=70, reason="failed"), "failed"),
        (ExitStatus(code=0, reason="done"), "done"),
    ],
)
def test_a_notice_explains_a_stop_and_nothing_else(status, reason):
    assert with_notice(status, noticed=True).reason == reason
    assert with_notice(status, noticed=False) == status
    assert with_notice(status, noticed=True).code == status.code


def test_a_machine_that_stops_us_too_is_not_gone_on_on(tmp_path):
    # The VM that goes asks the runner itself to stop, and that leaves word of it.
    asked = "(run / 'stop.json').write_text(json.dumps(dict(signal='SIGTERM', asked='now')))\n"
    code = TAKEN.format(first=asked + A_STEP, times=9)
    done, waits = waited(tmp_path, code, "--preemptions", "2")
    assert (done.exit_code, waits, reasons(tmp_path)) == (143, [], ["preempted"])
