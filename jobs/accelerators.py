"""The one table of accelerators: what each type has, and what the compiler calls it.

Usable HBM was read from libtpu 0.0.32.1's own compile error per topology ("Used X of Y hbm"):
it is what the runtime can give out, not the figure on the data sheet. Peak FLOP/s and HBM
bandwidth are Google's published figures a chip (cloud.google.com/tpu/docs/system-architecture);
bandwidths count 1 GB/s as 1e9 bytes a second. Where JAX lists two devices a chip, a device has
half of them.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Arguments of `jax.experimental.topologies.get_topology_desc` for one accelerator."""

    name: str
    chip_config: str
    chips_per_host_bounds: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One accelerator type. Every figure is a device's, as JAX lists devices.

    Attributes:
        name: the type as users write it, "v4-8".
        platform: JAX's platform name.
        devices: what `jax.devices()` lists on the whole slice.
        hosts: VMs in the slice; each has `devices / hosts` of the devices.
        device_kind: `jax.Device.device_kind`.
        usable_hbm_bytes: bytes a device that the runtime can give out; 0 where there is no HBM.
        reserved_hbm_bytes: bytes a device that the runtime keeps for itself.
        peak_flops: bf16 FLOP/s a device; 0 where unknown.
        hbm_bandwidth: bytes/s a device; 0 where unknown.
        gcloud_type: `TPU_ACCELERATOR_TYPE`, as gcloud spells it; empty without a TPU.
        device_files: what a container must be given to reach the chips of one host.
        topology: what the ahead-of-time compiler calls it; None where it has no name for it.
    """

    name: str
    platform: Literal["cpu", "tpu"]
    devices: int
    hosts: int = 1
    device_kind: str
    usable_hbm_bytes: int = 0
    reserved_hbm_bytes: int = 0
    peak_flops: float = 0.0
    hbm_bandwidth: float = 0.0
    gcloud_type: str = ""
    device_files: tuple[str, ...] = ()
    topology: Topology | None = None

    @property
    def devices_per_host(self) -> int:
        """Devices that one host sees as its own."""
        return self.devices // self.hosts


@dataclass(frozen=True, kw_only=True)
class _Generation:
    """What all slices of one TPU generation share; figures a device."""

    device_kind: str
    usable_gib: float
    reserved_mib: float
    tflops: float
    gbps: float
    chip_config: str
    bounds: tuple[int, int, int]
    gcloud: str
    devices_per_host: int
    device_files: tuple[str, ...]


_ACCEL = tuple(f"/dev/accel{i}" for i in range(4))
_VFIO = ("/dev/vfio",)

# usable_gib, reserved_mib: the compiler's own words for each topology (libtpu 0.0.32.1).
# v2 and v3 list two devices a chip (45 and 123 TFLOP/s, 700 and 900 GB/s a chip); so does v7x.
# v4 and v5p need chip_config "megacore": without it the compiler plans 8 devices of half a chip.
_GENERATIONS = {
    "v2": _Generation(
        device_kind="TPU v2", usable_gib=7.48, reserved_mib=530, tflops=22.5, gbps=350,
        chip_config="default", bounds=(2, 2, 1), gcloud="v2-8", devices_per_host=8,
        device_files=_ACCEL,
    ),
    "v3": _Generation(
        device_kind="TPU v3", usable_gib=15.48, reserved_mib=530, tflops=61.5, gbps=450,
        chip_config="default", bounds=(2, 2, 1), gcloud="v3-8", devices_per_host=8,
        device_files=_ACCEL,
    ),
    "v4": _Generation(
        device_kind="TPU v4", usable_gib=30.75, reserved_mib=1280, tflops=275, gbps=1228,
        chip_config="megacore", bounds=(2, 2, 1), gcloud="v4-{n}", devices_per_host=4,
        device_files=_ACCEL,
    ),
    "v5e": _Generation(
        device_kind="TPU v5 lite", usable_gib=15.75, reserved_mib=258, tflops=197, gbps=819,
        chip_config="default", bounds=(2, 4, 1), gcloud="v5litepod-{n}", devices_per_host=8,
        device_files=_VFIO,
    ),
    "v5p": _Generation(
        device_kind="TPU v5", usable_gib=95.74, reserved_mib=263, tflops=459, gbps=2765,
        chip_config="megacore", bounds=(2, 2, 1), gcloud="v5p-{n}", devices_per_host=4,
        device_files=_VFIO,
    ),
    "v6e": _Generation(
        device_kind="TPU v6 lite", usable_gib=31.25, reserved_mib=260, tflops=918, gbps=1640,
        chip_config="default", bounds=(2, 4, 1), gcloud="v6e-{n}", devices_per_host=8,
        device_files=_VFIO,
    ),
    "v7x": _Generation(
        device_kind="TPU7x", usable_gib=94.75, reserved_mib=260, tflops=1153.5, gbps=3690,
        chip_config="default", bounds=(2, 2, 1), gcloud="tpu7x-{n}", devices_per_host=8,
        device_files=_VFIO,
    ),
}  # fmt: skip

# (type, generation, topology name, devices)
_SLICES = (
    ("v2-8", "v2", "v2:2x2", 8),
    ("v3-8", "v3", "v3:2x2", 8),
    ("v4-8", "v4", "v4:2x2x1", 4),
    ("v4-16", "v4", "v4:2x2x2", 8),
    ("v5e-8", "v5e", "v5e:2x4", 8),
    ("v5e-16", "v5e", "v5e:4x4", 16),
    ("v5p-8", "v5p", "v5p:2x2x1", 4),
    ("v6e-8", "v6e", "v6e:2x4", 8),
    ("v6e-16", "v6e", "v6e:4x4", 16),
    ("v7x-8", "v7x", "tpu7x:2x2x1", 8),
)


def _slice(name: str, generation: str, topology: str, devices: int) -> Accelerator:
    g = _GENERATIONS[generation]
    return Accelerator(
        name=name,
        platform="tpu",
        devices=devices,
        hosts=max(1, devices // g.devices_per_host),
        device_kind=g.device_kind,
        usable_hbm_bytes=int(g.usable_gib * GIB),
        reserved_hbm_bytes=int(g.reserved_mib * 2**20),
        peak_flops=g.tflops * 1e12,
        hbm_bandwidth=g.gbps * 1e9,
        gcloud_type=g.gcloud.format(n=name.rpartition("-")[2]),
        device_files=g.device_files,
        topology=Topology(name=topology, chip_config=g.chip_config, chips_per_host_bounds=g.bounds),
    )


ACCELERATORS: dict[str, Accelerator] = {row[0]: _slice(*row) for row in _SLICES}
_CPU = re.compile(r"cpu(?:-([1-9][0-9]{0,2}))?")


def accelerator(name: str) -> Accelerator:
    """The accelerator of that type; "cpu" is one device, "cpu-4" four virtual ones.

    Raises:
        KeyError: no such type; the message names the nearest one and the whole list.

    >>> accelerator("v4-8").devices, accelerator("v4-8").usable_hbm_bytes / GIB
    (4, 30.75)
    >>> accelerator("cpu-4").devices
    4
    """
    if cpu := _CPU.fullmatch(name):
        return Accelerator(
            name=name, platform="cpu", devices=int(cpu.group(1) or 1), device_kind="cpu"
        )
    if name in ACCELERATORS:
        return ACCELERATORS[name]
    near = get_close_matches(name, ACCELERATORS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise KeyError(f"{hint}known: {', '.join(ACCELERATORS)}, cpu, cpu-N")
