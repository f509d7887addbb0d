"""The named cause of a log: labelled excerpts, the SOP's three messages, noise, size, purity."""

import importlib.util
import io
import json
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.records import Diagnosis, ExitStatus
from runner.causes import BY_ID, CAUSES
from runner.diagnose import arithmetic, diagnose, follow, format_diagnosis
from runner.logtext import read_log

REPOSITORY = Path(__file__).parents[1]
LOGS = Path(__file__).parent / "data" / "logs"
LABELLED = REPOSITORY.parent / "shared" / "data" / "failures" / "dev.jsonl"
OOM = (REPOSITORY / "docs" / "oom.md").read_text(encoding="utf-8")

LOAD = (
    "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Error loading program 'jit_training_step':"
    " Attempting to reserve 7.82G at the bottom of memory. That was not possible."
    " There are 5.68G free, 0B reserved, and 5.68G reservable."
)
ALLOCATE = (
    "ValueError: RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 1.50G."
    " That was not possible. There are 740.31M free.; (1x0x0_HBM0)"
)
ENGINE = "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static."
BUSY = (
    "RuntimeError: Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by"
    " process with pid 4711. Not attempting to load libtpu.so in this process."
)
INDIVISIBLE = "ValueError: batch 32 must be divisible by the 5 devices of the mesh"
HEADER = 'Traceback (most recent call last):\n  File "t.py", line 1, in <module>\n'
FAILURES = [
    (LOAD, "hbm_program_load"),
    (ALLOCATE, "hbm_alloc"),
    (ENGINE, "engine_not_enough_memory"),
    (BUSY, "tpu_busy_lockfile"),
    (INDIVISIBLE, "shard_indivisible"),
    ("OSError: [Errno 28] No space left on device", "disk_full"),
    ("KeyError: 'answer'", "unknown_exception"),
]
NOISE = [
    "loading checkpoint shards: 3/8",
    "WARNING: Retrying (Retry(total=4)) after connection broken: Temporary failure in name",
    "INFO:absl:Unable to initialize backend 'rocm': module has no attribute 'GpuAllocator'",
    "wandb: Network error (ConnectTimeout), entering retry loop.",
    "W0101 00:00:00.000001 7 preemption.cc:9] polling took long",
    "Failed to find host bounds for accelerator type: WARNING: could not determine TPU",
    "the answer is 42, because 6 * 7 = 42; no error there",
    "\x1b[32m[LOADING]\x1b[0m  10%|#   | 1/9\r\x1b[32m[LOADING]\x1b[0m  100%|####| 9/9",
    "2026-01-19 08:46:40,123 INFO train: jax 0.8.2",
    "\ufffd\ufffd binary \x00 rubbish",
]
noise = st.lists(st.sampled_from(NOISE), max_size=12)


def found(text, **how):
    return diagnose([text.encode()], **how)


