"""What a run writes: its records, its file names, and the one way to print bytes.

Every record is one JSON object: a file of its own (written whole, then renamed) or a line of a
`.jsonl` file (flushed as it is written, so that it survives SIGKILL). Bytes are whole numbers; text
for people says GiB, through `gib`.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

JOB_FILE = "job.json"
MANIFEST_FILE = "manifest.json"
LOG_FILE = "run.log"
STEPS_FILE = "steps.jsonl"
HBM_FILE = "hbm.jsonl"
CHECKPOINTS = "checkpoints"  # a run's folder of them, each named for the steps that are in it
FAILURE_FILE = "failure.json"
PLAN_FILE = "plan.json"
FIT_FILE = "fit.json"
DIAGNOSIS_FILE = "diagnosis.json"


def gib(size_bytes: float) -> str:
    """Bytes as text for people, in GiB with two digits.

    >>> gib(33017561088)
    '30.75 GiB'
    """
    return f"{size_bytes / 2**30:.2f} GiB"


class Record(BaseModel):
    """A frozen record that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StepRecord(Record):
    """One step of training, a line of steps.jsonl. Times are seconds of wall clock.

    Attributes:
        step: counted from 0.
        loss: the step's mean loss over its updates.
        entropy: mean entropy of the policy over completion tokens, nats.
        reward_mean: mean weighted reward over all completions.
        reward_std: population standard deviation of the same.
        rewards: mean of each reward function, unweighted, by name.
        pass_at_1: share of prompts whose first completion is correct.
        pass_at_k: share of prompts with at least one correct completion of the group.
        mean_at_k: share of all completions that are correct.
        completion_tokens_mean: mean completion length, tokens, EOS counted.
        completion_tokens_max: the longest completion, tokens.
        prompt_tokens_mean: mean prompt length, tokens.
        truncated_fraction: share of completions that ended by the length limit, not by EOS.
        clipped_fraction: share of completion tokens whose ratio the objective clipped.
        grad_norm: global norm of the gradient before clipping, mean over the updates.
        learning_rate: of the step's last update.
        kl: mean k3 estimate of KL(policy || reference), nats a token; None when beta is 0.
        mismatch: mean |ln p_trainer - ln p_engine| of the completion tokens; None where the job
            does not have the trainer compute the sampling policy's logprobs.
        tokens_per_s: completion tokens over the whole step's seconds.
        seconds: of each phase by name: rollout, reward, update, hand_over, other.
        dt_s: the whole step.
        host_rss_bytes: resident set of the trainer's process at the end of the step.
        hbm_peak_bytes: the highest device's peak so far; None where the platform does not tell.
    """

    step: int
    loss: float
    entropy: float
    reward_mean: float
    reward_std: float
    rewards: dict[str, float]
    pass_at_1: float
    pass_at_k: float
    mean_at_k: float
    completion_tokens_mean: float
    completion_tokens_max: int
    prompt_tokens_mean: float
    truncated_fraction: float
    clipped_fraction: float
    grad_norm: float
    learning_rate: float
    kl: float | None
    mismatch: float | None = None
    tokens_per_s: float
    seconds: dict[str, float]
    dt_s: float
    host_rss_bytes: int
    hbm_peak_bytes: int | None


class EvalRecord(Record):
    """One evaluation, a line of steps.jsonl beside the steps.

    Attributes:
        eval_step: steps of training done before it.
        prompts: rows asked.
        group_size: completions a row.
        pass_at_1: mean share of correct completions (unbiased at any group size).
        pass_at_k: share of rows with at least one correct completion.
        reward_mean: mean weighted reward.
        dt_s: seconds.
    """

    eval_step: int
    prompts: int
    group_size: int
    pass_at_1: float
    pass_at_k: float
    reward_mean: float
    dt_s: float


class HbmSample(Record):
    """HBM of every local device at a named point of the loop, a line of hbm.jsonl.

    Attributes:
        step: the step under way; -1 before the first.
        phase: load, rollout, hand_over or update.
        in_use_bytes, peak_bytes, limit_bytes: one number a device, in `jax.local_devices()` order.
        peak_reserved_bytes: the most that programs' temporaries have taken so far; None where the
            runtime does not tell, as the next.
        largest_free_bytes: the largest free piece.
    """

    step: int
    phase: str
    in_use_bytes: list[int]
    peak_bytes: list[int]
    limit_bytes: list[int]
    peak_reserved_bytes: list[int] | None = None
    largest_free_bytes: list[int] | None = None


class Failure(Record):
    """Why the trainer stopped, failure.json, written before the exception goes on.

    Attributes:
        kind: the exception's class name.
        message: its text.
        phase: what the trainer was doing.
        step: the step under way; -1 before the first.
        traceback: as Python prints it.
    """

    kind: str
    message: str
    phase: str
    step: int
    traceback: str


