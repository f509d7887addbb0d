"""The table of causes, first part: memory of the chip, of a GPU, of the host and of the engine."""

from runner.cause import COUNT, SIZE, Cause, Sign

_DEVICE = r"\((?P<device>\d+x\d+x\d+_[A-Z]+\d+)\)"
_ERROR_CODE = r"(?P<error_code>E\d{4}): ?\w+"
_PROGRAM = r"Error loading program '(?P<program>[^'\s]+)'"
_XLA_ERRORS = "https://openxla.org/xla/errors"


def _over(space: str) -> str:
    """The compiler's sum does not fit: `Used 9.08G of 7.48G hbm. Exceeded hbm capacity by ...`."""
    return rf"Ran out of memory in memory space {space}\b"


def _over_details(space: str) -> tuple[str, ...]:
    return (
        rf"Used (?P<used_bytes>{SIZE}) of (?P<capacity_bytes>{SIZE}) {space}\b",
        rf"Exceeded {space} capacity by (?P<exceeded_bytes>{SIZE})",
        _ERROR_CODE,
    )


def _one_buffer(space: str) -> str:
    """One buffer alone is larger than the memory; both sizes are printed as plain bytes."""
    return (
        r"Allocation \(size=(?P<requested_bytes>\d+)\) would exceed memory"
        rf" \(size=(?P<capacity_bytes>\d+)\)(?s:.){{0,400}}?space={space}\b"
    )


_ONE_BUFFER_PROGRAM = r"::\s(?P<program>[A-Za-z_]\w*?)(?:\.\d+)*\s*$"

