import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import spec
from trainer.architecture import Architecture, leaf_shapes
from trainer.data import Batch
from trainer.grpo import LOSSES, clip_range
from trainer.mesh import make_mesh, state_shardings
from trainer.update import program
from trainer.update.layout import abstract_state
from trainer.update.masters import Split, cast_tree
from trainer.update.optimizer import LeafState, Quantized
from trainer.update.program import make_update

# Sums of some hundred f32 products in another order: some units of 6e-8 of the largest.
ROUNDING = 1e-5
PROMPT, COMPLETION, VOCAB = 5, 4, 48
RATE = 1e-3
NOT_DECAYED = {"norm", "ln1", "ln2", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias"}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Twenty programs compile in half the time without LLVM's passes; they compute the same."""
    quick = "jax_disable_most_optimizations"
    before = jax.config.read(quick)
    jax.config.update(quick, not before)
    yield
    jax.config.update(quick, before)


@functools.cache
def architecture(family):
    """Every kind of leaf in one of the three, in sizes that 2 and 4 divide."""
    return Architecture(
        family=family,
        vocab=VOCAB,
        embed=16,
        mlp=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        rope_theta=1e4,
        norm_eps=1e-6,
        tied_head=family == "llama",
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        max_position=64,
    )


def host_params(family, scale=0.2):
    random = np.random.default_rng(0)
    tree = {"layers": {}}
    for path, shape in leaf_shapes(architecture(family)).items():
        near_one = path[-1] in ("norm", "ln1", "ln2", "q_norm", "k_norm")
        leaf = near_one + scale * random.standard_normal(shape).astype(np.float32)
        (tree["layers"] if path[0] == "layers" else tree)[path[-1]] = leaf
    return tree


def make_job(*, devices=1, prompts=8, group=2, temperature=1.0, micro=None, update=None, **train):
    train = {"learning_rate": RATE, "max_grad_norm": None, "steps": 20, **train}
    return spec.Job(
        name="layer-major",
        accelerator=f"cpu-{devices}",
        model="tiny",
        steps=train.pop("steps"),
        rollout=spec.Rollout(
            prompts_per_step=prompts,
            group_size=group,
            max_prompt_tokens=PROMPT,
            max_completion_tokens=COMPLETION,
            temperature=temperature,
        ),
        train=spec.Train(micro_batch_size=micro, **train),
        update=spec.Update(**{"update_dtype": "float32", **(update or {})}),
    )


def make_batch(job, family, *, old=False, lengths=None, seed=1):
    """Prompts of every length, the first the longest; completions of every length, some empty.

    The first group has equal rewards, so no advantage; the last has no completion token at all: a
    row of nothing but prompt where groups share rows.
    """
    random = np.random.default_rng(seed)
    group, batch = job.rollout.group_size, job.sequences_per_step
    prompts = random.integers(1, PROMPT + 1, batch // group)
    prompts[0] = PROMPT
    if lengths is None:
        lengths = random.integers(0, COMPLETION + 1, batch)
        lengths[:2], lengths[-group:] = COMPLETION, 0
    mask = (np.arange(COMPLETION)[None] < np.array(lengths)[:, None]).astype(np.float32)
    tokens = np.zeros((batch, PROMPT + COMPLETION), np.int32)
    for b, length in enumerate(np.repeat(prompts, group)):
        if b % group == 0:
            prompt = random.integers(0, VOCAB, length)
        tokens[b, :length] = prompt
        tokens[b, length : length + lengths[b]] = random.integers(0, VOCAB, lengths[b])
    advantages = random.standard_normal(batch).astype(np.float32)
    advantages[:group] = 0.0
    parts = {
        "tokens": tokens,
        "prompt_lengths": np.repeat(prompts, group).astype(np.int32),
        "completion_mask": mask,
        "weights": np.asarray(LOSSES[job.train.loss].weights(jnp.asarray(mask), COMPLETION)),
        "advantages": advantages,
    }
    if old or job.train.beta:
        run = reference(family, job.rollout.temperature)
        now = run(host_params(family), Batch(**parts), np.zeros_like(mask))[0]
        # Some ratios inside the clips, some outside, on both sides.
        near = lambda: (now + 0.3 * random.standard_normal(mask.shape)).astype(np.float32)
        parts |= {"old_logprobs": near() if old else None}
        parts |= {"ref_logprobs": near() if job.train.beta else None}
    return Batch(**parts)


# The reference's forward and its gradient by autodiff, one program a family and temperature; the
# losses' slopes above it by hand.


@functools.cache
def reference(family, temperature):
    """(parameters, batch, d loss / d logprob) -> logprobs, entropy, gradient."""
    job = make_job(temperature=temperature, update={"design": "reference"})

    def run(params, batch, slope):
        forward = lambda params: program.completion_logprobs(
            params, batch, job, architecture(family)
        )
        logprobs, back, entropy = jax.vjp(forward, params, has_aux=True)
        return logprobs, entropy, back(slope)[0]

    jitted = jax.jit(run)
    return lambda *arguments: jax.tree.map(np.asarray, jitted(*arguments))


def loss_by_hand(job, batch, logprobs):
    """Of f64 numbers: (loss, d loss / d logprob, clipped share, mean kl)."""
    mask, gain = batch.completion_mask, batch.advantages[:, None].astype(np.float64)
    lengths, tokens = mask.sum(axis=1, keepdims=True), max(mask.sum(), 1)
    old = logprobs if batch.old_logprobs is None else batch.old_logprobs
    distance = (logprobs.astype(np.float64) - old) * mask
    if job.train.loss == "gspo":
        distance = distance.sum(axis=1, keepdims=True) / np.maximum(lengths, 1)
    ratio = np.exp(np.broadcast_to(distance, mask.shape))
    low, high = (0, np.inf) if job.train.loss == "rloo" else clip_range(job)
    clipped = np.clip(ratio, low, high) * gain < ratio * gain
    weights = {
        "grpo": mask / np.maximum(lengths, 1) / len(mask),
        "dr_grpo": mask / COMPLETION / len(mask),
        "dapo": mask / tokens,
        "gspo": mask / np.maximum(lengths, 1) / len(mask),
        "rloo": mask / len(mask),
        "reinforce_pp": mask / tokens,
    }[job.train.loss]
    each = -np.minimum(ratio * gain, np.clip(ratio, low, high) * gain)
    slope, kl = np.where(clipped, 0.0, -ratio * gain), np.zeros_like(ratio)
    if job.train.beta:
        apart = batch.ref_logprobs.astype(np.float64) - logprobs
        kl = np.exp(apart) - apart - 1
        slope = slope + job.train.beta * (1 - np.exp(apart))
    loss = (weights * (each + job.train.beta * kl)).sum()
    mean = lambda x: (x * mask).sum() / tokens
    return loss, (weights * slope).astype(np.float32), mean(clipped), mean(kl)


def clipped_by_hand(gradient, job, family):
    """The gradient as the job's clip leaves it, and its norm before."""
    groups = [{"embed"}, {"head", "norm"}] if family != "llama" else [{"embed", "norm"}]
    flat = {name: leaf[None] for name, leaf in gradient.items() if name != "layers"}
    layers = gradient["layers"]
    parts = [{name: flat[name] for name in group} for group in groups]
    parts += [{name: leaf[i : i + 1] for name, leaf in layers.items()} for i in range(2)]
    norms = [np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in p.values())) for p in parts]
    whole, limit = np.linalg.norm(norms), job.train.max_grad_norm or np.inf
    if job.update.clip == "global":
        norms = [whole] * len(parts)
    cut = [
        {name: g * min(1.0, limit / norm) for name, g in part.items()}
        for part, norm in zip(parts, norms, strict=True)
    ]
    above, below = cut[: len(groups)], cut[len(groups) :]
    clipped = {name: g[0] for part in above for name, g in part.items()}
    clipped["layers"] = {name: np.concatenate([p[name] for p in below]) for name in layers}
    return clipped, whole


