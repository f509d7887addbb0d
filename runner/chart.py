"""Pictures of records: HBM of one chip by phase and owner; the steps of a run. Drawn by matplotlib.

A picture for a page is SVG without colours or fonts of its own: it names those of the page
(`COLOURS`), so that one picture is right in light, in dark and on paper.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal
from xml.etree import ElementTree

from jobs.records import MemoryPlan, StepRecord, gib

_GIB = 2**30
# Name -> on light paper, on dark.
COLOURS = {
    "ink": ("#1b2027", "#e7eaee"),
    "muted": ("#59626e", "#a3adba"),
    "grid": ("#dde1e6", "#343b45"),
    "paper": ("#ffffff", "#15181d"),
    "limit": ("#c3271b", "#ff7a6b"),
    "parameters": ("#3567ad", "#5b8fd9"),
    "moments": ("#7fb0dc", "#9cc6ea"),
    "accumulators": ("#8a78bd", "#a797d6"),
    "engine": ("#2a8f84", "#43b3a6"),
    "kv": ("#93b977", "#a9cd8d"),
    "temporaries": ("#e3a136", "#ebb454"),
    "code": ("#bf6f58", "#d58a74"),
    "other": ("#8a929c", "#9099a4"),
}
# What an owner's or a phase's name contains -> its colour. The first that is found counts.
_KINDS = {
    "outputs": "other",
    "temporaries": "temporaries",
    "code": "code",
    "accumulators": "accumulators",
    "moments": "moments",
    "weights": "engine",
    "KV pool": "kv",
    "parameters": "parameters",
    "rollout": "engine",
    "update": "temporaries",
    "hand_over": "parameters",
    "reward": "kv",
}
_LEGEND = {"engine": "engine weights", "kv": "KV pool"}  # where the colour's name is not enough
_WIDTH = 5.0  # inches, 72 units of an SVG each: text stays legible on a telephone
_POINTS = 100  # of a line; more are averaged
_SVG = "http://www.w3.org/2000/svg"
_NUMBER = re.compile(r"-?\d+\.\d+")


class NoPicturesError(Exception):
    """The package that draws is not here; the message says what would help."""


def kind(name: str) -> str:
    """The name of the colour of an owner of HBM, or of a phase's seconds.

    >>> kind("update temporaries (estimated)"), kind("engine weights"), kind("batch")
    ('temporaries', 'engine', 'other')
    """
    return next((colour for part, colour in _KINDS.items() if part in name), "other")


def plan_png(plan: MemoryPlan) -> bytes:
    """The ledger as PNG, with a legend; the same bytes for the same plan.

    Raises:
        NoPicturesError: matplotlib is not installed.
    """
    figure = _figure(8.0, 3.6)
    axes = figure.add_axes((0.11, 0.24, 0.86, 0.6))
    _ledger(axes, plan, _on_paper)
    axes.set_title(
        _plain(f"{plan.job} on {plan.accelerator}: {plan.verdict}; GiB a chip"),
        loc="left", pad=18, parse_math=False,
    )  # fmt: skip
    figure.legend(loc="lower center", ncols=5, frameon=False)
    return _saved(figure, "png")


def plan_svg(plan: MemoryPlan) -> str:
    """The ledger as an element for a page: a bar a phase, a piece an owner, a line for the limit.

    Raises:
        NoPicturesError: matplotlib is not installed.
    """
    height = 0.62 + 0.27 * len(plan.phases)
    figure = _figure(_WIDTH, height)
    _ledger(figure.add_axes((0.18, 0.24 / height, 0.8, 1 - 0.46 / height)), plan, _named)
    label = (
        f"HBM of one chip by phase, GiB. Usable: {gib(plan.usable_bytes)}; fullest: "
        f"{gib(plan.peak_bytes)} in {plan.deciding_phase}. The table has the numbers."
    )
    return _element(_saved(figure, "svg"), label)


def steps_svg(steps: Sequence[StepRecord]) -> str:
    """Reward, loss and seconds by phase over the steps, as an element for a page.

    Raises:
        NoPicturesError: matplotlib is not installed.
    """
    figure = _figure(_WIDTH, 2.9)
    reward, loss, seconds = (figure.add_axes((0.13, at, 0.83, 0.22)) for at in (0.72, 0.41, 0.1))
    every = -(-len(steps) // _POINTS)
    groups = [steps[at : at + every] for at in range(0, len(steps), every)]
    at = [group[0].step for group in groups]
    for axes, title, values in (
        (reward, "reward, mean", [[one.reward_mean for one in group] for group in groups]),
        (loss, "loss", [[one.loss for one in group] for group in groups]),
    ):
        axes.plot(at, [sum(v) / len(v) for v in values], color=_named("engine"), linewidth=1.6)
        axes.margins(x=0.02, y=0.15)
        _frame(axes, title=title)
    phases = list(dict.fromkeys(phase for one in steps for phase in one.seconds))
    parts = [
        [sum(one.seconds.get(phase, 0.0) for one in group) / len(group) for group in groups]
        for phase in phases
    ]
    seconds.stackplot(at, parts, colors=[_named(kind(phase)) for phase in phases])
    seconds.set_xlim(reward.get_xlim())
    _frame(seconds, title="seconds by phase", numbered=True)
    mean = f"; a point is the mean of {every} steps" if every > 1 else ""
    label = f"Reward, loss and seconds by phase of {len(steps)} steps{mean}. The table has numbers."
    return _element(_saved(figure, "svg"), label)


def _figure(width: float, height: float) -> Any:
    try:
        import matplotlib as mpl  # noqa: PLC0415 - only pictures need it
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise NoPicturesError(
            "pages and pictures are drawn with matplotlib, which is not installed here: "
            "pip install matplotlib"
        ) from error
    # hashsalt: the names of an SVG's parts are random without one.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "headroom", "font.size": 9.5})
    return Figure(figsize=(width, height))


def _ledger(axes: Any, plan: MemoryPlan, colour: Callable[[str], str]) -> None:
    """One bar a phase, the first on top; a thin edge tells owners of one kind apart."""
    from matplotlib.patches import PathPatch  # noqa: PLC0415
    from matplotlib.path import Path  # noqa: PLC0415

    usable = plan.usable_bytes / _GIB
    wide = 1.2 * max(usable, plan.peak_bytes / _GIB)
    axes.set(xlim=(0, wide), ylim=(len(plan.phases) - 0.45, -0.55))
    _lines(axes, "x", 7, colour)
    pieces: dict[str, list[Path]] = {}
    for at, (phase, owners) in enumerate(plan.phases.items()):
        left = 0.0
        for owner, size in owners.items():
            right = left + size / _GIB
            corners = [(left, at - 0.33), (right, at - 0.33), (right, at + 0.33), (left, at + 0.33)]
            if size:
                pieces.setdefault(kind(owner), []).append(Path([*corners, corners[0]], closed=True))
            left = right
        axes.text(wide, at, f"{left:.2f}", va="center", ha="right", color=colour("ink"))
        axes.text(
            -wide / 60, at, _plain(hyphened(phase)), va="center", ha="right",
            color=colour("muted"), parse_math=False,
        )  # fmt: skip
    for what, paths in pieces.items():
        axes.add_artist(
            PathPatch(
                Path.make_compound_path(*paths), facecolor=colour(what),
                edgecolor=colour("paper"), linewidth=0.6, label=_LEGEND.get(what, what),
            )
        )  # fmt: skip
    axes.vlines(usable, *axes.get_ylim(), color=colour("limit"), linewidth=1.4)
    axes.text(
        usable, -0.62, f"usable {usable:.2f} GiB", ha="right", va="bottom", color=colour("limit")
    )


def _frame(axes: Any, *, title: str, numbered: bool = False) -> None:
    """A panel over the steps: its title, a faint grid, and the steps' numbers under the last."""
    _lines(axes, "y", 3, _named)
    _lines(axes, "x", 6, _named, numbered=numbered)
    axes.text(0, 1.05, title, color=_named("ink"), transform=axes.transAxes)


