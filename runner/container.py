"""A job in a Docker container: what it is given, how it is started, followed and removed.

Nothing is built or pulled here. The daemon keeps the container's log and we copy it; `attach` is
never used, as a slow reader would stall the job, and the log is never rotated, as a follower would
lose lines.

Values of `container.pass_env` go to the daemon in its API call and nowhere else. As with any
container, whoever may talk to that daemon can read them back (`docker inspect`).
"""

import contextlib
import io
import os
import re
import tarfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import docker
from docker import DockerClient
from docker.errors import DockerException, ImageNotFound, NotFound
from docker.models.containers import Container

from jobs.contradictions import BIND
from jobs.records import JOB_FILE, Manifest
from jobs.spec import Job
from runner.archive import RunDir, now
from runner.chips import LABEL
from runner.container_task import ContainerTask
from runner.provenance import NO_COMMIT

# docker/Dockerfile installs these, and nothing else, into the trainer's environment.
_LOCKS = "/opt/locks"
_LOCKED = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)", re.MULTILINE)
_REVISION = "org.opencontainers.image.revision"
# A daemon's own default may rotate logs; only a size of its own keeps json-file from it. It
# replaces bytes that are no UTF-8; `local` keeps them, but loses ends of very long lines (20.10).
_NO_ROTATION = {"type": "json-file", "config": {"max-size": "1p"}}
_PING_S = 10
# A busy daemon makes a container of a large image in tens of seconds.
_START_S = 300


class NoDaemonError(Exception):
    """No Docker daemon answers."""


class NoImageError(Exception):
    """The daemon has no such image."""


class NotStartedError(Exception):
    """The daemon would not start the container."""


def connect() -> DockerClient:
    """A client of the daemon that DOCKER_HOST names, or the machine's own.

    Raises:
        NoDaemonError: it does not answer; the message says where it was looked for.
    """
    client = None
    try:
        client = docker.from_env(timeout=_PING_S)
        client.ping()
    except (DockerException, OSError) as error:
        where = client.api.base_url if client else "DOCKER_HOST or /var/run/docker.sock"
        raise NoDaemonError(f"no Docker daemon answers at {where}") from error
    return client


def image_revision(client: DockerClient, job: Job) -> str:
    """The commit that the job's image was built from, "unknown" where the image does not tell.

    Raises:
        NoImageError: there is no such image; the message has the command that makes it.
    """
    try:
        image = client.images.get(job.image)
    except ImageNotFound as error:
        how = f"make it with: make image STAGE={job.target.platform}"
        if job.container.image is not None:
            how = f"pull or build {job.image}, or leave container.image out"
        raise NoImageError(f"Docker has no image {job.image}; {how}") from error
    return image.labels.get(_REVISION, "unknown")


def cache_folders(job: Job) -> list[Path]:
    """Folders of this machine that the container writes and that must be there before."""
    return [Path(job.cache_dir), Path(job.cache_dir) / "huggingface"]


def name_of(run_dir: Path) -> str:
    """What a run's container is called."""
    return f"headroom-{run_dir.name}"


