"""The job: everything that was asked for, checked as a whole, in one frozen object.

A job is read once from YAML (`load`), overridden by `--set key.path=value` and by the SOP's names
where the caller passes them, checked, and written to the run directory as job.json; the trainer
reads that file and nothing else. Derived numbers are properties. Nothing is adjusted:
a value that cannot be honoured is a `JobError`, and one JobError holds all that is wrong.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from jobs.accelerators import Accelerator, accelerator
from jobs.contradictions import contradictions
from jobs.problems import JobError, parse
from jobs.source import Source, read_sources

DEFAULT_CACHE_DIR = "~/.cache/headroom"

Count = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
Sizes = Annotated[tuple[Count, ...], Field(strict=False)]


def _absolute(path: str) -> str:
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:
        raise ValueError(
            f"names the home of a user that this machine does not have: {path}"
        ) from error


def _absolute_if_local(model: str) -> str:
    """A hub id or a built-in name stays; what is written like a path is one."""
    local = model.startswith((".", "/", "~")) or model.endswith(".gguf")
    return _absolute(model) if local else model


# Job files may be read in a container: a path is written to job.json whole, and bound there alike.
LocalPath = Annotated[str, Field(min_length=1, validate_default=True), AfterValidator(_absolute)]


class Part(BaseModel):
    """A part of the job: frozen, strict about types, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Data(Part):
    """Where the word problems come from."""

    source: Literal["arithmetic", "gsm8k"] | None = None
    """arithmetic: made here from the seed; gsm8k: the hub's. Unset: `path`, else arithmetic."""
    path: LocalPath | None = None
    """A local file of GSM8K's form: one {"question": ..., "answer": "... #### 42"} a line."""
    rows: Count = 1024
    """Rows that the arithmetic generator makes."""


class Rollout(Part):
    """How completions are sampled."""

    engine: Literal["naive", "sglang_jax"] = "naive"
    """naive: our own sampler; sglang_jax: sglang-jax 0.0.2 in the same process."""
    prompts_per_step: Count = 4
    """Groups in a step."""
    group_size: Count = 4
    """Completions of one prompt (G in arXiv:2402.03300); 1 makes every advantage zero."""
    max_prompt_tokens: Count = 256
    """Prompts are padded to this; a longer one is left out of the data, and counted in the log."""
    max_completion_tokens: Count = 64
    """A completion without EOS ends here."""
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """0 is greedy."""
    top_k: Count | None = None
    """Sample among the k likeliest tokens only."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample among the likeliest tokens that reach this probability together."""
    chunk_size: Count | None = None
    """sglang_jax: requests in one generate call (SGLANG_JAX_ROLLOUT_CHUNK_SIZE); unset: all."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype of the naive sampler."""


class Engine(Part):
    """Settings of sglang-jax under its own names, read with rollout.engine sglang_jax only."""

    mem_fraction_static: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the HBM that was free when the engine started that it may keep: weights and KV."""
    max_total_tokens: Count | None = None
    """Cap of the KV pool, tokens."""
    max_running_requests: Count | None = None
    """Requests in flight at once."""
    chunked_prefill_size: Count | None = None
    """Tokens of one prefill program."""
    context_length: Count | None = None
    """Prompt + completion, tokens."""
    page_size: Count | None = None
    """Tokens of one KV page."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the engine's weights."""
    kv_cache_dtype: Literal["auto", "bf16"] = "auto"
    """Of the KV pool."""
    tp_size: Count | None = None
    """Chips that share one copy of the weights; all of them when unset."""
    residency: Literal["sleep", "drop_kv", "keep"] = "sleep"
    """Through the update. sleep: no weights, no KV pool; drop_kv: weights stay; keep: both do."""
    load_format: Literal["auto", "dummy"] = "dummy"
    """dummy: weights come from the trainer, none are read."""
    log_level: Literal["debug", "info", "warning", "error"] = "error"
    """Of the engine's own log."""
    disable_radix_cache: bool = True
    """Prefix cache; on, it would serve KV of the weights before the last hand-over."""
    disable_precompile: bool = True
    """Compile programs when first used."""
    precompile_token_paddings: Sizes | None = None
    """Prefill sizes to compile, tokens."""
    precompile_bs_paddings: Sizes | None = None
    """Batch sizes to compile, requests."""


