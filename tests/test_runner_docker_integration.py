"""The docker way in a real engine, with a shell of a few files in the trainer's place."""

import contextlib
import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fakes import headroom, write_job
from shell_image import load_shell_image

from jobs.records import Manifest
from jobs.spec import load
from runner import archive, container, launch
from runner import status as state
from runner.provenance import Checkout

pytestmark = pytest.mark.docker

IMAGE = "headroom-test/shell:runner"


@pytest.fixture(scope="session")
def image(docker_client):
    load_shell_image(docker_client, IMAGE)
    yield IMAGE
    docker_client.images.remove(IMAGE, force=True)


@pytest.fixture
def job_file(tmp_path, image, docker_client):
    """Writes a job whose trainer is a shell script; it sees VERB and job.json as $1 and $2."""

    def write(script, more="", *, name="shell"):
        told = tmp_path / "told"
        told.mkdir(exist_ok=True)
        (told / "job.sh").write_text(script)
        settings = f"container:\n  image: {image}\n  network: none\n  binds: ['{told}:/told:ro']\n"
        return write_job(tmp_path, settings + more, name=name)

    yield write
    for left in docker_client.containers.list(all=True, filters={"label": "headroom=1"}):
        if left.labels["headroom.run_dir"].startswith(str(tmp_path)):
            left.remove(force=True)


@pytest.fixture
def run_job(tmp_path, docker_client, job_file):
    """Runs a shell script as a job in a container; gives run directory and manifest."""

    def run(script, more="", *, say=str):
        job = load(job_file(script, more))
        code = Checkout(commit=None, dirty=None)
        runs = tmp_path / "runs"
        with archive.create(job, verb="train", where="docker", runs=runs, code=code) as made:
            out = io.BytesIO()
            manifest = launch.launch(made, job, client=docker_client, out=out, say=say)
        assert out.getvalue() == made.log_file.read_bytes()
        return made, manifest

    return run


@pytest.mark.parametrize(
    ("script", "number", "name", "reason"),
    [
        ("exit 0", 0, None, "done"),
        ("exit 1", 1, None, "failed"),
        ("exit 3", 3, None, "failed"),
        ("kill -ABRT $$", 134, "SIGABRT", "failed"),
        ("kill -KILL $$", 137, "SIGKILL", "failed"),
    ],
)
def test_the_true_status_of_a_container_is_recorded(
    run_job, docker_client, script, number, name, reason
):
    made, manifest = run_job(script)
    status = manifest.exit_status
    assert (status.code, status.signal, status.reason) == (number, name, reason)
    assert not status.oom_killed
    assert made.log_file.read_text() == f"exit_status={number}\n"
    digest = docker_client.images.get(IMAGE).id
    assert manifest.image == f"{IMAGE}@{digest}"
    with pytest.raises(container.NotFound):
        docker_client.containers.get(manifest.container)


def test_a_container_killed_for_memory_is_told_from_one_that_was_killed(run_job):
    _, manifest = run_job("tail /dev/zero", "  memory_gib: 0.03\n")
    status = manifest.exit_status
    assert (status.code, status.signal, status.reason) == (137, "SIGKILL", "oom_killed")
    assert status.oom_killed


def test_200000_lines_all_arrive_in_order(run_job):
    made, _ = run_job("seq 200000")
    expected = b"".join(b"%d\n" % i for i in range(1, 200001)) + b"exit_status=0\n"
    assert made.log_file.read_bytes() == expected


def test_a_line_longer_than_the_daemons_buffer_stays_one_line(run_job):
    # json-file cuts at 16 KiB; 20000 numbers without a line break are 108 KiB.
    made, _ = run_job("for i in $(seq 20000); do printf '%s ' $i; done; echo")
    assert (
        made.log_file.read_text() == "".join(f"{i} " for i in range(1, 20001)) + "\nexit_status=0\n"
    )


@pytest.mark.parametrize("owner", [0, 12345])
def test_the_job_runs_as_the_run_directorys_owner_and_writes_where_it_must(
    tmp_path, docker_client, job_file, owner
):
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to another user")
    script = (
        'set -e; id -u; id -g; touch "$HOME/a" "$HF_HOME/b" "${2%/*}/steps.jsonl"; '
        "echo $1 $2; cat /proc/1/cmdline; echo"
    )
    job = load(job_file(script))
    code = Checkout(commit=None, dirty=None)
    runs = tmp_path / "runs"
    with archive.create(job, verb="train", where="docker", runs=runs, code=code) as made:
        os.chown(made.path, owner, owner)
        manifest = launch.launch(made, job, client=docker_client, out=io.BytesIO(), say=str)
    lines = made.log_file.read_text().splitlines()
    assert lines[:3] == [str(owner), str(owner), f"train {made.job_file}"]
    assert "init" in lines[3]
    for written in (made.steps_file, tmp_path / "cache/huggingface/b"):
        assert written.stat().st_uid == owner
    assert manifest.command == ["train", str(made.job_file)]