# A run of layer_major


@functools.cache
def updates(job, family):
    mesh = make_mesh(job, jax.devices()[: job.target.devices])
    return make_update(job, architecture(family), mesh), mesh


def first_state(job, family):
    """The state of `host_params` with moments of 0, laid out by hand and not by `init`."""
    abstract = abstract_state(job, architecture(family), updates(job, family)[1])

    def leaf(value, like):
        bits = value.view(np.uint32)
        high = ((bits.astype(np.uint64) + 0x8000) >> 16).astype(np.uint16)
        low = (bits.astype(np.int64) - (high.astype(np.int64) << 16)).astype(np.int16)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (like.m, like.v))
        filled = LeafState(Split(high.view(ml_dtypes.bfloat16), low), *zeros)
        return jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), filled, like)

    params = host_params(family)
    if job.update.layers == "per_layer":
        of_layer = lambda i: {name: x[i] for name, x in params["layers"].items()}
        params["layers"] = [of_layer(i) for i in range(2)]
    count = abstract.pop("updates")
    is_leaf = lambda x: isinstance(x, np.ndarray)
    state = jax.tree.map(leaf, params, abstract, is_leaf=is_leaf)
    return {**state, "updates": jax.device_put(np.int32(0), count.sharding)}


def plain(leaf):
    """A master or moment as f32; a quantized one's scales spread over the devices' parts."""
    if isinstance(leaf, Split):
        high = np.asarray(leaf.hi).view(np.uint16).astype(np.int64) << 16
        return (high + np.asarray(leaf.lo)).astype(np.uint32).view(np.float32)
    if not isinstance(leaf, Quantized):
        return np.asarray(leaf, np.float32)
    values, scales = np.asarray(leaf.values, np.float32), np.asarray(leaf.scales)
    return values * np.repeat(scales, values.shape[-1] // scales.shape[-1], axis=-1)


def read(state, part):
    """Host f32 of one part ("master", "m") of a state, layers stacked."""
    tree = {name: leaf for name, leaf in state.items() if name != "updates"}
    is_leaf = lambda x: isinstance(x, LeafState)
    tree = jax.tree.map(lambda leaf: plain(getattr(leaf, part)), tree, is_leaf=is_leaf)
    if isinstance(tree["layers"], list):
        names = tree["layers"][0]
        tree["layers"] = {n: np.stack([layer[n] for layer in tree["layers"]]) for n in names}
    return tree


def leaves(*trees):
    """(leaf's name, its value in each tree)."""
    flat = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in trees]
    for row in zip(*flat, strict=True):
        assert len({str(path) for path, _ in row}) == 1
        yield row[0][0][-1].key, *(np.asarray(leaf, np.float64) for _, leaf in row)


