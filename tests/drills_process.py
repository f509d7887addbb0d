"""Drills of a job in a process; those that also fit a container are drilled there as well."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

from jobs.records import Diagnosis
from runner import archive
from tests.drills import Drill, NotHereError, Place, Told, differing, until


def numbers(last: int) -> bytes:
    """What `seq LAST` prints."""
    return b"".join(b"%d\n" % i for i in range(1, last + 1))


def runner_killed(place: Place) -> Told:
    """The reader takes the run up again, and another finishes it."""
    runner = place.run(place.job())
    place.ticking()
    runner.kill()
    place.ended(runner)
    _, listed = place.call("status", "--json")
    words = [json.loads(listed)[0]["state"]]
    reader = place.start("logs", "latest", "-f")
    place.go.touch()
    out, _ = reader.communicate(timeout=120)
    same = out == place.the_run().log_file.read_bytes()
    words += [place.ended_as(), "logs -f whole" if same else "logs -f differs"]
    return "; ".join(words), place.ticks_lost()


def supervisor_killed(place: Place) -> Told:
    runner = place.run(place.job())
    place.ticking()
    os.kill(
        place.the_run().read_json(place.the_run().process_file)["supervisor_pid"], signal.SIGKILL
    )
    place.go.touch()
    code = place.ended(runner)
    return f"{place.ended_as()}; exit code {code}", place.ticks_lost()


def rebooted(place: Place) -> Told:
    """All processes go at once, and the next command sees another boot."""
    runner = place.run(place.job())
    place.ticking()
    known = place.the_run().read_json(place.the_run().process_file)
    for pid in (runner.pid, known["supervisor_pid"], known["pid"]):
        os.kill(pid, signal.SIGKILL)
    place.ended(runner)
    place.call("status", prefix=place.after_a_boot())
    return place.ended_as(), place.ticks_lost()


def number_taken(place: Place) -> Told:
    """After a boot another process has the job's number: the job's own, here, is left alone."""
    runner = place.run(place.job())
    place.ticking()
    runner.kill()
    place.ended(runner)
    pid = place.manifest().pid
    place.call("cancel", "latest", prefix=place.after_a_boot())
    alive = "the other lives" if Path(f"/proc/{pid}").exists() else "the other was killed"
    counted = place.wrote.read_text().count("\n")
    until(lambda: place.wrote.read_text().count("\n") > counted)
    return f"{place.manifest().state}; {alive}", 0


HBM = (
    "jaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED: Error loading program 'jit_training_step': "
    "Attempting to reserve 7.82G at the bottom of memory. That was not possible. There are 5.68G "
    "free, 0B reserved, and 5.68G reservable."
)


def hbm(place: Place) -> Told:
    text = f"{HBM}\n"
    place.ended(place.run(place.job(f'echo "{HBM}"; exit 70')))
    return _with_cause(place), differing(place.said(), text.encode())


def _with_cause(place: Place) -> str:
    found = Diagnosis.model_validate_json(place.the_run().diagnosis_file.read_bytes())
    return f"{place.ended_as()}, {found.cause}"


def disk_full_while_logging(place: Place) -> Told:
    """The job writes its log itself here: its own writes fail once the disk is full."""
    place.mount("tmpfs", place.folder / "runs", "size=1m")
    script = (
        f'i=0; while i=$((i + 1)); echo "line $i of the drill"; do echo $i >>"{place.wrote}"; done '
        "2>/dev/null; exit 9"
    )
    runner = place.run(place.job(script))
    code = place.ended(runner)
    log = place.said()
    # Of the line at which the disk was full the kernel has taken a part; the job was told so.
    counted = int(place.wrote.read_text().split("\n")[-2])
    written = b"".join(b"line %d of the drill\n" % i for i in range(1, counted + 1))
    return f"{place.ended_as()}; exit code {code}", differing(log[: len(written)], written)


def disk_full_while_archiving(place: Place) -> Told:
    """logs/ is another disk, and has no room for the copy: the link to the log stays."""
    place.mount("tmpfs", place.folder / "logs", "size=256k")
    place.ended(place.run(place.job("seq 1000000")))
    return place.ended_as(), differing(place.said(), numbers(1_000_000))


def nothing_can_be_written(place: Place) -> Told:
    """A disk goes away under a run, as of a network, and comes back when the run is over."""
    runs, disk = place.folder / "runs", place.folder / "disk"
    disk.mkdir()
    place.mount("bind", runs, "rw", source=disk)
    runner = place.run(place.job())
    place.ticking()
    subprocess.run(["umount", "-l", runs], check=True)
    place.go.touch()
    code = place.ended(runner)
    said = "it is said" if "headroom status finishes" in place.errors() else place.errors()
    subprocess.run(["mount", "--bind", disk, runs], check=True)
    place.call("status")
    return f"exit code {code}; {said}; {place.ended_as()}", place.ticks_lost()


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *at) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int told = real(id, at);
  FILE *jump;
  long seconds = 0;
  if (id == CLOCK_REALTIME && (jump = fopen(getenv("DRILL_JUMP"), "r"))) {
    if (fscanf(jump, "%ld", &seconds) != 1) seconds = 0;
    fclose(jump);
  }
  at->tv_sec += seconds;
  return told;
}
"""


