"""The image that docker/Dockerfile makes, on the stand-in base, in a real engine."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from docker_fixtures import REPOSITORY, Image

pytestmark = pytest.mark.docker


def python_in(image: Image, code: str, *options: str) -> str:
    return image.engine.docker(
        "run", "--rm", "--network=none", *options, "--entrypoint=python", image.tag, "-c", code
    )


def config(image: Image, tag: str) -> dict:
    return json.loads(image.engine.docker("image", "inspect", tag))[0]


def test_the_image_tells_its_commit_and_its_lock(headroom_image):
    labels = config(headroom_image, headroom_image.tag)["Config"]["Labels"]
    assert (
        labels["org.opencontainers.image.revision"].removesuffix("-dirty") == headroom_image.commit
    )
    lock = hashlib.sha256((REPOSITORY / "docker" / "trainer.txt").read_bytes()).hexdigest()
    assert labels["headroom.lock"] == lock


def test_a_container_starts_the_trainer_and_its_environment_configures_no_run(headroom_image):
    ours = config(headroom_image, headroom_image.tag)["Config"]
    assert ours["Entrypoint"] == ["python", "-m", "trainer"]
    names = {line.partition("=")[0] for line in ours["Env"]}
    of_base = {
        line.partition("=")[0]
        for line in config(headroom_image, headroom_image.base)["Config"]["Env"]
    }
    assert names - of_base == {"PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"}


def test_the_image_holds_every_locked_package_and_nothing_that_builds(headroom_image):
    lock = (REPOSITORY / "docker" / "trainer.txt").read_text()
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))
    found = python_in(
        headroom_image,
        "import importlib.metadata as m, json, re\n"
        "name = lambda d: re.sub('[-_.]+', '-', d.metadata['Name']).lower()\n"
        "print(json.dumps({name(d): d.version for d in m.distributions()}))",
    )
    installed = json.loads(found)
    assert installed.pop("headroom")
    # The base's own pip is in another prefix; uv and hatchling came by bind mount only.
    assert installed == locked
    assert (locked["jax"], locked["sglang-jax"], locked["flax"]) == ("0.8.2", "0.0.2", "0.12.0")


@pytest.mark.parametrize("user", ["0:0", "12345:54321"])
def test_any_user_runs_it_and_finds_bytecode_for_what_it_imports(headroom_image, user):
    """Without bytecode, which no such user may write, the imports take 2 to 4 times as long."""
    code = """
import os, sys, jax, flax.nnx, transformers, datasets, math_verify, jobs.spec
from sgl_jax.srt.entrypoints.engine import Engine
files = [m.__spec__.cached for m in list(sys.modules.values())
         if (getattr(m, "__file__", None) or "").startswith("/opt/headroom")
         and m.__file__.endswith(".py")]
bare = [name for name in files if not os.path.exists(name)]
total = jax.numpy.arange(4).sum()
print(os.getuid(), os.getgid(), total, jax.default_backend(), len(files) > 1000, bare[:3])
"""
    options = [
        "--read-only",
        "--tmpfs=/scratch:mode=1777",
        "--tmpfs=/tmp:mode=1777",
        f"--user={user}",
    ]
    options += ["--env=HOME=/scratch", "--env=JAX_PLATFORMS=cpu"]
    said = python_in(headroom_image, code, *options).splitlines()[-1]
    assert said == " ".join([*user.split(":"), "6", "cpu", "True", "[]"])


def test_a_change_of_code_builds_one_small_layer_and_keeps_the_dependencies(
    headroom_image, tmp_path: Path
):
    for name in ["docker", "jobs", "runner", "trainer"]:
        shutil.copytree(
            REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ["pyproject.toml", "README.md", ".dockerignore"]:
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "trainer" / "new_in_this_test.py").write_text("HERE = True\n")
    engine = headroom_image.engine
    changed = "headroom-test:changed"
    built = engine.run(
        tmp_path / "docker" / "build_image.sh", "cpu", headroom_image.base, changed, cwd=tmp_path
    )
    assert built.returncode == 0, built.stderr
    assert re.fullmatch(rf"{changed} sha256:[0-9a-f]{{64}} \d\.\d\d GiB", built.stdout.strip())
    try:
        before, after = config(headroom_image, headroom_image.tag), config(headroom_image, changed)
        assert after["RootFS"]["Layers"][:-1] == before["RootFS"]["Layers"][:-1]
        assert after["RootFS"]["Layers"][-1] != before["RootFS"]["Layers"][-1]
        assert abs(after["Size"] - before["Size"]) < 1_000_000
        # Not a clone: the label must say so rather than name a commit.
        assert after["Config"]["Labels"]["org.opencontainers.image.revision"] == "unknown"
    finally:
        engine.docker("image", "rm", "--force", changed)


def test_the_tpu_stage_adds_tpu_info_to_the_same_packages(headroom_image: Image):
    script = REPOSITORY / "docker" / "build_image.sh"
    tag = "headroom-test:tpu"
    built = headroom_image.engine.run(script, "tpu", headroom_image.base, tag)
    assert built.returncode == 0, built.stderr
    cpu, tpu = config(headroom_image, headroom_image.tag), config(headroom_image, tag)
    # All but the last layer of cpu, the project's wheel, are below those of tpu.
    shared = len(cpu["RootFS"]["Layers"]) - 1
    assert tpu["RootFS"]["Layers"][:shared] == cpu["RootFS"]["Layers"][:shared]
    assert tpu["Config"]["Entrypoint"] == cpu["Config"]["Entrypoint"]
    # No chips here: that it says so shows that it runs.
    assert "No TPU chips found" in headroom_image.engine.docker(
        "run", "--rm", "--network=none", "--entrypoint=tpu-info", tag
    )


def test_a_base_that_cannot_be_pulled_is_refused_with_the_ways_out(headroom_image):
    # A name that no resolver answers (RFC 2606), so nothing leaves the machine.
    script = REPOSITORY / "docker" / "build_image.sh"
    done = headroom_image.engine.run(
        script, "cpu", "registry.invalid/python:3.12", "headroom-test:none"
    )
    assert done.returncode == 1
    assert (
        "the base image registry.invalid/python:3.12 is not here and cannot be pulled"
        in done.stderr
    )
    assert "make image STAGE=cpu BASE=" in done.stderr
