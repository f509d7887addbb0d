"""When memory runs out: who held it, by the arrays that are alive, beside what the plan had.

Arrays are told by identity: those of the state, of the reference policy and of the engine are asked
for as the loop has them. What an update that broke off left of the state is told by its shapes.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jobs.aftermath import BLACK_BOX_FILE, BlackBox, LiveArrays
from jobs.records import gib
from jobs.spec import Job
from trainer import hbm
from trainer.files import write_record
from trainer.phases import residents
from trainer.plan import architecture_of

log = logging.getLogger(__name__)

# What the loop holds, by owner: "state" and further trees.
Holds = Callable[[], Mapping[str, Any]]

OTHER, BY_SHAPE = "other", "state (by shape)"
_WORDS = ("RESOURCE_EXHAUSTED", "ut of memory", "nable to allocate", "enough memory")
_ERROR_CHARACTERS = 4000
_KINDS = 3  # of arrays that are named, an owner
_PHASES = {"reward": "rollout", "evaluation": "rollout", "checkpoint": "update", "end": "update"}
# Fields in the paths of a state's leaves, and the plan's words for them (trainer/budget.py).
_OWNERS = {
    "hi": "parameters hi",
    "lo": "parameters lo",
    "params": "parameters (f32)",
    "gradients": "accumulators",
    "m": "moments",
    "v": "moments",
    "moments": "moments",
}


def is_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, says that memory ran out."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or any(word in str(error) for word in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def write(
    job: Job,
    run_dir: Path,
    error: BaseException,
    *,
    where: Any,
    show: Callable[[str], str] = lambda text: text,
) -> None:
    """Write blackbox.json, and say it in a line. Whatever goes wrong here is only told.

    Args:
        job: that ran.
        run_dir: where to.
        error: what the runtime said.
        where: the loop's `Phases`.
        show: takes secrets out of a text.
    """
    try:
        found = record(job, error, phase=where.phase, step=where.step, holds=where.holds)
        texts = {"error": show(found.error), "notes": [show(note) for note in found.notes]}
        found = found.model_copy(update=texts)
        write_record(run_dir / BLACK_BOX_FILE, found.model_dump_json(indent=2))
        log.info(
            "black box: %s alive on %s: %s", gib(found.live_bytes), found.device, BLACK_BOX_FILE
        )
    except Exception as wrong:  # noqa: BLE001 - the error that is told must be the run's own
        log.warning("no black box: %s: %s", type(wrong).__name__, wrong)


def record(job: Job, error: BaseException, *, phase: str, step: int, holds: Holds) -> BlackBox:
    """Who holds what, now."""
    notes: list[str] = []
    held: Mapping[str, Any] = {}
    try:
        held = holds()
    except Exception as wrong:  # noqa: BLE001 - an engine may be half made
        notes.append(f"what the loop holds is not known: {type(wrong).__name__}: {wrong}")
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    owners, shapes = _owners(held)
    groups, host = _groups(jax.live_arrays(), owners, shapes)
    per_device = Counter[str]()
    for (_, device), kinds in groups.items():
        per_device[device] += sum(size * count for (_, size), count in kinds.items())
    fullest = max(per_device, key=lambda d: per_device[d], default=str(jax.local_devices()[0]))
    live = [_live(owner, kinds) for (owner, device), kinds in groups.items() if device == fullest]
    planned: dict[str, int] = {}
    try:
        planned = _planned(job, phase)
    except Exception as wrong:  # noqa: BLE001 - the plan is only beside it
        notes.append(f"no plan: {type(wrong).__name__}: {wrong}")
    return BlackBox(
        error=str(error)[:_ERROR_CHARACTERS],
        phase=phase,
        step=step,
        device=fullest,
        live_bytes=per_device[fullest],
        live=sorted(live, key=lambda one: -one.size_bytes),
        host_bytes=host,
        memory_stats=[{k: v for k, v in s.items() if isinstance(v, int)} for s in stats if s],
        planned=planned,
        host_rss_bytes=hbm.host_rss_bytes(),
        notes=notes,
    )


# Of one owner on one device: how many arrays of each kind, and a kind's bytes there.
_Kinds = Counter[tuple[str, int]]


def _groups(
    arrays: Iterable[jax.Array], owners: Mapping[int, str], shapes: set[tuple[Any, str]]
) -> tuple[dict[tuple[str, str], _Kinds], int]:
    """Live arrays by owner and device, and the bytes of those in the host's memory."""
    found: dict[tuple[str, str], _Kinds] = {}
    host = 0
    for array in arrays:
        if array.is_deleted():
            continue
        owner = owners.get(id(array))
        if owner is None:
            owner = BY_SHAPE if (array.shape, str(array.dtype)) in shapes else OTHER
        share = array.sharding.shard_shape(array.shape)
        size = math.prod(share) * array.dtype.itemsize
        devices = array.sharding.addressable_devices
        if array.sharding.memory_kind == "pinned_host":
            host += size * len(devices)
            continue
        kind = f"{array.dtype}[{','.join(map(str, share))}]"
        for device in devices:
            found.setdefault((owner, str(device)), Counter())[kind, size] += 1
    return found, host


def _live(owner: str, kinds: _Kinds) -> LiveArrays:
    most = sorted(kinds.items(), key=lambda one: -one[0][1] * one[1])[:_KINDS]
    known = {OTHER: "nothing", BY_SHAPE: "shape"}.get(owner, "identity")
    return LiveArrays.model_validate(
        {
            "owner": owner,
            "size_bytes": sum(size * count for (_, size), count in kinds.items()),
            "count": kinds.total(),
            "known_by": known,
            "largest": [f"{count} x {kind}: {gib(count * size)}" for (kind, size), count in most],
        }
    )


def _owners(held: Mapping[str, Any]) -> tuple[dict[int, str], set[tuple[Any, str]]]:
    """Owner by an array's id, and shape and dtype of the state's large arrays."""
    owners: dict[int, str] = {}
    shapes: set[tuple[Any, str]] = set()
    for name, tree in held.items():
        for owner, leaf in _leaves(name, tree):
            # The state comes first: what an engine has by reference is the state's.
            owners.setdefault(id(leaf), owner)
            if name == "state" and leaf.ndim:
                shapes.add((leaf.shape, str(leaf.dtype)))
    return owners, shapes


def _leaves(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array):
            continue
        if name != "state":
            yield name, leaf
        elif not leaf.ndim:
            yield "counters", leaf
        else:
            # Names of fields alone: a layer's leaf is called "v", too.
            keys = [str(getattr(key, "name", "")) for key in path]
            yield next((_OWNERS[key] for key in keys if key in _OWNERS), "state"), leaf


def _planned(job: Job, phase: str) -> dict[str, int]:
    if not job.target.usable_hbm_bytes:
        return {}
    found = residents(job, architecture_of(job), build="sharded").phases
    return dict(found.get(_PHASES.get(phase, phase), {}))
