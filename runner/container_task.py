"""A container under way: its log copied, its end told, signals passed on."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from docker import DockerClient
from docker.errors import DockerException, NotFound
from docker.models.containers import Container

from jobs.records import LOG_FILE, ExitStatus
from runner import ending
from runner.archive import NotFinishedError, RunDir
from runner.ending import signal_name
from runner.supervise import boot_id
from runner.watch import write_out

_PING_S = 10
_RETRY_S = 1.0
_END_LINES = 100
_HEADER_BYTES = 8
_CHUNK_BYTES = 1 << 16
_KERNEL_LOG = Path("/dev/kmsg")


class LogNotWrittenError(Exception):
    """What the daemon has of a log cannot be written here.

    Attributes:
        why: what the system said.
    """

    def __init__(self, why: OSError) -> None:
        self.why = why
        super().__init__(str(why))


def copy_log(container: Container, log: Path, *, follow: bool) -> None:
    """Append to the file what of the container's log it lacks.

    The daemon's log begins with all that stands in the file already, byte for byte, as nobody else
    writes there while the container is there: what is read again is known by its length.

    Raises:
        LogNotWrittenError: the file takes no more.
    """
    skip = log.stat().st_size
    with log.open("ab", buffering=0) as file:
        for data in _log_of(container, follow=follow):
            fresh = data[skip:] if skip else data
            skip = max(0, skip - len(data))
            if fresh:
                try:
                    write_out(file, fresh)
                except OSError as error:
                    raise LogNotWrittenError(error) from error


def _log_of(container: Container, *, follow: bool) -> Iterator[bytes]:
    """A container's log from its beginning, as it comes.

    By the daemon's answer itself: docker-py reads it a header and a line at a time, and is slower
    than `docker logs -f` (benchmarks/runner.py).
    """
    # Docker's client is untyped here; it is a requests.Session.
    api = cast("Any", container.client).api
    asked = {"follow": int(follow), "stdout": 1, "stderr": 1}
    url = f"{api.base_url}/v{api.api_version}/containers/{container.id}/logs"
    # A daemon may be silent for hours: only its answer's beginning has a deadline.
    with api.get(url, params=asked, stream=True, timeout=(_PING_S, None)) as response:
        if response.status_code == HTTPStatus.NOT_FOUND:
            raise NotFound(f"no container {container.id}")
        response.raise_for_status()
        yield from frames(response.iter_content(_CHUNK_BYTES))


def frames(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """What stands in a stream of frames, wherever it is cut.

    A frame is one byte that names the stream, three of 0, the payload's size in four (big-endian),
    and the payload; of a frame that is not whole what is there is not lost.

    Source: Docker Engine API v1.41, "Attach to a container", stream format.

    >>> b"".join(frames([b"\\1\\0\\0\\0\\0\\0\\0\\2a", b"b\\2\\0\\0", b"\\0\\0\\0\\0\\1c"]))
    b'abc'
    """
    held, left = b"", 0
    for chunk in chunks:
        # Nearly always a chunk is one frame: a line that the daemon has flushed.
        if not held and not left and len(chunk) - _HEADER_BYTES == int.from_bytes(chunk[4:8]):
            yield chunk[_HEADER_BYTES:]
            continue
        data, at, payloads = held + chunk, 0, list[bytes]()
        while True:
            if left:
                payload = data[at : at + left]
                at, left = at + len(payload), left - len(payload)
                payloads.append(payload)
            if left or len(data) - at < _HEADER_BYTES:
                break
            left = int.from_bytes(data[at + 4 : at + _HEADER_BYTES])
            at += _HEADER_BYTES
        held = data[at:]
        if payload := b"".join(payloads):
            yield payload


def complete_log(container: Container, log: Path) -> None:
    """Append what an ended container's log has beyond the file; reads it all only where it must."""
    end: bytes = container.logs(tail=_END_LINES)
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(end)))
        copied = file.read() == end
    if not copied:
        copy_log(container, log, follow=False)


