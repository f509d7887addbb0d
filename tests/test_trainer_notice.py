"""A notice of the cloud stops a run as SIGTERM does; a machine without one is left alone."""

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs import spec
from jobs.aftermath import Notice
from jobs.records import Manifest
from runner.cli import main
from tests.test_trainer_checkpoint import JOB, steps
from trainer.notice import SERVER, ask, follow, server_of
from trainer.stop import Stopped, Stops

REPOSITORY = Path(__file__).parents[1]


class Metadata:
    """A metadata server as Google's is: values by key, a tag each state, and waiting for another.

    Attributes:
        url: of it.
        asked: every request's path.
    """

    def __init__(self, *, flavor="Google"):
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.tags = dict.fromkeys(self.values, 0)
        self.changed = threading.Condition()
        self.asked = []
        self.closed = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                path, _, query = self.path.partition("?")
                key = path.removeprefix("/computeMetadata/v1/instance/")
                wanted = dict(pair.split("=") for pair in query.split("&") if pair)
                if self.headers["Metadata-Flavor"] != "Google" or key not in outer.values:
                    self.send_error(403)
                    return
                with outer.changed:
                    if wanted.get("wait_for_change") == "true":
                        outer.changed.wait_for(
                            lambda: outer.closed or wanted["last_etag"] != str(outer.tags[key]),
                            timeout=float(wanted["timeout_sec"]),
                        )
                    value, tag = outer.values[key].encode(), str(outer.tags[key])
                self.send_response(200)
                self.send_header("Metadata-Flavor", flavor)
                self.send_header("ETag", tag)
                self.send_header("Content-Length", str(len(value)))
                self.end_headers()
                self.wfile.write(value)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))

    def say(self, key, value):
        with self.changed:
            self.values[key] = value
            self.tags[key] += 1
            self.changed.notify_all()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def metadata():
    with Metadata() as server:
        yield server


def job(tmp_path, *overrides):
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return spec.load(path, overrides=overrides)


def test_tpu_jobs_ask_by_themselves_and_others_when_told(tmp_path):
    assert server_of(job(tmp_path)) is None
    assert server_of(job(tmp_path, "accelerator=v4-8", "rollout.prompts_per_step=4")) == SERVER
    never = ("accelerator=v4-8", "rollout.prompts_per_step=4", "checkpoint.notice=never")
    assert server_of(job(tmp_path, *never)) is None
    assert server_of(job(tmp_path, "checkpoint.notice=http://x:1")) == "http://x:1"
    with pytest.raises(spec.JobError, match=r"checkpoint\.notice"):
        job(tmp_path, "checkpoint.notice=yes-please")


def following(server, key, end):
    told = []
    thread = threading.Thread(
        target=follow,
        args=(server, key, end, lambda *what: told.append(what)),
        kwargs={"first_pause_s": 0.01},
        daemon=True,
    )
    thread.start()
    return thread, told


def test_a_value_is_waited_for_at_the_server_and_other_values_do_not_count(metadata):
    key, end = "maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"
    thread, told = following(metadata.url, key, end)
    value, tag = ask(metadata.url, key, etag=None)
    assert (value, tag) == ("NONE", "0")
    metadata.say(key, "MIGRATE_ON_HOST_MAINTENANCE")
    assert ask(metadata.url, key, etag="0") == ("MIGRATE_ON_HOST_MAINTENANCE", "1")
    assert thread.is_alive()
    assert told == []
    metadata.say(key, end)
    thread.join(60)
    assert told == [(key, end)]
    # Once at once, then only for another state than the last: nobody is asked all the time.
    waited = [path for path in metadata.asked if "wait_for_change=true" in path]
    assert len(metadata.asked) <= len(waited) + 2
    assert len(waited) <= 4
    assert {path.partition("last_etag=")[2] for path in waited} <= {"0", "1"}


def test_whoever_is_no_metadata_server_is_not_believed():
    with Metadata(flavor="a captive portal") as other:
        other.say("preempted", "TRUE")
        with pytest.raises(ConnectionError, match="no metadata server"):
            ask(other.url, "preempted", etag=None)
        with pytest.raises(ConnectionError, match="status 403"):
            ask(other.url, "something", etag=None)


def test_a_server_that_comes_later_is_found():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    thread, told = following(f"http://127.0.0.1:{port}", "preempted", "TRUE")
    with Metadata() as late:
        # The first asks a port that nobody listens on; the second is told where to.
        other, heard = following(late.url, "preempted", "TRUE")
        late.say("preempted", "TRUE")
        other.join(60)
    assert (heard, told) == ([("preempted", "TRUE")], [])
    assert thread.is_alive()


