"""The main job, whole, in the real image: `headroom run jobs/smoke.yaml --where docker`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_smoke_job_finishes_a_step_in_the_container(headroom_image, tmp_path):
    headroom = str(Path(sys.executable).with_name("headroom"))
    argv = [headroom, "run", str(ROOT / "jobs" / "smoke.yaml")]
    argv += ["--where", "docker", "--set", f"container.image={headroom_image.tag}"]
    # Its own cache: the container must compile, not find what a process compiled for other cores.
    argv += ["--set", f"cache_dir={tmp_path / 'cache'}"]
    environment = {**os.environ, "DOCKER_HOST": headroom_image.engine.host}  # noqa: TID251
    done = subprocess.run(
        argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [run_dir] = (tmp_path / "runs").iterdir()
    log = (run_dir / "run.log").read_text()
    assert re.search(r"^step=0 loss=\S+ entropy=\S+ reward_mean=\S+ dt=\S+s", log, re.MULTILINE)
    assert log.endswith("exit_status=0\n")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["where"] == "docker"
    assert manifest["state"] == "finished"
    assert manifest["exit_status"]["code"] == 0
    assert manifest["image"].startswith(headroom_image.tag)
    assert manifest["packages"]["jax"] == "0.8.2"
    [step] = [json.loads(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()]
    assert step["reward_std"] > 0  # completions differ in reward: see the job's comment on its seed
    assert step["grad_norm"] > 0
    latest = tmp_path / "logs" / "smoke_latest.log"
    assert latest.read_text() == log
