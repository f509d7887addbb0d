"""Reading a GGUF file: architecture, tokenizer, and weights dequantized a block of rows at a time.

llama.cpp's converter renames what Hugging Face calls the weights, and for the llama family it also
reorders the rows of q and k, so that rope turns neighbouring pairs instead of halves; `rows` undoes
both. Source of names and order: llama.cpp's convert_hf_to_gguf.py, and gguf's constants.
"""

import math
from pathlib import Path as FilePath
from typing import Any, cast

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from trainer.architecture import (
    CLASSES,
    SUPPORTED,
    Architecture,
    Family,
    ModelError,
    Path,
    RopeScaling,
)
from trainer.tokenizer import Tokenizer, from_gguf

NAMES: dict[Path, str] = {
    ("embed",): "token_embd.weight",
    ("norm",): "output_norm.weight",
    ("head",): "output.weight",
    ("layers", "ln1"): "blk.{}.attn_norm.weight",
    ("layers", "ln2"): "blk.{}.ffn_norm.weight",
    ("layers", "q"): "blk.{}.attn_q.weight",
    ("layers", "k"): "blk.{}.attn_k.weight",
    ("layers", "v"): "blk.{}.attn_v.weight",
    ("layers", "o"): "blk.{}.attn_output.weight",
    ("layers", "gate"): "blk.{}.ffn_gate.weight",
    ("layers", "up"): "blk.{}.ffn_up.weight",
    ("layers", "down"): "blk.{}.ffn_down.weight",
    ("layers", "q_bias"): "blk.{}.attn_q.bias",
    ("layers", "k_bias"): "blk.{}.attn_k.bias",
    ("layers", "v_bias"): "blk.{}.attn_v.bias",
    ("layers", "q_norm"): "blk.{}.attn_q_norm.weight",
    ("layers", "k_norm"): "blk.{}.attn_k_norm.weight",
}
ROPE_FACTORS = "rope_freqs.weight"


def halves_from_pairs(rows: int, heads: int) -> np.ndarray:
    """Where each row of a Hugging Face q or k lies in a llama GGUF: i64[rows].

    Within a head of d rows Hugging Face turns row i with row i + d/2; llama.cpp has laid those two
    next to each other, at 2i and 2i + 1.

    >>> halves_from_pairs(8, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


class GgufFile:
    """An open GGUF file: a source of a model's weights.

    Attributes:
        source: the file, for messages.
        architecture: what its metadata describes.
        shapes: of each tensor by the file's own name, rows first.
        ignored: names of tensors that are no leaf.
    """

    def __init__(self, path: FilePath) -> None:
        """Read the metadata; weights stay on disk.

        Raises:
            ModelError: no GGUF file, a broken one, or a model that is not supported.
        """
        self.source = str(path)
        try:
            reader = GGUFReader(str(path))
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ModelError(
                f"{path}: not readable as a GGUF file ({error}); "
                f"it has {path.stat().st_size if path.is_file() else 0} bytes: "
                "was its download finished?"
            ) from error
        self._metadata = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes = {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self.ignored = frozenset({ROPE_FACTORS})
        try:
            self.architecture = self._read_architecture()
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in its metadata."""
        return from_gguf(self._metadata, source=self.source)

    def name(self, path: Path, layer: int | None) -> str:
        """What the file calls a leaf's tensor."""
        return NAMES[path].format(layer)

    def rows(self, path: Path, *, layer: int | None, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a leaf's tensor, in Hugging Face's order: f32[rows, ...]."""
        a, tensor = self.architecture, self._tensors[self.name(path, layer)]
        data = tensor.data
        if a.family == "llama" and path in (("layers", "q"), ("layers", "k")):
            heads = a.heads if path[1] == "q" else a.kv_heads
            block = data[halves_from_pairs(len(data), heads)[start:stop]]
        else:
            block = data[start:stop]
        return dequantize(np.ascontiguousarray(block), tensor.tensor_type)

    def _field(self, key: str) -> Any:
        full = f"{self._metadata['general.architecture']}.{key}"
        if full not in self._metadata:
            raise ModelError(f"its metadata lacks {full}; take another GGUF file")
        return self._metadata[full]

    def _has(self, key: str) -> bool:
        return f"{self._metadata['general.architecture']}.{key}" in self._metadata

    def _decimal(self, key: str) -> float:
        """A float, as it was before GGUF stored it in 32 bits: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(self._field(key))))

    def _read_architecture(self) -> Architecture:
        found = self._metadata.get("general.architecture")
        if found not in CLASSES or self._has("expert_count"):
            what = " with experts" if found in CLASSES else ""
            raise ModelError(f"general.architecture = {found!r}{what}; {SUPPORTED}")
        heads, embed = (
            int(self._field("attention.head_count")),
            int(self._field("embedding_length")),
        )
        head_dim = self._field("attention.key_length") if self._has("attention.key_length") else 0
        head_dim = int(head_dim) if head_dim else embed // heads
        theta = self._decimal("rope.freq_base") if self._has("rope.freq_base") else 10000.0
        return Architecture(
            family=cast("Family", found),
            vocab=self.shapes.get(NAMES["embed",], (1,))[0],  # that it is missing is told later
            embed=embed,
            mlp=int(self._field("feed_forward_length")),
            layers=int(self._field("block_count")),
            heads=heads,
            kv_heads=int(self._field("attention.head_count_kv")),
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=self._rope_scaling(theta, head_dim),
            norm_eps=self._decimal("attention.layer_norm_rms_epsilon"),
            tied_head=NAMES["head",] not in self.shapes,
            attention_bias=found == "qwen2",
            qk_norm=found == "qwen3",
            max_position=int(self._field("context_length")),
        )

    def _rope_scaling(self, theta: float, head_dim: int) -> RopeScaling | None:
        """Llama 3's scaling, which GGUF keeps as one divisor a frequency and not as its rule."""
        kind = self._field("rope.scaling.type") if self._has("rope.scaling.type") else "none"
        if kind != "none":
            raise ModelError(f"rope.scaling.type = {kind!r}; supported: none, llama3")
        if ROPE_FACTORS not in self._tensors:
            return None
        divisors = np.asarray(self._tensors[ROPE_FACTORS].data, np.float32)
        scaling = RopeScaling(
            factor=float(divisors.max()),
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=8192,
        )
        expected = llama3_divisors(scaling, theta=theta, head_dim=head_dim)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
            raise ModelError(
                f"the divisors in {ROPE_FACTORS} are not those of Llama 3 "
                "(low 1, high 4, 8192 original positions); take the model's Hugging Face folder"
            )
        return scaling


def llama3_divisors(scaling: RopeScaling, *, theta: float, head_dim: int) -> np.ndarray:
    """What each rotary frequency is divided by under llama3 scaling: f64[head_dim / 2].

    Source: transformers' _compute_llama3_parameters, written as a divisor.
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling.factor + smooth)
