"""The engine's real scheduler and model runner, driven by hand: no threads, signals or sockets.

What is left out of sglang-jax is its Engine (signal handlers, child processes, a thread for the
scheduler) and its way to weights and samples; see workarounds.py for each.
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
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jobs.records import gib
from jobs.spec import Job
from trainer.architecture import Architecture, to_hf_config
from trainer.rollout.sampling import Drawn, Places, draw_alone
from trainer.rollout.sglang import workarounds
from trainer.rollout.sglang.leaves import HandOver
from trainer.rollout.sglang.settings import EngineError, EngineFaultError, Settings, settings_of

workarounds.apply()  # before anything of the engine is imported

from sgl_jax.srt.managers import scheduler as scheduling  # noqa: E402
from sgl_jax.srt.managers import tp_worker as working  # noqa: E402
from sgl_jax.srt.managers.io_struct import TokenizedGenerateReqInput  # noqa: E402
from sgl_jax.srt.model_executor.model_runner import ModelRunner  # noqa: E402
from sgl_jax.srt.model_loader.arch import get_model_architecture  # noqa: E402
from sgl_jax.srt.sampling.sampling_params import SamplingParams  # noqa: E402
from sgl_jax.srt.server_args import PortArgs, ServerArgs  # noqa: E402
from sgl_jax.srt.utils.jax_utils import get_available_device_memory  # noqa: E402

log = logging.getLogger(__name__)

AXES = ("data", "tensor", "expert")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion that is wanted.

    Attributes:
        prompt: token ids.
        sequence_number: of the whole job; with the seed it decides the noise.
    """

    prompt: Sequence[int]
    sequence_number: int


@dataclass(kw_only=True)
class Sampled:
    """One completion.

    Attributes:
        tokens: ids, with the stop token where there was one.
        logprobs: of each under logits / temperature, before top-k and top-p.
        raw_logprobs: of each under the logits as they are.
        stopped: by a stop token, be it the last that its length allows.
    """

    tokens: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]
    stopped: bool = False


@dataclass
class _Arguments(ServerArgs):
    """The engine's own arguments, and what its model runner is told besides.

    Attributes:
        coming_bytes: of weights on a chip, which the first hand-over will bring.
    """

    coming_bytes: int = 0


class _Runner(ModelRunner):
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


@contextmanager
def _in_place_of(substitutes: Mapping[tuple[Any, str], Any]) -> Iterator[None]:
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


