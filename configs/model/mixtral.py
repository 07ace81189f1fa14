"""Mixtral: `configs/model/mixtral.py:8x7b`, `8x22b`.

Sources: Jiang et al. 2024, arXiv:2401.04088, table 1 (8x7B); the model cards and `config.json`
released with the weights. Neither states a balance loss. Parameters: 46,702,792,704, of which
a token uses 12.9 billion; 140,630,071,296, of which it uses 39.
"""

import ml_collections

from research.core.errors import UserError, nearest

# vocabulary, longest sequence, layers, width, heads, width of an expert
SIZES = {
    "8x7b": (32_000, 32_768, 32, 4096, 32, 14_336),
    "8x22b": (32_768, 65_536, 56, 6144, 48, 16_384),
}


def get_config(size: str = "8x7b") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a Mixtral. {nearest(size, SIZES)}")
    vocab_size, max_length, layers, width, heads, hidden = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "vocab_size": vocab_size,
            "num_layers": layers,
            "embed_dim": width,
            "max_length": max_length,
            "attention": {"num_heads": heads, "num_kv_heads": 8, "head_dim": 128},
            "mlp": {"hidden_dim": hidden, "activation": "silu", "gated": True},
            "experts": {
                "num_experts": 8,
                "experts_per_token": 2,
                "hidden_dim": hidden,
                "score": "softmax",
                "renormalize": True,
            },
            "norm": {"kind": "rmsnorm", "placement": "pre", "epsilon": 1e-5},
            "position": {"kind": "rotary", "theta": 1e6},
            "tied_embeddings": False,
        }
    )
