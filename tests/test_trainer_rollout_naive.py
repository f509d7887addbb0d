import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jobs.spec import Job, Mesh, Rollout, Update
from trainer.data import pack
from trainer.mesh import make_mesh, state_shardings
from trainer.model import hidden_states, logits, token_logprobs
from trainer.rollout.naive import NaiveRollout
from trainer.rollout.sampling import Places, gumbel_noise, restrict
from trainer.update.program import make_update
from trainer.weights import load_params, open_model

PROMPTS = [[10, 20, 30], [7], list(range(40, 52)), [200, 201, 202, 203, 204]]
MAX_PROMPT, MAX_TOKENS, GROUP = 12, 10, 3
# Sequences of a random model end nowhere in particular: a tenth of its tokens are given as EOS.
EOS = tuple(range(0, 320, 10))


@pytest.fixture(scope="module")
def model():
    return open_model("tiny")


@pytest.fixture(scope="module")
def params(model):
    return jax.tree.map(jnp.asarray, load_params(model, lambda _, leaf: leaf))


@pytest.fixture(scope="module")
def make(model, params):
    """A sampler by devices, mesh and rollout keys; each kind is made once."""

    @functools.cache
    def made(*, devices=1, tp=1, eos=EOS, seed=0, **rollout):
        job = Job(
            name="naive",
            accelerator=f"cpu-{devices}",
            model="tiny",
            seed=seed,
            mesh=Mesh(tp=tp),
            rollout=Rollout(
                prompts_per_step=4,
                group_size=GROUP,
                max_prompt_tokens=MAX_PROMPT,
                max_completion_tokens=MAX_TOKENS,
                dtype="float32",
                **rollout,
            ),
        )
        mesh = make_mesh(job, jax.devices()[:devices])
        sampler = NaiveRollout(job, model.architecture, mesh, eos_ids=eos)
        sampler.hand_over(params)
        return sampler

    return made


def generate(sampler, prompts=PROMPTS, *, group_size=GROUP, temperature=1.0, first_sequence=0):
    return sampler.generate(
        prompts, group_size=group_size, temperature=temperature, first_sequence=first_sequence
    )


def rows(completions):
    """Each completion's tokens, up to its end."""
    pairs = zip(completions.tokens, completions.lengths, strict=True)
    return [row[:length].tolist() for row, length in pairs]


@pytest.fixture(scope="module")
def scores(model, params):
    """Logits after every position of right-padded rows, by the trainer's forward pass."""

    @jax.jit
    def forward(tokens):
        hidden = hidden_states(params, tokens, model.architecture, dtype=jnp.float32, remat=False)
        return logits(params, hidden)

    def padded(sequences):
        tokens = np.zeros((16, MAX_PROMPT + MAX_TOKENS), np.int32)  # one shape, one program
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = sequence
        return np.asarray(forward(tokens))[: len(sequences)]

    return padded


# What is sampled


def greedy_without_cache(scores, prompts, eos):
    """One token at a time, the whole sequence computed anew for each."""
    sequences = [list(prompt) for prompt in prompts]
    for _ in range(MAX_TOKENS):
        after = scores(sequences)
        for i, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
            if len(sequence) == len(prompt) or sequence[-1] not in eos:
                sequence.append(int(after[i, len(sequence) - 1].argmax()))
    return [s[len(p) :] for s, p in zip(sequences, prompts, strict=True)]


def test_greedy_tokens_are_the_argmax_of_the_whole_sequence_computed_anew(make, scores):
    found = generate(make(), temperature=0.0)
    expected = greedy_without_cache(scores, PROMPTS, EOS)
    assert rows(found) == [row for row in expected for _ in range(GROUP)]


def test_completions_end_with_the_first_eos_or_with_the_length(make):
    found = generate(make())
    for row, truncated in zip(rows(found), found.truncated, strict=True):
        assert not set(row[:-1]) & set(EOS)
        assert truncated == (row[-1] not in EOS)
        assert len(row) == MAX_TOKENS if truncated else len(row) <= MAX_TOKENS
    # Both happened.
    assert 0 < found.truncated.sum() < len(PROMPTS) * GROUP


def test_without_eos_every_completion_is_cut_at_the_length(make):
    # 320 is past the vocabulary: no token is EOS.
    found = generate(make(eos=(320,)))
    assert found.lengths.tolist() == [MAX_TOKENS] * len(PROMPTS) * GROUP
    assert found.truncated.all()


