"""What nobody thought of: job files, logs and endings made at random."""

import hashlib
import itertools
import json
import math
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import spec
from jobs.source import MAX_VALUES
from runner import archive
from runner.diagnose import diagnose, format_diagnosis
from runner.ending import of_process
from runner.provenance import Checkout

JOBS = Path(spec.__file__).parent
# A folder of its own for each test is enough: each example writes its file anew.
ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

KEYS = st.sampled_from(
    [
        key
        for part in spec.Job.model_fields.values()
        for key in getattr(part.annotation, "model_fields", ())
    ]
    + list(spec.Job.model_fields)
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        [
            "~",
            "../../x",
            "/",
            "\x00",
            "v4-8",
            "tiny",
            "1e400",
            "&a",
            "*a",
            "!!python/object:os.system",
        ]
    ),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
JOB = {"name": "x", "accelerator": "cpu", "model": "tiny"}


def loads_or_refuses(path, **kwargs):
    """A job that survives its own JSON, or lines that say what is wrong."""
    refused = None
    try:
        job = spec.load(path, **kwargs)
    except spec.JobError as error:
        refused = error
    if refused is not None:
        assert refused.problems
        assert all(line.strip() for line in str(refused).splitlines())
        assert len(str(refused)) < 10**6
    else:
        beside = path.with_name("job.json")
        beside.write_text(job.to_json())
        assert spec.load(beside) == job


@ONE_FOLDER
@given(content=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_a_job_or_are_refused(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    loads_or_refuses(path)


@ONE_FOLDER
@given(tree=st.dictionaries(KEYS | st.text(max_size=8), TREES, max_size=5), whole=st.booleans())
def test_any_tree_of_keys_is_a_job_or_is_refused(tmp_path, tree, whole):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(JOB | tree if whole else tree))
    loads_or_refuses(path)


@ONE_FOLDER
@given(
    overrides=st.lists(
        st.tuples(KEYS, SCALARS | TREES).map(lambda p: f"{p[0]}={p[1]}") | st.text(max_size=20),
        max_size=4,
    )
)
def test_any_override_is_taken_or_refused(tmp_path, overrides):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(JOB))
    loads_or_refuses(path, overrides=overrides)


@ONE_FOLDER
@given(
    key=st.sampled_from(sorted(spec.Job.model_fields)),
    value=TREES,
    job=st.sampled_from(sorted(JOBS.glob("s*.yaml"))),
)
def test_a_job_of_ours_with_one_key_put_in_at_random(tmp_path, key, value, job):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(job.read_text()) | {key: value}))
    loads_or_refuses(path)


def test_aliases_that_spell_out_billions_are_refused_at_once(tmp_path):
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    path = tmp_path / "x.yaml"
    path.write_text("\n".join([*lines, "container: {binds: *a8}"]))
    with pytest.raises(spec.JobError) as caught:
        spec.load(path)
    [line] = str(caught.value).splitlines()
    assert f"its aliases (*name) spell out more than {MAX_VALUES} values" in line


SIGNS = [
    "RESOURCE_EXHAUSTED: Error loading program 'jit_step': Attempting to reserve 7.82G at the "
    "bottom of memory. That was not possible. There are 5.68G free, 0B reserved, and 5.68G "
    "reservable.",
    "Traceback (most recent call last):",
    '  File "x.py", line 3, in f',
    "ValueError: no",
    "exit_status=137",
    "Error: steps: too many",
    "The TPU is already in use by process with pid 12",
    "CUDA out of memory. Tried to allocate 99999999999999999999.0 GiB",
    "Ran out of memory in memory space hbm. Used 1e9G of 30.75G hbm.",
    "\x1b[31mSIGTERM received by PID 1\x1b[0m",
    "worker 1: Killed",
    "step=0 loss=nan",
]
LINES = st.lists(
    st.sampled_from(SIGNS).map(str.encode)
    | st.tuples(st.sampled_from(SIGNS), st.integers(0, 150)).map(
        lambda cut: cut[0][: cut[1]].encode()
    )
    | st.binary(max_size=60)
    | st.text(string.printable, max_size=60).map(str.encode),
    max_size=12,
).map(b"\n".join)


@settings(deadline=None)
@given(
    log=LINES, cuts=st.lists(st.integers(0, 2000), max_size=6), code=st.none() | st.integers(0, 255)
)
def test_any_log_is_diagnosed_and_alike_wherever_its_blocks_are_cut(log, cuts, code):
    status = None if code is None else of_process(code, stopped=False, refusal=False)
    found = diagnose([log], exit_status=status)
    places = [0, *sorted(min(cut, len(log)) for cut in cuts), len(log)]
    blocks = [log[a:b] for a, b in itertools.pairwise(places)]
    assert diagnose(blocks, exit_status=status) == found
    assert format_diagnosis(found)
    record = json.loads(found.model_dump_json())
    assert all(math.isfinite(n) for n in record["numbers"].values() if isinstance(n, int | float))
    count = log.count(b"\n") + 1
    assert all(
        1 <= line <= count for line in [*found.evidence, *([found.line] if found.line else [])]
    )


@ONE_FOLDER
@given(log=LINES, code=st.integers(-15, 255), again=st.integers(1, 3))
def test_any_log_is_archived_whole_with_its_status_once(tmp_path_factory, log, code, again):
    folder = tmp_path_factory.mktemp("runs")
    job = spec.load(JOBS / "smoke.yaml")
    with archive.create(
        job,
        verb="train",
        where="process",
        runs=folder / "runs",
        code=Checkout(commit=None, dirty=None),
    ) as run:
        run.log_file.write_bytes(log)
        status = of_process(code, stopped=False, refusal=False)
        for _ in range(again):
            manifest = run.finish(status)
    written = run.log_file.read_bytes()
    last = b"exit_status=%d\n" % status.code
    assert written.startswith(log)
    assert (
        written[len(log) :] in (last, b"\n" + last) or written == log == log.rstrip(b"\n") + b"\n"
    )
    assert written.endswith(last)
    assert manifest.log_sha256 == hashlib.sha256(written).hexdigest()
    [archived] = (path for path in run.logs.iterdir() if not path.is_symlink())
    assert archived.read_bytes() == written
