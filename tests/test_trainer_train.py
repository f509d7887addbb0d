import json
import logging
import math
import re
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from jobs import spec
from jobs.records import STEPS_FILE, EvalRecord, StepRecord
from trainer.data import prompts_of_step
from trainer.refusal import Refusal
from trainer.reward import last_number
from trainer.rollout import Completions
from trainer.train import (
    Phases,
    PlatformError,
    Rolled,
    check_platform,
    evaluate_only,
    learn,
    open_session,
    read_prompts,
    read_weights,
    train,
)
from trainer.update.program import Learned, Update

# What differs between two runs of the same thing.
GROUP, TOKENS = 4, 24
OF_TIME = {"dt_s", "seconds", "tokens_per_s", "host_rss_bytes"}
LINE = re.compile(r"^step=0 loss=\S+ entropy=\S+ reward_mean=\S+ dt=\S+s")


def job(**keys):
    """A job of the tiny model that takes seconds; f32, so that numbers can be compared."""
    rollout = {
        "prompts_per_step": 2,
        "group_size": GROUP,
        "max_prompt_tokens": 192,
        "max_completion_tokens": TOKENS,
        "dtype": "float32",
        **keys.pop("rollout", {}),
    }
    update = {"design": "reference", "update_dtype": "float32", **keys.pop("update", {})}
    return spec.Job(
        **{
            "name": "train",
            "accelerator": "cpu-4",
            "model": "tiny",
            "steps": 2,
            "system_prompt": "",
            "rollout": spec.Rollout(**rollout),
            "train": spec.Train(**{"learning_rate": 1e-3, **keys.pop("train", {})}),
            "update": spec.Update(**update),
            **keys,
        }
    )


def records(run_dir):
    """Every line of steps.jsonl, as the record it is."""
    lines = (run_dir / STEPS_FILE).read_text().splitlines()
    kinds = [EvalRecord if "eval_step" in json.loads(one) else StepRecord for one in lines]
    return [kind.model_validate_json(one) for kind, one in zip(kinds, lines, strict=True)]


def run(asked, run_dir):
    train(asked, run_dir, Phases(run_dir))
    return records(run_dir)