def test_a_completion_of_one_token_is_an_eos_at_once(make):
    found = generate(make(eos=tuple(range(320))))
    assert found.lengths.tolist() == [1] * len(PROMPTS) * GROUP
    assert not found.truncated.any()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_that_the_trainer_computes(make, model, params, temperature):
    found = generate(make(), temperature=temperature)
    prompts = [prompt for prompt in PROMPTS for _ in range(GROUP)]
    tokens, lengths, mask = pack(prompts, found, sequence_tokens=MAX_PROMPT + MAX_TOKENS, pad_id=0)

    @jax.jit
    def trainers(params, tokens, temperature):
        hidden = hidden_states(params, tokens, model.architecture, dtype=jnp.float32, remat=False)
        return token_logprobs(
            params, hidden[:, :-1], tokens[:, 1:], temperature=temperature, chunk=32
        )[0]

    every = trainers(params, tokens, temperature or 1.0)
    at = lengths[:, None] - 1 + np.arange(MAX_TOKENS)
    expected = np.take_along_axis(np.asarray(every), np.minimum(at, every.shape[1] - 1), axis=1)
    # f32, other orders of the same sums (attention in two parts, over padding).
    np.testing.assert_allclose(found.logprobs * mask, expected * mask, atol=1e-5, rtol=0)


def test_logprobs_are_of_the_whole_distribution_even_where_top_k_restricts_it(make, scores):
    found = generate(make(top_k=2))
    after = scores([prompt for prompt in PROMPTS for _ in range(GROUP)])
    for i, prompt in enumerate(p for p in PROMPTS for _ in range(GROUP)):
        ln_p = np.log(softmax(after[i, len(prompt) - 1]))
        assert found.tokens[i, 0] in np.argsort(ln_p)[-2:]
        np.testing.assert_allclose(found.logprobs[i, 0], ln_p[found.tokens[i, 0]], atol=1e-5)


def softmax(x):
    shares = np.exp(x.astype(np.float64) - x.max())
    return shares / shares.sum()


# Noise: seed, sequence and position decide it, and nothing else


def test_the_completions_of_a_group_differ_and_a_seed_repeats_them(make):
    found = rows(generate(make()))
    assert len({tuple(row) for row in found}) == len(found)
    assert rows(generate(make())) == found
    assert rows(generate(make(seed=1))) != found


def test_a_sequence_does_not_depend_on_what_else_is_in_the_batch(make):
    whole = rows(generate(make()))
    # A prompt alone, with the numbers that its sequences have in the batch.
    for i, prompt in enumerate(PROMPTS):
        alone = generate(make(), [prompt], first_sequence=i * GROUP)
        assert rows(alone) == whole[i * GROUP : (i + 1) * GROUP]


def test_a_group_may_be_asked_for_in_parts_and_prompts_in_any_order(make):
    whole = rows(generate(make()))
    parts = [
        rows(generate(make(), [PROMPTS[2]], group_size=1, first_sequence=6 + k)) for k in (2, 0, 1)
    ]
    assert [parts[1][0], parts[2][0], parts[0][0]] == whole[6:9]
    # Sequences 0 to 2 are now another prompt's: the numbers, not the rows, carry the noise.
    swapped = rows(generate(make(), PROMPTS[::-1]))
    assert swapped != whole
    assert rows(generate(make(), PROMPTS[::-1])) == swapped


def test_noise_is_one_of_its_own_for_every_sequence_and_position():
    key = jax.random.key(0)
    noise = np.stack(
        [
            gumbel_noise(key, Places(jnp.arange(4, dtype=jnp.uint32), jnp.int32(t)), 50)
            for t in range(4)
        ]
    ).reshape(16, 50)
    distances = np.abs(noise[:, None] - noise[None]).max(axis=-1)
    assert (distances[~np.eye(16, dtype=bool)] > 0.5).all()
    # The largest sequence number of all, and one beyond 2**31 (evaluations), have their own too.
    far = gumbel_noise(key, Places(jnp.array([2**31, 2**32 - 1], jnp.uint32), jnp.int32(0)), 50)
    assert np.abs(np.asarray(far)[:, None] - noise[None]).max(axis=-1).min() > 0.5


