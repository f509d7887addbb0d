"""What a program would reserve, by a formula: for `headroom plan --quick`, and to sort candidates.

The formulas of layer_major's update, and of logprobs, name what fills the heap when it is fullest;
the first is within 7 % of the compiler's figure for the rows of docs/memory.md. The reference's
update is one measured ratio, the sampler a sum of caches: take them for an order of magnitude.
"""

import math
from dataclasses import dataclass

from jobs.spec import Job
from trainer import budget
from trainer.architecture import Architecture, leaf_shapes, parameter_count
from trainer.buffers import ProgramMemory

# Arrays of the MLP's width that one micro-batch keeps inside a layer: 0.30 GiB of row 7b.
_MLP_WIDE = 5
# f32 arrays of the vocabulary's width, each device's share of it for all devices' tokens, that one
# chunk of the loss keeps: 4.72 GiB in all for row 7b with chunks of 2048 tokens.
_LOGITS = 1.6
# Of the whole model in bf16, 14.19 GiB for 7B: 7.50 with single layers, whose gathered weights XLA
# keeps until the backward pass; about 18.0 where layers are stacked (a prototype's).
_REFERENCE_RATIO = {"per_layer": 7.50 / 14.19, "stacked": 18.0 / 14.19}
_REFERENCE_TOKENS = 1536  # of a device, at once, when they were measured
# sglang-jax 0.0.2, 7B, v4-8, 32 requests, by the compiler: its prefill of 4096 tokens takes 0.068
# GiB, of 512 tokens 0.023, decode 0.018.
_ENGINE_PROGRAM = int(0.07 * 2**30)
# Of the weights handed over from the reference's f32 masters, whose columns go to other chips:
# 2.008 of 3.547 GiB for 7B on v4-8.
_RESHARDED = 0.57
_PROBE_TOKENS = 16  # trainer/rollout/sglang/probe.py


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program's memory, and who says so.

    Attributes:
        memory: on one chip.
        estimated: by a formula here, not by the compiler.
    """

    memory: ProgramMemory
    estimated: bool


def estimate(job: Job, architecture: Architecture, program: str) -> Program:
    """The memory of one of a job's programs, see `ledger.programs_of`."""
    makers = {
        "update": _update,
        "logprobs": _logprobs,
        "reference_logprobs": _reference_logprobs,
        "sampler": _sampler,
        "engine_prefill": _engine_program,
        "engine_decode": _engine_program,
        "engine_probe": _engine_probe,
        "hand_over": _hand_over,
    }
    arguments, outputs, reserved = makers[program](job, architecture)
    memory = ProgramMemory(
        arguments_bytes=arguments,
        outputs_bytes=outputs,
        reserved_bytes=reserved,
        code_bytes=None,
        host_bytes=budget.state_bytes(job, architecture).host_bytes,
        peak=(),
        fragmentation_bytes=0,
    )
    return Program(memory=memory, estimated=True)


def _update(job: Job, architecture: Architecture) -> tuple[int, int, int]:
    a, devices = architecture, job.target.devices
    arguments = sum(budget.state_bytes(job, a).owners.values()) + budget.batch_bytes(job)
    whole = 2 * parameter_count(a)  # bf16
    if job.update.design == "reference":
        reserved = int(_REFERENCE_RATIO[job.update.layers] * whole)
        return arguments, 0, reserved + _reference_tokens_bytes(job, a)
    tokens, at_once = (
        _device_tokens(job, n) for n in (job.sequences_per_step, job.micro_batch_size)
    )
    layer_inputs = (a.layers + 1) * tokens * a.embed * 2  # and the gradient of one layer's
    layer = _layer_parameters(a) * (4 + 2)  # f32 gradient, gathered bf16 weights
    inside = _MLP_WIDE * at_once * a.mlp * 2
    kept = whole // devices if job.update.clip == "global" else 0
    # Or at the head, before: its f32 gradient, and scores of one chunk of all devices' tokens.
    chunk = min(job.update.loss_chunk_tokens, tokens)
    head = a.vocab * a.embed * 4 // devices + int(_LOGITS * chunk * a.vocab * 4)
    return arguments, 0, layer_inputs + max(layer + inside + kept, head)


def _device_tokens(job: Job, sequences: int) -> int:
    """A device's share of so many sequences' rows, tokens."""
    per_row, r = job.sequences_per_row, job.rollout
    row_tokens = r.max_prompt_tokens + per_row * r.max_completion_tokens
    return sequences // per_row // job.target.devices * row_tokens


