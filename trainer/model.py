"""The decoder as functions of its parameter tree: Llama, Qwen2 and Qwen3.

Parameters: {"embed", "norm", "head" (absent when tied), "layers": {...}}, leaf shapes in
`architecture.leaf_shapes`. Weights are cast to the activations' dtype where they are used; norms,
rotary angles, softmax and logits are computed in f32. Positions are counted from each sequence's
first token, and sequences are padded on the right, so a causal mask is all the mask there is.

Source: transformers 4.55.4, modeling_llama.py, modeling_qwen2.py, modeling_qwen3.py.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from trainer.architecture import Architecture

Weights = Mapping[str, Any]
# (q, k, v) of one layer, after rope -> (their attention, whatever the caller wants to keep)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def rope_frequencies(architecture: Architecture) -> np.ndarray:
    """Radians a position for each rotary pair, f32[head_dim / 2].

    Source: arXiv:2104.09864; llama3 scaling as `_compute_llama3_parameters` of transformers.
    """
    a = architecture
    frequencies = a.rope_theta ** (-np.arange(0, a.head_dim, 2, dtype=np.float64) / a.head_dim)
    s = a.rope_scaling
    if s is not None:
        wavelengths = 2 * np.pi / frequencies
        ratio = s.original_max_position / wavelengths
        smooth = (ratio - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        blend = np.clip(smooth, 0.0, 1.0)  # 0: slow, divided by factor; 1: fast, left alone
        frequencies = frequencies / s.factor * (1 - blend) + frequencies * blend
    return frequencies.astype(np.float32)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMS norm over the last axis, computed in f32, in x's dtype: x / rms(x) * scale.

    Source: arXiv:1910.07467, equation 4.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotary position embedding, neox halves.

    Args:
        x: [batch, seq, heads, head_dim].
        angles: f32[batch, seq, head_dim / 2].

    Returns:
        As x, in x's dtype.
    """
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
    """Each position attends to itself and what came before.

    Args:
        q: [batch, seq, heads, head_dim].
        k: [batch, seq, kv_heads, head_dim].
        v: as k.

    Returns:
        [batch, seq, heads, head_dim], and nothing to keep.
    """
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), None


def decoder_layer(
    x: jax.Array,
    weights: Weights,
    architecture: Architecture,
    *,
    angles: jax.Array,
    attend: Attend,
) -> tuple[jax.Array, Any]:
    """One layer of the decoder.

    Args:
        x: [batch, seq, embed].
        weights: one layer's leaves, without the layers axis.
        architecture: the model's.
        angles: rotary angles, f32[batch, seq, head_dim / 2].
        attend: given q [batch, seq, heads, head_dim] and k, v [batch, seq, kv_heads, head_dim].

    Returns:
        [batch, seq, embed], and what `attend` kept.
    """
    a = architecture
    w = {name: leaf.astype(x.dtype) for name, leaf in weights.items()}
    h = rms_norm(x, weights["ln1"], a.norm_eps)
    q, k, v = (_project(h, w, name, a) for name in ("q", "k", "v"))
    if a.qk_norm:
        q = rms_norm(q, weights["q_norm"], a.norm_eps)
        k = rms_norm(k, weights["k_norm"], a.norm_eps)
    context, kept = attend(rotate(q, angles), rotate(k, angles), v)
    x = x + context.reshape(*x.shape[:-1], -1) @ w["o"]
    h = rms_norm(x, weights["ln2"], a.norm_eps)
    return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], kept


def _project(h: jax.Array, w: Weights, name: str, a: Architecture) -> jax.Array:
    """q, k or v, [batch, seq, its heads, head_dim]."""
    y = h @ w[name]
    if a.attention_bias:
        y = y + w[f"{name}_bias"]
    return y.reshape(*h.shape[:-1], -1, a.head_dim)


def position_angles(positions: jax.Array, architecture: Architecture) -> jax.Array:
    """Rotary angles of i32[batch, seq] positions, f32[batch, seq, head_dim / 2]."""
    return positions[..., None].astype(jnp.float32) * rope_frequencies(architecture)


def hidden_states(
    params: Weights,
    tokens: jax.Array,
    architecture: Architecture,
    *,
    dtype: Any,
    remat: bool,
    activations: NamedSharding | None = None,
) -> jax.Array:
    """What the head reads, for whole sequences.

    Args:
        params: the parameter tree, layers stacked or a list of one tree a layer.
        tokens: i32[batch, seq], padded on the right.
        architecture: the model's.
        dtype: of the activations.
        remat: keep only each layer's input for the backward pass.
        activations: how [batch, seq, embed] is held to lie at each layer; None: as XLA likes, which
            may share out what is computed in other ways than its sequences.

    Returns:
        dtype[batch, seq, embed], normed.
    """
    batch, seq = tokens.shape
    angles = position_angles(jnp.broadcast_to(jnp.arange(seq), (batch, seq)), architecture)

    def layer(x: jax.Array, weights: Weights) -> tuple[jax.Array, None]:
        if activations is not None:
            x = jax.lax.with_sharding_constraint(x, activations)
        return decoder_layer(x, weights, architecture, angles=angles, attend=causal_attention)

    x, layers = params["embed"].astype(dtype)[tokens], params["layers"]
    one = jax.checkpoint(layer) if remat else layer
    if isinstance(layers, list):
        for weights in layers:
            x, _ = one(x, weights)
    else:
        x, _ = jax.lax.scan(one, x, layers)
    return rms_norm(x, params["norm"], architecture.norm_eps)


def logits(params: Weights, hidden: jax.Array) -> jax.Array:
    """f32[..., vocab] of hidden [..., embed]; products accumulate in f32."""
    head = params.get("head", params["embed"])
    return jnp.einsum(
        "...e,ve->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def token_logprobs(
    params: Weights,
    hidden: jax.Array,
    targets: jax.Array,
    *,
    temperature: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """The targets' ln p and the entropy of each position, logits existing for one chunk at a time.

    Args:
        params: the parameter tree.
        hidden: [batch, seq, embed], the position before each target.
        targets: i32[batch, seq].
        temperature: logits are divided by it, above 0.
        chunk: positions of each sequence whose logits exist at once.

    Returns:
        f32[batch, seq] and f32[batch, seq], nats.
    """
    batch, seq, _ = hidden.shape
    chunks = math.ceil(seq / chunk)
    padded = chunks * chunk - seq

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padded), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z = logits(params, part[0]) / temperature
        log_norm = jax.nn.logsumexp(z, axis=-1)
        chosen = jnp.take_along_axis(z, part[1][..., None], axis=-1)[..., 0]
        probabilities = jnp.exp(z - log_norm[..., None])
        return chosen - log_norm, log_norm - jnp.sum(probabilities * z, axis=-1)

    found, entropy = jax.lax.map(one, (split(hidden), split(targets)))
    join = lambda y: jnp.moveaxis(y, 0, 1).reshape(batch, -1)[:, :seq]
    return join(found), join(entropy)
