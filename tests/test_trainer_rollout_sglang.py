"""sglang-jax 0.0.2 as a rollout engine, run for real on virtual CPU devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from benchmarks.handover import live_bytes
from tests.engines import EOS, FAMILIES, engine_job, make_engine, random_params
from trainer.mesh import make_mesh
from trainer.model import hidden_states, logits
from trainer.rollout.naive import NaiveRollout
from trainer.rollout.sglang.driver import Request
from trainer.rollout.sglang.settings import EngineError, EngineFaultError, check_engine, settings_of
from trainer.update.program import make_update

pytestmark = pytest.mark.engine

PROMPTS = [[10, 20, 30], [7], list(range(40, 62)), [80, 81, 82, 83]]
QWEN2 = FAMILIES["qwen2"]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, random_params(QWEN2))


@pytest.fixture(scope="module")
def make(params):
    """An engine of the qwen2 model by its job's keys, awake; each kind is made once."""

    @functools.cache
    def made(*, eos=EOS, **keys):
        engine = dict(keys.pop("engine", ()))
        return make_engine(engine_job(engine=engine, **keys), QWEN2, params, eos)

    return made


def generate(engine, prompts=PROMPTS, *, group_size=2, temperature=1.0, first_sequence=0):
    return engine.generate(
        prompts, group_size=group_size, temperature=temperature, first_sequence=first_sequence
    )


def rows(completions):
    pairs = zip(completions.tokens, completions.lengths, strict=True)
    return [row[:length].tolist() for row, length in pairs]


def forward_logprobs(architecture, params, prompts, completions, *, temperature=1.0):
    """Logprob of each completion token, one whole forward pass a sequence, by the trainer."""
    found = []
    for prompt, row in zip(prompts, rows(completions), strict=True):
        tokens = jnp.asarray([[*prompt, *row]])
        hidden = hidden_states(params, tokens, architecture, dtype=jnp.float32, remat=False)
        scores = jax.nn.log_softmax(logits(params, hidden)[0] / temperature)
        at = np.arange(len(row)) + len(prompt) - 1
        found.append(np.asarray(scores)[at, row])
    return found


def each_twice(prompts=PROMPTS):
    return [prompt for prompt in prompts for _ in range(2)]


# What is sampled


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_the_trainers_for_every_family(family):
    architecture = FAMILIES[family]
    params = jax.tree.map(jnp.asarray, random_params(architecture))
    found = generate(
        make_engine(engine_job(temperature=0.8), architecture, params), temperature=0.8
    )
    expected = forward_logprobs(architecture, params, each_twice(), found, temperature=0.8)
    for row, (length, ours) in enumerate(zip(found.lengths, expected, strict=True)):
        np.testing.assert_allclose(found.logprobs[row, :length], ours, atol=1e-5)


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_share_weights_and_repeat_heads_without_a_difference(make, params, devices):
    alone, shared = generate(make()), generate(make(devices=devices))
    assert rows(shared) == rows(alone)
    np.testing.assert_allclose(shared.logprobs, alone.logprobs, atol=1e-5)


def test_both_engines_sample_the_same_tokens_of_the_same_policy_and_seed(make, params):
    job = engine_job(seed=0, dtype="float32", top_k=20, top_p=0.9)
    naive = NaiveRollout(job, QWEN2, make_mesh(job, jax.devices()[:1]), eos_ids=EOS)
    naive.hand_over(params)
    ours, theirs = generate(naive), generate(make(top_k=20, top_p=0.9))
    assert rows(theirs) == rows(ours)
    for row, length in enumerate(ours.lengths):
        np.testing.assert_allclose(
            theirs.logprobs[row, :length], ours.logprobs[row, :length], atol=1e-5
        )


def test_completions_end_with_a_stop_token_that_is_in_them_or_with_their_length(make):
    found = generate(make(), group_size=8)
    for row, truncated in zip(rows(found), found.truncated, strict=True):
        assert not set(row[:-1]) & set(EOS)
        assert truncated == (row[-1] not in EOS)
        assert len(row) == 8 or not truncated
    assert 0 < found.truncated.sum() < len(found.truncated)  # both happened


def test_raw_logprobs_are_those_of_temperature_1(make, params):
    driver = make().driver
    [one] = driver.run(
        [Request(prompt=PROMPTS[0], sequence_number=5)], max_tokens=8, temperature=0.5
    )
    tokens = jnp.asarray([[*PROMPTS[0], *one.tokens]])
    hidden = hidden_states(params, tokens, QWEN2, dtype=jnp.float32, remat=False)
    for temperature, found in ((1.0, one.raw_logprobs), (0.5, one.logprobs)):
        scores = jax.nn.log_softmax(logits(params, hidden)[0] / temperature)
        at = np.arange(len(one.tokens)) + len(PROMPTS[0]) - 1
        np.testing.assert_allclose(found, np.asarray(scores)[at, one.tokens], atol=1e-5)


