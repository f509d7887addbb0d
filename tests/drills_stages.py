"""A signal at every stage of a run: at each thing that the runner does to a file or to Docker."""

import signal
from collections import Counter

from jobs.records import MANIFEST_FILE
from runner import archive
from tests.drills import Drill, Place, Told, differing, until

SCRIPT = "echo one; echo two; exit 3"
SAID = b"one\ntwo\n"

# Python's own audit events (PEP 578) count the stages: nothing of the runner is touched. They come
# before the deed, so the signal does, too.
AT_STAGE = """
import atexit, os
_events = {{
    "open", "os.rename", "os.mkdir", "os.link", "os.symlink", "os.remove", "os.truncate",
    "fcntl.flock", "subprocess.Popen", "http.client.connect", "http.client.send",
}}
_seen = [0]
def _at_stage(event, arguments):
    if event not in _events:
        return
    if event in ("open", "os.rename", "os.mkdir", "os.remove") and (
        not str(arguments[0]).startswith(({folder!r} + "/runs", {folder!r} + "/logs"))
    ):
        return
    _seen[0] += 1
    if _seen[0] == {stage}:
        os.kill(os.getpid(), {number})
sys.addaudithook(_at_stage)
@atexit.register
def _tell():
    with open({folder!r} + "/stages", "w") as file:
        file.write(str(_seen[0]))
"""


def every_stage(number: signal.Signals):
    """Runs of one short job, the signal a stage later each time."""

    def run(place: Place) -> Told:
        job = place.job(SCRIPT)
        place.ended(place.run(job, before=_before(place, stage=0, number=number)))
        stages = int((place.folder / "stages").read_text())
        step = 1 if place.thorough else max(1, stages // 5)
        seen: Counter[str] = Counter()
        lost = 0
        for stage in range(1, stages + 1, step):
            words, missing = _at(place, stage, number)
            seen[words] += 1
            lost += missing
        bad = {words: count for words, count in seen.items() if words not in _allowed(number)}
        if stages < 20 or bad:
            return f"{stages} stages: {bad}", lost
        return "ended, whole, nothing left", lost

    return run


def _before(place: Place, *, stage: int, number: int) -> str:
    return AT_STAGE.format(folder=str(place.folder), stage=stage, number=int(number))


def _allowed(number: signal.Signals) -> set[str]:
    """Ends that are true: the job's own code, or that it was stopped or never started."""
    if number is signal.SIGKILL:
        return {"137: failed 3", "137: lost 255, never started", "137: no run"}
    code = 128 + number
    stopped = f"{code}: interrupted {code}"
    # Stopped; over before the signal; all written before it; stopped before there was a run.
    return {
        stopped,
        "5: failed 3",
        f"{code}: failed 3",
        f"{code}: no run",
        f"{code}: interrupted 3",
    }


def _at(place: Place, stage: int, number: signal.Signals) -> Told:
    runs = place.folder / "runs"
    before = {path.name for path in runs.iterdir()}
    code = place.ended(
        place.run(place.folder / "job.yaml", before=_before(place, stage=stage, number=number))
    )
    code = 128 - code if code < 0 else code  # as a shell tells it
    made = [path for path in runs.iterdir() if path.name not in before]
    if not made or not (made[0] / MANIFEST_FILE).exists():
        return f"{code}: no run", 0
    found = archive.RunDir(made[0])
    if number is signal.SIGKILL:
        until(lambda: (place.call("status"), found.manifest().exit_status)[1])
    words = f"{code}: {place.ended_as()}"
    said = place.said(found)
    if "lost" in words and not said and not found.process_file.exists():
        return f"{words}, never started", 0
    whole = differing(said, SAID) if "failed 3" in words else 0
    return words, whole if SAID.startswith(said) else len(said)


DRILLS = [
    Drill(
        name=f"every-stage-{number.name}-{'docker' if docker else 'process'}",
        fault=f"{number.name} at every stage of `run --where {'docker' if docker else 'process'}`",
        expected="ended, whole, nothing left",
        run=every_stage(number),
        docker=docker,
        quick=number is signal.SIGKILL or (number is signal.SIGTERM and not docker),
    )
    for docker in (False, True)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
]
