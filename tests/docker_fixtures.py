"""Session fixtures that need Docker: an engine, the stand-in for the Python base image, our image.

pyproject.toml loads this file as a pytest plugin. Where the machine allows no engine, the tests
that use these fixtures are skipped with the reason that tests/docker_engine.sh gave.
"""

import fcntl
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

REPOSITORY = Path(__file__).resolve().parents[1]
ENGINE_DIR = REPOSITORY / ".cache" / "engine"
CANNOT = 3
"""Exit status by which both scripts say that this machine does not allow it."""

INTEGRATION = "_integration.py"
"""How files of tests end that have an engine, or other machines, to themselves."""

BUILD_TIMEOUT_S = 900
"""debootstrap and a cold build take 2 to 3 minutes on 2 quiet cores."""


@dataclass(frozen=True)
class Engine:
    """A Docker engine that answers; `host` is for DOCKER_HOST or the SDK's base_url."""

    host: str

    def run(self, *argv: str | Path, cwd: Path = REPOSITORY, timeout: float = BUILD_TIMEOUT_S):
        """Runs a command with DOCKER_HOST set; the result has text stdout and stderr."""
        return subprocess.run(
            ["env", f"DOCKER_HOST={self.host}", *map(str, argv)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def docker(self, *argv: str) -> str:
        """The output of a docker command that has to succeed."""
        done = self.run("docker", *argv)
        if done.returncode != 0:
            raise AssertionError(
                f"docker {' '.join(argv)}: {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout.strip()


@dataclass(frozen=True)
class Image:
    """The cpu stage, built from this working tree on the stand-in base."""

    engine: Engine
    tag: str
    """For a job: --set container.image=TAG."""
    base: str
    commit: str
    """HEAD when the build began."""


@contextmanager
def shared_engine() -> Iterator[Engine]:
    """The engine that answers or a private one, stopped when no other test session uses it."""
    ENGINE_DIR.mkdir(parents=True, exist_ok=True)
    with (ENGINE_DIR / "users").open("w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        yield Engine(script("docker_engine.sh", "start", str(ENGINE_DIR)))
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        script("docker_engine.sh", "stop", str(ENGINE_DIR))


def script(name: str, *argv: str) -> str:
    done = subprocess.run(
        [REPOSITORY / "tests" / name, *argv],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    return outcome(done)


def outcome(done: subprocess.CompletedProcess[str]) -> str:
    """The script's standard output; skips where it says that the machine cannot."""
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.strip())
    if done.returncode != 0:
        raise AssertionError(f"{done.args} ended with {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout.strip()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what uses these fixtures, and gives it the time that the first of them needs."""
    for item in items:
        if {"docker_engine", "headroom_image"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.docker)
            item.add_marker(pytest.mark.timeout(BUILD_TIMEOUT_S))
    # They take longest, and one after the other: see `Together`.
    items.sort(key=lambda item: not item.path.name.endswith(INTEGRATION))


class Together(LoadFileScheduling):
    """Side by side (pytest -n 2) a file stays in one process, and so do all integration tests.

    They share one engine, one /sys/fs/cgroup and one table of mounts.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return INTEGRATION if file.endswith(INTEGRATION) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    """What hands the tests to the processes."""
    return Together(config, log)


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[Engine]:
    with shared_engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def headroom_image(docker_engine: Engine) -> Image:
    """Builds base (once for an interpreter and script) and image (what changed of it)."""
    maker = REPOSITORY / "tests" / "stand_in_base.sh"
    made_of = hashlib.sha256(maker.read_bytes() + f"{sys.version} {sys.base_prefix}".encode())
    base = f"headroom-test/base:{made_of.hexdigest()[:12]}"
    if docker_engine.run("docker", "image", "inspect", base).returncode != 0:
        outcome(docker_engine.run(maker, base))
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    tag = "headroom-test:cpu"
    outcome(docker_engine.run(REPOSITORY / "docker" / "build_image.sh", "cpu", base, tag))
    return Image(docker_engine, tag, base, head.stdout.strip() or "unknown")
