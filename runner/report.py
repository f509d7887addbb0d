"""A page of a sweep. A placeholder until the page is there."""

import html
from pathlib import Path

from runner.sweep_row import Sweep


def write_sweep(sweep: Sweep, path: Path) -> None:
    """Write the rows as they are."""
    path.write_text(f"<pre>{html.escape(sweep.model_dump_json(indent=2))}</pre>\n")
