"""The engine's real scheduler and model runner, driven by hand: no threads, signals or sockets.

What is left out of sglang-jax is its Engine (signal handlers, child processes, a thread for the
scheduler) and its way to weights and samples; see workarounds.py for each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jobs.records import gib
from jobs.spec import Job
from trainer.architecture import Architecture
from trainer.budget import engine_copied_bytes
from trainer.rollout.sampling import Drawn, Places, draw_alone
from trainer.rollout.sglang.leaves import HandOver
from trainer.rollout.sglang.settings import EngineError, EngineFaultError, settings_of
from trainer.rollout.sglang.start import AXES, pool_layers, start

# `start` has mended the engine, which must come before anything else of it is imported.
from sgl_jax.srt.managers.io_struct import TokenizedGenerateReqInput  # isort: skip
from sgl_jax.srt.managers.schedule_batch import ScheduleBatch  # isort: skip
from sgl_jax.srt.sampling.sampling_params import SamplingParams  # isort: skip


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
        coming = engine_copied_bytes(job, architecture, "sharded")
        self._scheduler = start(job, architecture, mesh, coming_bytes=coming, eos_ids=self._eos)
        worker = self._scheduler.tp_worker
        self.runner: Any = worker.model_runner
        self.pool_tokens = int(self.runner.max_total_num_tokens)
        length, paged = self.settings.length, self.settings.paged_length
        if self.pool_tokens < paged + self.settings.page_size:
            raise EngineError(
                f"the KV pool of sglang-jax holds {self.pool_tokens} tokens, a sequence of the job "
                f"up to {length}, and a page must be left: raise engine.mem_fraction_static "
                f"({self.runner.mem_fraction_static}), of {gib(self.runner.free_bytes)} free with "
                f"{gib(coming)} of weights to come, or shorten the sequences"
            )
        worker.max_req_len = paged
        worker.precompile_cache_loc_paddings = [
            requests * paged for requests in worker.precompile_bs_paddings
        ]
        # It would keep seven tokens of each sequence back; what is asked was checked by `run`.
        self._scheduler.max_req_len = self._scheduler.max_req_input_len = length + 7
        shapes = [leaf.shape for leaf in self.runner.shapes]
        self.hand_over = HandOver(self.runner.names, shapes, mesh, architecture, job.engine.dtype)
        self._make_pool = _pool_program(self.runner.token_to_kv_pool)
        self._key = jax.random.key(job.seed)
        self.running = int(self._scheduler.max_running_requests)
        self._broken = False
        self._precompile = not job.engine.disable_precompile
        self.by_reference = False  # whether any weight it has is the trainer's own array

    def wake(self, params: Any) -> None:
        """Take the policy's weights, and make the KV pool anew where there is none."""
        missing = self.hand_over.missing(params)
        self.by_reference = len(missing) < len(self.hand_over.places)
        self.runner.leaves = []  # the old ones go before the new ones come
        self.runner.leaves = jax.block_until_ready(self.hand_over(params, missing))
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
        scheduler.running_batch = ScheduleBatch(reqs=[], batch_is_full=False)
        scheduler.new_token_ratio = scheduler.init_new_token_ratio
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
                f"sglang-jax has {len(scheduler.waiting_queue)} requests and runs none, with a KV "
                f"pool of {self.pool_tokens} tokens: raise engine.max_total_tokens, or, where "
                "memory made it that small, engine.mem_fraction_static"
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


def _pool_program(pool: Any) -> Any:
    """The one program that makes every layer's keys and values, kept for every wake."""
    layers = pool_layers(pool)
    make = lambda: [jnp.zeros(layer.shape, layer.dtype) for layer in layers]
    return jax.jit(make, out_shardings=[layer.sharding for layer in layers])
