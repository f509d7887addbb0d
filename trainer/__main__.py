"""`python -m trainer VERB /run/job.json`: one verb of the trainer, in its run's directory.

Sets what XLA, libtpu and the libraries read from the environment, by the job, before any of them is
imported; nothing else of the trainer looks at the environment.
"""

import logging
import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path

from jobs.records import FAILURE_FILE, JOB_FILE, Failure
from jobs.spec import Job, JobError, load
from trainer import libtpu, notice, redact
from trainer.files import write_record
from trainer.hang import watchdog
from trainer.refusal import Refusal
from trainer.stop import Stopped, Stops

VERBS = ("train", "evaluate", "plan", "fit", "export")
_WITH_OPTIONS = ("plan", "fit", "export")  # no run: nothing is trained, no chip is touched
USAGE = f"usage: python -m trainer {{{'|'.join(VERBS)}}} /path/of/the/run/job.json [options]"
# 70 is EX_SOFTWARE: Python's own code for an uncaught exception is 1, which is a refusal here.
REFUSED, WRONG_USAGE, FAILED = 1, 2, 70

log = logging.getLogger("trainer")


def set_environment(job: Job) -> None:
    """What the libraries are told, as the SOP told them, and XLA by the job's accelerator."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_ENABLE_HF_TRANSFER"] = "1"
    if job.target.platform == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = os.environ.get("XLA_FLAGS", "")
        count = f"--xla_force_host_platform_device_count={job.target.devices}"
        os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()
    else:
        # Unset, JAX takes the TPU and keeps the CPU beside it, which engines load weights through;
        # `train.check_platform` refuses to go on when it found no TPU.
        os.environ.pop("JAX_PLATFORMS", None)


def run(verb: str, job: Job, run_dir: Path, stops: Stops) -> None:
    """Import what the verb needs, and do it. A failure is written down before it goes on."""
    set_environment(job)
    notice.watch(job, run_dir, stops)
    alive = watchdog(job.stuck_after_s)
    alive()
    phase, step = "import", -1
    try:
        import jax

        from trainer import blackbox, metrics, timing, train

        jax.config.update("jax_compilation_cache_dir", str(Path(job.cache_dir) / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        metrics.check_wandb_key(job, os.environ.get("WANDB_API_KEY"))
        phases = timing.Phases(run_dir, alive)
        try:
            if verb == "train":
                train.train(job, run_dir, phases, stops)
            else:
                train.evaluate_only(job, run_dir, phases)
        except Exception as error:
            if blackbox.is_of_memory(error):
                secrets = redact.redactor_of(run_dir / JOB_FILE, os.environ)
                blackbox.write(job, run_dir, error, where=phases, show=secrets.text)
            raise
        finally:
            phase, step = phases.phase, phases.step
    except Stopped:
        raise
    except (Exception, SystemExit) as error:  # libraries end the program, too
        secrets = redact.redactor_of(run_dir / JOB_FILE, os.environ)
        failure = Failure(
            kind=type(error).__name__,
            message=secrets.text(str(error)),
            phase=phase,
            step=step,
            traceback=secrets.text(traceback.format_exc()),
        )
        write_record(run_dir / FAILURE_FILE, failure.model_dump_json(indent=2))
        raise


def plan(verb: str, job: Job, folder: Path, argv: list[str]) -> int:
    """Plan a job, or make it fit: nothing runs, no chip is touched. 0 fits, 3 does not."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.update(libtpu.SETTINGS)  # libtpu reads them when it is first asked
    from trainer import plan as planning

    if verb == "fit":
        from trainer import fit

        return fit.main(job, folder, fit.options_of(argv))
    return planning.main(job, folder, planning.options_of(argv))


def export(job: Job, folder: Path, argv: list[str]) -> int:
    """A checkpoint's weights as a Hugging Face folder."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["JAX_PLATFORMS"] = "cpu"
    from trainer import export as exporting

    return exporting.main(job, folder, exporting.options_of(argv))


def _do(verb: str, job: Job, folder: Path, options: list[str], *, stops: Stops) -> int:
    if verb == "export":
        return export(job, folder, options)
    if verb in _WITH_OPTIONS:
        return plan(verb, job, folder, options)
    run(verb, job, folder, stops)
    return 0


def _refuse(lines: str) -> int:
    for line in lines.splitlines():
        log.error("Error: %s", line)
    return REFUSED


def main(argv: list[str]) -> int:
    """Run a verb: 0 done, 1 refused, 2 usage, 3 planned not to fit, 70 failed, with traceback."""
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
    for name in ("jax", "absl", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    options = len(argv) > len(("verb", "job"))
    known = len(argv) >= len(("verb", "job")) and argv[0] in VERBS
    if not known or (options and argv[0] not in _WITH_OPTIONS):
        log.error("%s", USAGE)
        return WRONG_USAGE
    stops = Stops()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stops)
    path = Path(argv[1])
    try:
        return _do(argv[0], load(path), path.parent, argv[2:], stops=stops)
    except (JobError, Refusal) as error:
        return _refuse(str(error))
    except Stopped:
        raise
    # `run` has written it down; a library's exit(0) is no success.
    except (Exception, SystemExit):  # noqa: BLE001
        traceback.print_exc()
        return FAILED


def start(argv: list[str]) -> int:
    """`main`, in a process of its own where its output may hold secrets."""
    secrets = redact.redactor_of(Path(argv[1]) if len(argv) > 1 else Path(), os.environ)
    return redact.guarded(partial(main, argv), secrets) if secrets else main(argv)


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
