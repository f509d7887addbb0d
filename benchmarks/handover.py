"""Hand-over, sleep and wake of sglang-jax beside the trainer's state: bytes, seconds, recompiles.

Two ways for the weights: `reference`, masters one by one in the engine's dtype (bf16), no copy;
`copy`, masters stacked, the engine in f32. On this machine's CPU; bytes are those of any device.
With --threaded, tokens a second of the same prompts in f32, ours and sglang-jax's own Engine's (a
thread, its broken sampler), in the same run: plumbing on a CPU, not a TPU's speed.

    python benchmarks/handover.py
    python benchmarks/handover.py --model tiny --cycles 20 --json
    python benchmarks/handover.py --threaded
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from jobs.spec import Job, load
from trainer.hf_folder import save_hf_folder
from trainer.mesh import make_mesh
from trainer.rollout.sglang.rollout import SglangRollout
from trainer.rollout.sglang.settings import settings_of
from trainer.update.program import make_update
from trainer.weights import Model, load_params, open_model

ROOT = Path(__file__).parents[1]
GIB = 2**30
PROMPTS, PROMPT, COMPLETION = 16, 256, 64  # facts-peers.md, section 4
WAYS = {
    "reference": ("update.layers=per_layer", "engine.dtype=bfloat16"),
    "copy": ("update.layers=stacked", "engine.dtype=float32"),
}
BRIEF = 2  # tokens of a rollout that is there for its programs, not for its speed


def job_of(model: str, way: str, *, completion: int) -> Job:
    """The smoke job with the prompts of the peers' benchmark."""
    overrides = [
        f"model={model}",
        f"rollout.prompts_per_step={PROMPTS}",
        "rollout.group_size=1",
        f"rollout.max_prompt_tokens={PROMPT}",
        f"rollout.max_completion_tokens={completion}",
        "update.completions_per_row=one",
        *WAYS[way],
    ]
    return load(ROOT / "jobs" / "smoke.yaml", overrides=overrides)


def prompts_of(model: Model) -> list[list[int]]:
    """Random tokens: what they are changes no time."""
    random = np.random.default_rng(0)
    return random.integers(1, model.architecture.vocab, (PROMPTS, PROMPT)).tolist()


