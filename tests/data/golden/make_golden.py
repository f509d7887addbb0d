"""Makes the golden files: logprobs of three tiny random models, computed by torch and transformers.

Run once, in an environment of its own (torch is no dependency of headroom):

    python3.11 -m venv /tmp/golden && /tmp/golden/bin/pip install torch==2.13.0 transformers==4.57.6
    /tmp/golden/bin/python tests/data/golden/make_golden.py tests/data/golden

Made with Python 3.11.7, torch 2.13.0 (CPU), transformers 4.57.6, numpy 2.4.6: the same is in each
file under `versions`. README.md beside this file says what the files hold.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

LENGTHS = (40, 29, 13)  # tokens of each row; the rest of its 40 is padding, on the right
PAD = 0
SHARED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
}
MODELS = {
    # Wavelengths are 6.3, 14, 32, 73, ... tokens: with 32 original positions the scaling leaves the
    # first alone, bends the second and third and stretches the others, all within 40 tokens.
    "llama": {
        "head_dim": 32,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen2": {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    "qwen3": {
        "head_dim": 32,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
}
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def weight(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """f32 values on a grid of 1/64, so that float16 holds them exactly and the file stays small."""
    spread = 0.4 if name.endswith("bias") else 0.25 if "norm" in name else 0.125
    centre = 1.0 if "norm" in name else 0.0
    grid = np.round((centre + spread * random.standard_normal(shape)) * 64) / 64
    return grid.astype(np.float32)


def logprobs_of(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[batch, seq, vocab]: ln p of every token after each position."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    return torch.log_softmax(logits, dim=-1).numpy()


def golden(family: str, seed: int) -> dict[str, np.ndarray]:
    """Everything the file of one family holds."""
    config_class = getattr(transformers, f"{CLASSES[family]}Config")
    config = config_class(**SHARED, **MODELS[family], attn_implementation="eager")
    model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config).float().eval()
    random = np.random.default_rng(seed)
    weights = {
        name: weight(name, tuple(value.shape), random)
        for name, value in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    missing = model.load_state_dict({k: torch.tensor(v) for k, v in weights.items()}, strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - {"lm_head.weight"}:
        raise SystemExit(f"{family}: {missing}")
    model.tie_weights()

    ids = random.integers(1, config.vocab_size, (len(LENGTHS), max(LENGTHS)), dtype=np.int64)
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    ids = np.where(mask == 1, ids, PAD)
    every = logprobs_of(model, ids, mask)
    every_f64 = logprobs_of(model.double(), ids, mask)
    chosen = np.take_along_axis(every[:, :-1], ids[:, 1:, None], axis=2)[..., 0] * mask[:, 1:]
    last = every[np.arange(len(LENGTHS)), np.array(LENGTHS) - 1]
    rounding = np.abs(every - every_f64)[mask == 1].max()
    sys.stdout.write(f"{family}: f32 and f64 logprobs differ by {rounding:.1e} at most\n")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"numpy": np.__version__, "python": sys.version.split()[0]}
    return {
        "config": np.array(json.dumps(config.to_dict(), sort_keys=True)),
        "versions": np.array(json.dumps(versions)),
        "ids": ids.astype(np.int32),
        "mask": mask.astype(np.int32),
        "logprobs": chosen.astype(np.float32),
        "last_logprobs": last.astype(np.float32),
    } | {f"weights/{name}": value.astype(np.float16) for name, value in weights.items()}


def main(folder: Path) -> None:
    """Write one file a family."""
    torch.set_num_threads(2)
    for seed, family in enumerate(MODELS):
        np.savez_compressed(folder / f"{family}.npz", **golden(family, seed))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
