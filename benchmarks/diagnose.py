"""How well `diagnose` does: `python benchmarks/diagnose.py LABELLED.jsonl [--json]`.

Each line of the file is an object with `text`, `exit_code` (or null) and `expected`: `category`,
`numbers`, and `root_line`. Needs an installed headroom, or the repository's root on PYTHONPATH.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from jobs.records import Diagnosis, ExitStatus
from runner.diagnose import diagnose


def status_of(code: int | None) -> ExitStatus | None:
    """The exit status as a run directory would hold it; None when the label does not know."""
    if code is None:
        return None
    return ExitStatus(code=code, reason="failed" if code else "done")


def wrong_numbers(found: Diagnosis, expected: dict[str, Any]) -> dict[str, str]:
    """The expected numbers that were not found, or found otherwise."""
    return {
        key: f"expected {value!r}, found {found.numbers.get(key)!r}"
        for key, value in expected.items()
        if found.numbers.get(key) != value
    }


def score(records: list[dict[str, Any]], *, with_exit_code: bool) -> dict[str, Any]:
    """Accuracy over the records, and every miss."""
    misses: list[dict[str, Any]] = []
    confusion: Counter[str] = Counter()
    right = numbers = numbers_right = numbers_wrong = extra = roots = confident = 0
    for record in records:
        expected = record["expected"]
        status = status_of(record.get("exit_code")) if with_exit_code else None
        found = diagnose([record["text"].encode()], exit_status=status)
        wrong = wrong_numbers(found, expected["numbers"])
        hit = found.cause == expected["category"]
        right += hit
        roots += found.root_line == expected["root_line"]
        numbers += len(expected["numbers"])
        numbers_right += len(expected["numbers"]) - len(wrong)
        numbers_wrong += sum(key in found.numbers for key in wrong)
        extra += len(set(found.numbers) - set(expected["numbers"]))
        confident += not hit and found.confidence == "certain"
        if not hit:
            confusion[f"{expected['category']} -> {found.cause}"] += 1
        if not hit or wrong:
            misses.append(
                {
                    "id": record.get("id"),
                    "expected": expected["category"],
                    "found": found.cause,
                    "confidence": found.confidence,
                    "line": found.root_line,
                    "numbers": wrong,
                }
            )
    return {
        "records": len(records),
        "category_right": right,
        "category_accuracy": right / len(records) if records else None,
        "numbers_expected": numbers,
        "numbers_right": numbers_right,
        "numbers_found_wrong": numbers_wrong,
        "numbers_beyond_the_label": extra,
        "root_lines_right": roots,
        "wrong_but_certain": confident,
        "confusion": dict(confusion),
        "misses": misses,
    }


def main(argv: list[str]) -> int:
    """Print the scores, once with the exit status known and once without."""
    paths = [argument for argument in argv if not argument.startswith("-")]
    if len(paths) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    lines = Path(paths[0]).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    scores = {
        "exit status known": score(records, with_exit_code=True),
        "log alone": score(records, with_exit_code=False),
    }
    if "--json" in argv:
        print(json.dumps(scores, indent=1))
        return 0
    for name, told in scores.items():
        share = told["category_accuracy"]
        print(f"{name}: {told['category_right']} of {told['records']} categories", end="")
        print("" if share is None else f" ({share:.1%})", end="; ")
        print(f"{told['numbers_right']} of {told['numbers_expected']} numbers", end=" (")
        print(
            f"{told['numbers_found_wrong']} found wrong, {told['numbers_beyond_the_label']}", end=""
        )
        print(f" beyond the label); {told['root_lines_right']} root lines;", end=" ")
        print(f"{told['wrong_but_certain']} wrong but certain")
        for miss in told["misses"]:
            print(
                f"  {miss['id']}: {miss['expected']} -> {miss['found']} ({miss['confidence']})",
                end="",
            )
            print(f" {miss['numbers'] or ''} {(miss['line'] or '')[:120]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
