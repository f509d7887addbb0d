"""Fixtures of more than one test file."""

from collections.abc import Iterator

import pytest

import docker


@pytest.fixture(scope="session")
def docker_client(docker_engine) -> Iterator[docker.DockerClient]:
    """A client of the engine that tests/docker_fixtures.py found or started."""
    client = docker.DockerClient(base_url=docker_engine.host)
    yield client
    client.close()
