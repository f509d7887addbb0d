"""Preemption and maintenance: the cloud tells that it will take the machine, and we stop in time.

Google's metadata server answers on every VM of theirs, TPU VMs included; a request with
`wait_for_change` is answered when the value is another. A machine without it is left alone: nothing
is said, nothing waits, and threads that look for it end with the process.

Source: https://cloud.google.com/compute/docs/instances/create-use-preemptible (detecting
preemption), https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
"""

import http
import http.client
import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from jobs.aftermath import NOTICE_FILE, Notice
from jobs.spec import Job
from trainer.files import write_record
from trainer.stop import Stops

log = logging.getLogger(__name__)

SERVER = "http://metadata.google.internal"
_HEADERS = {"Metadata-Flavor": "Google"}
# Key, and what it says when the machine will go; MIGRATE_ON_HOST_MAINTENANCE is survived.
ENDS = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
# The server answers after so long even without a change: a connection that broke in silence is
# noticed then.
_ANSWER_S = 60
_PATIENCE_S = _ANSWER_S + 30
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 60.0


def server_of(job: Job) -> str | None:
    """The metadata server that the job's `checkpoint.notice` means; None: none is asked."""
    asked = job.checkpoint.notice
    if asked == "auto":
        return SERVER if job.target.platform == "tpu" else None
    return None if asked == "never" else asked


def watch(job: Job, run_dir: Path, stops: Stops) -> None:
    """Have `stops` stop the run, and notice.json written, once the machine will be taken.

    Returns at once. Needs the process's signal handlers in place.
    """
    server = server_of(job)
    if server is None:
        return

    def told(key: str, value: str) -> None:
        record = Notice(key=key, value=value, seen=datetime.now(UTC).isoformat())
        stops.notice(
            f"preemption notice: {key} = {value}",
            lambda: write_record(run_dir / NOTICE_FILE, record.model_dump_json(indent=2)),
        )

    for key, end in ENDS.items():
        threading.Thread(
            target=follow, args=(server, key, end, told), name=f"notice {key}", daemon=True
        ).start()


def follow(
    server: str,
    key: str,
    end: str,
    told: Callable[[str, str], None],
    *,
    first_pause_s: float = _FIRST_PAUSE_S,
) -> None:
    """Ask for a value until it is `end`, then tell and return; where nobody answers, ask later."""
    etag, pause_s = None, first_pause_s
    while True:
        known = etag
        try:
            value, etag = ask(server, key, etag=known)
        except (OSError, http.client.HTTPException):
            etag = None
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            continue
        pause_s = first_pause_s
        if value == end:
            told(key, value)
            return
        if etag == known:  # whoever does not wait for a change is not asked all the time
            time.sleep(1.0)


def ask(server: str, key: str, *, etag: str | None) -> tuple[str, str]:
    """A value of the metadata server, and the tag of this state of it.

    Args:
        server: http://host or http://host:port.
        key: below /computeMetadata/v1/instance/.
        etag: of the state that is known: the answer comes when it is another, or after a minute;
            None: at once.

    Raises:
        OSError: nobody answers, or somebody who is no metadata server.
    """
    # No proxy of the environment: the server is this machine's own.
    parts = urlsplit(server)
    connection = http.client.HTTPConnection(parts.netloc, timeout=_PATIENCE_S)
    path = f"{parts.path}/computeMetadata/v1/instance/{key}"
    if etag is not None:
        path += f"?wait_for_change=true&timeout_sec={_ANSWER_S}&last_etag={etag}"
    try:
        connection.request("GET", path, headers=_HEADERS)
        answer = connection.getresponse()
        text = answer.read(4096).decode("ascii", errors="replace").strip()
    finally:
        connection.close()
    found = answer.headers.get("ETag")
    if answer.status != http.HTTPStatus.OK or not found:
        raise ConnectionError(f"{server}{path}: status {answer.status}, no value")
    if answer.headers.get("Metadata-Flavor") != _HEADERS["Metadata-Flavor"]:
        raise ConnectionError(f"{server}: no metadata server of Google's answers there")
    return text, found
