"""The training loop, top to bottom: rollout, reward, advantages, update, hand-over, record."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jobs.records import EvalRecord, StepRecord
from jobs.spec import Job
from trainer import hbm, reward
from trainer.architecture import ModelError, Path
from trainer.axes import LEAF_AXES
from trainer.checkpoint import Checkpoints, restore
from trainer.data import Batch, Prompt, fitting_prompts, load_rows, pack, prompts_of_step
from trainer.evaluate import evaluate
from trainer.finite import check_learned
from trainer.grpo import LOSSES, truncated_importance
from trainer.mesh import make_mesh, state_shardings
from trainer.metrics import Metrics
from trainer.refusal import Refusal
from trainer.rollout import Completions, Rollout
from trainer.rollout.naive import NaiveRollout
from trainer.stop import Stopped, Stops
from trainer.timing import Phases
from trainer.update.masters import Split, cast
from trainer.update.program import Learned, Update, make_update
from trainer.weights import Model, load_params, open_model

log = logging.getLogger(__name__)


class PlatformError(Refusal):
    """JAX runs on something else than the job's accelerator."""


@dataclass(kw_only=True)
class Session:
    """Everything that lives from the load to the end of the run."""

    job: Job
    phases: Phases
    model: Model
    mesh: Any
    rollout: Rollout
    mismatch: float | None = None


def open_session(job: Job, phases: Phases) -> Session:
    """Check the platform, read the model's headers, and build the engine: no weight is read yet.

    Raises:
        PlatformError: the devices are not the job's.
        ModelError, MeshError: the model cannot be had or used, or does not divide over the mesh.
    """
    devices = check_platform(job, jax.devices())
    mesh = make_mesh(job, devices)
    model = open_model(job.model)
    a = model.architecture
    if job.max_sequence_tokens > a.max_position:
        raise ModelError(
            f"{job.model} has {a.max_position} positions, a sequence of the job up to "
            f"{job.max_sequence_tokens} tokens: lower rollout.max_prompt_tokens or "
            "rollout.max_completion_tokens"
        )
    rollout = make_rollout(job, model, mesh)
    log.info(
        "model=%s layers=%d embed=%d vocab=%d devices=%d platform=%s engine=%s",
        job.model,
        a.layers,
        a.embed,
        a.vocab,
        len(devices),
        devices[0].platform,
        rollout.name,
    )
    return Session(job=job, phases=phases, model=model, mesh=mesh, rollout=rollout)


def read_weights(
    session: Session, place: Callable[[Path, np.ndarray], Any] = lambda _, leaf: leaf
) -> dict[str, Any]:
    """The model's parameters, f32, each leaf as `place` makes it; without it, on the host."""
    with session.phases("load"):
        params = load_params(session.model, place)
    log.info("load=%.2fs", session.phases.seconds["load"])
    return params


def check_platform(job: Job, devices: list[Any]) -> list[Any]:
    """The devices, when they are the job's accelerator; a TPU job never runs on a CPU unnoticed."""
    target = job.target
    found = {(d.platform, d.device_kind) for d in devices}
    if found != {(target.platform, target.device_kind)}:
        kinds = ", ".join(f"{kind} ({platform})" for platform, kind in sorted(found))
        raise PlatformError(
            f"accelerator = {job.accelerator} is {target.devices} x {target.device_kind}, but JAX "
            f"lists {len(devices)} x {kinds}: run on a {job.accelerator}, or set accelerator to "
            "what is there"
        )
    return devices


def make_rollout(job: Job, model: Model, mesh: Any) -> Rollout:
    """The engine that the job names."""
    if job.rollout.engine == "naive":
        return NaiveRollout(job, model.architecture, mesh, eos_ids=model.eos_ids)
    # Imported here: it takes seconds, and mends the library in the process.
    from trainer.rollout.sglang.rollout import SglangRollout  # noqa: PLC0415

    return SglangRollout(job, model.architecture, mesh, eos_ids=model.eos_ids)