class ExitStatus(Record):
    """How the trainer's process ended.

    Attributes:
        code: what the operating system or the container said, 0 to 255; 128 + N for signal N; 255
            of a lost run, whose code nobody knows.
        signal: name of the signal that ended it, "SIGKILL", else None.
        oom_killed: the kernel's OOM killer ended it (told by the container engine).
        reason: done: code 0; refused: bad job or unfit host; failed: any other code; interrupted:
            somebody asked it to stop; preempted: the cloud did, by a notice (notice.json);
            oom_killed: host memory; lost: nobody saw it end.
    """

    code: int
    signal: str | None = None
    oom_killed: bool = False
    reason: Literal["done", "refused", "failed", "interrupted", "preempted", "oom_killed", "lost"]


class Manifest(Record):
    """What ran, where, when and how it ended: manifest.json.

    Attributes:
        run: the run directory's name.
        job: the job's name.
        job_sha256: of job.json as written.
        verb: what the trainer was asked to do: train, plan, evaluate.
        state: created until the job starts, running until its exit status is known, then
            finished or lost.
        where: process or docker.
        command: argv of the trainer's process, or of the container.
        commit: of the repository, full; None outside a git checkout.
        dirty: the checkout had uncommitted changes; None outside one.
        image: image name and digest, None in a process.
        container: container id, None in a process.
        pid: of the trainer's process on this host, None in a container.
        packages: version by distribution name, of the trainer's environment.
        host: name, operating system, CPU count, RAM bytes, boot id.
        created, started, finished: UTC, ISO 8601; None while it has not happened.
        exit_status: None until the run has ended.
        log_sha256: of run.log when the run ended.
        retry_of: the run that failed before this one; None: a first attempt.
    """

    run: str
    job: str
    job_sha256: str
    verb: str
    state: Literal["created", "running", "finished", "lost"]
    where: Literal["process", "docker"]
    command: list[str]
    commit: str | None
    dirty: bool | None
    image: str | None = None
    container: str | None = None
    pid: int | None = None
    packages: dict[str, str]
    host: dict[str, str | int]
    created: str
    started: str | None = None
    finished: str | None = None
    exit_status: ExitStatus | None = None
    log_sha256: str | None = None
    retry_of: str | None = None


class Diagnosis(Record):
    """The named cause of a failed log: diagnosis.json.

    Attributes:
        cause: a category id of docs/oom.md, "success", or "unknown".
        confidence: certain: the log says so in words only this cause has; likely: it fits best;
            none: unknown.
        explanation: one sentence for a person.
        root_line: the line of the log that tells, as it stands there without colours.
        line: its number, from 1; None when no line tells.
        evidence: further line numbers that support it.
        numbers: what the log itself says, `requested_bytes`, `free_bytes`, `program`, ...
        advice: what to change, best first.
        retry: may the job run again: retryable, not_as_is, after_clean_up, after_refit.
    """

    cause: str
    confidence: Literal["certain", "likely", "none"]
    explanation: str
    root_line: str | None
    line: int | None
    evidence: list[int]
    numbers: dict[str, int | float | str]
    advice: list[str]
    retry: Literal["retryable", "not_as_is", "after_clean_up", "after_refit"]


class PlannedProgram(Record):
    """A compiled program on one chip, bytes.

    Attributes:
        arguments_bytes: its arguments, donated ones included: state and batch, or weights.
        outputs_bytes: its outputs that take no donated argument's place.
        reserved_bytes: its temporaries, which the runtime reserves whole.
        code_bytes: its instructions and constants.
        free_bytes_at_load: of the usable HBM, when all that is resident then has its place.
        code_assumed: no code was generated: code_bytes is that of a like program.
        estimated: reserved_bytes is by a formula, not by the compiler.
    """

    arguments_bytes: int
    outputs_bytes: int
    reserved_bytes: int
    code_bytes: int
    free_bytes_at_load: int
    code_assumed: bool
    estimated: bool


class PeakTensors(Record):
    """Tensors of one kind that lie in a program's temporaries when they are fullest.

    Attributes:
        program: whose temporaries.
        op: the traced operation that makes them; empty where XLA's own.
        shape: dtype and axes of one, on one chip.
        count: how many.
        size_bytes: of all of them.
    """

    program: str
    op: str
    shape: str
    count: int
    size_bytes: int


class MemFractionInterval(Record):
    """The values of engine.mem_fraction_static with which a job can run.

    Attributes:
        above: the engine refuses to start at this value and below: it keeps no KV pool then.
        up_to: the largest value with which everything else still fits; below `above` there is none.
    """

    above: float
    up_to: float


