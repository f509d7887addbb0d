"""Hugging Face folders: one table of names, read forwards into our tree and backwards into files.

A folder holds config.json, the tokenizer's files and the weights in safetensors, in one file or in
shards under an index. Hugging Face keeps a matrix as [out, in], we keep [in, out]; embed and head
are [vocab, embed] in both.
"""

import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from operator import itemgetter
from pathlib import Path as FilePath
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jobs.records import gib
from trainer.architecture import (
    Architecture,
    ModelError,
    Path,
    from_hf_config,
    leaf_shapes,
    to_hf_config,
)
from trainer.tokenizer import Tokenizer, from_folder
from trainer.update.masters import cast

NAMES: dict[Path, str] = {
    ("embed",): "model.embed_tokens.weight",
    ("norm",): "model.norm.weight",
    ("head",): "lm_head.weight",
    ("layers", "ln1"): "model.layers.{}.input_layernorm.weight",
    ("layers", "ln2"): "model.layers.{}.post_attention_layernorm.weight",
    ("layers", "q"): "model.layers.{}.self_attn.q_proj.weight",
    ("layers", "k"): "model.layers.{}.self_attn.k_proj.weight",
    ("layers", "v"): "model.layers.{}.self_attn.v_proj.weight",
    ("layers", "o"): "model.layers.{}.self_attn.o_proj.weight",
    ("layers", "gate"): "model.layers.{}.mlp.gate_proj.weight",
    ("layers", "up"): "model.layers.{}.mlp.up_proj.weight",
    ("layers", "down"): "model.layers.{}.mlp.down_proj.weight",
    ("layers", "q_bias"): "model.layers.{}.self_attn.q_proj.bias",
    ("layers", "k_bias"): "model.layers.{}.self_attn.k_proj.bias",
    ("layers", "v_bias"): "model.layers.{}.self_attn.v_proj.bias",
    ("layers", "q_norm"): "model.layers.{}.self_attn.q_norm.weight",
    ("layers", "k_norm"): "model.layers.{}.self_attn.k_norm.weight",
}
TRANSPOSED = frozenset({("layers", name) for name in ("q", "k", "v", "o", "gate", "up", "down")})
INDEX = "model.safetensors.index.json"
# transformers' own default; what is held on the host while it is written.
SHARD_BYTES = 5 * 10**9


