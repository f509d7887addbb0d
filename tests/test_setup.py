"""Set-up, Makefile, locks and the Docker scripts, with stand-in programs and no network."""

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LOCKS = ["dev", "trainer", "tpu", "runner", "build", "conda"]
NEEDED = ["bash", "env", "cat", "sha256sum", "cut", "mkdir", "flock", "mktemp", "rm", "awk", "sed"]
NEEDED += ["dirname", "sort", "head", "touch", "cp", "ls", "realpath", "tr", "grep"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What set-up reads, alone in a folder with a space in its name."""
    root = tmp_path / "a clone"
    (root / "docker").mkdir(parents=True)
    for name in ["docker/setup_venv.sh", "docker/dev.txt", "pyproject.toml"]:
        shutil.copy(REPOSITORY / name, root / name)
    return root


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    """A PATH of its own: coreutils, and whatever interpreter and uv a test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in NEEDED:
        (folder / name).symlink_to(shutil.which(name) or pytest.fail(f"no {name} here"))
    return folder


def put(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)
    return path


def set_up(clone: Path, bin_dir: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(
                shutil.which("env") or "",
                "-i",
                f"PATH={bin_dir}",
                f"HOME={bin_dir.parent / 'home'}",
            ),
            *(str(clone / "docker" / "setup_venv.sh"), *argv),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def real_python_without_pip(bin_dir: Path) -> None:
    """This interpreter as Debian ships it: neither pip nor ensurepip."""
    real = Path(sys.base_prefix) / "bin" / "python3.12"
    put(
        bin_dir,
        "python3.12",
        f'case "$*" in *--without-pip*|-c*) exec {real} "$@";; *) exit 1;; esac',
    )


def stand_in_uv(bin_dir: Path, *, fails: bool = False) -> Path:
    """A uv that notes its arguments and installs a `headroom`."""
    calls = bin_dir.parent / "uv-calls"
    stops = 'case "$*" in *sync*) exit 2;; esac' if fails else ""
    # A copy of itself is as good a program as any to stand for the command.
    installs = f'case "$*" in *--editable*) cp {bin_dir}/uv .venv/bin/headroom;; esac'
    put(bin_dir, "uv", f'echo "$*" >>{calls}\n{stops}\n{installs}')
    return calls


def test_without_a_python_the_message_names_what_was_tried_and_the_ways_out(clone, bin_dir):
    done = set_up(clone, bin_dir)
    assert done.returncode == 1
    for text in [
        "CPython 3.12",
        "on the PATH",
        "apt-get install",
        "pyenv install 3.12",
        "uv python install 3.12",
    ]:
        assert text in done.stderr
    assert not (clone / ".venv").exists()


def test_a_python_that_was_named_is_used_or_refused_but_never_replaced(clone, bin_dir):
    real_python_without_pip(bin_dir)
    done = set_up(clone, bin_dir, "/nowhere/python3.12")
    assert done.returncode == 1
    assert "/nowhere/python3.12" in done.stderr
    assert "make setup PYTHON=" in done.stderr


def test_a_pyenv_shim_that_fails_is_passed_over_for_pyenvs_own_interpreter(clone, bin_dir):
    put(bin_dir, "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    versions = bin_dir.parent / "home" / ".pyenv" / "versions"
    chosen = put(versions / "3.12.9" / "bin", "python3.12", '[ "$1" = -c ]')
    done = set_up(clone, bin_dir)
    assert done.returncode == 1
    # It answers as CPython 3.12 and can do nothing else, so the message tells which one was taken.
    assert f"{chosen} has neither pip nor ensurepip" in done.stderr


def test_set_up_heals_after_a_failure_and_then_does_nothing_until_the_lock_changes(clone, bin_dir):
    real_python_without_pip(bin_dir)
    calls = stand_in_uv(bin_dir, fails=True)
    assert set_up(clone, bin_dir).returncode == 2
    assert not list(clone.glob(".venv/.stamp-*"))

    stand_in_uv(bin_dir)
    calls.unlink()
    done = set_up(clone, bin_dir)
    assert done.returncode == 0, done.stderr
    sync, install = calls.read_text().splitlines()
    assert "--require-hashes" in sync
    assert sync.endswith("docker/dev.txt")
    assert "--no-deps" in install
    assert install.endswith("--editable .")
    assert not list(clone.glob(".cache/setup.*/")), "scratch folders are left over"

    calls.unlink()
    again = set_up(clone, bin_dir)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert not calls.exists()

    with (clone / "docker" / "dev.txt").open("a") as lock:
        lock.write("# changed\n")
    assert set_up(clone, bin_dir).returncode == 0
    assert "sync" in calls.read_text()
    assert len(list(clone.glob(".venv/.stamp-*"))) == 1


def test_a_moved_clone_is_set_up_anew(clone, bin_dir):
    real_python_without_pip(bin_dir)
    calls = stand_in_uv(bin_dir)
    assert set_up(clone, bin_dir).returncode == 0
    moved = clone.rename(clone.with_name("moved"))
    calls.unlink()
    assert set_up(moved, bin_dir).returncode == 0
    assert calls.exists(), "scripts in .venv/bin name the old folder"


def make(*argv: str) -> str:
    return subprocess.run(
        ["make", "--no-print-directory", *argv],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def test_make_alone_lists_every_target_with_what_it_does():
    phony = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert phony
    listed = re.findall(r"^  make (\S+) +\S.*$", make(), re.MULTILINE)
    assert sorted(listed) == sorted(phony[1].split())


def test_make_passes_job_stage_and_arguments_on():
    smoke = make("-n", "smoke", "JOB=jobs/x.yaml", "ARGS=--set steps=0")
    assert (
        smoke.splitlines()[-1] == ".venv/bin/headroom run jobs/x.yaml --where process --set steps=0"
    )
    assert make("-n", "image", "STAGE=tpu", "BASE=b:1").strip() == "docker/build_image.sh tpu b:1"


@pytest.mark.parametrize(
    ("argv", "runs"),
    [
        (["deploy", "ARGS=--check"], "inventory/hosts.yaml --limit 'w0' deploy.yml --check"),
        (["logs", "INVENTORY=inventory/gcloud.py"], "inventory/gcloud.py --limit 'w0' fetch.yml"),
        (["smoke"], "inventory/hosts.yaml --limit 'w0' smoke.yml"),
        (["smoke", "JOB=jobs/x.yaml"], "--limit 'w0' smoke.yml -e 'run_job_file=jobs/x.yaml'"),
    ],
)
def test_with_a_host_the_playbooks_run_there(argv, runs):
    command = make("-n", *argv, "HOST=w0").splitlines()[-1].rstrip()
    assert command.startswith("cd ansible && ../.venv/bin/ansible-playbook -i inventory/")
    assert command.endswith(runs)


@pytest.mark.parametrize("target", ["deploy", "logs"])
def test_without_a_host_nothing_is_deployed_or_fetched(target):
    argv = ["make", "-n", target]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"HOST is empty: make {target} HOST=" in done.stderr


def pins(name: str) -> dict[str, str]:
    text = (REPOSITORY / "docker" / f"{name}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_all_that_is_asked_for_by_hash_and_names_no_host(name):
    text = (REPOSITORY / "docker" / f"{name}.txt").read_text()
    assert "://" not in text
    assert "--index" not in text
    blocks = re.split(r"\n(?=\S)", text)
    assert [block.split()[0] for block in blocks if "--hash=sha256:" not in block] == []
    asked = re.findall(
        r"^([\w-]+)", (REPOSITORY / "docker" / f"{name}.in").read_text(), re.MULTILINE
    )
    asked = {word.lower() for word in asked} - {"-r"}
    assert asked <= set(pins(name))


def test_the_locks_agree_with_each_other_and_hold_what_the_engine_needs():
    dev = pins("dev")
    for name in ["trainer", "runner", "build", "conda"]:
        assert pins(name).items() <= dev.items(), name
    for name, version in pins("tpu").items():
        assert dev.get(name, version) == version
    # 0.12.1 and later break the engine; the old msgpack overwrites the new one's files.
    assert (dev["flax"], dev["jax"], dev["sglang-jax"]) == ("0.12.0", "0.8.2", "0.0.2")
    assert "msgpack-python" not in dev


def test_an_engine_that_is_not_ours_is_never_stopped(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as bystander:
        try:
            (tmp_path / "pid").write_text(str(bystander.pid))
            script = REPOSITORY / "tests" / "docker_engine.sh"
            subprocess.run([script, "stop", tmp_path], check=True, timeout=30)
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_where_no_engine_can_be_started_the_reason_and_a_status_of_3_are_given(bin_dir, tmp_path):
    # The script looks into /usr/sbin by itself, so it is the account that must not allow it.
    put(bin_dir, "id", "echo 1000")
    argv = [
        shutil.which("env") or "",
        "-i",
        f"PATH={bin_dir}",
        str(REPOSITORY / "tests" / "docker_engine.sh"),
    ]
    done = subprocess.run(
        [*argv, "start", str(tmp_path / "engine")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert "only root can start one" in done.stderr


def build(bin_dir: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            shutil.which("env") or "",
            f"PATH={bin_dir}:{os.defpath}",
            REPOSITORY / "docker" / "build_image.sh",
            *argv,
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("docker", "argv", "says"),
    [
        ("exit 0", ["gpu"], ["STAGE is 'gpu'", "cpu, tpu"]),
        ("exit 1", ["cpu"], ["no Docker engine answers", "systemctl start docker", "DOCKER_HOST"]),
        (
            'case "$1 $2" in info*) ;; version*) echo 20.10.24;; *) exit 1;; esac',
            ["cpu", "mirror/py:3.12"],
            ["the base image mirror/py:3.12 is not here", "BASE=", "docker load"],
        ),
    ],
)
def test_an_image_that_cannot_be_built_is_refused_with_the_way_out(bin_dir, docker, argv, says):
    put(bin_dir, "docker", docker)
    done = build(bin_dir, *argv)
    assert (done.returncode, done.stdout) == (1, "")
    for text in says:
        assert text in done.stderr


def test_the_image_is_built_of_the_stage_base_commit_and_lock_it_is_labelled_with(
    bin_dir, tmp_path
):
    noted = tmp_path / "noted"
    put(
        bin_dir,
        "docker",
        f"""case "$1 $2" in
          version*) echo 20.10.24;;
          buildx*) exit 1;;
          build*) printf '%s\\n' "$DOCKER_BUILDKIT" "$@" >{noted};;
          'image inspect') case "$*" in *--format*) echo sha256:1 2147483648;; esac;;
        esac""",
    )
    done = build(bin_dir, "tpu", "mirror/py:3.12", "t:1")
    assert (done.returncode, done.stdout) == (0, "t:1 sha256:1 2.00 GiB\n"), done.stderr
    buildkit, *argv = noted.read_text().splitlines()
    assert buildkit == "1"
    after = dict(itertools.pairwise(argv))
    assert (after["--target"], after["--tag"], argv[-1]) == ("tpu", "t:1", ".")
    locks = [REPOSITORY / "docker" / name for name in ("trainer.txt", "tpu.txt")]
    lock = hashlib.sha256(b"".join(path.read_bytes() for path in locks)).hexdigest()
    assert {"BASE=mirror/py:3.12", f"LOCK={lock}"} <= set(argv)
    assert [word for word in argv if re.fullmatch(r"COMMIT=([0-9a-f]{40}(-dirty)?|unknown)", word)]
