"""Send an image from this machine's Docker engine to a VM's, over ssh; nothing is kept in between.

ship_image.py IMAGE TAG TO; TAG is its name there, TO is JSON, see `To`.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass


class NotShippedError(Exception):
    """The image is not there; the message says why."""


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


def ship(image: str, tag: str, to: To) -> None:
    """Save here, load there, and name there what arrived; no other name there is touched.

    Raises:
        NotShippedError: with the words of the program that failed.
    """
    # By its id: a name would be given there as soon as it is loaded, also to one that jobs use.
    found = run(["docker", "image", "inspect", "--format", "{{.Id}}", image], "")
    with subprocess.Popen(["docker", "save", found], stdout=subprocess.PIPE) as save:
        argv = ssh_argv(to, ["docker", "load", "--quiet"])
        load = subprocess.run(argv, stdin=save.stdout, capture_output=True, text=True, check=False)
        # Where the loading ended early the saving must not wait for a reader.
        if save.stdout is not None:
            save.stdout.close()
    if save.returncode or load.returncode:
        raise NotShippedError(
            f"{image}: docker save ended with {save.returncode}, docker load at {to.address} "
            f"with {load.returncode}: {load.stderr.strip()}"
        )
    arrived = load.stdout.strip().rpartition(" ")[2]
    run(ssh_argv(to, ["docker", "tag", arrived, tag]), image)


def run(argv: list[str], about: str) -> str:
    """What a program prints that has to succeed."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotShippedError(f"{about} {argv}: {done.stderr.strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    try:
        ship(sys.argv[1], sys.argv[2], To(**json.loads(sys.argv[3])))
    except NotShippedError as error:
        sys.exit(f"Error: {error}")