class Reward(Part):
    """Weights of the SOP's three reward functions."""

    correct: float = 1.0
    """The last number of the completion equals the answer (math-verify)."""
    format: float = 0.5
    """<think>...</think> then <answer>...</answer>, and nothing else."""
    tags: float = 0.5
    """A quarter for each of the four tags that stands exactly once."""


class Train(Part):
    """What is learned: objective and optimizer."""

    micro_batch_size: Count | None = None
    """Sequences in one forward and backward pass, over all devices; one a device when unset."""
    updates_per_rollout: Count = 1
    """Optimizer applications on one rollout (mu in arXiv:2402.03300, algorithm 1)."""
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp"] = "grpo"
    """Advantages, token weights and ratio, as the papers combine them (trainer/grpo.py)."""
    clip_low: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """The ratio is clipped below 1 - clip_low; unset: the loss's paper's figure."""
    clip_high: Annotated[float, Field(ge=0.0)] | None = None
    """The ratio is clipped above 1 + clip_high; unset: the loss's paper's figure."""
    rollout_correction: Annotated[float, Field(gt=0.0)] | None = None
    """Weigh tokens by p_trainer / p_engine, at most this (2 is usual); unset: not at all."""
    beta: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of KL(policy || reference), k3 estimate; 0 keeps no reference in memory."""
    optimizer: Literal["lion", "adamw"] = "lion"
    """The SOP used Lion."""
    learning_rate: Annotated[float, Field(ge=0.0)] = 1e-6
    """Peak, after the warm-up."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates over which the learning rate rises linearly to its peak."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: falls to 0 as the job ends."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled, times the learning rate."""
    b1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Lion: interpolation of the sign; AdamW: decay of the first moment."""
    b2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    """Lion: decay of the momentum; AdamW: decay of the second moment."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Gradients are scaled down to this norm, of what update.clip says; null: never."""


class Update(Part):
    """How the update is computed and lies in memory; but for clip, it differs by rounding."""

    design: Literal["layer_major", "reference"] = "layer_major"
    """layer_major: half the memory; reference: plain autodiff, the numerical reference."""
    update_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype of forward and backward; masters are exact f32 in either."""
    moments: Literal["bfloat16", "int8"] = "bfloat16"
    """layer_major: of the optimizer's moments; int8 has a scale a row. reference: always f32."""
    clip: Literal["per_layer", "global"] = "per_layer"
    """What max_grad_norm bounds: each layer's gradient, or all together (a gradient copy more)."""
    layers: Literal["stacked", "per_layer"] = "stacked"
    """One array for all layers, or one for each, as engines take them."""
    completions_per_row: Literal["one", "group"] = "one"
    """layer_major: group computes each prompt once for all its completions."""
    host_offload: Annotated[tuple[Literal["momentum", "lo"], ...], Field(strict=False)] = ()
    """layer_major on TPU: parts of the state that live in host memory between uses."""
    attention: Literal["auto", "splash", "xla"] = "auto"
    """layer_major: auto is the splash kernel on TPU where it has the shapes, else XLA's."""
    loss_chunk_tokens: Count = 512
    """Tokens a device whose logits exist at once."""
    remat: bool = True
    """reference: keep only each layer's input for the backward pass, compute the rest again."""


class Mesh(Part):
    """How the devices are laid out; the product must be the accelerator's device count."""

    dp: Count = 1
    """Copies of the state, each with its own sequences."""
    fsdp: Count | None = None
    """Devices that share one copy of the state, each with its own sequences; unset: the rest."""
    tp: Count = 1
    """Devices that share each matrix and the same sequences."""


