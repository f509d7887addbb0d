"""Bytes on one chip by arithmetic, without compiler or JAX: state, batch, engine, KV pool.

Arrays are counted as they lie in HBM, with XLA's tiles (`buffers.tiled_bytes`), and on the chip of
which JAX lists one device. What a program reserves besides is the compiler's to say (`plan.py`).
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from jobs.spec import Job
from trainer.architecture import Architecture, leaf_shapes
from trainer.axes import (
    LEAF_AXES,
    MESH_AXES,
    OVER_MESH,
    OVER_SAMPLER,
    of_kv_heads,
    on_host,
    shared_axis,
)
from trainer.buffers import tiled_bytes
from trainer.rollout.sglang.settings import settings_of

Shape = tuple[int, ...]
# How sglang-jax's embedding, head and biases lie: our hand-over shares them out over the chips, as
# the SOP's build (git, 2025-11) did with the first two; PyPI's 0.0.2 by itself keeps all on each.
EngineBuild = Literal["sharded", "replicated"]

_SCALAR = tiled_bytes((), 4)
_ITEMSIZE = {"bfloat16": 2, "float32": 4}
# optax's lion and adamw: updates so far, for the moments and for the learning rate.
_OPTAX_COUNTERS = 2
_REFERENCE_SUMS = 5  # reference.py's sums over micro-batches, f32[] each
_SERVER_FRACTION = 0.88  # sglang-jax 0.0.2's mem_fraction_static on a TPU where none is given


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """The trainer's state on one chip.

    Attributes:
        owners: bytes of HBM by owner.
        host_bytes: that live in the host's memory.
        largest_f32_bytes: the largest leaf in f32, as it comes from the host.
    """

    owners: Mapping[str, int]
    host_bytes: int
    largest_f32_bytes: int


def state_bytes(job: Job, architecture: Architecture) -> StateBytes:
    """The state of the job's update design, by owner."""
    if job.update.design == "reference":
        return _reference_state(job, architecture)
    return _layer_major_state(job, architecture)


def _reference_state(job: Job, architecture: Architecture) -> StateBytes:
    parameters = largest = 0
    for path, shape, count in _leaves(job, architecture):
        one = tiled_bytes(_mesh_share(job, path[-1], shape), 4)
        parameters += one * count
        largest = max(largest, one)
    moments = 1 if job.train.optimizer == "lion" else 2
    counters = _OPTAX_COUNTERS + _REFERENCE_SUMS + 1
    owners = {
        "parameters (f32)": parameters,
        "moments": moments * parameters,
        "accumulators": parameters if job.grad_accum_steps > 1 else 0,
        "counters": counters * _SCALAR,
    }
    return StateBytes(owners=owners, host_bytes=0, largest_f32_bytes=largest)


def _layer_major_state(job: Job, architecture: Architecture) -> StateBytes:
    devices, update = job.target.devices, job.update
    owners: Counter[str] = Counter({"parameters hi": 0, "parameters lo": 0, "moments": 0})
    host = largest = 0
    moments = ("m",) if job.train.optimizer == "lion" else ("m", "v")
    for path, shape, count in _leaves(job, architecture):
        name, axis = path[-1], _shared(path[-1], shape)
        part = _share(shape, axis, devices)
        largest = max(largest, tiled_bytes(part, 4))
        parts = [("parameters hi", "hi", tiled_bytes(part, 2))]
        parts += [("parameters lo", "lo", tiled_bytes(part, 2))]
        moment = tiled_bytes(part, 2)
        if update.moments == "int8":
            # A chip's rows have one scale each.
            moment = tiled_bytes(part, 1) + tiled_bytes((*part[:-1], 1), 4)
        parts += [("moments", "momentum", moment) for _ in moments]
        for owner, kind, size in parts:
            if on_host(name, kind, update.host_offload):
                host += size * count
            else:
                owners[owner] += size * count
    owners["counters"] = _SCALAR
    return StateBytes(owners=dict(owners), host_bytes=host, largest_f32_bytes=largest)


def _leaves(job: Job, architecture: Architecture) -> Iterator[tuple[tuple[str, ...], Shape, int]]:
    """Path, shape and count of each array, by `update.layers`."""
    for path, shape in leaf_shapes(architecture).items():
        if path[0] == "layers" and job.update.layers == "per_layer":
            yield path, shape[1:], architecture.layers
        else:
            yield path, shape, 1


def _shared(name: str, shape: Shape) -> int | None:
    """The axis of an array that is shared out, its layers axis counted where it has one."""
    axis = shared_axis(name)
    if axis is None:
        return None
    return axis + len(shape) - len([a for a in LEAF_AXES[name] if a != "layers"])


