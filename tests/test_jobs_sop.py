"""The SOP's environment names at the door."""

from pathlib import Path

import pytest

from jobs import sop, spec

MINIMAL = "name: x\naccelerator: v4-8\nmodel: tiny\n"
# Step 3 of the SOP, as it exports it.
STEP_3 = {
    "MODEL_PATH": "Qwen/Qwen2.5-7B-Instruct",
    "STEPS": "20",
    "ROLLOUT_BACKEND": "sglang_jax",
    "BATCH_SIZE": "32",
    "NUM_PRE_Q": "1",
    "GLOBAL_LENGTH": "512",
    "MAX_LENGTH_SAMPLE": "1024",
    "PPO_EPOCHS": "1",
    "GRAD_ACCUM_STEPS": "8",
    "BETA": "0",
    "EVAL_EVERY_STEPS": "0",
    "WANDB_MODE": "disabled",
    "SGLANG_JAX_MEM_FRACTION_STATIC": "0.4",
    "SGLANG_JAX_ROLLOUT_CHUNK_SIZE": "1",
    "SGLANG_JAX_MAX_RUNNING_REQUESTS": "1",
    "SGLANG_JAX_MAX_TOTAL_TOKENS": "1536",
    "SGLANG_JAX_CONTEXT_LENGTH": "1536",
    "SGLANG_JAX_PAGE_SIZE": "1",
    "SGLANG_JAX_DTYPE": "bfloat16",
    "PATH": "/usr/bin",
}


def job_of(folder: Path, environment: dict[str, str]) -> spec.Job:
    path = folder / "x.yaml"
    path.write_text(MINIMAL)
    return spec.load(path, environment=environment)


def refusals(folder: Path, environment: dict[str, str]) -> list[str]:
    with pytest.raises(spec.JobError) as caught:
        job_of(folder, environment)
    return [str(p) for p in caught.value.problems]


def test_the_sops_exports_spell_the_job_that_comes_along(tmp_path):
    ours = spec.load(Path(spec.__file__).with_name("sop_bs32_len1024_kv1536.yaml"))
    theirs = job_of(tmp_path, STEP_3)
    for part in ("model", "steps", "train", "reward"):
        assert getattr(theirs, part) == getattr(ours, part), part
    assert theirs.rollout == ours.rollout
    assert theirs.engine.page_size == 1
    # What the SOP's build held through the update is no export: it had no choice.
    told = {"page_size": None, "residency": "keep"}
    assert theirs.engine.model_copy(update=told) == ours.engine


def test_grad_accum_steps_counts_micro_batches(tmp_path):
    job = job_of(tmp_path, {"BATCH_SIZE": "8", "NUM_PRE_Q": "4", "GRAD_ACCUM_STEPS": "2"})
    assert job.train.micro_batch_size == 16
    assert job.grad_accum_steps == 2


def test_grad_accum_steps_counts_after_the_overrides(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(MINIMAL + "rollout: {prompts_per_step: 4, group_size: 4}")
    job = spec.load(path, overrides=["rollout.group_size=8"], environment={"GRAD_ACCUM_STEPS": "4"})
    assert (job.sequences_per_step, job.grad_accum_steps) == (32, 4)


def test_two_ways_to_say_the_micro_batch_are_refused(tmp_path):
    both = {
        "BATCH_SIZE": "4",
        "NUM_PRE_Q": "4",
        "GRAD_ACCUM_STEPS": "4",
        "TRAIN_MICRO_BATCH_SIZE": "4",
    }
    [line] = refusals(tmp_path, both)
    assert "environment TRAIN_MICRO_BATCH_SIZE=4 say the same thing twice" in line


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SGLANG_JAX_MEM_FRACTION": "1"}, "did you mean SGLANG_JAX_MEM_FRACTION_STATIC?"),
        ({"MAX_LENGTH_TOTAL": "1152"}, "MAX_LENGTH_TOTAL=1152: is GLOBAL_LENGTH + MAX_LENGTH"),
        ({"GRAD_ACCUM_STEPS": "0"}, "is not a whole number above 0"),
        ({"GRAD_ACCUM_STEPS": "2"}, "needs rollout.prompts_per_step and rollout.group_size"),
        (
            {"GRAD_ACCUM_STEPS": "5", "BATCH_SIZE": "4", "NUM_PRE_Q": "4"},
            "does not divide the 16 sequences",
        ),
        ({"MESH_SHAPE_FSDP": "auto"}, "is not dp,fsdp,tp"),
        ({"SGLANG_JAX_DISABLE_RADIX_CACHE": "maybe"}, "neither true nor false"),
        ({"BETA": "some"}, "train.beta = some is not a number"),
    ],
)
def test_a_name_or_value_that_cannot_be_honoured_is_refused(tmp_path, environment, says):
    [line] = refusals(tmp_path, environment)
    assert says in line
    assert line.startswith(f"environment {next(iter(environment))}=")


def test_the_mesh_of_the_sop_leaves_fsdp_to_the_rest(tmp_path):
    job = job_of(tmp_path, {"MESH_SHAPE_FSDP": "1,-1,1"})
    assert job.mesh_shape == (1, 4, 1)


def test_other_peoples_variables_are_left_alone():
    assert sop.translate({"HOME": "/root", "JAX_PLATFORMS": "cpu"}) == ({}, {})


def test_top_k_of_minus_one_means_none(tmp_path):
    assert job_of(tmp_path, {"SGLANG_JAX_TOP_K": "-1"}).rollout.top_k is None
    assert job_of(tmp_path, {"SGLANG_JAX_TOP_K": "50"}).rollout.top_k == 50
