"""Drills of a job in a container, in an engine of our own that is killed and started again."""

import contextlib
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

from jobs.records import Diagnosis
from tests import drills_process
from tests.drills import Drill, Place, Told, differing, until

LINES = 200_000  # 1.3 MB: more than the small disk has


def daemon_restarted(number: signal.Signals, *options: str):
    """The engine ends under a job and comes back; a job that lives on is told to end then."""

    def run(place: Place) -> Told:
        place.engine.end()
        place.engine.start(*options)
        try:
            runner = place.run(place.job())
            place.ticking()
            place.engine.end(number)
            place.engine.start(*options)
            if options:
                place.ticking(place.wrote.read_text().count("\n") + 20)
                place.go.touch()
            code = place.ended(runner)
            return f"{place.ended_as()}; exit code {code}", place.ticks_lost()
        finally:
            place.engine.end()
            place.engine.start()

    return run


def rebooted(place: Place) -> Told:
    """Daemon, containerd, shims, job and runner go at once; the next command sees another boot."""
    runner = place.run(place.job())
    place.ticking()
    with place.engine.client() as client:
        job = client.containers.get(place.manifest().container).attrs["State"]["Pid"]
    ours = str(Path(place.engine.host.removeprefix("unix://")).parent)
    pids = [job, runner.pid]
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = command.read_bytes().decode(errors="replace").split("\0")
            if Path(words[0]).name in ("dockerd", "containerd", "containerd-shim-runc-v2") and any(
                ours in word for word in words
            ):
                pids.append(int(command.parent.name))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    place.ended(runner)
    until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids))
    place.engine.stop()  # /run is empty after a boot
    place.engine.start()
    place.call("status", prefix=place.after_a_boot())
    return place.ended_as(), place.ticks_lost()


def killed_for_memory(place: Place) -> Told:
    job = place.job("echo up; exec tail /dev/zero", container="  memory_gib: 0.03\n")
    place.ended(place.run(job))
    return _with_cause(place), differing(place.said(), b"up\n")


def killed(place: Place) -> Told:
    runner = place.run(place.job())
    place.ticking()
    with place.engine.client() as client:
        client.containers.get(place.manifest().container).kill()
    place.ended(runner)
    return _with_cause(place), place.ticks_lost()


def _with_cause(place: Place) -> str:
    found = Diagnosis.model_validate_json(place.the_run().diagnosis_file.read_bytes())
    status = place.manifest().exit_status
    return f"{place.ended_as()}, oom_killed {status.oom_killed}, {found.cause}"


def disk_full_while_logging(place: Place) -> Told:
    """The daemon has the log: nothing of it is given up before it is here as a whole."""
    runs = place.folder / "runs"
    place.mount("tmpfs", runs, "size=1m")
    code = place.ended(place.run(place.job(f"seq {LINES}; exit 3")))
    said = "it is said" if "headroom status finishes" in place.errors() else place.errors()
    kept = f"{len(place.leaks())} container kept"
    place.call("status")
    still = place.manifest().exit_status is None
    subprocess.run(["mount", "-o", "remount,size=32m", runs], check=True)
    place.call("status")
    words = [
        f"exit code {code}",
        said,
        kept,
        *([] if still else ["closed too early"]),
        place.ended_as(),
    ]
    return "; ".join(words), differing(place.said(), drills_process.numbers(LINES))


def missing_image(place: Place) -> Told:
    job = place.job()
    job.write_text(job.read_text().replace("shell:drills", "none:1"))
    code = place.ended(place.run(job))
    says = (
        "one line"
        if place.errors().count("Error:") == 1 and "none:1" in place.errors()
        else place.errors()
    )
    return f"refused {code}, {says}, {len(list((place.folder / 'runs').glob('*')))} runs", 0


def container_removed(place: Place) -> Told:
    """By somebody else, with the runner gone."""
    runner = place.run(place.job())
    place.ticking()
    runner.kill()
    place.ended(runner)
    place.call("status")
    with place.engine.client() as client:
        client.containers.get(place.manifest().container).remove(force=True)
    until(lambda: (place.call("status"), place.manifest().exit_status)[1])
    return place.ended_as(), 0


ALSO = ("runner-killed", "flood", "two-runners", "hostile-names")

DRILLS = [
    *(
        replace(drill, name=f"{drill.name}-docker", fault=f"{drill.fault} (container)", docker=True)
        for drill in drills_process.DRILLS
        if drill.name in ALSO
    ),
    Drill(
        name="daemon-stopped",
        fault="dockerd stopped and started, without live-restore",
        expected="interrupted 143; exit code 143",
        run=daemon_restarted(signal.SIGTERM),
        docker=True,
        quick=False,
    ),
    Drill(
        name="daemon-killed",
        fault="dockerd kill -9 and started, without live-restore",
        expected="interrupted 143; exit code 143",
        run=daemon_restarted(signal.SIGKILL),
        docker=True,
        quick=False,
    ),
    Drill(
        name="live-restore-stopped",
        fault="dockerd stopped and started, with live-restore",
        expected="failed 3; exit code 5",
        run=daemon_restarted(signal.SIGTERM, "--live-restore"),
        docker=True,
    ),
    Drill(
        name="live-restore-killed",
        fault="dockerd kill -9 and started, with live-restore",
        expected="failed 3; exit code 5",
        run=daemon_restarted(signal.SIGKILL, "--live-restore"),
        docker=True,
        quick=False,
    ),
    Drill(
        name="reboot-docker",
        fault="host reboot: daemon, container, runner gone, another boot id",
        expected="lost 255",
        run=rebooted,
        docker=True,
        may_lose_bytes=4096,
    ),
    Drill(
        name="memory",
        fault="the container is killed for memory",
        expected="oom_killed 137, oom_killed True, host_oom",
        run=killed_for_memory,
        docker=True,
    ),
    Drill(
        name="killed",
        fault="the container is killed by hand",
        expected="failed 137, oom_killed False, container_killed",
        run=killed,
        docker=True,
    ),
    Drill(
        name="disk-full-logging-docker",
        fault="disk full while the container's log is copied; room later",
        expected="exit code 5; it is said; 1 container kept; failed 3",
        run=disk_full_while_logging,
        docker=True,
    ),
    Drill(
        name="missing-image",
        fault="the image is not there",
        expected="refused 1, one line, 0 runs",
        run=missing_image,
        docker=True,
    ),
    Drill(
        name="container-removed",
        fault="somebody removes the container, the runner is dead",
        expected="lost 255",
        run=container_removed,
        docker=True,
    ),
]