def container_options(
    job: Job,
    run_dir: Path,
    *,
    manifest: Manifest,
    user: tuple[int, int],
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """What `docker.containers.create` is given for a job.

    Args:
        job: the job.
        run_dir: absolute; it has the same path inside.
        manifest: of the run, for verb, name and commit.
        user: uid and gid that own the run directory.
        environment: variables of this machine that the job may see, with their values.
    """
    c = job.container
    uid, gid = user
    options: dict[str, Any] = {
        "image": job.image,
        "command": [manifest.verb, str(run_dir / JOB_FILE)],
        "name": name_of(run_dir),
        "user": f"{uid}:{gid}",
        "mounts": _mounts(job, run_dir),
        "devices": [f"{path}:{path}:rwm" for path in _devices(job)],
        "ulimits": _ulimits(job),
        "shm_size": int(c.shm_gib * 2**30),
        "network_mode": c.network,
        "privileged": c.privileged,
        # No set-uid program of an image makes the job more than its user.
        "security_opt": [] if c.privileged else ["no-new-privileges"],
        # Without an init the trainer is PID 1, for which SIGTERM does nothing by default.
        "init": True,
        "log_config": _NO_ROTATION,
        "labels": {
            **({} if job.target.platform == "cpu" else {LABEL: job.accelerator}),
            "headroom": "1",
            "headroom.run": run_dir.name,
            "headroom.run_dir": str(run_dir),
            "headroom.job": job.name,
            "headroom.commit": manifest.commit or NO_COMMIT,
        },
        "environment": {
            # The user has no home in the image. What is written there goes with the container.
            "HOME": "/tmp",  # noqa: S108
            "USER": "headroom",
            "PYTHONUNBUFFERED": "1",
            "HF_HOME": str(Path(job.cache_dir) / "huggingface"),
            **environment,
        },
    }
    if c.memory_gib is not None:
        limit = int(c.memory_gib * 2**30)
        # The same limit for memory and swap together: no swap.
        options |= {"mem_limit": limit, "memswap_limit": limit}
    return options


def _devices(job: Job) -> tuple[str, ...]:
    return job.target.device_files if job.container.devices is None else job.container.devices


def _ulimits(job: Job) -> list[dict[str, Any]]:
    asked = {"memlock": job.container.memlock, "nofile": job.container.nofile}
    return [{"Name": n, "Soft": v, "Hard": v} for n, v in asked.items() if v is not None]


def _mounts(job: Job, run_dir: Path) -> list[dict[str, Any]]:
    """Bind mounts in the API's own form: unlike "a:b:ro" it takes any path, and makes none up."""
    needed = [_bind(str(run_dir)), _bind(job.cache_dir)]
    needed += [_bind(path, read_only=True) for path in job.local_paths]
    there = [Path(mount["Target"]) for mount in needed]
    for path in job.local_paths:
        for inside, real in sorted(linked_folders(Path(path)).items()):
            if not any(inside.is_relative_to(folder) for folder in there):
                needed.append(_bind(str(real), target=str(inside), read_only=True))
    mounts: dict[str, dict[str, Any]] = {}
    for mount in needed:
        mounts.setdefault(mount["Target"], mount)
    for bind in job.container.binds:
        parts = BIND.fullmatch(bind)
        if parts is not None:  # the job's own check has refused any other form
            mounts[parts[2]] = _bind(parts[1], target=parts[2], read_only=parts[3] == "ro")
    return list(mounts.values())


def linked_folders(folder: Path) -> dict[Path, Path]:
    """Where the links in a folder lead in a container that has only it: path inside -> path here.

    A snapshot of Hugging Face's cache holds nothing else: its files are links to ../../blobs.
    """
    found: dict[Path, Path] = {}
    for at, folders, files in os.walk(folder):
        for link in (Path(at) / name for name in (*folders, *files)):
            if not link.is_symlink() or not link.exists():
                continue
            inside = Path(os.path.normpath(link.parent / link.readlink()))
            real = link.resolve()
            # The hub's blobs, all at once; of any other folder only the file that is named: the
            # rest of it is none of the job's business.
            if inside.parent.name == real.parent.name == "blobs" and inside.name == real.name:
                inside, real = inside.parent, real.parent
            found[inside] = real
    return found


def _bind(source: str, *, target: str | None = None, read_only: bool = False) -> dict[str, Any]:
    return {
        "Type": "bind",
        "Source": source,
        "Target": source if target is None else target,
        "ReadOnly": read_only,
    }


def start(client: DockerClient, run: RunDir, options: dict[str, Any]) -> ContainerTask:
    """Create and start a container and write it into the run's manifest.

    Raises:
        NotStartedError: with the daemon's own words.
    """
    try:
        with _patient(client):
            image = client.images.get(options["image"])
            container = client.containers.create(**options)
            run.update(
                container=container.id,
                image=f"{options['image']}@{image.id}",
                command=options["command"],
                packages=locked_packages(container),
            )
            container.start()
    except (DockerException, OSError) as error:
        # By its name: where the daemon answered too late nobody was told the id.
        _remove_ours(client, options["name"], run)
        said = getattr(error, "explanation", None) or str(error)
        raise NotStartedError(
            f"Docker would not start the container: {said}{_hint(said)}"
        ) from error
    run.update(state="running", started=now())
    return ContainerTask(client, run, str(container.id))


@contextlib.contextmanager
def _patient(client: DockerClient) -> Generator[None]:
    """Wait longer for each of the daemon's answers while the `with` lasts."""
    before = client.api.timeout
    client.api.timeout = _START_S
    try:
        yield
    finally:
        client.api.timeout = before


def _remove_ours(client: DockerClient, name: str, run: RunDir) -> None:
    """Remove a container by name, unless it is of a run in another folder."""
    with contextlib.suppress(DockerException, OSError):
        found = client.containers.get(name)
        if found.labels.get("headroom.run_dir") == str(run.path):
            found.remove(force=True, v=True)


def _hint(said: str) -> str:
    """What to change, where the daemon's words are known."""
    hints = {
        "rlimit": "; this machine does not allow that ulimit: lower container.memlock or nofile",
        "gathering device information": "; no such device here: see container.devices",
        "bind source path does not exist": "; see container.binds, data.path and model",
    }
    return next((hint for words, hint in hints.items() if words in said), "")


def locked_packages(container: Container) -> dict[str, str]:
    """Versions by name from the lock files in a container's image; {} where it has none."""
    try:
        stream, _ = container.get_archive(_LOCKS)
    except NotFound:
        return {}
    found: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as tar:
        for member in tar.getmembers():
            if file := tar.extractfile(member):
                found |= dict(_LOCKED.findall(file.read().decode()))
    return found


def remove(client: DockerClient, run: RunDir) -> None:
    """Remove a run's container, which is needed no more; one that is gone already is fine."""
    _remove_ours(client, name_of(run.path), run)


def init_pid(client: DockerClient, container_id: str) -> int:
    """The process number of a running container's init, as its daemon counts; 0 once it ended."""
    return int(client.containers.get(container_id).attrs["State"]["Pid"])
