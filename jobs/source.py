"""Where a job's values were written (YAML file, --set, the SOP's variables), and what they say."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import yaml

from jobs import sop

MAX_FILE_BYTES = 2**20
MAX_VALUES = 2**20
"""As many as a file of that size can spell out without aliases."""


class _NoValue:
    """There is no value to show: the problem is the key itself."""


NO_VALUE = _NoValue()


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        key: dotted path in the job.
        value: as found, or NO_VALUE.
        text: what is wrong with it and what to change; a whole sentence when there is no value.
        others: further keys whose values take part.
        origin: the file, flag or variable it was written in.
    """

    key: str
    value: Any
    text: str
    others: tuple[str, ...] = ()
    origin: str = ""

    def at(self, source: "Source") -> "Problem":
        """The same problem, with the place where its key was written."""
        return self if self.origin else replace(self, origin=source.origin(self.key, *self.others))

    def __str__(self) -> str:
        """One line: origin, key, value, text."""
        where = f"{self.origin}: " if self.origin else ""
        if isinstance(self.value, _NoValue):
            return _one_line(f"{where}{self.text}")
        shown = str(self.value)
        shown = shown if len(shown) <= 120 else f"{shown[:117]}..."
        return _one_line(f"{where}{self.key} = {shown} {self.text}")


def _one_line(text: str) -> str:
    r"""The text with what is no character of a line spelled out: what was found may hold anything.

    >>> _one_line("a\nb\x1b[31m")
    'a\\nb\\x1b[31m'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The merged values, where each was written, and what could not be read of them.

    A file that is no job at all (`readable` is false) has one problem, and no values.
    """

    tree: dict[str, Any]
    origins: dict[str, str]
    default_origin: str
    readable: bool
    problems: list[Problem] = field(default_factory=list[Problem])

    def origin(self, *keys: str) -> str:
        """Where the first of those keys was written, or a group above or a key below it."""

        def touches(written: str, key: str) -> bool:
            return f"{written}.".startswith(f"{key}.") or f"{key}.".startswith(f"{written}.")

        found = (
            at for key in keys for written, at in self.origins.items() if touches(written, key)
        )
        return next(found, self.default_origin)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that reads YAML as people mean it: 1e-6 is a number, a key stands once."""


_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


# A date is text here: no key of a job is one, and 2020-13-45 would be an error without a line.
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key: Any = loader.construct_object(key_node, deep=True)  # pyright: ignore[reportUnknownMemberType]
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise yaml.YAMLError(f"key {key!r} is not text (line {line}): put it in quotes")
        if key in seen:
            raise yaml.YAMLError(f"key {key!r} stands twice (line {line}): leave one out")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _read_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it is none, or too much to be meant.
    """
    value: Any = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    if _values_of(value, {}) > MAX_VALUES:
        raise yaml.YAMLError(f"its aliases (*name) spell out more than {MAX_VALUES} values")
    return value


def _check_text(value: Any) -> None:
    """Refuse half a character: "\\ud800" can be written, and no file can hold it.

    Raises:
        ValueError: there is one; the message tells where.
    """
    json.dumps(value, ensure_ascii=False, default=str).encode()


def _values_of(value: object, known: dict[int, int]) -> int:
    """How many values a tree spells out; a part that stands in many places is counted once."""
    if isinstance(value, dict):
        parts = list(cast("dict[object, object]", value).values())
    elif isinstance(value, list):
        parts = cast("list[object]", value)
    else:
        return 1
    key = id(cast("object", value))
    if key not in known:
        known[key] = 1 + sum(_values_of(part, known) for part in parts)
    return known[key]


def read_sources(
    path: Path, *, overrides: Sequence[str], environment: Mapping[str, str] | None
) -> Source:
    """The job file's values, then the environment's, then the overrides', later ones winning."""
    tree = parse_file(path)
    if isinstance(tree, Problem):
        return Source(
            tree={}, origins={}, default_origin=str(path), readable=False, problems=[tree]
        )
    source = Source(tree=tree, origins={}, default_origin=str(path), readable=True)
    if environment is not None:
        _read_environment(environment, source)
    for override in overrides:
        read_override(override, source)
    if environment is not None:
        _count_micro_batches(environment, source)
    return source


