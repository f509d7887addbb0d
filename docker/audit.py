"""Tells which locked packages have known vulnerabilities: `make audit`, and part of `make check`.

It reports and never fails: a vulnerability that became known today is mended by `make lock
ARGS=--upgrade`, not by an older commit's check. Many registries tell of none; then it says so.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# All that reaches a host or an image. The shortest first: where the registry tells nothing of it,
# it tells nothing of the others.
LOCKS = ("build.txt", "runner.txt", "conda.txt", "tpu.txt", "trainer.txt")
LIMIT_S = 120


def main() -> None:
    """Print a line for each vulnerability, and one for each lock."""
    for lock in LOCKS:
        try:
            packages = audited(HERE / lock)
        except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
            print(
                f"audit: left out: pip-audit told nothing of docker/{lock}: {type(error).__name__}"
            )
            return
        known = [package for package in packages if "skip_reason" not in package]
        for package in known:
            for found in package["vulns"]:
                mended = ", ".join(found["fix_versions"]) or "no version yet"
                what = f"{package['name']} {package['version']}: {found['id']}"
                print(f"audit: docker/{lock}: {what}, mended in {mended}")
        print(
            f"audit: docker/{lock}: {len(known)} of {len(packages)} packages could be asked about"
        )
        if not known:
            print("audit: left out: this registry tells nothing of vulnerabilities")
            return


def audited(lock: Path) -> list[dict]:
    """What pip-audit says of each package of a lock."""
    argv = ["pip_audit", "--requirement", str(lock), "--require-hashes", "--disable-pip"]
    done = subprocess.run(
        [sys.executable, "-m", *argv, "--format", "json", "--progress-spinner", "off"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return json.loads(done.stdout)["dependencies"]


if __name__ == "__main__":
    main()
