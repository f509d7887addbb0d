"""The engine's parts, started without what would harm the process they live in.

Its own model runner and scheduler, as subclasses that leave out weights of their own, the sampler,
the watchdog and the sockets; see workarounds.py for why.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jobs.records import gib
from jobs.spec import Job
from trainer.architecture import Architecture, to_hf_config
from trainer.rollout.sampling import Drawn
from trainer.rollout.sglang import workarounds
from trainer.rollout.sglang.settings import EngineError, EngineFaultError, settings_of

workarounds.apply()  # before anything of the engine is imported

from sgl_jax.srt.managers import scheduler as scheduling  # noqa: E402
from sgl_jax.srt.managers import tp_worker as working  # noqa: E402
from sgl_jax.srt.model_executor.model_runner import ModelRunner  # noqa: E402
from sgl_jax.srt.model_loader.arch import get_model_architecture  # noqa: E402
from sgl_jax.srt.server_args import PortArgs, ServerArgs  # noqa: E402
from sgl_jax.srt.utils.jax_utils import get_available_device_memory  # noqa: E402

AXES = ("data", "tensor", "expert")


@dataclass
class Arguments(ServerArgs):
    """The engine's own arguments, and what its model runner is told besides.

    Attributes:
        coming_bytes: see `start`.
    """

    coming_bytes: int = 0


class Runner(ModelRunner):
    """The engine's model runner, whose weights and KV pool are brought to it."""

    leaves: list[jax.Array]  # of the model, in the order of `names`; empty while asleep
    names: list[str]
    shapes: list[Any]
    run: Any  # jitted (leaves, forward_batch, token_to_kv_pool, logits_metadata)
    draw: Any  # logits -> Drawn, as the driver sets it for the batch under way
    drawn: Drawn
    free_bytes: int | None = None

    def get_available_device_memory(self) -> int:
        """Free bytes of the fullest chip at the start; then the same, less the weights to come."""
        if self.free_bytes is None:
            self.free_bytes = get_available_device_memory(self.device, empty_cache=False)
            return self.free_bytes
        return self.free_bytes - self.server_args.coming_bytes  # pyright: ignore

    def load_model(self) -> None:
        """Build the model of shapes: no weight is allocated."""
        config = self.model_config
        config.validate_tensor_parallel_config(self.tp_size)
        config.configure_for_tensor_parallel(self.tp_size)
        model_class, _ = get_model_architecture(config)
        make = lambda: model_class(config.hf_config, config.dtype, self.rngs, self.mesh)
        with self.mesh:
            self.model: Any = nnx.eval_shape(make)
        self.dtype = config.dtype

    def initialize_jit(self) -> None:
        """The engine's program, its weights an argument instead of a constant of the closure."""
        definition, state = nnx.split(self.model)
        found, tree = jax.tree_util.tree_flatten_with_path(state)
        self.names = [".".join(str(getattr(k, "key", k)) for k in path[:-1]) for path, _ in found]
        self.shapes = [leaf for _, leaf in found]
        self.leaves = []
        self.model = None  # pyright: ignore

        def run(leaves: Any, forward_batch: Any, token_to_kv_pool: Any, metadata: Any) -> Any:
            model = nnx.merge(definition, jax.tree_util.tree_unflatten(tree, leaves))
            return model(forward_batch, token_to_kv_pool, metadata)

        self.run = jax.jit(run, donate_argnames=["token_to_kv_pool"])
        self.jitted_run_model = lambda batch, metadata: self.run(
            self.leaves, batch, self.token_to_kv_pool, metadata
        )

    def sample(self, logits_output: Any, sampling_metadata: Any, positions: Any) -> jax.Array:
        """Draw by our own sampler; the engine's metadata and positions are not asked."""
        del sampling_metadata, positions
        self.drawn = self.draw(logits_output.next_token_logits)
        return self.drawn.tokens


class _Scheduler(scheduling.Scheduler):
    """The engine's scheduler without its watchdog, which would send signals."""

    def watchdog_thread(self) -> None:
        """End at once."""


def pool_layers(pool: Any) -> list[jax.ShapeDtypeStruct]:
    """Keys and values of each layer, fused, [tokens + page, 2 x kv_heads, head_dim].

    Source: `MHATokenToKVPool._create_buffers` of sglang-jax 0.0.2.
    """
    shape = (pool.size + pool.page_size, pool.head_num * 2, pool.head_dim)
    layer = jax.ShapeDtypeStruct(shape, pool.dtype, sharding=pool.kv_sharding)
    return [layer] * pool.layer_num


