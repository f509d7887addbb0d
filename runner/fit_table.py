"""What `headroom fit` found, for people: changes, front, and the answer."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.records import Fit, FitPoint, gib


def print_fit(fit: Fit, console: Console) -> None:
    """The answer, and what it was chosen from."""
    console.print(_front(fit))
    if fit.changes:
        console.print(_changes(fit))
    for note in fit.notes:
        console.print(f"assumed: {note}", style="dim", highlight=False, markup=False)
    style = "bold red" if fit.plan is None else "bold green"
    said = "nothing fits. " if fit.plan is None else "fits. "
    console.print(Text(f"{fit.job} on {fit.accelerator}: {said}", style=style), end="")
    console.print(answer(fit), highlight=False, markup=False)


def answer(fit: Fit) -> str:
    """One sentence with the numbers."""
    margin = gib(fit.margin_bytes)
    if fit.plan is not None:
        left, usable = gib(fit.plan.headroom_bytes), gib(fit.plan.usable_bytes)
        parts = ", ".join(f"{name[:-2]} {s:.2f}" for name, s in fit.step.items() if s >= 0.005)
        estimated = any(program.estimated for program in fit.plan.programs.values())
        how = "by formulas" if estimated else "by the compiler"
        return (
            f"{left} of {usable} a chip left {how} ({margin} were to be); modelled, not measured: "
            f"{sum(fit.step.values()):.2f} s a step ({parts}), {fit.asked_step_s:.2f} as asked"
        )
    short = gib(fit.shortfall_bytes or 0)
    where = (
        f"the smallest accelerator on which it would: {fit.smallest_accelerator}"
        if fit.smallest_accelerator
        else "nor on any larger accelerator that is known"
    )
    return f"The smallest setting is short by {short}, {margin} to be left; {where}"


def _changes(fit: Fit) -> Table:
    table = Table(title="Changes", title_justify="left")
    for name in ("key", "was", "is", "GiB saved", "s saved", "what it does", "price"):
        table.add_column(name, justify="right" if "saved" in name else "left")
    for one in fit.changes:
        saved = gib(one.saves_bytes).removesuffix(" GiB")
        cells = (one.key, str(one.old), str(one.new), saved, f"{one.saves_s:.2f}")
        table.add_row(*map(Text, (*cells, one.why, one.price)))
    return table


def _front(fit: Fit) -> Table:
    """None of them is both slower and larger than another."""
    table = Table(title="Faster or smaller: by model and formulas", title_justify="left")
    for name in ("s a step", "peak GiB", "fits", "", "settings"):
        table.add_column(name, justify="right" if name in ("s a step", "peak GiB") else "left")
    for one in fit.front:
        table.add_row(
            f"{one.step_s:.2f}",
            gib(one.peak_bytes).removesuffix(" GiB"),
            Text("yes" if one.fits else "no", style="green" if one.fits else "red"),
            _but(one),
            Text(" ".join(one.settings) or "as asked"),
        )
    return table


def _but(point: FitPoint) -> str:
    said = [] if point.exact else ["other mathematics"]
    return ", ".join(said if point.runs else [*said, "does not run in this version"])
