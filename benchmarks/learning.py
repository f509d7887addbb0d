"""A learning curve of SmolLM2-135M on the arithmetic problems, as PNG and as numbers.

    python benchmarks/learning.py --steps 100 --png learning.png

Trains with layer_major on the CPU, or reads a run that is there (--run DIR), and draws the mean
reward of each step with its mean over ten.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

from jobs.records import STEPS_FILE
from jobs.spec import load

mpl.use("Agg")
from matplotlib import pyplot as plt


def train(run_dir: Path, steps: int) -> None:
    """Run the smoke job for so many steps, with more completions and a learning rate to match."""
    overrides = [
        f"steps={steps}",
        "rollout.prompts_per_step=4",
        "rollout.group_size=8",
        "rollout.max_completion_tokens=48",
        "train.micro_batch_size=16",
        "train.optimizer=adamw",
        "train.learning_rate=1e-5",
        "metrics.samples_per_step=1",
    ]
    job = load(Path(__file__).parents[1] / "jobs" / "smoke.yaml", overrides=overrides)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "job.json").write_text(job.to_json())
    argv = [sys.executable, "-m", "trainer", "train", str(run_dir / "job.json")]
    subprocess.run(argv, check=True)


def main() -> None:
    """Train, draw, print first and last means."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--run", type=Path, default=Path("runs/learning"))
    parser.add_argument("--png", type=Path, default=Path("learning.png"))
    asked = parser.parse_args()
    if not (asked.run / STEPS_FILE).exists():
        train(asked.run, asked.steps)
    lines = (asked.run / STEPS_FILE).read_text().splitlines()
    rewards = np.array([json.loads(line)["reward_mean"] for line in lines])
    window = min(10, len(rewards))
    smooth = np.convolve(rewards, np.ones(window) / window, mode="valid")
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(rewards, alpha=0.35, label="mean reward of a step")
    axes.plot(np.arange(window - 1, len(rewards)), smooth, label=f"mean over {window} steps")
    axes.set_xlabel("step")
    axes.set_ylabel("reward")
    axes.legend()
    figure.savefig(asked.png, dpi=120, bbox_inches="tight")
    print(
        f"first {window} steps {smooth[0]:.3f}, last {window} steps {smooth[-1]:.3f}: {asked.png}"
    )


if __name__ == "__main__":
    main()
