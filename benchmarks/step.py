"""One GRPO step of SmolLM2-135M on this machine's CPU, as `headroom run` does it, by phase.

4 prompts of 241 to 256 tokens x 4 completions of up to 64 tokens, T = 1, f32, one AdamW update of
all parameters. The first step compiles and is left out. With --trl, TRL (torch) does the same work
on the same prompts in the same run, and the ratio is printed; compare within one run only.

    python benchmarks/step.py
    python benchmarks/step.py --designs layer_major reference --json
    python benchmarks/step.py --trl /path/of/a/venv/with/trl/bin/python
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from jobs.records import STEPS_FILE
from jobs.spec import Job, load
from trainer.data import arithmetic_rows
from trainer.hf_folder import save_hf_folder
from trainer.weights import load_params, open_model

PROMPTS, GROUP, SHORTEST, LONGEST, COMPLETION = 4, 4, 241, 256, 64
GIB = 2**30


def questions(count: int, count_tokens: Callable[[str], int]) -> list[dict[str, str]]:
    """Rows whose rendered prompt has SHORTEST to LONGEST tokens: worked problems, then one more."""
    source = iter(arithmetic_rows(seed=0, split="train", count=100 * count))
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        asked = next(source)
        text = asked.question
        while count_tokens(text) < SHORTEST:
            example = next(source)
            text = f"{example.question} The answer is {example.answer}.\n{text}"
        if count_tokens(text) <= LONGEST:
            rows.append({"question": text, "answer": f"#### {asked.answer}"})
    return rows


def job(design: str, rows: Path, steps: int) -> Job:
    """The job of one design; layer_major shares each prompt among its completions."""
    overrides = [
        f"steps={steps}",
        "system_prompt=''",
        f"data.path={rows}",
        f"rollout.prompts_per_step={PROMPTS}",
        f"rollout.group_size={GROUP}",
        f"rollout.max_prompt_tokens={LONGEST}",
        f"rollout.max_completion_tokens={COMPLETION}",
        "rollout.temperature=1.0",
        "train.optimizer=adamw",
        f"train.micro_batch_size={GROUP}",
        "metrics.samples_per_step=0",
        f"update.design={design}",
        "update.clip=global",
        f"update.completions_per_row={'group' if design == 'layer_major' else 'one'}",
    ]
    return load(Path(__file__).parents[1] / "jobs" / "smoke.yaml", overrides=overrides)


def measure_ours(design: str, rows: Path, folder: Path, steps: int) -> dict[str, float | str]:
    """Medians over the steps after the first, of the real trainer in a process of its own."""
    run_dir = folder / design
    run_dir.mkdir()
    (run_dir / "job.json").write_text(job(design, rows, steps + 1).to_json())
    argv = [sys.executable, "-m", "trainer", "train", str(run_dir / "job.json")]
    peak = run_watched(argv)
    lines = (run_dir / STEPS_FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines][1:]
    median = lambda values: statistics.median(list(values))
    rollout = median(r["seconds"]["rollout"] for r in records)
    step = median(r["dt_s"] for r in records)
    tokens = median(r["completion_tokens_mean"] * PROMPTS * GROUP for r in records)
    return {
        "who": design,
        "step_s": step,
        "rollout_s": rollout,
        "update_s": step - rollout,
        "rollout_tokens_per_s": tokens / rollout,
        "step_tokens_per_s": tokens / step,
        "peak_rss_gib": peak / GIB,
    }


def measure_trl(python: str, rows: Path, folder: Path, steps: int) -> dict[str, float | str]:
    """The same of TRL, run by its own interpreter on the same weights and prompts."""
    model = open_model("smollm2-135m-instruct")
    params = load_params(model, lambda _, leaf: leaf)
    save_hf_folder(
        params, folder / "hf", architecture=model.architecture, tokenizer=model.tokenizer
    )
    out = folder / "trl.json"
    script = Path(__file__).with_name("peer_trl.py")
    peak = run_watched([python, str(script), str(folder / "hf"), str(rows), str(steps), str(out)])
    return {"who": "trl", **json.loads(out.read_text()), "peak_rss_gib": peak / GIB}


def run_watched(argv: list[str]) -> int:
    """Run a program to its end; the largest resident set of it so far, bytes.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(argv, stdout=output, stderr=output, env={**os.environ, **quiet})
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            sys.exit(f"{argv} failed:\n{output.read().decode(errors='replace')[-4000:]}")
    return usage.ru_maxrss * 1024


def main() -> None:
    """Measure, print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--designs", nargs="+", default=["layer_major"], choices=["layer_major", "reference"]
    )
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one of warm-up")
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter of an environment with trl")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    tokenizer = open_model("smollm2-135m-instruct").tokenizer
    count = lambda text: len(tokenizer.encode_chat([{"role": "user", "content": text}]))
    found: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        made = questions(PROMPTS * (asked.steps + 1), count)
        rows.write_text("\n".join(json.dumps(row) for row in made))
        for design in asked.designs:
            print(f"measuring {design} ...", file=sys.stderr)
            found.append(measure_ours(design, rows, folder, asked.steps))
        if asked.trl:
            print("measuring trl ...", file=sys.stderr)
            found.append(measure_trl(asked.trl, rows, folder, asked.steps))
            for row in found:
                row["step_of_trl"] = row["step_s"] / found[-1]["step_s"]
    if asked.json:
        print(json.dumps(found, indent=2))
        return
    for row in found:
        numbers = [f"{k} {v:.2f}" for k, v in row.items() if isinstance(v, float)]
        print(f"{row['who']:12s}", "  ".join(numbers))


if __name__ == "__main__":
    main()
