import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers

from trainer.architecture import (
    ARCHITECTURES,
    ModelError,
    RopeScaling,
    from_hf_config,
    leaf_shapes,
    parameter_count,
    to_hf_config,
)

GOLDEN = Path(__file__).parent / "data" / "golden"

# Totals of the safetensors files on the hub; Qwen3's 0.6B and 1.7B store the tied head a second
# time (151936 x 1024 and x 2048), which is taken off here.
PUBLISHED = {
    "qwen/qwen2.5-0.5b": 494_032_768,
    "qwen/qwen2.5-1.5b": 1_543_714_304,
    "qwen/qwen2.5-3b": 3_085_938_688,
    "qwen/qwen2.5-7b": 7_615_616_512,
    "qwen/qwen2.5-14b": 14_770_033_664,
    "qwen/qwen2.5-32b": 32_763_876_352,
    "qwen/qwen3-0.6b": 751_632_384 - 151_936 * 1024,
    "qwen/qwen3-1.7b": 2_031_739_904 - 151_936 * 2048,
    "qwen/qwen3-4b": 4_022_468_096,
    "qwen/qwen3-8b": 8_190_735_360,
    "qwen/qwen3-14b": 14_768_307_200,
    "qwen/qwen3-32b": 32_762_123_264,
    "meta-llama/llama-3.1-8b": 8_030_261_248,
    "meta-llama/llama-3.2-1b": 1_235_814_400,
    "meta-llama/llama-3.2-3b": 3_212_749_824,
    "huggingfacetb/smollm2-135m": 134_515_008,
    "huggingfacetb/smollm2-360m": 361_821_120,
    "huggingfacetb/smollm2-1.7b": 1_711_376_384,
}

# As published, apart from keys that say nothing about the shape.
PUBLISHED_CONFIGS = {
    "qwen/qwen2.5-7b-instruct": """{"attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768,
        "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false,
        "use_sliding_window": false, "vocab_size": 152064}""",
    "qwen/qwen2.5-14b": """{"hidden_act": "silu", "hidden_size": 5120,
        "intermediate_size": 13824, "max_position_embeddings": 131072, "max_window_layers": 48,
        "model_type": "qwen2", "num_attention_heads": 40, "num_hidden_layers": 48,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": 131072, "tie_word_embeddings": false, "use_sliding_window": false,
        "vocab_size": 152064}""",
    "qwen/qwen3-8b": """{"attention_bias": false, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960,
        "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32,
        "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
        "tie_word_embeddings": false, "use_sliding_window": false, "vocab_size": 151936}""",
    "meta-llama/llama-3.2-3b": """{"attention_bias": false, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 24, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0,
        "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": true, "vocab_size": 128256}""",
}


def a_config(**changes):
    config = json.loads(PUBLISHED_CONFIGS["qwen/qwen2.5-7b-instruct"]) | changes
    return {key: value for key, value in config.items() if value is not ...}


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_the_parameters_of_built_in_shapes_add_up_to_the_published_totals(name, total):
    assert parameter_count(ARCHITECTURES[name]) == total
    if "qwen3" not in name:
        assert parameter_count(ARCHITECTURES[f"{name}-instruct"]) == total


def test_every_built_in_shape_is_held_against_a_published_total():
    assert set(ARCHITECTURES) == set(PUBLISHED) | {
        f"{name}-instruct" for name in PUBLISHED if "qwen3" not in name
    }


