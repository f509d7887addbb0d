import itertools
import struct
from pathlib import Path

import pytest
from fakes import FakeClient, FakeContainer, write_job
from hypothesis import given
from hypothesis import strategies as st

from jobs.records import Manifest
from jobs.spec import load
from runner.archive import RunDir
from runner.container import cache_folders, container_options
from runner.container_task import ContainerTask, complete_log, copy_log, frames, state_status

RUN = Path("/data/my runs/20260119-084640-smoke-15154fc")
SECRET = "hf_of_a_test"  # noqa: S105 - of nothing
CHUNKS = [b"first line\n", b"second", b" line\n", b"\xff\n", b"x" * 40000 + b"\n"]
WHOLE = b"".join(CHUNKS)
COMMIT = "15154fc0a1b2c3d4e5f60718293a4b5c6d7e8f90"


def options(folder, more="", *, name="smoke", environment=None, user=(1000, 1001), commit=COMMIT):
    job = load(write_job(folder, more, name=name))
    manifest = Manifest.model_construct(verb="train", commit=commit)
    given = {} if environment is None else environment
    return container_options(job, RUN, manifest=manifest, user=user, environment=given)


def test_a_cpu_job_gets_what_it_needs_and_nothing_more(tmp_path):
    cache = str(tmp_path / "cache")
    assert options(tmp_path) == {
        "image": "headroom:cpu",
        "command": ["train", f"{RUN}/job.json"],
        "name": "headroom-20260119-084640-smoke-15154fc",
        "user": "1000:1001",
        "mounts": [
            {"Type": "bind", "Source": str(RUN), "Target": str(RUN), "ReadOnly": False},
            {"Type": "bind", "Source": cache, "Target": cache, "ReadOnly": False},
        ],
        "devices": [],
        "ulimits": [],
        "shm_size": 1073741824,
        "network_mode": "host",
        "privileged": False,
        "security_opt": ["no-new-privileges"],
        "init": True,
        "log_config": {"type": "json-file", "config": {"max-size": "1p"}},
        "labels": {
            "headroom": "1",
            "headroom.run": RUN.name,
            "headroom.run_dir": str(RUN),
            "headroom.job": "smoke",
            "headroom.commit": COMMIT,
        },
        "environment": {
            "HOME": "/tmp",  # noqa: S108 - in the container
            "USER": "headroom",
            "PYTHONUNBUFFERED": "1",
            "HF_HOME": f"{cache}/huggingface",
        },
    }
    assert cache_folders(load(tmp_path / "job.yaml"))[0] == tmp_path / "cache"


@pytest.mark.parametrize(
    ("accelerator", "files"),
    [
        ("v4-8", ["/dev/accel0", "/dev/accel1", "/dev/accel2", "/dev/accel3"]),
        ("v5e-8", ["/dev/vfio"]),
        ("cpu-4", []),
    ],
)
def test_a_job_gets_the_device_files_of_its_accelerator(tmp_path, accelerator, files):
    path = write_job(tmp_path, "rollout: {prompts_per_step: 8}\n")
    job = load(path, overrides=[f"accelerator={accelerator}"])
    manifest = Manifest.model_construct(verb="train", commit=None)
    given = container_options(job, RUN, manifest=manifest, user=(0, 0), environment={})
    assert given["devices"] == [f"{file}:{file}:rwm" for file in files]
    assert given["image"] == ("headroom:cpu" if accelerator == "cpu-4" else "headroom:tpu")
    assert given["labels"]["headroom.commit"] == "nogit"
    assert given["user"] == "0:0"


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        ("devices: [/dev/accel7]", {"devices": ["/dev/accel7:/dev/accel7:rwm"]}),
        ("devices: []", {"devices": []}),
        ("memlock: -1", {"ulimits": [{"Name": "memlock", "Soft": -1, "Hard": -1}]}),
        ("memlock: 0", {"ulimits": [{"Name": "memlock", "Soft": 0, "Hard": 0}]}),
        ("nofile: 20000", {"ulimits": [{"Name": "nofile", "Soft": 20000, "Hard": 20000}]}),
        ("shm_gib: 0.25", {"shm_size": 268435456}),
        ("memory_gib: 1.5", {"mem_limit": 1610612736, "memswap_limit": 1610612736}),
        ("network: none", {"network_mode": "none"}),
        ("network: bridge", {"network_mode": "bridge"}),
        ("privileged: true", {"privileged": True, "security_opt": []}),
        ("image: mine:1", {"image": "mine:1"}),
    ],
)
def test_each_container_setting_changes_what_it_names_and_nothing_else(tmp_path, more, changed):
    assert options(tmp_path, f"container:\n  {more}\n") == {**options(tmp_path), **changed}


