"""The page's content against the records that it was made of."""

import itertools
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from fakes import write_job
from sweeps import LENGTH, MICRO, OUT_OF_HBM, cell, manifest, planned, ran, step, sweep

from jobs.records import ExitStatus
from jobs.spec import load
from runner import archive, conclude
from runner.chart import plan_svg, steps_svg
from runner.cli import main
from runner.provenance import Checkout
from runner.report import against_plan, heat_maps, verdict, write_run, write_sweep
from runner.run_row import outcome_of, row_of
from runner.sweep_row import Sweep

ROOT = Path(__file__).parents[1]
GIB = 2**30
VOID = {"meta", "br"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        parts = [one if isinstance(one, str) else one.text for one in self.children]
        return re.sub(r"\s+", " ", "".join(parts)).strip()

    def all(self, tag: str = "", **attributes: str) -> list["Element"]:
        """Those below that fit, in the document's order."""
        found = []
        for one in self.children:
            if isinstance(one, Element):
                fits = tag in ("", one.tag) and attributes.items() <= one.attributes.items()
                found += [one] * fits + one.all(tag, **attributes)
        return found

    def rows(self) -> list[list[str]]:
        return [
            [c.text for c in line.children if not isinstance(c, str)] for line in self.all("tr")
        ]


class Tree(HTMLParser):
    """The page as a tree; what is not closed in its place is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag, tag

    def handle_data(self, data):
        self.open[-1].children.append(data)


@pytest.fixture(scope="module")
def made() -> Sweep:
    return sweep()


@pytest.fixture(scope="module")
def text(made, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("page") / "page.html"
    write_sweep(made, file)
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text) -> Element:
    return Tree(text).root


def written(sweep_or_row, folder: Path) -> Element:
    file = folder / "page.html"
    (write_sweep if isinstance(sweep_or_row, Sweep) else write_run)(sweep_or_row, file)
    return Tree(file.read_text(encoding="utf-8")).root


def section(page: Element, name: str, made: Sweep) -> Element:
    """A cell's part of the page, found through its name in the summary."""
    places = [row.cell for row in made.rows]
    found = page.all("details")[places.index(name)]
    assert found.all("h3")[0].text == name
    return found


def grid(page: Element, at: int = 0) -> list[list[str]]:
    heat = [one for one in page.all("table") if one.attributes.get("class") == "heat"]
    return heat[at].rows()


def test_each_cell_stands_in_the_heat_map_in_its_place_with_its_verdict(page, made):
    head, *lines = grid(page)
    assert head == ["", "4", "8", "16", "32"]
    words = [
        [line[0], *(re.sub(r"[^a-zA-Z ]", " ", c).split() for c in line[1:])] for line in lines
    ]
    assert words == [
        ["256", ["run", "fits"], ["run", "fits"], ["run", "out", "of", "HBM", "plan"],
         ["run", "fits"]],
        ["512", ["run", "fits"], ["run", "failed"], ["skipped"], ["run", "fits"]],
        ["1024", ["plan", "fits"], ["run", "fits"], ["plan", "does", "not", "fit"],
         ["run", "fits"]],
        ["2048", ["open"], ["plan", "does", "not", "fit"], ["plan", "failed"],
         ["inferred", "does", "not", "fit", "as", "x"]],
    ]  # fmt: skip
    assert [column.attributes["scope"] for column in page.all("th")].count(None) == 0
    links = [a for table in page.all("table", **{"class": "heat"}) for a in table.all("a")]
    for link in links:
        target = page.all("div", id=(link.attributes["href"] or "")[1:])
        assert len(target) == 1
    places = {row.cell: row.place for row in made.rows}
    first = section(page, "256x16", made).all("div")[0]
    assert links[2].attributes["href"] == f"#{first.attributes['id']}"
    assert places["256x16"] == {LENGTH: 256, MICRO: 16}


def test_a_heat_map_s_number_is_what_the_plan_leaves(page, made):
    _, *lines = grid(page)
    plans = {tuple(row.place.values()): row.plan for row in made.rows if row.plan}
    seen = 0
    for line in lines:
        for micro, said in zip((4, 8, 16, 32), line[1:], strict=True):
            if plan := plans.get((int(line[0]), micro)):
                left = (plan.usable_bytes - plan.peak_bytes) / GIB
                number = re.findall(r"[+\u2212]\d+\.\d\d", said)[0].replace("\u2212", "-")
                assert float(number) == pytest.approx(left, abs=0.0051)
                seen += 1
    assert seen == 13


def test_named_cells_are_listed_above_with_what_they_change(page):
    table = page.all("table")[0].rows()
    assert [line[0] for line in table] == ["cell", "as-the-sop", "mended"]
    assert table[1][1:] == ["run: out of HBM", "\u22122.05", "train.micro_batch_size=4"]
    assert "update.design=layer_major" in table[2][3]


def test_planned_bytes_stand_beside_measured_ones_with_their_error(page, made):
    at = next(i for i, one in enumerate(page.all("h2")) if one.attributes["id"] == "measured")
    assert page.all("h2")[at].text == "Planned against measured"
    table = next(t for t in page.all("table") if t.rows()[0][:2] == ["cell", "what"])
    _, *lines = table.rows()
    compared = [(row, one) for row in made.rows for one in row.measured]
    assert len(lines) == len(compared) == 16
    for line, (row, one) in zip(lines, compared, strict=True):
        error = one.measured_bytes - one.planned_bytes
        assert line[:2] == [row.cell, one.what]
        told = [float(cell.replace("\u2212", "-")) for cell in line[2:]]
        wanted = [one.planned_bytes / GIB, one.measured_bytes / GIB, error / GIB]
        assert told[:3] == pytest.approx(wanted, abs=0.00051)
        assert told[3] == pytest.approx(100 * error / one.planned_bytes, abs=0.051)


def test_a_plan_s_table_has_every_owner_in_every_phase_and_their_sums(page, made):
    row = next(row for row in made.rows if row.cell == "as-the-sop")
    assert row.plan
    table = section(page, "as-the-sop", made).all("table")[0]
    head, *lines = table.rows()
    phases = list(row.plan.phases)
    assert [name.replace("-", "_") for name in head[1:]] == phases
    told = {line[0]: [one.replace("\u2212", "-") for one in line[1:]] for line in lines}
    for at, (phase, owners) in enumerate(row.plan.phases.items()):
        for owner, size in owners.items():
            if any(others.get(owner) for others in row.plan.phases.values()):
                assert told[owner][at] == f"{size / GIB:.3f}", (phase, owner)
        assert told["all"][at] == f"{sum(owners.values()) / GIB:.3f}"
        assert told["left"][at] == f"{(row.plan.usable_bytes - sum(owners.values())) / GIB:.3f}"
    assert float(told["all"][phases.index("update")]) == pytest.approx(
        row.plan.peak_bytes / GIB, abs=0.00051
    )


def test_the_picture_s_bars_are_as_long_as_the_bytes(made):
    plan = made.rows[0].plan
    assert plan
    svg = Tree(plan_svg(plan)).root
    # The page's own scale: the grid's lines, which stand at round numbers of GiB.
    paths = [(one.attributes["d"] or "", one.attributes["style"] or "") for one in svg.all("path")]
    lines = [float(d.split()[1]) for d, style in paths if "--grid" in style]
    numbers = [one.text for one in svg.all("text") if one.text.isdecimal()]
    a_gib = (lines[1] - lines[0]) / (int(numbers[1]) - int(numbers[0]))
    limit = next(float(d.split()[1]) for d, style in paths if "--limit" in style)
    assert (limit - lines[0]) / a_gib == pytest.approx(plan.usable_bytes / GIB, abs=0.02)
    ends = [
        float(x) for d, style in paths if "--code" in style for x in re.findall(r"L ([\d.]+) ", d)
    ]
    assert (max(ends) - lines[0]) / a_gib == pytest.approx(plan.peak_bytes / GIB, abs=0.02)
    assert "32.80" in {one.text for one in svg.all("text")}


def test_a_cell_tells_its_cause_with_evidence_and_what_to_change(page, made):
    found = section(page, "as-the-sop", made)
    diagnosis = made.rows[0].diagnosis
    assert diagnosis
    assert diagnosis.cause == "hbm_program_load"
    assert "jit_training_step needs 7.82 GiB, 5.68 GiB can be reserved: short by 2.14" in found.text
    assert any(OUT_OF_HBM.splitlines()[1] == pre.text for pre in found.all("pre"))
    assert "Line 2 of the log says" in found.text
    items = [li.text for li in found.all("li")]
    assert [one for one in diagnosis.advice if one not in items] == []
    causes = next(t for t in page.all("table") if t.rows()[0] == ["cause", "cells", "which"])
    assert causes.rows()[1:] == [
        ["hbm_program_load", "2", "as-the-sop, 256x16"], ["hf_auth", "1", "512x8"],
    ]  # fmt: skip


def test_each_cell_has_its_exact_command_its_job_and_its_settings(page, made):
    for row in made.rows:
        found = section(page, row.cell, made)
        assert found.all("pre")[0].text == row.command
        codes = [code.text for code in found.all("code")]
        assert row.job_file in codes
        for key, value in row.settings.items():
            assert f"{key} = {value}" in codes
        assert (row.skipped or "") in found.text
        assert row.plan_said in found.text


def test_steps_are_a_table_of_numbers_and_a_picture(page, made):
    row = next(row for row in made.rows if row.cell == "mended")
    tables = [t.rows() for t in section(page, "mended", made).all("table")]
    head, *lines = next(rows for rows in tables if rows[0][0] == "step")
    assert head[:4] == ["step", "reward", "loss", "pass@1"]
    assert head[4:8] == ["rollout s", "reward s", "update s", "hand-over s"]
    assert len(lines) == 20
    for line, one in zip(lines, row.steps, strict=True):
        assert line[:3] == [str(one.step), f"{one.reward_mean:.3f}", f"{one.loss:.4f}"]
        assert [float(s) for s in line[4:8]] == pytest.approx(
            list(one.seconds.values()), abs=0.0051
        )
        assert float(line[8]) == pytest.approx(one.dt_s, abs=0.0051)
        assert line[-1] == "29.000"
    assert len(section(page, "mended", made).all("svg")) == 2
    assert len(section(page, "256x16", made).all("svg")) == 1  # one step is no curve


def test_of_many_steps_the_table_has_some_and_the_picture_means(tmp_path):
    steps = [step(at) for at in range(1000)]
    page = written(cell("long", {}, steps=steps), tmp_path)
    table = page.all("table")[0]
    numbers = [int(line[0]) for line in table.rows()[1:]]
    assert (numbers[0], numbers[-1], len(numbers)) == (0, 999, 24)
    assert {b - a for a, b in itertools.pairwise(numbers)} == {43, 44}
    assert "24 of 1000 steps" in table.text
    svg = steps_svg(steps)
    assert "a point is the mean of 10 steps" in svg
    assert len(svg) < 30_000


HOSTILE = "</pre><script>alert(1)</script><img src=x onerror='a()'>\" '&amp; {{ 7*7 }} \x1b[31m$x$"


def test_hostile_text_is_text_wherever_it_stands(tmp_path, made):
    found = made.rows[0]
    assert found.plan
    assert found.diagnosis
    assert found.manifest
    plan = found.plan.model_copy(
        update={
            "phases": {HOSTILE: {HOSTILE: GIB}, "update": {"moments": GIB}},
            "assumptions": [HOSTILE],
            "deciding_phase": HOSTILE,
            "job": HOSTILE,
        }
    )
    diagnosis = found.diagnosis.model_copy(
        update={"root_line": HOSTILE, "advice": [HOSTILE], "explanation": HOSTILE, "cause": HOSTILE}
    )
    row = found.model_copy(
        update={
            "cell": HOSTILE, "settings": {HOSTILE: HOSTILE}, "place": {HOSTILE: HOSTILE},
            "job_file": HOSTILE, "command": HOSTILE, "plan_said": HOSTILE, "skipped": HOSTILE,
            "run": HOSTILE, "plan": plan, "diagnosis": diagnosis,
            "steps": [step(0, seconds={HOSTILE: 1.0}), step(1, seconds={HOSTILE: 1.0})],
            "manifest": found.manifest.model_copy(update={"image": HOSTILE, "commit": HOSTILE}),
        }
    )  # fmt: skip
    hostile = Sweep(
        name=HOSTILE, accelerator=HOSTILE, axes={HOSTILE: [HOSTILE]}, rows=[row], notes=[HOSTILE]
    )
    for page in (written(hostile, tmp_path), written(row, tmp_path)):
        tags = Counter(one.tag for one in page.all())
        assert not {"script", "img", "iframe", "link", "object"} & set(tags)
        names = {name for one in page.all() for name in one.attributes}
        assert not [name for name in names if name.startswith("on") or name == "src"]
        shown = re.sub(r"\s+", " ", HOSTILE)
        assert page.all("h1")[0].text.endswith(shown)
        assert page.text.count(shown) >= 12
        assert all((a.attributes["href"] or "").startswith("#") for a in page.all("a"))


def test_the_same_records_make_the_same_bytes_in_another_process_too(text, tmp_path):
    file = tmp_path / "again.html"
    subprocess.run(
        [sys.executable, "-m", "tests.sweeps", file],
        cwd=ROOT, check=True, timeout=120,
        env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"},  # noqa: TID251
    )  # fmt: skip
    assert file.read_text(encoding="utf-8") == text


def test_the_page_needs_nothing_else_and_runs_nothing(page, text):
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|<script|<link", text)
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]
    assert (policy.attributes["content"] or "").startswith("default-src 'none'")
    assert page.all("html")[0].attributes["lang"] == "en"
    assert page.all("title")[0].text == "Sweep oom on v4-8"


