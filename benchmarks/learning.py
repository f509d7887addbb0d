"""A learning curve of SmolLM2-135M on the arithmetic problems, as PNG and as numbers.

    python benchmarks/learning.py --steps 60 --png learning.png
    python benchmarks/learning.py --run runs/learning-20261123-120000

Trains with layer_major on the CPU in a folder of its own, or reads a run that is there (--run DIR),
and draws the mean reward of each step with its mean over ten.
"""

import argparse
import json
import subprocess
import sys
import time
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
        "rollout.prompts_per_step=2",
        "rollout.group_size=8",
        "rollout.max_prompt_tokens=224",
        "rollout.max_completion_tokens=48",
        "train.micro_batch_size=16",
        "train.optimizer=adamw",
        "train.learning_rate=2e-5",
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
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--run", type=Path, help="read this run instead of training")
    parser.add_argument("--png", type=Path, default=Path("learning.png"))
    asked = parser.parse_args()
    run = asked.run
    if run is None:
        run = Path("runs") / f"learning-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        train(run, asked.steps)
    lines = (run / STEPS_FILE).read_text().splitlines()
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