def _lines(
    axes: Any, way: Literal["x", "y"], most: int, colour: Callable[[str], str], *,
    numbered: bool = True,
) -> None:  # fmt: skip
    """Lines of a grid at round numbers. Axes of matplotlib cost more time than all else drawn."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter  # noqa: PLC0415

    axes.set_axis_off()
    limits = {"x": axes.get_xlim(), "y": axes.get_ylim()}
    low, high = sorted(limits[way])
    locator = MaxNLocator(most, integer=way == "x", steps=[1, 2, 5, 10])
    at = [value for value in locator.tick_values(low, high) if low <= value <= high]
    over = axes.vlines if way == "x" else axes.hlines
    over(at, *limits["y" if way == "x" else "x"], color=colour("grid"), linewidth=0.7, zorder=0)
    formatter = ScalarFormatter(useOffset=False)
    formatter.set_axis(axes.xaxis if way == "x" else axes.yaxis)
    named = zip(at, formatter.format_ticks(at), strict=True) if numbered else ()
    for value, text in named:
        place = {"x": (value, -0.05), "y": (-0.015, value)}[way]
        align = {"x": ("center", "top"), "y": ("right", "center")}[way]
        axes.text(
            *place, text, ha=align[0], va=align[1], color=colour("muted"),
            transform=axes.get_xaxis_transform() if way == "x" else axes.get_yaxis_transform(),
        )  # fmt: skip
    axes.set(xlim=limits["x"], ylim=limits["y"])  # lines widen them


def _on_paper(name: str) -> str:
    return COLOURS[name][0]


def hyphened(phase: str) -> str:
    """A phase's name for people."""
    return phase.replace("_", "-")


