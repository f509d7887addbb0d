"""Real faults against the real `headroom run`, and what came of it: `make drill`.

Each drill starts the command with a shell script in the trainer's place, injects one fault, and
tells what it saw and how many bytes of the job's output are not in its log (or twice in it).
docs/reliability.md has the promises. `python -m tests.drills [WORD...]` runs all, or those whose
name has one of the words; tests/test_drills_integration.py runs the quick ones.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import docker

from jobs.records import Manifest
from runner import archive
from runner.supervise import start_ticks
from tests.docker_fixtures import CANNOT, REPOSITORY
from tests.fakes import JOB
from tests.shell_image import load_shell_image

IMAGE = "headroom-test/shell:drills"
DEADLINE_S = 120
ENGINE_DIR = REPOSITORY / ".cache" / "drills"
Told = tuple[str, int]
"""What a drill saw, in words, and the bytes that differ."""

# Prints a known line a hundredth of a second until it is told to end; counts beside what it wrote.
TICKS = """\
i=0
echo up
while ! [ -e "{go}" ]; do
  i=$((i + 1))
  echo "line $i of the drill"
  echo $i >>"{wrote}"
  sleep 0.01
done
exit 3
"""


class NotHereError(Exception):
    """This machine does not allow the drill; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Drill:
    """One fault and the promise about it.

    Attributes:
        name: in a word or two.
        fault: what is done.
        expected: what must be seen.
        run: does it, at a place.
        quick: pytest runs it too.
        may_lose_bytes: what nobody can keep: it stood in a pipe of the daemon's.
    """

    name: str
    fault: str
    expected: str
    run: Callable[["Place"], Told]
    docker: bool = False
    quick: bool = True
    may_lose_bytes: int = 0

    def holds(self, seen: str, lost: int) -> bool:
        """It went as promised."""
        return seen == self.expected and lost <= self.may_lose_bytes


@dataclass(kw_only=True)
class Engine:
    """A Docker engine of our own, which may be killed."""

    options: tuple[str, ...] = ()
    host: str = ""

    def start(self, *options: str) -> None:
        """Start it, with dockerd's options."""
        done = subprocess.run(
            [REPOSITORY / "tests/docker_engine.sh", "private", ENGINE_DIR, *options],
            capture_output=True, text=True, check=False, timeout=DEADLINE_S,
        )  # fmt: skip
        if done.returncode == CANNOT:
            raise NotHereError(done.stderr.strip())
        done.check_returncode()
        self.host, self.options = done.stdout.strip(), options
        with self.client() as client:
            if not client.images.list(IMAGE):
                load_shell_image(client, IMAGE)

    @contextlib.contextmanager
    def client(self) -> Iterator[docker.DockerClient]:
        """Of it, for a while."""
        client = docker.DockerClient(base_url=self.host)
        try:
            yield client
        finally:
            client.close()

    def end(self, number: int = signal.SIGTERM) -> None:
        """End dockerd, and wait until it is gone."""
        pid = int((ENGINE_DIR / "pid").read_text())
        os.kill(pid, number)
        until(lambda: _has_ended(pid))
        if number == signal.SIGKILL:
            # Its containerd went with it; dockerd 20.10 takes one that nobody reaps for alive.
            run = Path(self.host.removeprefix("unix://")).parent
            (run / "exec/containerd/containerd.pid").unlink(missing_ok=True)

    def stop(self) -> None:
        """End it and take its network away."""
        subprocess.run([REPOSITORY / "tests/docker_engine.sh", "stop", ENGINE_DIR], check=True)


def _has_ended(pid: int) -> bool:
    """It has ended, reaped or not."""
    return start_ticks(pid) is None


