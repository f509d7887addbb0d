"""Is this machine fit for a job, and who holds its chips? Prints one JSON object.

    host_check.py look WANTED    changes nothing; "problems" is empty where the machine is fit
    host_check.py free WANTED    stops what is ours, removes the lock file that nobody holds
    host_check.py would WANTED   tells what `free` would do

WANTED is JSON, see `Wanted`. Ours is: a container with the label headroom=1 whose run directory
lies in our folder, and a process whose argument vector is exactly that of our trainer, with a job
in our folder. Nothing else is ever stopped, and nothing is found by a part of its command line.

Runs on the machine by its own Python (3.10 or later), without any package, as root.
"""

import fcntl
import json
import os
import platform
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

PYTHON_NEEDED = (3, 10)
_STOP_S = 30
_CONTAINER_ID = re.compile(r"\b[0-9a-f]{64}\b")
# struct flock of x86-64 and aarch64: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = "hhqqi4x"


@dataclass(frozen=True)
class Wanted:
    """What the machine must have.

    Attributes:
        root: our folder; jobs lie in its jobs/.
        systems: names of /etc/os-release (ID) that we know.
        disk_gib: GiB that must be free, by path; a path that is not there yet counts as its parent.
        ram_gib: GiB of memory in all.
        devices: glob patterns of chips' device files.
        chips: files that must match them; 0: none are needed.
        memlock_kib: the limit of locked memory this machine must be able to give; -1 unlimited.
        open_files: likewise, of open files.
        lock: libtpu's lock file.
        now: the controller's clock, seconds since 1970; None: clocks are not compared.
        clock_skew_s: how far the clocks may differ.
    """

    root: str
    systems: tuple = ("debian", "ubuntu")
    disk_gib: dict = field(default_factory=dict)
    ram_gib: float = 0.0
    devices: tuple = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
    chips: int = 0
    memlock_kib: int = 0
    open_files: int = 0
    lock: str = "/tmp/libtpu_lockfile"  # noqa: S108 - where libtpu puts it
    now: "float | None" = None
    clock_skew_s: float = 30.0


def look(wanted: Wanted) -> dict:
    """The machine as it is: facts, holders, and what is wrong with it in words."""
    machine = facts(wanted)
    held = holders(wanted)
    return {
        **machine,
        **held,
        "problems": [*unfit(wanted, machine), *busy(wanted, held)],
    }


def facts(wanted: Wanted) -> dict:
    """What the machine has. Sizes are bytes."""
    release = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
        if "=" in line
    )
    return {
        "system": release.get("ID", "unknown").strip('"'),
        "version": release.get("VERSION_ID", "unknown").strip('"'),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "disk_free_bytes": {path: free_bytes(Path(path)) for path in wanted.disk_gib},
        "devices": chip_files(wanted),
        "memlock_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[1],
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "clock_skew_s": None if wanted.now is None else round(time.time() - wanted.now, 1),
    }


