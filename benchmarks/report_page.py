"""How heavy a sweep's page is, and how soon a browser shows it: `python -m benchmarks.report_page`.

Needs Chromium (tests/chromium.sh) and the packages of docker/dev.txt.
"""

import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from runner.report import write_sweep
from tests.sweeps import sweep

_SEEDS = 13  # of 16 cells each: 208 and the named ones
_TIMES = 5
_TIMING = (
    "(t => [t.domInteractive, t.loadEventEnd].map(at => at - t.navigationStart))"
    "(performance.timing)"
)


def main(chromium: str) -> None:
    """Print the numbers."""
    many = sweep(more=_SEEDS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        began = time.process_time()
        write_sweep(many, file)
        drawn_s = time.process_time() - began
        print(
            f"{len(many.rows)} cells: {file.stat().st_size / 2**20:.2f} MiB, "
            f"{drawn_s:.1f} s of CPU time to write"
        )
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for _ in range(_TIMES):
                page = browser.new_page()
                page.goto(file.as_uri())
                interactive_ms, loaded_ms = page.evaluate(_TIMING)
                print(f"interactive after {interactive_ms} ms, loaded after {loaded_ms} ms")
                page.close()
            browser.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "/usr/bin/chromium")
