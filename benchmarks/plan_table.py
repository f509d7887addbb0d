"""The table of docs/plan.md, predicted against hardware: `python -m benchmarks.plan_table`.

Plans each row's job as `headroom plan` does, by the TPU compiler (minutes the first time; what was
compiled is kept), and rewrites the part of docs/plan.md between its two marks. Figures of hardware
are kept here and nowhere else.

  --print   to stdout, docs/plan.md stays as it is
"""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs import spec
from jobs.records import MemoryPlan
from trainer.libtpu import SETTINGS
from trainer.plan import Options, memory_of, plan

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plan.md"
BEGINS, ENDS = "<!-- made by `make plan-table` -->", "<!-- end of plan-table -->"
GIB = 2**30
LIMIT_S = 1200.0  # for one job


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure that hardware told, too.

    Attributes:
        what: it is.
        job: a file of jobs/, without its ending.
        predicted: reads it from the plan.
        hardware: what was printed or happened.
        settings: on top of the job.
    """

    what: str
    job: str
    predicted: Callable[[MemoryPlan], str]
    hardware: str
    settings: tuple[str, ...] = ()


def free(made: MemoryPlan) -> str:
    """What the update finds free, GiB."""
    return f"{made.programs['update'].free_bytes_at_load / GIB:.2f}"


def temporaries(made: MemoryPlan) -> str:
    """What the update reserves, GiB."""
    return f"{made.programs['update'].reserved_bytes / GIB:.2f}"


def verdict(made: MemoryPlan) -> str:
    """The verdict and its number."""
    if made.verdict == "engine_refused" and made.mem_fraction_interval is not None:
        return f"engine refuses, above {made.mem_fraction_interval.above:.3f}"
    if made.verdict == "fits":
        return f"fits, {made.headroom_bytes / GIB:.2f} to spare"
    return f"does not load, short by {-made.headroom_bytes / GIB:.2f}"


def at_2048(sequences: int) -> tuple[str, ...]:
    """The SOP's repository's sweep on v4-16: prompts of 2048 tokens and a bucket of 128."""
    return (
        "accelerator=v4-16",
        "rollout.engine=naive",
        f"rollout.prompts_per_step={sequences}",
        f"train.micro_batch_size={sequences}",
        "rollout.max_prompt_tokens=2048",
        "rollout.max_completion_tokens=128",
    )


ROWS = (
    Row(
        what="free beside state, engine and KV pool",
        job="sop_bs32_len1024",
        predicted=free,
        hardware="5.68",
    ),
    Row(
        what="the same, KV pool of 1536 tokens",
        job="sop_bs32_len1024_kv1536",
        predicted=free,
        hardware="5.90",
    ),
    Row(
        what="temporaries of the update",
        job="sop_bs32_len1024",
        predicted=temporaries,
        hardware="7.82, the SOP's own program",
    ),
    Row(
        what="verdict",
        job="sop_bs32_len1024",
        predicted=verdict,
        hardware="did not load, short by 2.14",
    ),
    Row(
        what="verdict",
        job="sop_bs32_len1024_kv1536",
        predicted=verdict,
        hardware="did not load, short by 1.92",
    ),
    Row(
        what="verdict, share 0.35",
        job="sop_bs32_len1024_mem035",
        predicted=verdict,
        hardware="refused; 0.4 was taken",
    ),
    Row(what="verdict", job="sop_smoke", predicted=verdict, hardware="ran"),
    Row(
        what="verdict, v4-16, 2048 + 128 tokens, 8 sequences",
        job="sop_bs32_len1024",
        predicted=verdict,
        hardware="ran",
        settings=at_2048(8),
    ),
    Row(
        what="the same, 16 sequences",
        job="sop_bs32_len1024",
        predicted=verdict,
        hardware="out of memory, the SOP's own program",
        settings=at_2048(16),
    ),
)


def line(row: Row, predicted: str) -> str:
    """A row of the table."""
    return f"| {row.what} | {row.job} | {predicted} | {row.hardware} |"


def table(rows: Sequence[Row], planned: Callable[[Row], MemoryPlan]) -> str:
    """The whole table."""
    head = ["| what | job | predicted | hardware |", "|---|---|---|---|"]
    return "\n".join([*head, *(line(row, row.predicted(planned(row))) for row in rows)])


def rewritten(page: str, made: str) -> str:
    """The page with another table between its marks.

    Raises:
        ValueError: it does not have both marks once, in order.
    """
    before, begins, rest = page.partition(BEGINS)
    _, ends, after = rest.partition(ENDS)
    if not begins or not ends or BEGINS in rest or ENDS in after:
        raise ValueError(f"docs/plan.md must have {BEGINS!r} and then {ENDS!r}, each once")
    return f"{before}{BEGINS}\n{made}\n{ENDS}{after}"


def planned(row: Row) -> MemoryPlan:
    """The row's job by the compiler."""
    job = spec.load(ROOT / "jobs" / f"{row.job}.yaml", overrides=row.settings)
    options = Options(advice=False, limit_s=LIMIT_S)
    memory = memory_of(quick=False, limit_s=LIMIT_S, build=options.build)
    made = plan(job, options, memory)
    print(line(row, row.predicted(made)), file=sys.stderr, flush=True)
    return made


def main(argv: Sequence[str]) -> int:
    """Rewrite the page, or print the table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", dest="only_print")
    options = parser.parse_args(argv)
    os.environ.update(SETTINGS)  # libtpu reads them when it is first asked, JAX its own on import
    made = table(ROWS, planned)
    if options.only_print:
        print(made)
    else:
        PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