def free_bytes(path: Path) -> int:
    """Bytes free where that path lies or would lie."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def chip_files(wanted: Wanted) -> list:
    """Device files of the chips, sorted."""
    root = Path("/")
    return sorted({str(p) for pattern in wanted.devices for p in root.glob(pattern.lstrip("/"))})


def unfit(wanted: Wanted, machine: dict) -> list:
    """What the machine lacks, a sentence each: asked, found, what to change."""
    gib = 2**30
    found = []
    if machine["system"] not in wanted.systems:
        known = ", ".join(wanted.systems)
        found.append(f"the system is {machine['system']}; known: {known} (tpu_vm_systems)")
    if tuple(int(n) for n in machine["python"].split(".")[:2]) < PYTHON_NEEDED:
        found.append(f"its Python is {machine['python']}; the conda role needs 3.10 or later")
    for path, wish in wanted.disk_gib.items():
        free = machine["disk_free_bytes"][path] / gib
        if free < wish:
            found.append(
                f"{free:.2f} GiB free at {path}, {wish:g} wanted: "
                "free some, or lower tpu_vm_disk_gib"
            )
    ram = machine["ram_bytes"] / gib
    if ram < wanted.ram_gib:
        found.append(f"{ram:.2f} GiB of memory, {wanted.ram_gib:g} wanted (tpu_vm_ram_gib)")
    if len(machine["devices"]) < wanted.chips:
        found.append(
            f"{len(machine['devices'])} device files of chips ({', '.join(wanted.devices)}), "
            f"{wanted.chips} wanted: is tpu_vm_accelerator right for this VM?"
        )
    found += [
        f"the limit of {name} is {limit}, {wish} wanted ({key})"
        for name, limit, wish, key in (
            ("locked memory, bytes,", machine["memlock_bytes"], wanted.memlock_kib * 1024,
             "tpu_vm_memlock_kib"),
            ("open files", machine["open_files"], wanted.open_files, "tpu_vm_open_files"),
        )
        if _below(limit, wish)
    ]  # fmt: skip
    skew = machine["clock_skew_s"]
    if skew is not None and abs(skew) > wanted.clock_skew_s:
        found.append(
            f"its clock differs by {skew:g} s from the controller's, "
            f"{wanted.clock_skew_s:g} allowed: is it synchronized (timedatectl)?"
        )
    return found


def _below(limit: int, wish: int) -> bool:
    unlimited = resource.RLIM_INFINITY
    if limit == unlimited or wish == 0:
        return False
    return wish < 0 or limit < wish


def busy(wanted: Wanted, held: dict) -> list:
    """Who is in the way and not ours, by process id and command, a sentence each."""
    found = [
        f"process {h['pid']} ({h['command']}) holds {', '.join(h['what'])} and is not ours: "
        "nothing was changed; end it, or wait"
        for h in held["foreign"]
    ]
    pid = held["lock"]["held_by"]
    if pid is not None and pid not in {h["pid"] for h in [*held["foreign"], *held["ours"]]}:
        found.append(
            f"a process that this machine does not show ({pid}) holds {wanted.lock}: "
            "nothing was changed; it may be in another container"
        )
    return found


def holders(wanted: Wanted) -> dict:
    """Processes on the chips or on libtpu's lock, ours and others; the lock; what of ours runs."""
    lock = lock_state(Path(wanted.lock))
    containers = our_containers(wanted)
    ours, foreign = [], []
    for pid in sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        what = held_files(pid, wanted)
        if pid == lock["held_by"] and wanted.lock not in what:
            what.append(wanted.lock)
        argv = arguments(pid)
        name = container_of(pid, containers) or (
            f"process {pid}" if is_our_trainer(argv, wanted) else None
        )
        if name is not None and argv:
            ours.append({"pid": pid, "command": " ".join(argv), "what": what, "is": name})
        elif what:
            foreign.append({"pid": pid, "command": " ".join(argv), "what": what})
    return {"lock": lock, "containers": containers, "ours": ours, "foreign": foreign}


