"""Programs that have the bytes to load, but perhaps not in one piece. Pure.

The runtime wants a program's temporaries and code contiguous, at the bottom of memory. What was
never used until then is one piece; what was freed since may lie in many. So a program that needs
more than was never used may fail, though enough is free; one that needs less cannot fail for that.
"""

from collections.abc import Mapping

from jobs.records import Contiguity

Owners = Mapping[str, int]
# Moments of the first step, in order: programs are loaded when they are first called.
_ORDER = ("load", "hand_over", "rollout", "update")


def doubts(
    usable_bytes: int, arrays: Mapping[str, Owners], needs: Mapping[str, tuple[str, int]]
) -> list[Contiguity]:
    """The programs that may find no piece that is large enough.

    Args:
        usable_bytes: of a chip.
        arrays: by phase, by owner, what is resident before a program of it is loaded; by
            "after PHASE" with its programs' outputs.
        needs: by program, its phase and the bytes that it wants in one piece.
    """
    found: list[Contiguity] = []
    for program, (phase, bytes_in_one) in needs.items():
        now = arrays[phase]
        earlier = [arrays[f"after {name}"] for name in _ORDER[: _ORDER.index(phase)]]
        fullest = max([*earlier, now], key=lambda owners: sum(owners.values()))
        free = usable_bytes - sum(now.values())
        untouched = usable_bytes - sum(fullest.values())
        if not max(0, untouched) < bytes_in_one <= free:
            continue
        gone = {owner: size - now.get(owner, 0) for owner, size in fullest.items()}
        found.append(
            Contiguity(
                program=program,
                needs_bytes=bytes_in_one,
                free_bytes=free,
                untouched_bytes=max(0, untouched),
                freed={owner: size for owner, size in gone.items() if size > 0},
            )
        )
    return found
