"""What libtpu must be told where it only compiles, and which version of it is here. Without JAX."""

from importlib import metadata

# Ask no metadata server, no other host, no chip; and live beside a job that has the chips.
SETTINGS = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a program takes; those that are not here lack."""
    found: dict[str, str] = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
