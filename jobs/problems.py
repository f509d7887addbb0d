"""What is wrong with a job, a line each: where it was written, key, value, limit, way out."""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from jobs.source import NO_VALUE, Problem, Source

# Stand-ins for required keys that are wrong, so that the rest can still be checked.
_STAND_INS = {"name": "unnamed", "accelerator": "cpu", "model": "tiny", "job": "unnamed.yaml"}


class JobError(Exception):
    """A job that is refused.

    Attributes:
        problems: all that is wrong, at least one.
    """

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(p) for p in problems))
        self.problems = problems


@dataclass(frozen=True, kw_only=True)
class Parsed[M: BaseModel]:
    """A model that holds what could be read, and what could not."""

    job: M
    problems: list[Problem]


def parse[M: BaseModel](model: type[M], source: Source, *, noun: str = "job") -> Parsed[M]:
    """The model that a tree spells; a wrong value becomes a problem and keeps its default.

    Args:
        model: of a job, or of what else is written as jobs are.
        source: the tree.
        noun: what a person calls it.
    """
    try:
        return Parsed(job=model.model_validate(source.tree), problems=[])
    except ValidationError as error:
        details = error.errors(include_url=False)
    for detail in details:  # a wrong key of a mapping is told as this, below the key
        detail["loc"] = tuple(part for part in detail["loc"] if part != "[key]")
    problems = [_problem(model, detail, noun) for detail in details]
    tree = _without(source.tree, [detail["loc"] for detail in details])
    for key, stand_in in _STAND_INS.items():
        if key in model.model_fields:
            tree.setdefault(key, stand_in)
    return Parsed(job=model.model_validate(tree), problems=problems)


def _without(tree: dict[str, Any], paths: list[tuple[int | str, ...]]) -> dict[str, Any]:
    """A copy of the tree that lacks what lies at those paths."""
    whole = {path[0] for path in paths if len(path) == 1 or not isinstance(path[1], str)}
    rest: dict[str, Any] = {k: v for k, v in tree.items() if k not in whole}
    for key, value in rest.items():
        inner = [path[1:] for path in paths if path[0] == key]
        # A path below something that is no group ends there.
        if inner and not isinstance(value, dict):
            return _without(tree, [*paths, (key,)])
        if inner:
            rest[key] = _without(cast("dict[str, Any]", value), inner)
    return rest


def _problem(model: type[BaseModel], detail: ErrorDetails, noun: str) -> Problem:
    names = [str(part) for part in detail["loc"] if not isinstance(part, int)]
    key = ".".join(names)
    if detail["type"] == "extra_forbidden":
        return Problem(key, NO_VALUE, _unknown_key(model, names))
    if detail["type"] == "missing":
        text = f"the {noun} has no {key!r}; add it: {_meaning(model, names)}"
        return Problem(key, NO_VALUE, text)
    return Problem(key, detail["input"], _limit(detail, _field_default(model, names)))


# What pydantic's error types mean, in words for the person who wrote the value.
_LIMITS = {
    "greater_than_equal": "is below {ge}, the least it can be",
    "greater_than": "must be above {gt}",
    "less_than_equal": "is above {le}, the most it can be",
    "less_than": "must be below {lt}",
    "literal_error": "is not one of {expected}",
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_type": "is not a number",
    "bool_type": "is neither true nor false",
    "string_type": "is not text (put it in quotes)",
    "string_too_short": "is empty",
    "dict_type": "is not keys and values",
    "tuple_type": "is not a list",
    "string_pattern_mismatch": "may hold 1 to 64 letters, digits, '.', '_' and '-', and begins "
    "with a letter or digit",
}


def _limit(detail: ErrorDetails, default: str) -> str:
    if detail["type"].startswith("model_"):
        return "is not a group of keys; leave it out, or write keys below it"
    text = _LIMITS.get(detail["type"])
    if text is None:
        return f"is refused: {detail['msg'].removeprefix('Value error, ')}{default}"
    limits = {
        name: f"{limit:g}" if isinstance(limit, float) else limit
        for name, limit in detail.get("ctx", {}).items()
    }
    return text.format(**limits) + _near(detail) + default


def _near(detail: ErrorDetails) -> str:
    words = str(detail.get("ctx", {}).get("expected", "")).replace("'", "").replace(" or ", ", ")
    asked = str(detail["input"])
    near: list[str] = get_close_matches(asked, words.split(", "))
    # Two letters swapped are likelier than one that is wrong: gpro is grpo, not gspo.
    near.sort(key=lambda word: sorted(word) != sorted(asked))
    return f"; did you mean {near[0]!r}?" if near else ""


def _unknown_key(model: type[BaseModel], names: list[str]) -> str:
    *path, last = names
    part = _part(model, path)
    known = list(part.model_fields)
    everywhere = {key.rpartition(".")[2]: key for key in _keys(model)}
    near = [".".join([*path, k]) for k in get_close_matches(last, known, n=1)]
    near += [everywhere[k] for k in get_close_matches(last, everywhere, n=1, cutoff=0.8)]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    inside = f" of {'.'.join(path)}" if path else ""
    return f"unknown key {'.'.join(names)!r}{hint}; known keys{inside}: {', '.join(known)}"


def _part(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for name in path:
        field = model.model_fields.get(name)
        if field is None:  # a name that the user gave, of a part below
            continue
        inner = field.annotation
        if get_origin(inner) is dict:
            inner = get_args(inner)[1]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return model


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _keys(inner, f"{prefix}{name}.")


def _field_default(model: type[BaseModel], names: list[str]) -> str:
    field = _part(model, names[:-1]).model_fields.get(names[-1]) if names else None
    if field is None or field.default in (None, PydanticUndefined):  # required, or made anew
        return ""
    return f" (default: {field.default})"


def _meaning(model: type[BaseModel], names: list[str]) -> str:
    field = _part(model, names[:-1]).model_fields[names[-1]]
    return (field.description or "").rstrip(".")
