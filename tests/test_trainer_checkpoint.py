"""What is saved is all that the next step needs, and nothing else is taken for it."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from jobs import spec
from jobs.records import STEPS_FILE
from trainer.checkpoint import CheckpointError, Checkpoints, decisive, read_record, restore
from trainer.mesh import make_mesh
from trainer.update.program import make_update
from trainer.weights import load_params, open_model

JOB = """
name: saved
accelerator: cpu-2
model: tiny
steps: 4
system_prompt: ""
rollout:
  prompts_per_step: 2
  group_size: 4
  max_prompt_tokens: 192
  max_completion_tokens: 8
  dtype: float32
train: {optimizer: adamw, learning_rate: 1.0e-3, warmup_updates: 3}
update: {update_dtype: float32}
checkpoint: {every_steps: 1}
metrics: {samples_per_step: 0}
"""
OF_TIME = {"dt_s", "seconds", "tokens_per_s", "host_rss_bytes"}


def write(folder, *overrides):
    """A run directory with a job in it; its job.json."""
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB)
    job_json = folder / "job.json"
    job_json.write_text(spec.load(folder / "job.yaml", overrides=overrides).to_json())
    return job_json


def start(job_json, verb="train"):
    argv = [sys.executable, "-u", "-m", "trainer", verb, str(job_json)]
    return subprocess.Popen(
        argv,
        env=os.environ,  # noqa: TID251
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    said, _ = process.communicate(timeout=240)
    return process.returncode, said


def steps(run):
    """The records of a run's steps, without what differs from run to run."""
    lines = (run / STEPS_FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in OF_TIME} for record in records]


def state_of(job_json, checkpoint):
    """The leaves of a checkpoint's state, as the job lays them."""
    asked = [f"checkpoint.resume={checkpoint}"]
    job = spec.load(job_json, overrides=asked)
    model = open_model(job.model)
    mesh = make_mesh(job, jax.devices()[: job.target.devices])
    state, _ = restore(job, make_update(job, model.architecture, mesh).abstract)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("design", ["layer_major", "reference"])