def _named(name: str) -> str:
    """A colour that stands for a name: matplotlib knows no other than real ones."""
    return f"#0000{list(COLOURS).index(name) + 1:02x}"


def _plain(text: str) -> str:
    """Text that XML can hold."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _saved(figure: Any, form: Literal["png", "svg"]) -> bytes:
    file = io.BytesIO()
    for axes in figure.axes if form == "svg" else ():
        axes.patch.set_visible(False)
        for artist in axes.get_children():
            artist.set_clip_on(False)
    metadata = {"Date": None} if form == "svg" else {"Software": None}
    figure.patch.set_visible(form == "png")
    figure.savefig(file, format=form, dpi=120, metadata=metadata)
    return file.getvalue()


def _element(svg: bytes, label: str) -> str:
    """An <svg> that may stand in a page many times: no ids, no style sheet, few digits."""
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(svg)  # noqa: S314 - matplotlib wrote it this moment
    for child in [one for one in root if one.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}defs")]:
        root.remove(child)
    for element in root.iter():
        for name in ("id", "clip-path", "transform"):  # nothing is rotated, moved or cut off
            element.attrib.pop(name, None)
        for key, value in element.attrib.items():
            element.set(key, _tidy(value))
        element.text = (element.text and element.text.strip()) or None
        element.tail = None
    box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": _plain(label)})
    return re.sub(r"</?g>|<g />", "", ElementTree.tostring(root, encoding="unicode"))


def _tidy(value: str) -> str:
    """A path or a style with one digit after the point, the page's colours, and no fonts."""
    value = _NUMBER.sub(lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), value)
    for name in COLOURS:
        value = value.replace(_named(name), f"var(--{name})")
    value = re.sub(r"; font-family: [^;]*|font-family: [^;]*; ", "", value)
    value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)
    value = re.sub(r"; stroke-line(join|cap): \w+", "", value)
    return re.sub(r"\s+", " ", value).strip()