def clock_jumped(seconds: int):
    """The runner's wall clock jumps while the job runs; the job is stopped with a grace after."""

    def run(place: Place) -> Told:
        if shutil.which("cc") is None:
            raise NotHereError("no C compiler: the clock of one process cannot be changed")
        (place.folder / "clock.c").write_text(CLOCK)
        library = place.folder / "clock.so"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-o", library, place.folder / "clock.c", "-ldl"], check=True
        )
        jump = place.folder / "jump"
        prefix = ["env", f"LD_PRELOAD={library}", f"DRILL_JUMP={jump}"]
        runner = place.start("run", place.job(), "--where", "process", prefix=prefix)
        place.ticking()
        jump.write_text(f"{seconds}\n")
        counted = place.wrote.read_text().count("\n")
        until(lambda: place.wrote.read_text().count("\n") > counted + 50)
        goes_on = "goes on" if runner.poll() is None else "ended"
        runner.terminate()
        code = place.ended(runner)
        jumped = place.manifest().finished[:10] != place.manifest().started[:10]
        words = [goes_on, place.ended_as(), f"exit code {code}", *([] if jumped else ["no jump"])]
        return "; ".join(words), place.ticks_lost()

    return run


def flood(place: Place) -> Told:
    """As fast as it goes: many lines, then lines of 10 MB, then all byte values."""
    # Docker's json-file replaces what is no UTF-8.
    lines, values = (1_000_000, 256) if place.engine is None else (200_000, 128)
    every_byte = "".join(f"\\{i:03o}" for i in range(values))
    script = (
        f"seq {lines}; for i in 1 2 3; do head -c 10000000 /dev/zero | tr '\\0' $i; echo; done; "
        f"for i in $(seq 1000); do printf '{every_byte}'; done; echo; exit 3"
    )
    expected = numbers(lines) + b"".join(b"%d" % i * 10_000_000 + b"\n" for i in (1, 2, 3))
    expected += bytes(range(values)) * 1000 + b"\n"
    runner = place.run(place.job(script))
    out, _ = runner.communicate(timeout=240)
    place.ended(runner)
    shown = "whole" if out.startswith(expected) else "with gaps"
    return f"{place.ended_as()}; shown {shown}", differing(place.said(), expected)


CHIPS = "accelerator: v4-8\n"


def two_runners(place: Place) -> Told:
    """Two at once, a third when the winner's runner is dead, a fourth when its job is over."""
    job = place.job(more=CHIPS, container="  devices: []\n")
    both = [place.run(job), place.run(job)]
    until(lambda: any(runner.poll() is not None for runner in both))
    until(lambda: place.wrote.exists() and place.wrote.read_text().count("\n") > 20)
    (loser,) = [runner for runner in both if runner.poll() is not None]
    (winner,) = [runner for runner in both if runner is not loser]
    refusal = (place.folder / f"errors{both.index(loser)}").read_text()
    running = next(
        run for run in archive.all_runs(place.folder / "runs") if run.manifest().exit_status is None
    )
    words = [f"one runs, one exits {place.ended(loser)}"]
    words += ["named" if f"held by run {running.name} (" in refusal else f"not named: {refusal}"]
    winner.kill()
    place.ended(winner)
    words.append(f"runner killed: {place.ended(place.run(job))}")
    place.go.touch()
    until(lambda: (place.call("status"), running.manifest().exit_status)[1])
    lost = place.ticks_lost(running)
    words.append(f"over: {place.ended(place.run(job))}")
    return "; ".join(words), lost