@pytest.mark.parametrize(
    "keys",
    [
        {"chunk_size": 3},  # requests in one call
        {"engine": (("max_running_requests", 2),)},  # the others wait
        {"engine": (("chunked_prefill_size", 16),)},  # a prompt in parts
        {"engine": (("disable_radix_cache", False),)},  # a group shares its prompt's keys
        {"engine": (("precompile_bs_paddings", (2, 8)), ("precompile_token_paddings", (16, 64)))},
    ],
    ids=str,
)
def test_how_requests_are_batched_changes_no_token(make, keys):
    plain, other = generate(make()), generate(make(**keys))
    assert rows(other) == rows(plain)
    np.testing.assert_allclose(other.logprobs, plain.logprobs, atol=1e-5)


def test_a_sequence_that_is_started_again_for_want_of_room_keeps_its_tokens(make):
    # Eight sequences of up to 64 tokens in a pool of 100: some lose their keys half way.
    keys = {"max_completion_tokens": 40, "eos": (95,)}
    small = make(engine=(("max_total_tokens", 100),), **keys)
    scheduler, retracted = small.driver._scheduler, []
    extend = scheduler._extend_requests_to_queue

    def note(requests, **more):
        retracted.extend(requests)
        extend(requests, **more)

    scheduler._extend_requests_to_queue = note
    scheduler.new_token_ratio = 0.0  # as after many steps: it hopes for short completions
    plain, other = generate(make(**keys)), generate(small)
    assert retracted
    assert rows(other) == rows(plain)
    np.testing.assert_allclose(other.logprobs, plain.logprobs, atol=1e-4)


def test_seed_and_sequence_number_make_the_noise_and_a_group_is_diverse(make):
    engine = make()
    first = rows(generate(engine, [PROMPTS[0]], group_size=16))
    assert rows(generate(engine, [PROMPTS[0]], group_size=16)) == first
    later = rows(generate(engine, [PROMPTS[0]], group_size=16, first_sequence=16))
    assert rows(generate(make(seed=1), [PROMPTS[0]], group_size=16)) != first
    assert len({tuple(row) for row in first + later}) > 24


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_with_their_probabilities(make, params, temperature):
    driver, prompt = make().driver, PROMPTS[0]
    requests = [Request(prompt=prompt, sequence_number=i) for i in range(2000)]
    drawn = [one.tokens[0] for one in driver.run(requests, max_tokens=1, temperature=temperature)]
    hidden = hidden_states(params, jnp.asarray([prompt]), QWEN2, dtype=jnp.float32, remat=False)
    p = np.asarray(jax.nn.softmax(logits(params, hidden)[0, -1] / temperature), np.float64)
    counts = np.bincount(drawn, minlength=len(p))
    # Pearson's chi-square over tokens expected often enough; its mean is their number.
    often = p * len(drawn) >= 5
    assert often.sum() > 5
    chi = (((counts - p * len(drawn)) ** 2) / (p * len(drawn)))[often].sum()
    assert chi < often.sum() + 4 * np.sqrt(2 * often.sum())


def test_greedy_takes_the_likeliest_token(make, params):
    found = generate(make(), temperature=0.0, group_size=1)
    for prompt, row in zip(PROMPTS, rows(found), strict=True):
        tokens = jnp.asarray([[*prompt, *row]])
        hidden = hidden_states(params, tokens, QWEN2, dtype=jnp.float32, remat=False)
        best = np.asarray(logits(params, hidden)[0].argmax(axis=-1))
        assert row == best[len(prompt) - 1 :][: len(row)].tolist()


# Hand-over, sleep and wake


def test_asleep_the_engine_owns_nothing_and_twenty_wakes_compile_nothing():
    params = jax.tree.map(jnp.asarray, random_params(QWEN2))
    without = live_bytes()
    engine = make_engine(engine_job(), QWEN2, params)
    before = rows(generate(engine, temperature=0.0))
    driver = engine.driver
    awake, compiled, programs = live_bytes(), driver.recompiles, programs_of(driver)
    engine.sleep()
    # The key of its noise and the last draw are all it keeps: less than any leaf of the model.
    assert live_bytes() - without < 1024
    assert awake - without > sum(leaf.nbytes for leaf in jax.tree.leaves(params)) // 2
    for _ in range(20):
        engine.hand_over(params)
        assert rows(generate(engine, temperature=0.0)) == before
        engine.sleep()
    assert live_bytes() - without < 1024
    assert driver.recompiles == compiled
    assert programs_of(driver) == programs


