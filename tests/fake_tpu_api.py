"""The part of the Cloud TPU API (v2) that gcloud asks us for, on 127.0.0.1, for one zone's nodes.

Field names are those of the SDK's own generated client; the values are made up.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PARENT = "projects/p-test/locations/us-central2-b"


def node(name: str, addresses: list[str], *, state: str = "READY", kind: str = "v4-16") -> dict:
    """A node as the API tells of it, with an endpoint a worker."""
    endpoints = [
        {"ipAddress": f"10.130.0.{i + 2}", "port": 8470, "accessConfig": {"externalIp": address}}
        for i, address in enumerate(addresses)
    ]
    return {
        "name": f"{PARENT}/nodes/{name}",
        "acceleratorType": kind,
        "state": state,
        "health": "HEALTHY",
        "runtimeVersion": "tpu-ubuntu2204-base",
        "schedulingConfig": {"spot": True},
        "networkEndpoints": endpoints,
    }


def guest_attributes(keys: list[str]) -> dict:
    """What each worker published: its host key and its name."""
    return {
        "guestAttributes": [
            {
                "queryValue": {
                    "items": [
                        {"namespace": "hostkeys", "key": "ssh-ed25519", "value": key},
                        {"namespace": "guestInventory", "key": "Hostname", "value": f"t1v-w-{i}"},
                    ]
                }
            }
            for i, key in enumerate(keys)
        ]
    }


class Zone:
    """What the fake knows and was asked.

    Attributes:
        nodes: by name.
        keys: host keys of every node's workers, by name.
        asked: method and path of each request that changed something, with its body.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str, dict[str, Any]]] = []

    # A line a question is easier to hold against the API's pages than a dispatcher is.
    def answer(  # noqa: C901, PLR0911
        self, method: str, path: str, body: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        """Status and body for a request."""
        if method != "GET" and "getGuestAttributes" not in path:
            self.asked.append((method, path, body))
        if "/operations/" in path:
            return 200, self._done()
        if found := re.search(r"/nodes\?.*nodeId=([\w-]+)", path):
            self.nodes[found[1]] = {**node(found[1], []), **body, "state": "READY"}
            return 200, self._done()
        if re.search(r"/queuedResources\?", path) and method == "POST":
            spec = body["tpu"]["nodeSpec"][0]
            self.nodes[spec["nodeId"]] = {**node(spec["nodeId"], []), **spec["node"]}
            return 200, self._done()
        if "/queuedResources/" in path:
            if method == "DELETE":
                self.nodes.clear()
                return 200, self._done()
            return 200, {"name": path.partition("?")[0], "state": {"state": "ACTIVE"}}
        if re.search(r"/nodes(\?|$)", path):
            return 200, {"nodes": list(self.nodes.values())}
        found = re.search(r"/nodes/([\w-]+)(:\w+)?(\?|$)", path)
        name = found[1] if found else ""
        if name not in self.nodes:
            return 404, {"error": {"code": 404, "message": "not found", "status": "NOT_FOUND"}}
        if found[2] == ":getGuestAttributes":
            return 200, guest_attributes(self.keys.get(name, []))
        if method == "DELETE":
            del self.nodes[name]
            return 200, self._done()
        return 200, self.nodes[name]

    def _done(self) -> dict[str, Any]:
        kind = "type.googleapis.com/google.protobuf.Empty"
        return {"name": f"{PARENT}/operations/op-1", "done": True, "response": {"@type": kind}}


@contextmanager
def serving(zone: Zone) -> Iterator[int]:
    """The port at which the zone answers while the `with` lasts."""

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            status, told = zone.answer(self.command, self.path, body)
            content = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = _reply  # noqa: N815 - the server looks for these names

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
