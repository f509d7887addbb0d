"""The page in Debian's headless Chromium: quiet, alone, legible, by keyboard, on paper, quick."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import pytest
from docker_fixtures import BUILD_TIMEOUT_S, REPOSITORY, script
from playwright.sync_api import Browser, Page, sync_playwright
from pypdf import PdfReader
from sweeps import sweep

from runner.report import write_run, write_sweep
from runner.sweep_row import Sweep

pytestmark = pytest.mark.timeout(BUILD_TIMEOUT_S)  # the first of them may install Chromium
LIMIT_MS = 60_000  # of one action of the browser, on a machine that others use too
INTERACTIVE_MS = 1000
ENOUGH = 4.5  # WCAG 2.2, 1.4.3: of text against what is behind it

# Each element with text of its own: what it says, its colour, and what is behind it.
TEXTS = """() => {
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (c !== 'rgba(0, 0, 0, 0)') return c;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility()) continue;
    const style = getComputedStyle(e), svg = e.namespaceURI.endsWith('svg');
    found.push([e.tagName + '.' + (e.closest('[class]')?.getAttribute('class') ?? ''),
                svg ? style.fill : style.color, behind(e)]);
  }
  return found;
}"""


@dataclass
class Opened:
    """A page, and all that the browser had to say of it."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = script("chromium.sh", str(REPOSITORY / ".cache" / "chromium"))
    with sync_playwright() as playwright:
        # Chromium as root has no sandbox; /dev/shm of a container is small.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        with playwright.chromium.launch(
            executable_path=path.splitlines()[0], args=options, timeout=LIMIT_MS
        ) as found:
            yield found


@pytest.fixture(scope="module")
def made() -> Sweep:
    return sweep()


@pytest.fixture(scope="module")
def file(made, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "a page.html"
    write_sweep(made, path)
    return path


@pytest.fixture
def visit(browser, file) -> Iterator[Any]:
    contexts = []

    def visit(
        *, scheme: Literal["light", "dark"] = "light", width: int = 1200, path: Path = file
    ) -> Opened:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        context.set_default_timeout(LIMIT_MS)
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.on("console", lambda message: opened.said.append(message.text))
        opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.page.on("request", lambda request: opened.asked.append(request.url))
        opened.page.goto(path.as_uri())
        return opened

    yield visit
    for context in contexts:
        context.close()


def open_all(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2.2 of rgb(...) as the browser tells it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def letters(text: str) -> str:
    """Without white space and ligatures, which a sheet has of its own."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def test_the_page_is_read_alone_and_the_browser_has_nothing_to_say(visit, file, made):
    opened = visit()
    open_all(opened.page)
    opened.page.wait_for_load_state("networkidle")
    assert opened.asked == [file.as_uri()]
    assert opened.said == []
    assert opened.page.title() == "Sweep oom on v4-8"
    assert opened.page.locator("table.heat td a").count() == 16
    assert opened.page.locator("details").count() == len(made.rows)
    shown = opened.page.inner_text("main")
    assert [row.command for row in made.rows if row.command not in shown] == []
    assert "jit_training_step needs 7.82 GiB, 5.68 GiB can be reserved: short by 2.14" in shown


def test_by_keyboard_each_cell_of_the_map_is_reached_and_opened(visit, made):
    page = visit().page
    links = page.locator("table.heat td a")
    reached = []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "[document.activeElement.closest('.heat') !== null,"
            " document.activeElement.getAttribute('href'),"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        if focused[0]:
            reached.append(focused[1])
            assert focused[2] == "solid"
    assert reached == [links.nth(at).get_attribute("href") for at in range(16)]
    links.nth(2).focus()
    page.keyboard.press("Enter")
    opened = page.locator("details[open]")
    assert opened.count() == 1
    assert opened.locator("h3").inner_text() == "256x16"
    assert opened.locator("pre").first.is_visible()
    page.keyboard.press("Tab")  # on from the cell, not from the map
    assert page.evaluate("document.activeElement.closest('details, .back') !== null")
    page.locator("summary").nth(0).focus()
    page.keyboard.press("Enter")
    assert opened.count() == 2


def test_light_and_dark_differ_and_both_are_legible(visit):
    pictures = {}
    for scheme in ("light", "dark"):
        page = visit(scheme=scheme).page
        pictures[scheme] = page.screenshot()
        open_all(page)
        texts = {tuple(one) for one in page.evaluate(TEXTS)}
        # Every kind of cell, chips, numbers, code, pictures: all that stands on the page.
        kinds = {one[0].partition(".")[2] for one in texts}
        verdicts = {"run-fits", "run-out", "run-failed", "plan-fits", "plan-out", "plan-none"}
        assert verdicts | {"inferred-out", "skipped", "open"} <= kinds
        assert {"text", "PRE", "CODE", "TD", "TH"} <= {one[0].partition(".")[0] for one in texts}
        bad = {one: contrast(one[1], one[2]) for one in texts if contrast(*one[1:]) < ENOUGH}
        assert bad == {}
    assert pictures["light"] != pictures["dark"]
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)


@pytest.mark.parametrize("width", [360, 400, 1200])
def test_nothing_is_wider_than_the_window(visit, width):
    page = visit(width=width).page
    open_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if width == 400:  # and the map of four columns is whole
        heat = page.locator(".wide", has=page.locator(".heat"))
        assert heat.evaluate("e => e.scrollWidth <= e.clientWidth")


def test_on_paper_it_is_light_and_every_cell_is_whole(visit, made):
    page = visit(scheme="dark").page
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    texts = {tuple(one) for one in page.evaluate(TEXTS)}
    assert {one: 0 for one in texts if contrast(*one[1:]) < ENOUGH} == {}
    paper = PdfReader(BytesIO(page.pdf(format="A4")))
    printed = letters("".join(sheet.extract_text() for sheet in paper.pages))
    for row in made.rows:
        assert letters(row.command) in printed
    for advice in made.rows[0].diagnosis.advice:
        assert letters(advice) in printed
    # No line of a table leaves the sheet's right margin.
    page.set_viewport_size({"width": 688, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") == 688


def test_a_run_s_page_is_quiet_and_legible_too(visit, made, tmp_path):
    path = tmp_path / "run.html"
    write_run(made.rows[1], path)
    opened = visit(path=path)
    assert opened.said == []
    assert opened.asked == [path.as_uri()]
    assert opened.page.locator("svg:visible").count() == 2


def test_200_cells_are_interactive_within_a_second(visit, tmp_path_factory):
    many = sweep(more=13)
    assert len(many.rows) >= 200
    path = tmp_path_factory.mktemp("many") / "page.html"
    write_sweep(many, path)
    script = "performance.timing.domInteractive - performance.timing.navigationStart"
    took = [visit(path=path).page.evaluate(script) for _ in range(3)]
    assert min(took) < INTERACTIVE_MS, (took, path.stat().st_size)
