"""The memory of a job's programs by the TPU compiler, kept in the job's cache folder.

What was compiled once is found again by everything that decides it: the parts of the job that the
program reads, the model's shape, this code and the compiler's version. Finding it needs no JAX.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jobs.records import gib
from jobs.spec import Job
from trainer.architecture import Architecture
from trainer.budget import EngineBuild
from trainer.buffers import ProgramMemory, Tensors
from trainer.estimate import Program
from trainer.ledger import PlanError
from trainer.libtpu import versions
from trainer.phases import residents

_ROOT = Path(__file__).resolve().parents[1]
# Parts and keys of a job that no program's memory depends on.
_NOT_READ = {
    "name", "steps", "seed", "system_prompt", "eval_every_steps", "cache_dir", "checkpoint", "data",
    "engine", "reward", "evaluation", "metrics", "container", "model",
}  # fmt: skip
_NOT_READ_OF_ROLLOUT = {"engine", "chunk_size"}
_NOT_READ_OF_ENGINE = {"residency", "log_level", "load_format", "disable_precompile"}
_OF_THE_UPDATE = ("update", "logprobs", "reference_logprobs")  # read nothing of an engine

# They count and say; no program is made of them.
PLANNING = frozenset(
    {
        "budget.py", "calibration.py", "choices.py", "contiguity.py", "estimate.py", "fit.py",
        "ledger.py", "phases.py", "plan.py", "records.py", "remedies.py", "timemodel.py",
    }
)  # fmt: skip

Compile = Callable[[Job, Architecture, str, float], ProgramMemory]
Say = Callable[[str], None]


class TooLongError(PlanError):
    """The time for a plan is up."""


@dataclass
class Programs:
    """Gives programs' memory: from the cache, else by the compiler.

    Attributes:
        say: is told a line for each program.
        until: of `time.monotonic`, when the plan must be done.
        compile_one: compiles a job's program and gives its memory within seconds.
        build: how sglang-jax's embedding, head and biases lie.
        versions: of the compiler.
    """

    say: Say
    until: float
    compile_one: "Compile"
    build: EngineBuild = "sharded"
    versions: dict[str, str] = field(default_factory=versions)

    def of(self, job: Job, architecture: Architecture, name: str) -> Program:
        """The memory of one program.

        Raises:
            PlanError: the compiler is not here, or the time is up.
            CompileError: it refused, or aborted.
        """
        file = Path(job.cache_dir) / "plan" / f"{self._key(job, architecture, name)}.json"
        known = _read(file)
        if known is not None:
            self.say(f"{name} on {job.accelerator}: {gib(known.reserved_bytes)} (known)")
            return Program(memory=known, estimated=False)
        if "libtpu" not in self.versions:
            raise PlanError(
                "the TPU compiler is not here (no package libtpu): install docker/tpu.txt, or plan "
                "by arithmetic alone, --quick"
            )
        left = self.until - time.monotonic()
        if left <= 0:
            raise TooLongError(
                f"the time is up before {name} is compiled: raise --limit; what is compiled so far "
                f"is kept in {file.parent}"
            )
        self.say(f"{name} on {job.accelerator}: compiling ...")
        began = time.monotonic()
        memory = self.compile_one(job, architecture, name, left)
        self.say(
            f"{name} on {job.accelerator}: {gib(memory.reserved_bytes)} of temporaries "
            f"({time.monotonic() - began:.0f} s)"
        )
        _write(file, memory)
        return Program(memory=memory, estimated=False)

    def _key(self, job: Job, architecture: Architecture, name: str) -> str:
        read = job.model_dump(mode="json", exclude=_NOT_READ)
        read["rollout"] = {
            key: value for key, value in read["rollout"].items() if key not in _NOT_READ_OF_ROLLOUT
        }
        said = [name, read, asdict(architecture), self.versions, sources_hash()]
        if job.rollout.engine != "naive" and name not in _OF_THE_UPDATE:
            held = residents(job, architecture, build=self.build).engine
            settings = job.engine.model_dump(mode="json", exclude=_NOT_READ_OF_ENGINE)
            said += [settings, job.rollout.chunk_size, asdict(held) if held else None]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def sources_hash() -> str:
    """Of the code that makes the programs: the trainer but for planning, and what a job is."""
    found = hashlib.sha256()
    for path in sorted([*_ROOT.glob("trainer/**/*.py"), *_ROOT.glob("jobs/*.py")]):
        if path.name in PLANNING:
            continue
        found.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def _read(file: Path) -> ProgramMemory | None:
    """What was kept; None where nothing is, or nothing that can be read."""
    try:
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        peak = tuple(Tensors(**kind) for kind in kept.pop("peak"))
        return ProgramMemory(**kept, peak=peak)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(file: Path, memory: ProgramMemory) -> None:
    """Whole or not at all: another plan may write the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{time.monotonic_ns()}")
    beside.write_text(json.dumps(asdict(memory)), encoding="utf-8")
    beside.replace(file)


def compile_program(
    job: Job, architecture: Architecture, name: str, limit_s: float, *, build: EngineBuild
) -> ProgramMemory:
    """Lower the very program that `train.py` runs, and compile it as far as its buffers.

    Raises:
        CompileError: the compiler refused, aborted or took too long.
    """
    # Imported here: what is known already needs neither JAX nor the compiler.
    from trainer.ahead import program_memory  # noqa: PLC0415
    from trainer.lowering import lowered  # noqa: PLC0415

    began = time.monotonic()
    made = lowered(job, architecture, name, build=build)
    return program_memory(made, limit_s=max(1.0, limit_s - (time.monotonic() - began)))