@dataclass(kw_only=True)
class Place:
    """Where a drill takes place: a folder, a way to run, and all that it started.

    Attributes:
        folder: empty at first; runs/ and logs/ come to lie in it.
        engine: for the docker way; None: jobs run as processes.
        thorough: take every stage, all of a soak; pytest takes some.
    """

    folder: Path
    engine: Engine | None = None
    thorough: bool = True
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    cleanups: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def where(self) -> str:
        """process or docker."""
        return "process" if self.engine is None else "docker"

    @property
    def go(self) -> Path:
        """The file that ends a ticking job; a container sees it in its cache folder."""
        return self.folder / "cache" / "go"

    @property
    def wrote(self) -> Path:
        """The file in which a ticking job counts its lines."""
        return self.folder / "cache" / "wrote"

    def job(self, script: str = "", *, more: str = "", container: str = "") -> Path:
        """Write a job whose trainer is the script (a ticking one when empty); gives its file."""
        told = self.folder / "told"
        for folder in (told, self.go.parent):
            folder.mkdir(exist_ok=True, parents=True)
        (told / "job.sh").write_text(script or TICKS.format(go=self.go, wrote=self.wrote))
        text = JOB.format(name="drill", cache=json.dumps(str(self.go.parent)))
        text += f"container:\n  stop_grace_s: 10\n{container}"
        if self.engine is not None:
            bind = json.dumps(f"{told}:/told:ro")
            text += f"  image: {IMAGE}\n  network: none\n  memlock: null\n  binds: [{bind}]\n"
        path = self.folder / "job.yaml"
        path.write_text(text.replace("accelerator: cpu\n", "") + (more or "accelerator: cpu\n"))
        return path

    def command(self, *arguments: str | Path, before: str = "") -> list[str]:
        """argv of `headroom`, its trainer the job's script; `before` is Python to begin with."""
        world = f"trainer=('sh', {str(self.folder / 'told/job.sh')!r}), pause=lambda _: None"
        program = (
            f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
            f"from pathlib import Path\n{before}\n"
            "from runner.cli import main\nfrom runner.terminal import World\n"
            f"main(obj=World({world}, chips_lock=Path({str(self.folder / 'chips.lock')!r})))\n"
        )
        host = () if self.engine is None else ("env", f"DOCKER_HOST={self.engine.host}")
        return [*host, sys.executable, "-c", program, *map(str, arguments)]

    def start(
        self, *arguments: str | Path, before: str = "", prefix: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """Start `headroom ...`."""
        argv = [*prefix, *self.command(*arguments, before=before)]
        with (self.folder / f"errors{len(self.started)}").open("wb") as errors:
            made = subprocess.Popen(
                argv, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        self.started.append(made)
        return made

    def run(self, job: Path, *arguments: str, before: str = "") -> subprocess.Popen[bytes]:
        """Start `headroom run` of a job."""
        return self.start("run", job, "--where", self.where, *arguments, before=before)

    def call(self, *arguments: str | Path, prefix: Sequence[str] = ()) -> tuple[int, str]:
        """`headroom ...` to its end: exit code and stdout."""
        made = self.start(*arguments, prefix=prefix)
        out, _ = made.communicate(timeout=DEADLINE_S)
        return made.returncode, out.decode(errors="replace")

    def errors(self) -> str:
        """What the newest command said on stderr."""
        return (self.folder / f"errors{len(self.started) - 1}").read_text()

    def ended(self, made: subprocess.Popen[bytes]) -> int:
        """Its exit code."""
        made.communicate(timeout=DEADLINE_S)
        return made.returncode

    def the_run(self) -> archive.RunDir:
        """The newest run."""
        return archive.find(self.folder / "runs", "latest")

    def manifest(self) -> Manifest:
        """Its manifest."""
        return self.the_run().manifest()

    def ticking(self, lines: int = 20) -> None:
        """Wait until the job has written so many lines, and its run is in the archive."""
        until(lambda: self.wrote.exists() and self.wrote.read_text().count("\n") >= lines)
        if self.engine is None:
            until(lambda: self.the_run().process_file.exists())  # noqa: PLW0108 - another run each time
        until(lambda: self.manifest().state == "running")

    def mount(self, kind: str, folder: Path, options: str, *, source: Path | None = None) -> None:
        """Mount a file system of its own on a folder until the drill is over."""
        if os.geteuid() != 0:
            raise NotHereError("only root can mount a small or read-only file system")
        folder.mkdir(exist_ok=True, parents=True)
        how = {
            "tmpfs": ["-t", "tmpfs", "-o", options, "none"],
            "bind": ["--bind", str(source or folder)],
        }
        subprocess.run(["mount", *how[kind], str(folder)], check=True)
        self.cleanups.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
        if kind == "bind":
            self.remount(folder, options)

    def remount(self, folder: Path, options: str) -> None:
        """Change a bind mount to ro or rw."""
        subprocess.run(["mount", "-o", f"remount,bind,{options}", str(folder)], check=True)

    def after_a_boot(self) -> list[str]:
        """What to put before a command so that it sees another boot id."""
        if os.geteuid() != 0:
            raise NotHereError("only root can show a command another boot id")
        other = self.folder / "boot_id"
        other.write_text("00000000-0000-4000-8000-000000000000\n")
        mount = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
        return ["unshare", "-m", "sh", "-c", mount, str(other)]

    def ended_as(self) -> str:
        """How the run ended, in words: by its record, and by what else must be whole."""
        run, manifest = self.the_run(), self.manifest()
        if (status := manifest.exit_status) is None:
            return f"not ended ({manifest.state})"
        words = [f"{status.reason} {status.code}"]
        last = run.log_file.read_bytes().rstrip(b"\n").rpartition(b"\n")[2]
        code = "lost" if status.reason == "lost" else status.code
        if last != f"exit_status={code}".encode():
            words.append(f"last line {last!r}")
        if archive.archived_log(run, manifest).read_bytes() != run.log_file.read_bytes():
            words.append("logs/ differs")
        if None in (manifest.finished, manifest.log_sha256):
            words.append("manifest not complete")
        if status.reason in ("failed", "oom_killed", "lost") and not run.diagnosis_file.exists():
            words.append("no diagnosis")
        if self.leaks():
            words.append(f"left {self.leaks()}")
        return ", ".join(words)

    def leaks(self) -> list[str]:
        """Containers that are still there."""
        if not self.engine:
            return []
        with self.engine.client() as client:
            return [c.name for c in client.containers.list(all=True)]

    def said(self, run: archive.RunDir | None = None) -> bytes:
        """A run's log, the newest's, without its last line."""
        return (run or self.the_run()).log_file.read_bytes().rpartition(b"exit_status=")[0]

    def ticks_lost(self, run: archive.RunDir | None = None) -> int:
        """Bytes by which the log of a ticking job differs from what that has counted.

        Its last line may be written and not counted yet, when it is killed.
        """
        log = self.said(run)
        counted = int(self.wrote.read_text().split("\n")[-2])
        return min(differing(log, ticks(n)) for n in (counted, counted + 1))

    def close(self) -> None:
        """End what is left of the drill."""
        for made in self.started:
            with contextlib.suppress(ProcessLookupError):
                made.kill()
            made.communicate()
        for record in self.folder.glob("runs/*/process.json"):
            with contextlib.suppress(ProcessLookupError, PermissionError, ValueError):
                os.killpg(json.loads(record.read_text())["pid"], signal.SIGKILL)
        self.cleanups.close()
        if self.engine is not None:
            self.engine.start(*self.engine.options)  # a drill that broke may have left it dead
            with self.engine.client() as client:
                for left in client.containers.list(all=True):
                    left.remove(force=True)


def ticks(lines: int) -> bytes:
    """What a ticking job writes with so many lines."""
    return b"up\n" + b"".join(b"line %d of the drill\n" % i for i in range(1, lines + 1))


def differing(found: bytes, written: bytes) -> int:
    """Bytes from the first that differs on, in the longer of both; 0: they are the same."""
    if found == written:
        return 0
    same = len(os.path.commonprefix([found, written]))  # noqa: RUF071 - bytes, not paths
    return max(len(found), len(written)) - same


def until(condition: Callable[[], object], *, seconds: float = DEADLINE_S) -> None:
    """Wait for it.

    Raises:
        TimeoutError: it did not come.
    """
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(archive.NoSuchRunError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise TimeoutError("what the drill waits for did not come")
        time.sleep(0.01)


def seen_at(drill: Drill, folder: Path, engine: Engine | None, *, thorough: bool = True) -> Told:
    """Do one drill in an empty folder."""
    place = Place(folder=folder, engine=engine if drill.docker else None, thorough=thorough)
    try:
        return drill.run(place)
    finally:
        place.close()


def every_drill() -> list[Drill]:
    """The table."""
    from tests import drills_container, drills_process, drills_soak, drills_stages  # noqa: PLC0415

    modules = (drills_process, drills_container, drills_stages, drills_soak)
    return [drill for module in modules for drill in module.DRILLS]


def main(words: Sequence[str]) -> int:
    """Do the drills and print the table; 1 where one did not go as promised."""
    wrong = missing = total = 0
    engine = Engine()
    chosen = [d for d in every_drill() if not words or any(w in d.name for w in words)]
    print("| fault | expected | seen | lost bytes | s |\n|---|---|---|---:|---:|", flush=True)  # noqa: T201
    for drill in chosen:
        begin = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix="headroom-drill-"))
        lost: int | str = 0
        try:
            if drill.docker and not engine.host:
                engine.start()
            seen, lost = seen_at(drill, folder, engine)
            total += lost
        except NotHereError as error:
            seen, lost = f"NOT RUN: {error}", "-"
            missing += 1
        except Exception as error:  # noqa: BLE001 - one broken drill must not hide the others
            seen = f"{type(error).__name__}: {error}"
        if lost != "-" and not drill.holds(seen, lost):
            wrong += 1
            seen = f"**{seen}**"
        seconds = time.monotonic() - begin
        print(f"| {drill.fault} | {drill.expected} | {seen} | {lost} | {seconds:.1f} |", flush=True)  # noqa: T201
        shutil.rmtree(folder, ignore_errors=True)
    if engine.host:
        engine.stop()
    good = len(chosen) - wrong - missing
    words = f"{good} of {len(chosen)} drills as promised, {wrong} not, {missing} not run here"
    print(f"{words}; {total} bytes lost")  # noqa: T201
    return 1 if wrong else 0


if __name__ == "__main__":
    from tests import drills  # not __main__: the modules of the table know this one by its name

    sys.exit(drills.main(sys.argv[1:]))
