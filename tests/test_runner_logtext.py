"""Reading lines of logs: colours, wrappers, escapes, blocks."""

import re

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from runner.cause import key_words, size_bytes, spaced
from runner.causes import CAUSES, KEY_PHRASES, KEY_WORDS
from runner.excerpt import (
    AFTER,
    LONGEST_LINE,
    MOST_LINES,
    SAME_SHAPE,
    TAIL,
    Excerpt,
    one_search,
    physical_lines,
)
from runner.logtext import is_low, lines, peeled, read_log, uncoloured, unescaped

SIGNS = [(cause.id, sign.pattern) for cause in CAUSES for sign in cause.signs]


def excerpt():
    return Excerpt(one_search(KEY_WORDS), one_search(KEY_PHRASES))


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\x1b[1;31mError\x1b[0m: x", "Error: x"),
        (b"\x1b]8;;http://a\x07link\x1b]8;;\x07", "link"),
        (b"[1;34mwandb[0m: done", "wandb: done"),
        (b"caf\xc3\xa9 \xff", "café �"),
        (b"[12] kept", "[12] kept"),
    ],
)
def test_colours_and_broken_bytes_are_taken_out(raw, text):
    assert uncoloured(raw) == text


@pytest.mark.parametrize(
    ("line", "stream", "rest"),
    [
        ("trainer-1  | ValueError: x", "trainer-1", "ValueError: x"),
        ("[worker 3]   File 'x'", "[worker 3]", "  File 'x'"),
        ("[rank0]: Traceback", "[rank0]", "Traceback"),
        ("(EngineCore pid=9) ERROR 11-02 04:05:06 [core.py:7] boom", "(EngineCore pid=9)", "boom"),
        ("[2026-01-19 08:46:40 TP0] Decode batch", "", "Decode batch"),
        ("[2026-03-03T10:00:00.1+0000] {subprocess.py:93} INFO - boom", "", "boom"),
        ("Jan  2 03:04:05 vm1 docker[77]: boom", "", "boom"),
        ("2 tasks: one | two", "", "2 tasks: one | two"),
    ],
)
def test_wrappers_are_peeled_off_and_name_the_process(line, stream, rest):
    assert (peeled(line)[0], peeled(line)[2]) == (stream, rest)


@pytest.mark.parametrize(
    ("line", "low"),
    [
        ("WARNING: Retrying", True),
        ("INFO:2026-01-01 00:00:00,1:jax._src.xla_bridge:822: Unable to", True),
        ("W0101 00:00:00.000001 7 x.cc:9] slow", True),
        ("I f236.cc] libtpu.so already in use", True),
        ("E0101 00:00:00.000001 7 x.cc:9] bad", False),
        ("RuntimeError: WARNING was ignored", False),
        ("Inside the loop", False),
    ],
)
def test_a_line_that_calls_itself_a_warning_is_known(line, low):
    assert is_low(line) is low


def test_an_escaped_traceback_has_its_lines_back():
    text = 'fatal: {"stderr": "Traceback:\\n  File \\"x\\"\\r\\nKeyError: \'a\'"}'
    assert unescaped(text) == ['fatal: {"stderr": "Traceback:', '  File "x"', "KeyError: 'a'\"}"]
    assert unescaped("plain") == ["plain"]


def test_every_part_of_a_line_keeps_the_line_number_and_the_whole_line():
    made = list(lines(7, b'{"a": "b\\nc"}\r'))
    assert [(line.number, line.text) for line in made] == [(7, '{"a": "b'), (7, 'c"}')]
    assert {line.shown for line in made} == {'{"a": "b\\nc"}'}


@given(st.lists(st.binary(max_size=40).filter(lambda b: b"\n" not in b)), st.integers(1, 9))
def test_lines_do_not_depend_on_how_the_log_is_cut_into_blocks(parts, size):
    whole = b"\n".join(parts)
    blocks = [whole[at : at + size] for at in range(0, len(whole), size)]
    expected = whole.split(b"\n")
    expected = expected if expected[-1] else expected[:-1]
    assert [line for batch in physical_lines(blocks) for line in batch] == expected