def flattened(tree):
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(tree)])


def cosine(found, expected):
    x, y = flattened(found), flattened(expected)
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


# Gradients and one step through the one door. Lion with b2 = 0 keeps the clipped gradient as its
# momentum, AdamW with b1 = 0 as its first moment: both are read from there.
LION, ADAMW = {"optimizer": "lion", "b2": 0.0}, {"optimizer": "adamw", "b1": 0.0, "b2": 0.9}

# Each family, loss and option with several others, on 1, 2 and 4 devices. 16 sequences a step.
CASES = {
    "one sequence at a time": ("llama", LION | {"micro": 1, "loss": "grpo", "max_grad_norm": 0.3}),
    "chunks that do not divide": (
        "qwen2",
        ADAMW
        | {"devices": 2, "micro": 4, "loss": "dr_grpo", "old": True, "max_grad_norm": 0.1}
        | {"clip": "global", "layers": "per_layer", "rows": "group", "chunk": 7},
    ),
    "int8 lion": (
        "qwen3",
        LION
        | {"devices": 4, "micro": 16, "loss": "dapo", "old": True}
        | {"rows": "group", "chunk": 3, "moments": "int8"},
    ),
    "int8 adamw": (
        "llama",
        ADAMW
        | {"devices": 4, "micro": 4, "loss": "gspo", "old": True, "clip_low": 0.1}
        | {"clip_high": 0.2, "max_grad_norm": 0.2, "clip": "global", "layers": "per_layer"}
        | {"moments": "int8"},
    ),
    "gspo of its own samples, hotter": (
        "qwen2",
        LION | {"micro": 8, "loss": "gspo", "temperature": 1.3, "max_grad_norm": 0.2},
    ),
    "a chunk a token": (
        "qwen3",
        ADAMW
        | {"devices": 2, "micro": 2, "loss": "rloo", "old": True, "max_grad_norm": 0.5}
        | {"weight_decay": 0.1, "layers": "per_layer", "chunk": 1},
    ),
    "two devices, shared prompts": (
        "llama",
        LION
        | {"devices": 2, "micro": 8, "loss": "reinforce_pp", "old": True, "beta": 0.2}
        | {"weight_decay": 0.1, "rows": "group"},
    ),
    "four devices, hotter": (
        "qwen2",
        LION
        | {"devices": 4, "micro": 8, "loss": "dapo", "beta": 0.3, "temperature": 1.3}
        | {"max_grad_norm": 0.2, "layers": "per_layer", "rows": "group"},
    ),
    # The same mathematics three times: see the property below.
    "groups of four": (
        "qwen3",
        LION
        | {"devices": 4, "prompts": 4, "group": 4, "micro": 16, "loss": "grpo", "old": True}
        | {"beta": 0.1, "rows": "group"},
    ),
    "groups of one": (
        "qwen3",
        LION
        | {"prompts": 16, "group": 1, "micro": 16, "loss": "grpo", "old": True}
        | {"beta": 0.1, "rows": "group"},
    ),
    "one row at a time": (
        "qwen3",
        LION
        | {"micro": 2, "loss": "grpo", "old": True, "beta": 0.1}
        | {"clip": "global", "rows": "group", "chunk": 5},
    ),
    "gspo with the paper's clips": (
        "qwen3",
        LION | {"devices": 2, "micro": 4, "loss": "gspo", "old": True, "max_grad_norm": 0.1},
    ),
}
UPDATE = {
    "clip": "clip",
    "layers": "layers",
    "rows": "completions_per_row",
    "chunk": "loss_chunk_tokens",
    "moments": "moments",
    "dtype": "update_dtype",
}


