"""What a job may see of this machine's environment, and the trainer that it runs.

The one file of the runner that reads the environment. Names that say where things are on this
machine, and the names in `container.pass_env`: nothing else reaches a job.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

# Beside this runner lies the trainer of the same commit; -P: a trainer/ in the user's folder is not
# ours.
CODE = Path(__file__).resolve().parents[1]
TRAINER = (sys.executable, "-P", "-m", "trainer")

_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_PROXY_NAMES = frozenset({*_PROXIES, *(name.upper() for name in _PROXIES)})
_PERSON = ("HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ")
_PLACES = ("PATH", "TMPDIR", "LD_LIBRARY_PATH")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_HUB = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE")
_HOST_PREFIXES = ("LC_", "XDG_")


def here() -> Mapping[str, str]:
    """The environment that the command was started in."""
    return os.environ


def process_environment(environment: Mapping[str, str], pass_env: Iterable[str]) -> dict[str, str]:
    """What a job in a process sees: this machine's places, and what the job names. Nothing else."""
    names = {*_PERSON, *_PLACES, *_CERTIFICATES, *_HUB, *_PROXY_NAMES, *pass_env}
    kept = {k: v for k, v in environment.items() if k in names or k.startswith(_HOST_PREFIXES)}
    return {**kept, "PYTHONPATH": str(CODE), "PYTHONUNBUFFERED": "1"}


def container_environment(
    environment: Mapping[str, str], pass_env: Iterable[str]
) -> dict[str, str]:
    """What a job in a container sees of this machine: its proxies, and what the job names."""
    names = {*_PROXY_NAMES, *pass_env}
    return {k: v for k, v in environment.items() if k in names}


def unset(environment: Mapping[str, str], pass_env: Iterable[str]) -> list[str]:
    """Names the job may see that have no value here."""
    return [name for name in pass_env if name not in environment]
