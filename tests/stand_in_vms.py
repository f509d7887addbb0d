"""Stand-ins for fresh TPU VMs, and what deploying to them needs: host keys, a conda channel.

A VM here is a container with systemd, sshd, sudo and a Docker engine of its own
(stand_in_vm.Dockerfile); like a real one it is reached by ssh and by nothing else.
"""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from docker_fixtures import REPOSITORY, Engine

DOCKERFILE = REPOSITORY / "tests" / "stand_in_vm.Dockerfile"
USER = "person"
# What systemd and a nested engine need; --privileged is more than CI machines may give.
OPTIONS = (
    *("--cap-add=SYS_ADMIN", "--cap-add=NET_ADMIN", "--cap-add=SYS_PTRACE", "--cap-add=SYS_MODULE"),
    *("--security-opt=seccomp=unconfined", "--security-opt=apparmor=unconfined"),
    # Read-only is the top alone: where it has no folder, systemd mounts no hierarchy of its own.
    *("--tmpfs=/run:exec", "--tmpfs=/run/lock", "--volume=/sys/fs/cgroup:/sys/fs/cgroup:ro"),
    "--volume=/var/lib/docker",
)
# Of CPython, what no test of ours imports.
LEFT_OUT = ("site-packages/", "ensurepip/", "pydoc_data/", "lib2to3/", "test/")