def test_ids_are_unique_links_lead_somewhere_and_headings_do_not_skip(page):
    ids = Counter(one.attributes["id"] for one in page.all() if "id" in one.attributes)
    assert set(ids.values()) == {1}
    assert {(a.attributes["href"] or "")[1:] for a in page.all("a")} <= set(ids)
    levels = [int(one.tag[1]) for one in page.all() if re.fullmatch("h[1-6]", one.tag)]
    assert levels[:4] == [1, 2, 2, 2]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_further_axes_make_a_table_for_each_of_their_combinations():
    made = sweep((256, 512), more=3)
    maps = heat_maps(made)
    assert [one.fixed for one in maps] == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    for one in maps:
        assert (one.down, one.across, one.columns) == (LENGTH, MICRO, [4, 8, 16, 32])
        for value, rows in one.lines:
            for micro, row in zip(one.columns, rows, strict=True):
                assert row
                assert row.place == {LENGTH: value, MICRO: micro, **one.fixed}


def test_one_axis_is_a_column_and_a_cell_that_is_not_there_is_said_so(tmp_path):
    rows = [cell("a", {MICRO: 4}), cell("b", {MICRO: True})]
    made = Sweep(name="x", accelerator="cpu", axes={MICRO: [4, True, 1]}, rows=rows, notes=[])
    page = written(made, tmp_path)
    # 1 and true are two values: the third has no cell.
    assert grid(page) == [
        ["", "verdict"], ["4", "\u2013 open"], ["true", "\u2013 open"], ["1", "\u2013 no cell"],
    ]  # fmt: skip
    assert heat_maps(made.model_copy(update={"axes": {}})) == []


