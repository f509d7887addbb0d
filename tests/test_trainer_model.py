import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.architecture import from_hf_config
from trainer.hf_folder import tree_from_hf
from trainer.model import hidden_states, logits, rms_norm, token_logprobs
from trainer.weights import load_params, open_model

GOLDEN = Path(__file__).parent / "data" / "golden"
SHARED_GOLDEN = Path(__file__).parents[2] / "shared/data/golden/smollm2_135m_f32.npz"
FAMILIES = ["llama", "qwen2", "qwen3"]
# torch's own f32 and f64 results differ by up to 6e-6 on these models (data/golden/README.md); a
# wrong epsilon moves a logprob by 6e-4 or more.
TOLERANCE = 1e-4


class Golden:
    """A golden file, and the same weights as our parameter tree."""

    def __init__(self, family):
        with np.load(GOLDEN / f"{family}.npz") as z:
            self.architecture = from_hf_config(json.loads(str(z["config"])))
            weights = {
                key.removeprefix("weights/"): z[key].astype(np.float32)
                for key in z
                if key.startswith("weights/")
            }
            self.ids, self.mask = z["ids"], z["mask"]
            self.logprobs, self.last_logprobs = z["logprobs"], z["last_logprobs"]
        self.params = jax.tree.map(jnp.asarray, tree_from_hf(self.architecture, weights))

    def hidden(self, ids, *, remat=False):
        return hidden_states(
            self.params, jnp.asarray(ids), self.architecture, dtype=jnp.float32, remat=remat
        )


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="module")
def llama():
    return Golden("llama")


@pytest.mark.parametrize("remat", [False, True])
def test_logprobs_are_those_of_torch(golden, remat):
    found, _ = token_logprobs(
        golden.params,
        golden.hidden(golden.ids, remat=remat)[:, :-1],
        jnp.asarray(golden.ids[:, 1:]),
        temperature=1.0,
        chunk=16,
    )
    np.testing.assert_allclose(
        np.asarray(found) * golden.mask[:, 1:], golden.logprobs, atol=TOLERANCE, rtol=0
    )


def test_the_distribution_after_the_last_token_is_that_of_torch(golden):
    rows = np.arange(len(golden.ids))
    last = golden.hidden(golden.ids)[rows, golden.mask.sum(axis=1) - 1]
    found = jax.nn.log_softmax(logits(golden.params, last))
    np.testing.assert_allclose(found, golden.last_logprobs, atol=TOLERANCE, rtol=0)


def test_padding_on_the_right_changes_nothing(golden):
    length = int(golden.mask.sum(axis=1)[2])
    alone = golden.hidden(golden.ids[2:, :length])
    padded = golden.hidden(golden.ids)[2:, :length]
    other = golden.hidden(np.where(golden.mask == 1, golden.ids, 77))[2:, :length]
    # Programs of another width sum in another order: a few units in the last place of f32.
    np.testing.assert_allclose(padded, alone, atol=2e-5, rtol=0)
    np.testing.assert_array_equal(padded, other)


def test_no_position_depends_on_a_later_token(golden):
    """The gradient of each position's output by each input embedding is lower triangular."""
    a, seq = golden.architecture, 8
    # A token's embedding row is used once: ids 0..7, so d hidden[t] / d embed[s] is about token s.
    # Tied heads play no part, for hidden states do not read the head.
    ids = jnp.arange(seq)[None]
    embed = golden.params["embed"]

    def totals(rows):
        params = {**golden.params, "embed": embed.at[:seq].set(rows)}
        return hidden_states(params, ids, a, dtype=jnp.float32, remat=False)[0] @ direction

    # Not the sum: an RMS norm holds part of that fixed.
    direction = jnp.asarray(np.random.default_rng(0).standard_normal(a.embed), jnp.float32)
    depends = np.abs(np.asarray(jax.jit(jax.jacrev(totals))(embed[:seq]))).max(axis=-1)
    assert depends.shape == (seq, seq)
    assert (depends[np.triu_indices(seq, k=1)] == 0).all()
    assert (depends[np.tril_indices(seq)] > 1e-6).all()