def tree_from_hf(architecture: Architecture, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our parameter tree from weights by Hugging Face name, all in host memory.

    For goldens and tests; models are loaded by `trainer.weights.load_params`, a leaf at a time.
    """
    tree: dict[str, Any] = {"layers": {}}
    for path, shape in leaf_shapes(architecture).items():
        turn = np.transpose if path in TRANSPOSED else np.asarray
        if path[0] == "layers":
            names = [NAMES[path].format(layer) for layer in range(shape[0])]
            tree["layers"][path[1]] = np.stack([turn(weights[name]) for name in names])
        else:
            tree[path[0]] = np.asarray(weights[NAMES[path]])
    return tree


def hf_tensors(
    params: Mapping[str, Any], architecture: Architecture, dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of each Hugging Face tensor, a layer of a leaf at a time: the inverse map.

    Args:
        params: our tree, layers stacked or one by one; numpy or JAX arrays, or split masters,
            sharded or not.
        architecture: of `params`.
        dtype: of the values; bf16 of a split master is its `hi`.
    """
    paths, layers = leaf_shapes(architecture), params["layers"]
    for path in (path for path in paths if path[0] != "layers"):
        yield NAMES[path], np.asarray(cast(params[path[0]], dtype))
    for layer in range(architecture.layers):
        for path in (path for path in paths if path[0] == "layers"):
            leaf = (
                jax.tree.map(itemgetter(layer), layers[path[1]])
                if isinstance(layers, Mapping)
                else layers[layer][path[1]]
            )
            value = np.asarray(cast(leaf, dtype))
            turned = value.T if path in TRANSPOSED else value
            yield NAMES[path].format(layer), np.ascontiguousarray(turned)


class HfFolder:
    """An open Hugging Face folder: a source of a model's weights.

    Attributes:
        source: the folder, for messages.
        architecture: what config.json describes.
        shapes: of each tensor by the file's own name.
        ignored: names of tensors that are no leaf.
    """

    def __init__(self, folder: FilePath) -> None:
        """Read config.json and the headers of the weight files; weights stay on disk.

        Raises:
            ModelError: a file is missing or broken, or the model is not supported.
        """
        self.source = str(folder)
        self._folder = folder
        self._config = _json(folder / "config.json")
        try:
            self.architecture = from_hf_config(self._config)
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from error
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in _weight_files(folder):
            try:
                opened: Any = safe_open(str(file), framework="np")
            except (OSError, SafetensorError) as error:
                raise ModelError(
                    f"{file}: not readable as safetensors ({error}); "
                    f"it has {gib(file.stat().st_size)}: was its download finished?"
                ) from error
            for name in opened.keys():  # noqa: SIM118 (no dict: it has no __iter__)
                self._files[name] = opened
                self.shapes[name] = tuple(opened.get_slice(name).get_shape())
        # Qwen3 repeats a tied head in its files; old Llama files hold rope's frequencies.
        tied = {NAMES["head",]} if self.architecture.tied_head else set()
        self.ignored = frozenset(
            tied | {name for name in self.shapes if re.search(r"rotary_emb\.inv_freq$", name)}
        )

    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer, with the ends of completion that its configs name."""
        generation = self._folder / "generation_config.json"
        configs = [_json(generation)] if generation.is_file() else []
        ends: list[int] = []
        for config in (*configs, self._config):
            found = config.get("eos_token_id")
            ends += [] if found is None else found if isinstance(found, list) else [found]
        return from_folder(self._folder, eos_ids=ends, pad_id=self._config.get("pad_token_id"))

    def name(self, path: Path, layer: int | None) -> str:
        """What the files call a leaf's tensor."""
        return NAMES[path].format(layer)

    def rows(self, path: Path, *, layer: int | None, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a leaf's tensor, in the type in which it is stored."""
        name = self.name(path, layer)
        return self._files[name].get_slice(name)[start:stop]


def _json(file: FilePath) -> dict[str, Any]:
    if not file.is_file():
        raise ModelError(
            f"{file.parent}: no {file.name} there; a Hugging Face folder has config.json, "
            "*.safetensors and tokenizer.json"
        )
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise ModelError(f"{file}: holds a JSON {type(parsed).__name__}; an object is needed")
    return parsed


def _weight_files(folder: FilePath) -> list[FilePath]:
    """The safetensors files that make up the model: the index's, or the only one there."""
    if (folder / INDEX).is_file():
        listed = sorted(set(_json(folder / INDEX).get("weight_map", {}).values()))
        missing = [name for name in listed if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder}: {INDEX} lists {len(listed)} files, of which {len(missing)} are missing "
                f"({missing[0]}); finish the download or the copy"
            )
        return [folder / name for name in listed]
    found = sorted(folder.glob("*.safetensors"))
    whole = [file for file in found if file.name == "model.safetensors"] or found
    if len(whole) == 1:
        return whole
    others = sorted(file.name for file in (*folder.glob("*.bin"), *folder.glob("*.pth")))
    raise ModelError(
        f"{folder}: {len(found)} safetensors files and no {INDEX}"
        + (f", but {others[0]}, which is pickle and is not read" if others else "")
        + "; wanted: model.safetensors, or shards with that index "
        "(transformers writes them: model.save_pretrained(folder))"
    )


def save_hf_folder(
    params: Mapping[str, Any],
    folder: FilePath,
    *,
    architecture: Architecture,
    tokenizer: Tokenizer,
    dtype: Any = np.float32,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a tree that is in memory as a Hugging Face folder; see `write_hf_folder`.

    Args:
        params: our tree; numpy or JAX arrays.
        folder: must not exist, or be empty.
        architecture: of `params`.
        tokenizer: its files are written, and its ids into both configs.
        dtype: in which weights are stored: float32, bfloat16 or float16.
        shard_bytes: most weights in one file (a single larger tensor still gets its own).

    Raises:
        ModelError: there is something in the folder, or the type is none of the three.
    """
    write_hf_folder(
        hf_tensors(params, architecture, np.dtype(dtype)),
        folder,
        architecture=architecture,
        tokenizer=tokenizer,
        dtype=dtype,
        shard_bytes=shard_bytes,
    )


def write_hf_folder(
    tensors: Iterator[tuple[str, np.ndarray]],
    folder: FilePath,
    *,
    architecture: Architecture,
    tokenizer: Tokenizer,
    dtype: Any,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder that transformers, vLLM, sglang and `open_model` read.

    The folder appears whole or not at all. Host memory: one shard, and what `tensors` holds.

    Args:
        tensors: Hugging Face's names and layout, each once, in any order, of `dtype`.
        folder: must not exist, or be empty.
        architecture: of the tensors.
        tokenizer: its files are written, and its ids into both configs.
        dtype: in which weights are stored: float32, bfloat16 or float16.
        shard_bytes: most weights in one file (a single larger tensor still gets its own).

    Raises:
        ModelError: there is something in the folder, or the type is none of the three.
    """
    stored = np.dtype(dtype)
    if stored not in (np.float32, np.float16, ml_dtypes.bfloat16):
        raise ModelError(f"dtype = {stored}; supported: float32, bfloat16, float16")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(
            f"{folder}: there is something already; name a folder that is new or empty"
        )
    if folder.is_symlink() or folder.is_mount():
        raise ModelError(f"{folder} cannot be put in place at once: name a folder below it")
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    part.mkdir(parents=True)
    try:
        tokenizer.save(part)
        _write_configs(part, architecture=architecture, tokenizer=tokenizer, dtype=stored.name)
        _write_shards(part, tensors, shard_bytes)
        part.replace(folder)
    except BaseException:
        shutil.rmtree(part)
        raise


def _write_configs(
    folder: FilePath, *, architecture: Architecture, tokenizer: Tokenizer, dtype: str
) -> None:
    ends = tokenizer.eos_ids[0] if len(tokenizer.eos_ids) == 1 else list(tokenizer.eos_ids)
    ids = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    if tokenizer.bos_id is not None:
        ids["bos_token_id"] = tokenizer.bos_id
    for name, content in {
        "config.json": to_hf_config(architecture, dtype=dtype) | ids,
        "generation_config.json": ids,
    }.items():
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _write_shards(
    folder: FilePath, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
    """Shards are numbered when their count is known: written under a number, renamed after."""
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = in_shard = 0

    def flush() -> None:
        save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, value in tensors:
        if held and in_shard + value.nbytes > shard_bytes:
            flush()
            in_shard = 0
        held[name] = value
        in_shard += value.nbytes
        total += value.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
