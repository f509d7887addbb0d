"""The accelerator table against the figures that the compiler printed."""

import pytest

from jobs.accelerators import ACCELERATORS, GIB, accelerator
from jobs.records import gib

# libtpu 0.0.32.1's own error text, "Used X of <this> hbm", one probe a topology; devices and hosts
# as the topology lists them.
COMPILER_SAYS = {
    "v2-8": (7.48, 8, 1),
    "v3-8": (15.48, 8, 1),
    "v4-8": (30.75, 4, 1),
    "v4-16": (30.75, 8, 2),
    "v5e-8": (15.75, 8, 1),
    "v5p-8": (95.74, 4, 1),
    "v6e-8": (31.25, 8, 1),
    "v7x-8": (94.75, 8, 1),
}


@pytest.mark.parametrize(("name", "figures"), COMPILER_SAYS.items())
def test_the_table_holds_the_compilers_figures(name, figures):
    usable, devices, hosts = figures
    row = accelerator(name)
    assert (row.usable_hbm_bytes / GIB, row.devices, row.hosts) == (
        pytest.approx(usable, abs=1e-6),
        devices,
        hosts,
    )


def test_v4_is_32_gib_less_what_the_runtime_keeps():
    row = accelerator("v4-8")
    assert row.usable_hbm_bytes + row.reserved_hbm_bytes == 32 * GIB
    assert gib(row.usable_hbm_bytes) == "30.75 GiB"


def test_v4_peak_is_its_clock_times_its_multipliers():
    # 1.05 GHz x 2 cores x 4 MXU x 128 x 128 multiply-adds x 2 operations = 275 TFLOP/s
    assert accelerator("v4-8").peak_flops == pytest.approx(1.05e9 * 2 * 4 * 128 * 128 * 2, rel=2e-3)


def test_hosts_share_the_devices_evenly():
    for row in ACCELERATORS.values():
        assert row.devices_per_host * row.hosts == row.devices


@pytest.mark.parametrize("name", ["v4-9", "tpu", "cpu-0", "cpu-x", ""])
def test_an_unknown_type_is_refused_with_the_list(name):
    with pytest.raises(KeyError, match="known: v2-8"):
        accelerator(name)


def test_the_nearest_type_is_offered():
    with pytest.raises(KeyError, match="did you mean 'v4-8'"):
        accelerator("v4_8")


def test_virtual_cpu_devices():
    assert accelerator("cpu").devices == 1
    assert accelerator("cpu-4").devices == 4
    assert accelerator("cpu-4").platform == "cpu"
