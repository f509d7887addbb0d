"""HBM that our programs take, by the TPU compiler: `python benchmarks/hbm.py [OPTIONS]`.

Compiles for accelerators that need not be there, from jobs/sop_bs32_len1024.yaml with the settings
of each row, the very function that train.py calls. Most rows stop when the buffers are assigned;
`--full` names those that are compiled to the end (minutes each), for code size and modelled time.

  --rows NAME,...   only these            --full NAME,...|all|none   (default: 7b,decode)
  --json            a list of objects     --why      what fills the heap when it is fullest
  --limit SECONDS   for one compilation (default 900)

Needs the packages of docker/tpu.txt, and the repository's root as working folder or on PYTHONPATH.
"""

import json
import os
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from jobs import spec
from jobs.records import gib
from jobs.spec import Job
from trainer.ahead import CompileError, compile_ahead, described_devices
from trainer.architecture import ARCHITECTURES
from trainer.buffers import ProgramMemory
from trainer.libtpu import SETTINGS
from trainer.mesh import make_mesh
from trainer.refusal import Refusal
from trainer.rollout.programs import lowered_sampler
from trainer.steptime import step_time
from trainer.update.program import make_update

GIB = 2**30
JOB = Path(__file__).parents[1] / "jobs" / "sop_bs32_len1024.yaml"
# Of every row: ours, not the SOP's.
OURS = (
    "update.design=layer_major",
    "update.clip=per_layer",
    "update.layers=stacked",
    "train.micro_batch_size=null",
    "rollout.engine=naive",
)
FITS = None  # a bar: no more than the accelerator's usable HBM


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: for --rows.
        says: what is compiled.
        settings: on top of OURS.
        prototype: GiB a chip of the first prototype; None where it had no such row.
        bar: GiB a chip that must be reached; FITS.
        program: update or decode.
        code_counts: in what the bar holds; the prototype's figures for v5e-8 and v6e-8 have none.
    """

    name: str
    says: str
    settings: tuple[str, ...]
    prototype: float | None
    bar: float | None
    program: str = "update"
    code_counts: bool = True


_HOST = "update.host_offload=[momentum,lo]"
_14B, _32B = "model=Qwen/Qwen2.5-14B-Instruct", "model=Qwen/Qwen2.5-32B-Instruct"
_GROUP = (
    "rollout.prompts_per_step=4",
    "rollout.group_size=8",
    "update.completions_per_row=group",
)
_SOP = (
    "update.design=reference",
    "update.clip=global",
    "update.layers=per_layer",
    "train.micro_batch_size=4",
)
ROWS = (
    Row("7b", "7B, Lion, bf16 moments, splash, stacked", (), 14.83, 14.9),
    Row("group", "7B, 4 prompts x 8 completions, each prompt once", _GROUP, None, 14.9),
    Row("global", "7B, exact global clip", ("update.clip=global",), 18.45, 18.5),
    Row("per_layer", "7B, one array a layer", ("update.layers=per_layer",), 16.47, 16.5),
    Row("host", "7B, momentum and lo on the host", (_HOST,), 8.97, 9.0),
    Row("128", "7B, 128 sequences", ("rollout.prompts_per_step=128",), 22.60, FITS),
    Row("8192", "7B, completion 8192", ("rollout.max_completion_tokens=8192",), 28.14, FITS),
    Row("14b", "14B", (_14B,), 28.43, FITS),
    Row("14b_int8", "14B, 8-bit Lion", (_14B, "update.moments=int8"), 24.93, FITS),
    Row("32b_host", "32B, momentum and lo on the host", (_32B, _HOST), 28.27, FITS),
    Row("v5e-8", "7B", ("accelerator=v5e-8",), 8.14, 8.14, code_counts=False),
    Row("v6e-8", "7B", ("accelerator=v6e-8",), 8.14, 8.14, code_counts=False),
    Row("v4-16", "7B", ("accelerator=v4-16",), 8.21, 8.21),
    Row("v5p-8", "7B", ("accelerator=v5p-8",), 14.83, 14.83),
    Row("sop", "7B, the SOP's program: plain autodiff, f32 state", _SOP, 29.19, None),
    Row("decode", "7B, naive sampler, 32 sequences", (), 4.44, 5.0, program="decode"),
)
# What the first row's time, and a token of the decode row, must reach.
COMPUTE_S, ICI_GIB, TOKEN_MS = 3.6, 40.0, 3.6


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row's figures, GiB a chip; None where no code was generated.

    Attributes:
        row: its name.
        accelerator: what it was compiled for.
        total_gib: arguments, outputs, temporaries and code.
        arguments_gib: donated ones included.
        outputs_gib: those that take no argument's place.
        temporaries_gib: the heap that the runtime reserves.
        code_gib: instructions and constants.
        host_gib: in the host's memory, not in the total.
        modelled_compute_s: by the compiler's estimated cycles (trainer/steptime.py).
        ici_gib: received by a chip.
        token_ms: modelled compute of one token of all sequences; the decode row's.
        must_reach_gib: the bar.
        prototype_gib: the first prototype's total.
        passed: all bars of the row.
        seconds: that the row took here.
        failure: why there are no figures.
    """

    row: str
    accelerator: str
    total_gib: float | None = None
    arguments_gib: float | None = None
    outputs_gib: float | None = None
    temporaries_gib: float | None = None
    code_gib: float | None = None
    host_gib: float | None = None
    modelled_compute_s: float | None = None
    ici_gib: float | None = None
    token_ms: float | None = None
    must_reach_gib: float
    prototype_gib: float | None
    passed: bool = False
    seconds: float = 0.0
    failure: str | None = None