@pytest.mark.parametrize("chunk", [1, 3, 8, 16, 100])
def test_chunking_changes_no_logprob_no_entropy_and_no_gradient(llama, chunk):
    """Against one softmax over all positions at once, written out here."""
    hidden, targets = llama.hidden(llama.ids[:, :17])[:, :-1], jnp.asarray(llama.ids[:, 1:17])
    weights = jnp.asarray(
        np.random.default_rng(1).standard_normal((2, *targets.shape)), jnp.float32
    )

    def chunked(head, hidden):
        found = token_logprobs(
            {**llama.params, "head": head}, hidden, targets, temperature=0.7, chunk=chunk
        )
        return sum(jnp.sum(w * x) for w, x in zip(weights, found, strict=True)), found

    def whole(head, hidden):
        ln_p = jax.nn.log_softmax(hidden @ head.T / 0.7)
        chosen = jnp.sum(ln_p * jax.nn.one_hot(targets, ln_p.shape[-1]), axis=-1)
        found = (chosen, -jnp.sum(jnp.exp(ln_p) * ln_p, axis=-1))
        return sum(jnp.sum(w * x) for w, x in zip(weights, found, strict=True)), found

    both = [
        jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(llama.params["head"], hidden)
        for f in (chunked, whole)
    ]
    (found_gradients, found), (expected_gradients, expected) = both
    # f32: sums over 512 tokens of numbers up to about 10.
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=0)
    for x, y in zip(found_gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.abs(y).max()), rtol=1e-4)


def test_the_entropy_of_equal_logits_is_ln_of_the_vocabulary(llama):
    hidden = jnp.zeros((1, 2, llama.architecture.embed))
    logprobs, entropy = token_logprobs(
        llama.params, hidden, jnp.array([[3, 4]]), temperature=1.0, chunk=2
    )
    np.testing.assert_allclose(entropy, np.full((1, 2), np.log(512)), rtol=1e-6)
    np.testing.assert_allclose(logprobs, np.full((1, 2), -np.log(512)), rtol=1e-6)


def test_an_rms_norm_in_bfloat16_is_computed_in_float32():
    # 257 is no bfloat16 (8 bits): its square summed in bfloat16 would be off by a per cent.
    x = np.random.default_rng(2).standard_normal((3, 257)).astype(np.float32)
    x16 = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(x16, np.float64)
    expected = exact / np.sqrt((exact**2).mean(axis=-1, keepdims=True) + 1e-5) * 1.5
    found = rms_norm(x16, jnp.full(257, 1.5), 1e-5)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8)


@pytest.mark.skipif(not SHARED_GOLDEN.is_file(), reason="no ../shared/data/golden here")
def test_smollm2_gives_the_logprobs_of_torch():
    model = open_model("smollm2-135m-instruct")
    params = jax.tree.map(jnp.asarray, load_params(model, lambda _, leaf: leaf))
    with np.load(SHARED_GOLDEN) as golden:
        rows = [(golden[f"ids{i}"], golden[f"logprobs{i}"]) for i in (0, 1)]
        entropies = [golden[f"entropy{i}"] for i in (0, 1)]
    width = 40  # later tokens cannot change them, and cost time
    tokens = jnp.asarray(np.stack([ids[:width] for ids, _ in rows]))

    @jax.jit
    def run(params, tokens):
        hidden = hidden_states(params, tokens, model.architecture, dtype=jnp.float32, remat=False)
        return token_logprobs(params, hidden[:, :-1], tokens[:, 1:], temperature=1.0, chunk=16)

    logprobs, entropy = run(params, tokens)
    for i, (_, expected) in enumerate(rows):
        found = (logprobs[i], entropy[i])
        wanted = (expected[: width - 1], entropies[i][: width - 1])
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE, rtol=0)
