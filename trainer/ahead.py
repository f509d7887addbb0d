"""Compiling for a TPU that is not there: its devices, described, and a program's memory on them.

libtpu can abort the process that calls it, and cannot be told to stop where we want it to. So a
program is compiled in a child process, `python -m trainer.ahead FOLDER`, which ends itself when its
time is up, even where its parent is gone. Memory is known when XLA has assigned the buffers, before
it generates code: the child is ended there, seconds instead of minutes, unless code is wanted too.

The calling process, too, must have TPU_SKIP_MDS_QUERY, TPU_ACCELERATOR_TYPE and
TPU_WORKER_HOSTNAMES before it asks for described devices (`SETTINGS`); one value of each serves
every accelerator. ALLOW_MULTIPLE_LIBTPU_LOAD lets both live beside a job that has the chips.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from jobs.accelerators import ACCELERATORS, Accelerator
from trainer.buffers import DUMPED, ProgramMemory, program_memory_of
from trainer.libtpu import SETTINGS
from trainer.refusal import Refusal

# Written right after the buffer assignment, which is whole once this is there.
_AFTERWARDS = "after_optimizations_after_buffer_assignment.txt"
_MODULE, _OPTIONS, _DEVICES = "program.mlir", "options.pb", "devices.json"
_CODE, _HLO, _DUMP, _LOG = "code.json", "compiled.txt", "dump", "compile.log"
_POLL_S = 0.2


class CompileError(Refusal):
    """A program could not be compiled: what the compiler, or the child process, said."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of a program.

    Attributes:
        memory: on one chip.
        hlo: text of the finished module, with the estimated cycles of each instruction; None where
            no code was generated.
    """

    memory: ProgramMemory
    hlo: str | None


def described_devices(target: Accelerator) -> list[Any]:
    """JAX devices of an accelerator that need not be there: to lower and compile for, not to run.

    Raises:
        CompileError: libtpu has no name for it.
    """
    if target.topology is None:
        raise CompileError(
            f"accelerator = {target.name} is no TPU that can be compiled for from here; "
            f"these can: {', '.join(ACCELERATORS)}"
        )
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=target.topology.name,
        chip_config_name=target.topology.chip_config,
        chips_per_host_bounds=target.topology.chips_per_host_bounds,
        num_slices=1,
    ).devices


def program_memory(lowered: jax.stages.Lowered, *, limit_s: float = 300.0) -> ProgramMemory:
    """What a lowered program takes of each chip, by the TPU compiler; no code is generated.

    Args:
        lowered: any program, lowered for `described_devices` of one accelerator.
        limit_s: seconds until it is given up.

    Raises:
        CompileError: the compiler refused, aborted or took too long.
    """
    return compile_ahead(lowered, code=False, limit_s=limit_s).memory


def compile_ahead(lowered: jax.stages.Lowered, *, code: bool, limit_s: float) -> Compiled:
    """A lowered program's memory and, where `code` is wanted, its code's size and text.

    Raises:
        CompileError: the compiler refused, aborted or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="headroom-compile-") as name:
        folder = Path(name)
        _write(lowered, folder)
        with (folder / _LOG).open("wb") as log:
            child = subprocess.Popen(
                child_argv(folder, limit_s=limit_s),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                _wait(child, folder, code=code, limit_s=limit_s)
            finally:
                child.kill()
                child.wait()
        return _read(folder, child.returncode, code=code, limit_s=limit_s)


def child_argv(folder: Path, *, limit_s: float) -> list[str]:
    """The child's command: what libtpu reads at its start is set for it alone."""
    settings = SETTINGS | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pairs = [f"{name}={value}" for name, value in settings.items()]
    return ["env", *pairs, sys.executable, "-m", "trainer.ahead", str(folder), str(limit_s)]


def _write(lowered: jax.stages.Lowered, folder: Path) -> None:
    """The program, the compiler's options and the devices, as files for the child."""
    # jax 0.8.2 can serialize only what it has compiled, or a function: from a Lowered, the way to
    # the options goes through its inside. A public one would make this function go.
    from jax._src.interpreters import mlir, pxla  # noqa: PLC0415

    inside: Any = lowered._lowering
    args = inside.compile_args
    devices = list(inside._device_list)
    to_inputs, to_outputs = pxla.get_prop_to_input_output(
        args["in_shardings"], args["out_shardings"], len(args["ordered_effects"])
    )
    options = pxla.create_compile_options(
        inside.stablehlo(),
        None,
        args["spmd_lowering"],
        args["tuple_args"],
        args["auto_spmd_lowering"],
        to_inputs,
        to_outputs,
        args["backend"],
        _as_array(devices),
        args["pmap_nreps"],
        dict(inside._compiler_options_kvs)
        | {"xla_dump_to": str(folder / _DUMP), "xla_dump_hlo_as_text": True},
    )
    (folder / _MODULE).write_bytes(mlir.module_to_bytecode(inside.stablehlo()))
    (folder / _OPTIONS).write_bytes(options.SerializeAsString())
    found = {"accelerator": _accelerator_of(devices), "ids": [device.id for device in devices]}
    (folder / _DEVICES).write_text(json.dumps(found), encoding="utf-8")


def _as_array(devices: Sequence[Any]) -> Any:
    found = np.empty(len(devices), object)
    found[:] = devices
    return found


def _accelerator_of(devices: Sequence[Any]) -> str:
    """The smallest accelerator of that kind that has the devices."""
    kind, highest = devices[0].device_kind, max(device.id for device in devices)
    fitting = [a for a in ACCELERATORS.values() if a.device_kind == kind and a.devices > highest]
    if not fitting:
        raise CompileError(
            f"the program is lowered for {len(devices)} devices of kind {kind!r}; lower it for "
            f"described devices of one of: {', '.join(ACCELERATORS)}"
        )
    return min(fitting, key=lambda a: a.devices).name


def _wait(child: subprocess.Popen[bytes], folder: Path, *, code: bool, limit_s: float) -> None:
    """Until the child is done, its time is up or, without `code`, the buffers are assigned."""
    until = time.monotonic() + limit_s
    while child.poll() is None and time.monotonic() < until:
        if not code and _dumped(folder, _AFTERWARDS):
            return
        time.sleep(_POLL_S)


def _dumped(folder: Path, ending: str) -> Path | None:
    """The dump of the program itself: beside a large one, XLA may compile small ones of its own."""
    found = list((folder / _DUMP).glob(f"*{ending}"))
    return max(found, key=lambda path: path.stat().st_size) if found else None


def _read(folder: Path, status: int, *, code: bool, limit_s: float) -> Compiled:
    assignment, finished = _dumped(folder, DUMPED), folder / _CODE
    assigned = assignment is not None and _dumped(folder, _AFTERWARDS) is not None
    if assignment is None or not assigned or (code and not finished.exists()):
        raise CompileError(_why(folder, status, limit_s=limit_s))
    optimized = assignment.with_name(assignment.name.replace("-buffer-assignment", ""))
    told = json.loads(finished.read_text(encoding="utf-8")) if finished.exists() else {}
    return Compiled(
        memory=program_memory_of(
            assignment.read_text(encoding="utf-8"),
            hlo=optimized.read_text(encoding="utf-8"),
            code_bytes=told.get("code_bytes"),
        ),
        hlo=(folder / _HLO).read_text(encoding="utf-8") if code else None,
    )


def _why(folder: Path, status: int, *, limit_s: float) -> str:
    """What to tell of a compilation that came to nothing."""
    lines = (folder / _LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line for line in lines if line.strip() and "WARNING" not in line]
    last = " | ".join(told[-3:])[-600:] or "it said nothing"
    if status in (-signal.SIGKILL, -signal.SIGALRM):
        return f"compiling took more than {limit_s:.0f} s and was given up; last: {last}"
    return f"the compiler's process ended with status {status}: {last}"


def _compile(folder: Path) -> None:
    """The child: compile what `_write` wrote; the dump is a side effect of its options."""
    from jax._src.interpreters import mlir  # noqa: PLC0415

    # Extension modules, of whose names pyright knows nothing.
    xla: Any = importlib.import_module("jaxlib._jax")
    ir: Any = importlib.import_module("jaxlib.mlir.ir")

    told = json.loads((folder / _DEVICES).read_text(encoding="utf-8"))
    by_id = {d.id: d for d in described_devices(ACCELERATORS[told["accelerator"]])}
    devices = tuple(by_id[number] for number in told["ids"])
    options = xla.CompileOptions.ParseFromString((folder / _OPTIONS).read_bytes())
    with mlir.make_ir_context():
        module = ir.Module.parse((folder / _MODULE).read_bytes())
        made = devices[0].client.compile(
            module, executable_devices=xla.DeviceList(devices), compile_options=options
        )
    text = "\n".join(part.to_string() for part in made.hlo_modules())
    (folder / _HLO).write_text(text, encoding="utf-8")
    size = made.get_compiled_memory_stats().generated_code_size_in_bytes
    (folder / _CODE).write_text(json.dumps({"code_bytes": size}), encoding="utf-8")


if __name__ == "__main__":
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))
    _compile(Path(sys.argv[1]))
