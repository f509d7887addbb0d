"""Save and resume everything that makes the next step: the state, and how many steps are in it.

Nothing else is needed: prompts, the order of the data and the noise of sampling follow from the
job's seed and the step's number. A checkpoint is a folder of the run,

    checkpoints/step_000005/state/           the update's state, by Orbax
    checkpoints/step_000005/checkpoint.json  `Record`: steps, the job, a checksum of every file

which appears whole or not at all.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from pydantic import BaseModel, ConfigDict, ValidationError

from jobs.records import CHECKPOINTS, gib
from jobs.spec import Job
from trainer.finite import LossError, not_finite
from trainer.refusal import Refusal

log = logging.getLogger(__name__)

_RECORD, _STATE = "checkpoint.json", "state"
# Keys of a job that may be others when it goes on: where it runs, what it tells and when it looks.
_MAY_CHANGE = (
    "name", "cache_dir", "container", "metrics", "checkpoint", "evaluation", "eval_every_steps",
    "engine", "stuck_after_s",
)  # fmt: skip
_DECISIVE_OF_ENGINE = ("dtype", "kv_cache_dtype")  # they make the policy that is sampled from
_PLACE = ("accelerator", "mesh")  # only 8-bit moments are laid out by it


class CheckpointError(Refusal):
    """A checkpoint cannot be used: which, what is wrong with it, what to do."""


class Record(BaseModel):
    """checkpoint.json.

    Attributes:
        steps: that are in the state; the next step has this number.
        job: what decided them, by key.
        files: sha256 of each file of the state, by its path in it.
        size_bytes: of all of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int
    job: dict[str, Any]
    files: dict[str, str]
    size_bytes: int


class Checkpoints:
    """The checkpoints of a run.

    Args:
        job: how often, how many.
        run_dir: whose.
    """

    def __init__(self, job: Job, run_dir: Path) -> None:
        self._job = job
        self._folder = run_dir / CHECKPOINTS
        self._newest: int | None = None

    def due(self, steps: int) -> bool:
        """Whether one is wanted after so many steps."""
        every = self._job.checkpoint.every_steps
        return every > 0 and steps % every == 0

    def save_last(self, state: Any, steps: int) -> None:
        """Save before the process ends, where checkpoints are wanted and this one is not there."""
        if not self._job.checkpoint.every_steps or steps in (0, self._newest):
            return
        try:
            self.save(state, steps)
        except LossError as error:  # it ends as it was asked to, with what was good
            log.warning("%s", error)

    def save(self, state: Any, steps: int) -> None:
        """Save the state after so many steps, then remove what is older than the job keeps.

        Raises:
            LossError: it is not finite, and nothing is saved or removed.
        """
        if (bad := not_finite(state)) is not None:
            raise LossError(
                f"after {steps} steps {bad} of the state is not finite: it is not saved, and the "
                "checkpoint before it stays the newest; lower train.learning_rate, or start from "
                "weights that are finite"
            )
        began = time.monotonic()
        self._folder.mkdir(exist_ok=True)
        made = self._folder / f"step_{steps:06d}"
        part = self._folder / f".{made.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        with ocp.StandardCheckpointer() as saver:
            saver.save(part / _STATE, state)
        files = _checksums(part / _STATE)
        record = Record(
            steps=steps,
            job=decisive(self._job),
            files=files,
            size_bytes=sum((part / _STATE / name).stat().st_size for name in files),
        )
        (part / _RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        os.sync()  # what the rename makes whole must outlive a crash of the host
        shutil.rmtree(made, ignore_errors=True)
        part.replace(made)
        self._newest = steps
        for old in sorted(self._folder.glob("step_*"))[: -self._job.checkpoint.keep]:
            shutil.rmtree(old)
        took = time.monotonic() - began
        log.info("checkpoint=%s steps=%d %s %.1fs", made, steps, gib(record.size_bytes), took)


def restore(job: Job, abstract: Any) -> tuple[Any, int]:
    """The state of the checkpoint that the job goes on from, and the steps that are in it.

    Args:
        job: its checkpoint.resume is a checkpoint's folder.
        abstract: the state as shapes, dtypes and shardings.

    Raises:
        CheckpointError: it is not whole, or another job's.
    """
    folder = Path(job.checkpoint.resume or "")
    record = read_record(folder)
    _check_job(folder, record, job)
    if job.steps < record.steps:
        raise CheckpointError(
            f"{folder} has {record.steps} steps in it, and steps = {job.steps}: ask for more"
        )
    check_files(folder, record)
    with ocp.StandardCheckpointer() as loader:
        state = loader.restore(folder / _STATE, abstract)
    log.info("resumed from %s: %d steps are done", folder, record.steps)
    return jax.block_until_ready(state), record.steps


def check_files(folder: Path, record: Record) -> Path:
    """The folder of a checkpoint's state, once every file of it is what was saved.

    Raises:
        CheckpointError: one is not.
    """
    if (found := _checksums(folder / _STATE)) != record.files:
        wrong = sorted(name for name, _ in found.items() ^ record.files.items())
        raise CheckpointError(
            f"{folder}: {wrong[0]} is not what was saved ({len(set(wrong))} files differ): it was "
            f"damaged; {_instead(folder)}"
        )
    return folder / _STATE


def read_record(folder: Path) -> Record:
    """The record of a checkpoint.

    Raises:
        CheckpointError: the folder is none.
    """
    try:
        return Record.model_validate_json((folder / _RECORD).read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"checkpoint.resume = {folder}: no whole checkpoint ({_RECORD} is missing or cannot be "
            f"read); {_instead(folder)}"
        ) from error


def _instead(folder: Path) -> str:
    """What to go on from in place of a checkpoint that cannot be used."""
    older = [path for path in sorted(folder.parent.glob("step_*")) if path.name < folder.name]
    if not older:
        return "there is no older one beside it: start anew"
    return f"the one before it: --set checkpoint.resume={older[-1]}"


def decisive(job: Job) -> dict[str, Any]:
    """What of a job decides its next step, by key: {"train.loss": ...}; rows by their sha256."""
    tree = json.loads(job.to_json())
    free = (*_MAY_CHANGE, *(() if job.update.moments == "int8" else _PLACE))
    if job.train.schedule == "constant":
        free = (*free, "steps")
    found = _flat({key: value for key, value in tree.items() if key not in free})
    found |= {f"engine.{key}": tree["engine"][key] for key in _DECISIVE_OF_ENGINE}
    if job.data.path is not None:
        found["data.path"] = "sha256 " + _sha256(Path(job.data.path))
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _check_job(folder: Path, record: Record, job: Job) -> None:
    ours = decisive(job)
    for key in sorted(ours.keys() | record.job.keys()):
        if ours.get(key) != record.job.get(key):
            raise CheckpointError(
                f"{folder} is of another job: {key} = {json.dumps(ours.get(key))}, and the "
                f"checkpoint's had {json.dumps(record.job.get(key))}; set it back, or start anew"
            )


def _checksums(folder: Path) -> dict[str, str]:
    """Sha256 of each file below a folder, by its path from there."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = _sha256(path)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
