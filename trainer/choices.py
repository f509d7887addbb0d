"""What `headroom fit` tries: the values of each key, and what a change of it does and costs."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from jobs.spec import Job

ALTERS = ("update.clip", "update.moments")  # the mathematics
_CHUNKS = (256,)  # larger ones are no faster: trainer/timemodel.py
_OFFLOADS = ([], ["momentum"], ["lo"], ["momentum", "lo"])

# What a change does, and what it costs.
SAYS = {
    "update.design": (
        "updates layer by layer: no gradient of the whole model, each layer's weights gathered "
        "twice a step and not twice a micro-batch",
        "the optimizer's moments in bf16 instead of f32; parameters stay exact f32, in two halves",
    ),
    "update.remat": ("layer_major always recomputes a layer", "none"),
    "update.clip": (
        "no gradient waits for the norm of all",
        "alters the mathematics: each layer's gradient is clipped by its own norm",
    ),
    "update.moments": (
        "moments of 8 bits",
        "alters the mathematics: moments are rounded at random to 8 bits",
    ),
    "update.layers": ("other layout of the layers' arrays", "per_layer compiles longer"),
    "update.host_offload": ("state lies in the host's memory", "it crosses PCIe twice an update"),
    "update.completions_per_row": ("a prompt is computed once for its group", "none but rounding"),
    "update.loss_chunk_tokens": ("fewer logits exist at once", "none but rounding"),
    "train.micro_batch_size": ("other count of sequences at once", "none but rounding"),
    "rollout.engine": (
        "our own sampler: all sequences at once, in lock step, and nothing of an engine in memory",
        "completions are sampled by another program",
    ),
    "engine.residency": (
        "the engine lets go of its weights and KV pool through the update",
        "the KV pool is made anew each step",
    ),
    "engine.max_total_tokens": ("a smaller KV pool", "fewer requests run at once"),
}


def value_of(job: Job, key: str) -> Any:
    """The job's value of a dotted key, as JSON has it."""
    node: Any = job.model_dump(mode="json")
    for part in key.split("."):
        node = node[part]
    return node


def choices_of(job: Job, design: str, *, exact: bool) -> dict[str, list[Any]]:
    """Values worth trying, the job's own first, by key."""
    u, sequences = job.update, job.sequences_per_step
    dp, fsdp, _ = job.mesh_shape
    tokens = job.rollout.max_completion_tokens * sequences // (dp * fsdp)
    divisors = [n for n in range(1, sequences + 1) if sequences % n == 0 and not n % (dp * fsdp)]
    new: dict[str, list[Any]] = {
        "update.clip": ["per_layer"] if u.clip == "global" and job.train.max_grad_norm else [],
        "update.layers": ["stacked", "per_layer"],
        "update.loss_chunk_tokens": [n for n in _CHUNKS if n <= tokens],
        "train.micro_batch_size": divisors,
    }
    if design == "layer_major":
        new |= {
            "update.remat": [],
            "update.moments": ["int8"],
            "update.host_offload": list(_OFFLOADS),
            "update.completions_per_row": ["group"] if job.rollout.group_size > 1 else [],
        }
    if exact:
        new |= {key: [] for key in ALTERS if key in new}
    asked = {key: [value_of(job, key)] for key in new}
    if design == "layer_major":
        asked["update.remat"] = [True]
    if asked["train.micro_batch_size"] == [None]:
        # Unset is the smallest.
        new["train.micro_batch_size"] = divisors[1:]
    found = {key: _unlike(asked[key] + values) for key, values in new.items()}
    return found | _engine_choices(job)


def _engine_choices(job: Job) -> dict[str, list[Any]]:
    if job.rollout.engine == "naive":
        return {}
    whole = job.sequences_per_step * job.max_sequence_tokens
    pools = [whole // 4] if whole // 4 >= job.max_sequence_tokens else []
    return {
        "rollout.engine": ["naive", job.rollout.engine],
        "engine.residency": _unlike([job.engine.residency, "sleep"]),
        "engine.max_total_tokens": _unlike([job.engine.max_total_tokens, *pools]),
    }


def _unlike(values: Iterable[Any]) -> list[Any]:
    return [json.loads(text) for text in dict.fromkeys(json.dumps(value) for value in values)]


def pointless(job: Job, changes: Mapping[str, Any]) -> bool:
    """They change an engine that they do not ask for."""
    engine = changes.get("rollout.engine", job.rollout.engine)
    return engine == "naive" and any(key.startswith("engine.") for key in changes)
