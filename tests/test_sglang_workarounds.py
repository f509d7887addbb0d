"""Each workaround has a trouble behind it: these fail when sglang-jax no longer has that one.

A row of `WORKAROUNDS` and the test of its name go together, and go away together.
"""

import inspect
import json
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sgl_jax
from flax import nnx

from tests.engines import FAMILIES, engine_job, make_engine, random_params
from trainer.rollout.sglang.workarounds import WORKAROUNDS

pytestmark = pytest.mark.engine

QWEN2 = FAMILIES["qwen2"]


def source(file: str) -> str:
    """Text of a file of the library, as it is installed."""
    [folder] = sgl_jax.__path__
    return (Path(folder) / "srt" / file).read_text(encoding="utf-8")


def unmended(code: str) -> subprocess.CompletedProcess[str]:
    """What the library does by itself, in a process that has no workaround applied."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def engine():
    return make_engine(engine_job(), QWEN2, jax.tree.map(jnp.asarray, random_params(QWEN2)))


def test_every_workaround_has_a_test_and_names_a_line_that_is_there():
    here = inspect.getmodule(test_every_workaround_has_a_test_and_names_a_line_that_is_there)
    tests = {name.removeprefix("test_") for name in vars(here) if name.startswith("test_")}
    assert {w.name for w in WORKAROUNDS} <= tests
    for workaround in WORKAROUNDS:
        found = re.findall(r"([\w/]+\.py):(\d+)", workaround.cause)
        assert found, workaround.name
        for file, line in found:
            assert int(line) <= source(file).count("\n"), (workaround.name, file)


def test_flax():
    # The library takes any 0.12, and builds its models on 0.12.0 alone (facts: each was tried).
    [wanted] = [line for line in requires("sglang-jax") or () if line.startswith("flax")]
    assert wanted == "flax~=0.12.0"
    assert "nnx.with_partitioning(" in source("layers/linear.py")


def test_bit_width():
    found = unmended("from jax._src import dtypes; print(hasattr(dtypes, 'bit_width'))")
    assert found.stdout.strip() == "False"
    assert "dtypes.bit_width(dtype)" in source("layers/attention/flash_attn_kernel/util.py")


def test_native_attention():
    found = unmended("import sgl_jax.srt.layers.attention.native_backend")
    assert found.returncode == 1
    assert "Duplicate custom PyTreeDef type registration" in found.stderr


def test_f32_logits():
    found = unmended(
        "import jax, jax.numpy as jnp\n"
        "from types import SimpleNamespace as N\n"
        "from sgl_jax.srt.layers.embeddings import ParallelLMHead\n"
        "from sgl_jax.srt.layers.logits_processor import LogitsProcessor\n"
        "jax.set_mesh(jax.make_mesh((1,), ('tensor',)))\n"
        "head = ParallelLMHead(8, 4)\n"
        "hidden = jnp.ones((2, 4), jnp.float32)\n"
        "print(LogitsProcessor._get_logits(N(vocab_size=8), hidden, head).dtype)\n"
    )
    assert found.stdout.strip() == "bfloat16", found.stderr


def test_f32_rope():
    found = unmended(
        "import jax, jax.numpy as jnp\n"
        "from sgl_jax.srt.layers.embeddings import get_rope\n"
        "scaling = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0,\n"
        "    high_freq_factor=4.0, original_max_position_embeddings=16)\n"
        "x = jnp.ones((1, 1, 32)); at = jnp.array([500])\n"
        "rope = lambda dtype, **more: get_rope(32, 32, 512, 10000, dtype=dtype, **more)\n"
        "of = lambda dtype, **more: rope(dtype, **more)(at, x, x)[0]\n"
        "exact = of(jnp.float32)\n"
        "print(float(abs(of(jnp.bfloat16).astype('float32') - exact).max()))\n"
        "print(float(abs(of(jnp.float32, rope_scaling=scaling) - exact).max()))\n"
    )
    rounded, scaled = map(float, found.stdout.split())
    assert rounded > 0.05  # rounding the result to bf16 explains 0.006
    assert scaled == 0.0  # the scaling changed nothing at all


def test_kv_pool():
    assert re.search(
        r"for _ in range\(self\.layer_num\):\s+kv_buf = jax\.jit\(\s+lambda:",
        source("mem_cache/memory_pool.py"),
    )


def test_sampler_noise():
    from sgl_jax.srt.layers.sampler import Sampler  # noqa: PLC0415

    sampler = Sampler(nnx.Rngs(0))
    before = jax.random.key_data(sampler.rngs.params.key.value)
    count = int(sampler.rngs.params.count.value)
    definition, state = nnx.split(sampler)

    @jax.jit
    def keys(leaves):
        # As the runner calls it: the module is made anew from the same leaves every time.
        merged = nnx.merge(definition, leaves)
        return jax.random.key_data(jax.random.split(merged.rngs.params())[1])

    np.testing.assert_array_equal(keys(state), keys(state))
    np.testing.assert_array_equal(jax.random.key_data(sampler.rngs.params.key.value), before)
    assert int(sampler.rngs.params.count.value) == count
    assert "_, rng = jax.random.split(self.rngs.params())" in source("layers/sampler.py")


def test_logprobs():
    # Prompts' lengths are static: another program for every set of them; and what the sampler
    # stores in its argument, inside jit, stays there.
    assert "extend_seq_lens_cpu" in source("layers/logits_processor.py")
    assert "logits_output.next_token_logprobs = " in source("layers/sampler.py")


def test_special_tokens():
    from sgl_jax.srt.managers.detokenizer_manager import (  # noqa: PLC0415
        process_special_tokens_spaces,
    )

    assert process_special_tokens_spaces(
        [5, 2, 7], skip_special_tokens=True, all_special_ids=[2]
    ) == [5, 7]


def test_replicated_embedding():
    for family in ("qwen2", "qwen3", "llama"):
        text = source(f"models/{family}.py")
        for leaf in ("model.embed_tokens.weight", "lm_head.weight"):
            at = text.index(f'"{leaf}": WeightMapping') if f'"{leaf}": Weight' in text else 0
            at = at or text.index(f'mappings["{leaf}"] = WeightMapping')
            assert "sharding=(None, None)" in text[at : at + 200], (family, leaf)


def test_dummy_weights(engine):
    # Upstream draws every leaf; our runner's model is shapes alone until the hand-over.
    assert "rng.uniform(low, high, size=(numel,))" in source("model_loader/loader.py")
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in engine.driver.runner.shapes)


def test_clear_caches(monkeypatch):
    from sgl_jax.srt.utils.jax_utils import get_available_device_memory  # noqa: PLC0415

    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(1))
    # Its TPU branch, on devices that tell no memory: it has cleared before it asks.
    with pytest.raises(TypeError):
        get_available_device_memory("tpu")
    assert cleared
    with pytest.raises(TypeError):
        get_available_device_memory("tpu", empty_cache=False)
    assert cleared == [1]


def test_signals():
    text = source("managers/scheduler.py")
    assert "self.parent_process.send_signal(signal.SIGQUIT)" in text
    assert "t = threading.Thread(target=self.watchdog_thread, daemon=True)" in text


def test_sockets(tmp_path):
    found = unmended(
        "import os, sys, tempfile\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "from sgl_jax.srt.server_args import PortArgs\n"
        "class Args: nnodes = 1\n"
        "PortArgs.init_new(Args())\n"
    )
    assert found.returncode == 0, found.stderr
    assert len(list(tmp_path.iterdir())) == 5


def test_global_seed():
    from sgl_jax.srt.utils.common_utils import set_random_seed  # noqa: PLC0415

    before = np.random.get_state()
    try:
        set_random_seed(7)
        first = np.random.random()
        set_random_seed(7)
        assert np.random.random() == first
    finally:
        np.random.set_state(before)
    assert "set_random_seed(self.random_seed)" in source("managers/scheduler.py")


def test_cache_settings():
    text = source("managers/scheduler.py")
    assert 'jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)' in text


def test_page_padding(engine):
    # Eight sequences of 30 tokens: upstream has room for 15 pages, and they are on 16.
    worker, length, page = engine.driver._scheduler.tp_worker, 30, 16
    rounded_once = (8 * length + page - 1) // page * page
    each = -(-length // page) * page
    assert "(item * self.max_req_len + self.page_size - 1) // self.page_size" in source(
        "managers/tp_worker.py"
    )
    assert rounded_once < 8 * each
    assert worker.precompile_cache_loc_paddings == [16 * engine.driver.settings.length]


def test_clipped_lengths(engine):
    scheduler, length = engine.driver._scheduler, engine.driver.settings.length
    worker = scheduler.tp_worker
    # By its own limits a sequence of the job would not be taken, or would end early.
    assert worker.max_req_input_len <= length - 5
    assert "self.max_req_len - len(req.origin_input_ids) - 1" in source("managers/scheduler.py")


# The process that the engine lives in

HOST = """
import asyncio, logging, os, random, signal, subprocess, sys, threading, json
from pathlib import Path
os.environ["JAX_PLATFORMS"] = "cpu"
handler = logging.StreamHandler(sys.stdout)
logging.getLogger().addHandler(handler)
child = subprocess.Popen(["sleep", "60"])
import flax  # draws a number of its own
random.seed(1); expected = random.random(); random.seed(1)
def facts():
    return {
        "signals": [str(signal.getsignal(s)) for s in (2, 3, 15, 17)],
        "policy": type(asyncio.get_event_loop_policy()).__module__,
        "handlers": [id(h) for h in logging.getLogger().handlers],
        "level": logging.getLogger().level,
        "atexit": threading._register_atexit.__module__,
    }
