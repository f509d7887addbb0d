"""The main job, whole, in the real image: `headroom run jobs/smoke.yaml --where docker`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(image, folder, *settings, **variables):
    headroom = str(Path(sys.executable).with_name("headroom"))
    # Its own cache: the container must compile, not find what a process compiled for other cores.
    settings = (f"container.image={image.tag}", f"cache_dir={folder / 'cache'}", *settings)
    sets = [word for setting in settings for word in ("--set", setting)]
    return subprocess.run(
        [headroom, "run", str(ROOT / "jobs" / "smoke.yaml"), "--where", "docker", *sets],
        cwd=folder,
        env={**os.environ, "DOCKER_HOST": image.engine.host, **variables},  # noqa: TID251
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_smoke_job_finishes_a_step_in_the_container(headroom_image, tmp_path):
    done = run(headroom_image, tmp_path)
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


def test_a_secret_that_the_trainer_prints_is_starred_in_a_container_s_log(headroom_image, tmp_path):
    token = "hf_a_token_of_this_test"  # noqa: S105
    names = "container.pass_env=[HF_TOKEN, HF_HUB_OFFLINE]"
    told = {"HF_TOKEN": token, "HF_HUB_OFFLINE": "1"}
    done = run(headroom_image, tmp_path, f"model=nobody/{token}", names, **told)
    assert done.returncode in (1, 4, 5)
    [run_dir] = (tmp_path / "runs").iterdir()
    log = (run_dir / "run.log").read_text()
    assert "nobody/" + "*" * len(token) in log
    left = [path for path in run_dir.iterdir() if path.name != "job.json" and path.is_file()]
    assert [
        path.name for path in left if token in path.read_text()
    ] == []  # but as the model's name
    status = json.loads((run_dir / "manifest.json").read_text())["exit_status"]
    assert status["code"] == int(re.search(r"exit_status=(\d+)\n$", log).group(1))
    ours = f"label=headroom.run={run_dir.name}"
    assert headroom_image.engine.docker("ps", "--all", "--quiet", "--filter", ours) == ""
