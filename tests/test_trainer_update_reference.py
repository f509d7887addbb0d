import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jobs import spec
from trainer.architecture import Architecture, leaf_shapes
from trainer.data import Batch
from trainer.grpo import LOSSES
from trainer.mesh import make_mesh, state_shardings
from trainer.model import hidden_states, logits
from trainer.update.optimizer import learning_rate
from trainer.update.program import make_update
from trainer.update.reference import abstract_state

# Every kind of leaf but q_norm and k_norm, in sizes that 2 and 4 divide.
ARCHITECTURE = Architecture(
    family="qwen2",
    vocab=48,
    embed=16,
    mlp=32,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=8,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied_head=False,
    attention_bias=True,
    qk_norm=False,
    max_position=64,
)
SEQUENCES, PROMPT, COMPLETION = 8, 5, 6
NOT_DECAYED = {"norm", "ln1", "ln2", "q_bias", "k_bias", "v_bias"}


def make_job(*, devices=1, mesh=None, micro=SEQUENCES, steps=20, update=None, **train):
    rollout = spec.Rollout(
        prompts_per_step=2,
        group_size=4,
        max_prompt_tokens=PROMPT,
        max_completion_tokens=COMPLETION,
        temperature=train.pop("temperature", 1.0),
    )
    train = {"learning_rate": 1e-3, "max_grad_norm": None, **train}
    return spec.Job(
        name="reference",
        accelerator=f"cpu-{devices}",
        model="tiny",
        steps=steps,
        rollout=rollout,
        mesh=spec.Mesh(**(mesh or {})),
        train=spec.Train(micro_batch_size=micro, **train),
        update=spec.Update(
            design="reference", **{"update_dtype": "float32", "clip": "global", **(update or {})}
        ),
    )


@functools.cache
def host_params():
    """Random f32 parameters: norms about 1, the rest of the size that models have."""
    random = np.random.default_rng(0)
    tree = {"layers": {}}
    for path, shape in leaf_shapes(ARCHITECTURE).items():
        near_one = path[-1] in ("norm", "ln1", "ln2")
        leaf = near_one + 0.2 * random.standard_normal(shape).astype(np.float32)
        (tree["layers"] if path[0] == "layers" else tree)[path[-1]] = leaf
    return tree


def make_batch(job, *, old=None, ref=None):
    random = np.random.default_rng(1)
    prompts = random.integers(1, PROMPT + 1, SEQUENCES).astype(np.int32)
    prompts[0] = PROMPT  # the longest prompt with the longest completion fills its row
    lengths = np.array([COMPLETION, 1, 3, 4, COMPLETION, 2, 5, 0])
    mask = (np.arange(COMPLETION)[None] < lengths[:, None]).astype(np.float32)
    weights = LOSSES[job.train.loss].weights(jnp.asarray(mask), COMPLETION)
    return Batch(
        tokens=random.integers(0, 48, (SEQUENCES, PROMPT + COMPLETION)).astype(np.int32),
        prompt_lengths=prompts,
        completion_mask=mask,
        weights=np.asarray(weights),
        advantages=random.standard_normal(SEQUENCES).astype(np.float32),
        old_logprobs=old,
        ref_logprobs=ref,
    )


class Run:
    """An update design on a mesh, and its state."""

    def __init__(self, job):
        self.job = job
        mesh = make_mesh(job, jax.devices()[: job.target.devices])
        self.mesh = mesh
        self.update = make_update(job, ARCHITECTURE, mesh)
        shardings = state_shardings(mesh, ARCHITECTURE)
        self.state = self.update.init(jax.tree.map(jax.device_put, host_params(), shardings))

    def step(self, batch):
        self.state, learned = self.update.step(self.state, batch)
        return learned

    @property
    def params(self):
        return jax.tree.map(np.asarray, self.update.params(self.state))

    def moment(self, name="mu"):
        return jax.tree.map(np.asarray, optax.tree_utils.tree_get(self.state.moments, name))

    def logprobs(self, batch):
        return np.asarray(self.update.logprobs(self.update.params(self.state), batch))


def leaves(*trees):
    """(leaf's name, its value in each tree)."""
    flat = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in trees]
    for row in zip(*flat, strict=True):
        assert len({str(path) for path, _ in row}) == 1
        yield row[0][0][-1].key, *(leaf for _, leaf in row)


def assert_close(found, expected, *, share):
    """Each leaf within that share of its largest number."""
    for name, x, y in leaves(found, expected):
        np.testing.assert_allclose(x, y, rtol=0, atol=share * np.abs(y).max(), err_msg=name)


# A second implementation: one sequence at a time, one softmax over everything, no micro-batches.


