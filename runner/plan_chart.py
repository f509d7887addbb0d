"""A memory plan as a picture: HBM of one chip by phase and owner, and what there is of it."""

import html
import io
from pathlib import Path
from typing import Any

from jobs.records import MemoryPlan, gib
from runner.archive import write_whole
from runner.plan_table import reason

_GIB = 2**30
# Below this share of the chip an owner is drawn, but has no room for its name.
_NAMED = 0.03


class NoPicturesError(Exception):
    """The package that draws is not here; the message says what would help."""


def write_png(plan: MemoryPlan, path: Path) -> None:
    """Write the picture as PNG, whole or not at all.

    Raises:
        NoPicturesError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    write_whole(path, _drawn(plan, "png"))


def write_html(plan: MemoryPlan, path: Path) -> None:
    """Write one page that needs nothing else: the verdict, the picture, every number.

    Raises:
        NoPicturesError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    picture = _drawn(plan, "svg").decode()
    title = html.escape(f"{plan.job} on {plan.accelerator}")
    rows = "\n".join(
        f"<tr><td>{html.escape(phase)}</td><td>{html.escape(owner)}</td>"
        f"<td>{size / _GIB:.3f}</td></tr>"
        for phase, owners in plan.phases.items()
        for owner, size in owners.items()
    )
    notes = "\n".join(f"<li>{html.escape(note)}</li>" for note in plan.assumptions)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body{font-family:sans-serif;max-width:60em;margin:2em auto}"
        "td,th{padding:0 1em 0 0;text-align:left}td:last-child{text-align:right}</style></head>\n"
        f"<body><h1>{title}</h1>\n<p><b>{plan.verdict}</b>. {html.escape(reason(plan))}</p>\n"
        f"{picture[picture.index('<svg') :]}\n"
        f"<table><tr><th>phase</th><th>owner</th><th>GiB a chip</th></tr>\n{rows}\n</table>\n"
        f"<ul>{notes}</ul></body></html>\n"
    )
    write_whole(path, page.encode())


def _drawn(plan: MemoryPlan, kind: str) -> bytes:
    """The picture's bytes, the same for the same plan."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 - only pictures need it
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise NoPicturesError(
            "--png and --html draw with matplotlib, which is not installed here: "
            "pip install matplotlib"
        ) from error
    mpl.rcParams["svg.hashsalt"] = plan.job_sha256
    figure: Any = Figure(figsize=(8, 4.8))
    axes = figure.subplots()
    owners = list(dict.fromkeys(name for phase in plan.phases.values() for name in phase))
    colours = mpl.colormaps["tab20"]
    usable = plan.usable_bytes / _GIB
    for at, phase in enumerate(plan.phases.values()):
        bottom = 0.0
        for owner, size in phase.items():
            height = size / _GIB
            axes.bar(at, height, bottom=bottom, color=colours(owners.index(owner)), width=0.7)
            if height > _NAMED * usable:
                text = f"{owner} {height:.2f}"
                axes.text(at, bottom + height / 2, text, ha="center", va="center", fontsize=7)
            bottom += height
    axes.axhline(usable, color="red", label=f"usable: {gib(plan.usable_bytes)}")
    axes.set_xticks(range(len(plan.phases)), list(plan.phases))
    axes.set_ylabel("GiB a chip")
    axes.set_title(f"{plan.job} on {plan.accelerator}: {plan.verdict}")
    axes.set_ylim(0, 1.12 * max(usable, plan.peak_bytes / _GIB))
    axes.legend(loc="upper left")
    file = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(file, format=kind, dpi=120, bbox_inches="tight", metadata=metadata)
    return file.getvalue()