def without_times(found):
    return [record.model_dump(exclude=OF_TIME) for record in found]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two problems of which the first step solves some and not others, so that there is to learn.

    The completions do not depend on the answers: a first look at them says what is a right one.
    """
    folder = tmp_path_factory.mktemp("data")
    path = folder / "rows.jsonl"

    def write(answers):
        rows = zip(("How many?", "And how many more?"), answers, strict=True)
        lines = [json.dumps({"question": q, "answer": f"#### {a}"}) for q, a in rows]
        path.write_text("\n".join(lines) + "\n")
        return spec.Data(path=str(path))

    session = open_session(job(data=write([0, 0])), Phases(folder))
    session.rollout.hand_over(read_weights(session))
    prompts = read_prompts(session, "train")
    asked = prompts_of_step(session.job, prompts, 0)
    found = session.rollout.generate(
        [p.tokens for p in asked], group_size=GROUP, temperature=1.0, first_sequence=0
    )
    texts = found.texts(session.model.tokenizer)
    answers = {}
    for i, prompt in enumerate(asked):
        numbers = [last_number(text) for text in texts[i * GROUP : (i + 1) * GROUP]]
        seen = sorted({n for n in numbers if n is not None and re.fullmatch(r"[0-9]+", n)})
        answers[prompt.row.question] = seen[0] if len(seen) + (None in numbers) > 1 else "none"
    assert set(answers.values()) != {"none"}
    return write([answers[prompt.row.question] for prompt in prompts])


@dataclass
class Once:
    """A run that several tests look at."""

    job: spec.Job
    records: list
    lines: list


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.extend(record.getMessage().splitlines())


@pytest.fixture(scope="module")
def once(tmp_path_factory, data):
    log, heard, asked = logging.getLogger("trainer"), Lines(), job(data=data)
    log.addHandler(heard)
    log.setLevel(logging.INFO)
    try:
        found = run(asked, tmp_path_factory.mktemp("run"))
    finally:
        log.removeHandler(heard)
        log.setLevel(logging.NOTSET)
    return Once(asked, found, heard.lines)


def test_every_step_leaves_a_record_and_the_line_of_the_sop(once):
    assert [record.step for record in once.records] == [0, 1]
    assert len([line for line in once.lines if LINE.match(line)]) == 1
    assert [line.split()[0] for line in once.lines if line.startswith("step=")] == [
        "step=0",
        "step=1",
    ]


def test_the_log_tells_the_model_the_data_and_the_samples(once):
    log = "\n".join(once.lines)
    assert "model=tiny layers=2 embed=128 vocab=320 devices=4 platform=cpu engine=naive" in log
    assert "data split=train prompts=2 left_out=0 (longer than 192 tokens)" in log
    # Two of each step, with question, completion and rewards.
    assert len(re.findall(r"^sample \d: reward=\S+ correct=\S+ format=\S+ tags=", log, re.M)) == 4
    assert len(re.findall(r"^  \? ", log, re.M)) == 4


def test_a_records_numbers_fit_together(once):
    for record in once.records:
        weights = once.job.reward.model_dump()
        total = sum(weights[name] * value for name, value in record.rewards.items())
        assert record.reward_mean == pytest.approx(total, abs=1e-6)
        assert record.mean_at_k == pytest.approx(record.rewards["correct"], abs=1e-6)
        assert record.pass_at_k >= max(record.pass_at_1, record.mean_at_k)
        assert 0 < record.completion_tokens_mean <= record.completion_tokens_max <= TOKENS
        # A random model of 320 tokens is a little less sure than a flat die.
        assert 4.5 < record.entropy < math.log(320)
        assert record.learning_rate == pytest.approx(1e-3)
        assert record.kl is None
        assert record.clipped_fraction == 0
        assert set(record.seconds) == {"rollout", "reward", "update", "hand_over", "other"}
        assert sum(record.seconds.values()) == pytest.approx(record.dt_s)
        assert all(value >= 0 for value in record.seconds.values())
        tokens = record.completion_tokens_mean * once.job.sequences_per_step
        assert record.tokens_per_s == pytest.approx(tokens / record.dt_s)
        # JAX, its programs and the libraries: some hundred MB, and not the machine's TB.
        assert 2**27 < record.host_rss_bytes < 2**36
        assert record.hbm_peak_bytes is None


def test_a_step_with_unequal_rewards_learns(once):
    first, second = once.records
    assert 0 < first.rewards["correct"] < 1
    assert first.reward_std > 0
    assert first.grad_norm > 0
    # Ratios are 1, and the advantages of a group sum to 0.
    assert first.loss == pytest.approx(0.0, abs=1e-6)
    assert second.entropy != first.entropy


def test_a_seed_gives_the_same_run_again(once, tmp_path):
    assert without_times(run(once.job, tmp_path)) == without_times(once.records)


def test_another_seed_gives_another_run(once, data, tmp_path):
    found = run(job(data=data, seed=1, steps=1), tmp_path)
    assert without_times(found) != without_times(once.records[:1])


def test_no_step_loads_everything_and_leaves_an_empty_record(tmp_path):
    assert run(job(steps=0), tmp_path) == []


def test_the_policy_is_evaluated_after_every_so_many_steps_and_no_step_is_changed_by_it(
    once, data, tmp_path
):
    asked = job(
        data=data,
        steps=3,
        eval_every_steps=2,
        # Three prompts, two at a time: the last call is filled up.
        evaluation=spec.Evaluation(
            prompts=3, group_size=GROUP, temperature=1.0, path=write_tests(tmp_path)
        ),
    )
    found = run(asked, tmp_path)
    assert [getattr(record, "step", None) for record in found] == [0, 1, None, 2]
    evaluated = found[2]
    assert isinstance(evaluated, EvalRecord)
    assert (evaluated.eval_step, evaluated.prompts, evaluated.group_size) == (2, 3, GROUP)
    assert without_times(found[:2]) == without_times(once.records)


def test_an_evaluation_alone_is_one_record_and_no_step(tmp_path):
    evaluation = spec.Evaluation(
        prompts=None, group_size=GROUP, temperature=1.0, path=write_tests(tmp_path)
    )
    evaluate_only(job(evaluation=evaluation), tmp_path, Phases(tmp_path))
    [found] = records(tmp_path)
    assert isinstance(found, EvalRecord)
    assert (found.eval_step, found.prompts) == (0, 5)


def write_tests(folder):
    path = folder / "tests.jsonl"
    row = '{"question": "How many are left?", "answer": "#### 3"}\n'
    path.write_text(row * 5)
    return str(path)


def test_a_second_update_has_moved_from_the_first_and_the_engine_has_the_newest_weights(
    data, tmp_path
):
    updates = {"updates_per_rollout": 2, "beta": 0.1, "rollout_correction": 2.0}
    first, second = run(job(data=data, train=updates), tmp_path)
    # The first update is of the reference itself; each of Lion's moves every weight away from it.
    assert second.kl > first.kl > 0
    # The trainer's and the engine's logprobs of the same tokens, f32 both. With the weights of the
    # step before, after two of Lion's steps of 1e-3, the second would be some hundredths apart.
    assert first.mismatch < 1e-4
    assert second.mismatch < 1e-4
    assert abs(second.entropy - first.entropy) > 1e-3


def test_a_group_of_one_is_warned_of(tmp_path, caplog):
    run(job(steps=0, rollout={"prompts_per_step": 4, "group_size": 1}), tmp_path)
    assert "rollout.group_size = 1: every advantage is zero" in caplog.text


def test_a_tpu_job_never_runs_on_a_cpu():
    asked = spec.Job(name="tpu", accelerator="v4-8", model="tiny")
    says = r"accelerator = v4-8 is 4 x TPU v4, but JAX lists 4 x cpu \(cpu\): run on a v4-8, or"
    with pytest.raises(PlatformError, match=says):
        check_platform(asked, jax.devices())
    assert issubclass(PlatformError, Refusal)


def test_a_cpu_job_takes_the_cpu_devices():
    assert check_platform(job(), jax.devices()) == jax.devices()


@pytest.mark.parametrize(("platform", "kind"), [("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H100")])
def test_another_kind_of_device_is_refused_by_its_name(platform, kind):
    class Device:
        pass

    device = Device()
    device.platform, device.device_kind = platform, kind
    asked = spec.Job(name="tpu", accelerator="v4-8", model="tiny")
    with pytest.raises(PlatformError, match=f"lists 4 x {re.escape(kind)} \\({platform}\\)"):
        check_platform(asked, [device] * 4)


def test_phases_add_up_and_tell_where_a_run_was(tmp_path):
    phases = Phases(tmp_path)
    with phases("rollout"):
        assert phases.phase == "rollout"
    first = phases.seconds["rollout"]
    with phases("rollout"):
        np.linalg.inv(np.eye(50) * 2)
    assert phases.seconds["rollout"] > first
    # CPU devices tell no memory.
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_computes_otherwise_is_corrected_for_and_the_mismatch_told(tmp_path):
    session = open_session(job(train={"rollout_correction": 1.5}), Phases(tmp_path))
    sequences = 2 * GROUP
    random = np.random.default_rng(0)
    engine = random.normal(-2, 1, (sequences, TOKENS)).astype(np.float32)
    trainer = engine + random.normal(0, 0.5, engine.shape).astype(np.float32)
    lengths = random.integers(1, TOKENS + 1, sequences).astype(np.int32)
    rolled = Rolled(
        prompts=read_prompts(session, "train")[:1] * sequences,
        completions=Completions(
            tokens=np.ones((sequences, TOKENS), np.int32),
            lengths=lengths,
            logprobs=engine,
            truncated=np.zeros(sequences, bool),
        ),
        texts=[""] * sequences,
        scores={},
        rewards=np.arange(sequences, dtype=np.float32),
    )
    seen = []

    def step(state, batch):
        seen.append(batch)
        zero = dict.fromkeys(("entropy", "clipped_fraction", "kl", "grad_norm", "learning_rate"), 0)
        return state, Learned(loss=0.0, **zero)

    unused = lambda *_: pytest.fail("not asked for")
    update = Update(
        abstract=None,
        init=unused,
        params=lambda s: s,
        step=step,
        logprobs=lambda *_: trainer,
        lower=unused,
        lower_logprobs=unused,
    )
    learn(update, "state", session, rolled, None)
    mask = np.arange(TOKENS) < lengths[:, None]
    [batch] = seen
    np.testing.assert_array_equal(batch.completion_mask, mask)
    np.testing.assert_allclose(batch.old_logprobs, np.where(mask, trainer, 0))
    plain = 1 / (lengths[:, None] * sequences)  # GRPO: each completion's mean, their mean
    ratio = np.minimum(np.exp(trainer.astype(np.float64) - engine), 1.5)
    np.testing.assert_allclose(batch.weights, np.where(mask, plain * ratio, 0), rtol=1e-5)
    assert session.mismatch == pytest.approx(np.abs(trainer - engine)[mask].mean(), rel=1e-5)
