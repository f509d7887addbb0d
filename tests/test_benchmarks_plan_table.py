"""docs/plan.md's table: that it is the script's, row by row; its figures take minutes to make."""

from types import SimpleNamespace

import pytest

from benchmarks.plan_table import BEGINS, ENDS, PAGE, ROOT, ROWS, rewritten, table, verdict
from jobs import spec

GIB = 2**30


def rows_of_the_page():
    text = PAGE.read_text(encoding="utf-8")
    made = text.partition(BEGINS)[2].partition(ENDS)[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in made]


def test_the_page_has_the_script_s_rows_with_the_hardware_s_figures_and_no_other():
    head, rule, *rows = rows_of_the_page()
    assert head == ["what", "job", "predicted", "hardware"]
    assert set(rule) == {"---"}
    assert [(what, job, told) for what, job, _, told in rows] == [
        (row.what, row.job, row.hardware) for row in ROWS
    ]
    assert all(predicted for _, _, predicted, _ in rows)


def test_what_the_page_predicts_of_the_free_bytes_is_what_the_hardware_printed():
    found = {(what, job): (predicted, told) for what, job, predicted, told in rows_of_the_page()}
    for row in ROWS[:2]:
        predicted, told = found[row.what, row.job]
        assert predicted == told


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_every_row_s_job_can_be_loaded_with_its_settings(row):
    spec.load(ROOT / "jobs" / f"{row.job}.yaml", overrides=row.settings)


def test_a_new_table_takes_the_old_one_s_place_and_nothing_else():
    page = f"before\n{BEGINS}\n| old |\n{ENDS}\nafter\n"
    assert rewritten(page, "| new |") == f"before\n{BEGINS}\n| new |\n{ENDS}\nafter\n"
    assert rewritten(rewritten(page, "x"), "| old |") == page


@pytest.mark.parametrize("page", ["", BEGINS, ENDS, f"{ENDS}{BEGINS}", f"{BEGINS}{BEGINS}{ENDS}"])
def test_a_page_without_its_marks_is_refused(page):
    with pytest.raises(ValueError, match="must have"):
        rewritten(page, "x")


def test_a_table_has_a_line_for_each_row_and_says_verdicts_with_their_number():
    plans = {
        "fits": SimpleNamespace(verdict="fits", headroom_bytes=2 * GIB, mem_fraction_interval=None),
        "not": SimpleNamespace(
            verdict="does_not_load", headroom_bytes=-GIB, mem_fraction_interval=None
        ),
        "refused": SimpleNamespace(
            verdict="engine_refused",
            headroom_bytes=0,
            mem_fraction_interval=SimpleNamespace(above=0.3749),
        ),
    }
    rows = [SimpleNamespace(what=name, job="j", predicted=verdict, hardware="h") for name in plans]
    assert table(rows, lambda row: plans[row.what]).splitlines()[2:] == [
        "| fits | j | fits, 2.00 to spare | h |",
        "| not | j | does not load, short by 1.00 | h |",
        "| refused | j | engine refuses, above 0.375 | h |",
    ]
