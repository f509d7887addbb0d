"""Contiguity: against allocators that were simulated here, piece by piece."""

import itertools

import numpy as np

from trainer.contiguity import doubts

USABLE = 30


def arrays(load, hand_over, rollout, update):
    phases = {"load": load, "hand_over": hand_over, "rollout": rollout, "update": update}
    return {**phases, **{f"after {name}": owners for name, owners in phases.items()}}


def test_what_was_never_used_is_one_piece_and_what_was_freed_may_not_be():
    # 10 of state, 3 and 7 that the engine had in the rollout: of 30, 10 were never used.
    awake = {"state": 10, "weights": 3, "pool": 7}
    found = arrays(awake, awake, awake, {"state": 10})
    assert doubts(USABLE, found, {"update": ("update", 10)}) == []
    [one] = doubts(USABLE, found, {"update": ("update", 11)})
    assert (one.free_bytes, one.untouched_bytes) == (20, 10)
    assert one.freed == {"weights": 3, "pool": 7}
    # Twenty are free; for more there is no doubt: it does not load.
    assert doubts(USABLE, found, {"update": ("update", 20)})
    assert doubts(USABLE, found, {"update": ("update", 21)}) == []


def test_nothing_is_in_doubt_where_nothing_was_freed():
    kept = {"state": 10, "weights": 3, "pool": 7}
    found = arrays(kept, kept, kept, kept)
    assert doubts(USABLE, found, {"update": ("update", 10), "sampler": ("rollout", 9)}) == []


def test_what_comes_later_has_freed_nothing_yet():
    found = arrays({"state": 10}, {"state": 10}, {"state": 10, "pool": 15}, {"state": 10})
    assert doubts(USABLE, found, {"hand_over": ("hand_over", 18)}) == []
    assert doubts(USABLE, found, {"update": ("update", 18)}) != []


def largest_hole(spans):
    """Of the memory between arrays that still lie there."""
    edges = [(0, 0), *sorted(spans), (USABLE, USABLE)]
    return max(after[0] - before[1] for before, after in itertools.pairwise(edges))


def test_a_program_without_doubt_finds_a_piece_however_the_arrays_were_laid_from_the_top():
    draw = np.random.default_rng(0)
    fell_short = 0
    for _ in range(2000):
        sizes = [int(draw.integers(1, 7)) for _ in range(draw.integers(1, 8))]
        if sum(sizes) > USABLE:
            continue
        end, spans = USABLE, []
        for size in sizes:
            spans.append((end - size, end))
            end -= size
        stays = [draw.random() < 0.5 for _ in sizes]
        left = [span for span, stay in zip(spans, stays, strict=True) if stay]
        before = {str(i): size for i, size in enumerate(sizes)}
        now = {str(i): size for i, size in enumerate(sizes) if stays[i]}
        needs = int(draw.integers(1, USABLE + 1))
        doubted = doubts(USABLE, arrays(before, before, before, now), {"x": ("update", needs)})
        loads = largest_hole(left) >= needs
        if not doubted and needs <= USABLE - sum(now.values()):
            assert loads
        if doubted and not loads:
            fell_short += 1
    assert fell_short > 100  # and the doubt is not for nothing
