"""What runs on real chips have taught about an accelerator; the planner adds it to its ledgers.

One file for each accelerator and version of libtpu, in the job's cache_dir: the newest run's.
"""

from pathlib import Path

from pydantic import ValidationError

from jobs.records import Record

# Owners in a ledger that come of it, and of no arithmetic.
HELD = "runtime (measured)"
BEYOND = "temporaries beyond the plan (measured)"


class Calibration(Record):
    """What one run measured that no arithmetic tells. Bytes of one chip.

    Attributes:
        accelerator: of the job.
        libtpu: its version.
        run: that measured.
        measured: when it ended, UTC, ISO 8601.
        free_bytes: before anything was placed; of the fullest chip.
        reserved_beyond_plan_bytes: that programs' temporaries took more than the run's plan said;
            None where it had no plan, or the runtime does not tell.
    """

    accelerator: str
    libtpu: str
    run: str
    measured: str
    free_bytes: int
    reserved_beyond_plan_bytes: int | None = None


def calibration_file(cache_dir: Path, *, accelerator: str, libtpu: str) -> Path:
    """Where it is kept.

    >>> calibration_file(Path("c"), accelerator="v4-8", libtpu="0.0.32.1").as_posix()
    'c/calibration/v4-8_0.0.32.1.json'
    """
    return cache_dir / "calibration" / f"{accelerator}_{libtpu}.json"


def read_calibration(cache_dir: Path, *, accelerator: str, libtpu: str) -> Calibration | None:
    """What is known; None where nothing is, or nothing that can be read."""
    file = calibration_file(cache_dir, accelerator=accelerator, libtpu=libtpu)
    try:
        return Calibration.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None
