"""The engine's own programs, lowered for a TPU that need not be there.

The engine's model class, attention backend, KV pool and batches are its own, made as the driver
makes them; only where it would put an array on a device, that array's shape is noted instead.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jobs.spec import Job
from trainer.architecture import Architecture
from trainer.budget import EngineBuild
from trainer.rollout.sglang import probe, start
from trainer.rollout.sglang.leaves import HandOver
from trainer.rollout.sglang.settings import Settings, settings_of

# `start` has mended the engine, which must come before anything else of it is imported.
from sgl_jax.srt.configs.model_config import ModelConfig  # isort: skip
from sgl_jax.srt.layers import logits_processor  # isort: skip
from sgl_jax.srt.layers.attention import flashattention_backend  # isort: skip
from sgl_jax.srt.layers.attention.flash_attn_kernel import tuned_block_sizes  # isort: skip
from sgl_jax.srt.managers import tp_worker  # isort: skip
from sgl_jax.srt.mem_cache.memory_pool import MHATokenToKVPool  # isort: skip
from sgl_jax.srt.model_executor import forward_batch_info  # isort: skip


class Engine:
    """The engine's parts for a job, of shapes only.

    Args:
        job: for a TPU.
        architecture: the model's.
        devices: that may be only described.
        build: how embedding, head and biases lie: as our hand-over lays them, or the engine.
    """

    def __init__(
        self, job: Job, architecture: Architecture, devices: Sequence[Any], *, build: EngineBuild
    ) -> None:
        self._job, self._architecture = job, architecture
        self._settings = settings_of(job)
        shape = (-1, self._settings.tp_size, 1)
        self._mesh = Mesh(np.array(devices).reshape(shape), start.AXES)
        self._runner = _runner(job, architecture, self._mesh, self._settings)
        shapes = [leaf.shape for leaf in self._runner.shapes]
        self._hand_over = HandOver(
            self._runner.names, shapes, self._mesh, architecture, job.engine.dtype
        )
        self._build: EngineBuild = build

    def lowered(self, *, prefill: bool, pool_tokens: int) -> Any:
        """The engine's largest prefill or decode program, lowered as its runner calls it.

        Args:
            prefill: that one, else decode.
            pool_tokens: of the KV pool.
        """
        s, mode = self._settings, forward_batch_info.ForwardMode
        tokens = max(s.prefill_paddings) if prefill else s.running
        worker = object.__new__(tp_worker.ModelWorker)
        worker.model_config = self._runner.model_config
        batch = worker.generate_model_worker_batch(
            s.running,
            tokens,
            mode.EXTEND if prefill else mode.DECODE,
            s.running * s.paged_length,
        )
        with _for_described_devices(self._mesh):
            backend = self._runner.attn_backend
            backend.forward_metadata = backend.get_forward_metadata(batch)
            asked = forward_batch_info.ForwardBatch.init_new(batch, self._runner)
            metadata = logits_processor.LogitsMetadata.from_model_worker_batch(batch, self._mesh)
            with jax.set_mesh(self._mesh):
                return self._runner.run.lower(
                    self._leaves(), asked, self._pool(pool_tokens), metadata
                )

    def lowered_hand_over(self, params: Any) -> Any:
        """The program that makes the leaves which are not the trainer's own arrays.

        Args:
            params: as `Update.params` gives them, abstract.
        """
        return self._hand_over.program(self._hand_over.missing(params)).lower(params)

    def _leaves(self) -> list[jax.ShapeDtypeStruct]:
        """The weights as shapes, where they lie."""
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        found: list[jax.ShapeDtypeStruct] = []
        for i, leaf in enumerate(self._runner.shapes):
            place, sharding = self._hand_over.places[i], self._hand_over.shardings[i]
            small = place.layer is None or "bias" in place.name
            if self._build == "replicated" and small:
                sharding = everywhere
            found.append(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))
        return found

    def _pool(self, tokens: int) -> MHATokenToKVPool:
        config, s = self._runner.model_config, self._settings
        pool = MHATokenToKVPool(
            size=tokens,
            page_size=s.page_size,
            dtype=jnp.bfloat16 if self._job.engine.kv_cache_dtype == "bf16" else config.dtype,
            head_num=config.get_total_num_kv_heads_with_replication(s.tp_size),
            head_dim=config.head_dim,
            layer_num=config.num_hidden_layers,
            mesh=self._mesh,
        )
        pool.kv_buffer = start.pool_layers(pool)
        return pool


def lowered_probe(job: Job, architecture: Architecture, params: Any) -> Any:
    """The trainer's own pass over a few tokens, with which the engine's are compared."""
    tokens = jax.ShapeDtypeStruct(probe.tokens_shape(job), jnp.int32)
    temperature = jax.ShapeDtypeStruct((), jnp.float32)
    return probe.program(job, architecture).lower(params, tokens, temperature)


def _runner(job: Job, architecture: Architecture, mesh: Mesh, settings: Settings) -> Any:
    """The driver's model runner, up to where it would ask for memory."""
    runner = object.__new__(start.Runner)
    with start.model_folder(job, architecture) as folder:
        # The engine wants the platform that JAX_PLATFORMS names, and planning's is the CPU.
        here = job.model_copy(update={"accelerator": f"cpu-{job.target.devices}"})
        arguments = start.arguments_of(here, folder, 0)
        arguments.device, arguments.attention_backend = "tpu", "fa"
        runner.model_config = ModelConfig.from_server_args(arguments, model_path=folder)
    runner.server_args, runner.device = arguments, arguments.device
    runner.mesh, runner.tp_size, runner.page_size = mesh, settings.tp_size, settings.page_size
    runner.num_attn_heads = runner.model_config.num_attention_heads
    runner.num_kv_heads = runner.model_config.get_total_num_kv_heads_with_replication(
        settings.tp_size
    )
    runner.rngs = nnx.Rngs(job.seed)
    runner.load_model()
    runner.initialize_jit()
    runner.init_attention_backend()
    return runner


@contextmanager
def _for_described_devices(mesh: Mesh) -> Iterator[None]:
    """The engine notes shapes instead of putting arrays, and asks our devices for their kind."""
    kind = mesh.devices.flat[0].device_kind
    version = int(re.sub(r"\D", "", kind))

    def shapes(data: Any, *, sharding: Any = None) -> Any:
        of = lambda x: jax.ShapeDtypeStruct(
            np.shape(x), jax.dtypes.canonicalize_dtype(np.asarray(x).dtype), sharding=sharding
        )
        return jax.tree.map(of, data)

    modules = (flashattention_backend, forward_batch_info, logits_processor)
    substitutes = {(module, "device_array"): shapes for module in modules}
    substitutes |= {
        (tuned_block_sizes, "get_tpu_version"): lambda: version,
        (tuned_block_sizes, "get_device_name"): lambda *_: " ".join(kind.split()[:2]),
    }
    with start.in_place_of(substitutes):
        yield
