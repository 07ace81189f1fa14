"""Gemma 2 and 3, all sizes: `configs/model/gemma.py:2-9b`, `3-270m`, `3-27b`, …

Sources: Gemma Team 2024, arXiv:2408.00118, table 1 (Gemma 2); Gemma Team 2025, arXiv:2503.19786,
table 1 and section 2 (Gemma 3); the model card of 3 270M; epsilons, rotary bases and the scale of
the queries from the `config.json` released with the weights. Parameters:

    2  2b 2,614,341,888     9b 9,241,705,984     27b 27,227,128,320
    3  270m 268,098,176     1b 999,885,952       4b 3,880,263,168     12b 11,766,034,176     27b
    27,009,346,304

Gemma 3 from 4B on also takes images; this is its text tower, with the 64 rows of the vocabulary
that are for images. Queries are scaled by 1 / √H, except for the two 27B, where it is
1 / √(model width / heads).
"""

import math
from typing import Any

import ml_collections

from research.core.errors import UserError, nearest


def _three(
    max_length: int, window: int, factor: float | None, vocab_size: int = 262_208
) -> dict[str, Any]:
    """Returns what Gemma 3 has: normalized queries and keys, and five local layers to a global one
    of another base.
    """
    local = {"window": window, "position": {"kind": "rotary", "theta": 1e4}}
    scaling = None if factor is None else {"kind": "linear", "factor": factor}
    return {
        "vocab_size": vocab_size,
        "max_length": max_length,
        "attention": {"qk_norm": "head"},
        "position": {"kind": "rotary", "theta": 1e6, "scaling": scaling},
        "pattern": [local] * 5 + [{}],
    }


TWO = {
    "vocab_size": 256_000,
    "max_length": 8192,
    "attention": {"softcap": 50.0},
    "position": {"kind": "rotary", "theta": 1e4},
    "pattern": [{"window": 4096}, {}],
    "head": {"softcap": 30.0},
}
THREE_TINY = _three(32_768, window=512, factor=None, vocab_size=262_144)
THREE = _three(131_072, window=1024, factor=8.0)

# what its generation has, then layers, width, heads, key/value heads, head width, MLP width, what
# queries are scaled by
SIZES = {
    "2-2b": (TWO, 26, 2304, 8, 4, 256, 9216, 256),
    "2-9b": (TWO, 42, 3584, 16, 8, 256, 14_336, 256),
    "2-27b": (TWO, 46, 4608, 32, 16, 128, 36_864, 144),
    "3-270m": (THREE_TINY, 18, 640, 4, 1, 256, 2048, 256),
    "3-1b": (THREE_TINY, 26, 1152, 4, 1, 256, 6912, 256),
    "3-4b": (THREE, 34, 2560, 8, 4, 256, 10_240, 256),
    "3-12b": (THREE, 48, 3840, 16, 8, 256, 15_360, 256),
    "3-27b": (THREE, 62, 5376, 32, 16, 128, 21_504, 168),
}


def get_config(size: str = "3-1b") -> ml_collections.ConfigDict:
    """Returns the model of one generation and size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a Gemma. {nearest(size, SIZES)}")
    generation, layers, width, heads, kv_heads, head_dim, hidden, query_width = SIZES[size]
    config = ml_collections.ConfigDict(
        {
            "num_layers": layers,
            "embed_dim": width,
            "attention": {
                "num_heads": heads,
                "num_kv_heads": kv_heads,
                "head_dim": head_dim,
                "scale": 1 / math.sqrt(query_width),
            },
            "mlp": {"hidden_dim": hidden, "activation": "gelu_tanh", "gated": True},
            "norm": {
                "kind": "rmsnorm",
                "placement": "sandwich",
                "epsilon": 1e-6,
                "unit_offset": True,
            },
            "tied_embeddings": True,
            "scale_embeddings": True,
        }
    )
    config.update(generation)
    return config
