"""`rollout.engine: sglang_jax`: what train.py asks of an engine, asked of sglang-jax."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jobs.records import gib
from jobs.spec import Job
from trainer.architecture import Architecture
from trainer.rollout import Completions
from trainer.rollout.sglang.driver import Driver, Request, Sampled
from trainer.rollout.sglang.probe import Probe
from trainer.rollout.sglang.settings import VERSION, EngineFaultError, check_engine

log = logging.getLogger(__name__)


class SglangRollout:
    """sglang-jax in this process, asleep through the update; see `Rollout` for the methods.

    The engine is made at the first hand-over, when the trainer's state has its place: its share of
    memory (engine.mem_fraction_static) is of what is free then.

    Args:
        job: what it runs for.
        architecture: the model's.
        mesh: the trainer's.
        eos_ids: what ends a completion.

    Raises:
        EngineError: it cannot run the job.
    """

    name = f"sglang_jax {VERSION}"

    def __init__(
        self, job: Job, architecture: Architecture, mesh: Mesh, *, eos_ids: Sequence[int]
    ) -> None:
        check_engine(job, architecture)
        self._job, self._architecture = job, architecture
        self._devices = list(mesh.devices.flat)
        self._eos_ids = list(eos_ids)
        self._probe = Probe(job, architecture)
        self._params: Any = None  # of the hand-over, until the engine has been probed
        self.driver: Driver | None = None

    def hand_over(self, params: Any) -> None:
        """Take the policy's weights, masters' `hi` by reference where they lie as the engine's."""
        if self.driver is None:
            self.driver = Driver(
                self._job, self._architecture, self._devices, eos_ids=self._eos_ids
            )
            settings = self.driver.settings
            log.info(
                "engine=%s kv_pool_tokens=%d running=%d sequence=%d weights=%s/device",
                self.name,
                self.driver.pool_tokens,
                self.driver.running,
                settings.length,
                gib(self.driver.runner.server_args.coming_bytes),
            )
            asked = self._job.engine.max_total_tokens
            if asked is not None and self.driver.pool_tokens < asked:
                log.warning(
                    "engine.max_total_tokens = %d, but its share of memory holds %d",
                    asked,
                    self.driver.pool_tokens,
                )
        self.driver.wake(params)
        self._params = params

    def sleep(self) -> None:
        """Let go of what engine.residency says; of weights by reference always."""
        self._params = None
        if self.driver is not None:
            residency = self._job.engine.residency
            self.driver.sleep(
                drop_weights=residency == "sleep" or self.driver.by_reference,
                drop_kv=residency != "keep",
            )

    def held(self) -> dict[str, Any]:
        """See `Rollout.held`."""
        if self.driver is None:
            return {}
        runner = self.driver.runner
        return {"engine weights": runner.leaves, "KV pool": runner.token_to_kv_pool.kv_buffer}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        temperature: float,
        first_sequence: int,
    ) -> Completions:
        """See `Rollout.generate`; the first call after a hand-over compares the engine's logprobs.

        Raises:
            EngineError: a prompt is too long.
            EngineFaultError: the engine fails, or has not the trainer's policy.
        """
        requests = [
            Request(prompt=prompt, sequence_number=first_sequence + i * group_size + k)
            for i, prompt in enumerate(prompts)
            for k in range(group_size)
        ]
        at_once = self._job.rollout.chunk_size or len(requests)
        sampled: list[Sampled] = []
        for first in range(0, len(requests), at_once):
            sampled += self._sample(requests[first : first + at_once], temperature)
        completions = self._completions(sampled)
        if self._params is not None:
            params, self._params = self._params, None
            self._probe.check(params, prompts[0], completions, temperature=temperature)
        return completions

    def _sample(self, requests: Sequence[Request], temperature: float) -> list[Sampled]:
        if self.driver is None:
            raise EngineFaultError("sglang-jax is asleep: hand the weights over first")
        most = self._job.rollout.max_completion_tokens
        return self.driver.run(requests, max_tokens=most, temperature=temperature)

    def _completions(self, sampled: Sequence[Sampled]) -> Completions:
        most = self._job.rollout.max_completion_tokens
        tokens = np.zeros((len(sampled), most), np.int32)
        logprobs = np.zeros((len(sampled), most), np.float32)
        for row, one in enumerate(sampled):
            tokens[row, : len(one.tokens)] = one.tokens
            logprobs[row, : len(one.tokens)] = one.logprobs
        return Completions(
            tokens=tokens,
            lengths=np.array([len(one.tokens) for one in sampled], np.int32),
            logprobs=logprobs,
            truncated=np.array([not one.stopped for one in sampled]),
        )