@dataclass(frozen=True)
class Vm:
    """A running stand-in."""

    engine: Engine
    name: str
    address: str
    host_key: str
    """Its line of known_hosts."""

    def run(self, *argv: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs a command in it as root, past ssh: to look, and to put things in the way."""
        return self.engine.run("docker", "exec", self.name, *argv, timeout=timeout)

    def says(self, *argv: str) -> str:
        """The output of a command that has to succeed."""
        done = self.run(*argv)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout.strip()


def build(engine: Engine, base: str) -> str:
    """The VMs' image, made once for a base and a Dockerfile; its tag."""
    made_of = hashlib.sha256(DOCKERFILE.read_bytes() + base.encode()).hexdigest()[:12]
    tag = f"headroom-test/vm:{made_of}"
    if engine.run("docker", "image", "inspect", tag).returncode == 0:
        return tag
    client = next(
        (c for c in ("/usr/bin/docker", "docker") if shutil.which(c)), None
    ) or pytest.fail("no docker")
    done = engine.run(
        *("env", "DOCKER_BUILDKIT=1", client, "build", f"--build-arg=BASE={base}", "--tag", tag),
        *("--file", DOCKERFILE, REPOSITORY / "docker"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return tag


def start(engine: Engine, image: str, *, name: str, keys: Path, mount: Path) -> Vm:
    """Starts one; whoever has keys/id gets in as USER. `mount` is seen there, read-only."""
    host_key = keys / f"{name}.key"
    ssh_keygen(host_key)
    engine.docker(
        *("create", "--name", name, "--hostname", name, "--label=headroom.test=vm", *OPTIONS),
        *(f"--volume={mount}:{mount}:ro", image),
    )
    put(engine, name, "etc/ssh/host_key", host_key.read_bytes(), mode=0o600)
    mine = (keys / "id.pub").read_bytes()
    put(engine, name, f"home/{USER}/.ssh/authorized_keys", mine, mode=0o644)
    engine.docker("start", name)
    address = engine.docker("inspect", "--format={{.NetworkSettings.IPAddress}}", name)
    kind, key = host_key.with_suffix(".key.pub").read_text().split()[:2]
    vm = Vm(engine, name, address, f"{address} {kind} {key}")
    # `is-system-running --wait` fails where systemd has not opened its socket yet.
    until = "until systemctl is-active --quiet ssh docker; do sleep 0.1; done"
    assert vm.run("timeout", "60", "sh", "-c", until).returncode == 0, "no sshd in the stand-in"
    return vm


def hierarchies() -> set[str]:
    """The cgroup hierarchies that the kernel has, by their controllers."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return {line.split(":")[1] for line in lines} - {""}


def forget(made: set[str], mount: Path) -> None:
    """Ends hierarchies that a stand-in's systemd made; they outlive it while they have folders.

    With one that is mounted nowhere containerd finds no cgroup to watch for OOM kills.
    """
    mount.mkdir(exist_ok=True)
    # Removed folders go a little later, and only an unmount without any ends a hierarchy.
    for _ in range(40):
        for controllers in made & hierarchies():
            argv = ["mount", "-t", "cgroup", "-o", controllers, "cgroup", str(mount)]
            subprocess.run(argv, check=True, timeout=10)
            for folder in sorted((p for p in mount.rglob("*") if p.is_dir()), reverse=True):
                folder.rmdir()
            subprocess.run(["umount", str(mount)], check=True, timeout=10)
        if not made & hierarchies():
            return
        time.sleep(0.25)


def ssh_keygen(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(argv, check=True, timeout=30)


def put(engine: Engine, name: str, path: str, content: bytes, *, mode: int) -> None:
    """Writes a file into a container that need not run."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo(path)
        entry.size, entry.mode = len(content), mode
        tar.addfile(entry, io.BytesIO(content))
    subprocess.run(
        ["env", f"DOCKER_HOST={engine.host}", "docker", "cp", "-", f"{name}:/"],
        input=packed.getvalue(),
        check=True,
        timeout=60,
    )


def conda_channel(engine: Engine, base: str, folder: Path) -> str:
    """A conda channel with one package, the base image's CPython 3.12; its address."""
    (folder / "noarch").mkdir(parents=True)
    subdir = folder / "linux-64"
    subdir.mkdir()
    container = engine.docker("create", base)
    try:
        copied = subprocess.run(
            ["env", f"DOCKER_HOST={engine.host}", "docker", "cp", f"{container}:/usr/local", "-"],
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout
    finally:
        engine.docker("rm", container)
    with tarfile.open(fileobj=io.BytesIO(copied)) as source:
        version = write_python(source, subdir)
    # In a process of its own, left at once: py-rattler 0.28.0 can abort an interpreter at its end.
    index = (
        "import asyncio, os, sys; from rattler.index import index_fs; "
        "asyncio.run(index_fs(sys.argv[1])); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", index, str(folder)], check=True, timeout=120)
    assert (subdir / "repodata.json").exists(), version
    return folder.as_uri()


def write_python(source: tarfile.TarFile, subdir: Path) -> str:
    """Packs the interpreter of a /usr/local as conda packs one."""
    members = {}
    for member in source.getmembers():
        inside = member.name.partition("/")[2]
        ours = inside.startswith(("bin/python3", "lib/"))
        if not ours or not (member.isfile() or member.issym()):
            continue
        below = inside.removeprefix("lib/python3.12/")
        if below.startswith(LEFT_OUT) or "__pycache__" in inside or "-config" in inside:
            continue
        members[inside] = member
    link = tarfile.TarInfo("bin/python")
    link.type, link.linkname = tarfile.SYMTYPE, "python3.12"
    members["bin/python"] = link
    paths = []
    packed: list[tuple[tarfile.TarInfo, bytes]] = []
    for inside, member in sorted(members.items()):
        read = source.extractfile(member) if member.isfile() else None
        content = read.read() if read else b""
        entry = tarfile.TarInfo(inside)
        entry.type, entry.linkname, entry.mode = member.type, member.linkname, member.mode | 0o644
        entry.size = len(content)
        packed.append((entry, content))
        paths.append({
            "_path": inside,
            "path_type": "softlink" if member.issym() else "hardlink",
            "sha256": hashlib.sha256(content).hexdigest(),
            "size_in_bytes": len(content),
        })  # fmt: skip
    version, build_name = "3.12.1", "0_test"
    index = {
        "name": "python", "version": version, "build": build_name, "build_number": 0,
        "depends": [], "license": "PSF-2.0", "platform": "linux", "arch": "x86_64",
        "subdir": "linux-64", "timestamp": 1700000000000,
    }  # fmt: skip
    told = {
        "info/index.json": json.dumps(index),
        "info/paths.json": json.dumps({"paths": paths, "paths_version": 1}),
        "info/files": "".join(f"{path['_path']}\n" for path in paths),
        "info/about.json": "{}",
    }
    name = subdir / f"python-{version}-{build_name}.tar.bz2"
    with tarfile.open(name, "w:bz2", compresslevel=1) as tar:
        for path, text in told.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
        for entry, content in packed:
            tar.addfile(entry, io.BytesIO(content))
    return version
