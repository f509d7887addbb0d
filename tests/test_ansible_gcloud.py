"""The inventory from gcloud: from recorded answers, and by the real gcloud against a fake API."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_tpu_api
import pytest

ANSIBLE = Path(__file__).resolve().parents[1] / "ansible"
KEYS = [f"AAAAC3NzaC1lZDI1NTE5AAAAI{letter * 43}" for letter in "ab"]
ADDRESSES = ["203.0.113.7", "203.0.113.5"]


def load():
    path = ANSIBLE / "inventory" / "gcloud.py"
    spec = importlib.util.spec_from_file_location("gcloud_inventory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gcloud = load()


def attributes(keys: list[str]) -> list[dict]:
    """As `gcloud ... get-guest-attributes --format=json` prints what the API told."""
    return [
        {"worker_id": i, "namespace": "hostkeys", "key": kind, "value": key}
        for i, key in enumerate(keys)
        for kind in ("ssh-rsa", "ssh-ed25519")
    ]


def answers(node: dict, keys: list[str]):
    told = {"describe": node, "list": [node], "get-guest-attributes": attributes(keys)}
    return lambda verb, *_: told[verb]


ASKED = {"TPU_NAME": "hr", "TPU_ZONE": "us-central2-b"}


def test_workers_come_in_order_with_their_addresses_and_pinned_keys(tmp_path):
    node = fake_tpu_api.node("hr", ADDRESSES)
    made = gcloud.inventory(ASKED, gcloud=answers(node, KEYS), folder=tmp_path)
    assert made["tpu"] == {"hosts": ["hr-w0", "hr-w1"], "vars": {"ansible_user": "root"}}
    hosts = made["_meta"]["hostvars"]
    assert [hosts[name]["ansible_host"] for name in ("hr-w0", "hr-w1")] == ADDRESSES
    assert {host["vm_accelerator"] for host in hosts.values()} == {"v4-16"}
    pinned = Path(hosts["hr-w1"]["known_hosts_file"]).read_text().splitlines()
    assert pinned == [f"{a} ssh-ed25519 {k}" for a, k in zip(ADDRESSES, KEYS, strict=True)]


def test_internal_addresses_are_taken_when_asked_for_or_when_there_are_no_others(tmp_path):
    node = fake_tpu_api.node("hr", ADDRESSES)
    asked = {**ASKED, "TPU_ADDRESS": "internal"}
    made = gcloud.inventory(asked, gcloud=answers(node, KEYS), folder=tmp_path)
    assert made["_meta"]["hostvars"]["hr-w0"]["ansible_host"] == "10.130.0.2"
    for endpoint in node["networkEndpoints"]:
        del endpoint["accessConfig"]
    made = gcloud.inventory(ASKED, gcloud=answers(node, KEYS), folder=tmp_path)
    assert made["_meta"]["hostvars"]["hr-w1"]["ansible_host"] == "10.130.0.3"
    with pytest.raises(gcloud.NotFitError, match="no external address"):
        gcloud.inventory(
            {**ASKED, "TPU_ADDRESS": "external"}, gcloud=answers(node, KEYS), folder=tmp_path
        )


@pytest.mark.parametrize(
    ("node", "keys", "asked", "says"),
    [
        (fake_tpu_api.node("hr", ADDRESSES, state="PREEMPTED"), KEYS, ASKED, "hr is PREEMPTED"),
        (fake_tpu_api.node("hr", ADDRESSES), KEYS[:1], ASKED, "hr-w1 published no ssh host key"),
        (fake_tpu_api.node("hr", ADDRESSES), KEYS, {"TPU_NAME": "hr"}, "TPU_ZONE is not set"),
        (
            fake_tpu_api.node("hr", ADDRESSES), KEYS, {**ASKED, "TPU_ADDRESS": "both"},
            "external or internal",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_reached_safely_is_refused(tmp_path, node, keys, asked, says):
    with pytest.raises(gcloud.NotFitError, match=says):
        gcloud.inventory(asked, gcloud=answers(node, keys), folder=tmp_path)


def test_without_a_name_all_that_are_ready_are_listed(tmp_path):
    ready = fake_tpu_api.node("hr", ADDRESSES)
    away = fake_tpu_api.node("gone", ["203.0.113.9"], state="PREEMPTED")
    told = {"list": [away, ready], "get-guest-attributes": attributes(KEYS)}
    made = gcloud.inventory({"TPU_ZONE": "z"}, gcloud=lambda verb, *_: told[verb], folder=tmp_path)
    assert made["tpu"]["hosts"] == ["hr-w0", "hr-w1"]


@pytest.fixture
def zone():
    return fake_tpu_api.Zone()


@pytest.fixture
def world(zone, tmp_path):
    """The environment in which the real gcloud talks to the fake API."""
    if shutil.which("gcloud") is None:
        pytest.skip("no gcloud here")
    (tmp_path / "token").write_text("not-a-token")
    with fake_tpu_api.serving(zone) as port:
        yield {
            **os.environ,  # noqa: TID251
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"http://127.0.0.1:{port}/",
            "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(tmp_path / "token"),
            "CLOUDSDK_CONFIG": str(tmp_path / "config"),
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "TPU_ZONE": "us-central2-b",
            "TPU_PROJECT": "p-test",
            "LC_ALL": "C.UTF-8",
            "ANSIBLE_HOME": str(tmp_path / "ansible"),
        }


def program(world, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, argv)), cwd=ANSIBLE, env=world, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_the_real_gcloud_gives_ansible_the_inventory(zone, world):
    zone.nodes["hr"] = fake_tpu_api.node("hr", ADDRESSES)
    zone.keys["hr"] = KEYS
    show = [Path(sys.executable).with_name("ansible-inventory"), "-i", "inventory/gcloud.py"]
    done = program({**world, "TPU_NAME": "hr"}, *show, "--host=hr-w1")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["ansible_host"], told["tpu_worker"]) == (ADDRESSES[1], 1)
    # The script's word outweighs group_vars/all.yml: the keys are those of this TPU VM.
    pinned = Path(told["known_hosts_file"]).read_text()
    assert pinned.splitlines()[1] == f"{ADDRESSES[1]} ssh-ed25519 {KEYS[1]}"
    away = program({**world, "TPU_NAME": "none"}, *show, "--list")
    assert away.returncode != 0
    assert "not found" in away.stderr.lower()


@pytest.mark.parametrize("queued", [False, True])
def test_create_makes_one_and_delete_removes_it_and_done_again_they_change_nothing(
    zone, world, queued
):
    play = Path(sys.executable).with_name("ansible-playbook")
    asked = {"tpu_name": "hr", "tpu_zone": "us-central2-b", "tpu_project": "p-test"}
    asked |= {"tpu_type": "v4-8", "tpu_queued": queued, "tpu_poll_s": 1}
    made = program(world, play, "create.yml", "-i", "localhost,", "-e", json.dumps(asked))
    assert made.returncode == 0, made.stdout + made.stderr
    assert "changed=1" in made.stdout
    [(method, path, body)] = zone.asked
    assert method == "POST"
    sent = json.dumps(body)
    assert "v4-8" in sent
    assert "tpu-ubuntu2204-base" in sent
    assert '"enable-guest-attributes": "TRUE"' in sent
    assert "spot" in sent.lower()
    if queued:
        assert "queuedResources" in path
        return
    again = program(world, play, "create.yml", "-i", "localhost,", "-e", json.dumps(asked))
    assert "changed=0" in again.stdout, again.stdout
    gone = program(world, play, "delete.yml", "-i", "localhost,", "-e", json.dumps(asked))
    assert (gone.returncode, zone.nodes) == (0, {}), gone.stdout
    again = program(world, play, "delete.yml", "-i", "localhost,", "-e", json.dumps(asked))
    assert again.returncode == 0, again.stdout
    assert "changed=0" in again.stdout
