"""Send an image from this machine's Docker engine to a VM's, over ssh; nothing is kept in between.

ship_image.py IMAGE TO; TO is JSON, see `To`.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class To:
    """The VM, as the inventory has it; "" where it says nothing.

    Attributes:
        address: of the VM.
        options: of ssh, as one line of a shell; the pinned host keys are in it.
        user, port, key: how to get in.
        sudo: that user is not root.
    """

    address: str
    options: str
    user: str = ""
    port: str = ""
    key: str = ""
    sudo: bool = True


def ssh_argv(to: To, command: list[str]) -> list[str]:
    """The argument vector of ssh that runs a command there.

    >>> ssh_argv(To("10.0.0.9", '-o UserKnownHostsFile="/a b"', sudo=False), ["id", "-u"])
    ['ssh', '-o', 'UserKnownHostsFile=/a b', '--', '10.0.0.9', 'id -u']
    """
    argv = ["ssh", *shlex.split(to.options)]
    for flag, value in (("-l", to.user), ("-p", str(to.port)), ("-i", to.key)):
        argv += [flag, value] if value else []
    words = ["sudo", "-n", *command] if to.sudo else command
    return [*argv, "--", to.address, shlex.join(words)]


def ship(image: str, to: To) -> int:
    """Save here, load there; 0 where both ended well."""
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as save:
        load = subprocess.run(
            ssh_argv(to, ["docker", "load", "--quiet"]), stdin=save.stdout, check=False
        )
        # Only ours is left: where the loading ended early, the saving must not wait for a reader.
        if save.stdout is not None:
            save.stdout.close()
    return load.returncode or save.returncode


if __name__ == "__main__":
    sys.exit(ship(sys.argv[1], To(**json.loads(sys.argv[2]))))