def plain_logprobs(params, batch, temperature=1.0):
    """(ln p, entropy) of every completion token, f32[batch, completion]; 0 where there is none."""
    hidden = hidden_states(
        params, jnp.asarray(batch.tokens), ARCHITECTURE, dtype=jnp.float32, remat=False
    )
    ln_p = jax.nn.log_softmax(logits(params, hidden) / temperature)
    chosen = jnp.zeros((SEQUENCES, COMPLETION))
    entropy = jnp.zeros((SEQUENCES, COMPLETION))
    for i, start in enumerate(batch.prompt_lengths):
        for t in range(int(batch.completion_mask[i].sum())):
            after = ln_p[i, start + t - 1]
            chosen = chosen.at[i, t].set(after[batch.tokens[i, start + t]])
            entropy = entropy.at[i, t].set(-jnp.sum(jnp.exp(after) * after))
    return chosen, entropy


@functools.cache
def plain_gradient_at():
    """parameters -> gradient of -sum(weight x advantage x ratio), the ratio being 1, compiled."""
    batch = make_batch(make_job())
    gain = batch.weights * batch.advantages[:, None]
    return jax.jit(jax.grad(lambda params: -jnp.sum(gain * plain_logprobs(params, batch)[0])))


@functools.cache
def plain_gradient():
    """That of the first parameters."""
    return jax.tree.map(np.asarray, plain_gradient_at()(host_params()))


def global_norm(tree):
    return np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree)))


# f32 sums of some hundred products, in another order: some units of 6e-8 of the largest.
ROUNDING = 1e-5


def gradient_of(run):
    """The gradient of a first Lion step, from its momentum: m = (1 - b2) g, b2 = 0.99."""
    return jax.tree.map(lambda m: m / np.float32(1 - run.job.train.b2), run.moment())


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_micro_batches_of_any_size_give_the_full_batchs_gradient(micro):
    run = Run(make_job(micro=micro))
    said = run.step(make_batch(run.job))
    assert_close(gradient_of(run), plain_gradient(), share=ROUNDING)
    np.testing.assert_allclose(said.grad_norm, global_norm(plain_gradient()), rtol=1e-5)
    batch = make_batch(run.job)
    # Every ratio is 1.
    expected = -(batch.weights * batch.advantages[:, None]).sum()
    np.testing.assert_allclose(said.loss, expected, rtol=1e-5)
    assert (said.clipped_fraction, said.kl) == (0.0, 0.0)


@pytest.mark.parametrize("mesh", [{"tp": 4}, {"fsdp": 2, "tp": 2}, {"dp": 2, "fsdp": 2}])
def test_every_mesh_gives_the_gradient_of_one_device(mesh):
    run = Run(make_job(devices=4, mesh=mesh))
    said = run.step(make_batch(run.job))
    assert_close(gradient_of(run), plain_gradient(), share=ROUNDING)
    np.testing.assert_allclose(said.grad_norm, global_norm(plain_gradient()), rtol=1e-5)


@pytest.mark.parametrize(("optimizer", "mesh"), [("adamw", {}), ("lion", {"fsdp": 2, "tp": 2})])
def test_the_abstract_state_is_the_real_one_in_shapes_dtypes_and_shardings(mesh, optimizer):
    devices = 4 if mesh else 1
    run = Run(make_job(devices=devices, mesh=mesh, optimizer=optimizer))
    abstract = abstract_state(run.job, ARCHITECTURE, run.mesh)
    for _ in range(2):
        pairs = zip(jax.tree.leaves(abstract), jax.tree.leaves(run.state), strict=True)
        for told, real in pairs:
            assert (told.shape, told.dtype) == (real.shape, real.dtype)
            assert told.sharding.is_equivalent_to(real.sharding, real.ndim)
        assert jax.tree.structure(abstract) == jax.tree.structure(run.state)
        run.step(make_batch(run.job))


def test_options_of_memory_change_no_gradient():
    run = Run(make_job(update={"loss_chunk_tokens": 24, "remat": False}))
    run.step(make_batch(run.job))
    assert_close(gradient_of(run), plain_gradient(), share=ROUNDING)


def test_bfloat16_computes_nearly_the_same_gradient_into_f32_parameters():
    run = Run(make_job(update={"update_dtype": "bfloat16"}))
    run.step(make_batch(run.job))
    assert {leaf.dtype for leaf in jax.tree.leaves(run.params)} == {np.dtype(np.float32)}
    found, expected = (
        np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])
        for tree in (gradient_of(run), plain_gradient())
    )
    # 8 bits: a relative error of 2^-9 an operation, through some ten of them.
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


# What is said of an update


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropy_are_the_plain_formulas(temperature):
    run = Run(make_job(temperature=temperature))
    batch = make_batch(run.job)
    expected, entropy = plain_logprobs(run.params, batch, temperature)
    np.testing.assert_allclose(
        run.logprobs(batch) * batch.completion_mask, expected, atol=1e-5, rtol=0
    )
    said = run.step(batch)
    tokens = batch.completion_mask.sum()
    np.testing.assert_allclose(said.entropy, np.asarray(entropy).sum() / tokens, rtol=1e-5)