def failed(code, **how):
    return ExitStatus(code=code, reason="failed", **how)


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def benchmark():
    spec = importlib.util.spec_from_file_location(
        "benchmarks_diagnose", REPOSITORY / "benchmarks" / "diagnose.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["variants.jsonl", "hard.jsonl"])
def test_our_own_excerpts_are_diagnosed_with_their_numbers(name):
    score = benchmark().score(records(LOGS / name), with_exit_code=True)
    assert score["misses"] == []
    assert score["records"] >= 80


@pytest.mark.skipif(not LABELLED.exists(), reason="the labelled failures are not on this machine")
@pytest.mark.parametrize("with_exit_code", [True, False])
def test_the_labelled_failures_reach_their_targets(with_exit_code):
    score = benchmark().score(records(LABELLED), with_exit_code=with_exit_code)
    assert score["category_accuracy"] >= 0.95
    assert score["numbers_found_wrong"] == 0
    assert score["wrong_but_certain"] == 0


def test_the_benchmark_prints_its_scores_and_refuses_a_missing_file(capsys):
    module = benchmark()
    assert module.main([str(LOGS / "hard.jsonl"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert set(scores) == {"exit status known", "log alone"}
    assert module.main([str(LOGS / "hard.jsonl")]) == 0
    assert "wrong but certain" in capsys.readouterr().out
    assert module.main([]) == 2


def test_our_own_excerpts_hold_every_cause():
    told = {r["expected"]["category"] for path in LOGS.glob("*.jsonl") for r in records(path)}
    assert set(BY_ID) == told


# The SOP's three messages, with the numbers that it gives.
@pytest.mark.parametrize(
    ("free", "says"),
    [
        ("5.68G", "jit_training_step needs 7.82 GiB, 5.68 GiB is free: short by 2.14 GiB"),
        ("5.90G", "jit_training_step needs 7.82 GiB, 5.90 GiB is free: short by 1.92 GiB"),
    ],
)
def test_the_sop_messages_give_the_sop_numbers_and_the_shortfall(free, says):
    said = "Error loading program 'jit_training_step' ... Attempting to reserve 7.82G"
    text = f"... {said} ... {free} free"
    diagnosis = found(text)
    assert diagnosis.cause == "hbm_program_load"
    assert f"hbm_program_load: {says}" in format_diagnosis(diagnosis)


def test_the_sop_third_message_is_not_answered_with_the_advice_it_prints():
    diagnosis = found(ENGINE)
    assert diagnosis.cause == "engine_not_enough_memory"
    assert diagnosis.advice[0].startswith("Beside a trainer on the same chips do not follow")


def test_what_can_be_reserved_decides_not_what_is_free():
    said = "Attempting to reserve 5.88G at the bottom of memory. That was not possible."
    numbers = found(f"{said} There are 14.74G free, 0B reserved, and 4.62G reservable.").numbers
    assert arithmetic(numbers) == ("it needs 5.88 GiB, 4.62 GiB can be reserved: short by 1.26 GiB")


def test_a_held_lock_is_not_answered_with_its_removal_alone():
    advice = found(BUSY).advice
    assert advice[0].startswith("Find the holder first")
    assert "only when nobody holds" in " ".join(advice)
    assert found(BUSY).numbers == {"pid": 4711}


@pytest.mark.parametrize(("line", "cause"), FAILURES)
@given(before=noise, after=noise)
@settings(max_examples=15, deadline=None)
def test_noise_before_and_after_changes_nothing(line, cause, before, after):
    alone = found(f"{HEADER}{line}")
    text = "\n".join([*before, f"{HEADER}{line}", *after])
    noisy = found(text)
    assert (noisy.cause, noisy.numbers) == (cause, alone.numbers)
    assert noisy.root_line == line
    assert text.split("\n")[noisy.line - 1] == line


@given(
    name=st.from_regex(r"jit_[a-z_]{1,20}", fullmatch=True),
    asked=st.integers(100, 9999),
    free=st.integers(100, 9999),
    unit=st.sampled_from("KMG"),
)
@settings(max_examples=40, deadline=None)
def test_other_programs_and_units_change_only_the_numbers(name, asked, free, unit):
    text = LOAD.replace("jit_training_step", name)
    text = text.replace("7.82G", f"{asked / 100:.2f}{unit}")
    text = text.replace("5.68G free", f"{free / 100:.2f}{unit} free")
    numbers = found(text).numbers
    factor = {"K": 2**10, "M": 2**20, "G": 2**30}[unit]
    assert numbers["program"] == name
    assert abs(numbers["requested_bytes"] - asked / 100 * factor) <= 0.5
    assert abs(numbers["free_bytes"] - free / 100 * factor) <= 0.5


@pytest.mark.parametrize("line", [LOAD, ALLOCATE])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_message_broken_between_words_means_the_same(line, data):
    words = line.split(" ")
    glue = data.draw(st.lists(st.sampled_from([" ", "\n", "\n    "]), min_size=len(words)))
    broken = "".join(f"{word}{gap}" for word, gap in zip(words, glue, strict=False))
    assert (found(broken).cause, found(broken).numbers) == (found(line).cause, found(line).numbers)


@pytest.mark.parametrize("width", [31, 40, 80, 120])
@pytest.mark.parametrize("line", [LOAD, ALLOCATE])
def test_a_message_broken_inside_its_words_means_the_same(line, width):
    broken = "\n".join(line[at : at + width] for at in range(0, len(line), width))
    assert found(broken).cause == found(line).cause
    assert found(broken).numbers == found(line).numbers


@pytest.mark.parametrize(
    "prefix",
    [
        "trainer-1  | ",
        "[worker 2] ",
        "[rank0]: ",
        "2026-01-19 08:46:40,123 ",
        "(EngineCore_DP0 pid=812) ERROR 11-02 04:05:06 [core.py:710] ",
        "[2026-03-03T10:00:00.123+0000] {subprocess.py:93} INFO - ",
        "\x1b[36mtrainer\x1b[0m ",
    ],
)
def test_a_wrapper_before_every_line_changes_nothing(prefix):
    text = "\n".join(f"{prefix}{line}" for line in f"{HEADER}{LOAD}".split("\n"))
    assert found(text).cause == "hbm_program_load"
    assert found(text).numbers == found(LOAD).numbers


def test_a_traceback_inside_the_json_of_ansible_is_read():
    told = json.dumps({"rc": 1, "stderr": f"{HEADER}{LOAD}", "msg": "non-zero return code"})
    diagnosis = found(f"TASK [run]\nfatal: [tpu-0]: FAILED! => {told}\nPLAY RECAP")
    assert diagnosis.cause == "hbm_program_load"
    assert diagnosis.numbers == found(LOAD).numbers
    assert diagnosis.root_line.startswith("fatal: [tpu-0]")


def test_interleaved_workers_do_not_mix_their_numbers():
    cut = LOAD.index(" Attempting")
    mine = (f"[worker 0] {LOAD[:cut]}\n", f"[worker 0] {LOAD[cut:]}\n")
    other = (
        "[worker 1] Attempting to reserve 9.99G at the bottom of memory. There are 9.00G free.\n"
    )
    assert found(f"{mine[0]}{other}{mine[1]}").numbers == found(LOAD).numbers


def test_a_cut_message_does_not_borrow_the_numbers_of_the_next_one():
    said = "Error loading program 'jit_a': Attempting to reserve 1.00G at the bottom"
    text = f"{said}\n{said} of memory. That was not possible. There are 0.50G free"
    assert found(text).numbers == {"program": "jit_a", "requested_bytes": 2**30}


def test_a_broken_message_in_the_middle_of_a_long_log_is_read_whole():
    letters = "abcdefghijklmnopqrstuvwxyz"
    dull = "\n".join(f"nothing here {one}{two}" for one in letters for two in letters)
    broken = LOAD.replace(". ", ".\n").replace("loading ", "loading\n")
    assert found(f"{dull}\n{broken}\n{dull}").numbers == found(LOAD).numbers
    assert found(f"{dull}\n{broken}\n{dull}").line == 26 * 26 + 1


def test_an_error_that_was_survived_is_no_cause():
    steps = "step=0 loss=0.5\nstep=1 loss=0.4\n"
    survived = f"{LOAD}\ncaught; halving the micro batch\n{steps}"
    assert found(f"{survived}exit_status=0").cause == "success"
    assert found(f"{survived}{ALLOCATE}", exit_status=failed(1)).cause == "hbm_alloc"
    assert found(survived, exit_status=failed(137)).cause == "container_killed"
    assert found(survived).cause == "unknown"


def test_the_root_is_the_deepest_cause_not_the_last_line():
    last = "Task failed\nConnection to 10.0.0.4 closed by remote host.\nexit code 255"
    assert found(f"{HEADER}{LOAD}\nAborted (core dumped)\n{last}").cause == "hbm_program_load"


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=300))
def test_any_text_has_an_answer_and_a_line_of_its_own(text):
    diagnosis = found(text)
    assert diagnosis.cause in BY_ID
    if diagnosis.line is not None:
        assert 1 <= diagnosis.line <= text.count("\n") + 1


@given(st.binary(max_size=300))
def test_any_bytes_have_an_answer(raw):
    assert diagnose([raw]).cause in BY_ID


@given(st.lists(st.sampled_from(["we", "think", "42", "apples", "cost", "so", "\n", ".", "!"])))
def test_unknown_text_is_never_guessed_at(words):
    diagnosis = found(" ".join(words), exit_status=failed(1))
    assert (diagnosis.cause, diagnosis.confidence) == ("unknown", "none")
    assert diagnosis.root_line is None


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        (ExitStatus(code=0, reason="done"), "success"),
        (failed(137), "container_killed"),
        (ExitStatus(code=137, oom_killed=True, reason="oom_killed"), "host_oom"),
        (failed(139), "native_crash"),
        (failed(124), "timeout"),
        (ExitStatus(code=143, reason="interrupted"), "interrupted"),
        (failed(1), "unknown"),
    ],
)
def test_a_log_that_says_nothing_is_judged_by_its_exit_status(status, cause):
    assert found("step=0 loss=0.5\n", exit_status=status).cause == cause