def test_a_killed_run_goes_on_to_the_very_bits(tmp_path, design):
    asked = f"update.design={design}"
    code, said = finish(start(write(tmp_path / "straight", asked)))
    assert code == 0, said
    # Killed as it begins its third step.
    process = start(write(tmp_path / "killed", asked))
    for line in process.stdout:
        if line.startswith("checkpoint=") and "steps=2" in line:
            process.kill()
            break
    finish(process)
    assert process.returncode == -signal.SIGKILL
    saved = tmp_path / "killed" / "checkpoints" / "step_000002"
    resumed = write(tmp_path / "resumed", asked, f"checkpoint.resume={saved}")
    code, said = finish(start(resumed))
    assert code == 0, said
    assert "resumed from" in said
    assert steps(tmp_path / "resumed") == steps(tmp_path / "straight")[2:]
    ends = [tmp_path / name / "checkpoints" / "step_000004" for name in ("straight", "resumed")]
    for ours, theirs in zip(*(state_of(resumed, end) for end in ends), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    # The newest two are kept.
    kept = sorted(path.name for path in (tmp_path / "straight" / "checkpoints").iterdir())
    assert kept == ["step_000003", "step_000004"]


def test_asked_to_stop_it_saves_the_last_whole_step(tmp_path):
    job_json = write(tmp_path / "run", "steps=1000", "checkpoint.every_steps=1000")
    process = start(job_json)
    for line in process.stdout:
        if line.startswith("step=1 "):
            process.terminate()
            break
    code, said = finish(process)
    assert code == 143, said
    [saved] = (tmp_path / "run" / "checkpoints").iterdir()
    done = read_record(saved).steps
    assert done >= 2
    assert saved.name == f"step_{done:06d}"
    assert len(steps(tmp_path / "run")) == done


# What is refused


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint after five steps, its job, and the update's state in it."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    job = spec.load(write(folder))
    model = open_model(job.model)
    update = make_update(
        job, model.architecture, make_mesh(job, jax.devices()[: job.target.devices])
    )
    state = update.init(load_params(model, lambda _, leaf: leaf))
    Checkpoints(job, folder).save(state, 5)
    return folder / "checkpoints" / "step_000005", job, update.abstract


def asking(job, folder, **changes):
    checkpoint = job.checkpoint.model_copy(update={"resume": str(folder)})
    return job.model_copy(update={"checkpoint": checkpoint, "steps": 9, **changes})


def test_what_was_saved_is_what_comes_back(saved):
    folder, job, abstract = saved
    state, done = restore(asking(job, folder), abstract)
    assert done == 5
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_another_jobs_checkpoint_is_refused_by_the_key_that_differs(saved):
    folder, job, abstract = saved
    train = job.train.model_copy(update={"learning_rate": 5e-4})
    with pytest.raises(CheckpointError, match=r"train\.learning_rate = 0\.0005,.* had 0\.001"):
        restore(asking(job, folder, train=train), abstract)
    # Where it runs, what it tells and how long it goes on are free; what is sampled from is not.
    decided = decisive(job)
    assert not {"steps", "name", "accelerator", "engine.residency"} & decided.keys()
    assert decided["engine.dtype"] == "bfloat16"
    cosine = job.train.model_copy(update={"schedule": "cosine"})
    assert decisive(job.model_copy(update={"train": cosine}))["steps"] == 4


def test_other_rows_behind_the_same_path_are_another_job(saved, tmp_path):
    _, job, _ = saved
    rows = tmp_path / "rows.jsonl"
    read = job.model_copy(update={"data": job.data.model_copy(update={"path": str(rows)})})
    rows.write_text("a")
    before = decisive(read)
    assert decisive(read) == before
    rows.write_text("b")
    assert decisive(read) != before


def test_a_checkpoint_can_be_evaluated(saved, tmp_path):
    folder, _, _ = saved
    asked = (f"checkpoint.resume={folder}", "steps=5", "evaluation.prompts=2")
    job_json = write(tmp_path / "run", *asked)
    code, said = finish(start(job_json, "evaluate"))
    assert code == 0, said
    record = json.loads((tmp_path / "run" / STEPS_FILE).read_text())
    assert record["eval_step"] == 5


def test_fewer_steps_than_are_done_are_refused(saved):
    folder, job, abstract = saved
    with pytest.raises(CheckpointError, match=r"5 steps in it, and steps = 4"):
        restore(asking(job, folder, steps=4), abstract)


@pytest.mark.parametrize("damage", ["flip", "remove", "record"])
def test_a_damaged_checkpoint_is_refused(saved, tmp_path, damage):
    folder, job, abstract = saved
    copy = tmp_path / folder.name
    subprocess.run(["cp", "-r", folder, copy], check=True)
    largest = max((copy / "state").rglob("*"), key=lambda path: path.stat().st_size)
    if damage == "flip":
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif damage == "remove":
        largest.unlink()
    else:
        (copy / "checkpoint.json").write_text("{")
    expected = "no whole checkpoint" if damage == "record" else "is not what was saved"
    if damage == "flip":  # what to do depends on what else there is
        (tmp_path / "step_000004").mkdir()
        expected += r".*--set checkpoint\.resume=.*step_000004"
    with pytest.raises(CheckpointError, match=expected):
        restore(asking(job, copy), abstract)


def test_what_is_half_written_is_no_checkpoint_and_is_written_anew(saved, tmp_path):
    _, job, abstract = saved
    folder, _, _ = saved
    part = tmp_path / "checkpoints" / ".step_000006.part"
    part.mkdir(parents=True)
    (part / "rubbish").write_text("half")
    state, _ = restore(asking(job, folder), abstract)
    Checkpoints(job, tmp_path).save(state, 6)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000006"]


def test_without_checkpoints_nothing_is_saved(saved, tmp_path):
    _, job, _ = saved
    never = job.model_copy(update={"checkpoint": spec.Checkpoint()})
    checkpoints = Checkpoints(never, tmp_path)
    assert not checkpoints.due(1)
    checkpoints.save_last({}, 3)
    assert list(tmp_path.iterdir()) == []
