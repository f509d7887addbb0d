"""What sglang-jax is started with for a job, and the jobs that it cannot run. Pure: no JAX."""

from dataclasses import dataclass

from jobs.spec import Job
from trainer.architecture import Architecture
from trainer.buffers import power_of_two, up_to
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
        pool_tokens: of the KV pool, at most: what `running` sequences of `length` fill.
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

    @property
    def paged_length(self) -> int:
        """Tokens of the pool that a sequence at its longest takes: whole pages."""
        return up_to(self.length, self.page_size)


def settings_of(job: Job) -> Settings:
    """The engine's settings for a job."""
    e, r = job.engine, job.rollout
    page, length = e.page_size or 1, e.context_length or job.max_sequence_tokens
    running = e.max_running_requests or min(
        r.chunk_size or job.sequences_per_step, _most_running(job, length, page)
    )
    prefill = e.chunked_prefill_size
    if prefill is None:
        wanted = min(_MOST_PREFILL, max(_LEAST_PREFILL, r.max_prompt_tokens))
        prefill = up_to(power_of_two(max(wanted, running)), page)
    return Settings(
        tp_size=e.tp_size or job.target.devices,
        running=running,
        length=length,
        page_size=page,
        pool_tokens=e.max_total_tokens or running * up_to(length, page),
        prefill_tokens=prefill,
        prefill_paddings=tuple(sorted({*(e.precompile_token_paddings or ()), prefill})),
        decode_paddings=tuple(sorted({*(e.precompile_bs_paddings or ()), running})),
        mem_fraction=e.mem_fraction_static,
    )


def _most_running(job: Job, length: int, page: int) -> int:
    """Requests that the attention backend takes at once.

    Source: sglang-jax 0.0.2, flashattention_backend.py:281, native_backend.py:103.
    """
    if job.target.platform != "tpu":
        return 4096
    return max(1, 1024 * 1024 // 2 // -(-(length + 1) // page) // 4)


def check_engine(job: Job, architecture: Architecture) -> None:
    """Refuse a job that sglang-jax 0.0.2 cannot run, before anything starts.

    Raises:
        EngineError: what it cannot do, and what to change.
    """
    if job.rollout.engine == "sglang_jax":
        settings = settings_of(job)
        _check_heads(job, architecture, settings)
        _check_sizes(job, settings)
        _check_asked(job, settings)


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


def _check_asked(job: Job, s: Settings) -> None:
    """What the engine would drop or lower without a word."""
    e, most = job.engine, _most_running(job, s.length, s.page_size)
    if e.load_format != "dummy":
        raise EngineError(
            f"engine.load_format = {e.load_format}: the engine's weights are the trainer's, and "
            "none are read: leave it at dummy"
        )
    if s.running > most:
        raise EngineError(
            f"engine.max_running_requests = {s.running}: sglang-jax {VERSION} runs at most {most} "
            f"sequences of {s.length} tokens in pages of {s.page_size}: lower it, or raise "
            "engine.page_size"
        )
    if max(s.decode_paddings) > s.running:
        raise EngineError(
            f"engine.precompile_bs_paddings has {max(s.decode_paddings)}, and at most {s.running} "
            "requests run at once: leave out what is above"
        )
    if max(s.prefill_paddings) > s.prefill_tokens or min(s.prefill_paddings) < s.running:
        raise EngineError(
            f"engine.precompile_token_paddings = {list(s.prefill_paddings)}: each must be from the "
            f"{s.running} requests in flight to engine.chunked_prefill_size = {s.prefill_tokens}"
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
    least = s.paged_length
    if s.pool_tokens < least:
        raise EngineError(
            f"engine.max_total_tokens = {s.pool_tokens} is a KV pool too small for one sequence "
            f"of {s.length} tokens in pages of {s.page_size}: use at least {least}"
        )
