"""The decoder once more, in float64 NumPy and loops, straight from the papers' equations."""

import math
from typing import Any

import numpy as np

from research.models.config import ModelConfig, PositionConfig


def plain_logits(
    config: ModelConfig,
    params: Any,
    tokens: np.ndarray,
    positions: np.ndarray,
    segments: np.ndarray,
) -> np.ndarray:
    """Logits `[T, V]` of one row."""
    params = _double(params)
    x = params["embed"]["embedding"][tokens]
    if config.scale_embeddings:
        x = x * math.sqrt(config.embed_dim)
    if config.position.kind == "learned":
        x = x + params["position_embed"]["embedding"][positions]
    if config.position.kind == "sinusoidal":
        x = x + np.stack([_wave(int(p), config.embed_dim) for p in positions])
    for layer in range(config.num_layers):
        weights = params[f"layers_{layer}"]
        for sublayer, norm in (("attention", "attention_norm"), ("mlp", "mlp_norm")):
            pre = config.norm.placement == "pre"
            y = _norm(config, weights[norm], x) if pre else x
            if sublayer == "attention":
                y = _attention(config, weights["attention"], y, positions, segments)
            else:
                y = _mlp(config, weights["mlp"], y)
            x = x + y if pre else _norm(config, weights[norm], x + y)
    if config.norm.placement == "pre":
        x = _norm(config, params["final_norm"], x)
    return x @ (params["embed"]["embedding"].T if config.tied_embeddings else params["unembed"])


def _double(tree: Any) -> Any:
    return (
        {k: _double(v) for k, v in tree.items()}
        if isinstance(tree, dict)
        else np.asarray(tree, np.float64)
    )


def _norm(config: ModelConfig, weights: Any, x: np.ndarray) -> np.ndarray:
    if config.norm.kind == "layernorm":
        x = x - x.mean(axis=-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm.epsilon) * weights["scale"]
    return y + weights["bias"] if config.norm.bias else y


def _wave(position: int, width: int) -> np.ndarray:
    angles = [position / 10_000 ** (2 * (i // 2) / width) for i in range(width)]
    return np.array(
        [math.cos(angle) if i % 2 else math.sin(angle) for i, angle in enumerate(angles)]
    )


def _turn(config: PositionConfig, vector: np.ndarray, position: int) -> np.ndarray:
    """Multiplies each pair of columns, taken as a complex number, by e^(i position frequency)."""
    half = len(vector) // 2
    frequencies = [config.theta ** (-2 * i / len(vector)) for i in range(half)]
    pairs = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * np.array(frequencies))
    return np.concatenate([pairs.real, pairs.imag])


def _linear(weights: Any, x: np.ndarray, axes: int = 1) -> np.ndarray:
    y = np.tensordot(x, weights["kernel"], axes)
    return y + weights["bias"] if "bias" in weights else y


def _attention(
    config: ModelConfig, weights: Any, x: np.ndarray, positions: np.ndarray, segments: np.ndarray
) -> np.ndarray:
    c = config.attention
    q, k, v = (_linear(weights[name], x) for name in ("query", "key", "value"))
    if config.position.kind == "rotary":
        for array in (q, k):
            for t, head in np.ndindex(array.shape[:2]):
                array[t, head] = _turn(config.position, array[t, head], int(positions[t]))
    out = np.zeros_like(q)
    for n, t in np.ndindex(c.num_heads, len(x)):
        group = n // (c.num_heads // c.num_kv_heads)
        seen = [s for s in range(t + 1) if segments[s] == segments[t] != 0]
        if not seen:
            continue
        scores = np.array([q[t, n] @ k[s, group] / math.sqrt(c.head_dim) for s in seen])
        if config.position.kind == "alibi":
            assert c.num_heads & (c.num_heads - 1) == 0
            scores -= 2 ** (-8 * (n + 1) / c.num_heads) * (positions[t] - positions[seen])
        probabilities = np.exp(scores - scores.max())
        out[t, n] = probabilities / probabilities.sum() @ v[seen, group]
    return _linear(weights["out"], out, axes=2)


def _mlp(config: ModelConfig, weights: Any, x: np.ndarray) -> np.ndarray:
    up = _linear(weights["up"], x)
    gate = _linear(weights["gate"], x) if config.mlp.gated else up
    act = {
        "relu": lambda z: np.maximum(z, 0),
        "silu": lambda z: z / (1 + np.exp(-z)),
        "gelu": lambda z: z * (1 + np.vectorize(math.erf)(z / math.sqrt(2))) / 2,
        "gelu_tanh": lambda z: (
            z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
        ),
    }[config.mlp.activation](gate)
    return _linear(weights["down"], act * up if config.mlp.gated else act)