def hostile_names(place: Place) -> Told:
    """Job names, names of runs, and folders that a shell or a mount would take apart."""
    words = []
    for name in ("../x", "a b", "a'b", 'a"b', "a\nb", "-rf", "", "x" * 65, "$HOME", "a/b"):
        job = place.job("exit 0")
        job.write_text(job.read_text().replace("name: drill", f"name: {json.dumps(name)}"))
        code = place.ended(place.run(job))
        if code != 1 or (place.folder / "runs").exists():
            words.append(f"job name {name!r}: {code}")
    for name in ("../x", "..", "", "/", "../../etc/passwd", "x\ny"):
        code, _ = place.call("show", name)
        if code != 1 or "Traceback" in place.errors():
            words.append(f"run name {name!r}: {code}")
    lost = 0
    for name in ("with space", "quo'te\"s", "new\nline", "$HOME `true`", "..", "-rf", "a,b:c"):
        runs = place.folder / "hostile" / name / "runs"
        code = place.ended(place.run(place.job("seq 1000; exit 3"), "--runs", str(runs)))
        (found,) = runs.glob("*/run.log")
        lost += differing(found.read_bytes(), numbers(1000) + b"exit_status=3\n")
        if code != 5:
            words.append(f"folder {name!r}: {code}")
        shutil.rmtree(runs)
    return "; ".join(words) or "names refused, folders as they are", lost


def read_only(which: str):
    """A folder that cannot be written from the start."""

    def run(place: Place) -> Told:
        place.mount("bind", place.folder / which, "ro")
        code = place.ended(place.run(place.job("exit 0")))
        says = place.errors()
        clean = "one line" if says.count("Error:") == 1 and "Traceback" not in says else says
        left = list((place.folder / "runs").glob("*"))
        return f"refused {code}, {clean}" + (f", left {left}" if left else ""), 0

    return run


def daemon_down(place: Place) -> Told:
    host = ["env", "DOCKER_HOST=unix:///nowhere/docker.sock"]
    job = place.job("echo here")
    asked = place.start("run", job, "--where", "docker", prefix=host)
    code = place.ended(asked)
    says = "Error: --where docker: no Docker daemon answers" in place.errors()
    auto = place.ended(place.start("run", job, prefix=host))
    words = f"docker: {code}, said {says}; auto: {auto}, {place.ended_as()}"
    return words, differing(place.said(), b"here\n")


DRILLS = [
    Drill(
        name="runner-killed",
        fault="kill -9 of `headroom run`, then `logs -f`",
        expected="running; failed 3; logs -f whole",
        run=runner_killed,
    ),
    Drill(
        name="supervisor-killed",
        fault="kill -9 of the job's supervisor",
        expected="lost 255; exit code 5",
        run=supervisor_killed,
    ),
    Drill(
        name="reboot",
        fault="host reboot: all processes gone, another boot id",
        expected="lost 255",
        run=rebooted,
    ),
    Drill(
        name="reboot-number-taken",
        fault="host reboot, the job's process number taken by another",
        expected="lost; the other lives",
        run=number_taken,
    ),
    Drill(
        name="hbm",
        fault="out of HBM (the SOP's words, exit 70)",
        expected="failed 70, hbm_program_load",
        run=hbm,
    ),
    Drill(
        name="disk-full-logging",
        fault="disk full while the job writes its log",
        expected="failed 9; exit code 5",
        run=disk_full_while_logging,
    ),
    Drill(
        name="disk-full-archiving",
        fault="disk full while the log is copied to logs/ on another disk",
        expected="done 0",
        run=disk_full_while_archiving,
    ),
    Drill(
        name="disk-away",
        fault="the disk of runs/ goes away under the run, and comes back later",
        expected="exit code 5; it is said; lost 255",
        run=nothing_can_be_written,
    ),
    *(
        Drill(
            name=f"clock-{word}",
            fault=f"the wall clock jumps {word} by two days, then SIGTERM",
            expected="goes on; interrupted 143; exit code 143",
            run=clock_jumped(seconds),
        )
        for word, seconds in (("on", 172_800), ("back", -172_800))
    ),
    Drill(
        name="flood",
        fault="many lines, lines of 10 MB, all byte values, at full speed",
        expected="failed 3; shown whole",
        run=flood,
    ),
    Drill(
        name="two-runners",
        fault="two runners race for one host's chips; the winner is killed -9",
        expected="one runs, one exits 1; named; runner killed: 1; over: 5",
        run=two_runners,
    ),
    Drill(
        name="hostile-names",
        fault="job names, run names, folders with quotes, newlines, ../",
        expected="names refused, folders as they are",
        run=hostile_names,
        quick=False,
    ),
    *(
        Drill(
            name=f"read-only-{which}",
            fault=f"{which}/ is read-only",
            expected="refused 1, one line",
            run=read_only(which),
        )
        for which in ("runs", "logs")
    ),
    Drill(
        name="daemon-down",
        fault="no Docker daemon answers",
        expected="docker: 1, said True; auto: 0, done 0",
        run=daemon_down,
    ),
]
