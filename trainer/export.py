"""`python -m trainer export`: a checkpoint's weights as a Hugging Face folder, on any machine.

Only parameters are read, an array at a time, so that the host holds the largest of them and one
file of the folder, never the model twice. No device of the job is needed: this runs on the CPU.
"""

import logging
import shutil
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from jobs.aftermath import EXPORT_FILE, Export
from jobs.records import CHECKPOINTS, gib
from jobs.spec import Job
from trainer.architecture import Architecture, leaf_shapes
from trainer.architecture import Path as LeafPath
from trainer.checkpoint import CheckpointError, check_files, read_record
from trainer.files import write_record
from trainer.hf_folder import NAMES, SHARD_BYTES, TRANSPOSED, write_hf_folder
from trainer.update.masters import Split, cast
from trainer.weights import open_model

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
# Weights are not all of a folder: the tokenizer's files are tens of MB.
_BESIDE_BYTES = 64 * 10**6


class ExportError(CheckpointError):
    """Nothing can be exported: what is missing, or in the way."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to export and where to.

    Attributes:
        to: the folder to make.
        checkpoint: a checkpoint's folder; None: the run's newest.
        dtype: bfloat16: what the engine sampled with; float32: the exact masters.
    """

    to: Path
    checkpoint: Path | None = None
    dtype: str = "bfloat16"


def options_of(argv: Sequence[str]) -> Options:
    """The options behind the verb and the job.

    Raises:
        SystemExit: they are not understood.
    """
    parser = ArgumentParser(prog="python -m trainer export JOB")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    read = parser.parse_args(argv)
    return Options(to=read.to, checkpoint=read.checkpoint, dtype=read.dtype)


def newest(run_dir: Path) -> Path:
    """The newest whole checkpoint of a run.

    Raises:
        ExportError: it has none.
    """
    found = sorted((run_dir / CHECKPOINTS).glob("step_*"))
    if not found:
        raise ExportError(
            f"{run_dir} has no checkpoint to export: run its job with checkpoint.every_steps, or "
            "name one with --checkpoint"
        )
    return found[-1]


def export(job: Job, run_dir: Path, options: Options, *, shard_bytes: int = SHARD_BYTES) -> Export:
    """Write the folder.

    Args:
        job: the run's; its model gives architecture and tokenizer.
        run_dir: whose checkpoint.
        options: which, where to and in which type.
        shard_bytes: most weights in one file.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or of another model.
        ModelError: the model's files cannot be had, or there is something in the folder.
    """
    folder = newest(run_dir) if options.checkpoint is None else options.checkpoint
    record = read_record(folder)
    trained = record.job.get("model")
    if trained != job.model:
        raise ExportError(f"{folder} is of model = {trained}, the run's job has {job.model}")
    model = open_model(job.model)
    dtype = DTYPES[options.dtype]
    elements = sum(int(np.prod(s)) for s in leaf_shapes(model.architecture).values())
    size = elements * dtype.itemsize
    _check_room(options.to, size + _BESIDE_BYTES)
    state = check_files(folder, record)
    write_hf_folder(
        _tensors(_Arrays(state), model.architecture, dtype),
        options.to,
        architecture=model.architecture,
        tokenizer=model.tokenizer,
        dtype=dtype,
        shard_bytes=shard_bytes,
    )
    made = Export(
        folder=str(options.to.absolute()),
        checkpoint=str(folder.absolute()),
        steps=record.steps,
        model=job.model,
        dtype=options.dtype,
        weights_bytes=size,
        files=sorted(path.name for path in options.to.glob("*.safetensors")),
    )
    log.info(
        "exported %s after %d steps to %s: %s of %s in %d file%s",
        job.model,
        record.steps,
        options.to,
        gib(size),
        options.dtype,
        len(made.files),
        "" if len(made.files) == 1 else "s",
    )
    return made


def _check_room(folder: Path, needed: int) -> None:
    at = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(at).free
    if free < needed:
        raise ExportError(
            f"{folder} needs {gib(needed)}, and {at} has {gib(free)} free: name a folder elsewhere"
            " with --to, or make room"
        )


class _Arrays:
    """The arrays of a saved state by their path in it, read when they are asked for."""

    def __init__(self, state: Path) -> None:
        self._state = state
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(state).item_metadata.tree
        # The reference design has its parameters in a part of their own.
        self.root = ("params",) if "params" in tree else ()
        self._tree = tree

    def has(self, path: Sequence[Any]) -> bool:
        """Whether there is something at a path below the parameters."""
        node: Any = self._tree
        for key in (*self.root, *path):
            try:
                node = node[key]
            except (KeyError, IndexError, TypeError):
                return False
        return True

    def read(self, path: Sequence[Any]) -> np.ndarray:
        """One array, in host memory."""
        wanted = (*self.root, *path)
        place = lambda at: tuple(key.idx if hasattr(key, "idx") else key.key for key in at)
        item = jax.tree_util.tree_map_with_path(
            lambda at, leaf: leaf if place(at) == wanted else ocp.PLACEHOLDER, self._tree
        )
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), self._tree)
        with ocp.PyTreeCheckpointer() as reader:
            asked = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy)
            found = reader.restore(self._state, asked)
        [array] = [leaf for leaf in jax.tree.leaves(found) if leaf is not ocp.PLACEHOLDER]
        return array


def _tensors(
    arrays: _Arrays, architecture: Architecture, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of each Hugging Face tensor, an array of the state after the other.

    Raises:
        CheckpointError: the state is of another architecture.
    """
    stacked = not arrays.has(("layers", 0))
    for path, shape in leaf_shapes(architecture).items():
        if path[0] != "layers":
            yield NAMES[path], _value(_leaf(arrays, path, shape, dtype), dtype)
            continue
        whole = _leaf(arrays, path, shape, dtype) if stacked else None
        for layer in range(architecture.layers):
            if whole is None:
                leaf = _leaf(arrays, ("layers", layer, path[1]), shape[1:], dtype)
            else:
                leaf = jax.tree.map(lambda x, layer=layer: x[layer], whole)
            value = _value(leaf, dtype)
            turned = value.T if path in TRANSPOSED else value
            yield NAMES[path].format(layer), np.ascontiguousarray(turned)


def _leaf(
    arrays: _Arrays, path: Sequence[Any] | LeafPath, shape: tuple[int, ...], dtype: np.dtype
) -> Any:
    """A parameter as the state has it, whole or split; of a split one what `dtype` asks for."""
    if not arrays.has((*path, "master", "hi")):
        leaf = arrays.read(path) if arrays.has(path) else None
    elif dtype == DTYPES["bfloat16"]:
        leaf = arrays.read((*path, "master", "hi"))
    else:
        leaf = Split(*(arrays.read((*path, "master", half)) for half in ("hi", "lo")))
    first = leaf.hi if isinstance(leaf, Split) else leaf
    if first is None or first.shape != shape:
        found = "is missing" if first is None else f"is {first.shape}, not {shape}"
        raise CheckpointError(f"{'.'.join(map(str, path))} {found}: it is of another model")
    return leaf


def _value(leaf: Any, dtype: np.dtype) -> np.ndarray:
    return np.asarray(cast(leaf, dtype))


def main(job: Job, run_dir: Path, options: Options) -> int:
    """Export, and leave export.json beside the job: 0.

    Raises:
        Refusal: nothing was written.
    """
    made = export(job, run_dir, options)
    write_record(run_dir / EXPORT_FILE, made.model_dump_json(indent=2))
    return 0