class Evaluation(Part):
    """What an evaluation asks (every `eval_every_steps`)."""

    path: LocalPath | None = None
    """Rows of the test split; unset: of the same source as the training rows."""
    prompts: Count | None = 64
    """Rows of the test split; null: all of them."""
    group_size: Count = 1
    """Completions a row: pass@1 is their mean, pass@K the share of rows with a correct one."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """0 is greedy."""


class Metrics(Part):
    """Where the metrics go besides the log and steps.jsonl."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """online needs WANDB_API_KEY in container.pass_env."""
    wandb_project: str = "headroom"
    """W&B project."""
    wandb_name: str | None = None
    """W&B run name; the run directory's name when unset."""
    tensorboard: bool = False
    """Event files in the run directory."""
    samples_per_step: Annotated[int, Field(ge=0)] = 2
    """Completions printed in the log each step."""


class Checkpoint(Part):
    """What is kept of a run so that it can go on (trainer/checkpoint.py)."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """Save after every so many steps, and when asked to stop; 0: never."""
    keep: Count = 2
    """The newest so many; older ones are removed once a newer one is whole."""
    resume: LocalPath | None = None
    """Go on from this checkpoint's folder (headroom run --resume RUN)."""
    notice: Annotated[str, Field(pattern=r"^(auto|never|http://.+)$")] = "auto"
    """Stop, and save, when the cloud will take the VM. auto: on TPU; or another metadata server."""


class Container(Part):
    """How the container is started (--where docker)."""

    image: str | None = None
    """headroom:cpu or headroom:tpu, by the accelerator, when unset."""
    devices: Names | None = None
    """Host device files to hand in; the accelerator's own when unset."""
    memlock: Annotated[int, Field(ge=-1)] | None = None
    """ulimit, bytes; -1 is unlimited (TPU runtimes want it); unset: Docker's default."""
    nofile: Count | None = None
    """ulimit, open files; unset: Docker's default."""
    shm_gib: Annotated[float, Field(gt=0.0)] = 1.0
    """Size of /dev/shm."""
    memory_gib: Annotated[float, Field(gt=0.0)] | None = None
    """Host memory limit; beyond it the kernel kills the job. Unset: none."""
    network: Literal["host", "bridge", "none"] = "host"
    """TPU runtimes ask the metadata server and each other: host."""
    privileged: bool = False
    """Only where a device file cannot be handed in by itself."""
    pass_env: Names = ()
    """Names, never values, of variables the job may see: [HF_TOKEN, WANDB_API_KEY]."""
    binds: Names = ()
    """Extra folders, "/host/folder:/inside" or "/host/folder:/inside:ro"."""
    stop_grace_s: Count = 30
    """Seconds between SIGTERM and SIGKILL."""


