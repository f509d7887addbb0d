"""A sweep for tests: real plans of the SOP's job, real diagnoses of its log, runs by hand.

The page's tests and its pictures are made of it: `python -m tests.sweeps FILE [CELLS]` writes one.
"""

import itertools
import shlex
import sys
from pathlib import Path
from typing import Any

from jobs.records import Diagnosis, ExitStatus, Manifest, MemoryPlan, StepRecord
from jobs.spec import load
from runner.diagnose import diagnose
from runner.report import write_sweep
from runner.sweep_row import Measured, Row, Sweep
from trainer.estimate import estimate
from trainer.plan import Options, plan

JOBS = Path(__file__).parents[1] / "jobs"
LENGTH, MICRO = "rollout.max_completion_tokens", "train.micro_batch_size"
ASLEEP = "engine.residency=sleep"
OUT_OF_HBM = (
    "step=0 loss=0.0012 entropy=1.31 reward_mean=0.21 dt=31.2s\n"
    "jaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED: Error loading program 'jit_training_step': "
    "Attempting to reserve 7.82G at the bottom of memory. That was not possible. There are 5.68G "
    "free, 0B reserved, and 5.68G reservable.\n"
)
INFERRED = "planned not to fit"
MISSING = "huggingface_hub.errors.GatedRepoError: 403 Client Error. <b>Access</b> is restricted\n"


def planned(*settings: str) -> MemoryPlan:
    """By formulas, of the SOP's job with changes."""
    job = load(JOBS / "sop_bs32_len1024.yaml", overrides=settings)
    return plan(job, Options(quick=True, advice=False), estimate)


def step(number: int, **changes: Any) -> StepRecord:
    """One of a run that learns."""
    seconds = {"rollout": 9.1 + 0.1 * number, "reward": 0.08, "update": 5.9, "hand_over": 0.41}
    known: dict[str, Any] = {
        "step": number,
        "loss": 0.012 / (number + 1),
        "entropy": 1.3,
        "reward_mean": 0.2,
        "reward_std": 0.4,
        "rewards": {"correct": 0.2},
        "pass_at_1": 0.25,
        "pass_at_k": 0.5,
        "mean_at_k": 0.25,
        "completion_tokens_mean": 300.0,
        "completion_tokens_max": 1024,
        "prompt_tokens_mean": 80.0,
        "truncated_fraction": 0.1,
        "clipped_fraction": 0.0,
        "grad_norm": 0.4,
        "learning_rate": 1e-6,
        "kl": None,
        "tokens_per_s": 612.5,
        "seconds": seconds,
        "dt_s": sum(seconds.values()),
        "host_rss_bytes": 2**34,
        "hbm_peak_bytes": 29 * 2**30 + number,
    }
    return StepRecord.model_validate(known | changes)


def manifest(run: str, *, code: int, reason: Any) -> Manifest:
    return Manifest(
        run=run, job="sop_bs32_len1024", job_sha256="0" * 64, verb="train", state="finished",
        where="docker", command=["train", "/run/job.json"], commit="49d528e" * 5, dirty=False,
        image="headroom:tpu@sha256:2f1c", packages={}, host={"name": "tpu-w0", "cpus": 240},
        created="2026-11-20T08:00:00+00:00", started="2026-11-20T08:00:02+00:00",
        finished="2026-11-20T08:04:41+00:00", exit_status=ExitStatus(code=code, reason=reason),
    )  # fmt: skip


def cell(name: str, place: dict[str, Any], **known: Any) -> Row:
    settings = known.pop("settings", place)
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = shlex.join(["headroom", "run", "jobs/sop_bs32_len1024.yaml", *sets])
    fields: dict[str, Any] = {"steps": [], "measured": [], "command": command} | known
    return Row(
        cell=name, settings=settings, place=place, job_file=f"cells/{name}/job.json", **fields
    )


