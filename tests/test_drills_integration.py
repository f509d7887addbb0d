"""The drills that are quick: each fault as `make drill` has it, a soak and the stages in part."""

from collections.abc import Iterator

import pytest

from tests.drills import Engine, NotHereError, every_drill, seen_at

QUICK = [drill for drill in every_drill() if drill.quick]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """One of our own, which the drills stop and kill; stopped when the last is over."""
    made = Engine()
    yield made
    if made.host:
        made.stop()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "drill",
    [
        pytest.param(drill, id=drill.name, marks=[pytest.mark.docker] if drill.docker else [])
        for drill in QUICK
    ],
)
def test_a_fault_ends_as_promised_and_no_byte_is_lost(drill, engine, tmp_path):
    try:
        if drill.docker and not engine.host:
            engine.start()
        seen, lost = seen_at(drill, tmp_path, engine, thorough=False)
    except NotHereError as error:
        pytest.skip(str(error))
    assert drill.holds(seen, lost), f"expected {drill.expected}, seen {seen}, {lost} bytes lost"