@pytest.mark.parametrize(("top_k", "temperature"), [(None, 1.0), (4, 0.5)])
def test_tokens_are_drawn_with_their_probabilities(make, scores, top_k, temperature):
    """Total variation between counts and exact probabilities, of one next token."""
    calls, group = 4, 4096
    draws = calls * group
    sampler = make(top_k=top_k, eos=tuple(range(320)))
    ask = functools.partial(
        generate, sampler, [PROMPTS[0]], group_size=group, temperature=temperature
    )
    tokens = np.concatenate([ask(first_sequence=i * group).tokens[:, 0] for i in range(calls)])
    exact = softmax(scores([PROMPTS[0]])[0, len(PROMPTS[0]) - 1] / temperature)
    if top_k is not None:
        exact[np.argsort(exact)[:-top_k]] = 0
        exact /= exact.sum()
    counts = np.bincount(tokens, minlength=320)
    distance = np.abs(counts / draws - exact).sum() / 2
    # E|count/n - p| <= sqrt(p (1 - p) / n) for each token, so half their sum bounds the mean; a
    # draw moves the distance by 1/n at most, so by McDiarmid it exceeds the mean by
    # sqrt(ln(1e6) / 2n) with probability 1e-6 at most.
    bound = np.sqrt(exact * (1 - exact) / draws).sum() / 2 + np.sqrt(np.log(1e6) / (2 * draws))
    assert distance < bound
    # And the test can tell: twice that temperature would not pass.
    wrong = exact**0.5 / (exact**0.5).sum()
    assert np.abs(wrong - exact).sum() / 2 > 1.5 * bound


# What is restricted


def kept(scores, *, top_k, top_p):
    """Which tokens may be drawn, by the definitions: one row, no ties."""
    allowed = np.zeros(len(scores), bool)
    ranked = np.argsort(-scores)[: len(scores) if top_k is None else top_k]
    shares = softmax(scores[ranked])
    together = 0.0
    for token, share in zip(ranked, shares, strict=True):
        if together >= top_p:
            break
        allowed[token] = True
        together += share
    return allowed


@pytest.mark.parametrize("top_k", [None, 1, 3, 20, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_top_k_and_then_top_p_keep_what_their_definitions_keep(top_k, top_p):
    scores = 3 * np.random.default_rng(4).standard_normal((6, 20)).astype(np.float32)
    found = np.asarray(restrict(jnp.asarray(scores), top_k=top_k, top_p=top_p))
    expected = np.array([kept(row, top_k=top_k, top_p=top_p) for row in scores])
    np.testing.assert_array_equal(found == scores, expected)
    assert (found[~expected] < -1e38).all()


def test_top_p_counts_the_share_among_the_top_k():
    # Shares 0.4, 0.3, 0.2, 0.1; among the first two 0.571 and 0.429: 0.5 is reached by the first.
    scores = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    both = np.asarray(restrict(scores, top_k=2, top_p=0.5))[0] > -1e38
    assert both.tolist() == [True, False, False, False]
    alone = np.asarray(restrict(scores, top_k=None, top_p=0.5))[0] > -1e38
    assert alone.tolist() == [True, True, False, False]


# Devices and dtypes


@pytest.mark.parametrize(("devices", "tp"), [(2, 1), (4, 4)])
def test_more_devices_give_the_same_tokens(make, devices, tp):
    one, many = make(), make(devices=devices, tp=tp)
    assert rows(generate(many, temperature=0.0)) == rows(generate(one, temperature=0.0))
    found, expected = generate(many), generate(one)
    assert rows(found) == rows(expected)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_bfloat16_samples_from_nearly_the_same_distribution(make, params, model):
    job = Job(
        name="naive",
        accelerator="cpu",
        model="tiny",
        rollout=Rollout(
            max_prompt_tokens=MAX_PROMPT, max_completion_tokens=MAX_TOKENS, dtype="bfloat16"
        ),
    )
    half = NaiveRollout(job, model.architecture, make_mesh(job, jax.devices()[:1]), eos_ids=EOS)
    half.hand_over(params)
    found, expected = (generate(s).logprobs[:, 0] for s in (half, make()))
    # 8 bits in each of 2 layers' sums: a few per cent; a wrong cast (of rope, of norms) is more.
    np.testing.assert_allclose(found, expected, atol=0.15)


@pytest.mark.parametrize("devices", [1, 4])
def test_split_masters_of_single_layers_are_sampled_from_without_a_copy(model, devices):
    job = Job(
        name="naive",
        accelerator=f"cpu-{devices}",
        model="tiny",
        rollout=Rollout(dtype="bfloat16"),
        update=Update(layers="per_layer"),
    )
    mesh = make_mesh(job, jax.devices()[:devices])
    shardings = state_shardings(mesh, model.architecture)
    whole = jax.device_put(load_params(model, lambda _, leaf: leaf), shardings)
    update = make_update(job, model.architecture, mesh)
    masters = update.params(update.init(whole))
    sampler = NaiveRollout(job, model.architecture, mesh, eos_ids=EOS)
    before = sum(x.nbytes for x in jax.live_arrays())
    sampler.hand_over(masters)
    assert sum(x.nbytes for x in jax.live_arrays()) == before
    assert sampler.weights["layers"][1]["q"] is masters["layers"][1]["q"].hi
    assert sampler.weights["embed"] is masters["embed"].hi
    sampler.sleep()
    assert sampler.weights is None