def train(job: Job, run_dir: FilePath, phases: Phases, stops: Stops | None = None) -> None:
    """Run the job: `steps` rollouts with all their learning.

    Args:
        job: to run.
        run_dir: where its records and checkpoints go.
        phases: is told where it is.
        stops: takes the process's signals; None: none are looked for.

    Raises:
        LossError: a loss, a gradient norm, or the state that was to be saved is not finite.
        CheckpointError: the checkpoint to go on from is not whole, or another job's.
        Stopped: a signal came; where checkpoints are wanted, the last whole step is saved.
    """
    stops = Stops() if stops is None else stops
    session = open_session(job, phases)
    prompts = read_prompts(session, "train")
    tests = read_prompts(session, "test") if job.eval_every_steps else []
    update = make_update(job, session.model.architecture, session.mesh)
    if job.rollout.group_size == 1:
        log.warning("rollout.group_size = 1: every advantage is zero, nothing will be learned")
    with Metrics(job, run_dir) as metrics:
        state, reference, done = _first_state(session, update)
        checkpoints = Checkpoints(job, run_dir)
        phases.holds = lambda: {
            "state": state,
            "reference policy": reference,
            **session.rollout.held(),
        }
        try:
            with phases("hand_over"):
                session.rollout.hand_over(update.params(state))
            for step in range(done, job.steps):
                phases.step, phases.seconds = step, {}
                began = time.monotonic()
                rolled = _roll(session, prompts_of_step(job, prompts, step), step)
                session.rollout.sleep()
                # While it learns the state is in no one place: a signal waits, and for the record.
                with stops.held():
                    with phases("update"):
                        state, learned = learn(update, state, session, rolled, reference)
                        done = step + 1
                    with phases("hand_over"):
                        session.rollout.hand_over(update.params(state))
                    record = _record(session, rolled, learned, dt_s=time.monotonic() - began)
                    metrics.write(record, step)
                _log_samples(session, rolled)
                if job.eval_every_steps and done % job.eval_every_steps == 0:
                    metrics.write(_evaluate(session, tests, after_steps=done), step)
                if checkpoints.due(done):
                    with stops.held(), phases("checkpoint"):
                        checkpoints.save(state, done)
        except Stopped:
            with stops.held(), phases("checkpoint"):
                checkpoints.save_last(state, done)
            raise


def _first_state(session: Session, update: Update) -> tuple[Any, Any, int]:
    """The state to go on from, the reference policy of a KL term, and the steps that are done."""
    job, state, done = session.job, None, 0
    reference = None
    if job.checkpoint.resume is None or job.train.beta:
        state = update.init(read_weights(session))
        reference = reference_params(job, update.params(state)) if job.train.beta else None
    if job.checkpoint.resume is not None:
        state = None  # the model's own weights were wanted for the reference alone
        with session.phases("load"):
            state, done = restore(job, update.abstract)
    return state, reference, done


def evaluate_only(job: Job, run_dir: FilePath, phases: Phases) -> None:
    """Evaluate the job's model as it is, or a checkpoint of it, without training."""
    session = open_session(job, phases)
    tests = read_prompts(session, "test")
    with Metrics(job, run_dir) as metrics:
        if job.checkpoint.resume is not None:
            update = make_update(job, session.model.architecture, session.mesh)
            with phases("load"):
                state, done = restore(job, update.abstract)
            session.rollout.hand_over(update.params(state))
            metrics.write(_evaluate(session, tests, after_steps=done), done)
            return
        shardings = state_shardings(session.mesh, session.model.architecture)
        at = lambda path: shardings[path[0]] if len(path) == 1 else shardings[path[0]][path[1]]
        place = lambda path, leaf: jax.device_put(leaf, at(path))
        session.rollout.hand_over(read_weights(session, place))
        metrics.write(_evaluate(session, tests, after_steps=0), 0)


def _evaluate(session: Session, tests: list[Prompt], *, after_steps: int) -> EvalRecord:
    with session.phases("evaluation"):
        return evaluate(
            session.job,
            session.rollout,
            tests,
            session.model.tokenizer,
            after_steps=after_steps,
            alive=session.phases.alive,
        )


def read_prompts(session: Session, split: str) -> list[Prompt]:
    """The prompts of a split that fit, with a line in the log about those that do not."""
    job = session.job
    rows = load_rows(job, split=split)
    if split == "test" and job.evaluation.prompts is not None:
        rows = rows[: job.evaluation.prompts]
    prompts, longer = fitting_prompts(job, rows, session.model.tokenizer)
    log.info(
        "data split=%s prompts=%d left_out=%d (longer than %d tokens)",
        split,
        len(prompts),
        longer,
        job.rollout.max_prompt_tokens,
    )
    return prompts


def reference_params(job: Job, params: Any) -> Any:
    """A frozen copy of the policy's weights for the KL term, each as the update computes with it.

    Matrices in the update's compute dtype, norms in f32: the policy's distance from its own
    reference is 0 at first.
    """
    dtype = jnp.dtype(job.update.update_dtype)

    def frozen(path: Any, leaf: Any) -> jax.Array:
        exact = LEAF_AXES[path[-1].key][-1] == "norm"
        return jnp.array(cast(leaf, jnp.float32 if exact else dtype), copy=True)

    return jax.tree_util.tree_map_with_path(frozen, params, is_leaf=lambda x: isinstance(x, Split))


@dataclass(frozen=True, kw_only=True)
class Rolled:
    """A rollout and its rewards; rows are sequences, a prompt's group next to each other."""

    prompts: list[Prompt]
    completions: Completions
    texts: list[str]
    scores: dict[str, np.ndarray]
    rewards: np.ndarray


