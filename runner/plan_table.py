"""A memory plan for people: ledger, programs, why, what would help, and the verdict."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.records import Contiguity, MemoryPlan, gib

_VERDICTS = {
    "fits": ("fits", "bold green"),
    "does_not_load": ("does not fit", "bold red"),
    "engine_refused": ("the engine refuses to start", "bold red"),
}
_TENSORS = 8  # of `why` that are shown; --json has them all
_OP_WIDTH = 60


def print_plan(plan: MemoryPlan, console: Console) -> None:
    """The plan of one job."""
    console.print(_ledger(plan))
    console.print(_programs(plan))
    for line in _tensors(plan):
        console.print(line, highlight=False, markup=False)
    for one in plan.contiguity:
        console.print(doubt(one), highlight=False, markup=False)
    for note in plan.assumptions:
        console.print(f"assumed: {note}", style="dim", highlight=False, markup=False)
    if plan.step:
        console.print(step_line(plan), highlight=False, markup=False)
    for line in _advice(plan):
        console.print(line, highlight=False, markup=False)
    said, style = _VERDICTS[plan.verdict]
    console.print(Text(f"{plan.job} on {plan.accelerator}: {said}. ", style=style), end="")
    console.print(reason(plan), highlight=False, markup=False)


def print_what_if(plans: Sequence[MemoryPlan], console: Console) -> None:
    """One line for each accelerator."""
    table = Table(title=f"{plans[0].job if plans else 'nothing'}: GiB a chip", title_justify="left")
    numbers = ("usable", "peak", "left", "step s (model)")
    for name in ("accelerator", *numbers, "decided by", "verdict"):
        table.add_column(name, justify="right" if name in numbers else "left")
    for plan in plans:
        said, style = _VERDICTS[plan.verdict]
        table.add_row(
            plan.accelerator,
            _cell(plan.usable_bytes),
            _cell(plan.peak_bytes),
            _cell(plan.headroom_bytes),
            f"{sum(plan.step.values()):.1f}" if plan.step else "",
            f"{plan.deciding_phase}: {plan.deciding_owner}",
            Text(said, style=style),
        )
    console.print(table)


def step_line(plan: MemoryPlan) -> str:
    """A step's modelled seconds, longest part first; parts under a hundredth are left out."""
    whole = sum(plan.step.values())
    parts = sorted(plan.step.items(), key=lambda part: -part[1])
    told = [f"{name.removesuffix('_s')} {s:.2f}" for name, s in parts if s >= whole / 100]
    return f"a step, by a model and not measured: {whole:.1f} s ({', '.join(told)})"


def doubt(found: Contiguity) -> str:
    """What may go wrong though enough is free."""
    freed = ", ".join(f"{owner} {gib(size)}" for owner, size in found.freed.items())
    return (
        f"perhaps not in one piece: {found.program} wants {gib(found.needs_bytes)} contiguous; of "
        f"the {gib(found.free_bytes)} free {gib(found.untouched_bytes)} were never used, the rest "
        f"was freed before it loads and may lie in pieces ({freed})"
    )


def reason(plan: MemoryPlan) -> str:
    """One sentence with the numbers of the verdict."""
    interval = plan.mem_fraction_interval
    if plan.verdict == "engine_refused" and interval is not None:
        text = (
            f"Its share leaves nothing for a KV pool: engine.mem_fraction_static must be above "
            f"{interval.above:.3f}"
        )
        if interval.up_to <= interval.above:
            return f"{text}, and then the update has no room"
        return f"{text} and at most {interval.up_to:.3f}"
    usable, phase = gib(plan.usable_bytes), plan.deciding_phase
    if plan.verdict == "fits":
        return (
            f"At most {gib(plan.peak_bytes)} of {usable} a chip, in {phase}: "
            f"{gib(plan.headroom_bytes)} to spare"
        )
    text = f"{gib(plan.peak_bytes)} of {usable} a chip in {phase}: short by "
    text += gib(-plan.headroom_bytes)
    for name, program in plan.programs.items():
        needs = program.reserved_bytes + program.outputs_bytes + program.code_bytes
        if needs > program.free_bytes_at_load:
            text += f"; {name} needs {gib(needs)} and finds {gib(program.free_bytes_at_load)} free"
    return text


def _ledger(plan: MemoryPlan) -> Table:
    """Owners down, phases across."""
    table = Table(title="HBM of one chip, GiB", title_justify="left")
    table.add_column("owner")
    for phase in plan.phases:
        table.add_column(phase.replace("_", "-"), justify="right")
    owners = dict.fromkeys(owner for phase in plan.phases.values() for owner in phase)
    for owner in owners:
        sizes = [phase.get(owner) for phase in plan.phases.values()]
        if any(sizes):
            table.add_row(owner, *["" if size is None else _cell(size) for size in sizes])
    table.add_section()
    totals = [sum(phase.values()) for phase in plan.phases.values()]
    table.add_row("all", *map(_cell, totals), style="bold")
    table.add_row("usable", *[_cell(plan.usable_bytes) for _ in totals])
    left = [plan.usable_bytes - total for total in totals]
    table.add_row(
        "left", *[Text(_cell(size), style="red" if size < 0 else "green") for size in left]
    )
    return table


def _programs(plan: MemoryPlan) -> Table:
    table = Table(title="Programs, GiB a chip", title_justify="left")
    for name in ("program", "arguments", "free when loaded", "temporaries", "outputs", "code", ""):
        table.add_column(name, justify="left" if name in ("program", "") else "right")
    for name, program in plan.programs.items():
        needs = program.reserved_bytes + program.outputs_bytes + program.code_bytes
        left = program.free_bytes_at_load - needs
        table.add_row(
            name,
            _cell(program.arguments_bytes),
            _cell(program.free_bytes_at_load),
            _cell(program.reserved_bytes) + (" est." if program.estimated else ""),
            _cell(program.outputs_bytes),
            _cell(program.code_bytes) + (" ass." if program.code_assumed else ""),
            "loads" if left >= 0 else f"short by {gib(-left)}",
        )
    return table


def _tensors(plan: MemoryPlan) -> Iterable[str]:
    if not plan.why:
        return
    yield f"what fills the temporaries of {plan.why[0].program} when they are fullest:"
    for kind in plan.why[:_TENSORS]:
        op = kind.op if len(kind.op) <= _OP_WIDTH else f"...{kind.op[-_OP_WIDTH:]}"
        yield f"  {gib(kind.size_bytes):>10}  {kind.count:4d} x {kind.shape}  {op}"
    rest = sum(kind.size_bytes for kind in plan.why[_TENSORS:])
    if rest:
        yield f"  {gib(rest):>10}  in {len(plan.why) - _TENSORS} smaller kinds"
    yield f"  {gib(plan.fragmentation_bytes):>10}  fragmentation"


def _advice(plan: MemoryPlan) -> Iterable[str]:
    for one in plan.advice:
        settings = " ".join(f"--set {setting}" for setting in one.settings)
        how = "estimated" if one.estimated else "planned, too"
        then = "fits" if one.fits else "does not fit either"
        yield (
            f"advice ({how}): {settings}\n"
            f"  saves {gib(one.saves_bytes)}, then {then} with {gib(one.headroom_bytes)} left; "
            f"price: {one.price}"
        )


def _cell(size_bytes: int) -> str:
    return gib(size_bytes).removesuffix(" GiB")
