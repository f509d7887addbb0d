"""What may help a job that does not fit: settings and their price. Nothing here is verified."""

import math

from jobs.records import MemoryPlan, gib
from jobs.spec import Job
from trainer import budget
from trainer.architecture import Architecture

Remedy = tuple[tuple[str, ...], str]

_LAYER_MAJOR = ("update.design=layer_major",)
_PRICE_OF_DESIGN = (
    "the optimizer's moments in bf16 instead of f32; parameters stay exact f32, in two halves"
)
_PRICE_OF_CLIP = "each layer's gradient is clipped by its own norm, not all by the norm of all"
_SLEEP = ("engine.residency=sleep",)
_PRICE_OF_SLEEP = "the engine's KV pool is made anew each step"
_PRICE_OF_NAIVE = "our own sampler decodes; nothing of an engine is in memory"


def remedies(job: Job, architecture: Architecture, plan: MemoryPlan) -> list[Remedy]:
    """Changes worth planning, alone and together."""
    return [*_of_engine(job, plan), *_of_update(job, architecture), *_together(job)]


def _of_engine(job: Job, plan: MemoryPlan) -> list[Remedy]:
    if job.rollout.engine == "naive":
        return []
    found: list[Remedy] = [(("rollout.engine=naive",), _PRICE_OF_NAIVE)]
    if job.engine.residency != "sleep":
        found.append((_SLEEP, _PRICE_OF_SLEEP))
    needed = job.sequences_per_step * job.max_sequence_tokens
    interval = plan.mem_fraction_interval
    if interval is None:
        return found
    if plan.verdict == "engine_refused" and interval.above < 1.0:
        # A share that just holds what is asked for at once.
        fraction = math.ceil(interval.above * 100 + 1) / 100
        if fraction < 1.0:
            price = "none: the engine's own rule wants more than its weights"
            found.append(((f"engine.mem_fraction_static={fraction}",), price))
    elif (plan.kv_pool_tokens or 0) > needed:
        price = "none: a step's sequences have no use for more"
        found.append(((f"engine.max_total_tokens={needed}",), price))
    return found


def _of_update(job: Job, architecture: Architecture) -> list[Remedy]:
    u, found = job.update, list[Remedy]()
    if u.design == "reference":
        if (job.mesh.dp, job.mesh.tp) == (1, 1):
            found.append((_LAYER_MAJOR, _PRICE_OF_DESIGN))
        return found
    if u.clip == "global":
        found.append((("update.clip=per_layer",), _PRICE_OF_CLIP))
    if u.moments == "bfloat16":
        price = "moments with 8 bits, rounded at random"
        found.append((("update.moments=int8",), price))
    if not u.host_offload:
        size = gib(_offloaded_bytes(job, architecture))
        price = f"state crosses PCIe twice an update, {size} each way"
        found.append((('update.host_offload=["momentum","lo"]',), price))
    if u.layers == "stacked" and job.rollout.engine == "naive":
        price = "the update compiles longer"
        found.append((("update.layers=per_layer",), price))
    return found


def _offloaded_bytes(job: Job, architecture: Architecture) -> int:
    update = job.update.model_copy(update={"host_offload": ("momentum", "lo")})
    return budget.state_bytes(job.model_copy(update={"update": update}), architecture).host_bytes


def _together(job: Job) -> list[Remedy]:
    """The strongest that there is, in one; and what keeps the engine."""
    settings: list[str] = []
    prices: list[str] = []
    found: list[Remedy] = []
    if job.update.design == "reference" and (job.mesh.dp, job.mesh.tp) == (1, 1):
        settings += _LAYER_MAJOR
        prices.append(_PRICE_OF_DESIGN)
        if job.rollout.engine != "naive" and job.engine.residency != "sleep":
            found.append((_LAYER_MAJOR + _SLEEP, f"{_PRICE_OF_DESIGN}; {_PRICE_OF_SLEEP}"))
    if job.update.clip == "global":
        settings.append("update.clip=per_layer")
        prices.append(_PRICE_OF_CLIP)
    if job.rollout.engine != "naive":
        settings.append("rollout.engine=naive")
        prices.append(_PRICE_OF_NAIVE)
    if job.update.design == "layer_major" and not job.update.host_offload:
        settings.append('update.host_offload=["momentum","lo"]')
        prices.append("state crosses PCIe twice an update")
    if len(settings) > 1:
        found.append((tuple(settings), "; ".join(prices)))
    return found
