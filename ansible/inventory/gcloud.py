#!/usr/bin/env python3
"""Inventory of TPU VMs from gcloud: every worker, in order, with the host key that it published.

    TPU_NAME=my-tpu TPU_ZONE=us-central2-b ansible-playbook -i inventory/gcloud.py deploy.yml

TPU_NAME: one TPU VM; unset: all of the zone that are READY.  TPU_ZONE: as gcloud's --zone.
TPU_PROJECT: unset: gcloud's own.  TPU_USER: who gets in, root when unset.
The key is gcloud's, ~/.ssh/google_compute_engine, where there is one.
TPU_ADDRESS: external or internal; unset: external where there is one.

Host keys are read from the guest attributes that each VM published when it booted, and written to a
known_hosts of its own: a VM that answers with another key is refused.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from jobs.accelerators import ACCELERATORS

Gcloud = Callable[..., Any]
_TIMEOUT_S = 120
KEY_KINDS = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa")


class NotFitError(Exception):
    """No inventory can be made; the message says why and what would help."""


def run_gcloud(verb: str, *more: str) -> Any:
    """The JSON that a verb of `gcloud compute tpus tpu-vm` prints.

    Raises:
        NotFitError: with gcloud's own words.
    """
    argv = ["gcloud", "compute", "tpus", "tpu-vm", verb, *more, "--format=json"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise NotFitError(
            "there is no gcloud on the PATH; write inventory/hosts.yaml instead"
        ) from error
    if done.returncode != 0:
        raise NotFitError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def nodes(asked: Mapping[str, str], gcloud: Gcloud) -> list[dict[str, Any]]:
    """The TPU VMs that were asked for, all of them READY.

    Raises:
        NotFitError: the one that was named is in another state.
    """
    where = place(asked)
    name = asked.get("TPU_NAME", "")
    if not name:
        return [node for node in gcloud("list", *where) if node.get("state") == "READY"]
    node = gcloud("describe", name, *where)
    state = node.get("state")
    if state != "READY":
        raise NotFitError(
            f"{name} is {state}, not READY; "
            f"gcloud compute tpus tpu-vm describe {name} {' '.join(where)} tells more"
        )
    return [node]


def place(asked: Mapping[str, str]) -> list[str]:
    """Zone and project as options of gcloud.

    Raises:
        NotFitError: no zone was named.
    """
    zone, project = asked.get("TPU_ZONE", ""), asked.get("TPU_PROJECT", "")
    if not zone:
        raise NotFitError("TPU_ZONE is not set, for example TPU_ZONE=us-central2-b")
    return [f"--zone={zone}", *([f"--project={project}"] if project else [])]


def host_keys(attributes: list[dict[str, Any]]) -> dict[int, tuple[str, str]]:
    """Kind and key by worker, of what get-guest-attributes prints; the best kind of each."""
    found: dict[int, dict[str, str]] = {}
    for item in attributes:
        if item.get("namespace") == "hostkeys":
            found.setdefault(int(item.get("worker_id", 0)), {})[item["key"]] = item["value"]
    best = {
        worker: next((kind for kind in KEY_KINDS if kind in keys), None)
        for worker, keys in found.items()
    }
    return {worker: (kind, found[worker][kind]) for worker, kind in best.items() if kind}


def hosts(node: Mapping[str, Any], *, address: str) -> dict[str, dict[str, Any]]:
    """Variables by host of a node's workers, in worker order.

    Raises:
        NotFitError: a worker has no address of the kind that was asked for.
    """
    name = node["name"].rpartition("/")[2]
    made: dict[str, dict[str, Any]] = {}
    for worker, endpoint in enumerate(node.get("networkEndpoints", [])):
        external = endpoint.get("accessConfig", {}).get("externalIp")
        internal = endpoint.get("ipAddress")
        chosen = {"external": external, "internal": internal, "": external or internal}[address]
        if not chosen:
            raise NotFitError(
                f"worker {worker} of {name} has no {address or 'known'} address; "
                "try TPU_ADDRESS=internal from inside its network"
            )
        made[f"{name}-w{worker}"] = {
            "ansible_host": chosen,
            "tpu_worker": worker,
            "vm_accelerator": accelerator_of(node.get("acceleratorType", "")),
        }
    return made


def accelerator_of(gcloud_type: str) -> str:
    """Our name of gcloud's accelerator type; an unknown one as it is, for the roles to refuse.

    >>> accelerator_of("v5litepod-8"), accelerator_of("v4-8"), accelerator_of("v9-1")
    ('v5e-8', 'v4-8', 'v9-1')
    """
    known = {row.gcloud_type: row.name for row in ACCELERATORS.values()}
    return known.get(gcloud_type, gcloud_type)


def inventory(
    asked: Mapping[str, str], *, gcloud: Gcloud = run_gcloud, folder: Path
) -> dict[str, Any]:
    """The inventory as Ansible reads it; the host keys are written into the folder.

    Raises:
        NotFitError: a VM is not READY, or published no host key.
    """
    address = asked.get("TPU_ADDRESS", "")
    if address not in {"", "external", "internal"}:
        raise NotFitError(f"TPU_ADDRESS is {address!r}; external or internal, or leave it out")
    found: dict[str, dict[str, Any]] = {}
    for node in nodes(asked, gcloud):
        name = node["name"].rpartition("/")[2]
        workers = hosts(node, address=address)
        keys = host_keys(gcloud("get-guest-attributes", name, *place(asked)))
        known = folder / name / "known_hosts"
        missing = [host for host, made in workers.items() if made["tpu_worker"] not in keys]
        if missing:
            raise NotFitError(
                f"{', '.join(missing)} published no ssh host key in its guest attributes: were "
                "they enabled (enable-guest-attributes=TRUE)? Or pin it by hand: docs/deploy.md"
            )
        lines = [
            " ".join((made["ansible_host"], *keys[made["tpu_worker"]])) for made in workers.values()
        ]
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text("".join(f"{line}\n" for line in lines))
        found |= {host: {**made, "known_hosts_file": str(known)} for host, made in workers.items()}
    variables = {"ansible_user": asked.get("TPU_USER") or "root"}
    key = Path(asked.get("HOME", "/")) / ".ssh" / "google_compute_engine"
    if key.is_file():
        variables["ansible_ssh_private_key_file"] = str(key)
    return {
        "tpu": {"hosts": list(found), "vars": variables},
        "_meta": {"hostvars": found},
    }


def main() -> None:
    """Print the inventory, or the reason why there is none."""
    try:
        made = inventory(os.environ, folder=REPOSITORY / ".cache" / "gcloud")
    except NotFitError as error:
        sys.exit(f"Error: {error}")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
