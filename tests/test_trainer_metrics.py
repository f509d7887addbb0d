import re
import struct
from pathlib import Path

import pytest
import wandb
from tensorboardX.proto.event_pb2 import Event

from jobs import spec
from jobs.records import EvalRecord, StepRecord
from trainer.metrics import Metrics, MetricsError, check_wandb_key, line, numbers

STEP = StepRecord(
    step=3,
    loss=-0.0123456789,
    entropy=1.5,
    reward_mean=0.25,
    reward_std=0.5,
    rewards={"correct": 0.125, "format": 0.0, "tags": 0.25},
    pass_at_1=0.25,
    pass_at_k=0.5,
    mean_at_k=0.125,
    completion_tokens_mean=31.5,
    completion_tokens_max=64,
    prompt_tokens_mean=100.0,
    truncated_fraction=0.75,
    clipped_fraction=0.0,
    grad_norm=2.5,
    learning_rate=1e-6,
    kl=None,
    tokens_per_s=12.5,
    seconds={"rollout": 1.25, "update": 2.5, "other": 0.25},
    dt_s=4.0,
    host_rss_bytes=2**30,
    hbm_peak_bytes=None,
)
EVALUATION = EvalRecord(
    eval_step=4, prompts=8, group_size=2, pass_at_1=0.5, pass_at_k=0.75, reward_mean=1.0, dt_s=2.0
)


def job(**metrics):
    return spec.Job(
        name="metrics", accelerator="cpu", model="tiny", metrics=spec.Metrics(**metrics)
    )


def test_a_steps_line_is_the_one_that_the_sops_readers_look_for():
    text = line(STEP)
    assert re.match(
        r"^step=0 loss=\S+ entropy=\S+ reward_mean=\S+ dt=\S+s", text.replace("=3", "=0", 1)
    )
    assert text.startswith("step=3 loss=-0.012346 entropy=1.5000 reward_mean=0.2500 dt=4.00s ")
    assert "rollout=1.25s update=2.50s" in text
    assert "\n" not in text


def test_an_evaluations_line_tells_its_rates():
    assert line(EVALUATION) == (
        "evaluation after_steps=4 prompts=8 pass@1=0.5000 pass@2=0.7500 reward_mean=1.0000 dt=2.00s"
    )


def test_every_number_has_a_flat_name_and_what_is_none_has_none():
    flat = numbers(STEP)
    assert flat["rewards/correct"] == 0.125
    assert flat["seconds/update"] == 2.5
    assert flat["train/loss"] == -0.0123456789
    assert not {"train/kl", "train/hbm_peak_bytes"} & set(flat)
    assert all(isinstance(value, (int, float)) for value in flat.values())
    assert numbers(EVALUATION)["evaluation/pass_at_1"] == 0.5


def test_records_are_on_disk_as_soon_as_they_are_written_and_a_second_run_appends(tmp_path):
    path = tmp_path / "steps.jsonl"
    with Metrics(job(), tmp_path) as metrics:
        metrics.write(STEP, 3)
        assert StepRecord.model_validate_json(path.read_text()) == STEP
        metrics.write(EVALUATION, 3)
    with Metrics(job(), tmp_path) as metrics:
        metrics.write(STEP, 4)
    first, second, third = path.read_text().splitlines()
    assert EvalRecord.model_validate_json(second) == EVALUATION
    assert first == third
    assert [p.name for p in tmp_path.iterdir()] == ["steps.jsonl"]


def events(path):
    """The scalars of an event file, read by the format alone: length, crc, bytes, crc."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack_from("<Q", data)
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)


def test_tensorboard_gets_every_number(tmp_path):
    with Metrics(job(tensorboard=True), tmp_path) as metrics:
        metrics.write(STEP, 3)
    [path] = (tmp_path / "tensorboard").iterdir()
    found = {tag: (step, value) for step, tag, value in events(path)}
    assert found.keys() == numbers(STEP).keys()
    assert found["train/reward_mean"] == (3, 0.25)


KEY = "0123456789" * 4


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (None, r"WANDB_API_KEY is not there: name it in container\.pass_env"),
        (KEY + "\r", r"carriage return \(a CRLF \.env file\)"),
        (" " + KEY, "begins or ends with white space"),
        (KEY + "\n", "begins or ends with white space"),
        (KEY[:-1], "has 39 characters, a key has 40 or more"),
        ("", "has 0 characters"),
    ],
)
def test_a_key_that_wandb_would_refuse_is_refused_by_its_fault_and_never_shown(key, says):
    with pytest.raises(MetricsError, match=says) as refused:
        check_wandb_key(job(wandb="online"), key)
    assert "offline or disabled" in str(refused.value)
    assert KEY[:20] not in str(refused.value)


def test_a_good_key_passes_and_no_key_is_asked_for_where_none_is_used():
    check_wandb_key(job(wandb="online"), KEY)
    check_wandb_key(job(wandb="online"), KEY * 2)
    for mode in ("offline", "disabled"):
        check_wandb_key(job(wandb=mode), None)


def test_wandb_offline_leaves_a_run_in_the_run_directory(tmp_path):
    with Metrics(job(wandb="offline", wandb_name="a run"), tmp_path) as metrics:
        metrics.write(STEP, 3)
    wandb.teardown()  # its service writes what is left, as it does when the trainer's process ends
    [found] = Path(tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    # Its binary log holds names as plain text.
    content = found.read_bytes()
    assert b"rewards/correct" in content
    assert b"a run" in content
