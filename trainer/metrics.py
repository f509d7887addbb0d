"""Where the numbers of a run go: the log, steps.jsonl, and W&B and TensorBoard when asked."""

import logging
from pathlib import Path
from typing import Any

from jobs.records import STEPS_FILE, EvalRecord, StepRecord
from jobs.spec import Job
from trainer.refusal import Refusal

log = logging.getLogger(__name__)

WANDB_KEY_CHARACTERS = 40  # wandb 0.31: "must have 40+ characters"


class MetricsError(Refusal):
    """A metrics service that cannot be used as asked."""


def check_wandb_key(job: Job, key: str | None) -> None:
    """Refuse a W&B key that W&B would refuse, before the model loads.

    Args:
        job: asks for W&B online or not.
        key: WANDB_API_KEY as the process sees it.

    Raises:
        MetricsError: no key, white space round it (a CR from a CRLF file), or too short.
    """
    if job.metrics.wandb != "online":
        return
    way_out = "or set metrics.wandb to offline or disabled"
    if key is None:
        raise MetricsError(
            "metrics.wandb = online, but WANDB_API_KEY is not there: name it in container.pass_env "
            f"and set it where headroom runs, {way_out}"
        )
    if key != key.strip():
        what = "a carriage return (a CRLF .env file)" if key.endswith("\r") else "white space"
        raise MetricsError(f"WANDB_API_KEY begins or ends with {what}: take it out, {way_out}")
    if len(key) < WANDB_KEY_CHARACTERS:
        raise MetricsError(
            f"WANDB_API_KEY has {len(key)} characters, a key has {WANDB_KEY_CHARACTERS} or more: "
            f"copy it again, {way_out}"
        )


class Metrics:
    """The open sinks of one run; use as a context manager."""

    def __init__(self, job: Job, run_dir: Path) -> None:
        self._steps = (run_dir / STEPS_FILE).open("a", encoding="utf-8")
        self._wandb: Any = None
        self._tensorboard: Any = None
        m = job.metrics
        # Imported here: each takes a second, and most runs ask for neither.
        if m.wandb != "disabled":
            import wandb  # noqa: PLC0415

            self._wandb = wandb.init(
                project=m.wandb_project,
                name=m.wandb_name or run_dir.name,
                mode=m.wandb,
                dir=run_dir,
                config=job.model_dump(mode="json"),
                # It would take the log before secrets are out of it (redact.py).
                settings=wandb.Settings(console="off"),
            )
        if m.tensorboard:
            from tensorboardX import SummaryWriter  # noqa: PLC0415

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"))

    def __enter__(self) -> "Metrics":
        """Nothing more: the sinks are open."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close every sink; W&B is told whether the run failed."""
        self._steps.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def write(self, record: StepRecord | EvalRecord, step: int) -> None:
        """One line in the log and in steps.jsonl, and its numbers to the other sinks."""
        log.info("%s", line(record))
        self._steps.write(record.model_dump_json() + "\n")
        self._steps.flush()
        values = numbers(record)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)


def line(record: StepRecord | EvalRecord) -> str:
    """The record as one line of the log; a step's begins as the SOP's readers expect."""
    if isinstance(record, EvalRecord):
        several = record.group_size > 1
        at_k = f"pass@{record.group_size}={record.pass_at_k:.4f} " if several else ""
        return (
            f"evaluation after_steps={record.eval_step} prompts={record.prompts} "
            f"pass@1={record.pass_at_1:.4f} {at_k}"
            f"reward_mean={record.reward_mean:.4f} dt={record.dt_s:.2f}s"
        )
    phases = " ".join(f"{name}={value:.2f}s" for name, value in record.seconds.items())
    return (
        f"step={record.step} loss={record.loss:.6f} entropy={record.entropy:.4f} "
        f"reward_mean={record.reward_mean:.4f} dt={record.dt_s:.2f}s "
        f"reward_std={record.reward_std:.4f} pass@1={record.pass_at_1:.4f} "
        f"completion_tokens={record.completion_tokens_mean:.1f} "
        f"truncated={record.truncated_fraction:.2f} grad_norm={record.grad_norm:.4f} {phases}"
    )


def numbers(record: StepRecord | EvalRecord) -> dict[str, float]:
    """Every number of a record by a flat name: seconds/rollout, rewards/correct, ..."""
    kind = "evaluation" if isinstance(record, EvalRecord) else "train"
    flat: dict[str, float] = {}
    for name, value in record.model_dump().items():
        if isinstance(value, dict):
            flat |= {f"{name}/{inner}": number for inner, number in value.items()}
        elif value is not None:
            flat[f"{kind}/{name}"] = value
    return flat