class Contiguity(Record):
    """A program for which enough is free when it is first loaded, but perhaps not in one piece.

    Attributes:
        program: that wants its temporaries and code contiguous.
        needs_bytes: of both.
        free_bytes: when it is loaded.
        untouched_bytes: of those, never used until then: they are in one piece.
        freed: by owner, what was let go of since: it may lie in many pieces.
    """

    program: str
    needs_bytes: int
    free_bytes: int
    untouched_bytes: int
    freed: dict[str, int]


class Advice(Record):
    """A change of the job that was planned, too.

    Attributes:
        settings: "key=value" each, for --set.
        saves_bytes: less on the fullest chip, at the fullest moment, than the job as it is.
        headroom_bytes: what is then left at that moment.
        price: what it costs, in time, exactness or work.
        fits: the job with it fits.
        estimated: some program of it is by a formula, not by the compiler.
    """

    settings: list[str]
    saves_bytes: int
    headroom_bytes: int
    price: str
    fits: bool
    estimated: bool


class MemoryPlan(Record):
    """Who holds the HBM of one chip, phase by phase, before anything runs: plan.json.

    Attributes:
        job: the job's name.
        job_sha256: of the job as job.json has it.
        accelerator: planned for.
        verdict: fits; does_not_load: a program, or an array, finds no room; engine_refused: the
            engine does not start with its share.
        usable_bytes: what the runtime can give out, a chip.
        peak_bytes: everything resident at the fullest moment.
        headroom_bytes: usable less peak; negative: does not fit.
        deciding_phase: the phase of the fullest moment, or that the engine's start fails in.
        deciding_owner: the largest owner in it, or the engine's.
        phases: by phase, by owner, bytes: load, rollout, hand_over, update.
        programs: by name.
        host_bytes: of the state, in the host's memory, a chip.
        kv_pool_tokens: that the engine's KV pool holds; None without an engine of another program.
        mem_fraction_interval: of the engine; None without.
        why: what fills the temporaries of the fullest program, largest first.
        fragmentation_bytes: of those temporaries, covered by nothing at their fullest moment.
        contiguity: programs that may find no piece of memory that is large enough.
        advice: best first; empty where the job fits, or nothing was found.
        assumptions: what the figures take for granted, with sources.
        step: seconds of one step, by part, by a model of its shapes: never a measurement; empty
            where the engine would not start.
        versions: of the packages that decide the figures.
    """

    job: str
    job_sha256: str
    accelerator: str
    verdict: Literal["fits", "does_not_load", "engine_refused"]
    usable_bytes: int
    peak_bytes: int
    headroom_bytes: int
    deciding_phase: str
    deciding_owner: str
    phases: dict[str, dict[str, int]]
    programs: dict[str, PlannedProgram]
    host_bytes: int
    kv_pool_tokens: int | None = None
    mem_fraction_interval: MemFractionInterval | None = None
    why: list[PeakTensors] = []
    fragmentation_bytes: int = 0
    contiguity: list[Contiguity] = []
    advice: list[Advice] = []
    assumptions: list[str] = []
    step: dict[str, float] = {}
    versions: dict[str, str] = {}


class FitChange(Record):
    """A key that `headroom fit` changed.

    Attributes:
        key: dotted, as --set has it.
        old: as the job asked.
        new: as it fits.
        why: what the change does.
        saves_bytes: of the peak, by formulas, against the same job with `old`.
        saves_s: of the modelled step, the same.
        price: what it costs, in exactness or work.
    """

    key: str
    old: JsonValue
    new: JsonValue
    why: str
    saves_bytes: int
    saves_s: float
    price: str


class FitPoint(Record):
    """Settings than which none is both faster, by the model, and smaller, by formulas."""

    settings: list[str]
    step_s: float
    peak_bytes: int
    fits: bool  # with the margin
    exact: bool  # no change alters the mathematics
    runs: bool  # the trainer of this version has the engine


class Fit(Record):
    """The fastest setting of a job that fits: fit.json. Times are a model's, never measured.

    Attributes:
        job: the job's name.
        accelerator: searched for.
        margin_bytes: to be left of a chip's usable HBM.
        changes: of the job; empty where it is best as it is, or nothing fits.
        plan: of the job with them; None where nothing fits.
        step: modelled seconds of a step, by part.
        asked_step_s: of the job as it was.
        front: fastest first.
        shortfall_bytes: of the smallest setting, margin included; None where one fits.
        smallest_accelerator: on which a setting would fit; None where one fits, or on none.
        notes: what the answer takes for granted.
    """

    job: str
    accelerator: str
    margin_bytes: int
    changes: list[FitChange] = []
    plan: MemoryPlan | None = None
    step: dict[str, float] = {}
    asked_step_s: float
    front: list[FitPoint] = []
    shortfall_bytes: int | None = None
    smallest_accelerator: str | None = None
    notes: list[str] = []
