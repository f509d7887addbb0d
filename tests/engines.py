"""Small models and engines for tests: sglang-jax for real, on this machine's virtual devices."""

from typing import Any

import jax
import numpy as np

from jobs.spec import Engine, Job, Rollout, Update
from trainer.architecture import Architecture, RopeScaling, leaf_shapes
from trainer.mesh import make_mesh
from trainer.rollout.sglang.rollout import SglangRollout

# A tenth of the vocabulary ends a completion: a random model's end nowhere by themselves.
EOS = tuple(range(0, 96, 10))

_SHAPE: dict[str, Any] = {
    "vocab": 96,
    "embed": 64,
    "mlp": 96,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "rope_theta": 10000.0,
    "norm_eps": 1e-6,
    "max_position": 512,
}
FAMILIES = {
    "llama": Architecture(
        family="llama", tied_head=True, attention_bias=False, qk_norm=False, **_SHAPE
    ),
    "llama3": Architecture(
        family="llama",
        tied_head=False,
        attention_bias=False,
        qk_norm=False,
        rope_scaling=RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16
        ),
        **_SHAPE,
    ),
    "qwen2": Architecture(
        family="qwen2", tied_head=False, attention_bias=True, qk_norm=False, **_SHAPE
    ),
    "qwen3": Architecture(
        family="qwen3", tied_head=False, attention_bias=False, qk_norm=True, **_SHAPE
    ),
}


def random_params(architecture: Architecture, seed: int = 0) -> dict[str, Any]:
    """A parameter tree, f32 on the host, whose logits are far from flat."""
    random = np.random.default_rng(seed)
    params: dict[str, Any] = {"layers": {}}
    for path, shape in leaf_shapes(architecture).items():
        name = path[-1]
        norm = name in ("norm", "ln1", "ln2", "q_norm", "k_norm")
        leaf = random.normal(1.0 if norm else 0.0, 0.2, shape).astype(np.float32)
        (params["layers"] if len(path) > 1 else params)[name] = leaf
    return params


def engine_job(
    *,
    devices: int = 1,
    seed: int = 0,
    engine: dict[str, Any] | None = None,
    update: dict[str, Any] | None = None,
    **rollout: Any,
) -> Job:
    """A job of four prompts of 24 tokens and completions of 8, its engine in f32."""
    asked = {"prompts_per_step": 4, "max_prompt_tokens": 24, "max_completion_tokens": 8, **rollout}
    return Job(
        name="engine",
        accelerator=f"cpu-{devices}",
        model="tiny",
        seed=seed,
        rollout=Rollout(engine="sglang_jax", **asked),
        engine=Engine(**{"dtype": "float32", **(engine or {})}),
        update=Update(**(update or {})),
    )


def make_engine(
    job: Job, architecture: Architecture, params: Any = None, eos_ids: tuple[int, ...] = EOS
) -> SglangRollout:
    """An engine over the first devices, awake where there are parameters."""
    mesh = make_mesh(job, jax.devices()[: job.target.devices])
    made = SglangRollout(job, architecture, mesh, eos_ids=eos_ids)
    if params is not None:
        made.hand_over(params)
    return made