@pytest.mark.parametrize(
    ("known", "kind", "word", "against"),
    [
        ({"outcome": "fits", "planned": "fits"}, "run-fits", "fits", False),
        ({"outcome": "fits", "planned": "does_not_load"}, "run-fits", "fits", True),
        ({"outcome": "fits"}, "run-fits", "done", False),
        ({"outcome": "out_of_hbm", "planned": "fits"}, "run-out", "out of HBM", True),
        ({"outcome": "out_of_hbm", "planned": "does_not_load"}, "run-out", "out of HBM", False),
        ({"outcome": "failed", "planned": "fits"}, "run-failed", "failed", False),
        ({"outcome": "running"}, "run-other", "running", False),
        ({"outcome": "lost"}, "run-other", "lost", False),
        ({"planned": "engine_refused"}, "plan-out", "engine refuses", False),
        ({"planned": "fits", "planned_from": "z"}, "inferred-fits", "fits", False),
        ({"planned": "refused"}, "plan-none", "refused", False),
        ({"planned": "fits", "skipped": "cell z"}, "skipped", "skipped", False),
        ({"planned": "does_not_load", "skipped": "it"}, "plan-out", "does not fit", False),
        ({}, "open", "open", False),
    ],
)
def test_a_run_s_word_counts_before_a_plan_s(known, kind, word, against):
    row = cell("a", {}, **known)
    assert (verdict(row).kind, verdict(row).word, against_plan(row)) == (kind, word, against)