def test_a_secret_reaches_the_container_and_no_file_of_the_run(run_job, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADROOM_TEST_TOKEN", "s3cr3t of a test")
    monkeypatch.setenv("BATCH_SIZE", "3")
    script = 'echo "${#HEADROOM_TEST_TOKEN}, ${BATCH_SIZE-none}"'
    made, _ = run_job(script, "  pass_env: [HEADROOM_TEST_TOKEN]\n")
    assert made.log_file.read_text() == "16, none\nexit_status=0\n"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"s3cr3t" in path.read_bytes()]


@pytest.mark.parametrize("folder", ["with space", "co:lon", "quo'te\"s", "new\nline", "$H `true`"])
def test_a_run_directory_of_any_name_is_mounted(tmp_path, docker_client, job_file, folder):
    job = load(job_file('cat "$2"'))
    code = Checkout(commit=None, dirty=None)
    runs = tmp_path / folder / "runs"
    with archive.create(job, verb="train", where="docker", runs=runs, code=code) as made:
        launch.launch(made, job, client=docker_client, out=io.BytesIO(), say=str)
    assert made.log_file.read_text() == made.job_file.read_text() + "exit_status=0\n"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("  devices: [/dev/accel99]\n", "container.devices"),
        ("  image: headroom-test/none:1\n", "headroom-test/none:1"),
    ],
)
def test_a_container_that_cannot_start_is_one_error_and_a_finished_archive(
    run_job, tmp_path, docker_client, more, says
):
    if "image" in more:
        job = load(write_job(tmp_path, f"container:\n{more}"))
        with pytest.raises(launch.HostNotFit, match=says):
            launch.place("auto", job, connect=lambda: docker_client)
        return
    with pytest.raises(launch.HostNotFit, match=says):
        run_job("exit 0", more)
    (path,) = tmp_path.glob("runs/*/manifest.json")
    manifest = Manifest.model_validate_json(path.read_text())
    assert (manifest.exit_status.code, manifest.exit_status.reason) == (125, "refused")
    assert says in path.with_name("run.log").read_text()
    labels = {"label": f"headroom.run={manifest.run}"}
    assert not docker_client.containers.list(all=True, filters=labels)


def test_a_missing_image_is_refused_with_the_command_that_makes_it(tmp_path, docker_client):
    job = load(write_job(tmp_path), overrides=["accelerator=v4-8"])
    if [i for i in docker_client.images.list("headroom") if "headroom:tpu" in i.tags]:
        pytest.skip("this engine has headroom:tpu")
    with pytest.raises(launch.HostNotFit, match=r"make image STAGE=tpu.*--where process"):
        launch.place("auto", job, connect=lambda: docker_client)


def test_auto_takes_docker_where_a_daemon_answers_and_says_so(docker_client, job_file):
    client, why = launch.place("auto", load(job_file("exit 0")), connect=lambda: docker_client)
    assert client is docker_client
    assert "docker" in why


