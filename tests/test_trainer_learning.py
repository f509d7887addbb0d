"""It learns: layer_major takes a random model from chance to certainty."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jobs import spec

JOB = """
name: seven
accelerator: cpu
model: tiny
steps: 40
system_prompt: ""
rollout:
  prompts_per_step: 6
  group_size: 16
  max_prompt_tokens: 32
  max_completion_tokens: 4
  dtype: float32
reward: {correct: 1.0, format: 0.0, tags: 0.0}
train: {micro_batch_size: 96, optimizer: adamw, learning_rate: 5.0e-4}
update: {design: layer_major, update_dtype: float32, completions_per_row: group}
metrics: {samples_per_step: 0}
"""


@pytest.mark.parametrize(
    ("engine", "seed"),
    [
        ("naive", 0),
        ("naive", 1),
        ("naive", 2),
        pytest.param("sglang_jax", 0, marks=pytest.mark.engine),
    ],
)
def test_a_random_model_learns_to_say_the_number_that_is_rewarded(tmp_path, engine, seed):
    """The reward is 1 when the last number of four sampled tokens is 7, whatever was asked.

    A random model draws its 4 tokens from 320, 10 of them digits: its last number is 7 in about 1
    of 90 completions. Seen: 0.01 at first, 0.98 to 1 after 40 steps of 96 completions.
    """
    rows = [{"question": str(d), "answer": "#### 7"} for d in range(6)]
    data, job_file = tmp_path / "rows.jsonl", tmp_path / "seven.yaml"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    job_file.write_text(JOB)
    asked = [f"data.path={data}", f"seed={seed}", f"rollout.engine={engine}"]
    job = spec.load(job_file, overrides=[*asked, "engine.dtype=float32"])
    job_json = tmp_path / "job.json"
    job_json.write_text(job.to_json())
    argv = [sys.executable, "-m", "trainer", "train", str(job_json)]
    done = subprocess.run(argv, env=os.environ, capture_output=True, text=True, check=False)  # noqa: TID251
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"engine={engine}" in done.stdout
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward_mean"] for line in lines]
    assert len(rewards) == 40
    assert rewards[0] < 0.06
    assert np.mean(rewards[-10:]) > 0.8, [round(r, 2) for r in rewards[::5]]