def test_every_verdict_s_colours_are_in_the_style_sheet():
    style = (ROOT / "runner/templates/page.css").read_text()
    outcomes = ["fits", "out_of_hbm", "failed", "refused", "interrupted", "lost", "running"]
    kinds = {verdict(cell("a", {}, outcome=one)).kind for one in outcomes}
    for one in ("fits", "does_not_load", "engine_refused", "refused", "failed"):
        kinds |= {verdict(cell("a", {}, planned=one)).kind}
        kinds |= {verdict(cell("a", {}, planned=one, planned_from="z")).kind}
    assert len(kinds) == 10
    assert [kind for kind in kinds if not re.search(rf"\.{kind}\b[^{{]*{{ --b", style)] == []


def run_directory(folder: Path, log: str, *, code: int, steps: int) -> archive.RunDir:
    job = load(write_job(folder, name="tiny"))
    checkout = Checkout(commit="1" * 40, dirty=False)
    with archive.create(
        job, verb="train", where="process", runs=folder / "runs", code=checkout
    ) as run:
        run.log_file.write_text(log)
        run.steps_file.write_text("".join(step(at).model_dump_json() + "\n" for at in range(steps)))
        conclude.conclude(run, ExitStatus(code=code, reason="failed" if code else "done"))
    return run