def test_an_exit_status_of_137_says_nothing_when_the_program_named_a_cause():
    text = f"{HEADER}{ENGINE}\nReceived sigquit from a child process\nKilled"
    assert found(text, exit_status=failed(137)).cause == "engine_not_enough_memory"


def test_a_half_cut_message_keeps_what_it_has():
    numbers = found(LOAD[: LOAD.index(" There are")]).numbers
    assert numbers == {"program": "jit_training_step", "requested_bytes": 8396661064}


def test_the_job_and_the_plan_give_their_numbers_to_the_advice():
    job = {"engine": {"mem_fraction_static": 0.4}, "train": {"micro_batch_size": None}}
    advice = found(LOAD, job=job, plan={"headroom_bytes": 2**30}).advice
    assert advice[0] == "This job has engine.mem_fraction_static = 0.4."
    assert "1.00 GiB of headroom" in advice[1]
    assert found(LOAD, job={}, plan={}).advice == found(LOAD).advice


def test_the_changes_that_a_plan_has_found_to_fit_are_the_first_advice():
    change = {
        "settings": ["update.design=layer_major", "rollout.engine=naive"],
        "saves_bytes": 18 * 2**30,
        "headroom_bytes": 16 * 2**30,
        "price": "moments in bf16",
        "fits": True,
        "estimated": False,
    }
    short = {**change, "settings": ["a=b"], "fits": False}
    plan = {"headroom_bytes": -2 * 2**30, "advice": [short, change]}
    advice = found(LOAD, plan=plan).advice
    assert advice[:2] == [
        "The plan had said so: short by 2.00 GiB a chip.",
        "--set update.design=layer_major --set rollout.engine=naive: 18.00 GiB less at the peak, "
        "then 16.00 GiB left by the plan; price: moments in bf16.",
    ]
    assert not any("a=b" in line for line in advice)
    assert found(LOAD, plan={"advice": [{"other": 1}]}).advice == found(LOAD).advice
    # Of no use where memory was not the cause.
    assert not any("--set" in line for line in found("ValueError: x", plan=plan).advice)