def test_a_line_without_end_comes_in_pieces():
    batches = list(physical_lines([b"x" * LONGEST_LINE] * 3))
    assert sum(len(line) for batch in batches for line in batch) == 3 * LONGEST_LINE
    assert max(len(line) for batch in batches for line in batch) <= 2 * LONGEST_LINE


def test_a_file_is_read_in_blocks(tmp_path):
    log = tmp_path / "run.log"
    log.write_bytes(b"ab\ncd")
    assert list(read_log(log, block_bytes=2)) == [b"ab", b"\nc", b"d"]


@pytest.mark.parametrize(("_cause", "pattern"), SIGNS)
def test_every_text_that_fits_a_sign_holds_one_of_its_key_words(_cause, pattern):
    plain = re.sub(r"\(\?s:\.\)", ".", pattern)
    # Python's `$` also fits before a last line break, and hypothesis knows no look-behind.
    fits = st.from_regex(re.compile(spaced(plain).pattern), fullmatch=False)
    for text in _examples(fits):
        words = " ".join(text.split())
        assert any(word in text for word in key_words(pattern))
        assert any(phrase in words for phrase in key_words(pattern, phrases=True))
        assert one_search(key_words(pattern)).search(text.encode())


def _examples(strategy):
    found = []

    @settings(max_examples=8, database=None, deadline=None, phases=[Phase.generate])
    @given(strategy)
    def collect(text):
        found.append(text)

    collect()
    return found


def test_a_pattern_without_a_word_of_its_own_is_refused():
    with pytest.raises(ValueError, match="write one out"):
        key_words(r"\d+|[a-z]+")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("7.82G", 8396661064),  # round(7.82 * 2**30)
        ("512.0K", 524288),
        ("0B", 0),
        ("13.4 GiB", 14388140442),
        ("1.00T", 2**40),
        ("4096", 4096),
        ("-2.55G", -2738041651),
    ],
)
def test_sizes_are_binary_and_rounded(text, size):
    assert size_bytes(text) == size


def test_what_is_no_size_is_refused():
    with pytest.raises(ValueError, match="write it like"):
        size_bytes("lots")


def test_a_million_like_lines_are_kept_a_few_times_and_the_tail_always():
    kept = excerpt()
    kept.read([b"step=%d loss=0.5" % number for number in range(50_000)])
    kept.read([b"HTTP Error 429 thrown, try %d" % number for number in range(50_000)])
    kept.read([b"quiet %d" % number for number in range(TAIL)])
    assert kept.seen == 100_000 + TAIL
    assert kept.progress == 50_000
    numbers = [number for number, _ in kept.lines()]
    assert len(numbers) < SAME_SHAPE * 3 + AFTER * 2 + TAIL + 10
    assert numbers[-TAIL:] == list(range(100_001, 100_001 + TAIL))


def test_memory_is_bounded_when_every_line_is_an_error_of_its_own():
    kept = excerpt()
    letters = "abcdefghijklmnopqrstuvwxyz"
    for first in letters:
        kept.read(
            [
                f"ValueError: {first}{second}{third} is not divisible by 4".encode()
                for second in letters
                for third in letters
            ]
        )
    assert kept.seen == 26**3
    assert len(kept.lines()) <= 2 * MOST_LINES + TAIL


def test_a_phrase_broken_over_two_lines_is_kept_with_its_neighbours():
    kept = excerpt()
    dull = [b"nothing %s" % letter.encode() for letter in "abcdefgh"]
    kept.read([*dull, b"Ran out of memory in", b"memory space hbm. Used", *[b"x"] * 1000])
    numbers = [number for number, _ in kept.lines()]
    assert {6, 7, 8, 9, 10} <= set(numbers)
    assert 1 not in numbers


def test_an_overwritten_progress_bar_keeps_its_ends_only():
    kept = excerpt()
    kept.read([b"\r".join(b"loading %d/1000" % at for at in range(1000)) + b"\rError: x"])
    ((_, line),) = kept.lines()
    assert line.count(b"\r") < 10
    assert line.endswith(b"Error: x")
