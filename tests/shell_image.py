"""An image of this machine's own shell and a few programs: nothing is pulled."""

import io
import shutil
import subprocess
import tarfile

import docker

PROGRAMS = ("sh", "cat", "env", "head", "id", "seq", "sleep", "tail", "touch", "tr")


def shell_image() -> bytes:
    """A tar of the programs and what they link to."""
    buffer = io.BytesIO()
    added = set()
    with tarfile.open(fileobj=buffer, mode="w", dereference=True) as tar:
        for program in PROGRAMS:
            found = shutil.which(program)
            tar.add(found, f"bin/{program}")
            linked = subprocess.run(["ldd", found], capture_output=True, text=True, check=True)
            for word in linked.stdout.split():
                if word.startswith("/") and word not in added:
                    added.add(word)
                    tar.add(word, word.lstrip("/"))
        for folder in ("tmp", "dev", "proc", "sys", "etc"):
            made = tarfile.TarInfo(folder)
            made.type, made.mode = tarfile.DIRTYPE, 0o1777
            tar.addfile(made)
    return buffer.getvalue()


def load_shell_image(client: docker.DockerClient, image: str) -> None:
    """Give a daemon the image; its program is the script /told/job.sh of a bind mount."""
    name, _, tag = image.partition(":")
    changes = ['ENTRYPOINT ["/bin/sh", "/told/job.sh"]', "LABEL headroom.test=1"]
    client.api.import_image_from_data(shell_image(), repository=name, tag=tag, changes=changes)
