"""The time model: against the compiler's figures of docs/memory.md, and sums worked out here."""

from pathlib import Path

import pytest

from jobs import spec
from trainer.architecture import ARCHITECTURES
from trainer.timemodel import ici_bytes, step_model, token_s, update_flops

JOB = Path(__file__).parents[1] / "jobs" / "sop_bs32_len1024.yaml"
GIB = 2**30
OURS = (
    "update.design=layer_major",
    "update.clip=per_layer",
    "update.layers=stacked",
    "rollout.engine=naive",
)
# Qwen2.5-7B: 28 layers of q, o 3584 x 3584, k, v 3584 x 512, gate, up, down 3584 x 18944.
LAYERS = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
HEAD = 152064 * 3584


def modelled(*overrides):
    job = spec.load(JOB, overrides=overrides)
    return job, ARCHITECTURES[job.model.lower()], step_of(job)


def step_of(job):
    return step_model(job, ARCHITECTURES[job.model.lower()], build="sharded")


def test_the_flops_of_an_update_are_those_of_its_matmuls_worked_out_here():
    job, shape, _ = modelled(*OURS)
    tokens = 32 * 1536
    layers = 8 * LAYERS * tokens  # 2 forward, 2 again, 4 backward
    head = 6 * HEAD * 32 * 1024  # 2 forward, 4 backward
    # Scores and their use, 28 heads of 128, every pair, 4.5 times.
    attention = 4.5 * 28 * 2 * 2 * tokens * 1536 * 28 * 128
    assert update_flops(job, shape) == pytest.approx(layers + head + attention, rel=1e-12)


@pytest.mark.parametrize(("micro", "seconds"), [(4, 3.30), (8, 3.35), (32, 3.12)])
def test_the_update_s_compute_is_near_the_compiler_s_cycles(micro, seconds):
    _, _, step = modelled(*OURS, f"train.micro_batch_size={micro}")
    # The cycles count nothing for the splash kernel.
    attention = 4.5 * 28 * 2 * 2 * 32 * 1536 * 1536 * 28 * 128 / (4 * 275e12 * 0.787)
    assert step.update_compute_s - attention == pytest.approx(seconds, rel=0.05)


def test_what_a_chip_receives_is_near_what_the_compiled_programs_have():
    job, shape, _ = modelled(*OURS)
    assert ici_bytes(job, shape) / GIB == pytest.approx(37.2, rel=0.01)
    # The SOP's own program: 209.
    job, shape, _ = modelled()
    assert ici_bytes(job, shape) / GIB == pytest.approx(209, rel=0.01)


def test_a_token_is_near_the_compiler_s_and_reads_weights_and_cache_once():
    job, shape, step = modelled(*OURS)
    found = token_s(job, shape, build="sharded")
    assert found == pytest.approx(3.41e-3, rel=0.02)
    # Biases and norms are the rest: under a thousandth.
    weights = 2 * (LAYERS + HEAD) / 4
    cache = 32 * 1536 * 2 * 28 * 128 * 2  # one KV head a chip
    assert found == pytest.approx((weights + cache) / 1228e9, rel=1e-3)
    assert step.decode_s == pytest.approx(1024 * found)


def test_what_is_offloaded_crosses_pcie_twice():
    _, _, step = modelled(*OURS, "update.host_offload=[momentum,lo]")
    # 6.08 GiB each way (docs/memory.md), 8e9 bytes/s.
    assert step.host_offload_s == pytest.approx(2 * 6.08 * GIB / 8e9, rel=1e-3)
    assert modelled(*OURS)[2].host_offload_s == 0


def test_a_pool_of_one_sequence_decodes_them_one_after_the_other():
    wide = modelled("update.design=layer_major")[2]
    narrow = modelled("update.design=layer_major", "engine.max_total_tokens=1536")[2]
    assert narrow.decode_s / wide.decode_s > 20


def test_a_prompt_computed_once_for_its_group_takes_less():
    groups = (*OURS, "rollout.prompts_per_step=4", "rollout.group_size=8")
    one = modelled(*groups)[2]
    group = modelled(*groups, "update.completions_per_row=group", "train.micro_batch_size=32")[2]
    assert group.update_compute_s < 0.8 * one.update_compute_s


def test_a_second_update_takes_as_long_again_and_a_forward_pass_more():
    once, twice = modelled(*OURS)[2], modelled(*OURS, "train.updates_per_rollout=2")[2]
    assert twice.update_ici_s == 2 * once.update_ici_s
    assert 2 < twice.update_compute_s / once.update_compute_s < 2.5
    assert twice.step_s == pytest.approx(sum(twice.parts().values()))