def test_the_largest_allocation_of_the_compiler_table_is_told():
    text = (
        "Ran out of memory in memory space hbm. Used 41.74G of 16.00G hbm."
        " Exceeded hbm capacity by 25.74G.\n\n  Largest program allocations in hbm:\n\n"
        '  1. Size: 32.00G\n     Operator: op_type="FloorMod" op_name="jit(f)/floor"\n'
        "     Shape: s32[8388608,8,4]{2,1,0:T(8,128)}\n     Unpadded size: 1.00G\n"
        "     Extra memory due to padding: 31.00G (32.0x expansion)\n\n  2. Size: 1.00G\n"
    )
    assert found(text).advice[0] == (
        "The largest allocation is 32.00 GiB, jit(f)/floor, s32[8388608,8,4]{2,1,0:T(8,128)},"
        " 32.0 times its size by padding."
    )


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({}, ""),
        ({"requested_bytes": 2**30}, "it needs 1.00 GiB"),
        ({"used_bytes": 2**20, "capacity_bytes": 2**20, "exceeded_bytes": 1741},
         "it needs 1.00 MiB, 1.00 MiB is there: short by 1.70 KiB"),
        ({"requested_bytes": 2**30, "free_bytes": 2**31}, "it needs 1.00 GiB, 2.00 GiB is free"),
        ({"requested_bytes": 2**30, "free_bytes": 0},
         "it needs 1.00 GiB, 0.00 KiB is free: short by 1.00 GiB"),
    ],
)  # fmt: skip
def test_sums_are_told_in_the_unit_that_shows_them(numbers, says):
    assert arithmetic(numbers) == says