def test_a_second_update_of_a_rollout_compares_with_the_policy_that_sampled():
    # Steps of 0.02 in every weight move ratios far out of the clip.
    run = Run(make_job(learning_rate=0.02, clip_low=0.1, clip_high=0.3))
    old = run.logprobs(make_batch(run.job))
    batch = make_batch(run.job, old=old)
    gain = batch.advantages[:, None]
    mask, weights = batch.completion_mask, batch.weights
    first = run.step(batch)
    np.testing.assert_allclose(first.loss, -(weights * gain).sum(), rtol=1e-4)
    assert first.clipped_fraction == 0
    ratio = np.exp((run.logprobs(batch) - old).astype(np.float64))
    second = run.step(batch)
    plain, bounded = ratio * gain, np.clip(ratio, 0.9, 1.3) * gain
    np.testing.assert_allclose(
        second.loss, -(weights * np.minimum(plain, bounded)).sum(), rtol=1e-4
    )
    clipped = ((bounded < plain) * mask).sum() / mask.sum()
    assert 0 < clipped < 1
    np.testing.assert_allclose(second.clipped_fraction, clipped, rtol=1e-6)
    # Learned: what was good is likelier, what was bad is less likely.
    assert (weights * gain * ratio).sum() > (weights * gain).sum()


def test_beta_holds_the_policy_to_the_reference():
    job = make_job(beta=0.25, micro=2)
    run = Run(job)
    apart = np.random.default_rng(5).normal(0, 0.5, (SEQUENCES, COMPLETION)).astype(np.float32)
    ours = run.logprobs(make_batch(job))
    batch = make_batch(job, ref=ours + apart)
    k3 = (np.exp(apart.astype(np.float64)) - apart - 1) * batch.completion_mask
    expected = (
        -(batch.weights * batch.advantages[:, None]).sum() + 0.25 * (batch.weights * k3).sum()
    )
    before = run.params
    said = run.step(batch)
    np.testing.assert_allclose(said.kl, k3.sum() / batch.completion_mask.sum(), rtol=1e-4)
    np.testing.assert_allclose(said.loss, expected, rtol=1e-4)
    # d k3 / d logprob = 1 - r: the gradient of a plain loss with that beside the advantage.
    gain = batch.weights * (batch.advantages[:, None] - 0.25 * (1 - np.exp(apart)))
    loss = lambda params: -jnp.sum(gain * plain_logprobs(params, batch)[0])
    assert_close(gradient_of(run), jax.jit(jax.grad(loss))(before), share=5 * ROUNDING)


# The optimizer, in numpy from the papers


def lion(param, gradient, m, v, *, t, rate, decay, number):
    """arXiv:2302.06675, algorithm 2."""
    change = np.sign(t.b1 * m + (1 - t.b1) * gradient)
    return param - rate * (change + decay * param), t.b2 * m + (1 - t.b2) * gradient, v


def adamw(param, gradient, m, v, *, t, rate, decay, number):
    """arXiv:1711.05101, algorithm 2."""
    m, v = t.b1 * m + (1 - t.b1) * gradient, t.b2 * v + (1 - t.b2) * gradient**2
    root = np.sqrt(v / (1 - t.b2**number))
    change = m / (1 - t.b1**number) / (root + 1e-8)
    return param - rate * (change + decay * param), m, v


@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_two_steps_are_those_of_the_paper(optimizer):
    job = make_job(
        optimizer=optimizer,
        learning_rate=1e-2,
        weight_decay=0.1,
        b1=0.8,
        b2=0.9,
        warmup_updates=2,
    )
    run, t = Run(job), job.train
    batch = make_batch(job)
    params = jax.tree.map(np.float64, run.params)
    m = v = jax.tree.map(np.zeros_like, params)
    # Of what optax keeps, a gradient g is read back: m' = b m + (1 - b) g.
    b = t.b2 if optimizer == "lion" else t.b1
    for number in (1, 2):
        expected_gradient = jax.tree.map(np.asarray, plain_gradient_at()(run.params))
        said = run.step(batch)
        rate = 1e-2 * number / 2
        np.testing.assert_allclose(said.learning_rate, rate, rtol=1e-6)
        gradient = jax.tree.map(lambda new, old: (new - b * old) / (1 - b), run.moment(), m)
        np.testing.assert_allclose(global_norm(gradient), said.grad_norm, rtol=1e-4)
        # What is read back is the difference of two f32 numbers, in units of 1 - b.
        assert_close(gradient, expected_gradient, share=1e-4)
        one = {"lion": lion, "adamw": adamw}[optimizer]
        after = [
            one(
                *values,
                t=t,
                rate=rate,
                decay=0.0 if name in NOT_DECAYED else 0.1,
                number=number,
            )
            for name, *values in leaves(params, gradient, m, v)
        ]
        unflatten = jax.tree.structure(params).unflatten
        params, m, v = (unflatten(column) for column in zip(*after, strict=True))
        for name, found, expected, change in leaves(run.params, params, m):
            # A sign is either right or wrong; where the interpolation is nothing but rounding (the
            # embeddings of tokens that are not in the batch are exactly 0) it may be either.
            sure = (np.abs(change) > 1e-7 * np.abs(change).max()) | (change == 0)
            assert sure.mean() > 0.98
            np.testing.assert_allclose(
                found[sure], expected[sure], atol=3e-5 * rate / 1e-2, rtol=1e-5, err_msg=name
            )