def _roll(session: Session, asked: list[Prompt], step: int) -> Rolled:
    job = session.job
    group = job.rollout.group_size
    with session.phases("rollout"):
        completions = session.rollout.generate(
            [p.tokens for p in asked],
            group_size=group,
            temperature=job.rollout.temperature,
            first_sequence=step * job.sequences_per_step,
        )
    with session.phases("reward"):
        texts = completions.texts(session.model.tokenizer)
        scores = reward.score(texts, [p.row.answer for p in asked for _ in range(group)])
    return Rolled(
        prompts=[p for p in asked for _ in range(group)],
        completions=completions,
        texts=texts,
        scores=scores,
        rewards=reward.total(scores, job.reward),
    )


def _batch(session: Session, rolled: Rolled) -> Batch:
    job = session.job
    tokens, lengths, mask = pack(
        [p.tokens for p in rolled.prompts],
        rolled.completions,
        sequence_tokens=job.max_sequence_tokens,
        pad_id=session.model.pad_id,
    )
    loss = LOSSES[job.train.loss]
    advantages = loss.advantages(jnp.asarray(rolled.rewards), job.rollout.group_size)
    weights = loss.weights(jnp.asarray(mask), job.rollout.max_completion_tokens)
    return Batch(
        tokens=tokens,
        prompt_lengths=lengths,
        completion_mask=mask,
        weights=np.asarray(weights),
        advantages=np.asarray(advantages),
    )


def learn(
    update: Update, state: Any, session: Session, rolled: Rolled, reference: Any
) -> tuple[Any, list[Learned]]:
    """All updates of one rollout."""
    job, batch = session.job, _batch(session, rolled)
    if reference is not None:
        ref = np.asarray(update.logprobs(reference, batch))
        batch = replace(batch, ref_logprobs=np.where(batch.completion_mask > 0, ref, 0))
    correction = job.train.rollout_correction
    if job.needs_old_logprobs:
        mask = batch.completion_mask
        # Padding is 0 in all of them: what an engine leaves there must not reach the loss.
        old = np.where(mask > 0, update.logprobs(update.params(state), batch), 0)
        engine = np.where(mask > 0, rolled.completions.logprobs, 0)
        session.mismatch = float(np.abs(old - engine).sum() / max(mask.sum(), 1.0))
        weights = batch.weights
        if correction is not None:
            weights = weights * np.asarray(truncated_importance(old, engine, cap=correction))
        batch = replace(batch, old_logprobs=old, weights=weights)
    learned: list[Learned] = []
    phases = session.phases
    for number in range(job.train.updates_per_rollout):
        state, said = update.step(state, batch)
        check_learned(
            said,
            batch=batch,
            rolled=rolled,
            run_dir=phases.run_dir,
            step=phases.step,
            update=number,
        )
        learned.append(said)
    return state, learned


def _record(session: Session, rolled: Rolled, learned: list[Learned], *, dt_s: float) -> StepRecord:
    phases, completions = session.phases, rolled.completions
    right = rolled.scores["correct"].reshape(-1, session.job.rollout.group_size)
    mean = lambda name: float(np.mean([getattr(one, name) for one in learned]))
    measured = hbm.sample(phases.run_dir, step=phases.step, phase="end")
    return StepRecord(
        step=phases.step,
        loss=mean("loss"),
        entropy=mean("entropy"),
        reward_mean=float(rolled.rewards.mean()),
        reward_std=float(rolled.rewards.std()),
        rewards={name: float(value.mean()) for name, value in rolled.scores.items()},
        pass_at_1=float(right[:, 0].mean()),
        pass_at_k=float(right.max(axis=1).mean()),
        mean_at_k=float(right.mean()),
        completion_tokens_mean=float(completions.lengths.mean()),
        completion_tokens_max=int(completions.lengths.max()),
        prompt_tokens_mean=float(np.mean([len(p.tokens) for p in rolled.prompts])),
        truncated_fraction=float(completions.truncated.mean()),
        clipped_fraction=mean("clipped_fraction"),
        grad_norm=mean("grad_norm"),
        learning_rate=learned[-1].learning_rate,
        kl=mean("kl") if session.job.train.beta else None,
        mismatch=session.mismatch,
        tokens_per_s=float(completions.lengths.sum()) / dt_s,
        seconds={**phases.seconds, "other": dt_s - sum(phases.seconds.values())},
        dt_s=dt_s,
        host_rss_bytes=hbm.host_rss_bytes(),
        hbm_peak_bytes=max(measured.peak_bytes) if measured else None,
    )


def _log_samples(session: Session, rolled: Rolled) -> None:
    """The first completions of the step, for a person to read."""
    for i in range(min(session.job.metrics.samples_per_step, len(rolled.texts))):
        row = rolled.prompts[i].row
        parts = " ".join(f"{name}={value[i]:.2f}" for name, value in rolled.scores.items())
        log.info("sample %d: reward=%.2f %s answer=%s", i, rolled.rewards[i], parts, row.answer)
        log.info("  ? %s", row.question.replace("\n", "\n  ? "))
        log.info("  | %s", rolled.texts[i].replace("\n", "\n  | "))