def live_bytes() -> int:
    """Bytes of all arrays, one that two of them share counted once."""
    gc.collect()
    buffers: dict[int, int] = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            if shard.data.size:
                buffers[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(buffers.values())


def seconds(action: Any) -> float:
    """Of one call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(model: Model, way: str, cycles: int) -> dict[str, Any]:
    """One way's bytes, median seconds and recompiles."""
    job = job_of(model.name, way, completion=BRIEF)
    mesh = make_mesh(job, jax.devices()[:1])
    update = make_update(job, model.architecture, mesh)
    params = update.params(update.init(load_params(model, lambda _, leaf: leaf)))
    state = live_bytes()
    engine = SglangRollout(job, model.architecture, mesh, eos_ids=())
    first = seconds(lambda: engine.hand_over(params))
    driver = engine.driver
    assert driver is not None  # noqa: S101
    awake = live_bytes()
    prompts = prompts_of(model)

    def roll() -> None:  # one request: its programs are padded to all
        engine.generate(prompts[:1], group_size=1, temperature=1.0, first_sequence=0)

    roll()
    compiled = driver.recompiles
    times: dict[str, list[float]] = {"sleep": [], "hand_over": []}
    for _ in range(cycles):
        times["sleep"].append(seconds(engine.sleep))
        asleep = live_bytes()
        times["hand_over"].append(seconds(lambda: engine.hand_over(params)))
        roll()
    median = {name: statistics.median(values) for name, values in times.items()}
    referenced = len(driver.runner.leaves) - len(driver.hand_over.missing(params))
    return {
        "way": way,
        "leaves": len(driver.runner.leaves),
        "by_reference": referenced,
        "state_bytes": state,
        "engine_awake_bytes": awake - state,
        "engine_asleep_bytes": asleep - state,
        "first_hand_over_s": first,
        **{f"{name}_s": value for name, value in median.items()},
        "recompiles": driver.recompiles - compiled,
    }


def ours(model: Model, cycles: int) -> float:
    """Tokens a second of our driver, f32."""
    job = job_of(model.name, "copy", completion=COMPLETION)
    mesh = make_mesh(job, jax.devices()[:1])
    engine = SglangRollout(job, model.architecture, mesh, eos_ids=())
    engine.hand_over(jax.tree.map(jax.numpy.asarray, load_params(model, lambda _, leaf: leaf)))
    prompts = prompts_of(model)

    def roll() -> None:
        engine.generate(prompts, group_size=1, temperature=1.0, first_sequence=0)

    roll()
    return PROMPTS * COMPLETION / statistics.median(seconds(roll) for _ in range(cycles))


# sglang-jax's own Engine, mended as far as it must be to start on a CPU; see workarounds.py.
THREADED = """
import json, sys, time
from trainer.rollout.sglang import workarounds
from sgl_jax.srt.mem_cache.memory_pool import MHATokenToKVPool
create = MHATokenToKVPool._create_buffers
workarounds.apply()
MHATokenToKVPool._create_buffers = create
import sgl_jax.srt.layers.sampler as sampler
from sgl_jax.srt.utils.weight_utils import WeightLoader
min_p = sampler._apply_min_p_filter
sampler._apply_min_p_filter = lambda operands: min_p(operands[:2])
init = WeightLoader.__init__
def unpadded(self, *arguments, **more):
    init(self, *arguments, **more)
    self.head_dim, self.head_dim_pad = self.head_dim_original, 0
WeightLoader.__init__ = unpadded
from sgl_jax.srt.entrypoints.engine import Engine
asked = json.loads(sys.argv[1])
engine = Engine(device="cpu", attention_backend="native", log_level="error", random_seed=0,
    dtype="float32", disable_jax_precompile=True, enable_single_process=True,
    disable_radix_cache=True, skip_tokenizer_init=True, **asked["engine"])
times = []
for _ in range(asked["cycles"] + 1):
    began = time.perf_counter()
    engine.generate(input_ids=asked["prompts"],
        sampling_params={"max_new_tokens": asked["tokens"], "ignore_eos": True, "temperature": 1.0})
    times.append(time.perf_counter() - began)
print(json.dumps(times[1:]), flush=True)
import os; os._exit(0)
"""


def threaded(model: Model, cycles: int) -> float:
    """Tokens a second of sglang-jax's own Engine, in a process of its own."""
    settings = settings_of(job_of(model.name, "copy", completion=COMPLETION))
    with tempfile.TemporaryDirectory() as folder:
        params = load_params(model, lambda _, leaf: leaf)
        written = Path(folder) / "model"
        save_hf_folder(params, written, architecture=model.architecture, tokenizer=model.tokenizer)
        asked = {
            "prompts": prompts_of(model),
            "tokens": COMPLETION,
            "cycles": cycles,
            "engine": {
                "model_path": str(written),
                "max_total_tokens": settings.pool_tokens,
                "max_running_requests": settings.running,
                "context_length": settings.length + 8,
                "chunked_prefill_size": settings.prefill_tokens,
                "precompile_token_paddings": list(settings.prefill_paddings),
                "precompile_bs_paddings": list(settings.decode_paddings),
            },
        }
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", THREADED, json.dumps(asked)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return PROMPTS * COMPLETION / statistics.median(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--threaded", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    model = open_model(asked.model)
    found: dict[str, Any] = {"ways": [measure(model, way, asked.cycles) for way in WAYS]}
    if asked.threaded:
        found["tokens_per_s"] = ours(model, asked.cycles)
        found["threaded_tokens_per_s"] = threaded(model, asked.cycles)
    if asked.json:
        print(json.dumps(found, indent=2))
        return
    print("way        leaves  by ref  awake GiB  asleep B  sleep s  hand-over s  recompiles")
    for row in found["ways"]:
        print(
            f"{row['way']:<10} {row['leaves']:>6}  {row['by_reference']:>6}  "
            f"{row['engine_awake_bytes'] / GIB:>9.3f}  {row['engine_asleep_bytes']:>8}  "
            f"{row['sleep_s']:>7.4f}  {row['hand_over_s']:>11.3f}  "
            f"{row['recompiles']:>10}"
        )
    if asked.threaded:
        own, threads = found["tokens_per_s"], found["threaded_tokens_per_s"]
        print(f"f32, 16 x (256 + 64): ours {own:.1f} tokens/s, its own Engine {threads:.1f}")


if __name__ == "__main__":
    main()
