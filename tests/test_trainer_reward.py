import threading

import numpy as np
import pytest

from jobs.spec import Reward
from trainer.reward import correct, last_number, score, tags, total, well_formed

GOOD = "<think>3 + 4 = 7</think>\n<answer>7</answer>"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("none at all, <answer>seven</answer>", None),
        ("7", "7"),
        ("first 3, then 4, so 7.", "7"),
        ("she pays $1,200", "1200"),
        ("1,234,567 people", "1234567"),
        ("3.50 euros", "3.50"),
        ("it is 3/4", "3/4"),
        ("it is -5", "-5"),
        ("10 - 3 = 7", "7"),
        ("it falls to -12.5.", "-12.5"),
        ("the range 10-12", "12"),  # a dash between numbers is no sign
        ("12-5", "5"),
        ("(8)-3", "3"),
        ("version-2", "2"),
        ("<answer>7</answer> and 9 more", "7"),  # inside the tags first
        ("<answer>7</answer> no: <answer>8</answer>", "8"),  # the last answer
        ("<answer>\n 7 apples \n</answer>", "7"),
        ("<answer>7", "7"),  # an open tag is no answer
        ("5 <answer>none</answer>", None),  # tags without a number: not looked at outside
        ("the answer is 7,", "7"),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (GOOD, "7", 1.0),
        ("7", "7", 1.0),
        ("7.0", "7", 1.0),
        ("14/2", "7", 1.0),
        ("0.5", "1/2", 1.0),
        ("007", "7", 1.0),
        ("$1,200.00", "1200", 1.0),
        ("-7", "-7", 1.0),
        ("it is 7%", "7", 1.0),
        ("<answer>7</answer> or 8", "7", 1.0),
        ("8", "7", 0.0),
        ("-7", "7", 0.0),
        ("7", "-7", 0.0),
        ("70", "7", 0.0),
        ("7.1", "7", 0.0),
        ("7 then 8", "7", 0.0),
        ("", "7", 0.0),
        ("seven", "7", 0.0),
        # What a random model may write must not stop a run.
        ("1/0", "7", 0.0),
        ("0/0", "0", 0.0),
        ("٣", "3", 0.0),
        ("9" * 5000, "7", 0.0),
        ("7" + "0" * 5000 + "/3", "7", 0.0),
        ("0." + "0" * 5000 + "7", "7", 0.0),
        ("1,,,,2", "7", 0.0),
        ("\x00\ufffd7\u2028", "7", 1.0),
    ],
)
def test_a_completion_is_correct_when_its_last_number_equals_the_answer(
    completion, answer, expected
):
    assert correct(completion, answer) == expected


def test_rewards_are_given_in_a_thread_other_than_the_main_one():
    found = []
    thread = threading.Thread(target=lambda: found.append(correct("14/2", "7")))
    thread.start()
    thread.join()
    assert found == [1.0]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (GOOD, 1.0),
        ("  " + GOOD + "\n\n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<think>\na\nb\n</think>\n\n<answer>7</answer>", 1.0),
        ("Well: " + GOOD, 0.0),
        (GOOD + " Done.", 0.0),
        ("<answer>7</answer><think>x</think>", 0.0),
        ("<think>x</think> so <answer>7</answer>", 0.0),
        ("<think>x</think><answer>7", 0.0),
        ("<answer>7</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_the_format_is_thoughts_then_an_answer_and_nothing_else(completion, expected):
    assert well_formed(completion, "7") == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (GOOD, 1.0),
        ("", 0.0),
        ("<think>", 0.25),
        ("<think></think>", 0.5),
        ("<think></think><answer>", 0.75),
        ("</answer></think>", 0.5),  # anywhere
        ("<think><think></think><answer></answer>", 0.75),  # twice is once too often
        ("<THINK>", 0.0),
    ],
)
def test_each_tag_that_stands_once_is_a_quarter(completion, expected):
    assert tags(completion, "7") == expected


def test_scores_are_given_by_function_in_the_order_of_the_completions():
    found = score([GOOD, "7", "<think>"], ["7", "8", "7"])
    assert {name: value.tolist() for name, value in found.items()} == {
        "correct": [1.0, 0.0, 0.0],
        "format": [1.0, 0.0, 0.0],
        "tags": [1.0, 0.0, 0.25],
    }
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}


def test_the_total_is_the_weighted_sum_and_a_weight_of_zero_counts_for_nothing():
    scores = score([GOOD, "7", "<think>"], ["7", "7", "7"])
    # correct + format / 2 + tags / 2: 1 + 0.5 + 0.5; 1; 0.125.
    np.testing.assert_array_equal(total(scores, Reward()), np.float32([2.0, 1.0, 0.125]))
    other = Reward(correct=3.0, format=0.0, tags=-1.0)
    np.testing.assert_array_equal(total(scores, other), np.float32([2.0, 3.0, -0.25]))
    assert total(scores, Reward()).dtype == np.float32


def test_completions_and_answers_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        score(["7", "8"], ["7"])
