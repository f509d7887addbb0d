"""What is left when a run is over: why it was taken, what filled a chip, the model that came of it.

`bad_batch.npz` (trainer/finite.py) is the one file of a run that is no JSON: the batch after which
a loss was no number, for numpy.
"""

from typing import Literal

from jobs.records import Record

NOTICE_FILE = "notice.json"
BLACK_BOX_FILE = "blackbox.json"
BAD_BATCH_FILE = "bad_batch.npz"
EXPORT_FILE = "export.json"


class Notice(Record):
    """The cloud said that it will take the machine, and the trainer stopped for it: notice.json.

    Attributes:
        key: of the metadata server: preempted or maintenance-event.
        value: what it said there: TRUE, TERMINATE_ON_HOST_MAINTENANCE.
        seen: UTC, ISO 8601.
    """

    key: str
    value: str
    seen: str


class LiveArrays(Record):
    """What one owner has on the fullest device.

    Attributes:
        owner: in the plan's words; "other" of what nobody claims.
        size_bytes: on that device, padding not counted.
        count: of arrays.
        known_by: identity: these very arrays are the owner's; shape: they only look like its own
            (an update was half done); nothing: of "other".
        largest: shape and dtype of its largest kinds, with their count and bytes.
    """

    owner: str
    size_bytes: int
    count: int
    known_by: Literal["identity", "shape", "nothing"]
    largest: list[str]


class BlackBox(Record):
    """Who held the memory when an allocation failed: blackbox.json.

    Attributes:
        error: the first lines of what the runtime said.
        phase: of the loop.
        step: the step under way; -1 before the first.
        device: the fullest, by live arrays.
        live_bytes: of all live arrays on it.
        live: by owner, largest first.
        host_bytes: of arrays that live in the host's memory, on all devices together.
        memory_stats: what the runtime tells of each device, in the order of `jax.local_devices()`;
            empty where it tells nothing (CPU).
        planned: by owner, what the plan's arithmetic had resident in that phase on one chip,
            programs aside; empty where the accelerator has no HBM.
        host_rss_bytes: of the trainer's process.
        notes: what could not be found out, and why.
    """

    error: str
    phase: str
    step: int
    device: str
    live_bytes: int
    live: list[LiveArrays]
    host_bytes: int
    memory_stats: list[dict[str, int]]
    planned: dict[str, int]
    host_rss_bytes: int
    notes: list[str]


class Export(Record):
    """A Hugging Face folder that was made of a checkpoint: export.json, beside the job file.

    Attributes:
        folder: absolute.
        checkpoint: the checkpoint's folder, absolute.
        steps: that are in it.
        model: that was trained.
        dtype: in which the weights are stored.
        weights_bytes: of all of them.
        files: that hold them.
    """

    folder: str
    checkpoint: str
    steps: int
    model: str
    dtype: str
    weights_bytes: int
    files: list[str]
