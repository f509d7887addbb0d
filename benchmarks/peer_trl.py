"""The peer of step.py: TRL's GRPOTrainer on the same weights, prompts and settings.

Run by step.py with an interpreter that has torch and trl (1.16.0 was used); nothing of headroom is
imported. Usage: peer_trl.py MODEL_FOLDER ROWS.jsonl STEPS OUT.json
"""

import json
import statistics
import sys
import time
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

PROMPTS, GROUP, COMPLETION = 4, 4, 64


def digits(completions, **_):
    """A cheap reward that differs between completions: the share of digits."""
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [sum(ch.isdigit() for ch in text) / max(len(text), 1) for text in texts]


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self):
        self.steps = []
        self.began = 0.0

    def on_step_begin(self, *_, **__):
        self.began = time.monotonic()

    def on_step_end(self, *_, **__):
        self.steps.append(time.monotonic() - self.began)


def main(model, rows, steps, out):
    """Train for one step of warm-up and `steps` more; write the medians."""
    lines = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": line["question"]}]} for line in lines]
    )
    config = GRPOConfig(
        output_dir=f"{out}.trainer",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=COMPLETION,
        max_steps=steps + 1,
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-6,
        optim="adamw_torch",
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        shuffle_dataset=False,
    )
    clock, generated = Clock(), []
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=digits,
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[clock],
    )
    generate = trainer._generate_and_score_completions

    def timed(*args, **kwargs):
        began = time.monotonic()
        result = generate(*args, **kwargs)
        generated.append((time.monotonic() - began, int(result["completion_mask"].sum())))
        return result

    trainer._generate_and_score_completions = timed
    trainer.train()
    step = statistics.median(clock.steps[1:])
    rollout = statistics.median(seconds for seconds, _ in generated[1:])
    tokens = statistics.median(tokens for _, tokens in generated[1:])
    found = {
        "step_s": step,
        "rollout_s": rollout,
        "update_s": step - rollout,
        "rollout_tokens_per_s": tokens / rollout,
        "step_tokens_per_s": tokens / step,
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