def arguments(pid: int) -> list:
    """A process's argument vector, [] when it has ended."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in raw.split(b"\0")[:-1]]


def held_files(pid: int, wanted: Wanted) -> list:
    """Chips that a process has open. The lock file counts where it is locked, not where open."""
    patterns = re.compile(r"/dev/accel[0-9]+|/dev/vfio/[0-9]+")
    known = set(chip_files(wanted))
    found = set()
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = str(link.readlink())
            if target in known or patterns.fullmatch(target):
                found.add(target)
    except OSError:  # it has ended
        pass
    return sorted(found)


def is_our_trainer(argv: list, wanted: Wanted) -> bool:
    """True for `python -P -m trainer VERB ROOT/jobs/.../job.json`, word by word."""
    jobs = f"{wanted.root}/jobs/"
    return (
        len(argv) == 6
        and Path(argv[0]).name.startswith("python")
        and argv[1:4] == ["-P", "-m", "trainer"]
        and os.path.normpath(argv[5]) == argv[5]
        and argv[5].startswith(jobs)
        and argv[5].endswith("/job.json")
    )


def our_containers(wanted: Wanted) -> dict:
    """Name by id of running containers with our label and a run directory in our folder."""
    if shutil.which("docker") is None:
        return {}
    form = '{{.ID}} {{.Names}} {{.Label "headroom.run_dir"}}'
    argv = ["docker", "ps", "--no-trunc", "--filter", "label=headroom=1", "--format", form]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    jobs = f"{wanted.root}/jobs/"
    rows = [line.split(" ", 2) for line in done.stdout.splitlines()]
    return {r[0]: r[1] for r in rows if len(r) == 3 and r[2].startswith(jobs)}


def container_of(pid: int, containers: dict) -> "str | None":
    """The name of the container of ours that a process runs in."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")
    except OSError:
        return None
    for number in _CONTAINER_ID.findall(text):
        if number in containers:
            return f"container {containers[number]}"
    return None


def lock_state(path: Path) -> dict:
    """Whether the file is there, and the process that has it locked; libtpu's is a POSIX lock.

    `flock` does not see such a lock, and the file outlives its holder: that it is there says
    nothing.
    """
    try:
        with path.open("rb") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            told = fcntl.fcntl(file, fcntl.F_GETLK, asked)
    except FileNotFoundError:
        return {"exists": False, "held_by": None}
    kind, _, _, _, pid = struct.unpack(_FLOCK, told)
    return {"exists": True, "held_by": None if kind == fcntl.F_UNLCK else pid}


def would(wanted: Wanted) -> dict:
    """What `free` would change."""
    before = look(wanted)
    if before["problems"]:
        return {**before, "changed": []}
    changed = [f"would stop {name}" for name in sorted({h["is"] for h in before["ours"]})]
    if before["lock"]["exists"]:
        changed.append(f"would remove {wanted.lock}")
    return {**before, "changed": changed}


def free(wanted: Wanted) -> dict:
    """Stop what is ours and remove a lock file that nobody holds; nothing where others hold."""
    before = look(wanted)
    if before["problems"]:
        return {**before, "changed": []}
    changed = [stop_container(number, name) for number, name in before["containers"].items()]
    ours = [h["pid"] for h in before["ours"] if h["is"] == f"process {h['pid']}"]
    changed += [stop_process(pid, wanted) for pid in ours]
    changed.append(remove_stale_lock(Path(wanted.lock)))
    return {**look(wanted), "changed": [words for words in changed if words]}


def stop_container(number: str, name: str) -> str:
    """Stop one container, by its id."""
    argv = ["docker", "stop", "--time", str(_STOP_S), number]
    subprocess.run(argv, capture_output=True, timeout=4 * _STOP_S, check=True)
    return f"stopped container {name}"


def stop_process(pid: int, wanted: Wanted) -> str:
    """SIGTERM to one process, then SIGKILL, if it still is what it was taken for."""
    handle = os.pidfd_open(pid)
    try:
        if not is_our_trainer(arguments(pid), wanted):
            return ""
        for number, seconds in ((signal.SIGTERM, _STOP_S), (signal.SIGKILL, 5)):
            signal.pidfd_send_signal(handle, number)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if not arguments(pid):
                    return f"stopped process {pid}"
                time.sleep(0.05)
    finally:
        os.close(handle)
    return f"process {pid} does not end"


def remove_stale_lock(path: Path) -> str:
    """Remove the file while we hold its lock ourselves, so that nobody takes it meanwhile."""
    try:
        with path.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                path.unlink()
                return f"removed {path}, which no process held"
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"left {path}: {error}"
    return ""


def main(verb: str, text: str) -> None:
    """Print what was found or done."""
    wanted = Wanted(**json.loads(text))
    sys.stdout.write(json.dumps({"look": look, "free": free, "would": would}[verb](wanted)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
