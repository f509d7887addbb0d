"""What the runner costs: seconds over a bare `docker run`, and a log's way beside `docker logs -f`.

Alternating rounds with one image and one argv; medians. The log: a container that has printed many
lines is read by `docker logs -f`, by the runner's own copy, and by `docker logs -f` into a file.
Needs a Docker engine (DOCKER_HOST) and no TPU; the machine's load is told beside the numbers.

    python benchmarks/runner.py
    python benchmarks/runner.py --rounds 20 --lines 1000000 --json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import docker

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from runner.container_task import copy_log  # noqa: E402
from tests.shell_image import load_shell_image  # noqa: E402

IMAGE = "headroom-test/shell:benchmark"
JOB = """\
name: benchmark
accelerator: cpu
model: tiny
cache_dir: {folder}/cache
container: {{image: {image}, network: none, binds: ['{folder}/told:/told:ro']}}
"""


def seconds(argv: list[str], folder: Path) -> float:
    """Of a command that has to succeed."""
    begin = time.perf_counter()
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    took = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}")
    return took


def overhead(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds of a job that ends at once, both ways, in turns."""
    (folder / "told").mkdir()
    (folder / "told/job.sh").write_text("exit 0\n")
    (folder / "job.yaml").write_text(JOB.format(folder=folder, image=IMAGE))
    bare = ["docker", "run", "--rm", "--init", "--network", "none", "-v", f"{folder}/told:/told:ro"]
    bare += [IMAGE, "train", f"{folder}/job.json"]
    ours = [
        "env",
        f"PYTHONPATH={ROOT}",
        sys.executable,
        "-c",
        "from runner.cli import main; main()",
    ]
    ours += ["run", "job.yaml", "--where", "docker"]
    seconds(bare, folder), seconds(ours, folder)  # both once for the page cache
    pairs = [(seconds(bare, folder), seconds(ours, folder)) for _ in range(rounds)]
    return {
        "docker_run_s": statistics.median(p[0] for p in pairs),
        "headroom_run_s": statistics.median(p[1] for p in pairs),
        "overhead_s": statistics.median(p[1] - p[0] for p in pairs),
    }


def throughput(folder: Path, client: docker.DockerClient, lines: int) -> dict[str, float]:
    """Lines a second of an ended container's log into a file, the best of three each."""
    (folder / "told/job.sh").write_text(
        f"seq -f 'line %.0f of a log as a trainer prints it' {lines}\n"
    )
    mount = {f"{folder}/told": {"bind": "/told", "mode": "ro"}}
    made = client.containers.run(IMAGE, detach=True, init=True, network_mode="none", volumes=mount)
    made.wait()

    def theirs(log: Path) -> None:
        with log.open("wb") as file:
            subprocess.run(["docker", "logs", "-f", made.id], stdout=file, stderr=file, check=True)

    def ours(log: Path) -> None:
        log.touch()
        copy_log(made, log, follow=True)

    try:
        logs = {name: folder / name for name in ("theirs", "ours")}
        took = {"theirs": [], "ours": []}
        for _ in range(3):
            for name, way in (("theirs", theirs), ("ours", ours)):
                logs[name].unlink(missing_ok=True)
                took[name].append(_timed(way, logs[name]))
        if logs["ours"].read_bytes() != logs["theirs"].read_bytes():
            raise SystemExit("the two logs differ")
    finally:
        made.remove(force=True)
    return {
        "lines": lines,
        "docker_logs_lines_per_s": lines / min(took["theirs"]),
        "headroom_lines_per_s": lines / min(took["ours"]),
    }


def _timed(way: Callable[[Path], None], log: Path) -> float:
    begin = time.perf_counter()
    way(log)
    return time.perf_counter() - begin


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    client = docker.from_env()
    load_shell_image(client, IMAGE)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        told = overhead(folder, asked.rounds) | throughput(folder, client, asked.lines)
    client.images.remove(IMAGE, force=True)
    told["load_1_min"], told["cpus"] = os.getloadavg()[0], os.cpu_count()
    if asked.json:
        print(json.dumps(told, indent=2))
        return
    for name, value in told.items():
        print(f"{name:24} {value:,.2f}")


if __name__ == "__main__":
    main()