before = facts()
import jax
from tests.engines import FAMILIES, engine_job, make_engine, random_params
params = jax.tree.map(jax.numpy.asarray, random_params(FAMILIES["qwen2"]))
config = {n: getattr(jax.config, n) for n in ("jax_persistent_cache_min_compile_time_secs",)}
engine = make_engine(engine_job(), FAMILIES["qwen2"], params)
engine.generate([[1, 2, 3]], group_size=4, temperature=1.0, first_sequence=0)
engine.sleep()
after = facts()
said = {
    "same": before == after,
    "before": before, "after": after,
    "config": config == {n: getattr(jax.config, n) for n in config},
    "threads": [t.name for t in threading.enumerate()],
    "children": sum(
        len(task.read_text().split()) for task in Path("/proc/self/task").glob("*/children")
    ),
    "child": child.poll(),
    "code": subprocess.run(["false"]).returncode,
    "random": random.random() == expected,
    "sockets": sum(
        "socket" in os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.is_symlink()
    ),
}
child.terminate(); child.wait()
print(json.dumps(said))
"""


def test_the_process_it_lives_in_is_left_as_it_was():
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HOST],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert found.returncode == 0, found.stderr  # a natural end
    said = json.loads(found.stdout.splitlines()[-1])
    assert said["same"], said
    assert said["config"]
    assert said["threads"] == ["MainThread"]
    assert said["children"] == 1  # the test's own
    assert said["child"] is None
    assert said["code"] == 1
    assert said["random"]
    assert said["sockets"] == 0


def test_another_version_is_refused(monkeypatch):
    from trainer.rollout.sglang import workarounds  # noqa: PLC0415
    from trainer.rollout.sglang.settings import EngineError  # noqa: PLC0415

    monkeypatch.setattr(workarounds, "version", lambda _: "0.0.3")
    with pytest.raises(EngineError, match=r"sglang-jax 0\.0\.3 is installed.*0\.0\.2"):
        workarounds.apply()