def test_the_gradient_is_cut_to_the_global_norm_and_the_norm_before_is_told():
    whole = global_norm(plain_gradient())
    run = Run(make_job(max_grad_norm=float(whole) / 3))
    said = run.step(make_batch(run.job))
    np.testing.assert_allclose(said.grad_norm, whole, rtol=1e-5)
    np.testing.assert_allclose(global_norm(gradient_of(run)), whole / 3, rtol=1e-4)
    third = jax.tree.map(lambda g: g / 3, plain_gradient())
    assert_close(gradient_of(run), third, share=2 * ROUNDING)


def parts(tree):
    """Each layer, the head with the final norm, and the embedding: what a clip by layer bounds."""
    layers = tree["layers"]
    yield from ({n: leaf[i] for n, leaf in layers.items()} for i in range(ARCHITECTURE.layers))
    yield {name: tree[name] for name in ("head", "norm")}
    yield {"embed": tree["embed"]}


def test_a_clip_by_layer_bounds_each_layer_by_itself_and_the_head_and_the_embedding():
    plain = plain_gradient()
    norms = [global_norm(part) for part in parts(plain)]
    limit = sum(sorted(norms)[1:3]) / 2  # two are cut, two are not
    run = Run(make_job(max_grad_norm=float(limit), update={"clip": "per_layer"}))
    said = run.step(make_batch(run.job))
    np.testing.assert_allclose(said.grad_norm, global_norm(plain), rtol=1e-5)
    for found, whole, norm in zip(parts(gradient_of(run)), parts(plain), norms, strict=True):
        scale = np.float32(min(1.0, limit / norm))
        assert_close(found, jax.tree.map(lambda g, s=scale: g * s, whole), share=2 * ROUNDING)


@pytest.mark.parametrize("clip", ["global", "per_layer"])
@pytest.mark.parametrize("devices", [1, 4])
def test_single_layers_learn_what_stacked_ones_do(clip, devices):
    def run(layers):
        settings = {"clip": clip, "layers": layers}
        run = Run(make_job(devices=devices, micro=4, max_grad_norm=0.3, update=settings))
        said = [run.step(make_batch(run.job)) for _ in range(2)]
        return run, said

    (stacked, said), (single, said_too) = run("stacked"), run("per_layer")
    for one, other in zip(said, said_too, strict=True):
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5)
        np.testing.assert_allclose(one.grad_norm, other.grad_norm, rtol=1e-5)
    for tree, expected in ((single.params, stacked.params), (single.moment(), stacked.moment())):
        assert isinstance(tree["layers"], list)
        assert len(tree["layers"]) == ARCHITECTURE.layers
        restacked = jax.tree.map(lambda *leaves: np.stack(leaves), *tree["layers"])
        # A sign may turn where a gradient is all rounding: Lion then steps the other way.
        for name, x, y in leaves({**tree, "layers": restacked}, expected):
            assert np.mean(np.abs(x - y) > 1e-5 * np.abs(y).max()) < 1e-3, name


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 2 updates of warm-up, then 8 of the job's 10.
        ("constant", [0.5, 1.0] + [1.0] * 8),
        ("cosine", [0.5, 1.0] + [(1 + np.cos(np.pi * n / 8)) / 2 for n in range(8)]),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(schedule, expected):
    job = make_job(
        learning_rate=3e-4, warmup_updates=2, schedule=schedule, steps=5, updates_per_rollout=2
    )
    found = [float(learning_rate(job)(n)) for n in range(10)]
    np.testing.assert_allclose(found, 3e-4 * np.array(expected), rtol=1e-5)


def test_without_warm_up_the_first_update_has_the_whole_rate():
    for schedule in ("constant", "cosine"):
        job = make_job(learning_rate=3e-4, schedule=schedule, steps=4)
        np.testing.assert_allclose(float(jnp.asarray(learning_rate(job)(0))), 3e-4, rtol=1e-6)
    # Cosine reaches 0 behind the last update.
    np.testing.assert_allclose(float(learning_rate(job)(4)), 0.0, atol=1e-10)
