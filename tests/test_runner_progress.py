import io
import os
import pty
import re
import subprocess
import time

import pytest
from fakes import headroom, write_job
from rich.console import Console

from runner.progress import log_stream

STEPS = (
    "import time\n"
    "for i in range(3):\n"
    "    print(f'step={i} loss=0.1', flush=True)\n"
    "    time.sleep(0.3)\n"
    "print('ésumé \\x1b[31mred\\x1b[0m ' + 'x' * 300, flush=True)\n"
)


def run_on_a_terminal(argv, cwd, stderr):
    """What a person sees; the pieces as they come."""
    ours, theirs = pty.openpty()
    here = ["env", "-u", "NO_COLOR", "TERM=xterm", "COLUMNS=100", "LINES=30"]
    process = subprocess.Popen([*here, *argv], cwd=cwd, stdout=theirs, stderr=stderr)
    os.close(theirs)
    seen = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # EIO: the other end is closed
            break
        seen += data
    os.close(ours)
    assert process.wait() == 0, seen
    return seen.decode()


def test_a_person_sees_the_log_and_below_it_how_many_steps_are_done(tmp_path):
    job = write_job(tmp_path, "steps: 3\n")
    argv = headroom(STEPS, "run", job, "--where", "process")
    with (tmp_path / "err").open("w") as stderr:
        seen = run_on_a_terminal(argv, tmp_path, stderr)
    for done in (0, 1, 2, 3):
        assert f"{done}/3" in seen
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen).replace("\r", "\n").splitlines()
    shown = [line for line in plain if line.startswith(("step=", "ésumé", "exit_status"))]
    assert shown[:3] == [f"step={i} loss=0.1" for i in range(3)]
    assert shown[3].startswith("ésumé red xxx")
    assert shown[4] == "exit_status=0"
    # What is said stays where stderr goes, and the archive is the trainer's bytes.
    assert "run directory: " in (tmp_path / "err").read_text()
    (log,) = tmp_path.glob("runs/*/run.log")
    assert log.read_text().count("\n") == 5
    assert "\x1b[31mred\x1b[0m" in log.read_text()


def test_a_log_gets_the_bytes_and_no_bar(tmp_path):
    argv = headroom(STEPS, "run", write_job(tmp_path, "steps: 3\n"), "--where", "process")
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, check=True)
    (log,) = tmp_path.glob("runs/*/run.log")
    assert done.stdout.startswith(log.read_bytes())


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_is_shown_whole_wherever_it_was_cut(cut):
    file = io.StringIO()
    data = "é\nstep=0 x\nend".encode()
    terminal = Console(file=file, force_terminal=True, width=40, color_system=None)
    with log_stream(io.BytesIO(), terminal, steps=1) as out:
        assert out.write(data[:cut]) == cut
        assert out.write(data[cut:]) == len(data) - cut
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").split("\n")
    assert [line for line in plain if line in ("é", "step=0 x", "end")] == ["é", "step=0 x", "end"]


def test_what_a_librarys_bar_says_stands_before_ours_until_its_line_ends():
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=60, color_system=None)
    with log_stream(io.BytesIO(), terminal, steps=1) as out:
        out.write(b"up\n\rloading 10%\rloading 55%")
        out.flush()
        time.sleep(0.3)  # rich draws ten times a second
        assert "loading 55%" in file.getvalue()
        out.write(b"\rloading 100%\n")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").split("\n")
    assert "loading 100%" in shown


def test_an_evaluation_has_no_steps_to_count():
    out = io.BytesIO()
    terminal = Console(file=io.StringIO(), force_terminal=True)
    with log_stream(out, terminal, steps=None) as shown:
        assert shown is out