@pytest.fixture
def started(tmp_path, docker_engine, job_file):
    """Starts `headroom run --where docker` and waits for the job's first line."""
    made = []

    def start(script, more=""):
        command = headroom("pass", "run", job_file(script, more), "--where", "docker")
        argv = ["env", f"DOCKER_HOST={docker_engine.host}", *command]
        runner = subprocess.Popen(
            argv, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        made.append(runner)
        assert runner.stdout.readline() == "up\n", runner.communicate()[1]
        return runner

    yield start
    for runner in made:
        with contextlib.suppress(ProcessLookupError):
            runner.kill()
        runner.communicate()


def the_run(folder):
    return archive.find(folder / "runs", "latest")


HANDLES = "trap 'exit 143' TERM; trap 'exit 130' INT; echo up; while :; do sleep 0.1; done"
STUBBORN = "trap '' TERM INT; echo up; while :; do sleep 0.1; done"
# Prints on until it is told to end, by a file that it sees through the cache folder.
TOLD = (
    'echo up; i=0; while ! [ -e "$HF_HOME/go" ]; do i=$((i+1)); echo $i; sleep 0.01; done; exit 3'
)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_a_signal_stops_the_container_and_finishes_the_archive(started, tmp_path, number, code):
    runner = started(HANDLES)
    runner.send_signal(number)
    out, errors = runner.communicate(timeout=60)
    assert runner.returncode == code, errors
    status = the_run(tmp_path).manifest().exit_status
    assert (status.code, status.reason) == (code, "interrupted")
    assert out.splitlines()[0] == f"exit_status={code}"


def test_a_container_that_will_not_stop_is_killed_after_the_grace(started, tmp_path):
    runner = started(STUBBORN, "  stop_grace_s: 1\n")
    runner.terminate()
    runner.communicate(timeout=60)
    assert runner.returncode == 143
    status = the_run(tmp_path).manifest().exit_status
    assert (status.code, status.signal, status.reason) == (137, "SIGKILL", "interrupted")


def test_after_sigkill_of_the_runner_the_container_goes_on_and_its_log_is_whole(
    started, tmp_path, docker_client
):
    runner = started(TOLD)
    runner.kill()
    runner.communicate()
    run = the_run(tmp_path)
    connect = lambda: docker_client
    assert state.settle(run, connect=connect).state == "running"
    seen = run.log_file.read_bytes()
    assert seen.startswith(b"up\n1\n")
    (tmp_path / "cache/huggingface/go").touch()
    until_over(run, connect)
    manifest = run.manifest()
    assert (manifest.exit_status.code, manifest.exit_status.reason) == (3, "failed")
    lines = run.log_file.read_text().splitlines()
    assert lines == ["up", *map(str, range(1, len(lines) - 1)), "exit_status=3"]
    assert run.log_file.read_bytes().startswith(seen)
    assert archive.archived_log(run, manifest).read_bytes() == run.log_file.read_bytes()
    with pytest.raises(container.NotFound):
        docker_client.containers.get(manifest.container)


def until_over(run, connect):
    deadline = time.monotonic() + 60
    while state.settle(run, connect=connect).exit_status is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("runner_lives", [True, False])
def test_cancel_stops_a_container(started, tmp_path, docker_client, runner_lives):
    runner = started(HANDLES)
    if not runner_lives:
        runner.kill()
        runner.communicate()
    run = the_run(tmp_path)
    manifest = state.cancel(run, connect=lambda: docker_client)
    assert (manifest.exit_status.code, manifest.exit_status.reason) == (143, "interrupted")
    assert run.log_file.read_text() == "up\nexit_status=143\n"
    if runner_lives:
        runner.communicate(timeout=60)
        assert runner.returncode == 143


def test_a_container_that_somebody_removed_is_a_lost_run(started, tmp_path, docker_client):
    runner = started(TOLD)
    runner.kill()
    runner.communicate()
    run = the_run(tmp_path)
    docker_client.containers.get(run.manifest().container).remove(force=True)
    assert state.settle(run, connect=lambda: docker_client).state == "lost"
    assert json.loads(run.manifest_file.read_text())["exit_status"]["reason"] == "lost"


def test_a_daemon_that_is_away_leaves_the_record_as_it_is(started, tmp_path):
    def away():
        raise container.NoDaemonError("no Docker daemon answers at unix:///nowhere")

    runner = started(TOLD)
    runner.kill()
    runner.communicate()
    run = the_run(tmp_path)
    with pytest.raises(state.CannotTellError, match="unix:///nowhere"):
        state.settle(run, connect=away)
    assert run.manifest().state == "running"


def test_the_log_is_never_rotated_whatever_the_daemons_default(run_job, tmp_path, docker_client):
    """A daemon with `log-opts max-size` hands it to every container that does not name its own."""
    job = load(write_job(tmp_path, f"container: {{image: {IMAGE}, network: none}}\n"))
    manifest = Manifest.model_construct(verb="train", commit=None)
    for folder in container.cache_folders(job):
        folder.mkdir(parents=True, exist_ok=True)
    options = container.container_options(
        job, tmp_path, manifest=manifest, user=(0, 0), environment={}
    )
    made = docker_client.containers.create(**options)
    try:
        assert made.attrs["HostConfig"]["LogConfig"] == {
            "Type": "json-file",
            "Config": {"max-size": "1p"},
        }
        assert made.attrs["HostConfig"]["Init"]
        assert Path(made.attrs["Mounts"][0]["Source"]).is_absolute()
    finally:
        made.remove()