def test_data_model_and_binds_are_mounted_and_the_inputs_cannot_be_written(tmp_path):
    rows = tmp_path / "my rows.jsonl"
    rows.write_text('{"question": "q", "answer": "a #### 1"}\n')
    more = f"data: {{path: '{rows}'}}\ncontainer:\n  binds: ['/a b:/c', '/d:/e:ro', '/f:/g:rw']\n"
    job = load(write_job(tmp_path, more), overrides=["model=/models/q.gguf"])
    manifest = Manifest.model_construct(verb="train", commit=None)
    given = container_options(job, RUN, manifest=manifest, user=(0, 0), environment={})
    assert [(m["Source"], m["Target"], m["ReadOnly"]) for m in given["mounts"][2:]] == [
        (str(rows), str(rows), True),
        ("/models/q.gguf", "/models/q.gguf", True),
        ("/a b", "/c", False),
        ("/d", "/e", True),
        ("/f", "/g", False),
    ]


def mounts(job):
    manifest = Manifest.model_construct(verb="train", commit=None)
    given = container_options(job, RUN, manifest=manifest, user=(0, 0), environment={})
    return [(m["Source"], m["Target"], m["ReadOnly"]) for m in given["mounts"][2:]]


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_hugging_face_snapshot_is_given_with_the_blobs_its_links_lead_to(
    tmp_path, through_a_link
):
    repo = tmp_path / "hub" / "models--a--b"
    snapshot, blobs = repo / "snapshots" / "0123", repo / "blobs"
    (snapshot / "onnx").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "onnx" / "model").symlink_to("../../../blobs/abc")
    (snapshot / "within").symlink_to("config.json")
    (snapshot / "dangling").symlink_to("../nowhere")
    model, inside = snapshot, blobs
    if through_a_link:
        # Docker puts the folder itself there: ../../blobs is then beside x/y.
        model, inside = tmp_path / "x" / "y" / "model", tmp_path / "x" / "blobs"
        model.parent.mkdir(parents=True)
        model.symlink_to(snapshot)
    job = load(write_job(tmp_path), overrides=[f"model={model}"])
    assert mounts(job) == [(str(model), str(model), True), (str(blobs), str(inside), True)]


def test_of_a_folder_that_a_link_leads_into_only_the_file_is_given(tmp_path):
    model, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    model.mkdir()
    elsewhere.mkdir()
    weights = elsewhere / "model.safetensors"
    weights.write_text("")
    (elsewhere / "secret").write_text("")
    (model / "model.safetensors").symlink_to(weights)
    job = load(write_job(tmp_path), overrides=[f"model={model}"])
    assert mounts(job) == [(str(model), str(model), True), (str(weights), str(weights), True)]


def test_what_lies_in_a_mounted_folder_already_is_not_mounted_again(tmp_path):
    cache = tmp_path / "cache"
    snapshot, blobs = cache / "huggingface/hub/m/snapshots/0", cache / "huggingface/hub/m/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    more = f"container:\n  binds: ['/elsewhere:{snapshot}:rw']\n"
    job = load(write_job(tmp_path, more), overrides=[f"model={snapshot}"])
    assert mounts(job) == [("/elsewhere", str(snapshot), False)]