def test_a_likely_cause_says_so_on_the_terminal():
    shown = format_diagnosis(found("step=0 loss=1.0", exit_status=failed(137)))
    assert shown.startswith("container_killed (likely): ")
    assert format_diagnosis(found("")).startswith("unknown: ")


def test_blocks_a_file_and_an_open_stream_are_the_same_log(tmp_path):
    log = tmp_path / "run.log"
    log.write_text(f"step=0 loss=0.5\n{HEADER}{LOAD}\n", encoding="utf-8")
    by_blocks = diagnose(read_log(log, block_bytes=7))
    with log.open("rb") as stream:
        assert diagnose(stream) == by_blocks
    assert diagnose(io.BytesIO(log.read_bytes())) == by_blocks
    assert (by_blocks.cause, by_blocks.line) == ("hbm_program_load", 4)


def test_following_names_each_cause_once_and_as_soon_as_it_is_read():
    read = []

    def growing():
        for line in ["start", BUSY, "quiet", BUSY, LOAD, "end"]:
            read.append(line)
            yield f"{line}\n".encode()

    named = [(diagnosis.cause, len(read)) for diagnosis in follow(growing())]
    assert [cause for cause, _ in named] == ["tpu_busy_lockfile", "hbm_program_load"]
    assert [at for _, at in named] == [2, 5]


def test_fifty_megabytes_take_little_time_and_memory():
    step = "step={} loss=0.{} entropy=0.2734 reward_mean=0.1250 dt=120.51s\n"
    talk = ["so we have {} apples, and each of them costs {} dollars at the store.\n"] * 3
    batch = "Decode batch. #running-req: 1, #token: {}, gen throughput (token/s): {}\n"
    chunk = "".join(
        line.format(number, number * 7) for number in range(4000) for line in (step, *talk, batch)
    ).encode()
    blocks = 50_000_000 // len(chunk)
    started = time.process_time()
    diagnosis = diagnose([*[chunk] * blocks, f"{LOAD}\n".encode()])
    took_s = time.process_time() - started
    assert diagnosis.cause == "hbm_program_load"
    # About 0.7 s on an idle core; CPU seconds double where the cores are shared.
    assert took_s < 2.0 * 2


def test_memory_does_not_grow_with_the_log():
    chunk = "".join(f"step={number} loss=0.5 x{number}\n" for number in range(20_000)).encode()

    def peak(blocks):
        tracemalloc.start()
        diagnose(chunk for _ in range(blocks))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)
    assert peak(24) < peak(3) * 1.5


def test_importing_it_pulls_in_neither_jax_nor_docker():
    code = "import sys, runner.diagnose; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "runner" in loaded
    assert not loaded & {"jax", "jaxlib", "docker", "libtpu", "numpy", "trainer"}


def test_every_cause_has_its_heading_explanation_advice_and_source_in_the_manual():
    flat = re.sub(r"\s+", " ", OOM)
    headings = re.findall(r"^## (\w+)$", OOM, re.MULTILINE)
    assert sorted(headings) == sorted(BY_ID)
    for cause in CAUSES:
        for sentence in (cause.explanation, *cause.advice, cause.source):
            assert sentence in flat, f"{cause.id}: docs/oom.md lacks {sentence!r}"


def test_the_manual_shows_for_each_cause_lines_that_are_diagnosed_so():
    for name, lines in re.findall(r"^## (\w+)\n.*?^```\n(.*?)^```", OOM, re.MULTILINE | re.DOTALL):
        code = 0 if name in ("success", "tpu_cpu_fallback", "nan_loss") else 1
        code = {"container_killed": 137, "timeout": 124}.get(name, code)
        told = found(lines, exit_status=ExitStatus(code=code, reason="failed" if code else "done"))
        assert told.cause == name


def test_no_memory_failure_is_run_again_unchanged():
    for cause in CAUSES:
        if cause.id.startswith("hbm_") or cause.id.endswith(("_oom", "_memory", "_compile")):
            assert cause.retry == "after_refit"
    assert BY_ID["preempted"].retry == "retryable"
    assert BY_ID["tpu_busy_lockfile"].retry == "after_clean_up"
    assert BY_ID["config_error"].retry == "not_as_is"


def test_a_diagnosis_survives_its_file():
    diagnosis = found(LOAD)
    assert Diagnosis.model_validate_json(diagnosis.model_dump_json()) == diagnosis
