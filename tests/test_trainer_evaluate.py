import numpy as np
import pytest

from jobs import spec
from trainer.data import Prompt, Row
from trainer.evaluate import evaluate
from trainer.rollout import Completions
from trainer.tokenizer import tiny_tokenizer


class Answers:
    """An engine whose completions are given in advance, by prompt: one text a completion."""

    name = "answers"

    def __init__(self, texts):
        self.texts, self.calls = texts, []

    def hand_over(self, params):
        raise AssertionError("an evaluation hands nothing over")

    def sleep(self):
        raise AssertionError("an evaluation does not send the engine to sleep")

    def generate(self, prompts, *, group_size, temperature, first_sequence):
        numbers = range(first_sequence, first_sequence + len(prompts) * group_size)
        self.calls.append(([p[0] for p in prompts], group_size, temperature, numbers))
        rows = [tiny_tokenizer().encode(t) for p in prompts for t in self.texts[p[0]]]
        tokens = np.zeros((len(rows), 64), np.int32)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
        return Completions(
            tokens=tokens,
            lengths=np.array([len(ids) for ids in rows], np.int32),
            logprobs=np.zeros(tokens.shape, np.float32),
            truncated=np.zeros(len(rows), bool),
        )


def job(*, at_once, group_size, **evaluation):
    return spec.Job(
        name="evaluate",
        accelerator="cpu",
        model="tiny",
        rollout=spec.Rollout(prompts_per_step=at_once),
        evaluation=spec.Evaluation(group_size=group_size, **evaluation),
    )


def prompts(answers):
    return [
        Prompt(row=Row(question="?", answer=str(answer)), tokens=[number])
        for number, answer in enumerate(answers)
    ]


def test_pass_at_1_is_the_mean_and_pass_at_k_the_share_with_any():
    engine = Answers([["1", "1"], ["2", "9"], ["9", "9"]])
    found = evaluate(
        job(at_once=3, group_size=2), engine, prompts([1, 2, 3]), tiny_tokenizer(), after_steps=7
    )
    # Correct: 2 of 2, 1 of 2, 0 of 2. The default weights give 1 for correct, no tags here.
    assert (found.eval_step, found.prompts, found.group_size) == (7, 3, 2)
    assert found.pass_at_1 == pytest.approx(3 / 6)
    assert found.pass_at_k == pytest.approx(2 / 3)
    assert found.reward_mean == pytest.approx(3 / 6)
    assert found.dt_s > 0


def test_the_last_call_is_filled_up_and_what_fills_it_is_not_counted():
    # Five prompts, two at a time: the fifth stands twice in the last call, and is right.
    engine = Answers([["9"], ["9"], ["9"], ["9"], ["<answer>5</answer>"]])
    asked = job(at_once=2, group_size=1)
    found = evaluate(asked, engine, prompts([1, 2, 3, 4, 5]), tiny_tokenizer(), after_steps=0)
    assert [call[0] for call in engine.calls] == [[0, 1], [2, 3], [4, 4]]
    assert (found.prompts, found.pass_at_1) == (5, pytest.approx(1 / 5))
    # Correct 1, and two of four tags at half weight: 1.25.
    assert found.reward_mean == pytest.approx(1.25 / 5)


def test_sequences_are_numbered_apart_from_each_other_and_from_all_training():
    engine = Answers([["1", "1"]] * 4)
    asked = job(at_once=2, group_size=2, temperature=0.5)
    evaluate(asked, engine, prompts([1, 1, 1, 1]), tiny_tokenizer(), after_steps=0)
    numbers = [n for call in engine.calls for n in call[3]]
    assert len(set(numbers)) == len(numbers) == 8
    # A job of a million steps of a thousand sequences stays below.
    assert min(numbers) > 10**9
    assert max(numbers) < 2**32
    assert {call[1:3] for call in engine.calls} == {(2, 0.5)}
