import json
import re
from pathlib import Path

import numpy as np
import pytest

from jobs.spec import Data, Evaluation, Job, Rollout
from trainer.data import (
    SYSTEM_PROMPT,
    Batch,
    DataError,
    Prompt,
    Row,
    arithmetic_rows,
    fitting_prompts,
    load_rows,
    messages,
    pack,
    prompts_of_step,
    read_jsonl,
)
from trainer.reward import correct, tags, well_formed
from trainer.rollout import Completions
from trainer.tokenizer import tiny_tokenizer

GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k"


def job(**parts):
    rollout = Rollout(prompts_per_step=parts.pop("prompts_per_step", 4), **parts.pop("rollout", {}))
    return Job(name="data", accelerator="cpu", model="tiny", rollout=rollout, **parts)


def numbered(count):
    return [Prompt(row=Row(question=str(i), answer=str(i)), tokens=[i % 256]) for i in range(count)]


# Arithmetic

# Each kind of problem by its own words, solved from the numbers as they come in the text.
SOLUTIONS = [
    (r"has (\d+) \w+ and \w+ gives \w+ (\d+) more\.", lambda a, b: a + b),
    (r"has (\d+) \w+ and gives (\d+) of them to", lambda a, b: a - b),
    (r"has (\d+) \w+\. \w+ buys (\d+) more and then gives (\d+) to", lambda a, b, c: a + b - c),
    (
        r"fills (\d+) boxes with (\d+) \w+ each, and (\d+) \w+ are left over",
        lambda c, b, a: c * b + a,
    ),
    (r"has (\d+) \w+ and \w+ has (\d+) more than .* together", lambda a, b: a + (a + b)),
    (r"sells (\d+) \w+ a day.* in (\d+) days, if (\d+) more are sold", lambda b, c, a: b * c + a),
]


def test_every_arithmetic_answer_is_right():
    kinds = set()
    for row in arithmetic_rows(seed=3, split="train", count=400):
        [(kind, found)] = [
            (kind, solve(*map(int, match.groups())))
            for kind, (pattern, solve) in enumerate(SOLUTIONS)
            if (match := re.search(pattern, row.question))
        ]
        kinds.add(kind)
        assert str(found) == row.answer, row.question
        assert found > 0
    assert kinds == {0, 1, 2, 3, 4, 5}


def test_a_seed_makes_the_same_problems_and_another_seed_or_split_others():
    rows = {
        (seed, split): arithmetic_rows(seed=seed, split=split, count=200)
        for seed in (0, 1)
        for split in ("train", "test")
    }
    assert rows[0, "train"] == arithmetic_rows(seed=0, split="train", count=200)
    questions = [{row.question for row in some} for some in rows.values()]
    # 6 kinds x 110 pairs of names x 8 things x 7 x 4 numbers or more: meetings are rare.
    for i, some in enumerate(questions):
        for other in questions[i + 1 :]:
            assert len(some & other) < 10


def test_more_rows_begin_with_the_same_ones():
    few, many = (arithmetic_rows(seed=0, split="train", count=n) for n in (5, 50))
    assert many[:5] == few


# Files


@pytest.mark.skipif(not GSM8K.is_dir(), reason="no ../shared/data/gsm8k here")
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_real_gsm8k_is_read_whole_and_its_answers_are_numbers(split, count):
    path = GSM8K / f"{split}.jsonl"
    rows = read_jsonl(path)
    assert len(rows) == count
    with path.open(encoding="utf-8") as lines:
        for row, line in zip(rows, lines, strict=True):
            fields = json.loads(line)
            assert row.question == fields["question"]
            assert re.fullmatch(r"-?\d+(\.\d+)?", row.answer), row
            assert fields["answer"].replace(",", "").endswith(f"#### {row.answer}")


def test_our_form_of_file_is_read_with_line_separators_inside_and_empty_lines_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = {"question": "two\u2028lines\x85 and\nmore?", "answer": "so\n#### 1,234"}
    second = {"question": "?", "answer": "#### -5", "extra": 1}
    text = json.dumps(first, ensure_ascii=False) + "\r\n\n" + json.dumps(second)
    path.write_text(text, encoding="utf-8", newline="")
    assert read_jsonl(path) == [
        Row(question=first["question"], answer="1234"),
        Row(question="?", answer="-5"),
    ]


GOOD = '{"question": "?", "answer": "#### 1"}'


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([GOOD, "{not json"], ":2: no word problem"),
        ([GOOD, "", "[1, 2]"], ":3: no word problem"),
        (['"text"'], ":1: no word problem"),
        (["null"], ":1: no word problem"),
        (['{"question": "?"}'], ":1: no word problem"),
        (['{"question": "?", "answer": 7}'], ":1: question and answer must both be text"),
        (['{"question": ["?"], "answer": "#### 7"}'], ":1: question and answer must both be text"),
        ([GOOD, '{"question": "?", "answer": "7"}'], ":2: the answer has no"),
        (['{"question": "?", "answer": "7 ####  "}'], ":1: the answer has no"),
        ([""], "holds no rows"),
    ],
)
def test_a_bad_file_is_refused_with_the_line(tmp_path, lines, says):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=re.escape(f"{path}") + ".*" + re.escape(says)):
        read_jsonl(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="binary cannot be read"):
        read_jsonl(tmp_path / "binary")