CAUSES = (
    Cause(
        id="hbm_program_load",
        depth=100,
        explanation="A compiled program's own memory (temporaries and code) does not fit beside"
        " the buffers that are already on the chip.",
        signs=(
            Sign(rf"{_PROGRAM}|Error loading program\b"),
            Sign(r"Attempting to reserve [\d.]+\w* at the bottom of memory"),
            Sign(r"RuntimeProgramAllocationFailure"),
        ),
        details=(
            _PROGRAM,
            rf"Attempting to (?:reserve|allocate) (?P<requested_bytes>{SIZE})",
            rf"(?:There are|\.\.\.) (?P<free_bytes>{SIZE}) free",
            rf"\bfree, (?P<reserved_bytes>{SIZE}) reserved",
            rf"\band (?P<reservable_bytes>{SIZE}) reservable",
            rf"HBM capacity (?P<capacity_bytes>{SIZE})",
            _ERROR_CODE,
            _DEVICE,
        ),
        advice=(
            "Let go of resident buffers before the program loads: put the engine to sleep for the"
            " update (its weights and its KV pool), donate arguments, drop stale arrays. Buffers"
            " have priority over programs.",
            "Shrink the program: smaller train.micro_batch_size, loss in chunks"
            " (update.loss_chunk_tokens), remat.",
            "If the engine must stay awake, lower engine.mem_fraction_static or cap"
            " engine.max_total_tokens, so that its KV pool leaves room.",
            "More chips for one copy of the state (mesh.fsdp).",
        ),
        retry="after_refit",
        source=f"{_XLA_ERRORS}/error_0101; https://github.com/AI-Hypercomputer/tpu-recipes/issues/151",
    ),
    Cause(
        id="hbm_fragmentation",
        depth=90,
        explanation="Enough HBM is free in total, but no contiguous piece is large enough.",
        signs=(
            Sign(r"[Dd]ue to fragmentation, the largest contiguous region of free memory is"),
            Sign(r"largest contiguous region of free memory is [\d.]+ ?\w* due to fragmentation"),
        ),
        details=(
            rf"Attempting to (?:reserve|allocate) (?P<requested_bytes>{SIZE})",
            rf"There are (?P<free_bytes>{SIZE}) free",
            rf"largest contiguous region of free memory is (?P<largest_free_bytes>{SIZE})",
            _DEVICE,
            _ERROR_CODE,
        ),
        advice=(
            "Make the large buffers first and once: allocate state and KV pool before the small,"
            " short-lived arrays, and donate what is replaced.",
            "Start a new process: fragmentation does not survive it.",
            "Free a margin: smaller engine.max_total_tokens or train.micro_batch_size.",
        ),
        retry="after_refit",
        source=f"{_XLA_ERRORS}/error_0100; https://github.com/google/trax/issues/431",
    ),
    Cause(
        id="hbm_alloc",
        depth=110,
        explanation="A buffer does not fit into the HBM that is still free.",
        signs=(
            Sign(r"Error allocating device buffer"),
            Sign(r"RuntimeBufferAllocationFailure"),
            Sign(r"Attempting to allocate [\d.]+ ?\w*\. That was not possible"),
        ),
        details=(
            rf"Attempting to allocate (?P<requested_bytes>{SIZE})",
            rf"There are (?P<free_bytes>{SIZE}) free",
            _DEVICE,
            _ERROR_CODE,
        ),
        advice=(
            "Release what is no longer used: arrays of an earlier run in the same process, a second"
            " copy of the weights, results kept in a list.",
            "Create arrays sharded from the start; an unsharded zeros() puts all"
            " of it on one chip.",
            "Smaller batch, shorter sequences, smaller KV pool, or more chips (mesh.fsdp).",
        ),
        retry="after_refit",
        source=f"{_XLA_ERRORS}/error_0100; https://github.com/google-deepmind/gemma/issues/85",
    ),
    Cause(
        id="hbm_compile",
        depth=120,
        explanation="The compiler found that the program needs more HBM than a chip has.",
        signs=(
            Sign(_over("hbm")),
            Sign(_one_buffer("hbm")),
            Sign(r"Ran out of memory on HBM"),
            Sign(r"CompileTimeHbmOom"),
            Sign(r"Hbm usage: [\d.]+\w*, SparseCore Hbm usage"),
            Sign(r"Used [\d.]+\w* of [\d.]+\w* hbm\. Exceeded hbm capacity"),
        ),
        details=(
            *_over_details("hbm"),
            r"^\s*reserved\s+(?P<reserved_bytes>[\d.]+[KMGT])\b",
            # A program without arguments prints 0B: nothing to tell.
            r"^\s*arguments\s+(?P<args_bytes>[\d.]+[KMGT])\b",
            r"Output size (?P<output_bytes>[\d.]+[KMGT])\b",
            rf"HLO temporaries \((?P<used_bytes>{SIZE})\) exceeds"
            rf" (?:the )?available HBM \((?P<capacity_bytes>{SIZE})\)",
            rf"TensorCore Hbm usage: (?P<used_bytes>{SIZE})",
            rf"exceeding available bytes: (?P<capacity_bytes>{SIZE})",
            _ONE_BUFFER_PROGRAM,
        ),
        advice=(
            "Read the table below the message: one allocation that is larger than expected (padding"
            " expansion, an unsharded array) is a layout or sharding mistake; many of equal size"
            " are activations.",
            "Fewer activations at once: update.remat, smaller train.micro_batch_size, smaller"
            " update.loss_chunk_tokens.",
            "More chips for one copy (mesh.fsdp, mesh.tp); donate arguments that are replaced.",
            "A last dimension below 128 is padded to 128: change that layout.",
        ),
        retry="after_refit",
        source=f"{_XLA_ERRORS}/error_1000",
    ),
    Cause(
        id="vmem_compile",
        depth=121,
        explanation="A kernel or fusion needs more VMEM (the chip's on-core memory) than it has;"
        " HBM is not the problem.",
        signs=(
            Sign(_over("vmem")),
            Sign(_one_buffer("vmem")),
            Sign(r"exceeded scoped vmem limit"),
            Sign(r"CompileTimeScopedVmemOom"),
            Sign(r"Ran out of memory on VMEM"),
            Sign(r"because they exceed VMEM limits"),
        ),
        details=(
            *_over_details("vmem"),
            rf"Scoped allocation with size (?P<requested_bytes>{SIZE})"
            rf" and limit (?P<capacity_bytes>{SIZE})",
            rf"exceeded scoped vmem limit by (?P<exceeded_bytes>{SIZE})",
            _ONE_BUFFER_PROGRAM,
        ),
        advice=(
            "Smaller kernel blocks, for example attention blocks of 256 instead of 1024.",
            "Raise the kernel's vmem_limit_bytes where the chip has it"
            " (--xla_tpu_scoped_vmem_limit_kib for XLA's own fusions).",
            "Fewer buffering levels, or tile the contracting dimension: newer"
            " Pallas buffers twice.",
        ),
        retry="after_refit",
        source=f"{_XLA_ERRORS}/error_1001; https://github.com/jax-ml/jax/issues/38988",
    ),
    Cause(
        id="smem_compile",
        depth=122,
        explanation="A kernel's scalar arguments (page tables, offsets) do not fit into SMEM.",
        signs=(
            Sign(_over("smem")),
            Sign(_one_buffer("smem")),
            Sign(r"exceeded scoped smem limit"),
            Sign(r"Ran out of memory on SMEM"),
        ),
        details=(
            *_over_details("smem"),
            rf"Scoped allocation with size (?P<requested_bytes>{SIZE})"
            rf" and limit (?P<capacity_bytes>{SIZE})",
            rf"exceeded scoped smem limit by (?P<exceeded_bytes>{SIZE})",
            _ONE_BUFFER_PROGRAM,
        ),
        advice=(
            "Fewer requests or shorter contexts in one call: engine.max_running_requests,"
            " engine.context_length; the page table grows with their product.",
            "Larger engine.page_size: fewer pages to list.",
        ),
        retry="after_refit",
        source="https://github.com/vllm-project/vllm/pull/9350;"
        " https://github.com/vllm-project/tpu-inference/pull/3316",
    ),
    Cause(
        id="gpu_oom",
        depth=123,
        explanation="A GPU ran out of memory.",
        signs=(
            Sign(r"CUDA out of memory"),
            Sign(r"OutOfMemoryError: (?:CUDA|HIP)"),
            Sign(r"HIP out of memory"),
            Sign(r"Out of memory while trying to allocate [\d.]+ ?\w*"),
            Sign(r"Failed to allocate request for [\d.]+\w* \(\d+B\) on device ordinal"),
            Sign(r"CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"),
            Sign(r"Allocator \(GPU_\d+_bfc\) ran out of memory trying to allocate"),
            Sign(r"CUDA error: out of memory"),
        ),
        details=(
            rf"Tried to allocate (?P<requested_bytes>{SIZE})",
            rf"total capacit?y of (?P<capacity_bytes>{SIZE})",
            rf"(?P<capacity_bytes>{SIZE}) total capacity",
            rf"of which (?P<free_bytes>{SIZE}) is free",
            rf"(?P<free_bytes>{SIZE}) free;",
            r"request for [\d.]+\w* \((?P<requested_bytes>\d+)B\)",
            rf"trying to allocate (?P<requested_bytes>{SIZE})",
        ),
        advice=(
            "Smaller batch or shorter sequences; more devices for one copy of the model.",
            "JAX takes 75 % of a GPU at start: one process a GPU, or"
            " XLA_PYTHON_CLIENT_PREALLOCATE=false where two must share it.",
        ),
        retry="after_refit",
        source="https://docs.jax.dev/en/latest/gpu_memory_allocation.html",
    ),
    Cause(
        id="engine_not_enough_memory",
        depth=140,
        explanation="The engine's share of the chip (weights and KV pool together) is too small:"
        " no room for a KV pool is left after its weights.",
        signs=(
            Sign(r"Not enough memory\. Please try (?:to increas|increasing|to lower|lowering)"),
            Sign(r"No available memory for the cache blocks"),
            Sign(r"larger than the profiled value -\d+", sure=False),
            Sign(r"Free memory on device.{0,80} is less than desired (?:GPU|TPU) memory utiliz"),
            Sign(r"Not enough memory to handle \d+ prefill tokens", sure=False),
            Sign(r"[Nn]ot enough HBM to allocate (?:the )?KV cache"),
        ),
        details=(rf"larger than the profiled value (?P<profiled_tokens>{COUNT})",),
        advice=(
            "Beside a trainer on the same chips do not follow the engine's own advice: raising"
            " engine.mem_fraction_static takes the bytes from the update. Give the engine the"
            " trainer's weights (rollout without a second copy) and cap engine.max_total_tokens.",
            "On a host that only serves, raise engine.mem_fraction_static: it covers weights and KV"
            " together, so it must exceed the weights' share.",
            "More chips for the engine's weights (engine.tp_size).",
        ),
        retry="after_refit",
        source="https://github.com/sgl-project/sglang/issues/322 (message and manual contradict"
        " each other: https://github.com/sgl-project/sglang/issues/4330)",
    ),
    Cause(
        id="kv_pool_too_small",
        depth=150,
        explanation="The KV pool cannot hold the request: the engine waits for room that never"
        " comes, or cuts the completion.",
        signs=(
            Sign(r"(?:Prefill|Decode) out of memory|alloc_\w+ runs out of memory"),
            Sign(r"maximum number of tokens that can be stored in (?:the )?KV cache"),
            Sign(r"KV cache is needed, which is larger than the available KV cache"),
            Sign(r"KV cache (?:pool )?is too small|[Nn]o free KV (?:cache )?blocks", sure=False),
        ),
        details=(
            rf"max_total_num_tokens(?:: |=)(?P<pool_tokens>{COUNT})",
            rf"stored in (?:the )?KV cache \((?P<pool_tokens>{COUNT})\)",
        ),
        advice=(
            "engine.max_total_tokens must hold at least one whole prompt + completion, better"
            " max_running_requests of them.",
            "Shorter prompts or completions (rollout.max_prompt_tokens,"
            " rollout.max_completion_tokens).",
            "A pool that is smaller than prompt + completion cuts completions silently: do not"
            " train on them.",
        ),
        retry="after_refit",
        source="own runs with sglang-jax 0.0.2; https://github.com/vllm-project/vllm/pull/2163",
    ),
    Cause(
        id="context_too_long",
        depth=160,
        explanation="A prompt, or prompt + completion, is longer than the context length.",
        signs=(
            Sign(r"(?:is|are) longer than the (?:model's )?(?:maximum )?(?:context|model) length"),
            Sign(r"exceeds? the (?:model's )?max(?:imum)?(?: allowed)? (?:context |input )?length"),
            Sign(r"maximum context length (?:is|of) \d+"),
            Sign(r"too long to fit into the model"),
            Sign(r"[Ii]nput length \(?\d+.{0,30} exceeds"),
            Sign(r"longer than the maximum model length"),
            Sign(r"greater than the derived max_model_len"),
            Sign(r"[Pp]rompt is too long|context_length_exceeded"),
            Sign(r"exceeds (?:the )?(?:model'?s? )?(?:context[_ ]len(?:gth)?|max_model_len)"),
        ),
        details=(
            rf"(?:[Ii]nput length|input|prompt length|total length|Prompt length of)"
            rf" \(?(?P<requested_tokens>{COUNT})",
            rf"you requested (?P<requested_tokens>{COUNT}) tokens",
            rf"(?:maximum context length|context length|maximum allowed length|model length)"
            rf"(?: is| of)? \(?(?P<context_tokens>{COUNT})",
        ),
        advice=(
            "Set engine.context_length to at least max_prompt_tokens + max_completion_tokens.",
            "Leave long prompts out (rollout.max_prompt_tokens) rather than truncate them.",
        ),
        retry="not_as_is",
        source="https://github.com/sgl-project/sglang/issues/4048",
    ),
    Cause(
        id="host_oom",
        depth=175,
        explanation="The host's RAM (or the container's limit) ran out, not the chip's HBM.",
        signs=(
            Sign(r"OOMKilled[=\": ]+true|OOMKilled\b(?![=\": ]+false)"),
            Sign(r"[Oo]ut of memory: Kill(?:ed)? process|Memory cgroup out of memory|oom-kill:"),
            Sign(r"invoked oom-killer|oom_kill event|oom_reaper"),
            Sign(r"_ArrayMemoryError|numpy\S*MemoryError|Unable to allocate [\d.]+ ?[KMGT]iB"),
            Sign(r"Out of memory allocating \d+ bytes"),
            Sign(r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)"),
            Sign(r"^\s*(?:\w+:\s?)?MemoryError\b"),
            Sign(r"std::bad_alloc"),
            Sign(r"\[Errno 12\]|[Cc]annot allocate memory"),
            Sign(r"due to memory pressure \(OOM\)|node running low on memory"),
            Sign(r"killed by signal: Killed"),
            # What a shell prints when its child got SIGKILL; who sent it, it does not know.
            Sign(
                r"^(?:.*:\s*line \d+:\s*)?(?:\[\d+\]\+?\s+)?\d*\s*Killed(?:\s.*)?$",
                sure=False,
                depth=595,
            ),
            Sign(r"signal 9 \(SIGKILL\) .{0,40}[Oo]ut of memory", sure=False),
        ),
        details=(
            rf"Unable to allocate (?P<requested_bytes>{SIZE})",
            rf"Out of memory allocating (?P<requested_bytes>{SIZE})",
            rf"tried to allocate (?P<requested_bytes>{SIZE})",
        ),
        advice=(
            "Load weights shard by shard, straight onto the chips; do not keep host copies"
            " (checkpoints, engine caches, dataset in memory).",
            "Raise the container's memory limit, or take a host with more RAM.",
            "Watch host_rss_bytes in steps.jsonl: growth over the steps is a leak in the engine.",
        ),
        retry="after_refit",
        source="https://github.com/google/tunix/issues/1149",
        exit_code=True,
    ),
)