class Job(Part):
    """What was asked: one training job."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    """Names the run directory and the log."""
    accelerator: str
    """v4-8, v5e-8, ...; cpu is one CPU device, cpu-4 four virtual ones."""
    model: Annotated[str, Field(min_length=1), AfterValidator(_absolute_if_local)]
    """smollm2-135m-instruct, tiny, a Hugging Face id, a folder, or a .gguf file."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of everything random."""
    steps: Annotated[int, Field(ge=0)] = 20
    """Rollouts with their learning; 0 loads everything and stops."""
    system_prompt: str | None = None
    """Put before each question; unset: ours, which asks for think and answer tags; "": none."""
    eval_every_steps: Annotated[int, Field(ge=0)] = 0
    """Evaluate after every so many steps; 0: never."""
    stuck_after_s: Annotated[int, Field(ge=0)] = 3600
    """Stop, with Python's stacks in the log, where no phase ends for so many seconds; 0: never."""
    cache_dir: LocalPath = DEFAULT_CACHE_DIR
    """Compiled programs, and the hub's files of containers; kept between runs."""
    data: Data = Data()
    rollout: Rollout = Rollout()
    engine: Engine = Engine()
    reward: Reward = Reward()
    train: Train = Train()
    update: Update = Update()
    mesh: Mesh = Mesh()
    evaluation: Evaluation = Evaluation()
    metrics: Metrics = Metrics()
    checkpoint: Checkpoint = Checkpoint()
    container: Container = Container()

    @property
    def target(self) -> Accelerator:
        """The accelerator's row of the table."""
        return accelerator(self.accelerator)

    @property
    def sequences_per_step(self) -> int:
        """prompts_per_step x group_size."""
        return self.rollout.prompts_per_step * self.rollout.group_size

    @property
    def micro_batch_size(self) -> int:
        """Sequences in one forward and backward pass, over all devices."""
        if self.train.micro_batch_size is not None:
            return self.train.micro_batch_size
        dp, fsdp, _ = self.mesh_shape
        return dp * fsdp * self.sequences_per_row

    @property
    def sequences_per_row(self) -> int:
        """Completions that share one computation of their prompt in the update."""
        shared = self.update.design == "layer_major" and self.update.completions_per_row == "group"
        return self.rollout.group_size if shared else 1

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches in one update."""
        return self.sequences_per_step // self.micro_batch_size

    @property
    def max_sequence_tokens(self) -> int:
        """Prompt and completion at their longest."""
        return self.rollout.max_prompt_tokens + self.rollout.max_completion_tokens

    @property
    def mesh_shape(self) -> tuple[int, int, int]:
        """(dp, fsdp, tp), their product the accelerator's device count."""
        m = self.mesh
        fsdp = m.fsdp if m.fsdp is not None else self.target.devices // (m.dp * m.tp)
        return m.dp, fsdp, m.tp

    @property
    def needs_old_logprobs(self) -> bool:
        """The trainer computes the sampling policy's logprobs before it updates."""
        return self.train.updates_per_rollout > 1 or self.train.rollout_correction is not None

    @property
    def loss_temperature(self) -> float:
        """What logits are divided by before logprobs are taken; greedy rollouts learn at 1."""
        return self.rollout.temperature or 1.0

    @property
    def total_updates(self) -> int:
        """Optimizer applications of the whole job."""
        return self.steps * self.train.updates_per_rollout

    @property
    def image(self) -> str:
        """The container image to run."""
        return self.container.image or f"headroom:{self.target.platform}"

    @property
    def local_paths(self) -> list[str]:
        """Files and folders of this machine that the job reads: a container is given each."""
        model = self.model if self.model.startswith("/") else None
        paths = (self.data.path, self.evaluation.path, model, self.checkpoint.resume)
        return list(dict.fromkeys(path for path in paths if path is not None))

    def to_json(self) -> str:
        """The whole job with every default spelled out, as written to job.json."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    @property
    def digest(self) -> str:
        """sha256 of job.json's text: two jobs with the same digest ask for the same thing."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def load(
    path: Path | str,
    *,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Job:
    """The job of a YAML file, or of a run's job.json, with overrides on top.

    Args:
        path: the job file.
        overrides: "key.path=value" each, as given to --set; values are YAML.
        environment: variables under the SOP's names (BATCH_SIZE, SGLANG_JAX_...); they lie between
            the file and the overrides. None: the environment is not looked at.

    Raises:
        JobError: everything that is wrong, a line each.
    """
    return check(read_sources(Path(path), overrides=overrides, environment=environment))


def check(source: Source) -> Job:
    """The job that the merged sources spell, or everything that is wrong with them.

    Raises:
        JobError: a line for each wrong value, unknown key and contradiction.
    """
    if not source.readable:
        raise JobError(source.problems)
    found = parse(Job, source)
    wrong = {p.key for p in found.problems}
    clashes = [p for p in contradictions(found.job) if not wrong & {p.key, *p.others}]
    everything = [*source.problems, *found.problems, *clashes]
    if everything:
        raise JobError([p.at(source) for p in everything])
    return found.job
