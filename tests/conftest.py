"""Fixtures of more than one test file."""

import os
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

# Before any test file imports JAX: four virtual devices to lay meshes on, never an accelerator that
# happens to be here, and programs compiled once for all runs of the tests.
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two processes of tests may compile for TPU at once
}.items():
    os.environ.setdefault(name, value)  # noqa: TID251


@pytest.fixture(scope="session")
def docker_client(docker_engine) -> Iterator[docker.DockerClient]:
    """A client of the engine that tests/docker_fixtures.py found or started."""
    client = docker.DockerClient(base_url=docker_engine.host)
    yield client
    client.close()
