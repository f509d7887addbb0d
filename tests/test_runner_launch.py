import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
from docker.errors import NotFound
from fakes import trainer, write_job

from jobs.spec import load
from runner import archive, environment, launch
from runner import status as state
from runner.container import NoDaemonError
from runner.process import ProcessTask
from runner.provenance import Checkout
from runner.show import print_log
from runner.supervise import start_ticks
from runner.watch import Interrupts

CODE = Checkout(commit=None, dirty=None)
SECRET = "s3cr3t-value-of-a-test"  # noqa: S105 - of nothing


def run_code(folder, code, *, more="", out=None, verb="train", says=None):
    """Run a stand-in trainer to its end; gives its run directory and manifest."""
    job = load(write_job(folder, more))
    with archive.create(job, verb=verb, where="process", runs=folder / "runs", code=CODE) as run:
        says = [] if says is None else says
        stream = io.BytesIO() if out is None else out
        manifest = launch.launch(
            run, job, client=None, out=stream, say=says.append, trainer=trainer(code)
        )
    return run, manifest


@pytest.mark.parametrize(
    ("code", "number", "name", "reason"),
    [
        ("pass", 0, None, "done"),
        ("print('Error: x'); raise SystemExit(1)", 1, None, "refused"),
        ("import no_such_module_of_a_test", 1, None, "failed"),
        ("print('no Error: x'); raise SystemExit(1)", 1, None, "failed"),
        ("import sys; sys.exit(3)", 3, None, "failed"),
        ("import sys; sys.exit(134)", 134, None, "failed"),
        ("import sys; sys.exit(137)", 137, None, "failed"),
        ("import os; os.abort()", 134, "SIGABRT", "failed"),
        ("import os; os.kill(os.getpid(), 9)", 137, "SIGKILL", "failed"),
        ("import os; os.kill(os.getpid(), 11)", 139, "SIGSEGV", "failed"),
        ("import os; os.kill(os.getpid(), 15)", 143, "SIGTERM", "interrupted"),
        ("import sys; sys.exit(130)", 130, None, "interrupted"),
    ],
)
def test_the_true_status_stands_in_manifest_and_log(tmp_path, code, number, name, reason):
    run, manifest = run_code(tmp_path, code)
    status = manifest.exit_status
    assert (status.code, status.signal, status.reason) == (number, name, reason)
    assert run.log_file.read_bytes().splitlines()[-1] == b"exit_status=%d" % number
    assert manifest.state == "finished"
    assert not status.oom_killed


def test_the_trainer_is_given_its_verb_and_the_job_by_its_whole_path(tmp_path):
    run, manifest = run_code(tmp_path, "import sys; print(*sys.argv[1:], sep='|')", verb="evaluate")
    assert run.log_file.read_text() == f"evaluate|{run.path}/job.json\nexit_status=0\n"
    assert manifest.command[-2:] == ["evaluate", str(run.path / "job.json")]


def test_the_default_trainer_is_the_one_beside_this_runner():
    assert list(environment.TRAINER) == [sys.executable, "-P", "-m", "trainer"]
    assert (environment.CODE / "trainer" / "__init__.py").is_file()


def test_a_log_of_200000_lines_is_whole_in_the_file_and_on_the_terminal(tmp_path):
    out = io.BytesIO()
    run, _ = run_code(tmp_path, "for i in range(200000): print(i)", out=out)
    expected = b"".join(b"%d\n" % i for i in range(200000)) + b"exit_status=0\n"
    assert run.log_file.read_bytes() == expected
    assert out.getvalue() == expected


def test_bytes_that_are_no_text_and_progress_bars_stay_as_they_are(tmp_path):
    raw = bytes(range(256)) + b"\r 50%\r100%\x1b[0m no newline"
    out = io.BytesIO()
    run, _ = run_code(tmp_path, f"import os; os.write(1, {raw!r})", out=out)
    assert run.log_file.read_bytes() == raw + b"\nexit_status=0\n"
    assert out.getvalue() == run.log_file.read_bytes()


def test_output_and_errors_are_one_log_in_order(tmp_path):
    code = "import os\nfor i in range(100): os.write(1 + i % 2, b'%d\\n' % i)"
    run, _ = run_code(tmp_path, code)
    assert run.log_file.read_text().split()[:-1] == [str(i) for i in range(100)]


