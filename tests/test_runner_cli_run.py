"""`headroom run --resume`, and a retry, go on from the newest checkpoint that a run left."""

import json

import pytest
from click.testing import CliRunner

from runner.cli import main
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