def of_case(name, **more):
    """(family, job, batch)."""
    family, asked = CASES[name]
    asked = asked | more
    old = asked.pop("old", False)
    update = {key: asked.pop(short) for short, key in UPDATE.items() if short in asked}
    job = make_job(update=update, **asked)
    return family, job, make_batch(job, family, old=old)


def step(job, family, batch):
    """(state after, what was learned) of the first step."""
    return updates(job, family)[0].step(first_state(job, family), batch)


def expected_of(job, family, batch):
    """(clipped gradient, its norm before, loss, clipped, kl, entropy)."""
    run = functools.partial(reference(family, job.rollout.temperature), host_params(family))
    logprobs, entropy, _ = run(batch, np.zeros_like(batch.completion_mask))
    loss, slope, clipped, kl = loss_by_hand(job, batch, logprobs)
    gradient, norm = clipped_by_hand(run(batch, slope)[2], job, family)
    mask = batch.completion_mask
    return gradient, norm, loss, clipped, kl, (entropy * mask).sum() / max(mask.sum(), 1)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_and_a_step_are_those_of_the_reference(name):
    family, job, batch = of_case(name)
    state, said = step(job, family, batch)
    gradient, norm, loss, clipped, kl, entropy = expected_of(job, family, batch)
    np.testing.assert_allclose(said.grad_norm, norm, rtol=ROUNDING)
    np.testing.assert_allclose(said.loss, loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(said.entropy, entropy, rtol=1e-5)
    np.testing.assert_allclose(said.kl, kl, rtol=1e-4)
    np.testing.assert_allclose(said.clipped_fraction, clipped, rtol=1e-6)
    assert norm > (job.train.max_grad_norm or 0.0)  # the clip does something
    found = read(state, "m")
    # bf16 moments have 8 bits; int8 ones, rounded up or down at random,
    # are off by less than a scale: the largest of a row / 127.
    # A global clip keeps the layers' gradients in bf16 before.
    roundings = (job.update.moments == "bfloat16") + (job.update.clip == "global")
    for leaf, ours, exact in leaves(found, gradient):
        bound = roundings * 1.01 * 2**-8 * np.abs(exact) + ROUNDING * np.abs(exact).max()
        if job.update.moments == "int8":
            bound = bound + np.abs(exact).max(axis=-1, keepdims=True) / 126
        assert (np.abs(ours - exact) <= bound).all(), leaf
    if job.update.moments == "bfloat16":
        assert cosine(found, gradient) >= 0.99999
    check_step(job, host_params(family), gradient, read(state, "master"))


def check_step(job, start, gradient, found):
    """A first step from moments of 0: both optimizers take a step of RATE by the sign."""
    compared = 0
    for leaf, before, g, after in leaves(start, gradient, found):
        # A sign is right or wrong; where the gradient is nothing but rounding, it may be either.
        sure = (np.abs(g) > 3 * ROUNDING * np.abs(g).max()) | (g == 0)
        compared += sure.sum()
        # AdamW's eps: what is 1e-8 against |g|.
        change = np.sign(g) if job.train.optimizer == "lion" else g / (np.abs(g) + 1e-8)
        change = change + (0.0 if leaf in NOT_DECAYED else job.train.weight_decay) * before
        # f32 parameters of at most 2: a unit of 1.2e-7, against RATE.
        np.testing.assert_allclose(
            ((before - after) / RATE)[sure], change[sure], atol=2e-3, err_msg=leaf
        )
    assert compared > 0.99 * sum(x.size for x in jax.tree.leaves(start))


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(0, COMPLETION), min_size=16, max_size=16), seed=st.integers(0))
def test_no_way_of_sharing_out_a_step_changes_what_is_learned(lengths, seed):
    """4 devices with a row of four each; 8 micro-batches of a row of two; 16 rows at once."""
    cases = ("groups of four", "one row at a time", "groups of one")
    jobs = [of_case(name)[1] for name in cases]
    batch = make_batch(jobs[0], "qwen3", old=True, lengths=lengths, seed=seed)
    (state, said), *others = (step(job, "qwen3", batch) for job in jobs)
    gradient, norm, *_ = expected_of(jobs[0], "qwen3", batch)
    np.testing.assert_allclose(said.grad_norm, norm, rtol=ROUNDING, atol=1e-7)
    for other, of_other in others:
        for name in ("loss", "entropy", "kl", "clipped_fraction", "grad_norm"):
            ours, theirs = getattr(said, name), getattr(of_other, name)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6, err_msg=name)
        for leaf, ours, theirs, exact in leaves(read(state, "m"), read(other, "m"), gradient):
            # Each is rounded to bf16, and one of them, of a global clip, twice.
            bound = 3.03 * 2**-8 * np.abs(exact) + ROUNDING * np.abs(exact).max()
            assert (np.abs(ours - theirs) <= bound).all(), leaf