def test_a_machine_that_is_none_of_googles_hears_nothing_and_is_not_kept_from_its_end(tmp_path):
    # Somebody who takes the connection and never says a word.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        path = tmp_path / "job.json"
        path.write_text(job(tmp_path, f"checkpoint.notice={url}").to_json())
        code = (
            "import logging, sys, pathlib\n"
            "from jobs.spec import load\n"
            "from trainer import notice\n"
            "from trainer.stop import Stops\n"
            "logging.basicConfig(level=logging.DEBUG)\n"
            "path = pathlib.Path(sys.argv[1])\n"
            "notice.watch(load(path), path.parent, Stops())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, path],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert done.stdout + done.stderr == ""
    assert not (tmp_path / "notice.json").exists()


def test_a_notice_comes_from_any_thread_and_waits_for_what_is_held():
    stops, seen = Stops(), []
    before = signal.signal(signal.SIGTERM, stops)

    def work():
        with stops.held():
            thread = threading.Thread(target=stops.notice, args=("gone", lambda: seen.append(1)))
            thread.start()
            thread.join()
            while stops.number is None:  # the handler runs here, between two instructions
                pass
            seen.append("whole")

    try:
        with pytest.raises(Stopped) as caught:
            work()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 143
    assert seen == [1, "whole"]


def test_a_stop_that_was_asked_for_before_stays_what_it_was():
    stops, seen = Stops(), []
    with pytest.raises(Stopped):
        stops(signal.SIGINT, None)
    stops.notice("gone", lambda: seen.append(1))
    assert (seen, stops.number) == ([], signal.SIGINT)


def test_a_preempted_run_saves_and_goes_on_at_once_to_the_very_bits(tmp_path, metadata, caplog):
    caplog.set_level(logging.ERROR)
    asked = ["--where", "process", "--set", "steps=12", "--set", "checkpoint.every_steps=1000"]
    asked += ["--set", f"cache_dir={REPOSITORY / '.cache'}"]
    (tmp_path / "job.yaml").write_text(JOB)
    begun = threading.Event()

    def take_the_machine():
        while not begun.wait(0.02):
            if any(path.stat().st_size for path in tmp_path.glob("taken/*/steps.jsonl")):
                metadata.say("preempted", "TRUE")
                while not any(tmp_path.glob("taken/*/exit.json")):
                    if begun.wait(0.02):
                        return
                metadata.say("preempted", "FALSE")  # another machine
                return

    cloud = threading.Thread(target=take_the_machine)
    cloud.start()
    job_file = str(tmp_path / "job.yaml")
    notice = ["--set", f"checkpoint.notice={metadata.url}"]
    try:
        taken = ["run", job_file, *asked, *notice, "--preemptions", "1"]
        done = CliRunner().invoke(main, [*taken, "--runs", str(tmp_path / "taken")])
    finally:
        begun.set()
        cloud.join()
    assert done.exit_code == 0, done.output
    assert "preempted; 0 of --preemptions left; again in 0 s" in done.stderr
    first, second = sorted(path.parent for path in tmp_path.glob("taken/*/manifest.json"))
    status = Manifest.model_validate_json((first / "manifest.json").read_text()).exit_status
    assert (status.code, status.reason) == (143, "preempted")
    found = Notice.model_validate_json((first / "notice.json").read_text())
    assert (found.key, found.value) == ("preempted", "TRUE")
    assert "preemption notice: preempted = TRUE" in (first / "run.log").read_text()
    [saved] = (first / "checkpoints").iterdir()
    before = steps(first)
    assert saved.name == f"step_{len(before):06d}"
    assert 0 < len(before) < 12
    assert json.loads((second / "job.json").read_text())["checkpoint"]["resume"] == str(saved)
    straight = ["run", job_file, *asked, "--runs", str(tmp_path / "straight")]
    assert CliRunner().invoke(main, straight).exit_code == 0
    [whole] = [path.parent for path in tmp_path.glob("straight/*/manifest.json")]
    assert before + steps(second) == steps(whole)


def test_a_notice_without_a_budget_ends_with_143_and_names_the_way_on(tmp_path, metadata):
    # Found at the first look, before JAX is there: nothing is trained, and it is no failure.
    metadata.say("preempted", "TRUE")
    (tmp_path / "job.yaml").write_text(JOB)
    argv = ["run", str(tmp_path / "job.yaml"), "--where", "process", "--retries", "3"]
    argv += ["--set", f"checkpoint.notice={metadata.url}", "--runs", str(tmp_path / "runs")]
    done = CliRunner().invoke(main, argv)
    assert done.exit_code == 143, done.output
    [run] = [path.parent for path in tmp_path.glob("runs/*/manifest.json")]
    status = Manifest.model_validate_json((run / "manifest.json").read_text()).exit_status
    assert (status.code, status.reason) == (143, "preempted")
    assert not (run / "failure.json").exists()
    shown = CliRunner().invoke(main, ["show", str(run)])
    assert "preempted (143)" in shown.stdout
    told = CliRunner().invoke(main, ["diagnose", str(run)])
    assert told.stdout.startswith("preempted: ")