class Driver:
    """One engine, in this process and thread.

    It is made asleep: `wake` gives it the weights and its KV pool, `sleep` takes them away.

    Args:
        job: what it runs for.
        architecture: the model's.
        devices: the trainer's, in the trainer's order.
        eos_ids: what ends a completion.

    Raises:
        EngineError: it does not start, with its own words and our numbers.
    """

    def __init__(
        self,
        job: Job,
        architecture: Architecture,
        devices: Sequence[Any],
        *,
        eos_ids: Sequence[int],
    ) -> None:
        self.settings = settings_of(job)
        self.recompiles = 0
        self._job, self._eos = job, list(eos_ids)
        mesh = Mesh(np.array(devices).reshape(-1, self.settings.tp_size, 1), AXES)
        coming = weight_bytes(job, architecture)
        self._scheduler = _start(job, architecture, mesh, self.settings, coming, self._eos)
        worker = self._scheduler.tp_worker
        self.runner: Any = worker.model_runner
        self.pool_tokens = int(self.runner.max_total_num_tokens)
        length, page = self.settings.length, self.settings.page_size
        if self.pool_tokens < length:
            raise EngineError(
                f"the KV pool of sglang-jax holds {self.pool_tokens} tokens, and a sequence of the "
                f"job up to {length}: raise engine.mem_fraction_static "
                f"({self.runner.mem_fraction_static}), of {gib(self.runner.free_bytes)} free with "
                f"{gib(coming)} of weights to come, or shorten the sequences"
            )
        worker.precompile_cache_loc_paddings = [
            requests * -(-length // page) * page for requests in worker.precompile_bs_paddings
        ]
        # It would keep seven tokens of each sequence back; what is asked was checked by `run`.
        self._scheduler.max_req_len = self._scheduler.max_req_input_len = length + 7
        shapes = [leaf.shape for leaf in self.runner.shapes]
        self.hand_over = HandOver(self.runner.names, shapes, mesh, architecture, job.engine.dtype)
        self._make_pool = _pool_program(self.runner.token_to_kv_pool)
        self._key = jax.random.key(job.seed)
        self._broken = False
        self._precompile = not job.engine.disable_precompile
        self.by_reference = False  # whether any weight it has is the trainer's own array

    def wake(self, params: Any) -> None:
        """Take the policy's weights, and make the KV pool anew where there is none."""
        self.by_reference = any(leaf is not None for leaf in self.hand_over.referenced(params))
        self.runner.leaves = []  # the old ones go before the new ones come
        self.runner.leaves = jax.block_until_ready(self.hand_over(params))
        if not self.runner.token_to_kv_pool.kv_buffer:
            self.runner.token_to_kv_pool.kv_buffer = self._make_pool()
        if self._precompile:
            self._compile()
        self._forget()

    def _compile(self) -> None:
        """Run every program once, as `engine.disable_precompile: false` asks."""
        self._precompile = False
        worker = self._scheduler.tp_worker
        nowhere = Places(np.zeros(1, np.uint32), np.zeros(1, np.int32))
        self.runner.draw = lambda logits: self._draw(logits, nowhere, np.float32(1.0))
        worker.precompile_extend()
        worker.precompile_decode()

    def sleep(self, *, drop_weights: bool, drop_kv: bool) -> None:
        """Let go of weights, or of the KV pool, or of both."""
        if drop_weights:
            self.runner.leaves = []
        if drop_kv:
            self.runner.token_to_kv_pool.kv_buffer = []

    def _forget(self) -> None:
        """Drop every cached key and value: they are of other weights."""
        scheduler = self._scheduler
        scheduler.last_batch = scheduler.cur_batch = None
        scheduler.running_batch = scheduling.ScheduleBatch(reqs=[], batch_is_full=False)
        scheduler.tree_cache.reset()
        scheduler.token_to_kv_pool_allocator.clear()
        scheduler.req_to_token_pool.clear()

    def run(
        self, requests: Sequence[Request], *, max_tokens: int, temperature: float
    ) -> list[Sampled]:
        """Sample a completion of each request; as many at once as the settings say.

        Args:
            requests: at least one; sequence numbers are all different.
            max_tokens: a completion without a stop token ends here.
            temperature: 0 is greedy.

        Raises:
            EngineError: a request is too long.
            EngineFaultError: the engine is asleep, or fails; what an error broke stays broken.
        """
        self._check(requests, max_tokens)
        for request in requests:
            self._scheduler.handle_generate_request(self._ask(request, max_tokens))
        found = {
            str(request.sequence_number): Sampled(tokens=[], logprobs=[], raw_logprobs=[])
            for request in requests
        }
        waiting = len(requests)
        self._broken = True  # until it is over: an error leaves requests half way
        while waiting:
            waiting -= self._step(found, np.float32(temperature))
        if self._scheduler.get_next_batch_to_run() is not None:
            raise EngineFaultError("sglang-jax still runs a batch though every request is finished")
        self._scheduler.last_batch = None
        self._scheduler.check_memory()
        self._broken = False
        return list(found.values())

    def _check(self, requests: Sequence[Request], max_tokens: int) -> None:
        if self._broken:
            raise EngineFaultError("sglang-jax broke in an earlier call: start the run again")
        if not self.runner.leaves or not self.runner.token_to_kv_pool.kv_buffer:
            raise EngineFaultError("sglang-jax is asleep: hand the weights over first")
        longest = max(len(request.prompt) for request in requests)
        if longest + max_tokens > self.settings.length:
            raise EngineError(
                f"a prompt of {longest} tokens and a completion of {max_tokens} are longer than "
                f"the {self.settings.length} tokens of a sequence of this engine: raise "
                "rollout.max_prompt_tokens, or engine.context_length where it is set"
            )

    def _ask(self, request: Request, max_tokens: int) -> TokenizedGenerateReqInput:
        # The engine's own sampling is never asked; it stops by these, and counts.
        wanted = SamplingParams(max_new_tokens=max_tokens, stop_token_ids=self._eos)
        wanted.normalize(None)
        return TokenizedGenerateReqInput(
            rid=str(request.sequence_number),
            text="",
            input_ids=list(request.prompt),
            sampling_params=wanted,  # pyright: ignore
            return_logprob=False,
            top_logprobs_num=0,
        )

    def _step(self, found: Mapping[str, Sampled], temperature: Any) -> int:
        """One batch, prefill or decode; how many requests it finished."""
        scheduler = self._scheduler
        # Where the last of the running ones has finished it first notes that, and runs none.
        batch = scheduler.get_next_batch_to_run() or scheduler.get_next_batch_to_run()
        scheduler.cur_batch = batch
        if batch is None:
            raise EngineFaultError(
                f"sglang-jax has {len(scheduler.waiting_queue)} requests and runs none: a KV pool "
                f"of {self.pool_tokens} tokens is too small; raise engine.max_total_tokens"
            )
        requests = list(batch.reqs)
        sampled = [found[request.rid] for request in requests]
        places = Places(
            np.array([int(request.rid) for request in requests], np.uint32),
            np.array([len(one.tokens) for one in sampled], np.int32),
        )
        self.runner.draw = lambda logits: self._draw(logits, places, temperature)
        result = scheduler.run_batch(batch)
        scheduler.process_batch_result(batch, result)
        scheduler.last_batch = batch
        self.recompiles += result.cache_miss_count
        return self._collect(requests, sampled)

    def _collect(self, requests: list[Any], sampled: list[Sampled]) -> int:
        """Note what was drawn for each row whose request grew; a prompt's part grows nothing."""
        logprobs, raw = jax.device_get((self.runner.drawn.logprobs, self.runner.drawn.raw_logprobs))
        finished = 0
        for row, (request, one) in enumerate(zip(requests, sampled, strict=True)):
            if len(request.output_ids) == len(one.tokens):
                continue
            one.tokens.append(int(request.output_ids[-1]))
            one.logprobs.append(float(logprobs[row]))
            one.raw_logprobs.append(float(raw[row]))
            one.stopped = one.tokens[-1] in self._eos
            finished += request.finished()
        return finished

    def _draw(self, logits: jax.Array, places: Places, temperature: Any) -> Drawn:
        """Tokens of a batch, its rows filled up with copies of the last: they are never read."""
        rows = logits.shape[0] - len(places.positions)
        padded = Places(*(np.pad(part, (0, rows), mode="edge") for part in places))
        r = self._job.rollout
        return draw_alone(logits, self._key, padded, temperature, top_k=r.top_k, top_p=r.top_p)


def weight_bytes(job: Job, architecture: Architecture) -> int:
    """Weights on one chip that a hand-over will bring."""
    # Imported here: budget.py counts by the engine's settings.
    from trainer.budget import engine_weight_bytes  # noqa: PLC0415

    return engine_weight_bytes(job, architecture, "sharded")


def _start(
    job: Job,
    architecture: Architecture,
    mesh: Mesh,
    settings: Settings,
    coming: int,
    eos_ids: list[int],
) -> Any:
    """The engine's scheduler with all that it owns, asleep."""
    logging.getLogger("sgl_jax").setLevel(job.engine.log_level.upper())
    substitutes = {
        (working, "ModelRunner"): _Runner,
        (scheduling, "create_device_mesh"): lambda **_: mesh,
        (scheduling, "set_random_seed"): lambda _: None,
        (scheduling, "zmq"): SimpleNamespace(Context=lambda _: None),  # one would never be closed
    }
    nobody = PortArgs("", "", "", "", "", "", "")  # pyright: ignore
    with tempfile.TemporaryDirectory(prefix="headroom-engine-") as folder:
        config = {**to_hf_config(architecture, dtype=job.engine.dtype), "eos_token_id": eos_ids}
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        arguments = _arguments(job, settings, folder, coming)
        try:
            with _in_place_of(substitutes), _cache_settings_kept():
                return _Scheduler(arguments, nobody)
        except (RuntimeError, ValueError, AssertionError) as error:
            free = get_available_device_memory(arguments.device, empty_cache=False)
            raise EngineError(
                f"sglang-jax did not start: {error} (its weights take {gib(coming)} of "
                f"{gib(free)} free on a device, so engine.mem_fraction_static must be above "
                f"{coming / max(free, 1):.3f}; it is {arguments.mem_fraction_static})"
            ) from error


def _arguments(job: Job, settings: Settings, folder: str, coming: int) -> _Arguments:
    e, platform = job.engine, job.target.platform
    return _Arguments(
        model_path=folder,
        device=platform,
        tp_size=settings.tp_size,
        dtype=e.dtype,
        kv_cache_dtype=e.kv_cache_dtype,
        mem_fraction_static=settings.mem_fraction,
        max_total_tokens=settings.pool_tokens,
        max_running_requests=settings.running,
        context_length=settings.length + 1,  # the engine takes one off
        page_size=settings.page_size,
        chunked_prefill_size=settings.prefill_tokens,
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
        coming_bytes=coming,
    )


def _pool_program(pool: Any) -> Any:
    """The one program that makes every layer's keys and values, kept for every wake."""
    shape = (pool.size + pool.page_size, pool.head_num * 2, pool.head_dim)
    make = lambda: [jnp.zeros(shape, pool.dtype) for _ in range(pool.layer_num)]
    return jax.jit(make, out_shardings=[pool.kv_sharding] * pool.layer_num)