def _logprobs(job: Job, architecture: Architecture) -> tuple[int, int, int]:
    """A forward pass that keeps no layer's input: one layer's gathered weights, or the head."""
    a, owners = architecture, budget.state_bytes(job, architecture).owners
    batch = budget.batch_bytes(job)
    if job.update.design == "reference":
        cast = 2 * a.vocab * a.embed // job.target.devices  # the masters' own share of the head
        return owners["parameters (f32)"] + batch, 0, _whole_head(job, a) + cast
    tokens, at_once = (
        _device_tokens(job, n) for n in (job.sequences_per_step, job.micro_batch_size)
    )
    layer = 2 * _layer_parameters(a) + 2 * at_once * a.mlp
    head = int(_LOGITS * min(job.update.loss_chunk_tokens, tokens) * a.vocab * 4)
    reserved = 2 * tokens * a.embed + max(layer, head)
    return owners["parameters hi"] + batch, 0, reserved


def _reference_logprobs(job: Job, architecture: Architecture) -> tuple[int, int, int]:
    arguments = budget.reference_policy_bytes(job, architecture) + budget.batch_bytes(job)
    if job.update.design == "reference":
        return arguments, 0, _whole_head(job, architecture)
    return arguments, 0, _logprobs(job, architecture)[2]


def _whole_head(job: Job, a: Architecture) -> int:
    """The reference's: XLA gathers all of the head, beside one chunk's scores."""
    return 2 * a.vocab * a.embed + job.update.loss_chunk_tokens * a.vocab * 4


def _reference_tokens_bytes(job: Job, a: Architecture) -> int:
    """Of more tokens at once than the ratio was measured with: a guess."""
    dp, fsdp, _ = job.mesh_shape
    length = job.max_sequence_tokens
    more = job.micro_batch_size // (dp * fsdp) * length - _REFERENCE_TOKENS
    scores = 2 * a.heads * length * 4  # XLA's attention, f32
    each = (a.layers + 1) * a.embed * 2 + _MLP_WIDE * a.mlp * 2 + scores
    return max(0, more) * each


def _layer_parameters(architecture: Architecture) -> int:
    return sum(
        math.prod(shape[1:])
        for path, shape in leaf_shapes(architecture).items()
        if path[0] == "layers"
    )


def _sampler(job: Job, architecture: Architecture) -> tuple[int, int, int]:
    a = architecture
    completions = job.sequences_per_step * job.rollout.max_completion_tokens * _kv_token(job, a)
    logits = 3 * job.sequences_per_step * a.vocab * 4  # scores, noise, their sum
    arguments = budget.sampler_bytes(job, a) + budget.request_bytes(job)
    # The loop's carry is an output to XLA, and its first value lies beside it.
    return arguments, completions, kept_kv_bytes(job, a) + logits


def kept_kv_bytes(job: Job, architecture: Architecture) -> int:
    """Keys and values that the naive sampler keeps on one chip: a prompt's once for its group."""
    r = job.rollout
    tokens = r.prompts_per_step * r.max_prompt_tokens
    tokens += job.sequences_per_step * r.max_completion_tokens
    return tokens * _kv_token(job, architecture)


def _kv_token(job: Job, a: Architecture) -> int:
    devices = job.target.devices
    heads = a.kv_heads // devices if a.kv_heads % devices == 0 else a.kv_heads
    return heads * a.head_dim * a.layers * 2 * (2 if job.rollout.dtype == "bfloat16" else 4)


def _engine_program(job: Job, architecture: Architecture) -> tuple[int, int, int]:
    weights = budget.engine_weight_bytes(job, architecture, "sharded")
    return weights, 0, _ENGINE_PROGRAM


def _engine_probe(job: Job, architecture: Architecture) -> tuple[int, int, int]:
    """A forward pass of one prompt by the trainer's own functions: its scores are most of it."""
    a, owners = architecture, budget.state_bytes(job, architecture).owners
    scores = (job.rollout.max_prompt_tokens + _PROBE_TOKENS) * a.vocab * 4
    if job.update.design == "reference":
        return owners["parameters (f32)"], 0, 2 * scores
    return owners["parameters hi"], 0, scores * 5 // 4 // job.target.devices


def _hand_over(job: Job, architecture: Architecture) -> tuple[int, int, int]:
    owners = budget.state_bytes(job, architecture).owners
    parameters = sum(size for owner, size in owners.items() if owner.startswith("parameters"))
    if job.rollout.engine == "naive":
        return parameters, budget.sampler_bytes(job, architecture), 0
    copied = budget.engine_copied_bytes(job, architecture, "sharded")
    moved = _RESHARDED if job.update.design == "reference" else 0.0
    return parameters, copied, int(moved * copied)