class ContainerTask:
    """A container under way, and the thread that copies its log to the run's directory."""

    def __init__(
        self, client: DockerClient, run: RunDir, container_id: str, *, retry_s: float = _RETRY_S
    ) -> None:
        self._client, self._run, self._id = client, run, container_id
        self._retry_s = retry_s
        self._state: dict[str, Any] | None = None
        self._unwritten: OSError | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    @property
    def container_id(self) -> str:
        """As the daemon knows it."""
        return self._id

    def wait(self, seconds: float) -> ExitStatus | None:
        """How it ended, its log copied; None when it has not after so many seconds.

        Raises:
            NotFinishedError: it has ended, and the rest of its log finds no room here.
        """
        self._thread.join(seconds)
        if self._thread.is_alive():
            return None
        status = state_status(self._run, self._state)
        if self._unwritten is not None:
            raise NotFinishedError(self._run, status, self._unwritten)
        return status

    def stop(self, number: int) -> None:
        """Pass on a signal, through the container's init."""
        _signal(self._client, self._id, number)

    def kill(self) -> None:
        """End the container."""
        _signal(self._client, self._id, signal.SIGKILL)

    def _follow(self) -> None:
        """Copy until it has ended; a stream that ends, or breaks, earlier is only an interlude."""
        while not self._unwritten:
            try:
                container = self._client.containers.get(self._id)
                with contextlib.suppress(LogNotWrittenError):  # there may be room by its end
                    copy_log(container, self._run.path / LOG_FILE, follow=True)
                # The stream's end is not the container's: a daemon that restarts ends it as well.
                container.wait(timeout=_PING_S)
                container.reload()
                if not container.attrs["State"]["Running"]:
                    self._state = container.attrs["State"]
                    complete_log(container, self._run.path / LOG_FILE)
                    return
            except NotFound:
                return
            except LogNotWrittenError as error:
                self._unwritten = error.why
            except (DockerException, OSError):
                time.sleep(self._retry_s)


class OthersTask:
    """A container that another runner started; its log is that runner's care, or `settle`'s."""

    def __init__(self, client: DockerClient, run: RunDir, container_id: str) -> None:
        self._client, self._run, self._id = client, run, container_id

    def wait(self, seconds: float) -> ExitStatus | None:
        """How it ended; None when it has not after so many seconds."""
        time.sleep(seconds)
        try:
            state = self._client.containers.get(self._id).attrs["State"]
        except NotFound:  # ended, and removed by its runner
            return ending.LOST
        return None if state["Running"] else state_status(self._run, state)

    def stop(self, number: int) -> None:
        """Pass on a signal, through the container's init."""
        _signal(self._client, self._id, number)

    def kill(self) -> None:
        """End the container."""
        _signal(self._client, self._id, signal.SIGKILL)


def _signal(client: DockerClient, container_id: str, number: int) -> None:
    # It may have ended meanwhile, or the daemon be away: `wait` tells.
    with contextlib.suppress(DockerException, OSError):
        client.containers.get(container_id).kill(signal=signal_name(number))


def _killed_for_memory(container_id: str | None, *, kernel_log: Path = _KERNEL_LOG) -> bool:
    """The kernel's own word, where the daemon missed it and root may read it.

    containerd 1.6 sees no OOM kill at all on a host with a control group hierarchy that is not
    mounted ("cannot find cgroup mount destination").

    Source: mm/oom_kill.c, dump_oom_summary: `oom-kill:...,oom_memcg=/docker/ID,...`; a read of
    /dev/kmsg gives one record.
    """
    if container_id is None:
        return False
    try:
        handle = os.open(kernel_log, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        while True:
            with contextlib.suppress(BrokenPipeError):  # overwritten meanwhile: the next is read
                record = os.read(handle, 8192)
                if not record:
                    return False
                if b"oom-kill:" in record and container_id.encode() in record:
                    return True
    except BlockingIOError:  # the last has been read
        return False
    finally:
        os.close(handle)


def _went_with_the_host(state: dict[str, Any], booted: str | None) -> bool:
    """The host was booted since, and nobody saw how the container ended: its daemon says 255."""
    return state["ExitCode"] == ending.CODE_OF_LOST and booted not in (None, boot_id())


def state_status(run: RunDir, state: dict[str, Any] | None) -> ExitStatus:
    """How a container that runs no more ended, by its engine's State; `lost` without one."""
    manifest = run.read_json(run.manifest_file) or {}
    booted = manifest.get("host", {}).get("boot_id")
    if state is None or state["Status"] == "created" or _went_with_the_host(state, booted):
        return ending.LOST
    failed = state["ExitCode"] != ending.DONE
    return ending.of_container(
        state["ExitCode"],
        oom_killed=state["OOMKilled"] or (failed and _killed_for_memory(manifest.get("container"))),
        stopped=run.stop_file.exists(),
        refusal=state["ExitCode"] == ending.REFUSED and bool(run.refusals()),
    )
