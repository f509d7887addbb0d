"""An exported folder has the checkpoint's weights; other programs make the same logits of them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open

from jobs import spec
from runner.cli import main
from runner.terminal import World
from tests.fakes import trainer
from trainer.architecture import from_hf_config, to_hf_config
from trainer.checkpoint import CheckpointError, Checkpoints
from trainer.export import ExportError, Options, export
from trainer.hf_folder import save_hf_folder, tree_from_hf
from trainer.mesh import make_mesh
from trainer.model import hidden_states, logits, token_logprobs
from trainer.update.program import make_update
from trainer.weights import load_params, open_model

GOLDEN = Path(__file__).parent / "data" / "golden"
JOB = """
name: exported
accelerator: cpu-2
model: {model}
rollout: {{prompts_per_step: 2, group_size: 2, max_prompt_tokens: 16, max_completion_tokens: 8}}
update: {{design: {design}, layers: {layers}}}
"""
CONFIG = {  # SmolLM2's shape, small
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 1e4,  # transformers' Flax Llama knows no other
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def model_folder(folder, config, weights):
    """A model's folder of weights by Hugging Face's names."""
    architecture = from_hf_config(config)
    save_hf_folder(
        tree_from_hf(architecture, weights),
        folder,
        architecture=architecture,
        tokenizer=open_model("tiny").tokenizer,
    )
    return folder


def random_weights(config):
    """f32 under Hugging Face's names and in its layout, written down here from its documents."""
    random = np.random.default_rng(7)
    e, m, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], e), "model.norm.weight": (e,)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}input_layernorm.weight": (e,),
            f"{at}post_attention_layernorm.weight": (e,),
            f"{at}self_attn.q_proj.weight": (q, e),
            f"{at}self_attn.k_proj.weight": (kv, e),
            f"{at}self_attn.v_proj.weight": (kv, e),
            f"{at}self_attn.o_proj.weight": (e, q),
            f"{at}mlp.gate_proj.weight": (m, e),
            f"{at}mlp.up_proj.weight": (m, e),
            f"{at}mlp.down_proj.weight": (e, m),
        }
    return {
        name: random.normal(scale=0.3, size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def run_of(folder, model, *, design="layer_major", layers="stacked", steps=5):
    """A run's directory whose newest checkpoint has the model's weights; its job."""
    folder.mkdir()
    path = folder / "job.yaml"
    path.write_text(JOB.format(model=json.dumps(str(model)), design=design, layers=layers))
    job = spec.load(path)
    found = open_model(job.model)
    mesh = make_mesh(job, jax.devices()[: job.target.devices])
    update = make_update(job, found.architecture, mesh)
    Checkpoints(job, folder).save(update.init(load_params(found, lambda _, leaf: leaf)), steps)
    return job


def tensors(folder):
    """Every tensor of a folder, by the library of the format itself."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(str(path), framework="np") as file:
            names = list(file.keys())
            assert not names & found.keys()
            found |= {name: file.get_tensor(name) for name in names}
    return found


def to_bf16_bits(value):
    """To the nearest, half-way cases away from zero: how masters.py says that hi is rounded."""
    return ((value.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


@pytest.mark.parametrize(
    ("design", "layers"),
    [("layer_major", "stacked"), ("layer_major", "per_layer"), ("reference", "stacked")],
)
def test_the_folder_has_the_very_weights_of_the_checkpoint(tmp_path, design, layers):
    weights = random_weights(CONFIG)
    model = model_folder(tmp_path / "model", CONFIG, weights)
    job = run_of(tmp_path / "run", model, design=design, layers=layers)
    exact, short = tmp_path / "exact", tmp_path / "short"
    made = export(job, tmp_path / "run", Options(to=exact, dtype="float32"))
    assert (made.steps, made.files) == (5, ["model.safetensors"])
    assert made.weights_bytes == sum(value.nbytes for value in weights.values())
    found = tensors(exact)
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert found[name].tobytes() == value.tobytes(), name
    # In files of at most so many bytes, under an index.
    made = export(job, tmp_path / "run", Options(to=short), shard_bytes=40_000)
    assert len(made.files) > 2
    assert "bfloat16" in (short / "config.json").read_text()
    index = json.loads((short / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == made.weights_bytes
    assert sorted(set(index["weight_map"].values())) == made.files
    for name, value in tensors(short).items():
        ours = value.view(np.uint16)
        wanted = to_bf16_bits(weights[name])
        # The reference design rounds as XLA does: half-way cases to the even neighbour.
        even = weights[name].astype(value.dtype).view(np.uint16)
        np.testing.assert_array_equal(ours, wanted if design == "layer_major" else even, name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_model_through_checkpoint_and_export_has_the_logprobs_that_torch_gave_it(
    tmp_path, family
):
    with np.load(GOLDEN / f"{family}.npz") as z:
        golden = dict(z)
    config = json.loads(str(golden["config"]))
    weights = {
        key.removeprefix("weights/"): value.astype(np.float32)
        for key, value in golden.items()
        if key.startswith("weights/")
    }
    model = model_folder(tmp_path / "model", config, weights)
    job = run_of(tmp_path / "run", model)
    export(job, tmp_path / "run", Options(to=tmp_path / "out", dtype="float32"))
    out = open_model(str(tmp_path / "out"))
    assert out.architecture == from_hf_config(config)
    assert out.eos_ids == open_model(str(model)).eos_ids
    params = load_params(out, lambda _, leaf: jnp.asarray(leaf))
    ids = jnp.asarray(golden["ids"])
    hidden = hidden_states(params, ids, out.architecture, dtype=jnp.float32, remat=False)
    found, _ = token_logprobs(params, hidden[:, :-1], ids[:, 1:], temperature=1.0, chunk=16)
    wanted = golden["logprobs"]
    np.testing.assert_allclose(found * golden["mask"][:, 1:], wanted, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_transformers_own_model_makes_the_same_logits_of_the_folder(tmp_path):
    # torch is not in this environment; transformers' Flax Llama is a program of its own as well.
    from transformers import AutoTokenizer, FlaxLlamaForCausalLM, LlamaConfig  # noqa: PLC0415

    weights = random_weights(CONFIG)
    job = run_of(tmp_path / "run", model_folder(tmp_path / "model", CONFIG, weights))
    out = tmp_path / "out"
    export(job, tmp_path / "run", Options(to=out, dtype="float32"))
    config = LlamaConfig.from_pretrained(out)
    theirs = FlaxLlamaForCausalLM(config, input_shape=(1, 8), dtype=jnp.float32, _do_init=False)
    found = tensors(out)
    flax = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(named(found, [part.key for part in path])),
        theirs.params_shape_tree,
    )
    ids = jnp.asarray(np.random.default_rng(3).integers(0, 259, (2, 24)))
    wanted = theirs(ids, params=flax).logits
    ours = open_model(str(out))
    params = load_params(ours, lambda _, leaf: jnp.asarray(leaf))
    hidden = hidden_states(params, ids, ours.architecture, dtype=jnp.float32, remat=False)
    np.testing.assert_allclose(logits(params, hidden), wanted, atol=2e-4, rtol=0)
    text = "6 * 7 = 42"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode(text) == open_model("tiny").tokenizer.encode(text)


def named(found, path):
    """A tensor for Flax's path: kernels are the transposed weights, embeddings and norms as is."""
    *module, kind = path
    if module == ["lm_head"]:  # tied
        return found["model.embed_tokens.weight"].T
    value = found[".".join([*module, "weight"])]
    return value.T if kind == "kernel" else value


def test_llamas_config_goes_through_unchanged(tmp_path):
    job = run_of(tmp_path / "run", model_folder(tmp_path / "m", CONFIG, random_weights(CONFIG)))
    export(job, tmp_path / "run", Options(to=tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = to_hf_config(from_hf_config(CONFIG), dtype="bfloat16")
    assert {key: config[key] for key in wanted} == wanted
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A folder of runs with one that has ended and left a checkpoint of `tiny`."""
    folder = tmp_path_factory.mktemp("ended")
    job_file = folder / "job.yaml"
    job_file.write_text(JOB.format(model="tiny", design="layer_major", layers="stacked"))
    argv = ["run", str(job_file), "--where", "process", "--runs", str(folder / "runs")]
    done = CliRunner().invoke(main, argv, obj=World(trainer=trainer("pass")))
    assert done.exit_code == 0, done.output
    [run] = (folder / "runs").iterdir()
    run_of(folder / "made", "tiny", steps=7)
    (folder / "made" / "checkpoints").rename(run / "checkpoints")
    return folder / "runs", run


def exported(runs, *options):
    argv = ["export", "latest", "--runs", runs, *options]
    return CliRunner().invoke(main, [str(part) for part in argv])


def test_the_command_exports_the_newest_checkpoint_and_says_how_large_it_is(ended, tmp_path):
    runs, _ = ended
    done = exported(runs, "--to", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert (made["steps"], made["model"], made["dtype"]) == (7, "tiny", "bfloat16")
    found = tensors(tmp_path / "out")
    assert made["weights_bytes"] == sum(value.nbytes for value in found.values())
    assert open_model(str(tmp_path / "out")).architecture == open_model("tiny").architecture
    # It is not written over.
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir())
    again = exported(runs, "--to", tmp_path / "out")
    assert again.exit_code == 1
    assert "there is something already" in again.stderr
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()) == before


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(ended, tmp_path):
    _, run = ended
    job = spec.load(run / "job.json")
    with pytest.raises(ExportError, match="no checkpoint to export"):
        export(job, tmp_path, Options(to=tmp_path / "out"))
    other = job.model_copy(update={"model": "smollm2-135m-instruct"})
    with pytest.raises(ExportError, match="is of model = tiny"):
        export(other, run, Options(to=tmp_path / "out"))
    [folder] = (run / "checkpoints").iterdir()
    copy = tmp_path / "step_000007"
    for path in folder.rglob("*"):
        if path.is_file():
            to = copy / path.relative_to(folder)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
    largest = max((copy / "state").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is not what was saved"):
        export(job, run, Options(to=tmp_path / "out", checkpoint=copy))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000007"]
