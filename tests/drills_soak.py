"""Many short jobs one after the other: what is left open, running, in memory and on disk."""

import json
import stat
import subprocess
import sys
from pathlib import Path

from runner import archive
from tests.drills import REPOSITORY, Drill, Place, Told

# A long-lived process that calls `launch` in a loop, as a program around the runner would.
LOOP = """
import gc, io, json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import docker, psutil
from jobs.spec import load
from runner import archive, launch
from runner.provenance import Checkout
job, runs, script, number, host = load(Path(sys.argv[2])), Path(sys.argv[3]), *sys.argv[4:7]
client = docker.DockerClient(base_url=host) if host else None
where = "docker" if host else "process"
code = Checkout(commit=None, dirty=None)
def one():
    with archive.create(job, verb="train", where=where, runs=runs, code=code) as run:
        out = io.BytesIO()
        launch.launch(run, job, client=client, out=out, say=str, trainer=("sh", script))
def held():
    gc.collect()
    me = psutil.Process()
    return [me.num_fds(), me.num_threads(), len(me.children(recursive=True)), me.memory_info().rss]
for _ in range(3):
    one()
first = held()
for _ in range(int(number) - 3):
    one()
print(json.dumps([first, held()]))
"""
LINES = 100
# A manifest with this environment's packages, job.json, the log, process.json, exit.json: 5 blocks
# of 4 KiB and the directory.
DISK_BYTES = 40 << 10
# Python's allocator may keep an arena more; a leak of a run's log or records would be more a run.
MEMORY_BYTES, MEMORY_BYTES_A_RUN = 4 << 20, 8 << 10


def soaked(*, loop: int, commands: int):
    """So many jobs by one process, and so many commands."""

    def run(place: Place) -> Told:
        many, few = (loop, commands) if place.thorough else (max(5, loop // 25), commands // 25)
        job = place.job(f"seq {LINES}")
        runs = place.folder / "runs"
        host = place.engine.host if place.engine else ""
        argv = [sys.executable, "-c", LOOP, REPOSITORY, job, runs, place.folder / "told/job.sh"]
        done = subprocess.run(
            [*map(str, argv), str(many), host],
            capture_output=True, text=True, check=False, timeout=3600,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-1000:])
        first, last = json.loads(done.stdout)
        bad = [
            f"{name} {a} -> {b}"
            for name, a, b in zip(("files", "threads", "processes"), first, last, strict=False)
            if a != b
        ]
        if last[3] - first[3] > MEMORY_BYTES + many * MEMORY_BYTES_A_RUN:
            bad.append(f"memory {first[3]} -> {last[3]} bytes")
        for _ in range(few):
            place.ended(place.run(job))
            place.started.clear()
        every = archive.all_runs(runs)
        if len(every) != many + few:
            bad.append(f"{len(every)} runs of {many + few}")
        expected = b"".join(b"%d\n" % i for i in range(1, LINES + 1)) + b"exit_status=0\n"
        lost = sum(r.log_file.read_bytes() != expected for r in every) * len(expected)
        disk = _disk(place.folder / "runs") + _disk(place.folder / "logs")
        if disk > len(every) * DISK_BYTES:
            bad.append(f"disk {disk // len(every)} bytes a run")
        bad += place.leaks()
        return "; ".join(bad) or "all done, nothing left", lost

    return run


def _disk(folder: Path) -> int:
    """Bytes of blocks; a log has a name in runs/ and one in logs/, half of it counts in each."""
    stats = [path.lstat() for path in folder.rglob("*")]
    return sum(s.st_blocks * 512 // (1 if stat.S_ISDIR(s.st_mode) else s.st_nlink) for s in stats)


DRILLS = [
    Drill(
        name="soak",
        fault="500 short jobs: 400 in one process, 100 commands",
        expected="all done, nothing left",
        run=soaked(loop=400, commands=100),
    ),
    Drill(
        name="soak-docker",
        fault="30 short jobs in containers: 20 in one process, 10 commands",
        expected="all done, nothing left",
        run=soaked(loop=20, commands=10),
        docker=True,
    ),
]
