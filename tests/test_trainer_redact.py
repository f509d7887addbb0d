"""Secrets in a stream: against a search of the whole text, and in real processes."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.redact import LEAST, Redactor, redactor_of

REPOSITORY = Path(__file__).parents[1]
# Few letters, so that secrets begin, end and lie in each other.
SECRETS = st.lists(
    st.text("ab-", min_size=LEAST, max_size=14).map(str.encode), min_size=1, max_size=3
)


def in_pieces(redactor, data, cuts):
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(places)]
    return b"".join([*map(redactor.feed, pieces), redactor.end()])


@given(SECRETS, st.text("ab-\n", max_size=60).map(str.encode), st.data())
def test_no_secret_gets_through_wherever_the_stream_is_cut(secrets, around, data):
    at = data.draw(st.integers(0, len(around)))
    text = around[:at] + secrets[0] + around[at:]
    cuts = data.draw(st.lists(st.integers(0, 100), max_size=8))
    shown = in_pieces(Redactor(secrets), text, cuts)
    # A byte is starred where it lies in a secret, and nowhere else: marked here one by one.
    expected = bytearray(text)
    for secret in secrets:
        for i in range(len(text) - len(secret) + 1):
            if text[i : i + len(secret)] == secret:
                expected[i : i + len(secret)] = b"*" * len(secret)
    assert shown == expected


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=8))
def test_all_else_goes_through_byte_for_byte(data, cuts):
    assert in_pieces(Redactor([b"hf_no_such_text_in_there"]), data, cuts) == data


def test_each_line_of_a_secret_of_several_lines_is_one():
    redactor = Redactor([b'{\n "key": "0123456789",\n}'])
    assert redactor.whole(b'x "key": "0123456789", {') == b"x ******************** {"


def test_a_secret_is_known_as_libraries_read_it():
    redactor = Redactor([b" hf_0123456789\r"])
    assert redactor.whole(b"[hf_0123456789]") == b"[*************]"


def test_short_values_and_blanks_are_no_secrets():
    assert not Redactor([b"offline", b"", b" " * 9, b"{\n" + b"-" * 9])


def test_the_values_are_those_of_the_names_that_the_job_has(tmp_path):
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"container": {"pass_env": ["HF_TOKEN", "UNSET_HERE"]}}))
    redactor = redactor_of(job, {"HF_TOKEN": "hf_0123456789", "OTHER": "another_value"})
    assert redactor.whole(b"hf_0123456789 another_value") == b"************* another_value"
    assert not redactor_of(tmp_path / "none.json", {})
    told = redactor_of(tmp_path / "none.json", {"https_proxy": "http://me:pass_word@host:1"})
    assert told.whole(b"me:pass_word@") == b"me:*********@"
    assert not redactor_of(tmp_path / "none.json", {"http_proxy": "http://["})
    job.write_text("[]")
    assert not redactor_of(job, {})


HEADROOM = (sys.executable, "-c", "from runner.cli import main; main()")
GUARDED = (
    "import os, signal, subprocess, sys, time\n"
    "from trainer.redact import Redactor, guarded\n"
    "def program():\n"
    "    {program}\n"
    "    return 0\n"
    "sys.exit(guarded(program, Redactor([b'hf_0123456789'])))\n"
)


def process(program, **options):
    return subprocess.Popen(
        [sys.executable, "-c", GUARDED.format(program=program)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


@pytest.mark.parametrize(
    ("program", "code", "shown"),
    [
        ("print('a hf_0123456789 b')", 0, b"a ************* b\n"),
        ("return 70", 70, b""),
        ("sys.exit(3)", 3, b""),
        ("os.write(2, b'hf_01234'); time.sleep(0.5); os.write(1, b'56789')", 0, b"*" * 13),
        # What was printed before a crash arrives, also the half of a line.
        ("os.write(1, b'last hf_0123456789 wor'); os.abort()", -6, b"last ************* wor"),
        ("os.write(1, b'hf_012'); os.kill(os.getpid(), signal.SIGKILL)", -9, b"hf_012"),
        # A child that outlives the trainer does not hold up its end.
        ("subprocess.Popen(['sleep', '60']); os.write(1, b'gone')", 0, b"gone"),
        # It may close its output, and go on.
        ("os.write(1, b'gone'); os.close(1); os.close(2); time.sleep(1); return 3", 3, b"gone"),
    ],
)
def test_it_ends_as_the_program_ends_with_all_of_its_output(program, code, shown):
    made = process(program)
    out, _ = made.communicate(timeout=30)
    assert (out, made.returncode) == (shown, code)


def test_a_child_that_goes_on_writing_does_not_hold_up_the_end_either():
    made = process("subprocess.Popen(['sh', '-c', 'while sleep 0.05; do echo x; done']); return 3")
    began = time.monotonic()
    try:
        assert made.wait(timeout=60) == 3
    finally:
        made.stdout.close()  # ends it: nobody reads any more
    assert time.monotonic() - began < 50


def test_the_job_goes_on_where_its_output_finds_no_room():
    argv = [sys.executable, "-c", GUARDED.format(program="print('x' * 10**6); return 70")]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(argv, cwd=REPOSITORY, stdout=full, timeout=60, check=False)
    assert done.returncode == 70


def test_nobody_is_left_where_the_outer_process_is_killed():
    made = process("print(os.getpid(), flush=True); time.sleep(600)")
    child = Path("/proc") / made.stdout.readline().decode().strip() / "cmdline"
    made.kill()
    made.communicate(timeout=30)
    deadline = time.monotonic() + 30
    while child.exists() and child.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_signal_is_passed_on():
    made = process(
        "signal.signal(15, lambda *_: sys.exit(143)); print('up', flush=True); time.sleep(60)"
    )
    assert made.stdout.readline() == b"up\n"
    made.send_signal(signal.SIGTERM)
    made.communicate(timeout=30)
    assert made.returncode == 143


def test_a_refusal_that_quotes_a_secret_is_starred_in_the_run_s_log(tmp_path, monkeypatch):
    token = "hf_a_token_of_this_test"  # noqa: S105
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: a\naccelerator: cpu\nmodel: {tmp_path}/{token}\ncache_dir: {tmp_path / 'cache'}\n"
        "container: {pass_env: [HF_TOKEN]}\n"
    )
    monkeypatch.setenv("HF_TOKEN", token)
    done = subprocess.run(
        [*HEADROOM, "run", job, "--where", "process"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (log,) = tmp_path.glob("runs/*/run.log")
    assert done.returncode == 1, done.stderr
    assert "*" * len(token) in log.read_text()
    assert token not in log.read_text() + done.stdout + done.stderr
