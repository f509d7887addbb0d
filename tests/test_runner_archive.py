import hashlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fakes import write_job

from jobs.records import ExitStatus
from jobs.spec import load
from runner import archive
from runner.provenance import Checkout, checkout, host, installed_packages

CODE = Checkout(commit="15154fc0a1b2c3d4e5f60718293a4b5c6d7e8f90", dirty=False)
DONE = ExitStatus(code=0, reason="done")
HOSTILE = ["plain", "with space", "quo'te\"s", "new\nline", "-rf $HOME ; `true` %s", "ünïcode"]


def create(folder, *, name="smoke", code=CODE):
    job = load(write_job(folder, name=name))
    return archive.create(job, verb="train", where="process", runs=folder / "runs", code=code)


def test_a_run_is_named_by_time_job_and_commit_and_so_is_its_log(tmp_path):
    with create(tmp_path) as run:
        manifest = run.finish(DONE)
    assert re.fullmatch(r"\d{8}-\d{6}-smoke-15154fc", run.name)
    assert run.path == tmp_path / "runs" / run.name
    stamp = run.name[:15]
    assert (tmp_path / "logs" / f"smoke_15154fc_{stamp}.log").read_text() == "exit_status=0\n"
    assert manifest.created.replace("-", "").replace(":", "")[:15] == stamp.replace("-", "T")


def test_outside_a_checkout_the_name_says_nogit(tmp_path):
    with create(tmp_path, code=Checkout(commit=None, dirty=None)) as run:
        assert run.name.endswith("-smoke-nogit")


def test_runs_of_one_second_get_numbers_and_logs_of_their_own(tmp_path):
    # Ten take far less than a second each; so at least two share one.
    names, logs = [], []
    for _ in range(10):
        with create(tmp_path) as run:
            names.append(run.name)
            logs.append(archive.archived_log(run, run.manifest()))
            run.finish(DONE)
    assert len(set(names)) == len(set(logs)) == 10
    assert any(name.endswith("-smoke-15154fc-2") for name in names)
    assert all(log.is_file() for log in logs)
    assert [run.name for run in archive.all_runs(tmp_path / "runs")] == names[::-1]


def test_the_latest_log_can_be_read_while_the_run_goes_on_and_after(tmp_path):
    latest = tmp_path / "logs" / "smoke_latest.log"
    with create(tmp_path) as first:
        first.log_file.write_text("first\n")
        assert latest.read_text() == "first\n"
        first.finish(DONE)
    with create(tmp_path) as second:
        with second.log_file.open("a") as log:
            log.write("second\n")
        assert latest.read_text() == "second\n"
    assert latest.is_symlink()
    assert not latest.readlink().is_absolute()


def test_a_log_that_cannot_be_linked_is_copied_at_the_end(tmp_path):
    with create(tmp_path) as run:
        run.log_file.write_text("kept\n")
        archived = archive.archived_log(run, run.manifest())
        archived.unlink()
        # What is left at the start where the file system has no hard links.
        archived.symlink_to(os.path.relpath(run.log_file, run.logs))
        run.finish(DONE)
    assert not archived.is_symlink()
    assert not archived.samefile(run.log_file)
    assert archived.read_text() == "kept\nexit_status=0\n"


@pytest.mark.parametrize("log", [b"", b"a\n", b"no newline at the end", b"\xff\xfe\n"])
def test_the_last_line_is_the_exit_status_whatever_stands_before(tmp_path, log):
    with create(tmp_path) as run:
        run.log_file.write_bytes(log)
        manifest = run.finish(ExitStatus(code=134, signal="SIGABRT", reason="failed"))
        again = run.finish(DONE)
    written = run.log_file.read_bytes()
    assert written.startswith(log)
    assert written.splitlines()[-1] == b"exit_status=134"
    assert written.count(b"exit_status=") == 1
    assert manifest == again == run.manifest()
    summed = subprocess.run(["sha256sum"], input=written, capture_output=True, check=True)
    assert manifest.log_sha256 == summed.stdout.split()[0].decode()
    assert manifest.state == "finished"


def test_a_finisher_that_died_after_the_last_line_is_followed_by_one_that_does_not_repeat_it(
    tmp_path,
):
    with create(tmp_path) as run:
        run.log_file.write_bytes(b"a\nexit_status=0\n")
        run.finish(DONE)
    assert run.log_file.read_bytes() == b"a\nexit_status=0\n"