@pytest.mark.parametrize("size", [0, 11, len(WHOLE)])
def test_the_end_of_a_log_is_completed_where_it_was_cut(tmp_path, size):
    log = tmp_path / "run.log"
    log.write_bytes(WHOLE[:size])
    complete_log(FakeContainer(CHUNKS), log)
    assert log.read_bytes() == WHOLE


def test_passed_values_go_into_the_environment_and_nowhere_else(tmp_path):
    more = "container:\n  pass_env: [HF_TOKEN]\n"
    given = options(tmp_path, more, environment={"HF_TOKEN": SECRET})
    environment = given.pop("environment")
    assert environment["HF_TOKEN"] == SECRET
    assert SECRET not in str(given)


@pytest.mark.parametrize("size", [0, 1, 11, 14, 25, 26, len(WHOLE) - 1, len(WHOLE)])
def test_a_log_that_was_copied_in_part_is_completed_without_a_byte_twice(tmp_path, size):
    log = tmp_path / "run.log"
    log.write_bytes(WHOLE[:size])
    copy_log(FakeContainer(CHUNKS), log, follow=False)
    assert log.read_bytes() == WHOLE


@given(
    st.lists(st.binary(max_size=20), max_size=6),
    st.lists(st.integers(0, 200), max_size=8),
    st.integers(0, 30),
)
def test_frames_give_their_payloads_wherever_the_stream_is_cut_or_ends(payloads, cuts, lost):
    stream = b"".join(struct.pack(">B3xI", 1, len(payload)) + payload for payload in payloads)
    stream = stream[: max(0, len(stream) - lost)]
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    shown = b"".join(frames(stream[a:b] for a, b in itertools.pairwise(places)))
    whole = b"".join(payloads)
    assert whole.startswith(shown)
    assert len(whole) - len(shown) <= lost


@pytest.mark.parametrize(("breaks", "away"), [((), 0), ((0,), 1), ((2, 2, 5), 2), ((5,), 0)])
def test_a_log_whose_stream_ends_before_the_container_is_taken_up_again(tmp_path, breaks, away):
    (tmp_path / "run.log").touch()
    fake = FakeContainer(CHUNKS, breaks=breaks, code=3)
    task = ContainerTask(FakeClient(fake, away=away), RunDir(tmp_path), "id", retry_s=0.001)
    while (status := task.wait(0.01)) is None:
        pass
    assert status.code == 3
    assert (tmp_path / "run.log").read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("code", "oom_killed", "signal", "reason"),
    [
        (0, False, None, "done"),
        (1, False, None, "refused"),
        (1, False, None, "failed"),
        (3, False, None, "failed"),
        (134, False, "SIGABRT", "failed"),
        (137, False, "SIGKILL", "failed"),
        (137, True, "SIGKILL", "oom_killed"),
        (143, False, "SIGTERM", "interrupted"),
        (255, False, None, "failed"),
        # A child of the trainer was killed for memory and the trainer went on to a good end.
        (0, True, None, "done"),
    ],
)
def test_a_containers_state_tells_how_it_ended(tmp_path, code, oom_killed, signal, reason):
    (tmp_path / "run.log").write_text("up\nError: no TPU\n" if reason == "refused" else "up\n")
    state = {"Status": "exited", "ExitCode": code, "OOMKilled": oom_killed}
    status = state_status(RunDir(tmp_path), state)
    assert (status.code, status.signal, status.reason) == (code, signal, reason)
    assert status.oom_killed == (reason == "oom_killed")


@pytest.mark.parametrize("state", [None, {"Status": "created", "ExitCode": 0, "OOMKilled": False}])
def test_a_container_that_is_gone_or_never_started_is_lost(tmp_path, state):
    assert state_status(RunDir(tmp_path), state).reason == "lost"