class Slow(io.RawIOBase):
    """A terminal that nobody reads until told to."""

    def __init__(self, until):
        self.until, self.got = until, b""

    def write(self, data):
        assert self.until.wait(60)
        self.got += bytes(data)
        return len(data)


def test_a_reader_that_does_not_read_holds_up_neither_job_nor_archive(tmp_path):
    read = threading.Event()
    out = Slow(read)

    def read_once_finished():
        while not list(tmp_path.glob("runs/*/manifest.json")):
            time.sleep(0.01)
        while '"exit_status": {' not in next(tmp_path.glob("runs/*/manifest.json")).read_text():
            time.sleep(0.01)
        read.set()

    reader = threading.Thread(target=read_once_finished)
    reader.start()
    run, _ = run_code(tmp_path, "print('x' * 3_000_000)", out=out)
    reader.join()
    assert out.got == run.log_file.read_bytes()
    assert len(out.got) > 3_000_000


class Sips(io.RawIOBase):
    def __init__(self):
        self.got = b""

    def write(self, data):
        self.got += bytes(data[:7])
        return min(7, len(data))


@pytest.mark.parametrize(("lines", "first"), [(None, 0), (2, 98)])
def test_a_log_is_printed_whole_to_a_stream_that_takes_a_little_at_a_time(tmp_path, lines, first):
    log = tmp_path / "run.log"
    log.write_text("".join(f"line {i}\n" for i in range(100)))
    out = Sips()
    print_log(log, out, lines=lines, ended=None)
    assert out.got.decode() == "".join(f"line {i}\n" for i in range(first, 100))


class Broken(io.RawIOBase):
    def write(self, _):
        raise BrokenPipeError


def test_a_reader_that_goes_away_does_not_end_the_job(tmp_path):
    run, manifest = run_code(tmp_path, "print('a')\nprint('b')", out=Broken())
    assert manifest.exit_status.reason == "done"
    assert run.log_file.read_text() == "a\nb\nexit_status=0\n"


def test_the_job_sees_the_places_of_this_machine_and_no_more():
    told = {
        "PATH": "/bin", "HOME": "/root", "LANG": "C", "LC_ALL": "C.UTF-8", "XDG_CACHE_HOME": "/c",
        "HF_HOME": "/hf", "SSL_CERT_FILE": "/ca", "https_proxy": "http://p", "NO_PROXY": "x",
        "HF_TOKEN": "t", "BATCH_SIZE": "32", "SGLANG_JAX_PAGE_SIZE": "1", "WANDB_API_KEY": "w",
        "PYTHONPATH": "/theirs", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "-x", "LD_PRELOAD": "/x",
    }  # fmt: skip
    seen = environment.process_environment(told, ["HF_TOKEN", "NOT_SET"])
    ours = {"PYTHONPATH": str(environment.CODE), "PYTHONUNBUFFERED": "1"}
    kept = (
        "PATH HOME LANG LC_ALL XDG_CACHE_HOME HF_HOME SSL_CERT_FILE https_proxy NO_PROXY HF_TOKEN"
    )
    assert seen == {name: told[name] for name in kept.split()} | ours
    inside = environment.container_environment(told, ["HF_TOKEN", "NOT_SET"])
    assert inside == {name: told[name] for name in ("https_proxy", "NO_PROXY", "HF_TOKEN")}


def test_a_secret_reaches_the_job_and_no_file_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADROOM_TEST_TOKEN", SECRET)
    monkeypatch.setenv("BATCH_SIZE", SECRET)
    code = (
        "import os; print(len(os.environ['HEADROOM_TEST_TOKEN']), 'BATCH_SIZE' in os.environ, "
        "sorted(os.environ))"
    )
    more = "container:\n  pass_env: [HEADROOM_TEST_TOKEN]\n"
    run, manifest = run_code(tmp_path, code, more=more)
    assert run.log_file.read_text().startswith(f"{len(SECRET)} False ")
    assert SECRET not in str(manifest)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_name_without_a_value_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("HEADROOM_TEST_TOKEN", raising=False)
    says = []
    more = "container:\n  pass_env: [HEADROOM_TEST_TOKEN]\n"
    run_code(tmp_path, "pass", more=more, says=says)
    assert any("HEADROOM_TEST_TOKEN is not set here" in said for said in says)


def test_what_the_job_leaves_running_is_ended_with_it(tmp_path):
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
    )
    run, _ = run_code(tmp_path, code)
    left = int(run.log_file.read_text().split()[0])
    deadline = time.monotonic() + 10
    while start_ticks(left) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert start_ticks(left) is None