def _mesh_share(job: Job, name: str, shape: Shape) -> Shape:
    """A chip's share of an array of the reference's state."""
    sizes: dict[str, int] = dict(zip(MESH_AXES, job.mesh_shape, strict=True))
    axes = LEAF_AXES[name][len(LEAF_AXES[name]) - len(shape) :]
    return tuple(
        n // sizes[OVER_MESH[axis]] if axis in OVER_MESH else n
        for axis, n in zip(axes, shape, strict=True)
    )


def _share(shape: Shape, axis: int | None, devices: int) -> Shape:
    return tuple(n // devices if i == axis else n for i, n in enumerate(shape))


def batch_bytes(job: Job) -> int:
    """What one call of the update is given besides the state."""
    width, extra = job.rollout.max_completion_tokens, job.needs_old_logprobs + (job.train.beta > 0)
    dp, fsdp, _ = job.mesh_shape
    if job.update.design == "reference":
        rows = job.micro_batch_size // (dp * fsdp)
        per_token = (2 + extra) * tiled_bytes((rows, width), 4)  # mask, weights
        per_row = 2 * tiled_bytes((rows,), 4)  # prompt lengths, advantages
        # Whether it is the last micro-batch: a bool, which has no use where it is the only one.
        flag = _SCALAR if job.grad_accum_steps > 1 else 0
        return tiled_bytes((rows, job.max_sequence_tokens), 4) + per_token + per_row + flag
    per_row = job.sequences_per_row
    rows, tokens = job.sequences_per_step // per_row // (dp * fsdp), per_row * width
    seq = job.rollout.max_prompt_tokens + tokens
    # before, targets, mask, weights, advantages; then tokens and positions; then real.
    per_token = (5 + extra) * tiled_bytes((rows, tokens), 4)
    return per_token + 2 * tiled_bytes((rows, seq), 4) + tiled_bytes((rows, seq), 1)


def reference_policy_bytes(job: Job, architecture: Architecture) -> int:
    """The frozen copy for the KL term: matrices in the compute dtype, norms in f32; 0 without."""
    if not job.train.beta:
        return 0
    total = 0
    for path, shape, count in _leaves(job, architecture):
        name = path[-1]
        itemsize = 4 if LEAF_AXES[name][-1] == "norm" else _ITEMSIZE[job.update.update_dtype]
        if job.update.design == "layer_major":
            part = _share(shape, _shared(name, shape), job.target.devices)
        else:
            part = _mesh_share(job, name, shape)
        total += tiled_bytes(part, itemsize) * count
    return total


def by_reference(job: Job) -> bool:
    """Whether the naive sampler reads the masters' own `hi` (see `naive.hi_by_reference`)."""
    u = job.update
    split_as_sampled = u.design == "layer_major" and u.layers == "per_layer"
    return split_as_sampled and job.rollout.dtype == "bfloat16"


def sampler_bytes(job: Job, architecture: Architecture) -> int:
    """The weights that the naive sampler reads, a copy or not."""
    devices, itemsize = job.target.devices, _ITEMSIZE[job.rollout.dtype]
    total = 0
    for path, shape in leaf_shapes(architecture).items():
        in_layers = path[0] == "layers"
        axes, sizes = LEAF_AXES[path[-1]], shape
        if in_layers:
            axes, sizes = axes[1:], shape[1:]
        part = tuple(
            n // devices if axis in OVER_SAMPLER and n % devices == 0 else n
            for axis, n in zip(axes, sizes, strict=True)
        )
        total += tiled_bytes(part, itemsize) * (architecture.layers if in_layers else 1)
    return total


def request_bytes(job: Job) -> int:
    """What the naive sampler is given besides the weights, the same on every chip."""
    r = job.rollout
    prompts = tiled_bytes((r.prompts_per_step, r.max_prompt_tokens), 4)
    lengths = tiled_bytes((r.prompts_per_step,), 4) + tiled_bytes((job.sequences_per_step,), 4)
    return prompts + lengths + 2 * _SCALAR


def engine_weight_bytes(job: Job, architecture: Architecture, build: EngineBuild) -> int:
    """All of sglang-jax's weights, those that are the trainer's own arrays counted in.

    Each is shared out over the chips as the trainer's masters are; k and v are repeated where there
    are fewer heads than chips.

    Source: trainer/rollout/sglang/leaves.py; for what sglang-jax 0.0.2 does by itself, its
    srt/models/qwen2.py and weight_utils.py, and the leaves of a real engine.
    """
    return sum(leaf.size_bytes for leaf in _engine_leaves(job, architecture, build))


def engine_copied_bytes(job: Job, architecture: Architecture, build: EngineBuild) -> int:
    """The part of sglang-jax's weights that is no array of the trainer's.

    Source: trainer/rollout/sglang/leaves.py, `HandOver.missing`.
    """
    leaves = _engine_leaves(job, architecture, build)
    return sum(leaf.size_bytes for leaf in leaves if not leaf.by_reference)


@dataclass(frozen=True, kw_only=True)
class _EngineLeaf:
    """Weights of the engine of one kind, on one chip.

    Attributes:
        size_bytes: of all layers'.
        by_reference: they are the trainer's own arrays.
    """

    size_bytes: int
    by_reference: bool


def _engine_leaves(
    job: Job, architecture: Architecture, build: EngineBuild
) -> Iterator[_EngineLeaf]:
    a, tp, itemsize = architecture, _tp(job), _ITEMSIZE[job.engine.dtype]
    kv_width = max(a.kv_heads, tp) * a.head_dim
    for path, shape in leaf_shapes(architecture).items():
        name, in_layers = path[-1], path[0] == "layers"
        one = wide = shape[1:] if in_layers else shape
        if of_kv_heads(name):
            wide = (*one[:-1], kv_width)
        whole = build == "replicated" and ("bias" in name or not in_layers)
        part = wide if whole else _share(wide, shared_axis(name), tp)
        single = not in_layers or job.update.layers == "per_layer"
        like = part == _trainers_share(job, name, one) and wide == one
        yield _EngineLeaf(
            size_bytes=tiled_bytes(part, itemsize) * (a.layers if in_layers else 1),
            by_reference=single and like and itemsize == _masters_itemsize(job),
        )


def _trainers_share(job: Job, name: str, shape: Shape) -> Shape:
    if job.update.design == "reference":
        return _mesh_share(job, name, shape)
    return _share(shape, _shared(name, shape), job.target.devices)


def _masters_itemsize(job: Job) -> int:
    """Of what a master is read as: all of it in the reference, a split one's `hi`."""
    return 4 if job.update.design == "reference" else 2


def engine_request_bytes(job: Job, *, prefill: bool) -> int:
    """What sglang-jax's largest prefill or decode program is given besides weights and KV pool.

    Source: `ForwardBatch` and `FlashAttentionMetadata` of sglang-jax 0.0.2, less what XLA drops.
    """
    s = settings_of(job)
    pages = tiled_bytes((s.running * s.paged_length // s.page_size,), 4)
    tokens = tiled_bytes((max(s.prefill_paddings) if prefill else s.running,), 4)
    # Lengths and their sums, and how many sequences are of which kind.
    return pages + 2 * tokens + (5 if prefill else 4) * tiled_bytes((s.running,), 4)


def kv_token_bytes(job: Job, architecture: Architecture) -> int:
    """HBM that one cached token takes on one chip: K and V of every layer, the heads shared out.

    Source: `ModelRunner.profile_max_num_token` of sglang-jax 0.0.2; 14336 for Qwen2.5-7B on v4-8.
    """
    heads = max(1, architecture.kv_heads // _tp(job))
    itemsize = 2 if job.engine.kv_cache_dtype == "bf16" else _ITEMSIZE[job.engine.dtype]
    return heads * architecture.head_dim * architecture.layers * 2 * itemsize


def _tp(job: Job) -> int:
    return job.engine.tp_size or job.target.devices


@dataclass(frozen=True, kw_only=True)
class Pool:
    """sglang-jax's KV pool, or its refusal.

    Attributes:
        tokens: that it holds; 0 where the engine refuses to start.
        size_bytes: of the whole pool, on one chip.
        fraction: mem_fraction_static as given, or the server's own default.
        least_fraction: the engine refuses this and below.
    """

    tokens: int
    size_bytes: int
    fraction: float
    least_fraction: float


def kv_pool(job: Job, architecture: Architecture, *, free_bytes: int, weight_bytes: int) -> Pool:
    """The pool that the engine's own rule makes, whole pages.

    Never larger than the requests in flight can fill: `settings.settings_of` asks for no more.

    Args:
        job: its engine's settings.
        architecture: the model's.
        free_bytes: of a chip, when the engine starts, its weights not loaded yet.
        weight_bytes: the engine's.

    Source: `ModelRunner.profile_max_num_token` and `init_memory_pool` of sglang-jax 0.0.2; the
    fraction is of what was free then, not of the chip.
    """
    e = job.engine
    fraction = _SERVER_FRACTION if e.mem_fraction_static is None else e.mem_fraction_static
    least = weight_bytes / free_bytes if free_bytes > 0 else math.inf
    room = (free_bytes - weight_bytes) - free_bytes * (1 - fraction)
    page, token = e.page_size or 1, kv_token_bytes(job, architecture)
    tokens = max(1, int(room // token)) if room > 0 else 0
    tokens = min(tokens, settings_of(job).pool_tokens) // page * page
    size = (tokens + page) * token if tokens else 0
    return Pool(tokens=tokens, size_bytes=size, fraction=fraction, least_fraction=least)