def test_bfloat16_computes_nearly_the_same_gradient():
    """Of its own samples: no ratio is near a clip, so no rounding takes a gradient away."""
    changes = {"dtype": "bfloat16", "old": False, "rows": "group"}
    family, job, batch = of_case("chunks that do not divide", **changes)
    state, said = step(job, family, batch)
    gradient, norm, *_ = expected_of(job, family, batch)
    # Errors of 2^-8 an operation, of random sign, through some ten of them in a row: 1.2 % of the
    # gradient's length would be a cosine of 0.9999; cancellations in the softmax cost the rest.
    assert cosine(read(state, "m"), gradient) >= 0.995
    np.testing.assert_allclose(said.grad_norm, norm, rtol=0.02)


# Several updates in a row


@pytest.mark.parametrize(
    ("train", "update"),
    [
        ({"optimizer": "lion"}, {"moments": "bfloat16", "clip": "global"}),
        ({"optimizer": "adamw"}, {"moments": "int8", "layers": "per_layer"}),
    ],
)
def test_five_updates_go_the_way_of_the_reference(train, update):
    family = "llama"
    train |= {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "max_grad_norm": 0.1}
    train |= {"warmup_updates": 2, "schedule": "cosine", "loss": "dapo"}
    job = make_job(devices=2, micro=8, steps=5, update=update, **train)
    plain_update = spec.Update(design="reference", update_dtype="float32", clip=job.update.clip)
    of_reference = job.model_copy(
        update={
            "accelerator": "cpu",
            "update": plain_update,
            "train": job.train.model_copy(update={"micro_batch_size": 16}),
        }
    )
    reference_update, mesh = updates(of_reference, family)
    shardings = state_shardings(mesh, architecture(family))
    ours = first_state(job, family)
    theirs = reference_update.init(jax.tree.map(jax.device_put, host_params(family), shardings))
    for number in range(5):
        batch = make_batch(job, family, old=True, seed=number)
        ours, said = updates(job, family)[0].step(ours, batch)
        theirs, expected = reference_update.step(theirs, batch)
        assert said.learning_rate == expected.learning_rate
        if number == 0:
            for name in ("loss", "entropy", "clipped_fraction", "grad_norm"):
                found, exact = getattr(said, name), getattr(expected, name)
                np.testing.assert_allclose(found, exact, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(said.grad_norm, expected.grad_norm, rtol=0.05)
    start, end = flattened(host_params(family)), flattened(theirs.params)
    found = flattened(read(ours, "master"))
    # A Lion sign differs where b1 m + (1 - b1) g is within its bf16 rounding of 0: with steps of
    # +-1, one in 1,700 of five times all signs makes 0.05 of the way. An int8 root is rounded up by
    # less than a 127th of its row's largest. Found: 0.034 and 0.017 of the way.
    assert np.linalg.norm(found - end) < 0.1 * np.linalg.norm(end - start)


# The door


def test_the_first_state_is_the_parameters_and_moments_of_zero_where_the_plan_lays_them():
    family, job, _ = of_case("int8 adamw")
    update, mesh = updates(job, family)
    shardings = state_shardings(mesh, architecture(family))
    found = update.init(jax.tree.map(jax.device_put, host_params(family), shardings))
    told = abstract_state(job, architecture(family), mesh)
    assert jax.tree.structure(found) == jax.tree.structure(told)
    expected = first_state(job, family)
    for real, abstract, values in zip(*map(jax.tree.leaves, (found, told, expected)), strict=True):
        assert (real.shape, real.dtype) == (abstract.shape, abstract.dtype)
        assert real.sharding.is_equivalent_to(abstract.sharding, real.ndim)
        np.testing.assert_array_equal(np.asarray(real), np.asarray(values))


def test_a_state_from_init_compiles_nothing_anew_and_is_used_up():
    family, job, batch = of_case("two devices, shared prompts")
    step(job, family, batch)  # compiles, here or in a test before
    update, mesh = updates(job, family)
    shardings = state_shardings(mesh, architecture(family))
    state = update.init(jax.tree.map(jax.device_put, host_params(family), shardings))
    lowered = []
    note = lambda event, _, **said: lowered.append(said) if "to_mlir_module" in event else None
    before, counts = state, []
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for _ in range(3):
            before, (state, _) = state, update.step(state, batch)
            counts.append(len(lowered))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert counts == [0, 0, 0]
    assert int(state["updates"]) == 3


@pytest.mark.parametrize("name", ["a chunk a token", "one row at a time"])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_logprobs_are_the_references_of_split_masters_and_of_a_cast(name, dtype):
    family, job, batch = of_case(name)
    update = updates(job, family)[0]
    params = update.params(first_state(job, family))
    exact = host_params(family)
    if dtype is not None:
        params = cast_tree(params, dtype)
        round_trip = lambda x: x.astype(dtype).astype(np.float32)
        exact = jax.tree.map(round_trip, exact)
    mask = batch.completion_mask
    expected = reference(family, 1.0)(exact, batch, np.zeros_like(mask))[0]
    found = update.logprobs(params, batch)
    assert found.shape == mask.shape
    np.testing.assert_allclose(found * mask, expected * mask, rtol=0, atol=1e-5)
