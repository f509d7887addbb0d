"""The SOP's environment names, accepted at the door (`--from-env`) and nowhere else.

Source: scripts/run_grpo_gsm8k_training.py and plugins/training/rollout_backends/sglang_jax.py of
demon2036/MLLM-JAX at 15154fc.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


def _boolean(text: str) -> Any:
    word = text.strip().lower()
    return True if word in _TRUE else False if word in _FALSE else text


def _whole(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return text


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _sizes(text: str) -> Any:
    return [_whole(part) for part in text.split(",") if part.strip()]


def _top_k(text: str) -> Any:
    return None if text.strip() == "-1" else _whole(text)


def _lower(text: str) -> str:
    return text.strip().lower()


_NAMES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "MODEL_PATH": ("model", str),
    "STEPS": ("steps", _whole),
    "ROLLOUT_BACKEND": ("rollout.engine", _lower),
    "BATCH_SIZE": ("rollout.prompts_per_step", _whole),
    "NUM_PRE_Q": ("rollout.group_size", _whole),
    "GLOBAL_LENGTH": ("rollout.max_prompt_tokens", _whole),
    "MAX_LENGTH_SAMPLE": ("rollout.max_completion_tokens", _whole),
    "TRAIN_MICRO_BATCH_SIZE": ("train.micro_batch_size", _whole),
    "PPO_EPOCHS": ("train.updates_per_rollout", _whole),
    "BETA": ("train.beta", _number),
    "EVAL_EVERY_STEPS": ("eval_every_steps", _whole),
    "WANDB_MODE": ("metrics.wandb", _lower),
    "WANDB_PROJECT": ("metrics.wandb_project", str),
    "WANDB_NAME": ("metrics.wandb_name", str),
    "SGLANG_JAX_ROLLOUT_CHUNK_SIZE": ("rollout.chunk_size", _whole),
    "SGLANG_JAX_TEMPERATURE": ("rollout.temperature", _number),
    "SGLANG_JAX_TOP_K": ("rollout.top_k", _top_k),
    "SGLANG_JAX_TOP_P": ("rollout.top_p", _number),
    "SGLANG_JAX_MEM_FRACTION_STATIC": ("engine.mem_fraction_static", _number),
    "SGLANG_JAX_MAX_TOTAL_TOKENS": ("engine.max_total_tokens", _whole),
    "SGLANG_JAX_MAX_RUNNING_REQUESTS": ("engine.max_running_requests", _whole),
    "SGLANG_JAX_CHUNKED_PREFILL_SIZE": ("engine.chunked_prefill_size", _whole),
    "SGLANG_JAX_CONTEXT_LENGTH": ("engine.context_length", _whole),
    "SGLANG_JAX_PAGE_SIZE": ("engine.page_size", _whole),
    "SGLANG_JAX_DTYPE": ("engine.dtype", _lower),
    "SGLANG_JAX_KV_CACHE_DTYPE": ("engine.kv_cache_dtype", _lower),
    "SGLANG_JAX_TP_SIZE": ("engine.tp_size", _whole),
    "SGLANG_JAX_LOAD_FORMAT": ("engine.load_format", _lower),
    "SGLANG_JAX_LOG_LEVEL": ("engine.log_level", _lower),
    "SGLANG_JAX_DISABLE_RADIX_CACHE": ("engine.disable_radix_cache", _boolean),
    "SGLANG_JAX_DISABLE_PRECOMPILE": ("engine.disable_precompile", _boolean),
    "SGLANG_JAX_PRECOMPILE_TOKEN_PADDINGS": ("engine.precompile_token_paddings", _sizes),
    "SGLANG_JAX_PRECOMPILE_BS_PADDINGS": ("engine.precompile_bs_paddings", _sizes),
}

# Names of the SOP that say something we do not do: refused, with the way to say it here.
_REFUSED = {
    "ROLLOUT_GLOBAL_BATCH_SIZE": "counts prompts over passes: set BATCH_SIZE to all of them",
    "ROLLOUT_PER_DEVICE_BATCH_SIZE": "counts by device: set BATCH_SIZE to the prompts of a step",
    "TRAIN_PER_DEVICE_MICRO_BATCH_SIZE": "counts by device: set TRAIN_MICRO_BATCH_SIZE instead",
    "MAX_LENGTH_TOTAL": "is GLOBAL_LENGTH + MAX_LENGTH_SAMPLE here: unset it",
    "EVAL_BATCHES": "counts batches: use --set evaluation.prompts=N instead",
    "EVAL_SPLIT": "cannot be chosen: evaluations read the test split; unset it",
}


def translate(
    environment: Mapping[str, str],
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Job values by the SOP's name, and refused names with the reason.

    A value that is not of its key's type is passed on as text, for the job's own check to refuse.

    >>> translate({"BATCH_SIZE": "32", "HOME": "/root"})[0]
    {'BATCH_SIZE': {'rollout.prompts_per_step': 32}}
    """
    values: dict[str, dict[str, Any]] = {}
    refusals: dict[str, str] = {}
    for name, text in environment.items():
        if name in _NAMES:
            key, read = _NAMES[name]
            values[name] = {key: read(text)}
        elif name == "MESH_SHAPE_FSDP":
            _mesh(text, values, refusals)
        elif name in _REFUSED:
            refusals[name] = _REFUSED[name]
        elif name.startswith("SGLANG_JAX_"):
            refusals[name] = _unknown(name)
    if "GRAD_ACCUM_STEPS" in environment and grad_accum_steps(environment) is None:
        refusals["GRAD_ACCUM_STEPS"] = "is not a whole number above 0"
    return values, refusals


def grad_accum_steps(environment: Mapping[str, str]) -> int | None:
    """GRAD_ACCUM_STEPS as a whole number above 0; None when it is not there or is none."""
    steps = _whole(environment.get("GRAD_ACCUM_STEPS", ""))
    return steps if isinstance(steps, int) and steps > 0 else None


def _mesh(text: str, values: dict[str, dict[str, Any]], refusals: dict[str, str]) -> None:
    sizes = _sizes(text)
    if len(sizes) != len(("dp", "fsdp", "tp")):
        refusals["MESH_SHAPE_FSDP"] = "is not dp,fsdp,tp, as in 1,-1,1"
        return
    dp, fsdp, tp = sizes
    values["MESH_SHAPE_FSDP"] = {
        "mesh.dp": dp,
        "mesh.fsdp": None if fsdp == -1 else fsdp,
        "mesh.tp": tp,
    }


def _unknown(name: str) -> str:
    near = get_close_matches(name, _NAMES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    known = ", ".join(n.removeprefix("SGLANG_JAX_") for n in _NAMES if n.startswith("SGLANG_JAX_"))
    return f"unknown name; {hint}known after SGLANG_JAX_: {known}"