@pytest.mark.parametrize(("name", "text"), PUBLISHED_CONFIGS.items())
def test_a_published_config_gives_the_built_in_shape(name, text):
    assert from_hf_config(json.loads(text)) == ARCHITECTURES[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shape_survives_the_way_through_config_json(name):
    text = json.dumps(to_hf_config(ARCHITECTURES[name]))
    assert from_hf_config(json.loads(text)) == ARCHITECTURES[name]


@pytest.mark.parametrize("name", ["qwen/qwen2.5-7b", "qwen/qwen3-4b", "meta-llama/llama-3.2-1b"])
def test_transformers_reads_our_config_json_as_we_meant_it(name):
    a = ARCHITECTURES[name]
    theirs = transformers.AutoConfig.for_model(**to_hf_config(a, dtype="bfloat16"))
    assert theirs.architectures == [
        {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[a.family] + "ForCausalLM"
    ]
    assert theirs.num_key_value_heads == a.kv_heads
    assert theirs.head_dim == a.head_dim
    assert theirs.tie_word_embeddings == a.tied_head
    assert theirs.rope_theta == a.rope_theta
    assert not getattr(theirs, "sliding_window", None)
    assert from_hf_config(theirs.to_dict()) == a  # with every default of theirs written out


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_leaf_shapes_are_those_of_torchs_own_weights(family):
    with np.load(GOLDEN / f"{family}.npz") as golden:
        config = json.loads(str(golden["config"]))
        weights = {k.removeprefix("weights/"): golden[k] for k in golden if "weights/" in k}
    shapes = leaf_shapes(from_hf_config(config))
    assert parameter_count(from_hf_config(config)) == sum(w.size for w in weights.values())
    rows, columns = weights["model.layers.2.mlp.gate_proj.weight"].shape
    assert shapes["layers", "gate"] == (3, columns, rows)
    rows, columns = weights["model.layers.0.self_attn.o_proj.weight"].shape
    assert shapes["layers", "o"] == (3, columns, rows)
    assert shapes["embed",] == weights["model.embed_tokens.weight"].shape
    assert (("head",) in shapes) == ("lm_head.weight" in weights)


def test_the_spelling_of_transformers_5_is_understood():
    old = json.loads(PUBLISHED_CONFIGS["meta-llama/llama-3.2-3b"])
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    assert from_hf_config(new) == from_hf_config(old)
    plain = a_config(rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert from_hf_config(plain) == from_hf_config(a_config())


def test_absent_keys_have_the_defaults_of_transformers():
    llama = {"model_type": "llama", "vocab_size": 10, "hidden_size": 64, "intermediate_size": 8}
    llama |= {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 16}
    theirs = transformers.AutoConfig.for_model(**llama).to_dict()
    assert from_hf_config(llama) == from_hf_config(theirs)
    assert from_hf_config(llama).kv_heads == 4
    assert from_hf_config(a_config(model_type="qwen3")).head_dim == 128


def test_a_sliding_window_that_is_named_but_not_in_use_is_no_obstacle():
    assert from_hf_config(a_config(sliding_window=131072, use_sliding_window=False))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (a_config(model_type="gemma2"), "model_type = 'gemma2' is not known; supported: llama"),
        (a_config(model_type="qwen3_moe", num_experts=128), "a mixture of experts (num_experts = "),
        (a_config(model_type=...), "model_type = None"),
        (a_config(use_sliding_window=True), "sliding_window = 131072; supported: full attention"),
        (
            a_config(model_type="llama", sliding_window=4096),
            "sliding_window = 4096; supported: full attention",
        ),
        (
            a_config(layer_types=["full_attention", "sliding_attention"]),
            "supported: full_attention in every layer",
        ),
        (
            a_config(rope_scaling={"type": "yarn", "factor": 4.0}),
            "rope_type = 'yarn'; supported: default, llama3",
        ),
        (a_config(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_type = 'linear'"),
        (
            a_config(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
            "rope_type = 'llama3' without low_freq_factor, high_freq_factor, original_max",
        ),
        (a_config(hidden_act="gelu"), "hidden_act = 'gelu'; supported: silu"),
        (a_config(model_type="qwen3", attention_bias=True), "attention_bias = True"),
        (a_config(model_type="llama", mlp_bias=True), "mlp_bias = True"),
        (a_config(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
        (a_config(quantization_config={"quant_method": "awq"}), "'awq'}; supported: float weights"),
        (a_config(hidden_size="big"), "hidden_size = 'big'; a whole number is needed"),
        (a_config(num_key_value_heads=...), "num_key_value_heads = None"),
        (a_config(num_key_value_heads=3), "28 query heads cannot share 3 key/value heads"),
        (a_config(num_hidden_layers=0), "layers = 0; it must be at least 1"),
        (a_config(head_dim=127), "head_dim = 127; rotary halves need an even number"),
    ],
)
def test_a_config_that_no_program_of_ours_has_is_refused_with_what_was_found(config, says):
    with pytest.raises(ModelError) as refused:
        from_hf_config(config)
    assert says in str(refused.value)


def test_two_obstacles_are_both_named():
    with pytest.raises(ModelError, match=r"hidden_act.*sliding_window"):
        from_hf_config(a_config(hidden_act="gelu", use_sliding_window=True))


def test_qwen25_7b_in_bfloat16_has_the_bytes_that_the_engine_showed():
    # facts of sglang-jax's real leaves: 14.185 GiB over all chips
    count = parameter_count(ARCHITECTURES["qwen/qwen2.5-7b-instruct"])
    assert round(count * 2 / 2**30, 3) == 14.185


def test_a_shape_can_be_changed_and_compared():
    a = ARCHITECTURES["meta-llama/llama-3.1-8b"]
    assert isinstance(a.rope_scaling, RopeScaling)
    assert replace(a, layers=31) != a
    assert parameter_count(a) - parameter_count(replace(a, layers=31)) == (
        2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096  # q o, k v, MLP, norms
    )
