"""What a model's config.json says, in our words; the leaves it asks for; built-in shapes by name.

Pure Python: no JAX, no files. Three families of decoder are known: llama (SmolLM2, Llama 3), qwen2
(Qwen2.5; biases on q, k, v) and qwen3 (RMS norms on q and k). All have grouped queries, neox rotary
halves, SwiGLU and RMS norms before attention and MLP.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from trainer.refusal import Refusal

Family = Literal["llama", "qwen2", "qwen3"]
Path = tuple[str, ...]

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SUPPORTED = "supported: llama, qwen2, qwen3 (dense decoders)"


class ModelError(Refusal):
    """A model cannot be had or used: what was asked, what was found, what is possible instead."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretch of the slow rotary frequencies; config.json calls it rope_type llama3.

    Attributes:
        factor: by how much the slow frequencies are divided.
        low_freq_factor: wavelengths above original_max_position / this are fully stretched.
        high_freq_factor: wavelengths below original_max_position / this are left alone.
        original_max_position: tokens the model was first trained on.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of a decoder, with nothing about where or in what type it is kept.

    Attributes:
        family: llama, qwen2 or qwen3.
        vocab: rows of the embedding, which may be more than the tokenizer has tokens.
        embed: width of the residual stream.
        mlp: width of gate and up.
        layers: number of decoder layers.
        heads: query heads.
        kv_heads: key and value heads; divides `heads`.
        head_dim: width of one head; heads * head_dim need not be embed.
        rope_theta: base of the rotary frequencies.
        rope_scaling: llama3 scaling, or None.
        norm_eps: added to the mean square inside every RMS norm.
        tied_head: the head is the embedding.
        attention_bias: q, k and v have biases (o never has).
        qk_norm: RMS norms over head_dim on q and k, before rope.
        max_position: tokens a sequence may have.
    """

    family: Family
    vocab: int
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    norm_eps: float
    tied_head: bool
    attention_bias: bool
    qk_norm: bool
    max_position: int

    def __post_init__(self) -> None:
        """Refuse what no program can be built for."""
        for name in ("vocab", "embed", "mlp", "layers", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} = {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ModelError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim = {self.head_dim}; rotary halves need an even number")


def leaf_shapes(architecture: Architecture) -> dict[Path, tuple[int, ...]]:
    """The parameter tree: path of each leaf -> its shape, in the order in which leaves are loaded.

    Matrices are [in, out]; embed and head are [vocab, embed]; leaves under "layers" have the layer
    as leading axis.

    >>> from trainer.architecture import ARCHITECTURES, leaf_shapes
    >>> leaf_shapes(ARCHITECTURES["qwen/qwen2.5-7b-instruct"])["layers", "k"]
    (28, 3584, 512)
    """
    a = architecture
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    a_layer = {
        "ln1": (a.embed,),
        "ln2": (a.embed,),
        "q": (a.embed, queries),
        "k": (a.embed, keys),
        "v": (a.embed, keys),
        "o": (queries, a.embed),
        "gate": (a.embed, a.mlp),
        "up": (a.embed, a.mlp),
        "down": (a.mlp, a.embed),
    }
    if a.attention_bias:
        a_layer |= {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)}
    if a.qk_norm:
        a_layer |= {"q_norm": (a.head_dim,), "k_norm": (a.head_dim,)}
    shapes: dict[Path, tuple[int, ...]] = {("embed",): (a.vocab, a.embed), ("norm",): (a.embed,)}
    if not a.tied_head:
        shapes["head",] = (a.vocab, a.embed)
    return shapes | {("layers", name): (a.layers, *shape) for name, shape in a_layer.items()}


def parameter_count(architecture: Architecture) -> int:
    """Numbers in the parameter tree; a tied head counts once.

    >>> from trainer.architecture import ARCHITECTURES, parameter_count
    >>> parameter_count(ARCHITECTURES["huggingfacetb/smollm2-135m-instruct"])
    134515008
    """
    return sum(math.prod(shape) for shape in leaf_shapes(architecture).values())


def from_hf_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a Hugging Face config.json describes.

    Understands the spelling of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters).
    Absent keys have the defaults of transformers' own config classes.

    Args:
        config: the parsed file.

    Raises:
        ModelError: a family, rotary scaling, attention window or bias that no program of ours has.
    """
    family = _family(config)
    _refuse_what_we_lack(config, family)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    heads, embed = _whole(config, "num_attention_heads"), _whole(config, "hidden_size")
    head_dim = config.get("head_dim")
    if head_dim is None:
        head_dim = 128 if family == "qwen3" else embed // heads
    kv_heads = config.get("num_key_value_heads")
    if kv_heads is None:  # only llama's default is a rule (all heads); Qwen's are fixed numbers
        kv_heads = heads if family == "llama" else _whole(config, "num_key_value_heads")
    return Architecture(
        family=family,
        vocab=_whole(config, "vocab_size"),
        embed=embed,
        mlp=_whole(config, "intermediate_size"),
        layers=_whole(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(rope),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        max_position=_whole(config, "max_position_embeddings"),
    )


def _family(config: Mapping[str, Any]) -> Family:
    found = config.get("model_type")
    if found not in CLASSES:
        experts = next((key for key in config if "experts" in key), None)
        what = f"a mixture of experts ({experts} = {config[experts]})" if experts else "not known"
        raise ModelError(
            f"config.json: model_type = {found!r} is {what}; {SUPPORTED}; choose another model"
        )
    return cast("Family", found)


def _whole(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ModelError(f"config.json: {key} = {value!r}; a whole number is needed")
    return value


def _refuse_what_we_lack(config: Mapping[str, Any], family: Family) -> None:
    """Settings that change the mathematics in ways that the model functions do not have."""
    windowed = set(config.get("layer_types") or ()) - {"full_attention"}
    # Qwen's configs name a window even where use_sliding_window says that it is not in use.
    window = config.get("use_sliding_window") or (family == "llama" and "sliding_window")
    checks: list[tuple[str, bool, str]] = [
        ("hidden_act", config.get("hidden_act", "silu") != "silu", "silu"),
        # In transformers this one puts a bias on o as well.
        ("attention_bias", family != "qwen2" and bool(config.get("attention_bias")), "false"),
        ("mlp_bias", bool(config.get("mlp_bias")), "false"),
        ("sliding_window", bool(window and config.get("sliding_window")), "full attention"),
        ("layer_types", bool(windowed), "full_attention in every layer"),
        ("partial_rotary_factor", config.get("partial_rotary_factor", 1.0) != 1.0, "1.0"),
        ("quantization_config", bool(config.get("quantization_config")), "float weights, or GGUF"),
    ]
    wrong = [
        f"{key} = {config[key]!r}; supported: {instead}" for key, bad, instead in checks if bad
    ]
    if wrong:
        raise ModelError("config.json: " + "; ".join(wrong) + "; choose another model")


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(
            f"config.json: rope_type = {kind!r}; supported: default, llama3; "
            "most models also run without it, within their first max_position_embeddings tokens: "
            "take rope_scaling out of a local copy of config.json to do so"
        )
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [key for key in keys if key not in rope]:
        raise ModelError(f"config.json: rope_type = 'llama3' without {', '.join(missing)}")
    factor, low, high, original = (rope[key] for key in keys)
    return RopeScaling(
        factor=float(factor),
        low_freq_factor=float(low),
        high_freq_factor=float(high),
        original_max_position=int(original),
    )


def to_hf_config(architecture: Architecture, *, dtype: str = "float32") -> dict[str, Any]:
    """A config.json that transformers 4 and 5, vLLM and sglang read; token ids are not in it.

    Args:
        architecture: what to describe.
        dtype: name of the type in which the weights are stored, "float32" or "bfloat16".

    Returns:
        JSON values; `from_hf_config` gives the same architecture back.
    """
    a = architecture
    scaling = a.rope_scaling
    config: dict[str, Any] = {
        "architectures": [CLASSES[a.family]],
        "attention_dropout": 0.0,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "hidden_size": a.embed,
        "initializer_range": 0.02,
        "intermediate_size": a.mlp,
        "max_position_embeddings": a.max_position,
        "model_type": a.family,
        "num_attention_heads": a.heads,
        "num_hidden_layers": a.layers,
        "num_key_value_heads": a.kv_heads,
        "rms_norm_eps": a.norm_eps,
        "rope_scaling": None,
        "rope_theta": a.rope_theta,
        "tie_word_embeddings": a.tied_head,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": a.vocab,
    }
    if scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    if a.family == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    else:
        config |= {"use_sliding_window": False, "sliding_window": None}
    if a.family == "qwen3":
        config["attention_bias"] = False
    return config


_QWEN25 = Architecture(  # 0.5B-Instruct; its sisters differ in what `_built_in` replaces
    family="qwen2",
    vocab=151936,
    embed=896,
    mlp=4864,
    layers=24,
    heads=14,
    kv_heads=2,
    head_dim=64,
    rope_theta=1e6,
    norm_eps=1e-6,
    tied_head=True,
    attention_bias=True,
    qk_norm=False,
    max_position=32768,
)
_QWEN3 = replace(
    _QWEN25,
    family="qwen3",
    heads=16,
    kv_heads=8,
    head_dim=128,
    attention_bias=False,
    qk_norm=True,
    max_position=40960,
)
_SMOLLM2 = replace(
    _QWEN25,
    family="llama",
    vocab=49152,
    rope_theta=1e5,
    norm_eps=1e-5,
    attention_bias=False,
    max_position=8192,
)
_SCALING32 = RopeScaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
)
_LLAMA32 = replace(
    _SMOLLM2,
    vocab=128256,
    heads=32,
    kv_heads=8,
    rope_theta=5e5,
    rope_scaling=_SCALING32,
    max_position=131072,
)


def _built_in() -> dict[str, Architecture]:
    """Figures of the published config.json files, by Hugging Face id in lower case."""
    untied = replace(_QWEN25, vocab=152064, tied_head=False, head_dim=128)
    shapes: dict[str, Architecture] = {}
    for name, a in {
        "0.5b": _QWEN25,
        "1.5b": replace(_QWEN25, embed=1536, mlp=8960, layers=28, heads=12, head_dim=128),
        "3b": replace(_QWEN25, embed=2048, mlp=11008, layers=36, heads=16, head_dim=128),
        "7b": replace(untied, embed=3584, mlp=18944, layers=28, heads=28, kv_heads=4),
        "14b": replace(untied, embed=5120, mlp=13824, layers=48, heads=40, kv_heads=8),
        "32b": replace(untied, embed=5120, mlp=27648, layers=64, heads=40, kv_heads=8),
    }.items():
        shapes[f"qwen/qwen2.5-{name}-instruct"] = a
        shapes[f"qwen/qwen2.5-{name}"] = replace(
            a,
            norm_eps=1e-5 if name in ("14b", "32b") else 1e-6,
            max_position=32768 if name in ("0.5b", "3b") else 131072,
        )
    tied, untied = _QWEN3, replace(_QWEN3, tied_head=False)
    shapes |= {
        "qwen/qwen3-0.6b": replace(tied, embed=1024, mlp=3072, layers=28, heads=16),
        "qwen/qwen3-1.7b": replace(tied, embed=2048, mlp=6144, layers=28, heads=16),
        "qwen/qwen3-4b": replace(tied, embed=2560, mlp=9728, layers=36, heads=32),
        "qwen/qwen3-8b": replace(untied, embed=4096, mlp=12288, layers=36, heads=32),
        "qwen/qwen3-14b": replace(untied, embed=5120, mlp=17408, layers=40, heads=40),
        "qwen/qwen3-32b": replace(untied, embed=5120, mlp=25600, layers=64, heads=64),
    }
    llama31 = replace(
        _LLAMA32, tied_head=False, head_dim=128, rope_scaling=replace(_SCALING32, factor=8.0)
    )
    for name, a in {
        "meta-llama/llama-3.1-8b": replace(llama31, embed=4096, mlp=14336, layers=32, heads=32),
        "meta-llama/llama-3.2-1b": replace(_LLAMA32, embed=2048, mlp=8192, layers=16, heads=32),
        "meta-llama/llama-3.2-3b": replace(
            _LLAMA32, embed=3072, mlp=8192, layers=28, heads=24, head_dim=128
        ),
        "huggingfacetb/smollm2-135m": replace(
            _SMOLLM2, embed=576, mlp=1536, layers=30, heads=9, kv_heads=3
        ),
        "huggingfacetb/smollm2-360m": replace(
            _SMOLLM2, embed=960, mlp=2560, layers=32, heads=15, kv_heads=5
        ),
        "huggingfacetb/smollm2-1.7b": replace(
            _SMOLLM2, embed=2048, mlp=8192, layers=24, heads=32, kv_heads=32, rope_theta=130000.0
        ),
    }.items():
        shapes[name] = shapes[f"{name}-instruct"] = a
    return shapes


ARCHITECTURES: dict[str, Architecture] = _built_in()