def parse_file(path: Path) -> dict[str, Any] | Problem:
    """The YAML mapping of a file, or why there is none."""

    def refuse(text: str) -> Problem:
        return Problem("", NO_VALUE, text, origin=str(path))

    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return refuse(f"is larger than {MAX_FILE_BYTES} bytes: not a job file")
        text = path.read_text(encoding="utf-8")
        # job.json is no YAML: JSON spells characters beyond 16 bits as two, which YAML leaves so.
        tree: Any = json.loads(text) if path.suffix == ".json" else _read_yaml(text)
        _check_text(tree)
    except FileNotFoundError:
        return refuse("there is no such file; the jobs that come along are in jobs/")
    except (OSError, UnicodeDecodeError) as error:
        return refuse(f"cannot be read: {error}")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        form = "JSON" if path.suffix == ".json" else "YAML"
        return refuse(f"is not {form}: {' '.join(str(error).split())}")
    if not isinstance(tree, dict):
        return refuse(f"holds {type(tree).__name__}, not keys and values: begin with 'name: ...'")
    return cast("dict[str, Any]", tree)


def _read_environment(environment: Mapping[str, str], source: Source) -> None:
    values, refusals = sop.translate(environment)
    for name, reason in refusals.items():
        origin = f"environment {name}={environment[name]}"
        source.problems.append(Problem("", NO_VALUE, reason, origin=origin))
    for name, keys in values.items():
        for key, value in keys.items():
            put(source, key, value, origin=f"environment {name}={environment[name]}")


def _count_micro_batches(environment: Mapping[str, str], source: Source) -> None:
    """GRAD_ACCUM_STEPS, once all else is known: it counts micro-batches, we their sequences."""
    steps = sop.grad_accum_steps(environment)
    if steps is None:
        return
    origin, key = f"environment GRAD_ACCUM_STEPS={steps}", "train.micro_batch_size"
    rollout: Any = source.tree.get("rollout")
    parts = cast("dict[str, Any]", rollout) if isinstance(rollout, dict) else {}
    prompts, group = parts.get("prompts_per_step"), parts.get("group_size")
    if key in source.origins:
        text = f"and {source.origins[key]} say the same thing twice: leave one out"
    elif not (isinstance(prompts, int) and isinstance(group, int)):
        text = (
            "needs rollout.prompts_per_step and rollout.group_size (BATCH_SIZE, NUM_PRE_Q) set too"
        )
    elif (prompts * group) % steps:
        text = f"does not divide the {prompts * group} sequences of a step (BATCH_SIZE x NUM_PRE_Q)"
    else:
        put(source, key, prompts * group // steps, origin=origin)
        return
    source.problems.append(Problem("", NO_VALUE, text, origin=origin))


def read_override(override: str, source: Source) -> None:
    """Set what a key=value of --set says; what keeps it from that is one of the problems."""
    key, equals, text = override.partition("=")
    origin = f"--set {override}"
    if not equals or not all(key.split(".")):
        problem = "is not of the form key.path=value, as in train.micro_batch_size=2"
        source.problems.append(Problem("", NO_VALUE, problem, origin=origin))
        return
    try:
        value = _read_yaml(text)
        _check_text(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    if isinstance(value, dict):
        problem = f"sets a group of keys: set them one by one, as in {key}.name=value"
        source.problems.append(Problem("", NO_VALUE, problem, origin=origin))
        return
    put(source, key, value, origin=origin)


def put(source: Source, key: str, value: Any, *, origin: str) -> None:
    """Set a dotted key of the source's tree; what keeps it from that is one of its problems."""
    *path, last = key.split(".")
    node = source.tree
    for name in path:
        inner = node.setdefault(name, {})
        if not isinstance(inner, dict):
            text = f"{name} is a value, not a group of keys"
            source.problems.append(Problem("", NO_VALUE, text, origin=origin))
            return
        node = cast("dict[str, Any]", inner)
    node[last] = value
    source.origins[key] = origin
