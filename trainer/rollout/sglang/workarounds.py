"""Every place where sglang-jax 0.0.2 needs help to roll out for RL, in one table.

`patch` mends the library in this process; where it is None the driver goes round the trouble, as
`how` says. Each row has a test (tests/test_sglang_workarounds.py) that fails when upstream no
longer needs it: then the row, and what it names, can go.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import dtypes as jax_dtypes

from trainer.rollout.sglang.settings import VERSION, EngineError


@dataclass(frozen=True, kw_only=True)
class Workaround:
    """One trouble.

    Attributes:
        name: of its test too.
        symptom: what happens without.
        cause: file:line under sgl_jax/srt, version 0.0.2.
        how: what we do instead.
        patch: mends the library; idempotent.
    """

    name: str
    symptom: str
    cause: str
    how: str
    patch: Callable[[], None] | None = None


def apply() -> None:
    """Check the version, and mend the library in this process, once.

    Raises:
        EngineError: another version is installed, for which the table says nothing.
    """
    for package, wanted in (("sglang-jax", VERSION), ("flax", "0.12.0")):
        if (found := version(package)) != wanted:
            raise EngineError(
                f"{package} {found} is installed, and the engine is driven as {wanted} works: "
                f"install {package}=={wanted} (docker/trainer.txt has its hash)"
            )
    for workaround in WORKAROUNDS:
        if workaround.patch is not None:
            workaround.patch()


def _give_bit_width_back() -> None:
    if not hasattr(jax_dtypes, "bit_width"):
        jax_dtypes.bit_width = jax_dtypes.itemsize_bits  # pyright: ignore


def _import_native_attention() -> None:
    register = jax.tree_util.register_pytree_node_class

    def register_once(cls: Any) -> Any:
        try:
            return register(cls)
        except ValueError:  # flax registered it when the class was made
            return cls

    jax.tree_util.register_pytree_node_class = register_once
    try:
        import sgl_jax.srt.layers.attention.native_backend  # noqa: F401, PLC0415
    finally:
        jax.tree_util.register_pytree_node_class = register


def _compute_logits_in_f32() -> None:
    from sgl_jax.srt.layers.logits_processor import LogitsProcessor  # noqa: PLC0415

    def logits(self: Any, hidden: jax.Array, head: Any) -> jax.Array:
        weights = head.embedding.value
        found = jnp.einsum(
            "...e,ve->...v", hidden.astype(weights.dtype), weights, preferred_element_type="float32"
        )
        return found[..., : self.vocab_size]

    LogitsProcessor._get_logits = logits  # pyright: ignore


def _rotate_in_f32() -> None:
    from sgl_jax.srt.layers.embeddings import RotaryEmbedding  # noqa: PLC0415

    def turned(x: jax.Array, angles: jax.Array, head_dim: int) -> jax.Array:
        cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
        heads = x.reshape(x.shape[0], -1, head_dim).astype(jnp.float32)
        first, second = jnp.split(heads, 2, axis=-1)
        parts = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(parts, axis=-1).astype(x.dtype).reshape(x.shape)

    def rotate(
        self: Any, positions: jax.Array, query: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        frequencies = self._compute_inv_freq(self.base)
        angles = positions.reshape(-1, 1).astype(jnp.float32) * frequencies
        return turned(query, angles, self.head_size), turned(key, angles, self.head_size)

    RotaryEmbedding.__call__ = rotate


def _let_kv_pools_be_born_asleep() -> None:
    from jax.sharding import NamedSharding, PartitionSpec  # noqa: PLC0415
    from sgl_jax.srt.mem_cache.memory_pool import MHATokenToKVPool  # noqa: PLC0415

    def create(self: Any) -> None:
        spec = PartitionSpec(None, self.kv_partition_axis)
        self.kv_sharding = NamedSharding(self.mesh, spec)
        self.kv_buffer = []

    MHATokenToKVPool._create_buffers = create


WORKAROUNDS = (
    Workaround(
        name="flax",
        symptom="no model can be built: an auto mesh context or metadata is required",
        cause="layers/linear.py:46 and layers/embeddings.py:65, with flax 0.12.1 to 0.12.6",
        how="flax is pinned to 0.12.0, and checked",
    ),
    Workaround(
        name="bit_width",
        symptom="AttributeError: jax._src.dtypes has no bit_width, when the TPU kernels are traced",
        cause="layers/attention/flash_attn_kernel/util.py:17, mem_cache/memory_pool.py:569",
        how="the old name is given back to jax's itemsize_bits",
        patch=_give_bit_width_back,
    ),
    Workaround(
        name="native_attention",
        symptom="ValueError: duplicate PyTreeDef type registration for NativeAttention (CPU)",
        cause="layers/attention/native_backend.py:13 registers what flax has registered",
        how="imported with a registration that takes the second for done",
        patch=_import_native_attention,
    ),
    Workaround(
        name="f32_logits",
        symptom="logits in bf16, whatever the dtype: logprobs are off by up to 0.1 nats",
        cause="layers/logits_processor.py:432, models/qwen2.py:326",
        how="products accumulate in f32 and stay in it",
        patch=_compute_logits_in_f32,
    ),
    Workaround(
        name="f32_rope",
        symptom="rotary frequencies are rounded to bf16, and llama3's scaling is never applied",
        cause="layers/embeddings.py:204 casts them; :193 computes them without _compute_inv_freq",
        how="frequencies, angles and rotation in f32, with the class's own _compute_inv_freq",
        patch=_rotate_in_f32,
    ),
    Workaround(
        name="kv_pool",
        symptom="one program compiled for each layer's buffer (5 s for 30 layers), at every start",
        cause="mem_cache/memory_pool.py:292 jits a new lambda a layer",
        how="pools are born empty; the driver fills them by one program that it keeps",
        patch=_let_kv_pools_be_born_asleep,
    ),
    Workaround(
        name="sampler_noise",
        symptom="every step and every call draws by the same noise: a group has no diversity",
        cause="layers/sampler.py:180 splits a key that never advances",
        how="trainer/rollout/sampling.py draws, by seed, sequence and position",
    ),
    Workaround(
        name="logprobs",
        symptom="return_logprob=True kills the process; its values never leave the jitted program",
        cause="layers/logits_processor.py:417, assigned inside jit",
        how="trainer/rollout/sampling.py gives the logprob of each token that it draws",
    ),
    Workaround(
        name="special_tokens",
        symptom="output_ids lacks the stop token and every special one: positions do not align",
        cause="managers/detokenizer_manager.py:287 drops them",
        how="no detokenizer: tokens are read from the scheduler's own requests",
    ),
    Workaround(
        name="replicated_embedding",
        symptom="embedding and head are whole on every chip: 1.52 GiB more for 7B on v4-8",
        cause="models/qwen2.py:348, sharding (None, None)",
        how="the hand-over lays them over the vocabulary (leaves.py)",
    ),
    Workaround(
        name="dummy_weights",
        symptom="a start allocates all weights, though the trainer brings them",
        cause="model_loader/loader.py:229, model_loader/loader.py:108",
        how="the model is built of shapes only; weights come with the first hand-over",
    ),
    Workaround(
        name="clear_caches",
        symptom="a start forgets every program that the trainer has compiled",
        cause="utils/jax_utils.py:55",
        how="the driver reads free memory without it",
    ),
    Workaround(
        name="signals",
        symptom="a long compile or an error sends SIGQUIT to this process or its parent",
        cause="managers/scheduler.py:991 (watchdog), managers/tp_worker_overlap_thread.py:86",
        how="no watchdog, no overlap thread, no Engine: errors are exceptions",
    ),
    Workaround(
        name="sockets",
        symptom="ZeroMQ's threads and five files in the temporary folder, for messages to nobody",
        cause="managers/scheduler.py:140, server_args.py:845",
        how="started as node 1 of 1, which makes none; the driver hands requests over itself",
    ),
    Workaround(
        name="global_seed",
        symptom="random and numpy of the whole process are seeded anew",
        cause="utils/common_utils.py:63, called by managers/scheduler.py:214",
        how="the call is left out while the scheduler is made",
    ),
    Workaround(
        name="cache_settings",
        symptom="jax's compile cache keeps everything, however small, for the rest of the process",
        cause="managers/scheduler.py:112, where JAX_COMPILATION_CACHE_DIR is set",
        how="the driver puts the settings back",
    ),
    Workaround(
        name="page_padding",
        symptom="AssertionError: total_cache_loc_size, where sequences do not fill their pages",
        cause="managers/tp_worker.py:162 rounds the batch to pages, not each sequence",
        how="the driver sets the paddings, every sequence rounded up",
    ),
    Workaround(
        name="clipped_lengths",
        symptom="a completion ends early, unsaid: seven tokens of every length are kept back",
        cause="managers/tp_worker.py:124 and managers/scheduler.py:585",
        how="the driver sets the scheduler's limits to the job's, and checks them itself",
    ),
)