@pytest.mark.parametrize("name", ["with space", "quo'te\"s", "new\nline", "-rf $HOME `true`"])
def test_a_run_directory_of_any_name_works(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    run, manifest = run_code(folder, "import sys; print(open(sys.argv[2]).read())")
    assert manifest.exit_status.code == 0
    assert run.job_file.read_text() in run.log_file.read_text()


def test_a_program_that_is_not_there_is_status_127(tmp_path):
    job = load(write_job(tmp_path))
    runs = tmp_path / "runs"
    with archive.create(job, verb="train", where="process", runs=runs, code=CODE) as run:
        out = io.BytesIO()
        manifest = launch.launch(
            run, job, client=None, out=out, say=str, trainer=["/nowhere/python"]
        )
    assert manifest.exit_status.code == 127
    assert b"/nowhere/python" in out.getvalue()


def test_a_signal_that_came_before_the_start_ends_the_run_without_its_job(tmp_path):
    job = load(write_job(tmp_path))
    interrupts = Interrupts()
    interrupts.numbers += [signal.SIGINT, signal.SIGTERM]
    with archive.create(
        job, verb="train", where="process", runs=tmp_path / "runs", code=CODE
    ) as run:
        manifest = launch.launch(
            run, job, client=None, out=io.BytesIO(), say=str, trainer=trainer("print('ran')"),
            interrupts=interrupts,
        )  # fmt: skip
    status = manifest.exit_status
    assert (status.code, status.signal, status.reason) == (130, "SIGINT", "interrupted")
    assert run.log_file.read_text() == "exit_status=130\n"
    assert not run.process_file.exists()


def test_a_run_that_is_about_to_start_is_cancelled_once_it_has_started(tmp_path):
    job = load(write_job(tmp_path))
    done = []

    def cancel(run):
        done.append(state.cancel(run))

    with archive.create(
        job, verb="train", where="process", runs=tmp_path / "runs", code=CODE
    ) as run:
        canceller = threading.Thread(target=cancel, args=(run,))
        canceller.start()
        # Longer than the canceller needs to look: it has nothing to signal yet.
        canceller.join(0.5)
        assert canceller.is_alive()
        assert not run.stop_file.exists()
        code = "import time; time.sleep(600)"
        manifest = launch.launch(
            run, job, client=None, out=io.BytesIO(), say=str, trainer=trainer(code)
        )
    canceller.join(30)
    assert done == [manifest]
    assert (manifest.exit_status.code, manifest.exit_status.reason) == (143, "interrupted")


class LateDaemon:
    """A Docker client whose daemon makes the container and then answers too late."""

    def __init__(self, late, *, owner=None):
        self.api = self.images = self.containers = self
        self.late, self.owner, self.timeout, self.timeouts = late, owner, 10, []
        self.id, self.there, self.labels = "sha256:0", False, {}

    def get(self, name):
        if not self.there and name != "headroom:cpu":
            raise NotFound(name)
        return self

    def create(self, **options):
        self.timeouts.append(self.timeout)
        self.there = True
        self.labels = {**options["labels"], **(self.owner or {})}
        if self.late == "create":
            raise requests.ReadTimeout("read timed out")
        return self

    def get_archive(self, _):
        raise NotFound("no locks")

    def start(self):
        self.timeouts.append(self.timeout)
        raise requests.ReadTimeout("read timed out")

    def remove(self, **_):
        self.there = False


def launch_late(folder, client):
    job = load(write_job(folder))
    runs = folder / "runs"
    with (
        archive.create(job, verb="train", where="docker", runs=runs, code=CODE) as run,
        pytest.raises(launch.HostNotFit, match="read timed out"),
    ):
        launch.launch(run, job, client=client, out=io.BytesIO(), say=str)
    return run.manifest()


@pytest.mark.parametrize("late", ["create", "start"])
def test_a_daemon_that_answers_too_late_leaves_no_container_and_a_finished_archive(tmp_path, late):
    client = LateDaemon(late)
    status = launch_late(tmp_path, client).exit_status
    assert (status.code, status.reason) == (125, "refused")
    assert not client.there
    assert min(client.timeouts) >= 60
    assert client.timeout == 10


def test_a_container_of_that_name_from_another_folder_is_left_alone(tmp_path):
    client = LateDaemon("create", owner={"headroom.run_dir": "/elsewhere/runs/x"})
    launch_late(tmp_path, client)
    assert client.there


def test_a_process_that_cannot_be_started_finishes_the_archive(tmp_path):
    job = load(write_job(tmp_path))
    with archive.create(
        job, verb="train", where="process", runs=tmp_path / "runs", code=CODE
    ) as run:
        # Longer than the kernel takes for one argument (MAX_ARG_STRLEN, 128 KiB).
        program = trainer("#" + "x" * 200_000)
        with pytest.raises(launch.HostNotFit, match="Argument list too long"):
            launch.launch(run, job, client=None, out=io.BytesIO(), say=str, trainer=program)
    status = run.manifest().exit_status
    assert (status.code, status.reason) == (125, "refused")
    assert "Argument list too long" in run.log_file.read_text()


@pytest.mark.parametrize(
    ("change", "grace_s"),
    [({}, 7), ({"data": {"path": "/moved.jsonl"}}, 7), ({"container": None}, 30)],
)
def test_the_grace_of_a_cancel_is_the_jobs_even_where_the_job_loads_no_more(
    tmp_path, change, grace_s
):
    run = archive.RunDir(tmp_path)
    told = {"container": {"stop_grace_s": 7}, **change}
    run.job_file.write_text(json.dumps(told))
    assert state.grace_s(run) == grace_s


def start_sleeper(folder):
    job = load(write_job(folder))
    runs = folder / "runs"
    code = "import time; print('up', flush=True); time.sleep(600)"
    with archive.create(job, verb="train", where="process", runs=runs, code=CODE) as run:
        task = launch.start(run, job, client=None, trainer=trainer(code))
    return run, task


def test_a_run_whose_supervisor_was_killed_runs_until_its_trainer_is_gone_then_it_is_lost(tmp_path):
    run, task = start_sleeper(tmp_path)
    known = run.read_json(run.process_file)
    other = ProcessTask(run)
    os.kill(known["supervisor_pid"], signal.SIGKILL)
    assert task.wait(0.2) is None
    assert other.ended() is None
    other.kill()
    while (status := other.wait(0.01)) is None:
        pass
    assert status.reason == "lost"


@pytest.mark.parametrize("change", [{"ticks": 1, "supervisor_ticks": 1}, {"boot_id": "other"}])
def test_a_process_that_only_has_the_same_number_is_not_the_jobs_and_is_not_hit(tmp_path, change):
    run, task = start_sleeper(tmp_path)
    known = run.read_json(run.process_file)
    try:
        archive.write_whole(run.process_file, __import__("json").dumps({**known, **change}))
        other = ProcessTask(run)
        assert other.ended().reason == "lost"
        other.stop(signal.SIGTERM)
        other.kill()
        assert start_ticks(known["pid"]) == known["ticks"]
    finally:
        task.kill()
        while task.wait(0.01) is None:
            pass


def test_the_jobs_process_is_in_a_session_of_its_own_and_its_times_are_the_kernels(tmp_path):
    run, task = start_sleeper(tmp_path)
    known = run.read_json(run.process_file)
    try:
        told = subprocess.run(
            ["ps", "-o", "sid=,pgid=", "-p", str(known["pid"])],
            capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        assert told == [str(known["supervisor_pid"]), str(known["pid"])]
        assert os.getsid(0) != known["supervisor_pid"]
        stat = Path(f"/proc/{known['pid']}/stat").read_text()
        assert known["ticks"] == int(re.sub(r".*\)", "", stat).split()[19])
    finally:
        task.kill()
        while task.wait(0.01) is None:
            pass


def no_daemon():
    raise NoDaemonError("no Docker daemon answers at unix:///nowhere")


def test_without_a_daemon_auto_takes_a_process_and_says_so(tmp_path):
    job = load(write_job(tmp_path))
    client, why = launch.place("auto", job, connect=no_daemon)
    assert client is None
    assert "unix:///nowhere" in why


def test_docker_asked_for_and_not_there_is_one_error_with_the_way_out(tmp_path):
    job = load(write_job(tmp_path))
    with pytest.raises(launch.HostNotFit, match=r"unix:///nowhere.*--where process"):
        launch.place("docker", job, connect=no_daemon)


def test_a_process_asked_for_asks_no_daemon(tmp_path):
    def fail():
        raise AssertionError

    job = load(write_job(tmp_path))
    assert launch.place("process", job, connect=fail)[0] is None
