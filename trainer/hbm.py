"""Bytes by measurement: HBM of every local device, and the host's resident set."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from jobs.records import HBM_FILE, HbmSample


def sample(run_dir: Path, *, step: int, phase: str) -> HbmSample | None:
    """Measure every local device and append the line to hbm.jsonl, flushed; None without HBM.

    Written before a phase begins, the last line tells which phase a killed run was in.
    """
    found = read([device.memory_stats() for device in jax.local_devices()], step=step, phase=phase)
    if found is not None:
        with (run_dir / HBM_FILE).open("a", encoding="utf-8") as file:
            file.write(found.model_dump_json() + "\n")
    return found


def read(stats: Sequence[Mapping[str, int] | None], *, step: int, phase: str) -> HbmSample | None:
    """What `Device.memory_stats()` of every device says, as a record; None without HBM.

    Source of the keys: xla/pjrt/c/pjrt_c_api.h, PJRT_Device_MemoryStats; a runtime may leave out
    all but the first.
    """
    told = [one for one in stats if one]
    if not told or len(told) < len(stats):
        return None
    column = lambda key: [int(one[key]) for one in told]
    optional = lambda key: column(key) if all(key in one for one in told) else None
    return HbmSample(
        step=step,
        phase=phase,
        in_use_bytes=column("bytes_in_use"),
        peak_bytes=column("peak_bytes_in_use"),
        limit_bytes=column("bytes_limit"),
        peak_reserved_bytes=optional("peak_bytes_reserved"),
        largest_free_bytes=optional("largest_free_block_bytes"),
    )


def host_rss_bytes() -> int:
    """Resident set of this process, from /proc."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0