def test_show_writes_a_run_s_page_of_its_records(tmp_path):
    run = run_directory(tmp_path, OUT_OF_HBM, code=70, steps=2)
    plan = planned().model_copy(update={"job_sha256": run.manifest().job_sha256})
    (run.path / "plan.json").write_text(plan.model_dump_json())
    file = tmp_path / "run.html"
    argv = ["show", "latest", "--runs", str(tmp_path / "runs"), "--html", str(file)]
    done = CliRunner().invoke(main, argv)
    assert done.exit_code == 0, done.output
    page = Tree(file.read_text(encoding="utf-8")).root
    assert page.all("h1")[0].text == page.all("title")[0].text == run.name
    for said in (
        "run: out of HBM",
        "failed (70)",
        "1" * 40,
        "short by 2.14 GiB",
        "accelerator = cpu",
    ):
        assert said in page.text
    assert page.all("pre")[0].text == f"headroom run {run.job_file}"
    assert len(page.all("svg")) == 2
    assert len(page.all("details")) == 0


def test_a_page_that_cannot_be_written_is_refused(tmp_path):
    run = run_directory(tmp_path, "", code=0, steps=0)
    argv = ["show", run.name, "--runs", str(tmp_path / "runs"), "--html"]
    done = CliRunner().invoke(main, [*argv, str(tmp_path / "none" / "x.html")])
    assert done.exit_code == 1
    assert str(tmp_path / "none") in done.stderr
    assert "Traceback" not in done.output


def test_a_run_s_row_leaves_out_what_cannot_be_read(tmp_path):
    run = run_directory(tmp_path, OUT_OF_HBM, code=70, steps=1)
    run.steps_file.write_text(run.steps_file.read_text() + '{"eval_step": 1}\n{"cut')
    run.diagnosis_file.write_text('{"cause": "of another version"}')
    row = row_of(run, run.manifest())
    assert (len(row.steps), row.diagnosis, row.plan, row.outcome) == (1, None, None, "failed")
    assert row.settings["rollout.group_size"] == load(tmp_path / "job.yaml").rollout.group_size


@pytest.mark.parametrize(
    ("reason", "cause", "outcome"),
    [
        ("done", None, "fits"),
        ("failed", "hbm_alloc", "out_of_hbm"),
        ("failed", "hf_auth", "failed"),
        ("oom_killed", None, "failed"),
        ("interrupted", "hbm_alloc", "interrupted"),
        ("lost", None, "lost"),
    ],
)
def test_what_a_run_tells_of_its_job(reason, cause, outcome, made):
    diagnosis = made.rows[0].diagnosis
    assert diagnosis
    found = None if cause is None else diagnosis.model_copy(update={"cause": cause})
    assert outcome_of(manifest("x", code=1, reason=reason), found) == outcome
    assert outcome_of(manifest("x", code=0, reason="done").model_copy(update={"exit_status": None}),
                      found) == "running"  # fmt: skip


def test_without_the_package_that_draws_a_page_is_refused_with_the_way_out(tmp_path):
    row = cell("a", {}, **ran("a", steps=2))
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\n"
        "from runner.chart import NoPicturesError\n"
        "from runner.report import write_run\n"
        "from runner.sweep_row import Row\n"
        "try: write_run(Row.model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
        "except NoPicturesError as error: print(error)\n"
    )
    file = tmp_path / "x.html"
    argv = [sys.executable, "-c", code, row.model_dump_json(), str(file)]
    said = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60)
    assert "pip install matplotlib" in said.stdout
    assert not file.exists()


def test_the_wheel_carries_the_templates(tmp_path):
    argv = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = {f"runner/templates/{path.name}" for path in (ROOT / "runner/templates").iterdir()}
    assert len(names) == 5
    assert names <= set(zipfile.ZipFile(wheel).namelist())