@contextmanager
def model_folder(
    job: Job, architecture: Architecture, *, eos_ids: Sequence[int] = ()
) -> Iterator[str]:
    """A folder with the config.json that the engine reads its model from; no weights."""
    logging.getLogger("sgl_jax").setLevel(job.engine.log_level.upper())
    config = {
        **to_hf_config(architecture, dtype=job.engine.dtype),
        "eos_token_id": list(eos_ids),  # none is an answer, too: transformers would name its own
    }
    with tempfile.TemporaryDirectory(prefix="headroom-engine-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield folder


@contextmanager
def in_place_of(substitutes: Mapping[tuple[Any, str], Any]) -> Iterator[None]:
    """Names of modules stand for something else, for as long as the context lasts."""
    before = {(module, name): getattr(module, name) for module, name in substitutes}
    try:
        for (module, name), substitute in substitutes.items():
            setattr(module, name, substitute)
        yield
    finally:
        for (module, name), original in before.items():
            setattr(module, name, original)


@contextmanager
def _cache_settings_kept() -> Iterator[None]:
    """What a scheduler sets for the whole process, where a compile cache is in the environment."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_enable_xla_caches",
    )
    before = {name: getattr(jax.config, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def start(
    job: Job,
    architecture: Architecture,
    mesh: Mesh,
    *,
    coming_bytes: int,
    eos_ids: Sequence[int],
) -> Any:
    """The engine's scheduler with all that it owns, asleep: no weights, no KV pool.

    Args:
        job: what it runs for.
        architecture: the model's.
        mesh: of AXES.
        coming_bytes: of weights on one device, which the first hand-over will bring.
        eos_ids: what ends a completion.

    Raises:
        EngineError: it finds too little memory, with its own words and our numbers.
        EngineFaultError: it does not start for another reason.
    """
    substitutes = {
        (working, "ModelRunner"): Runner,
        (scheduling, "create_device_mesh"): lambda **_: mesh,
        (scheduling, "set_random_seed"): lambda _: None,
        (scheduling, "zmq"): SimpleNamespace(Context=lambda _: None),  # one would never be closed
    }
    nobody = PortArgs("", "", "", "", "", "", "")  # pyright: ignore
    with model_folder(job, architecture, eos_ids=eos_ids) as folder:
        arguments = arguments_of(job, folder, coming_bytes)
        try:
            with in_place_of(substitutes), _cache_settings_kept():
                return _Scheduler(arguments, nobody)
        except (RuntimeError, ValueError, AssertionError) as error:
            if "Not enough memory" not in str(error):
                raise EngineFaultError(f"sglang-jax did not start: {error}") from error
            free = get_available_device_memory(arguments.device, empty_cache=False)
            least = coming_bytes / max(free, 1)
            share = f"must be above {least:.3f}" if least < 1 else "cannot help"
            raise EngineError(
                f"sglang-jax did not start: {error} (its weights take {gib(coming_bytes)} of "
                f"{gib(free)} free on a device, so engine.mem_fraction_static {share}; it is "
                f"{arguments.mem_fraction_static})"
            ) from error


def arguments_of(job: Job, folder: str, coming_bytes: int) -> Arguments:
    """What the engine is started with; see settings.py.

    Args:
        job: what it runs for.
        folder: with the model's config.json.
        coming_bytes: see `start`.
    """
    e, platform, settings = job.engine, job.target.platform, settings_of(job)
    return Arguments(
        model_path=folder,
        device=platform,
        tp_size=settings.tp_size,
        dtype=e.dtype,
        kv_cache_dtype=e.kv_cache_dtype,
        mem_fraction_static=settings.mem_fraction,
        # It starts a sequence only where a page would be left beside it.
        max_total_tokens=settings.pool_tokens + settings.page_size,
        max_running_requests=settings.running,
        context_length=settings.length + 1,  # the engine takes one off
        page_size=settings.page_size,
        chunked_prefill_size=settings.prefill_tokens,
        max_prefill_tokens=settings.prefill_tokens,
        precompile_token_paddings=list(settings.prefill_paddings),
        precompile_bs_paddings=list(settings.decode_paddings),
        disable_radix_cache=e.disable_radix_cache,
        disable_jax_precompile=True,
        disable_overlap_schedule=True,
        skip_tokenizer_init=True,
        load_format="dummy",
        attention_backend="native" if platform == "cpu" else "fa",
        log_level=e.log_level,
        random_seed=job.seed,
        node_rank=1,
        coming_bytes=coming_bytes,
    )
