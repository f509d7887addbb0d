"""The trainer's black box (blackbox.json), in a line for a person."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from jobs.aftermath import BLACK_BOX_FILE, BlackBox
from jobs.records import gib

_OWNERS = 4  # that are named


def in_a_line(record: Mapping[str, Any] | None) -> str | None:
    """Who held the memory when it ran out; None without a record, or of another version's."""
    try:
        box = BlackBox.model_validate(record)
    except ValidationError:
        return None
    owners = [f"{one.owner} {gib(one.size_bytes)}" for one in box.live[:_OWNERS]]
    rest = sum(one.size_bytes for one in box.live[_OWNERS:])
    owners += [f"others {gib(rest)}"] if rest else []
    alive = f"{gib(box.live_bytes)} of arrays were alive on {box.device} in {box.phase}"
    plan = gib(sum(box.planned.values()))
    beside = f"; the plan had {plan} resident there" if box.planned else ""
    return f"{alive}: {', '.join(owners)}{beside} ({BLACK_BOX_FILE})."