def programs_of(driver):
    """How many programs the engine and its hand-over have compiled."""
    jitted = [driver.runner.run, driver._make_pool, *driver.hand_over._programs.values()]
    return [program._cache_size() for program in jitted]


@pytest.mark.parametrize(
    ("residency", "weights", "kv"), [("drop_kv", True, False), ("keep", True, True)]
)
def test_residency_says_what_stays_through_the_update(params, residency, weights, kv):
    # Weights in bf16 are a copy of these f32 ones: the engine's own, which may stay.
    job = engine_job(engine={"residency": residency, "dtype": "bfloat16"})
    engine = make_engine(job, QWEN2, params)
    engine.sleep()
    assert bool(engine.driver.runner.leaves) == weights
    assert bool(engine.driver.runner.token_to_kv_pool.kv_buffer) == kv


def trained(job, params):
    """The state of layer_major's update, and the parameters in it."""
    update = make_update(job, QWEN2, make_mesh(job, jax.devices()[: job.target.devices]))
    state = update.init(jax.tree.map(np.array, params))
    return state, update.params(state)


def pointers(array):
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


@pytest.mark.parametrize("devices", [1, 2])
def test_masters_one_by_one_are_handed_over_without_a_copy(params, devices):
    job = engine_job(devices=devices, engine={"dtype": "bfloat16"}, update={"layers": "per_layer"})
    _, masters = trained(job, params)
    before = live_bytes()
    engine = make_engine(job, QWEN2, masters)
    driver = engine.driver
    for place, leaf in zip(driver.hand_over.places, driver.runner.leaves, strict=True):
        assert pointers(leaf) == pointers(place.of(masters).hi), place
    kv = sum(buffer.nbytes for buffer in driver.runner.token_to_kv_pool.kv_buffer)
    assert live_bytes() - before < kv + 1024
    assert driver.by_reference
    # Whatever the residency: the update is about to donate what the engine reads.
    engine._job = job.model_copy(
        update={"engine": job.engine.model_copy(update={"residency": "keep"})}
    )
    engine.sleep()
    assert not driver.runner.leaves


def test_only_heads_that_are_repeated_are_copied(params):
    job = engine_job(devices=4, engine={"dtype": "bfloat16"}, update={"layers": "per_layer"})
    _, masters = trained(job, params)
    hand_over = make_engine(job, QWEN2, masters).driver.hand_over
    copied = {hand_over.places[i].name for i in hand_over.missing(masters)}
    assert copied == {"k", "v", "k_bias", "v_bias"}


@pytest.mark.parametrize("layers", ["stacked", "per_layer"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_copy_needs_no_more_than_a_leaf_besides(params, layers, dtype):
    job = engine_job(devices=2, engine={"dtype": dtype}, update={"layers": layers})
    _, masters = trained(job, params)
    hand_over = make_engine(job, QWEN2, masters).driver.hand_over
    missing = hand_over.missing(masters)
    if not missing:
        assert (layers, dtype) == ("per_layer", "bfloat16")
        return
    memory = hand_over.program(missing).lower(masters).compile().memory_analysis()
    # A device's part of the largest leaf, in the trainer's f32.
    largest = max(int(np.prod(shape)) for shape in hand_over._shapes) * 4 // 2
    assert memory.temp_size_in_bytes <= largest


@pytest.mark.parametrize("design", ["layer_major", "reference"])
def test_the_engine_has_the_policy_that_the_update_made(params, design):
    job = engine_job(devices=2, update={"design": design})
    _, masters = trained(job, params)
    found = generate(make_engine(job, QWEN2, masters))
    expected = forward_logprobs(QWEN2, params, each_twice(), found)
    for row, (length, ours) in enumerate(zip(found.lengths, expected, strict=True)):
        np.testing.assert_allclose(found.logprobs[row, :length], ours, atol=1e-5)


def test_a_leaf_that_is_not_the_trainers_is_found_before_anything_is_learned(params):
    engine = make_engine(engine_job(), QWEN2, params)
    generate(engine)
    for i in range(len(engine.driver.runner.leaves)):
        engine.hand_over(params)
        leaves, place = engine.driver.runner.leaves, engine.driver.hand_over.places[i]
        if "bias" in place.name and place.name != "v_bias":
            continue  # small, and a shift of all keys alike is none
        leaves[i] = jnp.roll(leaves[i], 1)
        with pytest.raises(EngineFaultError, match="does not have the trainer's policy"):
            generate(engine)


def test_programs_may_all_be_compiled_before_the_first_rollout(make):
    engine = make(engine=(("disable_precompile", False), ("precompile_bs_paddings", (2, 8))))
    assert generate(engine).tokens.tolist() == generate(make()).tokens.tolist()
    assert engine.driver.recompiles == 0


# Limits and failures


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"engine": {"page_size": 16}}, r"engine\.page_size = 16: .* use 1"),
        ({"engine": {"tp_size": 1}, "devices": 2}, r"engine\.tp_size = 1, but cpu-2 has 2"),
        ({"devices": 3}, r"4 query and 2 key/value heads,.* 3 devices: use --set rollout\.engine"),
        ({"engine": {"chunked_prefill_size": 4}}, r"less than the 16 requests in flight"),
        ({"engine": {"load_format": "auto"}}, r"load_format = auto: .* leave it at dummy"),
        ({"engine": {"precompile_bs_paddings": (2, 64)}}, r"has 64, and at most 16 requests"),
        ({"engine": {"precompile_token_paddings": (4,)}}, r"\[4, 64\]: .* 16 .* 64"),
        ({"engine": {"max_total_tokens": 31}}, r"31 is a KV pool too small .* 32 tokens .* 32"),
    ],
    ids=str,
)
def test_what_the_engine_cannot_run_is_refused_with_what_to_change(keys, match):
    job = engine_job(**keys)
    with pytest.raises(EngineError, match=match):
        check_engine(job, QWEN2)


