"""The programs of ansible/roles, each by itself: with real processes, real locks and real files."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.records import Diagnosis, ExitStatus, Manifest

ROLES = Path(__file__).resolve().parents[1] / "ansible" / "roles"


def load(role: str, name: str):
    path = ROLES / role / "files" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{role}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


host_check = load("tpu_vm", "host_check")
conda_env = load("conda", "conda_env")
ship_image = load("headroom", "ship_image")
verdict = load("run_job", "verdict")


@pytest.fixture
def wanted(tmp_path):
    """A host that asks for nothing, with a lock file of its own."""
    root, lock = str(tmp_path / "root"), str(tmp_path / "libtpu_lockfile")
    return host_check.Wanted(root=root, lock=lock, systems=("debian", "ubuntu"))


@pytest.fixture
def start():
    """Starts a program and waits until it says that it is ready; it ends with the test."""
    made = []

    def begin(*argv: str) -> subprocess.Popen[str]:
        made.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
        assert made[-1].stdout.readline() == "ready\n"
        return made[-1]

    yield begin
    for process in made:
        process.kill()
        process.communicate()


def locker(path: str, how: str) -> list[str]:
    code = (
        f"import fcntl, time; f = open({path!r}, 'w'); {how}; "
        "print('ready', flush=True); time.sleep(60)"
    )
    return [sys.executable, "-c", code]


def test_a_posix_lock_names_its_holder_and_a_flock_is_none(wanted, start):
    path = Path(wanted.lock)
    assert host_check.lock_state(path) == {"exists": False, "held_by": None}
    start(*locker(wanted.lock, "fcntl.flock(f, fcntl.LOCK_EX)"))
    assert host_check.lock_state(path) == {"exists": True, "held_by": None}
    holder = start(*locker(wanted.lock, "fcntl.lockf(f, fcntl.LOCK_EX)"))
    assert host_check.lock_state(path) == {"exists": True, "held_by": holder.pid}


def test_a_foreign_holder_is_told_by_pid_and_command_and_its_file_is_left(wanted, start):
    holder = start(*locker(wanted.lock, "fcntl.lockf(f, fcntl.LOCK_EX)"))
    told = host_check.free(wanted)
    [problem] = told["problems"]
    assert f"process {holder.pid} ({sys.executable} -c import fcntl" in problem
    assert f"holds {wanted.lock} and is not ours" in problem
    assert told["changed"] == []
    assert Path(wanted.lock).exists()
    assert holder.poll() is None
    assert host_check.remove_stale_lock(Path(wanted.lock)).startswith("left ")
    assert Path(wanted.lock).exists()


def test_the_file_of_a_dead_holder_is_removed_and_a_check_only_says_so(wanted, start):
    holder = start(*locker(wanted.lock, "fcntl.lockf(f, fcntl.LOCK_EX)"))
    holder.kill()
    holder.wait()
    assert host_check.would(wanted)["changed"] == [f"would remove {wanted.lock}"]
    assert Path(wanted.lock).exists()
    assert host_check.free(wanted)["changed"] == [f"removed {wanted.lock}, which no process held"]
    assert not Path(wanted.lock).exists()
    assert host_check.free(wanted)["changed"] == []


@pytest.mark.parametrize(
    ("argv", "ours"),
    [
        (["/env/bin/python3.12", "-P", "-m", "trainer", "train", "{jobs}/a/runs/r/job.json"], True),
        (["python", "-P", "-m", "trainer", "plan", "{jobs}/a/runs/r/job.json"], True),
        (["tail", "-P", "-m", "trainer", "train", "{jobs}/a/runs/r/job.json"], False),
        (["python", "-c", "import", "trainer", "train", "{jobs}/a/runs/r/job.json"], False),
        (["python", "-m", "trainer", "train", "{jobs}/a/runs/r/job.json"], False),
        (["python", "-P", "-m", "trainer", "train", "/home/other/job.json"], False),
        (["python", "-P", "-m", "trainer", "train", "{jobs}/../../other/job.json"], False),
        (["python", "-P", "-m", "trainer", "train", "{jobs}/a/job.json", "more"], False),
        (["vim", "{jobs}/a/runs/r/job.json"], False),
        ([], False),
    ],
)
def test_ours_is_the_exact_argument_vector_and_nothing_like_it(wanted, argv, ours):
    words = [word.replace("{jobs}", f"{wanted.root}/jobs") for word in argv]
    assert host_check.is_our_trainer(words, wanted) is ours


def test_a_trainer_of_ours_is_stopped_and_a_process_that_only_names_its_job_is_not(
    wanted, start, tmp_path
):
    job = Path(wanted.root) / "jobs" / "x" / "runs" / "r" / "job.json"
    job.parent.mkdir(parents=True)
    job.touch()
    # A package named trainer, so that the argument vector is the real one.
    package = tmp_path / "site"
    package.mkdir()
    (package / "trainer.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    argv = [sys.executable, "-P", "-m", "trainer", "train", str(job)]
    ours = start("env", f"PYTHONPATH={package}", *argv)
    bystander = start("sh", "-c", f"echo ready; exec tail -f {job}")
    told = host_check.look(wanted)
    assert [holder["pid"] for holder in told["ours"]] == [ours.pid]
    assert host_check.free(wanted)["changed"] == [f"stopped process {ours.pid}"]
    assert ours.wait(timeout=10) == -15
    assert bystander.poll() is None


def test_what_a_machine_lacks_is_told_in_numbers(tmp_path, wanted):
    asked = host_check.Wanted(
        root=wanted.root, lock=wanted.lock, systems=("plan9",), ram_gib=1e6, chips=4,
        devices=(str(tmp_path / "accel*"),), disk_gib={str(tmp_path / "not" / "there"): 1e9},
        open_files=2**40, now=time.time() - 3600,
    )  # fmt: skip
    found = "\n".join(host_check.look(asked)["problems"])
    system = host_check.facts(asked)["system"]
    for words in (
        f"the system is {system}; known: plan9",
        "1e+06 wanted (tpu_vm_ram_gib)",
        "0 device files of chips",
        "1e+09 wanted: free some",
        "open files is",
    ):
        assert words in found, words
    [skew] = re.findall(r"its clock differs by (\S+) s from the controller's, 30 allowed", found)
    assert 3600 <= float(skew) < 3700  # a slow machine adds its own
    (tmp_path / "accel0").touch()
    with (tmp_path / "accel0").open():
        told = host_check.holders(asked)
    [mine] = [h for h in told["foreign"] if h["what"] == [str(tmp_path / "accel0")]]
    assert mine["pid"] == os.getpid()


def test_look_prints_json_of_any_python_from_3_10(wanted):
    argv = [sys.executable, "-I", str(ROLES / "tpu_vm" / "files" / "host_check.py"), "look"]
    asked = json.dumps({"root": wanted.root, "lock": wanted.lock})
    done = subprocess.run([*argv, asked], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["lock"] == {"exists": False, "held_by": None}


def environment(prefix: Path, version: str | None) -> None:
    (prefix / "conda-meta").mkdir(parents=True)
    if version is not None:
        (prefix / "conda-meta" / f"python-{version}-h1_0_cpython.json").write_text("{}")
        (prefix / "conda-meta" / "python-dateutil-2.9-0.json").write_text("{}")


def asked_for(prefix: Path):
    return conda_env.Wanted(
        prefix=str(prefix), channels=[], packages=[], python="3.12", cache=str(prefix / "cache")
    )


def test_an_environment_is_absent_unfinished_or_whole(tmp_path):
    prefix = tmp_path / "miniconda3" / "envs" / "mllm-jax"
    assert conda_env.look(asked_for(prefix)) == {"state": "absent", "python": None}
    environment(prefix, "3.12.12")
    assert conda_env.look(asked_for(prefix)) == {"state": "whole", "python": "3.12.12"}
    (prefix / "conda-meta" / conda_env.UNFINISHED).touch()
    assert conda_env.look(asked_for(prefix))["state"] == "unfinished"


@pytest.mark.parametrize(
    ("version", "says"), [("3.11.4", "has Python 3.11.4, 3.12 wanted"), (None, "has Python none")]
)
def test_an_environment_of_somebody_else_is_never_replaced(tmp_path, version, says):
    environment(tmp_path / "env", version)
    with pytest.raises(conda_env.TakenError, match=says):
        conda_env.look(asked_for(tmp_path / "env"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").touch()
    with pytest.raises(conda_env.TakenError, match="no conda environment"):
        conda_env.look(asked_for(tmp_path / "folder"))


def test_ssh_gets_every_option_as_one_word():
    to = ship_image.To(
        address="10.0.0.9", options="-o UserKnownHostsFile='/a b/known' -o BatchMode=yes",
        user="me", port="2222", key="/k e y",
    )  # fmt: skip
    assert ship_image.ssh_argv(to, ["docker", "load"]) == [
        *("ssh", "-o", "UserKnownHostsFile=/a b/known", "-o", "BatchMode=yes"),
        *("-l", "me", "-p", "2222", "-i", "/k e y", "--", "10.0.0.9", "sudo -n docker load"),
    ]


@pytest.mark.parametrize(("save", "load"), [(0, 0), (3, 0), (0, 4)])
def test_an_image_is_shipped_by_its_id_and_only_where_both_ends_say_so(
    tmp_path, monkeypatch, save, load
):
    """Programs in the place of docker and ssh: the one writes, the other reads all of it."""
    there = (
        f'case "$4" in *load*) cat >{tmp_path}/got; echo Loaded image ID: sha256:12; exit {load};; '
        f'*) echo "$4" >>{tmp_path}/tagged;; esac'
    )
    here = f'case "$1" in save) echo image of $2; exit {save};; *) echo sha256:12;; esac'
    for name, script in {"docker": here, "ssh": there}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    send = lambda: ship_image.ship("headroom:cpu", "headroom:cpu-abc", ship_image.To("vm", "-4"))
    if save or load:
        with pytest.raises(ship_image.NotShippedError, match=str(save + load)):
            send()
        assert not (tmp_path / "tagged").exists()
        return
    send()
    assert (tmp_path / "got").read_text() == "image of sha256:12\n"
    tagged = (tmp_path / "tagged").read_text()
    assert tagged == "sudo -n docker tag sha256:12 headroom:cpu-abc\n"


def ended(folder: Path, worker: str, code: int, reason: str, second: int) -> Path:
    run = folder / worker / "runs" / "20261123-000000-x-abc"
    run.mkdir(parents=True)
    manifest = Manifest(
        run=run.name, job="x", job_sha256="0", verb="train", state="finished", where="docker",
        command=[], commit=None, dirty=None, packages={}, host={}, created="2026-11-23T00:00:00Z",
        finished=f"2026-11-23T00:00:{second:02}Z", exit_status=ExitStatus(code=code, reason=reason),
    )  # fmt: skip
    (run / "manifest.json").write_text(manifest.model_dump_json())
    (run / "run.log").write_text(f"step=0\nexit_status={code}\n")
    return run


def told(folder: Path, *workers: str) -> list[str]:
    return verdict.lines([verdict.end_of(folder, worker) for worker in workers])


def test_the_first_cause_is_of_who_failed_first_and_not_of_who_was_stopped(tmp_path):
    ended(tmp_path, "w0", 143, "interrupted", 10)
    run = ended(tmp_path, "w1", 70, "failed", 20)
    ended(tmp_path, "w2", 1, "failed", 30)
    diagnosis = Diagnosis(
        cause="disk_full", confidence="certain", explanation="The disk is full.",
        root_line="OSError: [Errno 28]", line=7, evidence=[], numbers={}, advice=[],
        retry="after_clean_up",
    )  # fmt: skip
    (run / "diagnosis.json").write_text(diagnosis.model_dump_json())
    said = told(tmp_path, "w0", "w1", "w2")
    assert said[0].startswith("w0: exit_status=143 interrupted, ")
    assert said[3:] == [
        "w1: disk_full: The disk is full.",
        "w1:   OSError: [Errno 28]",
        "failed: 0 of 3 workers ended with exit_status=0; w1 was first",
    ]


def test_all_workers_must_end_with_0(tmp_path):
    ended(tmp_path, "w0", 0, "done", 1)
    ended(tmp_path, "w1", 0, "done", 1)
    assert told(tmp_path, "w0", "w1")[-1] == "exit_status=0 on 2 of 2 workers"
    (tmp_path / "w2").mkdir()
    (tmp_path / "w2" / "runner.log").write_text("Error: no such image\n")
    said = told(tmp_path, "w0", "w1", "w2", "w3")
    assert said[2:4] == ["w2: was not started", "w3: nothing was fetched"]
    assert said[4:] == [
        "w2: Error: no such image",
        "failed: 2 of 4 workers ended with exit_status=0; w2 was first",
    ]


def test_the_playbooks_pass_ansible_lints_production_profile():
    """Here and not in `make check`: it takes 45 s of a core."""
    lint = [str(Path(sys.executable).with_name("ansible-lint")), "--offline", "--nocolor"]
    done = subprocess.run(
        [*lint, "-c", ".ansible-lint.yaml", "ansible"],
        cwd=ROLES.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
