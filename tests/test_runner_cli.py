import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from fakes import headroom, trainer, write_job

from jobs.records import Manifest
from runner.cli import main
from runner.terminal import World

WAIT_FOR_IT = "import time; print('up', flush=True); time.sleep(600)"
STOPS = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\n"
    "print('up', flush=True)\n"
    "time.sleep(600)\n"
)
STUBBORN = (
    "import signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "print('up', flush=True)\n"
    "time.sleep(600)\n"
)
# A trainer that says so when it ends, once it is told to (the file "go" beside the runs).
TOLD = (
    "import pathlib, time\n"
    "print('up', flush=True)\n"
    "while not pathlib.Path('../../go').exists(): time.sleep(0.01)\n"
    "for i in range(1000): print(i)\n"
    "raise SystemExit(3)\n"
)

# The SOP's own failure, as the TPU runtime words it.
OOM = (
    "jaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED: Error loading program 'jit_training_step': "
    "Attempting to reserve 7.82G at the bottom of memory. That was not possible. There are 5.68G "
    "free, 0B reserved, and 5.68G reservable."
)


@pytest.fixture
def started(tmp_path):
    """Starts `headroom run` with a stand-in trainer and waits until that is up."""
    made = []

    def start(code, *, more="", arguments=()):
        job = write_job(tmp_path, more)
        argv = headroom(code, "run", job, "--where", "process", *arguments)
        runner = subprocess.Popen(
            argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        made.append(runner)
        if "--json" not in arguments:
            assert runner.stdout.readline() == "up\n", runner.communicate()
        return runner

    yield start
    for runner in made:
        with contextlib.suppress(ProcessLookupError):
            runner.kill()
        runner.communicate()
    for process_file in tmp_path.glob("runs/*/process.json"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(json.loads(process_file.read_text())["pid"], signal.SIGKILL)


def manifest_in(folder):
    (path,) = folder.glob("runs/*/manifest.json")
    return Manifest.model_validate_json(path.read_text())


def log_in(folder):
    (path,) = folder.glob("runs/*/run.log")
    return path.read_text()


def call(folder, command, *arguments, code="pass"):
    """One command to its end, in this process."""
    runs = () if "--runs" in arguments else ("--runs", folder / "runs")
    argv = [str(a) for a in (command, *arguments, *runs)]
    return CliRunner().invoke(main, argv, obj=World(trainer=trainer(code)))


def until(condition, *, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("code", "number", "ours"),
    [
        ("pass", 0, 0),
        ("print('Error: engine: not in this version')\nraise SystemExit(1)", 1, 1),
        ("import no_such_module_of_a_test", 1, 4),
        ("raise SystemExit(3)", 3, 5),
        (f"print({OOM!r})\nraise SystemExit(70)", 70, 4),
    ],
)
def test_a_run_tells_its_end_in_log_manifest_terminal_and_exit_code(tmp_path, code, number, ours):
    done = call(tmp_path, "run", write_job(tmp_path), "--where", "process", code=code)
    assert done.exit_code == ours, done.stderr
    manifest = manifest_in(tmp_path)
    assert manifest.exit_status.code == number
    lines = done.stdout.splitlines()
    assert f"exit_status={number}" in lines
    assert lines[-1] == f"run directory: {tmp_path}/runs/{manifest.run}"
    assert "running in a process" in done.stderr


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
@pytest.mark.parametrize("job", [STOPS, WAIT_FOR_IT], ids=["handles", "dies"])
def test_a_signal_stops_the_job_and_the_archive_is_finished(started, tmp_path, number, code, job):
    runner = started(job)
    runner.send_signal(number)
    out, _ = runner.communicate(timeout=30)
    assert runner.returncode == code
    status = manifest_in(tmp_path).exit_status
    assert (status.code, status.reason) == (code, "interrupted")
    assert f"exit_status={code}\n" in out
    assert log_in(tmp_path).endswith(f"\nexit_status={code}\n")
    assert manifest_in(tmp_path).log_sha256 is not None


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_a_signal_right_after_the_run_was_made_leaves_its_exit_status(tmp_path, number, code):
    argv = headroom(WAIT_FOR_IT, "run", write_job(tmp_path), "--where", "process")
    runner = subprocess.Popen(
        argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while not runner.stderr.readline().startswith("headroom: run directory:"):
            assert runner.poll() is None
        runner.send_signal(number)
        out, errors = runner.communicate(timeout=60)
    finally:
        runner.kill()
    assert runner.returncode == code, errors
    manifest = manifest_in(tmp_path)
    assert (manifest.exit_status.code, manifest.exit_status.reason) == (code, "interrupted")
    assert f"exit_status={code}\n" in out
    assert log_in(tmp_path).endswith(f"exit_status={code}\n")


def test_a_signal_before_the_run_was_made_makes_none(tmp_path):
    # The daemon that is asked first never answers: this socket takes the call and says nothing.
    with socket.create_server(("127.0.0.1", 0)) as daemon:
        command = headroom("pass", "run", write_job(tmp_path))
        host = f"DOCKER_HOST=tcp://127.0.0.1:{daemon.getsockname()[1]}"
        argv = ["env", host, *command]
        runner = subprocess.Popen(argv, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        try:
            with daemon.accept()[0]:
                runner.terminate()
            _, errors = runner.communicate(timeout=60)
        finally:
            runner.kill()
    assert runner.returncode == 143, errors
    assert "SIGTERM: stopped before the run was made" in errors
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_ends_any_command_with_130(started, tmp_path):
    started(WAIT_FOR_IT)
    reader = subprocess.Popen(
        headroom("pass", "logs", "latest", "-f"),
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert reader.stdout.readline() == "up\n"
    reader.send_signal(signal.SIGINT)
    _, errors = reader.communicate(timeout=30)
    assert (reader.returncode, errors) == (130, "headroom: interrupted\n")


def test_a_job_that_will_not_stop_is_killed_after_the_grace(started, tmp_path):
    runner = started(STUBBORN, more="container:\n  stop_grace_s: 1\n")
    begin = time.monotonic()
    runner.terminate()
    runner.communicate(timeout=30)
    assert time.monotonic() - begin >= 1
    assert runner.returncode == 143
    status = manifest_in(tmp_path).exit_status
    assert (status.code, status.signal, status.reason) == (137, "SIGKILL", "interrupted")


def test_a_second_ctrl_c_kills_at_once(started, tmp_path):
    runner = started(STUBBORN, more="container:\n  stop_grace_s: 600\n")
    runner.send_signal(signal.SIGINT)
    while "SIGINT: the job is asked to stop" not in runner.stderr.readline():
        pass
    runner.send_signal(signal.SIGINT)
    runner.communicate(timeout=30)
    assert runner.returncode == 130
    assert manifest_in(tmp_path).exit_status.code == 137


def test_a_killed_job_is_told_with_its_signal(started, tmp_path):
    runner = started(WAIT_FOR_IT)
    os.kill(manifest_in(tmp_path).pid, signal.SIGKILL)
    runner.communicate(timeout=30)
    status = manifest_in(tmp_path).exit_status
    assert (status.code, status.signal, status.reason) == (137, "SIGKILL", "failed")
    assert runner.returncode in (4, 5)


def test_after_sigkill_of_the_runner_the_job_goes_on_and_status_tells_the_truth(started, tmp_path):
    runner = started(TOLD)
    runner.kill()
    runner.communicate()
    (before,) = json.loads(call(tmp_path, "status", "--json").stdout)
    assert (before["state"], before["exit_status"]) == ("running", None)
    assert (tmp_path / "logs" / "stand-in_latest.log").read_text() == "up\n"
    (tmp_path / "go").touch()
    until(lambda: list(tmp_path.glob("runs/*/exit.json")))
    (after,) = json.loads(call(tmp_path, "status", "--json").stdout)
    assert after["state"] == "finished"
    assert after["exit_status"]["code"] == 3
    expected = "up\n" + "".join(f"{i}\n" for i in range(1000)) + "exit_status=3\n"
    assert log_in(tmp_path) == expected
    assert (tmp_path / "logs" / "stand-in_latest.log").read_text() == expected


def test_a_run_of_which_nobody_saw_the_end_is_lost(started, tmp_path):
    runner = started(WAIT_FOR_IT)
    known = json.loads(next(tmp_path.glob("runs/*/process.json")).read_text())
    for pid in (runner.pid, known["supervisor_pid"], known["pid"]):
        os.kill(pid, signal.SIGKILL)
    runner.communicate()
    # The orphan is reaped by init, not by us.
    until(lambda: json.loads(call(tmp_path, "status", "--json").stdout)[0]["exit_status"])
    assert manifest_in(tmp_path).state == "lost"
    assert log_in(tmp_path) == "up\nexit_status=lost\n"
    shown = call(tmp_path, "show", "latest")
    assert "lost" in shown.stdout


def test_a_run_of_another_machine_is_left_as_it_is(started, tmp_path):
    runner = started(WAIT_FOR_IT)
    runner.kill()
    runner.communicate()
    (path,) = tmp_path.glob("runs/*/manifest.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "host": {**record["host"], "name": "elsewhere"}}))
    done = call(tmp_path, "status", "--json")
    assert json.loads(done.stdout)[0]["state"] == "running"
    assert "it runs on elsewhere" in done.stderr
    refused = call(tmp_path, "cancel", "latest")
    assert refused.exit_code == 1
    assert "elsewhere" in refused.stderr


@pytest.mark.parametrize("runner_lives", [True, False])
def test_cancel_stops_the_job_and_finishes_the_archive(started, tmp_path, runner_lives):
    runner = started(STOPS)
    if not runner_lives:
        runner.kill()
        runner.communicate()
    done = call(tmp_path, "cancel", "latest")
    assert done.exit_code == 0, done.stderr
    assert "has been stopped: interrupted (143)" in done.stdout
    assert manifest_in(tmp_path).exit_status.code == 143
    assert log_in(tmp_path) == "up\nexit_status=143\n"
    if runner_lives:
        runner.communicate(timeout=30)
        assert runner.returncode == 143
    again = call(tmp_path, "cancel", "latest", "--json")
    assert json.loads(again.stdout)["exit_status"]["code"] == 143
    assert "had already ended" in call(tmp_path, "cancel", "latest").stdout


def test_cancel_kills_what_will_not_stop(started, tmp_path):
    started(STUBBORN, more="container:\n  stop_grace_s: 1\n")
    done = call(tmp_path, "cancel", "latest")
    assert "interrupted (137, SIGKILL)" in done.stdout


def test_logs_follow_a_run_to_its_end_even_without_its_runner(started, tmp_path):
    runner = started(TOLD)
    runner.kill()
    runner.communicate()
    reader = subprocess.Popen(
        headroom("pass", "logs", "latest", "-f"), cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout.readline() == "up\n"
    (tmp_path / "go").touch()
    out, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0
    assert out == "".join(f"{i}\n" for i in range(1000)) + "exit_status=3\n"


def test_logs_print_the_last_lines_as_tail_does(tmp_path):
    code = "import os\nfor i in range(1000): os.write(1, b'\\xff%d\\n' % (i * 10**60))"
    call(tmp_path, "run", write_job(tmp_path), "--where", "process", code=code)
    log = next(tmp_path.glob("runs/*/run.log"))
    for number in (0, 1, 2, 3, 1000, 1002, 5000):
        argv = ["tail", f"-n{number}", log]
        expected = subprocess.run(argv, capture_output=True, check=True).stdout
        assert call(tmp_path, "logs", "latest", "-n", number).stdout_bytes == expected
    assert call(tmp_path, "logs", "latest").stdout_bytes == log.read_bytes()


STEP = {
    "step": 0, "loss": 0.25, "entropy": 1.5, "reward_mean": 0.75, "reward_std": 0.5,
    "rewards": {"correct": 0.5}, "pass_at_1": 0.5, "pass_at_k": 1.0, "mean_at_k": 0.5,
    "completion_tokens_mean": 31.0, "completion_tokens_max": 64, "prompt_tokens_mean": 200.0,
    "truncated_fraction": 0.0, "clipped_fraction": 0.0, "grad_norm": 1.0, "learning_rate": 1e-6,
    "kl": None, "tokens_per_s": 12.5, "seconds": {"rollout": 2.0}, "dt_s": 3.5,
    "host_rss_bytes": 1, "hbm_peak_bytes": None,
}  # fmt: skip
FAILURE = {
    "kind": "ValueError", "message": "loss is nan", "phase": "update", "step": 1,
    "traceback": "Traceback ...",
}  # fmt: skip
WRITES = (
    "import pathlib, json\n"
    f"line = json.dumps({STEP!r})\n"
    "pathlib.Path('steps.jsonl').write_text(line + '\\n' + line[:40])\n"
    f"pathlib.Path('failure.json').write_text(json.dumps({FAILURE!r}))\n"
    "raise SystemExit(70)\n"
)


def test_show_tells_what_ran_its_whole_steps_and_why_it_failed(tmp_path):
    call(tmp_path, "run", write_job(tmp_path), "--where", "process", code=WRITES)
    text = call(tmp_path, "show", "latest").stdout
    for part in ("stand-in (train)", "failed (70)", "0.2500", "0.750", "12.5", "loss is nan"):
        assert part in text
    data = json.loads(call(tmp_path, "show", "latest", "--json").stdout)
    assert set(data) == {
        "run", "path", "manifest", "job", "steps", "evaluations", "failure", "diagnosis",
        "black_box", "notice",
    }  # fmt: skip
    assert data["steps"] == [STEP]
    assert data["evaluations"] == []
    assert data["failure"] == FAILURE
    assert data["job"]["name"] == "stand-in"
    assert Manifest.model_validate(data["manifest"]).exit_status.code == 70


def test_the_trainers_refusal_is_the_last_that_it_is_heard_to_say(tmp_path):
    refuses = "print('loading')\nprint('Error: a')\nprint('Error: b')\nraise SystemExit(1)"
    done = call(tmp_path, "run", write_job(tmp_path), "--where", "process", code=refuses)
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-4:-1] == ["Error: a", "Error: b", "exit_status=1"]
    assert not list(tmp_path.glob("runs/*/diagnosis.json"))


def test_show_counts_what_another_version_wrote_and_shows_the_rest(tmp_path):
    call(tmp_path, "run", write_job(tmp_path), "--where", "process", code=WRITES)
    (steps,) = tmp_path.glob("runs/*/steps.jsonl")
    lines = [STEP, {"step": 1, "other": 2}, {"eval_step": 1}, [1], 7, None]
    steps.write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps.with_name("failure.json").write_text('{"why": "x"}')
    steps.with_name("diagnosis.json").write_text("[]")
    done = call(tmp_path, "show", "latest")
    assert done.exit_code == 0, done.output
    assert "0.2500" in done.stdout
    for kind in ("StepRecord", "EvalRecord", "Failure"):
        assert f"1 not shown: no {kind} of this version" in done.stdout
    assert json.loads(call(tmp_path, "show", "latest", "--json").stdout)["steps"] == lines[:2]


def test_a_log_is_diagnosed_from_a_pipe_and_a_name_of_nothing_is_one_plain_error(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(f"{OOM}\n",))
    writer.start()
    done = call(tmp_path, "diagnose", pipe)
    writer.join()
    assert "short by 2.14 GiB" in done.stdout
    for nothing in ("nope", tmp_path):
        refused = call(tmp_path, "diagnose", nothing)
        assert refused.exit_code == 1
        assert refused.stderr.startswith(f"Error: {str(nothing)!r} is neither a file nor a run: ")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('fine')", "success: The program ended well."),
        (f"print({OOM!r})", "success: The program ended well; the errors in its log were handled."),
    ],
)
def test_a_clean_run_is_not_said_to_have_handled_errors(tmp_path, code, said):
    call(tmp_path, "run", write_job(tmp_path), "--where", "process", code=code)
    assert call(tmp_path, "diagnose", "latest").stdout.splitlines()[0] == said


# A trainer that fails until it has been started so many times; the runs lie beside each other.
FAILS_UNTIL = (
    "import pathlib\n"
    "if len(list(pathlib.Path('..').glob('*/job.json'))) < {times}:\n"
    "    print({says!r})\n"
    "    raise SystemExit(70)\n"
)
PASSING = "OSError: [Errno 101] Network is unreachable"


def retried(folder, code, retries, *options):
    waits = []
    world = World(trainer=trainer(code), pause=waits.append)
    argv = ["run", write_job(folder), "--where", "process", "--runs", folder / "runs"]
    argv = [str(a) for a in (*argv, "--retries", retries, *options)]
    return CliRunner().invoke(main, argv, obj=world), waits


def test_a_cause_that_passes_is_tried_again_each_attempt_a_run_of_its_own(tmp_path):
    done, waits = retried(tmp_path, FAILS_UNTIL.format(times=3, says=PASSING), 5)
    assert done.exit_code == 0, done.output
    assert waits == [10, 20]
    manifests = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("runs/*/manifest.json"))]
    assert [m["exit_status"]["code"] for m in manifests] == [70, 70, 0]
    names = [m["run"] for m in manifests]
    assert [m["retry_of"] for m in manifests] == [None, *names[:2]]
    assert len({m["job_sha256"] for m in manifests}) == 1
    said = "network_unreachable may pass by itself; 4 of --retries left; again in 10 s"
    assert f"{names[0]}: {said}" in done.stderr
    assert "retry of" in call(tmp_path, "show", "latest").stdout


def test_no_more_attempts_are_made_than_were_asked_for(tmp_path):
    done, waits = retried(tmp_path, FAILS_UNTIL.format(times=9, says=PASSING), 2)
    assert done.exit_code == 4
    assert (len(list(tmp_path.glob("runs/*/job.json"))), len(waits)) == (3, 2)


@pytest.mark.parametrize(
    ("code", "ours"),
    [
        (f"print({OOM!r})\nraise SystemExit(70)", 4),  # only with other settings
        ("print('Error: no TPU')\nraise SystemExit(1)", 1),
        ("raise SystemExit(70)", 5),
        ("pass", 0),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143),
    ],
)
def test_what_would_only_fail_again_is_not_tried_again(tmp_path, code, ours):
    done, waits = retried(tmp_path, code, 3)
    assert (done.exit_code, waits) == (ours, [])
    assert len(list(tmp_path.glob("runs/*/job.json"))) == 1


def test_a_retry_runs_the_job_as_it_was_first_read(tmp_path):
    edits = f"import pathlib\npathlib.Path({str(tmp_path / 'job.yaml')!r}).write_text('x: 1')\n"
    done, _ = retried(
        tmp_path, edits + FAILS_UNTIL.format(times=2, says=PASSING), 1, "--set=seed=5"
    )
    assert done.exit_code == 0, done.output
    assert [json.loads(p.read_text())["seed"] for p in tmp_path.glob("runs/*/job.json")] == [5, 5]


def test_a_plan_and_a_job_beside_a_log_give_the_advice_its_numbers(tmp_path):
    log = tmp_path / "old.log"
    log.write_text(OOM + "\n")
    without = call(tmp_path, "diagnose", log).stdout
    (tmp_path / "plan.json").write_text(json.dumps({"headroom_bytes": -(2**30)}))
    (tmp_path / "job.json").write_text(json.dumps({"train": {"micro_batch_size": 4}}))
    told = call(tmp_path, "diagnose", log).stdout
    assert "The plan had said so: short by 1.00 GiB a chip." in told
    assert "train.micro_batch_size = 4" in told
    assert "plan had said" not in without
    (tmp_path / "plan.json").write_text("{")
    assert "plan had said" not in call(tmp_path, "diagnose", log).stdout


def test_a_refused_run_is_explained_by_the_trainers_own_lines(tmp_path):
    refuses = "print('up')\nprint('Error: a = 1 is odd')\nprint('Error: b')\nraise SystemExit(1)"
    call(tmp_path, "run", write_job(tmp_path), "--where", "process", code=refuses)
    found = json.loads(call(tmp_path, "diagnose", "latest", "--json").stdout)
    assert (found["cause"], found["root_line"], found["line"]) == (
        "config_error", "Error: a = 1 is odd", 2,
    )  # fmt: skip
    assert found["evidence"] == [3]


def test_a_run_without_its_log_is_shown_and_the_log_said_to_be_missing(tmp_path):
    call(tmp_path, "run", write_job(tmp_path), "--where", "process")
    (log,) = tmp_path.glob("runs/*/run.log")
    log.unlink()
    assert call(tmp_path, "show", "latest").exit_code == 0
    for command in ("logs", "diagnose"):
        done = call(tmp_path, command, "latest")
        assert done.exit_code == 1
        assert "has no run.log" in done.stderr
        assert "Traceback" not in done.output


@pytest.mark.parametrize("into", ["/dev/full", "a pipe that nobody reads"])
def test_a_run_ends_as_it_ended_whoever_reads_of_it(tmp_path, into):
    argv = headroom("print('x' * 100)", "run", write_job(tmp_path), "--where", "process")
    reads, writes = os.pipe()
    os.close(reads)
    with open(into if into == "/dev/full" else writes, "w") as out:  # noqa: PTH123
        done = subprocess.run(argv, cwd=tmp_path, stdout=out, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert manifest_in(tmp_path).exit_status.reason == "done"


@pytest.mark.parametrize("name", ["show", "logs", "cancel"])
def test_help_tells_what_a_run_may_be_called(name):
    shown = " ".join(CliRunner().invoke(main, [name, "--help"]).stdout.split())
    assert "RUN: a name, its beginning, the path of a run directory, or latest." in shown


def test_a_failed_run_is_diagnosed_at_once_and_again_by_name_file_and_stdin(tmp_path):
    failing = f"print({OOM!r})\nraise SystemExit(70)"
    done = call(tmp_path, "run", write_job(tmp_path), "--where", "process", code=failing)
    assert "jit_training_step needs 7.82 GiB, 5.68 GiB can be reserved: short by 2.14 GiB" in (
        done.stdout
    )
    (path,) = tmp_path.glob("runs/*/diagnosis.json")
    kept = json.loads(path.read_text())
    assert kept["numbers"]["program"] == "jit_training_step"
    assert json.loads(call(tmp_path, "diagnose", "latest", "--json").stdout) == kept
    assert json.loads(call(tmp_path, "show", "latest", "--json").stdout)["diagnosis"] == kept
    log = path.with_name("run.log")
    by_file = json.loads(call(tmp_path, "diagnose", log, "--json").stdout)
    assert by_file["cause"] == kept["cause"]
    argv = ["diagnose", "-", "--json"]
    by_stdin = CliRunner().invoke(main, argv, input=log.read_bytes())
    assert json.loads(by_stdin.stdout) == by_file
    assert "short by 2.14 GiB" in call(tmp_path, "show", "latest").stdout


def test_following_a_run_says_each_cause_once(tmp_path):
    failing = f"print({OOM!r})\nprint({OOM!r})\nraise SystemExit(70)"
    call(tmp_path, "run", write_job(tmp_path), "--where", "process", code=failing)
    said = call(tmp_path, "diagnose", "latest", "--follow", "--json").stdout.splitlines()
    assert [json.loads(line)["numbers"]["program"] for line in said] == ["jit_training_step"]


def test_run_as_json_prints_one_object_and_the_log_elsewhere(tmp_path):
    job = write_job(tmp_path)
    done = call(tmp_path, "run", job, "--where", "process", "--json", code="print('in the log')")
    data = json.loads(done.stdout)
    assert data["manifest"]["exit_status"] == {
        "code": 0, "signal": None, "oom_killed": False, "reason": "done",
    }  # fmt: skip
    assert Path(data["path"], "run.log").read_text() == "in the log\nexit_status=0\n"
    assert "in the log" in done.stderr


def test_runs_and_logs_lie_where_they_are_told_to(tmp_path):
    job = write_job(tmp_path)
    call(tmp_path, "run", job, "--where", "process", "--runs", tmp_path / "else where/runs")
    assert list(tmp_path.glob("else where/runs/*/manifest.json"))
    assert (tmp_path / "else where/logs/stand-in_latest.log").is_file()
    assert not (tmp_path / "runs").exists()
    (listed,) = json.loads(
        call(tmp_path, "status", "--json", "--runs", tmp_path / "else where/runs").stdout
    )
    assert listed["job"] == "stand-in"


def test_overrides_and_the_sops_names_reach_the_job(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCH_SIZE", "6")
    monkeypatch.setenv("NUM_PRE_Q", "2")
    job = write_job(tmp_path)
    call(tmp_path, "run", job, "--where", "process", "--set", "steps=0", "--from-env")
    given = json.loads(next(tmp_path.glob("runs/*/job.json")).read_text())
    assert (given["steps"], given["rollout"]["prompts_per_step"]) == (0, 6)
    assert given["rollout"]["group_size"] == 2


def test_without_an_option_runs_lie_in_the_current_folder(tmp_path):
    argv = headroom("pass", "run", write_job(tmp_path), "--where", "process")
    subprocess.run(argv, cwd=tmp_path, check=True, capture_output=True)
    assert list(tmp_path.glob("runs/*/manifest.json"))
    assert (tmp_path / "logs/stand-in_latest.log").read_text() == "exit_status=0\n"


def test_five_mistakes_are_five_lines_and_nothing_is_left_behind(tmp_path):
    job = tmp_path / "bad.yaml"
    job.write_text(
        "nmae: x\nname: bad\naccelerator: v4-9\nmodel: tiny\nsteps: -1\n"
        "train: {learning_rate: fast}\nrollout: {top_p: 2}\n"
    )
    done = CliRunner().invoke(main, ["run", str(job), "--runs", str(tmp_path / "runs")])
    assert done.exit_code == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("Error: ") for line in lines)
    for word in ("nmae", "v4-9", "-1", "fast", "top_p"):
        assert word in done.stderr
    assert "Traceback" not in done.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("host", ["unix:///nowhere/docker.sock", "tcp://127.0.0.1:9", "nonsense"])
def test_a_daemon_that_does_not_answer_is_one_plain_error_with_the_way_out(tmp_path, host):
    command = headroom("pass", "run", write_job(tmp_path), "--where", "docker")
    argv = ["env", f"DOCKER_HOST={host}", *command]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: --where docker: no Docker daemon answers at ")
    assert line.endswith("or use --where process")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["show", "logs", "cancel"])
def test_a_run_that_is_not_there_is_one_line(tmp_path, command):
    done = CliRunner().invoke(main, [command, "nope", "--runs", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: no run 'nope'")
    assert len(done.stderr.splitlines()) == 1


def test_a_wrong_option_is_a_usage_error():
    assert CliRunner().invoke(main, ["run", "x.yaml", "--where", "moon"]).exit_code == 2


def test_a_broken_manifest_does_not_hide_the_other_runs(tmp_path):
    for _ in range(2):
        call(tmp_path, "run", write_job(tmp_path), "--where", "process")
    newest = max(tmp_path.glob("runs/*/manifest.json"))
    newest.write_text("{")
    done = call(tmp_path, "status", "--json")
    assert len(json.loads(done.stdout)) == 1
    assert str(newest) in done.stderr


def test_help_waits_for_neither_docker_nor_jax():
    code = (
        "import sys\n"
        "from runner.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "slow = {'docker', 'jax', 'pydantic', 'rich', 'requests'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_help_ends_with_an_example_of_its_command(name):
    command = main.commands[name]
    example = command.help.rpartition("\b")[2].split("\n")
    assert any(line.strip().startswith(f"headroom {name}") for line in example)
    shown = CliRunner().invoke(main, [name, "--help"])
    assert shown.exit_code == 0
    assert isinstance(command, click.Command)
    assert all(p.help for p in command.params if isinstance(p, click.Option))