def ran(name: str, text: str = "", *, steps: int = 0, of: MemoryPlan | None = None) -> dict:
    """A run's part of a row: its outcome by its log."""
    found: Diagnosis | None = diagnose([text.encode()]) if text else None
    outcome = "fits" if found is None else "failed"
    if found is not None and found.cause.startswith("hbm_"):
        outcome = "out_of_hbm"
    code, reason = (0, "done") if found is None else (70, "failed")
    known = sum(of.phases["load"].values()) if of else 0
    return {
        "outcome": outcome, "run": f"runs/20261120-080000-{name}-49d528e", "diagnosis": found,
        "manifest": manifest(f"20261120-080000-{name}-49d528e", code=code, reason=reason),
        "steps": [step(at, reward_mean=0.2 + 0.03 * at) for at in range(steps)],
        "measured": [
            Measured(what=what, planned_bytes=planned_bytes, measured_bytes=planned_bytes + error)
            for what, planned_bytes, error in (
                ("in use before the update", known, 31 * 2**20 + 5),
                ("peak after the update", of.peak_bytes, -(2**28)),
            )
        ] if of and steps else [],
    }  # fmt: skip


def sweep(lengths: tuple[int, ...] = (256, 512, 1024, 2048), more: int = 1) -> Sweep:
    """Every verdict: 4 by 4 cells and two named ones; `more` > 1 has a third axis of so many."""
    axes: dict[str, list[Any]] = {LENGTH: list(lengths), MICRO: [4, 8, 16, 32]}
    if more > 1:
        axes["seed"] = list(range(more))
    plans = {
        (length, micro): planned(f"{LENGTH}={length}", f"{MICRO}={micro}", ASLEEP)
        for length, micro in itertools.product(lengths, axes[MICRO])
    }
    mended = planned("update.design=layer_major", ASLEEP, "rollout.group_size=2")
    rows = [
        cell("as-the-sop", {}, plan=planned(), planned="does_not_load",
             settings={"train.micro_batch_size": 4}, **ran("as-the-sop", OUT_OF_HBM)),
        cell("mended", {}, plan=mended, planned=mended.verdict,
             settings={"update.design": "layer_major", "engine.residency": "sleep"},
             **ran("mended", steps=20, of=mended)),
    ]  # fmt: skip
    for values in itertools.product(*axes.values()):
        place = dict(zip(axes, values, strict=True))
        name = f"{place[LENGTH]}x{place[MICRO]}" + (f"-s{place['seed']}" if more > 1 else "")
        own = plans[place[LENGTH], place[MICRO]]
        rows.append(cell(name, place, **_known(name, own)))
    return Sweep(
        name="oom", accelerator="v4-8", axes=axes, rows=rows,
        notes=["cell 2048x16: its run directory has no steps.jsonl"],
    )  # fmt: skip


def _known(name: str, own: MemoryPlan) -> dict[str, Any]:
    """What the sweep found out of a cell; some cells by name, so that no verdict is missing."""
    mine = {"plan": own, "planned": own.verdict}
    why = f"cell 256x16 ran out of HBM, and memory grows along {LENGTH}"
    told: dict[str, dict[str, Any]] = {
        "256x16": {**mine, **ran(name, OUT_OF_HBM, steps=1)},
        "512x8": {**mine, **ran(name, MISSING)},
        "512x16": {**mine, "skipped": why},
        "1024x4": mine,
        "2048x4": {},
        "2048x16": {"planned": "failed", "plan_said": "planning took more than 900 s"},
        "2048x32": {"planned": "does_not_load", "planned_from": "1024x32", "skipped": INFERRED},
    }
    otherwise = (
        ran(name, steps=3, of=own) if own.verdict == "fits" else {"skipped": "planned not to fit"}
    )
    return told.get(name.partition("-s")[0], {**mine, **otherwise})


if __name__ == "__main__":
    file, many = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16
    write_sweep(sweep(more=-(-many // 16)), file)