def test_a_lost_run_has_no_number_in_its_log(tmp_path):
    with create(tmp_path) as run:
        manifest = run.finish(ExitStatus(code=255, reason="lost"))
    assert run.log_file.read_text() == "exit_status=lost\n"
    assert manifest.state == "lost"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_folder_of_any_name_holds_runs_and_logs(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    with create(folder) as run:
        run.finish(DONE)
    assert archive.find(folder / "runs", "latest") == run
    assert archive.find(Path("elsewhere"), str(run.path)) == run
    assert (folder / "logs" / "smoke_latest.log").read_text() == "exit_status=0\n"


def test_the_job_stands_in_the_run_whole_and_its_sum_in_the_manifest(tmp_path):
    with create(tmp_path) as run:
        text = run.job_file.read_bytes()
        assert load(run.job_file) == load(tmp_path / "job.yaml")
        assert run.manifest().job_sha256 == hashlib.sha256(text).hexdigest()


def test_a_run_is_found_by_name_beginning_path_and_latest(tmp_path):
    runs = tmp_path / "runs"
    with create(tmp_path, name="aa") as first:
        pass
    with create(tmp_path, name="bb") as second:
        pass
    assert archive.find(runs, "latest") == second
    assert archive.find(runs, first.name) == first
    assert archive.find(runs, f"{first.name[:16]}aa") == first
    assert archive.find(runs, f"{second.path}/") == second


@pytest.mark.parametrize("name", ["", ".", "..", "../runs", "nope", "2", "/", "latest\n", "*"])
def test_what_names_no_run_or_two_is_refused_with_what_is_there(tmp_path, name):
    with create(tmp_path, name="aa") as run, create(tmp_path, name="bb"):
        pass
    with pytest.raises(archive.NoSuchRunError, match=re.escape(run.name)):
        archive.find(tmp_path / "runs", name)


def test_no_runs_at_all_is_said_plainly(tmp_path):
    with pytest.raises(archive.NoSuchRunError, match="none yet"):
        archive.find(tmp_path / "runs", "latest")


def test_a_manifest_that_is_none_is_named(tmp_path):
    with create(tmp_path) as run:
        run.manifest_file.write_text("{}")
    with pytest.raises(archive.NoSuchRunError, match=r"manifest\.json cannot be read"):
        run.manifest()


def test_a_run_is_held_until_its_holder_is_gone_even_by_sigkill(tmp_path):
    with create(tmp_path) as run, run.held() as ours:
        assert not ours
    program = (
        "import os, signal, sys, pathlib\n"
        "from runner.archive import RunDir\n"
        "with RunDir(pathlib.Path(sys.argv[1])).held() as ours:\n"
        "    print(ours, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"True\n"
    with run.held() as ours:
        assert not ours
    holder.kill()
    holder.communicate()
    with run.held() as ours:
        assert ours


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "record.json"
    texts = [letter * 100_000 for letter in "ab"]
    archive.write_whole(path, texts[0])
    seen = set()
    writers_done = threading.Event()

    def read():
        while not writers_done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20):
        archive.write_whole(path, texts[number % 2])
    writers_done.set()
    reader.join()
    assert seen <= set(texts)
    assert list(tmp_path.iterdir()) == [path]


def git(folder, *arguments):
    argv = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", folder, *arguments]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def test_the_checkout_tells_commit_and_changes(tmp_path):
    assert checkout(tmp_path) == Checkout(commit=None, dirty=None)
    git(tmp_path, "init", "-q")
    assert checkout(tmp_path) == Checkout(commit=None, dirty=None)
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert checkout(tmp_path) == Checkout(commit=head, dirty=False)
    (tmp_path / "new").write_text("1")
    assert checkout(tmp_path) == Checkout(commit=head, dirty=True)
    (tmp_path / "new").unlink()
    (tmp_path / "a").write_text("2")
    assert checkout(tmp_path) == Checkout(commit=head, dirty=True)
    (tmp_path / "inside").mkdir()
    assert checkout(tmp_path / "inside") == Checkout(commit=None, dirty=None)


def test_the_machine_and_its_packages_are_told_as_the_system_tells_them():
    told = host()
    meminfo = Path("/proc/meminfo").read_text()
    assert told["ram_bytes"] == int(re.search(r"MemTotal: +(\d+) kB", meminfo).group(1)) * 1024
    assert told["cpus"] == os.cpu_count()
    assert (
        told["name"]
        == subprocess.run(
            ["uname", "-n"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    uv = Path(sys.executable).with_name("uv")
    argv = [uv, "pip", "list", "--format=freeze", "--python", sys.executable]
    listed = subprocess.run(argv, capture_output=True, text=True, check=True)
    expected = dict(line.split("==") for line in listed.stdout.splitlines() if "==" in line)
    assert installed_packages() == {
        re.sub("[-_.]+", "-", k).lower(): v for k, v in expected.items()
    }
