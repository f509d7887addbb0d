"""What sglang-jax is started with for a job, and the jobs that it cannot run. Pure: no JAX."""

from dataclasses import dataclass

from jobs.spec import Job
from trainer.architecture import Architecture
from trainer.refusal import Refusal

VERSION = "0.0.2"
_LANES = 128  # the TPU kernel's head width: srt/layers/attention/flash_attn_kernel
_LEAST_PREFILL, _MOST_PREFILL = 64, 2048


class EngineError(Refusal):
    """The engine cannot run the job: what was asked, what it can do, what to change."""


class EngineFaultError(RuntimeError):
    """The engine failed at work: what it said, and our numbers."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The engine's numbers, every one of them, from what the job says and leaves open.

    Attributes:
        tp_size: chips that share the weights: all of them.
        running: requests in flight at once; more wait their turn.
        length: tokens of a sequence at its longest.
        page_size: tokens of one KV page.
        pool_tokens: of the KV pool, at most: what `running` sequences of `length` fill, and a page,
            since the engine starts a sequence only where something would be left.
        prefill_tokens: of one prefill program, at most.
        prefill_paddings: tokens of the prefill programs.
        decode_paddings: requests of the decode programs.
        mem_fraction: of what is free when the engine starts; None: the engine's own default.
    """

    tp_size: int
    running: int
    length: int
    page_size: int
    pool_tokens: int
    prefill_tokens: int
    prefill_paddings: tuple[int, ...]
    decode_paddings: tuple[int, ...]
    mem_fraction: float | None


def settings_of(job: Job) -> Settings:
    """The engine's settings for a job."""
    e, r = job.engine, job.rollout
    page, length = e.page_size or 1, e.context_length or job.max_sequence_tokens
    running = e.max_running_requests or r.chunk_size or job.sequences_per_step
    prefill = e.chunked_prefill_size
    if prefill is None:
        wanted = min(_MOST_PREFILL, max(_LEAST_PREFILL, r.max_prompt_tokens))
        prefill = _up_to(1 << (max(wanted, running) - 1).bit_length(), page)
    one = _up_to(length, page)
    pool = running * one + page if e.max_total_tokens is None else e.max_total_tokens
    if pool >= one:
        pool = max(pool, one + page)
    return Settings(
        tp_size=e.tp_size or job.target.devices,
        running=running,
        length=length,
        page_size=page,
        pool_tokens=pool,
        prefill_tokens=prefill,
        prefill_paddings=e.precompile_token_paddings or (prefill,),
        decode_paddings=e.precompile_bs_paddings or (running,),
        mem_fraction=e.mem_fraction_static,
    )


def _up_to(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def check_engine(job: Job, architecture: Architecture) -> None:
    """Refuse a job that sglang-jax 0.0.2 cannot run, before anything starts.

    Raises:
        EngineError: what it cannot do, and what to change.
    """
    if job.rollout.engine == "sglang_jax":
        settings = settings_of(job)
        _check_heads(job, architecture, settings)
        _check_sizes(job, settings)


def _check_heads(job: Job, a: Architecture, s: Settings) -> None:
    if job.target.platform == "tpu" and a.head_dim % _LANES:
        raise EngineError(
            f"{job.model} has heads of {a.head_dim}, and the TPU kernel of sglang-jax {VERSION} "
            f"wants a multiple of {_LANES}: use --set rollout.engine=naive"
        )
    if s.tp_size != job.target.devices:
        raise EngineError(
            f"engine.tp_size = {s.tp_size}, but {job.accelerator} has {job.target.devices} "
            "devices, and the others would each keep the weights once more: leave it unset"
        )
    if a.heads % s.tp_size or (a.kv_heads % s.tp_size and s.tp_size % a.kv_heads):
        raise EngineError(
            f"{job.model} has {a.heads} query and {a.kv_heads} key/value heads, which cannot be "
            f"shared out over {s.tp_size} devices: use --set rollout.engine=naive, or another "
            "accelerator"
        )


def _check_sizes(job: Job, s: Settings) -> None:
    if s.page_size > 1 and job.target.platform != "tpu":
        raise EngineError(
            f"engine.page_size = {s.page_size}: sglang-jax {VERSION} computes attention over pages "
            f"on TPU only, and accelerator = {job.accelerator}: use 1"
        )
    if s.prefill_tokens % s.page_size:
        raise EngineError(
            f"engine.chunked_prefill_size = {s.prefill_tokens} is no multiple of engine.page_size "
            f"= {s.page_size}: use one"
        )
    if s.prefill_tokens < s.running:
        raise EngineError(
            f"engine.chunked_prefill_size = {s.prefill_tokens} is less than the {s.running} "
            "requests in flight, and sglang-jax pads every batch to it: raise it, or lower "
            "engine.max_running_requests"
        )
    least = _up_to(s.length, s.page_size)
    if s.pool_tokens < least:
        raise EngineError(
            f"engine.max_total_tokens = {s.pool_tokens} is a KV pool too small for one sequence "
            f"of {s.length} tokens in pages of {s.page_size}: use at least {least}"
        )
