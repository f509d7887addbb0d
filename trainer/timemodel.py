"""How long a step of a job would take: a model from its shapes alone, never a measurement.

It orders settings; it promises nothing. What it assumes, and leaves out:

- Matmuls run at one fraction of the chip's peak, and a micro-batch adds so many bytes of HBM: what
  the compiler's own cycles give for 7B on v4-8. Elementwise work is in that fraction.
- Attention counts each pair of a sequence, the half above the diagonal, too: kernels lose about it.
- Communication and PCIe overlap with nothing. Latency counts nothing: 59 all-reduces a token of 7B.
- Every completion is as long as it may be, and decoding is bound by what it reads of HBM.
- The links' and PCIe's speeds are assumptions; no program of ours was timed on a TPU.
"""

import math
from dataclasses import asdict, dataclass

from jobs.accelerators import Accelerator
from jobs.spec import Job
from trainer import budget
from trainer.architecture import Architecture, leaf_shapes
from trainer.axes import LEAF_AXES
from trainer.budget import EngineBuild
from trainer.estimate import kept_kv_bytes

# trainer/steptime.py of row 7b of docs/memory.md, whose matmuls take 2.43 s at peak: 3.30 s of
# compute with 8 micro-batches (3.35 with 4), 3.12 with one: 5 bytes a number of the layers each.
# Chunks of the loss of 2048 tokens, not 512, changed it by 0.00 s.
MATMUL_SHARE = 0.787
_MICRO_BATCH_BYTES = 5
# Forward, again for backward, and backward: of a layer, in forwards; and of attention's kernel.
_LAYER_PASSES, _ATTENTION_PASSES, _HEAD_PASSES = 4.0, 4.5, 3.0
# Each layer's weights are gathered twice in bf16, and its gradient summed in f32.
_LAYER_MAJOR_ICI = 2 + 2 + 4
# Of the SOP's own program, a micro-batch: 209 GiB (docs/memory.md) in 8 of them.
_REFERENCE_ICI = 5.3
# Bytes/s that a device receives: two links of a chip carry a ring in every slice of the table.
# Google's published interconnect bandwidth of a chip over its links (cloud.google.com/tpu/docs:
# v2 496 and v3 656 Gbit/s over 4; v4 2400, v5p 4800, v7x 9600 over 6; v5e 1600, v6e 3584 over 4).
_ICI = {
    "TPU v2": 15.5e9,
    "TPU v3": 20.5e9,
    "TPU v4": 100e9,
    "TPU v5 lite": 100e9,
    "TPU v5": 200e9,
    "TPU v6 lite": 224e9,
    "TPU7x": 200e9,
}
_PCIE = 8e9  # bytes/s a device and way, assumed: half of what PCIe 3.0 x16 carries
# What to tell wherever its seconds are shown.
NOTE = (
    "times are a model (trainer/timemodel.py), never a measurement: matmuls at one share of the "
    "peak, completions as long as they may be, nothing overlaps, links and PCIe at assumed speeds"
)


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """Seconds of one step, by what takes them.

    Attributes:
        update_compute_s: of all applications of a step, with the passes for logprobs.
        update_ici_s: the same of communication.
        host_offload_s: of state over PCIe, both ways.
        prefill_s: of the prompts.
        decode_s: of all tokens.
        hand_over_s: copies to the sampler or engine.
    """

    update_compute_s: float
    update_ici_s: float
    host_offload_s: float
    prefill_s: float
    decode_s: float
    hand_over_s: float

    @property
    def step_s(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return asdict(self)


def step_model(job: Job, architecture: Architecture, *, build: EngineBuild) -> StepModel:
    """The model of one step of a job on its TPU.

    Args:
        job: on an accelerator whose peak and bandwidth are known.
        architecture: the model's.
        build: how sglang-jax lays embedding and head.
    """
    a, target, updates = architecture, job.target, job.train.updates_per_rollout
    speed = target.devices * target.peak_flops * MATMUL_SHARE
    # A forward pass for the sampling policy's logprobs, and one for the frozen policy's.
    forwards = job.needs_old_logprobs + (job.train.beta > 0)
    compute = updates * update_flops(job, a) + forwards * _forward_flops(job, a)
    hbm = job.grad_accum_steps * _MICRO_BATCH_BYTES * _layers(a)
    offloaded = 2 * budget.state_bytes(job, a).host_bytes  # in and out
    rollout = job.rollout
    whose = rollout.prompts_per_step if rollout.engine == "naive" else job.sequences_per_step
    prefill = 2 * _layers(a) * whose * rollout.max_prompt_tokens
    copied = _handed_over_bytes(job, a, build)
    return StepModel(
        update_compute_s=compute / speed + updates * hbm / target.hbm_bandwidth,
        update_ici_s=updates * ici_bytes(job, a) / ici_bandwidth(target),
        host_offload_s=updates * offloaded / _PCIE,
        prefill_s=prefill / speed,
        decode_s=_decode_s(job, a, build),
        hand_over_s=copied / target.hbm_bandwidth,
    )


def ici_bandwidth(target: Accelerator) -> float:
    """Bytes/s that a device receives over the interconnect, assumed."""
    return _ICI[target.device_kind]


def update_flops(job: Job, architecture: Architecture) -> float:
    """FLOPs of one application of the optimizer, over all devices, recomputation included."""
    a, tokens = architecture, _row_tokens(job) * _rows(job)
    again = job.update.design == "layer_major" or job.update.remat
    drop = 0.0 if again else 1.0
    layers = 2 * (_LAYER_PASSES - drop) * _layers(a) * tokens
    attention = (_ATTENTION_PASSES - drop) * _attention_flops(job, a)
    return layers + attention + 2 * _HEAD_PASSES * _head(a) * _completion_tokens(job)


def _forward_flops(job: Job, a: Architecture) -> float:
    tokens = _row_tokens(job) * _rows(job)
    head = 2 * _head(a) * _completion_tokens(job)
    return 2 * _layers(a) * tokens + _attention_flops(job, a) + head


def _attention_flops(job: Job, a: Architecture) -> float:
    """One forward pass's: scores and their use, of each token with every one it may see."""
    tokens = _row_tokens(job) * _rows(job)
    # The kernel leaves out what other completions of a row hold; XLA's attention does not.
    seen = _row_tokens(job) if job.update.attention == "xla" else job.max_sequence_tokens
    return 2 * 2 * tokens * seen * a.heads * a.head_dim * a.layers


def ici_bytes(job: Job, architecture: Architecture) -> float:
    """Bytes that a device receives in one application of the optimizer."""
    a, devices = architecture, job.target.devices
    others = (devices - 1) / devices
    if job.update.design == "reference":
        return job.grad_accum_steps * _REFERENCE_ICI * (_layers(a) + _head(a)) * others
    weights = _LAYER_MAJOR_ICI * _layers(a) * others
    # At both ends, bf16: all devices' tokens meet each one's share of the vocabulary, and go back.
    tokens = _rows(job) * _row_tokens(job) + _completion_tokens(job)
    return weights + 2 * tokens * a.embed * 2 * others


def _decode_s(job: Job, a: Architecture, build: EngineBuild) -> float:
    """Each token reads the weights, but for the table that only rows are taken from, and the KV."""
    r, sequences = job.rollout, job.sequences_per_step
    if r.engine == "naive":
        weights, kv, waves = budget.sampler_bytes(job, a), kept_kv_bytes(job, a), 1
        table = a.vocab * a.embed * 2 / job.target.devices
    else:
        weights = budget.engine_weight_bytes(job, a, build)
        running = _running(job, a, build)
        waves = math.ceil(sequences / running)
        # A request's tokens are there as they come: half of them, on the whole.
        held = r.max_prompt_tokens + r.max_completion_tokens / 2
        kv = running * held * budget.kv_token_bytes(job, a)
        table = a.vocab * a.embed * 2 / (job.target.devices if build == "sharded" else 1)
    read = weights + kv - (0 if a.tied_head else table)
    return waves * r.max_completion_tokens * read / job.target.hbm_bandwidth


def token_s(job: Job, architecture: Architecture, *, build: EngineBuild) -> float:
    """Seconds for one token of all sequences that are decoded together."""
    r = job.rollout
    waves = 1
    if r.engine != "naive":
        waves = math.ceil(job.sequences_per_step / _running(job, architecture, build))
    return _decode_s(job, architecture, build) / waves / r.max_completion_tokens


def _running(job: Job, a: Architecture, build: EngineBuild) -> int:
    """Requests that the engine's pool, and its caps, let run at once."""
    state = budget.state_bytes(job, a).owners
    free = job.target.usable_hbm_bytes - sum(state.values())
    free -= budget.reference_policy_bytes(job, a)
    weights = budget.engine_weight_bytes(job, a, build)
    pool = budget.kv_pool(job, a, free_bytes=free, weight_bytes=weights)
    caps = (job.engine.max_running_requests, job.rollout.chunk_size, job.sequences_per_step)
    room = pool.tokens // job.max_sequence_tokens
    return max(1, min(room, *(cap for cap in caps if cap is not None)))


def _handed_over_bytes(job: Job, a: Architecture, build: EngineBuild) -> float:
    """Read and written by a device; none where the sampler reads the masters' own halves."""
    if job.rollout.engine != "naive":
        return 2 * budget.engine_copied_bytes(job, a, build)
    return 0 if budget.by_reference(job) else 2 * budget.sampler_bytes(job, a)


def _rows(job: Job) -> int:
    return job.sequences_per_step // job.sequences_per_row


def _row_tokens(job: Job) -> int:
    r = job.rollout
    return r.max_prompt_tokens + job.sequences_per_row * r.max_completion_tokens


def _completion_tokens(job: Job) -> int:
    return job.sequences_per_step * job.rollout.max_completion_tokens


def _layers(a: Architecture) -> int:
    """Numbers in the matrices of all layers."""
    return sum(
        math.prod(shape)
        for path, shape in leaf_shapes(a).items()
        if path[0] == "layers" and len(LEAF_AXES[path[-1]]) == 3
    )


def _head(a: Architecture) -> int:
    return a.vocab * a.embed
