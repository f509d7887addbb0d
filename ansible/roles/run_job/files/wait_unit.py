"""Wait for a systemd unit to end, for so many seconds at most; print the state it is in then.

wait_unit.py UNIT SECONDS
"""

import subprocess
import sys
import time

_ASKED = "ActiveState,SubState,ExecMainStatus"


def state(unit: str) -> str:
    """The unit's state, a line a property."""
    argv = ["systemctl", "show", unit, "--property", _ASKED]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def main(unit: str, seconds: str) -> None:
    """Print the state once it is no longer running, or the time is over."""
    deadline = time.monotonic() + float(seconds)
    while "SubState=running" in (found := state(unit)) and time.monotonic() < deadline:
        time.sleep(0.5)
    sys.stdout.write(found)


if __name__ == "__main__":
    main(*sys.argv[1:3])
