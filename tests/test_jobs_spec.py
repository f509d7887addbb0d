"""The job: what is accepted, what is refused, and in which words."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jobs import schema, spec

JOBS = Path(spec.__file__).parent
MINIMAL = "name: x\naccelerator: cpu\nmodel: tiny\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "x.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str, **kwargs) -> list[str]:
    with pytest.raises(spec.JobError) as caught:
        spec.load(write(folder, text), **kwargs)
    return [str(p) for p in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nmae: x", "unknown key 'nmae'; did you mean 'name'?"),
        ("micro_batch_size: 4", "did you mean 'train.micro_batch_size'?"),
        (
            "train: {optimzer: lion}",
            "unknown key 'train.optimzer'; did you mean 'train.optimizer'?",
        ),
        ("steps: -1", "steps = -1 is below 0, the least it can be (default: 20)"),
        ("steps: 1.5", "steps = 1.5 is not a whole number"),
        ("steps: true", "steps = True is not a whole number"),
        ("rollout: {top_p: 0}", "rollout.top_p = 0 must be above 0 (default: 1.0)"),
        ("rollout: {engine: sglang}", "did you mean 'sglang_jax'?"),
        ("rollout: 3", "rollout = 3 is not a group of keys"),
        ("rollout:", "rollout = None is not a group of keys; leave it out"),
        ('"train.micro_batch_size": 2', "unknown key 'train.micro_batch_size'"),
        ("name2: 2020-13-45", "unknown key 'name2'; did you mean 'name'?"),
        ("data: {path: ~nosuchuser/x}", "the home of a user that this machine does not have"),
        ("reward: {correct: .inf}", "reward.correct = inf is refused: Input should be a finite"),
        ("train: {1: 2}", "key 1 is not text (line 4): put it in quotes"),
        ("? [a]\n: 1", "is not text (line 4): put it in quotes"),
        ("a: " + "[" * 3000, "is not YAML"),
        ("update: {remat: false}", "is an option of update.design reference"),
        ("seed: 1\nseed: 2", "key 'seed' stands twice (line 5)"),
        ("mesh: {dp: 3}", "does not make the 1 devices of cpu"),
        ("data: {path: no/such/file}", "is not a file that can be read from here"),
        (
            "rollout: {group_size: 8}\ntrain: {micro_batch_size: 5}",
            "train.micro_batch_size = 5 does not divide the 32 sequences of a step "
            "(rollout.prompts_per_step 4 x rollout.group_size 8)",
        ),
        ("rollout: {engine: sglang_jax}\nengine: {max_total_tokens: 300}", "use at least 320"),
        ("rollout: {engine: sglang_jax}\nengine: {context_length: 300}", "use at least 320"),
    ],
)
def test_a_bad_job_says_what_is_wrong(tmp_path, text, says):
    [line] = problems(tmp_path, MINIMAL + text)
    assert says in line
    assert line.startswith(f"{tmp_path / 'x.yaml'}: ")


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    lines = problems(
        tmp_path,
        "name: x\naccelerator: v4-9\nsteps: -1\nrollout: {group_size: 0}\nbta: 1\n"
        "data: {source: gsm8k, path: /nowhere}\n",
        overrides=["train.clip_low=2", "nonsense"],
    )
    assert len(lines) == 9
    for part in (
        "accelerator = v4-9",
        "steps = -1",
        "rollout.group_size = 0",
        "unknown key 'bta'",
        "no 'model'",
        "data.source =",
        "data.path = /nowhere is not",
        "train.clip_low = 2",
        "is not of the form key.path=value",
    ):
        assert sum(part in line for line in lines) == 1, part


def test_a_contradiction_with_a_wrong_value_is_not_reported_twice(tmp_path):
    text = MINIMAL + "rollout: {group_size: many}\ntrain: {micro_batch_size: 5}"
    [line] = problems(tmp_path, text)
    assert "rollout.group_size = many is not a whole number" in line


def test_a_batch_that_cannot_be_shared_out_is_refused_before_anything_loads(tmp_path):
    text = "name: x\naccelerator: v4-8\nmodel: m\nrollout: {prompts_per_step: 1, group_size: 1}"
    [line] = problems(tmp_path, text)
    assert "rollout.prompts_per_step = 1 makes 1 sequences a step" in line
    assert "cannot be shared out over 4 devices (mesh dp 1 x fsdp 4): use a multiple of 4" in line


@pytest.mark.parametrize("bind", ["/a", "a:/b", "/a:b", "/a:/b:rx", "/a:/b:ro:z", ""])
def test_a_bind_that_cannot_be_read_is_refused_with_its_form(tmp_path, bind):
    [line] = problems(tmp_path, f"{MINIMAL}container: {{binds: ['{bind}']}}")
    assert "is not of the form /host/folder:/inside" in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mesh: {tp: 2}", "shares its state out over all devices"),
        ("update: {design: reference, moments: int8}", "is an option of update.design layer_major"),
        ("update: {host_offload: [lo]}", "update.host_offload = lo needs a TPU"),
        ("update: {attention: splash}", "update.attention = splash needs a TPU"),
        ("train: {micro_batch_size: 2}", "cannot be shared out over 4 devices"),
        (
            "rollout: {prompts_per_step: 6}\nupdate: {completions_per_row: group}",
            "in rows of 4 (update.completions_per_row group): use a multiple of 16",
        ),
    ],
)
def test_an_option_that_the_design_or_the_machine_lacks_is_refused(tmp_path, text, says):
    [line] = problems(tmp_path, f"name: x\naccelerator: cpu-4\nmodel: tiny\n{text}")
    assert says in line


def test_zero_is_a_value_not_a_default(tmp_path):
    job = spec.load(
        write(
            tmp_path,
            MINIMAL + "steps: 0\nrollout: {temperature: 0}\nreward: {format: 0}\n"
            "metrics: {samples_per_step: 0}\n",
        )
    )
    assert (job.steps, job.rollout.temperature, job.reward.format) == (0, 0, 0)
    assert job.metrics.samples_per_step == 0


def test_overrides_win_over_the_environment_and_that_over_the_file(tmp_path):
    path = write(tmp_path, MINIMAL + "steps: 1\nseed: 1\ntrain: {beta: 0.5}\n")
    job = spec.load(path, overrides=["steps=3"], environment={"STEPS": "2", "BETA": "0.25"})
    assert (job.steps, job.seed, job.train.beta) == (3, 1, 0.25)


def test_the_environment_is_not_read_unless_it_is_passed(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "7")
    assert spec.load(write(tmp_path, MINIMAL)).steps == 20


def test_scientific_notation_without_a_point_is_a_number(tmp_path):
    job = spec.load(write(tmp_path, MINIMAL + "train: {learning_rate: 1e-6}"))
    assert job.train.learning_rate == 1e-6


def test_the_origin_of_a_wrong_value_is_where_it_was_written(tmp_path):
    lines = problems(
        tmp_path,
        MINIMAL,
        overrides=["rollout.top_p=2"],
        environment={"BATCH_SIZE": "many"},
    )
    assert lines[0].startswith("environment BATCH_SIZE=many: rollout.prompts_per_step = many")
    assert lines[1].startswith("--set rollout.top_p=2: rollout.top_p = 2 is above 1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "holds list"),
        ("a: [", "is not YAML"),
        ("", "holds NoneType"),
    ],
)
def test_a_file_that_is_no_job_is_one_line(tmp_path, text, says):
    lines = problems(tmp_path, text)
    assert says in lines[0]
    assert "\n" not in lines[0]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("name=2020-13-45", None),
        ("train={micro_batch_size: 5}", "set them one by one, as in train.name=value"),
        ("steps.x=3", "steps is a value, not a group of keys"),
    ],
)
def test_an_override_is_taken_as_text_or_refused_in_a_line(tmp_path, override, says):
    text = f"{MINIMAL}steps: 1\n"
    if says is None:
        assert spec.load(write(tmp_path, text), overrides=[override]).name == "2020-13-45"
    else:
        [line] = problems(tmp_path, text, overrides=[override])
        assert line.startswith(f"--set {override}: ")
        assert says in line


def test_no_machine_is_blamed_that_nobody_asked_for(tmp_path):
    lines = problems(tmp_path, "name: x\nmodel: tiny\nupdate: {host_offload: [lo]}")
    assert len(lines) == 1
    assert "the job has no 'accelerator'" in lines[0]


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(spec.JobError, match="no such file"):
        spec.load(tmp_path / "none.yaml")


def test_job_json_reads_back_as_the_same_job(tmp_path):
    job = spec.load(JOBS / "sop_bs32_len1024.yaml", overrides=["steps=2"])
    again = tmp_path / "job.json"
    again.write_text(job.to_json())
    assert spec.load(again) == job
    assert spec.load(again).digest == job.digest


def test_local_paths_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    job = spec.load(
        write(tmp_path, "name: x\naccelerator: cpu\nmodel: ./m\ndata: {path: rows.jsonl}")
    )
    assert job.data.path == str(tmp_path / "rows.jsonl")
    assert job.model == str(tmp_path / "m")


def test_derived_numbers_of_the_sops_job():
    job = spec.load(JOBS / "sop_bs32_len1024.yaml")
    assert job.sequences_per_step == 32
    assert job.grad_accum_steps == 8  # 32 sequences in micro-batches of 4, as the SOP ran it
    assert job.max_sequence_tokens == 1536
    assert job.mesh_shape == (1, 4, 1)
    assert job.image == "headroom:tpu"


JOB_FILES = [path for path in sorted(JOBS.glob("*.yaml")) if not path.stem.endswith("_sweep")]


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda p: p.stem)
def test_every_job_that_comes_along_loads_and_names_the_schema(path):
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=job.schema.json\n")
    assert spec.load(path).name == path.stem
    jsonschema.validate(yaml.safe_load(text), json.loads(schema.SCHEMA_FILE.read_text()))


def test_the_committed_schema_is_current():
    assert schema.SCHEMA_FILE.read_text() == schema.schema_text(), "run: make schema"


def test_the_schema_refuses_what_the_model_refuses():
    bad = {"name": "x", "accelerator": "cpu", "model": "tiny", "nmae": 1}
    with pytest.raises(jsonschema.ValidationError, match="nmae"):
        jsonschema.validate(bad, json.loads(schema.SCHEMA_FILE.read_text()))


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*spec.Job.model_fields, "dp", "x", "train.beta", "~a/b"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    tree=trees,
    override=st.text(max_size=30),
    environment=st.dictionaries(
        st.sampled_from(["GRAD_ACCUM_STEPS", "BATCH_SIZE", "MESH_SHAPE_FSDP", "BETA"]),
        st.sampled_from(["2", "-1", "x", "", "1,-1,1"]),
    ),
)
def test_no_tree_whatever_ends_in_a_traceback(tmp_path_factory, tree, override, environment):
    path = tmp_path_factory.mktemp("fuzz") / "x.yaml"
    path.write_text(yaml.safe_dump(tree))
    refusal = None
    try:
        spec.load(path, overrides=[override], environment=environment)
    except spec.JobError as error:
        refusal = error
    assert refusal is None or all(str(p).strip() for p in refusal.problems)


def test_letters_that_are_swapped_are_put_right_first(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("name: x\naccelerator: cpu\nmodel: tiny\ntrain: {loss: gpro}\n")
    with pytest.raises(spec.JobError, match="did you mean 'grpo'"):
        spec.load(path)


def test_half_a_character_is_refused(tmp_path):
    [line] = problems(tmp_path, MINIMAL + 'system_prompt: "\\ud800"')
    assert "surrogates not allowed" in line
