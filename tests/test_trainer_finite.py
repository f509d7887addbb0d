"""What is no number is never saved, and the batch that made it is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jobs import spec
from tests.test_trainer_checkpoint import JOB
from trainer.checkpoint import Checkpoints, read_record
from trainer.finite import LossError, not_finite
from trainer.mesh import make_mesh
from trainer.rollout import Completions
from trainer.timing import Phases
from trainer.train import Rolled, Session, learn, read_prompts
from trainer.update.program import make_update
from trainer.weights import load_params, open_model


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A session, its update and its first state, as train.py has them."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "job.yaml").write_text(JOB)
    job = spec.load(folder / "job.yaml", overrides=["train.loss=dr_grpo"])
    model = open_model(job.model)
    mesh = make_mesh(job, jax.devices()[: job.target.devices])
    session = Session(job=job, phases=Phases(folder), model=model, mesh=mesh, rollout=None)
    return session, make_update(job, model.architecture, mesh)


def first_state(begun):
    session, update = begun
    return update.init(load_params(session.model, lambda _, leaf: leaf))


def rolled(session, rewards):
    prompts = [p for p in read_prompts(session, "train")[:2] for _ in range(4)]
    tokens = np.arange(8 * 8, dtype=np.int32).reshape(8, 8)
    full = np.full(8, 8, np.int32)
    completions = Completions(
        tokens=tokens,
        lengths=full,
        logprobs=np.full((8, 8), -5.0, np.float32),
        truncated=np.ones(8, bool),
    )
    return Rolled(
        prompts=prompts,
        completions=completions,
        texts=completions.texts(session.model.tokenizer),
        scores={"correct": np.zeros(8, np.float32)},
        rewards=np.asarray(rewards, np.float32),
    )


def test_a_gradient_that_overflows_stops_the_run_though_the_loss_is_finite(begun):
    # Dr. GRPO's advantages are not divided by their deviation: a reward of 1e30 makes gradients
    # whose squares f32 does not hold.
    session, update = begun
    sampled = rolled(session, [1e30, 0, 0, 0, 0, 0, 0, 0])
    with pytest.raises(LossError, match=r"gradient norm = inf: .*bad_batch\.npz"):
        learn(update, first_state(begun), session, sampled, None)
    with np.load(session.phases.run_dir / "bad_batch.npz") as bad:
        assert np.isfinite(bad["loss"])
        assert np.isinf(bad["grad_norm"])
        # Relative to the group's mean, 1e30 / 4; the other group learns nothing.
        wanted = np.array([0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]) * 1e30
        np.testing.assert_allclose(bad["advantages"], wanted, rtol=1e-6)
        np.testing.assert_array_equal(bad["rewards"], sampled.rewards)
        assert list(bad["completions"]) == sampled.texts


def test_rewards_that_are_small_learn_and_leave_no_batch(begun, tmp_path):
    session, update = begun
    session.phases.run_dir = tmp_path
    state, [said] = learn(
        update, first_state(begun), session, rolled(session, [1, 0, 0, 0, 0, 0, 0, 0]), None
    )
    assert np.isfinite(said.grad_norm)
    assert not_finite(state) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "poison", "named"),
    [
        (("embed", "master", "hi"), np.inf, "embed.master.hi"),
        (("layers", "down", "m"), np.nan, "layers.down.m"),
    ],
)
def test_a_poisoned_state_is_not_saved_and_the_last_good_one_stays(
    begun, tmp_path, caplog, path, poison, named
):
    # A weight that no token of a batch uses makes no loss infinite.
    session, _ = begun
    state = first_state(begun)
    checkpoints = Checkpoints(session.job, tmp_path)
    checkpoints.save(state, 5)
    *parents, last = path
    leaf = state
    for key in parents:
        leaf = leaf[key] if isinstance(leaf, dict) else getattr(leaf, key)
    bad = getattr(leaf, last).at[(0,) * getattr(leaf, last).ndim].set(poison)
    poisoned = jax.tree.map(lambda x: bad if x is getattr(leaf, last) else x, state)
    with pytest.raises(LossError, match=rf"after 6 steps {named} of the state is not finite"):
        checkpoints.save(poisoned, 6)
    # Asked to stop, it ends as it was asked to.
    checkpoints.save_last(poisoned, 7)
    assert "after 7 steps" in caplog.text
    [kept] = (tmp_path / "checkpoints").iterdir()
    assert read_record(kept).steps == 5


def test_whole_numbers_are_never_looked_at():
    assert not_finite({"lo": jnp.zeros(3, jnp.int16), "hi": jnp.ones(3, jnp.bfloat16)}) is None
    assert not_finite([jnp.ones(2), jnp.array([1.0, -jnp.inf])]) == "1"
