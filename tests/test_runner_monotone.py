"""Which cells a sweep asks: few, and what it concludes of the others is the truth."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.monotone import ask_next, contradictions, grids, told


def conclude(grid, truth, *, at_once=1, rng=None):
    """Ask until nothing is open; the answers. Of those asked at once any may come first."""
    rng = rng or random.Random(0)  # noqa: S311 - an order, no secret
    open_, answers, busy = set(grid.ranks), {}, []
    while True:
        while len(busy) < at_once and (name := ask_next(grid, open_, busy)):
            assert name in open_
            busy.append(name)
        if not busy:
            return answers
        name = busy.pop(rng.randrange(len(busy)))
        answers[name] = truth[name]
        settled = grid.settled(name, fits=truth[name])
        # What waits for an answer is never asked at the same time.
        assert not settled.intersection(busy)
        open_ -= settled


def places_of(shape):
    places = itertools.product(*(range(size) for size in shape))
    return {str(at): {f"axis{i}": v for i, v in enumerate(at)} for at in places}


@pytest.mark.parametrize("cells", [1, 2, 3, 4, 7, 8, 15, 16, 100])
def test_on_one_axis_at_most_log2_of_n_plus_1_cells_are_asked(cells):
    places = places_of([cells])
    [grid] = grids(places, ["axis0"])
    for fitting in range(cells + 1):
        truth = {name: place["axis0"] < fitting for name, place in places.items()}
        assert len(conclude(grid, truth)) <= math.ceil(math.log2(cells + 1))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_concluded_is_the_truth_on_any_monotone_grid(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    places = places_of(shape)
    # Whatever these cells need, they and all below them fit: every monotone truth is of this kind.
    tops = data.draw(st.lists(st.sampled_from(sorted(places)), max_size=4))
    below = lambda a, b: all(a[axis] <= b[axis] for axis in a)
    truth = {n: any(below(place, places[top]) for top in tops) for n, place in places.items()}
    left_out = data.draw(st.sets(st.sampled_from(sorted(places)), max_size=len(places) - 1))
    kept = {name: place for name, place in places.items() if name not in left_out}
    free = data.draw(st.sampled_from([(), ("axis0",)]))
    monotone = [axis for axis in next(iter(kept.values())) if axis not in free]
    at_once, rng = data.draw(st.integers(1, 3)), data.draw(st.randoms(use_true_random=False))
    for grid in grids(kept, monotone):
        answers = conclude(grid, truth, at_once=at_once, rng=rng)
        found = told(grid, answers)
        assert answers.keys() | found.keys() == grid.ranks.keys()
        assert not answers.keys() & found.keys()
        for name, by in found.items():
            assert by.fits == truth[name]
            # It was told by a cell that was asked, and lies on the right side of it.
            low, high = (name, by.by) if by.fits else (by.by, name)
            assert by.by in answers
            assert below(kept[low], kept[high])
        assert contradictions(grid, answers) == []


def test_a_square_is_asked_for_about_its_edge_and_not_for_all_of_it():
    places = places_of([8, 8])
    [grid] = grids(places, ["axis0", "axis1"])
    for limit in range(16):
        truth = {n: place["axis0"] + place["axis1"] < limit for n, place in places.items()}
        # An edge has at most 8 corners on either side; a search for each column alone asks 32.
        assert len(conclude(grid, truth)) <= 20


def test_cells_that_differ_otherwise_tell_nothing_of_each_other():
    places = {
        "named": {},
        "other": {},
        "a1": {"m": "a", "n": 1},
        "a2": {"m": "a", "n": 2},
        "b2": {"m": "b", "n": 2},
    }
    found = [sorted(grid.ranks) for grid in grids(places, ["n"])]
    assert found == [["named"], ["other"], ["a1", "a2"], ["b2"]]
    assert [sorted(grid.ranks) for grid in grids(places, [])] == [[name] for name in places]
    [_, _, a, _] = grids(places, ["n"])
    assert told(a, {"a2": True})["a1"].by == "a2"
    assert told(a, {"a2": False}) == {}


def test_a_grid_whose_last_open_cell_is_busy_waits_though_another_grid_has_open_cells():
    places = {"named": {}} | {str(n): {"n": n} for n in range(3)}
    alone, line = grids(places, ["n"])
    open_ = set(places)
    assert ask_next(alone, open_) == "named"
    assert ask_next(alone, open_, ["named"]) is None
    assert ask_next(line, open_) == "1"


def test_answers_that_contradict_the_growth_are_told():
    [grid] = grids(places_of([3]), ["axis0"])
    assert contradictions(grid, {"(0,)": False, "(2,)": True}) == [("(0,)", "(2,)")]
    assert told(grid, {"(0,)": False, "(2,)": True})["(1,)"].fits is False
