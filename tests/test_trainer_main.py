import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from jobs.records import Failure
from trainer.hf_folder import save_hf_folder
from trainer.weights import load_params, open_model

REPOSITORY = Path(__file__).parents[1]
CACHE = REPOSITORY / ".cache"  # where conftest.py keeps compiled programs, too: in its folder jax
JOB = {
    "name": "main",
    "accelerator": "cpu",
    "model": "tiny",
    "system_prompt": "",
    "cache_dir": str(CACHE),
    "rollout": {
        "prompts_per_step": 2,
        "group_size": 2,
        "max_prompt_tokens": 192,
        "max_completion_tokens": 8,
    },
    "train": {},
    "update": {"design": "reference"},
}


def environment(**changes):
    """This process's, without what conftest.py set for JAX; None takes a variable away."""
    ours = {"JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "WANDB_API_KEY"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}  # noqa: TID251
    return kept | changes


def write(folder, **changes):
    """job.json in a run's directory, JOB with parts changed."""
    job = dict(JOB)
    for name, value in changes.items():
        job[name] = {**JOB.get(name, {}), **value} if isinstance(value, dict) else value
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def start(*arguments, **changes):
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment(PYTHONUNBUFFERED="1", **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, **changes):
    """(exit code, what it printed, what it printed on stderr)."""
    process = start(*arguments, **changes)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def failure(folder):
    return Failure.model_validate_json((folder / "failure.json").read_text())


@pytest.mark.parametrize("arguments", [[], ["train"], ["fly", "job.json"], ["train", "a", "b"]])
def test_wrong_usage_tells_the_usage_and_exits_with_2(arguments):
    code, out, _ = run(*arguments)
    assert code == 2
    assert out.startswith("usage: python -m trainer {train|evaluate")


def refused(found):
    """The lines of a refusal, each an error and no traceback anywhere."""
    code, out, err = found
    assert code == 1
    assert "Traceback" not in out + err
    lines = out.splitlines()
    assert all(line.startswith("Error: ") for line in lines), out
    return lines


def test_a_bad_job_is_refused_with_a_line_for_each_mistake(tmp_path):
    # 3 sequences a step cannot be shared out over 2 devices; and nothing was loaded.
    path = write(
        tmp_path,
        accelerator="cpu-2",
        stepps=3,
        rollout={"prompts_per_step": 3, "group_size": 1, "temperature": -1},
    )
    lines = refused(run("train", path))
    assert len(lines) == 3
    assert "rollout.temperature" in lines[0] + lines[1] + lines[2]
    assert any("unknown key 'stepps'" in line for line in lines)
    assert any("over 2 devices (mesh dp 1 x fsdp 2)" in line for line in lines)


def test_a_job_that_is_not_there_is_refused(tmp_path):
    [line] = refused(run("train", tmp_path / "none.json"))
    assert str(tmp_path / "none.json") in line


def test_a_model_that_is_not_there_is_refused_in_a_line_and_written_down(tmp_path):
    [line] = refused(run("train", write(tmp_path, model="./no/such/model")))
    found = failure(tmp_path)
    assert line == f"Error: {found.message}"
    assert "no/such/model" in line
    assert (found.kind, found.phase, found.step) == ("ModelError", "load", -1)
    assert "Traceback" in found.traceback


def test_a_tpu_job_on_a_cpu_is_refused_in_a_line(tmp_path):
    # Named in the environment, as somebody on a TPU VM might have it: the job decides, not that.
    path = write(tmp_path, accelerator="v4-8", rollout={"prompts_per_step": 2})
    [line] = refused(run("train", path, JAX_PLATFORMS="cpu"))
    assert line.startswith("Error: accelerator = v4-8 is 4 x TPU v4, but JAX lists ")
    assert failure(tmp_path).kind == "PlatformError"


@pytest.mark.parametrize("key", [None, "0123456789" * 4 + "\r"])
def test_a_bad_wandb_key_is_refused_before_the_model_is_looked_for(tmp_path, key):
    path = write(tmp_path, model="./no/such/model", metrics={"wandb": "online"})
    [line] = refused(run("train", path, **({} if key is None else {"WANDB_API_KEY": key})))
    assert "WANDB_API_KEY" in line
    assert failure(tmp_path).kind == "MetricsError"


def test_a_loss_that_is_not_finite_ends_in_a_traceback_and_a_record_of_where(tmp_path):
    tiny = open_model("tiny")
    params = load_params(tiny, lambda _, leaf: leaf)
    params["norm"][0] = np.nan
    folder = tmp_path / "model"
    save_hf_folder(params, folder, architecture=tiny.architecture, tokenizer=tiny.tokenizer)
    code, out, err = run("train", write(tmp_path, model=str(folder)))
    assert code == 70  # not 1, Python's own for an exception: that is a refusal here
    assert "step=0" not in out
    said = err.rstrip().splitlines()[-1]
    assert said.startswith("trainer.finite.LossError: loss = nan, gradient norm = nan: ")
    found = failure(tmp_path)
    assert (found.kind, found.phase, found.step) == ("LossError", "update", 0)
    assert said.endswith(found.message)
    assert found.traceback.rstrip().splitlines()[-1] == said
    assert (tmp_path / "steps.jsonl").read_text() == ""
    # The batch is there for numpy alone, and it is that of the log.
    assert f"{tmp_path / 'bad_batch.npz'}; " in said
    with np.load(tmp_path / "bad_batch.npz") as bad:
        batch = dict(bad)
    assert (batch["step"], batch["update"]) == (0, 0)
    assert np.isnan(batch["loss"])
    rows = zip(batch["tokens"], batch["prompt_lengths"], batch["questions"], strict=True)
    for tokens, length, question in rows:
        assert question in tiny.tokenizer.decode(tokens[:length])
    assert batch["completion_mask"].shape == batch["engine_logprobs"].shape == (4, 8)
    assert batch["rewards"].shape == batch["score_correct"].shape == (4,)


@pytest.mark.parametrize("asked", [0, 7])
def test_a_library_that_ends_the_program_has_failed_whatever_it_says(tmp_path, asked):
    code = (
        "import sys\n"
        "from trainer import train\n"
        "from trainer.__main__ import main\n"
        f"train.train = lambda *_: sys.exit({asked})\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    argv = [sys.executable, "-c", code, "train", write(tmp_path)]
    done = subprocess.run(argv, cwd=REPOSITORY, env=environment(), timeout=100, check=False)
    assert done.returncode == 70
    assert (failure(tmp_path).kind, failure(tmp_path).message) == ("SystemExit", str(asked))


def test_a_termination_ends_a_run_with_its_code_as_soon_as_python_runs(tmp_path):
    process = start("train", write(tmp_path, steps=10**6))
    stop = threading.Timer(200, process.kill)
    stop.start()
    try:
        lines = iter(process.stdout.readline, "")
        before = []
        for line in lines:
            before.append(line)
            if line.startswith("step=1 "):
                process.send_signal(signal.SIGTERM)
                break
        out, err = process.communicate(timeout=60)
    finally:
        stop.cancel()
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, "".join(before) + out + err
    # Where it comes while a step is recorded, it waits until that is done.
    assert "stopped by SIGTERM" in out or "SIGTERM: stopping as soon as the state is whole" in out
    assert "Traceback" not in out + err
    assert not (tmp_path / "failure.json").exists()
    # Every line of the record is whole.
    for line in (tmp_path / "steps.jsonl").read_text().splitlines():
        json.loads(line)


def told(folder, accelerator, **changes):
    """What the trainer tells JAX and the libraries, on top of what a person had set."""
    code = (
        "import json, os, sys\n"
        "from jobs.spec import load\n"
        "from trainer.__main__ import set_environment\n"
        "assert 'jax' not in sys.modules, 'too late to tell it'\n"
        "set_environment(load(sys.argv[1]))\n"
        "print(json.dumps(dict(os.environ)))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, write(folder, accelerator=accelerator)],
        cwd=REPOSITORY,
        env=environment(**changes),
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return json.loads(found.stdout)


def test_a_cpu_job_tells_jax_its_platform_and_device_count_after_what_a_person_had_set(tmp_path):
    found = told(tmp_path, "cpu-2", XLA_FLAGS="--xla_dump_to=x", JAX_PLATFORMS="tpu")
    assert found["JAX_PLATFORMS"] == "cpu"
    # The last of two counts is the one that counts.
    assert found["XLA_FLAGS"] == "--xla_dump_to=x --xla_force_host_platform_device_count=2"
    assert found["TOKENIZERS_PARALLELISM"] == "false"
    assert found["HF_HUB_ENABLE_HF_TRANSFER"] == "1"


def test_a_tpu_job_leaves_the_platform_to_jax(tmp_path):
    found = told(tmp_path, "v4-8", JAX_PLATFORMS="cpu")
    assert "JAX_PLATFORMS" not in found
    assert "XLA_FLAGS" not in found
