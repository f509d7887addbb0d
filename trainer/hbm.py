"""Bytes by measurement: HBM of every local device, and the host's resident set."""

import re
from pathlib import Path

import jax

from jobs.records import HBM_FILE, HbmSample


def sample(run_dir: Path, *, step: int, phase: str) -> HbmSample | None:
    """Measure every local device and append the line to hbm.jsonl, flushed; None without HBM.

    Written before a phase begins, the last line tells which phase a killed run was in.
    """
    stats = [device.memory_stats() for device in jax.local_devices()]
    if not all(stats):
        return None
    column = lambda key: [int(s[key]) for s in stats]
    found = HbmSample(
        step=step,
        phase=phase,
        in_use_bytes=column("bytes_in_use"),
        peak_bytes=column("peak_bytes_in_use"),
        limit_bytes=column("bytes_limit"),
    )
    with (run_dir / HBM_FILE).open("a", encoding="utf-8") as file:
        file.write(found.model_dump_json() + "\n")
    return found


def host_rss_bytes() -> int:
    """Resident set of this process, from /proc."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0