def test_more_requests_than_the_kernel_takes_are_refused_and_never_chosen():
    model = dataclasses.replace(QWEN2, head_dim=128)
    long = {"max_prompt_tokens": 1120, "max_completion_tokens": 4000, "prompts_per_step": 32}
    on_tpu = {"accelerator": "v4-8"}
    # 1024 x 1024 / 2 / 5121 tokens / 4: the kernel's table of pages.
    left_open = engine_job(group_size=1, **long).model_copy(update=on_tpu)
    assert settings_of(left_open).running == 25
    check_engine(left_open, dataclasses.replace(model, heads=4, kv_heads=4))
    asked = engine_job(group_size=1, engine={"max_running_requests": 32}, **long)
    with pytest.raises(EngineError, match=r"= 32: .* at most 25 .* raise engine\.page_size"):
        check_engine(asked.model_copy(update=on_tpu), model)


def test_heads_of_64_are_refused_on_tpu_only():
    model = dataclasses.replace(QWEN2, head_dim=64)
    job = engine_job()
    check_engine(job, model)
    on_tpu = job.model_copy(update={"accelerator": "v4-8"})
    with pytest.raises(EngineError, match=r"heads of 64,.* 128: use --set rollout\.engine=naive"):
        check_engine(on_tpu, model)
    check_engine(on_tpu, dataclasses.replace(QWEN2, head_dim=128))


def test_a_sequence_longer_than_the_engines_is_refused(make):
    with pytest.raises(EngineError, match=r"prompt of 25 tokens .* 8 .* 32 tokens"):
        generate(make(), [[1] * 25])


def test_a_sequence_may_be_as_long_as_the_job_says_to_the_last_token(params):
    # Hardly a token ends it, and the pool has room for one alone: 24 + 8 tokens.
    job = engine_job(engine={"max_total_tokens": 32, "context_length": 32})
    engine = make_engine(job, QWEN2, params, eos_ids=(95,))
    found = generate(engine, [[1] * 24], group_size=3)
    assert max(found.lengths) == 8
    assert (found.lengths == 8).sum() >= 2


def test_too_small_a_share_of_memory_is_refused_with_the_engines_words_and_our_numbers(params):
    job = engine_job(engine={"mem_fraction_static": 1e-9})
    with pytest.raises(EngineError, match=r"Not enough memory.*GiB free.*must be above"):
        make_engine(job, QWEN2, params)


def test_an_error_on_the_device_is_an_exception_and_what_it_broke_stays_broken(params):
    engine = make_engine(engine_job(), QWEN2, params)
    run, calls = engine.driver.runner.run, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("RESOURCE_EXHAUSTED: injected")
        return run(*arguments)

    engine.driver.runner.run = fails
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED: injected"):
        generate(engine)
    with pytest.raises(EngineFaultError, match="broke in an earlier call"):
        generate(engine)


def test_asleep_the_engine_samples_nothing(params):
    engine = make_engine(engine_job(), QWEN2)
    with pytest.raises(EngineFaultError, match="asleep"):
        generate(engine)
    engine.hand_over(params)
    engine.sleep()
    with pytest.raises(EngineFaultError, match="asleep"):
        generate(engine)


def test_two_hundred_rollouts_leave_no_memory_behind(make):
    engine, process = make(), psutil.Process()
    for _ in range(20):
        generate(engine)
    seen = []
    for _ in range(200):
        generate(engine)
        seen.append(process.memory_info().rss)
    # What leaks does so in both halves; an allocator that takes a piece does so once.
    slopes = [np.polyfit(np.arange(100), half, 1)[0] for half in (seen[:100], seen[100:])]
    assert min(slopes) < 16 * 1024  # bytes a rollout: 3 MiB in all of it
