"""The matrix of a sweep: its places, without those left out, and a name for each. Pure."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pydantic import JsonValue

Place = dict[str, JsonValue]

_MAX_NAME = 64  # a job's name, and so a cell's
_UNSAFE = re.compile(r"[^A-Za-z0-9.]+")


def places(
    matrix: Mapping[str, Sequence[JsonValue]], exclude: Iterable[Mapping[str, JsonValue]]
) -> Iterator[Place]:
    """Every combination of values, the last axis changing fastest, but for those left out.

    >>> list(places({"a": [1, 2], "b": [3, 4]}, [{"a": 2}, {"b": 3}]))
    [{'a': 1, 'b': 4}]
    """
    # By their axes: exclusions are many where they are written by a program, their axes few.
    out: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for place in exclude:
        axes = tuple(sorted(place))
        out.setdefault(axes, set()).add(tuple(text_of(place[axis]) for axis in axes))
    out = {axes: texts for axes, texts in out.items() if all(axis in matrix for axis in axes)}
    if not matrix:
        return
    for values in itertools.product(*matrix.values()):
        place = dict(zip(matrix, values, strict=True))
        texts = {key: text_of(value) for key, value in place.items()}
        if not any(tuple(texts[axis] for axis in axes) in left for axes, left in out.items()):
            yield place


def text_of(value: JsonValue) -> str:
    """A value as text that another value does not have: 1, 1.0, true and "1" are four.

    >>> [text_of(value) for value in (1, 1.0, True, "1")]
    ['1', '1.0', 'true', '"1"']
    """
    return json.dumps(value, sort_keys=True)


def named(found: Sequence[Place]) -> list[str]:
    """A name for each place, of its keys' last parts and values: no two alike in any case.

    >>> named([{"rollout.group_size": 4, "engine.page_size": 16}])
    ['group_size-4_page_size-16']
    """
    keys = _short_keys(list(found[0])) if found else {}
    names = [_name(keys, place) for place in found]
    counted = Counter(name.casefold() for name in names)
    number = len(str(len(found)))
    made = [
        name
        if counted[name.casefold()] == 1 and len(name) <= _MAX_NAME
        else f"{name[: _MAX_NAME - number - 1]}_{place:0{number}}"
        for place, name in enumerate(names, start=1)
    ]
    # A number may make a name that was there: then all have theirs.
    if len({name.casefold() for name in made}) == len(made):
        return made
    return [f"cell_{place:0{number}}" for place in range(1, len(found) + 1)]


def _short_keys(keys: list[str]) -> dict[str, str]:
    """The last part of each key; all of it where several end alike; initials where that is long."""
    last = {key: key.rpartition(".")[2] for key in keys}
    alike = Counter(last.values())
    short = {k: v if alike[v] == 1 else k for k, v in last.items()}
    # Values of 8 characters beside each.
    if sum(len(v) + 10 for v in short.values()) <= _MAX_NAME:
        return short
    initials = {k: "".join(w[0] for w in re.split(r"[._]+", v) if w) for k, v in short.items()}
    return initials if len(set(initials.values())) == len(keys) else short


def _name(keys: Mapping[str, str], place: Place) -> str:
    return "_".join(f"{keys[key]}-{_safe(value)}" for key, value in place.items())


def _safe(value: JsonValue) -> str:
    text = value if isinstance(value, str) else text_of(value)
    return _UNSAFE.sub("-", text).strip("-.") or "none"