def lowered(job: Job, program: str) -> Any:
    """The row's program, lowered for devices that are only described."""
    architecture = ARCHITECTURES[job.model.lower()]
    mesh = make_mesh(job, described_devices(job.target))
    if program == "decode":
        return lowered_sampler(job, architecture, mesh)
    return make_update(job, architecture, mesh).lower()


def measure(row: Row, *, full: bool, limit_s: float, why: bool) -> Result:
    """Compile a row and read its figures; a failure is a result, too."""
    job = spec.load(JOB, overrides=[*OURS, *row.settings])
    usable = job.target.usable_hbm_bytes / GIB
    known: dict[str, Any] = {
        "row": row.name,
        "accelerator": job.accelerator,
        "must_reach_gib": usable if row.bar is FITS else row.bar,
        "prototype_gib": row.prototype,
    }
    started = time.monotonic()
    try:
        compiled = compile_ahead(lowered(job, row.program), code=full, limit_s=limit_s)
    except (CompileError, Refusal) as error:
        return Result(**known, failure=str(error), seconds=time.monotonic() - started)
    memory = compiled.memory
    if why:
        _print_peak(row, memory)
    known |= {
        "total_gib": memory.total_bytes / GIB,
        "arguments_gib": memory.arguments_bytes / GIB,
        "outputs_gib": memory.outputs_bytes / GIB,
        "temporaries_gib": memory.reserved_bytes / GIB,
        "code_gib": None if memory.code_bytes is None else memory.code_bytes / GIB,
        "host_gib": memory.host_bytes / GIB,
    }
    counted = True
    if compiled.hlo is not None:
        modelled = step_time(compiled.hlo, job.target)
        known |= {
            "modelled_compute_s": modelled.compute_s,
            "ici_gib": modelled.ici_bytes / GIB,
        }
        counted = not modelled.unknown_loops  # whose time would be counted once
        if row.program == "decode":
            # The decode loop is the longest one at the outermost level; its bound is max_tokens.
            loop = max(modelled.loops, key=lambda one: one.compute_s)
            if loop.trips:
                known["token_ms"] = loop.compute_s / loop.trips * 1e3
    held = counted and passed(row, known)
    return Result(**known, passed=held, seconds=time.monotonic() - started)


def passed(row: Row, known: dict[str, Any]) -> bool:
    """Every bar that the figures at hand can be held to."""
    code = 0.0 if row.code_counts else known["code_gib"] or 0.0
    bars = [known["total_gib"] - code <= known["must_reach_gib"]]
    if row.name == "7b" and known.get("modelled_compute_s") is not None:
        bars += [known["modelled_compute_s"] <= COMPUTE_S, known["ici_gib"] <= ICI_GIB]
    if known.get("token_ms") is not None:
        bars.append(known["token_ms"] <= TOKEN_MS)
    return all(bars)


def _print_peak(row: Row, memory: ProgramMemory) -> None:
    """What fills the heap, on stderr: the table goes to stdout."""
    print(f"  {row.name}: the heap of {gib(memory.reserved_bytes)} at its fullest", file=sys.stderr)
    for kind in memory.peak[:12]:
        print(
            f"    {kind.size_bytes / GIB:7.3f} GiB {kind.count:4d} x {kind.shape[:40]:40} "
            f"{kind.op[-90:]}",
            file=sys.stderr,
        )
    print(f"    {memory.fragmentation_bytes / GIB:7.3f} GiB fragmentation", file=sys.stderr)


def table(results: Iterable[Result]) -> str:
    """The results for people, as Markdown."""
    says = {row.name: row.says for row in ROWS}
    titles = (
        "arguments,outputs,temporaries,code,total,prototype,must reach,compute s,ICI,ms a token"
    )
    head = ["row", "program", "accelerator", *titles.split(","), "verdict"]
    lines = [head, ["---"] * len(head)]
    for r in results:
        figures = [r.arguments_gib, r.outputs_gib, r.temporaries_gib, r.code_gib, r.total_gib]
        figures += [r.prototype_gib, r.must_reach_gib, r.modelled_compute_s, r.ici_gib, r.token_ms]
        cells = ["" if value is None else f"{value:.2f}" for value in figures]
        verdict = r.failure or ("ok" if r.passed else "MISSED")
        lines.append([r.row, says[r.row], r.accelerator, *cells, verdict])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _options(argv: list[str]) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(row.name for row in ROWS))
    parser.add_argument("--full", default="7b,decode")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--why", action="store_true")
    parser.add_argument("--limit", type=float, default=900.0)
    options = parser.parse_args(argv)
    names = [row.name for row in ROWS]
    options.rows = options.rows.split(",")
    whole = {"all": names, "none": []}
    options.full = whole[options.full] if options.full in whole else options.full.split(",")
    unknown = {*options.rows, *options.full} - set(names)
    if unknown:
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    return options


def main(argv: list[str]) -> int:
    """Print the table; 0 when every row is within its bars."""
    options = _options(argv)

    os.environ.update(SETTINGS)  # libtpu reads them when it is first asked, JAX its own on import
    jax.config.update("jax_platforms", "cpu")
    results: list[Result] = []
    for row in ROWS:
        if row.name not in options.rows:
            continue
        print(f"{row.name}: {row.says} ...", file=sys.stderr, flush=True)
        result = measure(row, full=row.name in options.full, limit_s=options.limit, why=options.why)
        told = result.failure or f"{result.total_gib:.2f} GiB"
        print(f"{row.name}: {told} ({result.seconds:.0f} s)", file=sys.stderr, flush=True)
        results.append(result)
    print(json.dumps([asdict(r) for r in results], indent=1) if options.json else table(results))
    return 0 if all(r.passed for r in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
