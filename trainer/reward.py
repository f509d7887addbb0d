"""Answer extraction and rewards: strings in, floats out.

Source: reward_correct, reward_format and tag_count_reward of demon2036/MLLM-JAX at 15154fc
(training2.py), which took the last two from open-r1.
"""

import logging
import re
from collections.abc import Callable, Sequence

import numpy as np
from math_verify import ExprExtractionConfig, parse, verify

from jobs.spec import Reward

# A dash behind a digit, a letter or a bracket is no sign: 10-12, (8)-3.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+|/\d+)?")
_DIVISION_BY_ZERO = re.compile(r"/0+$")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)
# It warns at every start that we set no time limit; see `correct`.
logging.getLogger("math_verify").setLevel(logging.ERROR)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def last_number(text: str) -> str | None:
    """The last number of a text, thousands separators taken out; None when there is none.

    Between the last answer tags where there are some, else anywhere. The seed looked anywhere and
    knew no sign and no thousands separator: "-5" was 5 to it, and "1,200" was 200.

    >>> last_number("<think>2 + 3</think><answer>$1,200.50</answer> or 7")
    '1200.50'
    """
    tagged = _ANSWER.findall(text)
    numbers = _NUMBER.findall(tagged[-1] if tagged else text)
    return numbers[-1].replace(",", "") if numbers else None


def correct(completion: str, answer: str) -> float:
    """1 when the completion's last number equals the answer by math-verify, else 0.

    >>> correct("so he has 24/2 = 12.0", "12")
    1.0
    """
    number = last_number(completion)
    # math-verify finds 0/0 equal to 0 or not by the process's hash seed.
    if number is None or _DIVISION_BY_ZERO.search(number):
        return 0.0
    if number == answer:
        return 1.0
    # 0 is no time limit: one plain number cannot hang the parser, and the limit is a signal, which
    # only the main thread may set.
    read = [ExprExtractionConfig()]
    gold = parse(answer, extraction_config=read, parsing_timeout=0)
    found = parse(number, extraction_config=read, parsing_timeout=0)
    return float(verify(gold, found, timeout_seconds=0))


def well_formed(completion: str, _answer: str) -> float:
    """1 for <think>...</think>, then <answer>...</answer>, and nothing else; else 0."""
    return float(_FORMAT.fullmatch(completion.strip()) is not None)


def tags(completion: str, _answer: str) -> float:
    """A quarter for each of the four tags that stands exactly once."""
    return sum(0.25 for tag in TAGS if completion.count(tag) == 1)


FUNCTIONS: dict[str, Callable[[str, str], float]] = {
    "correct": correct,
    "format": well_formed,
    "tags": tags,
}


def score(completions: Sequence[str], answers: Sequence[str]) -> dict[str, np.ndarray]:
    """Every reward function on every completion, unweighted, f32[batch] by name."""
    pairs = list(zip(completions, answers, strict=True))
    return {
        name: np.array([function(*pair) for pair in pairs], np.float32)
        for name, function in FUNCTIONS.items()
    }


def total(scores: dict[str, np.ndarray], weights: Reward) -> np.ndarray:
    """The weighted sum of the scores, f32[batch]."""
    return sum(
        (np.float32(getattr(weights, name)) * score for name, score in scores.items()),
        start=np.float32(0.0),
    )  # pyright: ignore[reportReturnType]