def test_the_rows_of_a_split_come_from_where_the_job_says(tmp_path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text('{"question": "a", "answer": "#### 1"}\n')
    test.write_text('{"question": "b", "answer": "#### 2"}\n')
    asked = job(data=Data(path=str(train)), evaluation=Evaluation(path=str(test)))
    assert load_rows(asked, split="train") == [Row(question="a", answer="1")]
    assert load_rows(asked, split="test") == [Row(question="b", answer="2")]
    made = job(data=Data(rows=7), seed=5)
    assert load_rows(made, split="test") == arithmetic_rows(seed=5, split="test", count=7)


# Prompts


def test_the_example_in_the_system_prompt_earns_every_reward():
    example = SYSTEM_PROMPT.partition("like this:\n")[2]
    assert (correct(example, "7"), well_formed(example, "7"), tags(example, "7")) == (1, 1, 1)


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (None, [{"role": "system", "content": SYSTEM_PROMPT}]),
        ("Be short.", [{"role": "system", "content": "Be short."}]),
        ("", []),
    ],
)
def test_a_question_is_asked_with_the_jobs_system_prompt(system, expected):
    asked = messages(job(system_prompt=system), Row(question="1 + 1?", answer="2"))
    assert asked == [*expected, {"role": "user", "content": "1 + 1?"}]


def test_longer_prompts_are_left_out_and_counted():
    rows = [Row(question="x" * n, answer="1") for n in (1, 50, 2, 60, 3)]
    plain = job(system_prompt="", rollout={"max_prompt_tokens": 60})
    found, longer = fitting_prompts(plain, rows, tiny_tokenizer())
    assert [len(p.row.question) for p in found] == [1, 2, 3]
    assert longer == 2
    text = tiny_tokenizer().render_chat([{"role": "user", "content": "x"}])
    assert found[0].tokens == tiny_tokenizer().encode(text)
    # The limit itself still fits.
    exact = job(system_prompt="", rollout={"max_prompt_tokens": len(found[0].tokens)})
    assert len(fitting_prompts(exact, rows, tiny_tokenizer())[0]) == 1


def test_no_prompt_that_fits_is_refused_with_the_lengths():
    rows = [Row(question="x" * n, answer="1") for n in (10, 20)]
    lengths = [len(tiny_tokenizer().encode_chat(messages(job(), row))) for row in rows]
    says = (
        f"leaves none of 2 prompts; the shortest has {lengths[0]} tokens, the longest {lengths[1]}"
    )
    with pytest.raises(DataError, match=says):
        fitting_prompts(job(rollout={"max_prompt_tokens": 8}), rows, tiny_tokenizer())


@pytest.mark.parametrize(("rows", "at_once"), [(12, 4), (7, 3), (3, 5), (1, 2)])
def test_every_epoch_asks_every_prompt_once_in_an_order_of_its_own(rows, at_once):
    prompts, asked = numbered(rows), job(prompts_per_step=at_once)
    steps = 4 * rows  # enough for whole epochs, at_once of them at least
    stream = [p.row.question for n in range(steps) for p in prompts_of_step(asked, prompts, n)]
    epochs = [stream[i : i + rows] for i in range(0, len(stream), rows)]
    assert all(sorted(epoch) == sorted(p.row.question for p in prompts) for epoch in epochs)
    if rows > 5:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_step_alone_asks_what_it_asks_in_the_middle_of_a_run():
    prompts = numbered(10)
    in_a_run = [prompts_of_step(job(prompts_per_step=3), prompts, n) for n in range(9)]
    for step in (8, 3, 0):
        assert prompts_of_step(job(prompts_per_step=3), prompts, step) == in_a_run[step]
    other = [prompts_of_step(job(prompts_per_step=3, seed=1), prompts, n) for n in range(9)]
    assert other != in_a_run


# Batches


def test_prompts_and_completions_are_packed_to_the_left_and_masked():
    completions = Completions(
        tokens=np.array([[11, 12, 2, 99], [21, 22, 23, 24], [2, 99, 99, 99]], np.int32),
        lengths=np.array([3, 4, 1], np.int32),
        logprobs=np.zeros((3, 4), np.float32),
        truncated=np.array([False, True, False]),
    )
    tokens, lengths, mask = pack(
        [[1, 2, 3], [4], [5, 6]], completions, sequence_tokens=7, pad_id=-1
    )
    assert tokens.tolist() == [
        [1, 2, 3, 11, 12, 2, -1],
        [4, 21, 22, 23, 24, -1, -1],
        [5, 6, 2, -1, -1, -1, -1],
    ]
    assert lengths.tolist() == [3, 1, 2]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert (tokens.dtype, lengths.dtype, mask.dtype) == (np.int32, np.int32, np.float32)


def test_micro_batches_are_the_rows_in_order_and_absent_parts_stay_absent():
    batch = Batch(
        tokens=np.arange(12).reshape(6, 2),
        prompt_lengths=np.arange(6),
        completion_mask=np.ones((6, 1)),
        weights=np.ones((6, 1)),
        advantages=np.arange(6.0),
    )
    parts = list(batch.micro_batches(2))
    assert [part.advantages.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    np.testing.assert_array_equal(np.concatenate([p.tokens for p in parts]), batch.tokens)
    assert all(part.old_logprobs is None and part.ref_logprobs is None for part in parts)
